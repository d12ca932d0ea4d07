//! What a run came to: counters and events, folded into one [`Summary`].
//!
//! Counts come from the kernel's counters, which lose nothing; what the applications asked for
//! comes from events, of which repeated ones are held back, and so is a list of examples.

mod calls;
mod json;
mod loss;
mod saved_counters;
mod table;
mod text;

use std::collections::{BTreeMap, HashMap};

use abi::{Counters, setting::OptionKey};

pub use self::{
    calls::CallLine,
    loss::{Loss, Lost, Reason, Unwritten},
    saved_counters::SavedCounters,
};
use serde_json::{Value, json};

use crate::{
    compile::Desired,
    escape::{self, Escape},
    events::{Action, Event, Kind, Verdict},
    kernel::Audit,
    limitations::{Concern, Limitation},
    policy::model::{Form, Mode, Named},
    unsupported::Unsupported,
    values,
};

/// Examples of what was asked for that are kept for each setting.
const EXAMPLES_MAX: usize = 4;

/// The option and the rule of a line.
type LineKey = (OptionKey, String);

/// Folds events as they come, and counters of policies when they have had their time.
#[derive(Debug, Default)]
pub struct Report {
    /// By generation and setting: what was asked for otherwise, and by whom.
    requested: BTreeMap<(u32, u32), Vec<Example>>,
    lines: Vec<Line>,
    /// The lines that can be of a setting, by what takes no comparing of texts.
    numbers: HashMap<LineKey, Vec<usize>>,
    /// What was counted before, of settings that have no line yet.
    before: Vec<SavedCounters>,
    /// All that had been counted when this began.
    at_first: Vec<SavedCounters>,
}

/// All that is to be said at the end.
#[derive(Debug)]
pub struct Summary {
    pub policies: Vec<(String, Mode)>,
    pub targets: Vec<String>,
    pub audit: Option<Audit>,
    /// What the policies ask for and this kernel cannot do.
    pub unsupported: Vec<Unsupported>,
    pub lines: Vec<Line>,
    /// Conflicts of these that were there before this began.
    pub earlier_conflicts: u64,
    /// What the audit counted, if it was asked to look at more than conflicts.
    pub calls: Vec<CallLine>,
    pub lost: Lost,
}

/// What the kernel side has to say at the end.
#[derive(Debug)]
pub struct Counts {
    pub calls: Vec<CallLine>,
    pub lost: Lost,
}

/// What was asked for, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The value as text and as JSON. `None`: unknown.
    requested: Option<(String, Value)>,
    /// The name of the task.
    who: String,
}

impl Example {
    fn text(&self) -> String {
        let who = self.who.escaped();
        self.requested.as_ref().map_or_else(|| who.to_string(), |(text, _)| format!("{text} by {who}"))
    }

    fn to_json(&self) -> Value {
        json!({ "requested": self.requested.as_ref().map(|(_, json)| json), "comm": self.who })
    }
}

/// One setting, wherever it holds.
#[derive(Debug)]
pub struct Line {
    pub policy: String,
    pub rule: String,
    /// `FILE:LINE`
    pub place: String,
    pub option: Named,
    pub form: Form,
    pub mode: Mode,
    pub counters: Counters,
    /// What was asked for otherwise, and by whom: examples.
    pub requested: Vec<Example>,
    /// What is not done of it.
    pub unsupported: Vec<(&'static Limitation, Concern)>,
    /// Whether it is to be told of: not where only policies that were there before this report have it.
    is_told: bool,
}

impl Report {
    /// Takes note of an event that policies of this generation have caused.
    pub fn fold(&mut self, generation: u32, event: &Event) {
        let (Kind::Conflict { .. }, Some(cause)) = (event.kind, &event.cause) else { return };
        let who = event.task.as_ref().map_or("a process", |task| task.comm.as_str());
        let value = &event.requested;
        let requested = (value.len > 0).then(|| (values::text(event.key, value), values::json(event.key, value)));
        let example = Example { requested, who: who.to_owned() };
        let examples = self.requested.entry((generation, cause.setting)).or_default();
        if examples.len() < EXAMPLES_MAX && !examples.contains(&example) {
            examples.push(example);
        }
    }

    /// Begins with what was counted before.
    #[must_use]
    pub fn resume(before: Vec<SavedCounters>) -> Self {
        Self { before, ..Self::default() }
    }

    /// Beside what has been counted, policies have counted so much that are still to be added up: what comes now is new.
    pub fn begin<'a>(&mut self, counted: impl IntoIterator<Item = (&'a Desired, &'a [Counters])>) {
        let mut first = Self::resume(self.all());
        counted.into_iter().for_each(|(desired, counters)| first.count(0, desired, counters, true));
        self.at_first = first.all();
    }

