//! Calls through an io_uring (`SOCKET_URING_OP_SETSOCKOPT` and `SOCKET_URING_OP_GETSOCKOPT`, 6.7 and later).

use std::io;

use io_uring::{IoUring, opcode, squeue, types};

use super::{int, print_line, socket};

/// `SOCKET_URING_OP_GETSOCKOPT` (include/uapi/linux/io_uring.h).
const OP_GETSOCKOPT: u32 = 2;

/// How calls are submitted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SubmitMode {
    Plain,
    /// By the kernel's submission-queue thread.
    Polled,
    /// On a registered file.
    Fixed,
    /// By an io-wq worker.
    Async,
    /// By the task itself, when it returns from a setsockopt call after a timeout.
    Deferred,
}

/// Prints the process id, and `CALL LEVEL OPTNAME RESULT VALUE` for each call.
pub(super) fn ring(mode: &str) -> io::Result<()> {
    let mode = match mode {
        "plain" => SubmitMode::Plain,
        "polled" => SubmitMode::Polled,
        "fixed" => SubmitMode::Fixed,
        "async" => SubmitMode::Async,
        "deferred" => SubmitMode::Deferred,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut calls = Calls::new(mode)?;
    print_line(&std::process::id().to_string())?;
    let (tcp, own) = (libc::SOL_TCP, libc::SOL_SOCKET);
    calls.set(tcp, libc::TCP_NODELAY, &int(0))?;
    calls.set(own, libc::SO_KEEPALIVE, &int(1))?;
    calls.set(tcp, libc::TCP_KEEPIDLE, &int(0))?;
    calls.set(tcp, 9999, &int(1))?;
    calls.set(tcp, libc::TCP_CONGESTION, b"reno")?;
    calls.get(own, libc::SO_KEEPALIVE, 4)?;
    calls.get(own, libc::SO_TYPE, 4)?;
    calls.get(own, 9999, 4)?;
    // The value that getsockopt returns to the owner of the socket.
    let mut value = 0;
    super::get_int(calls.socket, tcp, libc::TCP_NODELAY, &mut value)?;
    print_line(&format!("TCP_NODELAY {value}"))
}

struct Calls {
    ring: IoUring,
    socket: i32,
    mode: SubmitMode,
}

impl Calls {
    fn new(mode: SubmitMode) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        if mode == SubmitMode::Polled {
            builder.setup_sqpoll(1000);
        }
        let ring: IoUring = builder.build(4)?;
        let socket = socket()?;
        ring.submitter().register_files(&[socket])?;
        Ok(Self { ring, socket, mode })
    }

    fn set(&mut self, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
        let entry = self.entry(level, name, value.as_ptr().cast(), value.len() as u32);
        let result = self.submit(&entry)?;
        print_line(&format!("setsockopt {level} {name} {result} {}", hex(value)))
    }

    fn get(&mut self, level: i32, name: i32, len: u32) -> io::Result<()> {
        let mut value = vec![0; len as usize];
        let mut entry = self.entry(level, name, value.as_mut_ptr().cast_const().cast(), len);
        // The crate has no such operation. Except for its number, it is like SetSockOpt.
        // SAFETY: an entry is a `struct io_uring_sqe`, which has `cmd_op` at its 8th byte.
        unsafe { (&raw mut entry).cast::<u32>().add(2).write(OP_GETSOCKOPT) };
        let len = self.submit(&entry)?;
        // A successful getsockopt returns the length.
        let shown = value.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        print_line(&format!("getsockopt {level} {name} {} {}", len.min(0), hex(shown)))
    }

    fn entry(&self, level: i32, name: i32, value: *const libc::c_void, len: u32) -> squeue::Entry {
        let (level, name) = (level as u32, name as u32);
        match self.mode {
            SubmitMode::Plain | SubmitMode::Deferred => {
                opcode::SetSockOpt::new(types::Fd(self.socket), level, name, value, len).build()
            }
            SubmitMode::Async => {
                let call = opcode::SetSockOpt::new(types::Fd(self.socket), level, name, value, len);
                call.build().flags(squeue::Flags::ASYNC)
            }
            SubmitMode::Polled | SubmitMode::Fixed => {
                opcode::SetSockOpt::new(types::Fixed(0), level, name, value, len).build()
            }
        }
    }

    fn submit(&mut self, entry: &squeue::Entry) -> io::Result<i32> {
        if self.mode == SubmitMode::Deferred {
            return self.submit_for_later(entry);
        }
        // SAFETY: the memory that the entry points to outlives the wait.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.ring.submit_and_wait(1)?;
        let end = self.ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(end.result())
    }
}

impl Calls {
    /// Submits an entry that a timeout delays, and meanwhile makes setsockopt calls.
    fn submit_for_later(&mut self, entry: &squeue::Entry) -> io::Result<i32> {
        const OWN: u64 = 1;
        let soon = types::Timespec::new().nsec(200_000);
        let timeout = opcode::Timeout::new(&raw const soon).flags(types::TimeoutFlags::ETIME_SUCCESS).build();
        // SAFETY: the memory that the entries point to outlives the wait.
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

/// Formats bytes as events do.
fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "-".to_owned();
    }
    bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}
