//! Finds the watchers of containers, and the files of each container.
//!
//! A watcher is accepted if it is root of the initial user namespace. A watcher of another user is accepted for cgroups that
//! this user owns ([`Identity`]).

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::unistd::{Gid, Uid, geteuid, setegid, seteuid};
use serde::Deserialize;

use super::{
    budget::Budget,
    bundle::Bundle,
    identity::Identity,
    processes::{Kind, Processes},
    view::View,
};
use crate::{
    container::{CRUN, RUNC, Running},
    escape::Escape as _,
};

/// The maximum number of watchers of one account.
const WATCHERS_MAX: usize = 256;

/// The maximum number of accounts.
const ACCOUNTS_MAX: usize = 1024;

/// The maximum number of bytes that are read of a command line. The arguments of conmon itself come first.
const COMMAND_LINE_MAX: u64 = 128 << 10;

/// A container that was started and whose init process runs.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) id: String,
    /// The init process of the container.
    pub(super) init: u32,
    /// The parent of the init process.
    pub(super) watcher: Option<u32>,
    pub(super) bundle: Bundle,
    pub(super) by: StartedBy,
    /// The user of the watcher; 0 is root of the initial user namespace.
    pub(super) uid: u32,
}

/// The program through which a container was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StartedBy {
    /// conmon, with the name of the container at that time.
    Conmon { name: Option<String> },
    /// A shim, in this namespace of containerd.
    Shim { namespace: String },
    /// A runtime with this name, without a watcher.
    Runtime(&'static str),
}

/// The owner of the containers to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Root of the initial user namespace.
    Root,
    /// A user of the initial user namespace, and its subordinate uids.
    Account(u32),
}

/// The containers and watchers of a [`Scope`].
#[derive(Debug, Default)]
pub(super) struct Watched {
    pub(super) running: Vec<Running>,
    /// The number of watchers that this process cannot inspect (permission denied).
    pub(super) hidden: usize,
    /// In the scope of root, the users other than root that have watchers.
    pub(super) accounts: BTreeSet<u32>,
    /// The number of watchers that exceeded the limits.
    pub(super) skipped: usize,
}

/// Finds the cgroup, the name and the image of a container. Returns `None` if the container is not accepted.
type Describe<'a> = &'a mut dyn FnMut(&Started) -> Option<Running>;

/// An accepted watcher.
struct Watcher {
    pid: u32,
    kind: Kind,
    uid: u32,
    gid: u32,
}

/// Finds the containers of a scope.
pub(super) fn watched(processes: &Processes, scope: Scope, budget: &Rc<Budget>, describe: Describe<'_>) -> Watched {
    let mut watched = Watched::default();
    let watchers = watched.watchers(processes, scope);
    if scope == Scope::Root {
        watched.running = of_root(processes, &watchers, budget).iter().filter_map(describe).collect();
        return watched;
    }
    for of_user in watchers.chunk_by(|one, other| (one.uid, one.gid) == (other.uid, other.gid)) {
        match of_tenant(processes, of_user, budget, describe) {
            Ok(running) => watched.running.extend(running),
            Err(error) => {
                log::debug!("cannot search the containers of {} watchers as their user: {error}", of_user.len());
                watched.hidden += of_user.len();
            }
        }
    }
    watched
}

/// Returns the containers of root's watchers, and the containers of root's runtimes that have no watcher.
fn of_root(processes: &Processes, watchers: &[Watcher], budget: &Rc<Budget>) -> Vec<Started> {
    let mut started = of_watchers(processes, watchers, budget);
    let known: HashSet<(String, u32)> = started.iter().map(|started| (started.id.clone(), started.init)).collect();
    let unwatched = unwatched(processes, budget);
    started.extend(unwatched.into_iter().filter(|started| !known.contains(&(started.id.clone(), started.init))));
    started
}

