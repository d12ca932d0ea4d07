//! Looks into sockets of other processes, from a process apart.
//!
//! The owner of a socket can hold its lock without limit: send(2) copies from memory of theirs while the kernel holds
//! the lock (`tcp_sendmsg_locked`, net/ipv4/tcp.c), and userfaultfd(2) or FUSE decide when that memory is there. getsockopt,
//! setsockopt and getsockname then wait for the lock where no signal wakes them (`__lock_sock`, net/core/sock.c). So a worker
//! process makes these calls, each with a deadline. A worker that does not answer is killed and left behind; it holds nothing
//! but that socket.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use abi::setting::{OptionKey, Value, Words};
use serde::{Deserialize, Serialize};

use super::{
    netns::Namespace,
    process, sock_diag,
    socket::{self, Entry, Kind, State, Values},
    socket_table::FdRef,
};
use crate::{
    options::{self, SocketOption},
    policy::model::Direction,
    skipped::{self, Skip},
    worker::{JobError, Service, left_behind, serve},
};

/// The hidden command that is the worker.
pub const INSPECT: &str = "inspect-sockets";

/// How long a worker has for one socket.
const TIME: Duration = Duration::from_secs(2);
/// The same after [`PATIENT`] sockets did not answer.
const SHORT_TIME: Duration = Duration::from_millis(300);
const PATIENT: usize = 3;
/// Sockets of one process that are waited for in vain. Its others are left out then.
const STALLS_PER_PROCESS: u32 = 2;
/// Workers that were killed and have not ended. With more, no socket is looked into.
const ABANDONED_MAX: usize = 64;

/// Why a socket was not looked into.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error("it does not answer: its owner holds its lock")]
    Stalled,
    #[error("its process has other sockets that do not answer")]
    StalledBefore,
    #[error("{ABANDONED_MAX} worker processes wait for sockets that do not answer")]
    TooManyStalled,
    #[error("no worker process: {0}")]
    Start(#[source] io::Error),
    #[error("{0}")]
    Worker(#[source] JobError),
    #[error("{0}")]
    Refused(#[source] io::Error),
}

/// What a socket says of itself.
#[derive(Debug)]
pub struct Inspected {
    pub kind: Option<Kind>,
    /// Which end began a connection, if that can be told.
    pub direction: Option<Direction>,
    pub values: Values,
}

type Number = (i32, i32);
type Read = (Number, Words, u32);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// What policies go by, of a socket that the kernel does not list.
    Describe { process: u32, descriptor: i32, inode: u32 },
    /// Reads these options of the socket.
    Inspect { process: u32, descriptor: i32, cookie: u64, wanted: Vec<Number> },
    /// What it has of an option, after that was set to a value if there is one.
    Option { process: u32, descriptor: i32, cookie: u64, option: Number, set: Option<(Words, u32)> },
    /// All sockets of a process.
    All { process: u32 },
    /// A part of what the kernel lists in the namespace that the agent has at a descriptor. The first one has it listed.
    List { namespace: i32, from: usize },
    /// What a new socket of a kind has there of these options.
    Fresh { namespace: i32, kind: Number3, wanted: Vec<Number> },
    /// What such a socket shows of an option after that was set.
    After { namespace: i32, kind: Number3, option: Number, set: (Words, u32) },
}

#[derive(Debug, Serialize, Deserialize)]
enum Response {
    /// The descriptor leads to another socket, or to none.
    Gone,
    /// By errno.
    Refused(i32),
    /// With the id of the network namespace, and the worker's descriptor of that.
    Described(Option<Listed>, Option<(u64, i32)>),
    Inspected {
        kind: Option<Number3>,
        outbound: Option<bool>,
        values: Vec<Read>,
    },
    Option {
        errno: i32,
        value: Option<(Words, u32)>,
    },
    All(Vec<(i32, Listed)>),
    /// A part of the list, and whether it is the last one.
    List(Vec<Listed>, bool),
}

/// Sockets that are listed in one response.
const LIST_PART: usize = 16 * 1024;
/// How long the kernel has to list those of a network namespace.
const LIST_TIME: Duration = Duration::from_secs(20);

type Number3 = (i32, i32, i32);

/// An [`Entry`] between the processes.
#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    family: i32,
    protocol: i32,
    state: u8,
    local: SocketAddr,
    remote: Option<SocketAddr>,
    inode: u32,
    cookie: u64,
    cgroup: Option<u64>,
}

