//! A dry run decides as enforcement does, and changes nothing.

mod without_hooks;

use std::collections::BTreeMap;

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    bpf_objects::attach_types_of_links,
    cgroup::Cgroup,
    options::{
        IP_TOS, IP_TTL, SO_KEEPALIVE, SO_LINGER, SO_MARK, SO_PRIORITY, SO_RCVBUF, SocketOption, TCP_CONGESTION,
        TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY, TCP_QUICKACK, TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    probe::Probe,
    report::Report,
    require,
    script::{Argument, Family, Kind},
};

const POLICY: &str = "[[rule]]\n\
    match = { direction = \"outbound\" }\n\
    set = { TCP_NODELAY = true, SO_MARK = \"0x20/0xff\", SO_PRIORITY = 3, TCP_CONGESTION = \"reno\", \
            TCP_KEEPIDLE = { value = \"77s\", on_conflict = \"allow\" }, IP_TOS = \"AF21\", \
            TCP_USER_TIMEOUT = { value = \"5s\", on_conflict = \"ignore\" }, \
            SO_KEEPALIVE = { value = true, on_conflict = \"deny\", errno = \"EACCES\" } }\n\
    limit = { TCP_KEEPCNT = { max = 10 }, SO_RCVBUF = { max = \"32KiB\" } }\n\
    deny = [\"SO_LINGER\"]\n";

/// Returns the calls of an application, with the values that they would set without a policy.
fn calls() -> Vec<(SocketOption, Argument, Vec<u8>)> {
    let int = |value: i32| value.to_ne_bytes().to_vec();
    let linger: Vec<u8> = [1i32, 5].into_iter().flat_map(i32::to_ne_bytes).collect();
    vec![
        (TCP_NODELAY, 0.into(), int(0)),
        (SO_MARK, 0x1133.into(), int(0x1133)),
        (IP_TOS, 0xb8.into(), int(0xb8)),
        (SO_PRIORITY, 6.into(), int(6)),
        (TCP_CONGESTION, "cubic".into(), b"cubic".to_vec()),
        (TCP_KEEPIDLE, 99.into(), int(99)),
        (TCP_USER_TIMEOUT, 1234.into(), int(1234)),
        (SO_KEEPALIVE, 0.into(), int(0)),
        (TCP_KEEPCNT, Argument::padded(99, 8192), int(99)),
        (SO_RCVBUF, 65536.into(), int(2 * 65536)),
        (SO_LINGER, linger.clone().into(), linger),
    ]
}

/// Makes these calls on a connected socket. Returns their results, and the values of the socket afterwards.
fn ask(probe: &mut Probe) -> Vec<(&'static str, Result<(), Errno>, Vec<u8>)> {
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let calls = calls().into_iter();
    calls
        .map(|(option, argument, wish)| {
            let result = probe.set(pair.client, option, argument);
            let mut value = probe.get(pair.client, option, 16).unwrap();
            value.truncate(wish.len());
            (option.name, result, value)
        })
        .collect()
}

/// Returns the number of conflicts by option and verdict.
fn decisions(report: &Report) -> BTreeMap<(String, String), u64> {
    let all = report.summary.settings.iter().flat_map(|setting| {
        let verdicts = setting.calls.verdicts().into_iter();
        verdicts.map(|(verdict, count)| ((setting.option.clone(), verdict.to_owned()), count)).collect::<Vec<_>>()
    });
    all.collect()
}

fn would(verdict: &str) -> String {
    let verb = match verdict {
        "rewritten" => "rewrite",
        "clamped" => "clamp",
        "ignored" => "ignore",
        "denied" => "deny",
        other => return other.to_owned(),
    };
    format!("would-{verb}")
}

