//! Events as lines of text.

use std::fmt;

use abi::setting::Value;

use super::{Action, Cause, Event, Kind, Limit, Socket, Via};
use crate::{
    errno,
    escape::Escape,
    options::{self, display_name},
    policy::model::Form,
    values,
};

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = display_name(self.key);
        match self.kind {
            Kind::Outcome { errno } => {
                write!(f, "failed    {option} = {}: {}", self.wanted(), errno::name(errno))?;
            }
            Kind::Call(call) => {
                let requested = self.passed(&self.requested());
                write!(f, "call      {} {} {option} = {requested}", self.actor(), call.name())?;
                self.write_result(f)?;
            }
            Kind::Mismatch => {
                write!(f, "mismatch  {} read {option} = {}", self.actor(), self.passed(&self.requested()))?;
                self.write_policy(f)?;
                self.write_result(f)?;
            }
            Kind::Conflict { verdict } => {
                write!(f, "conflict  {} requested {option} = {}", self.actor(), self.passed(&self.requested))?;
                self.write_policy(f)?;
                write!(f, ": {verdict}")?;
                if self.applied.len > 0 && verdict.what == Action::Clamped {
                    write!(f, " to {}", self.passed(&self.applied))?;
                }
                if self.current.len > 0 {
                    write!(f, ", now {}", self.shown(&self.current))?;
                }
                self.write_result(f)?;
            }
            Kind::Drift => {
                write!(f, "drift     {} {option} is {}", self.actor(), self.shown(&self.current))?;
                self.write_policy(f)?;
            }
            Kind::Applied { before, after } => {
                write!(f, "applied   {} {option}: {} -> {}", self.actor(), self.shown(&before), self.shown(&after))?;
                if self.is_capped() {
                    write!(f, " (policy: {}, capped by the kernel)", self.wanted())?;
                }
            }
            Kind::Unknown { why } => write!(f, "unknown   {} {option}: {why}", self.actor())?,
            Kind::WouldApply => {
                let (current, wanted) = (self.shown(&self.current), self.passed(&self.wanted));
                write!(f, "apply     {} {option}: {current} -> {wanted} (dry run)", self.actor())?;
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

    /// Returns the text of a value as setsockopt takes it.
    fn passed(&self, value: &Value) -> String {
        values::text(self.key, value)
    }

    /// Returns the text of a value that getsockopt returned, as setsockopt takes it.
    fn shown(&self, value: &Value) -> String {
        self.passed(&options::as_passed(self.key, value))
    }

    /// Returns what the policy wants, as policies write it.
    fn wanted(&self) -> String {
        match self.cause {
            Some(Cause { limit: Some(Limit { min, max }), .. }) => {
                values::form_text(self.key, &Form::Limit { min, max })
            }
            Some(Cause { mask: Some(mask), .. }) => format!("{}/{mask:#x}", self.passed(&self.wanted_bits())),
            _ => self.passed(&self.wanted),
        }
    }

    /// Writes what the policy wants: a limit or a value. Writes nothing if the policy denies all calls.
    fn write_policy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_limit = self.cause.as_ref().is_some_and(|cause| cause.limit.is_some());
        if self.wanted.len > 0 || has_limit { write!(f, " (policy: {})", self.wanted()) } else { Ok(()) }
    }

    fn write_result(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Some(result) if result < 0 => {
                let errno = i32::try_from(result.saturating_neg()).unwrap_or_default();
                write!(f, ", call failed with {}", errno::name(errno))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        events::{Source, Verdict},
        options,
    };

    fn event(option: &str, kind: Kind, [wanted, requested, current]: [Option<u32>; 3], cause: Cause) -> String {
        let value = |number: Option<u32>| number.map_or(Value::UNKNOWN, Value::int);
        let event = Event {
            time: jiff::Timestamp::UNIX_EPOCH,
            kind,
            key: options::by_name(option).unwrap().key(),
            cause: Some(cause),
            wanted: value(wanted),
            requested: value(requested),
            optlen: None,
            applied: Value::UNKNOWN,
            current: value(current),
            result: Some(0),
            task: None,
            socket: None,
            source: Source::Fentry,
            via: None,
            duration_ns: None,
            suppressed: 0,
            missing: Vec::new(),
        };
        event.to_string()
    }

    fn cause() -> Cause {
        let [policy, rule, place] = ["p", "r", "f:1"].map(str::to_owned);
        Cause { setting: 0, policy, rule, place, limit: None, mask: None }
    }

    const REWRITTEN: Kind = Kind::Conflict { verdict: Verdict { what: Action::Rewritten, dry_run: false } };

    #[test]
    fn policy_is_shown_as_policies_write_it() {
        let masked = Cause { mask: Some(0xff), ..cause() };
        assert_eq!(
            event("SO_MARK", REWRITTEN, [Some(0x1120), Some(0x1133), Some(0x1120)], masked),
            "conflict  a process requested SO_MARK = 0x1133 (policy: 0x20/0xff): rewritten, now 0x1120  (f:1, rule r)"
        );
        let limited = Cause { limit: Some(Limit { min: 1, max: 9 }), ..cause() };
        assert_eq!(
            event("TCP_SYNCNT", REWRITTEN, [None, Some(20), None], limited),
            "conflict  a process requested TCP_SYNCNT = 20 (policy: 1 to 9): rewritten  (f:1, rule r)"
        );
        assert_eq!(
            event("TCP_KEEPIDLE", Kind::Mismatch, [Some(120), Some(1800), Some(1800)], cause()),
            "mismatch  a process read TCP_KEEPIDLE = 1800s (policy: 120s)  (f:1, rule r)"
        );
    }

    #[test]
    fn buffers_have_the_unit_of_setsockopt() {
        let [before, after] = [8192, 32768].map(Value::int);
        for (kind, values, shown) in [
            (
                REWRITTEN,
                [Some(4096), Some(65536), Some(8192)],
                "requested SO_SNDBUF = 64KiB (policy: 4KiB): rewritten, now 4KiB",
            ),
            (Kind::Mismatch, [Some(4096), Some(16384), Some(16384)], "read SO_SNDBUF = 8KiB (policy: 4KiB)"),
            (Kind::Drift, [Some(4096), None, Some(16384)], "SO_SNDBUF is 8KiB (policy: 4KiB)"),
            (Kind::WouldApply, [Some(4096), None, Some(16384)], "SO_SNDBUF: 8KiB -> 4KiB (dry run)"),
            (Kind::Applied { before, after }, [Some(16384), None, None], "SO_SNDBUF: 4KiB -> 16KiB"),
            (
                Kind::Applied { before, after },
                [Some(65536), None, None],
                "SO_SNDBUF: 4KiB -> 16KiB (policy: 64KiB, capped by the kernel)",
            ),
        ] {
            let line = event("SO_SNDBUF", kind, values, cause());
            assert_eq!(line.split_once("a process ").unwrap().1, format!("{shown}  (f:1, rule r)"));
        }
    }
}
