//! TCP sockets that are there, looked at and set by a program that the kernel runs for each of them (iter/tcp with
//! bpf_setsockopt, 5.15): without a descriptor, and without a call that anybody would take for their process's.
//!
//! It decides nothing: it is handed what each socket is to be given.
//!
//! Invariant: a socket without a job is left alone, and what could not be looked at is not set.

use std::{collections::HashMap, io::Read as _, mem, ops::Range};

use abi::{
    SETTABLE_MAX,
    live::{self, Assignment, List, Outcome, step},
};
use aya::{
    Btf, Ebpf,
    maps::{self, Array},
    programs::{Iter, Program, ProgramError},
};
use nix::sys::mman::ProtFlags;

use super::{
    Answer, KernelError, Probed,
    error::{chain, load_reason},
    maps::{View, with_map},
    object::{self, Bare},
};
use crate::host::netns::Namespace;

const PROGRAM: &str = "live_apply";

/// What the kernel's documentation calls the hook, and since when programs can set options there.
const NAME: &str = "iter/tcp";
pub const ITERATOR_SINCE: &str = "5.15";

/// Sockets, and values of theirs, that are looked at or set at a time: some megabytes' worth.
const JOBS_MAX: usize = 16 * 1024;
const OUTCOMES_MAX: usize = 64 * 1024;
/// Values that any socket is to be given, and ways in which sockets are to be given some of them.
const ASSIGNMENTS_MAX: usize = 1024;
const LISTS_MAX: usize = 1024;

/// Maps that this program has no use for, as small as they can be.
const IDLE: [(&str, u32); 4] = [("EVENTS", 4096), ("CALLS", 1), ("LIMITS", 1), ("TOLD", 1)];

/// What a TCP socket is to be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub cookie: u64,
    /// The network namespace that it is in: an index of those that the walk is given.
    pub namespace: usize,
    /// In the order in which to set them.
    pub assignments: Vec<Assignment>,
}

/// What came of a job: one outcome for each of its assignments.
pub(super) type Outcomes = Vec<Outcome>;

/// The program, and its maps.
pub struct Walk {
    ebpf: Ebpf,
    outcomes: View<Outcome>,
    /// The jobs that stand in the maps, with their places in `outcomes`.
    placed: Vec<(u64, Range<usize>)>,
    /// The namespaces that their sockets are in.
    namespaces: Vec<usize>,
}

impl Walk {
    /// Loads the program.
    ///
    /// # Errors
    ///
    /// [`KernelError::Iterator`] where this kernel does not take it; others where this process lacks rights or memory.
    pub fn load() -> Result<Self, KernelError> {
        super::check_privileges()?;
        let sizes =
            [("JOBS", JOBS_MAX), ("LISTS", LISTS_MAX), ("ASSIGNMENTS", ASSIGNMENTS_MAX), ("OUTCOMES", OUTCOMES_MAX)];
        let sizes = sizes.map(|(map, entries)| (map, entries as u32));
        let mut ebpf = object::sized(&[&sizes[..], &IDLE[..]].concat())?;
        load(&mut ebpf)?;
        let outcomes = View::of(&ebpf, "OUTCOMES", ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok(Self { ebpf, outcomes, placed: Vec::new(), namespaces: Vec::new() })
    }

    /// Reads what the sockets of these jobs have: of the first ones, as many as there is room for at a time, and one at the least.
    /// Where there is no such socket any more, its outcomes are zero.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn look<'a>(
        &mut self,
        jobs: impl IntoIterator<Item = &'a Job>,
        namespaces: &[Namespace],
    ) -> Result<Vec<Outcomes>, KernelError> {
        self.place(Round::first_of(jobs))?;
        self.visit(step::LOOK, namespaces)
    }

    /// Gives those what they are to have, as far as they could be looked at.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn set(&mut self, namespaces: &[Namespace]) -> Result<Vec<Outcomes>, KernelError> {
        self.visit(step::SET, namespaces)
    }

    /// Writes jobs to the maps, in place of those that are there.
    fn place(&mut self, round: Round) -> Result<(), KernelError> {
        let Round { placed, rows, namespaces, lists } = round;
        if placed.is_empty() {
            return Err(KernelError::Incomplete { what: "room for these jobs" });
        }
        let before = mem::replace(&mut self.placed, placed);
        self.namespaces = namespaces;
        with_map::<maps::HashMap<_, u64, live::Job>>(&mut self.ebpf, "JOBS", |map| {
            before.iter().try_for_each(|(cookie, _)| map.remove(cookie))?;
            rows.iter().try_for_each(|(cookie, job)| map.insert(cookie, job, 0))
        })?;
        with_map::<Array<_, List>>(&mut self.ebpf, "LISTS", |map| {
            (0..).zip(&lists.lists).try_for_each(|(at, list)| map.set(at, list, 0))
        })?;
        with_map::<Array<_, Assignment>>(&mut self.ebpf, "ASSIGNMENTS", |map| {
            (0..).zip(&lists.assignments).try_for_each(|(at, assignment)| map.set(at, assignment, 0))
        })?;
        let used = self.placed.last().map_or(0, |(_, range)| range.end);
        (0..used).for_each(|at| self.outcomes.set(at, Outcome::default()));
        Ok(())
    }

    /// Has the program visit all TCP sockets of these namespaces.
    fn visit(&mut self, step: u32, namespaces: &[Namespace]) -> Result<Vec<Outcomes>, KernelError> {
        with_map::<Array<_, u32>>(&mut self.ebpf, "STEP", |map| map.set(0, step, 0))?;
        for number in &self.namespaces {
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
        let outcomes = |range: &Range<usize>| range.clone().filter_map(|at| self.outcomes.get(at)).collect();
        Ok(self.placed.iter().map(|(_, range)| outcomes(range)).collect())
    }
}

