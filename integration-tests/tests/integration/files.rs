//! Files that decide what root does (pins, records, journals and policies), and what other users can do to them.

mod policies;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_MARK,
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::{self, in_mount_namespace},
    script::{Family, Kind},
};

use crate::{bad_input::rights::with_capabilities, stderr, stdout};

/// Prepares a separate host environment: an empty /run, and a BPF file system in which every user can create files,
/// as by default.
const OWN: &str = "mount -t tmpfs -o mode=755 none /run && mount -t bpf -o mode=1777 none /sys/fs/bpf && umask 000";

/// Runs a shell script in such an environment, with `sockpolicy` and `$POLICY`. `nobody COMMAND` runs a command as
/// another user.
#[track_caller]
fn on_own_host(prepare: &str, policy: &Path, script: &str) -> Output {
    let mut shell = Command::new("sh");
    let program = agent::program();
    let functions = format!(
        "PROGRAM={}; sockpolicy() {{ $PROGRAM \"$@\"; }}; nobody() {{ setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"; }}; POLICY={}",
        program.display(),
        policy.display()
    );
    shell.arg("-uc").arg(format!("{functions}; {script}"));
    process::output(in_mount_namespace(prepare, &shell))
}

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}: {}{}", output.status, stdout(output), stderr(output));
}

#[test]
fn directories_are_private_with_any_umask_and_file_system_mode() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let output = on_own_host(
        OWN,
        policy.path(),
        "sockpolicy attach --allow-unsupported $POLICY && find /run/sockpolicy /sys/fs/bpf/sockpolicy -printf '%y %m\n' | sort -u; \
         sockpolicy detach && ls /sys/fs/bpf | grep -v debug || true",
    );
    succeeds(&output);
    assert_eq!(stdout(&output), "d 700\nf 600\n", "{}", stderr(&output));
}

#[test]
fn symbolic_link_of_another_user_in_place_of_pins_is_not_followed() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let dir = policy.dir().join("precious");
    for (place, made) in [
        ("/sys/fs/bpf/sockpolicy", String::new()),
        ("/sys/fs/bpf/sockpolicy/default", "nobody mkdir /sys/fs/bpf/sockpolicy; ".to_owned()),
    ] {
        fs::create_dir_all(dir.join("0123456789abcdef/links/empty")).unwrap();
        fs::create_dir_all(dir.join("default/0123456789abcdef/maps")).unwrap();
        fs::write(dir.join("default/0123456789abcdef/maps/FILE"), "kept").unwrap();
        let output = on_own_host(
            OWN,
            policy.path(),
            &format!(
                "{made}nobody ln -s {0} {place}; find {0} | sort; for command in status detach 'attach $POLICY' detach; do \
                 eval sockpolicy $command 2>&1; echo $?; done; find {0} | sort",
                dir.display()
            ),
        );
        let printed = stdout(&output);
        let tree: Vec<&str> = printed.lines().take_while(|line| line.starts_with('/')).collect();
        assert_eq!(tree.len(), 8);
        assert!(printed.ends_with(&(tree.join("\n") + "\n")), "{printed}");
        // `status` says that no policy is in force; each command says that it cannot use the directory.
        assert_eq!(printed.matches("cannot use /sys/fs/bpf/sockpolicy: it ").count(), 4, "{printed}");
        assert_eq!(printed.matches("\n2\n").count(), 4, "{printed}");
        let why = if made.is_empty() { "it is a symbolic link\n" } else { "it belongs to user 65534\n  help: " };
        assert!(printed.contains(why), "{printed}");
    }
}

#[test]
fn pin_directory_of_another_user_does_not_stop_run() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let output = on_own_host(
        OWN,
        policy.path(),
        "nobody mkdir /sys/fs/bpf/sockpolicy; SOCKPOLICY_LOG=info $PROGRAM run --allow-unsupported $POLICY >/run/out 2>&1 & PID=$!; \
         for i in $(seq 300); do grep -q 'in force on' /run/out && break; sleep 0.1; done; kill $PID; wait $PID; echo $?; \
         grep -c 'in force on' /run/out",
    );
    assert_eq!(stdout(&output), "0\n1\n", "{}", stderr(&output));
}

