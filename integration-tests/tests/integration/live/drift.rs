//! `sockpolicy verify`.

use std::process::Output;

use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::Cgroup,
    options::{
        SO_COOKIE, SO_MARK, SO_RCVBUF, SO_SNDBUF, SocketOption, TCP_CONGESTION, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY,
        TCP_SYNCNT,
    },
    policy::PolicyFile,
    probe::Probe,
    process, require,
    script::{Family, Fd, Kind},
};

use crate::{
    bad_input::rights::with_capabilities,
    enforcement::{observe, policy_of_all},
    stderr, stdout,
};

/// Runs `sockpolicy verify` with these arguments. Returns its exit status, the drift events, and the summary.
#[track_caller]
fn verify(arguments: &[&str]) -> (Option<i32>, Vec<Value>, Value) {
    report(&agent::output(&[&["verify", "-o", "json"], arguments].concat()))
}

#[track_caller]
fn report(output: &Output) -> (Option<i32>, Vec<Value>, Value) {
    let printed = stdout(output);
    let mut lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let summary = lines.pop().unwrap_or_else(|| panic!("no output: {}", stderr(output)));
    assert_eq!(summary["event"], "verify-summary");
    assert!(lines.iter().all(|line| line["event"] == "drift"), "{printed}");
    assert_eq!(summary["drifts"], lines.len());
    (output.status.code(), lines, summary)
}

fn on(cgroup: &Cgroup) -> [String; 2] {
    ["--cgroup".to_owned(), cgroup.path().display().to_string()]
}

/// Runs `verify` for a policy on a cgroup.
#[track_caller]
fn verify_on(cgroup: &Cgroup, policy: &PolicyFile) -> (Option<i32>, Vec<Value>, Value) {
    let [option, path] = on(cgroup);
    verify(&[&option, &path, policy.path().to_str().unwrap()])
}

