//! What was lost, by reason: each is counted where it happens, told as soon as it is seen, and summed up.

use std::fmt;

use abi::Losses;
use serde_json::json;

use crate::schema;

/// All that was lost since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// What the programs counted.
    pub losses: Losses,
    /// Times that the kernel did not run a program, because one was running on that CPU.
    pub prog_missed: u64,
    /// Records that this build does not know.
    pub unknown_records: u64,
    /// Lines of output.
    pub unwritten: Unwritten,
}

/// Lines of output that could not be written, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unwritten {
    /// Too much was waiting for the reader already.
    pub blocked: u64,
    /// The disk, the quota or the file is full (ENOSPC, EDQUOT, EFBIG).
    pub no_space: u64,
    /// The reader is gone (EPIPE).
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

/// A loss that has just been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    pub reason: Reason,
    /// How many more there are than when it was last told.
    pub count: u64,
    pub total: u64,
}

/// Why something was lost: its name in JSON, and what was lost, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    pub name: &'static str,
    pub what: &'static str,
}

impl Lost {
    /// Every reason, with how often.
    #[must_use]
    pub fn by_reason(&self) -> [(Reason, u64); 16] {
        // Taken apart in full: a new one has to be thought of here.
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
        let reason = |name, what, count| (Reason { name, what }, count);
        [
            reason("ring_full", "events found the ring buffer full", ring_full),
            reason("calls_full", "calls found no room to be noted: their results are not known", calls_full),
            reason("unreadable", "arguments could not be read", unreadable),
            reason("no_storage", "sockets had no memory for notes: they may count more than once", no_storage),
            reason("no_room", "values found no room to be rewritten", no_room),
            reason("exit_missed", "calls were not seen to return", exit_missed),
            reason("tallies_full", "calls were not counted by option", tallies_full),
            reason("unjudged", "calls could not be judged: on which socket is not known", unjudged),
            reason("not_restored", "options could not be given back the value from before a rule", not_restored),
            reason("prog_missed", "times the kernel left a program of the audit out", prog_missed),
            reason("unknown_records", "records were of an unknown kind", unknown_records),
            reason("over_budget", "events were more than their cgroup may cause", over_budget),
            reason("output_blocked", "lines of output: nobody read what was written before", blocked),
            reason("output_no_space", "lines of output: no space was left", no_space),
            reason("output_closed", "lines of output: the reader was gone", closed),
            reason("output_failed", "lines of output: writing failed", failed),
        ]
    }

    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<Loss> {
        let all = self.by_reason().into_iter().zip(before.by_reason());
        all.filter(|((_, now), (_, before))| now > before)
            .map(|((reason, total), (_, before))| Loss { reason, count: total - before, total })
            .collect()
    }
}

impl Loss {
    /// The loss as one line of JSON, without its end.
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
        write!(f, "lost      {count} {}", reason.what)?;
        if total > count { write!(f, " ({total} in all)") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told() {
        let losses = Losses { ring_full: 5, unreadable: 2, ..Losses::default() };
        let before = Lost { losses, ..Lost::default() };
        let now = Lost { losses: Losses { ring_full: 12, ..losses }, prog_missed: 1, ..before };
        let told: Vec<String> = now.since(&before).iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "lost      7 events found the ring buffer full (12 in all)",
                "lost      1 times the kernel left a program of the audit out",
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
