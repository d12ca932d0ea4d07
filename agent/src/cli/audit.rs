//! `sockpolicy audit`: shows the setsockopt and getsockopt calls of a command, of processes, of cgroups, or of the whole
//! host. Changes nothing.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{
    FAILURE, FINDINGS, check,
    descriptor::Standard,
    exec::{EXIT_INTERNAL, ExecError, TransientRun},
    messages,
    output::{ReportArgs, ReportError, TrustArgs, Writer},
    print_error,
    run::{self, RunError},
    usage,
};
use crate::{
    compile::Desired,
    coverage::{Stack, all},
    daemon::{Signals, watch::WatchError},
    escape::{self, Escape},
    events::{Action, Filter},
    host::{cgroup::Mount, containers::Known, process},
    kernel,
    options::{self, SocketOption},
    policy::{
        model::{Calls, Policy},
        nearest_option,
    },
    session::{self, OnBlocked, OnUnsupported, SessionError, Setup},
    targets::ResolvedTargets,
};

/// Show setsockopt and getsockopt calls
///
/// Shows the calls of a command, of processes, of cgroups or of the whole host. Changes nothing. Without a policy, every call is shown. With policies, the calls that conflict with them are shown, or what their `[audit]` table selects. Ends with the command or the processes, else when interrupted.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy audit -- curl https://example.com\n  sockpolicy audit --pid 812\n  sockpolicy audit web.toml --cgroup system.slice/nginx.service"
)]
pub(super) struct Audit {
    /// Policy files to compare the calls with, and directories of them
    #[arg(value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Only calls of tasks in this cgroup: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    cgroup: Vec<PathBuf>,
    /// Only calls of this process and its threads, without its children. Can be repeated
    #[arg(long, value_name = "PID", conflicts_with = "command")]
    pid: Vec<u32>,
    /// Only calls on this option, by name or as LEVEL:NUMBER. Can be repeated
    #[arg(long, value_name = "NAME", value_parser = parse_option, allow_hyphen_values = true)]
    option: Vec<abi::setting::OptionKey>,
    /// Only calls with this verdict. Also matches the dry-run verdicts (would-rewrite, ...). Can be repeated
    #[arg(long, value_name = "VERDICT", value_parser = parse_verdict)]
    verdict: Vec<Action>,
    /// Only calls of tasks with this name, as in /proc/PID/comm. Can be repeated
    #[arg(long, value_name = "NAME", value_parser = usage::comm)]
    comm: Vec<String>,
    /// Calls to show: conflicts, governed (all calls on options that a policy names) or all
    #[arg(long, value_name = "CALLS", value_parser = parse_calls)]
    calls: Option<Calls>,
    #[command(flatten)]
    reporting: ReportArgs,
    /// Write the report to this file instead of standard output (with a command: standard error)
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// A command to run and audit, after `--`
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum AuditError {
    #[error("{0}")]
    Run(#[from] RunError),
    #[error("{0}")]
    Report(#[from] ReportError),
    #[error(
        "no process {pid}: {source}\n  help: `ps -e` lists them; the number is that of the process, not of a thread"
    )]
    NoProcess { pid: u32, source: io::Error },
    #[error(
        "--pid means the kernel's own numbers of processes, and this process sees others\n  help: run sockpolicy outside \
         the container (in the host's PID namespace), or give --cgroup"
    )]
    Namespace,
    #[error(
        "there is no policy file {word}\n  help: a command stands behind `--`: sockpolicy audit -- {word}",
        word = word.escaped()
    )]
    Command { word: String },
}

