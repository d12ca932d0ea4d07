//! The BPF iterators over TCP sockets and over files, in a worker process that loads them on demand.
//!
//! The iterator locks each TCP socket that it visits (`bpf_iter_tcp_seq_show`, net/ipv4/tcp_ipv4.c), and the owner of a socket can
//! hold that lock without limit: see `host/inspect`. The worker has programs and maps of its own. None of these enforces a policy.

use std::{fmt, io, mem, os::fd::AsRawFd as _, time::Duration};

use abi::{
    live::Assignment,
    setting::{OptionKey, Words},
};
use serde::{Deserialize, Serialize};

use crate::{
    host::{netns::Namespace, process, socket_table::FdRef},
    kernel::{self, Job, KernelError, Outcomes, SocketIter},
    worker::{Service, left_behind, serve},
};

/// The name of the hidden command that runs the worker.
pub const WALK: &str = "walk-sockets";

/// With fewer open files on this host, reading /proc is faster than loading the programs.
const WORTH_LOADING: u64 = 8 * 1024;

/// The deadlines for loading the programs, and for one run of an iterator.
const LOADING: Duration = Duration::from_secs(30);
const VISIT: Duration = Duration::from_secs(10);
/// With this many worker processes that did not end, no other is started.
const LEFT_BEHIND_MAX: usize = 64;

/// The iterators, which are loaded on first use.
#[derive(Default)]
pub enum LazyIter {
    #[default]
    Idle,
    /// The worker loads the programs in the background.
    Loading(IterWorker),
    Loaded(IterWorker),
    /// The programs cannot be loaded, or the worker did not answer, for this reason.
    Failed(String),
}

/// The worker process.
pub struct IterWorker(Option<Service>);

#[derive(Serialize, Deserialize)]
enum Request {
    Load {
        with_files: bool,
    },
    FdRefs,
    Read {
        /// The agent's file descriptors of the network namespaces.
        namespaces: Vec<i32>,
        /// Each distinct list of assignments.
        lists: Vec<Vec<Assigned>>,
        /// The cookie, the namespace and the index of the list of each socket.
        jobs: Vec<(u64, usize, usize)>,
    },
    Set {
        namespaces: Vec<i32>,
    },
}

/// An [`Assignment`] as the processes exchange it.
type Assigned = ((i32, i32), Words, Words, u32, u32);

#[derive(Serialize, Deserialize)]
enum Response {
    Loaded,
    /// The inode number, the process and the descriptor of each socket.
    FdRefs(Option<Vec<(u32, u32, i32)>>),
    /// Outcomes follow, as bytes.
    Done,
    Failed(String),
}

impl LazyIter {
    /// Starts to load the programs if this host has so many open files that they will be used.
    #[must_use]
    pub fn begin() -> Self {
        let is_worth_it = process::open_files().is_some_and(|files| files >= WORTH_LOADING);
        if !is_worth_it {
            return Self::Idle;
        }
        IterWorker::begin(true).map_or_else(|error| Self::Failed(error.to_string()), Self::Loading)
    }

    /// Returns the descriptors of all sockets, by inode number. `None`: the programs were not started, or do not answer.
    pub fn fd_refs(&mut self) -> Option<Vec<(u32, FdRef)>> {
        if matches!(self, Self::Idle) {
            return None;
        }
        let fd_refs = self.get().and_then(IterWorker::fd_refs);
        fd_refs.unwrap_or_else(|error| {
            log::info!("{error}: reading the file descriptors of processes from /proc");
            None
        })
    }

    /// Returns the worker, after its programs are loaded.
    ///
    /// # Errors
    ///
    /// Fails if the programs cannot be loaded, or if the worker does not answer.
    pub fn get(&mut self) -> Result<&mut IterWorker, KernelError> {
        let worker = match mem::take(self) {
            Self::Idle => IterWorker::begin(false).and_then(IterWorker::loaded),
            Self::Loading(worker) => worker.loaded(),
            Self::Loaded(worker) if worker.0.is_some() => Ok(worker),
            Self::Loaded(_) => Err(failed("it did not answer")),
            Self::Failed(reason) => Err(failed(reason)),
        };
        match worker {
            Ok(worker) => *self = Self::Loaded(worker),
            Err(error) => {
                *self = Self::Failed(error.to_string());
                return Err(error);
            }
        }
        match self {
            Self::Loaded(worker) => Ok(worker),
            _ => Err(failed("it did not answer")),
        }
    }
}

