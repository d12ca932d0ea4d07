//! Policy files that other users can change.

use std::{
    fs,
    os::unix::fs::{chown, lchown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use sockpolicy_integration_tests::{
    agent::{self, Run},
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_MARK,
    policy::{PolicyFile, set_mode, sets_mark},
    probe::Probe,
    process::{self, with_mounts},
    wait,
};

use super::succeeds;
use crate::{stderr, stdout};

const NOBODY: Option<u32> = Some(65534);

/// A policy in a directory in a directory, which go with the first value.
struct Nested {
    _whole: PolicyFile,
    outer: PathBuf,
    inner: PathBuf,
    file: PathBuf,
}

impl Nested {
    fn new(text: &str) -> Self {
        let whole = PolicyFile::named("other", "");
        let outer = whole.folder().join("outer");
        let inner = outer.join("inner");
        for directory in [&outer, &inner] {
            fs::create_dir(directory).unwrap();
            set_mode(directory, 0o755);
        }
        let file = inner.join("policy.toml");
        fs::write(&file, text).unwrap();
        set_mode(&file, 0o644);
        Self { _whole: whole, outer, inner, file }
    }
}

/// What makes a policy another user's to decide, and how that is said of it. Each gives the path to name to the agent.
type Weakening = (fn(&Nested) -> PathBuf, &'static str);

const WEAK: [Weakening; 10] = [
    (|at| (set_mode(&at.file, 0o646), at.file.clone()).1, "users other than its owner may write to it (mode 0646)"),
    (
        |at| {
            chown(&at.file, None, NOBODY).unwrap();
            set_mode(&at.file, 0o664);
            at.file.clone()
        },
        "users other than its owner may write to it (mode 0664)",
    ),
    (|at| (chown(&at.file, NOBODY, None).unwrap(), at.file.clone()).1, "it belongs to user 65534"),
    (|at| (set_mode(&at.inner, 0o777), at.file.clone()).1, "/inner (mode 0777)"),
    (|at| (set_mode(&at.inner, 0o777), at.inner.clone()).1, "/inner (mode 0777)"),
    (|at| (set_mode(&at.outer, 0o775), at.inner.clone()).1, "/outer (mode 0775)"),
    (|at| (chown(&at.inner, NOBODY, None).unwrap(), at.file.clone()).1, "/inner belongs to user 65534"),
    (|at| (chown(&at.outer, NOBODY, None).unwrap(), at.file.clone()).1, "/outer belongs to user 65534"),
    (
        // The link and the file are root's, the directory that the link is in is not.
        |at| {
            let elsewhere = at.outer.join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            symlink(&at.file, elsewhere.join("link.toml")).unwrap();
            symlink("elsewhere/link.toml", at.outer.join("first.toml")).unwrap();
            set_mode(&elsewhere, 0o777);
            at.outer.join("first.toml")
        },
        "/elsewhere (mode 0777)",
    ),
    (
        |at| {
            set_mode(&at.outer, 0o1777);
            let link = at.outer.join("link.toml");
            symlink("inner/policy.toml", &link).unwrap();
            lchown(&link, NOBODY, None).unwrap();
            link
        },
        "/link.toml belongs to user 65534",
    ),
];

/// Those that the kernel lets a command open: under fs.protected_symlinks it follows no link of another user in a sticky
/// directory (Documentation/admin-guide/sysctl/fs.rst).
fn weak() -> impl Iterator<Item = (fn(&Nested) -> PathBuf, &'static str)> {
    let protects = fs::read_to_string("/proc/sys/fs/protected_symlinks").unwrap().trim() == "1";
    WEAK.iter().copied().filter(move |(_, why)| !protects || !why.starts_with("/link.toml"))
}

fn changing(instance: &Instance, path: &Path, flags: &[&str]) -> Vec<Command> {
    let with = |arguments: &[&str]| {
        let mut command = agent::command(arguments);
        command.args(flags).arg(path);
        command
    };
    let mut exec = with(&["exec", "--quiet", agent::ALLOW_UNSUPPORTED]);
    exec.args(["--", "echo", "ran"]);
    vec![
        with(&["run", agent::ALLOW_UNSUPPORTED]),
        with(&["attach", agent::ALLOW_UNSUPPORTED, "--instance", &instance.name]),
        with(&["apply", "--instance", &instance.name]),
        exec,
    ]
}

#[test]
fn policy_that_other_users_can_change_is_refused_by_commands_that_change_something() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    for (weaken, why) in weak() {
        let at = Nested::new(&sets_mark(&target, 1));
        let path = weaken(&at);
        for command in changing(&instance, &path, &[]) {
            let name = command.get_args().next().unwrap().to_owned();
            let output = process::output(command);
            let said = stderr(&output);
            assert!(said.starts_with("error: cannot use ") && said.contains(why), "{name:?} {why}: {said}");
            assert!(said.contains("--insecure-policies"), "{name:?} {why}: {said}");
            assert_eq!((stdout(&output).as_str(), said.matches("error: ").count()), ("", 1), "{said}");
            assert_eq!(output.status.code(), Some(if name == "exec" { 125 } else { 2 }), "{said}");
        }
        for command in changing(&instance, &path, &["--insecure-policies"]).into_iter().skip(1) {
            let output = process::output(command);
            succeeds(&output);
            assert!(!stderr(&output).contains("`apply` refuse"), "{}", stderr(&output));
        }
        instance.detach();
    }
}

#[test]
fn policy_that_other_users_can_change_is_warned_of_by_commands_that_change_nothing() {
    let target = Cgroup::new();
    let socket = ["--protocol", "tcp", "--cgroup", &target.name()];
    for (weaken, why) in weak() {
        let at = Nested::new(&sets_mark(&target, 1));
        let path = weaken(&at);
        for name in ["check", "plan", "test", "verify", "ls", "explain"] {
            let with = |flags: &[&str]| {
                let mut command = agent::command(&[name]);
                command.args(flags).args(if name == "explain" { &socket[..] } else { &[] });
                // Of a directory, these take the files.
                command.arg(if path.is_dir() { path.join("policy.toml") } else { path.clone() });
                process::output(command)
            };
            let (output, accepted) = (with(&[]), with(&["--insecure-policies"]));
            let said = stderr(&output);
            assert!(
                said.contains("warning: `run`, `attach`, `exec` and `apply` refuse ") && said.contains(why),
                "{name}: {said}"
            );
            assert!(!stderr(&accepted).contains("`apply` refuse"), "{name}: {}", stderr(&accepted));
            assert_eq!(
                (stdout(&output), output.status.code()),
                (stdout(&accepted), accepted.status.code()),
                "{name}: {said}"
            );
            assert_eq!(output.status.code(), Some(0), "{name}: {said}");
        }
    }
}

#[test]
fn fault_of_a_directory_is_said_once_for_all_files_in_it() {
    let at = Nested::new("[[rule]]\nset = { SO_MARK = 1 }\n");
    for name in ["b.toml", "c.toml"] {
        fs::copy(&at.file, at.inner.join(name)).unwrap();
    }
    set_mode(&at.inner, 0o777);
    set_mode(&at.inner.join("c.toml"), 0o666);
    let output = process::output(changing(&Instance::new(), &at.inner, &["--cgroup", "/none"]).swap_remove(0));
    let said = stderr(&output);
    assert_eq!((said.matches("error: ").count(), said.matches("(mode 0777)").count()), (2, 1), "{said}");
    assert!(said.contains("c.toml: users other than its owner may write to it (mode 0666)\n"), "{said}");
}

#[test]
fn sticky_directories_and_read_only_mounts_are_accepted() {
    let target = Cgroup::new();
    let at = Nested::new(&sets_mark(&target, 1));
    set_mode(&at.outer, 0o1777);
    set_mode(&at.inner, 0o1777);
    let exec = |path: &Path| {
        let mut command = agent::command(&["exec", "--quiet", agent::ALLOW_UNSUPPORTED]);
        command.arg(path).args(["--", "echo", "ran"]);
        command
    };
    let output = process::output(exec(&at.file));
    assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
    // As the kubelet makes a ConfigMap's directory.
    let config = |flags: &str| {
        format!(
            "cd {} && mount -t tmpfs -o mode=1777 none inner && cd inner && chmod 0777 . && mkdir -m 0777 ..1 && \
             printf '[[rule]]\\nset = {{ SO_MARK = 1 }}\\n' >..1/policy.toml && chmod 0666 ..1/policy.toml && ln -s ..1 ..data && \
             ln -s ..data/policy.toml policy.toml && mount -o remount,{flags} ../inner",
            at.outer.display()
        )
    };
    let output = process::output(with_mounts(&config("ro"), &exec(&at.file)));
    assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
    let output = process::output(with_mounts(&config("rw"), &exec(&at.file)));
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)), "{}", stderr(&output));
    // Who owns it counts there too.
    let owned = config("rw") + " && chown nobody ..1/policy.toml && mount -o remount,ro ../inner";
    let output = process::output(with_mounts(&owned, &exec(&at.file)));
    assert!(stderr(&output).contains("belongs to user"), "{}", stderr(&output));
}

