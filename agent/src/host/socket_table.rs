//! Which sockets there are on this host, in every network namespace, whose they are, and what they have.
//!
//! What the kernel lists is found also where no process has it. What is neither bound nor connected the kernel does not list: it
//! is found with the process that has it, and taken to have been made in that process's cgroup.
//!
//! Sockets are looked into one by one, each for a moment: a process that closes one meanwhile has it closed a moment later. That
//! a descriptor still is what it was when the sockets were listed, the cookie tells, and before that the inode number: the
//! process may be gone by then, and its number another's.

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

/// The sockets that there are.
#[derive(Debug)]
pub struct SocketTable {
    /// In the order of processes and descriptors.
    pub sockets: Vec<SocketEntry>,
    namespaces: Vec<Namespace>,
    /// Processes of the wanted cgroups that must not be looked into: what else they have is not known.
    pub unread: HashSet<u32>,
    /// Whether there is any process that must not be looked into: it may have what nobody else has.
    pub is_partial: bool,
    /// Whether there is a network namespace whose sockets must not be listed.
    pub has_unlisted: bool,
}

#[derive(Clone, Debug)]
pub struct SocketEntry {
    pub entry: Entry,
    /// Index of the network namespaces.
    pub namespace: usize,
    /// Who has it, by process: none has what the kernel itself uses, or still or already keeps.
    pub holders: Vec<FdRef>,
    /// The cgroup of its process, of a socket that the kernel does not list.
    pub home: Option<PathBuf>,
}

/// A process that has a socket.
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

/// By inode number.
type FdRefs = HashMap<u32, Vec<FdRef>>;

fn note(holders: &mut FdRefs, inode: u32, holder: FdRef) {
    let of = holders.entry(inode).or_default();
    if of.iter().all(|other| other.process != holder.process) {
        of.push(holder);
    }
}

impl SocketTable {
    /// Looks for sockets. Of those that the kernel does not list, only in processes of cgroups that are `wanted`.
    ///
    /// `all_holders` may know of all processes' descriptors which socket each is, in the order of processes and descriptors.
    /// Otherwise they are looked at one by one.
    ///
    /// # Errors
    ///
    /// Where processes or sockets cannot be listed.
    pub fn read(
        wanted: impl Fn(&Path) -> bool,
        all_holders: impl FnOnce() -> Option<Vec<(u32, FdRef)>>,
        inspector: &mut Inspector,
    ) -> Result<Self, SurveyError> {
        let mut survey = Self {
            sockets: Vec::new(),
            namespaces: Vec::new(),
            unread: HashSet::new(),
            is_partial: false,
            has_unlisted: false,
        };
        let processes = process::all().map_err(SurveyError::Processes)?;
        fault::point("processes-listed");
        for process in &processes {
            let is_known = |id| survey.namespaces.iter().any(|namespace| namespace.id == id);
            let Some(id) = netns::id_of_process(*process).filter(|id| !is_known(*id)) else { continue };
            fault::point_for("namespace-found", id);
            if let Ok(namespace) = Namespace::of_process(*process) {
                survey.enter(namespace, inspector)?;
            }
        }
        // After that, so that what has come meanwhile is found with its process.
        let mut holders = FdRefs::new();
        match all_holders() {
            Some(all) => all.into_iter().for_each(|(inode, holder)| note(&mut holders, inode, holder)),
            None => processes.into_iter().for_each(|process| survey.visit(process, &mut holders, &wanted)),
        }
        fault::point("holders-listed");
        let listed: HashSet<u32> = survey.sockets.iter().map(|found| found.entry.inode).collect();
        for (inode, of) in holders.iter().filter(|(inode, _)| !listed.contains(inode)) {
            survey.add_unlisted(*inode, of, &wanted, inspector)?;
        }
        let mut seen = HashSet::new();
        survey.sockets.retain(|found| seen.insert(found.entry.cookie));
        for found in &mut survey.sockets {
            found.holders = holders.get(&found.entry.inode).cloned().unwrap_or_default();
        }
        survey.sockets.sort_by_key(SocketEntry::place);
        fault::point("sockets-listed");
        Ok(survey)
    }

