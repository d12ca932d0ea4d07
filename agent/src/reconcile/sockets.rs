//! The live sockets of targets, for `ls`, `verify` and `apply`.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap, HashSet},
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use abi::setting::{OptionKey, Value};

use super::SocketHandle;
use crate::{
    container, escape,
    events::Task,
    host::{
        cgroup::{self, CgroupError, Mount, Names},
        inspect::{Inspected, Inspector, Remote},
        netns::Namespace,
        process,
        socket::{Entry, Kind, State},
        socket_table::{Defaults, FdRef, SocketEntry, SocketTable, SurveyError},
    },
    kernel::Target,
    live::{Listeners, OptionRead, Owner, SocketSnapshot, Values, drift::Baseline},
    options::SocketOption,
    policy::Socket,
    skipped::Skip,
};

/// The sockets to inspect.
pub enum Selection {
    /// All sockets of the host.
    All,
    /// The sockets of these targets.
    Targets(Vec<TargetScope>),
}

/// A target: the name of its cgroup, and the index of its policies.
pub struct TargetScope {
    cgroup: String,
    level: u32,
    scope: usize,
    /// Whether the sockets of the target are selected. The sockets of a target do not belong to a target above it.
    is_selected: bool,
}

impl Selection {
    /// Selects the sockets of these targets, or all sockets if there is no target.
    #[must_use]
    pub fn all_or(targets: &[Target]) -> Self {
        if targets.is_empty() { Self::All } else { Self::of(targets) }
    }

    /// Selects the sockets of these targets.
    #[must_use]
    pub fn of(targets: &[Target]) -> Self {
        Self::of_cgroups(targets, |_| true)
    }

    /// Selects the sockets of those of these targets whose cgroup ids are in `cgroups`.
    #[must_use]
    pub fn among(targets: &[Target], cgroups: &BTreeSet<u64>) -> Self {
        Self::of_cgroups(targets, |cgroup| cgroups.contains(&cgroup))
    }

    fn of_cgroups(targets: &[Target], is_selected: impl Fn(u64) -> bool) -> Self {
        let governed = |Target { cgroup, scope, .. }: &Target| TargetScope {
            cgroup: cgroup.name.clone(),
            level: cgroup.level,
            scope: *scope,
            is_selected: is_selected(cgroup.id),
        };
        Self::Targets(targets.iter().map(governed).collect())
    }

    /// Opens these cgroups as targets without policies.
    ///
    /// # Errors
    ///
    /// Fails if a cgroup cannot be opened.
    pub fn open(mount: &Mount, cgroups: &[PathBuf]) -> Result<Vec<Target>, CgroupError> {
        cgroups
            .iter()
            .map(|path| mount.open(path).map(|cgroup| Target { cgroup, scope: 0, is_boundary: false }))
            .collect()
    }

    /// Returns the scope of the sockets of a cgroup: that of the deepest target that contains the cgroup. `None`: that target
    /// is not selected, or no target contains the cgroup.
    fn scope(&self, cgroup: Option<&Path>) -> Option<usize> {
        match self {
            Self::All => Some(0),
            Self::Targets(targets) => {
                let around = targets.iter().filter(|target| cgroup.is_some_and(|it| it.starts_with(&target.cgroup)));
                around.max_by_key(|target| target.level).filter(|target| target.is_selected).map(|target| target.scope)
            }
        }
    }

    /// Returns `None` if the socket is not selected, or is of a kind that policies do not govern.
    fn place(&self, found: &SocketEntry, names: &mut Names) -> Option<Placed> {
        let cgroup = match (&found.home, found.entry.cgroup) {
            (Some(home), _) => Some(format!("/{}", escape::plain(home))),
            (None, id) => id.and_then(|id| names.name(id)).map(|name| name.to_string()),
        };
        let scope = self.scope(cgroup.as_deref().map(Path::new))?;
        Some(Placed { cgroup, scope, facts: found.entry.facts()? })
    }
}

/// A selected socket.
struct Placed {
    cgroup: Option<String>,
    scope: usize,
    facts: Socket,
}

/// The selected sockets.
pub struct Sockets {
    table: SocketTable,
    targets: Selection,
    names: Names,
    /// By network namespace.
    listeners: Vec<Listeners>,
    defaults: Defaults,
    /// The cookies of sockets that [`Self::each`] leaves out.
    set_aside: HashSet<u64>,
    inspector: RefCell<Inspector>,
}

