//! Restores the values that sockets had before policies were applied to them, for `apply --restore` and `detach --restore`.
//!
//! Values are set through a descriptor of the socket's process. The BPF iterator sets what no descriptor reaches, and options that
//! only BPF programs can read and set.
//!
//! Invariant: an option that no longer has the value that was applied was changed by another process, and is not restored.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
};

use abi::{
    live::{Assignment, Outcome, state},
    setting::{OptionKey, Value},
};

use super::{
    ReconcileError, SocketHandle,
    iter_worker::{IterWorker, LazyIter},
};
use crate::{
    host::{inspect::Remote, socket_table::SocketTable},
    journal::{Change, Contents, Journal, Place},
    kernel::{self, Job, KernelError},
    options::{self, SocketOption},
    skipped::Skip,
};

/// The counts of a restoration.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// Options that have their old value again.
    pub restored: usize,
    /// Options that another process changed since.
    pub changed_by_others: usize,
    /// Options that the kernel refused to set, or whose socket could not be inspected.
    pub failed: usize,
    /// Options of sockets that may be in network namespaces that this process must not enter.
    pub unseen: usize,
    /// Lines of the journal that cannot be read.
    pub damaged: usize,
    /// Sockets that did not answer in time.
    pub skipped: Vec<Skip>,
}

impl Restored {
    /// Returns whether nothing remains to be restored.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.failed == 0 && self.unseen == 0 && self.damaged == 0
    }
}

/// Restores the values in the journal of an instance, of options that no other process changed since. What could not be restored stays in
/// the journal.
///
/// # Errors
///
/// Fails if the journal cannot be read or written, or if the sockets of this host cannot be listed.
pub fn restore(instance: &str) -> Result<Restored, ReconcileError> {
    let mut journal = Journal::of(instance);
    let Contents { changes, damaged } = journal.contents()?;
    let mut by_socket = by_socket(changes);
    let mut iter = LazyIter::begin();
    let inspector = RefCell::new(kernel::governed_inspector());
    let table = SocketTable::read(|_| true, || iter.fd_refs(), &mut inspector.borrow_mut())?;
    let mut work = Work::default();
    let mut left = Vec::new();
    for found in &table.sockets {
        let Some(changes) = by_socket.remove(&found.entry.cookie) else { continue };
        let inspected = found.inspect_by(&mut inspector.borrow_mut(), &[], |holder| holder);
        let changes = match inspected {
            Ok(Some((_, holder, _))) => {
                let cookie = found.entry.cookie;
                work.by_descriptor(&mut Remote { inspector: &inspector, holder, cookie }, changes)
            }
            Ok(None) => changes,
            Err(_) => {
                work.failed.extend(changes);
                continue;
            }
        };
        // A socket of another protocol without a descriptor is closed.
        if !changes.is_empty() && found.entry.protocol == libc::IPPROTO_TCP {
            left.push(PendingRestore::new(found.entry.cookie, found.namespace, changes));
        }
    }
    work.by_iterator(left, &table, &mut iter)?;
    // A socket that was not found is closed, if all sockets could be listed.
    let unseen: Vec<_> = by_socket.into_values().flatten().filter(|_| table.has_unlisted).collect();
    journal.keep(&work.remaining(&unseen, damaged))?;
    let skipped = inspector.borrow().skipped().to_vec();
    let Work { restored, others, failed } = work;
    let (changed_by_others, failed, unseen) = (others.len(), failed.len(), unseen.len());
    Ok(Restored { restored, changed_by_others, failed, unseen, damaged, skipped })
}

/// Returns the changes of each socket by its cookie, without those that the kernel refused.
fn by_socket(changes: BTreeMap<Place, Change>) -> HashMap<u64, Vec<(Place, Change)>> {
    let mut by_socket: HashMap<u64, Vec<(Place, Change)>> = HashMap::new();
    for (place, change) in changes.into_iter().filter(|(_, change)| change.after != change.before) {
        by_socket.entry(place.cookie).or_default().push((place, change));
    }
    by_socket
}

#[derive(Default)]
struct Work {
    restored: usize,
    /// Options that another process changed since.
    others: Vec<(Place, Change)>,
    failed: BTreeMap<Place, Change>,
}

