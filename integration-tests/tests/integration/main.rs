//! The agent and its programs on a real kernel.
//!
//! Wants root. What a socket has is asked of the process that owns it, never of the agent.

#![expect(clippy::panic, clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod actions;
mod apply;
mod arguments;
mod audit;
mod bad_input;
mod budgets;
mod containers;
mod datagrams;
mod dry_run;
mod enforcement;
mod explain;
mod facts;
mod files;
mod gaps;
mod impostors;
mod isolation;
mod journal;
mod lifecycle;
mod live;
mod matching;
mod meanwhile;
mod output;
mod overruling;
mod persistence;
mod plan;
mod policies;
mod preamble;
mod precedence;
mod product;
mod progress;
mod reload;
mod settings;
mod target;
mod targets;
mod values;

use std::process::Output;

use sockpolicy_integration_tests::options::SocketOption;

/// An option that has no name here.
fn number(level: i32, number: i32) -> SocketOption {
    SocketOption { name: "a numeric option", level, number }
}

/// What a command wrote to its standard output.
fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What it complained of.
fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
