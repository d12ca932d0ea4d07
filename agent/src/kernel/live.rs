//! TCP sockets that are there, looked at and set by a program that the kernel runs for each of them (iter/tcp with
//! bpf_setsockopt, 5.15): without a descriptor, and without a call that anybody would take for their process's.
//!
//! It decides nothing: it is handed what each socket is to be given.
//!
//! Invariant: a socket without a job is left alone, and what could not be looked at is not set.

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
use nix::sys::mman::ProtFlags;

use super::{
    Answer, KernelError, Probed,
    error::{chain, load_reason},
    layout::{Roots, layout},
    maps::{MappedArray, with_map},
    object::{self, ProbeObject},
};
use crate::host::{btf::Types, netns::Namespace, process, socket_table::FdRef};

/// Visits sockets.
const PROGRAM: &str = "sp_iter_tcp";
/// Visits the files that processes have open.
const HOLDERS: &str = "sp_iter_file";

/// What the kernel's documentation calls the hook, and since when programs can set options there.
const NAME: &str = "iter/tcp";
pub const ITERATOR_SINCE: &str = "5.15";

/// Sockets, and values of theirs, that are looked at or set at a time: some megabytes' worth. Each time takes two walks, in which
/// the kernel visits all sockets that there are.
const JOBS_MAX: usize = 64 * 1024;
const OUTCOMES_MAX: usize = 256 * 1024;
/// See [`places`].
const PLACES_PER_JOB: usize = 4;
const PLACES_MAX: usize = JOBS_MAX * PLACES_PER_JOB + REACH as usize;
/// Values that any socket is to be given, and ways in which sockets are to be given some of them.
const ASSIGNMENTS_MAX: usize = 1024;
const LISTS_MAX: usize = 1024;

/// Maps that this program has no use for, as small as they can be.
const IDLE: [(&str, u32); 4] = [("sp_events", 4096), ("sp_calls", 1), ("sp_rate_limits", 1), ("sp_exes_sent", 1)];

/// What a TCP socket is to be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub cookie: u64,
    /// The network namespace that it is in: an index of those that the walk is given.
    pub namespace: usize,
    /// In the order in which to set them.
    pub assignments: Vec<Assignment>,
}

/// What came of jobs: of each, one outcome for each of its assignments.
pub struct Outcomes {
    all: Vec<Outcome>,
    /// By job: where its outcomes begin; and where the last one's end.
    bounds: Vec<usize>,
}

impl Outcomes {
    /// How many jobs these are of.
    #[expect(clippy::len_without_is_empty, reason = "a walk is for one job at the least")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// By job.
    pub fn iter(&self) -> impl Iterator<Item = &[Outcome]> {
        self.bounds.windows(2).map(|bounds| &self.all[bounds[0]..bounds[1]])
    }
}

/// Of each outcome, as many bytes.
const OUTCOME_LEN: usize = size_of::<Outcome>();

/// Between processes of this build.
impl Outcomes {
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = (self.bounds.len() as u64).to_ne_bytes().to_vec();
        bytes.extend(self.bounds.iter().flat_map(|bound| (*bound as u64).to_ne_bytes()));
        for outcome in &self.all {
            // SAFETY: numbers without padding, of which each byte is one.
            bytes.extend_from_slice(unsafe { slice::from_raw_parts((&raw const *outcome).cast(), OUTCOME_LEN) });
        }
        bytes
    }

    /// What [`Self::to_bytes`] gave.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (count, bytes) = bytes.split_first_chunk()?;
        let (bounds, outcomes) = bytes.split_at_checked(u64::from_ne_bytes(*count) as usize * size_of::<u64>())?;
        let (bounds, _) = bounds.as_chunks();
        let bounds: Vec<usize> = bounds.iter().map(|bound| u64::from_ne_bytes(*bound) as usize).collect();
        let (outcomes, _) = outcomes.as_chunks::<OUTCOME_LEN>();
        // SAFETY: as many bytes, of numbers that are valid whatever they are.
        let all = outcomes.iter().map(|bytes| unsafe { bytes.as_ptr().cast::<Outcome>().read_unaligned() }).collect();
        let outcomes = Self { all, bounds };
        let is_whole = outcomes.bounds.is_sorted() && outcomes.bounds.last() == Some(&outcomes.all.len());
        is_whole.then_some(outcomes)
    }
}

