//! `sockpolicy run`: puts policies in force on cgroups and reports until it is told to end.

use std::{io, os::fd::BorrowedFd, path::PathBuf, process::ExitCode};

use super::{
    FAILURE, FINDINGS, check, complain,
    output::{Manner, Writer},
    signals::Signals,
    watch::{self, WatchError, watch},
};
use crate::{
    events::Filter,
    host::cgroup::{Cgroup, CgroupError, Mount},
    policy::model::Policy,
    session::{self, Session, SessionError, Setup},
};

/// Put policies in force on cgroups, and report until interrupted
///
/// The policies are in force while this runs, and end with it, however it ends. Sockets that were
/// there before are left as they are; only their later calls are judged.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// Policy files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Target, in place of the files' own: a cgroup's path below the cgroup2 mount, or absolute; can be given
    /// several times
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    #[command(flatten)]
    manner: Manner,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("no target: policy `{policy}` names none\n  help: say which cgroup with --cgroup PATH")]
    NoTarget { policy: String },
    #[error(
        "policies `{one}` and `{other}` have different targets\n  help: run them one by one, or give a common target \
         with --cgroup PATH"
    )]
    TwoTargets { one: String, other: String },
    #[error(
        "no cgroup matches {patterns}\n  help: the cgroups of this host are the folders below {}; `find {} -type d` \
         lists them",
        mount.display(), mount.display()
    )]
    NoMatch { patterns: String, mount: PathBuf },
    #[error(transparent)]
    Watch(#[from] WatchError),
}

impl Run {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files) else { return FAILURE.into() };
        match self.run_policies(&policies) {
            Ok(conflicts) if self.manner.reporting.fail_on_conflict && conflicts > 0 => FINDINGS.into(),
            Ok(_) => ExitCode::SUCCESS,
            // Whoever read the report has gone, and with them the reason to run.
            Err(RunError::Watch(WatchError::Write(error))) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::SUCCESS
            }
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        }
    }

    /// Gives the number of conflicts.
    fn run_policies(&self, policies: &[Policy]) -> Result<u64, RunError> {
        let mut signals = Signals::watch().map_err(WatchError::Watch)?;
        let Manner { dry_run, reporting } = &self.manner;
        let desired = session::prepare(policies, *dry_run, reporting.timing)?;
        crate::kernel::check_privileges().map_err(SessionError::from)?;
        let mount = Mount::find()?;
        let targets = targets(&mount, &self.cgroup, policies)?;
        let mut writer = Writer::new(reporting, io::stdout());
        let setup = Setup { desired, mount, targets, backend: reporting.audit_backend, filter: Filter::default() };
        report(setup, &mut signals, &mut writer, &[])
    }
}

/// Keeps a policy in force and reports, until a signal asks for the end or all of `ends`, if there are any, have ended.
/// Gives the number of conflicts.
pub(super) fn report(
    setup: Setup,
    signals: &mut Signals,
    writer: &mut Writer,
    ends: &[BorrowedFd<'_>],
) -> Result<u64, RunError> {
    let mut session = Session::start(setup)?;
    let names: Vec<&str> = session.targets().iter().map(|target| target.name.as_str()).collect();
    log::info!("in force on {}", names.join(", "));
    writer.announce(&session).map_err(WatchError::Write)?;
    watch(&mut session, signals, writer, ends)?;
    watch::end(&mut session, writer)?;
    let summary = session.finish()?;
    writer.summary(&summary).map_err(WatchError::Write)?;
    Ok(summary.conflicts())
}

/// The targets that were asked for, else those of the policies.
pub(super) fn targets(mount: &Mount, asked: &[PathBuf], policies: &[Policy]) -> Result<Vec<Cgroup>, RunError> {
    if !asked.is_empty() {
        check::warn_of_replaced_targets(policies, "--cgroup");
        let targets = asked.iter().map(|path| mount.open(path)).collect::<Result<Vec<_>, _>>()?;
        return Ok(outermost(targets));
    }
    let Some((first, rest)) = policies.split_first() else { return Ok(Vec::new()) };
    for policy in policies {
        if policy.target.is_empty() {
            return Err(RunError::NoTarget { policy: policy.name.clone() });
        }
    }
    if let Some(other) = rest.iter().find(|policy| policy.target != first.target) {
        return Err(RunError::TwoTargets { one: first.name.clone(), other: other.name.clone() });
    }
    let targets = mount.matching(&first.target)?;
    if targets.is_empty() {
        return Err(RunError::NoMatch { patterns: first.target.join(", "), mount: mount.path.clone() });
    }
    Ok(targets)
}

/// Leaves out what another target covers: its sockets would be decided twice.
fn outermost(mut targets: Vec<Cgroup>) -> Vec<Cgroup> {
    targets.sort_by(|one, other| one.path.cmp(&other.path));
    let mut kept: Vec<Cgroup> = Vec::new();
    for target in targets {
        if !kept.iter().any(|outer| target.path.starts_with(&outer.path)) {
            kept.push(target);
        }
    }
    kept
}
