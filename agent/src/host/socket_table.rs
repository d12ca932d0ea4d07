//! The sockets of this host, in all network namespaces, with the processes that have descriptors of them.
//!
//! A socket that the kernel lists is found even if no process has a descriptor of it. The kernel does not list sockets that are
//! neither bound nor connected. Such a socket is found through a process that has a descriptor of it. It is assumed to have
//! been created in the cgroup of this process.
//!
//! Sockets are inspected one by one, and each is open only for a short time, since an open descriptor delays the effect of the
//! owner's close(2). The inode number or the cookie shows whether a descriptor still refers to the socket that was listed. The
//! process may have ended since, and its id may have been reused.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
};

use abi::{
    apply_point,
    setting::{OptionKey, Value, kind},
};

use super::{
    cgroup,
    inspect::{InspectError, Inspected, Inspector},
    netns::{self, Namespace},
    process,
    socket::{Entry, Kind, Values},
};
use crate::{
    fault,
    options::{OPTIONS, SocketOption},
};

/// The sockets of this host.
#[derive(Debug)]
pub struct SocketTable {
    /// Sorted by process and descriptor.
    pub sockets: Vec<SocketEntry>,
    namespaces: Vec<Namespace>,
    /// The processes in wanted cgroups whose descriptors cannot be read (permission denied). These processes can have sockets
    /// that are missing here.
    pub unread: HashSet<u32>,
    /// Whether the descriptors of any process cannot be read (permission denied).
    pub is_partial: bool,
    /// Whether the sockets of any network namespace could not be listed.
    pub has_unlisted: bool,
}

#[derive(Clone, Debug)]
pub struct SocketEntry {
    pub entry: Entry,
    /// The index in [`SocketTable::namespaces()`].
    pub namespace: usize,
    /// One descriptor of each process that has the socket. Empty for sockets that the kernel uses itself, that are not accepted
    /// yet, or that are closed and not destroyed yet.
    pub holders: Vec<FdRef>,
    /// The cgroup of the process that has the socket, if the kernel does not list the socket.
    pub home: Option<PathBuf>,
}

/// A descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdRef {
    pub process: u32,
    pub descriptor: i32,
}

#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    #[error("cannot list the processes: {0}")]
    Processes(io::Error),
}

/// The descriptors of sockets, by inode number.
type FdRefs = HashMap<u32, Vec<FdRef>>;

/// Adds a descriptor, unless one of the same process is known already.
fn add_holder(holders: &mut FdRefs, inode: u32, holder: FdRef) {
    let known = holders.entry(inode).or_default();
    if known.iter().all(|other| other.process != holder.process) {
        known.push(holder);
    }
}

impl SocketTable {
    /// Lists the sockets of this host. Sockets that the kernel does not list are searched only in processes of `wanted`
    /// cgroups.
    ///
    /// `all_holders` can return the socket descriptors of all processes with their inode numbers, sorted by process and
    /// descriptor. If it returns `None`, `/proc` is read for each process.
    ///
    /// # Errors
    ///
    /// Fails if the processes cannot be listed.
    pub fn read(
        wanted: impl Fn(&Path) -> bool,
        all_holders: impl FnOnce() -> Option<Vec<(u32, FdRef)>>,
        inspector: &mut Inspector,
    ) -> Result<Self, SurveyError> {
        let mut table = Self {
            sockets: Vec::new(),
            namespaces: Vec::new(),
            unread: HashSet::new(),
            is_partial: false,
            has_unlisted: false,
        };
        let processes = process::all().map_err(SurveyError::Processes)?;
        fault::point("processes-listed");
        for process in &processes {
            let is_known = |id| table.namespaces.iter().any(|namespace| namespace.id == id);
            let Some(id) = netns::id_of_process(*process).filter(|id| !is_known(*id)) else { continue };
            fault::point_for("namespace-found", id);
            if let Ok(namespace) = Namespace::of_process(*process) {
                table.list(namespace, inspector)?;
            }
        }
        // Descriptors are read after the lists, so that a socket that was created in between is found through its process.
        let mut holders = FdRefs::new();
        match all_holders() {
            Some(all) => all.into_iter().for_each(|(inode, holder)| add_holder(&mut holders, inode, holder)),
            None => processes.into_iter().for_each(|process| table.read_holders(process, &mut holders, &wanted)),
        }
        fault::point("holders-listed");
        let listed: HashSet<u32> = table.sockets.iter().map(|socket| socket.entry.inode).collect();
        for (inode, fds) in holders.iter().filter(|(inode, _)| !listed.contains(inode)) {
            table.add_unlisted(*inode, fds, &wanted, inspector)?;
        }
        let mut cookies = HashSet::new();
        table.sockets.retain(|socket| cookies.insert(socket.entry.cookie));
        for socket in &mut table.sockets {
            socket.holders = holders.get(&socket.entry.inode).cloned().unwrap_or_default();
        }
        table.sockets.sort_by_key(SocketEntry::sort_key);
        fault::point("sockets-listed");
        Ok(table)
    }

