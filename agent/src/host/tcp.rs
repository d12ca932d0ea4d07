//! TCP settings of this host.

use std::{fs, io};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socket, sockopt};

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
/// Fails if the value cannot be read in `/proc` and cannot be probed with a socket.
pub fn buffer_max(name: &str) -> io::Result<i64> {
    match fs::read_to_string(format!("/proc/sys/net/core/{name}")) {
        Ok(number) => number.trim().parse().map_err(io::Error::other),
        // The kernel may show the value only in the initial network namespace. The value holds in all of them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => probe_buffer_max(name == "wmem_max"),
        Err(error) => Err(error),
    }
}

/// Sets the largest buffer of a new socket, and returns what the kernel took, in bytes.
fn probe_buffer_max(is_send: bool) -> io::Result<i64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let wanted = i32::MAX as usize;
    let shown = if is_send {
        setsockopt(&socket, sockopt::SndBuf, &wanted)?;
        getsockopt(&socket, sockopt::SndBuf)?
    } else {
        setsockopt(&socket, sockopt::RcvBuf, &wanted)?;
        getsockopt(&socket, sockopt::RcvBuf)?
    };
    // The kernel shows twice the size (socket(7)).
    Ok(shown as i64 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probed_bound_of_buffers_is_that_of_the_kernel() {
        for (name, is_send) in [("wmem_max", true), ("rmem_max", false)] {
            assert_eq!(probe_buffer_max(is_send).unwrap(), buffer_max(name).unwrap(), "{name}");
        }
    }
}
