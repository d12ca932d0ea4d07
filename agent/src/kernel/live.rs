//! Reads and sets options of existing TCP sockets by a program that the kernel runs for each socket (iter/tcp with
//! bpf_setsockopt, 5.15). This needs no descriptor, and no call that could be mistaken for one of the socket's process.
//!
//! The caller decides which values each socket gets.
//!
//! Invariant: a socket without a job is not changed, and an option that could not be read is not set.

use std::{collections::HashMap, io::Read as _, mem, slice};

use abi::{
    SETTABLE_MAX,
    layout::{Layout, known},
    live::{self, Assignment, AssignmentList, FdEntry, IterControl, Outcome, REACH, places, step},
};
use aya::{
    Btf, Ebpf,
    maps::Array,
    programs::{Iter, Program, ProgramError},
};

use super::{
    Answer, KernelError, Probed,
    error::{chain, load_reason},
    layout::{Roots, layout},
    loader::{self, ProbeObject},
    maps::{MappedArray, Writable, with_map},
};
use crate::host::{btf::Types, netns::Namespace, process, socket_table::FdRef};

/// The program that visits TCP sockets.
const SOCKET_PROGRAM: &str = "sp_iter_tcp";
/// The program that visits the open files of processes.
const FILE_PROGRAM: &str = "sp_iter_file";

/// The kernel documentation's name of the hook, and the first kernel on which its programs can set options.
const NAME: &str = "iter/tcp";
pub const ITERATOR_SINCE: &str = "5.15";

/// Maximum number of sockets and of values in one batch, which take some megabytes. A batch takes two iterations, each over all
/// sockets.
const JOBS_MAX: usize = 64 * 1024;
const OUTCOMES_MAX: usize = 256 * 1024;
/// See [`places`].
const PLACES_PER_JOB: usize = 4;
const PLACES_MAX: usize = JOBS_MAX * PLACES_PER_JOB + REACH as usize;
/// Maximum number of distinct assignments and of distinct lists of assignments in one batch.
const ASSIGNMENTS_MAX: usize = 1024;
const LISTS_MAX: usize = 1024;

/// Maps that the iterators do not use, with their minimum sizes.
const UNUSED_MAPS: [(&str, u32); 4] =
    [("sp_events", 4096), ("sp_calls", 1), ("sp_rate_limits", 1), ("sp_exes_sent", 1)];

/// The options to set on a TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub cookie: u64,
    /// The network namespace of the socket: an index of the namespaces that are passed to the iterator.
    pub namespace: usize,
    /// In the order in which to set them.
    pub assignments: Vec<Assignment>,
}

/// The outcomes of jobs: one for each assignment of each job.
pub struct Outcomes {
    all: Vec<Outcome>,
    /// For each job, the index of its first outcome; at the end, the number of outcomes.
    bounds: Vec<usize>,
}

impl Outcomes {
    /// Returns the number of jobs.
    #[expect(clippy::len_without_is_empty, reason = "a walk is for one job at the least")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Iterates over the outcomes of each job.
    pub fn iter(&self) -> impl Iterator<Item = &[Outcome]> {
        self.bounds.windows(2).map(|bounds| &self.all[bounds[0]..bounds[1]])
    }
}

/// Length of an encoded outcome, in bytes.
const OUTCOME_LEN: usize = size_of::<Outcome>();

