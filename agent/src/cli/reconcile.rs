//! Live sockets brought in line with policies, for `apply` and for `run`.
//!
//! TCP sockets that listen or are connected are set by a program that the kernel runs for each of them, as far as that needs no
//! look into the socket; all else, and what that program cannot do, through a descriptor of the socket's process.
//!
//! Invariants: what a socket has is in the journal before it is changed; each option of each socket is told of once.

use std::{collections::HashSet, io};

use abi::{
    live::{Assignment, Outcome, state},
    setting::{OptionKey, Value, word_in},
};
use serde_json::json;

use super::{
    apply::ApplyError,
    ignore_broken_pipe,
    lazy_iter::{IterWorker, LazyIter},
    restore::as_given,
    sockets::{InspectedSocket, Sockets},
    verify,
};
use crate::{
    compile::Desired,
    events::{Event, Kind},
    host::{inspect::Remote, netns::Namespace},
    journal::{Journal, Place},
    kernel::{Job, Outcomes},
    live::{
        OptionRead, SocketSnapshot,
        drift::{self, Assigned, Finding},
    },
    options::{self, SocketOption},
    policy::model::Mode,
};

/// What came of it, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    /// Sockets that were held against the policies.
    pub(super) sockets: u64,
    /// Those of them that were changed.
    pub(super) changed: u64,
    /// Values that were set or, in a dry run, would have been; and those that the kernel refused.
    pub(super) set: u64,
    pub(super) would_set: u64,
    pub(super) failed: u64,
    /// Options of sockets of which it cannot be told whether they agree.
    pub(super) unknown: u64,
    /// Sockets to which no descriptor leads, and that the program could not do all of.
    pub(super) no_fd: u64,
    /// Sockets that must not be looked into.
    pub(super) denied: u64,
    /// Sockets that do not answer.
    pub(super) unanswered: u64,
}

impl Tally {
    /// For people, with a line for whatever did not go well.
    pub(super) fn to_text(self) -> String {
        let Self { sockets, changed, set, would_set, failed, unknown, no_fd, denied, unanswered } = self;
        let mut text = format!("sockets: {sockets}, changed: {changed}, in {set} options\n");
        for (count, what) in [
            (would_set, "values would be set"),
            (failed, "values were refused by the kernel"),
            (unknown, "options cannot be told to agree or not"),
            (no_fd, "sockets were not looked into: no descriptor leads to them"),
            (denied, "sockets could not be looked into"),
            (unanswered, "sockets do not answer"),
        ] {
            if count > 0 {
                text.push_str(&format!("{count} {what}\n"));
            }
        }
        text
    }

    pub(super) fn to_json(self) -> serde_json::Value {
        let Self { sockets, changed, set, would_set, failed, unknown, no_fd, denied, unanswered } = self;
        json!({
            "checked": sockets, "changed": changed, "set": set, "would_set": would_set, "failed": failed,
            "unknown": unknown, "no_fd": no_fd, "denied": denied, "unanswered": unanswered,
        })
    }
}

/// Setting one option may give another a value (IP_TOS, SO_PRIORITY): then there is something left to do.
const ROUNDS: usize = 2;

/// A walk goes by all places at which TCP sockets can be, those of other network namespaces too: for fewer sockets than this it
/// is quicker to look into each.
const WORTH_A_WALK: usize = 256;

/// To whom each change is told.
pub(super) type Tell<'a> = dyn FnMut(&Event) -> io::Result<()> + 'a;

pub(super) struct Reconciler<'a> {
    desired: &'a Desired,
    dry_run: bool,
    journal: Journal,
    /// Nobody, if only the numbers are wanted.
    tell: Option<&'a mut Tell<'a>>,
    tally: Tally,
    /// The cookies of sockets that were changed.
    changed: HashSet<u64>,
}

