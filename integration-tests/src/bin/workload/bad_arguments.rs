//! Calls from many threads, from processes that execute another program, with invalid arguments, and on descriptors
//! that change during the call.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    mem,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::{
    sched::{CloneFlags, clone},
    sys::signal::Signal,
    unistd,
};

use super::{in_child, int, print_line, reap, set, socket};

/// The values of a thread begin at this number times the thread's number plus one.
const STRIDE: u32 = 1 << 16;

fn mark(socket: i32, value: u32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_MARK, &value.to_ne_bytes())
}

/// Starts `threads` threads on one socket and as many on their own sockets. Each thread makes `calls` calls, all with
/// different values, and prints `TID FIRST_VALUE`.
pub(super) fn threads(threads: u32, calls: u32) -> io::Result<()> {
    let shared = socket()?;
    let work = |number: u32| {
        let socket = if number.is_multiple_of(2) { shared } else { socket()? };
        let first = (number + 1) * STRIDE;
        for call in 0..calls {
            mark(socket, first + call)?;
        }
        print_line(&format!("{} {first}", unistd::gettid()))
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..2 * threads).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))))
    })
}

/// Starts `processes` processes. Each one alternates between a TCP_SYNCNT that is refused and one that is accepted,
/// `calls` times each, always from the same memory address.
pub(super) fn pairs(processes: u32, calls: u32, refused: u32) -> io::Result<()> {
    const TAKEN: u32 = 5;
    let work = || {
        let socket = socket()?;
        let mut value = int(0);
        for _ in 0..calls {
            for requested in [refused, TAKEN] {
                value.copy_from_slice(&int(requested as i32));
                let set = set(socket, libc::SOL_TCP, libc::TCP_SYNCNT, &value);
                if set.is_err() != (requested == refused) {
                    return Err(io::Error::other(format!("{requested}: {set:?}")));
                }
            }
        }
        Ok(())
    };
    (0..processes).try_for_each(|_| in_child(work))?;
    (0..processes).try_for_each(|_| reap())
}

/// Starts `children` children with vfork. Each one makes a call, executes `program` and makes another call; the
/// parent makes its own calls in between. Each process prints `PID VALUE` for its calls.
pub(super) fn vfork(program: &str, children: u32) -> io::Result<()> {
    let socket = socket()?;
    let program = CString::new(program)?;
    let word = |word: &str| CString::new(word).map_err(io::Error::other);
    for child in 1..=children {
        let arguments = [program.clone(), word("mark")?, word(&(2 * STRIDE + child).to_string())?];
        let mut stack = vec![0; 64 * 1024];
        let work = Box::new(|| {
            let made = mark(socket, STRIDE + child).is_ok();
            isize::from(!made || unistd::execv(&program, &arguments).is_err())
        });
        // SAFETY: the parent waits until the child has executed another program, or has ended.
        let pid = unsafe {
            clone(work, &mut stack, CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK, Some(Signal::SIGCHLD as i32))
        }?;
        mark(socket, child)?;
        print_line(&format!("{pid} {}\n{} {child}", STRIDE + child, std::process::id()))?;
    }
    (0..children).try_for_each(|_| reap())
}

/// Runs a program with this unused process id (clone3(2), Linux 5.5), and waits for its end.
pub(super) fn run_as(pid: i32, program: &str) -> io::Result<()> {
    let wanted = [pid];
    // SAFETY: zero is valid for each field, and requests the behaviour of fork(2).
    let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.set_tid = wanted.as_ptr().expose_provenance() as u64;
    arguments.set_tid_size = wanted.len() as u64;
    // SAFETY: this process has no other thread, and the arguments outlive the call.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) } {
        ..0 => Err(io::Error::last_os_error()),
        0 => Err(Command::new(program).exec()),
        _ => reap(),
    }
}

