//! Settings that this kernel does not support are found by probing, and are refused or reported.

use std::{collections::BTreeSet, process::Command};

use sockpolicy_integration_tests::{
    agent::{self, Exec},
    kernels::Kernel,
    options::TCP_KEEPCNT,
    policy::PolicyFile,
    process,
    report::Report,
    script::{Family, Kind},
};

use crate::stderr;

/// Returns a policy that sets every option to the example of the agent's table.
fn everything() -> PolicyFile {
    let output = agent::output(&["options", "--output", "json"]);
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let settable = lines.filter(|line| line["can"].as_array().unwrap().iter().any(|verb| verb == "set"));
    let settings: Vec<String> = settable
        .map(|line| format!("{} = {}", line["option"].as_str().unwrap(), line["example"].as_str().unwrap()))
        .collect();
    // A device has two options, of which a rule can name one.
    let (device, others): (Vec<_>, Vec<_>) =
        settings.into_iter().partition(|setting| setting.starts_with("SO_BINDTODEVICE "));
    let (device, others) = (device.join(", "), others.join(", "));
    PolicyFile::new(format!(
        "[[rule]]\nmatch = {{ protocol = \"tcp\" }}\nset = {{ {device} }}\n[[rule]]\nset = {{ {others} }}\n"
    ))
}

fn gaps_in(report: &Report) -> (BTreeSet<String>, BTreeSet<String>) {
    let (at_hooks, everywhere): (Vec<_>, Vec<_>) = report.unsupported.iter().partition(|entry| !entry.hooks.is_empty());
    let options = everywhere.into_iter().flat_map(|entry| entry.options.clone()).collect();
    (at_hooks.into_iter().flat_map(|entry| entry.hooks.clone()).collect(), options)
}

/// Returns the hooks that policies may need. Iterators are not hooks for new sockets, and policies also work without
/// the LSM hook.
fn policy_hooks(kernel: &Kernel) -> BTreeSet<String> {
    let is_needed = |name: &&String| !name.starts_with("iter/") && !name.starts_with("lsm_cgroup/");
    kernel.known.hooks.iter().filter(is_needed).cloned().collect()
}

#[test]
fn unsupported_settings_are_those_that_kernels_toml_lists_as_missing() {
    let kernel = Kernel::current();
    let exec = Exec::start(&everything());
    let report = exec.finish();
    let (hooks, options) = gaps_in(&report);
    let missing = |names: &BTreeSet<String>| names.iter().filter(|name| !kernel.has(name)).cloned().collect();
    assert_eq!(
        (hooks, options),
        (missing(&policy_hooks(kernel)), missing(&kernel.known.options)),
        "{:#?}",
        report.unsupported
    );
    assert_eq!(report.summary.unsupported, report.unsupported);
    for entry in &report.unsupported {
        assert!(!entry.options.is_empty() && entry.remedy.starts_with("known to work from "), "{entry:?}");
    }
}

#[test]
fn policy_with_unsupported_settings_is_refused_except_in_a_dry_run() {
    let policy = everything();
    let report = Exec::start(&policy).finish();
    let output = process::output(agent::command(&["exec", "--quiet", policy.path().to_str().unwrap(), "--", "true"]));
    if report.unsupported.is_empty() {
        assert!(output.status.success(), "{}", stderr(&output));
        return;
    }
    assert_eq!(output.status.code(), Some(125));
    let printed = stderr(&output);
    assert!(printed.contains("error: cannot enforce the policies on this kernel:\n"), "{printed}");
    for entry in &report.unsupported {
        let place = if entry.hooks.is_empty() { String::new() } else { format!(" at {}", entry.hooks.join(", ")) };
        let line = format!("\n  {}{place}: {} ({})\n", entry.options.join(", "), entry.reason, entry.remedy);
        assert!(printed.contains(&line), "{line} in {printed}");
    }
    let dry = Exec::with(&policy, &["--dry-run"]).finish();
    assert_eq!(dry.unsupported, report.unsupported, "a dry run reports them too");
}

/// `check --kernel` uses only versions, so it can check this kernel too.
#[test]
fn check_for_this_kernel_agrees_with_probing() {
    let kernel = Kernel::current();
    let policy = everything();
    let path = policy.path().to_str().unwrap();
    let output = agent::output(&["check", "-o", "json", "--kernel", &kernel.release, path]);
    let printed = String::from_utf8(output.stdout).unwrap();
    let messages: Vec<String> = printed
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line["severity"] == "error")
        .map(|line| line["message"].as_str().unwrap().to_owned())
        .collect();
    for names in [&kernel.known.options, &policy_hooks(kernel)] {
        for name in names {
            let is_missing = messages.iter().any(|message| {
                message.contains(&format!("does not let programs set {name}:"))
                    || message.split(" at ").nth(1).is_some_and(|hooks| hooks.contains(name.as_str()))
            });
            assert_eq!(is_missing, !kernel.has(name), "{name} on {}: {messages:#?}", kernel.release);
        }
    }
    assert_eq!(output.status.code(), Some(i32::from(!messages.is_empty())));
}

#[test]
fn routes_with_locked_congestion_control_are_found() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_CONGESTION = \"cubic\" }\n");
    let mut shell = Command::new("unshare");
    shell.args(["--net", "sh", "-ec"]);
    shell.arg(
        "ip link set lo up; for n in $(seq 250); do echo route add 10.98.$n.0/24 dev lo; done | ip -batch -; \
         ip route add 10.99.0.0/16 dev lo congctl lock reno; ip -6 route add fd99::/64 dev lo congctl lock reno; \
         ip route add 10.100.0.0/16 dev lo congctl reno; ip route add 10.101.0.0/16 dev lo congctl lock cubic; \
         exec \"$0\" check \"$1\"",
    );
    shell.arg(agent::program()).arg(policy.path());
    let output = process::output(shell);
    let printed = stderr(&output);
    assert!(output.status.success(), "{printed}");
    let expected =
        "connections over routes that lock another congestion control do not get `cubic`: 10.99.0.0/16, and 1 more\n";
    assert!(printed.contains(expected), "{printed}");
}

/// An option value that no kernel supports.
#[test]
fn other_settings_are_enforced_next_to_an_unsupported_one() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { TCP_CONGESTION = \"no-such-cc\", TCP_KEEPCNT = 5 }\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!([pair.client, pair.server].map(|fd| exec.probe.int(fd, TCP_KEEPCNT)), [5, 5]);
    let report = exec.finish();
    let [entry] = &report.unsupported[..] else { panic!("{:?}", report.unsupported) };
    assert_eq!(
        (&entry.options[..], &*entry.remedy),
        (&["TCP_CONGESTION = \"no-such-cc\"".to_owned()][..], "load it: modprobe tcp_no-such-cc")
    );
    assert!(report.setting("TCP_CONGESTION").sockets.failed > 0);
}

/// The sockets of the option probe do not count.
#[test]
fn option_probe_is_neither_counted_nor_reported() {
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { TCP_KEEPCNT = 5 }\n");
    let report = Exec::start(&policy).finish();
    let [line] = &report.summary.settings[..] else { panic!("{:?}", report.summary.settings) };
    assert_eq!((line.sockets.set, line.sockets.unchanged, report.events.len()), (0, 0, 0));
    assert_eq!(report.summary.policies, ["policy"]);
    report.assert_nothing_lost();
}
