//! Dry runs without a program on cgroup/setsockopt. The audit judges calls as the hook would, and every call has the
//! same result as without a policy.

use std::{collections::BTreeMap, fs, path::Path};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    foreign_program::{Hook, count_attached_to_hook},
    kernels::Kernel,
    options::{
        IP_TOS, IP_TTL, IPV6_TCLASS, IPV6_V6ONLY, SO_BINDTODEVICE, SO_BINDTOIFINDEX, SO_BUF_LOCK, SO_KEEPALIVE,
        SO_LINGER, SO_MARK, SO_MAX_PACING_RATE, SO_PRIORITY, SO_RCVBUF, SO_RCVTIMEO, SO_REUSEADDR, SO_REUSEPORT,
        SO_SNDBUF, SocketOption, TCP_CONGESTION, TCP_CORK, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY, TCP_SYNCNT,
        TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    probe::Probe,
    report::{Event, Report, Setting},
    script::{Argument, Family, Fd, Kind},
    wait,
};

/// No rule depends on facts that only the hooks record for a socket.
const POLICY: &str = "[audit]\nreads = true\nCALLS\n\
    [[rule]]\nname = \"local\"\nmatch = { local = [\"127.0.0.0/8\"] }\nset = { TCP_KEEPIDLE = \"77s\", SO_PRIORITY = 3 }\n\
    [[rule]]\nname = \"udp\"\nmatch = { protocol = \"udp\" }\nset = { SO_MARK = 7 }\n\
    [[rule]]\nname = \"tcp\"\nmatch = { protocol = \"tcp\" }\n\
    set = { TCP_NODELAY = true, SO_MARK = \"0x20/0xff\", TCP_CONGESTION = \"reno\", \
            TCP_USER_TIMEOUT = { value = \"5s\", on_conflict = \"ignore\" }, \
            SO_KEEPALIVE = { value = true, on_conflict = \"deny\", errno = \"EACCES\" } }\n\
    limit = { TCP_KEEPCNT = { max = 10 } }\n\
    [[rule]]\nname = \"all\"\nset = { IP_TOS = \"AF21\", IPV6_TCLASS = 72, SO_BINDTODEVICE = \"lo\" }\n\
    limit = { SO_SNDBUF = { max = \"64KiB\" }, SO_RCVBUF = { max = \"64KiB\", on_conflict = \"ignore\" }, \
              IP_TTL = { max = 64 }, SO_LINGER = { max = \"5s\" }, SO_RCVTIMEO = { max = \"30s\", on_conflict = \"allow\" }, \
              SO_MAX_PACING_RATE = { max = \"1gbit\" } }\n\
    deny = [\"SO_REUSEPORT\", \"IPV6_V6ONLY\"]\n";

fn policy(calls: &str) -> PolicyFile {
    PolicyFile::new(POLICY.replace("CALLS", calls))
}

/// All options of the policy, other names of the same options, and two options that the policy does not name.
const OPTIONS: [SocketOption; 23] = [
    TCP_KEEPIDLE,
    SO_PRIORITY,
    SO_MARK,
    TCP_NODELAY,
    TCP_CONGESTION,
    TCP_USER_TIMEOUT,
    SO_KEEPALIVE,
    TCP_KEEPCNT,
    IP_TOS,
    IPV6_TCLASS,
    SO_BINDTODEVICE,
    SO_BINDTOIFINDEX,
    SO_SNDBUF,
    SO_RCVBUF,
    SO_BUF_LOCK,
    IP_TTL,
    SO_LINGER,
    SO_RCVTIMEO,
    SO_MAX_PACING_RATE,
    SO_REUSEPORT,
    IPV6_V6ONLY,
    TCP_SYNCNT,
    TCP_CORK,
];

/// The results of calls, with their descriptions.
type Results = Vec<(String, Result<Vec<u8>, Errno>)>;

