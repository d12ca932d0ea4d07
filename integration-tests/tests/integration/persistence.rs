//! Policies that stay in force without an agent, and agents that take them over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::{self, Build, Run},
    bpf_objects::cgroups_of_links,
    bpffs::Instance,
    cgroup::Cgroup,
    foreign_program::{AttachMode, ForeignProgram, count_attached},
    options::{SO_MARK, SO_RCVLOWAT},
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running, in_mount_namespace, workload},
    script::{Family, Kind},
    wait,
};

use crate::{stderr, stdout};

fn sets_mark(target: &Cgroup, mark: i32) -> String {
    format!("[target]\ncgroup = {:?}\n[[rule]]\nname = \"r\"\nset = {{ SO_MARK = {mark} }}\n", target.name())
}

fn mark(target: &Cgroup) -> i32 {
    Probe::start(target).value_on_new_socket(SO_MARK)
}

fn run_persistent(instance: &Instance, policy: &PolicyFile) -> Run {
    Run::start_with(policy, &["--persist", "--instance", &instance.name])
}

#[test]
fn attached_policies_are_enforced_without_an_agent_until_detach() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(socket, SO_MARK), 1);
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 1);
    instance.detach();
    assert_eq!(count_attached(&target), 0);
    // The socket keeps its value, and the application can change it.
    assert_eq!((probe.int(socket, SO_MARK), probe.value_on_new_socket(SO_MARK)), (1, 0));
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 9);
}

#[test]
fn attach_replaces_the_policies_of_the_same_instance() {
    let (one, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
    instance.attach(PolicyFile::new(sets_mark(&one, 1)).path());
    instance.attach(PolicyFile::new(sets_mark(&one, 2)).path());
    assert_eq!(mark(&one), 2);
    instance.attach(PolicyFile::new(sets_mark(&other, 3)).path());
    assert_eq!((mark(&one), mark(&other), count_attached(&one)), (0, 3, 0));
    instance.detach();
}

#[test]
fn policies_of_a_persistent_run_stay_until_the_next_run_takes_over() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = run_persistent(&instance, &policy);
    let mut probe = Probe::start(&target);
    assert_eq!(probe.value_on_new_socket(SO_MARK), 1);
    run.signal(Signal::SIGKILL);
    let killed = run.wait_for_end();
    assert_eq!(killed.status.signal(), Some(Signal::SIGKILL as i32));
    let socket = probe.open(Family::Inet, Kind::Tcp);
    // This conflict happens while no agent runs.
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 1);

    let run = run_persistent(&instance, &policy);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    run.notice("reload", 1);
    assert_eq!(probe.value_on_new_socket(SO_MARK), 2);
    run.signal(Signal::SIGTERM);
    let ended = run.wait_for_end();
    assert!(ended.status.success(), "{}", stderr(&ended));
    assert!(
        stderr(&ended).contains(&format!("`sockpolicy detach --instance {}` ends that", instance.name)),
        "{}",
        stderr(&ended)
    );
    let reported = stdout(&ended);
    assert!(reported.contains("\"event\":\"conflict\""), "the call between the two agents is not reported: {reported}");
    assert_eq!(probe.value_on_new_socket(SO_MARK), 2);
    instance.detach();
    assert_eq!(count_attached(&target), 0);
}

/// Makes a new process set a mark that conflicts with the policy.
fn set_conflicting_mark(target: &Cgroup, mark: i32) {
    let mut probe = Probe::start(target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_MARK, mark).unwrap();
}

#[test]
fn counts_survive_agents_that_are_killed_before_they_retire_policies() {
    // Twice the number of generations whose tables the kernel side keeps (abi::GENERATIONS).
    const AGENTS: i32 = 8;
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    for agent in 1..=AGENTS {
        let run = run_persistent(&instance, &policy);
        set_conflicting_mark(&target, 10 + agent);
        run.signal(Signal::SIGKILL);
        run.wait_for_end();
    }
    let report = run_persistent(&instance, &policy).finish_persistent();
    assert_eq!(report.setting("SO_MARK").calls.verdicts(), BTreeMap::from([("rewritten", AGENTS as u64)]));
    instance.detach();
}

