//! Instances: sockpolicy as it runs, or as it has left policies in force, and how others find out.
//!
//! Each has a name, and below `/run/sockpolicy` a lock, held by the agent for as long as it runs, and a record of what is in
//! force: the policies' own texts, so that another agent, or `status`, comes to the same tables by the same code.
//!
//! Invariants: a record is written before what it tells of comes in force, so that whatever is in force is told of. Who says
//! that cgroups are its own has found that they are nobody else's, and nobody says so between.

use std::{
    collections::{BTreeMap, HashSet},
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
    compile::Desired,
    coverage::Stack,
    escape::Escape,
    fault,
    host::private::{PrivateDir, PrivateError},
    kernel::{KernelError, MapIds, Pins},
    policy::{Policy, PolicyErrors, Texts},
    report::SavedCounters,
    session::{self, SessionError},
    skipped::SkippedList,
};

/// The directory of all instances' files, and where it is.
const PARENT: &str = "/run";
const FOLDER: &str = "sockpolicy";
/// The longest name of an instance, in bytes.
const NAME_MAX: usize = 64;
/// How often, and after which pauses, to ask for a lock that somebody holds: who looks at it holds it for a moment.
const PATIENCE: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("{}: {source}", path.escaped())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "instance `{name}` of sockpolicy runs already, as process {pid}\n  help: end that one first (kill {pid}), or give \
         this one another name with --instance"
    )]
    Running { name: String, pid: String },
    #[error(
        "cgroup {} is a target of instance `{}` already, which {holder}\n  help: end that one first ({}), or put all \
         policies for this cgroup into one instance",
        cgroup.escaped(), name.escaped(), remedy.escaped()
    )]
    Governed { cgroup: String, name: String, holder: String, remedy: String },
    #[error(
        "instance `{name}` has policies in force that stay without an agent\n  help: take them over with --persist, end them \
         (sockpolicy detach {name}), or give this one another name with --instance"
    )]
    Pinned { name: String },
    #[error("`{}` is no name for an instance\n  help: take up to 64 letters, digits, `-` and `_`", .0.escaped())]
    Name(String),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Private(#[from] PrivateError),
}

/// What is in force, or will be in a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of sockpolicy that wrote this.
    pub version: String,
    /// Whether it stays in force when the agent is gone.
    pub persists: bool,
    pub maps: MapIds,
    #[serde(default)]
    pub unread: RingOverflow,
    /// The latest last. Of several, the configuration in the kernel says which is in force.
    pub generations: Vec<Generation>,
    /// Those before them, the latest last, that events may be of which nobody has read.
    #[serde(default)]
    pub retired: Vec<Generation>,
    /// What had been counted of settings when these were put in force.
    #[serde(default)]
    pub counted: Vec<SavedCounters>,
    /// What the instance cannot handle.
    #[serde(default)]
    pub skipped: SkippedList,
}

/// Events that found the ring buffer full: while there was nobody to read it that is no fault of anybody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingOverflow {
    /// Those that came while there was no agent, until the one of this record began.
    before: u64,
    /// All that there were when that one last looked.
    counted: u64,
}

impl RingOverflow {
    /// As of an agent that begins when there are so many in all, after another one, if there was one.
    #[must_use]
    pub fn begun(all: u64, former: Option<Self>) -> Self {
        let before = former.map_or(all, |former| former.of(all, false));
        Self { before, counted: all }
    }

    /// As of an agent that is there when there are so many.
    #[must_use]
    pub fn counted(self, all: u64) -> Self {
        Self { counted: all, ..self }
    }

    /// How many of all of them came while there was no agent.
    #[must_use]
    pub fn of(self, all: u64, is_running: bool) -> u64 {
        let Self { before, counted } = self;
        before + if is_running { 0 } else { all.saturating_sub(counted) }
    }
}

impl Record {
    /// The names of all cgroups that it is about.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.generations.iter().flat_map(|generation| &generation.targets).map(|(name, _)| name.as_str())
    }
}

