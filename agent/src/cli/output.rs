//! How reports are written: for people or as JSON lines, to a terminal or a file.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use crate::{events::Event, report::Summary, session::Session};

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
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
    pub(super) fn new(format: Format, quiet: bool, out: impl Write + 'static) -> Self {
        Self { format, quiet, out: Box::new(out) }
    }

    /// Writes to a file, made anew.
    pub(super) fn to_file(format: Format, quiet: bool, path: &Path) -> Result<Self, ReportError> {
        let file = File::create(path).map_err(|source| ReportError { place: path.display().to_string(), source })?;
        Ok(Self::new(format, quiet, BufWriter::new(file)))
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