#[test]
fn counts_and_unread_events_survive_attach_reload_and_takeover() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let counted = || {
        let status = agent::output(&["status", "--output", "json", "--instance", &instance.name]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        let setting = &status["settings"][0];
        [&setting["sockets"]["set"], &setting["calls"]["conflicts"]["rewritten"]].map(|count| count.as_u64().unwrap())
    };
    let fails = |run: Run| {
        run.signal(Signal::SIGTERM);
        run.wait_for_end().status.code()
    };
    // Without an agent, after repeated `attach` of the same policies.
    for times in 1..=3 {
        instance.attach(policy.path());
        set_conflicting_mark(&target, 10 + times);
        assert_eq!(counted(), [times as u64; 2]);
    }
    let run = run_persistent(&instance, &policy);
    assert_eq!(counted(), [3; 2]);
    set_conflicting_mark(&target, 14);
    run.signal(Signal::SIGHUP);
    run.notice("reload", 1);
    assert_eq!(counted(), [4; 2]);
    let report = run.finish_persistent();
    let asked: Vec<_> =
        report.of("conflict", "SO_MARK").iter().map(|event| event.requested.as_u64().unwrap()).collect();
    assert_eq!(asked, [11, 12, 13, 14]);
    report.assert_nothing_lost();
    let setting = report.setting("SO_MARK");
    assert_eq!((setting.sockets.set, setting.calls.verdicts()), (4, BTreeMap::from([("rewritten", 4)])));

    // Conflicts that one agent has reported do not fail later agents.
    let arguments = ["--persist", "--fail-on-conflict", "--instance", &instance.name];
    assert_eq!(fails(Run::start_with(&policy, &arguments)), Some(0));
    let run = Run::start_with(&policy, &arguments);
    set_conflicting_mark(&target, 15);
    assert_eq!(fails(run), Some(1));
    let run = run_persistent(&instance, &policy);
    set_conflicting_mark(&target, 16);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    set_conflicting_mark(&target, 17);
    assert_eq!(counted(), [7; 2]);
    // As many takeovers as there are generations, each killed before it has added up the earlier counts.
    for _ in 0..5 {
        assert!(attach_killed_at(&instance, &policy, "retired", 0));
        assert_eq!(counted(), [7; 2]);
    }
    instance.attach(policy.path());
    assert_eq!(counted(), [7; 2]);
    // A changed setting starts at zero.
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    instance.attach(policy.path());
    assert_eq!(counted(), [0; 2]);
    instance.detach();
}

#[test]
fn agent_for_a_covered_cgroup_or_a_running_instance_is_refused() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let path = policy.path().to_str().unwrap();
    let run = run_persistent(&instance, &policy);
    let (name, pid) = (&instance.name, run.pid());
    let refused = |output: std::process::Output, error: String| {
        assert_eq!((stderr(&output), output.status.code()), (error, Some(2)));
    };
    let runs = format!(
        "error: cannot start instance `{name}`: it already runs as process {pid}\n  help: stop that process first (kill {pid}), \
         or choose another name with --instance\n"
    );
    refused(instance.run("attach", &[path]), runs.clone());
    refused(instance.run("run", &["--persist", path]), runs);
    refused(
        agent::output(&["run", path]),
        format!(
            "error: cgroup {} is already a target of instance `{name}`, which runs as process {pid}\n  help: stop that \
             instance first (kill {pid}), or put all policies for this cgroup into one instance\n",
            target.name()
        ),
    );
    assert_eq!(mark(&target), 1);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    let output = agent::output(&["run", path]);
    assert!(stderr(&output).contains("is in force without an agent"), "{}", stderr(&output));
    instance.detach();
}

