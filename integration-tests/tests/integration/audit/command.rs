//! `sockpolicy audit`: its targets and filters, and that it changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::symlink,
    process::{Command, Output},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{errno::Errno, sys::signal::Signal};
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    options::{SO_KEEPALIVE, TCP_NODELAY, TCP_SYNCNT},
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running, read_report, workload},
    report::{Event, Report},
    require,
    script::{Family, Kind},
    wait,
};

use super::summed;
use crate::{stderr, stdout};

/// Returns a policy with which some of the probe's calls conflict.
fn conflicting_policy() -> PolicyFile {
    PolicyFile::new(
        "[[rule]]\nset = { TCP_NODELAY = true, SO_KEEPALIVE = true }\nlimit = { TCP_SYNCNT = { max = 9 } }\n",
    )
}

fn audit(arguments: &[&str]) -> Running {
    Running::start(agent::command(&[&["audit"], arguments].concat()))
}

/// Runs `sockpolicy audit` with invalid arguments. Returns its error message and its exit status.
fn refused(arguments: &[&str]) -> (String, Option<i32>) {
    let output = agent::output(&[&["audit"], arguments].concat());
    assert_eq!(stdout(&output), "", "{arguments:?}");
    (stderr(&output), output.status.code())
}

/// Makes a fixed sequence of calls.
fn make_calls(probe: &mut Probe) {
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, TCP_SYNCNT, 3).unwrap();
    probe.set(socket, TCP_SYNCNT, 50).unwrap();
    probe.set(socket, TCP_NODELAY, 1).unwrap();
    assert_eq!(probe.set(socket, TCP_SYNCNT, 3u8), Err(Errno::EINVAL));
    probe.get(socket, TCP_SYNCNT, 4).unwrap();
    probe.get(socket, TCP_NODELAY, 4).unwrap();
}

fn path_of(cgroup: &Cgroup) -> String {
    cgroup.path().display().to_string()
}

/// Checks the losses. Each task of `workload calls` passes one unreadable pointer.
#[track_caller]
fn assert_lost_only(report: &Report, reason: &str, count: u64) {
    let lost: Vec<_> = report.summary.losses.iter().filter(|(_, count)| **count > 0).collect();
    assert_eq!(lost, [(&reason.to_owned(), &count)]);
}

fn pids(events: &[Event]) -> BTreeSet<u32> {
    events.iter().map(|event| event.pid.unwrap()).collect()
}

/// Checks that the report has the calls of all three tasks of `workload calls`.
#[track_caller]
fn assert_is_all_of_workload(report: &Report) {
    let mut by_thread: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for (event, sum) in report.events.iter().zip(summed(&report.events)) {
        by_thread.entry(event.tid.unwrap()).or_default().push(sum);
    }
    let all: Vec<_> = by_thread.values().collect();
    assert!(all.len() == 3 && all[0].len() > 20 && all.iter().all(|calls| *calls == all[0]), "{by_thread:#?}");
}

#[test]
fn audited_command_runs_in_its_own_cgroup_and_its_status_is_returned() {
    let policy = conflicting_policy();
    let (report, sign) = (policy.dir().join("report"), policy.dir().join("sign"));
    let script = "echo ready; until [ -e \"$0\" ]; do sleep 0.01; done; \"$1\" calls; exit 7";
    let arguments = ["-o", "json", "--report", report.to_str().unwrap(), "--", "sh", "-c", script];
    let mut running = audit(&[&arguments[..], &[sign.to_str().unwrap(), &workload()]].concat());
    running.lines(1);
    let (held, target) = (running.bpf_objects(), running.target());
    fs::write(sign, "").unwrap();
    let output = running.finish();
    assert_eq!((&*stdout(&output), &*stderr(&output), output.status.code()), ("ready\n", "", Some(7)));
    held.assert_gone();
    assert!(!target.exists());
    let report = read_report(report.to_str().unwrap());
    assert_is_all_of_workload(&report);
    assert_eq!((&*report.summary.mode, &report.summary.policies), ("dry-run", &Vec::new()));
    assert_lost_only(&report, "unreadable", 3);
}

