//! What `fuzz/` feeds with what runtimes, and processes that have the name of a watcher, write of containers.
//!
//! Each function fails by a panic.

use std::path::{Component, Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::json;

use super::{
    Listing,
    bundle::Config,
    engines::{Docked, Known, Stored, folder_of_docker, of_containerd, of_crio},
    identity::Status,
    named, names, own_cgroup, parse_number,
    processes::{CONMON, Kind, Process, SHIM, parse_stat},
    search,
    watchers::{Arguments, State, is_name},
};
use crate::host::container::{self, CONTAINERD, Container, is_id};

/// An id of 64 digits.
const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

/// Reads a file that a runtime or an engine keeps of a container, as each of the kinds that there are.
pub(crate) fn state_file(input: &[u8]) {
    state(input);
    if let Some(number) = parse_number(input) {
        assert_eq!(parse_number(format!("{number}\n").as_bytes()), Some(number));
    }
    if let Some(config) = json::<Config>(input) {
        bundle(&config);
    }
    for stored in json::<Vec<Stored>>(input).unwrap_or_default() {
        described(stored.known());
    }
    if let Some(docked) = json::<Docked>(input) {
        let known = docked.known();
        assert!([&known.name, &known.image].into_iter().flatten().all(|word| !word.is_empty()));
        described(known);
    }
    if let Ok(listing) = search::parse(input) {
        listed(&listing);
    }
}

fn json<T: DeserializeOwned>(input: &[u8]) -> Option<T> {
    serde_json::from_slice(input).ok()
}

/// What the two runtimes keep of a container. The same facts give the same state.
fn state(input: &[u8]) {
    if let Some(state) = State::of_runc(input) {
        let State { first, start, bundle } = &state;
        let labels = ["bundle=/of/the/image".to_owned(), format!("bundle={}", bundle.to_string_lossy())];
        let config = json!({ "labels": labels });
        let written = json!({ "init_process_pid": first, "init_process_start": start, "config": config });
        assert_eq!(State::of_runc(written.to_string().as_bytes()), Some(state));
    }
    if let Some(state) = State::of_crun(input) {
        let State { first, start, bundle } = &state;
        let written = json!({ "pid": first, "process-start-time": start, "bundle": bundle });
        assert_eq!(State::of_crun(written.to_string().as_bytes()), Some(state));
    }
}

fn bundle(config: &Config) {
    assert!(config.annotation("").is_none_or(|value| !value.is_empty()));
    let folder = folder_of_docker(config);
    assert!(folder.ends_with("containers"), "{folder:?}");
    of_containerd(ID, config).into_iter().chain(of_crio(config)).for_each(described);
    let asked = config.cgroup();
    assert!(asked.as_ref().is_none_or(|asked| !asked.as_os_str().is_empty()));
    // Without an id, only what the engine asked for makes an ancestor the container's.
    let process = asked.iter().fold(PathBuf::from("around"), |path, asked| path.join(relative(asked))).join("below");
    owned("web", asked.as_deref(), &process);
    owned(ID, asked.as_deref(), &process.join(ID).join("init.scope"));
}

/// A path without what leads out of it.
fn relative(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

/// Which cgroup is a container's: one that its first process is in, for a reason.
fn owned(id: &str, asked: Option<&Path>, process: &Path) {
    let Some(own) = own_cgroup(id, asked, process, None) else { return };
    assert!(process.starts_with(&own) && !own.as_os_str().is_empty(), "{own:?} of {process:?}");
    let is_named = own.file_name().and_then(|name| name.to_str()).is_some_and(|name| names(name, id));
    assert!(own == process || is_named || asked.is_some_and(|asked| own.ends_with(asked)), "{own:?}");
    assert_eq!(own_cgroup(id, asked, process, Some(process)), None, "the watcher's own cgroup");
}

/// What people see of a container.
fn described(known: Known) {
    let Known { name, image } = known;
    let container = Container { runtime: CONTAINERD, id: ID.to_owned(), pod: None, name, image };
    let container = named(container, &Path::new("kubepods/besteffort/pod3d6beaa3004913efb68ce073d73494b0").join(ID));
    assert_eq!(container.pod.as_deref(), Some("3d6beaa3004913efb68ce073d73494b0"));
    assert!(!container.to_string().contains(char::is_control));
    let words = [&container.name, &container.image].into_iter().flatten();
    words.for_each(|word| assert!(word.len() <= 1024 && !word.contains(char::is_control), "{word:?}"));
}

/// What a worker process has found: the agent reads what it was written from.
fn listed(listing: &Listing) {
    let written = serde_json::to_vec(listing).unwrap_or_default();
    assert_eq!(search::parse(&written).as_ref(), Ok(listing));
    listing.running.iter().for_each(|running| assert!(!running.container.to_string().contains(char::is_control)));
}

/// Reads what a process says of itself: its command line, or what procfs has of it.
pub(crate) fn watcher(input: &[u8]) {
    if let Some(arguments) = Arguments::parse(input) {
        command_line(input, &arguments);
    }
    status(input);
    stat(input);
    cgroup(input);
}

/// The values are the words behind the first of each option.
fn command_line(input: &[u8], arguments: &Arguments) {
    let Arguments { id, name, bundle, pid_file } = arguments;
    assert!(is_name(id) && !id.contains('/') && ![".", ".."].contains(&id.as_str()), "{id:?}");
    let words: Vec<&[u8]> = input.split(|byte| *byte == 0).collect();
    assert!(!words.contains(&&b"--exec-process-spec"[..]));
    let behind = |names: [&str; 2]| {
        let mut pairs = words.windows(2).filter(|pair| names.iter().any(|name| name.as_bytes() == pair[0]));
        pairs.next().map(|pair| pair[1])
    };
    assert_eq!(behind(["-c", "--cid"]), Some(id.as_bytes()));
    assert_eq!(behind(["-b", "--bundle"]), Some(bundle.as_os_str().as_encoded_bytes()));
    assert_eq!(behind(["-p", "--container-pidfile"]), Some(pid_file.as_os_str().as_encoded_bytes()));
    assert!(name.as_ref().is_none_or(|name| behind(["-n", "--name"]) == Some(name.as_bytes())));
    // Words further on are other programs'.
    let longer = [input, b"\0-c\0other\0-b\0/other\0-p\0/other"].concat();
    let again = Arguments::parse(&longer);
    let places = |arguments: &Arguments| (arguments.id.clone(), arguments.bundle.clone(), arguments.pid_file.clone());
    assert_eq!(again.as_ref().map(places), Some(places(arguments)));
}

fn status(input: &[u8]) {
    if let Some(status) = Status::parse(input) {
        assert!(!status.numbers.is_empty(), "no number");
        assert_eq!(Status::parse(written(&status).as_bytes()), Some(status));
    }
    // As the kernel writes a name, which says nothing of the rest.
    let name = String::from_utf8_lossy(input).replace('\\', "\\\\").replace('\n', "\\n");
    let status = Status { uids: [1, 2, 3, 4], gids: [5; 4], capabilities: 6, numbers: vec![7, 8] };
    assert_eq!(Status::parse(format!("Name:\t{name}\n{}", written(&status)).as_bytes()), Some(status));
}

fn written(status: &Status) -> String {
    let Status { uids, gids, capabilities, numbers } = status;
    let words = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join("\t");
    let (uids, gids, numbers) = (words(uids), words(gids), words(numbers));
    format!("Uid:\t{uids}\nGid:\t{gids}\nNSpid:\t{numbers}\nCapEff:\t{capabilities:016x}\n")
}

fn stat(input: &[u8]) {
    let stat = |parent: u32, name: &[u8], start: u64| {
        let fields = format!(") S {parent} 812 812 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 {start} 5 6\n");
        parse_stat(&[b"812 (", name, fields.as_bytes()].concat())
    };
    if let Some(Process { parent, start, kind }) = parse_stat(input) {
        let name = kind.map_or("web", |kind| if kind == Kind::Conmon { CONMON } else { SHIM });
        assert_eq!(stat(parent, name.as_bytes(), start), Some(Process { parent, start, kind }));
    }
    // A process may have any name.
    let kind = match input {
        _ if input == CONMON.as_bytes() => Some(Kind::Conmon),
        _ if input == SHIM.as_bytes() => Some(Kind::Shim),
        _ => None,
    };
    assert_eq!(stat(7, input, 4242), Some(Process { parent: 7, start: 4242, kind }));
}

/// The path of a cgroup, whose folders users name.
fn cgroup(input: &[u8]) {
    let Ok(path) = str::from_utf8(input) else { return };
    let found = container::of_cgroup(path);
    if let Some(container) = &found {
        assert!(is_id(&container.id) && path.split('/').any(|name| name.contains(&container.id)), "{path:?}");
        assert!(container.pod.as_ref().is_none_or(|pod| (32..=64).contains(&pod.len())), "{path:?}");
        let read = serde_json::to_vec(container).ok().and_then(|written| json::<Container>(&written));
        assert_eq!(read.as_ref(), Some(container));
    }
    assert_eq!(container::of_cgroup(&format!("{path}/below/it")), found, "{path:?}");
    let inner = container::of_cgroup(&format!("{path}/system.slice/docker-{ID}.scope"));
    assert_eq!(inner.map(|container| (container.runtime, container.id)), Some((container::DOCKER, ID.to_owned())));
    owned(ID, None, Path::new(path));
    owned(path, None, &Path::new("docker").join(relative(Path::new(path))).join("below"));
}