/// Sets and reads each option on one socket, with arguments of many values and lengths.
fn make_calls(probe: &mut Probe, what: &str, fd: Fd, results: &mut Results) {
    let numbers = [0i32, 1, 77, -1, 1 << 20];
    let lengths = [4usize, 16];
    let mut arguments: Vec<Argument> =
        numbers.iter().flat_map(|number| lengths.map(|len| Argument::padded(*number, len))).collect();
    arguments.push(Argument::padded(99, 4097));
    arguments.extend((0..4usize).map(|len| Argument::from(vec![9; len])));
    arguments.extend(["reno", "cubic\0then more", "lo", "no-such-name", "\0"].map(Argument::from));
    let ints = |ints: &[i64]| Argument::from(ints.iter().flat_map(|int| int.to_ne_bytes()).collect::<Vec<_>>());
    arguments.extend([ints(&[1 | 9 << 32]), ints(&[99, 5]), ints(&[1, -1]), ints(&[1 << 40])]);
    arguments.push(Argument { len: -1, ..Argument::from(0) });
    arguments.push(Argument::bad_pointer(0));
    for option in OPTIONS {
        for argument in &arguments {
            let shown = argument.bytes.as_ref().map(|bytes| &bytes[..bytes.len().min(16)]);
            let call = format!("{what} {} {shown:?} of {}", option.name, argument.len);
            results.push((call, probe.set(fd, option, argument.clone()).map(|()| Vec::new())));
        }
        for len in [1, 4, 16] {
            results.push((format!("{what} {} read {len}", option.name), probe.get(fd, option, len)));
        }
    }
}

fn make_all_calls(probe: &mut Probe) -> Results {
    let mut results = Results::new();
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    make_calls(probe, "connected", pair.client, &mut results);
    for (family, kind) in
        [(Family::Inet6, Kind::Tcp), (Family::Inet, Kind::Udp), (Family::Inet, Kind::Mptcp), (Family::Inet, Kind::Unix)]
    {
        let Ok(fd) = probe.try_open(family, kind) else { continue };
        make_calls(probe, &format!("{family:?} {kind:?}"), fd, &mut results);
        probe.close(fd);
    }
    results
}

/// Returns the counters of each setting.
fn counted(report: &Report) -> BTreeMap<String, String> {
    let count = |setting: &Setting| {
        let Setting { rule, option, calls, sockets, .. } = setting;
        let counts = format!("agreed {}, reads {}, {:?}, {sockets:?}", calls.agreed, calls.reads, calls.verdicts());
        (format!("{rule} {option}"), counts)
    };
    report.summary.settings.iter().map(count).collect()
}

/// Returns the conflicts of a report, without the fields that only an audit or only a hook knows.
fn reported(report: &Report) -> Vec<String> {
    let conflicts = report.events.iter().filter(|event| event.event == "conflict");
    let text = |event: &Event| {
        let Event { call, rule, option, optval, optlen, wanted, requested, verdict, socket, .. } = event;
        let protocol = socket.as_ref().map(|socket| (&socket.protocol, &socket.family));
        format!("{call:?} {rule:?} {option} {optval:?} {optlen:?} {wanted} {requested} {verdict:?} {protocol:?}")
    };
    // If several settings cover a call, an audit reports one of them.
    conflicts.filter(|event| event.option != "SO_BUF_LOCK").map(text).collect()
}

fn backends() -> impl Iterator<Item = &'static str> {
    let kernel = Kernel::current();
    kernel.known.audit.iter().map(String::as_str).filter(|backend| kernel.has(backend))
}

#[track_caller]
fn dry_run(policy: &PolicyFile, backend: &str, hooks: u32) -> (Results, Report) {
    let mut exec = Exec::with(policy, &["--dry-run", "--audit-backend", backend]);
    let target = exec.target();
    let attached = [Hook::Setsockopt, Hook::Getsockopt].map(|hook| count_attached_to_hook(&target, hook));
    assert_eq!(attached, [hooks; 2], "{backend}");
    let results = make_all_calls(&mut exec.probe);
    (results, exec.finish())
}

