//! Policies that stay in force while their files change, and the cgroups come and go that they are about.
//!
//! What changes is looked at as a whole each time: the files are read anew, the cgroups listed anew. So it does not matter which
//! changes the kernel tells of, and when.
//!
//! Invariant: what is in force changes as a whole or not at all. Files that make no valid set of policies leave things as they
//! are, and that is said.

use std::{
    collections::BTreeSet,
    io, mem,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags};

use super::{
    apply::ApplyError,
    check,
    containers::{self, Backoff},
    look::Look,
    output::{EnforceArgs, TargetNames, Writer},
    print_error,
    reconcile_thread::{Done, Message, ReconcileThread, Task},
    run::{ResolvedTargets, RunError, check_targets, now, warn_of_skipped},
    signals::Signals,
    sockets::Targets,
    watch::{self, WatchError},
};
use crate::{
    coverage::{SearchScope, Stack},
    host::{
        cgroup::Mount,
        containers::{Known, Running, Search},
        inotify::{self, Changes, Watch},
    },
    instance::Files,
    journal::{Journal, JournalError},
    kernel::Target,
    policy::{Policy, Sources, Texts},
    session::{self, Session},
    skipped::{Skip, SkippedList},
};

/// How long files must be left alone before they are read: who writes several, or one in parts, is to be done.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// But no longer than this after the first change.
const DEBOUNCE_MAX: Duration = Duration::from_secs(1);
/// How long sockets have to be set up by policies that are no longer in force.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
/// How often to look whether the last socket of a removed cgroup is closed, which the kernel does not tell.
const LOOK_FOR_EMPTY_MS: u16 = 1000;

/// How long to look for containers before policies come in force on those that were found. Users can block the search for theirs.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// How often to look for new cgroups where the kernel watches no more of them, in milliseconds.
const POLL_MS: u64 = 2000;
/// How often to look anew, at a time, for what comes while cgroups begin to be watched.
const ROUNDS_MAX: usize = 4;

/// How long to wait for the end of a reconciliation.
const LAST_SOCKET: Duration = Duration::from_secs(5);

/// How long to wait where another process works on what sockets had.
const WHILE_BUSY: Duration = Duration::from_secs(5);

/// What people asked to be in force, and where.
pub(super) struct Wanted<'a> {
    pub(super) sources: Sources,
    /// Given in place of the policies' own targets.
    pub(super) cgroups: &'a [PathBuf],
    pub(super) manner: &'a EnforceArgs,
    pub(super) mount: &'a Mount,
    /// The instance with which to keep what live sockets had, where these are to be brought in line.
    pub(super) journal: Option<&'a str>,
}

impl Wanted<'_> {
    /// For the record of an instance.
    fn files(&self, texts: &Texts, stacks: &[Stack]) -> Files {
        Files::new(texts, self.manner.dry_run, stacks)
    }

    /// Has these policies, which are those of `texts`, in force there in place of others; gives their stacks.
    fn put_in_force(
        &self,
        session: &mut Session,
        policies: &[Policy],
        texts: &Texts,
        placement: ResolvedTargets,
    ) -> Result<Vec<Stack>, RunError> {
        let ResolvedTargets { stacks, targets, containers, skipped: _ } = placement;
        let EnforceArgs { dry_run, reporting, .. } = self.manner;
        let desired = session::prepare(policies, &stacks, *dry_run, reporting.timing)?;
        session.reload(desired, targets, self.files(texts, &stacks))?;
        session.set_containers(Known::new(&containers));
        Ok(stacks)
    }
}

/// Keeps that in force.
pub(super) struct Daemon<'a> {
    wanted: Wanted<'a>,
    /// What the files said when they were last read.
    texts: Texts,
    /// What those said that are in force.
    in_force: Texts,
    policies: Vec<Policy>,
    stacks: Vec<Stack>,
    files: Watch,
    cgroups: Watch,
    reach: SearchScope,
    pace: Pace,
    /// What is skipped at the moment, in all.
    skipped: SkippedList,
    /// Of that, what came of the last look at cgroups.
    skipped_cgroups: Vec<Skip>,
    /// And of the last look at live sockets.
    skipped_sockets: Vec<Skip>,
    /// Set while live sockets are reconciled.
    bringing: Option<ReconcileThread>,
    /// When files were first found changed, and when last, since they were read.
    changed: Option<(Instant, Instant)>,
    /// Where policies are about containers, these.
    search: Option<Search>,
    /// When to look for them, after a cgroup has come.
    looks: Option<Backoff>,
    /// When other policies came in force.
    replaced: Instant,
    /// When to bring live sockets in line, if they are to be.
    due: Option<Instant>,
}

