//! The output of the agent with `--output json`: events, and a summary as the last line.

use std::{collections::BTreeMap, process::Output};

use serde::Deserialize;
use serde_json::Value;

/// An event other than the summary. The fields are those of docs/guide.md.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    pub schema: u32,
    pub time: String,
    pub event: String,
    pub call: Option<String>,
    pub policy: Option<String>,
    pub rule: Option<String>,
    pub file: Option<String>,
    pub option: String,
    pub level: i32,
    pub optname: i32,
    pub optval: Option<String>,
    pub optlen: Option<i32>,
    #[serde(default)]
    pub wanted: Value,
    pub mask: Option<u32>,
    pub limit: Option<Limit>,
    pub unit: Option<String>,
    pub requested: Value,
    pub applied: Option<Value>,
    pub current: Value,
    pub verdict: Option<String>,
    pub outcome: Option<String>,
    pub result: Option<i64>,
    pub pid: Option<u32>,
    pub tid: Option<u32>,
    pub comm: Option<String>,
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    pub container: Option<Value>,
    pub socket: Option<Socket>,
    pub via: Option<String>,
    pub backend: Option<String>,
    pub suppressed: u64,
    pub duration_ns: Option<u64>,
    #[serde(default)]
    pub missing: BTreeMap<String, String>,
}

/// An event that reports lost events.
#[derive(Clone, Debug, Deserialize)]
pub struct Loss {
    pub reason: String,
    pub count: u64,
    pub total: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Socket {
    pub protocol: Option<String>,
    pub family: Option<String>,
    pub local: Option<String>,
    pub remote: Option<String>,
    pub cookie: Option<u64>,
    pub cgroup: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Summary {
    pub mode: String,
    pub policies: Vec<String>,
    pub targets: Vec<String>,
    pub backend: Option<String>,
    pub not_covered: Option<Vec<String>>,
    pub unsupported: Vec<Unsupported>,
    pub conflicts: u64,
    pub other_cgroups: BTreeMap<String, u64>,
    pub mismatches: u64,
    pub repaired: Repaired,
    pub settings: Vec<Setting>,
    pub call_counts: Vec<CallLine>,
    pub losses: BTreeMap<String, u64>,
}

/// The sockets of new targets that were created before the programs were attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Repaired {
    pub sockets: u64,
    pub listeners: u64,
}

/// A setting of a policy that the kernel does not support.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Unsupported {
    pub options: Vec<String>,
    pub hooks: Vec<String>,
    pub reason: String,
    pub remedy: String,
}

