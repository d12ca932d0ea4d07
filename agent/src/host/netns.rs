//! Opens network namespaces and runs code in them.
//!
//! The agent finds the namespaces that contain a process, or of which a process has a socket. In any other namespace, no
//! process can use a socket.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
    thread,
};

use nix::sched::{CloneFlags, setns};

/// An open network namespace. It exists at least until this is dropped.
#[derive(Debug)]
pub struct Namespace {
    /// The inode number, unique among the existing namespaces.
    pub id: u64,
    handle: File,
}

impl Namespace {
    /// Opens the namespace of a process.
    ///
    /// # Errors
    ///
    /// Fails if the process does not exist, or if permission is denied.
    pub fn of_process(process: u32) -> io::Result<Self> {
        Self::at(&format!("/proc/{process}/ns/net"))
    }

    /// Opens the namespace at a path.
    ///
    /// # Errors
    ///
    /// Fails if the path cannot be opened.
    pub fn at(path: &str) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// Opens the namespace of a socket.
    ///
    /// # Errors
    ///
    /// Fails without CAP_NET_ADMIN in that namespace.
    pub fn of_socket(socket: &OwnedFd) -> io::Result<Self> {
        /// `SIOCGSKNS` (include/uapi/linux/sockios.h)
        const GET_NAMESPACE: libc::c_ulong = 0x894c;
        // SAFETY: this ioctl takes no argument.
        let handle = unsafe { libc::ioctl(socket.as_raw_fd(), GET_NAMESPACE as libc::Ioctl) };
        if handle < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        Self::new(unsafe { File::from_raw_fd(handle) })
    }

    /// Returns the namespace that a descriptor refers to.
    ///
    /// # Errors
    ///
    /// Fails if fstat(2) fails.
    pub fn of_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Self::new(File::from(descriptor))
    }

    fn new(handle: File) -> io::Result<Self> {
        Ok(Self { id: handle.metadata()?.ino(), handle })
    }

    /// Calls a function in the namespace, on a new thread. The other threads of this process stay in their namespace.
    ///
    /// # Errors
    ///
    /// Fails without CAP_SYS_ADMIN, unless this process is in the namespace already.
    pub fn within<T: Send>(&self, function: impl FnOnce() -> T + Send) -> io::Result<T> {
        // setns(2) requires the capability even for the current namespace.
        if id_of_process(std::process::id()) == Some(self.id) {
            return Ok(function());
        }
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(function())
            });
            inside.join().unwrap_or_else(|_| Err(io::Error::other("a thread in the network namespace panicked")))
        })
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.handle.as_raw_fd()
    }
}

/// Returns the id of the network namespace of a process, or `None` if the process does not exist or permission is denied.
#[must_use]
pub fn id_of_process(process: u32) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{process}/ns/net")).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// Returns the path of the network namespace of this process below /run/netns, where ip-netns(8) mounts the namespaces that it
/// makes. Returns `None` if there is none.
#[must_use]
pub fn name_of_own() -> Option<PathBuf> {
    let own = id_of_process(std::process::id())?;
    let entries = fs::read_dir("/run/netns").ok()?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths.find(|path| fs::metadata(path).is_ok_and(|metadata| metadata.ino() == own))
}