/// A socket whose options were read, if that was possible.
pub struct InspectedSocket<'a> {
    pub live: SocketSnapshot,
    /// The index of the policies that govern the socket.
    pub scope: usize,
    /// A new socket of the same kind. `None`: no descriptor of the socket could be duplicated.
    pub fresh: Option<BaselineInNamespace<'a>>,
    /// The socket itself. `None`: no descriptor of the socket could be duplicated.
    pub socket: Option<Remote<'a>>,
}

impl Sockets {
    /// Finds the selected sockets. `all_holders`: see [`SocketTable::read`].
    ///
    /// # Errors
    ///
    /// Fails if the sockets of this host cannot be listed.
    pub fn find(
        mount: Mount,
        targets: Selection,
        all_holders: impl FnOnce() -> Option<Vec<(u32, FdRef)>>,
        mut inspector: Inspector,
    ) -> Result<Self, SurveyError> {
        process::raise_descriptor_limit();
        let is_selected = |home: &Path| targets.scope(Some(&Path::new("/").join(home))).is_some();
        let table = SocketTable::read(is_selected, all_holders, &mut inspector)?;
        let mut listeners: Vec<Vec<&Entry>> = vec![Vec::new(); table.namespaces().len()];
        for found in &table.sockets {
            if found.entry.state == State::Listening {
                listeners[found.namespace].push(&found.entry);
            }
        }
        let listeners = listeners.into_iter().map(Listeners::of).collect();
        Ok(Self {
            table,
            targets,
            names: Names::new(mount),
            listeners,
            defaults: Defaults::default(),
            set_aside: HashSet::new(),
            inspector: RefCell::new(inspector),
        })
    }

    /// Returns the socket with this cookie as `verify` describes it: the cgroup in which it was created, and its direction.
    /// Returns `None` if the kernel lists no such socket.
    pub fn find_by_cookie(mut self, cookie: u64) -> Option<SocketSnapshot> {
        self.table.sockets.retain(|found| found.entry.cookie == cookie);
        let mut snapshot = None;
        let taken = self.each(
            |_| Vec::new(),
            |inspected| {
                snapshot = Some(inspected.live);
                Ok::<(), Infallible>(())
            },
        );
        match taken {
            Ok(()) => snapshot,
        }
    }

    /// Returns the number of selected sockets.
    pub fn count(&mut self) -> usize {
        let Self { table, targets, names, .. } = self;
        table.sockets.iter().filter(|found| targets.place(found, names).is_some()).count()
    }

    /// Returns the sockets that did not answer in time.
    pub fn skipped(&self) -> Vec<Skip> {
        self.inspector.borrow().skipped().to_vec()
    }

    /// Returns the number of processes that this process may not inspect.
    pub fn unread(&self) -> usize {
        self.table.unread.len()
    }

    /// Returns the network namespaces of the sockets.
    pub fn namespaces(&self) -> &[Namespace] {
        self.table.namespaces()
    }

    /// Makes [`Self::each`] leave out a socket.
    pub fn set_aside(&mut self, cookie: u64) {
        self.set_aside.insert(cookie);
    }

    /// Returns the selected TCP sockets that listen or are connected, without their options. Each has its scope and the index of
    /// its network namespace.
    pub fn listed_tcp(&mut self) -> Vec<(usize, usize, SocketSnapshot)> {
        let Self { table, targets, names, listeners, .. } = self;
        // A process that has many sockets is read once.
        let mut tasks = HashMap::new();
        let mut task = |process| Rc::clone(tasks.entry(process).or_insert_with(|| task(process)));
        let lasts = |state| matches!(state, State::Listening | State::Established | State::SynSent | State::CloseWait);
        let mut listed = Vec::new();
        for found in &table.sockets {
            let entry = &found.entry;
            if entry.protocol != libc::IPPROTO_TCP || !lasts(entry.state) {
                continue;
            }
            let Some(Placed { cgroup, scope, facts }) = targets.place(found, names) else { continue };
            let direction = listeners[found.namespace].direction(entry, None);
            let live = SocketSnapshot {
                entry: entry.clone(),
                facts: Socket { direction, ..facts },
                cgroup,
                owner: found.holders.first().map(|holder| owner(found, *holder, &mut task)),
                values: OptionRead::NoFd,
            };
            listed.push((scope, found.namespace, live));
        }
        listed
    }

