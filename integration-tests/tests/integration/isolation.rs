//! What one tenant makes that cannot be handled is skipped, and takes nothing from others.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::{self, Run},
    built,
    cgroup::{Cgroup, Chain},
    foreign::{Foreign, Manner, attached, attached_at},
    options::{SO_MARK, SO_RCVLOWAT},
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::Running,
    script::{Family, Kind},
    wait,
};

fn policy_on(glob: &str) -> PolicyFile {
    PolicyFile::new(format!("[target]\ncgroup = {glob:?}\n[[rule]]\nset = {{ SO_MARK = 7 }}\n"))
}

/// What `status` says of an instance.
fn status(instance: &str) -> Value {
    let output = agent::output(&["status", "--output", "json", instance]);
    assert!(output.status.success(), "{}", crate::stderr(&output));
    serde_json::from_str(&crate::stdout(&output)).unwrap()
}

/// The objects that `status` lists as skipped: kind, name and reason of each.
fn skipped(instance: &str) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let status = status(instance);
    let objects = status["skipped"]["objects"].as_array().cloned().unwrap_or_default();
    assert!(objects.iter().all(|object| object["since"].is_string()), "{status}");
    objects.iter().map(|object| (text(&object["kind"]), text(&object["name"]), text(&object["reason"]))).collect()
}

/// A name for an instance that no other test has.
fn instance_for(cgroup: &Cgroup) -> String {
    cgroup.name().trim_start_matches('/').to_owned()
}

/// Commands that look for the policies' targets and end.
#[track_caller]
fn assert_others_work(policy: &PolicyFile) {
    let path = policy.path().display().to_string();
    for arguments in [&["plan", &path][..], &["verify", &path], &["ls", &path], &["apply", "--dry-run", &path]] {
        let output = agent::output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}{}", crate::stdout(&output), crate::stderr(&output));
    }
}

#[test]
fn path_longer_than_the_kernel_takes_is_governed_as_others_are() {
    let top = Cgroup::new();
    let (good, tenant) = (top.child("good"), top.child("tenant"));
    let app = good.child("app");
    let names = std::iter::repeat_n("n".repeat(250), 18).chain(["app".to_owned()]);
    let chain = Chain::below(&tenant, names);
    let policy = policy_on(&format!("{}/**/app", top.name()));
    let instance = instance_for(&top);
    let run = Run::started(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&app).fresh(SO_MARK), 7);
    assert!(attached_at(&chain.deepest()) > 0, "{}", run.stderr());
    // One that comes now is seen, and so is one deep in the long path.
    let later = top.child("later");
    let later_app = later.child("app");
    assert!(wait::until(wait::PATIENCE, || attached(&later_app) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&later_app).fresh(SO_MARK), 7);
    assert_others_work(&policy);
    assert_eq!(skipped(&instance), []);
    drop(chain);
    assert!(wait::until(wait::PATIENCE, || run.notices("targets").last().is_some_and(|last| last["count"] == 2)));
    run.finish();
}

#[test]
fn cgroup_that_is_too_deep_is_skipped_and_governed_from_above() {
    let top = Cgroup::new();
    let (good, tenant) = (top.child("good"), top.child("tenant"));
    let app = good.child("app");
    let chain = Chain::below(&tenant, std::iter::repeat_n("d", 40).chain(["app"]));
    let policy = policy_on(&format!("{}/**/app", top.name()));
    policy.add("tenant.toml", sets_mark(&tenant, 9));
    let instance = instance_for(&top);
    let run = Run::of(policy.folder(), &["--instance", &instance]);
    assert_eq!(Probe::start(&app).fresh(SO_MARK), 7);
    let listed = skipped(&instance);
    assert_eq!(listed.len(), 1, "{listed:?}");
    let (kind, name, reason) = &listed[0];
    assert!(kind == "cgroup" && name.starts_with(&format!("{}/d/d/d", tenant.name())), "{listed:?}");
    assert!(reason.contains("more than 32 levels"), "{reason}");
    // The policy of the tenant's own cgroup holds there.
    let deepest = format!("{}/{}/app", tenant.path().display(), ["d"; 40].join("/"));
    assert_eq!(Probe::start(&Cgroup::of(Path::new(&deepest))).fresh(SO_MARK), 9);
    // It is logged once, however often cgroups are looked at.
    let later = good.child("later");
    let later_app = later.child("app");
    assert!(wait::until(wait::PATIENCE, || attached(&later_app) > 0), "{}", run.stderr());
    assert_eq!(run.stderr().matches("skipped: ").count(), 1, "{}", run.stderr());
    assert_others_work(&policy);
    drop(chain);
    assert!(wait::until(wait::PATIENCE, || skipped(&instance).is_empty()), "{:?}", skipped(&instance));
    run.finish();
}