/// Returns the command `run` of an instance, with the log message for a policy in force.
fn run_named(name: &str, policy: &PolicyFile) -> Command {
    let mut run = agent::command(&["run", agent::ALLOW_UNSUPPORTED, "--instance", name]);
    run.arg(policy.path()).env("SOCKPOLICY_LOG", "info");
    run
}

fn is_in_force(run: &Running) -> bool {
    run.stderr().contains("in force on")
}

#[track_caller]
fn assert_refused(refused: Running, holder: &Running) {
    let output = refused.finish();
    let error = format!("which runs as process {}\n", holder.pid());
    assert!(stderr(&output).contains(&error), "{}: {}", holder.pid(), stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn agent_waits_for_another_that_is_starting_on_the_same_cgroup_and_is_refused() {
    let (target, one, other) = (Cgroup::new(), Instance::new(), Instance::new());
    let [first, second] = [1, 2].map(|value| PolicyFile::new(sets_mark(&target, value)));
    let holder = Running::start_stopped_at(run_named(&one.name, &first), "others-checked");
    let mut refused = Running::start(run_named(&other.name, &second));
    let waits = || process::waits_for_lock(refused.pid()) || is_in_force(&refused);
    assert!(wait::until(wait::TIMEOUT, waits) && !is_in_force(&refused), "{}", refused.stderr());
    assert!(!refused.has_ended());
    holder.resume();
    assert_refused(refused, &holder);
    assert!(wait::until(wait::TIMEOUT, || is_in_force(&holder)), "{}", holder.stderr());
    assert_eq!(mark(&target), 1);
    holder.signal(Signal::SIGTERM);
    assert!(holder.finish().status.success());
    assert!(one.left().is_empty() && other.left().is_empty(), "{:?}{:?}", one.left(), other.left());
}

#[test]
fn one_of_several_agents_that_start_at_once_on_a_cgroup_succeeds() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let instances = [(); 3].map(|()| Instance::new());
    let runs = instances.each_ref().map(|instance| Running::start(run_named(&instance.name, &policy)));
    let mut runs = Vec::from(runs);
    let is_settled = wait::until(wait::TIMEOUT, || {
        runs.iter_mut().map(Running::has_ended).filter(|has_ended| !has_ended).count() == 1
            && runs.iter().any(is_in_force)
    });
    let printed: Vec<String> = runs.iter().map(Running::stderr).collect();
    assert!(is_settled, "{printed:#?}");
    let holder = runs.swap_remove(runs.iter().position(is_in_force).unwrap());
    for refused in runs {
        assert_refused(refused, &holder);
    }
    holder.signal(Signal::SIGTERM);
    assert!(holder.finish().status.success());
}

/// The kernel decides: programs may be detached by others, and cgroups removed and created again.
#[test]
fn status_shows_what_the_kernel_has_attached() {
    let (slice, instance) = (Cgroup::new(), Instance::new());
    let service = slice.child("service");
    let policy = PolicyFile::new(sets_mark(&service, 1));
    instance.attach(policy.path());
    let state = || {
        let output = agent::output(&["status", "--output", "json", "--instance", &instance.name]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        let cgroup = &status["cgroups"][0];
        assert_eq!(cgroup["cgroup"], format!("{}/service", slice.name()));
        (cgroup["state"].as_str().unwrap().to_owned(), cgroup["missing_hooks"].clone())
    };
    let text = || stdout(&agent::output(&["status", "--instance", &instance.name]));
    assert_eq!(state(), ("in_force".to_owned(), json!([])));
    assert!(text().contains(&format!("    on {}/service\n", slice.name())), "{}", text());
    // Another administrator removes a pin, and with it the link.
    let pins = Path::new("/sys/fs/bpf/sockpolicy").join(&instance.name);
    let pin = files_below(&pins).into_iter().find(|file| file.to_string_lossy().ends_with("sp_connect4")).unwrap();
    fs::remove_file(pin).unwrap();
    assert_eq!(state(), ("not_attached".to_owned(), json!(["cgroup/connect4"])));
    assert!(text().contains("service: no program is attached to cgroup/connect4\n"), "{}", text());
    drop(service);
    assert_eq!(state().0, "removed");
    assert!(text().contains("not in force, the cgroup was removed\n"), "{}", text());
    let _service = slice.child("service");
    assert_eq!(state().0, "recreated");
    assert!(text().contains("not in force, the cgroup was removed and created again\n"), "{}", text());
    instance.detach();
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|entry| if entry.is_dir() { files_below(&entry) } else { vec![entry] }).collect()
}

#[test]
fn status_shows_an_instance_and_foreign_programs() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let name = &instance.name;
    let status = || -> Value {
        serde_json::from_slice(&agent::output(&["status", "--output", "json", "--instance", name]).stdout).unwrap()
    };
    instance.attach(policy.path());
    let foreign = ForeignProgram::attach(&target, SO_RCVLOWAT, AttachMode::Link);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_MARK, 9).unwrap();
    let reported = status();
    assert_eq!(
        (&reported["instance"], &reported["pid"], &reported["persists"]),
        (&name.as_str().into(), &Value::Null, &true.into())
    );
    assert_eq!(
        (&reported["cgroups"][0]["cgroup"], &reported["cgroups"][0]["mode"]),
        (&target.name().into(), &"enforce".into())
    );
    let setting = &reported["settings"][0];
    assert_eq!(
        (&setting["option"], &setting["rule"], &setting["sockets"]["set"]),
        (&"SO_MARK".into(), &"r".into(), &1.into())
    );
    assert_eq!(setting["calls"]["conflicts"]["rewritten"], 1);
    assert_eq!(reported["foreign_programs"].as_array().unwrap().len(), 1, "{reported}");
    drop(foreign);

    let run = run_persistent(&instance, &policy);
    assert_eq!((&status()["pid"], &status()["foreign_programs"]), (&run.pid().into(), &Value::Array(Vec::new())));
    let text = stdout(&agent::output(&["status", "--instance", name]));
    let first =
        format!("instance {name}: process {}; the policies stay when it ends\n  policy (enforced)\n", run.pid());
    assert!(
        text.starts_with(&first) && text.contains(&format!("    on {}\n    by cgroup/sock_create, ", target.name())),
        "{text}"
    );
    run.signal(Signal::SIGTERM);
    run.wait_for_end();
    instance.detach();
    let output = agent::output(&["status", "--instance", name]);
    assert!(stderr(&output).starts_with(&format!("error: no instance `{name}`")), "{}", stderr(&output));
}

