//! The summary as a line of JSON, the last one.

use serde_json::{Map, Value, json};

use super::{Line, Summary};
use crate::{
    events::{Deed, SCHEMA, Verdict},
    policy::model::Mode,
};

impl Summary {
    /// The summary as one line of JSON, without its end.
    #[must_use]
    pub fn to_json(&self, time: jiff::Timestamp) -> String {
        let Self { mode, policies, targets, backend, lines, losses, unknown_records } = self;
        let abi::Losses { ring_full, calls_full, unreadable, no_storage, no_room } = losses;
        json!({
            "schema": SCHEMA,
            "time": format!("{time:.6}"),
            "event": "summary",
            "mode": match mode { Mode::Enforce => "enforce", Mode::DryRun => "dry-run" },
            "policies": policies,
            "targets": targets,
            "backend": backend.map(super::Backend::name),
            "conflicts": self.conflicts(),
            "settings": lines.iter().map(|line| line_json(line, *mode)).collect::<Vec<_>>(),
            "losses": {
                "ring_full": ring_full,
                "calls_full": calls_full,
                "unreadable": unreadable,
                "no_storage": no_storage,
                "no_room": no_room,
                "unknown_records": unknown_records,
            },
        })
        .to_string()
    }
}

fn line_json(line: &Line, mode: Mode) -> Value {
    let abi::Counters { set, unchanged, failed, failed_errno, agreed, verdicts, reads, reported, suppressed } =
        line.counters;
    let dry_run = mode == Mode::DryRun;
    let verdicts: Map<String, Value> = Deed::ALL
        .into_iter()
        .zip(verdicts)
        .map(|(what, count)| (Verdict { what, dry_run }.to_string(), count.into()))
        .collect();
    let key = line.source.option.key();
    json!({
        "policy": line.policy,
        "rule": line.rule,
        "file": line.place,
        "option": line.source.option.to_string(),
        "level": key.level,
        "optname": key.name,
        "wanted": line.wanted(),
        "sockets": { "set": set, "unchanged": unchanged, "failed": failed, "failed_errno": failed_errno },
        "calls": { "agreed": agreed, "conflicts": verdicts, "reads": reads },
        "events": { "reported": reported, "suppressed": suppressed },
        "asked": line.asked,
    })
}
