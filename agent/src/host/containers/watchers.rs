//! Who watches containers, and where each left what it knows.
//!
//! A watcher counts if it is root of the initial user namespace; or, for cgroups that belong to a user, if it runs as that user
//! ([`Identity`]).

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
    super::container::{CRUN, RUNC},
    Running,
    budget::Budget,
    bundle::Bundle,
    identity::Identity,
    processes::{Kind, Processes},
    view::View,
};
use crate::escape::Escape as _;

/// The most watchers of one account that count.
const WATCHERS_MAX: usize = 256;

/// The most accounts that are looked at.
const ACCOUNTS_MAX: usize = 1024;

/// The most that is read of a command line, in bytes. A conmon's own arguments come first.
const COMMAND_LINE_MAX: u64 = 128 << 10;

/// A container that was started.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) id: String,
    /// Its first process.
    pub(super) first: u32,
    /// The parent of that.
    pub(super) watcher: Option<u32>,
    pub(super) bundle: Bundle,
    pub(super) by: By,
    /// The user who says so: 0 is root of the initial user namespace.
    pub(super) uid: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// With the name that the container had then.
    Conmon { name: Option<String> },
    /// For this namespace of containerd's.
    Shim { namespace: String },
    /// By a runtime on its own, of this name.
    Runtime(&'static str),
}

/// Whose containers to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of root of the initial user namespace.
    Root,
    /// Those of the watchers that this user is behind.
    Account(u32),
}

/// What watchers of a [`Scope`] say.
#[derive(Debug, Default)]
pub(super) struct Watched {
    pub(super) running: Vec<Running>,
    /// How many watchers this process must not look into.
    pub(super) hidden: usize,
    /// Users who have watchers too.
    pub(super) accounts: BTreeSet<u32>,
    /// How many watchers were left out, for there are too many.
    pub(super) skipped: usize,
}

/// Finds out more of a container that was started. `None`: it does not count.
type Describe<'a> = &'a mut dyn FnMut(&Started) -> Option<Running>;

/// A process that counts as a watcher.
struct Watcher {
    pid: u32,
    kind: Kind,
    uid: u32,
    gid: u32,
}

/// Returns what the watchers of a scope say.
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
                log::debug!("cannot take the rights of the user of {} watchers: {error}", of_user.len());
                watched.hidden += of_user.len();
            }
        }
    }
    watched
}

/// Returns what root's watchers say, and what root's runtimes keep of those that nobody watches.
fn of_root(processes: &Processes, watchers: &[Watcher], budget: &Rc<Budget>) -> Vec<Started> {
    let mut started = of_watchers(processes, watchers, budget);
    let known: HashSet<(String, u32)> = started.iter().map(|started| (started.id.clone(), started.first)).collect();
    let alone = unwatched(processes, budget);
    started.extend(alone.into_iter().filter(|started| !known.contains(&(started.id.clone(), started.first))));
    started
}