/// The program, and its maps.
pub struct SocketIter {
    ebpf: Ebpf,
    /// Whether the other program is there, too.
    can_name_holders: bool,
    jobs: MappedArray<live::SocketJob>,
    outcomes: MappedArray<Outcome>,
    /// What stands in the maps.
    round: Round,
}

impl SocketIter {
    /// Jobs that there is room for at a time.
    pub const JOBS_MAX: usize = JOBS_MAX;

    /// Loads the program, and if that is wanted, the one that names holders.
    ///
    /// # Errors
    ///
    /// [`KernelError::Iterator`] where this kernel does not take it; others where this process lacks rights or memory.
    pub fn load(names_holders: bool) -> Result<Self, KernelError> {
        super::check_privileges()?;
        let sizes = [
            ("sp_jobs", PLACES_MAX),
            ("sp_assign_lists", LISTS_MAX),
            ("sp_assignments", ASSIGNMENTS_MAX),
            ("sp_outcomes", OUTCOMES_MAX),
        ];
        let sizes = sizes.map(|(map, entries)| (map, entries as u32));
        // It tells them by the numbers that they have to the kernel, and only it looks at structures.
        let layout = match names_holders && process::is_initial_namespace() {
            true => Types::of_kernel().map(|types| layout(&Roots::find(&types))).unwrap_or_default(),
            false => Layout::default(),
        };
        let mut ebpf = object::sized(&[&sizes[..], &IDLE[..]].concat(), &layout)?;
        let types = types()?;
        load(&mut ebpf, &types)?;
        let can_name_holders = layout.knows(NAMES_HOLDERS) && load_holders(&mut ebpf, &types)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let (jobs, outcomes) =
            (MappedArray::of(&ebpf, "sp_jobs", protection)?, MappedArray::of(&ebpf, "sp_outcomes", protection)?);
        Ok(Self { ebpf, can_name_holders, jobs, outcomes, round: Round::default() })
    }