#[test]
fn report_of_an_audited_command_goes_to_standard_error() {
    let script = "echo mine; \"$0\" calls";
    let output = audit(&["-o", "json", "--", "sh", "-c", script, &workload()]).finish();
    assert_eq!((&*stdout(&output), output.status.code()), ("mine\n", Some(0)));
    let lines = stderr(&output);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.last().unwrap()["event"], "summary");
    assert!(lines.len() > 60, "{} lines", lines.len());

    let output = audit(&["--", "sh", "-c", script, &workload()]).finish();
    assert_eq!((&*stdout(&output), output.status.code()), ("mine\n", Some(0)));
    let printed = stderr(&output);
    assert!(printed.starts_with("sockpolicy: observing the calls of cgroup "), "{printed}");
    assert!(printed.contains("TCP_NODELAY"), "{printed}");
}

#[test]
fn command_that_cannot_be_run_gives_the_status_of_env() {
    for (command, status) in [("/no/such/command", 127), ("/", 126)] {
        let output = audit(&["--quiet", "--", command]).finish();
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert!(stderr(&output).starts_with(&format!("error: cannot run {command}: ")), "{}", stderr(&output));
    }
    let (printed, status) = refused(&["no-such-policy.toml", "--", "true"]);
    assert!(printed.starts_with("error: "), "{printed}");
    assert_eq!(status, Some(125));
}

#[test]
fn audit_of_a_process_sees_only_its_threads_and_ends_with_it() {
    let cgroup = Cgroup::new();
    let mut bystander = Probe::start(&cgroup);
    let (policy, home) = (conflicting_policy(), Cgroup::new());
    let sign = policy.dir().join("sign");
    let mut command = Command::new("sh");
    command.args(["-c", "echo ready; until [ -e \"$0\" ]; do sleep 0.01; done; exec \"$1\" calls"]);
    command.arg(&sign).arg(workload());
    let mut audited = Running::start_in(command, home);
    audited.lines(1);
    let pid = audited.pid();
    let run = Run::audit(&["--pid", &pid.to_string()]);
    make_calls(&mut bystander);
    fs::write(sign, "").unwrap();
    assert!(audited.finish().status.success());
    let (status, report) = run.finish_with_status();
    assert!(status.success());
    // Its child is not seen either.
    assert_eq!(pids(&report.events), [pid].into());
    let threads: BTreeSet<u32> = report.events.iter().map(|event| event.tid.unwrap()).collect();
    assert!(threads.len() == 2 && threads.contains(&pid), "{threads:?}");
    assert_lost_only(&report, "unreadable", 2);
    drop(bystander);
}

#[test]
fn audit_of_several_processes_ends_with_the_last_one() {
    let cgroup = Cgroup::new();
    let (mut first, mut second) = (Probe::start(&cgroup), Probe::start(&cgroup));
    let both = [first.pid, second.pid];
    let [one, other] = both.map(|pid| pid.to_string());
    let run = Run::audit(&["--pid", &one, "--pid", &other]);
    make_calls(&mut first);
    drop(first);
    make_calls(&mut second);
    drop(second);
    let (status, report) = run.finish_with_status();
    assert!(status.success());
    assert_eq!(pids(&report.events), both.into());
    assert_eq!(report.events.len() % 2, 0);
}

#[test]
fn missing_process_is_refused() {
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let pid = child.id().to_string();
    let error = format!(
        "error: no process {pid}: No such process (os error 3)\n  help: `ps -e` lists them; the number is that of the \
         process, not of a thread\n"
    );
    assert_eq!(refused(&["--pid", &pid]), (error, Some(2)));
    // In another PID namespace, the numbers differ from the kernel's.
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(agent::program()).args(["audit", "--pid", "1"]);
    let output = process::output(command);
    let start = "error: --pid means the kernel's own numbers of processes, and this process sees others\n  help: ";
    assert!(stderr(&output).starts_with(start), "{}", stderr(&output));
    assert_eq!((&*stdout(&output), output.status.code()), ("", Some(2)));
}