/// Options of a socket that the iterator restores.
struct PendingRestore {
    job: Job,
    /// By assignment of the job.
    changes: Vec<(Place, Change)>,
}

impl Work {
    /// Returns what stays in the journal. If lines of the journal are damaged, a value that differs from the journal may not be
    /// the choice of another process, and its change stays too.
    fn remaining(&self, unseen: &[(Place, Change)], damaged: usize) -> Contents {
        let others = self.others.iter().filter(|_| damaged > 0);
        let changes = others.chain(unseen).copied().chain(self.failed.iter().map(|(place, change)| (*place, *change)));
        Contents { changes: changes.collect(), damaged }
    }

    /// Restores options through a descriptor. Returns the changes of options that cannot be read in this way. One option can
    /// change another (IP_TOS, SO_PRIORITY): all are set twice, and the values at the end count.
    fn by_descriptor(&mut self, socket: &mut impl SocketHandle, changes: Vec<(Place, Change)>) -> Vec<(Place, Change)> {
        let (mut unchanged, mut rest) = (Vec::new(), Vec::new());
        for (place, change) in changes {
            match (options::by_key(place.option), socket.value(place.option)) {
                (Some(option), Some(current)) if current == change.after || current == change.before => {
                    unchanged.push((option, place, change));
                }
                (_, Some(_)) => self.others.push((place, change)),
                (_, None) => rest.push((place, change)),
            }
        }
        for (option, place, change) in unchanged.iter().chain(&unchanged) {
            if socket.value(place.option) != Some(change.before) {
                // The value is read below.
                let _ = socket.set(unbounded(option), &settable_value(option, &change.before));
            }
        }
        for (_, place, change) in unchanged {
            if socket.value(place.option) == Some(change.before) {
                self.restored += 1;
            } else {
                self.failed.insert(place, change);
            }
        }
        rest
    }

    fn by_iterator(
        &mut self,
        left: Vec<PendingRestore>,
        table: &SocketTable,
        iter: &mut LazyIter,
    ) -> Result<(), ReconcileError> {
        if left.is_empty() {
            return Ok(());
        }
        let Some(worker) = self.unless_refused(iter.get(), &left)? else { return Ok(()) };
        let read = all_rounds(worker, &left, table, false);
        let Some(read) = self.unless_refused(read, &left)? else { return Ok(()) };
        let unchanged = left.into_iter().zip(read).filter_map(|(left, outcomes)| self.unchanged(left, &outcomes));
        let unchanged: Vec<PendingRestore> = unchanged.collect();
        let set = all_rounds(worker, &unchanged, table, true);
        let Some(set) = self.unless_refused(set, &unchanged)? else { return Ok(()) };
        for (left, outcomes) in unchanged.into_iter().zip(set) {
            for ((place, change), outcome) in left.changes.into_iter().zip(outcomes) {
                match outcome.state {
                    // The socket is closed.
                    state::NONE => {}
                    state::UNCHANGED => self.restored += 1,
                    state::SET if outcome.errno == 0 && outcome.after == change.before.words => self.restored += 1,
                    _ => drop(self.failed.insert(place, change)),
                }
            }
        }
        Ok(())
    }