#[test]
fn bpf_file_system_is_mounted_if_missing() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let without = "mount -t tmpfs -o mode=755 none /run && umount /sys/fs/bpf";
    let output = on_own_host(
        without,
        policy.path(),
        "sockpolicy attach --allow-unsupported $POLICY && stat -c %a /sys/fs/bpf && sockpolicy status >/dev/null && sockpolicy detach",
    );
    succeeds(&output);
    assert_eq!(stdout(&output), "1700\n");
    let mounted =
        "warning: mounted a BPF file system at /sys/fs/bpf: persistent policies end with this mount namespace\n";
    assert_eq!(stderr(&output), mounted);
    let mut attach = agent::command(&["attach", "--allow-unsupported"]);
    attach.arg(policy.path());
    let rights = "-all,+bpf,+net_admin,+perfmon,+dac_override,+sys_resource";
    let output = process::output(in_mount_namespace(without, &with_capabilities(rights, &attach)));
    let error = "error: cannot pin policies: there is no BPF file system at /sys/fs/bpf, and it cannot be mounted: Operation not \
                 permitted\n  help: mount -t bpf -o mode=0700 bpf /sys/fs/bpf\n";
    assert_eq!((stderr(&output).as_str(), output.status.code()), (error, Some(2)));
}

#[test]
fn foreign_files_among_pins_are_left_and_named_and_stop_no_command() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let layout = instance.dir().join(&instance.layouts()[0]);
    let link = fs::read_dir(layout.join("links")).unwrap().next().unwrap().unwrap().file_name();
    // Names that a link of sockpolicy could have, for a cgroup that is not a target.
    let foreign: Vec<_> = ["foreign", "links", "maps", "0123456789abcdef"]
        .map(|name| instance.dir().join(name))
        .into_iter()
        .chain(["foreign", "links/foreign", "maps/sp_foreign", "links/1-2-3-sp_connect4"].map(|name| layout.join(name)))
        .collect();
    for path in &foreign {
        fs::create_dir(path).unwrap();
    }
    // An empty directory of another layout looks like the remains of a killed agent.
    let kept: Vec<_> = foreign.iter().filter(|path| !path.ends_with("0123456789abcdef")).collect();
    // A map under the name of a link, as `bpftool map pin` can make it.
    let map = layout.join("links/1-2-3-sp_bind4");
    let pinned =
        Command::new("bpftool").args(["map", "pin", "pinned"]).args([&layout.join("maps/sp_config"), &map]).output();
    let has_map = pinned.is_ok_and(|output| output.status.success());
    for mark in [2, 3] {
        instance.attach(PolicyFile::new(sets_mark(&target, mark)).path());
        assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), mark);
    }
    let output = agent::output(&["detach", "--instance", &instance.name]);
    succeeds(&output);
    let printed = stderr(&output);
    for path in kept.iter().copied().chain(has_map.then_some(&map)) {
        let warning = format!("warning: left {} in place: sockpolicy did not make it\n", path.display());
        assert!(printed.contains(&warning), "{}: {printed}", path.display());
        assert!(path.exists());
    }
    assert!(!layout.join("links").join(link).exists() && !layout.join("maps/sp_config").exists());
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 0);
    // The remaining files put no policy in force.
    let status = agent::output(&["status", "--instance", &instance.name]);
    assert_eq!(status.status.code(), Some(2), "{}", stdout(&status));
    instance.attach(PolicyFile::new(sets_mark(&target, 4)).path());
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 4);
    succeeds(&agent::output(&["detach", "--instance", &instance.name]));
    let _ = fs::remove_file(map);
    for path in
        kept.iter().rev().copied().chain([&layout.join("links"), &layout.join("maps"), &layout, &instance.dir()])
    {
        let _ = fs::remove_dir(path);
    }
    assert!(instance.left().is_empty(), "{:?}", instance.left());
}