impl Watched {
    /// Returns the watchers of a scope. Counts the other watchers.
    fn watchers(&mut self, processes: &Processes, scope: Scope) -> Vec<Watcher> {
        let mut watchers = Vec::new();
        for (pid, kind) in processes.watchers() {
            match (Identity::of(pid, kind), scope) {
                (Identity::Root, Scope::Root) => watchers.push(Watcher { pid, kind, uid: 0, gid: 0 }),
                (Identity::Tenant { account, uid, gid }, Scope::Account(wanted)) if account == wanted => {
                    if watchers.len() < WATCHERS_MAX {
                        watchers.push(Watcher { pid, kind, uid, gid });
                    } else {
                        self.skipped += 1;
                    }
                }
                (Identity::Tenant { account, .. }, Scope::Root) => {
                    if self.accounts.len() < ACCOUNTS_MAX || self.accounts.contains(&account) {
                        self.accounts.insert(account);
                    } else {
                        self.skipped += 1;
                    }
                }
                (Identity::Hidden, Scope::Root) => self.hidden += 1,
                _ => {}
            }
        }
        watchers.sort_by_key(|watcher| (watcher.uid, watcher.gid));
        watchers
    }
}

/// Finds the containers of the watchers of one user, with the rights of this user.
fn of_tenant(
    processes: &Processes,
    watchers: &[Watcher],
    budget: &Rc<Budget>,
    describe: Describe<'_>,
) -> io::Result<Vec<Running>> {
    let Some(Watcher { uid, gid, .. }) = watchers.first() else { return Ok(Vec::new()) };
    let _user = EffectiveUser::set(*uid, *gid)?;
    Ok(of_watchers(processes, watchers, budget).iter().filter_map(describe).collect())
}

/// Changes the effective user and group of this process until this is dropped. The kernel clears the effective capabilities
/// with it. The real user does not change, so that the other user can neither trace nor signal this process.
struct EffectiveUser {
    previous: (Uid, Gid),
}

impl EffectiveUser {
    fn set(uid: u32, gid: u32) -> io::Result<Self> {
        let previous = (geteuid(), nix::unistd::getegid());
        let user = Self { previous };
        if previous.0.as_raw() != uid {
            setegid(Gid::from_raw(gid))?;
            seteuid(Uid::from_raw(uid))?;
        }
        Ok(user)
    }
}

impl Drop for EffectiveUser {
    fn drop(&mut self) {
        let (uid, gid) = self.previous;
        if let Err(error) = seteuid(uid).and_then(|()| setegid(gid)) {
            log::debug!("cannot restore the effective user {uid}: {error}");
        }
    }
}

fn of_watchers(processes: &Processes, watchers: &[Watcher], budget: &Rc<Budget>) -> Vec<Started> {
    let of_kind = |kind: Kind| watchers.iter().filter(move |watcher| watcher.kind == kind);
    let conmons = of_kind(Kind::Conmon).filter_map(|conmon| of_conmon(processes, conmon, budget));
    let started = conmons.chain(of_shims(processes, of_kind(Kind::Shim), budget));
    // The process id of a watcher can have been reused.
    started.filter(|started| started.watcher.is_none_or(|watcher| processes.is_current(watcher))).collect()
}

/// Returns the container of a conmon. Each container of podman and CRI-O has its own conmon.
fn of_conmon(processes: &Processes, conmon: &Watcher, budget: &Rc<Budget>) -> Option<Started> {
    let Watcher { pid, uid, .. } = *conmon;
    let arguments = Arguments::parse(&command_line(pid)?)?;
    let view = Rc::new(View::of(pid, uid, budget).ok()?);
    let init = processes.child(pid, view.pid(&arguments.pid_file)?)?;
    Some(Started {
        id: arguments.id,
        init,
        watcher: Some(pid),
        bundle: Bundle { view, path: arguments.bundle },
        by: StartedBy::Conmon { name: arguments.name },
        uid,
    })
}

/// Reads the command line of a process from the memory of that process. A tenant can make this read block forever.
fn command_line(pid: u32) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/cmdline")).ok()?.take(COMMAND_LINE_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The command line of a conmon.
#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    pub id: String,
    pub name: Option<String>,
    pub bundle: PathBuf,
    pub pid_file: PathBuf,
}

