//! `sockpolicy run`: puts policies in force on cgroups and reports until it is told to end.

use std::{
    collections::{BTreeSet, HashMap},
    os::fd::BorrowedFd,
    path::PathBuf,
    process::ExitCode,
};

use super::{
    FAILURE, FINDINGS, check, containers,
    daemon::{Daemon, Wanted},
    descriptor::Standard,
    look::Look,
    messages,
    output::{EnforceArgs, ReportError, TrustArgs, Writer},
    print_error,
    signals::Signals,
    watch::{self, WatchError, watch},
};
use crate::{
    coverage::{Coverage, GlobError, SearchScope, Stack, all, stacks_by_target, unmatched_targets},
    escape::{self, Escape},
    events::Filter,
    host::{
        cgroup::{Cgroup, CgroupError, Mount},
        containers::{Known, Running},
        inotify, process,
    },
    instance::{Instance, InstanceError},
    journal::Journal,
    kernel::{self, Target},
    policy::{Policy, Sources, Texts},
    session::{self, OnBlocked, Session, SessionError, Setup},
    skipped::{Kind, Skip, Skipped, SkippedList},
};

/// Put policies in force on cgroups, and report until interrupted
///
/// The policies are in force while this runs, and end with it, however it ends. Sockets that were
/// there before are left as they are, only their later calls are judged; unless --apply is given.
///
/// When a policy file changes, one comes to a folder or goes, or on SIGHUP, all are read anew and put in force in place of the
/// others: as a whole, or not at all where any has an error. Cgroups that match a target and are made later become targets.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// Policy files, and folders whose *.toml are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Target, in place of the files' own: a cgroup's path below the cgroup2 mount, or absolute; can be given
    /// several times
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Keep the policies in force when this has ended, however it ends; the next `run --persist` takes over, without a moment
    /// between
    #[arg(long)]
    persist: bool,
    /// Bring sockets that are there in line, too: when this starts, and after each change of the policies and their targets. With
    /// --persist or --instance what they had is kept, for `detach --restore` and `apply --restore`
    #[arg(long)]
    apply: bool,
    /// Name of this instance, for `status` and `detach` [default: `default` with --persist, else run-PID]
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    #[command(flatten)]
    manner: EnforceArgs,
}

/// How many targets that match nothing are named in an error.
const PATTERNS_SHOWN: usize = 10;

/// The name of an instance that nobody has given another.
pub(super) const DEFAULT_INSTANCE: &str = "default";

#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("no target: policy `{}` names none\n  help: say which cgroup with --cgroup PATH", policy.escaped())]
    NoTarget { policy: String },
    #[error(transparent)]
    Glob(#[from] GlobError),
    #[error(
        "no cgroup matches {}\n  help: the cgroups of this host are the folders below {}; `find {} -type d` \
         lists them",
        patterns.escaped(), mount.escaped(), mount.escaped()
    )]
    NoMatch { patterns: String, mount: PathBuf },
    #[error(
        "no cgroup and no container matches {}\n  help: cgroups are the folders below {}; containers that run \
         here:{containers}",
        wanted.escaped(), mount.escaped()
    )]
    NoMatchAmong { wanted: String, containers: String, mount: PathBuf },
    #[error("cannot use any target: cgroup {}: {reason}", name.escaped())]
    Skipped { name: String, reason: String },
    #[error(transparent)]
    Watch(#[from] WatchError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Inotify(#[from] inotify::WatchError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
}