#[test]
fn cgroups_created_below_the_target_later_are_seen_too() {
    let (target, sibling) = (Cgroup::new(), Cgroup::new());
    let run = Run::audit(&["--cgroup", &path_of(&target)]);
    let child = target.child("later");
    let grandchild = child.child("still-later");
    let mut expected = Vec::new();
    for (number, cgroup) in [&target, &sibling, &child, &grandchild].into_iter().enumerate() {
        let mut probe = Probe::start(cgroup);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        probe.set(socket, TCP_SYNCNT, number as i32 + 1).unwrap();
        if cgroup.name() != sibling.name() {
            expected.push((Some(probe.pid), Value::from(number + 1), Some(cgroup.name())));
        }
    }
    let report = run.finish();
    let seen = report.events.iter().map(|event| (event.pid, event.requested.clone(), event.cgroup.clone()));
    assert_eq!(seen.collect::<Vec<_>>(), expected);
    let cgroups = report.events.iter().map(|event| event.socket.clone().and_then(|socket| socket.cgroup));
    assert_eq!(cgroups.collect::<Vec<_>>(), expected.iter().map(|(_, _, cgroup)| cgroup.clone()).collect::<Vec<_>>());
    assert_eq!(report.summary.targets, [target.name()]);
}

#[test]
fn several_cgroups_are_seen_at_once() {
    let (one, other, neither) = (Cgroup::new(), Cgroup::new(), Cgroup::new());
    let run = Run::audit(&["--cgroup", &path_of(&one), "--cgroup", &path_of(&other)]);
    let mut probes = [&one, &neither, &other].map(Probe::start);
    probes.iter_mut().for_each(make_calls);
    let report = run.finish();
    assert_eq!(pids(&report.events), [probes[0].pid, probes[2].pid].into());
}

#[test]
fn audit_without_a_target_sees_the_whole_host() {
    let (policy, home) = (conflicting_policy(), Cgroup::new());
    // No other task has this name.
    let name = format!("odd-{}", std::process::id());
    let program = policy.dir().join(&name);
    symlink(workload(), &program).unwrap();
    let run = Run::audit(&["--comm", &name]);
    let mut command = Command::new(program);
    command.arg("calls");
    assert!(Running::start_in(command, home.child("deep")).finish().status.success());
    // The filter excludes this process.
    make_calls(&mut Probe::start(&home));
    let report = run.finish();
    assert_eq!(report.summary.targets, ["/"]);
    assert!(report.events.iter().all(|event| event.comm.as_deref() == Some(&name)));
    assert_is_all_of_workload(&report);
}

/// Returns the events of `audit ARGUMENTS` for the probe's calls.
fn seen_with(arguments: &[&str]) -> Vec<String> {
    let target = Cgroup::new();
    let run = Run::audit(&[&["--cgroup", &path_of(&target)], arguments].concat());
    make_calls(&mut Probe::start(&target));
    summed(&run.finish().events)
}

