//! How reports are written: for people or as JSON lines, to a terminal or a file.

use std::{collections::HashSet, fmt, io, path::Path};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use jiff::tz::TimeZone;
use nix::errno::Errno;
use serde_json::{Value, json};

use super::{
    descriptor::Standard,
    messages::{self, print_error},
    sink::{Sink, Target, Unfinished, loss_line},
};
use crate::{
    compile::Hook,
    daemon::{Observer, TargetNames},
    escape::{self, Escape, visible},
    events::{Event, Kind},
    kernel::{self, Audit, BackendChoice},
    plural::counted,
    policy::{diagnostic::Diagnostic, model::Mode},
    reconcile::Tally,
    report::{Loss, Summary, common_mode},
    schema,
    session::{OnUnsupported, Session},
    sources::IfInsecure,
    wrap,
};

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Text for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// The audit backends on the command line, with their help.
const BACKENDS: [(&str, BackendChoice, &str); 5] = [
    (
        DEFAULT_BACKEND,
        BackendChoice::Auto,
        "The cheapest backend that this kernel supports; on preemptible kernels kprobe, which misses no calls there",
    ),
    ("fentry", BackendChoice::Fentry, "Programs at the entry and exit of kernel functions; needs BTF"),
    ("kprobe", BackendChoice::Kprobe, "Probes at the entry and exit of kernel functions"),
    ("tracepoint", BackendChoice::Tracepoint, "The tracepoints of system calls"),
    ("none", BackendChoice::None, "No audit: conflicts are reported without the result of the call"),
];

pub(super) const DEFAULT_BACKEND: &str = "auto";

/// Parses the name of an audit backend.
pub(super) fn backend_parser() -> impl TypedValueParser<Value = BackendChoice> {
    let values = BACKENDS.map(|(name, _, help)| PossibleValue::new(name).help(help));
    PossibleValuesParser::new(values).map(|name| {
        let found = BACKENDS.iter().find(|(known, ..)| *known == name);
        found.map_or(BackendChoice::Auto, |(_, choice, _)| *choice)
    })
}

/// How a command observes and reports calls.
#[derive(Debug, clap::Args)]
pub(super) struct ReportArgs {
    /// Print the summary only
    #[arg(long, short)]
    quiet: bool,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    pub(super) output: Format,
    /// Begin each line about a call or a socket with the local time of day, as `strace -tt` does. JSON always has the time
    #[arg(long, short = 't')]
    times: bool,
    /// How to observe calls
    #[arg(long, value_name = "BACKEND", value_parser = backend_parser(), default_value = DEFAULT_BACKEND)]
    pub(super) audit_backend: BackendChoice,
    /// Measure the duration of calls
    #[arg(long)]
    pub(super) timing: bool,
    /// Exit with status 1 if a call conflicted with a policy (and the command, if any, succeeded)
    #[arg(long)]
    pub(super) fail_on_conflict: bool,
}

/// How policies are enforced.
#[derive(Debug, clap::Args)]
pub(super) struct EnforceArgs {
    /// Evaluate and report, without changing anything
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) unsupported: UnsupportedArgs,
    #[command(flatten)]
    pub(super) reporting: ReportArgs,
}

/// What to do about policy files that other users can change.
#[derive(Debug, clap::Args)]
pub(super) struct TrustArgs {
    /// Accept policy files that users other than root and the caller own or can change
    #[arg(long)]
    insecure_policies: bool,
}

impl TrustArgs {
    /// For a command that changes something by what the files say.
    pub(super) fn or_refuse(&self) -> IfInsecure {
        if self.insecure_policies { IfInsecure::Accept } else { IfInsecure::Refuse }
    }

    /// For a command that changes nothing.
    pub(super) fn or_warn(&self) -> IfInsecure {
        if self.insecure_policies { IfInsecure::Accept } else { IfInsecure::Warn }
    }
}

/// What to do about settings that this kernel does not support.
#[derive(Debug, clap::Args)]
pub(super) struct UnsupportedArgs {
    /// Enforce what the kernel supports and report the rest
    #[arg(long)]
    allow_unsupported: bool,
}

impl UnsupportedArgs {
    pub(super) fn choice(&self) -> OnUnsupported {
        if self.allow_unsupported { OnUnsupported::Allow } else { OnUnsupported::Refuse }
    }
}

