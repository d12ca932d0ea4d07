//! docs/events.md describes each kind of line and each key that the commands print, with its type. Each kind and each key
//! that it describes is printed.

mod document;

use std::{collections::BTreeSet, fs, process::Command};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    bpffs::Instance,
    cgroup::{Cgroup, NestedCgroups},
    foreign_program::{AttachMode, ForeignProgram},
    options::{SO_MARK, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY, TCP_SYNCNT},
    policy::PolicyFile,
    probe::Probe,
    process::Running,
    script::{Family, Kind},
};

use self::document::{Document, compare};
use crate::stdout;

/// Keys that these runs do not print, or print as `null` only: the section, the path, and the reason.
const NOT_SEEN: &[(&str, &str, &str)] = &[
    ("*", "container.pod", "needs a pod"),
    ("*", "container.name", "needs a container runtime"),
    ("*", "container.image", "needs a container runtime"),
    ("doctor", "attached_programs[].displaced", "only `status` prints it"),
    ("doctor", "option_support[].reason", "needs a kernel that does not support an option"),
    ("instance", "error", "needs a record that this build cannot read"),
    ("instance", "settings[].read[].comm", "`status` knows counts and no calls"),
    ("instance", "settings[].read[].value", "`status` knows counts and no calls"),
    ("instance", "settings[].requested[].comm", "`status` knows counts and no calls"),
    ("instance", "settings[].requested[].value", "`status` knows counts and no calls"),
    ("instance", "settings[].requested[].verdict", "`status` knows counts and no calls"),
];

/// The lines of all runs.
#[derive(Default)]
struct Lines(Vec<Value>);

impl Lines {
    #[track_caller]
    fn add(&mut self, text: &str) {
        for line in text.lines() {
            self.0.push(serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")));
        }
    }

    /// Ends an agent, and adds its output.
    #[track_caller]
    fn end(&mut self, run: Run) {
        run.signal(Signal::SIGTERM);
        let output = run.wait_for_end();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.add(&stdout(&output));
    }

    /// Adds the output of a command with `--output json`.
    #[track_caller]
    fn run(&mut self, arguments: &[&str]) {
        let output = agent::output(&[arguments, &["--output", "json"]].concat());
        assert!(!output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        self.add(&stdout(&output));
    }
}

fn path(policy: &PolicyFile) -> &str {
    policy.path().to_str().unwrap()
}

const RULES: &str = "[[rule]]
name = \"r\"
match = { protocol = \"tcp\" }
set = { TCP_NODELAY = true, TCP_KEEPIDLE = \"60s\", SO_MARK = \"0x20/0xff\", SO_BINDTODEVICE = \"none-such0\", TCP_BPF_IW = 20, \
TCP_KEEPCNT = { value = 5, on_conflict = \"allow\" } }
limit = { TCP_SYNCNT = { max = 9 } }
";

/// A setting that no kernel supports.
const UNSUPPORTED: &str = "[[rule]]\nset = { TCP_CONGESTION = \"none-such\" }\n";

/// Makes calls of each kind with these rules in force.
fn make_calls(probe: &mut Probe, cgroup: &Cgroup) {
    let socket = probe.open(Family::Inet, Kind::Tcp);
    for (option, value) in
        [(TCP_NODELAY, 0), (TCP_KEEPIDLE, 30), (SO_MARK, 0x1133), (TCP_SYNCNT, 100), (TCP_SYNCNT, 3), (TCP_KEEPCNT, 7)]
    {
        probe.set(socket, option, value).unwrap();
    }
    assert_eq!(probe.int(socket, TCP_KEEPCNT), 7);
    probe.pair(Family::Inet, Kind::Tcp);
    // An argument that cannot be read, and one without a length.
    let script = "import ctypes, socket
c, s = ctypes.CDLL(None), socket.socket()
c.setsockopt(s.fileno(), 6, 9999, ctypes.c_void_p(1), 4)
c.setsockopt(s.fileno(), 6, 1, None, -1)";
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script]);
    cgroup.run_inside(&mut command);
    assert!(command.status().unwrap().success());
}

/// `run --apply`, and its reloads and targets.
fn enforce(lines: &mut Lines, target: &Cgroup, container: &Cgroup) {
    let slice = Cgroup::new();
    let policy = |more: &str| {
        let targets = [target.name(), format!("{}/late*", slice.name())];
        format!("{more}[audit]\ncalls = \"all\"\ntiming = true\n[target]\ncgroup = {targets:?}\n{RULES}{UNSUPPORTED}")
    };
    let file = PolicyFile::new(policy(""));
    let mut probe = Probe::start(container);
    probe.pair(Family::Inet, Kind::Tcp);
    let instance = Instance::new();
    let name = &*instance.name;
    let run = Run::start_with(&file, &["--apply", "--instance", name]);
    run.notice("apply-summary", 1);
    make_calls(&mut probe, container);
    fs::write(file.path(), policy("[[rule]]\nset = { SO_PRIORITY = 3 }\n")).unwrap();
    run.notice("reload", 1);
    let late = slice.child("late");
    run.notice("targets", 1);
    fs::write(file.path(), "no policy").unwrap();
    run.notice("reload", 2);
    let foreign = ForeignProgram::attach(target, TCP_SYNCNT, AttachMode::Multi);
    lines.run(&["status", "--instance", name]);
    let plan = PolicyFile::new(
        policy("")
            .replace("TCP_BPF_IW = 20", "SO_PRIORITY = 1")
            .replace("TCP_NODELAY = true", "TCP_NODELAY = false")
            .replace("max = 9 } }", "max = 9, on_conflict = \"deny\" } }"),
    );
    lines.run(&["plan", path(&plan), "--instance", name]);
    lines.run(&["plan", path(&plan)]);
    drop((foreign, late));
    lines.end(run);
}

/// `run` without `--apply`: repairs of new targets, and an object that is skipped.
fn repair(lines: &mut Lines, slice: &Cgroup) {
    let text = format!(
        "[target]\ncgroup = [{0:?}, {1:?}]\n",
        format!("{}/new", slice.name()),
        format!("{}/deep/**", slice.name())
    );
    let policy = PolicyFile::new(format!("{text}[[rule]]\nset = {{ SO_MARK = 7 }}\n"));
    let deep = slice.child("deep");
    let chain = NestedCgroups::below(&deep, std::iter::repeat_n("d", 40));
    let instance = Instance::new();
    let run = Run::start_with(&policy, &["--instance", &instance.name]);
    let agent = Pid::from_raw(run.pid() as i32);
    let mut probe = Probe::start(slice);
    kill(agent, Signal::SIGSTOP).unwrap();
    let new = slice.child("new");
    probe.enter(&new);
    probe.listener(Family::Inet, Kind::Tcp);
    kill(agent, Signal::SIGCONT).unwrap();
    run.notice("repair-summary", 1);
    lines.run(&["status", "--instance", &instance.name]);
    let foreign = ForeignProgram::attach(slice, TCP_SYNCNT, AttachMode::Exclusive);
    lines.run(&["plan", path(&policy)]);
    lines.run(&["doctor"]);
    lines.run(&["plan", path(&policy), "--dry-run", "--audit-backend", "none"]);
    drop(foreign);
    lines.end(run);
    drop(chain);
}

/// `ls`, `verify` and `apply`.
fn inspect(lines: &mut Lines, container: &Cgroup) {
    let script = "import os, socket, sys, time
kept = socket.socket()
if os.fork(): print('ready', flush=True)
time.sleep(1000)";
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script]);
    let mut owner = Running::start_in(command, container.child("shared"));
    owner.lines(1);
    let mut probe = Probe::start(container);
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    // No process accepts this connection, so no descriptor refers to its socket.
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let policy = PolicyFile::new(format!("[target]\ncgroup = {:?}\n{RULES}", container.name()));
    let instance = Instance::new();
    lines.run(&["ls", "--cgroup", &container.name(), "--all"]);
    lines.run(&["verify", path(&policy)]);
    lines.run(&["apply", path(&policy), "--dry-run"]);
    lines.run(&["apply", path(&policy), "--instance", &instance.name]);
    lines.run(&["apply", "--restore", "--instance", &instance.name]);
}

