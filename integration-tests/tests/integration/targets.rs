//! Targets that come and go while policies are in force.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use serde_json::json;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    foreign::{attached, attached_at},
    options::SO_MARK,
    policy::PolicyFile,
    probe::Probe,
    process::descriptors,
    residue::Residue,
    script::{Family, Kind},
    wait,
};

fn policy_on(globs: &[String], mark: i32) -> PolicyFile {
    PolicyFile::new(format!("[target]\ncgroup = {globs:?}\n[[rule]]\nset = {{ SO_MARK = {mark} }}\n"))
}

#[test]
fn cgroup_that_is_made_later_becomes_a_target_when_it_matches() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/a/x-*", top.name()), format!("{}/**/y", top.name())], 7);
    let run = Run::started(&policy, &[]);
    let outside = top.child("a");
    let x = outside.child("x-1");
    assert_eq!(run.notice("targets", 1)["added"], json!([x.name()]));
    assert_eq!(Probe::start(&x).fresh(SO_MARK), 7);
    // Several levels at once.
    let deep = top.child("b");
    let folder = deep.path().join("c/d/y");
    fs::create_dir_all(&folder).unwrap();
    let last = run.notice("targets", 2);
    assert_eq!((&last["added"], &last["count"]), (&json!([format!("{}/c/d/y", deep.name())]), &json!(2)));
    assert_eq!(Probe::start(&outside).fresh(SO_MARK), 0);
    fs::remove_dir(&folder).unwrap();
    let last = run.notice("targets", 3);
    assert_eq!((&last["removed"], &last["count"]), (&json!([format!("{}/c/d/y", deep.name())]), &json!(1)));
    run.finish();
}

#[test]
fn deeper_target_that_is_made_later_decides_there_and_gives_way_when_it_goes() {
    let top = Cgroup::new();
    let policy = policy_on(&[top.name()], 1);
    let deeper = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 2 }}\n", format!("{}/d*", top.name()));
    let deeper = policy.add("deeper.toml", deeper);
    let run = Run::of(policy.folder(), &[]);
    let child = top.child("deep");
    run.notice("targets", 1);
    assert_eq!((Probe::start(&child).fresh(SO_MARK), Probe::start(&top).fresh(SO_MARK)), (2, 1));
    // Its policy goes, the cgroup stays.
    let mut probe = Probe::start(&child);
    let born = probe.open(Family::Inet, Kind::Tcp);
    fs::remove_file(deeper).unwrap();
    run.notice("reload", 1);
    assert_eq!(probe.fresh(SO_MARK), 1);
    probe.set(born, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(born, SO_MARK), 1, "the outer policy does not judge a socket that was the inner one's");
    run.finish();
}

#[test]
fn run_waits_for_a_target_that_is_not_there() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/later", top.name())], 7);
    let run = Run::started(&policy, &[]);
    let later = top.child("later");
    run.notice("targets", 1);
    assert_eq!(Probe::start(&later).fresh(SO_MARK), 7);
    run.finish();
}

#[test]
fn removed_cgroup_keeps_its_programs_until_its_last_socket_is_closed() {
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/*", top.name())], 7);
    let run = Run::started(&policy, &[]);
    let before = Residue::of(run.pid());
    let child = top.child("gone");
    run.notice("targets", 1);
    // Made outside: a network namespace has sockets of its own, which are of the cgroup in which it is made.
    let mut probe = Probe::start(&top);
    probe.enter(&child);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.enter(&top);
    drop(child);
    assert_eq!(run.notice("targets", 2)["count"], json!(0));
    // A call by the socket's owner passes its hooks, wherever that is by now.
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 7);
    probe.close(socket);
    let is_let_go = wait::until(wait::PATIENCE, || Residue::of(run.pid()).links == before.links);
    assert!(is_let_go, "{:?} and before {before:?}", Residue::of(run.pid()));
    run.finish();
}

#[test]
fn given_cgroup_that_is_not_there_is_refused() {
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 1 }\n");
    let output = agent::output(&["run", "--cgroup", "no-such", policy.path().to_str().unwrap()]);
    assert!(crate::stderr(&output).starts_with("error: cannot find cgroup "), "{}", crate::stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}

/// `storm` in its name: an emulated machine takes minutes for it.
#[test]
fn storm_of_cgroups_leaves_nothing_behind() {
    const ROUNDS: usize = 100;
    const CGROUPS: usize = 100;
    let top = Cgroup::new();
    let policy = policy_on(&[format!("{}/*", top.name())], 7);
    let run = Run::started(&policy, &[]);
    // Tables of before may be kept for a while.
    let is_no_map = |(_, what): &(String, PathBuf)| what != Path::new("anon_inode:bpf-map");
    let held =
        || (Residue::of(run.pid()), descriptors(run.pid()).iter().filter(|descriptor| is_no_map(descriptor)).count());
    let before = held();
    let mut probe = Probe::start(&top);
    for round in 0..ROUNDS {
        let folders: Vec<PathBuf> = (0..CGROUPS).map(|number| top.path().join(format!("{round}-{number}"))).collect();
        for folder in &folders {
            fs::create_dir(folder).unwrap();
        }
        if round % 10 == 0 {
            let last = &folders[CGROUPS - 1];
            let name = last.display();
            assert!(
                wait::until(wait::PATIENCE, || attached_at(&File::open(last).unwrap()) > 0),
                "{name} is no target: {}",
                run.stderr()
            );
        }
        for folder in folders.iter().rev() {
            fs::remove_dir(folder).unwrap();
        }
        // The kernel takes its time to let go of a cgroup, and does so with one after the other.
        if round % 10 == 9 {
            let is_as_before = wait::until(wait::PATIENCE, || held().0 == before.0 && held().1 <= before.1);
            let notice = run.notices("targets").pop();
            assert!(is_as_before, "{:?} and before {before:?}; last: {notice:?}: {}", held(), run.stderr());
        }
    }
    // It is still about its business.
    let last = top.child("last");
    assert!(wait::until(wait::PATIENCE, || attached(&last) > 0), "{}", run.stderr());
    probe.enter(&last);
    assert_eq!(probe.fresh(SO_MARK), 7);
    drop(probe);
    drop(last);
    run.finish();
}
