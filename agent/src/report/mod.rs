//! The result of a run: counters and events, combined to one [`Summary`].
//!
//! Counts come from the kernel side's counters, which are exact. The values that applications requested come from
//! events, which are rate-limited, so these values are a list of examples.

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
    limitations::{Concern, Limitation},
    options,
    policy::model::{Form, Mode, Named, Wanted},
    unsupported::Unsupported,
    values,
};

/// How many examples are kept for each setting and verdict.
const EXAMPLES_MAX: usize = 4;

/// How many cgroups of sockets outside the targets are listed.
const OTHER_CGROUPS_MAX: usize = 16;

/// The option and the rule of a line.
type LineKey = (OptionKey, String);

/// Collects events as they arrive, and the counters of policies when they are replaced.
#[derive(Debug, Default)]
pub struct Report {
    /// Examples of conflicting values and their tasks, by generation and setting.
    requested: BTreeMap<(u32, u32), Vec<Example>>,
    /// Calls without a conflict on sockets of another cgroup than the caller's, by the cgroup of the socket.
    elsewhere: BTreeMap<String, u64>,
    lines: Vec<Line>,
    /// The lines of each option and rule. Narrows the search for the line of a setting.
    numbers: HashMap<LineKey, Vec<usize>>,
    /// Counters saved by an earlier agent, for settings that have no line yet.
    before: Vec<SavedCounters>,
    /// All counters at the start of this report.
    at_first: Vec<SavedCounters>,
    repaired: Repaired,
}

/// Sockets of new targets that were created before the programs were attached there, and that were set afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    pub sockets: u64,
    /// How many of the sockets are listeners.
    pub listeners: u64,
}

/// How the audit sees calls.
#[derive(Clone, Copy, Debug)]
pub struct AuditFacts {
    /// The name of the backend.
    pub backend: &'static str,
    /// The calls that the backend does not see.
    pub not_covered: &'static [&'static str],
}

/// The contents of the final report.
#[derive(Debug)]
pub struct Summary {
    pub policies: Vec<(String, Mode)>,
    pub targets: Vec<String>,
    pub audit: Option<AuditFacts>,
    /// What the policies need and this kernel does not support.
    pub unsupported: Vec<Unsupported>,
    pub lines: Vec<Line>,
    /// How many of the lines' conflicts are from before this report.
    pub earlier_conflicts: u64,
    pub repaired: Repaired,
    /// Reported calls on sockets that no target covers, by the cgroup of the socket: at most 16 cgroups. They are not judged.
    pub other_cgroups: BTreeMap<String, u64>,
    /// The calls that the audit counted, if it covers more than conflicts.
    pub calls: Vec<CallLine>,
    pub lost: Lost,
}

/// The final counts of the kernel side.
#[derive(Debug)]
pub struct Counts {
    pub calls: Vec<CallLine>,
    pub lost: Lost,
    pub buffer_max: BufferMax,
}

/// The largest buffers that setsockopt(2) and BPF programs can set (net.core.wmem_max and rmem_max), in bytes; `None` if
/// unknown.
#[derive(Clone, Copy, Debug, Default)]
pub struct BufferMax {
    pub send: Option<i64>,
    pub receive: Option<i64>,
}

/// A bound of the kernel that is below the value of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cap {
    /// Bytes.
    max: i64,
    sysctl: &'static str,
}

impl BufferMax {
    /// Returns the bound of the option if it is below the value that a setting wants.
    fn cap(self, option: Named, form: &Form) -> Option<Cap> {
        let Form::Set(Wanted::Number { value, .. }) = form else { return None };
        let (max, sysctl) = match options::by_key(option.key())?.canonical().name {
            "SO_SNDBUF" => (self.send?, "net.core.wmem_max"),
            "SO_RCVBUF" => (self.receive?, "net.core.rmem_max"),
            _ => return None,
        };
        (i64::from(*value) > max).then_some(Cap { max, sysctl })
    }
}

/// A requested value and the task that requested it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The value as text and as JSON; `None` if it was not seen.
    requested: Option<(String, Value)>,
    /// What was done about the call; `None` if the value was read.
    verdict: Option<Action>,
    /// The name of the task.
    task_name: String,
}

impl Example {
    fn text(&self) -> String {
        let task_name = self.task_name.escaped();
        self.requested.as_ref().map_or_else(|| task_name.to_string(), |(text, _)| format!("{text} by {task_name}"))
    }

    fn to_json(&self, mode: Mode) -> Value {
        let value = self.requested.as_ref().map(|(_, json)| json);
        match self.verdict {
            Some(_) => json!({ "value": value, "verdict": self.verdict_name(mode), "comm": self.task_name }),
            None => json!({ "value": value, "comm": self.task_name }),
        }
    }

