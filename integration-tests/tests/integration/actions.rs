//! Each action on a conflicting call: the value of the socket, the result of the call, and the report.

use std::collections::BTreeMap;

use nix::errno::Errno;
use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::Exec,
    options::{
        IP_TTL, SO_BINDTODEVICE, SO_COOKIE, SO_KEEPALIVE, SO_LINGER, SO_MARK, SO_PRIORITY, SO_RCVBUF, SO_RCVTIMEO,
        SO_SNDBUF, TCP_CONGESTION, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_NODELAY, TCP_SYNCNT, TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    probe,
    report::{Event, Sockets},
    require,
    script::{Family, Kind},
};

use crate::number;

/// Returns the cookie of a socket, from SO_COOKIE.
fn cookie(exec: &mut Exec, fd: i32) -> u64 {
    u64::from_ne_bytes(exec.probe.get(fd, SO_COOKIE, 8).unwrap().try_into().unwrap())
}

/// Returns the fields wanted, asked, now and result of an event.
fn values(event: &Event) -> [Value; 4] {
    [event.wanted.clone(), event.requested.clone(), event.current.clone(), json!(event.result)]
}

#[test]
fn rewritten_call_succeeds_and_sets_the_policys_value() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "name = \"demo\"\n\
         [[rule]]\n\
         name = \"all\"\n\
         set = { TCP_NODELAY = true, TCP_KEEPIDLE = \"33s\" }\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    let cookie = cookie(&mut exec, pair.client);
    let local = exec.probe.local_address(pair.client);
    assert_eq!(exec.probe.set(pair.client, TCP_NODELAY, 0), Ok(()));
    assert_eq!(exec.probe.int(pair.client, TCP_NODELAY), 1);
    assert_eq!(exec.probe.set(pair.client, TCP_KEEPIDLE, 44), Ok(()));
    assert_eq!(exec.probe.int(pair.client, TCP_KEEPIDLE), 33);
    assert_eq!(exec.probe.set(pair.client, TCP_KEEPIDLE, 33), Ok(()), "this call agrees");
    exec.wait_for_report_of("TCP_NODELAY");
    let (pid, target) = (exec.probe.pid, exec.target());
    let home = exec.home.name();
    let report = exec.finish();

    let event = report.conflict("TCP_NODELAY");
    assert_eq!(event.schema, 1);
    assert_eq!(event.call.as_deref(), Some("setsockopt"));
    assert_eq!(event.policy.as_deref(), Some("demo"));
    assert_eq!(event.rule.as_deref(), Some("all"));
    assert_eq!(event.file, Some(format!("{}:4", policy.path().display())));
    assert_eq!((event.level, event.optname), (TCP_NODELAY.level, TCP_NODELAY.number));
    assert_eq!(event.verdict.as_deref(), Some("rewritten"));
    assert_eq!(values(event), [json!(1), json!(0), json!(1), json!(0)], "wanted, asked, now, result");
    assert_eq!((event.pid, event.tid), (Some(pid), Some(pid)));
    assert_eq!(event.comm.as_deref(), Some("sockprobe"));
    assert_eq!(event.exe, Some(probe::program().display().to_string()));
    let target = target.file_name().unwrap().to_str().unwrap();
    assert_eq!(event.cgroup, Some(format!("{home}/{target}")));
    assert_eq!(event.via.as_deref(), Some("syscall"));
    assert_eq!(event.backend, report.summary.backend);
    let socket = event.socket.as_ref().unwrap();
    assert_eq!(socket.protocol.as_deref(), Some("tcp"));
    assert_eq!(socket.family.as_deref(), Some("ipv4"));
    assert_eq!(socket.local, Some(local.to_string()));
    assert_eq!(socket.remote, Some(pair.address.to_string()));
    assert_eq!(socket.cookie, Some(cookie));

    assert_eq!(values(report.conflict("TCP_KEEPIDLE")), [json!(33), json!(44), json!(33), json!(0)]);
    let setting = report.setting("TCP_KEEPIDLE");
    assert_eq!(setting.calls.verdicts(), BTreeMap::from([("rewritten", 1)]));
    assert_eq!((setting.calls.agreed, setting.calls.reads), (1, 0));
    // The listener and the client are set; the accepted socket inherits the value.
    assert_eq!(setting.sockets, Sockets { set: 2, unchanged: 1, ..Sockets::default() });
    assert_eq!(report.summary.conflicts, 2);
    assert_eq!(report.summary.mode, "enforce");
    assert_eq!(report.summary.policies, ["demo"]);
    report.assert_nothing_lost();
}

