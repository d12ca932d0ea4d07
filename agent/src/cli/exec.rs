//! `sockpolicy exec`: runs a command in a fresh cgroup under a policy.

use std::{
    convert::Infallible,
    ffi::{OsStr, OsString},
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::kill,
    unistd::Pid,
};

use super::{
    check, complain,
    output::{Manner, ReportError, Writer},
    signals::Signals,
    unless_closed,
};
use crate::{
    enclosure::{Enclosure, EnclosureError},
    host::cgroup::{CgroupError, Mount},
    policy,
    session::{self, Session, SessionError},
};

/// Exit status where sockpolicy itself failed, as of `env` and `timeout`.
pub(super) const OURS: u8 = 125;
/// The command cannot be run.
const NOT_EXECUTABLE: u8 = 126;
/// The command was not found.
const NOT_FOUND: u8 = 127;

/// Run a command in a fresh cgroup under a policy
///
/// The cgroup is made below the one that sockpolicy runs in, and is gone when the command has
/// ended. Its exit status is the command's own; 128+N if signal N killed it; 125 if sockpolicy
/// failed, 126 if the command cannot be run, 127 if it was not found.
#[derive(Debug, clap::Args)]
pub(super) struct Exec {
    /// Policy files; their targets give way to the command's cgroup
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    manner: Manner,
    /// Write the report there rather than to standard error
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The command, after `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Enclosure(#[from] EnclosureError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot watch for signals and events: {0}")]
    Watch(#[from] io::Error),
    #[error("cannot run {}: {source}{}", shown(command), spawn_help(source))]
    Spawn { command: OsString, source: io::Error },
}

/// A command's name, visible also where it is empty.
fn shown(command: &OsStr) -> String {
    if command.is_empty() { "``".to_owned() } else { command.display().to_string() }
}

fn spawn_help(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "\n  help: check the name, and that its folder is in PATH",
        io::ErrorKind::PermissionDenied => "\n  help: is it a program, and may it be executed?",
        _ => "",
    }
}

impl ExecError {
    fn status(&self) -> u8 {
        match self {
            Self::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Spawn { .. } => NOT_EXECUTABLE,
            _ => OURS,
        }
    }
}

impl Exec {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files) else { return OURS.into() };
        match self.enclose_and_run(&policies) {
            Ok(status) => status,
            Err(error) => {
                complain(&error);
                error.status().into()
            }
        }
    }

    fn enclose_and_run(&self, policies: &[policy::model::Policy]) -> Result<ExitCode, ExecError> {
        let mut signals = Signals::watch()?;
        let desired = session::prepare(policies, self.manner.dry_run)?;
        check::warn_of_replaced_targets(policies, "the command's cgroup");
        crate::kernel::check_privileges().map_err(SessionError::from)?;
        let mut writer = self.writer()?;
        let mount = Mount::find()?;
        let enclosure = Enclosure::make(&mount)?;
        let target = mount.open(&enclosure.cgroup.path)?;
        let mut session = Session::start(desired, vec![target], mount, self.manner.audit_backend)?;
        unless_closed(writer.announce(&session)).map_err(|source| self.report_error(source))?;

        if let Some(signal) = asked_to_end(&mut signals)? {
            return Ok(ExitCode::from(128 + signal as u8));
        }
        let mut child = self.spawn(&enclosure, &signals)?;
        let status = follow(&mut child, &mut session, &mut signals, &mut writer)?;
        session.end()?;
        while drain(&mut session, &mut writer) {}
        let left = enclosure.population();
        let summary = session.finish()?;
        let conflicts = summary.conflicts();
        unless_closed(writer.summary(&summary)).map_err(|source| self.report_error(source))?;
        if left > 0 {
            log::warn!("{left} processes outlived the command; they go on without the policy");
        }
        if let Err(error) = enclosure.remove() {
            log::warn!("{error}");
        }
        if self.manner.fail_on_conflict && conflicts > 0 && status.success() {
            return Ok(super::FINDINGS.into());
        }
        Ok(exit_code(status))
    }

    fn writer(&self) -> Result<Writer, ReportError> {
        match &self.report {
            Some(path) => Writer::to_file(&self.manner, path),
            // A line at a time: the command may write there too.
            None => Ok(Writer::new(&self.manner, io::LineWriter::new(io::stderr()))),
        }
    }

    fn report_error(&self, source: io::Error) -> ReportError {
        let place = self.report.as_ref().map_or_else(|| "standard error".to_owned(), |path| path.display().to_string());
        ReportError { place, source }
    }

    fn spawn(&self, enclosure: &Enclosure, signals: &Signals) -> Result<Child, ExecError> {
        let [name, arguments @ ..] = self.command.as_slice() else { unreachable_command() };
        let mut command = Command::new(name);
        command.args(arguments);
        enclosure.enclose(&mut command)?;
        signals.spare(&mut command);
        command.spawn().map_err(|source| ExecError::Spawn { command: name.clone(), source })
    }
}

/// clap has seen to it that there is one.
#[expect(clippy::panic, reason = "clap refuses an empty command")]
fn unreachable_command() -> ! {
    panic!("no command")
}

/// The signal that asked for an end before there was a command to pass it on to.
fn asked_to_end(signals: &mut Signals) -> io::Result<Option<nix::sys::signal::Signal>> {
    while let Some(received) = signals.next()? {
        if received.asks_for_end() {
            return Ok(Some(received.signal));
        }
    }
    Ok(None)
}

/// Reports and passes signals on until the command has ended.
fn follow(
    child: &mut Child,
    session: &mut Session,
    signals: &mut Signals,
    writer: &mut Writer,
) -> Result<ExitStatus, ExecError> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let mut polled =
            [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(session.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(ExecError::Watch(error.into())),
        }
        drain(session, writer);
        while let Some(received) = signals.next()? {
            if received.signal != nix::sys::signal::Signal::SIGCHLD && received.is_from_process {
                // Fails only where the command has just ended, which is seen next.
                let _ = kill(Pid::from_raw(child.id() as i32), received.signal);
            }
        }
    }
}

/// Writes events that are there; gives whether there may be more. The command goes on also where its
/// report cannot be written.
fn drain(session: &mut Session, writer: &mut Writer) -> bool {
    let mut failed = None;
    let result = session.drain(|event| {
        if failed.is_none() {
            failed = writer.event(event).err();
        }
        Ok::<(), Infallible>(())
    });
    if let Some(error) = failed.or_else(|| writer.flush().err())
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        log::warn!("cannot write the report: {error}");
    }
    result.unwrap_or_else(|never| match never {})
}

/// The command's own status; 128 and the signal's number where one killed it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(OURS))
}
