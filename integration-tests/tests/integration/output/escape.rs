//! Names that others choose, in all output for people: no control characters, and no line that a name starts.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_KEEPALIVE,
    policy::PolicyFile,
    probe::{self, Probe},
    process::{Running, in_mount_namespace, workload},
    script::{Family, Kind},
    wait,
};

use super::POLICY;
use crate::{stderr, stdout};

/// Ways in which a name can affect a terminal: colours, a line of its own, the C1 control sequence introducer,
/// reordered text, and invisible characters.
const NAME: &str = "\u{1b}[31mx\nforged\u{9b}2J\u{202e}\u{2066}\u{200b}\u{2028}\u{7f}\r";
/// Like [`NAME`], for a cgroup. The kernel permits no newline in its name (`cgroup_mkdir`, kernel/cgroup/cgroup.c).
const CGROUP: &str = "\u{1b}[31mx\u{9b}2J\u{202e}\u{2066}\u{200b}\u{2028}\u{7f}\r";
/// For the command name of a task, which has 15 bytes.
const COMM: &str = "\u{1b}[1m\nforged\u{9b}";

/// Panics if a text has characters that no name may add to it.
#[track_caller]
fn assert_clean(what: &str, text: &str) {
    let is_strange = |c: &char| {
        (c.is_control() && *c != '\n')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
    };
    let strange: Vec<char> = text.chars().filter(is_strange).collect();
    assert!(strange.is_empty(), "{what}: {strange:?} in {text:?}");
    let forged = text.lines().find(|line| line.starts_with("forged"));
    assert!(forged.is_none(), "{what}: a line that a name starts: {text:?}");
}

/// An environment with hostile names: a policy, programs, and a cgroup.
struct Place {
    policy: PolicyFile,
    parent: Cgroup,
    target: Cgroup,
}

impl Place {
    fn new(text: &str) -> Self {
        let parent = Cgroup::new();
        let target = parent.child(CGROUP);
        Self { policy: PolicyFile::named(&format!("{NAME}.toml"), text), parent, target }
    }

    fn program(&self, original: &Path) -> PathBuf {
        let link = self.policy.dir().join(COMM);
        // The task gets the name of the link.
        symlink(original, &link).unwrap();
        link
    }

    /// Runs a command, checks its output, and returns it.
    #[track_caller]
    fn check<A: AsRef<OsStr>>(&self, words: &[A]) -> String {
        let mut command = agent::command(words);
        command.env("SOCKPOLICY_LOG", "debug");
        let output = Running::start(command).finish();
        let text = stdout(&output) + &stderr(&output);
        let shown: Vec<_> = words.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        assert_clean(&format!("{shown:?}"), &text);
        text
    }
}

const STRANGE_POLICY: &str = "name = \"some\"\n[[rule]]\nset = { SO_KEEPALIVE = true }\n[[test]]\nname = \"\\u001b[31m\\nforged\\u009b\"\nsocket = { protocol = \"tcp\" }\n\
     set = { SO_KEEPALIVE = false }\n";

#[test]
fn exec_and_audit_escape_names_in_reports() {
    let place = Place::new(STRANGE_POLICY);
    let program = place.program(Path::new(&workload()));
    let (program, policy) = (program.as_os_str(), place.policy.path().as_os_str());
    let word = OsStr::new;
    let command = [word("--"), program, word("storm"), word("1"), word("3")];
    let text = place.check(&[&[word("exec"), policy], &command[..]].concat());
    assert!(text.contains(r"\u{1b}[1m\nforged"), "the name is shown: {text}");
    let text = place.check(&[&[word("audit")], &command[..]].concat());
    assert!(text.contains(r"\u{1b}[1m\nforged"), "the name is shown: {text}");
    place.check(&[&[word("audit"), policy], &command[..]].concat());
    place.check(&[word("exec"), policy, word("--"), word(NAME)]);
    place.check(&[word("exec"), word("--report"), word(&format!("/no/{NAME}")), policy, word("--"), word("true")]);
}

