//! `sockpolicy apply`: brings sockets that are there in line with policies, and puts back what they had.

use std::{
    io::{self, BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

use super::{
    FAILURE, check,
    descriptor::stdout,
    ignore_broken_pipe,
    output::{Format, TrustArgs, tally_text},
    print_error,
    progress::Progress,
    run::DEFAULT_INSTANCE,
};
use crate::{
    compile::{CompileError, compile},
    daemon::Signals,
    escape::{self, Escape as _},
    events::Event,
    host::{
        cgroup::{CgroupError, Mount},
        socket_table::SurveyError,
    },
    instance::{self, InstanceError},
    journal::{self, Journal},
    kernel,
    plural::counted,
    policy::Policy,
    reconcile::{
        LazyIter, ReconcileError, Reconciler, Report, Selection, Sockets, Tally,
        restore::{self, Restored},
    },
    schema, skipped,
    targets::{ResolvedTargets, TargetError},
};

/// Set the options of existing sockets
///
/// Sets what `verify` finds to differ. TCP sockets are set by a BPF iterator if the kernel has it, other sockets through a file descriptor of their process. The old values are recorded for `apply --restore` and `detach --restore`. The policies need not be in force, and are not attached. Policies with mode = "dry-run" are only reported.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy apply --dry-run web.toml\n  sockpolicy apply web.toml\n  sockpolicy apply --restore"
)]
pub(super) struct Apply {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required_unless_present = "restore", value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Cgroup to use instead of the targets of the policies: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Change nothing; report what would be set
    #[arg(long)]
    dry_run: bool,
    /// Restore the old values of options that have not changed since
    #[arg(long, conflicts_with_all = ["files", "cgroup", "dry_run", "quiet"])]
    restore: bool,
    /// Print the counts only
    #[arg(long, short)]
    quiet: bool,
    /// Name of the instance with which the old values are recorded
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INSTANCE)]
    instance: String,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("{0}")]
    Compile(#[from] CompileError),
    #[error("{0}")]
    Instance(#[from] InstanceError),
    #[error("{0}")]
    Reconcile(#[from] ReconcileError),
    #[error("no values are recorded for instance `{}`{}", name.escaped(), list(recorded))]
    NoJournal { name: String, recorded: Vec<String> },
    #[error("cannot watch for signals: {0}")]
    Signals(#[source] io::Error),
    #[error("cannot write the report: {0}")]
    Write(#[from] io::Error),
}

fn list(recorded: &[String]) -> String {
    match recorded {
        [] => "\n  help: `apply` records them; there is nothing to restore".to_owned(),
        _ => format!("\n  help: instances with recorded values: {}", escape::join(recorded, ", ")),
    }
}

impl From<CgroupError> for ApplyError {
    fn from(error: CgroupError) -> Self {
        Self::Target(error.into())
    }
}

impl From<SurveyError> for ApplyError {
    fn from(error: SurveyError) -> Self {
        Self::Reconcile(error.into())
    }
}

impl Apply {
    pub(super) fn run(self) -> ExitCode {
        let done = if self.restore {
            self.restore()
        } else {
            let Some(policies) = check::load(&self.files, self.trust.or_refuse()) else { return FAILURE.into() };
            self.apply(&policies).map(|tally| tally.failed == 0 && tally.is_complete())
        };
        match done {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => FAILURE.into(),
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    /// Restores the values of an instance that has recorded some.
    fn restore(&self) -> Result<bool, ApplyError> {
        instance::check_name(&self.instance)?;
        let recorded = journal::instances();
        if !recorded.contains(&self.instance) {
            instance::check_visible()?;
            return Err(ApplyError::NoJournal { name: self.instance.clone(), recorded });
        }
        restore(&self.instance, self.output)
    }

    fn apply(&self, policies: &[Policy]) -> Result<Tally, ApplyError> {
        instance::check_name(&self.instance)?;
        let mut signals = Signals::watch().map_err(ApplyError::Signals)?;
        let mut iter = LazyIter::begin();
        let mount = Mount::find()?;
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        let ResolvedTargets { stacks, targets, .. } = ResolvedTargets::find(&mount, &self.cgroup, policies)?;
        let mut desired = compile(policies, &stacks)?;
        kernel::leave_out_absent_hooks(&mut desired);
        let mut sockets = Sockets::find(mount, Selection::of(&targets), || iter.fd_refs(), kernel::inspector())?;
        let progress = Progress::of(sockets.count());
        let mut out = BufWriter::new(stdout(self.output));
        let mut write_event = |event: &Event| {
            let written = progress.above(|| match self.output {
                Format::Text => writeln!(out, "{event}"),
                Format::Json => writeln!(out, "{}", event.to_json()),
            });
            ignore_broken_pipe(written)
        };
        let report: Option<&mut Report<'_>> = if self.quiet { None } else { Some(&mut write_event) };
        let mut reconciler = Reconciler::new(&desired, self.dry_run, Journal::of(&self.instance), report);
        let done = reconciler.run(&mut sockets, &mut iter, |sockets| {
            if asks_for_end(&mut signals)? {
                return Err(ReconcileError::Stopped);
            }
            progress.step(sockets);
            Ok(())
        });
        let (unanswered, unread_processes) = (sockets.skipped().len() as u64, sockets.unread() as u64);
        let tally = Tally { unanswered, unread_processes, ..reconciler.tally() };
        drop(progress);
        skipped::warn_of(&sockets.skipped());
        ignore_broken_pipe(write_tally(&tally, self.output, &mut out).and_then(|()| out.flush()))?;
        done?;
        Ok(tally)
    }
}

fn asks_for_end(signals: &mut Signals) -> io::Result<bool> {
    while let Some(received) = signals.receive()? {
        if received.asks_for_end() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn write_tally(tally: &Tally, output: Format, out: &mut impl Write) -> io::Result<()> {
    match output {
        Format::Text => write!(out, "{}", tally_text(tally)),
        Format::Json => {
            let line = schema::line_at(jiff::Timestamp::now(), "apply-summary", tally.to_json());
            writeln!(out, "{line}")
        }
    }
}

/// Restores what the journal of an instance has, and prints the counts. Returns whether nothing remains to be restored.
pub(super) fn restore(instance: &str, output: Format) -> Result<bool, ApplyError> {
    instance::check_name(instance)?;
    let restored = restore::restore(instance)?;
    skipped::warn_of(&restored.skipped);
    let mut out = stdout(output);
    ignore_broken_pipe(write_restored(&restored, output, &mut out).and_then(|()| out.flush()))?;
    let Restored { failed, damaged, .. } = restored;
    if failed > 0 {
        log::warn!(
            "policies in force set these options again\n  help: detach the policies first: sockpolicy detach --restore --instance {}",
            instance.escaped()
        );
    }
    if damaged > 0 {
        let path = journal::path_of(instance);
        log::warn!(
            "damaged lines of {}: {damaged}. The values in these lines cannot be restored, and where one option changed \
             several times, its restored value may be a later one.\n  help: the lines are kept; if you do not need them: rm {}",
            path.escaped(),
            path.escaped()
        );
    }
    Ok(restored.is_complete())
}

fn write_restored(restored: &Restored, output: Format, out: &mut impl Write) -> io::Result<()> {
    let Restored { restored, changed_by_others, failed, unseen, damaged, .. } = restored;
    if output == Format::Json {
        let fields = json!({
            "restored": restored, "changed_since": changed_by_others, "failed": failed, "unseen": unseen,
            "damaged_lines": damaged,
        });
        return writeln!(out, "{}", schema::line_at(jiff::Timestamp::now(), "restore-summary", fields));
    }
    let restored = counted(*restored as u64, "option");
    writeln!(out, "restored: {restored}; changed by others since: {changed_by_others}; refused: {failed}")?;
    if *unseen > 0 {
        let unseen = counted(*unseen as u64, "option");
        writeln!(
            out,
            "not restored: {unseen} of sockets that may be in network namespaces that this process must not enter"
        )?;
    }
    Ok(())
}