#[test]
fn record_or_lock_that_is_no_regular_private_file_is_refused_and_named() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    for (made, why) in [
        ("mkfifo /run/sockpolicy/default.lock", "it is a pipe"),
        ("ln -s /etc/hostname /run/sockpolicy/default.lock", "it is a symbolic link"),
        ("mkdir /run/sockpolicy/default.lock", "it is a directory"),
        ("touch /run/sockpolicy/x && ln /run/sockpolicy/x /run/sockpolicy/default.lock", "it has 2 hard links"),
        ("touch /run/sockpolicy/default.lock && chown 65534 /run/sockpolicy/default.lock", "it belongs to user 65534"),
        ("touch /run/sockpolicy/default.lock && chmod 666 /run/sockpolicy/default.lock", "(mode 0666)"),
    ] {
        let script =
            format!("mkdir -m 700 /run/sockpolicy; {made}; sockpolicy attach --allow-unsupported $POLICY; echo $?");
        let output = on_own_host(OWN, policy.path(), &script);
        let printed = stderr(&output);
        let start = "error: cannot use /run/sockpolicy/default.lock: ";
        assert!(
            printed.starts_with(start) && printed.contains(why) && printed.contains("\n  help: "),
            "{made}: {printed}"
        );
        assert_eq!(stdout(&output), "2\n");
    }
    // An invalid record does not prevent the removal of the instance's pins.
    for made in ["rm $R && mkfifo $R", "rm $R && ln -s /dev/zero $R", "echo '{' >$R", "rm $R && mkdir $R"] {
        let script = format!(
            "R=/run/sockpolicy/default.json; sockpolicy attach --allow-unsupported $POLICY && {made} && timeout 20 $PROGRAM status \
             >/run/status 2>&1; cat /run/status; timeout 20 $PROGRAM detach && ls /sys/fs/bpf | grep sockpolicy"
        );
        let output = on_own_host(OWN, policy.path(), &script);
        let printed = stdout(&output);
        assert!(
            printed.contains("there is no record that this build can read"),
            "{made}: {printed}{}",
            stderr(&output)
        );
        assert!(!printed.ends_with("sockpolicy\n"), "{made}: {printed}");
    }
}

#[test]
fn record_directory_that_others_can_write_to_is_refused() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    for (made, why) in [
        ("mkdir -m 777 /run/sockpolicy", "users other than its owner may write to it (mode 0777)"),
        ("mkdir -m 700 /run/sockpolicy && chown 65534 /run/sockpolicy", "it belongs to user 65534"),
        ("mkdir /run/there && ln -s there /run/sockpolicy", "it is a symbolic link"),
    ] {
        let script = format!(
            "{made}; sockpolicy attach --allow-unsupported $POLICY; echo $?; sockpolicy apply --restore; echo $?"
        );
        let output = on_own_host(OWN, policy.path(), &script);
        assert_eq!(stdout(&output), "2\n2\n", "{made}: {}", stderr(&output));
        let error = format!("cannot use /run/sockpolicy: {why}\n  help: ");
        assert_eq!(stderr(&output).matches(&error).count(), 2, "{made}: {}", stderr(&output));
    }
}

#[test]
fn invalid_instance_name_is_refused() {
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 1 }\n");
    let long = "a".repeat(65);
    for name in ["", "..", ".", "a/b", "../../etc", ".hidden", "a.b", &long, "a b", "\u{e4}", "a\nb"] {
        for verb in ["attach", "apply", "detach"] {
            let mut command = agent::command(&[verb, "--instance", name]);
            if verb != "detach" {
                command.arg(policy.path()).args(["--cgroup", "/none"]);
            }
            let output = process::output(command);
            assert_eq!(output.status.code(), Some(2), "{name:?}: {}", stderr(&output));
        }
    }
}

/// Returns the values of sockets after `apply`, a change to the journal, and `apply --restore`; the output of the
/// latter; and whether the journal still exists.
#[track_caller]
fn restored_after(change: impl Fn(&mut Vec<u8>)) -> (Vec<i32>, Output, bool) {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 61));
    let mut probe = Probe::start(&target);
    let sockets: Vec<_> = (0..4).map(|_| probe.open(Family::Inet, Kind::Udp)).collect();
    for (number, socket) in sockets.iter().enumerate() {
        probe.set(*socket, SO_MARK, 500 + number as i32).unwrap();
    }
    succeeds(&instance.run("apply", &[policy.path().to_str().unwrap()]));
    sockets.iter().for_each(|socket| assert_eq!(probe.int(*socket, SO_MARK), 61));
    let journal = format!("/run/sockpolicy/{}.before", instance.name);
    let mut text = fs::read(&journal).unwrap();
    change(&mut text);
    fs::write(&journal, &text).unwrap();
    let output = instance.run("apply", &["--restore"]);
    let values = sockets.iter().map(|socket| probe.int(*socket, SO_MARK)).collect();
    (values, output, fs::exists(&journal).unwrap())
}

/// Returns the ranges of the lines with former values.
fn lines_of(text: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut start = 0;
    let lines = text.split_inclusive(|byte| *byte == b'\n').map(|line| {
        start += line.len();
        start - line.len()..start
    });
    lines.filter(|line| text[line.clone()].windows(10).any(|word| word == b"\"before\":{")).collect()
}

