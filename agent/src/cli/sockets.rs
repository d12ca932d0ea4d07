//! The sockets of targets, as `ls` and `verify` look at them.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use abi::setting::Value;

use super::run::RunError;
use crate::{
    events::Task,
    host::{
        cgroup::{self, CgroupError, Mount, Names},
        container, process,
        socket::{self, Kind},
        survey::{Defaults, Found, Holder, Survey, SurveyError},
    },
    kernel::Target,
    live::{Listeners, Live, Owner, Told, Values, drift::Fresh},
    options::SocketOption,
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
    These(Vec<Target>),
}

impl Targets {
    /// These cgroups.
    pub(super) fn open(mount: &Mount, cgroups: &[PathBuf]) -> Result<Self, CgroupError> {
        if cgroups.is_empty() {
            return Ok(Self::All);
        }
        let open = |path: &PathBuf| mount.open(path).map(|cgroup| Target { cgroup, scope: 0 });
        Ok(Self::These(cgroups.iter().map(open).collect::<Result<_, _>>()?))
    }

    /// The scope of the sockets of a cgroup, named as the kernel does: that of the deepest target that it is in.
    fn scope(&self, cgroup: Option<&Path>) -> Option<usize> {
        match self {
            Self::All => Some(0),
            Self::These(targets) => {
                let around =
                    targets.iter().filter(|target| cgroup.is_some_and(|it| it.starts_with(&target.cgroup.name)));
                around.max_by_key(|target| target.cgroup.level).map(|target| target.scope)
            }
        }
    }
}

/// All sockets of the targets, to be looked into one by one.
pub(super) struct Sockets {
    survey: Survey,
    targets: Targets,
    names: Names,
    /// By network namespace.
    listeners: Vec<Listeners>,
    defaults: Defaults,
}

/// A socket that was looked into.
pub(super) struct Seen<'a> {
    pub(super) live: Live,
    /// Which policies govern it.
    pub(super) scope: usize,
    /// What it is to be compared with; `None` where it could not be taken.
    pub(super) fresh: Option<FreshBeside<'a>>,
    /// The socket itself; `None` likewise.
    pub(super) socket: Option<&'a OwnedFd>,
}

impl Sockets {
    pub(super) fn find(mount: Mount, targets: Targets) -> Result<Self, SurveyError> {
        process::raise_descriptor_limit();
        let survey = Survey::make(|home| targets.scope(Some(&Path::new("/").join(home))).is_some())?;
        let namespaces = survey.sockets.iter().map(|found| found.namespace + 1).max().unwrap_or_default();
        let of_namespace = |number| survey.sockets.iter().filter(move |found| found.namespace == number);
        let listeners = (0..namespaces).map(|number| Listeners::of(of_namespace(number).map(|found| &found.entry)));
        let listeners = listeners.collect();
        Ok(Self { survey, targets, names: Names::new(mount), listeners, defaults: Defaults::default() })
    }

    /// How many sockets there are, those of other cgroups included.
    pub(super) fn len(&self) -> usize {
        self.survey.sockets.len()
    }

    /// Processes that must not be looked into.
    pub(super) fn unread(&self) -> usize {
        self.survey.unread.len()
    }

    /// Looks into each of the targets' sockets. `wanted` are the options to read, by scope.
    pub(super) fn each<E>(
        &mut self,
        wanted: impl Fn(usize) -> Vec<&'static SocketOption>,
        mut see: impl FnMut(Seen<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { survey, targets, names, listeners, defaults } = self;
        for found in &survey.sockets {
            let cgroup = match (&found.home, found.entry.cgroup) {
                (Some(home), _) => Some(format!("/{}", home.display())),
                (None, id) => id.and_then(|id| names.name(id)).map(str::to_owned),
            };
            let Some(scope) = targets.scope(cgroup.as_deref().map(Path::new)) else { continue };
            let Some(facts) = found.entry.facts() else { continue };
            let (taken, refused) = match found.take() {
                Ok(taken) => (taken, None),
                Err(error) => (None, Some(error.to_string())),
            };
            let counted = taken.as_ref().and_then(|(_, socket)| socket::beginning(socket));
            let direction = listeners[found.namespace].direction(&found.entry, counted);
            let told = match (&taken, refused) {
                (Some((_, socket)), _) => Told::Values(socket::values(socket, &wanted(scope))),
                (None, Some(why)) => Told::Refused(why),
                (None, None) if survey.is_partial && found.entry.inode != 0 => {
                    Told::Refused("whoever has it must not be looked into".to_owned())
                }
                (None, None) => Told::Nobody,
            };
            let holder = taken.as_ref().map(|(holder, _)| *holder).or(found.holders.first().copied());
            let live = Live {
                entry: found.entry.clone(),
                facts: crate::policy::Socket { direction, ..facts },
                cgroup,
                owner: holder.map(|holder| owner(found, holder)),
                values: told,
            };
            let kind = taken.as_ref().and_then(|(_, socket)| Kind::of(socket));
            let fresh = kind.map(|kind| FreshBeside { survey, found, kind, defaults });
            see(Seen { live, scope, fresh, socket: taken.as_ref().map(|(_, socket)| socket) })?;
        }
        Ok(())
    }
}

fn owner(found: &Found, Holder { process, descriptor }: Holder) -> Owner {
    let cgroup = cgroup::of_process(process).map(|path| format!("/{}", path.display()));
    let container = cgroup.as_deref().and_then(container::of_cgroup);
    let others = found.holders.iter().filter(|other| other.process != process);
    Owner {
        task: Task {
            pid: process,
            tid: process,
            comm: process::name(process).unwrap_or_default(),
            exe: process::executable(process),
            cgroup,
            container,
        },
        descriptor,
        others: others.map(|other| (other.process, other.descriptor)).collect(),
    }
}

/// New sockets of a kind in the namespace of another.
pub(super) struct FreshBeside<'a> {
    survey: &'a Survey,
    found: &'a Found,
    kind: Kind,
    defaults: &'a mut Defaults,
}

impl Fresh for FreshBeside<'_> {
    fn values(&mut self) -> Option<&Values> {
        self.defaults.of(self.survey, self.found, self.kind)
    }

    fn after(&mut self, option: &SocketOption, value: Value) -> Option<Value> {
        self.defaults.after(self.survey, self.found, self.kind, option.key(), value)
    }
}