/// The encoding between processes of the same build.
impl Outcomes {
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = (self.bounds.len() as u64).to_ne_bytes().to_vec();
        bytes.extend(self.bounds.iter().flat_map(|bound| (*bound as u64).to_ne_bytes()));
        for outcome in &self.all {
            // SAFETY: an outcome consists of numbers without padding.
            bytes.extend_from_slice(unsafe { slice::from_raw_parts((&raw const *outcome).cast(), OUTCOME_LEN) });
        }
        bytes
    }

    /// Decodes the bytes that [`Self::to_bytes`] returned; `None` if they are incomplete.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (count, bytes) = bytes.split_first_chunk()?;
        let (bounds, outcomes) = bytes.split_at_checked(u64::from_ne_bytes(*count) as usize * size_of::<u64>())?;
        let (bounds, _) = bounds.as_chunks();
        let bounds: Vec<usize> = bounds.iter().map(|bound| u64::from_ne_bytes(*bound) as usize).collect();
        let (outcomes, _) = outcomes.as_chunks::<OUTCOME_LEN>();
        // SAFETY: the length is that of the type, and every bit pattern is valid for its numbers.
        let all = outcomes.iter().map(|bytes| unsafe { bytes.as_ptr().cast::<Outcome>().read_unaligned() }).collect();
        let outcomes = Self { all, bounds };
        let is_whole = outcomes.bounds.is_sorted() && outcomes.bounds.last() == Some(&outcomes.all.len());
        is_whole.then_some(outcomes)
    }
}

/// The iterator programs and their maps.
pub struct SocketIter {
    ebpf: Ebpf,
    /// Whether the program that visits files is loaded.
    has_file_program: bool,
    jobs: MappedArray<live::SocketJob, Writable>,
    outcomes: MappedArray<Outcome, Writable>,
    /// The batch that is in the maps.
    batch: Batch,
}

impl SocketIter {
    /// Maximum number of jobs in one batch.
    pub const JOBS_MAX: usize = JOBS_MAX;

    /// Loads the program that visits sockets and, with `with_fd_refs`, the program that finds descriptors of sockets.
    ///
    /// # Errors
    ///
    /// [`KernelError::Iterator`] if this kernel refuses the program; other errors if this process lacks capabilities or memory.
    pub fn load(with_fd_refs: bool) -> Result<Self, KernelError> {
        super::check_privileges()?;
        let sizes = [
            ("sp_jobs", PLACES_MAX),
            ("sp_assign_lists", LISTS_MAX),
            ("sp_assignments", ASSIGNMENTS_MAX),
            ("sp_outcomes", OUTCOMES_MAX),
        ];
        let sizes = sizes.map(|(map, entries)| (map, entries as u32));
        // Only the program that visits files reads kernel structures. It reports PIDs of the initial namespace.
        let layout = match with_fd_refs && process::is_initial_namespace() {
            true => Types::of_kernel().map(|types| layout(&Roots::find(&types))).unwrap_or_default(),
            false => Layout::default(),
        };
        let mut ebpf = loader::sized(&[&sizes[..], &UNUSED_MAPS[..]].concat(), &layout)?;
        let types = types()?;
        load(&mut ebpf, &types)?;
        let has_file_program = layout.knows(FILE_PROGRAM_LAYOUT) && load_file_program(&mut ebpf, &types)?;
        let (jobs, outcomes) = (MappedArray::new(&ebpf, "sp_jobs")?, MappedArray::new(&ebpf, "sp_outcomes")?);
        Ok(Self { ebpf, has_file_program, jobs, outcomes, batch: Batch::default() })
    }