#[test]
fn audit_judges_as_the_hook_does() {
    let (conflicts, governed) = (policy(""), policy("calls = \"governed\""));
    let (results, hooked) = dry_run(&governed, "none", 1);
    let verdicts: u64 = hooked.summary.settings.iter().flat_map(|setting| setting.calls.verdicts.values()).sum();
    let agreed: u64 = hooked.summary.settings.iter().map(|setting| setting.calls.agreed).sum();
    assert!(verdicts > 500 && agreed > 100, "{verdicts} conflicts, {agreed} that agree: {hooked:#?}");
    for backend in backends() {
        let (unhooked_results, unhooked) = dry_run(&conflicts, backend, 0);
        for (hooked, unhooked) in results.iter().zip(&unhooked_results) {
            assert_eq!(hooked, unhooked, "{backend}, hook on the left");
        }
        assert_eq!(counted(&hooked), counted(&unhooked), "{backend}, hook on the left");
        unhooked.assert_nothing_lost();
    }
    // All backends share the code that fills in events, so one is enough.
    let backend = backends().next().unwrap();
    let (_, unhooked) = dry_run(&governed, backend, 0);
    let (hooked, unhooked) = (reported(&hooked), reported(&unhooked));
    for (hooked, unhooked) in hooked.iter().zip(&unhooked) {
        assert_eq!(hooked, unhooked, "{backend}, hook on the left");
    }
    assert_eq!(hooked.len(), unhooked.len());
}

/// Makes calls whose argument extends past mapped memory, and calls with a null argument.
fn make_calls_at_edge(probe: &mut Probe) -> Results {
    let (tcp, tcp6) = (probe.open(Family::Inet, Kind::Tcp), probe.open(Family::Inet6, Kind::Tcp));
    let int = |value: i32| value.to_ne_bytes().to_vec();
    let linger: Vec<u8> = [1i32, 9].into_iter().flat_map(i32::to_ne_bytes).collect();
    let calls: [(Fd, SocketOption, Option<Vec<u8>>, i32); 15] = [
        (tcp, TCP_NODELAY, Some(int(0)), 64),
        (tcp, TCP_NODELAY, Some(int(1)), 5),
        (tcp, TCP_NODELAY, Some(vec![0; 3]), 4),
        (tcp, SO_MARK, Some(int(0x1133)), 16),
        (tcp, SO_MARK, Some(int(0x20)), 1 << 20),
        (tcp, TCP_KEEPCNT, Some(int(99)), 8192),
        (tcp, TCP_CONGESTION, Some(b"cubic\0".to_vec()), 16),
        (tcp, TCP_CONGESTION, Some(b"reno\0".to_vec()), 4097),
        (tcp, TCP_CONGESTION, Some(b"cubic".to_vec()), 16),
        (tcp, IP_TOS, Some(vec![0xb8]), 2),
        (tcp, SO_LINGER, Some(linger), 16),
        (tcp, SO_REUSEADDR, Some(int(1)), 64),
        (tcp, SO_REUSEPORT, Some(int(1)), 64),
        (tcp6, IPV6_TCLASS, None, 4),
        (tcp6, SO_MARK, None, 4),
    ];
    let perform = |(fd, option, bytes, len): (Fd, SocketOption, Option<Vec<u8>>, i32)| {
        let argument = bytes.as_deref().map_or(Argument::null(len), |bytes| Argument::truncated_bytes(bytes, len));
        let set = probe.set(fd, option, argument);
        let result = set.map(|()| probe.get(fd, option, 16).unwrap());
        (format!("{} {bytes:?} of {len}", option.name), result)
    };
    calls.into_iter().map(perform).collect()
}