fn load(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    let refused = |reason| KernelError::Iterator { reason };
    let types = Btf::from_sys_fs().map_err(|error| refused(format!("the kernel's BTF: {}", chain(&error))))?;
    iterator(ebpf)?.load("tcp", &types).map_err(|error| refused(load_reason(&error)))
}

/// Whether this kernel takes the program and runs it.
pub(super) fn probe() -> Result<Probed<&'static str, Answer>, KernelError> {
    let Bare { mut ebpf, .. } = object::bare()?;
    let answer = match load(&mut ebpf).and_then(|()| visit_here(&mut ebpf)) {
        Ok(()) => Answer::Yes,
        Err(KernelError::Iterator { reason }) => Answer::No(reason),
        Err(error) => return Err(error),
    };
    Ok(Probed { answers: vec![(NAME, answer)], programs: object::sizes(&ebpf) })
}

fn iterator(ebpf: &mut Ebpf) -> Result<&mut Iter, KernelError> {
    match ebpf.program_mut(PROGRAM) {
        Some(Program::Iter(program)) => Ok(program),
        _ => Err(KernelError::Incomplete { what: PROGRAM }),
    }
}

/// Visits the sockets of the network namespace of this thread: an iterator is of the one in which it was made
/// (`bpf_iter_init_seq_net`, fs/proc/proc_net.c).
fn visit_here(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    let program = iterator(ebpf)?;
    let failed = |reason| KernelError::Iterator { reason };
    let link = program.attach().and_then(|link| program.take_link(link));
    let link = link.map_err(|error: ProgramError| failed(chain(&error)))?;
    let mut file = link.into_file().map_err(|error| failed(chain(&error)))?;
    // It has nothing to say, but may want to be asked again: after a million sockets (`bpf_seq_read`, kernel/bpf/bpf_iter.c).
    loop {
        match file.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

/// What is done at a time, as it stands in the maps.
#[derive(Default)]
struct Round {
    /// See [`Walk::placed`].
    placed: Vec<(u64, Range<usize>)>,
    rows: Vec<(u64, live::Job)>,
    /// Each once.
    namespaces: Vec<usize>,
    lists: Lists,
}

impl Round {
    /// As many of the jobs as there is room for.
    fn first_of<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> Self {
        let mut round = Self::default();
        for job in jobs.into_iter().take(JOBS_MAX) {
            let first = round.placed.last().map_or(0, |(_, range)| range.end);
            let end = first + job.assignments.len();
            if end > OUTCOMES_MAX {
                break;
            }
            let Some(list) = round.lists.add(&job.assignments) else { break };
            round.placed.push((job.cookie, first..end));
            round.rows.push((job.cookie, live::Job { list, first: first as u32 }));
            round.namespaces.push(job.namespace);
        }
        round.namespaces.sort_unstable();
        round.namespaces.dedup();
        round
    }
}

/// What sockets are to be given, each only once, however many sockets it is for.
#[derive(Default)]
struct Lists {
    assignments: Vec<Assignment>,
    lists: Vec<List>,
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
        let mut list = List { len: wanted.len() as u32, ..List::default() };
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

    fn job(values: impl IntoIterator<Item = u64>) -> Job {
        let assignment = |value| Assignment { value: [value, 0], ..Assignment::default() };
        Job { cookie: 1, namespace: 0, assignments: values.into_iter().map(assignment).collect() }
    }

    #[test]
    fn what_many_sockets_are_to_be_given_stands_there_once() {
        let mut lists = Lists::default();
        let numbers = [[1, 2], [1, 3], [1, 2]].map(|values| lists.add(&job(values).assignments));
        assert_eq!(numbers, [Some(0), Some(1), Some(0)]);
        assert_eq!((lists.lists.len(), lists.assignments.len()), (2, 3));
        assert_eq!(lists.lists[1].assignments[..2], [0, 2]);
    }

    #[test]
    fn so_many_jobs_are_done_at_a_time_as_there_is_room_for() {
        let same = vec![job([1]); JOBS_MAX + 1];
        assert_eq!(Round::first_of(&same).placed.len(), JOBS_MAX);
        let long = vec![job(0..40); JOBS_MAX];
        assert_eq!(Round::first_of(&long).placed.len(), OUTCOMES_MAX / 40);
        let various: Vec<Job> = (0..2000).map(|value| job([value])).collect();
        assert_eq!(Round::first_of(&various).placed.len(), LISTS_MAX);
    }
}