#[test]
fn lists_and_plans_escape_names() {
    let place = Place::new(STRANGE_POLICY);
    let instance = Instance::new();
    let program = place.program(&probe::program());
    let mut probe = Probe::start_copy(&program, &place.target);
    let (socket, _) = probe.listener(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_KEEPALIVE, 0).unwrap();
    let pid = probe.pid.to_string();
    let (policy, cgroup) = (place.policy.path().as_os_str(), place.target.path().as_os_str());
    let word = OsStr::new;
    let on = [word("--cgroup"), cgroup, policy];
    for command in ["verify", "plan"] {
        let text = place.check(&[&[word(command)], &on[..]].concat());
        assert!(text.contains(r"\u{1b}["), "a name is shown: {text}");
    }
    place.check(&[&[word("apply"), word("--dry-run")], &on[..]].concat());
    let text = place.check(&[word("ls"), word("--cgroup"), cgroup]);
    assert!(text.contains(r"\u{1b}[31mx") && text.contains(r"\u{1b}[1m\nforged"), "the names are shown: {text}");
    place.check(&[word("explain"), word("--pid"), word(&pid), policy]);
    place.check(&[word("explain"), word("--cgroup"), cgroup, word("--protocol"), word("tcp"), policy]);
    place.check(&[word("test"), policy]);
    place.check(&[word("attach"), word("--instance"), word(&instance.name), word("--cgroup"), cgroup, policy]);
    let text = place.check(&[word("status"), word("--instance"), word(&instance.name)]);
    assert!(text.contains(r"\u{1b}[31mx"), "the name is shown: {text}");
    place.check(&[word("plan"), word("--instance"), word(&instance.name), word("--cgroup"), cgroup, policy]);
    // Another instance has these targets.
    place.check(&[word("run"), word("--cgroup"), cgroup, policy]);
    place.check(&[word("detach"), word("--instance"), word(&instance.name)]);
}

#[test]
fn errors_escape_names() {
    let place = Place::new(&format!("{POLICY}\"{}\" = 1\n", "a\\u001b[31m\\nforged\\u009b"));
    let word = OsStr::new;
    let (policy, missing) = (place.policy.path().as_os_str(), format!("/no/{NAME}"));
    let text = place.check(&[word("check"), policy]);
    assert!(text.contains(r"\u{1b}[31m"), "the names are shown: {text}");
    for words in [
        &["check", &missing][..],
        &["run", &missing],
        &["exec", &missing, "--", "true"],
        &["attach", &missing],
        &["audit", NAME],
        &["audit", "--cgroup", &missing],
        &["audit", "--option", NAME],
        &["ls", "--cgroup", &missing],
        &["plan", "--cgroup", &missing, "/dev/null"],
        &["status", "--instance", NAME],
        &["detach", "--instance", NAME],
        &["apply", "--restore", "--instance", NAME],
        &["run", "--instance", NAME, &missing],
        &["options", NAME],
        &["explain", "--local", NAME, &missing],
        &["check", "--kernel", NAME, &missing],
        &[NAME],
        &[&format!("--{NAME}")],
    ] {
        place.check(words);
    }
    let other = place
        .policy
        .add("b.toml", format!("[target]\ncgroup = \"no-such/{}*\"\n{POLICY}", r"\u001b[31m\nforged\u009b"));
    place.check(&[word("plan"), other.as_os_str()]);
    place.check(&[word("verify"), other.as_os_str()]);
}

#[test]
fn messages_of_run_escape_names() {
    let place = Place::new("");
    let text = format!("name = \"some\"\n[target]\ncgroup = {:?}\n{POLICY}", format!("{}/**", place.parent.name()));
    fs::write(place.policy.path(), &text).unwrap();
    let mut command = agent::command(&["run"]);
    command.arg(place.policy.dir()).env("SOCKPOLICY_LOG", "debug").stdin(Stdio::null());
    let mut running = Running::start(command);
    running.lines(1);
    let other = place.parent.child(&format!("{CGROUP}other"));
    let program = place.program(Path::new(&workload()));
    let mut storm = Command::new(program);
    storm.args(["storm", "1", "5"]);
    let names_other = || running.stdout().contains("other");
    assert!(wait::until(wait::TIMEOUT, names_other), "{}", running.stdout());
    assert!(Running::start_in(storm, other).finish().status.success());
    assert!(wait::until(wait::TIMEOUT, || running.stdout().contains("conflict")), "{}", running.stdout());
    fs::write(place.policy.path(), "no policy").unwrap();
    let is_refused = || running.stdout().contains("refused");
    assert!(wait::until(wait::TIMEOUT, is_refused), "{}", running.stderr());
    running.signal(Signal::SIGTERM);
    let output = running.finish();
    assert!(output.status.success());
    assert_clean("run", &(stdout(&output) + &stderr(&output)));
}

#[test]
fn instance_names_are_escaped() {
    let dir = PolicyFile::new("");
    let name = dir.add("name", NAME).display().to_string();
    let prepare = format!(
        "mount -t tmpfs none /run && mkdir -p /run/sockpolicy && : >\"/run/sockpolicy/$(cat {name}).json\" && \
         mount -t bpf none /sys/fs/bpf && mkdir -p \"/sys/fs/bpf/sockpolicy/$(cat {name})\""
    );
    for words in [
        &["status"][..],
        &["status", "--instance", "other"],
        &["detach", "--instance", "other"],
        &["apply", "--restore"],
    ] {
        let output = in_mount_namespace(&prepare, &agent::command(words)).output().unwrap();
        let text = stdout(&output) + &stderr(&output);
        assert!(!text.contains("unshare:") && !text.contains("mount:"), "{text}");
        assert_clean(&format!("{words:?}"), &text);
    }
}
