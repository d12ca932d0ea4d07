//! Keeps policies in force while their files, cgroups and containers change.
//!
//! Each change leads to a complete look: all files are read again, all cgroups are listed again. A notification that the kernel
//! drops or merges therefore loses nothing.
//!
//! Invariant: policies are replaced as a whole or not at all. If the files contain an error, the policies in force stay, and the
//! error is reported.

mod pace;
mod signals;
pub mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    error::Error,
    io, mem,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags};

pub use self::signals::{Received, Signals};
use self::{pace::Pace, watch::WatchError};
use crate::{
    container::Running,
    coverage::{GlobError, OtherInstance, SearchScope, Stack, with_others, with_targets},
    escape,
    events::Event,
    host::{
        cgroup::Mount,
        containers::{Known, Search},
        inotify::{self, Changes, Watch},
    },
    instance::{self, Files, Other},
    journal::{Journal, JournalError},
    kernel::Target,
    policy::{
        Policy,
        diagnostic::{Diagnostic, Severity},
    },
    reconcile::{Done, Message, ReconcileError, ReconcileThread, Selection, Tally, Task},
    report::{Loss, Repaired},
    session::{self, Session, SessionError},
    skipped::{self, Skip, SkippedList},
    sources::{Sources, Texts},
    targets::{
        Candidates, ResolvedTargets, TargetError, check_targets,
        containers::{self, Backoff},
    },
};

/// Files are read when they have not changed for this time. An editor can write a file in several steps.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Files are read this time after the first change, even if they keep changing.
const DEBOUNCE_MAX: Duration = Duration::from_secs(1);
/// For this time after a reload, the programs still decide connections by the previous policies that were current when the
/// connections were opened.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
/// The interval of looks for the last socket of a removed cgroup, in milliseconds. The kernel does not report its end.
const REMOVED_INTERVAL_MS: u16 = 1000;
/// How long to search for containers before the policies are enforced on those that were found. A user can block the search for
/// the containers of that user.
const FIRST_SEARCH: Duration = Duration::from_secs(3);
/// How often to list cgroups again because some were not watched yet.
const ROUNDS_MAX: usize = 4;
/// How long to wait for the end of a reconciliation when the daemon ends.
const LAST_SOCKET: Duration = Duration::from_secs(5);
/// After a repair, no other repair starts for this many times as long as the repair took. The owners of cgroups decide how often
/// targets appear.
const REPAIR_REST: u32 = 4;
/// After the records of other instances were read, they are not read again for this many times as long as that took. Another
/// instance writes its record at each change of its targets.
const OTHERS_REST: u32 = 10;
/// How long to wait if another process uses the journal.
const JOURNAL_BUSY: Duration = Duration::from_secs(5);

/// Receives what the daemon reports. Must not block.
pub trait Observer {
    fn event(&self, event: &Event);
    fn loss(&self, loss: &Loss);
    /// Returns whether the reader of the report is gone.
    fn is_closed(&self) -> bool;
    /// Receives the warnings about policy files, or their errors.
    fn diagnostics(&self, found: &[Diagnostic]);
    #[track_caller]
    fn error(&self, error: &(dyn Error + 'static));
    /// Receives the end of a reload. `refused`: why the policies were not replaced.
    fn reloaded(&self, session: &Session, refused: Option<&str>);
    fn retargeted(&self, before: &TargetNames, after: &TargetNames);
    /// Receives the result of one option of one live socket.
    fn applied(&self, event: &Event);
    fn reconciled(&self, tally: &Tally);
    /// Receives the end of a repair: the sockets of new targets that were created before the programs were attached.
    fn repaired(&self, tally: &Tally);
}

/// The names of the targets' cgroups, by the id of the cgroup and the index of its policies.
pub type TargetNames = BTreeMap<(u64, usize), String>;

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error(transparent)]
    Inotify(#[from] inotify::WatchError),
}

impl From<GlobError> for DaemonError {
    fn from(error: GlobError) -> Self {
        Self::Target(error.into())
    }
}

/// The policies to keep in force, and where.
pub struct Config<'a> {
    pub sources: Sources,
    /// Cgroups that replace the targets of the policies, if there are any: paths below the mount.
    pub cgroups: &'a [PathBuf],
    pub dry_run: bool,
    /// Whether to measure the duration of calls.
    pub timing: bool,
    pub mount: &'a Mount,
    /// The instance whose journal records the values that live sockets had.
    pub instance: &'a str,
    /// Whether to reconcile the live sockets of all targets.
    pub apply: bool,
}

