//! Policies that stay in force when the agent is gone, and agents that take over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Build, Run},
    bpffs::Instance,
    cgroup::Cgroup,
    foreign::{Foreign, Manner, attached},
    options::{SO_MARK, SO_RCVLOWAT},
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running, with_mounts, workload},
    residue::cgroups_of_links,
    script::{Family, Kind},
    wait,
};

use crate::{stderr, stdout};

fn sets_mark(target: &Cgroup, mark: i32) -> String {
    format!("[target]\ncgroup = {:?}\n[[rule]]\nname = \"r\"\nset = {{ SO_MARK = {mark} }}\n", target.name())
}

fn mark(target: &Cgroup) -> i32 {
    Probe::start(target).fresh(SO_MARK)
}

fn run_persistent(instance: &Instance, policy: &PolicyFile) -> Run {
    Run::started(policy, &["--persist", "--instance", &instance.name])
}

#[test]
fn attached_policies_hold_without_an_agent_until_they_are_detached() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(socket, SO_MARK), 1);
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 1);
    instance.detach();
    assert_eq!(attached(&target), 0);
    // The socket keeps what it has, and is its owner's.
    assert_eq!((probe.int(socket, SO_MARK), probe.fresh(SO_MARK)), (1, 0));
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 9);
}

#[test]
fn attached_policies_give_way_to_others_of_the_same_instance() {
    let (one, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
    instance.attach(PolicyFile::new(sets_mark(&one, 1)).path());
    instance.attach(PolicyFile::new(sets_mark(&one, 2)).path());
    assert_eq!(mark(&one), 2);
    instance.attach(PolicyFile::new(sets_mark(&other, 3)).path());
    assert_eq!((mark(&one), mark(&other), attached(&one)), (0, 3, 0));
    instance.detach();
}

#[test]
fn policies_of_a_persistent_run_stay_and_the_next_one_takes_over() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = run_persistent(&instance, &policy);
    let mut probe = Probe::start(&target);
    assert_eq!(probe.fresh(SO_MARK), 1);
    run.signal(Signal::SIGKILL);
    let killed = run.wait_for_end();
    assert_eq!(killed.status.signal(), Some(Signal::SIGKILL as i32));
    let socket = probe.open(Family::Inet, Kind::Tcp);
    // What nobody has heard of yet.
    probe.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(probe.int(socket, SO_MARK), 1);

    let run = run_persistent(&instance, &policy);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    run.notice("reload", 1);
    assert_eq!(probe.fresh(SO_MARK), 2);
    run.signal(Signal::SIGTERM);
    let ended = run.wait_for_end();
    assert!(ended.status.success(), "{}", stderr(&ended));
    assert!(stderr(&ended).contains(&format!("`sockpolicy detach {}` ends that", instance.name)), "{}", stderr(&ended));
    let told = stdout(&ended);
    assert!(told.contains("\"event\":\"conflict\""), "the call between the two agents is not told of: {told}");
    assert_eq!(probe.fresh(SO_MARK), 2);
    instance.detach();
    assert_eq!(attached(&target), 0);
}

/// A process of its own asks for a mark that the policy does not want.
fn disagree(target: &Cgroup, mark: i32) {
    let mut probe = Probe::start(target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_MARK, mark).unwrap();
}

#[test]
fn counts_go_on_where_each_agent_is_killed_before_it_retires_policies() {
    // Twice as many as the kernel's side keeps the policies of (abi::GENERATIONS).
    const AGENTS: i32 = 8;
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    for agent in 1..=AGENTS {
        let run = run_persistent(&instance, &policy);
        disagree(&target, 10 + agent);
        run.signal(Signal::SIGKILL);
        run.wait_for_end();
    }
    let report = run_persistent(&instance, &policy).finish_and_stay();
    assert_eq!(report.setting("SO_MARK").calls.verdicts(), BTreeMap::from([("rewritten", AGENTS as u64)]));
    instance.detach();
}