/// The commands that read only files.
fn read_files(lines: &mut Lines) {
    let rules = "[[rule]]\nname = \"first\"\nset = { TCP_NODELAY = true }\n[[rule]]\nname = \"second\"\nset = { TCP_NODELAY = false }\n";
    let test = "[[test]]\nname = \"t\"\nsocket = { protocol = \"tcp\" }\nset = { TCP_NODELAY = false }\nfree = [\"TCP_SYNCNT\"]\n";
    let (policy, wrong) =
        (PolicyFile::new(format!("{rules}{test}")), PolicyFile::new("[[rule]]\nset = { NOSUCH = 1 }\n"));
    lines.run(&["check", path(&policy)]);
    lines.run(&["check", path(&wrong)]);
    lines.run(&["explain", path(&policy), "--protocol", "tcp"]);
    lines.run(&["test", path(&policy)]);
    lines.run(&["options"]);
}

#[test]
fn output_is_as_documented() {
    let text = include_str!("../../../docs/events.md");
    let document = Document::parse(text);
    let mut lines = Lines::default();
    let target = Cgroup::new();
    let container = target.child(&format!("docker-{:064x}.scope", std::process::id()));
    enforce(&mut lines, &target, &container);
    inspect(&mut lines, &container);
    repair(&mut lines, &Cgroup::new());
    read_files(&mut lines);

    let (mut wrong, mut seen, mut kinds) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for line in &lines.0 {
        let kind = line["event"].as_str().unwrap();
        let Some(keys) = document.kinds.get(kind) else {
            wrong.insert(format!("{kind} is not documented"));
            continue;
        };
        kinds.insert(kind);
        let (mut seen_here, mut wrong_here) = (BTreeSet::new(), BTreeSet::new());
        compare(keys, line, "", &mut seen_here, &mut wrong_here);
        let section = &document.sections[kind];
        seen.extend(seen_here.into_iter().map(|path| (section.clone(), path)));
        wrong.extend(wrong_here.into_iter().map(|what| format!("{kind}: {what}")));
        for reason in line["losses"].as_object().into_iter().flat_map(|losses| losses.keys()) {
            if !document.losses.contains(reason) {
                wrong.insert(format!("loss {reason} is not documented"));
            }
        }
    }
    for (kind, keys) in &document.kinds {
        let section = &document.sections[kind];
        if !kinds.contains(kind.as_str()) {
            wrong.insert(format!("{kind} is documented, and no run printed it"));
            continue;
        }
        for path in keys.keys() {
            let is_listed = NOT_SEEN.iter().any(|(of, name, _)| (*of == "*" || of == section) && name == path);
            let is_seen = seen.contains(&(section.clone(), path.clone()));
            if !is_seen && !is_listed {
                wrong.insert(format!("{section}: {path} is documented, and no run printed a value"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}
