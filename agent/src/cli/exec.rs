//! `sockpolicy exec`: runs a command in a fresh cgroup under a policy.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus},
};

use nix::{sys::signal::kill, unistd::Pid};

use super::{
    check,
    descriptor::Standard,
    messages,
    output::{EnforceArgs, ReportArgs, ReportError, TrustArgs, Writer},
    print_error,
};
use crate::{
    compile::Desired,
    coverage::all,
    daemon::{
        Signals,
        watch::{self, WatchError},
    },
    escape::Escape,
    events::Filter,
    host::{
        cgroup::{CgroupError, Mount},
        containers::Known,
        process::{self, DescriptorLimits},
    },
    kernel::Target,
    session::{self, OnBlocked, OnUnsupported, Session, SessionError, Setup},
    transient_cgroup::{TransientCgroup, TransientCgroupError},
};

/// Exit status if sockpolicy failed, as for env(1) and timeout(1).
pub(super) const EXIT_INTERNAL: u8 = 125;
/// Exit status if the command cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// Exit status if the command was not found.
const NOT_FOUND: u8 = 127;

/// Run a command under policies
///
/// The command runs in a new cgroup below that of sockpolicy. The cgroup is removed when the command ends. Exit status: the command's own; 128+N if signal N killed it; 125 if sockpolicy failed; 126 if the command cannot be run; 127 if it was not found.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy exec web.toml -- nginx -g \"daemon off;\"\n  sockpolicy exec --dry-run web.toml -- curl https://example.com"
)]
pub(super) struct Exec {
    /// Policy files, and directories whose *.toml files are policies. The command's cgroup replaces their targets
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    enforce: EnforceArgs,
    /// Write the report to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The command, after `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ExecError {
    #[error("{0}")]
    Report(#[from] ReportError),
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    #[error("{0}")]
    TransientCgroup(#[from] TransientCgroupError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("{0}")]
    Watch(#[from] WatchError),
    #[error("cannot watch the command: {0}")]
    Command(#[from] io::Error),
    #[error("cannot run {}: {source}", shown(command))]
    Spawn { command: OsString, source: io::Error },
    #[error("cannot run the command in cgroup {}: {source}", cgroup.escaped())]
    Enter { cgroup: PathBuf, source: io::Error },
}

/// Returns the name of a command for display, also if it is empty.
fn shown(command: &OsStr) -> String {
    if command.is_empty() { "``".to_owned() } else { command.escaped().to_string() }
}

impl ExecError {
    fn status(&self) -> u8 {
        match self {
            Self::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Spawn { .. } => NOT_EXECUTABLE,
            _ => EXIT_INTERNAL,
        }
    }
}

impl Exec {
    pub(super) fn run(self) -> ExitCode {
        messages::start(self.enforce.reporting.output);
        let Some(policies) = check::load(&self.files, self.trust.or_refuse()) else { return EXIT_INTERNAL.into() };
        let EnforceArgs { dry_run, reporting, .. } = &self.enforce;
        let prepared = session::prepare(&policies, &[all(&policies)], *dry_run, reporting.timing);
        check::warn_of_replaced_targets(&policies, "the command's cgroup");
        let report = self.report.as_deref();
        let enclosed = TransientRun {
            command: &self.command,
            reporting,
            report,
            on_unsupported: self.enforce.unsupported.choice(),
        };
        enclosed.finish(prepared.map_err(ExecError::from).and_then(|desired| enclosed.run(desired, Filter::default())))
    }
}

/// A command to run in a cgroup of its own.
pub(super) struct TransientRun<'a> {
    pub(super) command: &'a [OsString],
    pub(super) reporting: &'a ReportArgs,
    /// The file for the report; standard error if `None`.
    pub(super) report: Option<&'a Path>,
    pub(super) on_unsupported: OnUnsupported,
}

impl TransientRun<'_> {
    /// Prints an error, and returns the exit status.
    pub(super) fn finish(&self, result: Result<ExitCode, ExecError>) -> ExitCode {
        result.unwrap_or_else(|error| {
            print_error(&error);
            error.status().into()
        })
    }

    pub(super) fn run(&self, desired: Desired, filter: Filter) -> Result<ExitCode, ExecError> {
        let mut signals = Signals::watch()?;
        let limits = process::raise_descriptor_limit();
        crate::kernel::check_privileges().map_err(SessionError::from)?;
        let writer = self.writer()?;
        let mount = Mount::find()?;
        let transient = TransientCgroup::make(&mount, "")?;
        let target = Target { cgroup: mount.open(&transient.cgroup.path)?, scope: 0, is_boundary: false };
        let setup = Setup {
            desired,
            mount,
            targets: vec![target],
            containers: Known::default(),
            backend: self.reporting.audit_backend,
            on_unsupported: self.on_unsupported,
            on_blocked: OnBlocked::Refuse,
            filter,
            instance: None,
        };
        let mut session = Session::start(setup)?;
        writer.announce(&session);

        if let Some(signal) = asked_to_end(&mut signals)? {
            return Ok(ExitCode::from(128 + signal as u8));
        }
        writer.settle();
        let mut child = self.spawn(&transient, &signals, limits)?;
        let status = follow(&mut child, &mut session, &mut signals, &writer)?;
        session.end()?;
        while report_events(&mut session, &writer) {}
        let left = transient.population();
        let summary = session.finish()?;
        let conflicts = summary.conflicts();
        // The status of the command matters more than a lost report.
        if let Err(error) = writer.summary(summary) {
            log::warn!("{error}");
        }
        if left > 0 {
            log::warn!("{left} processes outlived the command; the policy does not apply to them any more");
        }
        if let Err(error) = transient.remove() {
            log::warn!("{error}");
        }
        if self.reporting.fail_on_conflict && conflicts > 0 && status.success() {
            return Ok(super::FINDINGS.into());
        }
        Ok(exit_code(status))
    }

    fn writer(&self) -> Result<Writer, ReportError> {
        match self.report {
            Some(path) => Writer::to_file(self.reporting, path),
            None => Writer::to_standard(self.reporting, Standard::Error),
        }
    }

    fn spawn(
        &self,
        transient: &TransientCgroup,
        signals: &Signals,
        limits: Option<DescriptorLimits>,
    ) -> Result<Child, ExecError> {
        let [name, arguments @ ..] = self.command else { unreachable_command() };
        let mut command = Command::new(name);
        command.args(arguments);
        let entry = transient.place_in(&mut command)?;
        signals.restore_in_child(&mut command);
        // SAFETY: the closure only makes a system call.
        unsafe { command.pre_exec(move || limits.map_or(Ok(()), DescriptorLimits::restore)) };
        command.spawn().map_err(|source| match entry.has_failed() {
            true => ExecError::Enter { cgroup: transient.cgroup.path.clone(), source },
            false => ExecError::Spawn { command: name.clone(), source },
        })
    }
}

/// clap refuses an empty command.
#[expect(clippy::panic, reason = "clap refuses an empty command")]
fn unreachable_command() -> ! {
    panic!("no command")
}

/// Returns a signal that ends sockpolicy, if one arrived before the command was started.
fn asked_to_end(signals: &mut Signals) -> io::Result<Option<nix::sys::signal::Signal>> {
    while let Some(received) = signals.receive()? {
        if received.asks_for_end() {
            return Ok(Some(received.signal));
        }
    }
    Ok(None)
}

/// Reports events and forwards signals until the command has ended.
fn follow(
    child: &mut Child,
    session: &mut Session,
    signals: &mut Signals,
    writer: &Writer,
) -> Result<ExitStatus, ExecError> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        watch::wait(signals, session, &[])?;
        report_events(session, writer);
        while let Some(received) = signals.receive()? {
            if received.signal != nix::sys::signal::Signal::SIGCHLD && received.is_from_process {
                // Fails only if the command has just ended.
                let _ = kill(Pid::from_raw(child.id() as i32), received.signal);
            }
        }
    }
}

/// Writes pending events. Returns whether there can be more. An error does not end the command.
fn report_events(session: &mut Session, writer: &Writer) -> bool {
    watch::pass_on(session, writer).unwrap_or_else(|error| {
        log::warn!("{error}");
        false
    })
}

/// Returns the exit status of the command, or 128 + N if signal N killed it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_INTERNAL))
}
