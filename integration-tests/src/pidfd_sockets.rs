//! Sockets of programs that the tests cannot control. The tests call getsockopt on duplicates of their descriptors
//! (pidfd_getfd(2)); the program itself would get the same values.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::{must, options::SocketOption, process::descriptors};

/// A duplicate of the descriptor of another process's socket.
#[derive(Debug)]
pub struct PidfdSocket(TcpStream);

impl PidfdSocket {
    /// Duplicates the sockets that a process has now.
    #[must_use]
    #[track_caller]
    pub fn all_of(pid: u32) -> Vec<Self> {
        // SAFETY: takes numbers.
        let process = must(descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }), "open a process");
        let is_socket = |target: &std::path::Path| target.to_string_lossy().starts_with("socket:");
        let numbers = descriptors(pid).into_iter().filter(|(_, target)| is_socket(target)).map(|(number, _)| number);
        numbers
            .filter_map(|number| {
                let number: i32 = number.parse().ok()?;
                // SAFETY: takes numbers.
                let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
                // The descriptor may be closed by now.
                descriptor(taken).ok().map(|socket| Self(socket.into()))
            })
            .collect()
    }

    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        self.0.local_addr().ok()
    }

    /// Returns the peer address. `None` if the socket is not connected.
    #[must_use]
    pub fn remote(&self) -> Option<SocketAddr> {
        self.0.peer_addr().ok()
    }

    /// Returns the value that getsockopt returns for an option.
    #[must_use]
    #[track_caller]
    pub fn get(&self, option: SocketOption) -> Vec<u8> {
        let mut value = vec![0; 16];
        let mut len = value.len() as libc::socklen_t;
        // SAFETY: both pointers are valid, and the length is that of the buffer.
        let result = unsafe {
            let value = value.as_mut_ptr().cast();
            libc::getsockopt(self.0.as_raw_fd(), option.level, option.number, value, &raw mut len)
        };
        must(if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }, format_args!("read {}", option.name));
        value.truncate(len as usize);
        value
    }

    /// Returns the value of an option that is an int.
    #[must_use]
    #[track_caller]
    pub fn int(&self, option: SocketOption) -> i32 {
        let value = self.get(option);
        let bytes = value.first_chunk().unwrap_or_else(|| panic!("{} is {value:?}", option.name));
        i32::from_ne_bytes(*bytes)
    }
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
