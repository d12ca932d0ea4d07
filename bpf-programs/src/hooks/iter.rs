//! iter/tcp: existing TCP sockets, each visited once when the agent reads from the iterator. iter/task_file: which processes
//! have which sockets.
//!
//! The kernel runs the first program for every TCP socket of the iterator's network namespace, and holds the socket's lock
//! meanwhile (`bpf_iter_tcp_seq_show`, net/ipv4/tcp_ipv4.c, 5.15). The agent has decided what to do with a socket: the maps
//! contain it, by the socket's cookie. Sockets without a job are skipped.

use abi::{
    SETTABLE_MAX,
    live::{Assignment, FdEntry, Outcome, state, step},
    setting::{DEVICE_BY_INDEX, word_in},
};
use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_get_socket_cookie, bpf_seq_write, bpf_skc_to_tcp_sock},
};

use crate::{ctx::Socket, kernel, maps};

/// `struct bpf_iter__tcp` (net/ipv4/tcp_ipv4.c).
#[repr(C)]
pub(crate) struct Context {
    meta: *mut c_void,
    /// NULL at the end of the iteration.
    sock_common: *mut c_void,
    uid: u32,
}

/// Continues with the next socket: 1 would repeat this one.
const NEXT: i32 = 0;

// aya-ebpf has no macro for iterators.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub(crate) extern "C" fn sp_iter_tcp(ctx: *mut Context) -> i32 {
    visit(ctx);
    NEXT
}

/// A TCP socket as tracing programs get it.
struct LiveTcp(*mut c_void);

impl Socket for LiveTcp {
    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.0
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        self.0
    }
}

#[inline(always)]
fn visit(ctx: *mut Context) -> Option<()> {
    let control = maps::iter_control();
    // SAFETY: the kernel's context.
    let sock_common = unsafe { core::ptr::read_volatile(&raw const (*ctx).sock_common) };
    if control.step == step::NONE || sock_common.is_null() {
        return None;
    }
    // SAFETY: the context's socket, checked for NULL.
    let job = maps::job(unsafe { bpf_get_socket_cookie(sock_common) }, &control)?;
    // SAFETY: as above. NULL for a connection request, and for a socket in TIME_WAIT.
    let tcp = LiveTcp(unsafe { bpf_skc_to_tcp_sock(sock_common) }.cast());
    if tcp.0.is_null() {
        return None;
    }
    let list = maps::list(job.list)?;
    for position in 0..SETTABLE_MAX {
        if position as u32 >= list.len {
            break;
        }
        let assignment = maps::assignment(list.assignments[position])?;
        let outcome = maps::outcome(job.first + position as u32)?;
        // SAFETY: each outcome belongs to one socket, and one CPU at a time visits that socket.
        let outcome = unsafe { &mut *outcome };
        if control.step == step::READ {
            read_option(&tcp, assignment, outcome);
        } else if outcome.state == state::READ && outcome.errno == 0 {
            set_option(&tcp, assignment, outcome);
        }
    }
    Some(())
}

// The values that are read and the results of the helpers go directly to the map, whose contents the verifier does not track.
// On the stack, each value could differ for every earlier option.

#[inline(always)]
fn read_option(tcp: &LiveTcp, assignment: &Assignment, outcome: &mut Outcome) {
    let key = assignment.key;
    outcome.errno = errno(tcp.get(key.level, key.name, &mut outcome.before, assignment.bytes()));
    outcome.state = state::READ;
}

#[inline(always)]
fn set_option(tcp: &LiveTcp, assignment: &Assignment, outcome: &mut Outcome) {
    let (level, name, len) = (assignment.key.level, assignment.key.name, assignment.bytes());
    outcome.errno = errno(tcp.get(level, name, &mut outcome.after, len));
    let value = assignment.given(&outcome.after);
    // The kernel may tune a buffer of the same size: setting the size turns that off.
    if assignment.is_doubled == 0 && outcome.after == assignment.shown(&value) {
        outcome.state = state::UNCHANGED;
        return;
    }
    let result = if assignment.key == DEVICE_BY_INDEX {
        tcp.set_device(word_in(&value))
    } else {
        tcp.set(level, name, &value, len)
    };
    outcome.errno = errno(result);
    outcome.state = state::SET;
    // The read above succeeded.
    let _ = tcp.get(level, name, &mut outcome.after, len);
}

#[inline(always)]
fn errno(result: Result<(), i32>) -> u32 {
    result.err().unwrap_or(0) as u32
}

/// `struct bpf_iter__task_file` (kernel/bpf/task_iter.c).
#[repr(C)]
pub(crate) struct FileContext {
    meta: *mut Meta,
    task: *mut c_void,
    /// Followed by padding: the kernel aligns pointers to eight bytes.
    descriptor: u32,
    /// NULL at the end of the iteration.
    file: *mut c_void,
}

/// `struct bpf_iter_meta` (include/linux/bpf.h).
#[repr(C)]
struct Meta {
    /// Receives what the agent reads.
    seq: *mut c_void,
    session: u64,
    number: u64,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub(crate) extern "C" fn sp_iter_file(ctx: *mut FileContext) -> i32 {
    emit_fd_entry(ctx);
    NEXT
}

/// Writes one record for each descriptor of a socket. Skips threads with descriptors of their own, as `/proc/PID/fd` does.
#[inline(always)]
fn emit_fd_entry(ctx: *mut FileContext) -> Option<()> {
    // SAFETY: the kernel's context.
    let (task, file) =
        unsafe { (core::ptr::read_volatile(&raw const (*ctx).task), core::ptr::read_volatile(&raw const (*ctx).file)) };
    if task.is_null() || file.is_null() {
        return None;
    }
    let inode = kernel::socket_inode(file as u64)?;
    let process = kernel::process_of(task as u64)?;
    // SAFETY: as above; the kernel's own structure, which is always present.
    let (descriptor, seq) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx).descriptor),
            core::ptr::read_volatile(&raw const (*(*ctx).meta).seq),
        )
    };
    let mut entry = FdEntry { inode, process, descriptor };
    // If there is no room left, the kernel returns the buffer to the reader and runs this program again.
    // SAFETY: reads the bytes of `entry`.
    unsafe { bpf_seq_write(seq.cast(), (&raw mut entry).cast(), size_of::<FdEntry>() as u32) };
    Some(())
}
