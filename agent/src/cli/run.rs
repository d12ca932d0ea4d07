//! `sockpolicy run`: puts policies in force on cgroups and reports until it is told to end.

use std::{io, os::fd::BorrowedFd, path::PathBuf, process::ExitCode};

use super::{
    FAILURE, FINDINGS, check, complain,
    output::{Manner, Writer},
    signals::Signals,
    watch::{self, WatchError, watch},
};
use crate::{
    coverage::{Coverage, GlobError, Stack, all, idle_globs},
    events::Filter,
    host::{
        cgroup::{Cgroup, CgroupError, Mount},
        process,
    },
    kernel::Target,
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
    #[error(transparent)]
    Glob(#[from] GlobError),
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
        let Manner { dry_run, reporting, .. } = &self.manner;
        process::raise_descriptor_limit();
        let mount = Mount::find()?;
        let Placement { stacks, targets } = Placement::find(&mount, &self.cgroup, policies)?;
        let desired = session::prepare(policies, &stacks, *dry_run, reporting.timing)?;
        crate::kernel::check_privileges().map_err(SessionError::from)?;
        let mut writer = Writer::new(reporting, io::stdout());
        let (backend, gaps) = (reporting.audit_backend, self.manner.gaps());
        let setup = Setup { desired, mount, targets, backend, gaps, filter: Filter::default() };
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
    let names: Vec<&str> = session.targets().iter().map(|target| target.cgroup.name.as_str()).collect();
    log::info!("in force on {}", names.join(", "));
    writer.announce(&session).map_err(WatchError::Write)?;
    watch(&mut session, signals, writer, ends)?;
    watch::end(&mut session, writer)?;
    let summary = session.finish()?;
    writer.summary(&summary).map_err(WatchError::Write)?;
    Ok(summary.conflicts())
}

/// Where policies are in force.
#[derive(Debug)]
pub(super) struct Placement {
    pub(super) stacks: Vec<Stack>,
    pub(super) targets: Vec<Target>,
}

impl Placement {
    /// All policies together, on one cgroup.
    pub(super) fn alone(policies: &[Policy], cgroup: Cgroup) -> Self {
        Self { stacks: vec![all(policies)], targets: vec![Target { cgroup, scope: 0 }] }
    }

    /// On the targets that were asked for, else on those of the policies.
    pub(super) fn find(mount: &Mount, asked: &[PathBuf], policies: &[Policy]) -> Result<Self, RunError> {
        let coverage = if asked.is_empty() {
            if let Some(policy) = policies.iter().find(|policy| policy.target.is_empty()) {
                return Err(RunError::NoTarget { policy: policy.name.clone() });
            }
            covered(mount, policies)?
        } else {
            check::warn_of_replaced_targets(policies, "--cgroup");
            let below = |path: &PathBuf| mount.open(path).map(|cgroup| mount.below(&cgroup));
            Coverage::of_all(policies, asked.iter().map(below).collect::<Result<_, _>>()?)
        };
        let Coverage { stacks, targets } = coverage;
        let open = |(path, scope): (PathBuf, usize)| Ok(Target { cgroup: mount.open(&path)?, scope });
        Ok(Self { stacks, targets: targets.into_iter().map(open).collect::<Result<_, CgroupError>>()? })
    }
}

fn covered(mount: &Mount, policies: &[Policy]) -> Result<Coverage, RunError> {
    let tree = mount.tree()?;
    let idle = idle_globs(policies, &tree)?;
    if idle.len() == policies.iter().map(|policy| policy.target.len()).sum::<usize>() {
        let patterns: Vec<_> = idle.into_iter().map(|(_, pattern)| pattern).collect();
        return Err(RunError::NoMatch { patterns: patterns.join(", "), mount: mount.path.clone() });
    }
    for (policy, pattern) in idle {
        log::warn!("policy `{}` does not hold on {pattern}: no cgroup matches that now", policies[policy].name);
    }
    Ok(Coverage::of_targets(policies, tree)?)
}