impl Arguments {
    /// Parses a command line. Returns `None` too for a conmon of `podman exec`.
    #[must_use]
    pub fn parse(cmdline: &[u8]) -> Option<Self> {
        let words: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
        if words.contains(&&b"--exec-process-spec"[..]) {
            return None;
        }
        // Only the first occurrence counts: arguments of other programs follow.
        let value = |short: &str, long: &str| {
            let index = words.iter().position(|word| *word == short.as_bytes() || *word == long.as_bytes())?;
            words.get(index + 1).copied().filter(|word| !word.is_empty())
        };
        let text = |word: &[u8]| str::from_utf8(word).ok().map(str::to_owned);
        let path = |word: &[u8]| PathBuf::from(OsStr::from_bytes(word));
        Some(Self {
            id: value("-c", "--cid").and_then(text).filter(|id| is_valid_id(id))?,
            name: value("-n", "--name").and_then(text),
            bundle: path(value("-b", "--bundle")?),
            pid_file: path(value("-p", "--container-pidfile")?),
        })
    }
}

/// Returns whether runc accepts a string as the id of a container (`validateID`, libcontainer/factory_linux.go).
pub(super) fn is_valid_id(id: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    (1..=255).contains(&id.len()) && id.bytes().all(is_allowed) && !id.bytes().all(|byte| byte == b'.')
}

/// The directories of containerd's namespaces that contain the working directories of one user's shims. The key is the device
/// and the inode number. The value is the view and the path of one of the shims, and the process ids of all of them.
type Namespaces = HashMap<(u64, u64), (Rc<View>, PathBuf, HashSet<u32>)>;

/// Returns the containers of shims. The working directory of a shim is the bundle of its container, in the directory of a
/// containerd namespace. A shim can watch the other containers of the same pod too. A container belongs to a shim if the
/// container's init process is a child of the shim.
fn of_shims<'a>(processes: &Processes, shims: impl Iterator<Item = &'a Watcher>, budget: &Rc<Budget>) -> Vec<Started> {
    let mut namespaces = Namespaces::new();
    let mut uid = 0;
    for shim in shims {
        uid = shim.uid;
        add_namespace(shim, budget, &mut namespaces);
    }
    let mut started = Vec::new();
    for (view, directory, shims) in namespaces.values() {
        let ids = view.list(directory).inspect_err(|error| log::debug!("cannot list {}: {error}", directory.escaped()));
        let ids = ids.unwrap_or_default().into_iter().filter_map(|id| id.into_string().ok());
        started.extend(ids.filter_map(|id| of_bundle(processes, id, view, directory, shims, uid)));
    }
    started
}

/// Adds the namespace of a shim, from the parent of its working directory.
fn add_namespace(shim: &Watcher, budget: &Rc<Budget>, namespaces: &mut Namespaces) -> Option<()> {
    let bundle = fs::read_link(format!("/proc/{}/cwd", shim.pid)).ok()?;
    let directory = bundle.parent()?;
    let view = View::of(shim.pid, shim.uid, budget).ok()?;
    let identity = view.identity(directory)?;
    let (.., shims) =
        namespaces.entry(identity).or_insert_with(|| (Rc::new(view), directory.to_owned(), HashSet::new()));
    shims.insert(shim.pid);
    Some(())
}

fn of_bundle(
    processes: &Processes,
    id: String,
    view: &Rc<View>,
    directory: &Path,
    shims: &HashSet<u32>,
    uid: u32,
) -> Option<Started> {
    let namespace = directory.file_name()?.to_str()?.to_owned();
    let path = directory.join(&id);
    let pid = view.pid(&path.join("init.pid")).filter(|_| is_valid_id(&id))?;
    let (shim, init) = shims.iter().find_map(|shim| Some((*shim, processes.child(*shim, pid)?)))?;
    let bundle = Bundle { view: Rc::clone(view), path };
    Some(Started { id, init, watcher: Some(shim), bundle, by: StartedBy::Shim { namespace }, uid })
}

