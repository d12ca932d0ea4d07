//! Makes the calls of setsockopt and getsockopt in a file, each on a new socket, and records their visible effects.

use std::{
    fs,
    io::{self, Write},
    mem, ptr,
};

use nix::sched::{CloneFlags, unshare};
use sockpolicy_integration_tests::differential::{
    Case, CaseSet, KINDS, Key, NO_OBSERVER, NO_SOCKET, OBSERVERS, Observation, Outcome, state,
};

use super::print_line;

/// The contents of the memory after the value.
const PATTERN: u8 = 0xa5;
/// The longest argument, with the memory after it.
const MEMORY: usize = 8192 + BEHIND;
const BEHIND: usize = 256;
const NOBODY_ID: u32 = 65534;

/// Makes the calls of the file `spec` in a new network namespace, as root or as `nobody`. Writes the outcomes to the
/// file `out`, and prints the number of calls.
pub(super) fn differential(spec: &str, out: &str, user: &str) -> io::Result<()> {
    let product = CaseSet::decode(&fs::read(spec)?).ok_or(io::ErrorKind::InvalidData)?;
    let mut out = fs::File::create(out)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    bring_loopback_up()?;
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    if user == "nobody" {
        nix::unistd::setgid(NOBODY_ID.into())?;
        nix::unistd::setuid(NOBODY_ID.into())?;
    }
    let mut caller = Caller { memory: vec![PATTERN; MEMORY], copy: vec![PATTERN; MEMORY], calls: 0 };
    let mut outcomes = Vec::new();
    for case in &product.cases {
        caller.outcome(&product, case).encode(&mut outcomes);
    }
    out.write_all(&outcomes)?;
    print_line(&caller.calls.to_string())
}

