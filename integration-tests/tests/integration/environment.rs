//! Assumptions of all other tests.

use std::{collections::BTreeSet, process::Command};

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    kernels::Kernel,
    options,
    policy::PolicyFile,
    probe::Probe,
    process::{self, workload},
    script::{Family, Kind},
};

/// Returns the names in a part of doctor's output.
fn names_of(doctor: &Value, part: &str, is_wanted: impl Fn(&Value) -> bool) -> BTreeSet<String> {
    let lines = doctor[part].as_array().unwrap().iter();
    lines.filter(|line| is_wanted(line)).map(|line| line["name"].as_str().unwrap().to_owned()).collect()
}

#[track_caller]
fn assert_same(found: &BTreeSet<String>, expected: &BTreeSet<String>, what: &str) {
    let (unexpected, missing) = (found - expected, expected - found);
    assert!(
        unexpected.is_empty() && missing.is_empty(),
        "not in kernels.toml: {unexpected:?}; only in kernels.toml: {missing:?}; {what}"
    );
}

#[test]
fn doctor_agrees_with_kernels_toml() {
    let kernel = Kernel::current();
    let output = agent::output(&["doctor", "--output", "json"]);
    assert!(output.status.success(), "{output:?}");
    let doctor: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(doctor["kernel"], kernel.release.as_str());
    let known = &kernel.known;
    for (part, names) in
        [("hook_support", &known.hooks), ("backend_support", &known.audit), ("option_support", &known.options)]
    {
        assert_same(&names_of(&doctor, part, |_| true), names, &format!("{part} that doctor tries"));
        let expected = names.iter().filter(|name| kernel.has(name)).cloned().collect();
        let found = names_of(&doctor, part, |line| line["works"] == "yes");
        assert_same(&found, &expected, &format!("{part} that work on {}: {:#}", kernel.release, doctor[part]));
    }
}

#[test]
fn mptcp_is_supported_if_kernels_toml_says_so() {
    let cgroup = Cgroup::new();
    let opened = Probe::start(&cgroup).try_open(Family::Inet, Kind::Mptcp);
    assert_eq!(opened.is_ok(), Kernel::current().has("mptcp"), "{opened:?}");
}

#[test]
fn dctcp_is_loaded_if_kernels_toml_says_so() {
    let loaded = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
    assert_eq!(loaded.split_whitespace().any(|name| name == "dctcp"), Kernel::current().has("dctcp"), "{loaded}");
}

#[test]
fn io_uring_has_socket_calls_if_kernels_toml_says_so() {
    let mut command = Command::new(workload());
    command.args(["ring", "plain"]);
    let output = process::output(command);
    // SO_KEEPALIVE. A kernel with io_uring but without these calls fails each with EOPNOTSUPP.
    let works = crate::stdout(&output).contains("\nsetsockopt 1 9 0 ");
    assert_eq!(works, Kernel::current().has("io_uring"), "{output:?}");
}

#[test]
fn denied_call_can_have_a_chosen_errno_if_kernels_toml_says_so() {
    let setting = "SO_KEEPALIVE = { value = true, on_conflict = \"deny\", errno = \"EACCES\" }";
    let policy = PolicyFile::new(format!("[[rule]]\nmatch = {{ protocol = \"tcp\" }}\nset = {{ {setting} }}\n"));
    let output = process::output(agent::command(&["exec", "--quiet", policy.path().to_str().unwrap(), "--", "true"]));
    if Kernel::current().has("errno") {
        assert!(output.status.success(), "{output:?}");
    } else {
        let error = "error: cannot enforce the policies on this kernel:\n  SO_KEEPALIVE at cgroup/setsockopt: denied calls fail \
                     with EPERM, not with EACCES (known to work from 5.18 on)\n  help: remove these settings, or give \
                     --allow-unsupported to enforce the rest\n";
        assert_eq!((&*crate::stderr(&output), output.status.code()), (error, Some(125)));
    }
}

#[test]
fn settable_options_have_the_numbers_of_the_kernels_headers() {
    let output = agent::output(&["options", "--output", "json"]);
    let mut settable = BTreeSet::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let name = line["option"].as_str().unwrap();
        if let Some(option) = options::ALL.iter().find(|option| option.name == name) {
            assert_eq!((&line["level"], &line["optname"]), (&option.level.into(), &option.number.into()), "{name}");
        }
        if line["can"].as_array().unwrap().iter().any(|verb| verb == "set") {
            assert!(options::ALL.iter().any(|option| option.name == name), "{name} is not in src/options.rs");
            settable.insert(name.to_owned());
        }
    }
    assert_same(&settable, &Kernel::current().known.options, "options that `sockpolicy options` says can be set");
}