#[test]
fn files_of_the_user_who_ran_sudo_are_accepted() {
    let target = Cgroup::new();
    let at = Nested::new(&sets_mark(&target, 1));
    for path in [&at.file, &at.inner, &at.outer] {
        chown(path, NOBODY, NOBODY).unwrap();
    }
    let run = |sudo: Option<&str>, real: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--ruid", real, "--", agent::program().to_str().unwrap()]);
        command
            .args(["exec", "--quiet", agent::ALLOW_UNSUPPORTED])
            .arg(&at.file)
            .args(["--", "echo", "ran"])
            .env_remove("SUDO_UID");
        if let Some(sudo) = sudo {
            command.env("SUDO_UID", sudo);
        }
        process::output(command)
    };
    let output = run(Some("65534"), "0");
    assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
    for (sudo, real) in
        [(None, "0"), (Some("65533"), "0"), (Some("65534 "), "0"), (Some("nobody"), "0"), (Some("65534"), "65533")]
    {
        let output = run(sudo, real);
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)), "{sudo:?} {real}");
        assert!(stderr(&output).contains("belongs to user 65534"), "{sudo:?} {real}: {}", stderr(&output));
    }
    // Not also those of others.
    set_mode(&at.inner, 0o777);
    assert_eq!(run(Some("65534"), "0").status.code(), Some(125));
}

#[test]
fn file_that_other_users_can_change_by_now_is_not_reloaded() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::started(&policy, &[]);
    set_mode(policy.path(), 0o666);
    assert_eq!(run.notice("reload", 1)["in_force"], false);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    assert_eq!(Probe::start(&target).fresh(SO_MARK), 1);
    assert!(run.stderr().contains("users other than its owner may write to it (mode 0666)"), "{}", run.stderr());
    set_mode(policy.path(), 0o644);
    let is_reloaded =
        wait::until(wait::PATIENCE, || run.notices("reload").iter().any(|notice| notice["in_force"] == true));
    assert!(is_reloaded, "{}{}", run.lines(), run.stderr());
    assert_eq!(Probe::start(&target).fresh(SO_MARK), 2);
    run.finish();
}