    /// All descriptors of processes that are sockets, each with the socket's inode number, in the order of processes and
    /// descriptors; `None` where this kernel does not tell.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn fd_refs(&mut self) -> Result<Option<Vec<(u32, FdRef)>>, KernelError> {
        if !self.can_name_holders {
            return Ok(None);
        }
        let mut told = Vec::new();
        read(&mut self.ebpf, HOLDERS, |bytes| told.extend_from_slice(bytes))?;
        let (records, _) = told.as_chunks::<{ size_of::<FdEntry>() }>();
        Ok(Some(records.iter().map(holder).collect()))
    }

    /// Reads what the sockets of these jobs have: of the first ones, as many as there is room for at a time, and one at the least.
    /// Where there is no such socket any more, its outcomes are zero.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn read<'a>(
        &mut self,
        jobs: impl ExactSizeIterator<Item = &'a Job>,
        namespaces: &[Namespace],
    ) -> Result<Outcomes, KernelError> {
        self.write_round(Round::first_of(jobs))?;
        self.run(step::READ, namespaces)
    }

    /// Gives those what they are to have, as far as they could be looked at.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn set(&mut self, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
        self.run(step::SET, namespaces)
    }

    /// Writes jobs to the maps, in place of those that are there.
    fn write_round(&mut self, round: Round) -> Result<(), KernelError> {
        if round.rows.is_empty() {
            return Err(KernelError::Incomplete { what: "room for these jobs" });
        }
        let before = mem::replace(&mut self.round, round);
        before.rows.iter().for_each(|(place, _)| self.jobs.set(*place, live::SocketJob::default()));
        let Round { rows, bounds, lists, .. } = &self.round;
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

    /// Has the program visit all TCP sockets of these namespaces.
    fn run(&mut self, step: u32, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
        let turn = IterControl { step, shift: self.round.shift };
        with_map::<Array<_, IterControl>>(&mut self.ebpf, "sp_iter_control", |map| map.set(0, turn, 0))?;
        for number in &self.round.namespaces {
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
        let bounds = self.round.bounds.clone();
        let used = bounds.last().copied().unwrap_or_default();
        Ok(Outcomes { all: (0..used).filter_map(|at| self.outcomes.get(at)).collect(), bounds })
    }
}

/// What the program has to know of the kernel's structures that names who has sockets.
const NAMES_HOLDERS: u32 = known::DESCRIPTOR | known::EXECUTABLE;

fn holder(record: &[u8; size_of::<FdEntry>()]) -> (u32, FdRef) {
    // SAFETY: as many bytes, of numbers that are valid whatever they are.
    let FdEntry { inode, process, descriptor } = unsafe { record.as_ptr().cast::<FdEntry>().read_unaligned() };
    (inode as u32, FdRef { process, descriptor: descriptor as i32 })
}

fn types() -> Result<Btf, KernelError> {
    Btf::from_sys_fs().map_err(|error| KernelError::Iterator { reason: format!("the kernel's BTF: {}", chain(&error)) })
}

fn load(ebpf: &mut Ebpf, types: &Btf) -> Result<(), KernelError> {
    iterator(ebpf, PROGRAM)?.load("tcp", types).map_err(|error| KernelError::Iterator { reason: load_reason(&error) })
}

/// Loads the program that names holders; gives whether this kernel takes it.
fn load_holders(ebpf: &mut Ebpf, types: &Btf) -> Result<bool, KernelError> {
    let loaded = iterator(ebpf, HOLDERS)?.load("task_file", types);
    Ok(loaded.inspect_err(|error| log::debug!("who has sockets is looked up in /proc: {}", load_reason(error))).is_ok())
}

/// Whether this kernel takes the program and runs it. The one that names holders is loaded for its size.
pub(super) fn probe() -> Result<Probed<&'static str, Answer>, KernelError> {
    let ProbeObject { mut ebpf, .. } = object::load_for_probe()?;
    let tried = types().and_then(|types| {
        load(&mut ebpf, &types)?;
        load_holders(&mut ebpf, &types)?;
        visit_here(&mut ebpf)
    });
    let answer = match tried {
        Ok(()) => Answer::Yes,
        Err(KernelError::Iterator { reason }) => Answer::No(reason),
        Err(error) => return Err(error),
    };
    Ok(Probed { answers: vec![(NAME, answer)], programs: object::sizes(&ebpf) })
}

fn iterator<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Iter, KernelError> {
    match ebpf.program_mut(name) {
        Some(Program::Iter(program)) => Ok(program),
        _ => Err(KernelError::Incomplete { what: name }),
    }
}

/// Visits the sockets of the network namespace of this thread: an iterator is of the one in which it was made
/// (`bpf_iter_init_seq_net`, fs/proc/proc_net.c).
fn visit_here(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    // It has nothing to say.
    read(ebpf, PROGRAM, |_| {})
}