#[test]
fn filters_select_calls() {
    let all = [
        "call setsockopt TCP_SYNCNT 0",
        "call setsockopt TCP_SYNCNT 0",
        "call setsockopt TCP_NODELAY 0",
        "call setsockopt TCP_SYNCNT -22",
        "call getsockopt TCP_SYNCNT 0",
        "call getsockopt TCP_NODELAY 0",
    ];
    let on = |option: &str| all.into_iter().filter(|call| call.contains(option)).collect::<Vec<_>>();
    for (arguments, expected) in [
        (&[][..], all.to_vec()),
        (&["--option", "TCP_NODELAY"], on("TCP_NODELAY")),
        (&["--option", "6:1"], on("TCP_NODELAY")),
        (&["--option", "6:7", "--option", "TCP_NODELAY"], all.to_vec()),
        (&["--option", "SO_KEEPALIVE"], vec![]),
        (&["--option", "-7:-7"], vec![]),
        (&["--comm", "sockprobe"], all.to_vec()),
        (&["--comm", "sockprob"], vec![]),
        (&["--comm", "nobody", "--comm", "sockprobe", "--option", "TCP_NODELAY"], on("TCP_NODELAY")),
        (&["--calls", "all"], all.to_vec()),
        (&["--calls", "conflicts"], vec![]),
        (&["--verdict", "denied"], vec![]),
    ] {
        assert_eq!(seen_with(arguments), expected, "{arguments:?}");
    }
}

#[test]
fn filtered_options_are_neither_summarized_nor_a_failure() {
    let policy = PolicyFile::new("[[rule]]\nlimit = { TCP_SYNCNT = { max = 9 } }\n");
    let (policy, target) = (policy.path().to_str().unwrap().to_owned(), Cgroup::new());
    let summed_up = |option: &str| {
        let arguments = ["--cgroup", &path_of(&target), "--calls", "all", "--fail-on-conflict", "--option", option];
        let run = Run::audit(&[&arguments[..], &[&policy]].concat());
        make_calls(&mut Probe::start(&target));
        run.signal(Signal::SIGTERM);
        let (status, report) = run.finish_with_status();
        let options: BTreeSet<_> = report.summary.call_counts.iter().map(|line| line.option.clone()).collect();
        (status.code(), report.summary.conflicts, options.into_iter().collect::<Vec<_>>())
    };
    assert_eq!(summed_up("TCP_NODELAY"), (Some(0), 0, vec!["TCP_NODELAY".to_owned()]));
    assert_eq!(summed_up("TCP_SYNCNT"), (Some(1), 1, vec!["TCP_SYNCNT".to_owned()]));
}

#[test]
fn filters_select_conflicts() {
    let policy = PolicyFile::new(
        "[[rule]]\nset = { TCP_NODELAY = { value = false, on_conflict = \"deny\" } }\nlimit = { TCP_SYNCNT = { max = 9 } }\n",
    );
    let policy = policy.path().to_str().unwrap();
    let (conflict, denied) = ("conflict setsockopt TCP_SYNCNT 0", "conflict setsockopt TCP_NODELAY 0");
    // Reads are compared with the values that a policy sets, not with its limits.
    let reads = ["call getsockopt TCP_SYNCNT 0", "mismatch getsockopt TCP_NODELAY 0"];
    let governed = ["call setsockopt TCP_SYNCNT 0", conflict, denied, "call setsockopt TCP_SYNCNT -22"];
    for (arguments, expected) in [
        (&[][..], vec![conflict, denied, reads[1]]),
        (&["--verdict", "clamped"], vec![conflict]),
        (&["--verdict", "would-clamp"], vec![conflict]),
        (&["--verdict", "would-deny", "--verdict", "clamped"], vec![conflict, denied]),
        (&["--verdict", "denied", "--option", "TCP_SYNCNT"], vec![]),
        (&["--option", "TCP_SYNCNT"], vec![conflict]),
        (&["--calls", "governed"], [&governed[..], &reads].concat()),
        (&["--calls", "all", "--option", "TCP_NODELAY"], vec![denied, reads[1]]),
    ] {
        assert_eq!(seen_with(&[&[policy], arguments].concat()), expected, "{arguments:?}");
    }
}

