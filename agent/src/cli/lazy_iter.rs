//! The programs that the kernel runs for each socket and for each file, in a process apart, loaded when they are wanted.
//!
//! The kernel takes the lock of each TCP socket that it visits (`bpf_iter_tcp_seq_show`, net/ipv4/tcp_ipv4.c), and the owner of a
//! socket can hold its lock for as long as they like: see `host/inspect`. The worker has programs and maps of its own, and none
//! that enforce anything.

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

/// The hidden command that is the worker.
pub(super) const WALK: &str = "walk-sockets";

/// With fewer files open on this host it takes less time to look at each of those of processes than to load the programs.
const WORTH_LOADING: u64 = 8 * 1024;

/// How long it takes at the most to load the programs, and to visit what there is.
const LOADING: Duration = Duration::from_secs(30);
const VISIT: Duration = Duration::from_secs(10);
/// Workers of any kind that were left behind. With more, none is started.
const LEFT_BEHIND_MAX: usize = 64;

/// The programs, as soon as they are wanted.
#[derive(Default)]
pub(super) enum LazyIter {
    #[default]
    Idle,
    /// Loaded beside whatever else is to be done, to tell who has sockets too.
    Coming(IterWorker),
    There(IterWorker),
    /// They do not answer.
    Gone(String),
}

/// The worker.
pub(super) struct IterWorker(Option<Service>);

#[derive(Serialize, Deserialize)]
enum Request {
    Load {
        names_holders: bool,
    },
    Holders,
    Look {
        /// The agent's descriptors of these.
        namespaces: Vec<i32>,
        /// Each once.
        lists: Vec<Vec<Assigned>>,
        /// By cookie, namespace and number of the list.
        jobs: Vec<(u64, usize, usize)>,
    },
    Set {
        namespaces: Vec<i32>,
    },
}

/// An [`Assignment`] between the processes.
type Assigned = ((i32, i32), Words, Words, u32, u32);

#[derive(Serialize, Deserialize)]
enum Response {
    Loaded,
    /// Each socket's inode number, process and descriptor.
    Holders(Option<Vec<(u32, u32, i32)>>),
    /// Outcomes follow, as bytes.
    Done,
    Failed(String),
}

impl LazyIter {
    /// Begins to load them, where there are so many files that they will be wanted.
    pub(super) fn begin() -> Self {
        let is_worth_it = process::open_files().is_some_and(|files| files >= WORTH_LOADING);
        if !is_worth_it {
            return Self::Idle;
        }
        IterWorker::begin(true).map_or_else(|error| Self::Gone(error.to_string()), Self::Coming)
    }

    /// Who has which sockets, if they were begun with.
    pub(super) fn holders(&mut self) -> Option<Vec<(u32, FdRef)>> {
        if matches!(self, Self::Idle) {
            return None;
        }
        let told = self.get().and_then(IterWorker::holders);
        told.unwrap_or_else(|error| {
            log::info!("{error}: who has sockets is looked up in /proc");
            None
        })
    }

    /// # Errors
    ///
    /// Where they cannot be loaded, or do not answer.
    pub(super) fn get(&mut self) -> Result<&mut IterWorker, KernelError> {
        let walking = match mem::take(self) {
            Self::Idle => IterWorker::begin(false).and_then(IterWorker::loaded),
            Self::Coming(walking) => walking.loaded(),
            Self::There(walking) if walking.0.is_some() => Ok(walking),
            Self::There(_) => Err(failed("it did not answer")),
            Self::Gone(reason) => Err(failed(reason)),
        };
        match walking {
            Ok(walking) => *self = Self::There(walking),
            Err(error) => {
                *self = Self::Gone(error.to_string());
                return Err(error);
            }
        }
        match self {
            Self::There(walking) => Ok(walking),
            _ => Err(failed("it did not answer")),
        }
    }
}

fn failed(reason: impl fmt::Display) -> KernelError {
    KernelError::Iterator { reason: format!("{reason}") }
}