    fn verdict_name(&self, mode: Mode) -> Option<String> {
        self.verdict.map(|what| Verdict { what, dry_run: mode == Mode::DryRun }.to_string())
    }
}

/// One setting, on all its targets.
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
    /// Examples of conflicting values and their tasks.
    pub requested: Vec<Example>,
    /// The bound of the kernel that caps the setting's value.
    cap: Option<Cap>,
    /// The limitations that apply to the setting.
    pub unsupported: Vec<(&'static Limitation, Concern)>,
    /// Whether the line is reported. False if only policies from before this report have the setting.
    is_reported: bool,
}

impl Report {
    /// Adds an event caused by policies of this generation.
    pub fn fold(&mut self, generation: u32, event: &Event) {
        let Some(cause) = &event.cause else { return self.note_cgroup(event) };
        let verdict = match event.kind {
            Kind::Conflict { verdict } => Some(verdict.what),
            Kind::Mismatch => None,
            _ => return,
        };
        let task_name = event.task.as_ref().map_or("a process", |task| task.comm.as_str());
        let value = event.requested();
        let requested = (value.len > 0).then(|| (values::text(event.key, &value), values::json(event.key, &value)));
        let example = Example { requested, verdict, task_name: task_name.to_owned() };
        let examples = self.requested.entry((generation, cause.setting)).or_default();
        if has_room(examples, verdict) && !examples.contains(&example) {
            examples.push(example);
        }
    }

    /// Adds sockets of new targets that were repaired.
    pub fn note_repaired(&mut self, repaired: Repaired) {
        self.repaired.sockets += repaired.sockets;
        self.repaired.listeners += repaired.listeners;
    }

    /// Counts a call that no setting decided, if the socket belongs to another cgroup than the caller.
    fn note_cgroup(&mut self, event: &Event) {
        let (Some(task), Some(socket)) = (&event.task, &event.socket) else { return };
        let Some(cgroup) = socket.cgroup.as_ref().filter(|cgroup| task.cgroup.as_ref() != Some(cgroup)) else { return };
        if let Some(calls) = self.elsewhere.get_mut(cgroup) {
            *calls += 1;
        } else if self.elsewhere.len() < OTHER_CGROUPS_MAX {
            self.elsewhere.insert(cgroup.clone(), 1);
        }
    }

    /// Returns a report that continues from saved counters.
    #[must_use]
    pub fn resume(before: Vec<SavedCounters>) -> Self {
        Self { before, ..Self::default() }
    }

    /// Starts the report: calls counted up to now are earlier ones. `counted` are the counters of policies that have not been
    /// added yet.
    pub fn begin<'a>(&mut self, counted: impl IntoIterator<Item = (&'a Desired, &'a [Counters])>) {
        let mut first = Self::resume(self.all());
        counted.into_iter().for_each(|(desired, counters)| first.count(0, desired, counters, true));
        self.at_first = first.all();
    }

    /// Adds the counters of a generation, which are in the order of its settings. `is_reported` says whether the settings
    /// are reported even if no other generation has them.
    pub fn count(&mut self, generation: u32, desired: &Desired, counters: &[Counters], is_reported: bool) {
        for (counters, setting) in counters.iter().zip(0..) {
            let Some(line) = Line::for_setting(desired, setting) else { continue };
            let examples = self.requested.remove(&(generation, setting)).unwrap_or_default();
            let line = Line { counters: *counters, requested: examples, is_reported, ..line };
            // A rule applies in each scope of its policy, and may be unchanged by a reload.
            let candidates = self.numbers.entry(line.key()).or_default();
            match candidates.iter().find(|other| self.lines[**other].is_of_same_setting(&line)) {
                Some(same) => self.lines[*same].add(line),
                None => {
                    candidates.push(self.lines.len());
                    let before = saved_counters::take(&mut self.before, &line);
                    self.lines.push(Line { counters: line.counters.plus(&before), ..line });
                }
            }
        }
    }

    /// Returns the counters of the settings of these policies, for the next agent.
    #[must_use]
    pub fn saved_counters(&self, desired: &Desired) -> Vec<SavedCounters> {
        let mut all = self.all();
        let lines = (0..desired.settings.len() as u32).filter_map(|setting| Line::for_setting(desired, setting));
        let counted = lines.map(|line| Line { counters: saved_counters::take(&mut all, &line), ..line });
        counted.filter(|line| line.counters != Counters::default()).map(|line| SavedCounters::from(&line)).collect()
    }

    fn all(&self) -> Vec<SavedCounters> {
        self.lines.iter().map(SavedCounters::from).chain(self.before.iter().cloned()).collect()
    }

    /// Returns the summary. `desired` are the last policies in force.
    #[must_use]
    pub fn summarize(
        self,
        desired: &Desired,
        counts: Counts,
        targets: Vec<String>,
        audit: Option<AuditFacts>,
        unsupported: Vec<Unsupported>,
    ) -> Summary {
        let Counts { calls, lost, buffer_max } = counts;
        let Self { mut lines, mut at_first, repaired, elsewhere: mut other_cgroups, .. } = self;
        other_cgroups.retain(|cgroup, _| !targets.iter().any(|target| is_within(cgroup, target)));
        let policies = desired.policies().into_iter().map(|(name, mode)| (name.to_owned(), mode)).collect();
        lines.retain(|line| line.is_reported);
        lines.iter_mut().for_each(|line| line.cap = buffer_max.cap(line.option, &line.form));
        let earlier = lines.iter().map(|line| conflicts(&saved_counters::take(&mut at_first, line))).sum();
        Summary {
            policies,
            targets,
            audit,
            unsupported,
            lines,
            earlier_conflicts: earlier,
            repaired,
            other_cgroups,
            calls,
            lost,
        }
    }
}

