//! The caller and the socket of a call, with many tasks at once, with tasks that execute another program, and with
//! descriptors that change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{self, Exec},
    options::{SocketOption, TCP_KEEPCNT},
    policy::PolicyFile,
    process::{Running, read_report, workload},
    report::{Event, Report},
    require,
    script::{Family, Kind},
};

use super::backends;
use crate::{stderr, stdout};

/// Audits a command. Returns the numbers on each line of its output, and the report.
fn audited(backend: &str, command: &[&str]) -> (Vec<Vec<u64>>, Report) {
    let dir = PolicyFile::new("");
    let report = dir.dir().join("report").display().to_string();
    let arguments = ["audit", "-o", "json", "--report", &report, "--audit-backend", backend, "--"];
    let output = Running::start(agent::command(&[&arguments, command].concat())).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = stdout(&output);
    let printed = printed.lines().map(|line| line.split(' ').map(|word| word.parse().unwrap()).collect()).collect();
    (printed, read_report(&report))
}

fn number(value: &serde_json::Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn calls_of_many_threads_are_attributed_correctly_and_losses_are_counted() {
    const THREADS: u64 = 64;
    const CALLS: u64 = 200;
    const TOTAL: u64 = 2 * THREADS * CALLS;
    for backend in backends() {
        let (printed, report) = audited(backend, &[&workload(), "threads", &THREADS.to_string(), &CALLS.to_string()]);
        let firsts: BTreeMap<u64, u64> = printed.into_iter().map(|line| (line[0], line[1])).collect();
        assert_eq!(firsts.len() as u64, 2 * THREADS);
        let mut last: BTreeMap<u64, u64> = BTreeMap::new();
        let mut cookies: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for event in &report.events {
            let thread = event.tid.unwrap().into();
            let (asked, first) = (number(&event.requested), firsts[&thread]);
            assert_eq!((&*event.option, event.result), ("SO_MARK", Some(0)), "{event:#?}");
            assert!((first..first + CALLS).contains(&asked), "{backend}: thread {thread} did not request {asked}");
            let before = last.insert(thread, asked);
            assert!(before.is_none_or(|before| before < asked), "thread {thread}: {asked} after {before:?}");
            let is_shared = (first >> 16) % 2 == 1;
            match &event.socket {
                Some(socket) => {
                    cookies.entry(if is_shared { 0 } else { thread }).or_default().insert(socket.cookie.unwrap());
                }
                // The kernel skipped the program that gets the socket.
                None => assert!(report.summary.losses["prog_missed"] > 0, "{event:#?}"),
            }
            // On the shared socket, another thread may have set a later value.
            assert!(is_shared || event.current == event.requested, "{event:#?}");
        }
        assert!(cookies.values().all(|cookies| cookies.len() == 1), "{cookies:?}");
        let different: BTreeSet<_> = cookies.values().flatten().collect();
        assert_eq!(different.len(), cookies.len());
        assert_accounted(backend, &report, TOTAL);
    }
}

/// Checks that every call has an event or is counted as lost.
#[track_caller]
fn assert_accounted(backend: &str, report: &Report, calls: u64) {
    let losses = &report.summary.losses;
    let [ring_full, calls_full, exit_missed, prog_missed] =
        ["ring_full", "calls_full", "exit_missed", "prog_missed"].map(|reason| losses[reason]);
    let others = losses.values().sum::<u64>() - ring_full - calls_full - exit_missed - prog_missed;
    assert_eq!(others, 0, "{backend}: {losses:?}");
    let events = report.events.len() as u64;
    assert!(events > 0);
    let tallied: u64 = report.summary.call_counts.iter().map(|line| line.count).sum();
    assert_eq!(tallied, events + ring_full, "{backend}: {losses:?}");
    assert!(report.summary.call_counts.iter().all(|line| line.failed == 0));
    // Several programs see a call, and the kernel may have skipped each of them.
    let unseen = calls - tallied;
    let counted = calls_full + exit_missed + prog_missed;
    assert!(unseen <= counted, "{backend}: {unseen} of {calls} calls unseen: {losses:?}");
    if prog_missed == 0 {
        assert_eq!(unseen, counted, "{backend}: {losses:?}");
    }
}

#[test]
fn conflict_never_has_the_result_of_the_next_call() {
    const TOTAL: u64 = 32 * 3000;
    let policy = PolicyFile::new("[[rule]]\non_conflict = \"deny\"\nlimit = { TCP_SYNCNT = { max = 9 } }\n");
    let report = policy.dir().join("report").display().to_string();
    for backend in backends() {
        let arguments = ["-o", "json", "--report", &report, "--audit-backend", backend];
        let output = Running::exec(&arguments, &policy, &[&workload(), "pairs", "32", "3000", "20"]).finish();
        assert!(output.status.success(), "{}", stderr(&output));
        let report = read_report(&report);
        let calls = &report.setting("TCP_SYNCNT").calls;
        assert_eq!((calls.agreed, calls.verdicts()), (TOTAL, BTreeMap::from([("denied", TOTAL)])));
        let reported: BTreeSet<_> =
            report.events.iter().map(|event| (number(&event.requested), event.result)).collect();
        // The kernel may skip programs, so the result can be unknown, possibly for several calls.
        assert!(reported.contains(&(20, Some(-1))), "{backend}: {reported:?}");
        assert!(reported.is_subset(&BTreeSet::from([(20, Some(-1)), (20, None)])), "{backend}: {reported:?}");
    }
}

#[test]
fn every_other_call_has_its_own_result() {
    for backend in backends() {
        // The kernel rejects values that do not fit into a byte.
        let (_, report) = audited(backend, &[&workload(), "pairs", "32", "500", "300"]);
        let reported: BTreeSet<_> =
            report.events.iter().map(|event| (number(&event.requested), event.result)).collect();
        assert_eq!(reported, BTreeSet::from([(5, Some(0)), (300, Some(-22))]), "{backend}");
    }
}

/// Returns the caller of each call, by the requested value.
fn callers(events: &[Event]) -> BTreeMap<u64, (u64, String, Option<String>)> {
    let caller = |event: &Event| (u64::from(event.pid.unwrap()), event.comm.clone().unwrap(), event.exe.clone());
    events.iter().map(|event| (number(&event.requested), caller(event))).collect()
}

#[test]
fn calls_of_vfork_children_are_attributed_correctly_before_and_after_exec() {
    const CHILDREN: u64 = 40;
    let dir = PolicyFile::new("");
    let other = dir.dir().join("other");
    sockpolicy_integration_tests::process::copy_program(workload(), &other);
    let other = other.to_str().unwrap();
    for backend in backends() {
        let (printed, report) = audited(backend, &[&workload(), "vfork", other, &CHILDREN.to_string()]);
        // A third of the values are from the executed program. Most processes have ended before their events are
        // read.
        let workload = workload();
        let program = |value: u64| if value >> 17 == 1 { ("other", other) } else { ("workload", &*workload) };
        let caller = |pid, (comm, exe): (&str, &str)| (pid, comm.to_owned(), Some(exe.to_owned()));
        let made: BTreeMap<_, _> = printed.iter().map(|line| (line[1], caller(line[0], program(line[1])))).collect();
        assert_eq!(made.len() as u64, 3 * CHILDREN);
        for (value, caller) in callers(&report.events) {
            assert_eq!(Some(&caller), made.get(&value), "{backend}: caller that requested {value}");
        }
        assert!(report.events.iter().all(|event| event.pid == event.tid));
        assert_accounted(backend, &report, 3 * CHILDREN);
    }
}

#[test]
fn executable_has_the_path_in_the_mount_namespace_of_its_process() {
    let dir = PolicyFile::new("");
    let dir = dir.dir().display().to_string();
    let name = "n".repeat(200);
    // A path of the greatest reported length, and a longer one.
    let long = format!("{dir}/long{}", format!("/{name}").repeat(4));
    let longer = format!("{long}{}", format!("/{name}").repeat(2));
    fs::create_dir_all(&longer).unwrap();
    let script = format!(
        "set -e
        cp {workload} {dir}/gone; cp {workload} {long}/there; cp {workload} {longer}/there
        {workload} mark 1; {long}/there mark 2; {longer}/there mark 3
        {dir}/gone mark 4; rm {dir}/gone
        unshare --mount sh -c 'mount --bind {dir} /mnt; exec /mnt/long/{name}/{name}/{name}/{name}/there mark 5'",
        workload = workload()
    );
    for backend in backends() {
        let (printed, report) = audited(backend, &["sh", "-c", &script]);
        assert_eq!(printed.len(), 5);
        let exe: BTreeMap<_, _> =
            callers(&report.events).into_iter().map(|(value, (_, _, exe))| (value, exe)).collect();
        let inside = long.replacen(&dir, "/mnt", 1);
        let expected = [
            (1, Some(workload())),
            (2, Some(format!("{long}/there"))),
            (3, None),
            (4, Some(format!("{dir}/gone"))),
            (5, Some(format!("{inside}/there"))),
        ];
        assert_eq!(exe, BTreeMap::from(expected), "{backend}");
        let unknown = report.events.iter().filter(|event| event.missing.contains_key("exe"));
        assert_eq!(unknown.map(|event| number(&event.requested)).collect::<Vec<_>>(), [3]);
    }
}

#[test]
fn event_never_has_the_socket_that_a_descriptor_had_at_another_time() {
    // Tracepoints find the socket by its descriptor, which may have changed in between.
    require!("kprobe");
    for backend in backends().filter(|backend| *backend != "tracepoint") {
        let (printed, report) = audited(backend, &[&workload(), "race", "4000"]);
        for line in printed {
            let [level, succeeded, failed] = line[..] else { panic!("{line:?}") };
            let events: Vec<_> = report.events.iter().filter(|event| event.level as u64 == level).collect();
            let is_ok = |event: &&&Event| event.result == Some(0);
            let seen = events.iter().filter(is_ok).count() as u64;
            assert_eq!((seen, events.len() as u64 - seen), (succeeded, failed), "{backend}");
            let (own, others) = if level == 6 { ("tcp", "udp") } else { ("udp", "tcp") };
            assert!(events.len() > 100);
            for event in events {
                let protocol = event.socket.as_ref().and_then(|socket| socket.protocol.as_deref());
                let expected = if event.result == Some(0) { own } else { others };
                assert_eq!(protocol, Some(expected), "{backend}: {event:#?}");
            }
        }
        report.assert_nothing_lost();
    }
}

#[test]
fn invented_options_displace_no_counter() {
    const INVENTED: i32 = 1500;
    let policy = PolicyFile::new("[audit]\ncalls = \"all\"\nreads = true\n[[rule]]\ndeny = [\"6:30001\"]\n");
    for backend in backends() {
        let mut exec = Exec::with(&policy, &["--audit-backend", backend]);
        let socket = exec.probe.open(Family::Inet, Kind::Tcp);
        for number in 0..INVENTED {
            let option = SocketOption { name: "invented", level: 6, number: 10_000 + number };
            assert_eq!(exec.probe.set(socket, option, 1), Err(Errno::ENOPROTOOPT));
        }
        let denied = SocketOption { name: "denied", level: 6, number: 30_001 };
        assert_eq!(exec.probe.set(socket, denied, 1), Err(Errno::EPERM));
        for count in 1..=5 {
            exec.probe.set(socket, TCP_KEEPCNT, count).unwrap();
            exec.probe.get(socket, TCP_KEEPCNT, 4).unwrap();
        }
        let report = exec.finish();
        let calls = |option: &str, call: &str| {
            let lines = report.summary.call_counts.iter().filter(|line| line.option == option && line.call == call);
            lines.map(|line| line.count).sum::<u64>()
        };
        assert_eq!((calls("TCP_KEEPCNT", "setsockopt"), calls("TCP_KEEPCNT", "getsockopt")), (5, 5), "{backend}");
        assert_eq!(calls("6:30001", "setsockopt"), 1, "{backend}");
        let all: u64 = report.summary.call_counts.iter().map(|line| line.count).sum();
        assert_eq!(all, INVENTED as u64 + 1 + 10, "{backend}");
        assert!(calls("other", "setsockopt") >= INVENTED as u64 - 256, "{backend}");
        assert_eq!(report.summary.losses["tallies_full"], 0, "{backend}");
    }
}