#[test]
fn cgroup_that_cannot_be_attached_to_is_skipped_until_it_can() {
    let top = Cgroup::new();
    let (good, bad) = (top.child("app-good"), top.child("app-bad"));
    let foreign = Foreign::attach(&bad, SO_RCVLOWAT, Manner::Exclusive);
    let policy = policy_on(&format!("{}/app-*", top.name()));
    let instance = instance_for(&top);
    let run = Run::started(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&good).fresh(SO_MARK), 7);
    assert_eq!(Probe::start(&bad).fresh(SO_MARK), 0);
    let listed = skipped(&instance);
    assert!(matches!(&listed[..], [(kind, name, _)] if kind == "cgroup" && *name == bad.name()), "{listed:?}");
    // Others come.
    let later = top.child("app-later");
    assert!(wait::until(wait::PATIENCE, || attached(&later) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&later).fresh(SO_MARK), 7);
    let targets = || status(&instance)["cgroups"].as_array().map(Vec::len);
    assert!(wait::until(wait::PATIENCE, || targets() == Some(2)), "{:?}", targets());
    drop(foreign);
    assert!(wait::until(wait::PATIENCE, || attached(&bad) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&bad).fresh(SO_MARK), 7);
    assert!(wait::until(wait::PATIENCE, || skipped(&instance).is_empty()), "{:?}", skipped(&instance));
    run.finish();
}

#[test]
fn target_of_another_instance_is_left_to_it() {
    let top = Cgroup::new();
    let (one, other) = (policy_on(&format!("{}/app-*", top.name())), policy_on(&format!("{}/*-web", top.name())));
    let (first, second) = (instance_for(&top) + "-1", instance_for(&top) + "-2");
    let own = top.child("own-web");
    let runs = (Run::started(&one, &["--instance", &first]), Run::started(&other, &["--instance", &second]));
    let both = top.child("app-web");
    assert!(wait::until(wait::PATIENCE, || attached(&both) > 0));
    let later = top.child("later-web");
    assert!(wait::until(wait::PATIENCE, || attached(&later) > 0), "{}", runs.1.stderr());
    assert_eq!((Probe::start(&own).fresh(SO_MARK), Probe::start(&later).fresh(SO_MARK)), (7, 7));
    let listed = [skipped(&first), skipped(&second)].concat();
    assert!(
        matches!(&listed[..], [(_, name, reason)] if *name == both.name() && reason.contains("instance")),
        "{listed:?}"
    );
    runs.0.finish();
    runs.1.finish();
}