#[test]
fn counts_and_what_nobody_has_read_go_on_from_policies_to_policies_and_from_agent_to_agent() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let counted = || {
        let status = agent::output(&["status", "--output", "json", &instance.name]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        let setting = &status["settings"][0];
        [&setting["sockets"]["set"], &setting["calls"]["verdicts"]["rewritten"]].map(|count| count.as_u64().unwrap())
    };
    let fails = |run: Run| {
        run.signal(Signal::SIGTERM);
        run.wait_for_end().status.code()
    };
    // Without an agent, and each time by the same policies put in force anew.
    for times in 1..=3 {
        instance.attach(policy.path());
        disagree(&target, 10 + times);
        assert_eq!(counted(), [times as u64; 2]);
    }
    let run = run_persistent(&instance, &policy);
    assert_eq!(counted(), [3; 2]);
    disagree(&target, 14);
    run.signal(Signal::SIGHUP);
    run.notice("reload", 1);
    assert_eq!(counted(), [4; 2]);
    let report = run.finish_and_stay();
    let asked: Vec<_> =
        report.of("conflict", "SO_MARK").iter().map(|event| event.requested.as_u64().unwrap()).collect();
    assert_eq!(asked, [11, 12, 13, 14]);
    report.assert_nothing_lost();
    let setting = report.setting("SO_MARK");
    assert_eq!((setting.sockets.set, setting.calls.verdicts()), (4, BTreeMap::from([("rewritten", 4)])));

    // What somebody has been told of is no failure of those who come after.
    let arguments = ["--persist", "--fail-on-conflict", "--instance", &instance.name];
    assert_eq!(fails(Run::started(&policy, &arguments)), Some(0));
    let run = Run::started(&policy, &arguments);
    disagree(&target, 15);
    assert_eq!(fails(run), Some(1));
    let run = run_persistent(&instance, &policy);
    disagree(&target, 16);
    run.signal(Signal::SIGKILL);
    run.wait_for_end();
    disagree(&target, 17);
    assert_eq!(counted(), [7; 2]);
    // As often as there are generations, each gone before it has summed up those before it.
    for _ in 0..5 {
        assert!(attach_killed_at(&instance, &policy, "retired", 0));
        assert_eq!(counted(), [7; 2]);
    }
    instance.attach(policy.path());
    assert_eq!(counted(), [7; 2]);
    // What is new begins anew.
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    instance.attach(policy.path());
    assert_eq!(counted(), [0; 2]);
    instance.detach();
}

#[test]
fn another_agent_for_the_same_cgroup_or_of_the_same_name_is_refused() {
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

/// `run` of an instance, which says when it is in force.
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
fn agent_that_starts_while_another_claims_the_same_cgroup_waits_for_it_and_is_refused() {
    let (target, one, other) = (Cgroup::new(), Instance::new(), Instance::new());
    let [first, second] = [1, 2].map(|value| PolicyFile::new(sets_mark(&target, value)));
    let holder = Running::start_held(run_named(&one.name, &first), "others-checked");
    let mut refused = Running::start(run_named(&other.name, &second));
    let waits = || process::waits_for_lock(refused.pid()) || is_in_force(&refused);
    assert!(wait::until(wait::PATIENCE, waits) && !is_in_force(&refused), "{}", refused.stderr());
    assert!(!refused.has_ended());
    holder.go_on();
    assert_refused(refused, &holder);
    assert!(wait::until(wait::PATIENCE, || is_in_force(&holder)), "{}", holder.stderr());
    assert_eq!(mark(&target), 1);
    holder.signal(Signal::SIGTERM);
    assert!(holder.finish().status.success());
    assert!(one.left().is_empty() && other.left().is_empty(), "{:?}{:?}", one.left(), other.left());
}

#[test]
fn of_agents_that_start_at_once_for_the_same_cgroup_one_gets_it() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let instances = [(); 3].map(|()| Instance::new());
    let runs = instances.each_ref().map(|instance| Running::start(run_named(&instance.name, &policy)));
    let mut runs = Vec::from(runs);
    let is_settled = wait::until(wait::PATIENCE, || {
        runs.iter_mut().map(Running::has_ended).filter(|has_ended| !has_ended).count() == 1
            && runs.iter().any(is_in_force)
    });
    let said: Vec<String> = runs.iter().map(Running::stderr).collect();
    assert!(is_settled, "{said:#?}");
    let holder = runs.swap_remove(runs.iter().position(is_in_force).unwrap());
    for refused in runs {
        assert_refused(refused, &holder);
    }
    holder.signal(Signal::SIGTERM);
    assert!(holder.finish().status.success());
}