    /// Adds up what the settings of a generation came to; `counters` are in their order. `is_told` where they are to be told of
    /// also if no others have them.
    pub fn count(&mut self, generation: u32, desired: &Desired, counters: &[Counters], is_told: bool) {
        for (counters, setting) in counters.iter().zip(0..) {
            let Some(line) = Line::of(desired, setting) else { continue };
            let asked = self.requested.remove(&(generation, setting)).unwrap_or_default();
            let line = Line { counters: *counters, requested: asked, is_told, ..line };
            // A rule holds in each scope that its policy is part of, and may come through a reload as it was.
            let alike = self.numbers.entry(line.key()).or_default();
            match alike.iter().find(|other| self.lines[**other].is_of_same_setting(&line)) {
                Some(same) => self.lines[*same].add(line),
                None => {
                    alike.push(self.lines.len());
                    let before = saved_counters::take(&mut self.before, &line);
                    self.lines.push(Line { counters: line.counters.plus(&before), ..line });
                }
            }
        }
    }

    /// What has been counted of the settings of these policies, for whoever goes on with it.
    #[must_use]
    pub fn saved_counters(&self, desired: &Desired) -> Vec<SavedCounters> {
        let mut all = self.all();
        let lines = (0..desired.settings.len() as u32).filter_map(|setting| Line::of(desired, setting));
        let counted = lines.map(|line| Line { counters: saved_counters::take(&mut all, &line), ..line });
        counted.filter(|line| line.counters != Counters::default()).map(|line| SavedCounters::from(&line)).collect()
    }

    fn all(&self) -> Vec<SavedCounters> {
        self.lines.iter().map(SavedCounters::from).chain(self.before.iter().cloned()).collect()
    }

    /// Sums up. `desired` are the policies that were in force last.
    #[must_use]
    pub fn summarize(
        self,
        desired: &Desired,
        counts: Counts,
        targets: Vec<String>,
        audit: Option<Audit>,
        unsupported: Vec<Unsupported>,
    ) -> Summary {
        let Counts { calls, lost } = counts;
        let Self { mut lines, mut at_first, .. } = self;
        let policies = desired.policies().into_iter().map(|(name, mode)| (name.to_owned(), mode)).collect();
        lines.retain(|line| line.is_told);
        let earlier = lines.iter().map(|line| conflicts(&saved_counters::take(&mut at_first, line))).sum();
        Summary { policies, targets, audit, unsupported, lines, earlier_conflicts: earlier, calls, lost }
    }
}

/// The mode that all of these policies have, if it is one. Without any policy nothing is changed either.
#[must_use]
pub fn common_mode<N>(policies: &[(N, Mode)]) -> Option<Mode> {
    let first = policies.first().map_or(Mode::DryRun, |(_, mode)| *mode);
    policies.iter().all(|(_, mode)| *mode == first).then_some(first)
}

impl Summary {
    /// How many of these calls have been made since this report began.
    #[must_use]
    pub fn new_conflicts(&self) -> u64 {
        self.conflicts().saturating_sub(self.earlier_conflicts)
    }

    /// How many calls disagreed with the policy, reads included.
    #[must_use]
    pub fn conflicts(&self) -> u64 {
        self.lines.iter().map(Line::conflicts).sum()
    }
}

impl Line {
    /// Of the setting of this number, with nothing counted.
    fn of(desired: &Desired, setting: u32) -> Option<Self> {
        let (source, rule) = desired.source(setting)?;
        Some(Self {
            policy: rule.policy.clone(),
            rule: rule.rule.clone(),
            place: format!("{}:{}", escape::plain(&rule.path), source.line),
            option: source.option,
            form: source.form.clone(),
            mode: rule.mode,
            counters: Counters::default(),
            requested: Vec::new(),
            unsupported: desired.unsupported_of(setting as usize),
            is_told: false,
        })
    }

    fn key(&self) -> LineKey {
        (self.option.key(), self.rule.clone())
    }

    fn is_of_same_setting(&self, other: &Self) -> bool {
        let Self { policy, rule, place, option, form, mode, counters: _, requested: _, unsupported: _, is_told: _ } =
            self;
        (policy, rule, place, option, form, mode)
            == (&other.policy, &other.rule, &other.place, &other.option, &other.form, &other.mode)
    }

    fn add(&mut self, other: Self) {
        self.counters = self.counters.plus(&other.counters);
        self.is_told |= other.is_told;
        let new: Vec<_> = other.requested.into_iter().filter(|example| !self.requested.contains(example)).collect();
        self.requested.extend(new);
        self.requested.truncate(EXAMPLES_MAX);
    }

    fn conflicts(&self) -> u64 {
        conflicts(&self.counters)
    }

    /// The verdicts that were given, with how often.
    fn verdicts(&self) -> Vec<(Verdict, u64)> {
        let dry_run = self.mode == Mode::DryRun;
        let all = Action::ALL.into_iter().zip(self.counters.verdicts);
        all.filter(|(_, count)| *count > 0).map(|(what, count)| (Verdict { what, dry_run }, count)).collect()
    }

    fn is_set(&self) -> bool {
        matches!(self.form, Form::Set(_))
    }

    fn wanted(&self) -> String {
        values::form_text(self.option.key(), &self.form)
    }
}

fn conflicts(counters: &Counters) -> u64 {
    counters.verdicts.iter().sum::<u64>() + counters.reads
}