    /// Adds the socket descriptors of a process to `holders`.
    fn read_holders(&mut self, process: u32, holders: &mut FdRefs, wanted: &impl Fn(&Path) -> bool) {
        match process::sockets(process) {
            Ok(sockets) => {
                for (descriptor, inode) in sockets {
                    add_holder(holders, inode, FdRef { process, descriptor });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.is_partial = true;
                if cgroup::of_process(process).is_some_and(|home| wanted(&home)) {
                    self.unread.insert(process);
                }
            }
            // The process has ended.
            Err(_) => {}
        }
    }

    /// Adds the sockets of a namespace, unless they are listed already. Returns the index of the namespace.
    fn list(&mut self, namespace: Namespace, inspector: &mut Inspector) -> Result<usize, SurveyError> {
        if let Some(known) = self.namespaces.iter().position(|known| known.id == namespace.id) {
            return Ok(known);
        }
        fault::point_for("namespace-opened", namespace.id);
        let entries = inspector.list(&namespace).unwrap_or_else(|error| {
            // The sockets of this namespace are found only through processes, as far as their descriptors can be read. The
            // inspector has recorded the namespace as skipped, unless permission was denied.
            log::debug!("cannot list the sockets of network namespace {}: {error}", namespace.id);
            self.has_unlisted = true;
            Vec::new()
        });
        let index = self.namespaces.len();
        self.namespaces.push(namespace);
        let socket = |entry| SocketEntry { entry, namespace: index, holders: Vec::new(), home: None };
        self.sockets.extend(entries.into_iter().map(socket));
        Ok(index)
    }

    /// Adds a socket that the kernel does not list, if a wanted cgroup contains a process that has it.
    fn add_unlisted(
        &mut self,
        inode: u32,
        holders: &[FdRef],
        wanted: &impl Fn(&Path) -> bool,
        inspector: &mut Inspector,
    ) -> Result<(), SurveyError> {
        for holder in holders {
            let Some(home) = cgroup::of_process(holder.process).filter(|home| wanted(home)) else { continue };
            fault::point("home-read");
            let (entry, namespace) = match inspector.describe(*holder, inode) {
                Ok(Some(described)) => described,
                Err(InspectError::Refused(_)) => {
                    self.unread.insert(holder.process);
                    continue;
                }
                // After a time-out, the inspector has recorded the socket as skipped.
                Ok(None) | Err(_) => continue,
            };
            let Some(namespace) = namespace else { continue };
            // A namespace that contains no process is found, and its sockets are listed, only now.
            let namespace = self.list(namespace, inspector)?;
            self.sockets.push(SocketEntry { entry, namespace, holders: Vec::new(), home: Some(home) });
            return Ok(());
        }
        Ok(())
    }

    /// Returns the network namespaces, by [`SocketEntry::namespace`].
    #[must_use]
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }
}

impl SocketEntry {
    /// Returns the process, the descriptor and the cookie. Sockets without a descriptor come last.
    fn sort_key(&self) -> (u32, i32, u64) {
        let (process, descriptor) =
            self.holders.first().map_or((u32::MAX, 0), |holder| (holder.process, holder.descriptor));
        (process, descriptor, self.entry.cookie)
    }

