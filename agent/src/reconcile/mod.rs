//! Reconciles live sockets with policies, for `apply` and `run --apply`, and restores the values that they had.
//!
//! A BPF iterator sets TCP sockets that listen or are connected, and options that can be decided without a descriptor.
//! The other sockets, and what the iterator cannot set, are set through a descriptor that is duplicated from the socket's process
//! (pidfd_getfd(2)).
//!
//! Invariants: the journal has the value of an option before the option is changed. Each option of each socket is reported once.

mod iter_worker;
pub mod restore;
mod sockets;
mod thread;

use std::{
    collections::{HashMap, HashSet},
    io,
};

use abi::{
    live::{Assignment, Outcome, state},
    setting::{OptionKey, Value, on_conflict, word_in},
};
use serde_json::json;

use self::{iter_worker::IterWorker, restore::settable_value};
pub use self::{
    iter_worker::{LazyIter, WALK, work},
    sockets::{InspectedSocket, Selection, Sockets},
    thread::{Done, Message, ReconcileThread, Task},
};
use crate::{
    compile::Desired,
    events::{Event, Kind},
    host::{netns::Namespace, socket::State, socket_table::SurveyError},
    journal::{Journal, JournalError, Place},
    kernel::{Job, KernelError, Outcomes},
    live::{
        OptionRead, SocketSnapshot, Values,
        drift::{self, Assigned, Baseline, Finding},
    },
    options::{self, Reading, Relation, SocketOption},
    policy::model::Mode,
};

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Sockets(#[from] SurveyError),
    #[error("cannot record the values that sockets have, and so changes none: {0}")]
    Journal(#[from] JournalError),
    /// The iterator cannot be used. Descriptors can.
    #[error("{0}")]
    Iterator(#[source] KernelError),
    #[error("{0}")]
    Kernel(#[source] KernelError),
    #[error("cannot write the report: {0}")]
    Report(#[from] io::Error),
    #[error("stopped by a signal: some sockets are not changed")]
    Stopped,
}

impl From<KernelError> for ReconcileError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Iterator { .. } => Self::Iterator(error),
            other => Self::Kernel(other),
        }
    }
}

/// The counts of a reconciliation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sockets that were compared with the policies.
    pub sockets: u64,
    /// Sockets that were changed.
    pub changed: u64,
    /// Listeners that were changed.
    pub listeners: u64,
    /// Options that were set.
    pub set: u64,
    /// Options of which the kernel took less than the policy wants (net.core.wmem_max and rmem_max, socket(7)).
    pub capped: u64,
    /// Options that a dry run would set.
    pub would_set: u64,
    /// Sockets on which a dry run would set options.
    pub would_change: u64,
    /// Options that the kernel refused to set.
    pub failed: u64,
    /// Options of sockets for which it is unknown whether they agree.
    pub unknown: u64,
    /// Sockets that no file descriptor refers to, and that the iterator could not set completely.
    pub no_fd: u64,
    /// Sockets that this process may not inspect.
    pub denied: u64,
    /// Sockets that did not answer in time.
    pub unanswered: u64,
    /// Processes whose sockets this process may not inspect.
    pub unread_processes: u64,
}

impl Tally {
    /// Returns whether every socket could be inspected.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.denied == 0 && self.unanswered == 0 && self.unread_processes == 0
    }

    /// Returns whether all sockets could be compared, and agree with the policies.
    #[must_use]
    pub fn is_without_findings(&self) -> bool {
        Self { sockets: self.sockets, ..Self::default() } == *self
    }

    /// Returns the fields of a JSON line.
    #[must_use]
    pub fn to_json(self) -> serde_json::Value {
        let Self {
            sockets,
            changed,
            listeners,
            set,
            capped,
            would_set,
            would_change,
            failed,
            unknown,
            no_fd,
            denied,
            unanswered,
            unread_processes,
        } = self;
        json!({
            "checked": sockets, "changed": changed, "listeners": listeners, "set": set, "capped": capped,
            "would_change": would_change, "would_set": would_set,
            "failed": failed, "unknown": unknown, "no_fd": no_fd, "denied": denied, "unanswered": unanswered,
            "unread_processes": unread_processes,
        })
    }
}

/// Setting one option can change another (IP_TOS, SO_PRIORITY). A second round sets that one again.
const ROUNDS: usize = 2;

/// The iterator visits every TCP socket, of other network namespaces too. For fewer sockets than this, descriptors are faster.
const WORTH_A_WALK: usize = 256;

/// Reports a change.
pub type Report<'a> = dyn FnMut(&Event) -> io::Result<()> + 'a;

