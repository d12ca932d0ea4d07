//! `soak`: policies in force for minutes or hours, next to hostile tenants that attack them.
//!
//! One agent, `run`, has a directory of policies that change each second. Another one, `run --persist`, is killed
//! repeatedly. Victims check their own sockets with getsockopt. Hostile tenants make many calls and processes, use
//! invented option numbers, use up descriptors, pose as containers, and try every way to change an option of a
//! policy. Cgroups are created and removed all the time.
//!
//! At the end, no socket may differ from its policy. Each conflict that a process caused must be counted. Each event
//! must be reported, suppressed or counted as lost. The agent's memory must not grow, and nothing may be left behind.
//! The exit status is 0 if all this holds.

mod agent;
mod checks;
mod findings;
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
    let mut findings = findings::Findings::default();
    let scene = scene::Scene::begin()?;
    scene.run_for(length, &mut findings)?;
    findings.print()
}