#[test]
fn invalid_filters_are_refused() {
    let verdicts = "the verdicts are allowed, rewritten, clamped, ignored, denied";
    let options = "no option of this name; `sockpolicy options` lists all, and LEVEL:NUMBER names any";
    let near = "no option of this name: did you mean TCP_NODELAY?";
    for (flag, value, why) in [
        ("--option", "TCP_NODELEY", near),
        ("--option", "nodelay", near),
        ("--option", "6:", options),
        ("--option", "6:TCP_NODELAY", near),
        ("--option", "6:99999999999", options),
        ("--verdict", "forgiven", verdicts),
        ("--calls", "some", "one of conflicts, governed, all"),
        ("--pid", "self", "invalid digit"),
    ] {
        let (printed, status) = refused(&[flag, value]);
        assert!(
            printed.contains(&format!("'{value}'")) && printed.contains(flag) && printed.contains(why),
            "{printed}"
        );
        assert_eq!(status, Some(2));
    }
    let (printed, _) = refused(&["redis-cli"]);
    assert_eq!(
        printed,
        "error: there is no policy file redis-cli\n  help: a command stands behind `--`: sockpolicy audit -- redis-cli\n"
    );
    let (printed, status) = refused(&["--pid", "1", "--", "true"]);
    assert!(printed.contains("cannot be used with"), "{printed}");
    assert_eq!(status, Some(2));
}

#[test]
fn audit_reports_conflicts_and_changes_nothing() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let policy = conflicting_policy();
    let run = Run::audit(&["--cgroup", &path_of(&target), policy.path().to_str().unwrap()]);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!((probe.int(socket, TCP_NODELAY), probe.int(socket, SO_KEEPALIVE)), (0, 0));
    probe.set(socket, TCP_SYNCNT, 50).unwrap();
    assert_eq!(probe.int(socket, TCP_SYNCNT), 50);
    probe.set(socket, SO_KEEPALIVE, 1).unwrap();
    probe.set(socket, SO_KEEPALIVE, 0).unwrap();
    assert_eq!(probe.int(socket, SO_KEEPALIVE), 0);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!([pair.client, pair.server].map(|fd| probe.int(fd, TCP_NODELAY)), [0, 0]);
    let report = run.finish();
    assert_eq!(report.summary.mode, "dry-run");
    for (option, verdict, asked) in [("TCP_SYNCNT", "would-clamp", 50), ("SO_KEEPALIVE", "would-rewrite", 0)] {
        let event = report.conflict(option);
        assert_eq!((event.verdict.as_deref(), event.result), (Some(verdict), Some(0)));
        assert_eq!((&event.requested, &event.current), (&asked.into(), &asked.into()), "{option}");
        assert_eq!(report.setting(option).calls.verdicts(), BTreeMap::from([(verdict, 1)]));
    }
    assert_eq!(report.setting("SO_KEEPALIVE").calls.agreed, 1);
    let kinds: BTreeSet<&str> = report.events.iter().map(|event| event.event.as_str()).collect();
    assert_eq!(kinds, BTreeSet::from(["conflict", "mismatch"]));
    let of = |kind: &str| report.events.iter().filter(|event| event.event == kind).count() as u64;
    assert!(report.summary.conflicts >= of("conflict") && report.summary.mismatches >= of("mismatch"));
}

#[test]
fn audit_fails_on_conflicts_if_requested() {
    require!("cgroup/bind4");
    let policy = conflicting_policy();
    let policy = policy.path().to_str().unwrap();
    for (calls, status) in [("1", 1), ("0", 0)] {
        let workload = workload();
        let command = ["--quiet", "--fail-on-conflict", policy, "--", &workload, "storm", "1", calls];
        let output: Output = audit(&command).finish();
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
    }
}