    /// Inspects the socket through one of its descriptors. Returns the facts, the descriptor, and the result of
    /// `describe_owner` for the process. Returns `None` if no process has the socket any more.
    ///
    /// `describe_owner` is called before each inspection: if the inspection succeeds, the process had the socket at that time,
    /// and its id was not reused.
    ///
    /// # Errors
    ///
    /// Fails if no descriptor can be used and permission was denied for one of them, or if a call times out.
    pub fn inspect_by<T>(
        &self,
        inspector: &mut Inspector,
        wanted: &[&'static SocketOption],
        mut describe_owner: impl FnMut(FdRef) -> T,
    ) -> Result<Option<(T, FdRef, Inspected)>, Refused<T>> {
        let mut refused = None;
        for holder in &self.holders {
            let owner = describe_owner(*holder);
            match inspector.inspect(*holder, self.entry.cookie, wanted) {
                Ok(Some(inspected)) => {
                    fault::point("socket-taken");
                    return Ok(Some((owner, *holder, inspected)));
                }
                Ok(None) => {}
                Err(source @ InspectError::Refused(_)) => refused = Some(Refused { by: owner, source }),
                // The socket would time out through the descriptor of another process too.
                Err(source) => return Err(Refused { by: owner, source }),
            }
        }
        refused.map_or(Ok(None), Err)
    }
}

/// The inspection of a socket failed.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Refused<T> {
    /// The description of the process whose descriptor was used.
    pub by: T,
    pub source: InspectError,
}

/// The options of new sockets by kind and network namespace, read when they are needed.
#[derive(Debug, Default)]
pub struct Defaults {
    /// The options of a new socket. `None`: no such socket can be created.
    new_sockets: HashMap<NamespaceKind, Option<Values>>,
    /// The value of an option after it was set to a value.
    after: HashMap<(NamespaceKind, OptionKey, Value), Option<Value>>,
}

/// The index of a namespace, and a kind of socket.
type NamespaceKind = (usize, Kind);

impl Defaults {
    /// Returns the options of a new socket of a kind, in the namespace of `socket`, as they are before a policy applies.
    /// Returns `None` if no such socket can be created.
    pub fn of(
        &mut self,
        table: &SocketTable,
        socket: &SocketEntry,
        kind: Kind,
        inspector: &mut Inspector,
    ) -> Option<&Values> {
        let read = || {
            let all: Vec<&'static SocketOption> = OPTIONS.iter().collect();
            let values = inspector.new_socket_values(&table.namespaces[socket.namespace], kind, &all);
            let values = values
                .inspect_err(|error| log::debug!("cannot create a socket to compare with ({kind:?}): {error}"))
                .ok()?;
            let initial = |(option, value)| (option, if is_set_at_creation(option) { zero(option) } else { value });
            Some(values.into_iter().map(initial).collect())
        };
        self.new_sockets.entry((socket.namespace, kind)).or_insert_with(read).as_ref()
    }

    /// Returns the value that getsockopt(2) returns on such a new socket after an option was set to `value`. Returns `None` if
    /// any of these calls fails.
    pub fn after(
        &mut self,
        (table, socket): (&SocketTable, &SocketEntry),
        kind: Kind,
        key: OptionKey,
        value: Value,
        inspector: &mut Inspector,
    ) -> Option<Value> {
        let set = || inspector.new_socket_value_after(&table.namespaces[socket.namespace], kind, key, &value);
        *self.after.entry(((socket.namespace, kind), key, value)).or_insert_with(set)
    }
}

/// Returns whether a BPF program can set the option on the agent's own new sockets. The kernel's default of each such option is
/// 0.
fn is_set_at_creation(option: &'static SocketOption) -> bool {
    let is_settable = |option: &SocketOption| {
        option.settable().is_some_and(|settable| settable.sites.contains(apply_point::SOCK_CREATE))
    };
    is_settable(option) || option.other_names().any(is_settable)
}

fn zero(option: &SocketOption) -> Value {
    Value::new([0; 2], if option.value.abi_kind() == kind::TEXT { 1 } else { size_of::<u32>() as u32 })
}