/// `None` where this kernel does not run the program: then it takes descriptors.
fn unless_refused<T>(done: Result<T, ApplyError>) -> Result<Option<T>, ApplyError> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(ApplyError::Iterator(error)) => {
            log::info!("{error}: each socket is set through a descriptor of its process");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What a TCP socket is to be given by the program.
struct Planned {
    live: SocketSnapshot,
    job: Job,
    /// By assignment of the job: the setting that says so.
    settings: Vec<u32>,
    /// Whether there is more to find on it.
    is_part: bool,
}

impl<'a> Reconciler<'a> {
    pub(super) fn new(desired: &'a Desired, dry_run: bool, journal: Journal, tell: Option<&'a mut Tell<'a>>) -> Self {
        Self { desired, dry_run, journal, tell, tally: Tally::default(), changed: HashSet::new() }
    }

    pub(super) fn tally(&self) -> Tally {
        Tally { changed: self.changed.len() as u64, ..self.tally }
    }

    /// Brings all of these in line. `pause` is called between sockets with how many have been done since, and may end it.
    pub(super) fn run(
        &mut self,
        sockets: &mut Sockets,
        walker: &mut LazyIter,
        mut pause: impl FnMut(usize) -> Result<(), ApplyError>,
    ) -> Result<(), ApplyError> {
        self.walk(sockets, walker, &mut pause)?;
        let desired = self.desired;
        sockets.each(
            |scope| drift::needed(&desired.scopes[scope]),
            |seen| {
                pause(1)?;
                self.look_into(seen)
            },
        )
    }

    fn only_says(&self, scope: usize) -> bool {
        self.dry_run || self.desired.scopes[scope].mode == Mode::DryRun
    }

    /// Has the kernel's iterator do what it can, and sets those sockets aside that are done.
    fn walk(
        &mut self,
        sockets: &mut Sockets,
        walker: &mut LazyIter,
        pause: &mut impl FnMut(usize) -> Result<(), ApplyError>,
    ) -> Result<(), ApplyError> {
        let planned = self.plan(sockets);
        if planned.is_empty() {
            return Ok(());
        }
        let Some(walk) = unless_refused(walker.get().map_err(ApplyError::from))? else { return Ok(()) };
        let mut left = &planned[..];
        while !left.is_empty() {
            pause(0)?;
            let done = self.do_round(walk, left, sockets.namespaces());
            let Some((round, in_line)) = unless_refused(done)? else { return Ok(()) };
            for planned in &in_line {
                self.tally.sockets += 1;
                sockets.set_aside(planned.job.cookie);
            }
            left = &left[round..];
            pause(in_line.len())?;
        }
        Ok(())
    }

    /// What there is for the iterator to do: sockets in the order of their namespaces, in which there are enough of them. What the
    /// kernel would make of a value it only tells when it is set: so what is only to be said is found by looking into sockets.
    fn plan(&self, sockets: &mut Sockets) -> Vec<Planned> {
        let mut planned = Vec::new();
        let mut worth = vec![0_usize; sockets.namespaces().len()];
        for (scope, namespace, live) in sockets.listed_tcp() {
            if self.only_says(scope) {
                continue;
            }
            let Assigned { assignments, settings, is_part } =
                drift::assign(self.desired, &self.desired.scopes[scope], &live);
            if assignments.is_empty() {
                continue;
            }
            // To what nobody has yet, a connection that is not accepted, no descriptor leads; and what only programs know none
            // can read.
            let needs_program = live.owner.is_none() || assignments.iter().any(is_for_programs);
            worth[namespace] += if needs_program { WORTH_A_WALK } else { 1 };
            let job = Job { cookie: live.entry.cookie, namespace, assignments };
            planned.push(Planned { live, job, settings, is_part });
        }
        planned.retain(|planned| worth[planned.job.namespace] >= WORTH_A_WALK);
        planned.sort_by_key(|planned| planned.job.namespace);
        planned
    }

    /// Does as many as can be done at a time, the first ones. Gives how many these were, and those of them that need no look any
    /// more.
    fn do_round<'p>(
        &mut self,
        walk: &mut IterWorker,
        planned: &'p [Planned],
        namespaces: &[Namespace],
    ) -> Result<(usize, Vec<&'p Planned>), ApplyError> {
        let looked = walk.look(planned.iter().map(|planned| &planned.job), namespaces)?;
        let mut is_done: Vec<bool> = planned
            .iter()
            .zip(looked.iter())
            .map(|(planned, outcomes)| !planned.is_part && outcomes.iter().all(Outcome::is_read))
            .collect();
        let to_set = to_set(planned, &looked);
        if !to_set.is_empty() {
            self.journal.note_all(to_set.iter().map(|one| (one.place(), Some(one.before), one.shown)))?;
            let set = walk.set(namespaces)?;
            let set: Vec<&[Outcome]> = set.iter().collect();
            let outcomes: Vec<&Outcome> = to_set.iter().map(|one| &set[one.socket][one.at]).collect();
            let after = to_set.iter().zip(&outcomes).map(|(one, outcome)| (one, one.after(outcome)));
            // What was wanted is noted already.
            let others = after.filter(|(one, after)| *after != one.shown);
            self.journal.note_all(others.map(|(one, after)| (one.place(), None, after)))?;
            for (one, outcome) in to_set.iter().zip(outcomes) {
                is_done[one.socket] &= self.conclude(one, outcome)?;
            }
        }
        let in_line = planned.iter().zip(is_done).filter(|(_, is_done)| *is_done).map(|(planned, _)| planned);
        Ok((looked.len(), in_line.collect()))
    }

    /// Counts and tells what came of one option. Gives whether that is all: what was refused a program a call may get (a congestion
    /// control is loaded for it), and a socket that has not come by again is looked for by its descriptor.
    fn conclude(&mut self, one: &ToSet<'_>, outcome: &Outcome) -> Result<bool, ApplyError> {
        let kind = match outcome.state {
            // It has got the value meanwhile.
            state::UNCHANGED => return Ok(true),
            state::SET if outcome.errno == 0 => {
                let after = one.after(outcome);
                // Or the kernel makes of the value what was there.
                if after == one.before {
                    return Ok(true);
                }
                self.tally.set += 1;
                self.changed.insert(one.planned.job.cookie);
                Kind::Applied { before: one.before, after }
            }
            state::SET if one.planned.live.owner.is_none() => {
                self.tally.failed += 1;
                Kind::Outcome { errno: outcome.errno as i32 }
            }
            _ => return Ok(false),
        };
        self.say(&one.planned.live, &one.finding(), kind)?;
        Ok(true)
    }

    /// Brings a socket in line through a descriptor.
    fn look_into(&mut self, seen: InspectedSocket<'_>) -> Result<(), ApplyError> {
        let InspectedSocket { mut live, scope, fresh, socket } = seen;
        let (Some(mut fresh), Some(mut socket)) = (fresh, socket) else {
            match live.values {
                OptionRead::Denied(_) => self.tally.denied += 1,
                OptionRead::NoFd | OptionRead::Values(_) => self.tally.no_fd += 1,
            }
            return Ok(());
        };
        self.tally.sockets += 1;
        let only_says = self.only_says(scope);
        let scope = &self.desired.scopes[scope];
        let mut refused = HashSet::new();
        for round in 0..ROUNDS {
            let findings = drift::find(self.desired, scope, &live, &mut fresh);
            for finding in findings.iter().filter(|_| round == 0) {
                if let Finding::Unknown { why, .. } = finding {
                    self.tally.unknown += 1;
                    self.say(&live, finding, Kind::Unknown { why })?;
                }
            }
            let drifts: Vec<&Finding> = findings
                .iter()
                .filter(|finding| is_to_be_set(finding) && !refused.contains(&option_of(finding)))
                .collect();
            if drifts.is_empty() {
                break;
            }
            for finding in drifts {
                if only_says {
                    self.tally.would_set += 1;
                    self.say(&live, finding, Kind::WouldApply)?;
                } else if !self.set(&live, finding, &mut socket)? {
                    refused.insert(option_of(finding));
                }
            }
            if only_says {
                break;
            }
            let Ok(values) = socket.values(&drift::needed(scope)) else {
                self.tally.denied += 1;
                break;
            };
            live.values = OptionRead::Values(values);
        }
        Ok(())
    }

    /// Gives whether the kernel took it.
    fn set(&mut self, live: &SocketSnapshot, finding: &Finding, socket: &mut Remote<'_>) -> Result<bool, ApplyError> {
        let Finding::Drift { option, current: now, .. } = finding else { return Ok(false) };
        let wanted = value_to_set(finding);
        let place = place_of(live, option.key());
        self.journal.note(place, now, &wanted)?;
        match socket.set(option.key(), &wanted) {
            Ok(after) => {
                let after = after.unwrap_or(wanted);
                // It is changed even if that cannot be recorded.
                self.tally.set += 1;
                self.changed.insert(place.cookie);
                self.journal.note_after(place, &after)?;
                self.say(live, finding, Kind::Applied { before: *now, after })?;
                Ok(true)
            }
            Err(error) => {
                self.journal.note_after(place, now)?;
                self.tally.failed += 1;
                self.say(live, finding, Kind::Outcome { errno: error.raw_os_error().unwrap_or_default() })?;
                Ok(false)
            }
        }
    }

    fn say(&mut self, live: &SocketSnapshot, finding: &Finding, kind: Kind) -> Result<(), ApplyError> {
        let Some(tell) = &mut self.tell else { return Ok(()) };
        let event = Event { kind, wanted: value_to_set(finding), ..verify::event(self.desired, live, finding) };
        Ok(ignore_broken_pipe(tell(&event))?)
    }
}