#[test]
fn argument_that_extends_past_mapped_memory_fails_no_call() {
    let without = make_calls_at_edge(&mut Probe::start(&Cgroup::new()));
    let failed: Vec<_> = without.iter().filter(|(_, result)| *result == Err(Errno::EFAULT)).collect();
    assert_eq!(failed.len(), 3, "{failed:?}");
    assert_eq!(without.iter().filter(|(_, result)| result.is_err()).count(), 3, "{without:?}");
    let policy = policy("");
    for backend in backends() {
        let mut exec = Exec::with(&policy, &["--dry-run", "--audit-backend", backend]);
        assert_eq!(count_attached_to_hook(&exec.target(), Hook::Setsockopt), 0);
        assert_eq!(make_calls_at_edge(&mut exec.probe), without, "{backend}, without a policy on the right");
        let report = exec.finish();
        report.assert_nothing_lost();
        for (rule, option, agreed, verdict) in [
            ("tcp", "TCP_NODELAY", 1, "would-rewrite"),
            ("tcp", "SO_MARK", 1, "would-rewrite"),
            ("tcp", "TCP_KEEPCNT", 0, "would-clamp"),
            ("tcp", "TCP_CONGESTION", 1, "would-rewrite"),
            ("all", "IP_TOS", 0, "would-rewrite"),
            ("all", "SO_LINGER", 0, "would-clamp"),
            ("all", "SO_REUSEPORT", 0, "would-deny"),
            ("all", "IPV6_TCLASS", 0, "would-rewrite"),
        ] {
            let calls = &report.setting_of(rule, option).calls;
            assert_eq!((calls.agreed, calls.verdicts()), (agreed, BTreeMap::from([(verdict, 1)])), "{option}");
        }
        let mark = report.conflict("SO_MARK");
        assert_eq!((mark.optval.as_deref(), mark.optlen), (Some("0x33110000"), Some(16)), "only the mapped bytes");
        assert_eq!(report.conflict("TCP_CONGESTION").requested, "cubic");
    }
}

/// As in the hook, the cgroup of the socket counts, not that of the caller.
#[test]
fn calls_are_judged_by_the_cgroup_of_the_socket() {
    for backend in backends() {
        let (outer, elsewhere) = (Cgroup::new(), Cgroup::new());
        let (inner, beside) = (outer.child("inner"), outer.child("beside"));
        let dir = PolicyFile::new(format!(
            "name = \"outer\"\nmode = \"dry-run\"\n[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_KEEPCNT = 3, TCP_SYNCNT = 3 }}\n",
            outer.name()
        ));
        let text = format!(
            "name = \"inner\"\nmode = \"dry-run\"\n[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_KEEPCNT = 4 }}\n",
            inner.name()
        );
        fs::write(dir.dir().join("inner.toml"), text).unwrap();
        let run = Run::on_path(dir.dir(), &["--audit-backend", backend]);
        for cgroup in [&outer, &inner] {
            assert_eq!(count_attached_to_hook(cgroup.path(), Hook::Setsockopt), 0);
        }
        let mut probe = Probe::start(&elsewhere);
        let mut open = |cgroup: &Cgroup| {
            probe.enter(cgroup);
            probe.open(Family::Inet, Kind::Tcp)
        };
        let sockets = [&inner, &inner.child("below"), &beside, &elsewhere].map(&mut open);
        for (fd, cgroup) in sockets.into_iter().zip([&elsewhere, &elsewhere, &elsewhere, &inner]) {
            probe.enter(cgroup);
            for option in [TCP_KEEPCNT, TCP_SYNCNT] {
                probe.set(fd, option, 9).unwrap();
                probe.set(fd, option, 3).unwrap();
            }
        }
        drop(probe);
        let report = run.finish();
        let calls = |policy: &str, option: &str| {
            let mut settings = report.summary.settings.iter();
            let found = settings.find(|setting| setting.policy == policy && setting.option == option).unwrap();
            (found.calls.agreed, found.calls.verdicts().values().sum::<u64>())
        };
        assert_eq!(calls("inner", "TCP_KEEPCNT"), (0, 4), "{backend}: two sockets, two values each");
        assert_eq!(calls("outer", "TCP_KEEPCNT"), (1, 1), "{backend}: beside it");
        assert_eq!(calls("outer", "TCP_SYNCNT"), (3, 3), "{backend}: on all three");
        report.assert_nothing_lost();
    }
}

/// Waits until the number of programs on cgroup/setsockopt is `programs`.
#[track_caller]
fn wait_for(cgroup: &Path, programs: u32) {
    let is_there = wait::until(wait::TIMEOUT, || count_attached_to_hook(cgroup, Hook::Setsockopt) == programs);
    assert!(is_there, "{} programs, expected {programs}", count_attached_to_hook(cgroup, Hook::Setsockopt));
}

