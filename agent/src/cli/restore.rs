//! What live sockets had before policies were applied to them, put back: for `apply --restore` and `detach --restore`.
//!
//! Through a descriptor of the socket's process; where none leads to it, or only programs can read and set the option, by the
//! program that the kernel runs for each TCP socket.
//!
//! Invariant: what shows another value than it was left with is somebody's choice since, and stays.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    io::{self, Write},
};

use abi::{
    live::{Assignment, Outcome, state},
    setting::{OptionKey, Value, read_back, word_in},
};

use super::{
    apply::ApplyError,
    descriptor::stdout,
    ignore_broken_pipe,
    lazy_iter::{IterWorker, LazyIter},
    output::Format,
    run::{RunError, warn_of_failed},
};
use crate::{
    escape::Escape,
    host::{
        inspect::{Inspector, Remote},
        socket_table::SocketTable,
    },
    instance,
    journal::{self, Change, Contents, Journal, Place},
    kernel::{Job, KernelError},
    options::{self, SocketOption},
};

/// What came of it.
#[derive(Default)]
struct Restored {
    put_back: usize,
    /// Options that somebody has changed since.
    others: Vec<(Place, Change)>,
    /// What is left to be put back.
    failed: BTreeMap<Place, Change>,
}

/// What the program is to put back on a socket.
struct PendingRestore {
    job: Job,
    /// By assignment of the job.
    changes: Vec<(Place, Change)>,
}

/// Puts back what sockets had before policies were applied to them, where nobody has changed it since. Gives whether all of it
/// could be; what could not is left to be put back.
pub(super) fn put_back(instance: &str) -> Result<bool, ApplyError> {
    instance::check_name(instance).map_err(RunError::from)?;
    let mut journal = Journal::of(instance);
    let Contents { changes, damaged } = journal.contents()?;
    let mut by_socket = by_socket(changes);
    let mut walker = LazyIter::begin();
    let inspector = RefCell::new(Inspector::default());
    let survey = SocketTable::read(|_| true, || walker.holders(), &mut inspector.borrow_mut())?;
    let mut restored = Restored::default();
    let mut left = Vec::new();
    for found in &survey.sockets {
        let Some(changes) = by_socket.remove(&found.entry.cookie) else { continue };
        let inspected = found.inspect_by(&mut inspector.borrow_mut(), &[], |holder| holder);
        let changes = match inspected {
            Ok(Some((_, holder, _))) => {
                let cookie = found.entry.cookie;
                restored.by_descriptor(&mut Remote { inspector: &inspector, holder, cookie }, changes)
            }
            Ok(None) => changes,
            Err(_) => {
                restored.failed.extend(changes);
                continue;
            }
        };
        // What is no TCP socket and nobody's any more is closed.
        if !changes.is_empty() && found.entry.protocol == libc::IPPROTO_TCP {
            left.push(PendingRestore::new(found.entry.cookie, found.namespace, changes));
        }
    }
    warn_of_failed(inspector.borrow().skipped());
    restored.by_program(left, &survey, &mut walker)?;
    // What was not found is closed, if all could be looked for.
    let unseen: Vec<_> = by_socket.into_values().flatten().filter(|_| survey.has_unlisted).collect();
    let kept = restored.kept(&unseen, damaged);
    journal.keep(&kept)?;
    let mut out = stdout(Format::Text);
    ignore_broken_pipe(restored.write(&mut out, unseen.len()).and_then(|()| out.flush()))?;
    restored.warn(instance, damaged);
    Ok(restored.failed.is_empty() && unseen.is_empty() && damaged == 0)
}

/// The changes of each socket, by its cookie, without those that the kernel refused.
fn by_socket(changes: BTreeMap<Place, Change>) -> HashMap<u64, Vec<(Place, Change)>> {
    let mut by_socket: HashMap<u64, Vec<(Place, Change)>> = HashMap::new();
    for (place, change) in changes.into_iter().filter(|(_, change)| change.after != change.before) {
        by_socket.entry(place.cookie).or_default().push((place, change));
    }
    by_socket
}

impl Restored {
    /// What is left to be put back. Where lines are damaged, what shows another value than the journal says may only seem to
    /// be somebody's choice.
    fn kept(&self, unseen: &[(Place, Change)], damaged: usize) -> Contents {
        let others = self.others.iter().filter(|_| damaged > 0);
        let changes = others.chain(unseen).copied().chain(self.failed.iter().map(|(place, change)| (*place, *change)));
        Contents { changes: changes.collect(), damaged }
    }

    fn write(&self, mut out: impl Write, unseen: usize) -> io::Result<()> {
        let Self { put_back, others, failed } = self;
        let (others, failed) = (others.len(), failed.len());
        writeln!(out, "put back: {put_back} options; changed by others since: {others}; refused: {failed}")?;
        if unseen > 0 {
            writeln!(
                out,
                "kept: {unseen} of sockets that may be in network namespaces that this process must not enter"
            )?;
        }
        Ok(())
    }

    fn warn(&self, instance: &str, damaged: usize) {
        if !self.failed.is_empty() {
            log::warn!(
                "policies that are in force set their values again: end them first, as `sockpolicy detach --restore` does"
            );
        }
        if damaged > 0 {
            let path = journal::path_of(instance);
            log::warn!(
                "damaged lines of {}: {damaged}. The values in these lines cannot be restored, and where one option changed \
                 several times, its restored value may be a later one.\n  help: the lines are kept; if you do not need them: rm {}",
                path.escaped(),
                path.escaped()
            );
        }
    }