/// An option of a socket that is to be set in a round.
struct ToSet<'a> {
    planned: &'a Planned,
    option: &'static SocketOption,
    /// The number of the socket in the round, and that of the option in its job.
    socket: usize,
    at: usize,
    before: Value,
    wanted: Value,
    /// What it is to show then.
    shown: Value,
}

/// What there is to set, by what has been read: options that do not show what they are to.
fn to_set<'a>(planned: &'a [Planned], looked: &Outcomes) -> Vec<ToSet<'a>> {
    let mut found = Vec::new();
    for (socket, (planned, outcomes)) in planned.iter().zip(looked.iter()).enumerate() {
        for (at, (assignment, outcome)) in planned.job.assignments.iter().zip(outcomes).enumerate() {
            let given = assignment.given(&outcome.before);
            let shown = assignment.shown(&given);
            if outcome.is_read()
                && shown != outcome.before
                && let Some(option) = options::by_key(assignment.key)
            {
                let [before, wanted, shown] = [outcome.before, given, shown].map(|words| assignment.shows(words));
                found.push(ToSet { planned, option, socket, at, before, wanted, shown });
            }
        }
    }
    found
}

impl ToSet<'_> {
    fn place(&self) -> Place {
        place_of(&self.planned.live, self.option.key())
    }

    /// What it shows since.
    fn after(&self, outcome: &Outcome) -> Value {
        let assignment = &self.planned.job.assignments[self.at];
        if outcome.state == state::SET && outcome.errno == 0 { assignment.shows(outcome.after) } else { self.before }
    }

    /// The same as what a look into the socket would have found.
    fn finding(&self) -> Finding {
        let Self { planned, option, at, before, wanted, socket: _, shown: _ } = self;
        Finding::Drift { setting: planned.settings[*at], option, wanted: *wanted, limit: None, current: *before }
    }
}

fn is_for_programs(assignment: &Assignment) -> bool {
    options::by_key(assignment.key).is_some_and(SocketOption::is_for_programs)
}

fn place_of(live: &SocketSnapshot, option: OptionKey) -> Place {
    Place { cookie: live.entry.cookie, option }
}

fn is_to_be_set(finding: &Finding) -> bool {
    matches!(finding, Finding::Drift { .. })
}

fn option_of(finding: &Finding) -> OptionKey {
    match finding {
        Finding::Drift { option, .. } | Finding::Unknown { option, .. } => option.key(),
    }
}

/// What a socket is to be given; of a limit, the bound that it is beyond.
fn value_to_set(finding: &Finding) -> Value {
    let Finding::Drift { option, wanted, limit, current: now, .. } = finding else { return Value::UNKNOWN };
    let Some(limit) = limit else { return *wanted };
    let shown = i64::from(word_in(&as_given(option, now).words));
    Value::number(option.value.abi_kind(), shown.clamp(limit.min, limit.max))
}
