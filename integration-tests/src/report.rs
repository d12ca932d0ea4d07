//! What the agent reports with `--output json`: events, and a summary as the last line.

use std::{collections::BTreeMap, process::Output};

use serde::Deserialize;
use serde_json::Value;

/// An event that is not the summary. Fields as in the agent's documentation.
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
    pub optlen: Option<u32>,
    #[serde(default)]
    pub wanted: Value,
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

/// An event that says what was lost.
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
    pub settings: Vec<Setting>,
    pub call_counts: Vec<CallLine>,
    pub losses: BTreeMap<String, u64>,
}

/// What a policy asks for and the kernel cannot do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Unsupported {
    pub options: Vec<String>,
    pub hooks: Vec<String>,
    pub reason: String,
    pub remedy: String,
}

/// What the audit counted of one kind of call on one option.
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

/// What became of one option of one rule.
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
    pub examples: Vec<Example>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Limit {
    pub min: i64,
    pub max: i64,
}

/// A value that an application requested, and the application's name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Example {
    pub requested: Value,
    pub comm: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Sockets {
    pub set: u64,
    pub unchanged: u64,
    pub failed: u64,
    pub failed_errno: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Calls {
    pub agreed: u64,
    /// By verdict; all five are there.
    pub verdicts: BTreeMap<String, u64>,
    pub reads: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Events {
    pub reported: u64,
    pub suppressed: u64,
}

impl Calls {
    /// Those verdicts that were given.
    #[must_use]
    pub fn verdicts(&self) -> BTreeMap<&str, u64> {
        let given = self.verdicts.iter().filter(|(_, count)| **count > 0);
        given.map(|(verdict, count)| (verdict.as_str(), *count)).collect()
    }
}

/// All that an agent said.
#[derive(Debug)]
pub struct Report {
    pub events: Vec<Event>,
    /// As they were told, before the end.
    pub losses: Vec<Loss>,
    /// As they were told, at the beginning.
    pub unsupported: Vec<Unsupported>,
    /// Of reloads and of targets, as they were told.
    pub notices: Vec<Value>,
    pub summary: Summary,
    /// Of the agent's process; `stdout` is empty where the probe had it.
    pub output: Output,
}

impl Report {
    /// Reads JSON lines.
    #[track_caller]
    pub(crate) fn read(lines: &str, output: Output) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let fail = |line: &str, why: String| -> ! { panic!("not a line of a report: {why}\n{line}\nagent: {stderr}") };
        let (mut events, mut losses, mut unsupported) = (Vec::new(), Vec::new(), Vec::new());
        let (mut notices, mut summary) = (Vec::new(), None);
        for line in lines.lines() {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|error| fail(line, error.to_string()));
            if summary.is_some() {
                fail(line, "it comes after the summary".to_owned());
            }
            if value["event"] == "summary" {
                summary = Some(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if value["event"] == "loss" {
                losses.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if value["event"] == "unsupported" {
                unsupported.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            } else if ["reload", "targets", "apply-summary"].iter().any(|notice| value["event"] == *notice) {
                notices.push(value);
            } else {
                events.push(serde_json::from_value(value).unwrap_or_else(|error| fail(line, error.to_string())));
            }
        }
        let Some(summary) = summary else { panic!("no summary, {}; the agent said: {stderr}", output.status) };
        Self { events, losses, unsupported, notices, summary, output }
    }

    /// Whether the audit says that it does not see such calls.
    #[must_use]
    pub fn does_not_cover(&self, what: &str) -> bool {
        self.summary.not_covered.iter().flatten().any(|blind_to| blind_to == what)
    }

    /// The events of this kind about this option.
    pub fn of(&self, event: &str, option: &str) -> Vec<&Event> {
        self.events.iter().filter(|found| found.event == event && found.option == option).collect()
    }

    /// The conflicts about this option by this call.
    pub fn conflicts(&self, call: &str, option: &str) -> Vec<&Event> {
        self.of("conflict", option).into_iter().filter(|event| event.call.as_deref() == Some(call)).collect()
    }

    /// The only setsockopt call in conflict about this option.
    #[track_caller]
    #[must_use]
    pub fn conflict(&self, option: &str) -> &Event {
        self.only("setsockopt", option)
    }

    /// The only getsockopt call in conflict about this option.
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
                panic!("{} conflicts by {call} about {option}, not one; all events: {}", found.len(), all.concat())
            }
        }
    }

    /// The verdicts on setsockopt calls about this option, as they were reported.
    pub fn verdicts(&self, option: &str) -> Vec<&str> {
        let conflicts = self.conflicts("setsockopt", option).into_iter();
        conflicts.filter_map(|event| event.verdict.as_deref()).collect()
    }

    /// The only setting of this option.
    #[track_caller]
    #[must_use]
    pub fn setting(&self, option: &str) -> &Setting {
        let found: Vec<&Setting> = self.summary.settings.iter().filter(|setting| setting.option == option).collect();
        match found.as_slice() {
            [setting] => setting,
            found => panic!("{} settings of {option}, not one: {found:#?}", found.len()),
        }
    }

    /// The setting of this option by this rule.
    #[track_caller]
    #[must_use]
    pub fn setting_of(&self, rule: &str, option: &str) -> &Setting {
        let mut settings = self.summary.settings.iter();
        let found = settings.find(|setting| setting.rule == rule && setting.option == option);
        found.unwrap_or_else(|| panic!("rule {rule} has no setting of {option}: {:#?}", self.summary.settings))
    }

    /// Nothing was lost.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        let lost: Vec<_> = self.summary.losses.iter().filter(|(_, count)| **count > 0).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}
