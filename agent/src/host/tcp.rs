//! TCP settings of this host.

use std::{fs, io};

/// Returns the registered congestion controls: built in, or in a loaded module. The kernel loads no module if a BPF program
/// sets the option (`tcp_set_congestion_control`, net/ipv4/tcp_cong.c).
///
/// # Errors
///
/// Fails if the list cannot be read in `/proc`.
pub fn congestion_controls() -> io::Result<Vec<String>> {
    let list = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")?;
    Ok(list.split_whitespace().map(str::to_owned).collect())
}

/// Returns the largest socket buffer that setsockopt(2) accepts, in bytes. `name` is `wmem_max` for the send buffer or
/// `rmem_max` for the receive buffer (socket(7)).
///
/// # Errors
///
/// Fails if the value cannot be read in `/proc`.
pub fn buffer_max(name: &str) -> io::Result<i64> {
    let number = fs::read_to_string(format!("/proc/sys/net/core/{name}"))?;
    number.trim().parse().map_err(io::Error::other)
}