#[test]
fn status_separates_events_lost_in_a_storm_from_unread_events() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let rule = "[[rule]]\nset = { TCP_NODELAY = true, SO_KEEPALIVE = true }\n";
    let policy = PolicyFile::new(format!("[target]\ncgroup = {:?}\n[audit]\ncalls = \"all\"\n{rule}", target.name()));
    let storm = |target| {
        let mut storm = Command::new(workload());
        storm.args(["storm", "1", "12000"]);
        let mut storm = Running::start_in(storm, target);
        assert!(storm.wait().success(), "{}", storm.stderr());
    };
    // Lost events, and events that no agent has read.
    let counted = || {
        let output = agent::output(&["status", "--output", "json", "--instance", &instance.name]);
        let reported: Value = serde_json::from_slice(&output.stdout).unwrap();
        (reported["losses"]["ring_full"].as_u64().unwrap(), reported["unread"].as_u64().unwrap())
    };
    instance.attach(policy.path());
    storm(target.child("one"));
    let (lost, unread) = counted();
    assert!(lost == 0 && unread > 0, "{lost} {unread}");
    let text = stdout(&agent::output(&["status", "--instance", &instance.name]));
    assert!(text.contains(&format!("\nlost without an agent: {unread} events")), "{text}");
    assert!(!text.contains("lost: "), "{text}");

    let run = run_persistent(&instance, &policy);
    assert_eq!(counted(), (0, unread));
    // A stopped agent does not read the ring buffer.
    run.signal(Signal::SIGSTOP);
    storm(target.child("two"));
    run.signal(Signal::SIGCONT);
    let losses = run.notice("loss", 1);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    let lost = losses["total"].as_u64().unwrap();
    assert_eq!((&losses["reason"], counted()), (&"ring_full".into(), (lost, unread)));
    storm(target.child("three"));
    let (still_lost, more) = counted();
    assert!(still_lost == lost && more > unread, "{still_lost} {more}");
    instance.detach();
}