#[test]
fn clamped_call_succeeds_with_the_nearest_permitted_value() {
    let policy = PolicyFile::new(
        "[[rule]]\n\
         limit = { TCP_KEEPCNT = { min = 5, max = 10 }, SO_SNDBUF = { max = \"32KiB\" }, TCP_SYNCNT = { min = 3 } }\n",
    );
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet6, Kind::Tcp);
    for (asked, left) in [(2, 5), (7, 7), (99, 10)] {
        assert_eq!(exec.probe.set(fd, TCP_KEEPCNT, asked), Ok(()));
        assert_eq!(exec.probe.int(fd, TCP_KEEPCNT), left, "requested {asked}");
    }
    assert_eq!(exec.probe.set(fd, SO_SNDBUF, 64 * 1024), Ok(()));
    assert_eq!(exec.probe.int(fd, SO_SNDBUF), 2 * 32 * 1024, "the kernel doubles it");
    assert_eq!(exec.probe.set(fd, TCP_SYNCNT, 1), Ok(()));
    assert_eq!(exec.probe.int(fd, TCP_SYNCNT), 3);
    let report = exec.finish();

    let setting = report.setting("TCP_KEEPCNT");
    assert_eq!(setting.calls.verdicts(), BTreeMap::from([("clamped", 2)]));
    assert_eq!(setting.calls.agreed, 1);
    assert_eq!(setting.sockets, Sockets::default(), "a limit sets nothing");
    let event = report.conflict("SO_SNDBUF");
    assert_eq!(event.verdict.as_deref(), Some("clamped"));
    assert_eq!(event.applied, Some(json!(32768)));
    assert_eq!(values(event), [Value::Null, json!(65536), json!(32768), json!(0)], "wanted, asked, now, result");
    assert_eq!(values(report.conflict("TCP_SYNCNT")), [Value::Null, json!(1), json!(3), json!(0)]);
}

#[test]
fn ignored_call_succeeds_without_effect() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         on_conflict = \"ignore\"\n\
         set = { TCP_USER_TIMEOUT = \"20s\" }\n\
         limit = { TCP_KEEPINTVL = { max = \"50s\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet6, Kind::Tcp);
    assert_eq!(exec.probe.set(pair.server, TCP_USER_TIMEOUT, 1234), Ok(()));
    assert_eq!(exec.probe.int(pair.server, TCP_USER_TIMEOUT), 20_000);
    let before = exec.probe.int(pair.server, TCP_KEEPINTVL);
    assert_eq!(exec.probe.set(pair.server, TCP_KEEPINTVL, 51), Ok(()));
    assert_eq!(exec.probe.int(pair.server, TCP_KEEPINTVL), before);
    let report = exec.finish();

    let event = report.conflict("TCP_USER_TIMEOUT");
    assert_eq!(event.verdict.as_deref(), Some("ignored"));
    assert_eq!(values(event), [json!(20_000), json!(1234), json!(20_000), json!(0)], "wanted, asked, now, result");
    assert_eq!(report.setting("TCP_USER_TIMEOUT").calls.verdicts(), BTreeMap::from([("ignored", 1)]));
    assert_eq!(report.verdicts("TCP_KEEPINTVL"), ["ignored"]);
    assert_eq!(report.summary.conflicts, 2);
}

