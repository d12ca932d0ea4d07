//! The owning process: does with sockets what it is told on standard input, a JSON line a step, and
//! says on standard output what came of each.
//!
//! It works in a network namespace of its own in which the loopback interface is up, or, as
//! `sockprobe stay`, in the one that it is started in. It ends with its input, or after [`LIFE_S`] seconds.

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
    script::{Answer, Argument, Family, Fd, Hello, Kind, STAY, Step},
};

/// Nobody waits that long for a step. A probe that hangs ends, and the test sees it.
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
    if impostor::pose()? {
        return Ok(());
    }
    if std::env::args().nth(1).as_deref() != Some(STAY) {
        unshare(CloneFlags::CLONE_NEWNET)?;
        bring_loopback_up()?;
    }
    say(&Hello { pid: std::process::id() })?;
    for line in io::stdin().lock().lines() {
        let step: Step = serde_json::from_str(&line?)?;
        say(&perform(step))?;
    }
    Ok(())
}

fn say(what: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.write_all(b"\n")?;
    out.flush()
}

fn bring_loopback_up() -> io::Result<()> {
    // Any kind will do: one that policies are not about.
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: zero is valid for each field.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is of the kind that this ioctl takes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn perform(step: Step) -> Answer {
    match step {
        Step::Socket { family, kind } => open(family, kind),
        Step::Bind { fd, to } => with_address(to, |address, len| {
            // SAFETY: `len` bytes of address.
            unsafe { libc::bind(fd, address, len) }.into()
        }),
        // SAFETY: takes numbers.
        Step::Listen { fd } => answer(unsafe { libc::listen(fd, 16) }.into()),
        Step::Connect { fd, to } => with_address(to, |address, len| {
            // SAFETY: `len` bytes of address.
            unsafe { libc::connect(fd, address, len) }.into()
        }),
        // SAFETY: takes a number.
        Step::BecomeNobody => answer(unsafe { libc::setuid(65534) }.into()),
        Step::Disconnect { fd } => disconnect(fd),
        // SAFETY: no address is asked for.
        Step::Accept { fd } => answer(unsafe { libc::accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) }.into()),
        Step::Set { fd, level, name, argument } => set(fd, level, name, &argument),
        Step::Get { fd, level, name, len, bad_pointer } => get(fd, level, name, len, bad_pointer),
        Step::LocalAddress { fd } => addressed(nix::sys::socket::getsockname(fd)),
        Step::PeerAddress { fd } => addressed(nix::sys::socket::getpeername(fd)),
        Step::Write { path, text } => written(fs::write(path, text)),
        Step::Send { fd, to } => send(fd, to),
        Step::Pour { from, to, len } => pour(from, to, len),
        Step::Receive { fd } => {
            let mut byte = [0; 1];
            // SAFETY: a buffer of one byte.
            answer(unsafe { libc::recv(fd, byte.as_mut_ptr().cast(), 1, 0) } as i64)
        }
        // SAFETY: of a descriptor that only the script uses.
        Step::Close { fd } => answer(unsafe { libc::close(fd) }.into()),
        Step::EnterCgroup { path } => written(fs::write(format!("{path}/cgroup.procs"), "0")),
    }
}

fn written(result: io::Result<()>) -> Answer {
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
    // SAFETY: an address of the length that is given.
    answer(unsafe { libc::connect(fd, &raw const address, size_of_val(&address) as libc::socklen_t) }.into())
}

fn set(fd: Fd, level: i32, name: i32, argument: &Argument) -> Answer {
    let value = match &argument.bytes {
        None if argument.is_null => std::ptr::null(),
        None => BAD_POINTER,
        Some(bytes) if argument.ends_with_memory => at_the_end_of_memory(bytes),
        Some(bytes) => bytes.as_ptr().cast(),
    };
    // SAFETY: goes to the kernel, which checks what it is given. It may read beyond the bytes where
    // the script gives a greater length, but not change them.
    answer(unsafe { libc::setsockopt(fd, level, name, value, argument.len as libc::socklen_t) }.into())
}

/// Copies bytes to the end of a page behind which nothing can be read. The page stays until the process ends.
fn at_the_end_of_memory(bytes: &[u8]) -> *const libc::c_void {
    const PAGE: usize = 4096;
    // SAFETY: two new pages, of which the second is made unreadable; the bytes fit into the first.
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

/// In the first page, where nothing is ever mapped.
const BAD_POINTER: *const libc::c_void = std::ptr::without_provenance(8);

fn get(fd: Fd, level: i32, name: i32, len: u32, bad_pointer: bool) -> Answer {
    let mut value = vec![0u8; len as usize];
    let mut left: libc::socklen_t = len;
    let room = if bad_pointer { BAD_POINTER.cast_mut() } else { value.as_mut_ptr().cast() };
    // SAFETY: `left` bytes of room, or an address that the kernel refuses.
    let result = unsafe { libc::getsockopt(fd, level, name, room, &raw mut left) };
    let mut answer = answer(result.into());
    if answer.result == 0 {
        value.truncate(left as usize);
        answer.value = value;
    }
    answer
}

fn addressed(address: nix::Result<SockaddrStorage>) -> Answer {
    match address {
        Ok(address) => Answer { address: socket_address(&address), ..Answer::default() },
        Err(errno) => Answer { result: -1, errno: errno as i32, ..Answer::default() },
    }
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let four = address.as_sockaddr_in().map(|address| SocketAddr::new(address.ip().into(), address.port()));
    four.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::new(address.ip().into(), address.port())))
}

/// Keeps the connection as full as it gets.
fn pour(from: Fd, to: Fd, len: usize) -> Answer {
    let mut room = vec![0u8; 1 << 16];
    let (mut sent, mut received) = (0, 0);
    while received < len {
        let left = room.len().min(len - sent);
        // SAFETY: no more bytes than there are.
        let count = unsafe { libc::send(from, room.as_ptr().cast(), left, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if count > 0 {
            sent += count as usize;
            continue;
        }
        // Without waiting, which takes as many bytes as SO_RCVLOWAT says.
        // SAFETY: as many bytes of room.
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
        // SAFETY: a buffer of one byte.
        return answer(unsafe { libc::send(fd, byte.as_ptr().cast(), 1, libc::MSG_NOSIGNAL) } as i64);
    };
    with_address(to, |address, len| {
        // SAFETY: a buffer of one byte, and `len` bytes of address.
        unsafe { libc::sendto(fd, byte.as_ptr().cast(), 1, libc::MSG_NOSIGNAL, address, len) as i64 }
    })
}