impl Listed {
    fn of(entry: &Entry) -> Self {
        let Entry { family, protocol, state, local, remote, inode, cookie, cgroup } = *entry;
        Self { family, protocol, state: state.number(), local, remote, inode, cookie, cgroup }
    }

    fn entry(self) -> Entry {
        let Self { family, protocol, state, local, remote, inode, cookie, cgroup } = self;
        Entry { family, protocol, state: State::from_number(state), local, remote, inode, cookie, cgroup }
    }
}

/// Who looks into sockets.
#[derive(Default)]
pub struct Inspector {
    service: Option<Service>,
    /// By process: how many of its sockets did not answer.
    stalls: HashMap<u32, u32>,
    skipped: Vec<Skip>,
    /// Called for each worker that is started, before the worker looks into any socket.
    announce: Option<Box<dyn FnMut(u32) + Send>>,
}

impl Inspector {
    /// One that tells of each worker that it starts.
    #[must_use]
    pub fn announcing(announce: impl FnMut(u32) + Send + 'static) -> Self {
        let mut inspector = Self::default();
        inspector.announce = Some(Box::new(announce));
        inspector
    }

    /// Sockets that were not looked into, because they do not answer.
    #[must_use]
    pub fn skipped(&self) -> &[Skip] {
        &self.skipped
    }

    /// What the socket behind a descriptor says of itself, and its network namespace: `None` where the descriptor is another's
    /// by now, or policies are not about the socket.
    ///
    /// # Errors
    ///
    /// Where it must not be looked into, or does not answer.
    pub fn describe(&mut self, holder: FdRef, inode: u32) -> Result<Option<(Entry, Option<Namespace>)>, InspectError> {
        let FdRef { process, descriptor } = holder;
        match self.ask(holder, &Request::Describe { process, descriptor, inode })? {
            Response::Described(Some(listed), namespace) => {
                let namespace = namespace.and_then(|(_, descriptor)| self.namespace(descriptor));
                Ok(Some((Entry { inode, ..listed.entry() }, namespace)))
            }
            _ => Ok(None),
        }
    }

    /// Takes over a namespace that the worker has open.
    fn namespace(&self, descriptor: i32) -> Option<Namespace> {
        let worker = process::open(self.service.as_ref()?.id()).ok()?;
        process::take_descriptor(&worker, descriptor).and_then(Namespace::of_descriptor).ok()
    }