impl Config<'_> {
    /// Replaces the targets of policies by those of the configuration, if there are any.
    fn with_targets(&self, policies: Vec<Policy>) -> Vec<Policy> {
        if self.cgroups.is_empty() { policies } else { with_targets(policies, self.cgroups) }
    }

    fn files(&self, texts: &Texts, stacks: &[Stack], others: &Others) -> Files {
        Files::new(texts, self.dry_run, stacks, &others.instances)
    }

    /// Replaces the policies in force by those of `texts`. Returns their stacks.
    fn enforce(
        &self,
        session: &mut Session,
        policies: &[Policy],
        others: &Others,
        texts: &Texts,
        resolved: ResolvedTargets,
    ) -> Result<Vec<Stack>, SessionError> {
        let ResolvedTargets { stacks, targets, containers, skipped: _ } = resolved;
        let desired = session::prepare(&with_others(policies, &others.freed), &stacks, self.dry_run, self.timing)?;
        session.reload(desired, targets, self.files(texts, &stacks, others))?;
        session.set_containers(Known::new(&containers));
        Ok(stacks)
    }
}

/// Other instances of this host that have targets below own ones: their policies decide there.
#[derive(Debug, Default)]
struct Others {
    instances: Vec<Other>,
    /// The policies of each, as rules that leave their options free.
    freed: Vec<OtherInstance>,
}

impl Others {
    /// Keeps the instances that have a target below one of these.
    fn below(instances: &[Other], targets: &[Target]) -> Self {
        let own: HashSet<&Path> = targets.iter().map(|target| Path::new(&target.cgroup.name)).collect();
        let is_below = |name: &str| Path::new(name).ancestors().skip(1).any(|ancestor| own.contains(ancestor));
        let instances: Vec<Other> = instances.iter().filter(|other| other.targets().any(is_below)).cloned().collect();
        let freed = instances.iter().map(Other::freed).collect();
        Self { instances, freed }
    }
}

/// Keeps policies in force.
pub struct Daemon<'a> {
    config: Config<'a>,
    /// The files as they were last read.
    texts: Texts,
    /// The files of the policies in force.
    in_force: Texts,
    policies: Vec<Policy>,
    stacks: Vec<Stack>,
    /// All other instances, as their records were last read.
    all_others: Vec<Other>,
    /// Those of them that the stacks in force contain.
    others: Others,
    files: Watch,
    cgroups: Watch,
    /// The directory of the records of instances.
    instances: Watch,
    /// When to read the records of other instances, if one has changed.
    read_others_at: Option<Instant>,
    /// The records are not read before this time.
    no_others_before: Instant,
    scope: SearchScope,
    pace: Pace,
    /// All that is skipped now.
    skipped: SkippedList,
    /// What the last look at cgroups skipped.
    skipped_cgroups: Vec<Skip>,
    /// What the last reconciliation skipped.
    skipped_sockets: Vec<Skip>,
    /// The reconciliation that runs now.
    reconciliation: Option<ReconcileThread>,
    /// The first and the last change of the files since they were read.
    changed: Option<(Instant, Instant)>,
    /// The search for containers, if a policy has one as a target.
    search: Option<Search>,
    next_search: Option<Backoff>,
    /// When the policies were replaced last.
    replaced: Instant,
    /// When to reconcile live sockets, if they are to be reconciled.
    reconcile_at: Option<Instant>,
    /// The cgroup ids of targets that have appeared, with sockets that may be older than the programs there. Not used if all
    /// targets are reconciled.
    to_repair: BTreeSet<u64>,
    /// Those of them that are repaired now.
    in_repair: BTreeSet<u64>,
    /// When the last reconciliation started.
    reconciliation_started: Instant,
    /// No repair starts before this time.
    no_repair_before: Instant,
}

/// What signals requested.
#[derive(Default)]
struct SignalRequests {
    reload: bool,
    end: bool,
}