#[test]
fn dry_run_changes_no_socket_and_has_the_same_verdicts_as_enforcement() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(POLICY);
    let mut enforced = Exec::start(&policy);
    let held = ask(&mut enforced.probe);
    let enforced = enforced.finish();
    let mut dry = Exec::with(&policy, &["--dry-run"]);
    let unheld = ask(&mut dry.probe);
    let dry = dry.finish();

    for ((option, result, value), (_, _, wish)) in unheld.iter().zip(calls()) {
        assert_eq!((result, value), (&Ok(()), &wish), "{option}: the application's value is set");
    }
    let unlike = held.iter().zip(&unheld).filter(|(held, unheld)| held != unheld).count();
    assert_eq!(unlike, unheld.len() - 1, "when enforced, all but the allowed call have a different effect");

    let expected: BTreeMap<_, _> =
        decisions(&enforced).into_iter().map(|((option, verdict), count)| ((option, would(&verdict)), count)).collect();
    assert_eq!(decisions(&dry), expected, "dry run on the left");
    assert_eq!(expected.len(), unheld.len());
    assert_eq!((enforced.summary.mode.as_str(), dry.summary.mode.as_str()), ("enforce", "dry-run"));

    for (option, ..) in calls() {
        let (one, other) = (enforced.conflict(option.name), dry.conflict(option.name));
        assert_eq!(would(one.verdict.as_deref().unwrap()), other.verdict.as_deref().unwrap(), "{}", option.name);
        assert_eq!(
            (&one.wanted, &one.requested, &one.rule),
            (&other.wanted, &other.requested, &other.rule),
            "{}",
            option.name
        );
        assert_eq!(other.result, Some(0), "{}", option.name);
    }
    // A dry run also counts the sockets that would have been set.
    for setting in &enforced.summary.settings {
        assert_eq!(dry.setting(&setting.option).sockets, setting.sockets, "{}", setting.option);
    }
}

#[test]
fn policy_can_request_a_dry_run() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(format!("mode = \"dry-run\"\n{POLICY}"));
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.int(fd, SO_MARK), 0, "not at creation either");
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(pair.client, TCP_NODELAY, 0), Ok(()));
    assert_eq!(exec.probe.int(pair.client, TCP_NODELAY), 0);
    let report = exec.finish();
    assert_eq!(report.verdicts("TCP_NODELAY"), ["would-rewrite"]);
}

#[test]
fn call_that_fails_for_other_reasons_has_the_same_verdict() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_KEEPCNT = 5 }\n");
    let mut exec = Exec::with(&policy, &["--dry-run"]);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(fd, TCP_KEEPCNT, 4000), Err(Errno::EINVAL), "out of the kernel's range");
    let report = exec.finish();
    let event = report.conflict("TCP_KEEPCNT");
    assert_eq!(event.verdict.as_deref(), Some("would-rewrite"));
    assert_eq!(event.result, Some(-(Errno::EINVAL as i64)));
    assert_ne!(event.current, 4000, "the socket does not have the refused value");
}

/// A policy for which the audit can judge calls as well as a hook: its rule matches only the protocol.
const PLAIN: &str = "[[rule]]\n\
    match = { protocol = \"tcp\" }\n\
    set = { TCP_NODELAY = true, SO_MARK = \"0x20/0xff\", SO_PRIORITY = { value = 3, on_conflict = \"ignore\" }, \
            TCP_CONGESTION = \"reno\", IP_TOS = { value = \"AF21\", on_conflict = \"deny\" } }\n\
    limit = { TCP_KEEPCNT = { max = 10 }, SO_RCVBUF = { max = \"32KiB\" }, IP_TTL = { max = 9 }, TCP_USER_TIMEOUT = { max = \"5s\" } }\n\
    deny = [\"SO_LINGER\", \"TCP_QUICKACK\"]\n\
    [audit]\nreads = true\n";

/// BPF_CGROUP_GETSOCKOPT and BPF_CGROUP_SETSOCKOPT.
const SOCKOPT: [u64; 2] = [21, 22];

