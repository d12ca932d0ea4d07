//! `sockpolicy run`: enforces policies on cgroups and reports, until a signal ends it.

use std::{os::fd::BorrowedFd, path::PathBuf, process::ExitCode};

use super::{
    FAILURE, FINDINGS, check,
    descriptor::Standard,
    help, messages,
    output::{EnforceArgs, IncompleteReport, ReportError, TrustArgs, Writer},
    print_error,
};
use crate::{
    daemon::{
        Config, Daemon, DaemonError, Signals,
        watch::{self, WatchError, watch},
    },
    escape,
    events::Filter,
    host::{
        cgroup::{CgroupError, Mount},
        containers::Known,
        process,
    },
    instance::{Instance, InstanceError},
    journal::Journal,
    kernel::{self, Target},
    policy::Policy,
    session::{self, OnBlocked, Session, SessionError, Setup},
    sources::{Sources, Texts},
    targets::{ResolvedTargets, TargetError},
};

/// Enforce policies on cgroups until interrupted
///
/// The policies are detached when sockpolicy ends, for whatever reason. Existing sockets keep their values unless --apply is given; only their later calls are decided.
///
/// sockpolicy reads all policy files again when one changes, is added or removed, and on SIGHUP. It replaces the policies as a whole, or keeps the previous ones if a file has an error. Cgroups that are created later and match a target become targets.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy run --dry-run web.toml --cgroup system.slice/nginx.service\n  sockpolicy run /etc/sockpolicy/policies.d\n  sockpolicy run --persist --apply web.toml"
)]
pub(super) struct Run {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Cgroup to use instead of the targets of the policies: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Keep the policies in force after sockpolicy ends. The next `run --persist` takes over without a gap
    #[arg(long)]
    persist: bool,
    /// Also set the options of existing sockets, at the start and after each change of policies or targets. With --persist or --instance, the old values are recorded for `detach --restore` and `apply --restore`
    #[arg(long)]
    apply: bool,
    /// Name of this instance, for `status` and `detach` [default: `default` with --persist, else run-PID]
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    #[command(flatten)]
    enforce: EnforceArgs,
}

/// The default name of an instance.
pub(super) const DEFAULT_INSTANCE: &str = "default";