#[test]
fn status_shows_an_agent_without_persistent_policies() {
    let target = Cgroup::new();
    let run = Run::start(&PolicyFile::new("[[rule]]\nset = { SO_MARK = 1 }\n"), &target);
    let name = format!("run-{}", run.pid());
    let text = stdout(&agent::output(&["status", "--instance", &name]));
    assert!(text.starts_with(&format!("instance {name}: process {}\n", run.pid())), "{text}");
    run.finish();
    assert_eq!(agent::output(&["status", "--instance", &name]).status.code(), Some(2));
}

#[test]
fn plan_shows_differences_from_the_policies_in_force() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let plan = || stdout(&agent::output(&["plan", "--instance", &instance.name, policy.path().to_str().unwrap()]));
    let name = &instance.name;
    assert_eq!(plan(), format!("no difference from what instance {name} has in force\n"));
    fs::write(policy.path(), sets_mark(&target, 2).replace(" }", ", TCP_NODELAY = true }")).unwrap();
    let place = format!("(policy, rule r, on {})", target.name());
    assert_eq!(
        plan(),
        format!(
            "different from what instance {name} has in force:\n  ~ SO_MARK = 0x1 -> 0x2  {place}\n  + TCP_NODELAY = true  \
             {place}\n"
        )
    );
    instance.detach();
}

#[test]
fn detach_without_an_instance_fails() {
    let instance = Instance::new();
    let output = agent::output(&["detach", "--instance", &instance.name]);
    assert!(stderr(&output).starts_with("error: no instance `"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2));
    assert!(instance.left().is_empty(), "{:?}", instance.left());
    // Without the BPF file system, `detach` fails in the same way.
    let without = process::output(in_mount_namespace(
        "umount /sys/fs/bpf",
        &agent::command(&["detach", "--instance", &instance.name]),
    ));
    assert_eq!(stderr(&without).lines().next(), stderr(&output).lines().next());
}

#[test]
fn detach_says_how_to_end_the_agent_and_how_to_restore_values() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let detach = || stderr(&agent::output(&["detach", "--restore", "--instance", &instance.name]));
    let run = run_persistent(&instance, &policy);
    let pid = run.pid();
    assert_eq!(
        detach(),
        format!(
            "error: instance `{}` of sockpolicy runs, as process {pid}\n  help: end that one (kill {pid}), and then, if it \
             was to persist, detach what it leaves\n",
            instance.name
        )
    );
    run.finish_persistent();
    instance.detach();
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let applied = instance.run("apply", &[policy.path().to_str().unwrap()]);
    assert!(applied.status.success(), "{}", stderr(&applied));
    assert_eq!(probe.int(socket, SO_MARK), 1);
    let printed = detach();
    let help = format!(
        "\n  help: put back what `apply` has changed: sockpolicy apply --restore --instance {}\n",
        instance.name
    );
    assert!(printed.ends_with(&help), "{printed}");
    assert_eq!(stdout(&instance.run("apply", &["--restore"])).split(';').next(), Some("restored: 1 option"));
    assert_eq!(probe.int(socket, SO_MARK), 0);
}

/// Returns the layout of the binary under test, and a binary with another layout.
fn other_layout(instance: &Instance) -> (String, Build) {
    let [layout] = <[String; 1]>::try_from(instance.layouts()).unwrap();
    let build = Build::with_other_layout(&layout);
    (layout, build)
}