impl SignalRequests {
    fn drain_signals(&mut self, signals: &mut Signals) -> io::Result<()> {
        while let Some(received) = signals.receive()? {
            // SIGHUP reloads if there is a terminal or none, and ends the agent if the terminal is gone.
            if received.asks_for_reload() {
                self.reload = true;
            } else {
                self.end |= received.asks_for_end();
            }
        }
        Ok(())
    }
}

impl<'a> Daemon<'a> {
    /// Starts to watch the files and the cgroups. The policies are those of `texts`.
    ///
    /// # Errors
    ///
    /// Fails if a glob cannot be compiled, or if the kernel refuses inotify(7).
    pub fn watch(config: Config<'a>, texts: Texts, policies: Vec<Policy>) -> Result<Self, DaemonError> {
        let policies = config.with_targets(policies);
        let scope = SearchScope::of(&policies)?;
        let now = Instant::now();
        let reconcile_at = config.apply.then_some(now);
        let mut daemon = Self {
            config,
            in_force: texts.clone(),
            texts,
            policies,
            stacks: Vec::new(),
            all_others: Vec::new(),
            others: Others::default(),
            instances: Watch::new(Changes::Folders)?,
            read_others_at: None,
            no_others_before: now,
            files: Watch::new(Changes::Files)?,
            cgroups: Watch::new(Changes::Folders)?,
            scope,
            changed: None,
            search: None,
            next_search: None,
            pace: Pace::default(),
            skipped: SkippedList::default(),
            skipped_cgroups: Vec::new(),
            skipped_sockets: Vec::new(),
            reconciliation: None,
            replaced: now,
            reconcile_at,
            to_repair: BTreeSet::new(),
            in_repair: BTreeSet::new(),
            reconciliation_started: now,
            no_repair_before: now,
        };
        if containers::are_wanted_by(&daemon.policies) {
            let search = daemon.search.insert(Search::default());
            search.look(FIRST_SEARCH);
            containers::warn_of_hidden(&search.listing());
        }
        daemon.follow_files();
        daemon.follow_instances();
        Ok(daemon)
    }

    /// Resolves the targets that exist now.
    ///
    /// # Errors
    ///
    /// Fails if a requested cgroup does not exist, or if a policy has no target.
    pub fn resolve_targets(&mut self) -> Result<ResolvedTargets, DaemonError> {
        self.pace.begin(Instant::now());
        let resolved = self.look(&BTreeSet::new());
        self.pace.end(Instant::now());
        let (mut resolved, others) = resolved?;
        self.others = others;
        self.stacks.clone_from(&resolved.stacks);
        self.skipped_cgroups.append(&mut resolved.skipped);
        Ok(resolved)
    }

    fn containers(&self) -> Vec<Running> {
        self.search.as_ref().map(|search| search.listing().running).unwrap_or_default()
    }

    /// Logs objects that are skipped since the last call, and records all that are skipped.
    pub fn note_skipped(&mut self, session: &mut Session) {
        let mut skipped_now = self.skipped_cgroups.clone();
        skipped_now.extend_from_slice(session.skipped());
        if skipped_now.iter().any(|skip| skip.is_transient) {
            self.pace.retry(Instant::now());
        }
        skipped_now.extend_from_slice(&self.skipped_sockets);
        let new = self.skipped.replace(&skipped_now, skipped::now());
        skipped::warn_of_new(&new, skipped_now.len());
        session.note_skipped(&self.skipped);
    }

    /// Returns the files of the policies in force, for the record of the instance.
    #[must_use]
    pub fn files(&self) -> Files {
        self.config.files(&self.in_force, &self.stacks, &self.others)
    }

    /// Returns the policies in force, followed by those of other instances, as the stacks count them.
    #[must_use]
    pub fn policies(&self) -> Vec<Policy> {
        with_others(&self.policies, &self.others.freed)
    }