#[test]
fn status_tells_of_instances_and_of_programs_of_others() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let name = &instance.name;
    let status =
        || -> Value { serde_json::from_slice(&agent::output(&["status", "--output", "json", name]).stdout).unwrap() };
    instance.attach(policy.path());
    let foreign = Foreign::attach(&target, SO_RCVLOWAT, Manner::Link);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_MARK, 9).unwrap();
    let told = status();
    assert_eq!(
        (&told["instance"], &told["pid"], &told["persists"]),
        (&name.as_str().into(), &Value::Null, &true.into())
    );
    assert_eq!(
        (&told["cgroups"][0]["cgroup"], &told["cgroups"][0]["mode"]),
        (&target.name().into(), &"enforce".into())
    );
    let setting = &told["settings"][0];
    assert_eq!(
        (&setting["option"], &setting["rule"], &setting["sockets"]["set"]),
        (&"SO_MARK".into(), &"r".into(), &1.into())
    );
    assert_eq!(setting["calls"]["verdicts"]["rewritten"], 1);
    assert_eq!(told["foreign_programs"].as_array().unwrap().len(), 1, "{told}");
    drop(foreign);

    let run = run_persistent(&instance, &policy);
    assert_eq!((&status()["pid"], &status()["foreign_programs"]), (&run.pid().into(), &Value::Array(Vec::new())));
    let text = stdout(&agent::output(&["status", name]));
    let first = format!(
        "instance {name}: runs as process {}, and stays in force when that ends\n  policy (enforced)\n",
        run.pid()
    );
    assert!(
        text.starts_with(&first) && text.contains(&format!("    on {}\n    by cgroup/sock_create, ", target.name())),
        "{text}"
    );
    run.signal(Signal::SIGTERM);
    run.wait_for_end();
    instance.detach();
    let output = agent::output(&["status", name]);
    assert!(
        stderr(&output).starts_with(&format!("error: no instance `{name}` of sockpolicy is here")),
        "{}",
        stderr(&output)
    );
}

#[test]
fn status_tells_what_was_lost_in_a_storm_from_what_came_while_there_was_no_agent() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let rule = "[[rule]]\nset = { TCP_NODELAY = true, SO_KEEPALIVE = true }\n";
    let policy = PolicyFile::new(format!("[target]\ncgroup = {:?}\n[audit]\ncalls = \"all\"\n{rule}", target.name()));
    let storm = |target| {
        let mut storm = Command::new(workload());
        storm.args(["storm", "1", "12000"]);
        let mut storm = Running::start_in(storm, target);
        assert!(storm.wait().success(), "{}", storm.stderr());
    };
    // Lost, and not told of for want of an agent.
    let counted = || {
        let output = agent::output(&["status", "--output", "json", &instance.name]);
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        (told["losses"]["ring_full"].as_u64().unwrap(), told["unread"].as_u64().unwrap())
    };
    instance.attach(policy.path());
    storm(target.child("one"));
    let (lost, unread) = counted();
    assert!(lost == 0 && unread > 0, "{lost} {unread}");
    let text = stdout(&agent::output(&["status", &instance.name]));
    assert!(text.contains(&format!("\nnot told: {unread} events that came while there was no agent")), "{text}");
    assert!(!text.contains("lost: "), "{text}");

    let run = run_persistent(&instance, &policy);
    assert_eq!(counted(), (0, unread));
    // One that does not come to reading.
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
fn status_tells_of_an_agent_whose_policies_do_not_stay() {
    let target = Cgroup::new();
    let run = Run::start(&PolicyFile::new("[[rule]]\nset = { SO_MARK = 1 }\n"), &target);
    let name = format!("run-{}", run.pid());
    let text = stdout(&agent::output(&["status", &name]));
    assert!(text.starts_with(&format!("instance {name}: runs as process {}\n", run.pid())), "{text}");
    run.finish();
    assert_eq!(agent::output(&["status", &name]).status.code(), Some(2));
}

#[test]
fn plan_tells_what_would_be_different_from_what_is_in_force() {
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
fn detach_of_nothing_says_so() {
    let instance = Instance::new();
    let output = agent::output(&["detach", &instance.name]);
    assert!(stderr(&output).starts_with("error: no instance `"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2));
    assert!(instance.left().is_empty(), "{:?}", instance.left());
    // It does not take what it would then not find either.
    let without = process::output(with_mounts("umount /sys/fs/bpf", &agent::command(&["detach", &instance.name])));
    assert_eq!(stderr(&without).lines().next(), stderr(&output).lines().next());
}

#[test]
fn detach_says_what_to_do_about_an_agent_that_runs_and_about_what_apply_has_changed() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let detach = || stderr(&agent::output(&["detach", "--restore", &instance.name]));
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
    run.finish_and_stay();
    instance.detach();
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let applied = instance.run("apply", &[policy.path().to_str().unwrap()]);
    assert!(applied.status.success(), "{}", stderr(&applied));
    assert_eq!(probe.int(socket, SO_MARK), 1);
    let said = detach();
    let help = format!(
        "\n  help: put back what `apply` has changed: sockpolicy apply --restore --instance {}\n",
        instance.name
    );
    assert!(said.ends_with(&help), "{said}");
    assert_eq!(stdout(&instance.run("apply", &["--restore"])).split(';').next(), Some("restored: 1 options"));
    assert_eq!(probe.int(socket, SO_MARK), 0);
}