impl Run {
    pub(super) fn run(self) -> ExitCode {
        messages::start(self.manner.reporting.output);
        let sources = Sources::new(&self.files, self.trust.or_refuse());
        let texts = sources.read();
        let Some(policies) = check::shown(texts.policies()) else { return FAILURE.into() };
        match self.run_policies(sources, texts, &policies) {
            Ok(conflicts) if self.manner.reporting.fail_on_conflict && conflicts > 0 => FINDINGS.into(),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    /// Gives the number of conflicts.
    fn run_policies(&self, sources: Sources, texts: Texts, policies: &[Policy]) -> Result<u64, RunError> {
        let mut signals = Signals::watch().map_err(WatchError::Watch)?;
        let EnforceArgs { dry_run, reporting, .. } = &self.manner;
        process::raise_descriptor_limit();
        let mount = Mount::find()?;
        let name = self.name();
        let journal = self.apply.then_some(name.as_str());
        let wanted = Wanted { sources, cgroups: &self.cgroup, manner: &self.manner, mount: &mount, journal };
        let mut standing = Daemon::watch(wanted, texts, policies.to_owned())?;
        let ResolvedTargets { stacks, targets, containers, .. } = standing.placement()?;
        let desired = session::prepare(policies, &stacks, *dry_run, reporting.timing)?;
        kernel::check_privileges().map_err(SessionError::from)?;
        let instance = self.become_instance(&targets)?.map(|instance| (instance, standing.files()));
        let writer = Writer::to_standard(reporting, Standard::Output)?;
        // A cgroup that was named is meant: one among those that a pattern matches concerns only itself.
        let blocked = if self.cgroup.is_empty() { OnBlocked::Skip } else { OnBlocked::Refuse };
        let setup = Setup {
            desired,
            mount: mount.clone(),
            targets,
            containers: Known::new(&containers),
            backend: reporting.audit_backend,
            on_unsupported: self.manner.unsupported.choice(),
            on_blocked: blocked,
            filter: Filter::default(),
            instance,
        };
        let mut session = start(setup, &writer)?;
        standing.note_skipped(&mut session);
        let stand =
            |session: &mut Session, signals: &mut Signals, writer: &Writer| standing.run(session, signals, writer);
        let ended = finish(session, &mut signals, writer, stand);
        if self.apply && !self.persist && self.instance.is_none() {
            // Nobody asks by this name any more.
            if let Err(error) = Journal::of(&name).remove() {
                log::warn!("what sockets had before is still kept: {error}");
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
                log::warn!("`sockpolicy status` will not show this: {error}");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Keeps policies in force and reports, until a signal asks for the end or all of `ends`, if there are any, have ended.
/// Gives the number of conflicts.
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
    log::info!("in force on {}", escape::join(kernel::names(session.targets()), ", "));
    writer.announce(&session);
    Ok(session)
}

/// Keeps them in force for as long as `during` runs, then sums up.
fn finish(
    mut session: Session,
    signals: &mut Signals,
    writer: Writer,
    during: impl FnOnce(&mut Session, &mut Signals, &Writer) -> Result<(), WatchError>,
) -> Result<u64, RunError> {
    during(&mut session, signals, &writer)?;
    watch::end(&mut session, &writer)?;
    let stays_as = session.persistent_name().map(str::to_owned);
    let summary = session.finish()?;
    let conflicts = summary.new_conflicts();
    if let Some(name) = stays_as {
        log::warn!("the policies stay in force; `sockpolicy detach {name}` ends that");
    }
    writer.summary(summary).map_err(WatchError::from)?;
    Ok(conflicts)
}

/// Whether all policies have targets of their own.
pub(super) fn check_targets(policies: &[Policy]) -> Result<(), RunError> {
    match policies.iter().find(|policy| policy.target.is_empty()) {
        Some(policy) => Err(RunError::NoTarget { policy: policy.name.clone() }),
        None => Ok(()),
    }
}

/// Where policies are in force.
#[derive(Debug, Default)]
pub(super) struct ResolvedTargets {
    pub(super) stacks: Vec<Stack>,
    pub(super) targets: Vec<Target>,
    /// Those that it was found by.
    pub(super) containers: Vec<Running>,
    /// What cannot be a target, or could not be looked at.
    pub(super) skipped: Vec<Skip>,
}

/// Targets that policies can have at the same time. More are skipped: a tenant that makes cgroups which a glob matches must not
/// use up the memory of the host.
const TARGETS_MAX: usize = 16 * 1024;

impl ResolvedTargets {
    /// All policies together, on one cgroup.
    pub(super) fn alone(policies: &[Policy], cgroup: Cgroup) -> Self {
        Self { stacks: vec![all(policies)], targets: vec![Target { cgroup, scope: 0 }], ..Self::default() }
    }

    /// On the targets that were asked for, else on those of the policies. Warns of what is skipped.
    pub(super) fn find(mount: &Mount, asked: &[PathBuf], policies: &[Policy]) -> Result<Self, RunError> {
        let placement = if asked.is_empty() {
            check_targets(policies)?;
            Self::covered(mount, policies)?
        } else {
            check::warn_of_replaced_targets(policies, "--cgroup");
            let below = |path: &PathBuf| mount.open(path).map(|cgroup| mount.below(&cgroup));
            Self::of(mount, Coverage::of_all(policies, asked.iter().map(below).collect::<Result<_, _>>()?), &[])
        };
        if let (true, Some(only)) = (placement.targets.is_empty(), placement.skipped.first()) {
            return Err(RunError::Skipped { name: only.name.clone(), reason: only.reason.clone() });
        }
        warn_of_failed(&placement.skipped);
        Ok(placement)
    }

    /// On the targets that were asked for, else on those of the policies that there are now: others may come. `containers` are
    /// to be listed before this: then the tree has their cgroups.
    pub(super) fn standing(
        mount: &Mount,
        asked: &[PathBuf],
        policies: &[Policy],
        containers: Vec<Running>,
    ) -> Result<Self, RunError> {
        if !asked.is_empty() {
            return Self::find(mount, asked, policies);
        }
        check_targets(policies)?;
        let look = Look::at(mount, policies, &SearchScope::of(policies)?, &containers, BTreeSet::new())?;
        Self::for_now(mount, policies, containers, look)
    }

    /// On the targets of the policies among the cgroups that a look has found. Policies that hold nowhere yet have a stack
    /// too.
    pub(super) fn for_now(
        mount: &Mount,
        policies: &[Policy],
        containers: Vec<Running>,
        look: Look,
    ) -> Result<Self, RunError> {
        let Look { cgroups, skipped } = look;
        let mut coverage = Coverage::of_targets(policies, cgroups.clone(), &containers)?;
        let covered: BTreeSet<usize> = coverage.stacks.iter().flatten().copied().collect();
        let by_target = stacks_by_target(policies).into_values();
        // In the order of the first policy of each.
        let others: BTreeSet<Stack> =
            by_target.filter(|stack| stack.iter().any(|policy| !covered.contains(policy))).collect();
        others.into_iter().for_each(|stack| _ = coverage.intern(stack));
        Ok(Self::of(mount, coverage, &cgroups).found_by(containers, skipped))
    }

    fn covered(mount: &Mount, policies: &[Policy]) -> Result<Self, RunError> {
        // Before the tree, which then has their cgroups.
        let listing = containers::wanted_by(policies);
        containers::tell_of_hidden(&listing);
        let containers = listing.running;
        let Look { cgroups, skipped } =
            Look::at(mount, policies, &SearchScope::of(policies)?, &containers, BTreeSet::new())?;
        let idle = unmatched_targets(policies, &cgroups, &containers)?;
        let all = |policy: &Policy| policy.target.cgroups.len() + policy.target.containers.len();
        if idle.len() == policies.iter().map(all).sum::<usize>() {
            return Err(no_match(mount, policies, &containers, idle));
        }
        for (policy, wanted) in idle {
            log::warn!(
                "policy `{}` does not hold on {}: nothing matches that now",
                policies[policy].name,
                wanted.escaped()
            );
        }
        let coverage = Coverage::of_targets(policies, cgroups.clone(), &containers)?;
        Ok(Self::of(mount, coverage, &cgroups).found_by(containers, skipped))
    }

    fn found_by(mut self, containers: Vec<Running>, skipped: Vec<Skip>) -> Self {
        self.containers = containers;
        self.skipped.extend(skipped);
        self
    }

    /// Opens the targets. Of more than there can be, those are kept that come first in `ranked`.
    fn of(mount: &Mount, coverage: Coverage, ranked: &[PathBuf]) -> Self {
        let Coverage { stacks, targets } = coverage;
        let mut placement = Self { stacks, ..Self::default() };
        for (path, scope) in placement.limited(targets, ranked) {
            match mount.open_below(&path) {
                Ok(cgroup) => placement.targets.push(Target { cgroup, scope }),
                // Gone since it was listed.
                Err(error) if error.is_gone() => {}
                Err(error) => {
                    let name = format!("/{}", escape::plain(&path));
                    let skip = Skip::new(Kind::Cgroup, name, error.to_string()).transient_if(error.is_transient());
                    placement.skipped.push(skip);
                }
            }
        }
        placement
    }

    fn limited(&mut self, targets: Vec<(PathBuf, usize)>, ranked: &[PathBuf]) -> Vec<(PathBuf, usize)> {
        let Some(too_many) = targets.len().checked_sub(TARGETS_MAX).filter(|count| *count > 0) else { return targets };
        let ranks: HashMap<&PathBuf, usize> = ranked.iter().zip(0..).collect();
        let rank = |path: &PathBuf| ranks.get(path).copied().unwrap_or(usize::MAX);
        let mut by_rank: Vec<usize> = targets.iter().map(|(path, _)| rank(path)).collect();
        by_rank.sort_unstable();
        let first_skipped = by_rank[TARGETS_MAX];
        let (kept, others): (Vec<_>, Vec<_>) = targets.into_iter().partition(|(path, _)| rank(path) < first_skipped);
        let reason = format!("{too_many} cgroups are too many: there can be {TARGETS_MAX} targets");
        let skip =
            |(path, _): &(PathBuf, usize)| Skip::new(Kind::Cgroup, format!("/{}", escape::plain(path)), reason.clone());
        self.skipped.extend(others.iter().map(skip));
        kept
    }
}

/// Logs what a command skips that ends soon.
pub(super) fn warn_of_failed(skipped: &[Skip]) {
    let mut list = SkippedList::default();
    warn_of_skipped(&list.replace(skipped, now()), skipped.len());
}

/// Lines that are logged of what is skipped at a time.
const LINES_MAX: usize = 16;

/// Logs objects that are skipped since now; `count` of them in all.
pub(super) fn warn_of_skipped(new: &[Skipped], count: usize) {
    for skipped in new.iter().take(LINES_MAX) {
        log::warn!("skipped: {} {}: {}", skipped.kind.name(), skipped.name, skipped.reason);
    }
    if new.len() > LINES_MAX {
        log::warn!("skipped: {} more, of {count} objects in all", new.len() - LINES_MAX);
    }
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn no_match(mount: &Mount, policies: &[Policy], containers: &[Running], idle: Vec<(usize, String)>) -> RunError {
    let more = idle.len().saturating_sub(PATTERNS_SHOWN);
    let mut wanted: Vec<String> = idle.into_iter().take(PATTERNS_SHOWN).map(|(_, wanted)| wanted).collect();
    wanted.extend((more > 0).then(|| format!("nor {more} others")));
    let wanted = wanted.join(", ");
    match containers::are_wanted_by(policies) {
        true => RunError::NoMatchAmong { wanted, containers: containers::list(containers), mount: mount.path.clone() },
        false => RunError::NoMatch { patterns: wanted, mount: mount.path.clone() },
    }
}
