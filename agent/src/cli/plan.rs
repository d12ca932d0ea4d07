//! `sockpolicy plan`: what `run` would do, without doing it and without any rights.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

use super::{
    FAILURE, FINDINGS, check, complain,
    output::Format,
    run::{self, RunError},
    unless_closed,
};
use crate::{
    compile::{Desired, Hook},
    events::SCHEMA,
    host::cgroup::{Cgroup, Mount},
    kernel::{self, BackendChoice},
    policy::{Policy, model::Mode},
    session,
};

/// Say what `run` would do: which programs it would attach where, and what for
///
/// The steps are those that `run` takes, from the same data. Whether this kernel can take them `doctor` says.
#[derive(Debug, clap::Args)]
pub(super) struct Plan {
    /// Policy files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Target, in place of the files' own: a cgroup's path below the cgroup2 mount, or absolute; can be given
    /// several times
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Decide and report, but change nothing
    #[arg(long)]
    dry_run: bool,
    /// How calls are to be seen
    #[arg(long, value_enum, default_value_t)]
    audit_backend: BackendChoice,
    /// Form of the plan
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Plan {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files) else { return FINDINGS.into() };
        match self.tell(&policies) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        }
    }

    fn tell(&self, policies: &[Policy]) -> Result<(), PlanError> {
        let desired = session::prepare(policies, self.dry_run, false).map_err(RunError::from)?;
        let mount = Mount::find().map_err(RunError::from)?;
        let targets = run::targets(&mount, &self.cgroup, policies)?;
        let written = match self.output {
            Format::Text => self.write_text(policies, &desired, &targets),
            Format::Json => self.write_json(&desired, &targets),
        };
        Ok(unless_closed(written)?)
    }

    fn write_text(&self, policies: &[Policy], desired: &Desired, targets: &[Cgroup]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let names: Vec<_> = policies.iter().map(|policy| policy.name.as_str()).collect();
        let mode = match desired.mode {
            Mode::Enforce => "enforced",
            Mode::DryRun => "dry run, nothing is changed",
        };
        writeln!(out, "{} ({mode})", names.join(", "))?;
        let mut last = None;
        for (hook, target) in desired.attachments(targets.len()) {
            if last.replace(target) != Some(target) {
                writeln!(out, "\non {}, and all below it:", targets[target].name)?;
            }
            let options: Vec<_> = desired.options_at(hook).iter().map(ToString::to_string).collect();
            let does = match (hook, options.is_empty(), desired.mode) {
                (Hook::Set, ..) => "judges calls on",
                (Hook::Get, ..) => "compares reads of",
                (_, true, _) => "keeps notes of each socket",
                (_, false, Mode::Enforce) => "sets",
                (_, false, Mode::DryRun) => "would set",
            };
            writeln!(out, "  attach {:18}  {}", hook.name(), format!("{does} {}", options.join(", ")).trim_end())?;
        }
        let calls = if desired.audit.reads { "setsockopt and getsockopt" } else { "setsockopt" };
        match self.backends()[..] {
            [] => writeln!(out, "\nno audit: results of calls are not seen"),
            ref backends => writeln!(out, "\nin the kernel:\n  attach to {calls}, by {}", backends.join(", or else ")),
        }
    }

    fn write_json(&self, desired: &Desired, targets: &[Cgroup]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for (hook, target) in desired.attachments(targets.len()) {
            let options: Vec<_> = desired.options_at(hook).iter().map(ToString::to_string).collect();
            let step = json!({
                "schema": SCHEMA,
                "step": "attach",
                "hook": hook.name(),
                "cgroup": targets[target].name,
                "options": options,
            });
            writeln!(out, "{step}")?;
        }
        let audit =
            json!({ "schema": SCHEMA, "step": "audit", "backends": self.backends(), "reads": desired.audit.reads });
        writeln!(out, "{audit}")
    }

    fn backends(&self) -> Vec<&'static str> {
        kernel::candidates(self.audit_backend).into_iter().map(kernel::Backend::name).collect()
    }
}

#[derive(Debug, thiserror::Error)]
enum PlanError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("cannot write the plan: {0}")]
    Write(#[from] io::Error),
}
