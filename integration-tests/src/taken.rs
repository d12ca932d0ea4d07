//! Sockets of a program that takes no questions, asked through descriptors of our own for the same sockets
//! (pidfd_getfd(2)): what getsockopt tells us it would tell the program.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::{must, options::SocketOption, process::descriptors};

/// A socket of another process.
#[derive(Debug)]
pub struct Taken(TcpStream);

impl Taken {
    /// The sockets that a process has by now.
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
                // It may be closed by now.
                descriptor(taken).ok().map(|socket| Self(socket.into()))
            })
            .collect()
    }

    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        self.0.local_addr().ok()
    }

    /// `None` also where it listens.
    #[must_use]
    pub fn remote(&self) -> Option<SocketAddr> {
        self.0.peer_addr().ok()
    }

    /// What the program would be told of an option.
    #[must_use]
    #[track_caller]
    pub fn get(&self, option: SocketOption) -> Vec<u8> {
        let mut value = vec![0; 16];
        let mut len = value.len() as libc::socklen_t;
        // SAFETY: both point to what they are said to.
        let result = unsafe {
            let value = value.as_mut_ptr().cast();
            libc::getsockopt(self.0.as_raw_fd(), option.level, option.number, value, &raw mut len)
        };
        must(if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }, format_args!("read {}", option.name));
        value.truncate(len as usize);
        value
    }

    /// The same of an option that is a number.
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
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
