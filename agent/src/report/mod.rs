//! What a run came to: counters and events, folded into one [`Summary`].
//!
//! Counts come from the kernel's counters, which lose nothing; what the applications asked for
//! comes from events, of which repeated ones are held back, and so is a list of examples.

mod calls;
mod json;
mod loss;
mod table;
mod text;

use std::collections::BTreeMap;

use abi::Counters;

pub use self::{
    calls::{CallLine, duration_text},
    loss::{Loss, Lost, Reason},
};
use crate::{
    compile::{Desired, SettingSource},
    events::{Deed, Event, Kind, Verdict},
    kernel::Audit,
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
}

/// All that is to be said at the end.
#[derive(Debug)]
pub struct Summary {
    pub mode: Mode,
    pub policies: Vec<String>,
    pub targets: Vec<String>,
    pub audit: Option<Audit>,
    pub lines: Vec<Line>,
    /// What the audit counted, if it was asked to look at more than conflicts.
    pub calls: Vec<CallLine>,
    pub lost: Lost,
}

/// What the kernel side has to say at the end.
#[derive(Debug)]
pub struct Counts {
    /// In the order of the settings.
    pub counters: Vec<Counters>,
    pub calls: Vec<CallLine>,
    pub lost: Lost,
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

    /// Sums up.
    #[must_use]
    pub fn summarize(
        mut self,
        desired: &Desired,
        counts: Counts,
        targets: Vec<String>,
        audit: Option<Audit>,
    ) -> Summary {
        let Counts { counters, calls, lost } = counts;
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
        Summary { mode: desired.mode, policies, targets, audit, lines: lines.collect(), calls, lost }
    }
}

impl Summary {
    /// How many calls disagreed with the policy, reads included.
    #[must_use]
    pub fn conflicts(&self) -> u64 {
        self.lines.iter().map(Line::conflicts).sum()
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
