//! The measured loops, and the state of a worker.

use std::{
    collections::BTreeMap,
    io, mem,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    ptr,
    time::{Duration, Instant},
};

use sockpolicy_integration_tests::wait;

use super::{Call, Timing};
use crate::{guard, measure};

/// The shortest piece of work that is timed separately.
const PIECE: Duration = Duration::from_micros(250);

/// Repeats an operation for `millis` milliseconds.
fn repeat(millis: u64, mut once: impl FnMut() -> io::Result<()>) -> io::Result<Timing> {
    let begin = Instant::now();
    let end = begin + Duration::from_millis(millis);
    // The number of operations per piece is known after the first one, which is left out because the caches are cold.
    let (mut each, mut pieces, mut times) = (1u32, Vec::new(), 0);
    loop {
        let start = Instant::now();
        for _ in 0..each {
            once()?;
        }
        let took = start.elapsed();
        times += u64::from(each);
        if took * 2 < PIECE {
            each = (f64::from(each) * (PIECE.as_secs_f64() / took.as_secs_f64().max(1e-9)).clamp(2.0, 16.0)) as u32;
        } else {
            pieces.push(took.as_nanos() as f64 / f64::from(each));
        }
        if Instant::now() >= end && !pieces.is_empty() {
            return Ok(Timing { ns: measure::median(&pieces), times });
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor of an IPv4 socket, closed when dropped.
struct Socket(libc::c_int);

impl Socket {
    fn new(kind: libc::c_int) -> io::Result<Self> {
        // SAFETY: takes numbers.
        check(unsafe { libc::socket(libc::AF_INET, kind | libc::SOCK_CLOEXEC, 0) }).map(Self)
    }

    fn set(&self, call: Call) -> libc::c_int {
        let Call { level, name, value } = call;
        // SAFETY: points to an int.
        unsafe { libc::setsockopt(self.0, level, name, (&raw const value).cast(), 4) }
    }

    fn connect(&self, address: &libc::sockaddr_in) -> io::Result<()> {
        // SAFETY: the address has the length that is passed.
        check(unsafe { libc::connect(self.0, ptr::from_ref(address).cast(), ADDRESS_LEN) }).map(drop)
    }

    fn bind(&self) -> io::Result<libc::sockaddr_in> {
        // SAFETY: zero is valid for each field: any port.
        let mut address: libc::sockaddr_in = unsafe { mem::zeroed() };
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
        let mut len = ADDRESS_LEN;
        // SAFETY: both calls get a valid address and its length.
        unsafe {
            check(libc::bind(self.0, (&raw const address).cast(), len))?;
            check(libc::getsockname(self.0, (&raw mut address).cast(), &raw mut len))?;
        }
        Ok(address)
    }
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: the descriptor has no other owner.
        unsafe { libc::close(self.0) };
    }
}

pub(super) fn set(call: Call, errno: i32, millis: u64) -> io::Result<Timing> {
    let socket = Socket::new(libc::SOCK_STREAM)?;
    let got = if socket.set(call) < 0 { io::Error::last_os_error().raw_os_error().unwrap_or_default() } else { 0 };
    if got != errno {
        return Err(io::Error::other(format!("setsockopt gave errno {got}, expected {errno}")));
    }
    repeat(millis, || {
        socket.set(call);
        Ok(())
    })
}

pub(super) fn get(call: Call, millis: u64) -> io::Result<Timing> {
    let socket = Socket::new(libc::SOCK_STREAM)?;
    check(socket.set(call))?;
    repeat(millis, || {
        let (mut value, mut len) = (0i32, 4);
        // SAFETY: room for an int.
        let result =
            unsafe { libc::getsockopt(socket.0, call.level, call.name, (&raw mut value).cast(), &raw mut len) };
        check(result).map(drop)
    })
}

/// A listening socket.
pub(super) struct Listener {
    socket: Socket,
    address: libc::sockaddr_in,
}

impl Listener {
    pub(super) fn new() -> io::Result<Self> {
        let socket = Socket::new(libc::SOCK_STREAM)?;
        // Accepted sockets inherit this option. They are reset when they are closed, so no port stays in TIME_WAIT,
        // and the connection tables stay small.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let len = size_of_val(&linger) as libc::socklen_t;
        // SAFETY: points to the structure that this option takes.
        unsafe {
            check(libc::setsockopt(socket.0, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len))?;
        }
        let address = socket.bind()?;
        // SAFETY: takes numbers.
        check(unsafe { libc::listen(socket.0, 16) })?;
        Ok(Self { socket, address })
    }

    pub(super) fn connect(&self, own: &[Call], millis: u64) -> io::Result<Timing> {
        repeat(millis, || {
            let client = Socket::new(libc::SOCK_STREAM)?;
            for call in own {
                check(client.set(*call))?;
            }
            client.connect(&self.address)?;
            // SAFETY: no address is requested.
            let accepted =
                unsafe { libc::accept4(self.socket.0, ptr::null_mut(), ptr::null_mut(), libc::SOCK_CLOEXEC) };
            // The accepted socket is closed first, because of the listener's SO_LINGER.
            drop(Socket(check(accepted)?));
            drop(client);
            Ok(())
        })
    }
}

pub(super) fn send(connected: bool, millis: u64) -> io::Result<Timing> {
    let (sender, receiver) = (Socket::new(libc::SOCK_DGRAM)?, Socket::new(libc::SOCK_DGRAM)?);
    let address = receiver.bind()?;
    if connected {
        sender.connect(&address)?;
    }
    let to = if connected { ptr::null() } else { (&raw const address).cast() };
    let to_len = if connected { 0 } else { ADDRESS_LEN };
    let mut byte = [0u8; 64];
    repeat(millis, || {
        // SAFETY: the buffer has the length that is passed, and the address is valid or null.
        let sent = unsafe { libc::sendto(sender.0, byte.as_ptr().cast(), byte.len(), 0, to, to_len) };
        check(sent as libc::c_int)?;
        // SAFETY: the buffer has the length that is passed.
        let got = unsafe { libc::recv(receiver.0, byte.as_mut_ptr().cast(), byte.len(), 0) };
        check(got as libc::c_int).map(drop)
    })
}

/// The sockets and servers of a worker.
#[derive(Default)]
pub(super) struct WorkerState {
    /// By the cgroup in which each was created.
    listeners: BTreeMap<PathBuf, Listener>,
    connections: Vec<(TcpStream, TcpStream)>,
    servers: Vec<Child>,
}

impl WorkerState {
    pub(super) fn has_listener(&self, cgroup: &Path) -> bool {
        self.listeners.contains_key(cgroup)
    }

    pub(super) fn listen(&mut self, cgroup: &Path) -> io::Result<()> {
        self.listeners.insert(cgroup.to_owned(), Listener::new()?);
        Ok(())
    }

    pub(super) fn listener(&self, cgroup: &Path) -> io::Result<&Listener> {
        self.listeners.get(cgroup).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn connect(&mut self, count: usize) -> io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        for _ in 0..count {
            let client = TcpStream::connect(listener.local_addr()?)?;
            self.connections.push((client, listener.accept()?.0));
        }
        Ok(())
    }

    pub(super) fn serve(&mut self, command: &[String], port: u16) -> io::Result<()> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        // SAFETY: only makes a system call.
        unsafe { command.pre_exec(guard::die_with_parent) };
        let mut server = command.spawn()?;
        let takes = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
        let is_there = wait::until(Duration::from_secs(10), || takes() || matches!(server.try_wait(), Ok(Some(_))));
        let ended = server.try_wait()?;
        self.servers.push(server);
        match ended {
            Some(status) => Err(io::Error::other(format!("{program} ended: {status}"))),
            None if is_there => Ok(()),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Drop for WorkerState {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