/// What signals have asked for.
#[derive(Default)]
struct SignalRequests {
    reload: bool,
    end: bool,
}

impl SignalRequests {
    /// Adds what has come since.
    fn drain_signals(&mut self, signals: &mut Signals) -> io::Result<()> {
        while let Some(received) = signals.next()? {
            // A hangup asks for either, and first for the files to be read.
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
    /// Begins to watch. The policies are those of `texts`.
    pub(super) fn watch(wanted: Wanted<'a>, texts: Texts, policies: Vec<Policy>) -> Result<Self, RunError> {
        let reach = SearchScope::of(&policies)?;
        let mut standing = Self {
            wanted,
            in_force: texts.clone(),
            texts,
            policies,
            stacks: Vec::new(),
            files: Watch::new(Changes::Files)?,
            cgroups: Watch::new(Changes::Folders)?,
            reach,
            changed: None,
            search: None,
            looks: None,
            pace: Pace::default(),
            skipped: SkippedList::default(),
            skipped_cgroups: Vec::new(),
            skipped_sockets: Vec::new(),
            bringing: None,
            replaced: Instant::now(),
            due: None,
        };
        standing.due = standing.wanted.journal.map(|_| Instant::now());
        if containers::are_wanted_by(&standing.policies) {
            let search = standing.search.insert(Search::default());
            search.look(FIRST_LOOK);
            containers::tell_of_hidden(&search.listing());
        }
        standing.follow_files();
        Ok(standing)
    }

    /// Where the policies hold by now.
    pub(super) fn placement(&mut self) -> Result<ResolvedTargets, RunError> {
        self.pace.begin();
        let looked = self.look(&BTreeSet::new());
        self.pace.end();
        let mut placement = looked?;
        self.stacks.clone_from(&placement.stacks);
        self.skipped_cgroups.append(&mut placement.skipped);
        Ok(placement)
    }

    /// The containers, as they were found last.
    fn containers(&self) -> Vec<Running> {
        self.search.as_ref().map(|search| search.listing().running).unwrap_or_default()
    }

    /// Logs new skipped objects, and records all of them.
    pub(super) fn note_skipped(&mut self, session: &mut Session) {
        let mut now_skipped = self.skipped_cgroups.clone();
        now_skipped.extend_from_slice(session.skipped());
        if now_skipped.iter().any(|skip| skip.is_transient) {
            self.pace.retry();
        }
        now_skipped.extend_from_slice(&self.skipped_sockets);
        let new = self.skipped.replace(&now_skipped, now());
        warn_of_skipped(&new, now_skipped.len());
        session.note_skipped(&self.skipped);
    }

    /// What is in force, for the record of an instance.
    pub(super) fn files(&self) -> Files {
        self.wanted.files(&self.in_force, &self.stacks)
    }

    /// Reports, and follows what changes, until a signal asks for the end.
    pub(super) fn run(
        &mut self,
        session: &mut Session,
        signals: &mut Signals,
        writer: &Writer,
    ) -> Result<(), WatchError> {
        let mut asked = SignalRequests::default();
        loop {
            if self.bringing.is_none() && self.due.is_some_and(|due| due <= Instant::now()) {
                self.start_reconcile(session)?;
            }
            let mut polled = watch::sources(signals, session);
            polled.extend([&self.files, &self.cgroups].map(|watch| PollFd::new(watch.as_fd(), PollFlags::POLLIN)));
            let found = self.search.iter().flat_map(Search::descriptors);
            polled.extend(found.map(|worker| PollFd::new(worker, PollFlags::POLLIN)));
            polled.extend(self.bringing.iter().map(|bringing| PollFd::new(bringing.as_fd(), PollFlags::POLLIN)));
            if !(asked.reload || asked.end) {
                watch::wait_for(&mut polled, self.poll_timeout_ms(session))?;
            }
            asked.drain_signals(signals).map_err(WatchError::Watch)?;
            watch::tell(session, writer)?;
            self.drain_reconcile(session, writer)?;
            if asked.end {
                return self.stop_reconcile(session, writer);
            }
            let is_asked = mem::take(&mut asked.reload);
            if self.files.has_changed().map_err(WatchError::Watch)? {
                let now = Instant::now();
                self.changed = Some((self.changed.map_or(now, |(first, _)| first), now));
            }
            if is_asked || self.is_debounced() {
                self.reload(session, writer, is_asked);
            }
            let has_changed = self.cgroups.has_changed().map_err(WatchError::Watch)?;
            if has_changed {
                self.pace.note_change();
            }
            if self.look_for_containers(has_changed) {
                self.pace.note_change();
            }
            if self.pace.is_due() {
                self.retarget(session, writer);
            }
            if session.has_removed() {
                session.detach_removed()?;
            }
            if session.has_draining() && self.replaced.elapsed() >= RETIRE_AFTER {
                session.retire()?;
            }
        }
    }

    /// Takes what was found of containers, and looks again if it is time to. Gives whether they are other ones than before.
    fn look_for_containers(&mut self, has_changed: bool) -> bool {
        let Some(search) = &mut self.search else { return false };
        let has_found = search.advance();
        if has_changed {
            self.looks = Some(Backoff::again(self.looks.take()));
        }
        if !search.is_looking() && self.looks.as_ref().is_some_and(Backoff::are_due) {
            search.begin();
            self.looks = self.looks.take().and_then(|looks| looks.after_one(search.took()));
        }
        has_found
    }

    /// Begins to bring sockets that are there in line with the policies in force, beside everything else.
    fn start_reconcile(&mut self, session: &Session) -> Result<(), WatchError> {
        self.due = None;
        let Wanted { manner, mount, journal: Some(journal), .. } = self.wanted else { return Ok(()) };
        let task = Task {
            mount: mount.clone(),
            desired: session.desired().clone(),
            targets: Targets::these(session.targets()),
            dry_run: manner.dry_run,
            journal: Journal::of(journal),
        };
        match ReconcileThread::begin(task) {
            Ok(bringing) => self.bringing = Some(bringing),
            Err(error) => {
                log::warn!("cannot begin to bring sockets in line: {error}");
                self.due = Some(Instant::now() + WHILE_BUSY);
            }
        }
        Ok(())
    }

    /// Takes what there is to be said of that. What cannot be done is said, and the policies stay in force.
    fn drain_reconcile(&mut self, session: &mut Session, writer: &Writer) -> Result<(), WatchError> {
        while let Some(message) = self.bringing.as_mut().and_then(ReconcileThread::next) {
            self.take(message, session, writer)?;
        }
        Ok(())
    }

    /// Has that come to an end, and says what came of it.
    fn stop_reconcile(&mut self, session: &mut Session, writer: &Writer) -> Result<(), WatchError> {
        let Some(mut bringing) = self.bringing.take() else { return Ok(()) };
        let mut taken = Ok(());
        bringing.stop(LAST_SOCKET, |message| {
            let this = self.take(message, session, writer);
            taken = mem::replace(&mut taken, Ok(())).and(this);
        });
        taken
    }

    fn take(&mut self, message: Message, session: &mut Session, writer: &Writer) -> Result<(), WatchError> {
        match message {
            Message::Worker(worker, answer) => {
                session.exempt_process(Some(worker))?;
                // It may be gone.
                let _ = answer.send(());
            }
            Message::Event(event) => writer.applied(&event),
            Message::Done(done) => {
                let Done { tally, skipped, error } = *done;
                self.bringing = None;
                session.exempt_process(None)?;
                self.skipped_sockets = skipped;
                self.note_skipped(session);
                match error {
                    None | Some(ApplyError::Stopped) => {}
                    Some(error) => {
                        print_error(&error);
                        if matches!(error, ApplyError::Journal(JournalError::Busy { .. })) {
                            self.due = Some(Instant::now() + WHILE_BUSY);
                        }
                    }
                }
                writer.reconciled(&tally);
            }
        }
        Ok(())
    }

    /// Has live sockets brought in line, if they are to be, when what has changed now has settled.
    fn schedule_reconcile(&mut self) {
        self.due = self.wanted.journal.map(|_| Instant::now() + DEBOUNCE);
    }

    /// How long to wait for something to happen, in milliseconds.
    fn poll_timeout_ms(&self, session: &Session) -> u16 {
        let until = |due: Instant| due.saturating_duration_since(Instant::now()).as_millis() as u16 + 1;
        let due = self.due.filter(|_| self.bringing.is_none());
        let patience =
            due.map_or(u16::MAX, until).min(if session.has_removed() { LOOK_FOR_EMPTY_MS } else { u16::MAX });
        let patience = patience.min(watch::interval(session)).min(self.pace.poll_timeout_ms());
        let of_workers = self.search.as_ref().and_then(Search::left);
        let of_workers = of_workers.map(|left| u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX));
        let is_looking = self.search.as_ref().is_some_and(Search::is_looking);
        let of_looks = self.looks.as_ref().filter(|_| !is_looking).map(Backoff::poll_timeout_ms);
        let patience = [of_workers, of_looks].into_iter().flatten().fold(patience, u16::min);
        if self.changed.is_some() { patience.min(DEBOUNCE.as_millis() as u16) } else { patience }
    }

    fn is_debounced(&self) -> bool {
        self.changed.is_some_and(|(first, last)| last.elapsed() >= DEBOUNCE || first.elapsed() >= DEBOUNCE_MAX)
    }

    /// Reads the files, and has in force what they say. `is_asked` where somebody waits for an answer, whatever they say.
    fn reload(&mut self, session: &mut Session, writer: &Writer, is_asked: bool) {
        self.changed = None;
        let texts = self.wanted.sources.read();
        self.follow_files();
        if texts == self.texts && !is_asked {
            return;
        }
        self.texts = texts;
        let reloaded = match self.texts.policies() {
            Ok((policies, warnings)) => {
                check::show(&warnings);
                self.replace(session, policies).inspect_err(|error| print_error(error)).is_ok()
            }
            Err(errors) => {
                check::show(&errors.diagnostics);
                false
            }
        };
        if !reloaded {
            log::error!("the policies in force stay as they are");
        }
        writer.reloaded(session, reloaded);
    }

    fn replace(&mut self, session: &mut Session, policies: Vec<Policy>) -> Result<(), RunError> {
        let reach = SearchScope::of(&policies)?;
        let containers = self.containers();
        let mut placement = ResolvedTargets::standing(self.wanted.mount, self.wanted.cgroups, &policies, containers)?;
        placement.skipped.extend(session.leave_to_others(&mut placement.targets));
        let skipped = mem::take(&mut placement.skipped);
        let stacks = self.wanted.put_in_force(session, &policies, &self.texts, placement)?;
        self.replaced = Instant::now();
        if containers::are_wanted_by(&policies) {
            self.search.get_or_insert_default();
            self.looks = Some(Backoff::again(self.looks.take()));
        } else {
            (self.search, self.looks) = (None, None);
        }
        (self.policies, self.stacks, self.reach) = (policies, stacks, reach);
        self.in_force = self.texts.clone();
        self.skipped_cgroups = skipped;
        self.note_skipped(session);
        self.schedule_reconcile();
        // What came while nobody looked.
        self.pace.note_change();
        Ok(())
    }

    /// Has the policies hold where they should by now. What cannot be done is said, and tried again.
    fn retarget(&mut self, session: &mut Session, writer: &Writer) {
        let before = ids(session.targets());
        self.pace.begin();
        let placed = self.place(session);
        self.pace.end();
        match placed {
            Ok(()) => {
                self.note_skipped(session);
                let after = ids(session.targets());
                if before == after {
                    return;
                }
                // Sockets may have been made before the programs were there.
                self.schedule_reconcile();
                writer.retargeted(&before, &after);
            }
            Err(error) => {
                self.pace.retry();
                print_error(&error);
                log::error!("the policies are in force on the cgroups that they were on");
            }
        }
    }

    fn place(&mut self, session: &mut Session) -> Result<(), RunError> {
        if !self.wanted.cgroups.is_empty() {
            return Ok(());
        }
        let mount = self.wanted.mount;
        // A target whose place cannot be looked at stays one.
        let known = session.targets().iter().map(|target| mount.below(&target.cgroup)).collect();
        let ResolvedTargets { stacks, mut targets, containers, mut skipped } = self.look(&known)?;
        skipped.extend(session.leave_to_others(&mut targets));
        self.skipped_cgroups = skipped;
        let scopes: Option<Vec<usize>> =
            stacks.iter().map(|stack| self.stacks.iter().position(|known| known == stack)).collect();
        let Some(scopes) = scopes else {
            let placement = ResolvedTargets { stacks, targets, containers, skipped: Vec::new() };
            self.stacks = self.wanted.put_in_force(session, &self.policies, &self.in_force, placement)?;
            self.replaced = Instant::now();
            return Ok(());
        };
        session.set_containers(Known::new(&containers));
        for target in &mut targets {
            target.scope = scopes[target.scope];
        }
        Ok(session.retarget(targets)?)
    }

    /// Looks where the policies hold by now, and watches where targets can come. Cgroups that come while it begins to watch
    /// are seen too.
    fn look(&mut self, known: &BTreeSet<PathBuf>) -> Result<ResolvedTargets, RunError> {
        let Wanted { mount, cgroups, .. } = self.wanted;
        // Listed before the tree, which then has their cgroups.
        let containers = self.containers();
        if !cgroups.is_empty() {
            return ResolvedTargets::standing(mount, cgroups, &self.policies, containers);
        }
        check_targets(&self.policies)?;
        let mut rounds = 0;
        loop {
            let look = Look::at(mount, &self.policies, &self.reach, &containers, known.clone())?;
            rounds += 1;
            let has_new = self.watch_cgroups(&look)?;
            if has_new && rounds < ROUNDS_MAX {
                continue;
            }
            if has_new {
                self.pace.note_change();
            }
            return ResolvedTargets::for_now(mount, &self.policies, containers, look);
        }
    }

    /// Watches the cgroups below which targets can come. Gives whether any was not watched before.
    fn watch_cgroups(&mut self, look: &Look) -> Result<bool, RunError> {
        match self.cgroups.follow(&look.watched(self.wanted.mount, &self.reach)) {
            Ok(has_new) => {
                self.pace.poll(false);
                Ok(has_new)
            }
            Err(error @ inotify::WatchError::Add { .. }) => {
                if self.pace.poll(true) {
                    log::warn!("{error}");
                    log::warn!("cgroups are looked at every {POLL_MS} ms or less often instead, as long as that is so");
                }
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn follow_files(&mut self) {
        match self.files.follow(&self.wanted.sources.folders()) {
            // What changed there while nobody looked.
            Ok(true) => self.changed = Some((Instant::now(), Instant::now())),
            Ok(false) => {}
            Err(error) => {
                log::warn!("{error}");
                log::warn!(
                    "changes of the policies' files may go unseen: kill -HUP {} has them read",
                    std::process::id()
                );
            }
        }
    }
}

fn ids(targets: &[Target]) -> TargetNames {
    targets.iter().map(|target| ((target.cgroup.id, target.scope), target.cgroup.name.clone())).collect()
}

/// How often the cgroups are looked at. Each look takes time that the owners of cgroups decide on, and they can have one follow
/// the other.
#[derive(Debug, Default)]
struct Pace {
    /// Whether something has changed since the last look began.
    has_changed: bool,
    began: Option<Instant>,
    /// Not before this.
    rested: Option<Instant>,
    /// When to try again what failed.
    retry: Option<Instant>,
    /// When to look although the kernel has told of no change: it does not watch all places.
    poll: Option<Instant>,
    is_polling: bool,
    took: Duration,
}

impl Pace {
    /// A look takes this part of the time at the most.
    const REST: u32 = 2;
    const RETRY: Duration = Duration::from_secs(1);

    fn note_change(&mut self) {
        self.has_changed = true;
    }

    fn retry(&mut self) {
        self.retry = Some(Instant::now() + Self::RETRY.max(self.took * Self::REST));
    }

    /// Says whether to look without being told of a change. Gives whether that is new.
    fn poll(&mut self, is_polling: bool) -> bool {
        let is_new = is_polling && !self.is_polling;
        self.is_polling = is_polling;
        is_new
    }

    /// Gives whether to look now.
    fn is_due(&self) -> bool {
        let now = Instant::now();
        let is_past = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let is_wanted = self.has_changed || is_past(self.retry) || is_past(self.poll);
        is_wanted && self.rested.is_none_or(|rested| rested <= now)
    }

    fn begin(&mut self) {
        (self.has_changed, self.retry, self.began) = (false, None, Some(Instant::now()));
    }

    fn end(&mut self) {
        self.took = self.began.take().map(|began| began.elapsed()).unwrap_or_default();
        let now = Instant::now();
        self.rested = Some(now + self.took * Self::REST);
        self.poll = self.is_polling.then(|| now + Duration::from_millis(POLL_MS).max(self.took * 10));
    }

    /// How long to wait at the most, in milliseconds.
    fn poll_timeout_ms(&self) -> u16 {
        let wanted = if self.has_changed { self.rested } else { None };
        let due = [wanted, self.retry, self.poll].into_iter().flatten().min();
        let left = due.map(|due| due.max(self.rested.unwrap_or(due)).saturating_duration_since(Instant::now()));
        left.map_or(u16::MAX, |left| u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX))
    }
}