/// The values that sockets had before they were changed.
pub trait ChangeLog {
    /// Records, for each option, the value before a change, if it is not recorded yet, and the value after it.
    ///
    /// # Errors
    ///
    /// Fails if the values cannot be recorded. The caller must not change them then.
    fn record(&mut self, changes: &mut dyn Iterator<Item = (Place, Option<Value>, Value)>) -> Result<(), JournalError>;
}

impl ChangeLog for Journal {
    fn record(&mut self, changes: &mut dyn Iterator<Item = (Place, Option<Value>, Value)>) -> Result<(), JournalError> {
        self.note_all(changes)
    }
}

/// A socket whose options can be read and set.
pub trait SocketHandle {
    /// Returns what getsockopt returns for an option. `None`: it fails.
    fn value(&mut self, key: OptionKey) -> Option<Value>;

    /// Returns the values of those of these options that the socket has. `None`: the socket does not answer.
    fn values(&mut self, wanted: &[&'static SocketOption]) -> Option<Values>;

    /// Sets an option. Returns what getsockopt returns for it afterwards.
    ///
    /// # Errors
    ///
    /// The kernel's errno. ETIMEDOUT if the socket does not answer.
    fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>>;
}

pub struct Reconciler<'a, J = Journal> {
    desired: &'a Desired,
    dry_run: bool,
    /// Whether to keep values that the application chose and that a rule allows (`on_conflict = "allow"`). A repair keeps them:
    /// some of its sockets are newer than the programs.
    keeps_allowed: bool,
    journal: J,
    /// `None`: only the counts are wanted.
    report: Option<&'a mut Report<'a>>,
    tally: Tally,
    /// The cookies of sockets that were changed, and whether the socket listens.
    changed: HashMap<u64, bool>,
}

/// Returns `None` if this kernel refuses the iterator: descriptors are used instead.
fn unless_refused<T>(done: Result<T, ReconcileError>) -> Result<Option<T>, ReconcileError> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(ReconcileError::Iterator(error)) => {
            log::info!("{error}: setting each socket through a file descriptor of its process");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A TCP socket for the iterator to set.
struct Planned {
    live: SocketSnapshot,
    job: Job,
    /// The index of the setting, by assignment of the job.
    settings: Vec<u32>,
    /// Whether options remain that only a descriptor can decide.
    is_part: bool,
}

impl<'a, J: ChangeLog> Reconciler<'a, J> {
    pub fn new(desired: &'a Desired, dry_run: bool, journal: J, report: Option<&'a mut Report<'a>>) -> Self {
        Self {
            desired,
            dry_run,
            keeps_allowed: false,
            journal,
            report,
            tally: Tally::default(),
            changed: HashMap::new(),
        }
    }

    /// Keeps values that the application chose and that a rule allows.
    #[must_use]
    pub fn keeping_allowed(self, keeps_allowed: bool) -> Self {
        Self { keeps_allowed, ..self }
    }

    #[must_use]
    pub fn tally(&self) -> Tally {
        let listeners = self.changed.values().filter(|is_listener| **is_listener).count();
        Tally { changed: self.changed.len() as u64, listeners: listeners as u64, ..self.tally }
    }

    /// Reconciles all of these sockets. Calls `pause` between sockets with the number that were finished since the last call;
    /// an error of `pause` ends the reconciliation.
    ///
    /// # Errors
    ///
    /// Fails if `pause` fails, or if a change cannot be recorded or reported.
    pub fn run(
        &mut self,
        sockets: &mut Sockets,
        iter: &mut LazyIter,
        mut pause: impl FnMut(usize) -> Result<(), ReconcileError>,
    ) -> Result<(), ReconcileError> {
        self.run_iterator(sockets, iter, &mut pause)?;
        let desired = self.desired;
        sockets.each(
            |scope| drift::needed(&desired.scopes[scope]),
            |inspected| {
                pause(1)?;
                self.reconcile_inspected(inspected)
            },
        )
    }

    /// Returns whether the value that an application chose for the option of this setting is kept.
    fn is_kept_if_chosen(&self, setting: u32) -> bool {
        let setting = self.desired.settings.get(setting as usize);
        self.keeps_allowed && setting.is_some_and(|setting| setting.on_conflict == on_conflict::ALLOW)
    }

    fn is_kept(&self, finding: &Finding, live: &SocketSnapshot, fresh: &mut impl Baseline) -> bool {
        let Finding::Drift { setting, option, current, .. } = finding else { return false };
        self.is_kept_if_chosen(*setting) && live.is_chosen(option, current, fresh.values())
    }

    /// Counts an option that was set to `wanted`, and that getsockopt shows as `after`.
    fn count_set(&mut self, option: OptionKey, wanted: &Value, after: &Value) {
        if options::is_capped(option, wanted, after) {
            self.tally.capped += 1;
        } else {
            self.tally.set += 1;
        }
    }

    fn note_changed(&mut self, live: &SocketSnapshot) {
        self.changed.insert(live.entry.cookie, live.entry.state == State::Listening);
    }

    fn is_dry_run(&self, scope: usize) -> bool {
        self.dry_run || self.desired.scopes[scope].mode == Mode::DryRun
    }

    /// Sets what the iterator can set, and sets the sockets aside that are finished.
    fn run_iterator(
        &mut self,
        sockets: &mut Sockets,
        iter: &mut LazyIter,
        pause: &mut impl FnMut(usize) -> Result<(), ReconcileError>,
    ) -> Result<(), ReconcileError> {
        let planned = self.plan(sockets);
        if planned.is_empty() {
            return Ok(());
        }
        let Some(worker) = unless_refused(iter.get().map_err(ReconcileError::from))? else { return Ok(()) };
        let mut left = &planned[..];
        while !left.is_empty() {
            pause(0)?;
            let done = self.run_round(worker, left, sockets.namespaces());
            let Some((round, finished)) = unless_refused(done)? else { return Ok(()) };
            for planned in &finished {
                self.tally.sockets += 1;
                sockets.set_aside(planned.job.cookie);
            }
            left = &left[round..];
            pause(finished.len())?;
        }
        Ok(())
    }

    /// Returns the work for the iterator: sockets in the order of their network namespaces, if a namespace has enough of them. A
    /// dry run inspects sockets through descriptors, because only a set call shows what the kernel makes of a value.
    fn plan(&self, sockets: &mut Sockets) -> Vec<Planned> {
        let mut planned = Vec::new();
        let mut worth = vec![0_usize; sockets.namespaces().len()];
        for (scope, namespace, live) in sockets.listed_tcp() {
            if self.is_dry_run(scope) {
                continue;
            }
            let Assigned { assignments, settings, is_part } =
                drift::assign(self.desired, &self.desired.scopes[scope], &live);
            // Only a descriptor shows what the application chose. Without a descriptor, the application cannot have chosen.
            let may_be_kept = live.owner.is_some() && settings.iter().any(|setting| self.is_kept_if_chosen(*setting));
            // The iterator reads only what it sets, and not what another option resets.
            let is_assigned = |key: OptionKey| assignments.iter().any(|one| one.key == key);
            let has_effect = live.owner.is_some()
                && assignments.iter().any(|one| {
                    reset_by(one.key).is_some_and(|other| other.reading == Reading::Chosen && !is_assigned(other.key()))
                });
            if assignments.is_empty() || may_be_kept || has_effect {
                continue;
            }
            // No descriptor refers to a connection that is not accepted yet, and only BPF programs can read some options.
            let needs_program = live.owner.is_none() || assignments.iter().any(is_for_programs);
            worth[namespace] += if needs_program { WORTH_A_WALK } else { 1 };
            let job = Job { cookie: live.entry.cookie, namespace, assignments };
            planned.push(Planned { live, job, settings, is_part });
        }
        planned.retain(|planned| worth[planned.job.namespace] >= WORTH_A_WALK);
        planned.sort_by_key(|planned| planned.job.namespace);
        planned
    }

    /// Runs as many jobs as fit into one round, from the first. Returns their number, and those of them that need no descriptor.
    fn run_round<'p>(
        &mut self,
        worker: &mut IterWorker,
        planned: &'p [Planned],
        namespaces: &[Namespace],
    ) -> Result<(usize, Vec<&'p Planned>), ReconcileError> {
        let read = worker.read(planned.iter().map(|planned| &planned.job), namespaces)?;
        let mut is_finished: Vec<bool> = planned
            .iter()
            .zip(read.iter())
            .map(|(planned, outcomes)| !planned.is_part && outcomes.iter().all(Outcome::is_read))
            .collect();
        let to_set = to_set(planned, &read);
        if !to_set.is_empty() {
            self.journal.record(&mut to_set.iter().map(|one| (one.place(), Some(one.before), one.expected)))?;
            let set = worker.set(namespaces)?;
            let set: Vec<&[Outcome]> = set.iter().collect();
            let outcomes: Vec<&Outcome> = to_set.iter().map(|one| &set[one.socket][one.at]).collect();
            let after = to_set.iter().zip(&outcomes).map(|(one, outcome)| (one, one.after(outcome)));
            // The expected value is recorded already.
            let others = after.filter(|(one, after)| *after != one.expected);
            self.journal.record(&mut others.map(|(one, after)| (one.place(), None, after)))?;
            for (one, outcome) in to_set.iter().zip(outcomes) {
                is_finished[one.socket] &= self.conclude(one, outcome)?;
            }
        }
        let finished = planned.iter().zip(is_finished).filter(|(_, is_finished)| *is_finished);
        Ok((read.len(), finished.map(|(planned, _)| planned).collect()))
    }

    /// Counts and reports the outcome of one option. Returns whether the option is finished. A setsockopt call can succeed where
    /// the program failed (the kernel loads a congestion control for it), and so can a socket that the iterator did not visit.
    fn conclude(&mut self, one: &ToSet<'_>, outcome: &Outcome) -> Result<bool, ReconcileError> {
        let kind = match outcome.state {
            // The socket got the value after it was read.
            state::UNCHANGED => return Ok(true),
            state::SET if outcome.errno == 0 => {
                let after = one.after(outcome);
                // The kernel can round the value to the one that the socket had.
                if after == one.before {
                    return Ok(true);
                }
                self.count_set(one.option.key(), &one.wanted, &after);
                self.note_changed(&one.planned.live);
                Kind::Applied { before: one.before, after }
            }
            state::SET if one.planned.live.owner.is_none() => {
                self.tally.failed += 1;
                Kind::Outcome { errno: outcome.errno as i32 }
            }
            _ => return Ok(false),
        };
        self.report(&one.planned.live, &one.finding(), kind)?;
        Ok(true)
    }

    fn reconcile_inspected(&mut self, inspected: InspectedSocket<'_>) -> Result<(), ReconcileError> {
        let InspectedSocket { live, scope, fresh, socket } = inspected;
        let (Some(mut fresh), Some(mut socket)) = (fresh, socket) else {
            match live.values {
                OptionRead::Denied(_) => self.tally.denied += 1,
                OptionRead::NoFd | OptionRead::Values(_) => self.tally.no_fd += 1,
            }
            return Ok(());
        };
        self.reconcile_socket(live, scope, &mut fresh, &mut socket)
    }

    /// Reconciles a socket through a descriptor. `scope` is the index of its policies, `fresh` a new socket of the same kind.
    fn reconcile_socket(
        &mut self,
        mut live: SocketSnapshot,
        scope: usize,
        fresh: &mut impl Baseline,
        socket: &mut impl SocketHandle,
    ) -> Result<(), ReconcileError> {
        self.tally.sockets += 1;
        let is_dry_run = self.is_dry_run(scope);
        let scope = &self.desired.scopes[scope];
        let mut refused = HashSet::new();
        for round in 0..ROUNDS {
            let findings = drift::find(self.desired, scope, &live, fresh);
            for finding in findings.iter().filter(|_| round == 0) {
                if let Finding::Unknown { why, .. } = finding {
                    self.tally.unknown += 1;
                    self.report(&live, finding, Kind::Unknown { why })?;
                }
            }
            let is_to_set = |finding: &&Finding| {
                is_drift(finding) && !refused.contains(&option_of(finding)) && !self.is_kept(finding, &live, fresh)
            };
            let drifts: Vec<&Finding> = findings.iter().filter(is_to_set).collect();
            if drifts.is_empty() {
                break;
            }
            self.tally.would_change += u64::from(is_dry_run);
            for finding in drifts {
                if is_dry_run {
                    self.tally.would_set += 1;
                    self.report(&live, finding, Kind::WouldApply)?;
                } else if !self.set(&live, finding, socket)? {
                    refused.insert(option_of(finding));
                }
            }
            if is_dry_run {
                break;
            }
            let Some(values) = socket.values(&drift::needed(scope)) else {
                self.tally.denied += 1;
                break;
            };
            live.values = OptionRead::Values(values);
        }
        Ok(())
    }

    /// Sets an option. Returns whether the kernel accepted the value.
    fn set(
        &mut self,
        live: &SocketSnapshot,
        finding: &Finding,
        socket: &mut impl SocketHandle,
    ) -> Result<bool, ReconcileError> {
        let Finding::Drift { option, current, .. } = finding else { return Ok(false) };
        let wanted = value_to_set(finding);
        let place = place_of(live, option.key());
        self.record_one(place, Some(*current), wanted)?;
        // The kernel resets another option (IP_TOS: SO_PRIORITY), which is restored with this one.
        let other = reset_by(option.key()).map(|other| (place_of(live, other.key()), socket.value(other.key())));
        if let Some((other, Some(before))) = other {
            self.record_one(other, Some(before), before)?;
        }
        match socket.set(option.key(), &wanted) {
            Ok(after) => {
                let after = after.unwrap_or(wanted);
                if let Some((other, Some(_))) = other
                    && let Some(reset) = socket.value(other.option)
                {
                    self.record_one(other, None, reset)?;
                }
                // Counted first: the socket is changed even if that cannot be recorded.
                self.count_set(option.key(), &wanted, &after);
                self.note_changed(live);
                self.record_one(place, None, after)?;
                self.report(live, finding, Kind::Applied { before: *current, after })?;
                Ok(true)
            }
            Err(error) => {
                self.record_one(place, None, *current)?;
                self.tally.failed += 1;
                self.report(live, finding, Kind::Outcome { errno: error.raw_os_error().unwrap_or_default() })?;
                Ok(false)
            }
        }
    }

    fn record_one(&mut self, place: Place, before: Option<Value>, after: Value) -> Result<(), ReconcileError> {
        Ok(self.journal.record(&mut std::iter::once((place, before, after)))?)
    }

    fn report(&mut self, live: &SocketSnapshot, finding: &Finding, kind: Kind) -> Result<(), ReconcileError> {
        let Some(report) = &mut self.report else { return Ok(()) };
        let event = Event { kind, wanted: value_to_set(finding), ..drift::event(self.desired, live, finding) };
        Ok(report(&event)?)
    }
}

/// An option that the iterator sets in a round.
struct ToSet<'a> {
    planned: &'a Planned,
    option: &'static SocketOption,
    /// The index of the socket in the round.
    socket: usize,
    /// The index of the assignment in the socket's job.
    at: usize,
    before: Value,
    wanted: Value,
    /// What getsockopt is expected to return afterwards.
    expected: Value,
}