#[test]
fn denied_call_fails_with_the_errno_of_the_policy() {
    require!("errno");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         name = \"strict\"\n\
         set = { TCP_NODELAY = { value = true, on_conflict = \"deny\" }, \
                 SO_MARK = { value = 32, on_conflict = \"deny\", errno = \"EACCES\" } }\n\
         limit = { SO_RCVBUF = { max = \"16KiB\", on_conflict = \"deny\", errno = \"ENOBUFS\" } }\n\
         deny = [\"SO_BINDTODEVICE\", \"SO_LINGER\", \"6:99\"]\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    let fd = pair.client;
    let buffer = exec.probe.int(fd, SO_RCVBUF);
    assert_eq!(exec.probe.set(fd, TCP_NODELAY, 0), Err(Errno::EPERM));
    assert_eq!(exec.probe.int(fd, TCP_NODELAY), 1);
    assert_eq!(exec.probe.set(fd, SO_MARK, 33), Err(Errno::EACCES));
    assert_eq!(exec.probe.int(fd, SO_MARK), 32);
    assert_eq!(exec.probe.set(fd, SO_MARK, 32), Ok(()), "the policy's value is not denied");
    assert_eq!(exec.probe.set(fd, SO_RCVBUF, 1 << 20), Err(Errno::ENOBUFS));
    assert_eq!(exec.probe.int(fd, SO_RCVBUF), buffer);
    assert_eq!(exec.probe.set(fd, SO_BINDTODEVICE, "lo"), Err(Errno::EPERM));
    assert_eq!(exec.probe.text(fd, SO_BINDTODEVICE), "");
    let linger: Vec<u8> = [1i32, 5].into_iter().flat_map(i32::to_ne_bytes).collect();
    assert_eq!(exec.probe.set(fd, SO_LINGER, linger), Err(Errno::EPERM));
    assert_eq!(exec.probe.get(fd, SO_LINGER, 8), Ok(vec![0; 8]));
    assert_eq!(exec.probe.set(fd, number(6, 99), 1), Err(Errno::EPERM));
    let report = exec.finish();

    for (option, errno, wanted, asked, now) in [
        ("TCP_NODELAY", Errno::EPERM, json!(1), json!(0), json!(1)),
        ("SO_MARK", Errno::EACCES, json!(32), json!(33), json!(32)),
        ("SO_RCVBUF", Errno::ENOBUFS, Value::Null, json!(1 << 20), json!(buffer / 2)),
        ("SO_BINDTODEVICE", Errno::EPERM, Value::Null, json!("lo"), Value::Null),
        ("SO_LINGER", Errno::EPERM, Value::Null, json!({ "onoff": 1, "linger": 5 }), Value::Null),
        ("6:99", Errno::EPERM, Value::Null, json!("0x01000000"), Value::Null),
    ] {
        let event = report.conflict(option);
        assert_eq!(event.verdict.as_deref(), Some("denied"), "{option}");
        assert_eq!(values(event), [wanted, asked, now, json!(-(errno as i32))], "{option}: wanted, asked, now, result");
        assert_eq!(event.rule.as_deref(), Some("strict"));
        assert_eq!(report.setting(option).calls.verdicts(), BTreeMap::from([("denied", 1)]), "{option}");
    }
    assert_eq!(report.conflict("6:99").file, Some(format!("{}:5", policy.path().display())));
    assert_eq!(report.summary.conflicts, 6);
}

#[test]
fn option_without_set_support_can_be_limited() {
    let policy = PolicyFile::new("[[rule]]\nlimit = { IP_TTL = { min = 10, max = 40 } }\n");
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Udp);
    assert_eq!(exec.probe.set(fd, IP_TTL, 200), Ok(()));
    assert_eq!(exec.probe.int(fd, IP_TTL), 40);
    assert_eq!(exec.probe.set(fd, IP_TTL, 1u8), Ok(()), "one byte is enough for this option");
    assert_eq!(exec.probe.int(fd, IP_TTL), 10);
    let report = exec.finish();
    assert_eq!(report.setting("IP_TTL").calls.verdicts(), BTreeMap::from([("clamped", 2)]));
}

/// struct linger and struct timeval.
#[test]
fn durations_in_structures_are_limited() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"tcp\" }\n\
         limit = { SO_LINGER = { max = \"5s\" }, SO_RCVTIMEO = { min = \"1s\", max = \"2500ms\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet, Kind::Tcp);
    let linger = |on: i32, seconds: i32| [on.to_ne_bytes(), seconds.to_ne_bytes()].concat();
    // A linger that is off keeps its former time.
    for (asked, expected) in [((1, 60), (1, 5)), ((1, 3), (1, 3)), ((0, 60), (0, 3))] {
        probe.set(fd, SO_LINGER, linger(asked.0, asked.1)).unwrap();
        assert_eq!(probe.get(fd, SO_LINGER, 8), Ok(linger(expected.0, expected.1)), "{asked:?}");
    }
    let time = |seconds: i64, microseconds: i64| [seconds.to_ne_bytes(), microseconds.to_ne_bytes()].concat();
    // 0 means no timeout. The kernel rounds to ticks of at most 4 ms.
    for (asked, expected) in [((0, 0), (2, 500_000)), ((9, 0), (2, 500_000)), ((0, 8000), (1, 0)), ((2, 0), (2, 0))] {
        probe.set(fd, SO_RCVTIMEO, time(asked.0, asked.1)).unwrap();
        assert_eq!(probe.get(fd, SO_RCVTIMEO, 16), Ok(time(expected.0, expected.1)), "{asked:?}");
    }
    // Values that the kernel rejects are still rejected.
    assert_eq!(probe.set(fd, SO_RCVTIMEO, time(1, 2_000_000)), Err(Errno::EDOM));
    assert_eq!(probe.set(fd, SO_LINGER, vec![1, 0, 0, 0]), Err(Errno::EINVAL));
    let report = exec.finish();
    let verdicts = |option| report.setting(option).calls.verdicts();
    assert_eq!(verdicts("SO_LINGER"), BTreeMap::from([("clamped", 1)]));
    assert_eq!(verdicts("SO_RCVTIMEO"), BTreeMap::from([("clamped", 3)]));
    let event = report.conflict("SO_LINGER");
    assert_eq!(event.requested, json!({ "onoff": 1, "linger": 60 }));
    assert_eq!(event.applied, Some(json!({ "onoff": 1, "linger": 5 })));
    let event = report.conflict("SO_RCVTIMEO");
    assert_eq!((&event.requested, event.applied.clone()), (&json!("0"), Some(json!("2500ms"))));
}

