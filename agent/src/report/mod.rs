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
    gaps::Gap,
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
    pub policies: Vec<(String, Mode)>,
    pub targets: Vec<String>,
    pub audit: Option<Audit>,
    /// What the policies ask for and this kernel cannot do.
    pub gaps: Vec<Gap>,
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

/// One setting, wherever it holds.
#[derive(Debug)]
pub struct Line {
    pub policy: String,
    pub rule: String,
    /// `FILE:LINE`
    pub place: String,
    pub source: SettingSource,
    pub mode: Mode,
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
        gaps: Vec<Gap>,
    ) -> Summary {
        let Counts { counters, calls, lost } = counts;
        let mut lines: Vec<Line> = Vec::new();
        for (counters, setting) in counters.iter().zip(0..) {
            let Some((source, rule)) = desired.source(setting) else { continue };
            let asked = self.asked.remove(&setting).unwrap_or_default();
            // A rule holds in each scope that its policy is part of.
            if let Some(line) = lines.iter_mut().find(|line| line.source == *source) {
                line.counters = line.counters.plus(counters);
                let new: Vec<_> = asked.into_iter().filter(|example| !line.asked.contains(example)).collect();
                line.asked.extend(new);
                line.asked.truncate(EXAMPLES_MAX);
                continue;
            }
            lines.push(Line {
                policy: rule.policy.clone(),
                rule: rule.rule.clone(),
                place: format!("{}:{}", rule.path.display(), source.line),
                source: source.clone(),
                mode: rule.mode,
                counters: *counters,
                asked,
            });
        }
        let policies = desired.policies().into_iter().map(|(name, mode)| (name.to_owned(), mode)).collect();
        Summary { policies, targets, audit, gaps, lines, calls, lost }
    }
}

/// The mode that all of these policies have, if it is one. Without any policy nothing is changed either.
#[must_use]
pub fn common_mode<N>(policies: &[(N, Mode)]) -> Option<Mode> {
    let first = policies.first().map_or(Mode::DryRun, |(_, mode)| *mode);
    policies.iter().all(|(_, mode)| *mode == first).then_some(first)
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
    fn verdicts(&self) -> Vec<(Verdict, u64)> {
        let dry_run = self.mode == Mode::DryRun;
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
