//! sockpolicy enforces socket options per cgroup.
//!
//! Data flows one way. The middle is pure; only the two ends do I/O:
//!
//! ```text
//! TOML → policy → compile → kernel → events → report
//! ```
//!
//! [`policy`], [`compile`], [`events`] and [`report`] are pure functions. [`host`] reads facts about this machine.
//! [`kernel`] is the only module that uses aya, and [`cli`] the only one that prints.

pub mod cli;
pub mod compile;
pub mod container;
pub mod coverage;
pub mod daemon;
pub mod errno;
pub mod escape;
pub mod events;
pub mod explain;
mod fault;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod host;
pub mod instance;
pub mod journal;
pub mod kernel;
pub mod limitations;
pub mod lint;
pub mod live;
pub mod options;
pub mod plural;
pub mod policy;
pub mod policy_diff;
pub mod recent;
pub mod reconcile;
pub mod reference;
pub mod report;
pub mod schema;
pub mod session;
pub mod skipped;
pub mod sources;
pub mod targets;
pub mod transient_cgroup;
pub mod trial;
pub mod unsupported;
pub mod values;
pub mod worker;
pub mod wrap;
