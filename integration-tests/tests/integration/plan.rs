//! `sockpolicy plan`, against what `run` does.

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    foreign::attached,
    policy::PolicyFile,
};

use crate::{stderr, stdout};

#[test]
fn plan_has_as_many_steps_as_programs_come_to_be_attached() {
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
        assert_eq!(attached(&target), 0, "a plan attaches nothing");
        let run = Run::start(&policy, &target);
        assert_eq!(attached(&target) as usize, hooks.len());
        drop(run.finish());
    }
}
