//! The summary as JSON: the last line of the output.

use serde_json::{Map, Value, json};

use super::{CallLine, Example, Line, Summary, common_mode};
use crate::{
    events::{Action, Verdict},
    policy::model::Mode,
    schema,
    unsupported::Unsupported,
    values,
};

impl Summary {
    /// Returns the counters of each setting.
    #[must_use]
    pub fn settings_json(&self) -> Vec<Value> {
        self.lines.iter().map(line_json).collect()
    }

    /// Returns the summary as one line of JSON, without the newline.
    #[must_use]
    pub fn to_json(&self, time: jiff::Timestamp) -> String {
        let Self {
            policies,
            targets,
            audit,
            unsupported,
            lines: _,
            earlier_conflicts: _,
            repaired,
            other_cgroups,
            calls,
            lost,
        } = self;
        let losses: Map<String, Value> =
            lost.by_reason().into_iter().map(|(reason, count)| (reason.name.to_owned(), count.into())).collect();
        let fields = json!({
            "mode": common_mode(policies).map_or("mixed", Mode::name),
            "policies": policies.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "targets": targets,
            "backend": audit.map(|audit| audit.backend),
            "not_covered": audit.map(|audit| audit.not_covered),
            "unsupported": unsupported.iter().map(Unsupported::to_json).collect::<Vec<_>>(),
            "conflicts": self.conflicts(),
            "mismatches": self.mismatches(),
            "repaired": { "sockets": repaired.sockets, "listeners": repaired.listeners },
            "other_cgroups": other_cgroups,
            "settings": self.settings_json(),
            "call_counts": calls.iter().map(CallLine::to_json).collect::<Vec<_>>(),
            "losses": losses,
        });
        schema::line_at(time, "summary", fields).to_string()
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
    let (set, capped) = if line.cap.is_some() { (0, set) } else { (set, 0) };
    let dry_run = line.mode == Mode::DryRun;
    let verdicts: Map<String, Value> = Action::ALL
        .into_iter()
        .zip(verdicts)
        .map(|(what, count)| (Verdict { what, dry_run }.to_string(), count.into()))
        .collect();
    let key = line.option.key();
    let examples = |is_wanted: fn(&Example) -> bool| -> Vec<Value> {
        let examples = line.requested.iter().filter(|example| is_wanted(example));
        examples.map(|example| example.to_json(line.mode)).collect()
    };
    let mut fields = json!({
        "policy": line.policy,
        "rule": line.rule,
        "file": line.place,
        "mode": line.mode.name(),
        "option": line.option.to_string(),
        "level": key.level,
        "optname": key.name,
        "unit": values::unit(key),
        "sockets": {
            "set": set, "capped": capped, "unchanged": unchanged, "failed": failed, "failed_errno": failed_errno,
        },
        "calls": { "agreed": agreed, "conflicts": verdicts, "reads": reads },
        "events": { "reported": reported, "suppressed": suppressed },
        "requested": examples(|example| example.verdict.is_some()),
        "read": examples(|example| example.verdict.is_none()),
        "limitations": line.unsupported.iter().map(|(entry, _)| entry.name).collect::<Vec<_>>(),
    });
    if let (Value::Object(fields), Value::Object(form)) = (&mut fields, values::form_fields(key, &line.form)) {
        fields.extend(form);
    }
    fields
}
