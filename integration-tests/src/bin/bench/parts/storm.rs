//! A process that disagrees as often as it can: what the agent takes then, and what of it is told.

use std::{fs, path::PathBuf, time::Instant};

use serde_json::Value;

use crate::{
    guard::{self, Ground},
    peers,
    row::{Budget, Findings, Line, Unit, whole},
    scene::{Beside, Condition, InForce, POLICY, SOCKPOLICY, Samples, Scene},
    trouble::{Attempt, Result, Trouble},
    work::{Call, Work, Worker},
};

const PART: &str = "storm";
const ROUNDS: usize = 3;
const MILLIS: u64 = 1500;

const STORM: Call = super::call(libc::SOL_TCP, libc::TCP_NODELAY, 0);
const RULES: &str = "[[rule]]\nset = { TCP_NODELAY = true }";
const PRINTING: &str = "tracepoint:syscalls:sys_enter_setsockopt \
    { printf(\"%d %d %d\\n\", pid, args->level, args->optname); }";

pub(crate) fn measure(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    for _ in 0..ROUNDS {
        let (said, called) = storm(ground, "ours", ours(), &mut samples)?;
        tally(&said, called, &mut samples)?;
        match storm(ground, "bpftrace", peers::bpftrace(PRINTING), &mut samples) {
            Ok((_, called)) => samples.add("bpftrace/called", called),
            Err(trouble) => samples.leave_out("bpftrace", trouble),
        }
    }
    let line = |what: &str, over: &str, versus: &str, under: &str| Line::new(what, whole(over), versus, whole(under));
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
    Condition { beside: words.map(str::to_owned).to_vec(), ..peers::audited(RULES) }
}

/// Has one storm; gives what was said of it, and how many calls it had.
fn storm(ground: &Ground, name: &str, condition: Condition, samples: &mut Samples) -> Result<(String, f64)> {
    let scene = Scene { name: format!("storm-{name}"), condition, setup: Vec::new(), arms: Vec::new() };
    let mut in_force = InForce::begin(ground, &scene)?;
    in_force.wait()?;
    let target = in_force.target.clone();
    let mut worker = Worker::start(ground, &target, &scene.condition)?;
    // What wraps the worker, if there is nothing beside it.
    let tool = in_force.into_beside();
    let pid = tool.as_ref().map_or(worker.pid(), Beside::pid);
    // It is there when it has answered.
    worker.perform(&target, &target, 0, &Work::Hold { connections: 0 })?;
    let (before, begin) = (cpu_seconds(pid)?, Instant::now());
    let took = worker.perform(&target, &target, MILLIS, &Work::Set { call: STORM, errno: 0 })?;
    let cpu = (cpu_seconds(pid)? - before) / begin.elapsed().as_secs_f64();
    samples.add(&format!("{name}/cpu"), cpu * 100.0);
    samples.add(&format!("{name}/memory"), peak_kib(pid)?);
    drop(worker);
    let said = tool.map_or_else(String::new, Beside::end);
    guard::remove(&target)?;
    // The first is tried before the clock runs.
    Ok((said, took.times as f64 + 1.0))
}

fn tally(said: &str, called: f64, samples: &mut Samples) -> Result<()> {
    let last = said.lines().rfind(|line| line.contains("\"event\":\"summary\"")).unwrap_or_default();
    let summary: Value = serde_json::from_str(last).or_cannot("read the summary of a storm")?;
    let setting = &summary["settings"][0];
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let losses = summary["losses"].as_object().map_or(0.0, |losses| losses.values().map(number).sum());
    let (told, held) = (number(&setting["events"]["reported"]), number(&setting["events"]["suppressed"]));
    samples.add("ours/called", called);
    samples.add("ours/counted", number(&setting["calls"]["verdicts"]["rewritten"]));
    samples.add("ours/accounted", told + held + losses);
    samples.add("ours/told", told);
    samples.add("ours/held", held);
    samples.add("ours/lost", losses);
    Ok(())
}

/// How long the threads of a process have run by now.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&path).or_cannot(format_args!("list {path}"))?;
    // Nanoseconds on a CPU, then two other numbers.
    let ran = |folder: PathBuf| {
        let text = fs::read_to_string(folder.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    let times: Option<Vec<f64>> = threads.flatten().map(|thread| ran(thread.path())).collect();
    let times = times.ok_or_else(|| Trouble::new(format_args!("{path} does not say how long threads ran")))?;
    Ok(times.iter().sum::<f64>() / 1e9)
}

fn peak_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).or_cannot(format_args!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    peak.ok_or_else(|| Trouble::new(format_args!("{path} says no VmHWM")))
}
