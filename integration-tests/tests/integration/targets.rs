//! Targets that come and go while policies are in force.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use serde_json::json;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    bpf_objects::BpfObjects,
    cgroup::Cgroup,
    foreign_program::{count_attached, count_attached_fd},
    options::SO_MARK,
    policy::PolicyFile,
    probe::Probe,
    process::descriptors,
    script::{Family, Kind},
    wait,
};

fn policy_on(globs: &[String], mark: i32) -> PolicyFile {
    PolicyFile::new(format!("[target]\ncgroup = {globs:?}\n[[rule]]\nset = {{ SO_MARK = {mark} }}\n"))
}

#[test]
fn new_cgroup_that_matches_becomes_a_target() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/a/x-*", top.name()), format!("{}/**/y", top.name())], 7);
    let run = Run::start_with(&policy, &[]);
    let outside = top.child("a");
    let x = outside.child("x-1");
    assert_eq!(run.notice("targets", 1)["added"], json!([x.name()]));
    assert_eq!(Probe::start(&x).value_on_new_socket(SO_MARK), 7);
    // Several levels at once.
    let deep = top.child("b");
    let dir = deep.path().join("c/d/y");
    fs::create_dir_all(&dir).unwrap();
    let last = run.notice("targets", 2);
    assert_eq!((&last["added"], &last["count"]), (&json!([format!("{}/c/d/y", deep.name())]), &json!(2)));
    assert_eq!(Probe::start(&outside).value_on_new_socket(SO_MARK), 0);
    fs::remove_dir(&dir).unwrap();
    let last = run.notice("targets", 3);
    assert_eq!((&last["removed"], &last["count"]), (&json!([format!("{}/c/d/y", deep.name())]), &json!(1)));
    run.finish();
}

#[test]
fn inner_target_that_is_added_later_decides_until_it_is_removed() {
    let top = Cgroup::new();
    let policy = policy_on(&[top.name()], 1);
    let deeper = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 2 }}\n", format!("{}/d*", top.name()));
    let deeper = policy.add("deeper.toml", deeper);
    let run = Run::on_path(policy.dir(), &[]);
    let child = top.child("deep");
    run.notice("targets", 1);
    assert_eq!(
        (Probe::start(&child).value_on_new_socket(SO_MARK), Probe::start(&top).value_on_new_socket(SO_MARK)),
        (2, 1)
    );
    // Its policy is removed, and the cgroup remains.
    let mut probe = Probe::start(&child);
    let inner_socket = probe.open(Family::Inet, Kind::Tcp);
    fs::remove_file(deeper).unwrap();
    run.notice("reload", 1);
    assert_eq!(probe.value_on_new_socket(SO_MARK), 1);
    probe.set(inner_socket, SO_MARK, 9).unwrap();
    assert_eq!(
        probe.int(inner_socket, SO_MARK),
        1,
        "the outer policy does not judge a socket of the former inner target"
    );
    run.finish();
}

#[test]
fn run_waits_for_a_missing_target() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/later", top.name())], 7);
    let run = Run::start_with(&policy, &[]);
    let later = top.child("later");
    run.notice("targets", 1);
    assert_eq!(Probe::start(&later).value_on_new_socket(SO_MARK), 7);
    run.finish();
}

#[test]
fn programs_of_a_removed_cgroup_stay_until_its_last_socket_is_closed() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/*", top.name())], 7);
    let run = Run::start_with(&policy, &[]);
    let before = BpfObjects::of(run.pid());
    let child = top.child("gone");
    run.notice("targets", 1);
    // The probe starts outside: the kernel's sockets of its network namespace belong to the cgroup in which it was
    // created.
    let mut probe = Probe::start(&top);
    probe.enter(&child);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.enter(&top);
    drop(child);
    assert_eq!(run.notice("targets", 2)["count"], json!(0));
    // A call of the owner runs the hooks of the socket's cgroup, wherever the owner is.
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 7);
    probe.close(socket);
    let is_released = wait::until(wait::TIMEOUT, || BpfObjects::of(run.pid()).links == before.links);
    assert!(is_released, "{:?} and before {before:?}", BpfObjects::of(run.pid()));
    run.finish();
}

#[test]
fn missing_cgroup_on_the_command_line_is_refused() {
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 1 }\n");
    let output = agent::output(&["run", "--cgroup", "no-such", policy.path().to_str().unwrap()]);
    assert!(crate::stderr(&output).starts_with("error: cannot find cgroup "), "{}", crate::stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}

/// The name contains `storm`, which `make vm-test-fast` skips: it takes minutes on an emulated machine.
#[test]
fn storm_of_cgroups_leaves_no_links_and_descriptors_behind() {
    const ROUNDS: usize = 100;
    const CGROUPS: usize = 100;
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/*", top.name())], 7);
    let run = Run::start_with(&policy, &[]);
    // Former tables can be kept for a while.
    let is_no_map = |(_, what): &(String, PathBuf)| what != Path::new("anon_inode:bpf-map");
    let held = || {
        (BpfObjects::of(run.pid()), descriptors(run.pid()).iter().filter(|descriptor| is_no_map(descriptor)).count())
    };
    let before = held();
    let mut probe = Probe::start(&top);
    for round in 0..ROUNDS {
        let dirs: Vec<PathBuf> = (0..CGROUPS).map(|number| top.path().join(format!("{round}-{number}"))).collect();
        for dir in &dirs {
            fs::create_dir(dir).unwrap();
        }
        if round % 10 == 0 {
            let last = &dirs[CGROUPS - 1];
            let name = last.display();
            assert!(
                wait::until(wait::TIMEOUT, || count_attached_fd(&File::open(last).unwrap()) > 0),
                "{name} is not a target: {}",
                run.stderr()
            );
        }
        for dir in dirs.iter().rev() {
            fs::remove_dir(dir).unwrap();
        }
        // The kernel releases removed cgroups slowly, and one after the other.
        if round % 10 == 9 {
            let is_as_before = wait::until(wait::TIMEOUT, || held().0 == before.0 && held().1 <= before.1);
            let notice = run.notices("targets").pop();
            assert!(is_as_before, "{:?} and before {before:?}; last: {notice:?}: {}", held(), run.stderr());
        }
    }
    // The agent still works.
    let last = top.child("last");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&last) > 0), "{}", run.stderr());
    probe.enter(&last);
    assert_eq!(probe.value_on_new_socket(SO_MARK), 7);
    drop(probe);
    drop(last);
    run.finish();
}
