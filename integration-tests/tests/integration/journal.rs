//! The journal of `apply`, which has the former values of sockets: used by one command at a time, and pruned of
//! closed sockets.

use std::{fs, process::Command};

use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_MARK,
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::{self, Running},
    script::{Family, Kind},
};

use crate::{stderr, stdout};

fn apply(instance: &Instance, policy: &PolicyFile) -> Command {
    let mut apply = agent::command(&["apply", "--instance", &instance.name]);
    apply.arg(policy.path());
    apply
}

/// Asserts that a command is refused because another one uses the journal.
#[track_caller]
fn assert_refused(command: Command, instance: &Instance, holder: &Running) {
    let output = process::output(command);
    let error = format!(
        "error: cannot record the values that sockets have, and so changes none: cannot use /run/sockpolicy/{}.before: another \
         sockpolicy (process {}) is using it\n  help: try again when that process has ended, or choose another journal with \
         --instance\n",
        instance.name,
        holder.pid()
    );
    assert_eq!((stderr(&output), output.status.code()), (error, Some(2)));
}

#[test]
fn command_that_needs_a_journal_in_use_is_refused() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let [one, other] = [7, 8].map(|mark| PolicyFile::new(sets_mark(&target, mark)));
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Udp);
    let held = Running::start_stopped_at(apply(&instance, &one), "journal-opened");
    let restore = || agent::command(&["apply", "--restore", "--instance", &instance.name]);
    assert_refused(apply(&instance, &other), &instance, &held);
    assert_refused(restore(), &instance, &held);
    assert_eq!(probe.int(socket, SO_MARK), 0);
    held.resume();
    assert!(held.finish().status.success());
    assert_eq!(probe.int(socket, SO_MARK), 7);
    let held = Running::start_stopped_at(restore(), "journal-opened");
    assert_refused(apply(&instance, &other), &instance, &held);
    held.resume();
    assert!(held.finish().status.success());
    assert_eq!(probe.int(socket, SO_MARK), 0);
    assert!(instance.left().is_empty(), "{:?}", instance.left());
}

#[test]
fn long_journal_drops_closed_sockets() {
    const MANY: usize = 500;
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 7));
    let len = || fs::metadata(format!("/run/sockpolicy/{}.before", instance.name)).unwrap().len();
    let (mut ends, mut stays) = (Probe::start(&target), Probe::start(&target));
    for _ in 0..MANY {
        ends.open(Family::Inet, Kind::Udp);
    }
    let first = stays.open(Family::Inet, Kind::Udp);
    stays.set(first, SO_MARK, 3).unwrap();
    assert!(process::output(apply(&instance, &policy)).status.success());
    assert!(len() > 64 * 1024, "{}", len());
    drop(ends);
    let more = [(); 2].map(|()| stays.open(Family::Inet, Kind::Udp));
    // The first of these sockets has been recorded by then.
    let mut last = apply(&instance, &policy);
    process::stop_at(&mut last, "socket-taken", 2);
    let held = Running::start(last);
    process::wait_for_stop(held.pid(), "socket-taken");
    assert!(len() < 1024, "{}", len());
    // The lock also covers the new file.
    assert_refused(apply(&instance, &PolicyFile::new(sets_mark(&target, 8))), &instance, &held);
    held.resume();
    assert!(held.finish().status.success());
    let marks = |probe: &mut Probe| [first, more[0], more[1]].map(|socket| probe.int(socket, SO_MARK));
    assert_eq!(marks(&mut stays), [7, 7, 7]);
    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).starts_with("restored: 3 options; "), "{}{}", stdout(&output), stderr(&output));
    assert_eq!(marks(&mut stays), [3, 0, 0]);
}