    /// Returns all descriptors that are sockets, each with the inode number of the socket, in the order of processes and
    /// descriptors; `None` if this kernel does not support it.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn fd_refs(&mut self) -> Result<Option<Vec<(u32, FdRef)>>, KernelError> {
        if !self.has_file_program {
            return Ok(None);
        }
        let mut bytes_read = Vec::new();
        read(&mut self.ebpf, FILE_PROGRAM, |bytes| bytes_read.extend_from_slice(bytes))?;
        let (records, _) = bytes_read.as_chunks::<{ size_of::<FdEntry>() }>();
        Ok(Some(records.iter().map(fd_ref).collect()))
    }

    /// Reads the options of the sockets of a batch: the first jobs, as many as there is room for, and at least one. The
    /// outcomes of a socket that does not exist any more are zero.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn read<'a>(
        &mut self,
        jobs: impl ExactSizeIterator<Item = &'a Job>,
        namespaces: &[Namespace],
    ) -> Result<Outcomes, KernelError> {
        self.write_batch(Batch::first_of(jobs))?;
        self.run(step::READ, namespaces)
    }

    /// Sets the options of the batch that was read, except those that could not be read.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn set(&mut self, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
        self.run(step::SET, namespaces)
    }

    /// Writes a batch to the maps in place of the previous one.
    fn write_batch(&mut self, batch: Batch) -> Result<(), KernelError> {
        if batch.rows.is_empty() {
            return Err(KernelError::Incomplete { what: "room for these jobs" });
        }
        let previous = mem::replace(&mut self.batch, batch);
        previous.rows.iter().for_each(|(place, _)| self.jobs.set(*place, live::SocketJob::default()));
        let Batch { rows, bounds, lists, .. } = &self.batch;
        rows.iter().for_each(|(place, job)| self.jobs.set(*place, *job));
        with_map::<Array<_, AssignmentList>>(&mut self.ebpf, "sp_assign_lists", |map| {
            (0..).zip(&lists.lists).try_for_each(|(at, list)| map.set(at, list, 0))
        })?;
        with_map::<Array<_, Assignment>>(&mut self.ebpf, "sp_assignments", |map| {
            (0..).zip(&lists.assignments).try_for_each(|(at, assignment)| map.set(at, assignment, 0))
        })?;
        let used = bounds.last().copied().unwrap_or_default();
        (0..used).for_each(|at| self.outcomes.set(at, Outcome::default()));
        Ok(())
    }

    /// Runs the program for all TCP sockets of the batch's namespaces.
    fn run(&mut self, step: u32, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
        let control = IterControl { step, shift: self.batch.shift };
        with_map::<Array<_, IterControl>>(&mut self.ebpf, "sp_iter_control", |map| map.set(0, control, 0))?;
        for number in &self.batch.namespaces {
            let Some(namespace) = namespaces.get(*number) else { continue };
            let visited = namespace.within(|| visit_here(&mut self.ebpf));
            match visited {
                Ok(visited) => visited?,
                Err(source) => {
                    let reason = format!("network namespace {}: {source}", namespace.id);
                    return Err(KernelError::Iterator { reason });
                }
            }
        }
        let bounds = self.batch.bounds.clone();
        let used = bounds.last().copied().unwrap_or_default();
        Ok(Outcomes { all: (0..used).filter_map(|at| self.outcomes.get(at)).collect(), bounds })
    }
}

/// The parts of the layout that the program which visits files needs.
const FILE_PROGRAM_LAYOUT: u32 = known::DESCRIPTOR | known::EXECUTABLE;

fn fd_ref(record: &[u8; size_of::<FdEntry>()]) -> (u32, FdRef) {
    // SAFETY: the length is that of the type, and every bit pattern is valid for its numbers.
    let FdEntry { inode, process, descriptor } = unsafe { record.as_ptr().cast::<FdEntry>().read_unaligned() };
    (inode as u32, FdRef { process, descriptor: descriptor as i32 })
}

fn types() -> Result<Btf, KernelError> {
    Btf::from_sys_fs()
        .map_err(|error| KernelError::Iterator { reason: format!("cannot read the kernel's BTF: {}", chain(&error)) })
}

fn load(ebpf: &mut Ebpf, types: &Btf) -> Result<(), KernelError> {
    iterator(ebpf, SOCKET_PROGRAM)?
        .load("tcp", types)
        .map_err(|error| KernelError::Iterator { reason: load_reason(&error) })
}

/// Loads the program that visits files. Returns whether this kernel accepts it.
fn load_file_program(ebpf: &mut Ebpf, types: &Btf) -> Result<bool, KernelError> {
    let loaded = iterator(ebpf, FILE_PROGRAM)?.load("task_file", types);
    Ok(loaded
        .inspect_err(|error| log::debug!("descriptors of sockets are searched in /proc: {}", load_reason(error)))
        .is_ok())
}

