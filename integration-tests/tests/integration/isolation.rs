//! Objects of one tenant that cannot be handled are skipped, and do not affect other tenants.

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
    built_binary,
    cgroup::{Cgroup, NestedCgroups},
    foreign_program::{AttachMode, ForeignProgram, count_attached, count_attached_fd},
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

/// Returns the JSON output of `status` for an instance.
fn status(instance: &str) -> Value {
    let output = agent::output(&["status", "--output", "json", "--instance", instance]);
    assert!(output.status.success(), "{}", crate::stderr(&output));
    serde_json::from_str(&crate::stdout(&output)).unwrap()
}

/// Returns the objects that `status` lists as skipped: kind, name and reason.
fn skipped(instance: &str) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let status = status(instance);
    let objects = status["skipped"]["objects"].as_array().cloned().unwrap_or_default();
    assert!(objects.iter().all(|object| object["since"].is_string()), "{status}");
    objects.iter().map(|object| (text(&object["kind"]), text(&object["name"]), text(&object["reason"]))).collect()
}

/// Returns an instance name that no other test uses.
fn instance_for(cgroup: &Cgroup) -> String {
    cgroup.name().trim_start_matches('/').to_owned()
}

/// Runs the commands that search for the policies' targets.
#[track_caller]
fn assert_others_work(policy: &PolicyFile) {
    let path = policy.path().display().to_string();
    for arguments in [&["plan", &path][..], &["verify", &path], &["ls", &path], &["apply", "--dry-run", &path]] {
        let output = agent::output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}{}", crate::stdout(&output), crate::stderr(&output));
    }
}

#[test]
fn cgroup_with_a_path_longer_than_path_max_is_covered() {
    let top = Cgroup::new();
    let (good, tenant) = (top.child("good"), top.child("tenant"));
    let app = good.child("app");
    let names = std::iter::repeat_n("n".repeat(250), 18).chain(["app".to_owned()]);
    let chain = NestedCgroups::below(&tenant, names);
    let policy = policy_on(&format!("{}/**/app", top.name()));
    let instance = instance_for(&top);
    let run = Run::start_with(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&app).value_on_new_socket(SO_MARK), 7);
    assert!(count_attached_fd(&chain.deepest()) > 0, "{}", run.stderr());
    // A new cgroup is found next to the long path.
    let later = top.child("later");
    let later_app = later.child("app");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&later_app) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&later_app).value_on_new_socket(SO_MARK), 7);
    assert_others_work(&policy);
    assert_eq!(skipped(&instance), []);
    drop(chain);
    assert!(wait::until(wait::TIMEOUT, || run.notices("targets").last().is_some_and(|last| last["count"] == 2)));
    run.finish();
}

#[test]
fn too_deep_cgroup_is_skipped_and_covered_from_above() {
    let top = Cgroup::new();
    let (good, tenant) = (top.child("good"), top.child("tenant"));
    let app = good.child("app");
    let chain = NestedCgroups::below(&tenant, std::iter::repeat_n("d", 40).chain(["app"]));
    let policy = policy_on(&format!("{}/**/app", top.name()));
    policy.add("tenant.toml", sets_mark(&tenant, 9));
    let instance = instance_for(&top);
    let run = Run::on_path(policy.dir(), &["--instance", &instance]);
    assert_eq!(Probe::start(&app).value_on_new_socket(SO_MARK), 7);
    let listed = skipped(&instance);
    assert_eq!(listed.len(), 1, "{listed:?}");
    let (kind, name, reason) = &listed[0];
    assert!(kind == "cgroup" && name.starts_with(&format!("{}/d/d/d", tenant.name())), "{listed:?}");
    assert!(reason.contains("more than 32 levels"), "{reason}");
    // The policy of the tenant's cgroup covers it.
    let deepest = format!("{}/{}/app", tenant.path().display(), ["d"; 40].join("/"));
    assert_eq!(Probe::start(&Cgroup::adopt(Path::new(&deepest))).value_on_new_socket(SO_MARK), 9);
    // The message is logged once, however often cgroups are examined.
    let later = good.child("later");
    let later_app = later.child("app");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&later_app) > 0), "{}", run.stderr());
    assert_eq!(run.stderr().matches("skipped: ").count(), 1, "{}", run.stderr());
    assert_others_work(&policy);
    drop(chain);
    assert!(wait::until(wait::TIMEOUT, || skipped(&instance).is_empty()), "{:?}", skipped(&instance));
    run.finish();
}