/// Returns the options that have drifted on a socket of the probe, which is found by its cookie.
fn drifted(events: &[Value], probe: &mut Probe, fd: Fd) -> Vec<String> {
    let cookie = probe.get(fd, SO_COOKIE, 8).unwrap();
    let cookie = u64::from_ne_bytes(cookie.try_into().unwrap());
    let of_it = events.iter().filter(|event| event["socket"]["cookie"] == cookie);
    of_it.map(|event| event["option"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn verify_finds_exactly_the_existing_drift() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let policy = PolicyFile::new(
        "name = \"steady\"\n\
         [[rule]]\n\
         name = \"all\"\n\
         match = { protocol = \"tcp\" }\n\
         set = { TCP_KEEPCNT = 5, TCP_CONGESTION = \"reno\", SO_SNDBUF = \"50KiB\", SO_MARK = \"0x20/0xff\" }\n\
         limit = { TCP_SYNCNT = { max = 3 } }\n",
    );
    let all: [(SocketOption, i32); 3] = [(TCP_KEEPCNT, 5), (SO_SNDBUF, 50 * 1024), (SO_MARK, 0x1120)];
    for fd in [pair.listener, pair.client, pair.server] {
        for (option, value) in all {
            probe.set(fd, option, value).unwrap();
        }
        probe.set(fd, TCP_CONGESTION, "reno").unwrap();
    }
    let (status, events, summary) = verify_on(&cgroup, &policy);
    assert_eq!((status, events.len(), &summary["checked"]), (Some(0), 0, &json!(3)), "{events:#?}");

    probe.set(pair.client, TCP_KEEPCNT, 9).unwrap();
    probe.set(pair.server, SO_MARK, 0x1121).unwrap();
    probe.set(pair.server, TCP_SYNCNT, 4).unwrap();
    probe.set(pair.listener, SO_SNDBUF, 60 * 1024).unwrap();
    probe.set(pair.listener, TCP_CONGESTION, "cubic").unwrap();
    probe.set(pair.listener, TCP_SYNCNT, 2).unwrap();
    let (status, events, summary) = verify_on(&cgroup, &policy);
    assert_eq!((status, &summary["drifted"]), (Some(1), &json!(3)));
    assert_eq!(drifted(&events, &mut probe, pair.client), ["TCP_KEEPCNT"]);
    assert_eq!(drifted(&events, &mut probe, pair.server), ["SO_MARK", "TCP_SYNCNT"]);
    assert_eq!(drifted(&events, &mut probe, pair.listener), ["SO_SNDBUF", "TCP_CONGESTION"]);
    let event = |option: &str| events.iter().find(|event| event["option"] == option).unwrap();
    let keep = event("TCP_KEEPCNT");
    assert_eq!((&keep["wanted"], &keep["current"]), (&json!(5), &json!(9)));
    assert_eq!((&keep["policy"], &keep["rule"]), (&json!("steady"), &json!("all")));
    assert_eq!(keep["file"], format!("{}:5", policy.path().display()));
    assert_eq!((&keep["level"], &keep["optname"]), (&json!(TCP_KEEPCNT.level), &json!(TCP_KEEPCNT.number)));
    assert_eq!(
        (&keep["pid"], &keep["comm"], &keep["cgroup"]),
        (&json!(probe.pid), &json!("sockprobe"), &json!(cgroup.name()))
    );
    assert_eq!(keep["socket"]["remote"], pair.address.to_string());
    assert_eq!((&event("SO_MARK")["wanted"], &event("SO_MARK")["current"]), (&json!(0x20), &json!(0x1121)));
    assert_eq!(
        (&event("SO_SNDBUF")["wanted"], &event("SO_SNDBUF")["current"]),
        (&json!(50 * 1024), &json!(60 * 1024)),
        "in the unit of setsockopt"
    );
    let limit = event("TCP_SYNCNT");
    assert_eq!(
        (&limit["wanted"], &limit["limit"], &limit["current"]),
        (&Value::Null, &json!({ "min": 1, "max": 3 }), &json!(4))
    );

    let [option, path] = on(&cgroup);
    let text = stdout(&agent::output(&["verify", &option, &path, policy.path().to_str().unwrap()]));
    let line = format!(
        "drift     sockprobe[{}] TCP_KEEPCNT is 9 (policy: 5)  ({}:5, rule all)",
        probe.pid,
        policy.path().display()
    );
    assert!(text.contains(&line), "{text}");
    assert!(text.ends_with("checked 3 sockets: drift of 5 options on 3 sockets\n"), "{text}");
}

/// All options at once, on sockets of every kind.
#[test]
fn sockets_set_by_a_policy_have_not_drifted() {
    let policy = policy_of_all();
    let mut exec = Exec::start(&policy);
    drop(observe(&mut exec.probe));
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    exec.probe.transfer(pair.client, pair.server, 1 << 20);
    let target = exec.target().display().to_string();
    let (status, events, summary) = verify(&["--cgroup", &target, policy.path().to_str().unwrap()]);
    assert_eq!((status, events.len()), (Some(0), 0), "{events:#?}");
    assert!(summary["checked"].as_u64().unwrap() >= 15, "{summary}");
    // Without the policy, the same sockets differ.
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    drop(observe(&mut probe));
    let (status, events, _) = verify_on(&cgroup, &policy);
    assert_eq!(status, Some(1));
    assert!(events.len() > 50, "{events:#?}");
    // Options that cannot be read, that the kernel does not keep, or that only matter at bind.
    let may_be = ["SK_BPF_CB_FLAGS", "TCP_WINDOW_CLAMP", "SO_REUSEADDR", "SO_REUSEPORT"];
    let unknown: Vec<&str> =
        summary["unknown_options"].as_array().unwrap().iter().map(|it| it["option"].as_str().unwrap()).collect();
    assert!(unknown.contains(&"TCP_BPF_IW"), "{unknown:?}");
    let others: Vec<_> =
        unknown.iter().filter(|option| !option.starts_with("TCP_BPF_") && !may_be.contains(option)).collect();
    assert!(others.is_empty(), "{others:?}");
    drop(exec.finish());
}

#[test]
fn direction_of_a_connection_without_its_listener_is_known() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"inbound\" }\nset = { TCP_KEEPCNT = 5 }\n\
         [[rule]]\nmatch = { direction = \"outbound\" }\nset = { TCP_KEEPIDLE = \"60s\" }\n",
    );
    for carried in [0, 1, 3 << 20] {
        let pair = probe.pair(Family::Inet, Kind::Tcp);
        probe.close(pair.listener);
        if carried > 0 {
            probe.transfer(pair.client, pair.server, carried);
            probe.transfer(pair.server, pair.client, carried / 2 + 1);
        }
        let (_, events, summary) = verify_on(&cgroup, &policy);
        assert_eq!(drifted(&events, &mut probe, pair.client), ["TCP_KEEPIDLE"], "after {carried}: {summary}");
        assert_eq!(drifted(&events, &mut probe, pair.server), ["TCP_KEEPCNT"], "after {carried}: {summary}");
        assert_eq!(summary["unknown_options"], json!([]));
    }
}