impl Watched {
    /// Returns the watchers of a scope, and notes the others.
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

/// Returns what watchers of one user say, with no more rights than that user has.
fn of_tenant(
    processes: &Processes,
    watchers: &[Watcher],
    budget: &Rc<Budget>,
    describe: Describe<'_>,
) -> io::Result<Vec<Running>> {
    let Some(Watcher { uid, gid, .. }) = watchers.first() else { return Ok(Vec::new()) };
    let _user = EffectiveUser::take(*uid, *gid)?;
    Ok(of_watchers(processes, watchers, budget).iter().filter_map(describe).collect())
}

/// The effective user of this process is another one, until this is dropped. The kernel drops the capabilities with it. The real
/// user stays, so that the other one can neither trace nor signal this process.
struct EffectiveUser {
    before: (Uid, Gid),
}

impl EffectiveUser {
    fn take(uid: u32, gid: u32) -> io::Result<Self> {
        let before = (geteuid(), nix::unistd::getegid());
        let user = Self { before };
        if before.0.as_raw() != uid {
            setegid(Gid::from_raw(gid))?;
            seteuid(Uid::from_raw(uid))?;
        }
        Ok(user)
    }
}

impl Drop for EffectiveUser {
    fn drop(&mut self) {
        let (uid, gid) = self.before;
        if let Err(error) = seteuid(uid).and_then(|()| setegid(gid)) {
            log::debug!("cannot take the rights of user {uid} again: {error}");
        }
    }
}

fn of_watchers(processes: &Processes, watchers: &[Watcher], budget: &Rc<Budget>) -> Vec<Started> {
    let of_kind = |kind: Kind| watchers.iter().filter(move |watcher| watcher.kind == kind);
    let conmons = of_kind(Kind::Conmon).filter_map(|conmon| of_conmon(processes, conmon, budget));
    let started = conmons.chain(of_shims(processes, of_kind(Kind::Shim), budget));
    // The numbers may be other processes' by now.
    started.filter(|started| started.watcher.is_none_or(|watcher| processes.is_current(watcher))).collect()
}

/// podman's and CRI-O's containers have a conmon each.
fn of_conmon(processes: &Processes, conmon: &Watcher, budget: &Rc<Budget>) -> Option<Started> {
    let Watcher { pid, uid, .. } = *conmon;
    let arguments = Arguments::parse(&command_line(pid)?)?;
    let view = Rc::new(View::of(pid, uid, budget).ok()?);
    let number = view.number(&arguments.pid_file)?;
    let first = processes.child(pid, number)?;
    Some(Started {
        id: arguments.id,
        first,
        watcher: Some(pid),
        bundle: Bundle { view, path: arguments.bundle },
        by: By::Conmon { name: arguments.name },
        uid,
    })
}

/// Reads the command line of a process from that process's memory, which can block for ever if the memory is a tenant's.
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
    /// Parses them. `None` also for one that watches a process that came later, by `podman exec`.
    #[must_use]
    pub fn parse(cmdline: &[u8]) -> Option<Self> {
        let words: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
        if words.contains(&&b"--exec-process-spec"[..]) {
            return None;
        }
        // Further on are those of other programs.
        let value = |short: &str, long: &str| {
            let at = words.iter().position(|word| *word == short.as_bytes() || *word == long.as_bytes())?;
            words.get(at + 1).copied().filter(|word| !word.is_empty())
        };
        let text = |word: &[u8]| str::from_utf8(word).ok().map(str::to_owned);
        let path = |word: &[u8]| PathBuf::from(OsStr::from_bytes(word));
        Some(Self {
            id: value("-c", "--cid").and_then(text).filter(|id| is_name(id))?,
            name: value("-n", "--name").and_then(text),
            bundle: path(value("-b", "--bundle")?),
            pid_file: path(value("-p", "--container-pidfile")?),
        })
    }
}

/// Whether a word can be the id of a container: what runc allows (`validateID`, libcontainer/factory_linux.go).
pub(super) fn is_name(id: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    (1..=255).contains(&id.len()) && id.bytes().all(is_allowed) && !id.bytes().all(|byte| byte == b'.')
}

/// Folders of containerd's namespaces that shims of one user work in: how they look to one of the shims, and which shims work
/// there.
type Namespaces = HashMap<(u64, u64), (Rc<View>, PathBuf, HashSet<u32>)>;

/// A shim works in the bundle of its container, which is beside those of all others in containerd's namespace. It may watch some
/// of these too: those of the same pod. A container is a shim's if the container's first process is a child of that shim.
fn of_shims<'a>(processes: &Processes, shims: impl Iterator<Item = &'a Watcher>, budget: &Rc<Budget>) -> Vec<Started> {
    let mut namespaces = Namespaces::new();
    let mut uid = 0;
    for shim in shims {
        uid = shim.uid;
        note_namespace(shim, budget, &mut namespaces);
    }
    let mut started = Vec::new();
    for (view, folder, shims) in namespaces.values() {
        let ids = view.list(folder).inspect_err(|error| log::debug!("cannot list {}: {error}", folder.escaped()));
        let ids = ids.unwrap_or_default().into_iter().filter_map(|id| id.into_string().ok());
        started.extend(ids.filter_map(|id| of_bundle(processes, id, view, folder, shims, uid)));
    }
    started
}

fn note_namespace(shim: &Watcher, budget: &Rc<Budget>, namespaces: &mut Namespaces) -> Option<()> {
    let own = fs::read_link(format!("/proc/{}/cwd", shim.pid)).ok()?;
    let folder = own.parent()?;
    let view = View::of(shim.pid, shim.uid, budget).ok()?;
    let identity = view.identity(folder)?;
    let (.., shims) = namespaces.entry(identity).or_insert_with(|| (Rc::new(view), folder.to_owned(), HashSet::new()));
    shims.insert(shim.pid);
    Some(())
}