#[test]
fn cgroup_that_rejects_programs_is_skipped_until_it_accepts_them() {
    let top = Cgroup::new();
    let (good, bad) = (top.child("app-good"), top.child("app-bad"));
    let foreign = ForeignProgram::attach(&bad, SO_RCVLOWAT, AttachMode::Exclusive);
    let policy = policy_on(&format!("{}/app-*", top.name()));
    let instance = instance_for(&top);
    let run = Run::start_with(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&good).value_on_new_socket(SO_MARK), 7);
    assert_eq!(Probe::start(&bad).value_on_new_socket(SO_MARK), 0);
    let listed = skipped(&instance);
    assert!(matches!(&listed[..], [(kind, name, _)] if kind == "cgroup" && *name == bad.name()), "{listed:?}");
    // Other cgroups become targets.
    let later = top.child("app-later");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&later) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&later).value_on_new_socket(SO_MARK), 7);
    let targets = || status(&instance)["cgroups"].as_array().map(Vec::len);
    assert!(wait::until(wait::TIMEOUT, || targets() == Some(2)), "{:?}", targets());
    drop(foreign);
    assert!(wait::until(wait::TIMEOUT, || count_attached(&bad) > 0), "{}", run.stderr());
    assert_eq!(Probe::start(&bad).value_on_new_socket(SO_MARK), 7);
    assert!(wait::until(wait::TIMEOUT, || skipped(&instance).is_empty()), "{:?}", skipped(&instance));
    run.finish();
}

#[test]
fn target_of_another_instance_is_skipped() {
    let top = Cgroup::new();
    let (one, other) = (policy_on(&format!("{}/app-*", top.name())), policy_on(&format!("{}/*-web", top.name())));
    let (first, second) = (instance_for(&top) + "-1", instance_for(&top) + "-2");
    let own = top.child("own-web");
    let runs = (Run::start_with(&one, &["--instance", &first]), Run::start_with(&other, &["--instance", &second]));
    let both = top.child("app-web");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&both) > 0));
    let later = top.child("later-web");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&later) > 0), "{}", runs.1.stderr());
    assert_eq!(
        (Probe::start(&own).value_on_new_socket(SO_MARK), Probe::start(&later).value_on_new_socket(SO_MARK)),
        (7, 7)
    );
    // Whichever of them came second skips it.
    let listed = || [skipped(&first), skipped(&second)].concat();
    let is_skipped =
        || matches!(&listed()[..], [(_, name, reason)] if *name == both.name() && reason.contains("instance"));
    assert!(wait::until(wait::TIMEOUT, is_skipped), "{:?}", listed());
    runs.0.finish();
    runs.1.finish();
}

#[test]
fn targets_without_descriptors_are_skipped_until_descriptors_are_free() {
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
    assert_eq!(Probe::start(&first).value_on_new_socket(SO_MARK), 7);
    let governed = || apps.iter().filter(|app| count_attached(app) > 0).count();
    let at_first = governed();
    assert!((1..CGROUPS).contains(&at_first), "{at_first} of {CGROUPS} cgroups are covered: {}", run.stderr());
    let listed = skipped(&instance);
    assert_eq!(listed.len(), CGROUPS - at_first, "{listed:?}");
    // Removed targets free descriptors.
    let (removed, left): (Vec<_>, Vec<_>) = apps.into_iter().partition(|app| count_attached(app) > 0);
    drop(removed);
    let are_governed = || left.iter().filter(|app| count_attached(app) > 0).count() >= left.len().min(at_first);
    assert!(wait::until(wait::TIMEOUT, are_governed), "{}", run.stderr());
    assert_eq!(Probe::start(&first).value_on_new_socket(SO_MARK), 7);
    run.finish();
}

#[test]
fn cgroup_name_can_contain_any_bytes() {
    let top = Cgroup::new();
    let chain = NestedCgroups::below(&top, [OsString::from_vec(b"\xff\x1b[2J-app".to_vec())]);
    let good = top.child("good-app");
    let policy = policy_on(&format!("{}/*-app", top.name()));
    let instance = instance_for(&top);
    let run = Run::start_with(&policy, &["--instance", &instance]);
    assert_eq!(Probe::start(&good).value_on_new_socket(SO_MARK), 7);
    assert!(count_attached_fd(&chain.deepest()) > 0, "{}", run.stderr());
    assert_others_work(&policy);
    assert_eq!(skipped(&instance), []);
    run.finish();
}

