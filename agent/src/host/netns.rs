//! Network namespaces: which there are, and doing something in one.
//!
//! Those are found that a process is in or has a socket of. A namespace without either has no socket that anybody could still
//! use.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    thread,
};

use nix::sched::{CloneFlags, setns};

/// A network namespace, held so that it stays.
#[derive(Debug)]
pub struct Namespace {
    /// What tells it from others as long as it is there.
    pub id: u64,
    handle: File,
}

impl Namespace {
    /// That of a process.
    ///
    /// # Errors
    ///
    /// Where there is no such process, or it must not be looked into.
    pub fn of_process(process: u32) -> io::Result<Self> {
        Self::at(&format!("/proc/{process}/ns/net"))
    }

    /// That which stands at a path.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened.
    pub fn at(path: &str) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// That of a socket, whoever has it.
    ///
    /// # Errors
    ///
    /// Where that must not be told: it takes CAP_NET_ADMIN there.
    pub fn of_socket(socket: &OwnedFd) -> io::Result<Self> {
        /// `SIOCGSKNS` (include/uapi/linux/sockios.h)
        const GET_NAMESPACE: libc::c_ulong = 0x894c;
        // SAFETY: takes no argument.
        let handle = unsafe { libc::ioctl(socket.as_raw_fd(), GET_NAMESPACE as libc::Ioctl) };
        if handle < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        Self::new(unsafe { File::from_raw_fd(handle) })
    }

    /// That which a descriptor stands for.
    ///
    /// # Errors
    ///
    /// Where it cannot be asked.
    pub fn of_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Self::new(File::from(descriptor))
    }

    fn new(handle: File) -> io::Result<Self> {
        Ok(Self { id: handle.metadata()?.ino(), handle })
    }

    /// Does something in the namespace, on a thread of its own: this process stays where it is.
    ///
    /// # Errors
    ///
    /// Where the namespace must not be entered: it takes CAP_SYS_ADMIN.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> io::Result<T> {
        // To enter the one where one is takes rights too.
        if id_of_process(std::process::id()) == Some(self.id) {
            return Ok(act());
        }
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(act())
            });
            inside.join().unwrap_or_else(|_| Err(io::Error::other("a thread in the namespace panicked")))
        })
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.handle.as_raw_fd()
    }
}

/// The id of the namespace that a process is in; `None` where it is gone, or must not be looked into.
#[must_use]
pub fn id_of_process(process: u32) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{process}/ns/net")).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}