#[test]
fn targets_beyond_the_descriptors_are_skipped_until_there_are_some() {
    const CGROUPS: usize = 60;
    let top = Cgroup::new();
    let first = top.child("first");
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = [{:?}, {:?}]\n[[rule]]\nset = {{ SO_MARK = 7 }}\n",
        format!("{}/t/app-*", top.name()),
        first.name()
    ));
    let tenant = top.child("t");
    let apps: Vec<Cgroup> = (0..CGROUPS).map(|number| tenant.child(&format!("app-{number}"))).collect();
    let instance = instance_for(&top);
    let run = Run::wrapped(&["prlimit", "--nofile=400"], &policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&first).fresh(SO_MARK), 7);
    let governed = || apps.iter().filter(|app| attached(app) > 0).count();
    let at_first = governed();
    assert!((1..CGROUPS).contains(&at_first), "{at_first} of {CGROUPS} are governed: {}", run.stderr());
    let listed = skipped(&instance);
    assert_eq!(listed.len(), CGROUPS - at_first, "{listed:?}");
    // What goes makes room.
    let (removed, left): (Vec<_>, Vec<_>) = apps.into_iter().partition(|app| attached(app) > 0);
    drop(removed);
    let are_governed = || left.iter().filter(|app| attached(app) > 0).count() >= left.len().min(at_first);
    assert!(wait::until(wait::PATIENCE, are_governed), "{}", run.stderr());
    assert_eq!(Probe::start(&first).fresh(SO_MARK), 7);
    run.finish();
}

#[test]
fn name_may_have_any_bytes() {
    let top = Cgroup::new();
    let chain = Chain::below(&top, [OsString::from_vec(b"\xff\x1b[2J-app".to_vec())]);
    let good = top.child("good-app");
    let policy = policy_on(&format!("{}/*-app", top.name()));
    let instance = instance_for(&top);
    let run = Run::started(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&good).fresh(SO_MARK), 7);
    assert!(attached_at(&chain.deepest()) > 0, "{}", run.stderr());
    assert_others_work(&policy);
    assert_eq!(skipped(&instance), []);
    run.finish();
}

#[test]
fn cgroups_are_looked_at_now_and_then_where_the_kernel_watches_no_more() {
    let top = Cgroup::new();
    let policy = policy_on(&format!("{}/**/app", top.name()));
    let (a, b) = (top.child("a"), top.child("b"));
    let wrapper = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=inotify_add_watch:error=ENOSPC:when=4+"];
    let run = Run::wrapped(&wrapper, &policy, &[]);
    let apps = [a.child("app"), b.child("app")];
    for app in &apps {
        assert!(wait::until(wait::PATIENCE, || attached(app) > 0), "{}", run.stderr());
        assert_eq!(Probe::start(app).fresh(SO_MARK), 7);
    }
    assert_eq!(run.stderr().matches("looked at every").count(), 1, "{}", run.stderr());
}

#[test]
fn line_of_targets_has_what_has_changed_and_no_more() {
    const CGROUPS: usize = 200;
    let top = Cgroup::new();
    let policy = policy_on(&format!("{}/app-*", top.name()));
    let run = Run::started(&policy, &[]);
    let apps: Vec<Cgroup> = (0..CGROUPS).map(|number| top.child(&format!("app-{number}"))).collect();
    let are_there = || run.notices("targets").last().is_some_and(|last| last["count"] == json!(CGROUPS));
    assert!(wait::until(wait::PATIENCE, are_there), "{:?}", run.notices("targets").last());
    let count = |notice: &Value, what: &str| notice[what].as_u64().unwrap();
    let notices = run.notices("targets");
    assert_eq!(notices.iter().map(|notice| count(notice, "added_count")).sum::<u64>(), CGROUPS as u64);
    assert!(notices.iter().all(|notice| notice["added"].as_array().unwrap().len() <= 64), "{notices:?}");
    fs::remove_dir(apps[7].path()).unwrap();
    let is_gone = || run.notices("targets").last().is_some_and(|last| last["removed"] == json!([apps[7].name()]));
    assert!(wait::until(wait::PATIENCE, is_gone), "{:?}", run.notices("targets").last());
    drop(apps);
    run.finish();
}

/// A process in a cgroup that holds the lock of one of its TCP sockets until this is dropped.
struct Hold(Running);

impl Hold {
    #[track_caller]
    fn start(cgroup: Cgroup) -> Self {
        let mut running = Running::start_in(Command::new(built("sockhold")), cgroup);
        let said = running.lines(1);
        assert!(said.first().is_some_and(|line| line.starts_with("held ")), "{said:?}: {}", running.stderr());
        Self(running)
    }

