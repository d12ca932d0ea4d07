//! The process that owns the sockets of a test. It reads requests from standard input, one JSON line each, and writes
//! an answer to each to standard output.
//!
//! It creates a network namespace and brings its loopback interface up. With `sockprobe stay`, it stays in its
//! network namespace. It ends with its input, or after [`LIFE_S`] seconds.

use std::{
    fs,
    io::{self, BufRead, Write},
    mem,
    net::SocketAddr,
    os::fd::AsRawFd,
    process::ExitCode,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, socket},
};
use sockpolicy_integration_tests::{
    impostor,
    script::{Answer, Argument, Family, Fd, Hello, KEEP_NETNS, Kind, Step},
};

/// The lifetime in seconds, which is longer than any test waits. A probe that hangs then ends, and the test fails.
const LIFE_S: u32 = 240;

const IPPROTO_MPTCP: i32 = 262;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "sockprobe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    nix::unistd::alarm::set(LIFE_S);
    if impostor::run_as_impostor()? {
        return Ok(());
    }
    if std::env::args().nth(1).as_deref() != Some(KEEP_NETNS) {
        unshare(CloneFlags::CLONE_NEWNET)?;
        bring_loopback_up()?;
    }
    write_message(&Hello { pid: std::process::id() })?;
    for line in io::stdin().lock().lines() {
        let step: Step = serde_json::from_str(&line?)?;
        write_message(&perform(step))?;
    }
    Ok(())
}

fn write_message(what: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.write_all(b"\n")?;
    out.flush()
}

fn bring_loopback_up() -> io::Result<()> {
    // Any kind of socket works; policies do not cover AF_UNIX.
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: zero is valid for each field.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request has the type that this ioctl takes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn perform(step: Step) -> Answer {
    match step {
        Step::Socket { family, kind } => open(family, kind),
        Step::Bind { fd, to } => with_address(to, |address, len| {
            // SAFETY: the address has `len` bytes.
            unsafe { libc::bind(fd, address, len) }.into()
        }),
        // SAFETY: takes numbers.
        Step::Listen { fd } => answer(unsafe { libc::listen(fd, 16) }.into()),
        Step::Connect { fd, to } => with_address(to, |address, len| {
            // SAFETY: the address has `len` bytes.
            unsafe { libc::connect(fd, address, len) }.into()
        }),
        // SAFETY: takes a number.
        Step::DropPrivileges => answer(unsafe { libc::setuid(65534) }.into()),
        Step::Disconnect { fd } => disconnect(fd),
        // SAFETY: no address is requested.
        Step::Accept { fd } => answer(unsafe { libc::accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) }.into()),
        Step::Set { fd, level, name, argument } => set(fd, level, name, &argument),
        Step::Get { fd, level, name, len, bad_pointer } => get(fd, level, name, len, bad_pointer),
        Step::LocalAddress { fd } => address_answer(nix::sys::socket::getsockname(fd)),
        Step::PeerAddress { fd } => address_answer(nix::sys::socket::getpeername(fd)),
        Step::Write { path, text } => io_answer(fs::write(path, text)),
        Step::Send { fd, to } => send(fd, to),
        Step::Transfer { from, to, len } => transfer(from, to, len),
        Step::Receive { fd } => {
            let mut byte = [0; 1];
            // SAFETY: the buffer has one byte.
            answer(unsafe { libc::recv(fd, byte.as_mut_ptr().cast(), 1, 0) } as i64)
        }
        // SAFETY: only the test uses this descriptor.
        Step::Close { fd } => answer(unsafe { libc::close(fd) }.into()),
        Step::EnterCgroup { path } => io_answer(fs::write(format!("{path}/cgroup.procs"), "0")),
    }
}

fn io_answer(result: io::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::default(),
        Err(error) => Answer { result: -1, errno: error.raw_os_error().unwrap_or(libc::EIO), ..Answer::default() },
    }
}

fn answer(result: i64) -> Answer {
    let errno = if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { 0 };
    Answer { result, errno, ..Answer::default() }
}

