//! The command line: one file for each command. The only place that prints.
//!
//! Exit status: 0 done; 1 findings (an invalid policy, drift, conflicts with `--fail-on-conflict`); 2
//! could not. `exec` passes the command's own status on and keeps 125 to 127 for itself.

mod apply;
mod attach;
mod audit;
mod check;
mod descriptor;
mod doctor;
mod exec;
mod explain;
mod help;
mod live_sockets;
mod ls;
mod messages;
mod options;
mod output;
mod plan;
mod progress;
mod run;
mod sink;
mod status;
mod test;
mod usage;
mod verify;

use std::{
    env,
    error::Error,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use self::{descriptor::Standard, messages::print_error};
use crate::{
    host::{
        containers::{self, LIST, Scope},
        inspect::{self, INSPECT},
    },
    reconcile, transient_cgroup, trial, worker,
};

/// Exit status for findings: an invalid policy, drift, conflicts.
const FINDINGS: u8 = 1;
/// Exit status for a failure.
const FAILURE: u8 = 2;

/// Enforce socket options per cgroup
///
/// sockpolicy reads TOML policies and attaches BPF programs to cgroups. The programs set the options of sockets when these are
/// created, connected or accepted, and decide calls of setsockopt that conflict with a policy.
#[derive(Debug, Parser)]
#[command(
    name = "sockpolicy",
    version,
    max_term_width = 80,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  sockpolicy check web.toml\n  sockpolicy exec --dry-run web.toml -- nginx\n  sockpolicy run web.toml --cgroup system.slice/nginx.service"
)]
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
    /// Print the help of sockpolicy or of a command
    #[command(after_help = "Examples:\n  sockpolicy help exec")]
    Help {
        /// The command
        #[arg(value_name = "COMMAND")]
        command: Option<String>,
    },
    /// Removes a cgroup when standard input ends. sockpolicy starts it for itself.
    #[command(name = transient_cgroup::GUARD, hide = true)]
    Guard {
        cgroup: PathBuf,
        home: PathBuf,
    },
    /// Lists the containers of root, or of a user, for the process that started it. sockpolicy starts it for itself.
    #[command(name = LIST, hide = true)]
    ListContainers {
        agent: u32,
        account: String,
    },
    /// Looks into sockets for the process that started it. sockpolicy starts it for itself.
    #[command(name = INSPECT, hide = true)]
    InspectSockets {
        agent: u32,
    },
    /// Has the kernel visit sockets for the process that started it. sockpolicy starts it for itself.
    #[command(name = reconcile::WALK, hide = true)]
    WalkSockets {
        agent: u32,
    },
    /// Opens sockets of each kind and ends. sockpolicy starts it for itself, to try options on.
    #[command(name = trial::SAMPLE, hide = true)]
    Sample,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    messages::init_log();
    let words: Vec<_> = env::args_os().collect();
    let status = match usage::parse(&words) {
        Ok(arguments) => run(arguments),
        Err(error) => usage::show(&error, &words),
    };
    messages::finish();
    status
}

fn run(arguments: Arguments) -> ExitCode {
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
        Command::Help { command } => usage::help(command.as_deref()),
        Command::Guard { cgroup, home } => match transient_cgroup::guard(&cgroup, &home) {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                let _ = writeln!(Standard::Output, "{reason}");
                FAILURE.into()
            }
        },
        Command::ListContainers { agent, account } => match list_containers(agent, &account) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&*error);
                FAILURE.into()
            }
        },
        Command::InspectSockets { agent } => {
            ended(worker::begin(agent).and_then(|()| inspect::work(agent, io::stdout().lock())))
        }
        Command::WalkSockets { agent } => {
            ended(worker::begin(agent).and_then(|()| reconcile::work(agent, io::stdout().lock())))
        }
        Command::Sample => match trial::sample() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        },
    }
}

/// Lists the containers of root, or of an account, for the agent that started this process.
fn list_containers(agent: u32, account: &str) -> Result<(), Box<dyn Error>> {
    worker::begin(agent)?;
    let scope = if account.is_empty() { Scope::Root } else { Scope::Account(account.parse()?) };
    let listing = serde_json::to_vec(&containers::list(scope)?)?;
    Ok(io::stdout().write_all(&worker::framed(&listing))?)
}

/// Returns the exit status of a worker.
fn ended(worked: io::Result<()>) -> ExitCode {
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&error);
            FAILURE.into()
        }
    }
}

/// Accepts the error of a write to a pipe without a reader.
fn ignore_broken_pipe(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