/// Probes whether this kernel loads and runs the program that visits sockets. Also loads the program that visits files, for its
/// size.
pub(super) fn probe() -> Result<Probed<&'static str, Answer>, KernelError> {
    let ProbeObject { mut ebpf, .. } = loader::load_for_probe()?;
    let tried = types().and_then(|types| {
        load(&mut ebpf, &types)?;
        load_file_program(&mut ebpf, &types)?;
        visit_here(&mut ebpf)
    });
    let answer = match tried {
        Ok(()) => Answer::Yes,
        Err(KernelError::Iterator { reason }) => Answer::No(reason),
        Err(error) => return Err(error),
    };
    Ok(Probed { answers: vec![(NAME, answer)], programs: loader::sizes(&ebpf) })
}

fn iterator<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Iter, KernelError> {
    match ebpf.program_mut(name) {
        Some(Program::Iter(program)) => Ok(program),
        _ => Err(KernelError::Incomplete { what: name }),
    }
}

/// Runs the program for the sockets of this thread's network namespace. An iterator is bound to the namespace in which it was
/// made (`bpf_iter_init_seq_net`, fs/proc/proc_net.c).
fn visit_here(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    // This program writes no output.
    read(ebpf, SOCKET_PROGRAM, |_| {})
}

/// Runs an iterator program to its end and passes its output to `take`.
fn read(ebpf: &mut Ebpf, name: &'static str, mut take: impl FnMut(&[u8])) -> Result<(), KernelError> {
    /// The size of the kernel's buffer in bytes (`bpf_seq_read`).
    const BUFFER_LEN: usize = 32 * 1024;
    let program = iterator(ebpf, name)?;
    let failed = |reason| KernelError::Iterator { reason };
    let link = program.attach().and_then(|link| program.take_link(link));
    let link = link.map_err(|error: ProgramError| failed(chain(&error)))?;
    let mut file = link.into_file().map_err(|error| failed(chain(&error)))?;
    let mut buffer = vec![0; BUFFER_LEN];
    // A read may return EAGAIN without output, after a million objects (`bpf_seq_read`, kernel/bpf/bpf_iter.c).
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => take(&buffer[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

/// The jobs that are done in one iteration, as they are in the maps.
#[derive(Default)]
struct Batch {
    /// For each job, its place in the map and its entry.
    rows: Vec<(usize, live::SocketJob)>,
    /// See [`places`].
    shift: u32,
    /// See [`Outcomes::bounds`].
    bounds: Vec<usize>,
    /// The namespaces of the sockets, each once.
    namespaces: Vec<usize>,
    lists: Lists,
}

impl Batch {
    /// Makes a batch of the first jobs, as many as there is room for.
    fn first_of<'a>(jobs: impl ExactSizeIterator<Item = &'a Job>) -> Self {
        let count = jobs.len().min(JOBS_MAX);
        let places_used = (count * PLACES_PER_JOB).next_power_of_two().max(2);
        let shift = u64::BITS - places_used.ilog2();
        let mut is_free = vec![true; places_used + REACH as usize];
        let mut batch = Self { shift, bounds: vec![0], rows: Vec::with_capacity(count), ..Self::default() };
        for job in jobs.take(count) {
            let first = batch.bounds.last().copied().unwrap_or_default();
            let end = first + job.assignments.len();
            let place = places(job.cookie, shift).map(|place| place as usize).find(|place| is_free[*place]);
            let Some(place) = place.filter(|_| end <= OUTCOMES_MAX) else { break };
            let Some(list) = batch.lists.add(&job.assignments) else { break };
            is_free[place] = false;
            batch.rows.push((place, live::SocketJob { cookie: job.cookie, list, first: first as u32 }));
            batch.bounds.push(end);
            if !batch.namespaces.contains(&job.namespace) {
                batch.namespaces.push(job.namespace);
            }
        }
        batch
    }
}

/// The distinct assignments and lists. Each is stored once, however many sockets use it.
#[derive(Default)]
struct Lists {
    assignments: Vec<Assignment>,
    lists: Vec<AssignmentList>,
    assignment_numbers: HashMap<Assignment, u32>,
    list_numbers: HashMap<Vec<Assignment>, u32>,
}

impl Lists {
    /// Returns the number of a list; `None` if there is no room for it.
    fn add(&mut self, wanted: &[Assignment]) -> Option<u32> {
        if let Some(number) = self.list_numbers.get(wanted) {
            return Some(*number);
        }
        if self.lists.len() == LISTS_MAX || wanted.len() > SETTABLE_MAX {
            return None;
        }
        let mut list = AssignmentList { len: wanted.len() as u32, ..AssignmentList::default() };
        for (place, assignment) in list.assignments.iter_mut().zip(wanted) {
            *place = self.add_assignment(assignment)?;
        }
        let number = self.lists.len() as u32;
        self.lists.push(list);
        self.list_numbers.insert(wanted.to_vec(), number);
        Some(number)
    }

    fn add_assignment(&mut self, assignment: &Assignment) -> Option<u32> {
        if let Some(number) = self.assignment_numbers.get(assignment) {
            return Some(*number);
        }
        let number = self.assignments.len();
        if number == ASSIGNMENTS_MAX {
            return None;
        }
        self.assignments.push(*assignment);
        self.assignment_numbers.insert(*assignment, number as u32);
        Some(number as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(cookie: u64, values: impl IntoIterator<Item = u64>) -> Job {
        let assignment = |value| Assignment { value: [value, 0], ..Assignment::default() };
        Job { cookie, namespace: 0, assignments: values.into_iter().map(assignment).collect() }
    }

    #[test]
    fn equal_lists_are_stored_once() {
        let mut lists = Lists::default();
        let numbers = [[1, 2], [1, 3], [1, 2]].map(|values| lists.add(&job(1, values).assignments));
        assert_eq!(numbers, [Some(0), Some(1), Some(0)]);
        assert_eq!((lists.lists.len(), lists.assignments.len()), (2, 3));
        assert_eq!(lists.lists[1].assignments[..2], [0, 2]);
    }

    #[test]
    fn outcomes_are_decoded_as_they_were_encoded() {
        let all = vec![Outcome { errno: 7, ..Outcome::default() }, Outcome { before: [1, 2], ..Outcome::default() }];
        let outcomes = Outcomes { all: all.clone(), bounds: vec![0, 0, 2] };
        let bytes = outcomes.to_bytes();
        let read = Outcomes::from_bytes(&bytes).unwrap();
        assert_eq!((read.all, read.bounds), (all, vec![0, 0, 2]));
        assert!((0..bytes.len()).all(|len| Outcomes::from_bytes(&bytes[..len]).is_none()));
    }

    #[test]
    fn batch_has_as_many_jobs_as_there_is_room_for() {
        let rows = |jobs: Vec<Job>| Batch::first_of(jobs.iter()).rows.len();
        let cookies = 1..=JOBS_MAX as u64 + 1;
        assert_eq!(rows(cookies.clone().map(|cookie| job(cookie, [1])).collect()), JOBS_MAX);
        assert_eq!(rows(cookies.map(|cookie| job(cookie, 0..40)).collect()), OUTCOMES_MAX / 40);
        assert_eq!(rows((1..2000).map(|value| job(value, [value])).collect()), LISTS_MAX);
    }

    #[test]
    fn each_job_is_found_at_its_own_place() {
        // The kernel gives cookies to each CPU in blocks of 4096.
        let jobs: Vec<Job> =
            (0..JOBS_MAX as u64).map(|number| job(1 + number % 4096 + (number / 4096) * 65_536, [1])).collect();
        let batch = Batch::first_of(jobs.iter());
        assert_eq!(batch.rows.len(), jobs.len());
        let mut taken = vec![0; PLACES_MAX];
        batch.rows.iter().for_each(|(place, job)| taken[*place] = job.cookie);
        for job in &jobs {
            let mut passed = places(job.cookie, batch.shift).map(|place| taken[place as usize]);
            assert_eq!(passed.find(|cookie| *cookie == job.cookie || *cookie == 0), Some(job.cookie));
        }
    }
}
