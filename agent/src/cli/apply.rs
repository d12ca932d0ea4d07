//! `sockpolicy apply`: brings sockets that are there in line with policies, and puts back what they had.

use std::{
    io::{self, BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

use super::{
    FAILURE, check,
    descriptor::stdout,
    ignore_broken_pipe,
    lazy_iter::LazyIter,
    output::{Format, TrustArgs},
    print_error,
    progress::Progress,
    reconcile::{Reconciler, Tally, Tell},
    restore,
    run::{DEFAULT_INSTANCE, ResolvedTargets, RunError, warn_of_failed},
    signals::Signals,
    sockets::{Sockets, SocketsError, Targets},
    watch::WatchError,
};
use crate::{
    compile::compile,
    events::Event,
    host::{cgroup::Mount, inspect::Inspector, socket_table::SurveyError},
    instance,
    journal::{Journal, JournalError},
    kernel::KernelError,
    policy::Policy,
    schema,
    session::{self, SessionError},
};

/// Bring sockets that are there already in line with policies
///
/// What `verify` finds to disagree is set: on TCP sockets by a program of the kernel's, where it has that, on others through a
/// descriptor of their process. What they had is kept, for `apply --restore` and `detach --restore`. Policies need not be in force
/// for that, and do not come in force. Of a dry-run policy it is only said what would be set.
#[derive(Debug, clap::Args)]
pub(super) struct Apply {
    /// Policy files, and folders whose *.toml are policies
    #[arg(required_unless_present = "restore", value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Target, in place of the files' own: a cgroup's path below the cgroup2 mount, or absolute; can be given
    /// several times
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Change nothing; say what would be set
    #[arg(long)]
    dry_run: bool,
    /// Put back what sockets had before, where nobody has changed it since
    #[arg(long, conflicts_with_all = ["files", "cgroup", "dry_run", "quiet"])]
    restore: bool,
    /// Say how many were changed, and not which
    #[arg(long, short)]
    quiet: bool,
    /// The instance with which to keep what sockets had
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INSTANCE)]
    instance: String,
    /// Form of what is done
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    #[error(transparent)]
    Sockets(#[from] SocketsError),
    #[error("cannot keep what sockets had, and so leaves them as they are: {0}")]
    Journal(#[from] JournalError),
    /// Where descriptors do.
    #[error(transparent)]
    Iterator(KernelError),
    #[error("cannot write what was done: {0}")]
    Write(#[from] io::Error),
    #[error(
        "stopped by a signal: some sockets are as they were\n  help: do it again, or put back what they had: sockpolicy apply --restore"
    )]
    Stopped,
}

impl From<RunError> for ApplyError {
    fn from(error: RunError) -> Self {
        Self::Sockets(error.into())
    }
}

impl From<KernelError> for ApplyError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Iterator { .. } => Self::Iterator(error),
            other => RunError::from(SessionError::from(other)).into(),
        }
    }
}

impl From<SurveyError> for ApplyError {
    fn from(error: SurveyError) -> Self {
        Self::Sockets(error.into())
    }
}

impl Apply {
    pub(super) fn run(self) -> ExitCode {
        let done = if self.restore {
            restore::put_back(&self.instance)
        } else {
            let Some(policies) = check::load(&self.files, self.trust.or_refuse()) else { return FAILURE.into() };
            self.apply(&policies).map(|tally| tally.failed == 0 && tally.denied == 0 && tally.unanswered == 0)
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

    fn apply(&self, policies: &[Policy]) -> Result<Tally, ApplyError> {
        instance::check_name(&self.instance).map_err(RunError::from)?;
        let mut signals = Signals::watch().map_err(WatchError::Watch).map_err(RunError::from)?;
        let mut walker = LazyIter::begin();
        let mount = Mount::find().map_err(RunError::from)?;
        let ResolvedTargets { stacks, targets, .. } = ResolvedTargets::find(&mount, &self.cgroup, policies)?;
        let mut desired = compile(policies, &stacks).map_err(|error| RunError::from(SessionError::from(error)))?;
        session::leave_out_absent_hooks(&mut desired);
        let mut sockets = Sockets::find(mount, Targets::these(&targets), || walker.holders(), Inspector::default())?;
        let progress = Progress::of(sockets.len());
        let mut out = BufWriter::new(stdout(self.output));
        let mut tell_event = |event: &Event| {
            progress.above(|| match self.output {
                Format::Text => writeln!(out, "{event}"),
                Format::Json => writeln!(out, "{}", event.to_json()),
            })
        };
        let listener: Option<&mut Tell<'_>> = if self.quiet { None } else { Some(&mut tell_event) };
        let mut work = Reconciler::new(&desired, self.dry_run, Journal::of(&self.instance), listener);
        let done = work.run(&mut sockets, &mut walker, |sockets| {
            if asks_for_end(&mut signals)? {
                return Err(ApplyError::Stopped);
            }
            progress.step(sockets);
            Ok(())
        });
        let tally = Tally { unanswered: sockets.skipped().len() as u64, ..work.tally() };
        drop(progress);
        warn_of_failed(&sockets.skipped());
        ignore_broken_pipe(tell(&tally, self.output, &mut out).and_then(|()| out.flush()))?;
        done.map(|()| tally)
    }
}

fn asks_for_end(signals: &mut Signals) -> io::Result<bool> {
    while let Some(received) = signals.next()? {
        if received.asks_for_end() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn tell(tally: &Tally, output: Format, out: &mut impl Write) -> io::Result<()> {
    match output {
        Format::Text => write!(out, "{}", tally.to_text()),
        Format::Json => {
            let line = schema::line_at(jiff::Timestamp::now(), "apply-summary", tally.to_json());
            writeln!(out, "{line}")
        }
    }
}
