//! An event as a line for people.

use std::fmt;

use super::{Call, Deed, Event, Kind, Socket, Via};
use crate::{options::display_name, report::errno_name, values};

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = display_name(self.key);
        let shown = |value| values::text(self.key, value);
        match self.kind {
            Kind::Outcome { errno } => {
                write!(f, "failed    {option} = {} was refused: {}", shown(&self.wanted), errno_name(errno))?;
            }
            Kind::Call(call) => {
                write!(f, "call      {} {} {option} = {}", self.who(), call.name(), shown(&self.asked))?;
                self.write_result(f)?;
            }
            Kind::Conflict { call, verdict } => {
                let verb = match call {
                    Call::Set => "asked for",
                    Call::Get => "was shown",
                };
                write!(f, "conflict  {} {verb} {option} = {}", self.who(), shown(&self.asked))?;
                if self.wanted.len > 0 {
                    write!(f, ", policy wants {}", shown(&self.wanted))?;
                }
                write!(f, ": {verdict}")?;
                if self.given.len > 0 && verdict.what == Deed::Clamped {
                    write!(f, " to {}", shown(&self.given))?;
                }
                if self.now.len > 0 && call == Call::Set {
                    write!(f, ", now {}", shown(&self.now))?;
                }
                self.write_result(f)?;
            }
        }
        if let Some(cause) = &self.cause {
            write!(f, "  ({}, rule {})", cause.place, cause.rule)?;
        }
        if let Some(socket) = &self.socket {
            write_socket(f, socket)?;
        }
        if let Some(duration) = self.duration_ns {
            write!(f, "  <{}>", crate::report::duration_text(duration))?;
        }
        if let Some(via @ (Via::CompatSyscall | Via::IoUring)) = self.via {
            write!(f, "  by {}", via.name())?;
        }
        if self.suppressed > 0 {
            write!(f, "  (+{} like it)", self.suppressed)?;
        }
        Ok(())
    }
}

impl Event {
    fn who(&self) -> String {
        let Some(task) = &self.task else { return "a process".to_owned() };
        let inside = task.container.as_ref().map_or_else(String::new, |container| format!(" in {container}"));
        format!("{}[{}]{inside}", task.comm, task.pid)
    }

    fn write_result(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Some(result) if result < 0 => {
                write!(f, ", call failed with {}", errno_name(i32::try_from(-result).unwrap_or_default()))
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