#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("{0}")]
    Watch(#[from] WatchError),
    #[error("{0}")]
    Daemon(#[from] DaemonError),
    #[error("{0}")]
    Report(#[from] ReportError),
    #[error("{0}")]
    Incomplete(#[from] IncompleteReport),
    #[error("{0}")]
    Instance(#[from] InstanceError),
}

impl From<CgroupError> for RunError {
    fn from(error: CgroupError) -> Self {
        Self::Target(error.into())
    }
}

impl Run {
    pub(super) fn run(self) -> ExitCode {
        messages::start(self.enforce.reporting.output);
        let sources = Sources::new(&self.files, self.trust.or_refuse()).may_be_empty();
        let texts = sources.read();
        let Some(policies) = check::shown(texts.policies()) else { return FAILURE.into() };
        match self.run_policies(sources, texts, &policies) {
            Ok(conflicts) if self.enforce.reporting.fail_on_conflict && conflicts > 0 => FINDINGS.into(),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    /// Returns the number of conflicts.
    fn run_policies(&self, sources: Sources, texts: Texts, policies: &[Policy]) -> Result<u64, RunError> {
        let mut signals = Signals::watch().map_err(WatchError::Wait)?;
        let EnforceArgs { dry_run, reporting, .. } = &self.enforce;
        process::raise_descriptor_limit();
        let mount = Mount::find()?;
        let name = self.name();
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        let below = |path: &PathBuf| mount.open(path).map(|cgroup| mount.below(&cgroup));
        let cgroups = self.cgroup.iter().map(below).collect::<Result<Vec<_>, _>>()?;
        let config = Config {
            sources,
            cgroups: &cgroups,
            dry_run: *dry_run,
            timing: reporting.timing,
            mount: &mount,
            instance: &name,
            apply: self.apply,
        };
        let mut daemon = Daemon::watch(config, texts, policies.to_owned())?;
        let ResolvedTargets { stacks, targets, containers, .. } = daemon.resolve_targets()?;
        let desired = session::prepare(&daemon.policies(), &stacks, *dry_run, reporting.timing)?;
        kernel::check_privileges().map_err(SessionError::from)?;
        let instance = self.become_instance(&targets)?.map(|instance| (instance, daemon.files()));
        let writer = Writer::to_standard(reporting, Standard::Output)?;
        // A cgroup of the command line must be attachable. A cgroup that a pattern matches is skipped if it is not.
        let blocked = if self.cgroup.is_empty() { OnBlocked::Skip } else { OnBlocked::Refuse };
        let setup = Setup {
            desired,
            mount: mount.clone(),
            targets,
            containers: Known::new(&containers),
            backend: reporting.audit_backend,
            on_unsupported: self.enforce.unsupported.choice(),
            on_blocked: blocked,
            filter: Filter::default(),
            instance,
        };
        let mut session = start(setup, &writer)?;
        daemon.note_skipped(&mut session);
        let ended =
            finish(session, &mut signals, writer, |session, signals, writer| daemon.run(session, signals, writer));
        if !self.persist && self.instance.is_none() {
            // No later command can use this name.
            if let Err(error) = Journal::of(&name).remove() {
                log::warn!("the recorded values of sockets are not removed: {error}");
            }
        }
        ended
    }

    fn name(&self) -> String {
        match &self.instance {
            Some(name) => name.clone(),
            None if self.persist => DEFAULT_INSTANCE.to_owned(),
            None => format!("run-{}", std::process::id()),
        }
    }

    fn become_instance(&self, targets: &[Target]) -> Result<Option<Instance>, RunError> {
        match Instance::acquire(&self.name(), self.persist) {
            Ok(instance) => {
                instance.check_others(&kernel::names(targets))?;
                Ok(Some(instance))
            }
            Err(error @ (InstanceError::File { .. } | InstanceError::Private(_))) if !self.persist => {
                log::warn!("`sockpolicy status` will not show this instance: {error}{}", help::line(&error));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Enforces policies and reports, until a signal requests the end or all of `ends`, if there are any, have ended. Returns the
/// number of conflicts.
pub(super) fn report(
    setup: Setup,
    signals: &mut Signals,
    writer: Writer,
    ends: &[BorrowedFd<'_>],
) -> Result<u64, RunError> {
    let session = start(setup, &writer)?;
    finish(session, signals, writer, |session, signals, writer| watch(session, signals, writer, ends))
}

fn start(setup: Setup, writer: &Writer) -> Result<Session, RunError> {
    let session = Session::start(setup)?;
    match (session.desired().scopes.is_empty(), kernel::names(session.targets())) {
        (true, _) => log::info!("no policy is in force on any cgroup: waiting for a policy"),
        (false, targets) if targets.is_empty() => log::info!("in force on no cgroup: waiting for a target"),
        (false, targets) => log::info!("in force on {}", escape::join(targets, ", ")),
    }
    writer.announce(&session);
    Ok(session)
}

/// Enforces policies while `during` runs, then writes the summary. Returns the number of conflicts.
fn finish(
    mut session: Session,
    signals: &mut Signals,
    writer: Writer,
    during: impl FnOnce(&mut Session, &mut Signals, &Writer) -> Result<(), WatchError>,
) -> Result<u64, RunError> {
    during(&mut session, signals, &writer)?;
    watch::end(&mut session, &writer)?;
    let persistent_name = session.persistent_name().map(str::to_owned);
    let summary = session.finish()?;
    let conflicts = summary.new_conflicts();
    if let Some(name) = persistent_name {
        log::warn!("the policies stay in force; `sockpolicy detach --instance {name}` ends that");
    }
    writer.summary(summary)?;
    Ok(conflicts)
}
