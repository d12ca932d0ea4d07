//! The summary as a line of JSON, the last one.

use serde_json::{Map, Value, json};

use super::{CallLine, Example, Line, Summary, common_mode};
use crate::{
    events::{Action, SCHEMA, Verdict},
    policy::model::Mode,
    unsupported::Unsupported,
};

impl Summary {
    /// What came of each setting.
    #[must_use]
    pub fn settings_json(&self) -> Vec<Value> {
        self.lines.iter().map(line_json).collect()
    }

    /// The summary as one line of JSON, without its end.
    #[must_use]
    pub fn to_json(&self, time: jiff::Timestamp) -> String {
        let Self { policies, targets, audit, unsupported, lines: _, earlier_conflicts: _, calls, lost } = self;
        let losses: Map<String, Value> =
            lost.by_reason().into_iter().map(|(reason, count)| (reason.name.to_owned(), count.into())).collect();
        json!({
            "schema": SCHEMA,
            "time": format!("{time:.6}"),
            "event": "summary",
            "mode": common_mode(policies).map_or("mixed", Mode::name),
            "policies": policies.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "targets": targets,
            "backend": audit.map(|audit| audit.backend.name()),
            "not_covered": audit.map(super::Audit::not_covered),
            "unsupported": unsupported.iter().map(Unsupported::to_json).collect::<Vec<_>>(),
            "conflicts": self.conflicts(),
            "settings": self.settings_json(),
            "calls": calls.iter().map(CallLine::to_json).collect::<Vec<_>>(),
            "losses": losses,
        })
        .to_string()
    }
}

fn line_json(line: &Line) -> Value {
    let abi::Counters {
        set,
        unchanged,
        failed,
        failed_errno,
        agreed,
        verdicts,
        reads,
        reported,
        suppressed,
        undone: _,
        _pad: _,
    } = line.counters;
    let dry_run = line.mode == Mode::DryRun;
    let verdicts: Map<String, Value> = Action::ALL
        .into_iter()
        .zip(verdicts)
        .map(|(what, count)| (Verdict { what, dry_run }.to_string(), count.into()))
        .collect();
    let key = line.option.key();
    json!({
        "policy": line.policy,
        "rule": line.rule,
        "file": line.place,
        "mode": line.mode.name(),
        "option": line.option.to_string(),
        "level": key.level,
        "optname": key.name,
        "wanted": line.wanted(),
        "sockets": { "set": set, "unchanged": unchanged, "failed": failed, "failed_errno": failed_errno },
        "calls": { "agreed": agreed, "conflicts": verdicts, "reads": reads },
        "events": { "reported": reported, "suppressed": suppressed },
        "requested": line.requested.iter().map(Example::plain).collect::<Vec<_>>(),
        "unsupported": line.unsupported.iter().map(|(entry, _)| entry.name).collect::<Vec<_>>(),
    })
}
