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
    process::{self, in_mount_namespace},
    wait,
};

use super::succeeds;
use crate::{stderr, stdout};

const NOBODY: Option<u32> = Some(65534);

/// A policy in nested directories, which are removed with the first field.
struct Nested {
    _whole: PolicyFile,
    outer: PathBuf,
    inner: PathBuf,
    file: PathBuf,
}

impl Nested {
    fn new(text: &str) -> Self {
        let whole = PolicyFile::named("other", "");
        let outer = whole.dir().join("outer");
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

/// A way to let another user change a policy, with the reason that the agent reports. The function returns the path
/// for the agent.
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
        // Root owns the link and the file, but others can write to the directory of the link.
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

/// The entries of [`WEAK`] that a command can open. With fs.protected_symlinks, the kernel follows no link of another
/// user in a sticky directory (Documentation/admin-guide/sysctl/fs.rst).
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
fn commands_that_make_changes_refuse_policies_that_other_users_can_change() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    for (weaken, why) in weak() {
        let at = Nested::new(&sets_mark(&target, 1));
        let path = weaken(&at);
        for command in changing(&instance, &path, &[]) {
            let name = command.get_args().next().unwrap().to_owned();
            let output = process::output(command);
            let printed = stderr(&output);
            assert!(printed.starts_with("error: cannot use ") && printed.contains(why), "{name:?} {why}: {printed}");
            assert!(printed.contains("--insecure-policies"), "{name:?} {why}: {printed}");
            assert_eq!((stdout(&output).as_str(), printed.matches("error: ").count()), ("", 1), "{printed}");
            assert_eq!(output.status.code(), Some(if name == "exec" { 125 } else { 2 }), "{printed}");
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
fn read_only_commands_warn_of_policies_that_other_users_can_change() {
    let target = Cgroup::new();
    let socket = ["--protocol", "tcp", "--cgroup", &target.name()];
    for (weaken, why) in weak() {
        let at = Nested::new(&sets_mark(&target, 1));
        let path = weaken(&at);
        for name in ["check", "plan", "test", "verify", "ls", "explain"] {
            let with = |flags: &[&str]| {
                let mut command = agent::command(&[name]);
                command.args(flags).args(if name == "explain" { &socket[..] } else { &[] });
                // These commands take the file instead of the directory.
                command.arg(if path.is_dir() { path.join("policy.toml") } else { path.clone() });
                process::output(command)
            };
            let (output, accepted) = (with(&[]), with(&["--insecure-policies"]));
            let printed = stderr(&output);
            assert!(
                printed.contains("warning: `run`, `attach`, `exec` and `apply` refuse ") && printed.contains(why),
                "{name}: {printed}"
            );
            assert!(!stderr(&accepted).contains("`apply` refuse"), "{name}: {}", stderr(&accepted));
            assert_eq!(
                (stdout(&output), output.status.code()),
                (stdout(&accepted), accepted.status.code()),
                "{name}: {printed}"
            );
            assert_eq!(output.status.code(), Some(0), "{name}: {printed}");
        }
    }
}

#[test]
fn unsafe_directory_is_reported_once_for_all_its_files() {
    let at = Nested::new("[[rule]]\nset = { SO_MARK = 1 }\n");
    for name in ["b.toml", "c.toml"] {
        fs::copy(&at.file, at.inner.join(name)).unwrap();
    }
    set_mode(&at.inner, 0o777);
    set_mode(&at.inner.join("c.toml"), 0o666);
    let output = process::output(changing(&Instance::new(), &at.inner, &["--cgroup", "/none"]).swap_remove(0));
    let printed = stderr(&output);
    assert_eq!((printed.matches("error: ").count(), printed.matches("(mode 0777)").count()), (2, 1), "{printed}");
    assert!(printed.contains("c.toml: users other than its owner may write to it (mode 0666)\n"), "{printed}");
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
    // Like the directory that the kubelet makes for a ConfigMap.
    let config = |flags: &str| {
        format!(
            "cd {} && mount -t tmpfs -o mode=1777 none inner && cd inner && chmod 0777 . && mkdir -m 0777 ..1 && \
             printf '[[rule]]\\nset = {{ SO_MARK = 1 }}\\n' >..1/policy.toml && chmod 0666 ..1/policy.toml && ln -s ..1 ..data && \
             ln -s ..data/policy.toml policy.toml && mount -o remount,{flags} ../inner",
            at.outer.display()
        )
    };
    let output = process::output(in_mount_namespace(&config("ro"), &exec(&at.file)));
    assert_eq!(stdout(&output), "ran\n", "{}", stderr(&output));
    let output = process::output(in_mount_namespace(&config("rw"), &exec(&at.file)));
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)), "{}", stderr(&output));
    // The owner also counts on a read-only mount.
    let owned = config("rw") + " && chown nobody ..1/policy.toml && mount -o remount,ro ../inner";
    let output = process::output(in_mount_namespace(&owned, &exec(&at.file)));
    assert!(stderr(&output).contains("belongs to user"), "{}", stderr(&output));
}

#[test]
fn files_of_the_sudo_user_are_accepted() {
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
    // Files that others can change are still refused.
    set_mode(&at.inner, 0o777);
    assert_eq!(run(Some("65534"), "0").status.code(), Some(125));
}

#[test]
fn file_that_other_users_can_now_change_is_not_reloaded() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::start_with(&policy, &[]);
    set_mode(policy.path(), 0o666);
    assert_eq!(run.notice("reload", 1)["in_force"], false);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 1);
    assert!(run.stderr().contains("users other than its owner may write to it (mode 0666)"), "{}", run.stderr());
    set_mode(policy.path(), 0o644);
    let is_reloaded =
        wait::until(wait::TIMEOUT, || run.notices("reload").iter().any(|notice| notice["in_force"] == true));
    assert!(is_reloaded, "{}{}", run.lines(), run.stderr());
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 2);
    run.finish();
}