/// Has a program visit all that it is for, and takes what it says.
fn read(ebpf: &mut Ebpf, name: &'static str, mut take: impl FnMut(&[u8])) -> Result<(), KernelError> {
    /// As much as the kernel keeps until it is read (`bpf_seq_read`).
    const ROOM: usize = 32 * 1024;
    let program = iterator(ebpf, name)?;
    let failed = |reason| KernelError::Iterator { reason };
    let link = program.attach().and_then(|link| program.take_link(link));
    let link = link.map_err(|error: ProgramError| failed(chain(&error)))?;
    let mut file = link.into_file().map_err(|error| failed(chain(&error)))?;
    let mut room = vec![0; ROOM];
    // It may want to be asked again without having said anything: after a million (`bpf_seq_read`, kernel/bpf/bpf_iter.c).
    loop {
        match file.read(&mut room) {
            Ok(0) => return Ok(()),
            Ok(len) => take(&room[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

/// What is done at a time, as it stands in the maps.
#[derive(Default)]
struct Round {
    /// By job: its place, and what stands there.
    rows: Vec<(usize, live::SocketJob)>,
    /// See [`places`].
    shift: u32,
    /// See [`Outcomes::bounds`].
    bounds: Vec<usize>,
    /// The namespaces that the sockets are in, each once.
    namespaces: Vec<usize>,
    lists: Lists,
}

impl Round {
    /// As many of the jobs as there is room for.
    fn first_of<'a>(jobs: impl ExactSizeIterator<Item = &'a Job>) -> Self {
        let count = jobs.len().min(JOBS_MAX);
        let places_used = (count * PLACES_PER_JOB).next_power_of_two().max(2);
        let shift = u64::BITS - places_used.ilog2();
        let mut is_free = vec![true; places_used + REACH as usize];
        let mut round = Self { shift, bounds: vec![0], rows: Vec::with_capacity(count), ..Self::default() };
        for job in jobs.take(count) {
            let first = round.bounds.last().copied().unwrap_or_default();
            let end = first + job.assignments.len();
            let place = places(job.cookie, shift).map(|place| place as usize).find(|place| is_free[*place]);
            let Some(place) = place.filter(|_| end <= OUTCOMES_MAX) else { break };
            let Some(list) = round.lists.add(&job.assignments) else { break };
            is_free[place] = false;
            round.rows.push((place, live::SocketJob { cookie: job.cookie, list, first: first as u32 }));
            round.bounds.push(end);
            if !round.namespaces.contains(&job.namespace) {
                round.namespaces.push(job.namespace);
            }
        }
        round
    }
}

/// What sockets are to be given, each only once, however many sockets it is for.
#[derive(Default)]
struct Lists {
    assignments: Vec<Assignment>,
    lists: Vec<AssignmentList>,
    assignment_numbers: HashMap<Assignment, u32>,
    list_numbers: HashMap<Vec<Assignment>, u32>,
}

impl Lists {
    /// The number of a list; `None` where there is no room for it.
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
    fn what_many_sockets_are_to_be_given_stands_there_once() {
        let mut lists = Lists::default();
        let numbers = [[1, 2], [1, 3], [1, 2]].map(|values| lists.add(&job(1, values).assignments));
        assert_eq!(numbers, [Some(0), Some(1), Some(0)]);
        assert_eq!((lists.lists.len(), lists.assignments.len()), (2, 3));
        assert_eq!(lists.lists[1].assignments[..2], [0, 2]);
    }

    #[test]
    fn outcomes_are_the_same_in_another_process() {
        let all = vec![Outcome { errno: 7, ..Outcome::default() }, Outcome { before: [1, 2], ..Outcome::default() }];
        let outcomes = Outcomes { all: all.clone(), bounds: vec![0, 0, 2] };
        let bytes = outcomes.to_bytes();
        let read = Outcomes::from_bytes(&bytes).unwrap();
        assert_eq!((read.all, read.bounds), (all, vec![0, 0, 2]));
        assert!((0..bytes.len()).all(|len| Outcomes::from_bytes(&bytes[..len]).is_none()));
    }

    #[test]
    fn so_many_jobs_are_done_at_a_time_as_there_is_room_for() {
        let rows = |jobs: Vec<Job>| Round::first_of(jobs.iter()).rows.len();
        let cookies = 1..=JOBS_MAX as u64 + 1;
        assert_eq!(rows(cookies.clone().map(|cookie| job(cookie, [1])).collect()), JOBS_MAX);
        assert_eq!(rows(cookies.map(|cookie| job(cookie, 0..40)).collect()), OUTCOMES_MAX / 40);
        assert_eq!(rows((1..2000).map(|value| job(value, [value])).collect()), LISTS_MAX);
    }

    #[test]
    fn each_job_is_found_at_a_place_of_its_own() {
        // Cookies are given out to each CPU in rows of 4096.
        let jobs: Vec<Job> =
            (0..JOBS_MAX as u64).map(|number| job(1 + number % 4096 + (number / 4096) * 65_536, [1])).collect();
        let round = Round::first_of(jobs.iter());
        assert_eq!(round.rows.len(), jobs.len());
        let mut taken = vec![0; PLACES_MAX];
        round.rows.iter().for_each(|(place, job)| taken[*place] = job.cookie);
        for job in &jobs {
            let mut passed = places(job.cookie, round.shift).map(|place| taken[place as usize]);
            assert_eq!(passed.find(|cookie| *cookie == job.cookie || *cookie == 0), Some(job.cookie));
        }
    }
}
