//! Events as JSON. Fields are only ever added.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value as Json;

use super::{Call, Event, Kind, Limit, Socket, Via};
use crate::{
    container::Container,
    errno,
    options::{self, display_name},
    schema, values,
};

#[derive(Serialize)]
struct Line<'a> {
    schema: u32,
    time: String,
    event: &'static str,
    call: Option<&'static str>,
    policy: Option<&'a str>,
    rule: Option<&'a str>,
    file: Option<&'a str>,
    option: String,
    level: i32,
    optname: i32,
    /// The first 16 bytes of the argument, in memory order, as hexadecimal digits.
    optval: Option<String>,
    /// The length of the whole argument.
    optlen: Option<i32>,
    /// The unit of numbers in the fields below.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'static str>,
    #[serde(skip_serializing_if = "Json::is_null")]
    wanted: Json,
    #[serde(skip_serializing_if = "Option::is_none")]
    mask: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<Limit>,
    requested: Json,
    #[serde(skip_serializing_if = "Json::is_null")]
    applied: Json,
    #[serde(skip_serializing_if = "Json::is_null")]
    before: Json,
    current: Json,
    verdict: Option<String>,
    outcome: Option<String>,
    result: Option<i64>,
    pid: Option<u32>,
    tid: Option<u32>,
    comm: Option<&'a str>,
    exe: Option<&'a str>,
    cgroup: Option<&'a str>,
    container: Option<&'a Container>,
    socket: Option<&'a Socket>,
    via: Option<&'static str>,
    backend: Option<&'static str>,
    suppressed: u64,
    duration_ns: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    missing: BTreeMap<&'static str, &'a str>,
}

impl Event {
    /// Returns the event as one line of JSON, without the newline.
    #[must_use]
    pub fn to_json(&self) -> String {
        let (event, call, verdict, outcome) = match self.kind {
            Kind::Conflict { verdict } => ("conflict", Some(Call::Set.name()), Some(verdict.to_string()), None),
            Kind::Mismatch => ("mismatch", Some(Call::Get.name()), None, None),
            Kind::Call(call) => ("call", Some(call.name()), None, None),
            Kind::Drift => ("drift", None, None, None),
            Kind::Applied { .. } => {
                let outcome = if self.is_capped() { "capped" } else { "set" };
                ("applied", None, None, Some(outcome.to_owned()))
            }
            Kind::WouldApply => ("would-apply", None, None, None),
            Kind::Unknown { why } => ("unknown", None, None, Some(why.to_owned())),
            Kind::Outcome { errno } => ("outcome", None, None, Some(format!("failed({})", errno::name(errno)))),
        };
        let shown = |value| values::json(self.key, &options::as_passed(self.key, value));
        let cause = self.cause.as_ref();
        let task = self.task.as_ref();
        let line = Line {
            schema: schema::VERSION,
            time: schema::time_text(self.time),
            event,
            call,
            policy: cause.map(|cause| cause.policy.as_str()),
            rule: cause.map(|cause| cause.rule.as_str()),
            file: cause.map(|cause| cause.place.as_str()),
            option: display_name(self.key),
            level: self.key.level,
            optname: self.key.name,
            optval: (self.requested.len > 0).then(|| values::bytes_text(&self.requested)),
            optlen: self.optlen,
            unit: values::unit(self.key),
            wanted: values::json(self.key, &self.wanted_bits()),
            mask: cause.and_then(|cause| cause.mask),
            limit: cause.and_then(|cause| cause.limit),
            requested: values::json(self.key, &self.requested()),
            applied: values::json(self.key, &self.applied),
            before: match &self.kind {
                Kind::Applied { before, .. } => shown(before),
                _ => Json::Null,
            },
            current: match &self.kind {
                Kind::Applied { after, .. } => shown(after),
                _ => shown(&self.current),
            },
            verdict,
            outcome,
            result: match self.kind {
                Kind::Outcome { errno } => Some(-i64::from(errno)),
                _ => self.result,
            },
            pid: task.map(|task| task.pid),
            tid: task.map(|task| task.tid),
            comm: task.map(|task| task.comm.as_str()),
            exe: task.and_then(|task| task.exe.as_deref()),
            cgroup: task.and_then(|task| task.cgroup.as_deref()),
            container: task.and_then(|task| task.container.as_ref()),
            socket: self.socket.as_ref(),
            via: self.via.map(Via::name),
            backend: self.source.backend(),
            suppressed: self.suppressed,
            duration_ns: self.duration_ns,
            missing: self.missing.iter().map(|missing| (missing.what, missing.why.as_str())).collect(),
        };
        // Serialization cannot fail: the keys are strings, and no number is a float.
        serde_json::to_string(&line).unwrap_or_default()
    }
}