    /// Runs until a signal ends it: reports events, and follows changes of files, cgroups and containers.
    ///
    /// # Errors
    ///
    /// Fails if poll(2) fails, or if the programs cannot be read.
    pub fn run(
        &mut self,
        session: &mut Session,
        signals: &mut Signals,
        observer: &impl Observer,
    ) -> Result<(), WatchError> {
        let mut requested = SignalRequests::default();
        self.schedule_repair(session.recreated().iter().copied());
        loop {
            if self.reconciliation.is_none() && self.reconcile_at.is_some_and(|at| at <= Instant::now()) {
                self.start_reconcile(session);
            }
            if !(requested.reload || requested.end) {
                self.wait(session, signals)?;
            }
            requested.drain_signals(signals).map_err(WatchError::Wait)?;
            watch::pass_on(session, observer)?;
            self.drain_reconcile(session, observer)?;
            if requested.end {
                return self.stop_reconcile(session, observer);
            }
            let is_requested = mem::take(&mut requested.reload);
            if self.files.has_changed().map_err(WatchError::Wait)? {
                let now = Instant::now();
                self.changed = Some((self.changed.map_or(now, |(first, _)| first), now));
            }
            if is_requested || self.is_debounced() {
                self.reload(session, observer, is_requested);
            }
            let has_changed = self.cgroups.has_changed().map_err(WatchError::Wait)?;
            if has_changed {
                self.pace.note_change();
            }
            if self.search_containers(has_changed) {
                self.pace.note_change();
            }
            if self.instances.has_changed().map_err(WatchError::Wait)? {
                self.read_others_at.get_or_insert(self.no_others_before);
            }
            if self.read_others_at.is_some_and(|at| at <= Instant::now()) && self.read_others() {
                self.pace.note_change();
            }
            if self.pace.is_due(Instant::now()) {
                self.retarget(session, observer);
            }
            if session.has_removed() {
                session.detach_removed()?;
            }
            if session.has_draining() && self.replaced.elapsed() >= RETIRE_AFTER {
                session.retire()?;
            }
        }
    }

    fn wait(&self, session: &Session, signals: &Signals) -> Result<(), WatchError> {
        let mut polled = watch::sources(signals, session);
        polled.extend(
            [&self.files, &self.cgroups, &self.instances].map(|watch| PollFd::new(watch.as_fd(), PollFlags::POLLIN)),
        );
        let workers = self.search.iter().flat_map(Search::descriptors);
        polled.extend(workers.map(|worker| PollFd::new(worker, PollFlags::POLLIN)));
        let reconciliation = self.reconciliation.iter();
        polled.extend(reconciliation.map(|thread| PollFd::new(thread.as_fd(), PollFlags::POLLIN)));
        watch::wait_for(&mut polled, self.poll_timeout_ms(session))
    }

    /// Takes what the search for containers has found, and starts another search if one is due. Returns whether other containers
    /// run than before.
    fn search_containers(&mut self, has_changed: bool) -> bool {
        let Some(search) = &mut self.search else { return false };
        let has_found = search.advance();
        let now = Instant::now();
        if has_changed {
            self.next_search = Some(Backoff::restarted(self.next_search.take(), now));
        }
        if !search.is_looking() && self.next_search.as_ref().is_some_and(|next| next.is_due(now)) {
            search.begin();
            self.next_search = self.next_search.take().and_then(|next| next.after_search(search.took(), now));
        }
        has_found
    }

    /// Starts to reconcile live sockets with the policies in force: the sockets of all targets, or of those to repair.
    fn start_reconcile(&mut self, session: &Session) {
        self.reconcile_at = None;
        self.reconciliation_started = Instant::now();
        let Config { mount, dry_run, instance, apply, .. } = self.config;
        let selection = match apply {
            true => Selection::of(session.targets()),
            false => Selection::among(session.targets(), &self.to_repair),
        };
        let task = Task {
            mount: mount.clone(),
            desired: session.desired().clone(),
            selection,
            dry_run,
            keeps_allowed: !apply,
            journal: Journal::of(instance),
        };
        match ReconcileThread::start(task) {
            Ok(thread) => {
                self.reconciliation = Some(thread);
                self.in_repair = mem::take(&mut self.to_repair);
            }
            Err(error) => {
                log::warn!("cannot start to reconcile live sockets: {error}");
                self.reconcile_at = Some(Instant::now() + JOURNAL_BUSY);
            }
        }
    }

    /// Takes the messages of the reconciliation.
    fn drain_reconcile(&mut self, session: &mut Session, observer: &impl Observer) -> Result<(), WatchError> {
        while let Some(message) = self.reconciliation.as_mut().and_then(ReconcileThread::take) {
            self.take_message(message, session, observer)?;
        }
        Ok(())
    }

