//! The command line: one file for each command. The only place that prints.
//!
//! Exit status: 0 done; 1 findings (an invalid policy, drift, conflicts with `--fail-on-conflict`); 2
//! could not. `exec` passes the command's own status on and keeps 125 to 127 for itself.

mod apply;
mod attach;
mod audit;
mod check;
mod containers;
mod doctor;
mod exec;
mod explain;
mod in_line;
mod ls;
mod options;
mod output;
mod plan;
mod progress;
mod restore;
mod run;
mod signals;
mod sockets;
mod standing;
mod status;
mod test;
mod verify;
mod walker;
mod watch;

use std::{
    env,
    error::Error,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::{enclosure, trial};

/// Done, and something was found that should not be.
const FINDINGS: u8 = 1;
/// Could not be done.
const FAILURE: u8 = 2;

/// Socket options as policy: the kernel makes it so, and every application call that disagrees is
/// reported.
#[derive(Debug, Parser)]
#[command(name = "sockpolicy", version, max_term_width = 100, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(check::Check),
    Explain(explain::Explain),
    Test(test::Test),
    Plan(plan::Plan),
    Exec(exec::Exec),
    Run(run::Run),
    Attach(attach::Attach),
    Apply(apply::Apply),
    Detach(attach::Detach),
    Status(status::Status),
    Audit(audit::Audit),
    Ls(ls::Ls),
    Verify(verify::Verify),
    Options(options::Options),
    Doctor(doctor::Doctor),
    /// Removes a cgroup when standard input ends. sockpolicy starts it for itself.
    #[command(name = enclosure::GUARD, hide = true)]
    Guard {
        cgroup: PathBuf,
        home: PathBuf,
    },
    /// Opens sockets of each kind and ends. sockpolicy starts it for itself, to try options on.
    #[command(name = trial::SAMPLE, hide = true)]
    Sample,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("SOCKPOLICY_LOG", "warn"))
        .format(|out, record| match record.level() {
            log::Level::Warn => writeln!(out, "warning: {}", record.args()),
            level => writeln!(out, "{}: {}", level.as_str().to_lowercase(), record.args()),
        })
        .init();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return tell_usage(&error),
    };
    match arguments.command {
        Command::Check(check) => check.run(),
        Command::Explain(explain) => explain.run(),
        Command::Test(test) => test.run(),
        Command::Plan(plan) => plan.run(),
        Command::Exec(exec) => exec.run(),
        Command::Run(run) => run.run(),
        Command::Attach(attach) => attach.run(),
        Command::Apply(apply) => apply.run(),
        Command::Detach(detach) => detach.run(),
        Command::Status(status) => status.run(),
        Command::Audit(audit) => audit.run(),
        Command::Ls(ls) => ls.run(),
        Command::Verify(verify) => verify.run(),
        Command::Options(options) => options.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Guard { cgroup, home } => match enclosure::guard(&cgroup, &home) {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                let _ = writeln!(io::stdout(), "{reason}");
                FAILURE.into()
            }
        },
        Command::Sample => match trial::sample() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        },
    }
}

/// Says how the program is to be called; help that was asked for is no failure.
fn tell_usage(error: &clap::Error) -> ExitCode {
    // Nobody is there to read it.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let is_exec = env::args_os().nth(1).is_some_and(|command| command == "exec");
    if is_exec { exec::OURS.into() } else { FAILURE.into() }
}

/// Says what went wrong, on standard error.
#[expect(clippy::print_stderr, reason = "this is the command line")]
fn complain(error: &(dyn Error + 'static)) {
    eprintln!("error: {}", with_causes(error));
}

/// An error, and what its own text does not say of its causes. The help line stays last.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}

/// A result of writing to a pipe that nobody reads any more is not a failure.
fn unless_closed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
