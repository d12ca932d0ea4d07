//! What a run came to: counters and events, folded into one [`Summary`].
//!
//! Counts come from the kernel's counters, which lose nothing; what the applications asked for
//! comes from events, of which repeated ones are held back, and so is a list of examples.

mod json;
mod text;

use std::collections::BTreeMap;

use abi::{Counters, Losses};

use crate::{
    compile::{Desired, SettingSource},
    events::{Deed, Event, Kind, Verdict},
    kernel::Backend,
    policy::model::{Form, Mode},
    values,
};

/// Examples of what was asked for that are kept for each setting.
const EXAMPLES_MAX: usize = 4;

/// Folds events as they come.
#[derive(Debug, Default)]
pub struct Report {
    /// By setting: what was asked for otherwise, and by whom.
    asked: BTreeMap<u32, Vec<String>>,
    unknown_records: u64,
}

/// All that is to be said at the end.
#[derive(Debug)]
pub struct Summary {
    pub mode: Mode,
    pub policies: Vec<String>,
    pub targets: Vec<String>,
    pub backend: Option<Backend>,
    pub lines: Vec<Line>,
    pub losses: Losses,
    /// Records that this build did not know.
    pub unknown_records: u64,
}

/// One setting.
#[derive(Debug)]
pub struct Line {
    pub policy: String,
    pub rule: String,
    /// `FILE:LINE`
    pub place: String,
    pub source: SettingSource,
    pub counters: Counters,
    /// What was asked for otherwise, and by whom: examples.
    pub asked: Vec<String>,
}

impl Report {
    /// Takes note of an event.
    pub fn fold(&mut self, event: &Event) {
        let (Kind::Conflict { .. }, Some(cause)) = (event.kind, &event.cause) else { return };
        let who = event.task.as_ref().map_or("a process", |task| task.comm.as_str());
        let example = if event.asked.len == 0 {
            who.to_owned()
        } else {
            format!("{} by {who}", values::text(event.key, &event.asked))
        };
        let examples = self.asked.entry(cause.setting).or_default();
        if examples.len() < EXAMPLES_MAX && !examples.contains(&example) {
            examples.push(example);
        }
    }

    /// Takes note of a record that could not be decoded.
    pub fn fold_unknown(&mut self) {
        self.unknown_records += 1;
    }

    /// Sums up. `counters` are in the order of the settings of `desired`.
    #[must_use]
    pub fn summarize(
        mut self,
        desired: &Desired,
        counters: &[Counters],
        losses: Losses,
        targets: Vec<String>,
        backend: Option<Backend>,
    ) -> Summary {
        let lines = counters.iter().zip(0..).filter_map(|(counters, setting)| {
            let (source, rule) = desired.source(setting)?;
            Some(Line {
                policy: rule.policy.clone(),
                rule: rule.rule.clone(),
                place: format!("{}:{}", rule.path.display(), source.line),
                source: source.clone(),
                counters: *counters,
                asked: self.asked.remove(&setting).unwrap_or_default(),
            })
        });
        let mut policies: Vec<String> = desired.rules.iter().map(|rule| rule.policy.clone()).collect();
        policies.dedup();
        Summary {
            mode: desired.mode,
            policies,
            targets,
            backend,
            lines: lines.collect(),
            losses,
            unknown_records: self.unknown_records,
        }
    }
}

impl Summary {
    /// How many calls disagreed with the policy, reads included.
    #[must_use]
    pub fn conflicts(&self) -> u64 {
        self.lines.iter().map(Line::conflicts).sum()
    }

    /// What was lost, by reason; what lost nothing is left out.
    #[must_use]
    pub fn lost(&self) -> Vec<(&'static str, u64)> {
        let Losses { ring_full, calls_full, unreadable, no_storage, no_room } = self.losses;
        [
            ("events found the ring buffer full", ring_full),
            ("calls found no room to be noted", calls_full),
            ("arguments could not be read", unreadable),
            ("sockets had no room for notes", no_storage),
            ("values found no room to be rewritten", no_room),
            ("records were of an unknown kind", self.unknown_records),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect()
    }
}

impl Line {
    fn conflicts(&self) -> u64 {
        self.counters.verdicts.iter().sum::<u64>() + self.counters.reads
    }

    /// The verdicts that were given, with how often.
    fn verdicts(&self, mode: Mode) -> Vec<(Verdict, u64)> {
        let dry_run = mode == Mode::DryRun;
        let all = Deed::ALL.into_iter().zip(self.counters.verdicts);
        all.filter(|(_, count)| *count > 0).map(|(what, count)| (Verdict { what, dry_run }, count)).collect()
    }

    fn is_set(&self) -> bool {
        matches!(self.source.form, Form::Set(_))
    }

    fn wanted(&self) -> String {
        values::form_text(self.source.option.key(), &self.source.form)
    }
}

/// The name of an errno.
#[must_use]
pub fn errno_name(errno: i32) -> String {
    /// The kernel's own "not supported", which user space has no name for (include/linux/errno.h).
    const ENOTSUPP: i32 = 524;
    if errno == ENOTSUPP {
        return "ENOTSUPP".to_owned();
    }
    match nix::errno::Errno::from_raw(errno) {
        nix::errno::Errno::UnknownErrno => format!("errno {errno}"),
        known => format!("{known:?}"),
    }
}