/// Returns the common mode of these policies, if they have one. Without policies, the mode is a dry run: nothing is
/// changed.
#[must_use]
pub fn common_mode<N>(policies: &[(N, Mode)]) -> Option<Mode> {
    let first = policies.first().map_or(Mode::DryRun, |(_, mode)| *mode);
    policies.iter().all(|(_, mode)| *mode == first).then_some(first)
}

impl Summary {
    /// Returns how many conflicts there were since this report began.
    #[must_use]
    pub fn new_conflicts(&self) -> u64 {
        self.conflicts().saturating_sub(self.earlier_conflicts)
    }

    /// Returns how many setsockopt calls conflicted with the policy.
    #[must_use]
    pub fn conflicts(&self) -> u64 {
        self.lines.iter().map(Line::conflicts).sum()
    }
}

impl Summary {
    /// Returns how many reads showed another value than the policy's.
    #[must_use]
    pub fn mismatches(&self) -> u64 {
        self.lines.iter().map(|line| line.counters.reads).sum()
    }
}

impl Line {
    /// Returns a line for a setting, with counters of 0.
    fn for_setting(desired: &Desired, setting: u32) -> Option<Self> {
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
            cap: None,
            unsupported: desired.unsupported_of(setting as usize),
            is_reported: false,
        })
    }

    fn key(&self) -> LineKey {
        (self.option.key(), self.rule.clone())
    }

    fn is_of_same_setting(&self, other: &Self) -> bool {
        let Self {
            policy,
            rule,
            place,
            option,
            form,
            mode,
            counters: _,
            requested: _,
            cap: _,
            unsupported: _,
            is_reported: _,
        } = self;
        (policy, rule, place, option, form, mode)
            == (&other.policy, &other.rule, &other.place, &other.option, &other.form, &other.mode)
    }

    fn add(&mut self, other: Self) {
        self.counters = self.counters.plus(&other.counters);
        self.is_reported |= other.is_reported;
        for example in other.requested {
            if has_room(&self.requested, example.verdict) && !self.requested.contains(&example) {
                self.requested.push(example);
            }
        }
    }

    fn conflicts(&self) -> u64 {
        conflicts(&self.counters)
    }

    /// Returns the verdicts that occurred, with their counts.
    fn verdicts(&self) -> Vec<(Verdict, u64)> {
        let dry_run = self.mode == Mode::DryRun;
        let all = Action::ALL.into_iter().zip(self.counters.verdicts);
        all.filter(|(_, count)| *count > 0).map(|(what, count)| (Verdict { what, dry_run }, count)).collect()
    }

    /// Returns the bound of the kernel because of which sockets got less than the setting's value, if there are such sockets.
    fn cap_in_effect(&self) -> Option<Cap> {
        self.cap.filter(|_| self.counters.set > 0)
    }

    fn is_set(&self) -> bool {
        matches!(self.form, Form::Set(_))
    }

    fn wanted(&self) -> String {
        values::form_text(self.option.key(), &self.form)
    }
}

/// Returns whether another example with this verdict is kept.
fn has_room(examples: &[Example], verdict: Option<Action>) -> bool {
    examples.iter().filter(|example| example.verdict == verdict).count() < EXAMPLES_MAX
}

/// Returns whether a cgroup is a target or below it.
fn is_within(cgroup: &str, target: &str) -> bool {
    cgroup.strip_prefix(target.trim_end_matches('/')).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn conflicts(counters: &Counters) -> u64 {
    counters.verdicts.iter().sum()
}