/// With `on_conflict = "allow"`, later hooks keep the values that the application has set.
#[test]
fn allowed_values_of_the_application_stay() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         on_conflict = \"allow\"\n\
         set = { SO_MARK = 32, SO_PRIORITY = 3, TCP_KEEPCNT = 5, SO_KEEPALIVE = true, TCP_CONGESTION = \"reno\" }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(listener, SO_MARK), 32, "before the application sets it");
    assert_eq!(probe.set(listener, TCP_KEEPCNT, 77), Ok(()));
    let client = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(client, SO_PRIORITY), 3, "set at creation");
    assert_eq!(probe.set(client, SO_PRIORITY, 5), Ok(()));
    assert_eq!(probe.set(client, SO_MARK, 7), Ok(()));
    assert_eq!(probe.set(client, TCP_KEEPCNT, 9), Ok(()));
    assert_eq!(probe.set(client, TCP_CONGESTION, "cubic"), Ok(()));
    probe.connect(client, address);
    let server = probe.accept(listener);

    assert_eq!(probe.int(client, SO_PRIORITY), 5, "connect does not set the policy's value again");
    assert_eq!(probe.int(client, SO_MARK), 7);
    assert_eq!(probe.int(client, TCP_KEEPCNT), 9);
    assert_eq!(probe.text(client, TCP_CONGESTION), "cubic");
    assert_eq!(probe.int(client, SO_KEEPALIVE), 1, "the application has not set this option");
    assert_eq!(probe.int(server, TCP_KEEPCNT), 77, "accepted sockets have the application's value of their listener");
    assert_eq!(probe.int(server, SO_KEEPALIVE), 1);
    assert_eq!(probe.text(server, TCP_CONGESTION), "reno");
    probe.set(client, TCP_KEEPCNT, 5).unwrap();
    assert_eq!(probe.int(client, TCP_KEEPCNT), 5);
    let report = exec.finish();

    let event = report.conflict("SO_PRIORITY");
    assert_eq!(event.verdict.as_deref(), Some("allowed"));
    assert_eq!(values(event), [json!(3), json!(5), json!(5), json!(0)], "wanted, asked, now, result");
    assert_eq!(
        values(report.conflict("TCP_CONGESTION")),
        [json!("reno"), json!("cubic"), json!("cubic"), json!(0)],
        "wanted, asked, now, result"
    );
    let setting = report.setting("TCP_KEEPCNT");
    assert_eq!(setting.calls.verdicts(), BTreeMap::from([("allowed", 2)]));
    assert_eq!(setting.calls.agreed, 1);
}

#[test]
fn action_of_a_setting_overrides_the_action_of_its_rule() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         on_conflict = \"deny\"\n\
         set = { TCP_NODELAY = { value = true, on_conflict = \"rewrite\" }, SO_KEEPALIVE = true }\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(pair.client, TCP_NODELAY, 0), Ok(()));
    assert_eq!(exec.probe.set(pair.client, SO_KEEPALIVE, 0), Err(Errno::EPERM));
    let report = exec.finish();
    assert_eq!(report.verdicts("TCP_NODELAY"), ["rewritten"]);
    assert_eq!(report.verdicts("SO_KEEPALIVE"), ["denied"]);
}

#[test]
fn repeated_conflicts_are_all_counted_and_reported_at_a_limited_rate() {
    const CALLS: u64 = 300;
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n");
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    for _ in 0..CALLS {
        exec.probe.set(fd, TCP_NODELAY, 0).unwrap();
    }
    let report = exec.finish();
    let setting = report.setting("TCP_NODELAY");
    assert_eq!(setting.calls.verdicts(), BTreeMap::from([("rewritten", CALLS)]));
    let events = report.of("conflict", "TCP_NODELAY");
    assert_eq!(setting.events.reported, events.len() as u64);
    assert_eq!(setting.events.reported + setting.events.suppressed, CALLS);
    assert_eq!(events[0].suppressed, 0, "the first conflict is reported at once");
    report.assert_nothing_lost();
}