    /// Returns `None` if the kernel refuses the iterator: all of these options remain to be restored.
    fn unless_refused<T>(
        &mut self,
        done: Result<T, KernelError>,
        left: &[PendingRestore],
    ) -> Result<Option<T>, ReconcileError> {
        match done {
            Ok(done) => Ok(Some(done)),
            Err(error @ KernelError::Iterator { .. }) => {
                log::warn!("{error}: sockets without a file descriptor are not restored");
                self.failed.extend(left.iter().flat_map(|left| left.changes.iter().copied()));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the options of a socket that still have the value that was applied.
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

/// Reads the options of these jobs and, if `sets`, sets them; as many jobs as fit into each round.
fn all_rounds(
    worker: &mut IterWorker,
    left: &[PendingRestore],
    table: &SocketTable,
    sets: bool,
) -> Result<Vec<Vec<Outcome>>, KernelError> {
    let mut all = Vec::new();
    while all.len() < left.len() {
        let read = worker.read(left[all.len()..].iter().map(|left| &left.job), table.namespaces())?;
        let outcomes = if sets { worker.set(table.namespaces())? } else { read };
        all.extend(outcomes.iter().map(<[Outcome]>::to_vec));
    }
    Ok(all)
}

impl PendingRestore {
    fn new(cookie: u64, namespace: usize, changes: Vec<(Place, Change)>) -> Self {
        let assignments = changes.iter().map(|(place, change)| {
            let option = options::by_key(place.option);
            let given = option.map_or(change.before, |option| settable_value(option, &change.before));
            let is_text = given.len > size_of::<u32>() as u32;
            Assignment {
                key: place.option,
                value: given.words,
                mask: [u64::MAX; 2],
                is_text: is_text.into(),
                is_doubled: option.is_some_and(SocketOption::is_doubled).into(),
            }
        });
        Self { job: Job { cookie, namespace, assignments: assignments.collect() }, changes }
    }
}

/// Returns the value to set so that getsockopt returns `shown`. The kernel doubles the sizes of buffers.
pub(super) fn settable_value(option: &SocketOption, shown: &Value) -> Value {
    options::as_passed(option.key(), shown)
}

/// Returns the option that sets another one without its bound: the kernel tunes buffers beyond the bound of SO_SNDBUF, and
/// SO_SNDBUFFORCE has none.
fn unbounded(option: &'static SocketOption) -> OptionKey {
    let is_it = |other: &&SocketOption| other.name.strip_suffix("FORCE") == Some(option.name);
    options::OPTIONS.iter().find(is_it).unwrap_or(option).key()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::live::Values;

    struct FakeSocket(HashMap<OptionKey, Value>, Option<OptionKey>);

    impl SocketHandle for FakeSocket {
        fn value(&mut self, key: OptionKey) -> Option<Value> {
            self.0.get(&key).copied()
        }

        fn values(&mut self, _: &[&'static SocketOption]) -> Option<Values> {
            None
        }

        fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>> {
            if self.1 == Some(key) {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            self.0.insert(key, *value);
            Ok(Some(*value))
        }
    }

    fn key(name: &str) -> OptionKey {
        options::by_name(name).unwrap().key()
    }

    fn change(name: &str, before: u32, after: u32) -> (Place, Change) {
        let change = Change { before: Value::int(before), after: Value::int(after) };
        (Place { cookie: 7, option: key(name) }, change)
    }

    #[test]
    fn option_that_has_the_applied_value_is_restored_and_others_are_left_alone() {
        let current = [("TCP_KEEPCNT", 5), ("TCP_SYNCNT", 8), ("TCP_KEEPIDLE", 60)];
        let current = current.map(|(name, value)| (key(name), Value::int(value)));
        let mut socket = FakeSocket(current.into_iter().collect(), Some(key("TCP_KEEPIDLE")));
        let mut work = Work::default();
        let unread = change("SO_MARK", 0, 1);
        let changes =
            vec![change("TCP_KEEPCNT", 9, 5), change("TCP_SYNCNT", 6, 3), change("TCP_KEEPIDLE", 7200, 60), unread];
        assert_eq!(work.by_descriptor(&mut socket, changes), [unread]);
        assert_eq!(socket.0[&key("TCP_KEEPCNT")], Value::int(9));
        assert_eq!((work.restored, work.others.len(), work.failed.len()), (1, 1, 1));
        let remaining = |damaged| work.remaining(&[unread], damaged).changes.len();
        assert_eq!((remaining(0), remaining(1)), (2, 3), "a damaged journal keeps what differs");
    }

    #[test]
    fn change_that_the_kernel_refused_is_not_restored() {
        let changes = [change("TCP_KEEPCNT", 9, 9), change("TCP_SYNCNT", 6, 3)].into_iter().collect();
        assert_eq!(by_socket(changes)[&7], [change("TCP_SYNCNT", 6, 3)]);
    }

    #[test]
    fn buffer_is_set_to_half_of_what_it_shows_and_without_its_bound() {
        let buffer = options::by_name("SO_SNDBUF").unwrap();
        assert_eq!(settable_value(buffer, &Value::int(8192)), Value::int(4096));
        assert_eq!(unbounded(buffer), key("SO_SNDBUFFORCE"));
        let other = options::by_name("TCP_KEEPCNT").unwrap();
        assert_eq!((settable_value(other, &Value::int(5)), unbounded(other)), (Value::int(5), other.key()));
    }
}