#[test]
fn calls_are_timed_if_requested() {
    let policy =
        PolicyFile::new("[audit]\ncalls = \"all\"\ntiming = true\n[[rule]]\nlimit = { TCP_SYNCNT = { max = 9 } }\n");
    let plain = PolicyFile::new("[audit]\ncalls = \"all\"\n[[rule]]\nlimit = { TCP_SYNCNT = { max = 9 } }\n");
    let report = policy.dir().join("report").display().to_string();
    let [timing, plain] = [&policy, &plain].map(|policy| policy.path().to_str().unwrap());
    for backend in super::backends() {
        for (arguments, is_timed) in [
            (&["audit", "--timing"][..], true),
            (&["audit"], false),
            (&["exec", timing], true),
            (&["exec", plain], false),
            (&["exec", "--timing", plain], true),
        ] {
            let ends = ["-o", "json", "--audit-backend", backend, "--report", &report, "--", &workload(), "calls"];
            let output = Running::start(agent::command(&[arguments, &ends].concat())).finish();
            assert!(output.status.success(), "{}", stderr(&output));
            assert_timing(&read_report(&report), is_timed);
        }
    }
}

#[track_caller]
fn assert_timing(report: &Report, is_timed: bool) {
    assert!(report.events.iter().all(|event| event.duration_ns.is_some() == is_timed));
    assert_eq!(report.summary.call_counts.iter().map(|line| line.count).sum::<u64>(), report.events.len() as u64);
    for line in &report.summary.call_counts {
        let events: Vec<_> =
            report.events.iter().filter(|event| is_of(event, line.call.as_str(), &line.option)).collect();
        assert_eq!(events.len() as u64, line.count, "{line:?}");
        assert_eq!(events.iter().filter(|event| event.result.unwrap() < 0).count() as u64, line.failed, "{line:?}");
        let durations: Option<Vec<u64>> = events.iter().map(|event| event.duration_ns).collect();
        assert_eq!(line.total_ns, durations.as_ref().map(|all| all.iter().sum()), "{line:?}");
        let histogram = line.histogram.as_ref().map(|buckets| {
            let counts = buckets.iter().map(|bucket| (bucket.from_ns, bucket.count));
            counts.filter(|(_, calls)| *calls > 0).collect::<BTreeMap<_, _>>()
        });
        let expected = durations.map(|durations| {
            assert!(durations.iter().all(|duration| *duration > 0));
            let mut counts = BTreeMap::new();
            for duration in durations {
                *counts.entry(1 << duration.ilog2()).or_default() += 1;
            }
            counts
        });
        assert_eq!(histogram, expected, "{line:?}");
    }
}

fn is_of(event: &Event, call: &str, option: &str) -> bool {
    event.call.as_deref() == Some(call) && event.option == option
}

#[test]
fn losses_reported_during_an_audit_add_up_to_those_of_the_summary() {
    const CALLS: u64 = 40_000;
    let target = Cgroup::new();
    let run = Run::audit(&["--cgroup", &path_of(&target)]);
    let agent = nix::unistd::Pid::from_raw(run.pid() as i32);
    for storm in 1..=2 {
        // The stopped agent does not read the ring buffer.
        nix::sys::signal::kill(agent, Signal::SIGSTOP).unwrap();
        let mut command = Command::new(workload());
        command.args(["storm", "1", &(CALLS / 2).to_string()]);
        assert!(Running::start_in(command, target.child(&storm.to_string())).finish().status.success());
        nix::sys::signal::kill(agent, Signal::SIGCONT).unwrap();
        let losses = || run.lines().lines().filter(|line| line.contains("\"event\":\"loss\"")).count();
        assert!(wait::until(wait::TIMEOUT, || losses() >= storm), "no loss was reported");
    }
    let report = run.finish();
    let mut reported: BTreeMap<String, u64> = BTreeMap::new();
    for loss in &report.losses {
        let sum = reported.entry(loss.reason.clone()).or_default();
        *sum += loss.count;
        assert_eq!(*sum, loss.total, "{loss:?}");
    }
    let summed: BTreeMap<String, u64> = report.summary.losses.into_iter().filter(|(_, count)| *count > 0).collect();
    assert_eq!(reported, summed);
    assert_eq!(report.events.len() as u64 + summed["ring_full"], 2 * CALLS);
}

