//! Instances: a running sockpolicy, or the persistent policies that one has left, and how other processes find them.
//!
//! An instance has a name. In `/run/sockpolicy` it has a lock file, which the agent locks while it runs, and a record of the
//! policies in force. The record contains the text of the policies, so that another agent or `status` makes the same tables
//! with the same code.
//!
//! Invariants: the record is written before its policies are enabled, so that it includes all policies in force. An instance
//! writes a cgroup as its target only after it has checked that the cgroup belongs to no other instance. No other instance can
//! write in between.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};
use serde::{Deserialize, Serialize};

use crate::{
    compile::{CompileError, Desired, compile_in_force},
    coverage::{OtherInstance, Stack},
    escape::Escape,
    fault,
    host::private::{PrivateDir, PrivateError},
    kernel::{self, KernelError, MapIds, Pins, is_instance_name},
    policy::{Policy, PolicyErrors, model::Mode},
    report::SavedCounters,
    skipped::SkippedList,
    sources::Texts,
};

/// The directory of the files of all instances, and its parent.
const PARENT: &str = "/run";
const DIR: &str = "sockpolicy";
/// Number of attempts to take a lock that is held, and the pause between them. A process that inspects an instance holds its
/// lock for a moment.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("{}: {source}", path.escaped())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "cannot start instance `{name}`: it already runs as process {pid}\n  help: stop that process first (kill {pid}), or \
         choose another name with --instance"
    )]
    Running { name: String, pid: String },
    #[error(
        "cgroup {} is already a target of instance `{}`, which {holder}\n  help: stop that instance first ({}), or put all \
         policies for this cgroup into one instance",
        cgroup.escaped(), name.escaped(), remedy.escaped()
    )]
    Governed { cgroup: String, name: String, holder: String, remedy: String },
    #[error(
        "cannot start instance `{name}`: it has persistent policies in force\n  help: take them over with --persist, remove them \
         (sockpolicy detach --instance {name}), or choose another name with --instance"
    )]
    Pinned { name: String },
    #[error("cannot use `{}` as the name of an instance\n  help: use 1 to 64 letters, digits, `-` and `_`", .0.escaped())]
    Name(String),
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("{0}")]
    Private(#[from] PrivateError),
}

/// What an instance has in force, or will have in a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of sockpolicy that wrote the record.
    pub version: String,
    /// Whether the policies persist after the agent has exited.
    pub persists: bool,
    pub maps: MapIds,
    #[serde(default)]
    pub unread: RingOverflow,
    /// The generations that may be in force, the latest last. The kernel's configuration decides which one is.
    pub generations: Vec<Generation>,
    /// Retired generations, the latest last. The ring buffer may still contain their events.
    #[serde(default)]
    pub retired: Vec<Generation>,
    /// The counters of settings when the generations were enabled.
    #[serde(default)]
    pub counted: Vec<SavedCounters>,
    /// The objects that the instance cannot handle.
    #[serde(default)]
    pub skipped: SkippedList,
    /// The last reload of the agent.
    #[serde(default)]
    pub reload: Option<Reload>,
}

/// The result of a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// RFC 3339, in UTC.
    pub time: String,
    /// Why the policies were not replaced.
    pub refused: Option<String>,
}

/// The number of events that found the ring buffer full. Those that came without an agent are counted separately, because
/// nobody read the buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingOverflow {
    /// Events that came without an agent, before the agent of this record started.
    before: u64,
    /// All events up to the agent's last update.
    counted: u64,
}

impl RingOverflow {
    /// Returns the value for an agent that starts when the total is `all`, after the agent of the record `previous`, if any.
    #[must_use]
    pub fn at_start(all: u64, previous: Option<Self>) -> Self {
        let before = previous.map_or(all, |previous| previous.of(all, false));
        Self { before, counted: all }
    }

    /// Returns the value for a running agent when the total is `all`.
    #[must_use]
    pub fn counted(self, all: u64) -> Self {
        Self { counted: all, ..self }
    }

    /// Returns how many of `all` events came without an agent.
    #[must_use]
    pub fn of(self, all: u64, is_running: bool) -> u64 {
        let Self { before, counted } = self;
        before + if is_running { 0 } else { all.saturating_sub(counted) }
    }
}

impl Record {
    /// Returns the names of the target cgroups.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.generations.iter().flat_map(|generation| &generation.targets).map(|(name, _)| name.as_str())
    }
}