    /// Stops the reconciliation, and reports its result.
    fn stop_reconcile(&mut self, session: &mut Session, observer: &impl Observer) -> Result<(), WatchError> {
        let Some(mut thread) = self.reconciliation.take() else { return Ok(()) };
        let mut taken = Ok(());
        thread.stop(LAST_SOCKET, |message| {
            let this = self.take_message(message, session, observer);
            taken = mem::replace(&mut taken, Ok(())).and(this);
        });
        taken
    }

    fn take_message(
        &mut self,
        message: Message,
        session: &mut Session,
        observer: &impl Observer,
    ) -> Result<(), WatchError> {
        match message {
            Message::Event(event) => observer.applied(&event),
            Message::Done(done) => {
                let Done { tally, skipped, error } = *done;
                self.reconciliation = None;
                self.skipped_sockets = skipped;
                self.note_skipped(session);
                match error {
                    None | Some(ReconcileError::Stopped) => {}
                    Some(error) => {
                        observer.error(&error);
                        if matches!(error, ReconcileError::Journal(JournalError::Busy { .. })) {
                            self.reconcile_at = Some(Instant::now() + JOURNAL_BUSY);
                            self.to_repair.append(&mut self.in_repair);
                        }
                    }
                }
                if self.config.apply {
                    observer.reconciled(&tally);
                } else {
                    self.no_repair_before = Instant::now() + self.reconciliation_started.elapsed() * REPAIR_REST;
                    session.note_repaired(Repaired { sockets: tally.changed, listeners: tally.listeners });
                    observer.repaired(&tally);
                }
            }
        }
        Ok(())
    }

    /// Reconciles the live sockets of all targets after [`DEBOUNCE`], if they are to be reconciled.
    fn schedule_reconcile(&mut self) {
        if self.config.apply {
            self.reconcile_at = Some(Instant::now() + DEBOUNCE);
        }
    }

    /// Repairs the sockets of these targets, by the ids of their cgroups: the sockets may have been created before the programs
    /// were attached.
    fn schedule_repair(&mut self, cgroups: impl Iterator<Item = u64>) {
        if self.config.apply {
            return;
        }
        self.to_repair.extend(cgroups);
        if !self.to_repair.is_empty() && self.reconcile_at.is_none() {
            self.reconcile_at = Some(Instant::now().max(self.no_repair_before));
        }
    }

    /// Returns how long to wait for an event, in milliseconds.
    fn poll_timeout_ms(&self, session: &Session) -> u16 {
        let now = Instant::now();
        let reconcile_at = self.reconcile_at.filter(|_| self.reconciliation.is_none());
        let next_search = self.search.as_ref().filter(|search| !search.is_looking());
        let next_search = next_search.and(self.next_search.as_ref()).map(Backoff::next);
        let worker = self.search.as_ref().and_then(Search::left).map(|left| now + left);
        let retire_at = session.has_draining().then(|| self.replaced + RETIRE_AFTER);
        let debounced = self.debounced_at();
        let due = [reconcile_at, next_search, worker, self.pace.next(), retire_at, debounced, self.read_others_at];
        let until_due = due.into_iter().flatten().min().map_or(u16::MAX, |due| timeout_ms(now, due));
        let removed = if session.has_removed() { REMOVED_INTERVAL_MS } else { u16::MAX };
        watch::interval_ms(session).min(until_due).min(removed)
    }

    /// Returns when to read the files that changed.
    fn debounced_at(&self) -> Option<Instant> {
        self.changed.map(|(first, last)| (last + DEBOUNCE).min(first + DEBOUNCE_MAX))
    }

    fn is_debounced(&self) -> bool {
        self.debounced_at().is_some_and(|at| at <= Instant::now())
    }

    /// Reads the files, and replaces the policies in force if the files changed. `is_requested`: report the result in any case.
    fn reload(&mut self, session: &mut Session, observer: &impl Observer, is_requested: bool) {
        self.changed = None;
        let texts = self.config.sources.read();
        self.follow_files();
        if texts == self.texts && !is_requested {
            return;
        }
        self.texts = texts;
        let replaced = match self.texts.policies() {
            Ok((policies, warnings)) => {
                observer.diagnostics(&warnings);
                let replaced = self.replace(session, observer, policies);
                replaced.inspect_err(|error| observer.error(error)).map_err(|error| first_line(&error.to_string()))
            }
            Err(errors) => {
                observer.diagnostics(&errors.diagnostics);
                Err(first_of(&errors.diagnostics))
            }
        };
        let refused = replaced.err();
        if let Some(reason) = &refused {
            log::error!("reload refused: {reason}: the previous policies stay in force");
        }
        session.note_reload(refused.clone());
        observer.reloaded(session, refused.as_deref());
    }