    /// Notes which sockets a process has.
    fn visit(&mut self, process: u32, holders: &mut FdRefs, wanted: &impl Fn(&Path) -> bool) {
        match process::sockets(process) {
            Ok(sockets) => {
                for (descriptor, inode) in sockets {
                    note(holders, inode, FdRef { process, descriptor });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.is_partial = true;
                if cgroup::of_process(process).is_some_and(|home| wanted(&home)) {
                    self.unread.insert(process);
                }
            }
            // It is gone.
            Err(_) => {}
        }
    }

    /// Lists what is in a namespace; gives its index.
    fn enter(&mut self, namespace: Namespace, inspector: &mut Inspector) -> Result<usize, SurveyError> {
        if let Some(known) = self.namespaces.iter().position(|known| known.id == namespace.id) {
            return Ok(known);
        }
        fault::point_for("namespace-opened", namespace.id);
        let entries = inspector.list(&namespace).unwrap_or_else(|error| {
            // What there is in it is found with its processes, as far as these may be looked into. The inspector has noted it,
            // unless it may not be entered.
            log::debug!("cannot list the sockets of network namespace {}: {error}", namespace.id);
            self.has_unlisted = true;
            Vec::new()
        });
        let index = self.namespaces.len();
        self.namespaces.push(namespace);
        let found = |entry| SocketEntry { entry, namespace: index, holders: Vec::new(), home: None };
        self.sockets.extend(entries.into_iter().map(found));
        Ok(index)
    }

    /// Adds a socket that no list had, if policies are about it.
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
                // The inspector has noted what does not answer.
                Ok(None) | Err(_) => continue,
            };
            let Some(namespace) = namespace else { continue };
            // It may be one that no process is in, whose sockets are listed only now.
            let namespace = self.enter(namespace, inspector)?;
            self.sockets.push(SocketEntry { entry, namespace, holders: Vec::new(), home: Some(home) });
            return Ok(());
        }
        Ok(())
    }

    /// The network namespaces that sockets are in, by [`SocketEntry::namespace`].
    #[must_use]
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }
}

impl SocketEntry {
    /// Sockets are in the order of processes and descriptors; those that nobody has come last.
    fn place(&self) -> (u32, i32, u64) {
        let (process, descriptor) =
            self.holders.first().map_or((u32::MAX, 0), |holder| (holder.process, holder.descriptor));
        (process, descriptor, self.entry.cookie)
    }

    /// What the socket says of itself, and which process it was reached through; `None` where no process has it any more. `note` is asked
    /// about the process before: the socket's process had this number then.
    ///
    /// # Errors
    ///
    /// Where it must not be looked into, or does not answer.
    pub fn inspect_by<T>(
        &self,
        inspector: &mut Inspector,
        wanted: &[&'static SocketOption],
        mut note: impl FnMut(FdRef) -> T,
    ) -> Result<Option<(T, FdRef, Inspected)>, Refused<T>> {
        let mut refused = None;
        for holder in &self.holders {
            let noted = note(*holder);
            match inspector.inspect(*holder, self.entry.cookie, wanted) {
                Ok(Some(inspected)) => {
                    fault::point("socket-taken");
                    return Ok(Some((noted, *holder, inspected)));
                }
                Ok(None) => {}
                Err(source @ InspectError::Refused(_)) => refused = Some(Refused { by: noted, source }),
                // Nor would it to another that has it.
                Err(source) => return Err(Refused { by: noted, source }),
            }
        }
        refused.map_or(Ok(None), Err)
    }
}

/// A process does not let its socket be taken.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Refused<T> {
    /// What was noted of the process.
    pub by: T,
    pub source: InspectError,
}

/// What new sockets have, of each kind and network namespace, found as it is asked for.
#[derive(Debug, Default)]
pub struct Defaults {
    /// `None` where none can be made.
    fresh: HashMap<Place, Option<Values>>,
    after: HashMap<(Place, OptionKey, Value), Option<Value>>,
}

/// Index of a namespace, and what sockets there are made as.
type Place = (usize, Kind);

impl Defaults {
    /// What a new socket of a kind has in the namespace of another; `None` where none can be made.
    pub fn of(
        &mut self,
        survey: &SocketTable,
        found: &SocketEntry,
        kind: Kind,
        inspector: &mut Inspector,
    ) -> Option<&Values> {
        let open = || {
            let all: Vec<&'static SocketOption> = OPTIONS.iter().collect();
            let fresh = inspector.fresh(&survey.namespaces[found.namespace], kind, &all);
            let fresh =
                fresh.inspect_err(|error| log::debug!("no new socket to compare with, {kind:?}: {error}")).ok()?;
            let at_first = |(option, value)| (option, if is_set_at_creation(option) { zero(option) } else { value });
            Some(fresh.into_iter().map(at_first).collect())
        };
        self.fresh.entry((found.namespace, kind)).or_insert_with(open).as_ref()
    }

    /// What such a socket shows of an option after it was set to a value; `None` where that cannot be tried.
    pub fn after(
        &mut self,
        (survey, found): (&SocketTable, &SocketEntry),
        kind: Kind,
        key: OptionKey,
        value: Value,
        inspector: &mut Inspector,
    ) -> Option<Value> {
        let set = || inspector.fresh_after(&survey.namespaces[found.namespace], kind, key, &value);
        let asked = ((found.namespace, kind), key, value);
        *self.after.entry(asked).or_insert_with(set)
    }
}

/// Whether a program can have given the option to our own new socket: the kernel itself makes all of these 0.
fn is_set_at_creation(option: &'static SocketOption) -> bool {
    let is_given = |option: &SocketOption| {
        option.settable().is_some_and(|settable| settable.sites.contains(apply_point::SOCK_CREATE))
    };
    is_given(option) || option.other_names().any(is_given)
}

fn zero(option: &SocketOption) -> Value {
    Value::new([0; 2], if option.value.abi_kind() == kind::TEXT { 1 } else { size_of::<u32>() as u32 })
}