#[test]
fn events_without_btf_say_why_the_socket_is_unknown() {
    require!("ancestors");
    let target = Cgroup::new();
    let path = target.path().display().to_string();
    let policy = conflicting_policy();
    let report = policy.dir().join("report");
    let command = agent::command(&["audit", "-o", "json", "--cgroup", &path, "--report", report.to_str().unwrap()]);
    let mut command = process::in_mount_namespace("mount -t tmpfs none /sys/kernel/btf", &command);
    command.env("SOCKPOLICY_LOG", "info");
    let running = Running::start(command);
    assert!(wait::until(wait::TIMEOUT, || running.stderr().contains("in force")), "{}", running.stderr());
    let mut probe = Probe::start(&target);
    make_calls(&mut probe);
    running.signal(Signal::SIGTERM);
    let output = running.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("events will lack the fields that come from sockets: "), "{}", stderr(&output));
    let report = read_report(report.to_str().unwrap());
    assert_eq!(summed(&report.events), seen_with(&[]));
    for event in &report.events {
        let why = if event.result == Some(-9) { "the descriptor is not a socket" } else { "/sys/kernel/btf" };
        assert!(event.missing["socket"].contains(why), "{event:#?}");
        assert_eq!(event.socket, None);
        assert_eq!((event.pid, event.comm.as_deref()), (Some(probe.pid), Some("sockprobe")));
        assert_eq!(event.cgroup.as_deref(), Some(&*target.name()));
    }
    report.assert_nothing_lost();
}

#[test]
fn text_can_begin_with_the_local_time_of_day() {
    let mut command = agent::command(&["audit", "--times", "--", &workload(), "mark", "0"]);
    command.env("TZ", "UTC");
    let seconds_now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 86_400;
    let before = seconds_now();
    let output = process::output(command);
    let took = (seconds_now() + 86_400 - before) % 86_400;
    let printed = stderr(&output);
    let line = printed.lines().find(|line| line.contains(" SO_MARK ")).unwrap_or_else(|| panic!("{printed}"));
    let (time, event) = line.split_once(' ').unwrap();
    assert!(event.starts_with("call      workload["), "{line}");
    let (seconds, microseconds) = time.split_once('.').unwrap();
    assert_eq!(microseconds.len(), 6, "{line}");
    let parts: Vec<u64> = seconds.split(':').map(|part| part.parse().unwrap()).collect();
    let [hours, minutes, seconds] = parts[..] else { panic!("{line}") };
    let at = hours * 3600 + minutes * 60 + seconds;
    assert!((at + 86_400 - before) % 86_400 <= took, "{line}: {at} is not within {took} s after {before}");
}

/// Lengths of 0 and below, and reads that fail.
#[test]
fn length_is_present_or_its_absence_is_explained() {
    let script = "import ctypes, socket
c, s, b = ctypes.CDLL(None), socket.socket(), ctypes.create_string_buffer(8)
for length in (0, -1, 4): c.setsockopt(s.fileno(), 6, 1, b, length)
c.setsockopt(s.fileno(), 6, 1, None, 4)
for length, name in ((0, 1), (-1, 1), (4, 9999), (4, 1)):
    c.getsockopt(s.fileno(), 6, name, b, ctypes.byref(ctypes.c_int(length)))
";
    let report = Running::start(agent::command(&["audit", "-o", "json", "--", "/usr/bin/python3", "-c", script]));
    let output = report.finish();
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let calls: Vec<Value> = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["event"] == "call" && line["level"] == 6)
        .collect();
    assert_eq!(calls.len(), 8, "{lines}");
    for call in &calls {
        assert_ne!(call["optlen"].is_null(), call["missing"]["optlen"].is_null(), "{call}");
    }
    let known: Vec<_> = calls.iter().filter_map(|call| call["optlen"].as_i64()).collect();
    assert_eq!(known, [0, -1, 4, 4, 0, 4], "{lines}");
}
