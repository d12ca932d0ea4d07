//! `sockpolicy plan`, compared with what `run` does.

use std::{fs, path::Path};

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::{self, Cgroup},
    foreign_program::{self, AttachMode, ForeignProgram, count_attached},
    options::SO_RCVLOWAT,
    policy::PolicyFile,
};

use crate::{stderr, stdout};

fn some_policy() -> PolicyFile {
    PolicyFile::new("[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { TCP_SYNCNT = 3 }\n")
}

#[test]
fn plan_has_one_step_for_each_program_that_run_attaches() {
    let target = Cgroup::new();
    for (policy, hooks) in [
        (
            "[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { SO_MARK = 32, TCP_SYNCNT = 3 }\n",
            &["sock_create", "connect4", "connect6", "sock_ops", "setsockopt", "getsockopt"][..],
        ),
        ("[audit]\nreads = false\n[[rule]]\nset = { TCP_SYNCNT = 3 }\n", &["sock_create", "sock_ops", "setsockopt"]),
        ("[[rule]]\nmatch = { protocol = \"udp\" }\ndeny = [\"SO_MARK\"]\n", &["sock_create", "setsockopt"]),
    ] {
        let policy = PolicyFile::new(policy);
        let (path, cgroup) = (policy.path().to_str().unwrap(), target.path().display().to_string());
        let output = agent::output(&["plan", "-o", "json", path, "--cgroup", &cgroup]);
        assert!(output.status.success(), "{}", stderr(&output));
        let steps: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let attach: Vec<&Value> = steps.iter().filter(|step| step["step"] == "attach").collect();
        let planned = attach.iter().map(|step| step["hook"].as_str().unwrap().trim_start_matches("cgroup/"));
        assert_eq!(planned.collect::<Vec<_>>(), hooks);
        assert!(attach.iter().all(|step| step["cgroup"] == target.name().as_str()));
        assert_eq!(count_attached(&target), 0, "a plan attaches nothing");
        let run = Run::start(&policy, &target);
        assert_eq!(count_attached(&target) as usize, hooks.len());
        drop(run.finish());
    }
}

#[test]
fn plan_names_foreign_programs() {
    let target = Cgroup::new();
    let below = target.child("below");
    let policy = some_policy();
    let path = policy.path().to_str().unwrap();
    let _foreign = ForeignProgram::attach(&target, SO_RCVLOWAT, AttachMode::Link);
    let hook = "cgroup/setsockopt";
    let plan = |cgroup: &Cgroup| {
        let output = agent::output(&["plan", "-o", "json", path, "--cgroup", &cgroup.path().display().to_string()]);
        let lines = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
        lines.into_iter().filter(|line| line["step"] == "leave").collect::<Vec<_>>()
    };
    for (cgroup, runs) in [(&target, "before"), (&below, "after")] {
        let [other] = &plan(cgroup)[..] else { panic!("{:?}", plan(cgroup)) };
        assert_eq!((&other["hook"], &other["runs"]), (&hook.into(), &runs.into()));
        assert_eq!((&other["cgroup"], &other["name"]), (&target.name().into(), &foreign_program::NAME.into()));
    }
    let text = stdout(&agent::output(&["plan", path, "--cgroup", &below.path().display().to_string()]));
    let expected = format!("{hook}   {} (program ", foreign_program::NAME);
    assert!(text.contains(&expected) && text.contains(&format!(" on {}: runs after ours", target.name())), "{text}");
    let doctor: Value = serde_json::from_slice(&agent::output(&["doctor", "-o", "json"]).stdout).unwrap();
    let attached = doctor["attached_programs"].as_array().unwrap();
    let ours: Vec<_> = attached.iter().filter(|line| line["cgroup"] == target.name().as_str()).collect();
    assert_eq!(ours.len(), 1, "{attached:?}");
    assert_eq!((&ours[0]["hook"], &ours[0]["name"]), (&hook.into(), &foreign_program::NAME.into()));
}

#[test]
fn plan_shows_missing_targets_and_targets_of_other_instances() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = [{:?}, \"no-such-cgroup\"]\n[[rule]]\nset = {{ TCP_SYNCNT = 3 }}\n",
        target.name()
    ));
    let later = policy.add("later.toml", "[target]\ncgroup = \"no-such-cgroup\"\n[[rule]]\nset = { SO_MARK = 3 }\n");
    let plan = |path: &Path| stdout(&agent::output(&["plan", path.to_str().unwrap()]));
    let printed = plan(&later);
    assert!(
        printed.contains("on no cgroup yet, and on those that come to be its targets: later (enforced)\n"),
        "{printed}"
    );
    assert!(!plan(policy.path()).contains("refused"));
    let run = Run::start_with(&policy, &[]);
    let refused = format!(
        "\nunless it takes over that instance, it would be refused as things are:\n  cgroup {} is already a target of \
         instance `run-{}`, which runs as process {}\n",
        target.name(),
        run.pid(),
        run.pid()
    );
    assert!(plan(policy.path()).contains(&refused), "{}", plan(policy.path()));
    run.finish();
}

/// `exec` does not follow the instances below its cgroup.
#[test]
fn exec_above_is_warned_of() {
    let policy = some_policy();
    let outer = Exec::start(&policy);
    let target = outer.target();
    fs::create_dir(target.join("below")).unwrap();
    let below = Cgroup::adopt(&target.join("below"));
    let inner = Run::start(&policy, &below).finish();
    let name = format!("/{}", target.strip_prefix(cgroup::mount()).unwrap().display());
    let warning =
        format!("another sockpolicy is attached to ancestor {name}: it overrides this one where both decide an option");
    assert!(stderr(&inner.output).contains(&warning), "{}", stderr(&inner.output));
    drop(below);
    outer.finish();
}