/// Makes one call, prints `PID VALUE`, and ends when standard input ends.
pub(super) fn mark_once(value: u32) -> io::Result<()> {
    mark(socket()?, value)?;
    print_line(&format!("{} {value}", std::process::id()))?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

/// Makes calls on a descriptor that another thread alternates between a TCP and a UDP socket. Each kind has an option
/// that the other refuses. Ends after `calls` calls, or later when each call has both succeeded and failed often
/// enough. Prints `LEVEL SUCCEEDED FAILED` for each option.
pub(super) fn race(calls: u32) -> io::Result<()> {
    // SAFETY: takes numbers.
    let (tcp, udp) = (socket()?, unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) });
    let descriptor = unistd::dup(borrowed(tcp))?;
    let is_over = AtomicBool::new(false);
    // By level: the numbers of successful and of failed calls.
    let mut results = [(libc::SOL_TCP, [0; 2]), (libc::SOL_UDP, [0; 2])];
    thread::scope(|scope| {
        let (raw, is_over) = (descriptor.as_raw_fd(), &is_over);
        scope.spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                for socket in [tcp, udp] {
                    // SAFETY: takes numbers; nothing else closes these descriptors.
                    unsafe { libc::dup2(socket, raw) };
                }
            }
        });
        let is_enough =
            |results: &[(i32, [u32; 2])]| results.iter().all(|(_, counts)| counts.iter().all(|count| *count > 50));
        let mut made = 0;
        while made < calls || !is_enough(&results) {
            for (level, counts) in &mut results {
                // TCP_NODELAY and UDP_CORK.
                let result = set(raw, *level, 1, &int(0));
                counts[usize::from(result.is_err())] += 1;
                made += 1;
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    for (level, [succeeded, failed]) in results {
        print_line(&format!("{level} {succeeded} {failed}"))?;
    }
    Ok(())
}

fn borrowed<'fd>(fd: i32) -> std::os::fd::BorrowedFd<'fd> {
    // SAFETY: the sockets stay open until the process ends.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

/// Memory of which only the first pages can be used.
struct Memory {
    start: usize,
    page: usize,
}

impl Memory {
    /// Maps four readable and writable pages and an inaccessible page, followed by unmapped memory.
    fn new() -> io::Result<Self> {
        let page = 4096;
        let (none, anonymous) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: maps new memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), 6 * page, none, anonymous, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: within the new mapping.
        let made = unsafe {
            libc::mprotect(start, 4 * page, libc::PROT_READ | libc::PROT_WRITE)
                | libc::munmap(start.byte_add(5 * page), page)
        };
        if made == 0 { Ok(Self { start: start.expose_provenance(), page }) } else { Err(io::Error::last_os_error()) }
    }

    /// Returns valid and invalid addresses.
    fn addresses(&self) -> [usize; 9] {
        let Self { start, page } = *self;
        let kernel = 0xffff_ffff_8100_0000;
        let not_canonical = 1 << 63;
        let half = start + 4 * page - 2;
        [start, half, start + 4 * page, start + 5 * page, 0, 8, kernel, not_canonical, usize::MAX - 1]
    }

    fn clear(&self) {
        // SAFETY: these pages are mapped, and nothing refers to them.
        unsafe { ptr::with_exposed_provenance_mut::<u8>(self.start).write_bytes(0, 4 * self.page) };
    }
}

/// Options that exist, and options that never will.
const OPTIONS: [(i32, i32); 8] = [
    (libc::SOL_TCP, libc::TCP_NODELAY),
    (libc::SOL_TCP, libc::TCP_CONGESTION),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_IP, libc::IP_TOS),
    (i32::MIN, i32::MAX),
    (i32::MAX, i32::MIN),
    (-1, -1),
];

/// Makes calls with every kind of invalid argument. Prints `CALL LEVEL OPTNAME RESULT` for each.
pub(super) fn faults(kind: &str) -> io::Result<()> {
    match kind {
        "sockets" => on_sockets(),
        "descriptors" => on_descriptors(),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Uses invalid addresses and lengths.
fn on_sockets() -> io::Result<()> {
    const LENGTHS: [i32; 9] = [0, 1, 3, 4, 16, 1 << 20, i32::MAX, -1, i32::MIN];
    let memory = Memory::new()?;
    // SAFETY: takes numbers.
    let unix = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
    for fd in [socket()?, unix] {
        for option in OPTIONS {
            for address in memory.addresses() {
                for len in LENGTHS {
                    memory.clear();
                    set_raw(fd, option, address, len)?;
                    memory.clear();
                    get_raw(fd, option, address, len)?;
                }
                get_at(fd, option, memory.start, address)?;
            }
        }
    }
    Ok(())
}

/// Uses descriptors that are not open, or are not sockets.
fn on_descriptors() -> io::Result<()> {
    let memory = Memory::new()?;
    let (reader, _writer): (OwnedFd, OwnedFd) = unistd::pipe()?;
    let file = File::open("/proc/self/exe")?;
    for fd in [-1, i32::MIN, i32::MAX, 1 << 19, file.as_raw_fd(), reader.as_raw_fd()] {
        for option in OPTIONS {
            set_raw(fd, option, memory.start, 4)?;
            get_raw(fd, option, memory.start, 4)?;
        }
    }
    Ok(())
}

fn set_raw(fd: i32, (level, name): (i32, i32), address: usize, len: i32) -> io::Result<()> {
    let value = ptr::with_exposed_provenance(address);
    // SAFETY: the kernel checks the pointer, and writes nothing.
    let result = unsafe { libc::setsockopt(fd, level, name, value, len as u32) };
    print_result("setsockopt", level, name, result)
}

fn get_raw(fd: i32, option: (i32, i32), address: usize, mut len: i32) -> io::Result<()> {
    get_at(fd, option, address, (&raw mut len).expose_provenance())
}

fn get_at(fd: i32, (level, name): (i32, i32), address: usize, len: usize) -> io::Result<()> {
    let (value, len) = (ptr::with_exposed_provenance_mut(address), ptr::with_exposed_provenance_mut(len));
    // SAFETY: the kernel checks the pointers. It writes to memory that nothing refers to.
    let result = unsafe { libc::getsockopt(fd, level, name, value, len) };
    print_result("getsockopt", level, name, result)
}

fn print_result(call: &str, level: i32, name: i32, result: i32) -> io::Result<()> {
    let errno = if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or_default() } else { 0 };
    print_line(&format!("{call} {level} {name} {}", -errno))
}