    /// Inspects each selected socket. `wanted` returns the options to read, by scope.
    ///
    /// # Errors
    ///
    /// Returns the first error of `see`.
    pub fn each<E>(
        &mut self,
        wanted: impl Fn(usize) -> Vec<&'static SocketOption>,
        mut see: impl FnMut(InspectedSocket<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { table, targets, names, listeners, defaults, set_aside, inspector } = self;
        let inspector = &*inspector;
        for found in table.sockets.iter().filter(|found| !set_aside.contains(&found.entry.cookie)) {
            let Some(Placed { cgroup, scope, facts }) = targets.place(found, names) else { continue };
            let inspected =
                found.inspect_by(&mut inspector.borrow_mut(), &wanted(scope), |holder| owner(found, holder, task));
            // `Ok(None)`: no process has the socket any more.
            let (owner, taken, refused) = match inspected {
                Ok(Some((owner, holder, inspected))) => (Some(owner), Some((holder, inspected)), None),
                Ok(None) => (None, None, None),
                Err(refused) => (Some(refused.by), None, Some(refused.source.to_string())),
            };
            let counted = taken.as_ref().and_then(|(_, inspected)| inspected.direction);
            let direction = listeners[found.namespace].direction(&found.entry, counted);
            let (reached, read) = match (taken, refused) {
                (Some((holder, Inspected { kind, values, .. })), _) => {
                    (Some((holder, kind)), OptionRead::Values(values))
                }
                (None, Some(why)) => (None, OptionRead::Denied(why)),
                // A socket whose process was found a moment ago has been closed.
                (None, None) if table.is_partial && found.entry.inode != 0 && found.holders.is_empty() => {
                    (None, OptionRead::Denied("no process that has the socket can be inspected".to_owned()))
                }
                (None, None) => (None, OptionRead::NoFd),
            };
            let live = SocketSnapshot {
                entry: found.entry.clone(),
                facts: Socket { direction, ..facts },
                cgroup,
                owner,
                values: read,
            };
            let kind = reached.and_then(|(_, kind)| kind);
            let fresh = kind.map(|kind| BaselineInNamespace { table, found, kind, defaults, inspector });
            let socket = reached.map(|(holder, _)| {
                let cookie = found.entry.cookie;
                Remote { inspector, holder, cookie }
            });
            see(InspectedSocket { live, scope, fresh, socket })?;
        }
        Ok(())
    }
}

/// Returns the owner of a socket. `task` reads the process.
fn owner(found: &SocketEntry, FdRef { process, descriptor }: FdRef, task: impl FnOnce(u32) -> Rc<Task>) -> Owner {
    let others = found.holders.iter().filter(|other| other.process != process);
    Owner { task: task(process), descriptor, others: others.map(|other| (other.process, other.descriptor)).collect() }
}

fn task(process: u32) -> Rc<Task> {
    let cgroup = cgroup::of_process(process).map(|path| format!("/{}", escape::plain(&path)));
    let container = cgroup.as_deref().and_then(container::of_cgroup);
    Rc::new(Task {
        pid: process,
        tid: process,
        comm: process::name(process).unwrap_or_default(),
        exe: process::executable(process),
        cgroup,
        container,
    })
}

/// A new socket of the same kind as another one, in the same network namespace.
pub struct BaselineInNamespace<'a> {
    table: &'a SocketTable,
    found: &'a SocketEntry,
    kind: Kind,
    defaults: &'a mut Defaults,
    inspector: &'a RefCell<Inspector>,
}

impl Baseline for BaselineInNamespace<'_> {
    fn values(&mut self) -> Option<&Values> {
        self.defaults.of(self.table, self.found, self.kind, &mut self.inspector.borrow_mut())
    }

    fn after(&mut self, option: &SocketOption, value: Value) -> Option<Value> {
        let beside = (self.table, self.found);
        self.defaults.after(beside, self.kind, option.key(), value, &mut self.inspector.borrow_mut())
    }
}

impl SocketHandle for Remote<'_> {
    fn value(&mut self, key: OptionKey) -> Option<Value> {
        Self::value(self, key)
    }

    fn values(&mut self, wanted: &[&'static SocketOption]) -> Option<Values> {
        Self::values(self, wanted).ok()
    }

    fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>> {
        Self::set(self, key, value)
    }
}
