//! Entry points of the fuzz targets in `fuzz/`: the files of container runtimes, and the data that a process with the name of a
//! watcher controls.
//!
//! Each function panics if a check fails.

use std::path::{Component, Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::json;

use super::{
    Listing,
    bundle::Config,
    engines::{DockerContainer, Labels, StorageContainer, docker_directory, of_containerd, of_crio},
    identity::Status,
    is_named_after, own_cgroup, parse_pid,
    processes::{CONMON, Kind, Process, SHIM, parse_stat},
    sanitized, search,
    watchers::{Arguments, State, is_valid_id},
};
use crate::container::{self, CONTAINERD, Container, is_id};

/// An id of 64 digits.
const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

/// Parses a file of a runtime or an engine about a container, in each known format.
pub(crate) fn state_file(input: &[u8]) {
    state(input);
    if let Some(number) = parse_pid(input) {
        assert_eq!(parse_pid(format!("{number}\n").as_bytes()), Some(number));
    }
    if let Some(config) = json::<Config>(input) {
        bundle(&config);
    }
    for stored in json::<Vec<StorageContainer>>(input).unwrap_or_default() {
        check_labels(stored.labels());
    }
    if let Some(container) = json::<DockerContainer>(input) {
        let labels = container.labels();
        assert!([&labels.name, &labels.image].into_iter().flatten().all(|label| !label.is_empty()));
        check_labels(labels);
    }
    if let Ok(listing) = search::parse(input) {
        check_listing(&listing);
    }
}

fn json<T: DeserializeOwned>(input: &[u8]) -> Option<T> {
    serde_json::from_slice(input).ok()
}

/// Checks that the state files of both runtimes can be parsed, written and parsed again without a change.
fn state(input: &[u8]) {
    if let Some(state) = State::of_runc(input) {
        let State { init, start, bundle } = &state;
        let labels = ["bundle=/of/the/image".to_owned(), format!("bundle={}", bundle.to_string_lossy())];
        let config = json!({ "labels": labels });
        let written = json!({ "init_process_pid": init, "init_process_start": start, "config": config });
        assert_eq!(State::of_runc(written.to_string().as_bytes()), Some(state));
    }
    if let Some(state) = State::of_crun(input) {
        let State { init, start, bundle } = &state;
        let written = json!({ "pid": init, "process-start-time": start, "bundle": bundle });
        assert_eq!(State::of_crun(written.to_string().as_bytes()), Some(state));
    }
}

fn bundle(config: &Config) {
    assert!(config.annotation("").is_none_or(|value| !value.is_empty()));
    let directory = docker_directory(config);
    assert!(directory.ends_with("containers"), "{directory:?}");
    of_containerd(ID, config).into_iter().chain(of_crio(config)).for_each(check_labels);
    let requested = config.cgroup();
    assert!(requested.as_ref().is_none_or(|requested| !requested.as_os_str().is_empty()));
    // Without an id of 64 digits, an ancestor is the container's cgroup only if the engine requested it.
    let outer = PathBuf::from("around");
    let process = requested.iter().fold(outer, |path, requested| path.join(relative(requested))).join("below");
    check_own_cgroup("web", requested.as_deref(), &process);
    check_own_cgroup(ID, requested.as_deref(), &process.join(ID).join("init.scope"));
}

/// Returns a path without components such as `/` and `..`.
fn relative(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

/// Checks that a container's cgroup contains its init process, and is the cgroup of that process, named after the container, or
/// requested by the engine.
fn check_own_cgroup(id: &str, requested: Option<&Path>, process: &Path) {
    let Some(own) = own_cgroup(id, requested, process, None) else { return };
    assert!(process.starts_with(&own) && !own.as_os_str().is_empty(), "{own:?} of {process:?}");
    let is_named = own.file_name().and_then(|name| name.to_str()).is_some_and(|name| is_named_after(name, id));
    assert!(own == process || is_named || requested.is_some_and(|requested| own.ends_with(requested)), "{own:?}");
    assert_eq!(own_cgroup(id, requested, process, Some(process)), None, "the watcher's own cgroup");
}

/// Checks the name and the image that are shown to people.
fn check_labels(labels: Labels) {
    let Labels { name, image } = labels;
    let container = Container { runtime: CONTAINERD, id: ID.to_owned(), pod: None, name, image };
    let container =
        sanitized(container, &Path::new("kubepods/besteffort/pod3d6beaa3004913efb68ce073d73494b0").join(ID));
    assert_eq!(container.pod.as_deref(), Some("3d6beaa3004913efb68ce073d73494b0"));
    assert!(!container.to_string().contains(char::is_control));
    let labels = [&container.name, &container.image].into_iter().flatten();
    labels.for_each(|label| assert!(label.len() <= 1024 && !label.contains(char::is_control), "{label:?}"));
}

/// Checks that the agent reads the same listing that a worker process writes.
fn check_listing(listing: &Listing) {
    let written = serde_json::to_vec(listing).unwrap_or_default();
    assert_eq!(search::parse(&written).as_ref(), Ok(listing));
    listing.running.iter().for_each(|running| assert!(!running.container.to_string().contains(char::is_control)));
}

/// Parses the command line of a process, or another file of the process in procfs.
pub(crate) fn watcher(input: &[u8]) {
    if let Some(arguments) = Arguments::parse(input) {
        command_line(input, &arguments);
    }
    status(input);
    stat(input);
    cgroup(input);
}

/// Checks that each value is the word after the first occurrence of its option.
fn command_line(input: &[u8], arguments: &Arguments) {
    let Arguments { id, name, bundle, pid_file } = arguments;
    assert!(is_valid_id(id) && !id.contains('/') && ![".", ".."].contains(&id.as_str()), "{id:?}");
    let words: Vec<&[u8]> = input.split(|byte| *byte == 0).collect();
    assert!(!words.contains(&&b"--exec-process-spec"[..]));
    let value_of = |options: [&str; 2]| {
        let mut pairs = words.windows(2).filter(|pair| options.iter().any(|option| option.as_bytes() == pair[0]));
        pairs.next().map(|pair| pair[1])
    };
    assert_eq!(value_of(["-c", "--cid"]), Some(id.as_bytes()));
    assert_eq!(value_of(["-b", "--bundle"]), Some(bundle.as_os_str().as_encoded_bytes()));
    assert_eq!(value_of(["-p", "--container-pidfile"]), Some(pid_file.as_os_str().as_encoded_bytes()));
    assert!(name.as_ref().is_none_or(|name| value_of(["-n", "--name"]) == Some(name.as_bytes())));
    // Later words are the arguments of other programs.
    let longer = [input, b"\0-c\0other\0-b\0/other\0-p\0/other"].concat();
    let again = Arguments::parse(&longer);
    let values = |arguments: &Arguments| (arguments.id.clone(), arguments.bundle.clone(), arguments.pid_file.clone());
    assert_eq!(again.as_ref().map(values), Some(values(arguments)));
}

fn status(input: &[u8]) {
    if let Some(status) = Status::parse(input) {
        assert!(!status.pids.is_empty(), "no process id");
        assert_eq!(Status::parse(written(&status).as_bytes()), Some(status));
    }
    // The kernel escapes the name, so that the name cannot change the other fields.
    let name = String::from_utf8_lossy(input).replace('\\', "\\\\").replace('\n', "\\n");
    let status = Status { uids: [1, 2, 3, 4], gids: [5; 4], capabilities: 6, pids: vec![7, 8] };
    assert_eq!(Status::parse(format!("Name:\t{name}\n{}", written(&status)).as_bytes()), Some(status));
}

fn written(status: &Status) -> String {
    let Status { uids, gids, capabilities, pids } = status;
    let words = |pids: &[u32]| pids.iter().map(u32::to_string).collect::<Vec<_>>().join("\t");
    let (uids, gids, pids) = (words(uids), words(gids), words(pids));
    format!("Uid:\t{uids}\nGid:\t{gids}\nNSpid:\t{pids}\nCapEff:\t{capabilities:016x}\n")
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
    // A process can have any name.
    let kind = match input {
        _ if input == CONMON.as_bytes() => Some(Kind::Conmon),
        _ if input == SHIM.as_bytes() => Some(Kind::Shim),
        _ => None,
    };
    assert_eq!(stat(7, input, 4242), Some(Process { parent: 7, start: 4242, kind }));
}

/// Parses the path of a cgroup, whose names users can choose.
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
    check_own_cgroup(ID, None, Path::new(path));
    check_own_cgroup(path, None, &Path::new("docker").join(relative(Path::new(path))).join("below"));
}