fn failed(reason: impl fmt::Display) -> KernelError {
    KernelError::Iterator { reason: format!("{reason}") }
}

impl IterWorker {
    /// Starts a worker that loads the programs, and does not wait for it.
    fn begin(with_files: bool) -> Result<Self, KernelError> {
        kernel::check_privileges()?;
        if left_behind() >= LEFT_BEHIND_MAX {
            return Err(failed(format!("{LEFT_BEHIND_MAX} worker processes wait for sockets that do not answer")));
        }
        let own = std::process::id().to_string();
        let mut service = Service::start(&[WALK, &own]).map_err(failed)?;
        let request = serde_json::to_vec(&Request::Load { with_files }).map_err(failed)?;
        match service.begin(&request, LOADING) {
            Ok(()) => Ok(Self(Some(service))),
            Err(error) => {
                service.abandon();
                Err(failed(error))
            }
        }
    }

    fn loaded(mut self) -> Result<Self, KernelError> {
        self.answer(Service::finish)?;
        Ok(self)
    }

    /// See [`SocketIter::fd_refs`].
    fn fd_refs(&mut self) -> Result<Option<Vec<(u32, FdRef)>>, KernelError> {
        let holder = |(inode, process, descriptor)| (inode, FdRef { process, descriptor });
        match self.ask(&Request::FdRefs)?.0 {
            Response::FdRefs(fd_refs) => Ok(fd_refs.map(|all| all.into_iter().map(holder).collect())),
            _ => Ok(None),
        }
    }

    /// Reads the options of as many of these jobs as fit into one round: see [`SocketIter::read`].
    ///
    /// # Errors
    ///
    /// Fails if the worker does not answer, or if the kernel refuses the iterator.
    pub fn read<'a>(
        &mut self,
        jobs: impl ExactSizeIterator<Item = &'a Job>,
        namespaces: &[Namespace],
    ) -> Result<Outcomes, KernelError> {
        let mut numbers = std::collections::HashMap::new();
        let (mut lists, mut sent) = (Vec::new(), Vec::new());
        for job in jobs.take(SocketIter::JOBS_MAX) {
            let number = *numbers.entry(&job.assignments).or_insert_with(|| {
                lists.push(job.assignments.iter().map(assigned).collect());
                lists.len() - 1
            });
            sent.push((job.cookie, job.namespace, number));
        }
        self.outcomes(&Request::Read { namespaces: descriptors(namespaces), lists, jobs: sent })
    }

    /// Sets the options of the jobs that were read last: see [`SocketIter::set`].
    ///
    /// # Errors
    ///
    /// Fails if the worker does not answer, or if the kernel refuses the iterator.
    pub fn set(&mut self, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
        self.outcomes(&Request::Set { namespaces: descriptors(namespaces) })
    }

    fn outcomes(&mut self, request: &Request) -> Result<Outcomes, KernelError> {
        let (_, rest) = self.ask(request)?;
        Outcomes::from_bytes(&rest).ok_or_else(|| failed("its answer is cut off"))
    }

    fn ask(&mut self, request: &Request) -> Result<(Response, Vec<u8>), KernelError> {
        let request = serde_json::to_vec(request).map_err(failed)?;
        self.answer(|service| service.request(&request, VISIT))
    }

    /// Takes an answer. Abandons a worker that does not answer.
    fn answer(
        &mut self,
        ask: impl FnOnce(&mut Service) -> Result<Vec<u8>, crate::worker::JobError>,
    ) -> Result<(Response, Vec<u8>), KernelError> {
        let service = self.0.as_mut().ok_or_else(|| failed("it did not answer"))?;
        match ask(service) {
            Ok(bytes) => parse(&bytes),
            Err(error) => {
                self.end();
                Err(failed(error))
            }
        }
    }

    fn end(&mut self) {
        if let Some(service) = self.0.take() {
            service.abandon();
        }
    }
}