/// Writes events and the summary. Writing does not block and does not fail: see [`super::sink`].
pub(super) struct Writer {
    format: Format,
    /// Whether events are left out.
    quiet: bool,
    /// The time zone of the times before events, if these are written.
    zone: Option<TimeZone>,
    out: Sink,
    /// The width to which text is wrapped, in columns.
    width: usize,
    /// The name of the output, for messages.
    place: String,
}

/// The maximum number of new targets, and of removed targets, that a JSON line names.
const TARGETS_SHOWN: usize = 64;
/// The maximum number of new targets, and of removed targets, that a line of text names.
const TARGETS_WRITTEN: usize = 16;

#[derive(Debug, thiserror::Error)]
#[error("cannot write the report to {place}: {source}")]
pub(super) struct ReportError {
    pub(super) place: String,
    pub(super) source: io::Error,
}

/// The end of the report could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the report to {place}: {reason}{}", lost_text(*.lost))]
pub(super) struct IncompleteReport {
    place: String,
    reason: String,
    lost: u64,
}

fn lost_text(lost: u64) -> String {
    if lost == 0 { String::new() } else { format!("; {} missing", counted(lost, "line")) }
}

impl Writer {
    /// Writes to standard output or standard error.
    pub(super) fn to_standard(reporting: &ReportArgs, standard: Standard) -> Result<Self, ReportError> {
        let place = match standard {
            Standard::Output => "standard output",
            Standard::Error => "standard error",
        };
        let is_messages_too = standard == Standard::Error || Standard::are_one();
        let messages = messages::queue().filter(|_| is_messages_too);
        Self::start(reporting, Target::Standard(standard), place.to_owned(), messages)
    }

    /// Writes to a file, which is created or replaced.
    pub(super) fn to_file(reporting: &ReportArgs, path: &Path) -> Result<Self, ReportError> {
        let place = path.escaped().to_string();
        let target = Target::file(path).map_err(|source| ReportError { place: place.clone(), source })?;
        Self::start(reporting, target, place, None)
    }

    fn start(reporting: &ReportArgs, target: Target, place: String, shared: Option<Sink>) -> Result<Self, ReportError> {
        let width = match &target {
            Target::Standard(standard) => standard.width(),
            Target::File(_) | Target::Fifo { .. } => None,
        };
        let width = width.unwrap_or(usize::MAX);
        let started =
            || Sink::start(target, reporting.output).map_err(|source| ReportError { place: place.clone(), source });
        let out = shared.map_or_else(started, Ok)?;
        let zone = reporting.times.then(TimeZone::system);
        Ok(Self { format: reporting.output, quiet: reporting.quiet, zone, out, width, place })
    }

    fn line(&self, line: &dyn fmt::Display) {
        self.out.put(&self.lines(line));
    }

    /// Returns lines as they are written: text is wrapped, and its control characters are escaped.
    fn lines(&self, lines: &dyn fmt::Display) -> String {
        match self.format {
            Format::Text => wrap::lines(&visible(&format!("{lines}\n"), true), self.width),
            Format::Json => format!("{lines}\n"),
        }
    }

    /// Writes what is in force, before the first event.
    pub(super) fn announce(&self, session: &Session) {
        if self.format == Format::Json {
            self.notice("", "started", started_json(session));
        }
        for unsupported in session.unsupported().iter().filter(|_| !self.quiet) {
            match self.format {
                Format::Text => self.line(&format_args!("unsupported {unsupported}")),
                Format::Json => self.line(&unsupported.to_event(jiff::Timestamp::now())),
            }
        }
        let desired = session.desired();
        if self.format == Format::Json || self.quiet {
            return;
        }
        let targets = escape::join(kernel::names(session.targets()), ", ");
        let audit = session.audit().map_or_else(|| "no audit".to_owned(), describe_audit);
        if desired.scopes.is_empty() {
            return self.line(&"sockpolicy: waiting for policies: there is none");
        }
        if desired.rules.is_empty() {
            return self.line(&format_args!("sockpolicy: observing the calls of cgroup {targets}; {audit}"));
        }
        let policies = |wanted| {
            let policies = desired.policies().into_iter().filter(|(_, mode)| *mode == wanted);
            escape::join(policies.map(|(name, _)| name), ", ")
        };
        let (enforced, dry) = (policies(Mode::Enforce), policies(Mode::DryRun));
        let doing = match (enforced.as_str(), dry.as_str()) {
            ("", dry) => format!("dry run of {dry}"),
            (enforced, "") => format!("enforcing {enforced}"),
            (enforced, dry) => format!("enforcing {enforced}, dry run of {dry}"),
        };
        let hooks: Vec<&str> = desired.hooks().iter().map(|hook| hook.name()).collect();
        let targets = if targets.is_empty() { "no cgroup yet".to_owned() } else { format!("cgroup {targets}") };
        self.line(&format_args!(
            "sockpolicy: {doing} on {targets}: {}, {}; {}; {audit}",
            counted(desired.rules.len() as u64, "rule"),
            counted(desired.named as u64, "option"),
            hooks.join(", "),
        ));
        if desired.audit_judges {
            self.line(&format_args!(
                "sockpolicy: the audit judges the calls that it sees: no program is at {}",
                Hook::Setsockopt
            ));
        } else if let Some(reason) =
            session.needs_hook().filter(|_| desired.is_dry_run() && desired.is_judged_by_hook())
        {
            self.line(&format_args!("sockpolicy: this dry run attaches to {}: {reason}", Hook::Setsockopt));
        }
    }

