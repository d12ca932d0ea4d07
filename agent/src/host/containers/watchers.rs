//! Who watches over containers, and where each left what it knows.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    rc::Rc,
};

use serde::Deserialize;

use super::{
    super::container::{CRUN, RUNC},
    bundle::Bundle,
    processes::Processes,
    view::View,
};

const CONMON: &str = "conmon";
/// The beginning of the names of all shims: the kernel keeps no more.
const SHIM: &str = "containerd-shim";

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

/// All that can be found, and how many of those who watch may not be looked into.
pub(super) fn started(processes: &Processes) -> (Vec<Started>, usize) {
    let (conmons, shims) = (processes.called(CONMON), processes.called(SHIM));
    let hidden = conmons.iter().chain(&shims).filter(|watcher| is_hidden(**watcher)).count();
    let mut started: Vec<_> = conmons.into_iter().filter_map(|conmon| of_conmon(processes, conmon)).collect();
    let mut folders = HashSet::new();
    for shim in shims {
        started.extend(of_shim(processes, shim, &mut folders).unwrap_or_default());
    }
    let watched: HashSet<String> = started.iter().map(|started| started.id.clone()).collect();
    if let Ok(view) = View::of(std::process::id()) {
        let unwatched = unwatched(processes, &Rc::new(view));
        started.extend(unwatched.into_iter().filter(|started| !watched.contains(&started.id)));
    }
    (started, hidden)
}

fn is_hidden(process: u32) -> bool {
    fs::read_link(format!("/proc/{process}/cwd")).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// podman's and CRI-O's containers have a conmon each.
fn of_conmon(processes: &Processes, conmon: u32) -> Option<Started> {
    let arguments = Arguments::parse(&fs::read(format!("/proc/{conmon}/cmdline")).ok()?)?;
    let view = Rc::new(View::of(conmon).ok()?);
    let number = view.number(&arguments.pid_file)?;
    let first = processes.child(conmon, number, |parent| parent == conmon)?;
    Some(Started {
        id: arguments.id,
        first,
        watcher: Some(conmon),
        bundle: Bundle { view, path: arguments.bundle },
        by: By::Conmon { name: arguments.name },
    })
}

/// The command line of a conmon.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    id: String,
    name: Option<String>,
    bundle: PathBuf,
    pid_file: PathBuf,
}

impl Arguments {
    /// `None` also for one that watches over a process that came later, by `podman exec`.
    fn parse(cmdline: &[u8]) -> Option<Self> {
        let words: Vec<&str> = cmdline.split(|byte| *byte == 0).filter_map(|word| str::from_utf8(word).ok()).collect();
        if words.contains(&"--exec-process-spec") {
            return None;
        }
        // Further on are those of other programs.
        let value = |short: &str, long: &str| {
            let at = words.iter().position(|word| *word == short || *word == long)?;
            words.get(at + 1).map(|word| (*word).to_owned()).filter(|word| !word.is_empty())
        };
        Some(Self {
            id: value("-c", "--cid")?,
            name: value("-n", "--name"),
            bundle: value("-b", "--bundle")?.into(),
            pid_file: value("-p", "--container-pidfile")?.into(),
        })
    }
}

/// A shim works in the bundle of its container, which is beside those of all others in containerd's namespace. It may watch over
/// some of these too: those of the same pod.
fn of_shim(processes: &Processes, shim: u32, seen: &mut HashSet<(u64, u64)>) -> Option<Vec<Started>> {
    let own = fs::read_link(format!("/proc/{shim}/cwd")).ok()?;
    let folder = own.parent()?;
    let namespace = folder.file_name()?.to_str()?.to_owned();
    let view = Rc::new(View::of(shim).ok()?);
    if !seen.insert(view.identity(folder)?) {
        return None;
    }
    let is_shim = |pid: u32| processes.get(pid).is_some_and(|process| process.comm == SHIM);
    let started = |id: String| {
        let path = folder.join(&id);
        let first = processes.child(shim, view.number(&path.join("init.pid"))?, is_shim)?;
        let watcher = processes.get(first).map(|process| process.parent);
        let bundle = Bundle { view: Rc::clone(&view), path };
        Some(Started { id, first, watcher, bundle, by: By::Shim { namespace: namespace.clone() } })
    };
    Some(view.list(folder).into_iter().filter_map(|id| id.into_string().ok()).filter_map(started).collect())
}

/// What runtimes that nobody else told where to keep it keep of their containers. Only root writes there.
fn unwatched(processes: &Processes, view: &Rc<View>) -> Vec<Started> {
    let in_folder = |folder: &'static str, file: &'static str, read: fn(&[u8]) -> Option<State>, word: &'static str| {
        view.list(Path::new(folder)).into_iter().filter_map(move |id| {
            let id = id.into_string().ok()?;
            let State { first, start, bundle } = read(&view.read(&Path::new(folder).join(&id).join(file)).ok()?)?;
            // Its number may be another process's by now.
            let process = processes.get(first).filter(|process| process.start == start)?;
            let bundle = Bundle { view: Rc::clone(view), path: bundle };
            Some(Started { id, first, watcher: Some(process.parent), bundle, by: By::Runtime(word) })
        })
    };
    let runc = in_folder("/run/runc", "state.json", State::of_runc, RUNC);
    runc.chain(in_folder("/run/crun", "status", State::of_crun, CRUN)).collect()
}

/// What runtimes keep of a container.
#[derive(Debug, PartialEq, Eq)]
struct State {
    first: u32,
    start: u64,
    bundle: PathBuf,
}

impl State {
    /// `BaseState` of runc (libcontainer/container.go), and `State` (libcontainer/container_linux.go).
    fn of_runc(json: &[u8]) -> Option<Self> {
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
        let bundle = config.labels.iter().find_map(|label| label.strip_prefix("bundle="))?;
        Some(Self { first, start, bundle: bundle.into() })
    }

    /// `libcrun_write_container_status` of crun (src/libcrun/status.c).
    fn of_crun(json: &[u8]) -> Option<Self> {
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
    }

    #[test]
    fn runtimes_say_where_the_bundle_is() {
        let expected = State { first: 812, start: 4242, bundle: "/b".into() };
        let runc =
            r#"{"id":"x","init_process_pid":812,"init_process_start":4242,"config":{"labels":["a=b","bundle=/b"]}}"#;
        assert_eq!(State::of_runc(runc.as_bytes()).as_ref(), Some(&expected));
        let crun = r#"{"pid":812,"process-start-time":4242,"cgroup-path":"/x","bundle":"/b","owner":"root"}"#;
        assert_eq!(State::of_crun(crun.as_bytes()), Some(expected));
        assert_eq!(State::of_crun(b"{}"), None);
    }
}