impl Drop for IterWorker {
    fn drop(&mut self) {
        self.end();
    }
}

fn descriptors(namespaces: &[Namespace]) -> Vec<i32> {
    namespaces.iter().map(Namespace::as_raw_fd).collect()
}

fn assigned(assignment: &Assignment) -> Assigned {
    let Assignment { key: OptionKey { level, name }, value, mask, is_text, is_doubled } = *assignment;
    ((level, name), value, mask, is_text, is_doubled)
}

fn assignment(((level, name), value, mask, is_text, is_doubled): Assigned) -> Assignment {
    Assignment { key: OptionKey { level, name }, value, mask, is_text, is_doubled }
}

/// Splits an answer into its line of JSON and the bytes after that.
fn parse(bytes: &[u8]) -> Result<(Response, Vec<u8>), KernelError> {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (line, rest) = bytes.split_at(end);
    match serde_json::from_slice(line).map_err(failed)? {
        Response::Failed(reason) => Err(failed(reason)),
        response => Ok((response, rest.get(1..).unwrap_or_default().to_vec())),
    }
}

/// Runs the worker: iterates for the agent that started this process, until that closes the connection.
///
/// # Errors
///
/// Fails if the connection fails.
pub fn work(agent: u32, output: impl io::Write) -> io::Result<()> {
    let mut iter = None;
    serve(output, |request| {
        let answered =
            serde_json::from_slice(request).map_err(failed).and_then(|request| answer(request, agent, &mut iter));
        let (response, outcomes) = answered.unwrap_or_else(|error| (Response::Failed(error.to_string()), None));
        let mut bytes = serde_json::to_vec(&response).unwrap_or_default();
        bytes.push(b'\n');
        bytes.extend(outcomes.iter().flat_map(Outcomes::to_bytes));
        bytes
    })
}

fn answer(
    request: Request,
    agent: u32,
    iter: &mut Option<SocketIter>,
) -> Result<(Response, Option<Outcomes>), KernelError> {
    if let Request::Load { with_files } = request {
        *iter = Some(SocketIter::load(with_files)?);
        return Ok((Response::Loaded, None));
    }
    let iter = iter.as_mut().ok_or_else(|| failed("it is not loaded"))?;
    let outcomes = match request {
        Request::Read { namespaces, lists, jobs } => {
            let lists: Vec<Vec<Assignment>> =
                lists.into_iter().map(|list| list.into_iter().map(assignment).collect()).collect();
            let job = |(cookie, namespace, list): &(u64, usize, usize)| Job {
                cookie: *cookie,
                namespace: *namespace,
                assignments: lists.get(*list).cloned().unwrap_or_default(),
            };
            let jobs: Vec<Job> = jobs.iter().map(job).collect();
            iter.read(jobs.iter(), &opened(agent, &namespaces)?)?
        }
        Request::Set { namespaces } => iter.set(&opened(agent, &namespaces)?)?,
        Request::FdRefs | Request::Load { .. } => {
            let fd_refs = iter.fd_refs()?;
            let holder = |(inode, FdRef { process, descriptor }): (u32, FdRef)| (inode, process, descriptor);
            return Ok((Response::FdRefs(fd_refs.map(|all| all.into_iter().map(holder).collect())), None));
        }
    };
    Ok((Response::Done, Some(outcomes)))
}

/// Opens the agent's file descriptors of network namespaces.
fn opened(agent: u32, namespaces: &[i32]) -> Result<Vec<Namespace>, KernelError> {
    namespaces
        .iter()
        .map(|descriptor| Namespace::at(&format!("/proc/{agent}/fd/{descriptor}")).map_err(failed))
        .collect()
}