    /// Gives what cannot be read so. One option may reset another (IP_TOS, SO_PRIORITY): so all are looked at first, and what
    /// counts is what they show in the end.
    fn by_descriptor(&mut self, socket: &mut Remote<'_>, changes: Vec<(Place, Change)>) -> Vec<(Place, Change)> {
        let (mut unchanged, mut rest) = (Vec::new(), Vec::new());
        for (place, change) in changes {
            match (options::by_key(place.option), socket.value(place.option)) {
                (Some(option), Some(now)) if now == change.after || now == change.before => {
                    unchanged.push((option, place, change));
                }
                (_, Some(_)) => self.others.push((place, change)),
                (_, None) => rest.push((place, change)),
            }
        }
        for (option, place, change) in unchanged.iter().chain(&unchanged) {
            if socket.value(place.option) != Some(change.before) {
                // Whether it was taken shows below.
                let _ = socket.set(unbounded(option), &as_given(option, &change.before));
            }
        }
        for (_, place, change) in unchanged {
            if socket.value(place.option) == Some(change.before) {
                self.put_back += 1;
            } else {
                self.failed.insert(place, change);
            }
        }
        rest
    }

    fn by_program(
        &mut self,
        left: Vec<PendingRestore>,
        survey: &SocketTable,
        walker: &mut LazyIter,
    ) -> Result<(), ApplyError> {
        if left.is_empty() {
            return Ok(());
        }
        let Some(walk) = self.unless_refused(walker.get(), &left)? else { return Ok(()) };
        let looked = all_rounds(walk, &left, survey, false);
        let Some(looked) = self.unless_refused(looked, &left)? else { return Ok(()) };
        let unchanged = left.into_iter().zip(looked).filter_map(|(left, outcomes)| self.unchanged(left, &outcomes));
        let unchanged: Vec<PendingRestore> = unchanged.collect();
        let set = all_rounds(walk, &unchanged, survey, true);
        let Some(set) = self.unless_refused(set, &unchanged)? else { return Ok(()) };
        for (left, outcomes) in unchanged.into_iter().zip(set) {
            for ((place, change), outcome) in left.changes.into_iter().zip(outcomes) {
                match outcome.state {
                    // The socket is closed.
                    state::NONE => {}
                    state::UNCHANGED => self.put_back += 1,
                    state::SET if outcome.errno == 0 && outcome.after == change.before.words => self.put_back += 1,
                    _ => drop(self.failed.insert(place, change)),
                }
            }
        }
        Ok(())
    }

    /// Where the kernel does not run the program, all of these are left to be put back.
    fn unless_refused<T>(
        &mut self,
        done: Result<T, KernelError>,
        left: &[PendingRestore],
    ) -> Result<Option<T>, ApplyError> {
        match done {
            Ok(done) => Ok(Some(done)),
            Err(error @ KernelError::Iterator { .. }) => {
                log::warn!("{error}: what no descriptor leads to is left as it is");
                self.failed.extend(left.iter().flat_map(|left| left.changes.iter().copied()));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What of a socket shows what it was left with.
    fn unchanged(&mut self, left: PendingRestore, outcomes: &[Outcome]) -> Option<PendingRestore> {
        let PendingRestore { job, changes } = left;
        let mut kept = PendingRestore { job: Job { assignments: Vec::new(), ..job }, changes: Vec::new() };
        for ((change, assignment), outcome) in changes.into_iter().zip(job.assignments).zip(outcomes) {
            if outcome.state == state::NONE {
                // The socket is closed.
            } else if outcome.errno != 0 {
                self.failed.insert(change.0, change.1);
            } else if outcome.before == change.1.after.words {
                kept.job.assignments.push(assignment);
                kept.changes.push(change);
            } else {
                self.others.push(change);
            }
        }
        (!kept.changes.is_empty()).then_some(kept)
    }
}

/// Looks at these, and sets them if that is wanted; as many at a time as there is room for.
fn all_rounds(
    walk: &mut IterWorker,
    left: &[PendingRestore],
    survey: &SocketTable,
    sets: bool,
) -> Result<Vec<Vec<Outcome>>, KernelError> {
    let mut all = Vec::new();
    while all.len() < left.len() {
        let looked = walk.look(left[all.len()..].iter().map(|left| &left.job), survey.namespaces())?;
        let outcomes = if sets { walk.set(survey.namespaces())? } else { looked };
        all.extend(outcomes.iter().map(<[Outcome]>::to_vec));
    }
    Ok(all)
}

impl PendingRestore {
    fn new(cookie: u64, namespace: usize, changes: Vec<(Place, Change)>) -> Self {
        let assignments = changes.iter().map(|(place, change)| {
            let option = options::by_key(place.option);
            let given = option.map_or(change.before, |option| as_given(option, &change.before));
            let is_text = given.len > size_of::<u32>() as u32;
            Assignment {
                key: place.option,
                value: given.words,
                mask: [u64::MAX; 2],
                is_text: is_text.into(),
                is_doubled: option.is_some_and(is_doubled).into(),
            }
        });
        Self { job: Job { cookie, namespace, assignments: assignments.collect() }, changes }
    }
}

fn is_doubled(option: &SocketOption) -> bool {
    option.settable().is_some_and(|settable| settable.read_back == read_back::DOUBLED)
}

/// What to set for an option to show a value: the kernel doubles buffers.
pub(super) fn as_given(option: &SocketOption, shown: &Value) -> Value {
    if is_doubled(option) { Value::int(word_in(&shown.words) / 2) } else { *shown }
}

/// By which option one is put back: the kernel tunes buffers beyond what SO_SNDBUF may set, and SO_SNDBUFFORCE may set all.
fn unbounded(option: &'static SocketOption) -> OptionKey {
    let is_it = |other: &&SocketOption| other.name.strip_suffix("FORCE") == Some(option.name);
    options::OPTIONS.iter().find(is_it).unwrap_or(option).key()
}
