//! Facts about this machine. What follows from them is decided elsewhere.

pub mod cgroup;
pub mod network;
pub mod privileges;
pub mod tcp;
pub mod tracefs;