    /// Writes what is queued, if there is a reader, so that it precedes what other processes write.
    pub(super) fn settle(&self) {
        self.out.settle();
    }

    fn notice(&self, text: &str, event: &str, fields: Value) {
        if self.quiet {
            return;
        }
        match self.format {
            Format::Text => self.line(&text),
            Format::Json => self.line(&schema::line_at(jiff::Timestamp::now(), event, fields)),
        }
    }

    /// Writes the summary, and waits for a bounded time until everything is written.
    ///
    /// # Errors
    ///
    /// Fails if the end of the report cannot be written. It is no error that the reader has closed the output.
    pub(super) fn summary(self, mut summary: Summary) -> Result<(), IncompleteReport> {
        summary.lost.unwritten = self.out.lost();
        if messages::queue().is_some_and(|messages| !messages.is_same(&self.out)) {
            summary.lost.unwritten = summary.lost.unwritten.plus(&messages::lost());
        }
        self.out.put_last(&match self.format {
            Format::Text => wrap::lines(&visible(&summary.to_string(), true), self.width),
            Format::Json => format!("{}\n", summary.to_json(jiff::Timestamp::now())),
        });
        let reason = match self.out.finish() {
            Ok(()) | Err(Unfinished::Failed(Errno::EPIPE)) => return Ok(()),
            Err(Unfinished::Stuck) => "the reader does not read it".to_owned(),
            Err(Unfinished::Failed(errno)) => io::Error::from(errno).to_string(),
        };
        Err(IncompleteReport { place: self.place, reason, lost: self.out.lost().total() })
    }
}

impl Observer for Writer {
    /// Writes what is in force after a reload.
    fn reloaded(&self, session: &Session, refused: Option<&str>) {
        if self.format == Format::Text && refused.is_none() {
            return self.announce(session);
        }
        let policies: Vec<&str> = session.desired().policies().into_iter().map(|(name, _)| name).collect();
        self.notice(
            &format!(
                "reload    refused: {}; still in force: {}",
                refused.unwrap_or_default().escaped(),
                escape::join(&policies, ", ")
            ),
            "reload",
            json!({
                "in_force": refused.is_none(), "error": refused,
                "policies": policies, "targets": kernel::names(session.targets()),
            }),
        );
    }

    /// Writes the new and the removed targets.
    fn retargeted(&self, before: &TargetNames, after: &TargetNames) {
        let only_in = |one: &TargetNames, other: &TargetNames| -> Vec<String> {
            let others: HashSet<u64> = other.keys().map(|(cgroup, _)| *cgroup).collect();
            one.iter().filter(|((cgroup, _), _)| !others.contains(cgroup)).map(|(_, name)| name.clone()).collect()
        };
        let (added, removed) = (only_in(after, before), only_in(before, after));
        let shown = |sign: &str, names: &[String]| {
            let listed: String =
                names.iter().take(TARGETS_WRITTEN).map(|name| format!(" {sign}{}", name.escaped())).collect();
            let others = names.len().saturating_sub(TARGETS_WRITTEN);
            if others == 0 { listed } else { format!("{listed} {sign}{others} more") }
        };
        let text = format!("targets   {}:{}{}", after.len(), shown("+", &added), shown("-", &removed));
        let first = |names: &[String]| names.iter().take(TARGETS_SHOWN).cloned().collect::<Vec<_>>();
        let fields = json!({
            "count": after.len(),
            "added": first(&added), "added_count": added.len(),
            "removed": first(&removed), "removed_count": removed.len(),
        });
        self.notice(&text, "targets", fields);
    }

