//! How reports are written: for people or as JSON lines, to a terminal or a file.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use crate::{events::Event, kernel::BackendChoice, report::Summary, session::Session};

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// How a policy is put in force and reported, for whatever command does so.
#[derive(Debug, clap::Args)]
pub(super) struct Manner {
    /// Change nothing; report what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Report summary only, no events
    #[arg(long, short)]
    quiet: bool,
    /// Form of the report
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
    /// How to see the calls' results
    #[arg(long, value_enum, default_value_t, value_name = "BACKEND")]
    pub(super) audit_backend: BackendChoice,
    /// Exit with 1 if a call disagreed with the policy (and the command, if any, succeeded)
    #[arg(long)]
    pub(super) fail_on_conflict: bool,
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
    pub(super) fn new(manner: &Manner, out: impl Write + 'static) -> Self {
        Self { format: manner.output, quiet: manner.quiet, out: Box::new(out) }
    }

    /// Writes to a file, made anew.
    pub(super) fn to_file(manner: &Manner, path: &Path) -> Result<Self, ReportError> {
        let file = File::create(path).map_err(|source| ReportError { place: path.display().to_string(), source })?;
        Ok(Self::new(manner, BufWriter::new(file)))
    }

    /// Says what has been put in force, before anything comes of it. JSON has events only.
    pub(super) fn announce(&mut self, session: &Session) -> io::Result<()> {
        if self.format == Format::Json || self.quiet {
            return Ok(());
        }
        let desired = session.desired();
        let mode = match desired.mode {
            crate::policy::model::Mode::Enforce => "enforcing",
            crate::policy::model::Mode::DryRun => "dry run of",
        };
        let targets: Vec<&str> = session.targets().iter().map(|target| target.name.as_str()).collect();
        let hooks: Vec<&str> = desired.hooks.iter().map(|hook| hook.name()).collect();
        let audit = session.backend().map_or_else(
            || "no audit".to_owned(),
            |backend| format!("audit by {backend} (does not see {})", backend.blind_to()),
        );
        let mut policies: Vec<&str> = desired.rules.iter().map(|rule| rule.policy.as_str()).collect();
        policies.dedup();
        writeln!(
            self.out,
            "sockpolicy: {mode} {} on cgroup {}: {} rules, {} options; {}; {audit}",
            policies.join(", "),
            targets.join(", "),
            desired.rules.len(),
            desired.options.len(),
            hooks.join(", "),
        )?;
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