/// The layout of the build that is tested, and a build of another one.
fn other_layout(instance: &Instance) -> (String, Build) {
    let [layout] = <[String; 1]>::try_from(instance.layouts()).unwrap();
    let build = Build::of_another_layout(&layout);
    (layout, build)
}

#[test]
fn pins_of_a_build_of_another_layout_are_replaced() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let before = attached(&target);
    let (ours, other) = other_layout(&instance);
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    instance.attach_by(&other, policy.path());
    assert_eq!((mark(&target), attached(&target)), (2, before));
    assert!(instance.layouts().len() == 1 && instance.layouts() != [ours], "{:?}", instance.layouts());
    // By ours, of which nothing is there.
    instance.detach();
    assert_eq!((mark(&target), attached(&target)), (0, 0));
}

#[test]
fn takeover_from_another_build_that_is_killed_at_any_step_has_the_old_or_the_new_in_force() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    instance.attach(policy.path());
    let before = attached(&target);
    let (ours, other) = other_layout(&instance);
    for (step, times) in STEPS.into_iter().filter(|(step, _)| *step != "link-taken-over") {
        fs::write(policy.path(), sets_mark(&target, 1)).unwrap();
        instance.attach_by(&other, policy.path());
        fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
        assert!(attach_killed_at(&instance, &policy, step, times), "{step}");
        // Of two that are attached the later one sets last.
        let is_new = ["enabled", "retired", "detached"].contains(&step);
        assert_eq!(mark(&target), if is_new { 2 } else { 1 }, "{step}");
        fs::write(policy.path(), sets_mark(&target, 3)).unwrap();
        instance.attach(policy.path());
        let layouts = instance.layouts();
        assert_eq!((mark(&target), attached(&target), layouts), (3, before, vec![ours.clone()]), "{step}");
    }
    instance.detach();
    assert_eq!(attached(&target), 0);
}