    /// Writes what was done to one live socket. Text has only failures, since there may be thousands of sockets.
    fn applied(&self, event: &Event) {
        match (self.format, event.kind) {
            (Format::Text, Kind::Applied { .. } | Kind::WouldApply | Kind::Unknown { .. }) => {}
            _ => self.event(event),
        }
    }

    /// Writes the counts of a reconciliation.
    fn reconciled(&self, tally: &Tally) {
        let text = tally_text(tally);
        let lines: Vec<String> = text.lines().map(|line| format!("live      {line}")).collect();
        self.notice(&lines.join("\n"), "apply-summary", tally.to_json());
    }

    fn repaired(&self, tally: &Tally) {
        if tally.is_without_findings() {
            return;
        }
        let lines: Vec<String> = tally_text(tally).lines().map(|line| format!("repair    {line}")).collect();
        self.notice(&lines.join("\n"), "repair-summary", tally.to_json());
    }

    fn event(&self, event: &Event) {
        match self.format {
            _ if self.quiet => {}
            Format::Text => match &self.zone {
                Some(zone) => self.line(&format_args!("{} {event}", time_of_day(event.time, zone))),
                None => self.line(event),
            },
            Format::Json => self.line(&event.to_json()),
        }
    }

    /// Writes a loss, also with --quiet: the summary is then incomplete.
    fn loss(&self, loss: &Loss) {
        self.out.put(&loss_line(loss, self.format));
    }

    /// Returns whether the reader has closed the output.
    fn is_closed(&self) -> bool {
        self.out.is_closed()
    }

    fn diagnostics(&self, found: &[Diagnostic]) {
        messages::show(found);
    }

    #[track_caller]
    fn error(&self, error: &(dyn std::error::Error + 'static)) {
        print_error(error);
    }
}

/// Returns the fields of the first line: what is in force.
fn started_json(session: &Session) -> Value {
    let desired = session.desired();
    let policies = desired.policies();
    let audit = session.audit();
    json!({
        "mode": common_mode(&policies).map_or("mixed", Mode::name),
        "policies": policies.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        "targets": kernel::names(session.targets()),
        "hooks": desired.hooks().iter().map(|hook| hook.name()).collect::<Vec<_>>(),
        "backend": audit.map(|audit| audit.backend.name()),
        "not_covered": audit.map(Audit::not_covered),
        "rule_count": desired.rules.iter().filter(|rule| rule.instance.is_none()).count(),
        "option_count": desired.named,
    })
}

/// Returns the time of day with microseconds.
fn time_of_day(time: jiff::Timestamp, zone: &TimeZone) -> impl fmt::Display {
    time.to_zoned(zone.clone()).strftime("%H:%M:%S%.6f").to_string()
}

/// Returns how calls are observed, and which calls are not.
pub(super) fn describe_audit(audit: Audit) -> String {
    let points: Vec<_> = audit.points().collect();
    let seen = format!("audit by {} of {}", audit.backend, points.join(" and "));
    match audit.not_covered() {
        [] => seen,
        not_covered => format!("{seen} (does not see {})", not_covered.join(", ")),
    }
}

/// Returns the counts of a reconciliation as lines, one for each kind of result.
pub(super) fn tally_text(tally: &Tally) -> String {
    let Tally { sockets, changed, set, capped, would_set, would_change, .. } = *tally;
    let Tally { listeners: _, failed, unknown, no_fd, denied, unanswered, unread_processes, .. } = *tally;
    let sockets = counted(sockets, "socket");
    let mut lines = Vec::new();
    if would_set > 0 {
        lines.push(format!("dry run: would change {} on {would_change} of {sockets}", counted(would_set, "option")));
    }
    if set + capped > 0 || would_set == 0 {
        lines.push(format!("changed {} on {changed} of {sockets}", counted(set + capped, "option")));
    }
    for (count, noun, what) in [
        (capped, "option", "capped: the kernel took less than the policy wants"),
        (failed, "option", "refused by the kernel"),
        (unknown, "option", "unknown: whether the value agrees with the policy cannot be determined"),
        (no_fd, "socket", "skipped: no file descriptor refers to it"),
        (denied, "socket", "skipped: permission denied, or no answer"),
        (unanswered, "socket", "skipped: no answer in time"),
        (unread_processes, "process", "skipped: permission denied (run sockpolicy as root)"),
    ] {
        if count > 0 {
            lines.push(format!("{} {what}", counted(count, noun)));
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}