/// Returns the containers in the default state directories of runc and crun. Only root can write there.
fn unwatched(processes: &Processes, budget: &Rc<Budget>) -> Vec<Started> {
    let Ok(view) = View::own(budget).map(Rc::new) else { return Vec::new() };
    let runtimes: [(&str, &str, Parse, &'static str); 2] =
        [("/run/runc", "state.json", State::of_runc, RUNC), ("/run/crun", "status", State::of_crun, CRUN)];
    let mut started = Vec::new();
    for (directory, file, parse, runtime) in runtimes {
        let directory = Path::new(directory);
        let ids = view.list(directory).inspect_err(|error| log::debug!("cannot list {}: {error}", directory.escaped()));
        let ids = ids.unwrap_or_default().into_iter().filter_map(|id| id.into_string().ok());
        for id in ids.filter(|id| is_valid_id(id)) {
            let state = view.read(&directory.join(&id).join(file)).ok();
            started.extend(state.and_then(|state| of_state(processes, id, parse(&state)?, &view, runtime)));
        }
    }
    started
}

type Parse = fn(&[u8]) -> Option<State>;

fn of_state(
    processes: &Processes,
    id: String,
    state: State,
    view: &Rc<View>,
    runtime: &'static str,
) -> Option<Started> {
    let State { init, start, bundle } = state;
    // The process id can have been reused.
    let process = processes.get(init).filter(|process| process.start == start)?;
    let bundle = Bundle { view: Rc::clone(view), path: bundle };
    Some(Started { id, init, watcher: Some(process.parent), bundle, by: StartedBy::Runtime(runtime), uid: 0 })
}

/// The state of a container, as a runtime stores it.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    /// The process id of the init process.
    pub init: u32,
    /// The start time of the init process, in clock ticks since boot.
    pub start: u64,
    pub bundle: PathBuf,
}

impl State {
    /// Parses `BaseState` of runc (libcontainer/container.go), and `State` (libcontainer/container_linux.go).
    #[must_use]
    pub fn of_runc(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Runc {
            init_process_pid: u32,
            init_process_start: u64,
            config: Config,
        }
        #[derive(Deserialize)]
        struct Config {
            labels: Vec<String>,
        }
        let Runc { init_process_pid: init, init_process_start: start, config } = serde_json::from_slice(json).ok()?;
        // The image can define labels with this name. runc appends its own label last (libcontainer/specconv).
        let bundle = config.labels.iter().rev().find_map(|label| label.strip_prefix("bundle="))?;
        Some(Self { init, start, bundle: bundle.into() })
    }

    /// Parses the status file of crun (`libcrun_write_container_status`, src/libcrun/status.c).
    #[must_use]
    pub fn of_crun(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Crun {
            pid: u32,
            process_start_time: u64,
            bundle: PathBuf,
        }
        let Crun { pid: init, process_start_time: start, bundle } = serde_json::from_slice(json).ok()?;
        Some(Self { init, start, bundle })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_of_conmon_is_parsed() {
        let line = "conmon --api-version 1 -c 4f7c -u 4f7c -r /usr/bin/crun -b /s/overlay-containers/4f7c/userdata \
                    -p /r/pidfile -n web-1 --exit-dir /run/libpod/exits --exit-command-arg -n --exit-command-arg other";
        let parse = |line: &str| Arguments::parse(line.replace(' ', "\0").as_bytes());
        let expected = Arguments {
            id: "4f7c".to_owned(),
            name: Some("web-1".to_owned()),
            bundle: "/s/overlay-containers/4f7c/userdata".into(),
            pid_file: "/r/pidfile".into(),
        };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse(&format!("{line} -e --exec-process-spec /r/exec")), None);
        assert_eq!(parse("conmon --version"), None);
        assert_eq!(parse(&line.replace("-c 4f7c", "-c \x1b[31m")), None);
        // The value is the next word, which can contain any bytes.
        let with = |word: &[u8]| [b"conmon\0-c\0", word, b"\x004f7c\0-b\0/b\xff\0-p\0/p"].concat();
        assert_eq!(Arguments::parse(&with(b"\xff")), None);
        let bundle = Arguments::parse(&with(b"web")).map(|arguments| arguments.bundle);
        assert_eq!(bundle.as_deref(), Some(Path::new(OsStr::from_bytes(b"/b\xff"))));
    }

    #[test]
    fn state_files_are_parsed() {
        let expected = State { init: 812, start: 4242, bundle: "/b".into() };
        let runc = r#"{"id":"x","init_process_pid":812,"init_process_start":4242,"config":{"labels":["bundle=/a","bundle=/b"]}}"#;
        assert_eq!(State::of_runc(runc.as_bytes()).as_ref(), Some(&expected));
        let crun = r#"{"pid":812,"process-start-time":4242,"cgroup-path":"/x","bundle":"/b","owner":"root"}"#;
        assert_eq!(State::of_crun(crun.as_bytes()), Some(expected));
        assert_eq!(State::of_crun(b"{}"), None);
    }
}