/// Policies that are or were in force together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub number: u32,
    #[serde(flatten)]
    pub files: Files,
    /// Names of cgroups, each with the index of its stack.
    pub targets: Vec<(String, usize)>,
    /// Names of cgroups that are targets of other instances below these targets, each with the index of its stack.
    #[serde(default)]
    pub boundaries: Vec<(String, usize)>,
    /// The ids of the target cgroups, by name. A cgroup that is created again has another id.
    #[serde(default)]
    pub cgroup_ids: BTreeMap<String, u64>,
    /// Whether the audit judges calls instead of the hooks.
    #[serde(default)]
    pub audit_judges: bool,
}

/// The text of policies, and how they were enabled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    #[serde(rename = "files")]
    pub texts: Vec<Text>,
    /// Whether the policies are a dry run, whatever their `mode` is.
    pub dry_run: bool,
    /// Indices of the policies of `texts`, followed by those of `others`.
    pub stacks: Vec<Stack>,
    /// The files of other instances, whose policies come first on deeper targets.
    #[serde(default)]
    pub others: Vec<OtherFiles>,
}

/// The policy files of another instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherFiles {
    pub instance: String,
    pub files: Vec<Text>,
}

impl Files {
    #[must_use]
    pub fn new(texts: &Texts, dry_run: bool, stacks: &[Stack], others: &[Other]) -> Self {
        let text = |(path, text): (&Path, &str)| Text { path: path.to_owned(), text: text.to_owned() };
        let others = others.iter().map(|other| OtherFiles { instance: other.name.clone(), files: other.texts.clone() });
        Self { texts: texts.files().map(text).collect(), dry_run, stacks: stacks.to_vec(), others: others.collect() }
    }
}

/// A policy file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    pub path: PathBuf,
    pub text: String,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Policy(#[from] PolicyErrors),
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl Generation {
    /// Parses the policies again, without those of other instances.
    ///
    /// # Errors
    ///
    /// Fails if this build does not accept them.
    pub fn policies(&self) -> Result<Vec<Policy>, PolicyErrors> {
        parsed(&self.files.texts)
    }

    /// Compiles the policies again.
    ///
    /// # Errors
    ///
    /// Fails if this build does not accept the policies or cannot compile them.
    pub fn desired(&self) -> Result<Desired, RecordError> {
        let mut policies = self.policies()?;
        for OtherFiles { instance, files } in &self.files.others {
            policies.extend(parsed(files)?.iter().map(|policy| policy.freed(instance)));
        }
        let mut desired = compile_in_force(&policies, &self.files.stacks, self.files.dry_run)?;
        kernel::leave_out_absent_hooks(&mut desired);
        if self.audit_judges {
            desired.judge_by_audit();
        }
        Ok(desired)
    }
}

fn parsed(texts: &[Text]) -> Result<Vec<Policy>, PolicyErrors> {
    let files = texts.iter().map(|Text { path, text }| (path.clone(), text.clone()));
    Ok(Texts::of(files).policies()?.0)
}

/// Another instance, as its record has it: what it enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    pub name: String,
    pub texts: Vec<Text>,
    stacks: Vec<Stack>,
    /// Names of cgroups, each with the index of its stack.
    targets: Vec<(String, usize)>,
}

impl Other {
    /// Returns the latest policies of an instance; `None` if the instance enforces none.
    fn of(status: InstanceStatus) -> Option<Self> {
        let InstanceStatus { name, record, .. } = status;
        let Generation { files, targets, .. } = record?.generations.pop()?;
        let Files { texts, dry_run, stacks, others: _ } = files;
        (!dry_run).then_some(Self { name, texts, stacks, targets })
    }

    /// Returns the names of the target cgroups.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.targets.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the instance with its policies as rules that leave their options free. Policies that are a dry run decide nothing,
    /// and are in no stack. An instance whose policies this build does not accept has no targets.
    #[must_use]
    pub fn freed(&self) -> OtherInstance {
        let policies = parsed(&self.texts).unwrap_or_else(|error| {
            log::warn!("cannot read the policies of instance `{}`: {error}", self.name.escaped());
            Vec::new()
        });
        let is_enforced = |policy: &usize| policies.get(*policy).is_some_and(|policy| policy.mode == Mode::Enforce);
        let stack = |scope: &usize| -> Stack {
            self.stacks.get(*scope).into_iter().flatten().copied().filter(is_enforced).collect()
        };
        let targets = self.targets.iter().map(|(name, scope)| (name.trim_start_matches('/').into(), stack(scope)));
        OtherInstance {
            targets: targets.collect(),
            policies: policies.iter().map(|policy| policy.freed(&self.name)).collect(),
        }
    }
}

/// Returns the instances other than `own` that enforce policies.
#[must_use]
pub fn others(own: &str) -> Vec<Other> {
    all().into_iter().filter(|status| status.name != own).filter_map(Other::of).collect()
}