fn open(family: Family, kind: Kind) -> Answer {
    let domain = match (kind, family) {
        (Kind::Unix, _) => libc::AF_UNIX,
        (_, Family::Inet) => libc::AF_INET,
        (_, Family::Inet6) => libc::AF_INET6,
    };
    let (form, protocol) = match (kind, family) {
        (Kind::Tcp | Kind::Unix, _) => (libc::SOCK_STREAM, 0),
        (Kind::Mptcp, _) => (libc::SOCK_STREAM, IPPROTO_MPTCP),
        (Kind::Udp, _) => (libc::SOCK_DGRAM, 0),
        (Kind::UdpLite, _) => (libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
        (Kind::Ping, Family::Inet) => (libc::SOCK_DGRAM, SockProtocol::Icmp as i32),
        (Kind::Ping, Family::Inet6) => (libc::SOCK_DGRAM, SockProtocol::IcmpV6 as i32),
        (Kind::Raw, Family::Inet) => (libc::SOCK_RAW, SockProtocol::Icmp as i32),
        (Kind::Raw, Family::Inet6) => (libc::SOCK_RAW, SockProtocol::IcmpV6 as i32),
    };
    // SAFETY: takes numbers.
    answer(unsafe { libc::socket(domain, form | libc::SOCK_CLOEXEC, protocol) }.into())
}

fn with_address(to: SocketAddr, call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i64) -> Answer {
    use nix::sys::socket::SockaddrLike;
    let address = SockaddrStorage::from(to);
    answer(call(address.as_ptr(), address.len()))
}

fn disconnect(fd: Fd) -> Answer {
    let address = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address has the length that is passed.
    answer(unsafe { libc::connect(fd, &raw const address, size_of_val(&address) as libc::socklen_t) }.into())
}

fn set(fd: Fd, level: i32, name: i32, argument: &Argument) -> Answer {
    let value = match &argument.bytes {
        None if argument.is_null => std::ptr::null(),
        None => BAD_POINTER,
        Some(bytes) if argument.ends_with_memory => at_end_of_mapping(bytes),
        Some(bytes) => bytes.as_ptr().cast(),
    };
    // SAFETY: the kernel checks the pointer. It may read beyond the bytes if the test passes a greater length, but
    // writes nothing.
    answer(unsafe { libc::setsockopt(fd, level, name, value, argument.len as libc::socklen_t) }.into())
}

/// Copies bytes to the end of a page that an unreadable page follows. The pages stay until the process ends.
fn at_end_of_mapping(bytes: &[u8]) -> *const libc::c_void {
    const PAGE: usize = 4096;
    // SAFETY: two new pages, of which the second becomes unreadable; the bytes fit into the first.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let pages = libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(pages, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(pages.byte_add(PAGE), PAGE, libc::PROT_NONE), 0);
        let place = pages.byte_add(PAGE - bytes.len());
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), place.cast(), bytes.len());
        place
    }
}

/// An address in the first page, which is never mapped.
const BAD_POINTER: *const libc::c_void = std::ptr::without_provenance(8);

fn get(fd: Fd, level: i32, name: i32, len: u32, bad_pointer: bool) -> Answer {
    let mut value = vec![0u8; len as usize];
    let mut left: libc::socklen_t = len;
    let room = if bad_pointer { BAD_POINTER.cast_mut() } else { value.as_mut_ptr().cast() };
    // SAFETY: the buffer has `left` bytes, or the kernel rejects the address.
    let result = unsafe { libc::getsockopt(fd, level, name, room, &raw mut left) };
    let mut answer = answer(result.into());
    if answer.result == 0 {
        value.truncate(left as usize);
        answer.value = value;
    }
    answer
}

fn address_answer(address: nix::Result<SockaddrStorage>) -> Answer {
    match address {
        Ok(address) => Answer { address: socket_address(&address), ..Answer::default() },
        Err(errno) => Answer { result: -1, errno: errno as i32, ..Answer::default() },
    }
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let four = address.as_sockaddr_in().map(|address| SocketAddr::new(address.ip().into(), address.port()));
    four.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::new(address.ip().into(), address.port())))
}

/// Sends and receives `len` bytes, and keeps the connection's buffers full.
fn transfer(from: Fd, to: Fd, len: usize) -> Answer {
    let mut room = vec![0u8; 1 << 16];
    let (mut sent, mut received) = (0, 0);
    while received < len {
        let left = room.len().min(len - sent);
        // SAFETY: the buffer has at least `left` bytes.
        let count = unsafe { libc::send(from, room.as_ptr().cast(), left, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if count > 0 {
            sent += count as usize;
            continue;
        }
        // Does not wait: a blocking recv would wait for SO_RCVLOWAT bytes.
        // SAFETY: the buffer has the length that is passed.
        let count = unsafe { libc::recv(to, room.as_mut_ptr().cast(), room.len(), libc::MSG_DONTWAIT) };
        match count {
            1.. => received += count as usize,
            0 => return answer(-1),
            _ if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            _ => return answer(-1),
        }
    }
    Answer { result: received as i64, ..Answer::default() }
}

fn send(fd: Fd, to: Option<SocketAddr>) -> Answer {
    let byte = [b'x'];
    let Some(to) = to else {
        // SAFETY: the buffer has one byte.
        return answer(unsafe { libc::send(fd, byte.as_ptr().cast(), 1, libc::MSG_NOSIGNAL) } as i64);
    };
    with_address(to, |address, len| {
        // SAFETY: the buffer has one byte, and the address `len` bytes.
        unsafe { libc::sendto(fd, byte.as_ptr().cast(), 1, libc::MSG_NOSIGNAL, address, len) as i64 }
    })
}