#[test]
fn pins_of_a_build_with_another_layout_are_replaced() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let before = count_attached(&target);
    let (ours, other) = other_layout(&instance);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    instance.attach_by(&other, policy.path());
    assert_eq!((mark(&target), count_attached(&target)), (2, before));
    assert!(instance.layouts().len() == 1 && instance.layouts() != [ours], "{:?}", instance.layouts());
    // The binary under test detaches policies of the other layout only.
    instance.detach();
    assert_eq!((mark(&target), count_attached(&target)), (0, 0));
}

#[test]
fn takeover_from_another_build_killed_at_any_step_leaves_the_old_or_the_new_policies_in_force() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let before = count_attached(&target);
    let (ours, other) = other_layout(&instance);
    for (step, times) in STEPS.into_iter().filter(|(step, _)| *step != "link-taken-over") {
        fs::write(policy.path(), sets_mark(&target, 1)).unwrap();
        instance.attach_by(&other, policy.path());
        fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
        assert!(attach_killed_at(&instance, &policy, step, times), "{step}");
        // If programs of both builds are attached, the later one sets the final value.
        let is_new = ["enabled", "retired", "detached"].contains(&step);
        assert_eq!(mark(&target), if is_new { 2 } else { 1 }, "{step}");
        fs::write(policy.path(), sets_mark(&target, 3)).unwrap();
        instance.attach(policy.path());
        let layouts = instance.layouts();
        assert_eq!((mark(&target), count_attached(&target), layouts), (3, before, vec![ours.clone()]), "{step}");
    }
    instance.detach();
    assert_eq!(count_attached(&target), 0);
}

