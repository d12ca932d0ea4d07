//! Reads and sets options of sockets of other processes, in a worker process.
//!
//! The owner of a socket can hold the socket's lock for any time. send(2) copies from the owner's memory while the kernel holds
//! the lock (`tcp_sendmsg_locked`, net/ipv4/tcp.c). userfaultfd(2) or FUSE can delay the access to this memory. Then
//! getsockopt(2), setsockopt(2) and getsockname(2) wait for the lock in an uninterruptible sleep (`__lock_sock`,
//! net/core/sock.c). Therefore a worker process makes these calls, each with a deadline. A worker that misses the deadline is
//! killed and abandoned. It holds no other resource than that socket.

use std::{
    any::Any,
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

/// The hidden command that runs this binary as the worker.
pub const INSPECT: &str = "inspect-sockets";

/// The deadline of a worker for one socket.
const SOCKET_TIME: Duration = Duration::from_secs(2);
/// The deadline after [`STALLS_BEFORE_SHORT_TIME`] sockets have timed out.
const SHORT_SOCKET_TIME: Duration = Duration::from_millis(300);
const STALLS_BEFORE_SHORT_TIME: usize = 3;
/// After this number of time-outs on sockets of one process, the other sockets of the process are skipped.
const STALLS_PER_PROCESS: u32 = 2;
/// The maximum number of workers that were killed and have not ended. At this number, no more sockets are inspected.
const ABANDONED_MAX: usize = 64;

/// The reason why a socket was not inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error("a call on the socket timed out: the owner of a socket can hold the socket's lock")]
    Stalled,
    #[error("calls on other sockets of the same process timed out")]
    StalledBefore,
    #[error("{ABANDONED_MAX} worker processes hang in calls on sockets")]
    TooManyStalled,
    #[error("cannot start a worker process: {0}")]
    Start(#[source] io::Error),
    #[error("{0}")]
    Worker(#[source] JobError),
    #[error("{0}")]
    Refused(#[source] io::Error),
}

/// The facts that were read from a socket.
#[derive(Debug)]
pub struct Inspected {
    pub kind: Option<Kind>,
    /// The direction of a connection, if it is known.
    pub direction: Option<Direction>,
    pub values: Values,
}

/// The level and the name of an option.
type RawKey = (i32, i32);
/// An option, and the words and the length of its value.
type RawValue = (RawKey, Words, u32);
/// The arguments of socket(2): family, type and protocol.
type RawKind = (i32, i32, i32);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Describes a socket that the kernel does not list, for matching by policies.
    Describe { process: u32, descriptor: i32, inode: u32 },
    /// Reads these options of a socket.
    Inspect { process: u32, descriptor: i32, cookie: u64, wanted: Vec<RawKey> },
    /// Sets an option if there is a value, and reads the option.
    Option { process: u32, descriptor: i32, cookie: u64, option: RawKey, set: Option<(Words, u32)> },
    /// Describes all sockets of a process.
    All { process: u32 },
    /// Returns a part of the kernel's list of sockets in a network namespace. `namespace` is a descriptor of the agent. The
    /// request for the first part makes the kernel list the sockets.
    List { namespace: i32, from: usize },
    /// Reads these options of a new socket of a kind in the namespace.
    NewSocket { namespace: i32, kind: RawKind, wanted: Vec<RawKey> },
    /// Sets an option of a new socket of a kind in the namespace, and reads the option.
    NewSocketAfter { namespace: i32, kind: RawKind, option: RawKey, set: (Words, u32) },
}

#[derive(Debug, Serialize, Deserialize)]
enum Response {
    /// The descriptor is closed, or refers to another file now.
    Gone,
    /// The call failed with this errno.
    Refused(i32),
    /// The description, the id of the network namespace, and the worker's descriptor of this namespace.
    Described(Option<Listed>, Option<(u64, i32)>),
    Inspected {
        kind: Option<RawKind>,
        outbound: Option<bool>,
        values: Vec<RawValue>,
    },
    Option {
        errno: i32,
        value: Option<(Words, u32)>,
    },
    All(Vec<(i32, Listed)>),
    /// A part of the list, and whether this part is the last one.
    List(Vec<Listed>, bool),
}

/// The maximum number of sockets in one response.
const LIST_PART: usize = 16 * 1024;
/// The deadline for listing the sockets of a network namespace.
const LIST_TIME: Duration = Duration::from_secs(20);

/// An [`Entry`] in the messages between the agent and a worker.
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

/// Inspects sockets through a worker process, which it starts when it is needed.
#[derive(Default)]
pub struct Inspector {
    service: Option<Service>,
    /// The number of sockets that timed out, by process.
    stalls: HashMap<u32, u32>,
    skipped: Vec<Skip>,
    /// Called with the process id of each worker that is started, before the worker inspects any socket.
    announce: Option<Announce>,
    /// What `announce` returned for the current worker.
    announced: Option<Box<dyn Any + Send>>,
}

type Announce = Box<dyn FnMut(u32) -> Box<dyn Any + Send> + Send>;

impl Inspector {
    /// Returns an inspector that calls `announce` with the process id of each worker that it starts, and keeps the result until the
    /// worker is abandoned.
    #[must_use]
    pub fn announcing(announce: impl FnMut(u32) -> Box<dyn Any + Send> + Send + 'static) -> Self {
        let mut inspector = Self::default();
        inspector.announce = Some(Box::new(announce));
        inspector
    }

    /// Returns the sockets and namespaces that were skipped because a call timed out or the worker failed.
    #[must_use]
    pub fn skipped(&self) -> &[Skip] {
        &self.skipped
    }

    /// Describes the socket at a descriptor of a process, and opens its network namespace. Returns `None` if the descriptor
    /// refers to another file now, or if policies do not apply to this kind of socket.
    ///
    /// # Errors
    ///
    /// Fails if permission is denied, or if the call times out.
    pub fn describe(&mut self, holder: FdRef, inode: u32) -> Result<Option<(Entry, Option<Namespace>)>, InspectError> {
        let FdRef { process, descriptor } = holder;
        match self.request_for(holder, &Request::Describe { process, descriptor, inode })? {
            Response::Described(Some(listed), namespace) => {
                let namespace = namespace.and_then(|(_, descriptor)| self.namespace(descriptor));
                Ok(Some((Entry { inode, ..listed.entry() }, namespace)))
            }
            _ => Ok(None),
        }
    }

    /// Duplicates a descriptor of a namespace from the worker into this process.
    fn namespace(&self, descriptor: i32) -> Option<Namespace> {
        let worker = process::open(self.service.as_ref()?.id()).ok()?;
        process::take_descriptor(&worker, descriptor).and_then(Namespace::of_descriptor).ok()
    }

    /// Reads the wanted options of a socket. Returns `None` if the descriptor refers to another file now.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::describe`] does.
    pub fn inspect(
        &mut self,
        holder: FdRef,
        cookie: u64,
        wanted: &[&'static SocketOption],
    ) -> Result<Option<Inspected>, InspectError> {
        let FdRef { process, descriptor } = holder;
        let keys = wanted.iter().map(|option| raw_key(option.key())).collect();
        let request = Request::Inspect { process, descriptor, cookie, wanted: keys };
        let Response::Inspected { kind, outbound, values } = self.request_for(holder, &request)? else {
            return Ok(None);
        };
        Ok(Some(Inspected {
            kind: kind.map(kind_of),
            direction: outbound.map(|outbound| if outbound { Direction::Outbound } else { Direction::Inbound }),
            values: values.into_iter().filter_map(value_of).collect(),
        }))
    }

    /// Sets an option if there is a value, and returns the value that getsockopt(2) then returns.
    fn option(
        &mut self,
        holder: FdRef,
        cookie: u64,
        key: OptionKey,
        set: Option<&Value>,
    ) -> Result<Result<Option<Value>, io::Error>, InspectError> {
        let FdRef { process, descriptor } = holder;
        let set = set.map(|value| (value.words, value.len));
        let request = Request::Option { process, descriptor, cookie, option: raw_key(key), set };
        Ok(match self.request_for(holder, &request)? {
            Response::Option { errno: 0, value } => Ok(value.map(|(words, len)| Value::new(words, len))),
            Response::Option { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        })
    }

    /// Returns the IPv4 and IPv6 sockets of a process, each with its descriptor in that process.
    ///
    /// # Errors
    ///
    /// Fails if the process does not exist, if permission is denied, or if a call on one of its sockets times out.
    pub fn all_of(&mut self, process: u32) -> Result<Vec<(i32, Entry)>, InspectError> {
        match self.request_for(FdRef { process, descriptor: -1 }, &Request::All { process })? {
            Response::All(all) => {
                Ok(all.into_iter().map(|(descriptor, listed)| (descriptor, listed.entry())).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Returns the sockets that the kernel lists in a network namespace.
    ///
    /// # Errors
    ///
    /// Fails if the namespace cannot be entered, or if the kernel does not list the sockets in time.
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

    /// Returns the wanted options of a new socket of a kind in a namespace.
    ///
    /// # Errors
    ///
    /// Fails if no such socket can be created.
    pub fn new_socket_values(
        &mut self,
        namespace: &Namespace,
        kind: Kind,
        wanted: &[&'static SocketOption],
    ) -> Result<Values, InspectError> {
        let wanted = wanted.iter().map(|option| raw_key(option.key())).collect();
        let request = Request::NewSocket { namespace: namespace.as_raw_fd(), kind: raw_kind(kind), wanted };
        match self.request(&request, SOCKET_TIME)? {
            Response::Inspected { values, .. } => Ok(values.into_iter().filter_map(value_of).collect()),
            _ => Ok(Values::new()),
        }
    }

    /// Sets an option of a new socket of a kind in a namespace, and returns the value that getsockopt(2) then returns. Returns
    /// `None` if any of these calls fails.
    pub fn new_socket_value_after(
        &mut self,
        namespace: &Namespace,
        kind: Kind,
        key: OptionKey,
        value: &Value,
    ) -> Option<Value> {
        let (kind, set) = (raw_kind(kind), (value.words, value.len));
        let request = Request::NewSocketAfter { namespace: namespace.as_raw_fd(), kind, option: raw_key(key), set };
        match self.request(&request, SOCKET_TIME).ok()? {
            Response::Option { errno: 0, value } => value.map(|(words, len)| Value::new(words, len)),
            _ => None,
        }
    }

    /// Sends a request about a socket. If it fails, records the socket as skipped, except for an error that the kernel
    /// returned.
    fn request_for(&mut self, socket: FdRef, request: &Request) -> Result<Response, InspectError> {
        let FdRef { process, descriptor } = socket;
        let has_stalled = self.stalls.get(&process).is_some_and(|stalls| *stalls >= STALLS_PER_PROCESS);
        let stalls = self.stalls.values().sum::<u32>() as usize;
        let time = if stalls >= STALLS_BEFORE_SHORT_TIME { SHORT_SOCKET_TIME } else { SOCKET_TIME };
        let result = if has_stalled { Err(InspectError::StalledBefore) } else { self.request(request, time) };
        if matches!(result, Err(InspectError::Stalled)) {
            *self.stalls.entry(process).or_default() += 1;
        }
        result.inspect_err(|error| {
            if !matches!(error, InspectError::Refused(_)) {
                let name = format!("descriptor {descriptor} of process {process}");
                self.skipped.push(Skip::new(skipped::Kind::Socket, name, error.to_string()).transient_if(true));
            }
        })
    }

    fn request(&mut self, request: &Request, time: Duration) -> Result<Response, InspectError> {
        let bytes = serde_json::to_vec(request).map_err(|error| InspectError::Start(error.into()))?;
        let response = self.service()?.request(&bytes, time).map_err(|error| match error {
            JobError::TimedOut(_) => InspectError::Stalled,
            other => InspectError::Worker(other),
        });
        let parsed = response.and_then(|bytes| {
            serde_json::from_slice(&bytes).map_err(|error| InspectError::Worker(JobError::Read(error.into())))
        });
        match parsed {
            Ok(Response::Refused(errno)) => Err(InspectError::Refused(io::Error::from_raw_os_error(errno))),
            Ok(response) => Ok(response),
            Err(error) => {
                self.abandon_worker();
                Err(error)
            }
        }
    }

    fn abandon_worker(&mut self) {
        if let Some(service) = self.service.take() {
            service.abandon();
        }
        self.announced = None;
    }

    fn service(&mut self) -> Result<&mut Service, InspectError> {
        if self.service.is_none() {
            if left_behind() >= ABANDONED_MAX {
                return Err(InspectError::TooManyStalled);
            }
            let own = std::process::id().to_string();
            let service = Service::start(&[INSPECT, &own]).map_err(InspectError::Start)?;
            if let Some(announce) = &mut self.announce {
                self.announced = Some(announce(service.id()));
            }
            self.service = Some(service);
        }
        self.service.as_mut().ok_or(InspectError::TooManyStalled)
    }
}

impl Drop for Inspector {
    fn drop(&mut self) {
        self.abandon_worker();
    }
}

/// A socket of another process, which a worker opens for each call through a descriptor of that process.
pub struct Remote<'a> {
    pub inspector: &'a RefCell<Inspector>,
    pub holder: FdRef,
    pub cookie: u64,
}

impl Remote<'_> {
    /// Returns the value of an option, or `None` if it cannot be read.
    pub fn value(&mut self, key: OptionKey) -> Option<Value> {
        self.inspector.borrow_mut().option(self.holder, self.cookie, key, None).ok()?.ok()?
    }

    /// Returns the values of these options. Leaves out options that cannot be read.
    ///
    /// # Errors
    ///
    /// Fails if permission is denied, or if the call times out.
    pub fn values(&mut self, wanted: &[&'static SocketOption]) -> Result<Values, InspectError> {
        let inspected = self.inspector.borrow_mut().inspect(self.holder, self.cookie, wanted)?;
        Ok(inspected.map(|inspected| inspected.values).unwrap_or_default())
    }

    /// Sets an option, and returns the value that getsockopt(2) then returns.
    ///
    /// # Errors
    ///
    /// Fails as setsockopt(2) does, and with ETIMEDOUT if the socket cannot be inspected.
    pub fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>> {
        let set = self.inspector.borrow_mut().option(self.holder, self.cookie, key, Some(value));
        set.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)))
    }
}

fn raw_key(key: OptionKey) -> RawKey {
    (key.level, key.name)
}

fn raw_kind(Kind { family, form, protocol }: Kind) -> RawKind {
    (family, form, protocol)
}

fn kind_of((family, form, protocol): RawKind) -> Kind {
    Kind { family, form, protocol }
}

fn value_of((key, words, len): RawValue) -> Option<(&'static SocketOption, Value)> {
    Some((options::by_key(key_of(key))?, Value::new(words, len)))
}

fn key_of((level, name): RawKey) -> OptionKey {
    OptionKey { level, name }
}

/// Runs the worker: inspects sockets for `agent`, the process that started this one.
///
/// # Errors
///
/// Fails if a request cannot be read, or a response cannot be written.
pub fn work(agent: u32, output: impl io::Write) -> io::Result<()> {
    let mut state = WorkerState { agent, namespace: None, listed: Vec::new() };
    serve(output, |request| {
        let response = match serde_json::from_slice(request) {
            Ok(request) => respond(request, &mut state),
            Err(_) => Response::Refused(libc::EINVAL),
        };
        serde_json::to_vec(&response).unwrap_or_default()
    })
}

/// The state that a worker keeps between requests.
struct WorkerState {
    agent: u32,
    /// The namespace of the last described socket. Kept open until the next such request, so that the agent can duplicate it.
    namespace: Option<Namespace>,
    /// The listed sockets. Kept until the agent has received the last part.
    listed: Vec<Entry>,
}

impl WorkerState {
    /// Opens the namespace at a descriptor of the agent.
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

    fn new_socket(&self, namespace: i32, kind: RawKind) -> io::Result<OwnedFd> {
        self.of_agent(namespace)?.within(|| kind_of(kind).open()).flatten()
    }
}

fn respond(request: Request, state: &mut WorkerState) -> Response {
    let result = match request {
        Request::Describe { process, descriptor, inode } => {
            describe(FdRef { process, descriptor }, inode, &mut state.namespace)
        }
        Request::Inspect { process, descriptor, cookie, wanted } => {
            let socket = duplicate_socket(FdRef { process, descriptor }, cookie);
            socket.map(|socket| socket.map(|socket| read_options(&socket, &wanted)))
        }
        Request::Option { process, descriptor, cookie, option, set } => {
            let socket = duplicate_socket(FdRef { process, descriptor }, cookie);
            socket.map(|socket| socket.map(|socket| set_and_read(&socket, key_of(option), set)))
        }
        Request::All { process } => describe_all(process).map(|all| Some(Response::All(all))),
        Request::List { namespace, from } => state.list(namespace, from).map(Some),
        Request::NewSocket { namespace, kind, wanted } => {
            state.new_socket(namespace, kind).map(|socket| Some(read_options(&socket, &wanted)))
        }
        Request::NewSocketAfter { namespace, kind, option, set } => {
            state.new_socket(namespace, kind).map(|socket| Some(set_and_read(&socket, key_of(option), Some(set))))
        }
    };
    match result {
        Ok(response) => response.unwrap_or(Response::Gone),
        Err(error) => Response::Refused(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Duplicates a descriptor of a process into this process. Returns `None` if the process or the descriptor does not exist any
/// more.
fn duplicate(holder: FdRef) -> io::Result<Option<OwnedFd>> {
    let duplicated =
        process::open(holder.process).and_then(|handle| process::take_descriptor(&handle, holder.descriptor));
    match duplicated {
        Ok(duplicated) => Ok(Some(duplicated)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EBADF)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Duplicates a descriptor if it still refers to the socket with this cookie.
fn duplicate_socket(holder: FdRef, cookie: u64) -> io::Result<Option<OwnedFd>> {
    Ok(duplicate(holder)?.filter(|socket| socket::cookie(socket) == Some(cookie)))
}

fn describe(holder: FdRef, inode: u32, opened: &mut Option<Namespace>) -> io::Result<Option<Response>> {
    // If the inode number differs, the descriptor or the process id was reused since the sockets were listed. The other process
    // can be in any cgroup.
    let Some(socket) = duplicate(holder)?.filter(|file| socket::inode(file) == Some(inode)) else { return Ok(None) };
    // If the namespace of the socket is not available, the namespace of its process is the most likely one.
    *opened = Namespace::of_socket(&socket).or_else(|_| Namespace::of_process(holder.process)).ok();
    let namespace = opened.as_ref().map(|namespace| (namespace.id, namespace.as_raw_fd()));
    Ok(Some(Response::Described(socket::describe(&socket).as_ref().map(Listed::of), namespace)))
}

fn read_options(socket: &OwnedFd, wanted: &[RawKey]) -> Response {
    let wanted: Vec<_> = wanted.iter().filter_map(|key| options::by_key(key_of(*key))).collect();
    let values = socket::values(socket, &wanted).into_iter();
    Response::Inspected {
        kind: Kind::of(socket).map(raw_kind),
        outbound: socket::direction(socket).map(|direction| direction == Direction::Outbound),
        values: values.map(|(option, value)| (raw_key(option.key()), value.words, value.len)).collect(),
    }
}

fn set_and_read(socket: &OwnedFd, key: OptionKey, set: Option<(Words, u32)>) -> Response {
    let result = set.map_or(Ok(()), |(words, len)| socket::set(socket, key, &Value::new(words, len)));
    let errno = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
    Response::Option { errno, value: socket::value(socket, key).map(|value| (value.words, value.len)) }
}

fn describe_all(process: u32) -> io::Result<Vec<(i32, Listed)>> {
    let handle = process::open(process)?;
    let mut sockets = Vec::new();
    for (descriptor, _) in process::sockets(process)? {
        match process::take_descriptor(&handle, descriptor) {
            Ok(socket) => sockets.extend(socket::describe(&socket).map(|entry| (descriptor, Listed::of(&entry)))),
            // The descriptor was closed after it was listed.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}