/// The calls of one kind on one option that the audit counted.
#[derive(Clone, Debug, Deserialize)]
pub struct CallLine {
    pub option: String,
    pub call: String,
    pub count: u64,
    pub failed: u64,
    pub total_ns: Option<u64>,
    pub histogram: Option<Vec<Bucket>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Bucket {
    pub from_ns: u64,
    pub count: u64,
}

/// The counters of one option of one rule.
#[derive(Clone, Debug, Deserialize)]
pub struct Setting {
    #[serde(default)]
    pub limitations: Vec<String>,
    pub policy: String,
    pub rule: String,
    pub file: String,
    pub mode: String,
    pub option: String,
    pub form: String,
    #[serde(default)]
    pub wanted: Value,
    pub limit: Option<Limit>,
    pub unit: Option<String>,
    pub sockets: Sockets,
    pub calls: Calls,
    pub events: Events,
    /// Examples of requested values.
    pub requested: Vec<Example>,
    /// Examples of values that were read.
    pub read: Vec<Example>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Limit {
    pub min: i64,
    pub max: i64,
}

/// A value that an application requested or read, and the application's name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Example {
    pub value: Value,
    pub verdict: Option<String>,
    pub comm: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Sockets {
    pub set: u64,
    pub capped: u64,
    pub unchanged: u64,
    pub failed: u64,
    pub failed_errno: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Calls {
    pub agreed: u64,
    /// Counts by verdict, with all five verdicts.
    #[serde(rename = "conflicts")]
    pub verdicts: BTreeMap<String, u64>,
    pub reads: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Events {
    pub reported: u64,
    pub suppressed: u64,
}

impl Calls {
    /// Returns the verdicts whose count is not 0.
    #[must_use]
    pub fn verdicts(&self) -> BTreeMap<&str, u64> {
        let nonzero = self.verdicts.iter().filter(|(_, count)| **count > 0);
        nonzero.map(|(verdict, count)| (verdict.as_str(), *count)).collect()
    }
}

/// The whole output of an agent.
#[derive(Debug)]
pub struct Report {
    pub events: Vec<Event>,
    /// In the order of the report, before the summary.
    pub losses: Vec<Loss>,
    /// In the order of the report, at its beginning.
    pub unsupported: Vec<Unsupported>,
    /// The events `reload`, `targets` and `apply-summary`.
    pub notices: Vec<Value>,
    pub summary: Summary,
    /// The output of the agent's process. `stdout` is empty if the probe used it.
    pub output: Output,
}

impl Report {
    /// Parses JSON lines.
    #[track_caller]
    pub(crate) fn read(lines: &str, output: Output) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let fail =
            |line: &str, why: String| -> ! { panic!("not a valid line of a report: {why}\n{line}\nagent: {stderr}") };
        let (mut events, mut losses, mut unsupported) = (Vec::new(), Vec::new(), Vec::new());
        let (mut notices, mut summary) = (Vec::new(), None);
        for line in lines.lines() {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|error| fail(line, error.to_string()));
            if summary.is_some() {
                fail(line, "the line comes after the summary".to_owned());
            }
            if value["event"] == "summary" {
                summary = Some(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if value["event"] == "loss" {
                losses.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if value["event"] == "unsupported" {
                unsupported.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if ["started", "reload", "targets", "apply-summary", "repair-summary"]
                .iter()
                .any(|notice| value["event"] == *notice)
            {
                notices.push(value);
            } else {
                events.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            }
        }
        let Some(summary) = summary else { panic!("no summary, {}; standard error: {stderr}", output.status) };
        Self { events, losses, unsupported, notices, summary, output }
    }

    /// Returns whether the audit reports that it does not see calls of this kind.
    #[must_use]
    pub fn does_not_cover(&self, what: &str) -> bool {
        self.summary.not_covered.iter().flatten().any(|not_covered| not_covered == what)
    }

    /// Returns the events of this kind for this option.
    pub fn of(&self, event: &str, option: &str) -> Vec<&Event> {
        self.events.iter().filter(|found| found.event == event && found.option == option).collect()
    }

    /// Returns the conflicts of this call for this option.
    pub fn conflicts(&self, call: &str, option: &str) -> Vec<&Event> {
        let kinds = ["conflict", "mismatch"].map(|kind| self.of(kind, option));
        kinds.concat().into_iter().filter(|event| event.call.as_deref() == Some(call)).collect()
    }

    /// Returns the only conflicting setsockopt call for this option.
    #[track_caller]
    #[must_use]
    pub fn conflict(&self, option: &str) -> &Event {
        self.only("setsockopt", option)
    }

    /// Returns the only conflicting getsockopt call for this option.
    #[track_caller]
    #[must_use]
    pub fn read_conflict(&self, option: &str) -> &Event {
        self.only("getsockopt", option)
    }

    #[track_caller]
    fn only(&self, call: &str, option: &str) -> &Event {
        match self.conflicts(call, option).as_slice() {
            [event] => event,
            found => {
                let all: Vec<String> = self.events.iter().map(|event| format!("\n{event:?}")).collect();
                panic!("{} conflicts of {call} for {option}, expected one; all events: {}", found.len(), all.concat())
            }
        }
    }

    /// Returns the reported verdicts on setsockopt calls for this option.
    pub fn verdicts(&self, option: &str) -> Vec<&str> {
        let conflicts = self.conflicts("setsockopt", option).into_iter();
        conflicts.filter_map(|event| event.verdict.as_deref()).collect()
    }

    /// Returns the only setting of this option.
    #[track_caller]
    #[must_use]
    pub fn setting(&self, option: &str) -> &Setting {
        let found: Vec<&Setting> = self.summary.settings.iter().filter(|setting| setting.option == option).collect();
        match found.as_slice() {
            [setting] => setting,
            found => panic!("{} settings of {option}, expected one: {found:#?}", found.len()),
        }
    }

    /// Returns the setting of this option in this rule.
    #[track_caller]
    #[must_use]
    pub fn setting_of(&self, rule: &str, option: &str) -> &Setting {
        let mut settings = self.summary.settings.iter();
        let found = settings.find(|setting| setting.rule == rule && setting.option == option);
        found.unwrap_or_else(|| panic!("rule {rule} has no setting of {option}: {:#?}", self.summary.settings))
    }

    /// Panics if the report counts lost events.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        let lost: Vec<_> = self.summary.losses.iter().filter(|(_, count)| **count > 0).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}
