//! Calls through an io_uring (`SOCKET_URING_OP_SETSOCKOPT` and `…_GETSOCKOPT`, 6.7 and later), and what came of each.

use std::io;

use io_uring::{IoUring, opcode, squeue, types};

use super::{int, say, socket};

/// `SOCKET_URING_OP_GETSOCKOPT` (include/uapi/linux/io_uring.h).
const OP_GETSOCKOPT: u32 = 2;

/// How calls are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Plain,
    /// By the kernel's thread that looks for entries.
    Polled,
    /// On a registered file.
    Fixed,
    /// By a worker.
    Async,
    /// By the task itself on its way back from a setsockopt call, when a time is up.
    Deferred,
}

/// Says the process's number, and of each call `CALL LEVEL OPTNAME RESULT VALUE`.
pub(super) fn ring(manner: &str) -> io::Result<()> {
    let manner = match manner {
        "plain" => Manner::Plain,
        "polled" => Manner::Polled,
        "fixed" => Manner::Fixed,
        "async" => Manner::Async,
        "deferred" => Manner::Deferred,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut calls = Calls::new(manner)?;
    say(&std::process::id().to_string())?;
    let (tcp, own) = (libc::SOL_TCP, libc::SOL_SOCKET);
    calls.set(tcp, libc::TCP_NODELAY, &int(0))?;
    calls.set(own, libc::SO_KEEPALIVE, &int(1))?;
    calls.set(tcp, libc::TCP_KEEPIDLE, &int(0))?;
    calls.set(tcp, 9999, &int(1))?;
    calls.set(tcp, libc::TCP_CONGESTION, b"reno")?;
    calls.get(own, libc::SO_KEEPALIVE, 4)?;
    calls.get(own, libc::SO_TYPE, 4)?;
    calls.get(own, 9999, 4)?;
    // What the socket's owner is told.
    let mut value = 0;
    super::get_int(calls.socket, tcp, libc::TCP_NODELAY, &mut value)?;
    say(&format!("TCP_NODELAY {value}"))
}

struct Calls {
    ring: IoUring,
    socket: i32,
    manner: Manner,
}

impl Calls {
    fn new(manner: Manner) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        if manner == Manner::Polled {
            builder.setup_sqpoll(1000);
        }
        let ring: IoUring = builder.build(4)?;
        let socket = socket()?;
        ring.submitter().register_files(&[socket])?;
        Ok(Self { ring, socket, manner })
    }

    fn set(&mut self, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
        let entry = self.entry(level, name, value.as_ptr().cast(), value.len() as u32);
        let result = self.submit(&entry)?;
        say(&format!("setsockopt {level} {name} {result} {}", hex(value)))
    }

    fn get(&mut self, level: i32, name: i32, len: u32) -> io::Result<()> {
        let mut value = vec![0; len as usize];
        let mut entry = self.entry(level, name, value.as_mut_ptr().cast_const().cast(), len);
        // The crate has no such operation. In all but its number it is like the other.
        // SAFETY: an entry is a `struct io_uring_sqe`, which has `cmd_op` at its 8th byte.
        unsafe { (&raw mut entry).cast::<u32>().add(2).write(OP_GETSOCKOPT) };
        let len = self.submit(&entry)?;
        // What it gives is the length.
        let shown = value.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        say(&format!("getsockopt {level} {name} {} {}", len.min(0), hex(shown)))
    }

    fn entry(&self, level: i32, name: i32, value: *const libc::c_void, len: u32) -> squeue::Entry {
        let (level, name) = (level as u32, name as u32);
        match self.manner {
            Manner::Plain | Manner::Deferred => {
                opcode::SetSockOpt::new(types::Fd(self.socket), level, name, value, len).build()
            }
            Manner::Async => {
                let call = opcode::SetSockOpt::new(types::Fd(self.socket), level, name, value, len);
                call.build().flags(squeue::Flags::ASYNC)
            }
            Manner::Polled | Manner::Fixed => opcode::SetSockOpt::new(types::Fixed(0), level, name, value, len).build(),
        }
    }

    fn submit(&mut self, entry: &squeue::Entry) -> io::Result<i32> {
        if self.manner == Manner::Deferred {
            return self.submit_for_later(entry);
        }
        // SAFETY: what the entry points to outlives the wait.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.ring.submit_and_wait(1)?;
        let end = self.ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(end.result())
    }
}

impl Calls {
    /// Most of the time until the call is made goes by in setsockopt calls.
    fn submit_for_later(&mut self, entry: &squeue::Entry) -> io::Result<i32> {
        const OWN: u64 = 1;
        let soon = types::Timespec::new().nsec(200_000);
        let timeout = opcode::Timeout::new(&raw const soon).flags(types::TimeoutFlags::ETIME_SUCCESS).build();
        // SAFETY: what the entries point to outlives the wait.
        unsafe {
            self.ring.submission().push_multiple(&[timeout.flags(squeue::Flags::IO_LINK), entry.clone().user_data(OWN)])
        }
        .map_err(io::Error::other)?;
        self.ring.submit()?;
        loop {
            super::set(self.socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &int(1))?;
            if let Some(end) = self.ring.completion().find(|end| end.user_data() == OWN) {
                return Ok(end.result());
            }
        }
    }
}

/// As events have it.
fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "-".to_owned();
    }
    bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}
