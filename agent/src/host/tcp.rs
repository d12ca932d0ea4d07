//! What this host's TCP has to offer.

use std::{fs, io};

/// The congestion controls that are registered: built in, or a module that is loaded. The kernel
/// loads none for a program (`tcp_set_congestion_control`, net/ipv4/tcp_cong.c).
///
/// # Errors
///
/// Where `/proc` does not have the list.
pub fn congestion_controls() -> io::Result<Vec<String>> {
    let list = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")?;
    Ok(list.split_whitespace().map(str::to_owned).collect())
}

/// The largest socket buffer that can be asked for, in bytes: `wmem_max` to send, `rmem_max` to receive (socket(7)).
///
/// # Errors
///
/// Where `/proc` does not have it.
pub fn buffer_max(name: &str) -> io::Result<i64> {
    let number = fs::read_to_string(format!("/proc/sys/net/core/{name}"))?;
    number.trim().parse().map_err(io::Error::other)
}
