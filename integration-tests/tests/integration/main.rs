//! Tests of the agent and its programs on a real kernel.
//!
//! They need root. Tests take the value of a socket option from the process that owns the socket, never from the
//! agent.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a failed expectation fails the test")]

mod actions;
mod app_override;
mod apply;
mod arguments;
mod audit;
mod bad_input;
mod budgets;
mod containers;
mod datagrams;
mod differential;
mod dry_run;
mod enforcement;
mod environment;
mod events_md;
mod explain;
mod facts;
mod files;
mod free;
mod impostors;
mod instances;
mod isolation;
mod journal;
mod lifecycle;
mod live;
mod matching;
mod output;
mod persistence;
mod plan;
mod policies;
mod precedence;
mod progress;
mod races;
mod reload;
mod restarts;
mod settings;
mod target;
mod targets;
mod unsupported;
mod values;

use std::process::Output;

use sockpolicy_integration_tests::options::SocketOption;

/// Returns an option by level and number.
fn number(level: i32, number: i32) -> SocketOption {
    SocketOption { name: "a numeric option", level, number }
}

/// Returns the standard output of a command.
fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns the standard error of a command.
fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