#[test]
fn removing_a_cgroup_affects_no_other_target() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let child = target.child("child");
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 1 }}\n", format!("{}/*", target.name()));
    let policy = PolicyFile::new(text);
    instance.attach(policy.path());
    drop(child);
    let output = agent::output(&["status", "--instance", &instance.name]);
    assert!(output.status.success(), "{}", stderr(&output));
    let other = target.child("other");
    instance.attach(policy.path());
    assert_eq!(mark(&other), 1);
    // The next `attach` removes pins of links that the kernel has released by then.
    let id = fs::metadata(other.path()).unwrap().ino();
    let is_of_other = |link: &fs::DirEntry| link.file_name().to_string_lossy().starts_with(&format!("{id}-"));
    let is_released = wait::until(wait::TIMEOUT, || {
        instance.attach(policy.path());
        let layout = fs::read_dir(instance.dir()).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(layout.join("links")).unwrap().flatten().all(|link| is_of_other(&link))
    });
    assert!(is_released, "links of the removed cgroup are still pinned");
    instance.detach();
}

/// Steps of `attach`, and how often to pass each one first. Some occur only in the second attach.
const STEPS: [(&str, u32); 10] = [
    ("maps-made", 0),
    ("link-taken-over", 0),
    ("link-taken-over", 3),
    ("tables-installed", 0),
    ("link-attached", 0),
    ("link-pinned", 2),
    ("recorded", 0),
    ("enabled", 0),
    ("retired", 0),
    ("detached", 0),
];

/// Runs `attach` with a kill at this step. Returns whether it was killed.
fn attach_killed_at(instance: &Instance, policy: &PolicyFile, step: &str, times: u32) -> bool {
    let mut command = agent::command(&["attach", agent::ALLOW_UNSUPPORTED, "--instance", &instance.name]);
    command.arg(policy.path()).env("SOCKPOLICY_FAULT", format!("{step}:{times}"));
    let output = Running::start(command).finish();
    let is_killed = output.status.signal() == Some(Signal::SIGKILL as i32);
    assert!(is_killed || output.status.success(), "{step}: {}", stderr(&output));
    is_killed
}

#[test]
fn attach_killed_at_any_step_leaves_all_policies_or_none_in_force_and_can_be_repeated() {
    for (step, times) in STEPS {
        let (target, instance) = (Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 1));
        let is_killed = attach_killed_at(&instance, &policy, step, times);
        assert_eq!(is_killed, step != "link-taken-over", "{step}");
        let is_in_force = !is_killed || ["enabled", "retired", "detached"].contains(&step);
        assert_eq!(mark(&target), i32::from(is_in_force), "{step}");
        fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
        instance.attach(policy.path());
        assert_eq!(mark(&target), 2, "{step}");
        instance.detach();
        assert_eq!(count_attached(&target), 0, "{step}");
    }
}

#[test]
fn takeover_killed_at_any_step_leaves_the_old_or_the_new_policies_in_force() {
    for (step, times) in STEPS {
        let (target, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 1));
        instance.attach(policy.path());
        // With an additional target, so that there is something to attach.
        let text = format!(
            "[target]\ncgroup = [{:?}, {:?}]\n[[rule]]\nset = {{ SO_MARK = 2 }}\n",
            target.name(),
            other.name()
        );
        fs::write(policy.path(), text).unwrap();
        assert!(attach_killed_at(&instance, &policy, step, times), "{step}");
        let is_new = ["enabled", "retired", "detached"].contains(&step);
        assert_eq!((mark(&target), mark(&other)), if is_new { (2, 2) } else { (1, 0) }, "{step}");
        let output = agent::output(&["status", "--instance", &instance.name]);
        assert!(stdout(&output).contains(if is_new { "0x2" } else { "0x1" }), "{step}: {}", stdout(&output));
        fs::write(policy.path(), sets_mark(&target, 3)).unwrap();
        instance.attach(policy.path());
        assert_eq!((mark(&target), mark(&other)), (3, 0), "{step}");
        instance.detach();
        assert_eq!((count_attached(&target), count_attached(&other)), (0, 0), "{step}");
    }
}

#[test]
fn reload_killed_at_any_step_leaves_the_old_or_the_new_policies_in_force() {
    // The steps of `attach`, passed once for the start.
    for (step, times) in
        [("tables-installed", 1), ("link-attached", 8), ("link-pinned", 9), ("recorded", 1), ("enabled", 1)]
    {
        let (target, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 1));
        let mut command = agent::command(&["run", agent::ALLOW_UNSUPPORTED, "--persist", "--instance", &instance.name]);
        command.arg(policy.path()).env("SOCKPOLICY_FAULT", format!("{step}:{times}")).env("SOCKPOLICY_LOG", "info");
        let mut running = Running::start(command);
        assert!(
            wait::until(wait::TIMEOUT, || running.stderr().contains("in force on")),
            "{step}: {}",
            running.stderr()
        );
        assert_eq!(mark(&target), 1, "{step}");
        let text = format!(
            "[target]\ncgroup = [{:?}, {:?}]\n[[rule]]\nset = {{ SO_MARK = 2 }}\n",
            target.name(),
            other.name()
        );
        fs::write(policy.path(), text).unwrap();
        assert_eq!(running.wait().signal(), Some(Signal::SIGKILL as i32), "{step}: {}", running.stderr());
        let is_new = step == "enabled";
        assert_eq!((mark(&target), mark(&other)), if is_new { (2, 2) } else { (1, 0) }, "{step}");
        instance.attach(policy.path());
        assert_eq!((mark(&target), mark(&other)), (2, 2), "{step}");
        instance.detach();
        assert_eq!((count_attached(&target), count_attached(&other)), (0, 0), "{step}");
    }
}

/// Returns a policy with options that are set at hooks of all kinds. `workload connections` reads these options.
fn sets_many(target: &Cgroup) -> PolicyFile {
    PolicyFile::new(format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 1, SO_PRIORITY = 1, TCP_KEEPIDLE = \"101s\", \
         TCP_KEEPCNT = 11, TCP_SYNCNT = 1, TCP_USER_TIMEOUT = \"10001ms\" }}\n",
        target.name()
    ))
}

/// Starts a process in a cgroup that connects to itself as often as it can.
fn connections(target: Cgroup) -> Running {
    let mut command = Command::new(workload());
    command.arg("connections").stdin(Stdio::piped());
    let mut running = Running::start_in(command, target);
    running.lines(1);
    running
}

/// Ends the process, and checks that all of its connections had their options.
#[track_caller]
fn end_with_all_options(mut connections: Running) {
    connections.close_stdin();
    let text = stdout(&connections.finish());
    let seen: BTreeSet<String> = text.lines().skip(1).map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect();
    let expected = ["accepted", "outbound"].map(|which| format!("{which} 1 1 101 11 1 10001"));
    assert_eq!(seen, BTreeSet::from(expected), "{text}");
}

#[test]
fn every_connection_has_its_options_while_agents_come_and_go() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = sets_many(&target);
    let run = run_persistent(&instance, &policy);
    let connections = connections(target);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        instance.attach(policy.path());
        let run = run_persistent(&instance, &policy);
        run.signal(signal);
        run.wait_for_end();
    }
    end_with_all_options(connections);
    instance.detach();
}

#[test]
fn every_connection_has_its_options_while_builds_take_over_from_each_other() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = sets_many(&target);
    let run = run_persistent(&instance, &policy);
    let (layout, other) = other_layout(&instance);
    let (ours, copy) = (Build::under_test(), Build::copy());
    let hooks = count_attached(&target);
    let connections = connections(target);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    for (build, is_of_ours, signal) in [
        (&other, false, Signal::SIGKILL),
        (&copy, true, Signal::SIGTERM),
        (&ours, true, Signal::SIGKILL),
        (&other, false, Signal::SIGTERM),
        (&ours, true, Signal::SIGTERM),
    ] {
        let run = Run::with_build(build, policy.path(), &["--persist", "--instance", &instance.name]);
        let layouts = instance.layouts();
        assert!(layouts.len() == 1 && (layouts[0] == layout) == is_of_ours, "{layouts:?}");
        assert_eq!(count_attached(&connections.home), hooks, "the programs of the other build are detached");
        run.signal(signal);
        run.wait_for_end();
    }
    end_with_all_options(connections);
    instance.detach();
}

#[test]
fn removing_a_cgroup_during_takeover_affects_no_other_target() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let [goes, stays] = ["goes", "stays"].map(|name| target.child(name));
    let text = |mark| {
        format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = {mark} }}\n", format!("{}/*", target.name()))
    };
    let policy = PolicyFile::new(text(1));
    instance.attach(policy.path());
    fs::write(policy.path(), text(2)).unwrap();
    let id = fs::metadata(goes.path()).unwrap().ino();
    let mut attach = agent::command(&["attach", agent::ALLOW_UNSUPPORTED, "--instance", &instance.name]);
    attach.arg(policy.path());
    let held = Running::start_stopped_at(attach, &format!("link-found={id}"));
    assert!(cgroups_of_links(held.pid()).contains(&id));
    drop(goes);
    let is_gone = wait::until(wait::TIMEOUT, || !cgroups_of_links(held.pid()).contains(&id));
    assert!(is_gone, "the kernel does not release a removed cgroup");
    held.resume();
    let output = held.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mark(&stays), 2);
    instance.detach();
}

/// In a mount namespace of its own: it would remove the instances of other tests.
#[test]
fn detach_all_removes_every_instance() {
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let policies = [&one, &other].map(|target| PolicyFile::new(sets_mark(target, 1)));
    let agent = agent::program().display().to_string();
    let [first, second] = policies.each_ref().map(|policy| policy.path().display().to_string());
    let script = format!(
        "{agent} attach --instance a {first} && {agent} attach --instance b {second} && {agent} status && \
         {agent} detach --all && {agent} status && {agent} detach --all"
    );
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]);
    let prepare = "mount -t tmpfs none /run && mount -t bpf -o mode=0700 none /sys/fs/bpf";
    let output = process::output(in_mount_namespace(prepare, &command));
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    let printed = stdout(&output);
    assert!(printed.contains("instance a:") && printed.contains("instance b:"), "{printed}");
    assert!(printed.trim_end().ends_with("no policies are in force"), "{printed}");
    assert_eq!((count_attached(&one), count_attached(&other)), (0, 0));
}
