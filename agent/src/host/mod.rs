//! Facts about this machine. Other modules decide what follows from these facts.

pub mod btf;
pub mod cgroup;
pub mod containers;
pub mod inotify;
pub mod inspect;
pub mod lsm;
mod netlink;
pub mod netns;
pub mod network;
pub mod ownership;
pub mod private;
pub mod privileges;
pub mod process;
pub mod routes;
pub mod sock_diag;
pub mod socket;
pub mod socket_table;
pub mod system;
pub mod tcp;
pub mod tracefs;