/// Policies that are, or were, in force together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub number: u32,
    #[serde(flatten)]
    pub files: Files,
    /// Names of cgroups, each with the number of its stack.
    pub targets: Vec<(String, usize)>,
    /// Whether the audit judges calls, and not the hooks.
    #[serde(default)]
    pub audit_judges: bool,
}

/// What policies were read from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    #[serde(rename = "files")]
    pub texts: Vec<Text>,
    /// Whether nothing is to be changed, whatever they say.
    pub dry_run: bool,
    pub stacks: Vec<Stack>,
}

impl Files {
    #[must_use]
    pub fn new(texts: &Texts, dry_run: bool, stacks: &[Stack]) -> Self {
        let text = |(path, text): (&Path, &str)| Text { path: path.to_owned(), text: text.to_owned() };
        Self { texts: texts.files().map(text).collect(), dry_run, stacks: stacks.to_vec() }
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
    Session(#[from] SessionError),
}

impl Generation {
    /// The policies, as they were read.
    ///
    /// # Errors
    ///
    /// Where they are no policies to this build.
    pub fn policies(&self) -> Result<Vec<Policy>, PolicyErrors> {
        let files = self.files.texts.iter().map(|Text { path, text }| (path.clone(), text.clone()));
        Ok(Texts::of(files).policies()?.0)
    }

    /// The tables, as they were made.
    ///
    /// # Errors
    ///
    /// As of [`Self::policies`].
    pub fn desired(&self) -> Result<Desired, RecordError> {
        let mut desired = session::prepare(&self.policies()?, &self.files.stacks, self.files.dry_run, false)?;
        if self.audit_judges {
            desired.judge_by_audit();
        }
        Ok(desired)
    }
}

/// An instance that this process is, until this is dropped.
#[derive(Debug)]
pub struct Instance {
    name: String,
    _lock: Flock<File>,
    /// Whether its record is to stay.
    persists: bool,
}

impl Instance {
    /// Becomes an instance.
    ///
    /// # Errors
    ///
    /// Where there is one of this name that runs.
    pub fn acquire(name: &str, persists: bool) -> Result<Self, InstanceError> {
        check_name(name)?;
        let folder = make_folder()?;
        let lock_name = file_name(name, "lock");
        let failed = |source| InstanceError::File { path: folder.path().join(&lock_name), source };
        let mut patience = PATIENCE;
        loop {
            let Some(file) = folder.open_file(&lock_name, OFlag::O_RDWR | OFlag::O_CREAT)? else { continue };
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                // It may be one who only looks.
                Err((_, Errno::EAGAIN)) if patience > 0 => {
                    patience -= 1;
                    thread::sleep(PAUSE);
                    continue;
                }
                Err((mut file, Errno::EAGAIN)) => {
                    return Err(InstanceError::Running { name: name.to_owned(), pid: read_pid(&mut file) });
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            // Who held it may have removed it meanwhile.
            if !folder.is_entry(&lock, &lock_name) {
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

    /// Leaves word of what is, or will be, in force.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn write(&self, record: &Record) -> Result<(), InstanceError> {
        let folder = make_folder()?;
        let (name, new) = (file_name(&self.name, "json"), file_name(&self.name, "new"));
        let failed = |source| InstanceError::File { path: folder.path().join(&new), source };
        let bytes = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        folder.remove_file(&new)?;
        let file = folder.open_file(&new, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        let written = file.map_or(Ok(()), |mut file| file.write_all(&bytes));
        if let Err(error) = written {
            // The record that is there stays whole.
            let _ = folder.remove_file(&new);
            return Err(failed(error));
        }
        Ok(folder.rename(&new, &name)?)
    }

    /// The same where these cgroups, by their names, become targets by it.
    ///
    /// # Errors
    ///
    /// Where one of them is a target of another instance, or it cannot be written.
    pub fn write_exclusive(&self, record: &Record, cgroups: &[&str]) -> Result<(), InstanceError> {
        let folder = make_folder()?;
        // One at a time: the folder is locked.
        let lock = Flock::lock(folder.reopen()?, FlockArg::LockExclusive);
        let _turn =
            lock.map_err(|(_, errno)| InstanceError::File { path: folder.path().to_owned(), source: errno.into() })?;
        self.check_others(cgroups)?;
        fault::point("others-checked");
        self.write(record)
    }

    /// Where what it has in force is to be kept, if it is to stay when this process is gone.
    ///
    /// # Errors
    ///
    /// Where there is no BPF file system.
    pub fn pins(&self) -> Result<Option<Pins>, InstanceError> {
        Ok(if self.persists { Some(Pins::make(&self.name)?) } else { None })
    }

    #[must_use]
    pub fn persists(&self) -> bool {
        self.persists
    }

    /// The record that is there.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        read_record(&self.name)
    }

    /// Nothing is in force any more.
    pub fn discard_record(&mut self) {
        self.persists = false;
    }

    /// Whether one of these cgroups, by their names, is a target of another instance.
    ///
    /// # Errors
    ///
    /// If so.
    pub fn check_others(&self, cgroups: &[&str]) -> Result<(), InstanceError> {
        check_others(Some(&self.name), cgroups)
    }
}

impl Instance {
    /// Returns which of these cgroups, by their names, are targets of other instances, each with the name of the instance.
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

/// Whether one of these cgroups, by their names, is a target of an instance, other than the one of this name.
///
/// # Errors
///
/// If so.
pub fn check_others(own: Option<&str>, cgroups: &[&str]) -> Result<(), InstanceError> {
    let wanted: HashSet<&str> = cgroups.iter().copied().collect();
    for other in all().into_iter().filter(|other| Some(&*other.name) != own) {
        let mut governed = other.record.iter().flat_map(Record::targets);
        let Some(cgroup) = governed.find(|cgroup| wanted.contains(cgroup)) else { continue };
        let cgroup = cgroup.to_owned();
        let (holder, remedy) = match other.pid {
            Some(pid) => (format!("runs as process {pid}"), format!("kill {pid}")),
            None if other.is_running => ("is just being started".to_owned(), "sockpolicy status".to_owned()),
            None => ("is in force without an agent".to_owned(), format!("sockpolicy detach {}", other.name)),
        };
        return Err(InstanceError::Governed { cgroup, name: other.name, holder, remedy });
    }
    Ok(())
}

impl Drop for Instance {
    fn drop(&mut self) {
        // While it is locked still, so that nobody else's is removed.
        if let Ok(Some(folder)) = folder() {
            remove_files(&folder, &self.name, if self.persists { &["lock"] } else { &["json", "lock"] });
        }
    }
}

/// An instance, seen from outside.
#[derive(Clone, Debug)]
pub struct InstanceStatus {
    pub name: String,
    /// Whether an agent runs.
    pub is_running: bool,
    /// Its process, if it has said so already.
    pub pid: Option<u32>,
    pub record: Option<Record>,
    /// Whether anything of it stays in the kernel without an agent.
    pub is_pinned: bool,
}

/// Returns all instances that there are, by name. Removes what dead ones have left.
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
/// Fails where this process may not look, or other users could have changed what there is to see.
pub fn check_visible() -> Result<(), InstanceError> {
    if let Some(folder) = folder()? {
        folder.names()?;
    }
    Pins::instances()?;
    Ok(())
}

/// Returns the names of instances that have pins. What other users may have put in their place is none.
fn pinned() -> Vec<String> {
    Pins::instances().inspect_err(|error| log::debug!("{error}")).unwrap_or_default()
}

/// Returns the names of instances that have a file of one of these kinds; those that have several come several times.
pub(crate) fn with_files(kinds: &[&str]) -> Vec<String> {
    let listed = folder().and_then(|folder| Ok((folder.as_ref().map_or(Ok(Vec::new()), PrivateDir::names)?, folder)));
    let (names, folder) = match listed {
        Ok((names, Some(folder))) => (names, folder),
        Ok((_, None)) => return Vec::new(),
        Err(error) => {
            log::debug!("{error}");
            return Vec::new();
        }
    };
    let of = |file: &str| {
        let (name, kind) = file.rsplit_once('.')?;
        let is_wanted = is_name(name) && kinds.contains(&kind) && folder.has_file(file);
        is_wanted.then(|| name.to_owned())
    };
    names.iter().filter_map(|file| of(file.to_str()?)).collect()
}

/// Returns one instance, if there is one of this name.
#[must_use]
pub fn inspect(name: &str) -> Option<InstanceStatus> {
    inspect_among(name, &pinned())
}

fn inspect_among(name: &str, pinned: &[String]) -> Option<InstanceStatus> {
    let is_pinned = pinned.iter().any(|pinned| pinned == name);
    let folder = folder_or_none().filter(|_| is_name(name));
    let (is_running, pid) = match folder.as_ref().map_or(Lock::Absent, |folder| lock_of(folder, name)) {
        Lock::Held(pid) => (true, pid),
        Lock::Free(lock) => {
            // While it is ours, so that nobody else's is removed.
            if let Some(folder) = folder.as_ref().filter(|_| !is_pinned)
                && folder.is_entry(&lock, &file_name(name, "lock"))
            {
                remove_files(folder, name, &["json", "lock"]);
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

fn remove_files(folder: &PrivateDir, name: &str, kinds: &[&str]) {
    for kind in kinds {
        if let Err(error) = folder.remove_file(&file_name(name, kind)) {
            log::debug!("{error}");
        }
    }
}

fn read_record(name: &str) -> Option<Record> {
    let folder = folder_or_none()?;
    let file = folder.open_file(&file_name(name, "json"), OFlag::O_RDONLY);
    let mut file = file.inspect_err(|error| log::warn!("{error}")).ok().flatten()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    parse_record(&bytes).inspect_err(|error| log::debug!("record of instance {name}: {error}")).ok()
}

/// Reads the text of a record.
///
/// # Errors
///
/// Fails where this is no record of this build.
pub fn parse_record(bytes: &[u8]) -> serde_json::Result<Record> {
    serde_json::from_slice(bytes)
}

enum Lock {
    /// By this process, if it has said so already.
    Held(Option<u32>),
    /// Nobody's, and ours for as long as this is there.
    Free(Flock<File>),
    Absent,
}

/// Longer than any number of a process, and a line's end.
const PID_BYTES: u64 = 16;

fn read_pid(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.take(PID_BYTES).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

fn lock_of(folder: &PrivateDir, name: &str) -> Lock {
    let opened = folder.open_file(&file_name(name, "lock"), OFlag::O_RDONLY);
    let Some(file) = opened.inspect_err(|error| log::warn!("{error}")).ok().flatten() else { return Lock::Absent };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Lock::Free(lock),
        Err((mut file, _)) => Lock::Held(read_pid(&mut file).parse().ok()),
    }
}

/// Opens the directory of all instances' files, and makes it if there is none. No other user is to keep an agent from its
/// lock, or to read policies.
pub(crate) fn make_folder() -> Result<PrivateDir, PrivateError> {
    PrivateDir::system(Path::new(PARENT))?.create(FOLDER)
}

/// Opens that directory, if there is one.
pub(crate) fn folder() -> Result<Option<PrivateDir>, PrivateError> {
    PrivateDir::system(Path::new(PARENT))?.open(FOLDER)
}

/// Opens it to look who is there. Without the rights for that, or where it is another user's, nobody is.
fn folder_or_none() -> Option<PrivateDir> {
    folder().inspect_err(|error| log::debug!("{error}")).ok().flatten()
}

/// Returns the name of an instance's file of this kind.
pub(crate) fn file_name(name: &str, kind: &str) -> String {
    format!("{name}.{kind}")
}

/// Returns where that file is, for messages.
pub(crate) fn path_of(name: &str, kind: &str) -> PathBuf {
    Path::new(PARENT).join(FOLDER).join(file_name(name, kind))
}

/// Returns whether an instance may have this name. It is a file's name, also in a BPF file system, which takes no dots.
pub(crate) fn is_name(name: &str) -> bool {
    let is_good = |character: char| character.is_ascii_alphanumeric() || "-_".contains(character);
    !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(is_good)
}

/// Checks the name of an instance.
///
/// # Errors
///
/// Fails where an instance may not have it.
pub fn check_name(name: &str) -> Result<(), InstanceError> {
    if is_name(name) { Ok(()) } else { Err(InstanceError::Name(name.to_owned())) }
}
