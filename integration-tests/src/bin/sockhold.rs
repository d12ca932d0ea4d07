//! Holds the lock of a connected TCP socket as long as it runs. send(2) copies from a page that is missing and that
//! this program never provides (userfaultfd(2)). `tcp_sendmsg` copies while it holds the socket lock
//! (net/ipv4/tcp.c).
//!
//! Prints `held DESCRIPTOR` once the lock is held. Its other sockets are not locked.

#![expect(clippy::panic, reason = "a helper of tests")]

use std::{
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    ptr, thread,
    time::Duration,
};

const PAGE: usize = 4096;

/// The structures and requests of include/uapi/linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const MODE_MISSING: u64 = 1;

fn check(what: &str, result: i64) -> i64 {
    assert!(result >= 0, "{what}: {}", io::Error::last_os_error());
    result
}

fn missing_page() -> *mut libc::c_void {
    // SAFETY: creates a descriptor and new memory, and registers that memory; the structures are those that the
    // kernel expects.
    unsafe {
        let faults = check("userfaultfd", libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC)) as i32;
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        check("UFFDIO_API", libc::ioctl(faults, UFFDIO_API as libc::Ioctl, &raw mut api).into());
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = libc::mmap(ptr::null_mut(), PAGE, access, flags, -1, 0);
        assert!(page != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        let mut register = Register { start: page as u64, len: PAGE as u64, mode: MODE_MISSING, ioctls: 0 };
        check("UFFDIO_REGISTER", libc::ioctl(faults, UFFDIO_REGISTER as libc::Ioctl, &raw mut register).into());
        page
    }
}

fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|error| panic!("listen: {error}"));
    let address = listener.local_addr().unwrap_or_else(|error| panic!("listen: {error}"));
    let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("connect: {error}"));
    let descriptor = stream.as_raw_fd();
    let page = missing_page() as usize;
    thread::spawn(move || {
        // SAFETY: the page belongs to this process.
        unsafe { libc::send(descriptor, page as *const libc::c_void, PAGE, 0) };
    });
    // The thread holds the lock once the kernel waits for the page.
    let is_held = || {
        let mut tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        tasks.any(|task| {
            let call = std::fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            call.split(' ').next() == Some(&libc::SYS_sendto.to_string())
        })
    };
    while !is_held() {
        thread::sleep(Duration::from_millis(1));
    }
    let _ = writeln!(io::stdout(), "held {descriptor}");
    loop {
        thread::park();
    }
}