    fn pid(&self) -> u32 {
        self.0.pid()
    }
}

#[test]
fn socket_whose_lock_is_held_is_named_and_no_other_is_kept_waiting() {
    let top = Cgroup::new();
    let (victim, tenant) = (top.child("victim"), top.child("tenant"));
    let mut probe = Probe::start(&victim);
    let (socket, _) = probe.listener(Family::Inet, Kind::Tcp);
    let held = Hold::start(tenant);
    let policy = PolicyFile::new(sets_mark(&top, 7));
    let path = policy.path().display().to_string();
    let instance = instance_for(&top);
    for (arguments, status) in [
        (&["ls", &path][..], 2),
        (&["verify", &path], 1),
        (&["apply", "--instance", &instance, &path], 2),
        (&["verify", &path], 2),
        (&["apply", "--restore", "--instance", &instance], 0),
    ] {
        let began = Instant::now();
        // Not in a cgroup of its own: a worker may be left behind there.
        let output = agent::command(arguments).output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{arguments:?} takes {:?}", began.elapsed());
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?}: {}{}",
            crate::stdout(&output),
            crate::stderr(&output)
        );
        let names_it =
            crate::stderr(&output).contains(&format!("of process {}: a call on the socket timed out", held.pid()));
        assert!(names_it || arguments[1] == "--restore", "{arguments:?}: {}", crate::stderr(&output));
        let expected = if arguments[0] == "apply" && status == 2 { 7 } else { probe.int(socket, SO_MARK) };
        assert_eq!(probe.int(socket, SO_MARK), expected);
    }
    assert_eq!(probe.int(socket, SO_MARK), 0);
}

#[test]
fn socket_whose_lock_is_held_delays_no_enforcement_and_keeps_nothing_attached() {
    let top = Cgroup::new();
    let (victim, tenant) = (top.child("victim"), top.child("tenant"));
    let mut probe = Probe::start(&victim);
    let (socket, _) = probe.listener(Family::Inet, Kind::Tcp);
    let held = Hold::start(tenant);
    let policy = PolicyFile::new(sets_mark(&top, 7));
    let instance = instance_for(&top);
    let run = Run::started(&policy, &["--apply", "--instance", &instance]);
    assert_eq!(probe.fresh(SO_MARK), 7);
    let live = run.notice("apply-summary", 1);
    assert!(live["unanswered"].as_u64().unwrap() > 0, "{live}");
    assert_eq!(probe.int(socket, SO_MARK), 7);
    let of_held = |(kind, name, _): &(String, String, String)| {
        kind == "socket" && name.ends_with(&format!("of process {}", held.pid()))
    };
    assert!(skipped(&instance).iter().any(of_held), "{:?}", skipped(&instance));
    // The agent goes on, and a worker stays that does not end.
    let child = top.child("later");
    policy.add("later.toml", sets_mark(&child, 9));
    run.signal(Signal::SIGHUP);
    assert_eq!(Probe::start(&victim).fresh(SO_MARK), 7);
    assert!(workers_left() > 0, "no worker is left behind");
    run.signal(Signal::SIGKILL);
    assert!(wait::until(wait::PATIENCE, || attached(&top) == 0), "something stays attached");
    assert_eq!(probe.fresh(SO_MARK), 0);
    assert!(workers_left() > 0, "no worker is left behind");
    // Then the worker ends, and its cgroup is empty.
    drop(held);
    drop(run);
}

/// Processes that wait for a lock and can do nothing else, of the agent's program.
fn workers_left() -> usize {
    let processes =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_worker = |pid: &u32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let has = |word: &[u8]| arguments.split(|byte| *byte == 0).any(|argument| argument == word);
        (has(b"inspect-sockets") || has(b"walk-sockets")) && state.contains(") D ")
    };
    processes.filter(is_worker).count()
}
