//! `soak`: policies in force for minutes or hours, beside tenants that attack them, all at once.
//!
//! One agent, `run`, has the policies of a folder, which change each second. Another, `run --persist`, is killed again and again.
//! Victims check their own sockets by getsockopt. Hostile tenants storm, fork, invent option numbers, use up descriptors,
//! pose as containers, and use each way to reach an option that a policy governs. Cgroups come and go.
//!
//! At the end: no socket differed from its policy, each conflict that a process caused is counted, each event is reported, held back or
//! counted as lost, the agent's memory is flat, and nothing is left behind. The exit status says whether all this is so.

mod agent;
mod checks;
mod judge;
mod policies;
mod scene;
mod sockets;
mod tenants;
mod work;
mod worker;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

const USAGE: &str = "usage: soak [MINUTES]";
const DEFAULT_MINUTES: f64 = 10.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match *words.as_slice() {
        [work::WORK, kind] => work::serve(kind).map(|()| true),
        [] => soak(DEFAULT_MINUTES),
        [minutes] => {
            minutes.parse().map_err(|error| io::Error::other(format!("{minutes}: {error}; {USAGE}"))).and_then(soak)
        }
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let _ = writeln!(io::stderr(), "soak: {error}");
            ExitCode::from(2)
        }
    }
}

fn soak(minutes: f64) -> io::Result<bool> {
    sockpolicy_integration_tests::require_root();
    let length = Duration::try_from_secs_f64(minutes * 60.0).map_err(io::Error::other)?;
    let mut findings = judge::Findings::default();
    let scene = scene::Scene::begin()?;
    scene.last(length, &mut findings)?;
    findings.say()
}
