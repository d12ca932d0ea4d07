//! The parts of the benchmark, as data.

mod connections;
mod datagrams;
mod lifecycle;
mod live;
mod programs;
mod scaling;
mod servers;
mod setsockopt;
mod storm;

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    row::Findings,
    work::Call,
};

/// A part, which the command line can select by its name.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) measure: fn(&Workspace, &mut Findings) -> Result<()>,
}

const fn part(name: &'static str, what: &'static str, measure: fn(&Workspace, &mut Findings) -> Result<()>) -> Part {
    Part { name, what, measure }
}

pub(crate) const ALL: [Part; 11] = [
    part("setsockopt", "application calls, one by one", setsockopt::measure),
    part("connections", "connections over loopback", connections::measure),
    part("rules", "policies of many rules", scaling::rules),
    part("targets", "policies of many targets", scaling::targets),
    part("prefixes", "matches of many networks", scaling::prefixes),
    part("datagrams", "datagrams over loopback", datagrams::measure),
    part("servers", "Redis and nginx under load", servers::measure),
    part("live", "options set on existing sockets", live::measure),
    part("lifecycle", "time to start, attach, reload and detach, and the memory for it", lifecycle::measure),
    part("programs", "time in each BPF program, by the kernel's clock", programs::measure),
    part("storm", "many more conflicts than are reported", storm::measure),
];

const fn call(level: i32, name: i32, value: i32) -> Call {
    Call { level, name, value }
}

/// Runs a command to its end. Returns its duration and its standard output.
fn run(ground: &Workspace, words: &[&str]) -> Result<(Duration, String)> {
    let what = words[..words.len().min(2)].join(" ");
    let (out_path, err_path) = (ground.scratch.join("run.out"), ground.scratch.join("run.err"));
    let create = |path| fs::File::create(path).or_cannot(format_args!("write for {what}"));
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(create(&out_path)?).stderr(create(&err_path)?);
    let mut enter = guard::enter(&ground.cgroup("background")?)?;
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || {
            guard::die_with_parent()?;
            enter()
        });
    }
    let begin = Instant::now();
    let status = command.status().or_cannot(format_args!("run {what}"))?;
    let took = begin.elapsed();
    let printed = |path| fs::read_to_string(path).unwrap_or_default();
    if status.success() {
        return Ok((took, printed(&out_path)));
    }
    let errors = printed(&err_path);
    let why = errors.lines().find(|line| line.contains("rror")).unwrap_or("no error message");
    Err(BenchError::new(format_args!("{what}: {status}: {why}")))
}