#[test]
fn cgroups_are_polled_if_inotify_watches_are_exhausted() {
    let top = Cgroup::new();
    let policy = policy_on(&format!("{}/**/app", top.name()));
    let (a, b) = (top.child("a"), top.child("b"));
    let wrapper = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=inotify_add_watch:error=ENOSPC:when=5+"];
    let run = Run::wrapped(&wrapper, &policy, &[]);
    let apps = [a.child("app"), b.child("app")];
    for app in &apps {
        assert!(wait::until(wait::TIMEOUT, || count_attached(app) > 0), "{}", run.stderr());
        assert_eq!(Probe::start(app).value_on_new_socket(SO_MARK), 7);
    }
    assert_eq!(run.stderr().matches("looked at every").count(), 1, "{}", run.stderr());
}

#[test]
fn targets_event_lists_only_changes() {
    const CGROUPS: usize = 200;
    let top = Cgroup::new();
    let policy = policy_on(&format!("{}/app-*", top.name()));
    let run = Run::start_with(&policy, &[]);
    let apps: Vec<Cgroup> = (0..CGROUPS).map(|number| top.child(&format!("app-{number}"))).collect();
    let are_there = || run.notices("targets").last().is_some_and(|last| last["count"] == json!(CGROUPS));
    assert!(wait::until(wait::TIMEOUT, are_there), "{:?}", run.notices("targets").last());
    let count = |notice: &Value, what: &str| notice[what].as_u64().unwrap();
    let notices = run.notices("targets");
    assert_eq!(notices.iter().map(|notice| count(notice, "added_count")).sum::<u64>(), CGROUPS as u64);
    assert!(notices.iter().all(|notice| notice["added"].as_array().unwrap().len() <= 64), "{notices:?}");
    fs::remove_dir(apps[7].path()).unwrap();
    let is_gone = || run.notices("targets").last().is_some_and(|last| last["removed"] == json!([apps[7].name()]));
    assert!(wait::until(wait::TIMEOUT, is_gone), "{:?}", run.notices("targets").last());
    drop(apps);
    run.finish();
}

/// A process in a cgroup that holds the lock of one of its TCP sockets, until this value is dropped.
struct LockHolder(Running);

impl LockHolder {
    #[track_caller]
    fn start(cgroup: Cgroup) -> Self {
        let mut running = Running::start_in(Command::new(built_binary("sockhold")), cgroup);
        let printed = running.lines(1);
        assert!(printed.first().is_some_and(|line| line.starts_with("held ")), "{printed:?}: {}", running.stderr());
        Self(running)
    }

    fn pid(&self) -> u32 {
        self.0.pid()
    }
}

#[test]
fn locked_socket_is_named_and_delays_no_other_socket() {
    let top = Cgroup::new();
    let (victim, tenant) = (top.child("victim"), top.child("tenant"));
    let mut probe = Probe::start(&victim);
    let (socket, _) = probe.listener(Family::Inet, Kind::Tcp);
    let held = LockHolder::start(tenant);
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
        // Not in a new cgroup: a worker may remain in it.
        let output = agent::command(arguments).output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{arguments:?} took {:?}", began.elapsed());
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
fn locked_socket_delays_no_enforcement_and_keeps_no_program_attached() {
    let top = Cgroup::new();
    let (victim, tenant) = (top.child("victim"), top.child("tenant"));
    let mut probe = Probe::start(&victim);
    let (socket, _) = probe.listener(Family::Inet, Kind::Tcp);
    let held = LockHolder::start(tenant);
    let policy = PolicyFile::new(sets_mark(&top, 7));
    let instance = instance_for(&top);
    let run = Run::start_with(&policy, &["--apply", "--instance", &instance]);
    assert_eq!(probe.value_on_new_socket(SO_MARK), 7);
    let live = run.notice("apply-summary", 1);
    assert!(live["unanswered"].as_u64().unwrap() > 0, "{live}");
    assert_eq!(probe.int(socket, SO_MARK), 7);
    let of_held = |(kind, name, _): &(String, String, String)| {
        kind == "socket" && name.ends_with(&format!("of process {}", held.pid()))
    };
    assert!(skipped(&instance).iter().any(of_held), "{:?}", skipped(&instance));
    // The agent continues, and the worker that cannot end remains.
    let child = top.child("later");
    policy.add("later.toml", sets_mark(&child, 9));
    run.signal(Signal::SIGHUP);
    assert_eq!(Probe::start(&victim).value_on_new_socket(SO_MARK), 7);
    assert!(workers_left() > 0, "no worker has been abandoned");
    run.signal(Signal::SIGKILL);
    assert!(wait::until(wait::TIMEOUT, || count_attached(&top) == 0), "programs stay attached");
    assert_eq!(probe.value_on_new_socket(SO_MARK), 0);
    assert!(workers_left() > 0, "no worker has been abandoned");
    // The worker now ends, and its cgroup is empty.
    drop(held);
    drop(run);
}

/// Returns the number of worker processes of the agent that wait in the kernel and cannot be killed.
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