/// Returns the directory whose changes show that instances come, change or go; `None` if there is none.
#[must_use]
pub fn watched() -> Option<PathBuf> {
    make_dir().inspect_err(|error| log::debug!("{error}")).ok().map(|dir| dir.path().to_owned())
}

/// The instance of this process, until this value is dropped.
#[derive(Debug)]
pub struct Instance {
    name: String,
    _lock: Flock<File>,
    /// Whether the record is kept when this value is dropped.
    persists: bool,
}

impl Instance {
    /// Takes the lock of an instance.
    ///
    /// # Errors
    ///
    /// Fails if an instance of this name runs, or if it has persistent policies and `persists` is false.
    pub fn acquire(name: &str, persists: bool) -> Result<Self, InstanceError> {
        check_name(name)?;
        let dir = make_dir()?;
        let lock_name = file_name(name, "lock");
        let failed = |source| InstanceError::File { path: dir.path().join(&lock_name), source };
        let mut attempts = LOCK_ATTEMPTS;
        loop {
            let Some(file) = dir.open_file(&lock_name, OFlag::O_RDWR | OFlag::O_CREAT)? else { continue };
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                // The holder may be a process that only inspects the instance.
                Err((_, Errno::EAGAIN)) if attempts > 0 => {
                    attempts -= 1;
                    thread::sleep(LOCK_PAUSE);
                    continue;
                }
                Err((mut file, Errno::EAGAIN)) => {
                    return Err(InstanceError::Running { name: name.to_owned(), pid: read_pid(&mut file) });
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            // The previous holder may have removed the file meanwhile.
            if !dir.is_entry(&lock, &lock_name) {
                continue;
            }
            if !persists && pinned().iter().any(|pinned| pinned == name) {
                return Err(InstanceError::Pinned { name: name.to_owned() });
            }
            lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
            writeln!(lock, "{}", std::process::id()).map_err(failed)?;
            return Ok(Self { name: name.to_owned(), _lock: lock, persists });
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes the record.
    ///
    /// # Errors
    ///
    /// Fails if the record cannot be written. The old record is then kept.
    pub fn write(&self, record: &Record) -> Result<(), InstanceError> {
        let dir = make_dir()?;
        let (name, new) = (file_name(&self.name, "json"), file_name(&self.name, "new"));
        let failed = |source| InstanceError::File { path: dir.path().join(&new), source };
        let bytes = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        dir.remove_file(&new)?;
        let file = dir.open_file(&new, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        let written = file.map_or(Ok(()), |mut file| file.write_all(&bytes));
        if let Err(error) = written {
            // The old record is not changed.
            let _ = dir.remove_file(&new);
            return Err(failed(error));
        }
        Ok(dir.rename(&new, &name)?)
    }

    /// Writes a record by which cgroups with these names become targets.
    ///
    /// # Errors
    ///
    /// Fails if a cgroup is a target of another instance or the record cannot be written.
    pub fn write_exclusive(&self, record: &Record, cgroups: &[&str]) -> Result<(), InstanceError> {
        let dir = make_dir()?;
        // The lock of the directory serializes this.
        let lock = Flock::lock(dir.reopen()?, FlockArg::LockExclusive);
        let _dir_lock =
            lock.map_err(|(_, errno)| InstanceError::File { path: dir.path().to_owned(), source: errno.into() })?;
        self.check_others(cgroups)?;
        fault::point("others-checked");
        self.write(record)
    }

    /// Returns where to pin the policies; `None` if they do not persist.
    ///
    /// # Errors
    ///
    /// Fails if there is no BPF file system.
    pub fn pins(&self) -> Result<Option<Pins>, InstanceError> {
        Ok(if self.persists { Some(Pins::make(&self.name)?) } else { None })
    }

    #[must_use]
    pub fn persists(&self) -> bool {
        self.persists
    }

    /// Reads the record; `None` if there is none or this build cannot read it.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        read_record(&self.name)
    }

    /// Marks the record for removal, because no policies are in force any more.
    pub fn discard_record(&mut self) {
        self.persists = false;
    }

    /// Checks that no cgroup with one of these names is a target of another instance.
    ///
    /// # Errors
    ///
    /// Fails if a cgroup is such a target.
    pub fn check_others(&self, cgroups: &[&str]) -> Result<(), InstanceError> {
        check_others(Some(&self.name), cgroups)
    }
}

impl Instance {
    /// Returns the targets of other instances that let this instance decide on its `targets`: the agent of the other instance runs,
    /// and reads the record of this one, or the other instance has boundaries at all of these targets.
    #[must_use]
    pub fn yielding(&self, targets: &[&str]) -> BTreeSet<String> {
        let mut yielding = BTreeSet::new();
        for other in all().into_iter().filter(|other| other.name != self.name) {
            let Some(latest) = other.record.as_ref().and_then(|record| record.generations.last()) else { continue };
            let boundaries: HashSet<&str> = latest.boundaries.iter().map(|(name, _)| name.as_str()).collect();
            for (name, _) in &latest.targets {
                let is_above = |target: &&&str| Path::new(target).starts_with(name);
                let has_boundaries = || targets.iter().filter(is_above).all(|target| boundaries.contains(target));
                if other.is_running || has_boundaries() {
                    yielding.insert(name.clone());
                }
            }
        }
        yielding
    }

    /// Returns which cgroups with these names are targets of other instances, each with the name of the instance.
    #[must_use]
    pub fn governed_by_others(&self, cgroups: &HashSet<&str>) -> BTreeMap<String, String> {
        let mut governed = BTreeMap::new();
        if cgroups.is_empty() {
            return governed;
        }
        for other in all().into_iter().filter(|other| other.name != self.name) {
            let targets = other.record.iter().flat_map(Record::targets).filter(|name| cgroups.contains(name));
            governed.extend(targets.map(|name| (name.to_owned(), other.name.clone())));
        }
        governed
    }
}

/// Checks that no cgroup with one of these names is a target of an instance other than `own`.
///
/// # Errors
///
/// Fails if a cgroup is such a target.
pub fn check_others(own: Option<&str>, cgroups: &[&str]) -> Result<(), InstanceError> {
    let names: HashSet<&str> = cgroups.iter().copied().collect();
    for other in all().into_iter().filter(|other| Some(&*other.name) != own) {
        let mut governed = other.record.iter().flat_map(Record::targets);
        let Some(cgroup) = governed.find(|cgroup| names.contains(cgroup)) else { continue };
        let cgroup = cgroup.to_owned();
        let (holder, remedy) = match other.pid {
            Some(pid) => (format!("runs as process {pid}"), format!("kill {pid}")),
            None if other.is_running => ("is starting".to_owned(), "sockpolicy status".to_owned()),
            None => ("is in force without an agent".to_owned(), format!("sockpolicy detach --instance {}", other.name)),
        };
        return Err(InstanceError::Governed { cgroup, name: other.name, holder, remedy });
    }
    Ok(())
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Removed while the lock is held, so that no files of a new instance are removed.
        if let Ok(Some(dir)) = dir() {
            remove_files(&dir, &self.name, if self.persists { &["lock"] } else { &["json", "lock"] });
        }
    }
}

/// The status of an instance, as another process sees it.
#[derive(Clone, Debug)]
pub struct InstanceStatus {
    pub name: String,
    /// Whether an agent runs.
    pub is_running: bool,
    /// The PID of the agent; `None` if the agent has not written it yet.
    pub pid: Option<u32>,
    pub record: Option<Record>,
    /// Whether the instance has pins.
    pub is_pinned: bool,
}

/// Returns all instances, by name. Removes the files of dead ones.
#[must_use]
pub fn all() -> Vec<InstanceStatus> {
    let pinned = pinned();
    let mut names: Vec<String> = with_files(&["json", "lock"]).into_iter().chain(pinned.iter().cloned()).collect();
    names.sort();
    names.dedup();
    names.into_iter().filter_map(|name| inspect_among(&name, &pinned)).collect()
}

/// Checks that [`all`] sees all instances.
///
/// # Errors
///
/// Fails if this process may not read the directories, or if other users could have changed them.
pub fn check_visible() -> Result<(), InstanceError> {
    if let Some(dir) = dir()? {
        dir.names()?;
    }
    Pins::instances()?;
    Ok(())
}

/// Returns the names of instances that have pins. Pins that other users could have changed do not count.
fn pinned() -> Vec<String> {
    Pins::instances().inspect_err(|error| log::debug!("{error}")).unwrap_or_default()
}

/// Returns the names of instances that have a file of one of these kinds. A name is repeated for each file.
pub(crate) fn with_files(kinds: &[&str]) -> Vec<String> {
    let listed = dir().and_then(|dir| Ok((dir.as_ref().map_or(Ok(Vec::new()), PrivateDir::names)?, dir)));
    let (names, dir) = match listed {
        Ok((names, Some(dir))) => (names, dir),
        Ok((_, None)) => return Vec::new(),
        Err(error) => {
            log::debug!("{error}");
            return Vec::new();
        }
    };
    let name_of = |file: &str| {
        let (name, kind) = file.rsplit_once('.')?;
        let is_wanted = is_instance_name(name) && kinds.contains(&kind) && dir.has_file(file);
        is_wanted.then(|| name.to_owned())
    };
    names.iter().filter_map(|file| name_of(file.to_str()?)).collect()
}

/// Returns the status of an instance; `None` if there is none with this name.
#[must_use]
pub fn inspect(name: &str) -> Option<InstanceStatus> {
    inspect_among(name, &pinned())
}

fn inspect_among(name: &str, pinned: &[String]) -> Option<InstanceStatus> {
    let is_pinned = pinned.iter().any(|pinned| pinned == name);
    let dir = dir_or_none().filter(|_| is_instance_name(name));
    let (is_running, pid) = match dir.as_ref().map_or(Lock::Absent, |dir| lock_of(dir, name)) {
        Lock::Held(pid) => (true, pid),
        Lock::Free(lock) => {
            // Removed while this process holds the lock, so that no files of a new instance are removed.
            if let Some(dir) = dir.as_ref().filter(|_| !is_pinned)
                && dir.is_entry(&lock, &file_name(name, "lock"))
            {
                remove_files(dir, name, &["json", "lock"]);
            }
            (false, None)
        }
        Lock::Absent => (false, None),
    };
    (is_running || is_pinned).then(|| InstanceStatus {
        name: name.to_owned(),
        is_running,
        pid,
        record: read_record(name),
        is_pinned,
    })
}

fn remove_files(dir: &PrivateDir, name: &str, kinds: &[&str]) {
    for kind in kinds {
        if let Err(error) = dir.remove_file(&file_name(name, kind)) {
            log::debug!("{error}");
        }
    }
}

fn read_record(name: &str) -> Option<Record> {
    let dir = dir_or_none()?;
    let file = dir.open_file(&file_name(name, "json"), OFlag::O_RDONLY);
    let mut file = file.inspect_err(|error| log::warn!("{error}")).ok().flatten()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    parse_record(&bytes).inspect_err(|error| log::debug!("record of instance {name}: {error}")).ok()
}

/// Parses a record.
///
/// # Errors
///
/// Fails if this is not a record of this build.
pub fn parse_record(bytes: &[u8]) -> serde_json::Result<Record> {
    serde_json::from_slice(bytes)
}

enum Lock {
    /// Locked by the process with this PID; `None` if it has not written its PID yet.
    Held(Option<u32>),
    /// Not locked by another process. This process locks it until the value is dropped.
    Free(Flock<File>),
    Absent,
}

/// More bytes than a PID and a line feed take.
const PID_BYTES: u64 = 16;

fn read_pid(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.take(PID_BYTES).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

fn lock_of(dir: &PrivateDir, name: &str) -> Lock {
    let opened = dir.open_file(&file_name(name, "lock"), OFlag::O_RDONLY);
    let Some(file) = opened.inspect_err(|error| log::warn!("{error}")).ok().flatten() else { return Lock::Absent };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Lock::Free(lock),
        Err((mut file, _)) => Lock::Held(read_pid(&mut file).parse().ok()),
    }
}

/// Opens the directory of the files of all instances, and makes it if there is none. No other user can change it, so no other
/// user can block an agent by its lock, or read policies.
pub(crate) fn make_dir() -> Result<PrivateDir, PrivateError> {
    PrivateDir::system(Path::new(PARENT))?.create(DIR)
}

/// Opens the directory of the files of all instances; `None` if there is none.
pub(crate) fn dir() -> Result<Option<PrivateDir>, PrivateError> {
    PrivateDir::system(Path::new(PARENT))?.open(DIR)
}

/// Opens the directory of the files of all instances; `None` if there is none, or if it cannot be opened or is not private.
fn dir_or_none() -> Option<PrivateDir> {
    dir().inspect_err(|error| log::debug!("{error}")).ok().flatten()
}

/// Returns the name of an instance's file of this kind.
pub(crate) fn file_name(name: &str, kind: &str) -> String {
    format!("{name}.{kind}")
}

/// Returns the path of an instance's file of this kind, for messages.
pub(crate) fn path_of(name: &str, kind: &str) -> PathBuf {
    Path::new(PARENT).join(DIR).join(file_name(name, kind))
}

/// Checks the name of an instance.
///
/// # Errors
///
/// Fails if an instance cannot have this name.
pub fn check_name(name: &str) -> Result<(), InstanceError> {
    if is_instance_name(name) { Ok(()) } else { Err(InstanceError::Name(name.to_owned())) }
}