/// Returns the options that do not have the value that they are to have.
fn to_set<'a>(planned: &'a [Planned], read: &Outcomes) -> Vec<ToSet<'a>> {
    let mut found = Vec::new();
    for (socket, (planned, outcomes)) in planned.iter().zip(read.iter()).enumerate() {
        for (at, (assignment, outcome)) in planned.job.assignments.iter().zip(outcomes).enumerate() {
            let given = assignment.given(&outcome.before);
            let shown = assignment.shown(&given);
            if outcome.is_read()
                && shown != outcome.before
                && let Some(option) = options::by_key(assignment.key)
            {
                let [before, wanted, expected] = [outcome.before, given, shown].map(|words| assignment.shows(words));
                found.push(ToSet { planned, option, socket, at, before, wanted, expected });
            }
        }
    }
    found
}

impl ToSet<'_> {
    fn place(&self) -> Place {
        place_of(&self.planned.live, self.option.key())
    }

    /// Returns what getsockopt returns after the round.
    fn after(&self, outcome: &Outcome) -> Value {
        let assignment = &self.planned.job.assignments[self.at];
        if outcome.state == state::SET && outcome.errno == 0 { assignment.shows(outcome.after) } else { self.before }
    }

    /// Returns what an inspection through a descriptor would have found.
    fn finding(&self) -> Finding {
        let Self { planned, option, at, before, wanted, socket: _, expected: _ } = self;
        Finding::Drift { setting: planned.settings[*at], option, wanted: *wanted, limit: None, current: *before }
    }
}