#[test]
fn setsockopt_hook_is_attached_only_while_a_policy_is_enforced() {
    let target = Cgroup::new();
    let text = |mode: &str, value: u32| {
        format!("mode = {mode:?}\n[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_SYNCNT = {value} }}\n", target.name())
    };
    let policy = PolicyFile::new(text("dry-run", 3));
    let run = Run::start_with(&policy, &[]);
    let mut probe = Probe::start(&target);
    let fd = probe.open(Family::Inet, Kind::Tcp);
    let mut reloads = 0;
    for (mode, value, hooks, shown) in [("dry-run", 3, 0, 9), ("enforce", 4, 1, 4), ("dry-run", 5, 0, 9)] {
        if value != 3 {
            fs::write(policy.path(), text(mode, value)).unwrap();
            reloads += 1;
            assert_eq!(run.notice("reload", reloads)["in_force"], true);
        }
        if hooks == 1 {
            wait_for(target.path(), 1);
        }
        probe.set(fd, TCP_SYNCNT, 9).unwrap();
        assert_eq!(probe.int(fd, TCP_SYNCNT), shown, "{mode}");
    }
    // The programs of the enforced policy are detached when its generation is dropped for new ones.
    for value in 6..9 {
        fs::write(policy.path(), text("dry-run", value)).unwrap();
        reloads += 1;
        run.notice("reload", reloads);
    }
    wait_for(target.path(), 0);
    probe.set(fd, TCP_SYNCNT, 9).unwrap();
    assert_eq!(probe.int(fd, TCP_SYNCNT), 9);
    let report = run.finish();
    let verdicts = |wanted: u32| {
        let mut settings = report.summary.settings.iter();
        let found = settings.find(|setting| setting.wanted == wanted).unwrap();
        found.calls.verdicts().into_iter().map(|(verdict, count)| format!("{verdict} {count}")).collect::<Vec<_>>()
    };
    assert_eq!(verdicts(3), ["would-rewrite 1"]);
    assert_eq!(verdicts(4), ["rewritten 1"]);
    assert_eq!(verdicts(5), ["would-rewrite 1"], "the hook that is still attached does not count the call again");
    assert_eq!(verdicts(8), ["would-rewrite 1"]);
}

/// The hook is attached if the audit cannot know the facts of a rule, and if another policy is enforced.
#[test]
fn hook_stays_where_the_audit_cannot_judge() {
    for (rules, arguments) in [
        ("[[rule]]\nset = { TCP_SYNCNT = { value = 3, on_conflict = \"allow\" } }\n", &[][..]),
        ("[[rule]]\nmatch = { direction = \"inbound\" }\nset = { TCP_SYNCNT = 3 }\n", &[]),
        ("[[rule]]\nmatch = { remote_port = 22 }\nlimit = { TCP_SYNCNT = { max = 3 } }\n", &[]),
        (
            "[[rule]]\nmatch = { protocol = \"tcp\" }\nlimit = { TCP_SYNCNT = { max = 3 } }\n\
             [[rule]]\nset = { TCP_SYNCNT = 2 }\n",
            &[],
        ),
        ("[[rule]]\nset = { TCP_SYNCNT = 3 }\n", &["--audit-backend", "none"]),
    ] {
        let exec = Exec::with(&PolicyFile::new(rules), &[&["--dry-run"], arguments].concat());
        assert_eq!(count_attached_to_hook(&exec.target(), Hook::Setsockopt), 1, "{rules}");
        drop(exec.finish());
    }
    let (enforced, dry) = (Cgroup::new(), Cgroup::new());
    let text = |name: &str, mode: &str, target: &Cgroup| {
        format!(
            "name = {name:?}\nmode = {mode:?}\n[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_SYNCNT = 3 }}\n",
            target.name()
        )
    };
    let dir = PolicyFile::new(text("enforced", "enforce", &enforced));
    fs::write(dir.dir().join("dry.toml"), text("dry", "dry-run", &dry)).unwrap();
    let run = Run::on_path(dir.dir(), &[]);
    for cgroup in [&enforced, &dry] {
        assert_eq!(count_attached_to_hook(cgroup.path(), Hook::Setsockopt), 1);
    }
    drop(run.finish());
}