#[test]
fn value_beyond_a_system_limit_is_no_drift_once_set() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_SNDBUF = \"900MiB\", SO_RCVBUF = 1 }\n");
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    let (small, large) = (exec.probe.int(pair.client, SO_RCVBUF), exec.probe.int(pair.client, SO_SNDBUF));
    assert!(small > 2 && large < 1800 << 20, "the kernel has bounds of its own: {small}, {large}");
    let target = exec.target().display().to_string();
    let (status, events, _) = verify(&["--cgroup", &target, policy.path().to_str().unwrap()]);
    assert_eq!((status, events.len()), (Some(0), 0), "{events:#?}");
    drop(exec.finish());
}

#[test]
fn each_socket_is_compared_with_the_policies_of_its_cgroup_also_in_a_dry_run() {
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let mut probe = Probe::start(&outer);
    let above = probe.pair(Family::Inet, Kind::Tcp);
    probe.enter(&inner);
    let below = probe.pair(Family::Inet, Kind::Tcp);
    let target = |cgroup: &Cgroup| format!("mode = \"dry-run\"\n[target]\ncgroup = \"{}\"\n[[rule]]\n", cgroup.name());
    let policies =
        PolicyFile::named("outer.toml", format!("{}set = {{ TCP_KEEPCNT = 5, TCP_NODELAY = true }}\n", target(&outer)));
    let inner = policies.add("inner.toml", format!("{}set = {{ TCP_KEEPCNT = 9 }}\n", target(&inner)));
    let (status, events, _) = verify(&[policies.path().to_str().unwrap(), inner.to_str().unwrap()]);
    assert_eq!(status, Some(1));
    assert_eq!(drifted(&events, &mut probe, above.client), ["TCP_NODELAY", "TCP_KEEPCNT"]);
    let keep = probe.int(below.client, TCP_KEEPCNT);
    assert_eq!((keep, drifted(&events, &mut probe, below.client)), (9, vec!["TCP_NODELAY".to_owned()]));
}

#[test]
fn sockets_older_than_the_policy_have_drifted_and_newer_ones_have_not() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let before = probe.pair(Family::Inet, Kind::Tcp);
    let policy =
        PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true, TCP_KEEPIDLE = \"60s\" }\n[audit]\nreads = false\n");
    let run = Run::start(&policy, &target);
    let after = probe.pair(Family::Inet, Kind::Tcp);
    let new = probe.open(Family::Inet, Kind::Tcp);
    let (status, events, summary) = verify_on(&target, &policy);
    assert_eq!(status, Some(1));
    for fd in [before.listener, before.client, before.server] {
        assert_eq!(drifted(&events, &mut probe, fd), ["TCP_NODELAY", "TCP_KEEPIDLE"]);
    }
    for fd in [after.listener, after.client, after.server, new] {
        assert_eq!(
            (probe.int(fd, TCP_NODELAY) == 1, drifted(&events, &mut probe, fd)),
            (fd != new, Vec::<String>::new())
        );
    }
    assert_eq!(summary["drifts"], 6);
    drop(run.finish());
}

#[test]
fn connection_in_the_accept_queue_is_counted_and_is_no_failure() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let keep = probe.int(client, TCP_KEEPIDLE);
    let policy = PolicyFile::new(format!("[[rule]]\nset = {{ TCP_KEEPIDLE = \"{keep}s\" }}\n"));
    let (status, _, summary) = verify_on(&cgroup, &policy);
    assert_eq!((status, &summary["checked"], &summary["no_fd"]), (Some(0), &json!(2), &json!(1)));
}

#[test]
fn verify_fails_with_the_number_of_unreadable_processes() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    probe.listener(Family::Inet, Kind::Tcp);
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_KEEPCNT = 9 }\n");
    let [option, path] = on(&cgroup);
    let agent = agent::command(&["verify", "-o", "json", &option, &path, policy.path().to_str().unwrap()]);
    let without = with_capabilities("-sys_ptrace", &agent);
    let (status, events, summary) = report(&process::output(without));
    assert_eq!((status, events.len(), &summary["unread_processes"]), (Some(2), 0, &json!(1)), "{summary}");
}

#[test]
fn policy_without_a_target_and_invalid_policy_are_failures() {
    for (policy, printed) in [("[[rule]]\nset = { TCP_KEEPCNT = 9 }\n", "no target"), ("nonsense\n", "error")] {
        let policy = PolicyFile::new(policy);
        let output = agent::output(&["verify", policy.path().to_str().unwrap()]);
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""));
        assert!(stderr(&output).contains(printed), "{}", stderr(&output));
    }
}
