//! Facts about this machine. What follows from them is decided elsewhere.

pub mod btf;
pub mod cgroup;
pub mod container;
pub mod containers;
pub mod inotify;
pub mod network;
pub mod privileges;
pub mod process;
pub mod routes;
pub mod socket;
pub mod system;
pub mod tcp;
pub mod tracefs;
