//! How reports are written: for people or as JSON lines, to a terminal or a file.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use serde_json::{Value, json};

use super::in_line::Tally;
use crate::{
    events::{Event, Kind, SCHEMA},
    kernel::{self, Audit, BackendChoice},
    policy::model::Mode,
    report::{Loss, Summary},
    session::{GapsChoice, Session},
};

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// How calls are seen and reported, for whatever command does so.
#[derive(Debug, clap::Args)]
pub(super) struct Reporting {
    /// Report summary only, no events
    #[arg(long, short)]
    quiet: bool,
    /// Form of the report
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
    /// How to see the calls' results
    #[arg(long, value_enum, default_value_t, value_name = "BACKEND")]
    pub(super) audit_backend: BackendChoice,
    /// Measure how long each call takes
    #[arg(long)]
    pub(super) timing: bool,
    /// Exit with 1 if a call disagreed with the policy (and the command, if any, succeeded)
    #[arg(long)]
    pub(super) fail_on_conflict: bool,
}

/// How a policy is put in force.
#[derive(Debug, clap::Args)]
pub(super) struct Manner {
    /// Change nothing; report what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    pub(super) gaps: GapsArgument,
    #[command(flatten)]
    pub(super) reporting: Reporting,
}

/// What to do about what this kernel cannot do.
#[derive(Debug, clap::Args)]
pub(super) struct GapsArgument {
    /// Go on without what this kernel cannot do of what the policies say; it is reported
    #[arg(long)]
    allow_gaps: bool,
}

impl GapsArgument {
    pub(super) fn choice(&self) -> GapsChoice {
        if self.allow_gaps { GapsChoice::Allow } else { GapsChoice::Refuse }
    }
}

/// Where events and the summary go.
pub(super) struct Writer {
    format: Format,
    /// Whether events are left out.
    quiet: bool,
    out: Box<dyn Write>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write the report to {place}: {source}")]
pub(super) struct ReportError {
    pub(super) place: String,
    pub(super) source: io::Error,
}

impl Writer {
    pub(super) fn new(reporting: &Reporting, out: impl Write + 'static) -> Self {
        Self { format: reporting.output, quiet: reporting.quiet, out: Box::new(out) }
    }

    /// Writes to a file, made anew.
    pub(super) fn to_file(reporting: &Reporting, path: &Path) -> Result<Self, ReportError> {
        let file = File::create(path).map_err(|source| ReportError { place: path.display().to_string(), source })?;
        Ok(Self::new(reporting, BufWriter::new(file)))
    }

    /// Says what has been put in force, before anything comes of it. JSON has events only.
    pub(super) fn announce(&mut self, session: &Session) -> io::Result<()> {
        for gap in session.gaps().iter().filter(|_| !self.quiet) {
            match self.format {
                Format::Text => writeln!(self.out, "gap       {gap}")?,
                Format::Json => writeln!(self.out, "{}", gap.to_event(jiff::Timestamp::now()))?,
            }
        }
        if self.format == Format::Json || self.quiet {
            return Ok(());
        }
        let desired = session.desired();
        let targets = kernel::names(session.targets()).join(", ");
        let audit = session.audit().map_or_else(|| "no audit".to_owned(), describe_audit);
        if desired.rules.is_empty() {
            writeln!(self.out, "sockpolicy: watching the calls of cgroup {targets}; {audit}")?;
            return self.out.flush();
        }
        let policies = |wanted| {
            let names: Vec<_> =
                desired.policies().into_iter().filter(|(_, mode)| *mode == wanted).map(|(name, _)| name).collect();
            names.join(", ")
        };
        let (enforced, dry) = (policies(Mode::Enforce), policies(Mode::DryRun));
        let doing = match (enforced.as_str(), dry.as_str()) {
            ("", dry) => format!("dry run of {dry}"),
            (enforced, "") => format!("enforcing {enforced}"),
            (enforced, dry) => format!("enforcing {enforced}, dry run of {dry}"),
        };
        let hooks: Vec<&str> = desired.hooks().iter().map(|hook| hook.name()).collect();
        let targets = if targets.is_empty() { "no cgroup yet".to_owned() } else { format!("cgroup {targets}") };
        writeln!(
            self.out,
            "sockpolicy: {doing} on {targets}: {} rules, {} options; {}; {audit}",
            desired.rules.len(),
            desired.named,
            hooks.join(", "),
        )?;
        self.out.flush()
    }

    /// Says what is in force after the files were read again: the old policies where these are not valid.
    pub(super) fn reloaded(&mut self, session: &Session, is_new: bool) -> io::Result<()> {
        if self.format == Format::Text && is_new {
            return self.announce(session);
        }
        let policies: Vec<&str> = session.desired().policies().into_iter().map(|(name, _)| name).collect();
        self.notice(
            &format!("reload    refused; still in force: {}", policies.join(", ")),
            json!({ "event": "reload", "in_force": is_new, "policies": policies, "targets": kernel::names(session.targets()) }),
        )
    }

    /// Says where the policies hold, cgroups having come or gone.
    pub(super) fn retargeted(&mut self, session: &Session) -> io::Result<()> {
        let targets = kernel::names(session.targets());
        let shown = if targets.is_empty() { "none".to_owned() } else { targets.join(", ") };
        self.notice(&format!("targets   {shown}"), json!({ "event": "targets", "targets": targets }))
    }

    /// Says what was done to one live socket: for people only where it could not be, for there may be thousands.
    pub(super) fn applied(&mut self, event: &Event) -> io::Result<()> {
        match (self.format, event.kind) {
            (Format::Text, Kind::Applied { .. } | Kind::WouldApply | Kind::Untold { .. }) => Ok(()),
            _ => self.event(event),
        }
    }

    /// Says what has come of bringing live sockets in line.
    pub(super) fn brought_in_line(&mut self, tally: &Tally) -> io::Result<()> {
        let text = tally.to_text();
        let lines: Vec<String> = text.lines().map(|line| format!("live      {line}")).collect();
        self.notice(&lines.join("\n"), tally.to_json("live"))
    }

    fn notice(&mut self, text: &str, mut event: Value) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        match self.format {
            Format::Text => writeln!(self.out, "{text}")?,
            Format::Json => {
                event["schema"] = SCHEMA.into();
                event["time"] = format!("{:.6}", jiff::Timestamp::now()).into();
                writeln!(self.out, "{event}")?;
            }
        }
        self.out.flush()
    }

    pub(super) fn event(&mut self, event: &Event) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        match self.format {
            Format::Text => writeln!(self.out, "{event}"),
            Format::Json => writeln!(self.out, "{}", event.to_json()),
        }
    }

    /// Says what was lost, also where events are left out: it is then the summary that is not whole.
    pub(super) fn loss(&mut self, loss: &Loss) -> io::Result<()> {
        match self.format {
            Format::Text => writeln!(self.out, "{loss}"),
            Format::Json => writeln!(self.out, "{}", loss.to_json(jiff::Timestamp::now())),
        }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    pub(super) fn summary(&mut self, summary: &Summary) -> io::Result<()> {
        match self.format {
            Format::Text => write!(self.out, "{summary}")?,
            Format::Json => writeln!(self.out, "{}", summary.to_json(jiff::Timestamp::now()))?,
        }
        self.out.flush()
    }
}

/// How calls are seen, and which are not.
pub(super) fn describe_audit(audit: Audit) -> String {
    let points: Vec<_> = audit.points().collect();
    let seen = format!("audit by {} of {}", audit.backend, points.join(" and "));
    match audit.blind_to() {
        [] => seen,
        blind_to => format!("{seen} (does not see {})", blind_to.join(", ")),
    }
}