fn bring_loopback_up() -> io::Result<()> {
    let socket = open(libc::AF_UNIX, libc::SOCK_DGRAM, 0).map_err(io::Error::from_raw_os_error)?;
    // SAFETY: zero is valid for each field.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is of the kind that this ioctl takes.
    let result = unsafe { libc::ioctl(socket.fd, libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Returns a result, or a negative errno.
fn result_or_errno(result: i32) -> i32 {
    if result < 0 { -errno() } else { result }
}

/// A descriptor, closed without leaving a lingering connection.
struct Socket {
    fd: i32,
    is_connected: bool,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.is_connected {
            // SAFETY: zero is valid for each field: AF_UNSPEC.
            let nowhere: libc::sockaddr = unsafe { mem::zeroed() };
            // SAFETY: the address has the length of its type.
            unsafe { libc::connect(self.fd, &raw const nowhere, size_of_val(&nowhere) as u32) };
        }
        // SAFETY: nothing else closes this descriptor.
        unsafe { libc::close(self.fd) };
    }
}

/// Opens a socket, or returns the errno.
fn open(domain: i32, kind: i32, protocol: i32) -> Result<Socket, i32> {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 { Err(errno()) } else { Ok(Socket { fd, is_connected: false }) }
}

/// The socket of a case, and the other sockets that it needs.
struct Opened {
    socket: Socket,
    _others: Vec<Socket>,
}

fn open_for(case: &Case) -> Result<Opened, i32> {
    let (_, domain, kind, protocol) = *KINDS.get(case.kind as usize).ok_or(libc::EINVAL)?;
    let new = || open(domain, kind, protocol);
    let mut socket = new()?;
    let mut others = Vec::new();
    match case.state {
        state::FRESH => {}
        state::BOUND => {
            bind(&socket, domain)?;
        }
        state::LISTENING => {
            bind(&socket, domain)?;
            listen(&socket)?;
        }
        _ if kind == libc::SOCK_DGRAM => {
            let address = bind(&socket, domain)?;
            connect(&mut socket, &address)?;
        }
        _ => {
            let listener = new()?;
            let address = bind(&listener, domain)?;
            listen(&listener)?;
            connect(&mut socket, &address)?;
            let mut accepted = accept(&listener)?;
            others.push(listener);
            if case.state == state::ACCEPTED {
                mem::swap(&mut socket, &mut accepted);
            }
            others.push(accepted);
        }
    }
    Ok(Opened { socket, _others: others })
}

/// An address in the kernel's format.
struct Address {
    bytes: [u8; 28],
    len: u32,
}

/// Binds a socket to a free port of the loopback address.
fn bind(socket: &Socket, domain: i32) -> Result<Address, i32> {
    let mut address = Address { bytes: [0; 28], len: if domain == libc::AF_INET { 16 } else { 28 } };
    address.bytes[..2].copy_from_slice(&(domain as u16).to_ne_bytes());
    if domain == libc::AF_INET {
        address.bytes[4..8].copy_from_slice(&[127, 0, 0, 1]);
    } else {
        address.bytes[23] = 1;
    }
    // SAFETY: the address has `len` bytes.
    must(unsafe { libc::bind(socket.fd, address.bytes.as_ptr().cast(), address.len) })?;
    // SAFETY: the buffer has `len` bytes.
    must(unsafe { libc::getsockname(socket.fd, address.bytes.as_mut_ptr().cast(), &raw mut address.len) })?;
    Ok(address)
}

fn must(result: i32) -> Result<i32, i32> {
    if result < 0 { Err(errno()) } else { Ok(result) }
}

fn listen(socket: &Socket) -> Result<i32, i32> {
    // SAFETY: takes numbers.
    must(unsafe { libc::listen(socket.fd, 4) })
}

fn connect(socket: &mut Socket, address: &Address) -> Result<(), i32> {
    // SAFETY: the address has `len` bytes.
    must(unsafe { libc::connect(socket.fd, address.bytes.as_ptr().cast(), address.len) })?;
    socket.is_connected = true;
    Ok(())
}

fn accept(listener: &Socket) -> Result<Socket, i32> {
    // SAFETY: no address is requested.
    let fd = must(unsafe { libc::accept4(listener.fd, ptr::null_mut(), ptr::null_mut(), libc::SOCK_CLOEXEC) })?;
    Ok(Socket { fd, is_connected: true })
}

/// The memory of the arguments.
struct Caller {
    memory: Vec<u8>,
    /// The contents of the memory before a call.
    copy: Vec<u8>,
    calls: u64,
}

impl Caller {
    fn outcome(&mut self, product: &CaseSet, case: &Case) -> Outcome {
        let opened = match open_for(case) {
            Ok(opened) => opened,
            Err(errno) => return Outcome { result: NO_SOCKET - errno, ..Outcome::default() },
        };
        let fd = opened.socket.fd;
        let mut outcome = Outcome::default();
        if let Some(value) = product.values.get(case.prior_value as usize) {
            outcome.prior = self.set(fd, case.prior, value, value.len() as i32).0;
        }
        let observers = product.observers.get(case.observers as usize).unwrap_or(&[NO_OBSERVER; OBSERVERS]);
        if case.reads != 0 {
            self.get(fd, case, &mut outcome);
            return outcome;
        }
        outcome.before = observers.map(|key| self.observe(fd, key));
        let value = product.values.get(case.value as usize).map_or(&[][..], Vec::as_slice);
        (outcome.result, outcome.is_changed) = self.set(fd, case.key, value, case.len);
        outcome.after = observers.map(|key| self.observe(fd, key));
        outcome
    }

    /// Returns the result, and whether the memory changed.
    fn set(&mut self, fd: i32, (level, name): Key, value: &[u8], len: i32) -> (i32, i32) {
        let end = value.len().max(len.max(0) as usize) + BEHIND;
        self.memory[..end].fill(PATTERN);
        self.memory[..value.len()].copy_from_slice(value);
        self.copy[..end].copy_from_slice(&self.memory[..end]);
        self.calls += 1;
        // SAFETY: at least `len` bytes are there. A BPF program may write to them.
        let result = unsafe { libc::setsockopt(fd, level, name, self.memory.as_mut_ptr().cast(), len as u32) };
        (result_or_errno(result), (self.memory[..end] != self.copy[..end]).into())
    }

    fn get(&mut self, fd: i32, case: &Case, outcome: &mut Outcome) {
        let end = case.len.max(0) as usize + BEHIND;
        self.memory[..end].fill(PATTERN);
        self.copy[..end].fill(PATTERN);
        let mut len = case.len as u32;
        self.calls += 1;
        let (level, name) = case.key;
        // SAFETY: the buffer has more than `len` bytes.
        let result = unsafe { libc::getsockopt(fd, level, name, self.memory.as_mut_ptr().cast(), &raw mut len) };
        outcome.result = result_or_errno(result);
        outcome.len = len as i32;
        let returned = if result < 0 { 0 } else { (len as usize).min(end) };
        outcome.is_changed = (self.memory[returned..end] != self.copy[returned..end]).into();
        outcome.sum = sum(&self.memory[..returned.min(512)]);
    }

    fn observe(&mut self, fd: i32, (level, name): Key) -> Observation {
        if (level, name) == NO_OBSERVER {
            return Observation::default();
        }
        let mut seen = Observation::default();
        let mut len = size_of_val(&seen.words) as u32;
        self.calls += 1;
        // SAFETY: the buffer has `len` bytes.
        let result = unsafe { libc::getsockopt(fd, level, name, seen.words.as_mut_ptr().cast(), &raw mut len) };
        seen.len = if result < 0 { -errno() } else { len as i32 };
        seen
    }
}

/// Returns a checksum (FNV-1a over words), which very likely differs for other bytes.
fn sum(bytes: &[u8]) -> i32 {
    let mut sum = 0x811c_9dc5_u32;
    for part in bytes.chunks(4) {
        let mut word = [0; 4];
        word[..part.len()].copy_from_slice(part);
        sum = (sum ^ u32::from_ne_bytes(word)).wrapping_mul(0x0100_0193);
    }
    sum as i32
}