fn of_bundle(
    processes: &Processes,
    id: String,
    view: &Rc<View>,
    folder: &Path,
    shims: &HashSet<u32>,
    uid: u32,
) -> Option<Started> {
    let namespace = folder.file_name()?.to_str()?.to_owned();
    let path = folder.join(&id);
    let number = view.number(&path.join("init.pid")).filter(|_| is_name(&id))?;
    let (shim, first) = shims.iter().find_map(|shim| Some((*shim, processes.child(*shim, number)?)))?;
    let bundle = Bundle { view: Rc::clone(view), path };
    Some(Started { id, first, watcher: Some(shim), bundle, by: By::Shim { namespace }, uid })
}

/// What runtimes keep of their containers where they keep it if no caller says where else. Only root can write there.
fn unwatched(processes: &Processes, budget: &Rc<Budget>) -> Vec<Started> {
    let Ok(view) = View::own(budget).map(Rc::new) else { return Vec::new() };
    let runtimes: [(&str, &str, Parse, &'static str); 2] =
        [("/run/runc", "state.json", State::of_runc, RUNC), ("/run/crun", "status", State::of_crun, CRUN)];
    let mut started = Vec::new();
    for (folder, file, parse, runtime) in runtimes {
        let folder = Path::new(folder);
        let ids = view.list(folder).inspect_err(|error| log::debug!("cannot list {}: {error}", folder.escaped()));
        for id in ids.unwrap_or_default().into_iter().filter_map(|id| id.into_string().ok()).filter(|id| is_name(id)) {
            let state = view.read(&folder.join(&id).join(file)).ok();
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
    let State { first, start, bundle } = state;
    // Its number may be another process's by now.
    let process = processes.get(first).filter(|process| process.start == start)?;
    let bundle = Bundle { view: Rc::clone(view), path: bundle };
    Some(Started { id, first, watcher: Some(process.parent), bundle, by: By::Runtime(runtime), uid: 0 })
}

/// What runtimes keep of a container.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    pub first: u32,
    /// In clock ticks since boot.
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
        let Runc { init_process_pid: first, init_process_start: start, config } = serde_json::from_slice(json).ok()?;
        // The image can bring labels of this name. runc appends its own (libcontainer/specconv).
        let bundle = config.labels.iter().rev().find_map(|label| label.strip_prefix("bundle="))?;
        Some(Self { first, start, bundle: bundle.into() })
    }

    /// Parses what `libcrun_write_container_status` of crun (src/libcrun/status.c) writes.
    #[must_use]
    pub fn of_crun(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Crun {
            pid: u32,
            process_start_time: u64,
            bundle: PathBuf,
        }
        let Crun { pid: first, process_start_time: start, bundle } = serde_json::from_slice(json).ok()?;
        Some(Self { first, start, bundle })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conmon_says_which_container_is_its_own() {
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
        // The value is the next word, whatever its bytes are.
        let with = |word: &[u8]| [b"conmon\0-c\0", word, b"\x004f7c\0-b\0/b\xff\0-p\0/p"].concat();
        assert_eq!(Arguments::parse(&with(b"\xff")), None);
        let bundle = Arguments::parse(&with(b"web")).map(|arguments| arguments.bundle);
        assert_eq!(bundle.as_deref(), Some(Path::new(OsStr::from_bytes(b"/b\xff"))));
    }

    #[test]
    fn runtimes_say_where_the_bundle_is() {
        let expected = State { first: 812, start: 4242, bundle: "/b".into() };
        let runc = r#"{"id":"x","init_process_pid":812,"init_process_start":4242,"config":{"labels":["bundle=/a","bundle=/b"]}}"#;
        assert_eq!(State::of_runc(runc.as_bytes()).as_ref(), Some(&expected));
        let crun = r#"{"pid":812,"process-start-time":4242,"cgroup-path":"/x","bundle":"/b","owner":"root"}"#;
        assert_eq!(State::of_crun(crun.as_bytes()), Some(expected));
        assert_eq!(State::of_crun(b"{}"), None);
    }
}