    fn replace(
        &mut self,
        session: &mut Session,
        observer: &impl Observer,
        policies: Vec<Policy>,
    ) -> Result<(), DaemonError> {
        // Sockets of a target of the previous policies are repaired, unlike those of a cgroup that the new policies cover.
        if self.pace.has_changed() {
            self.retarget(session, observer);
        }
        let policies = self.config.with_targets(policies);
        let scope = SearchScope::of(&policies)?;
        let mount = self.config.mount;
        let resolved = ResolvedTargets::find_or_wait(mount, &policies, self.containers())?;
        let others = Others::below(&self.all_others, &resolved.targets);
        let mut resolved = resolved.beside(mount, &policies, &others.freed);
        resolved.skipped.extend(session.leave_to_others(&mut resolved.targets));
        let skipped = mem::take(&mut resolved.skipped);
        let stacks = self.config.enforce(session, &policies, &others, &self.texts, resolved)?;
        self.others = others;
        self.replaced = Instant::now();
        if policies.is_empty() {
            // The administrator has removed the last policy: also sockets that are being set up are left alone.
            session.retire()?;
        }
        if containers::are_wanted_by(&policies) {
            self.search.get_or_insert_default();
            self.next_search = Some(Backoff::restarted(self.next_search.take(), Instant::now()));
        } else {
            (self.search, self.next_search) = (None, None);
        }
        (self.policies, self.stacks, self.scope) = (policies, stacks, scope);
        self.in_force = self.texts.clone();
        self.skipped_cgroups = skipped;
        self.note_skipped(session);
        self.schedule_reconcile();
        // Cgroups may have changed since they were listed.
        self.pace.note_change();
        Ok(())
    }

    /// Resolves the targets again, and attaches the policies to new ones. A failure is reported, and repeated later.
    fn retarget(&mut self, session: &mut Session, observer: &impl Observer) {
        let before = names(session.targets());
        self.pace.begin(Instant::now());
        let retargeted = self.attach_to_new(session);
        self.pace.end(Instant::now());
        match retargeted {
            Ok(()) => {
                self.note_skipped(session);
                let after = names(session.targets());
                if before == after {
                    return;
                }
                let known: BTreeSet<u64> = before.keys().map(|(cgroup, _)| *cgroup).collect();
                self.schedule_repair(after.keys().map(|(cgroup, _)| *cgroup).filter(|cgroup| !known.contains(cgroup)));
                self.schedule_reconcile();
                observer.retargeted(&before, &after);
            }
            Err(error) => {
                self.pace.retry(Instant::now());
                observer.error(&error);
                log::error!("the targets are unchanged: the policies stay in force on the same cgroups");
            }
        }
    }

    fn attach_to_new(&mut self, session: &mut Session) -> Result<(), DaemonError> {
        let mount = self.config.mount;
        // A target whose parent cannot be listed stays a target.
        let known = session.targets().iter().map(|target| mount.below(&target.cgroup)).collect();
        let (ResolvedTargets { stacks, mut targets, containers, mut skipped }, others) = self.look(&known)?;
        skipped.extend(session.leave_to_others(&mut targets));
        self.skipped_cgroups = skipped;
        let scopes: Option<Vec<usize>> =
            stacks.iter().map(|stack| self.stacks.iter().position(|known| known == stack)).collect();
        let Some(scopes) = scopes.filter(|_| others.instances == self.others.instances) else {
            let resolved = ResolvedTargets { stacks, targets, containers, skipped: Vec::new() };
            self.stacks = self.config.enforce(session, &self.policies, &others, &self.in_force, resolved)?;
            self.others = others;
            self.replaced = Instant::now();
            return Ok(());
        };
        session.set_containers(Known::new(&containers));
        for target in &mut targets {
            target.scope = scopes[target.scope];
        }
        Ok(session.retarget(targets)?)
    }

