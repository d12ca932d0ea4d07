//! A process that makes as many conflicting calls as it can: the cost of the agent, and the share of conflicts that
//! it reports.

use std::{fs, path::PathBuf, time::Instant};

use serde_json::Value;

use crate::{
    conditions,
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    row::{Budget, Findings, Line, Unit, total},
    scene::{ActiveCondition, BackgroundProcess, Condition, POLICY, SOCKPOLICY, Samples, Scene},
    work::{Call, Work, Worker},
};

const PART: &str = "storm";
const ROUNDS: usize = 3;
const MILLIS: u64 = 1500;

const STORM: Call = super::call(libc::SOL_TCP, libc::TCP_NODELAY, 0);
const RULES: &str = "[[rule]]\nset = { TCP_NODELAY = true }";
const PRINTING: &str = "tracepoint:syscalls:sys_enter_setsockopt \
    { printf(\"%d %d %d\\n\", pid, args->level, args->optname); }";

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    for _ in 0..ROUNDS {
        let (printed, called) = storm(ground, "ours", ours(), &mut samples)?;
        tally(&printed, called, &mut samples)?;
        match storm(ground, "bpftrace", conditions::bpftrace(PRINTING), &mut samples) {
            Ok((_, called)) => samples.add("bpftrace/called", called),
            Err(error) => samples.leave_out("bpftrace", error),
        }
    }
    let line = |what: &str, over: &str, versus: &str, under: &str| Line::new(what, total(over), versus, total(under));
    let counts = |what: &str, over: &str, versus: &str, under: &str| line(what, over, versus, under).unit(Unit::Count);
    findings.add(
        PART,
        &samples,
        &[
            counts("conflicts counted", "ours/counted", "calls made", "ours/called"),
            counts("events reported, suppressed or lost", "ours/accounted", "calls made", "ours/called"),
            counts("events reported", "ours/told", "calls made", "ours/called"),
            counts("events suppressed", "ours/held", "calls made", "ours/called"),
            counts("events lost", "ours/lost", "calls made", "ours/called"),
            counts("calls made in the same time", "ours/called", "under bpftrace printing", "bpftrace/called"),
            line("CPU of the agent", "ours/cpu", "bpftrace printing", "bpftrace/cpu")
                .unit(Unit::Percent)
                .budget(Budget::PlainAtMost(5.0)),
            line("peak memory of the agent", "ours/memory", "bpftrace printing", "bpftrace/memory")
                .unit(Unit::Kibibytes)
                .budget(Budget::PlainAtMost(16.0 * 1024.0)),
        ],
    );
    Ok(())
}

fn ours() -> Condition {
    let words = [SOCKPOLICY, "run", "-o", "json", POLICY];
    Condition { background: words.map(str::to_owned).to_vec(), ..conditions::audited(RULES) }
}

/// Runs one storm. Returns the output of the tool, and the number of calls.
fn storm(ground: &Workspace, name: &str, condition: Condition, samples: &mut Samples) -> Result<(String, f64)> {
    let scene = Scene { name: format!("storm-{name}"), condition, setup: Vec::new(), arms: Vec::new() };
    let mut in_force = ActiveCondition::begin(ground, &scene)?;
    in_force.wait()?;
    let target = in_force.target.clone();
    let mut worker = Worker::start(ground, &target, &scene.condition)?;
    // Without a background process, the wrapper of the worker is the tool.
    let tool = in_force.into_background();
    let pid = tool.as_ref().map_or(worker.pid(), BackgroundProcess::pid);
    // The tool is running once the worker has answered.
    worker.perform(&target, &target, 0, &Work::Hold { connections: 0 })?;
    let (before, begin) = (cpu_seconds(pid)?, Instant::now());
    let took = worker.perform(&target, &target, MILLIS, &Work::Set { call: STORM, errno: 0 })?;
    let cpu = (cpu_seconds(pid)? - before) / begin.elapsed().as_secs_f64();
    samples.add(&format!("{name}/cpu"), cpu * 100.0);
    samples.add(&format!("{name}/memory"), peak_kib(pid)?);
    drop(worker);
    let printed = tool.map_or_else(String::new, BackgroundProcess::end);
    guard::remove(&target)?;
    // One more call is made before the measurement.
    Ok((printed, took.times as f64 + 1.0))
}

fn tally(printed: &str, called: f64, samples: &mut Samples) -> Result<()> {
    let last = printed.lines().rfind(|line| line.contains("\"event\":\"summary\"")).unwrap_or_default();
    let summary: Value = serde_json::from_str(last).or_cannot("read the summary of a storm")?;
    let setting = &summary["settings"][0];
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let losses = summary["losses"].as_object().map_or(0.0, |losses| losses.values().map(number).sum());
    let (told, held) = (number(&setting["events"]["reported"]), number(&setting["events"]["suppressed"]));
    samples.add("ours/called", called);
    samples.add("ours/counted", number(&setting["calls"]["conflicts"]["rewritten"]));
    samples.add("ours/accounted", told + held + losses);
    samples.add("ours/told", told);
    samples.add("ours/held", held);
    samples.add("ours/lost", losses);
    Ok(())
}

/// Returns the CPU time of the threads of a process, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&path).or_cannot(format_args!("list {path}"))?;
    // The first number is the time on a CPU, in nanoseconds.
    let ran = |dir: PathBuf| {
        let text = fs::read_to_string(dir.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    let times: Option<Vec<f64>> = threads.flatten().map(|thread| ran(thread.path())).collect();
    let times = times.ok_or_else(|| BenchError::new(format_args!("{path} has no run times of threads")))?;
    Ok(times.iter().sum::<f64>() / 1e9)
}

fn peak_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).or_cannot(format_args!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    peak.ok_or_else(|| BenchError::new(format_args!("{path} has no VmHWM")))
}
