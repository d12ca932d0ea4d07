//! The agent and its programs on a real kernel.
//!
//! Wants root. What a socket has is asked of the process that owns it, never of the agent.

#![expect(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod actions;
mod matching;
mod preamble;

use sockpolicy_integration_tests::options::SocketOption;

/// An option that has no name here.
fn number(level: i32, number: i32) -> SocketOption {
    SocketOption { name: "a numeric option", level, number }
}
