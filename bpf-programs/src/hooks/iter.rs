//! iter/tcp: TCP sockets that are there, each visited once when the agent reads from the iterator. And iter/task_file: who has
//! which sockets.
//!
//! The kernel runs this for every TCP socket of the network namespace in which the iterator was made, and holds the socket's
//! lock meanwhile (`bpf_iter_tcp_seq_show`, net/ipv4/tcp_ipv4.c, 5.15). What is to become of it has been decided: it stands in
//! the maps, by the socket's cookie. Sockets without a job are left alone.

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
    /// NULL at the end.
    sock_common: *mut c_void,
    uid: u32,
}

/// Goes on with the next socket: 1 would ask for this one again.
const NEXT: i32 = 0;

// aya-ebpf has no macro for iterators.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub(crate) extern "C" fn sp_iter_tcp(ctx: *mut Context) -> i32 {
    visit(ctx);
    NEXT
}

/// A TCP socket as tracing programs have it.
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
    let turn = maps::iter_control();
    // SAFETY: the kernel's context.
    let sock_common = unsafe { core::ptr::read_volatile(&raw const (*ctx).sock_common) };
    if turn.step == step::NONE || sock_common.is_null() {
        return None;
    }
    // SAFETY: the context's socket, checked for NULL.
    let job = maps::job(unsafe { bpf_get_socket_cookie(sock_common) }, &turn)?;
    // SAFETY: as above. NULL for a request, and for what is left of a closed socket.
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
        if turn.step == step::READ {
            look(&tcp, assignment, outcome);
        } else if outcome.state == state::LOOKED_AT && outcome.errno == 0 {
            set(&tcp, assignment, outcome);
        }
    }
    Some(())
}

// What is read goes to the map at once, and so does what the helpers return: the verifier follows neither. On the stack each
// could be another for every option before this one.

#[inline(always)]
fn look(tcp: &LiveTcp, assignment: &Assignment, outcome: &mut Outcome) {
    let key = assignment.key;
    outcome.errno = errno(tcp.get(key.level, key.name, &mut outcome.before, assignment.bytes()));
    outcome.state = state::LOOKED_AT;
}

#[inline(always)]
fn set(tcp: &LiveTcp, assignment: &Assignment, outcome: &mut Outcome) {
    let (level, name, len) = (assignment.key.level, assignment.key.name, assignment.bytes());
    outcome.errno = errno(tcp.get(level, name, &mut outcome.after, len));
    let given = assignment.given(&outcome.after);
    // A buffer of the same size may be one that the kernel tunes: setting it turns that off.
    if assignment.is_doubled == 0 && outcome.after == assignment.shown(&given) {
        outcome.state = state::UNCHANGED;
        return;
    }
    let result = if assignment.key == DEVICE_BY_INDEX {
        tcp.set_device(word_in(&given))
    } else {
        tcp.set(level, name, &given, len)
    };
    outcome.errno = errno(result);
    outcome.state = state::SET;
    // It could be read a moment ago.
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
    /// Pointers begin at multiples of eight bytes.
    descriptor: u32,
    /// NULL at the end.
    file: *mut c_void,
}

/// `struct bpf_iter_meta` (include/linux/bpf.h).
#[repr(C)]
struct Meta {
    /// Takes what the agent reads.
    seq: *mut c_void,
    session: u64,
    number: u64,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub(crate) extern "C" fn sp_iter_file(ctx: *mut FileContext) -> i32 {
    tell_holder(ctx);
    NEXT
}

/// Threads that have descriptors of their own are left out, as they are in `/proc/PID/fd`.
#[inline(always)]
fn tell_holder(ctx: *mut FileContext) -> Option<()> {
    // SAFETY: the kernel's context.
    let (task, file) =
        unsafe { (core::ptr::read_volatile(&raw const (*ctx).task), core::ptr::read_volatile(&raw const (*ctx).file)) };
    if task.is_null() || file.is_null() {
        return None;
    }
    let inode = kernel::socket_inode(file as u64)?;
    let process = kernel::process_of(task as u64)?;
    // SAFETY: as above; the kernel's own structure, which is always there.
    let (descriptor, seq) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx).descriptor),
            core::ptr::read_volatile(&raw const (*(*ctx).meta).seq),
        )
    };
    let mut held = FdEntry { inode, process, descriptor };
    // Where there is no room left, the kernel has it read, and comes by again.
    // SAFETY: reads the bytes of `held`.
    unsafe { bpf_seq_write(seq.cast(), (&raw mut held).cast(), size_of::<FdEntry>() as u32) };
    Some(())
}