impl IterWorker {
    /// Has the programs loaded, without waiting for it.
    fn begin(names_holders: bool) -> Result<Self, KernelError> {
        kernel::check_privileges()?;
        if left_behind() >= LEFT_BEHIND_MAX {
            return Err(failed(format!("{LEFT_BEHIND_MAX} worker processes wait for sockets that do not answer")));
        }
        let own = std::process::id().to_string();
        let mut service = Service::start(&[WALK, &own]).map_err(failed)?;
        let request = serde_json::to_vec(&Request::Load { names_holders }).map_err(failed)?;
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

    /// All descriptors of processes that are sockets: see [`SocketIter::fd_refs`].
    fn holders(&mut self) -> Result<Option<Vec<(u32, FdRef)>>, KernelError> {
        let holder = |(inode, process, descriptor)| (inode, FdRef { process, descriptor });
        match self.ask(&Request::Holders)?.0 {
            Response::Holders(told) => Ok(told.map(|all| all.into_iter().map(holder).collect())),
            _ => Ok(None),
        }
    }

    /// See [`SocketIter::read`].
    pub(super) fn look<'a>(
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
        self.outcomes(&Request::Look { namespaces: descriptors(namespaces), lists, jobs: sent })
    }

    /// See [`SocketIter::set`].
    pub(super) fn set(&mut self, namespaces: &[Namespace]) -> Result<Outcomes, KernelError> {
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

    /// Takes an answer. A worker that does not answer is left behind.
    fn answer(
        &mut self,
        ask: impl FnOnce(&mut Service) -> Result<Vec<u8>, crate::worker::JobError>,
    ) -> Result<(Response, Vec<u8>), KernelError> {
        let service = self.0.as_mut().ok_or_else(|| failed("it did not answer"))?;
        match ask(service) {
            Ok(bytes) => read(&bytes),
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

/// A line of JSON, and what follows it.
fn read(bytes: &[u8]) -> Result<(Response, Vec<u8>), KernelError> {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (line, rest) = bytes.split_at(end);
    match serde_json::from_slice(line).map_err(failed)? {
        Response::Failed(reason) => Err(failed(reason)),
        response => Ok((response, rest.get(1..).unwrap_or_default().to_vec())),
    }
}

/// Walks for the agent that started this process: the worker.
pub(super) fn work(agent: u32, output: impl io::Write) -> io::Result<()> {
    let mut walk = None;
    serve(output, |request| {
        let answered =
            serde_json::from_slice(request).map_err(failed).and_then(|request| answer(request, agent, &mut walk));
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
    walk: &mut Option<SocketIter>,
) -> Result<(Response, Option<Outcomes>), KernelError> {
    if let Request::Load { names_holders } = request {
        *walk = Some(SocketIter::load(names_holders)?);
        return Ok((Response::Loaded, None));
    }
    let walk = walk.as_mut().ok_or_else(|| failed("it is not loaded"))?;
    let outcomes = match request {
        Request::Look { namespaces, lists, jobs } => {
            let lists: Vec<Vec<Assignment>> =
                lists.into_iter().map(|list| list.into_iter().map(assignment).collect()).collect();
            let job = |(cookie, namespace, list): &(u64, usize, usize)| Job {
                cookie: *cookie,
                namespace: *namespace,
                assignments: lists.get(*list).cloned().unwrap_or_default(),
            };
            let jobs: Vec<Job> = jobs.iter().map(job).collect();
            walk.read(jobs.iter(), &opened(agent, &namespaces)?)?
        }
        Request::Set { namespaces } => walk.set(&opened(agent, &namespaces)?)?,
        Request::Holders | Request::Load { .. } => {
            let told = walk.fd_refs()?;
            let holder = |(inode, FdRef { process, descriptor }): (u32, FdRef)| (inode, process, descriptor);
            return Ok((Response::Holders(told.map(|all| all.into_iter().map(holder).collect())), None));
        }
    };
    Ok((Response::Done, Some(outcomes)))
}

/// Opens what the agent has at these descriptors.
fn opened(agent: u32, namespaces: &[i32]) -> Result<Vec<Namespace>, KernelError> {
    namespaces
        .iter()
        .map(|descriptor| Namespace::at(&format!("/proc/{agent}/fd/{descriptor}")).map_err(failed))
        .collect()
}