#[test]
fn cgroup_that_is_removed_takes_nothing_else_with_it() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let child = target.child("child");
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 1 }}\n", format!("{}/*", target.name()));
    let policy = PolicyFile::new(text);
    instance.attach(policy.path());
    drop(child);
    let output = agent::output(&["status", &instance.name]);
    assert!(output.status.success(), "{}", stderr(&output));
    let other = target.child("other");
    instance.attach(policy.path());
    assert_eq!(mark(&other), 1);
    // What the kernel has let go of by then is gone from the next one's pins.
    let id = fs::metadata(other.path()).unwrap().ino();
    let is_of_other = |link: &fs::DirEntry| link.file_name().to_string_lossy().starts_with(&format!("{id}-"));
    let is_let_go = wait::until(wait::PATIENCE, || {
        instance.attach(policy.path());
        let layout = fs::read_dir(instance.folder()).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(layout.join("links")).unwrap().flatten().all(|link| is_of_other(&link))
    });
    assert!(is_let_go, "links of the removed cgroup are still pinned");
    instance.detach();
}

/// Steps of `attach`, and how many times to let each pass. Some are of the second attach only.
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

/// `attach` that is killed at this step. Gives whether it was.
fn attach_killed_at(instance: &Instance, policy: &PolicyFile, step: &str, times: u32) -> bool {
    let mut command = agent::command(&["attach", agent::ALLOW_UNSUPPORTED, "--instance", &instance.name]);
    command.arg(policy.path()).env("SOCKPOLICY_FAULT", format!("{step}:{times}"));
    let output = Running::start(command).finish();
    let is_killed = output.status.signal() == Some(Signal::SIGKILL as i32);
    assert!(is_killed || output.status.success(), "{step}: {}", stderr(&output));
    is_killed
}

#[test]
fn attach_that_is_killed_at_any_step_has_all_in_force_or_nothing_and_the_next_one_goes_on() {
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
        assert_eq!(attached(&target), 0, "{step}");
    }
}

#[test]
fn takeover_that_is_killed_at_any_step_has_the_old_or_the_new_in_force() {
    for (step, times) in STEPS {
        let (target, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 1));
        instance.attach(policy.path());
        // With a target more, so that there is something to attach.
        let text = format!(
            "[target]\ncgroup = [{:?}, {:?}]\n[[rule]]\nset = {{ SO_MARK = 2 }}\n",
            target.name(),
            other.name()
        );
        fs::write(policy.path(), text).unwrap();
        assert!(attach_killed_at(&instance, &policy, step, times), "{step}");
        let is_new = ["enabled", "retired", "detached"].contains(&step);
        assert_eq!((mark(&target), mark(&other)), if is_new { (2, 2) } else { (1, 0) }, "{step}");
        let output = agent::output(&["status", &instance.name]);
        assert!(stdout(&output).contains(if is_new { "0x2" } else { "0x1" }), "{step}: {}", stdout(&output));
        fs::write(policy.path(), sets_mark(&target, 3)).unwrap();
        instance.attach(policy.path());
        assert_eq!((mark(&target), mark(&other)), (3, 0), "{step}");
        instance.detach();
        assert_eq!((attached(&target), attached(&other)), (0, 0), "{step}");
    }
}

#[test]
fn reload_that_is_killed_at_any_step_has_the_old_or_the_new_in_force() {
    // As in `attach`, once for the start.
    for (step, times) in
        [("tables-installed", 1), ("link-attached", 8), ("link-pinned", 9), ("recorded", 1), ("enabled", 1)]
    {
        let (target, other, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 1));
        let mut command = agent::command(&["run", agent::ALLOW_UNSUPPORTED, "--persist", "--instance", &instance.name]);
        command.arg(policy.path()).env("SOCKPOLICY_FAULT", format!("{step}:{times}")).env("SOCKPOLICY_LOG", "info");
        let mut running = Running::start(command);
        assert!(
            wait::until(wait::PATIENCE, || running.stderr().contains("in force on")),
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
        assert_eq!((attached(&target), attached(&other)), (0, 0), "{step}");
    }
}

/// Sets options at hooks of all kinds, which `workload connections` looks at.
fn sets_many(target: &Cgroup) -> PolicyFile {
    PolicyFile::new(format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 1, SO_PRIORITY = 1, TCP_KEEPIDLE = \"101s\", \
         TCP_KEEPCNT = 11, TCP_SYNCNT = 1, TCP_USER_TIMEOUT = \"10001ms\" }}\n",
        target.name()
    ))
}

/// Connections to itself, as many as there can be, of a process of a cgroup.
fn connections(target: Cgroup) -> Running {
    let mut command = Command::new(workload());
    command.arg("connections").stdin(Stdio::piped());
    let mut running = Running::start_in(command, target);
    running.lines(1);
    running
}

/// Ends the connections, each of which has had its options.
#[track_caller]
fn end_governed(mut connections: Running) {
    connections.close_stdin();
    let text = stdout(&connections.finish());
    let seen: BTreeSet<String> = text.lines().skip(1).map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect();
    let expected = ["accepted", "outbound"].map(|which| format!("{which} 1 1 101 11 1 10001"));
    assert_eq!(seen, BTreeSet::from(expected), "{text}");
}

#[test]
fn no_connection_goes_without_its_options_while_agents_come_and_go() {
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
    end_governed(connections);
    instance.detach();
}

#[test]
fn no_connection_goes_without_its_options_while_builds_take_over_from_each_other() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = sets_many(&target);
    let run = run_persistent(&instance, &policy);
    let (layout, other) = other_layout(&instance);
    let (ours, copy) = (Build::ours(), Build::copy());
    let hooks = attached(&target);
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
        let run = Run::by(build, policy.path(), &["--persist", "--instance", &instance.name]);
        let layouts = instance.layouts();
        assert!(layouts.len() == 1 && (layouts[0] == layout) == is_of_ours, "{layouts:?}");
        assert_eq!(attached(&connections.home), hooks, "what the other build attached is gone");
        run.signal(signal);
        run.wait_for_end();
    }
    end_governed(connections);
    instance.detach();
}

#[test]
fn cgroup_that_goes_in_the_moment_of_being_taken_over_takes_nothing_else_with_it() {
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
    let held = Running::start_held(attach, &format!("link-found={id}"));
    assert!(cgroups_of_links(held.pid()).contains(&id));
    drop(goes);
    let is_gone = wait::until(wait::PATIENCE, || !cgroups_of_links(held.pid()).contains(&id));
    assert!(is_gone, "the kernel does not let go of a removed cgroup");
    held.go_on();
    let output = held.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mark(&stays), 2);
    instance.detach();
}
