//! Events as lines of text.

use std::fmt;

use abi::setting::read_back;

use super::{Action, Event, Kind, Limit, Socket, Via};
use crate::{
    errno,
    escape::Escape,
    options::{self, SocketOption, display_name},
    policy::model::Form,
    values,
};

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = display_name(self.key);
        let shown = |value| values::text(self.key, value);
        match self.kind {
            Kind::Outcome { errno } => {
                write!(f, "failed    {option} = {}: {}", shown(&self.wanted), errno::name(errno))?;
            }
            Kind::Call(call) => {
                write!(f, "call      {} {} {option} = {}", self.actor(), call.name(), shown(&self.requested))?;
                self.write_result(f)?;
            }
            Kind::Mismatch => {
                write!(f, "mismatch  {} read {option} = {}", self.actor(), shown(&self.requested))?;
                self.write_policy(f)?;
                self.write_result(f)?;
            }
            Kind::Conflict { verdict } => {
                write!(f, "conflict  {} requested {option} = {}", self.actor(), shown(&self.requested))?;
                self.write_policy(f)?;
                write!(f, ": {verdict}")?;
                if self.applied.len > 0 && verdict.what == Action::Clamped {
                    write!(f, " to {}", shown(&self.applied))?;
                }
                if self.current.len > 0 {
                    write!(f, ", now {}", shown(&self.current))?;
                }
                self.write_result(f)?;
            }
            Kind::Drift => self.write_drift(f)?,
            Kind::Applied { before, after } => {
                write!(f, "applied   {} {option}: {} -> {}", self.actor(), shown(&before), shown(&after))?;
            }
            Kind::Unknown { why } => write!(f, "unknown   {} {option}: {why}", self.actor())?,
            Kind::WouldApply => {
                write!(
                    f,
                    "apply     {} {option}: {} -> {} (dry run)",
                    self.actor(),
                    shown(&self.current),
                    shown(&self.wanted)
                )?;
            }
        }
        if let Some(cause) = &self.cause {
            write!(f, "  ({}, rule {})", cause.place.escaped(), cause.rule.escaped())?;
        }
        if let Some(socket) = &self.socket {
            write_socket(f, socket)?;
        }
        if let Some(duration) = self.duration_ns {
            write!(f, "  <{}>", values::duration_text(duration))?;
        }
        if let Some(via @ (Via::CompatSyscall | Via::IoUring)) = self.via {
            write!(f, "  by {}", via.name())?;
        }
        if self.suppressed > 0 {
            write!(f, "  (+{} suppressed)", self.suppressed)?;
        }
        Ok(())
    }
}

impl Event {
    fn actor(&self) -> String {
        let Some(task) = &self.task else { return "a process".to_owned() };
        let inside = task.container.as_ref().map_or_else(String::new, |container| format!(" in {container}"));
        format!("{}[{}]{inside}", task.comm.escaped(), task.pid)
    }

    fn write_drift(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, now) = (display_name(self.key), values::text(self.key, &self.current));
        write!(f, "drift     {} {name} is {now}", self.actor())?;
        let is_doubled =
            |option: &SocketOption| option.settable().is_some_and(|settable| settable.read_back == read_back::DOUBLED);
        if options::by_key(self.key).is_some_and(is_doubled) {
            f.write_str(" (doubled by the kernel)")?;
        }
        self.write_policy(f)
    }

    /// Writes what the policy wants: a limit or a value. Writes nothing if the policy denies all calls.
    fn write_policy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause.as_ref().and_then(|cause| cause.limit) {
            Some(Limit { min, max }) => {
                write!(f, " (policy: {})", values::form_text(self.key, &Form::Limit { min, max }))
            }
            None if self.wanted.len > 0 => write!(f, " (policy: {})", values::text(self.key, &self.wanted)),
            None => Ok(()),
        }
    }

    fn write_result(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Some(result) if result < 0 => {
                write!(
                    f,
                    ", call failed with {}",
                    errno::name(i32::try_from(result.saturating_neg()).unwrap_or_default())
                )
            }
            _ => Ok(()),
        }
    }
}

fn write_socket(f: &mut fmt::Formatter<'_>, socket: &Socket) -> fmt::Result {
    let protocol = socket.protocol.or(socket.family).unwrap_or("socket");
    match (socket.local, socket.remote) {
        (Some(local), Some(remote)) => write!(f, "  {protocol} {local} - {remote}"),
        (Some(local), None) => write!(f, "  {protocol} {local}"),
        (None, Some(remote)) => write!(f, "  {protocol} - {remote}"),
        (None, None) => write!(f, "  {protocol}"),
    }
}