/// Makes calls of every kind on TCP and UDP sockets. Returns their results.
fn ask_in_every_way(probe: &mut Probe) -> Vec<Result<(), Errno>> {
    let mut results = Vec::new();
    for (family, kind) in [(Family::Inet, Kind::Tcp), (Family::Inet6, Kind::Tcp), (Family::Inet, Kind::Udp)] {
        let fd = probe.open(family, kind);
        for option in [
            TCP_NODELAY,
            SO_MARK,
            SO_PRIORITY,
            TCP_CONGESTION,
            IP_TOS,
            TCP_KEEPCNT,
            SO_RCVBUF,
            IP_TTL,
            TCP_USER_TIMEOUT,
            SO_LINGER,
            TCP_QUICKACK,
            SO_KEEPALIVE,
        ] {
            for value in [-1, 0, 1, 3, 8, 0x20, 99, 1 << 20, i32::MAX] {
                results.push(probe.set(fd, option, value));
                results.push(probe.set(fd, option, (value as u32 as u64) << 8));
                results.push(probe.set(fd, option, value as u8));
                let _ = probe.get(fd, option, 16);
            }
            for argument in [Argument::from(Vec::new()), Argument::bad_pointer(4), "bbr\0".into(), "reno".into()] {
                results.push(probe.set(fd, option, argument));
            }
            results.push(probe.set(fd, option, Argument { len: -1, ..Argument::from(1) }));
            results.push(probe.set(fd, option, Argument::padded(1, 4097)));
        }
        probe.close(fd);
        // A closed descriptor.
        results.push(probe.set(fd, TCP_NODELAY, 0));
    }
    results
}

/// Calls on an option: conflicts by verdict, agreeing calls, and reads.
type Counts = (Vec<(String, u64)>, u64, u64);

/// Returns the counters of calls by option.
fn counts(report: &Report) -> BTreeMap<String, Counts> {
    let of = |calls: &sockpolicy_integration_tests::report::Calls| {
        (
            calls.verdicts().into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
            calls.agreed,
            calls.reads,
        )
    };
    report.summary.settings.iter().map(|setting| (setting.option.clone(), of(&setting.calls))).collect()
}

#[test]
fn audit_judges_calls_of_a_dry_run_as_the_hook_does() {
    let policy = PolicyFile::new(PLAIN);
    let mut hooked = Exec::with(&policy, &["--dry-run", "--audit-backend", "none"]);
    assert!(attach_types_of_links(hooked.pid()).is_superset(&SOCKOPT.into()), "hooks at both calls");
    ask_in_every_way(&mut hooked.probe);
    let hooked = hooked.finish();

    let mut audited = Exec::with(&policy, &["--dry-run"]);
    assert!(attach_types_of_links(audited.pid()).is_disjoint(&SOCKOPT.into()), "no hook at either call");
    let results = ask_in_every_way(&mut audited.probe);
    assert_eq!(results, ask_in_every_way(&mut Probe::start(&Cgroup::new())), "with and without a policy");
    let audited = audited.finish();

    assert_eq!(counts(&audited), counts(&hooked), "judged by the audit on the left");
    let conflicts: u64 = counts(&hooked).values().flat_map(|(verdicts, ..)| verdicts).map(|(_, count)| count).sum();
    assert!(conflicts > 200, "{conflicts} conflicts");
    assert_eq!(audited.summary.losses["unjudged"], 0);
}

#[test]
fn dry_run_does_not_fail_a_call_with_a_truncated_argument() {
    let policy = PolicyFile::new(PLAIN);
    let mut exec = Exec::with(&policy, &["--dry-run"]);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(fd, TCP_NODELAY, 1), Ok(()));
    assert_eq!(exec.probe.set(fd, TCP_NODELAY, Argument::truncated(0, 64)), Ok(()), "as without a policy");
    assert_eq!(exec.probe.int(fd, TCP_NODELAY), 0);
    let report = exec.finish();
    assert_eq!(report.verdicts("TCP_NODELAY"), ["would-rewrite"]);
}

#[test]
fn rule_about_the_peer_needs_the_hook_in_a_dry_run() {
    require!("cgroup/bind4");
    let policy =
        PolicyFile::new("[[rule]]\nmatch = { remote = \"127.0.0.0/8\" }\nlimit = { TCP_KEEPCNT = { max = 10 } }\n");
    let exec = Exec::with(&policy, &["--dry-run"]);
    assert!(attach_types_of_links(exec.pid()).contains(&SOCKOPT[1]), "calls before connect are judged at connect");
    exec.finish();
}