impl Audit {
    pub(super) fn run(mut self) -> ExitCode {
        messages::start(self.reporting.output);
        let failure = if self.command.is_empty() { FAILURE } else { EXIT_INTERNAL };
        if self.command.is_empty()
            && let Some(word) = self.files.iter().find(|file| is_like_a_command(file))
        {
            print_error(&AuditError::Command { word: escape::plain(word) });
            return failure.into();
        }
        let Some(policies) = check::load(&self.files, self.trust.or_warn()) else { return failure.into() };
        let filter = Filter {
            options: std::mem::take(&mut self.option),
            verdicts: std::mem::take(&mut self.verdict),
            processes: self.pid.clone(),
            comms: std::mem::take(&mut self.comm),
        };
        if !self.command.is_empty() {
            check::warn_of_replaced_targets(&policies, "the command's cgroup");
            let Self { command, reporting, report, .. } = &self;
            let enclosed = TransientRun {
                command,
                reporting,
                report: report.as_deref(),
                on_unsupported: OnUnsupported::DoNotProbe,
            };
            let desired = self.prepare(&policies, &[all(&policies)]).map_err(ExecError::from);
            return enclosed.finish(desired.and_then(|desired| enclosed.run(desired, filter)));
        }
        match self.watch(filter, &policies) {
            Ok(conflicts) if self.reporting.fail_on_conflict && conflicts > 0 => FINDINGS.into(),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                failure.into()
            }
        }
    }

    fn prepare(&self, policies: &[Policy], stacks: &[Stack]) -> Result<Desired, SessionError> {
        let mut desired = session::prepare(policies, stacks, true, self.reporting.timing)?;
        if policies.is_empty() {
            desired.audit.calls = Calls::All;
            desired.audit.reads = true;
            desired.note_births();
        }
        if let Some(calls) = self.calls {
            desired.audit.calls = calls;
        }
        // The kernel side then leaves out the calls on other options.
        if !self.option.is_empty() && desired.audit.calls == Calls::All {
            desired.audit.calls = Calls::Governed;
            desired.look_at(&self.option);
        }
        Ok(desired)
    }

    /// Returns the number of conflicts.
    fn watch(&self, filter: Filter, policies: &[Policy]) -> Result<u64, AuditError> {
        let mut signals = Signals::watch().map_err(WatchError::Wait).map_err(RunError::from)?;
        process::raise_descriptor_limit();
        let mount = Mount::find().map_err(RunError::from)?;
        let ResolvedTargets { stacks, targets, containers, .. } = self.placement(&mount, policies)?;
        let desired = self.prepare(policies, &stacks).map_err(RunError::from)?;
        kernel::check_privileges().map_err(SessionError::from).map_err(RunError::from)?;
        let processes = self.open_processes()?;
        let ends: Vec<BorrowedFd<'_>> = processes.iter().map(OwnedFd::as_fd).collect();
        let writer = match &self.report {
            Some(path) => Writer::to_file(&self.reporting, path)?,
            None => Writer::to_standard(&self.reporting, Standard::Output)?,
        };
        let backend = self.reporting.audit_backend;
        let setup = Setup {
            desired,
            mount,
            targets,
            containers: Known::new(&containers),
            backend,
            on_unsupported: OnUnsupported::DoNotProbe,
            on_blocked: OnBlocked::Refuse,
            filter,
            instance: None,
        };
        Ok(run::report(setup, &mut signals, writer, &ends)?)
    }

    fn open_processes(&self) -> Result<Vec<OwnedFd>, AuditError> {
        if !self.pid.is_empty() && !process::is_initial_namespace() {
            return Err(AuditError::Namespace);
        }
        let open = |pid: &u32| process::open(*pid).map_err(|source| AuditError::NoProcess { pid: *pid, source });
        self.pid.iter().map(open).collect()
    }

    /// Returns the cgroups of the command line, else the targets of the policies, else the root cgroup.
    fn placement(&self, mount: &Mount, policies: &[Policy]) -> Result<ResolvedTargets, RunError> {
        let names_none = policies.iter().all(|policy| policy.target.is_empty());
        if self.cgroup.is_empty() && names_none {
            return Ok(ResolvedTargets::alone(policies, mount.open(Path::new(""))?));
        }
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        Ok(ResolvedTargets::find(mount, &self.cgroup, policies)?)
    }
}

/// Whether a word among the policy files is no file, and could not be the name of one.
fn is_like_a_command(word: &Path) -> bool {
    word.components().count() == 1 && word.extension().is_none() && !word.exists()
}

fn parse_option(text: &str) -> Result<abi::setting::OptionKey, String> {
    let numeric = || {
        let (level, name) = text.split_once(':')?;
        Some(abi::setting::OptionKey { level: level.parse().ok()?, name: name.parse().ok()? })
    };
    options::by_name(text).map(SocketOption::key).or_else(numeric).ok_or_else(|| match nearest_option(text) {
        Some(near) => format!("no option of this name: did you mean {near}?"),
        None => "no option of this name; `sockpolicy options` lists all, and LEVEL:NUMBER names any".to_owned(),
    })
}

fn parse_verdict(text: &str) -> Result<Action, String> {
    let known: Vec<&str> = Action::ALL.into_iter().map(Action::name).collect();
    Action::ALL
        .into_iter()
        .find(|deed| deed.name() == text || deed.name_in_dry_run() == text)
        .ok_or_else(|| format!("the verdicts are {}", known.join(", ")))
}

fn parse_calls(text: &str) -> Result<Calls, String> {
    match text {
        "conflicts" => Ok(Calls::Conflicts),
        "governed" => Ok(Calls::Governed),
        "all" => Ok(Calls::All),
        _ => Err("one of conflicts, governed, all".to_owned()),
    }
}