#[test]
fn damaged_journal_line_loses_only_its_own_value() {
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let (values, output, is_kept) = restored_after(|_| {});
    assert_eq!((values, output.status.code(), is_kept), (vec![500, 501, 502, 503], Some(0), false));
    let flip = |line: usize, at: usize| {
        move |text: &mut Vec<u8>| {
            let line = lines_of(text)[line].clone();
            text[line.start + at] ^= 0x80;
        }
    };
    // A digit of the value: without a checksum, another value would be restored.
    let digit = |text: &mut Vec<u8>| {
        let at = text.windows(3).position(|word| word == b"500").unwrap();
        text[at] ^= 1;
    };
    let cut = |text: &mut Vec<u8>| {
        let last = lines_of(text).pop().unwrap();
        text.truncate(last.start + 20);
    };
    let changes: [(Damage<'_>, usize); 9] = [
        (&flip(0, 1), 3),
        (&flip(1, 10), 3),
        (&flip(3, 0), 3),
        (&digit, 3),
        (&cut, 3),
        (&|text| text.splice(0..0, b"\0\0\0\n\xff\n".iter().copied()).for_each(drop), 4),
        (&|text| text.splice(0..0, vec![b'x'; 1 << 20]).for_each(drop), 4),
        (&|text| text.splice(0..0, b"{\"version\":2}\n\n\n".iter().copied()).for_each(drop), 4),
        (&|text| text.extend(b"{\"cookie\":1,\"level\":6"), 4),
    ];
    for (number, (change, back)) in changes.into_iter().enumerate() {
        let (values, output, is_kept) = restored_after(change);
        let restored = values.iter().enumerate().filter(|(number, value)| **value == 500 + *number as i32).count();
        let others = values.iter().filter(|value| **value == 61).count();
        assert_eq!((restored, restored + others), (back, 4), "{number}: {values:?} {}", stderr(&output));
        assert!(stdout(&output).starts_with(&format!("restored: {back} options; ")), "{number}: {}", stdout(&output));
        let printed = stderr(&output);
        assert!(printed.contains("warning: damaged lines of /run/sockpolicy/"), "{number}: {printed}");
        assert!(printed.contains("\n  help: the lines are kept; "), "{number}: {printed}");
        assert_eq!((output.status.code(), is_kept), (Some(2), true), "{number}");
    }
}

#[test]
fn duplicate_journal_lines_and_lines_after_a_truncated_line_are_used() {
    let (values, output, _) = restored_after(|text| text.extend(text.clone()));
    assert_eq!((values, output.status.code()), (vec![500, 501, 502, 503], Some(0)), "{}", stderr(&output));
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 7));
    let mut probe = Probe::start(&target);
    let first = probe.open(Family::Inet, Kind::Udp);
    let apply = || instance.run("apply", &[policy.path().to_str().unwrap()]);
    succeeds(&apply());
    let journal = format!("/run/sockpolicy/{}.before", instance.name);
    let mut text = fs::read(&journal).unwrap();
    text.extend(b"{\"cookie\":1,\"lev");
    fs::write(&journal, text).unwrap();
    let second = probe.open(Family::Inet, Kind::Udp);
    succeeds(&apply());
    let output = instance.run("apply", &["--restore"]);
    assert_eq!([first, second].map(|socket| probe.int(socket, SO_MARK)), [0, 0], "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn socket_whose_value_cannot_be_recorded_is_not_changed() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 7));
    let mut probe = Probe::start(&target);
    let sockets: Vec<_> = (0..300).map(|_| probe.open(Family::Inet, Kind::Udp)).collect();
    // Space for the values of some sockets.
    let small = "mount -t tmpfs -o mode=755,size=16k none /run";
    let script =
        "sockpolicy apply --quiet $POLICY; echo $?; mount -o remount,size=10m /run; sockpolicy apply --restore";
    let output = on_own_host(small, policy.path(), script);
    let (printed, error) = (stdout(&output), stderr(&output));
    assert!(error.contains("No space left on device"), "{error}");
    assert!(printed.contains("\n2\n"), "{printed}");
    // Every change was recorded completely.
    let changed: usize = printed.split("changed ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(changed > 0 && changed < 300, "{printed}");
    let back = format!("restored: {changed} options; changed by others since: 0; refused: 0\n");
    assert!(printed.ends_with(&back), "{printed}{error}");
    assert!(sockets.iter().all(|socket| probe.int(*socket, SO_MARK) == 0));
    assert!(output.status.success(), "{error}");
}