    /// Resolves the targets that exist now, and watches the directories in which targets can appear. Repeats this for directories
    /// that were not watched before, so that no cgroup is missed.
    fn look(&mut self, known: &BTreeSet<PathBuf>) -> Result<(ResolvedTargets, Others), DaemonError> {
        let mount = self.config.mount;
        // Listed before the tree, so that the tree contains the cgroups of these containers.
        let containers = self.containers();
        check_targets(&self.policies)?;
        let mut rounds = 0;
        loop {
            let candidates = Candidates::find(mount, &self.policies, &self.scope, &containers, known.clone())?;
            rounds += 1;
            let has_new = self.watch_cgroups(&candidates)?;
            if has_new && rounds < ROUNDS_MAX {
                continue;
            }
            if has_new {
                self.pace.note_change();
            }
            let resolved = ResolvedTargets::among(mount, &self.policies, containers, candidates)?;
            let others = Others::below(&self.all_others, &resolved.targets);
            return Ok((resolved.beside(mount, &self.policies, &others.freed), others));
        }
    }

    /// Watches the cgroups below which targets can appear. Returns whether one of them was not watched before.
    fn watch_cgroups(&mut self, candidates: &Candidates) -> Result<bool, DaemonError> {
        match self.cgroups.follow(&candidates.watched(self.config.mount, &self.scope)) {
            Ok(has_new) => {
                self.pace.set_polling(false);
                Ok(has_new)
            }
            Err(error @ inotify::WatchError::Add { .. }) => {
                if self.pace.set_polling(true) {
                    log::warn!("{error}");
                    log::warn!("cgroups are looked at every {} ms or less often instead", Pace::POLL.as_millis());
                }
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the records of the other instances. Returns whether their policies or targets have changed.
    fn read_others(&mut self) -> bool {
        self.read_others_at = None;
        let began = Instant::now();
        let instances = instance::others(self.config.instance);
        self.no_others_before = Instant::now() + began.elapsed() * OTHERS_REST;
        let has_changed = instances != self.all_others;
        self.all_others = instances;
        has_changed
    }

    /// Watches for other instances. Without that, the programs of this instance override those on deeper targets.
    fn follow_instances(&mut self) {
        let directory: BTreeSet<PathBuf> = instance::watched().into_iter().collect();
        if let Err(error) = self.instances.follow(&directory) {
            log::warn!("{error}");
        }
        // Read afterwards, so that no change is missed.
        self.read_others();
    }

    fn follow_files(&mut self) {
        match self.files.follow(&self.config.sources.folders()) {
            // Files may have changed before their directory was watched.
            Ok(true) => self.changed = Some((Instant::now(), Instant::now())),
            Ok(false) => {}
            Err(error) => {
                log::warn!("{error}");
                log::warn!(
                    "changes of policy files may be missed\n  help: after a change, run: kill -HUP {}",
                    std::process::id()
                );
            }
        }
    }
}

/// Returns the first error of policy files, and the number of the others.
fn first_of(found: &[Diagnostic]) -> String {
    let mut errors = found.iter().filter(|diagnostic| diagnostic.severity == Severity::Error);
    let text = |Diagnostic { source, message, .. }: &Diagnostic| match source {
        Some(source) => format!("{}: {message}", escape::plain(source.path())),
        None => message.clone(),
    };
    let first = errors.next().map(text).unwrap_or_default();
    match errors.count() {
        0 => first_line(&first),
        others => format!("{} (and {others} more)", first_line(&first)),
    }
}

/// Returns the first line of a text, which is the message of an error without its help.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn names(targets: &[Target]) -> TargetNames {
    targets.iter().map(|target| ((target.cgroup.id, target.scope), target.cgroup.name.clone())).collect()
}

/// Returns the time until `due` in milliseconds, rounded up.
fn timeout_ms(now: Instant, due: Instant) -> u16 {
    let left = due.saturating_duration_since(now);
    u16::try_from(left.as_millis().saturating_add(1)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_is_rounded_up_and_bounded() {
        let now = Instant::now();
        assert_eq!(timeout_ms(now, now), 1);
        assert_eq!(timeout_ms(now + Duration::from_secs(1), now), 1, "it is past");
        assert_eq!(timeout_ms(now, now + Duration::from_micros(1500)), 2);
        assert_eq!(timeout_ms(now, now + Duration::from_secs(66)), u16::MAX);
        assert_eq!(timeout_ms(now, now + Duration::from_secs(86_400)), u16::MAX);
    }
}
