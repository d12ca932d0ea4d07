//! The sockets of targets, as `ls` and `verify` look at them.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use abi::setting::Value;

use super::run::RunError;
use crate::{
    escape,
    events::Task,
    host::{
        cgroup::{self, CgroupError, Mount, Names},
        container,
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

#[derive(Debug, thiserror::Error)]
pub(super) enum SocketsError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Survey(#[from] SurveyError),
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
}

impl From<CgroupError> for SocketsError {
    fn from(error: CgroupError) -> Self {
        Self::Run(error.into())
    }
}

/// Whose sockets to look at: those of these targets, or of everybody.
pub(super) enum Targets {
    All,
    These(Vec<TargetScope>),
}

/// A target's cgroup, by its name, and what holds there.
pub(super) struct TargetScope {
    cgroup: String,
    level: u32,
    scope: usize,
}

impl Targets {
    /// All of these cgroups; of everybody where there are none.
    pub(super) fn of(opened: &[Target]) -> Self {
        if opened.is_empty() { Self::All } else { Self::these(opened) }
    }

    /// All of these cgroups.
    pub(super) fn these(targets: &[Target]) -> Self {
        let governed = |Target { cgroup, scope }: &Target| {
            let (cgroup, level) = (cgroup.name.clone(), cgroup.level);
            TargetScope { cgroup, level, scope: *scope }
        };
        Self::These(targets.iter().map(governed).collect())
    }

    /// These cgroups, without policies.
    pub(super) fn open(mount: &Mount, cgroups: &[PathBuf]) -> Result<Vec<Target>, CgroupError> {
        cgroups.iter().map(|path| mount.open(path).map(|cgroup| Target { cgroup, scope: 0 })).collect()
    }

    /// The scope of the sockets of a cgroup, named as the kernel does: that of the deepest target that it is in.
    fn scope(&self, cgroup: Option<&Path>) -> Option<usize> {
        match self {
            Self::All => Some(0),
            Self::These(targets) => {
                let around = targets.iter().filter(|target| cgroup.is_some_and(|it| it.starts_with(&target.cgroup)));
                around.max_by_key(|target| target.level).map(|target| target.scope)
            }
        }
    }

    /// `None` where it is none of theirs, or nothing that policies are about.
    fn place(&self, found: &SocketEntry, names: &mut Names) -> Option<Placed> {
        let cgroup = match (&found.home, found.entry.cgroup) {
            (Some(home), _) => Some(format!("/{}", escape::plain(home))),
            (None, id) => id.and_then(|id| names.name(id)).map(|name| name.to_string()),
        };
        let scope = self.scope(cgroup.as_deref().map(Path::new))?;
        Some(Placed { cgroup, scope, facts: found.entry.facts()? })
    }
}

/// Where a socket belongs that is to be looked into.
struct Placed {
    cgroup: Option<String>,
    scope: usize,
    facts: Socket,
}

/// All sockets of the targets, to be looked into one by one.
pub(super) struct Sockets {
    survey: SocketTable,
    targets: Targets,
    names: Names,
    /// By network namespace.
    listeners: Vec<Listeners>,
    defaults: Defaults,
    /// The cookies of sockets that are not to be looked into.
    set_aside: HashSet<u64>,
    inspector: RefCell<Inspector>,
}

/// A socket that was looked into.
pub(super) struct InspectedSocket<'a> {
    pub(super) live: SocketSnapshot,
    /// Which policies govern it.
    pub(super) scope: usize,
    /// What it is to be compared with; `None` where it could not be taken.
    pub(super) fresh: Option<BaselineInNamespace<'a>>,
    /// The socket itself; `None` likewise.
    pub(super) socket: Option<Remote<'a>>,
}

impl Sockets {
    /// `all_holders`: see [`SocketTable::read`].
    pub(super) fn find(
        mount: Mount,
        targets: Targets,
        all_holders: impl FnOnce() -> Option<Vec<(u32, FdRef)>>,
        mut inspector: Inspector,
    ) -> Result<Self, SurveyError> {
        process::raise_descriptor_limit();
        let is_wanted = |home: &Path| targets.scope(Some(&Path::new("/").join(home))).is_some();
        let survey = SocketTable::read(is_wanted, all_holders, &mut inspector)?;
        let mut listeners: Vec<Vec<&Entry>> = vec![Vec::new(); survey.namespaces().len()];
        for found in &survey.sockets {
            if found.entry.state == State::Listening {
                listeners[found.namespace].push(&found.entry);
            }
        }
        let listeners = listeners.into_iter().map(Listeners::of).collect();
        Ok(Self {
            survey,
            targets,
            names: Names::new(mount),
            listeners,
            defaults: Defaults::default(),
            set_aside: HashSet::new(),
            inspector: RefCell::new(inspector),
        })
    }

    /// How many sockets there are to be looked into.
    pub(super) fn len(&mut self) -> usize {
        let Self { survey, targets, names, .. } = self;
        survey.sockets.iter().filter(|found| targets.place(found, names).is_some()).count()
    }

    /// Sockets that do not answer.
    pub(super) fn skipped(&self) -> Vec<Skip> {
        self.inspector.borrow().skipped().to_vec()
    }

    /// Processes that must not be looked into.
    pub(super) fn unread(&self) -> usize {
        self.survey.unread.len()
    }

    /// The network namespaces that sockets are in.
    pub(super) fn namespaces(&self) -> &[Namespace] {
        self.survey.namespaces()
    }

    /// Has [`Self::each`] leave out a socket.
    pub(super) fn set_aside(&mut self, cookie: u64) {
        self.set_aside.insert(cookie);
    }

    /// The targets' TCP sockets that listen or are connected, without looking into them: each with its scope, and the number of
    /// its network namespace.
    pub(super) fn listed_tcp(&mut self) -> Vec<(usize, usize, SocketSnapshot)> {
        let Self { survey, targets, names, listeners, .. } = self;
        // A process that has many is asked once.
        let mut tasks = HashMap::new();
        let mut task = |process| Rc::clone(tasks.entry(process).or_insert_with(|| task(process)));
        let lasts = |state| matches!(state, State::Listening | State::Established | State::SynSent | State::CloseWait);
        let mut listed = Vec::new();
        for found in &survey.sockets {
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

    /// Looks into each of the targets' sockets. `wanted` are the options to read, by scope.
    pub(super) fn each<E>(
        &mut self,
        wanted: impl Fn(usize) -> Vec<&'static SocketOption>,
        mut see: impl FnMut(InspectedSocket<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { survey, targets, names, listeners, defaults, set_aside, inspector } = self;
        let inspector = &*inspector;
        for found in survey.sockets.iter().filter(|found| !set_aside.contains(&found.entry.cookie)) {
            let Some(Placed { cgroup, scope, facts }) = targets.place(found, names) else { continue };
            let inspected =
                found.inspect_by(&mut inspector.borrow_mut(), &wanted(scope), |holder| owner(found, holder, task));
            // Nobody has one that cannot be taken, unless it was refused.
            let (owner, taken, refused) = match inspected {
                Ok(Some((owner, holder, inspected))) => (Some(owner), Some((holder, inspected)), None),
                Ok(None) => (None, None, None),
                Err(refused) => (Some(refused.by), None, Some(refused.source.to_string())),
            };
            let counted = taken.as_ref().and_then(|(_, inspected)| inspected.direction);
            let direction = listeners[found.namespace].direction(&found.entry, counted);
            let (reached, told) = match (taken, refused) {
                (Some((holder, Inspected { kind, values, .. })), _) => {
                    (Some((holder, kind)), OptionRead::Values(values))
                }
                (None, Some(why)) => (None, OptionRead::Denied(why)),
                // One that somebody had a moment ago has been closed.
                (None, None) if survey.is_partial && found.entry.inode != 0 && found.holders.is_empty() => {
                    (None, OptionRead::Denied("no process that has it can be inspected".to_owned()))
                }
                (None, None) => (None, OptionRead::NoFd),
            };
            let live = SocketSnapshot {
                entry: found.entry.clone(),
                facts: Socket { direction, ..facts },
                cgroup,
                owner,
                values: told,
            };
            let kind = reached.and_then(|(_, kind)| kind);
            let fresh = kind.map(|kind| BaselineInNamespace { survey, found, kind, defaults, inspector });
            let socket = reached.map(|(holder, _)| {
                let cookie = found.entry.cookie;
                Remote { inspector, holder, cookie }
            });
            see(InspectedSocket { live, scope, fresh, socket })?;
        }
        Ok(())
    }
}

/// Who has a socket; `task` is asked about the process.
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

/// New sockets of a kind in the namespace of another.
pub(super) struct BaselineInNamespace<'a> {
    survey: &'a SocketTable,
    found: &'a SocketEntry,
    kind: Kind,
    defaults: &'a mut Defaults,
    inspector: &'a RefCell<Inspector>,
}

impl Baseline for BaselineInNamespace<'_> {
    fn values(&mut self) -> Option<&Values> {
        self.defaults.of(self.survey, self.found, self.kind, &mut self.inspector.borrow_mut())
    }

    fn after(&mut self, option: &SocketOption, value: Value) -> Option<Value> {
        let beside = (self.survey, self.found);
        self.defaults.after(beside, self.kind, option.key(), value, &mut self.inspector.borrow_mut())
    }
}
