//! What was lost, by reason. Each loss is counted where it happens, reported when it is noticed, and included in the
//! summary.

use std::fmt;

use abi::Losses;
use serde_json::json;

use crate::{plural::counted, schema};

/// The losses since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Counted by the programs.
    pub losses: Losses,
    /// How many times the kernel skipped a program because another one was running on the same CPU.
    pub prog_missed: u64,
    /// Records of a type that this build does not know.
    pub unknown_records: u64,
    /// Lines of output that were not written.
    pub unwritten: Unwritten,
}

/// Lines of output that could not be written, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unwritten {
    /// The output queue was full.
    pub blocked: u64,
    /// The disk, the quota or the file is full (ENOSPC, EDQUOT, EFBIG).
    pub no_space: u64,
    /// The reader has closed the output (EPIPE).
    pub closed: u64,
    /// Any other error.
    pub failed: u64,
}

impl Unwritten {
    /// Counts lines that failed with `errno`.
    pub fn add(&mut self, errno: i32, lines: u64) {
        let count = match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => &mut self.no_space,
            libc::EPIPE => &mut self.closed,
            _ => &mut self.failed,
        };
        *count += lines;
    }

    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        let Self { blocked, no_space, closed, failed } = *other;
        Self {
            blocked: self.blocked + blocked,
            no_space: self.no_space + no_space,
            closed: self.closed + closed,
            failed: self.failed + failed,
        }
    }

    #[must_use]
    pub fn total(&self) -> u64 {
        let Self { blocked, no_space, closed, failed } = self;
        blocked + no_space + closed + failed
    }
}

/// A new loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    pub reason: Reason,
    /// How many there are since the last report of this reason.
    pub count: u64,
    pub total: u64,
}

/// What was lost, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The name of the reason in JSON.
    pub name: &'static str,
    /// What was lost, in the singular.
    noun: &'static str,
    /// The description that follows the noun in messages.
    why: &'static str,
}

impl Reason {
    /// Returns a count of losses with this description.
    #[must_use]
    pub fn counted(&self, count: u64) -> String {
        format!("{}{}", counted(count, self.noun), self.why)
    }
}

impl Lost {
    /// Returns every reason with its count.
    #[must_use]
    pub fn by_reason(&self) -> [(Reason, u64); 16] {
        // Destructured completely, so that a new field must be handled here.
        let Self { losses, prog_missed, unknown_records, unwritten } = *self;
        let Unwritten { blocked, no_space, closed, failed } = unwritten;
        let Losses {
            ring_full,
            calls_full,
            unreadable,
            no_storage,
            no_room,
            exit_missed,
            tallies_full,
            unjudged,
            not_restored,
            over_budget,
        } = losses;
        let reason = |name, noun, why, count| (Reason { name, noun, why }, count);
        [
            reason("ring_full", "event", ": the ring buffer was full", ring_full),
            reason("calls_full", "call", " without a result: the table of calls was full", calls_full),
            reason("unreadable", "argument", " not readable in the caller's memory", unreadable),
            reason("no_storage", "socket", " without storage: can be counted more than once", no_storage),
            reason("no_room", "value", " not rewritten: the kernel's buffer was too small", no_room),
            reason("exit_missed", "call", " whose return was not seen", exit_missed),
            reason("tallies_full", "call", " not counted by option: the table was full", tallies_full),
            reason("unjudged", "call", " not judged: the socket is unknown", unjudged),
            reason("not_restored", "option", " not restored to the value from before a rule", not_restored),
            reason("prog_missed", "run", " of an audit program, skipped by the kernel", prog_missed),
            reason("unknown_records", "record", " of an unknown type", unknown_records),
            reason("over_budget", "event", " over the budget of a cgroup, a target or all targets", over_budget),
            reason("output_blocked", "line", " of output: the queue was full", blocked),
            reason("output_no_space", "line", " of output: no space was left", no_space),
            reason("output_closed", "line", " of output: the reader has closed it", closed),
            reason("output_failed", "line", " of output: writing failed", failed),
        ]
    }

    /// Returns the losses since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<Loss> {
        let all = self.by_reason().into_iter().zip(before.by_reason());
        all.filter(|((_, now), (_, before))| now > before)
            .map(|((reason, total), (_, before))| Loss { reason, count: total - before, total })
            .collect()
    }
}

impl Loss {
    /// Returns the loss as one line of JSON, without the newline.
    #[must_use]
    pub fn to_json(&self, time: jiff::Timestamp) -> String {
        let Self { reason, count, total } = self;
        let fields = json!({
            "reason": reason.name,
            "count": count,
            "total": total,
        });
        schema::line_at(time, "loss", fields).to_string()
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, count, total } = self;
        write!(f, "lost      {}", reason.counted(*count))?;
        if total > count { write!(f, " ({total} in total)") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_losses_are_reported() {
        let losses = Losses { ring_full: 5, unreadable: 2, ..Losses::default() };
        let before = Lost { losses, ..Lost::default() };
        let now = Lost { losses: Losses { ring_full: 12, ..losses }, prog_missed: 1, ..before };
        let lines: Vec<String> = now.since(&before).iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "lost      7 events: the ring buffer was full (12 in total)",
                "lost      1 run of an audit program, skipped by the kernel",
            ]
        );
    }

    #[test]
    fn names_of_reasons_are_unique() {
        let names: std::collections::BTreeSet<_> =
            Lost::default().by_reason().map(|(reason, _)| reason.name).into_iter().collect();
        assert_eq!(names.len(), Lost::default().by_reason().len());
    }
}