fn is_for_programs(assignment: &Assignment) -> bool {
    options::by_key(assignment.key).is_some_and(SocketOption::is_for_programs)
}

/// Returns the option that the kernel resets when this one is set, if there is one.
fn reset_by(option: OptionKey) -> Option<&'static SocketOption> {
    let Relation::Resets(other) = options::by_key(option)?.relation?;
    options::by_name(other)
}

fn place_of(live: &SocketSnapshot, option: OptionKey) -> Place {
    Place { cookie: live.entry.cookie, option }
}

fn is_drift(finding: &Finding) -> bool {
    matches!(finding, Finding::Drift { .. })
}

fn option_of(finding: &Finding) -> OptionKey {
    match finding {
        Finding::Drift { option, .. } | Finding::Unknown { option, .. } => option.key(),
    }
}

/// Returns the value to set. For a limit that is the bound that the current value exceeds.
fn value_to_set(finding: &Finding) -> Value {
    let Finding::Drift { option, wanted, limit, current, .. } = finding else { return Value::UNKNOWN };
    let Some(limit) = limit else { return *wanted };
    let shown = i64::from(word_in(&settable_value(option, current).words));
    Value::number(option.value.abi_kind(), shown.clamp(limit.min, limit.max))
}

#[cfg(test)]
mod tests;