    /// Looks into a socket; `None` where the descriptor is another's by now.
    ///
    /// # Errors
    ///
    /// As of [`Self::describe`].
    pub fn inspect(
        &mut self,
        holder: FdRef,
        cookie: u64,
        wanted: &[&'static SocketOption],
    ) -> Result<Option<Inspected>, InspectError> {
        let FdRef { process, descriptor } = holder;
        let keys = wanted.iter().map(|option| number(option.key())).collect();
        let request = Request::Inspect { process, descriptor, cookie, wanted: keys };
        let Response::Inspected { kind, outbound, values } = self.ask(holder, &request)? else { return Ok(None) };
        Ok(Some(Inspected {
            kind: kind.map(kind_of),
            direction: outbound.map(|outbound| if outbound { Direction::Outbound } else { Direction::Inbound }),
            values: values.into_iter().filter_map(value_of).collect(),
        }))
    }

    /// Sets an option, if there is a value, and gives what the socket shows of it then.
    fn option(
        &mut self,
        holder: FdRef,
        cookie: u64,
        key: OptionKey,
        set: Option<&Value>,
    ) -> Result<Result<Option<Value>, io::Error>, InspectError> {
        let FdRef { process, descriptor } = holder;
        let set = set.map(|value| (value.words, value.len));
        let request = Request::Option { process, descriptor, cookie, option: number(key), set };
        Ok(match self.ask(holder, &request)? {
            Response::Option { errno: 0, value } => Ok(value.map(|(words, len)| Value::new(words, len))),
            Response::Option { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        })
    }

    /// The IPv4 and IPv6 sockets of a process, each with its descriptor there.
    ///
    /// # Errors
    ///
    /// Where there is no such process, it must not be looked into, or one of its sockets does not answer.
    pub fn all_of(&mut self, process: u32) -> Result<Vec<(i32, Entry)>, InspectError> {
        match self.ask(FdRef { process, descriptor: -1 }, &Request::All { process })? {
            Response::All(all) => {
                Ok(all.into_iter().map(|(descriptor, listed)| (descriptor, listed.entry())).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The sockets that the kernel lists in a network namespace.
    ///
    /// # Errors
    ///
    /// Where it must not be entered, or the kernel does not answer.
    pub fn list(&mut self, namespace: &Namespace) -> Result<Vec<Entry>, InspectError> {
        let mut entries = Vec::new();
        loop {
            let request = Request::List { namespace: namespace.as_raw_fd(), from: entries.len() };
            let response = self.request(&request, LIST_TIME).inspect_err(|error| {
                if !matches!(error, InspectError::Refused(source) if source.kind() == io::ErrorKind::PermissionDenied) {
                    let name = format!("network namespace {}", namespace.id);
                    self.skipped.push(Skip::new(skipped::Kind::Namespace, name, error.to_string()).transient_if(true));
                }
            })?;
            let Response::List(part, is_last) = response else { return Ok(entries) };
            let is_last = is_last || part.is_empty();
            entries.extend(part.into_iter().map(Listed::entry));
            if is_last {
                return Ok(entries);
            }
        }
    }

    /// What a new socket of a kind has in a namespace.
    ///
    /// # Errors
    ///
    /// Where none can be made.
    pub fn fresh(
        &mut self,
        namespace: &Namespace,
        kind: Kind,
        wanted: &[&'static SocketOption],
    ) -> Result<Values, InspectError> {
        let wanted = wanted.iter().map(|option| number(option.key())).collect();
        let request = Request::Fresh { namespace: namespace.as_raw_fd(), kind: numbers(kind), wanted };
        match self.request(&request, TIME)? {
            Response::Inspected { values, .. } => Ok(values.into_iter().filter_map(value_of).collect()),
            _ => Ok(Values::new()),
        }
    }

    /// What such a socket shows of an option after that was set to a value; `None` where that cannot be tried.
    pub fn fresh_after(&mut self, namespace: &Namespace, kind: Kind, key: OptionKey, value: &Value) -> Option<Value> {
        let (kind, set) = (numbers(kind), (value.words, value.len));
        let request = Request::After { namespace: namespace.as_raw_fd(), kind, option: number(key), set };
        match self.request(&request, TIME).ok()? {
            Response::Option { errno: 0, value } => value.map(|(words, len)| Value::new(words, len)),
            _ => None,
        }
    }

    /// Asks about a socket. One that does not answer is noted.
    fn ask(&mut self, about: FdRef, request: &Request) -> Result<Response, InspectError> {
        let FdRef { process, descriptor } = about;
        let has_stalled = self.stalls.get(&process).is_some_and(|stalls| *stalls >= STALLS_PER_PROCESS);
        let time = if self.stalls.values().sum::<u32>() as usize >= PATIENT { SHORT_TIME } else { TIME };
        let answered = if has_stalled { Err(InspectError::StalledBefore) } else { self.request(request, time) };
        if matches!(answered, Err(InspectError::Stalled)) {
            *self.stalls.entry(process).or_default() += 1;
        }
        answered.inspect_err(|error| {
            if !matches!(error, InspectError::Refused(_)) {
                let name = format!("descriptor {descriptor} of process {process}");
                self.skipped.push(Skip::new(skipped::Kind::Socket, name, error.to_string()).transient_if(true));
            }
        })
    }

    fn request(&mut self, request: &Request, time: Duration) -> Result<Response, InspectError> {
        let bytes = serde_json::to_vec(request).map_err(|error| InspectError::Start(error.into()))?;
        let answered = self.service()?.request(&bytes, time).map_err(|error| match error {
            JobError::TimedOut(_) => InspectError::Stalled,
            other => InspectError::Worker(other),
        });
        let parsed = answered.and_then(|bytes| {
            serde_json::from_slice(&bytes).map_err(|error| InspectError::Worker(JobError::Read(error.into())))
        });
        match parsed {
            Ok(Response::Refused(errno)) => Err(InspectError::Refused(io::Error::from_raw_os_error(errno))),
            Ok(response) => Ok(response),
            Err(error) => {
                self.end();
                Err(error)
            }
        }
    }

    fn end(&mut self) {
        if let Some(service) = self.service.take() {
            service.abandon();
        }
    }

    fn service(&mut self) -> Result<&mut Service, InspectError> {
        if self.service.is_none() {
            if left_behind() >= ABANDONED_MAX {
                return Err(InspectError::TooManyStalled);
            }
            let own = std::process::id().to_string();
            let service = Service::start(&[INSPECT, &own]).map_err(InspectError::Start)?;
            if let Some(announce) = &mut self.announce {
                announce(service.id());
            }
            self.service = Some(service);
        }
        self.service.as_mut().ok_or(InspectError::TooManyStalled)
    }
}

impl Drop for Inspector {
    fn drop(&mut self) {
        self.end();
    }
}

/// A socket, which is reached through a descriptor of its process each time.
pub struct Remote<'a> {
    pub inspector: &'a RefCell<Inspector>,
    pub holder: FdRef,
    pub cookie: u64,
}

impl Remote<'_> {
    /// What getsockopt shows of an option; `None` where it fails.
    pub fn value(&mut self, key: OptionKey) -> Option<Value> {
        self.inspector.borrow_mut().option(self.holder, self.cookie, key, None).ok()?.ok()?
    }

    /// The values of these options, as far as the socket has them and they can be read.
    ///
    /// # Errors
    ///
    /// Where the socket does not answer.
    pub fn values(&mut self, wanted: &[&'static SocketOption]) -> Result<Values, InspectError> {
        let inspected = self.inspector.borrow_mut().inspect(self.holder, self.cookie, wanted)?;
        Ok(inspected.map(|inspected| inspected.values).unwrap_or_default())
    }

    /// Sets an option; gives what getsockopt shows then.
    ///
    /// # Errors
    ///
    /// The kernel's; ETIMEDOUT where the socket does not answer.
    pub fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>> {
        let set = self.inspector.borrow_mut().option(self.holder, self.cookie, key, Some(value));
        set.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)))
    }
}

fn number(key: OptionKey) -> Number {
    (key.level, key.name)
}

fn numbers(Kind { family, form, protocol }: Kind) -> Number3 {
    (family, form, protocol)
}

fn kind_of((family, form, protocol): Number3) -> Kind {
    Kind { family, form, protocol }
}

fn value_of((key, words, len): Read) -> Option<(&'static SocketOption, Value)> {
    Some((options::by_key(key_of(key))?, Value::new(words, len)))
}

fn key_of((level, name): Number) -> OptionKey {
    OptionKey { level, name }
}

/// Looks into sockets for `agent`, the process that started this one: the worker.
///
/// # Errors
///
/// Where requests cannot be read or answered.
pub fn work(agent: u32, output: impl io::Write) -> io::Result<()> {
    let mut kept = WorkerState { agent, namespace: None, listed: Vec::new() };
    serve(output, |request| {
        let response = match serde_json::from_slice(request) {
            Ok(request) => answer(request, &mut kept),
            Err(_) => Response::Refused(libc::EINVAL),
        };
        serde_json::to_vec(&response).unwrap_or_default()
    })
}

/// What a worker keeps between requests.
struct WorkerState {
    agent: u32,
    /// Open until the agent has taken it.
    namespace: Option<Namespace>,
    /// Until the agent has all of it.
    listed: Vec<Entry>,
}

impl WorkerState {
    /// The namespace that the agent has at a descriptor.
    fn of_agent(&self, descriptor: i32) -> io::Result<Namespace> {
        Namespace::at(&format!("/proc/{}/fd/{descriptor}", self.agent))
    }

    fn list(&mut self, namespace: i32, from: usize) -> io::Result<Response> {
        if from == 0 {
            self.listed = self.of_agent(namespace)?.within(sock_diag::list).flatten()?;
        }
        let part = self.listed.iter().skip(from).take(LIST_PART).map(Listed::of).collect();
        let is_last = from + LIST_PART >= self.listed.len();
        if is_last {
            self.listed = Vec::new();
        }
        Ok(Response::List(part, is_last))
    }

    fn open_fresh(&self, namespace: i32, kind: Number3) -> io::Result<OwnedFd> {
        self.of_agent(namespace)?.within(|| kind_of(kind).open()).flatten()
    }
}

fn answer(request: Request, kept: &mut WorkerState) -> Response {
    let answered = match request {
        Request::Describe { process, descriptor, inode } => {
            describe(FdRef { process, descriptor }, inode, &mut kept.namespace)
        }
        Request::Inspect { process, descriptor, cookie, wanted } => {
            taken(FdRef { process, descriptor }, cookie).map(|taken| taken.map(|socket| inspected(&socket, &wanted)))
        }
        Request::Option { process, descriptor, cookie, option, set } => {
            let taken = taken(FdRef { process, descriptor }, cookie);
            taken.map(|taken| taken.map(|socket| option_of(&socket, key_of(option), set)))
        }
        Request::All { process } => all(process).map(|all| Some(Response::All(all))),
        Request::List { namespace, from } => kept.list(namespace, from).map(Some),
        Request::Fresh { namespace, kind, wanted } => {
            kept.open_fresh(namespace, kind).map(|socket| Some(inspected(&socket, &wanted)))
        }
        Request::After { namespace, kind, option, set } => {
            kept.open_fresh(namespace, kind).map(|socket| Some(option_of(&socket, key_of(option), Some(set))))
        }
    };
    match answered {
        Ok(response) => response.unwrap_or(Response::Gone),
        Err(error) => Response::Refused(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// What is behind a descriptor of a process; `None` where that is gone.
fn take(holder: FdRef) -> io::Result<Option<OwnedFd>> {
    let taken = process::open(holder.process).and_then(|handle| process::take_descriptor(&handle, holder.descriptor));
    match taken {
        Ok(taken) => Ok(Some(taken)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EBADF)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn taken(holder: FdRef, cookie: u64) -> io::Result<Option<OwnedFd>> {
    Ok(take(holder)?.filter(|taken| socket::cookie(taken) == Some(cookie)))
}

fn describe(holder: FdRef, inode: u32, kept: &mut Option<Namespace>) -> io::Result<Option<Response>> {
    // Otherwise it is closed, and something else has its descriptor, or its process is gone, and another has its number: that
    // one may be of any cgroup.
    let Some(taken) = take(holder)?.filter(|taken| socket::inode(taken) == Some(inode)) else { return Ok(None) };
    // Where that must not be told, most likely that of its process.
    *kept = Namespace::of_socket(&taken).or_else(|_| Namespace::of_process(holder.process)).ok();
    let namespace = kept.as_ref().map(|namespace| (namespace.id, namespace.as_raw_fd()));
    Ok(Some(Response::Described(socket::describe(&taken).as_ref().map(Listed::of), namespace)))
}

fn inspected(socket: &OwnedFd, wanted: &[Number]) -> Response {
    let wanted: Vec<_> = wanted.iter().filter_map(|key| options::by_key(key_of(*key))).collect();
    let values = socket::values(socket, &wanted).into_iter();
    Response::Inspected {
        kind: Kind::of(socket).map(numbers),
        outbound: socket::direction(socket).map(|direction| direction == Direction::Outbound),
        values: values.map(|(option, value)| (number(option.key()), value.words, value.len)).collect(),
    }
}

fn option_of(socket: &OwnedFd, key: OptionKey, set: Option<(Words, u32)>) -> Response {
    let set = set.map_or(Ok(()), |(words, len)| socket::set(socket, key, &Value::new(words, len)));
    let errno = set.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
    Response::Option { errno, value: socket::value(socket, key).map(|value| (value.words, value.len)) }
}

fn all(process: u32) -> io::Result<Vec<(i32, Listed)>> {
    let handle = process::open(process)?;
    let mut sockets = Vec::new();
    for (descriptor, _) in process::sockets(process)? {
        match process::take_descriptor(&handle, descriptor) {
            Ok(socket) => sockets.extend(socket::describe(&socket).map(|entry| (descriptor, Listed::of(&entry)))),
            // It was closed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}
