//! The audit: setsockopt and getsockopt calls of the targets' tasks, from entry to exit.
//!
//! Three kinds of hook run the same code, each in a file of its own: [`fentry`], [`kprobe`], [`tracepoint`].
//! Each hands over what it sees of a call in the same form ([`CallEntry`]), and its result.
//!
//! A call is seen where the kernel has its socket in hand ([`Subject::Socket`]): there its socket is certain. Around
//! that, it is seen by the number of a descriptor ([`Subject::Descriptor`]), also where that stands for no socket. Where
//! both are seen they make one record, which the outer begins and ends. Tracepoints have the number alone
//! ([`Subject::DescriptorAlone`]).
//!
//! Where only conflicts are reported, the beginning of a call may be left to the cgroup's hooks ([`hooked`]).
//!
//! The audit changes nothing. It decides only what no other hook gets to see: the calls of 32-bit programs,
//! for which the kernel does not run the cgroup hooks.
//!
//! Invariant: what is reported of a call is of that call. The record of one whose end was not seen is dropped and counted
//! when its thread is seen in another, and a socket that the kernel does not hold is looked at only while the descriptor
//! stands for it.

pub(super) mod cgroup_hook;
mod fentry;
mod kprobe;
mod tracepoint;
mod without_hook;

use abi::{
    Config, TargetSlot, calls,
    event::{Call, Executable, TallyKey, call, flags},
    setting::{OptionKey, TEXT_LEN, Value, Words, word_in},
};
use aya_ebpf::{
    Global,
    cty::c_void,
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{
            bpf_get_current_ancestor_cgroup_id, bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_probe_read_user,
            bpf_probe_read_user_str,
        },
    },
};

use self::cgroup_hook::CAN_BEGIN_CALLS;
use crate::{
    emit::{self, Head, Task},
    kernel,
    maps::{self, count_loss},
};

// As in `calls`, constants to the verifier.

/// Whether calls are timed.
#[unsafe(no_mangle)]
static TIMING: Global<u8> = Global::new(0);
/// `bpf_get_current_ancestor_cgroup_id` in programs like these: 5.15 and later.
#[unsafe(no_mangle)]
static CAN_SEE_ANCESTORS: Global<u8> = Global::new(0);

/// An address, in the memory of the caller or of the kernel (`sockptr_t`).
#[derive(Clone, Copy)]
struct Pointer {
    address: u64,
    in_kernel: bool,
}

impl Pointer {
    fn user(address: u64) -> Self {
        Self { address, in_kernel: false }
    }
}

/// What a call is about.
#[derive(Clone, Copy)]
enum Subject {
    /// A `struct socket`, held by the kernel for as long as the function runs.
    Socket(*const c_void),
    /// A descriptor of the task's. Another hook is handed the socket.
    Descriptor(i32),
    /// A descriptor of the task's, and no more will be known.
    DescriptorAlone(i32),
}

/// A call as it begins.
struct CallEntry {
    /// See [`call`].
    kind: u32,
    /// What the backend knows of how the call was made: bits of [`flags`].
    via: u32,
    subject: Subject,
    key: OptionKey,
    optval: Pointer,
    /// setsockopt: the length of the argument, as an address of no memory; getsockopt: the address of it.
    optlen: Pointer,
}

/// A call as it ends.
struct CallExit {
    /// See [`event::source`](abi::event::source).
    source: u32,
    result: i64,
    /// What the backend knows of which call it is: its kind, 0 if not known, and its option.
    kind: u32,
    key: Option<OptionKey>,
}

/// A `bool` among arguments, or the bit that says of which memory a `sockptr_t` is; what is beside it means nothing.
#[inline(always)]
fn is_set(argument: u64) -> bool {
    argument & 1 != 0
}

/// What the argument `compat` tells of how a call was made.
#[inline(always)]
fn via(compat: u64) -> u32 {
    if is_set(compat) { flags::COMPAT } else { 0 }
}

/// The numbers of setsockopt and getsockopt: by these they are told from one another, and from a call made through io_uring.
#[cfg(bpf_target_arch = "x86_64")]
const SYSTEM_CALLS: [i64; 2] = [54, 55];
#[cfg(not(bpf_target_arch = "x86_64"))]
const SYSTEM_CALLS: [i64; 2] = [208, 209];

/// The number of the system call of a kind.
#[inline(always)]
fn system_call(kind: u32) -> i64 {
    SYSTEM_CALLS[if kind == call::SETSOCKOPT { 0 } else { 1 }]
}

/// Notes a call that the audit is to follow.
///
/// Where only conflicts are reported, whose call it is and what it asks for is left to the cgroup's hooks, if there are any to
/// see it: in most calls they find no conflict, and most callers are in no target.
#[inline(always)]
fn begin(begun: CallEntry) {
    let Some(config) = maps::config() else { return };
    let thread = bpf_get_current_pid_tgid();
    if let Some(call) = maps::call(thread) {
        if let Subject::Socket(socket) = begun.subject
            && is_within(&begun, call)
        {
            call.sk = kernel::sock_of(socket);
            call.flags |= flags::HELD;
            if begun.via != 0 {
                // The kernel's word against ours, which does not know x32.
                call.flags = call.flags & !flags::SYSCALL | begun.via | flags::UNHOOKED;
            }
            return;
        }
        discard_stale(thread, call);
    }
    if config.calls != calls::ALL && !config.may_name(begun.key) {
        return;
    }
    let via = via_of(&begun);
    let is_unhooked = via & flags::COMPAT != 0 || config.audit_judges != 0;
    let is_hooked = config.calls == calls::CONFLICTS && !is_unhooked;
    let is_certain = !is_hooked || TIMING.load() != 0;
    if is_certain && !is_wanted(config, &begun) {
        return;
    }
    let Some(call) = maps::begin_call(thread) else {
        // Of most callers nothing would have been told.
        if is_certain || is_wanted(config, &begun) {
            count_loss(|losses| &mut losses.calls_full);
        }
        return;
    };
    *call = Call {
        key: begun.key,
        kind: begun.kind,
        flags: if is_unhooked { via | flags::UNHOOKED } else { via },
        fd: -1,
        optval: begun.optval.address,
        optlen: begun.optlen.address,
        thread,
        ..Call::default()
    };
    if begun.optval.in_kernel {
        call.flags |= flags::OPTVAL_IN_KERNEL;
    }
    if begun.optlen.in_kernel {
        call.flags |= flags::OPTLEN_IN_KERNEL;
    }
    match begun.subject {
        Subject::Socket(socket) => {
            call.sk = kernel::sock_of(socket);
            call.flags |= flags::HELD;
        }
        Subject::Descriptor(fd) => {
            call.fd = fd;
            call.flags |= flags::OUTER;
        }
        Subject::DescriptorAlone(fd) => {
            call.fd = fd;
            if !is_hooked {
                call.file = kernel::file_of_descriptor(fd);
            }
        }
    }
    if !is_hooked && begun.kind == call::SETSOCKOPT {
        read_requested(call, begun.optlen.address as i32);
    }
    if TIMING.load() != 0 {
        // SAFETY: has no arguments.
        call.start_ns = unsafe { bpf_ktime_get_ns() };
    }
}

/// Whether there is anything to do about a call: one of a task that the audit follows, or, where the audit judges, one on a socket
/// of a target.
#[inline(always)]
fn is_wanted(config: &Config, begun: &CallEntry) -> bool {
    let is_named = maps::option_number(config.generation, begun.key).is_some();
    let is_followed = (is_named || config.calls == calls::ALL) && followed(config).is_some();
    (is_followed || (is_named && config.audit_judges != 0 && may_be_governed(config, begun.subject)))
        && !kernel::is_agent(config)
}

/// Whether the socket of a call may be one of a target's.
#[inline(always)]
fn may_be_governed(config: &Config, subject: Subject) -> bool {
    match subject {
        Subject::Socket(socket) => kernel::place_of_sock(config.generation, kernel::sock_of(socket)) != 0,
        Subject::DescriptorAlone(fd) => kernel::place_of_descriptor(config.generation, fd) != 0,
        Subject::Descriptor(_) => true,
    }
}

/// How a call was made: bits of [`flags`].
#[inline(always)]
fn via_of(begun: &CallEntry) -> u32 {
    match begun.subject {
        _ if begun.via != 0 => begun.via,
        Subject::Socket(_) => kernel::via(system_call(begun.kind)),
        _ => kernel::via_by_descriptor(),
    }
}

/// Whether a call that begins with its socket is the one that began with a descriptor.
#[inline(always)]
fn is_within(begun: &CallEntry, outer: &Call) -> bool {
    outer.flags & flags::OUTER != 0
        && outer.sk == 0
        && outer.kind == begun.kind
        && outer.key == begun.key
        && outer.optval == begun.optval.address
        && outer.optlen == begun.optlen.address
        && via_of(begun) & flags::RING == 0
}

/// Notes the socket of the call that the current task is in, which the kernel has just found.
#[inline(always)]
fn record_socket(socket: *const c_void, kind: u32, key: OptionKey) {
    let thread = bpf_get_current_pid_tgid();
    let Some(call) = maps::call_of(thread, kind, key) else { return };
    // The cgroup hook knows the sockets of the others.
    if reports_everything() || call.flags & flags::UNHOOKED != 0 {
        call.sk = kernel::sock_of(socket);
        fill_socket(thread);
    }
}

/// The end of the function that was handed the socket.
#[inline(always)]
fn end_with_socket(ended: CallExit) {
    let Some((thread, call)) = current_record(&ended) else { return };
    if call.flags & flags::OUTER == 0 {
        finish(thread, call, &ended);
        return;
    }
    // The system call goes on to its end, and may let go of the socket before that.
    if should_report(call) {
        complete(thread, call.kind, call.flags, ended.result);
    }
    if let Some(call) = maps::call(thread) {
        call.flags = (call.flags | flags::COMPLETE) & !flags::HELD;
    }
}

/// The end of the function that a call began with.
#[inline(always)]
fn end(ended: CallExit) {
    let Some((thread, call)) = current_record(&ended) else { return };
    if call.flags & flags::OUTER != 0 {
        // Also where the end of the function that was handed it was not seen.
        call.flags &= !flags::HELD;
    }
    finish(thread, call, &ended);
}

/// Reports a call that `begin` noted, now that its result is known.
#[inline(always)]
fn finish(thread: u64, call: &Call, ended: &CallExit) {
    let CallExit { source, result, .. } = *ended;
    if (should_report(call) || TIMING.load() != 0) && record_matches_syscall(thread, result) == 0 {
        discard_stale(thread, call);
        return;
    }
    let duration_ns = if TIMING.load() != 0 && call.start_ns != 0 {
        // SAFETY: has no arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        now.wrapping_sub(call.start_ns)
    } else {
        0
    };
    if (reports_everything() || TIMING.load() != 0) && is_told_of() {
        maps::tally(&TallyKey { key: call.key, kind: call.kind, _pad: 0 }, result < 0, duration_ns);
    }
    if should_report(call) {
        if call.flags & flags::COMPLETE == 0 {
            complete(thread, call.kind, call.flags, result);
        }
        emit_call(thread, source, result, duration_ns);
    }
    maps::end_call(thread);
}

/// The current thread, and the record of the call that it is in.
///
/// The kernel may have left out the end of one call and the beginning of the next, which may be that of another thread with the
/// same number. The record of the former is then dropped and counted, as far as it can be told from the latter.
#[inline(always)]
fn current_record(ended: &CallExit) -> Option<(u64, &'static mut Call)> {
    let thread = bpf_get_current_pid_tgid();
    let call = maps::call(thread)?;
    let is_this = (ended.kind == 0 || ended.kind == call.kind) && ended.key.is_none_or(|key| key == call.key);
    if !is_this {
        discard_stale(thread, call);
        return None;
    }
    Some((thread, call))
}

/// Whether a thread's record is of the system call that it is at the end of, as far as that can be told: 1 or 0.
///
/// What was given is known by the registers with which the thread came into the kernel, from 5.15 on. Of two calls that were given
/// the same place in memory, what stands there tells. Where a hook has decided about the first it need not: if the second comes to
/// a hook, that drops the record; and if its descriptor stands for no socket, or it is a read that failed, the result says so. On a
/// socket of no target it is not told from the first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn record_matches_syscall(thread: u64, result: i64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    // Of calls that are made in other ways these registers tell nothing.
    if CAN_BEGIN_CALLS.load() == 0 || call.flags & flags::SYSCALL == 0 {
        return 1;
    }
    if !args_match(call) {
        return 0;
    }
    let may_be = if call.flags & flags::DECIDED == 0 {
        optval_unchanged(call)
    } else {
        call.kind == call::SETSOCKOPT || result >= 0
    };
    (may_be && (!is_of_no_socket(result) || call.sk == 0 || is_reference_held(call))).into()
}

/// Whether a result is what the kernel says of a descriptor that stands for no socket.
#[inline(always)]
fn is_of_no_socket(result: i64) -> bool {
    const EBADF: i64 = 9;
    const ENOTSOCK: i64 = 88;
    result == -EBADF || result == -ENOTSOCK
}

/// Whether a result is what the kernel says of an argument that it cannot read.
#[inline(always)]
fn is_of_no_argument(result: i64) -> bool {
    const EFAULT: i64 = 14;
    result == -EFAULT
}

/// Whether the system call that the current task is in was given what that of a record was.
#[inline(always)]
fn args_match(call: &Call) -> bool {
    let [fd, level, name, optval, optlen] = kernel::arguments();
    // A record that came with the socket has no descriptor.
    (call.fd < 0 || call.fd == fd as i32)
        && call.key == OptionKey { level: level as i32, name: name as i32 }
        && call.optval == optval
        // A length is an int, and what a register has beside it means nothing.
        && call.optlen as u32 == optlen as u32
}

/// Whether what a call asks for stands where it was read.
#[inline(always)]
fn optval_unchanged(call: &Call) -> bool {
    let was_read = call.requested.len != 0 && call.flags & flags::UNREADABLE == 0;
    if call.kind != call::SETSOCKOPT || !was_read {
        return true;
    }
    read_value(optval(call), call.optlen as i32).is_none_or(|asks| asks.words == call.requested.words)
}

/// Drops the record of a call whose end was not seen: it must not be taken for another's.
#[inline(always)]
fn discard_stale(thread: u64, call: &Call) {
    if should_report(call) || TIMING.load() != 0 {
        count_loss(|losses| &mut losses.exit_missed);
    }
    maps::end_call(thread);
}

#[inline(always)]
fn should_report(call: &Call) -> bool {
    maps::config().is_none_or(|config| call.should_report(config.calls))
}

/// Adds to the record of a thread's call what can be read now that it is over.
#[inline(always)]
fn complete(thread: u64, kind: u32, call_flags: u32, result: i64) {
    // What most calls do not need is not called for: each function looks for the record anew.
    if kind == call::GETSOCKOPT || call_flags & flags::UNREADABLE != 0 {
        complete_argument(thread, result);
    }
    complete_socket(thread);
    if kind == call::SETSOCKOPT {
        complete_value(thread);
    }
    if call_flags & (flags::DECIDED | flags::UNHOOKED) == flags::UNHOOKED {
        without_hook::judge_by_rows(thread, result);
    }
}

/// Whether the audit counts, and reports if that is wanted, a call that conflicts with nothing. Where it judges, it also has
/// records of calls of tasks that are in no target.
#[inline(always)]
fn is_told_of() -> bool {
    maps::config().is_none_or(|config| config.audit_judges == 0 || followed(config).is_some())
}

/// Whether calls are reported that conflict with nothing.
#[inline(always)]
fn reports_everything() -> bool {
    maps::config().is_some_and(|config| config.calls != calls::CONFLICTS)
}

// The verifier checks each of the functions below once and on its own. In one piece they took kernels before 6.3 half a
// million steps, for their branches multiply.

/// Adds to the record of a thread's call what could not be read of its argument before.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn complete_argument(thread: u64, result: i64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    if call.flags & flags::DECIDED != 0 {
        return 0;
    }
    if call.kind == call::GETSOCKOPT && result == 0 {
        read_shown(call);
    } else if call.flags & flags::UNREADABLE != 0 {
        // At the entry the page may not have been there. The kernel has looked at it since.
        read_requested(call, call.optlen as i32);
        if call.flags & flags::UNREADABLE != 0 && !is_of_no_argument(result) {
            read_part(call);
        }
    }
    // A call that the kernel could not read either has done nothing.
    if call.flags & flags::UNREADABLE != 0 && (reports_everything() || !is_of_no_argument(result)) {
        count_loss(|losses| &mut losses.unreadable);
    }
    0
}

/// Adds to the record of a thread's call what its socket says of itself, if that is still there and was not asked before.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn complete_socket(thread: u64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    if call.flags & flags::VALUES_READ != 0 || !is_reference_held(call) {
        return 0;
    }
    if call.sk == 0 {
        call.sk = kernel::sock_of_file(call.file);
    }
    if call.sk != 0 {
        look_at_socket(call);
    }
    0
}

/// Adds to the record of a thread's call what its socket says of itself. The kernel holds the socket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn fill_socket(thread: u64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    look_at_socket(call);
    0
}

#[inline(always)]
fn look_at_socket(call: &mut Call) {
    call.flags |= flags::VALUES_READ;
    kernel::describe(call, call.sk);
}

/// Adds to the record of a thread's setsockopt call the value that its socket has now.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn complete_value(thread: u64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    if call.flags & flags::VALUES_READ != 0
        && let Some(member) = maps::member(call.key)
        && is_reference_held(call)
        && let Some(now) = kernel::value_of(call.sk, call, member)
    {
        call.current = now;
        call.flags |= flags::VALUE_CURRENT;
    }
    0
}

/// Reports the call that a thread is in.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_call(thread: u64, source: u32, result: i64, duration_ns: u64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    let head = Head { key: call.key, call: call.kind, source, result, duration_ns };
    if emit::is_conflict(call) {
        let (setting, verdict, place) = (call.setting, call.verdict, call.place);
        emit::conflict(head, setting, verdict, place, Task::current(), executable, |record| *record = *call);
    } else if reports_everything() && is_told_of() {
        emit::call(head, slot_of_task_at, Task::current(), executable, |record| *record = *call);
    }
    0
}

/// The executable that the current task runs, of which the agent is told what file it is.
#[inline(always)]
fn executable() -> Executable {
    let executable = kernel::current_executable();
    if executable.pid != 0 && !maps::is_exe_sent(&executable) {
        emit_exe_path(executable.start_ns, executable.pid, executable.exec_id);
    }
    executable
}

/// Tells which file the current task runs, for the executable that these numbers make up.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_exe_path(start_ns: u64, pid: u32, exec_id: u32) -> u32 {
    emit::executable_file(&Executable { start_ns, pid, exec_id }, kernel::name_executable);
    0
}

/// Whether the socket of a call is still what it was: held by the kernel, or by a descriptor. Cookies are given once.
#[inline(always)]
fn is_reference_held(call: &Call) -> bool {
    if call.flags & flags::HELD != 0 {
        return true;
    }
    let file = kernel::file_of_descriptor(call.fd);
    let is_same =
        if call.file != 0 { file == call.file } else { call.sk != 0 && kernel::sock_of_file(file) == call.sk };
    is_same && (call.sk == 0 || call.cookie == 0 || kernel::cookie_of(call.sk) == call.cookie)
}

/// What holds on the deepest target that the current task is in; `None` where it is not one of those that the audit is
/// about.
#[inline(always)]
fn followed(config: &Config) -> Option<&'static TargetSlot> {
    slot_of_task(config).map(|(_, place)| place)
}

/// The same, behind the place.
#[inline(always)]
fn slot_of_task(config: &Config) -> Option<(u32, &'static TargetSlot)> {
    if config.by_process != 0 && !maps::is_process((bpf_get_current_pid_tgid() >> 32) as u32) {
        return None;
    }
    let place = find_slot(config.generation, config.target_levels).checked_sub(1)?;
    maps::slot_at(config.generation, place).map(|holds| (place, holds))
}

/// The place of the target that the audit follows the current task for.
#[inline(always)]
fn slot_of_task_at() -> u32 {
    maps::config().and_then(slot_of_task).map_or(0, |(place, _)| place)
}

/// The place of the deepest target that the current task is in, plus one; 0 where there is none. `levels` are those that
/// targets are at.
///
/// The verifier checks it once and on its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_slot(generation: u32, levels: u64) -> u32 {
    let mut place = 0;
    for level in 0..=abi::CGROUP_LEVELS_MAX {
        let left = levels >> level;
        if left == 0 {
            break;
        }
        if left & 1 != 0
            && let Some(deeper) = maps::cgroup_slot(generation, ancestor(level))
        {
            place = deeper + 1;
        }
    }
    place
}

/// The id of the cgroup above the current task's at a level counted from the root; 0 where there is none.
#[inline(always)]
fn ancestor(level: u32) -> u64 {
    if CAN_SEE_ANCESTORS.load() != 0 {
        // SAFETY: takes a number.
        unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
    } else {
        kernel::ancestor_cgroup(level)
    }
}

/// The argument of a call.
#[inline(always)]
fn optval(call: &Call) -> Pointer {
    Pointer { address: call.optval, in_kernel: call.flags & flags::OPTVAL_IN_KERNEL != 0 }
}

/// Reads what the application asks for.
#[inline(always)]
fn read_requested(call: &mut Call, len: i32) {
    record_requested(call, read_value(optval(call), len));
}

/// Whether all of an argument can be read that the kernel copies for hooks, by its first byte and its last.
#[inline(always)]
fn is_whole(call: &Call) -> bool {
    /// Of a longer argument the kernel copies no more (PAGE_SIZE).
    const COPIED_MAX: i32 = 4096;
    let len = call.optlen as i32;
    let Pointer { address, in_kernel } = optval(call);
    if in_kernel || len <= 0 {
        return true;
    }
    let last = if len < COPIED_MAX { len } else { COPIED_MAX } - 1;
    let mut byte = 0u8;
    let mut can_read = |place: u64| {
        // SAFETY: writes one byte, and the helper checks the address.
        unsafe { bpf_probe_read_user((&raw mut byte).cast(), 1, place as *const c_void) == 0 }
    };
    can_read(address) && can_read(address.wrapping_add(last as u64))
}

/// Reads what there is of an argument that ends before its length says, as far as the kernel's handler reads it: a byte, a number
/// of four bytes or eight, or a text up to its NUL.
#[inline(always)]
fn read_part(call: &mut Call) {
    let Pointer { address, in_kernel } = optval(call);
    let len = call.optlen as i32;
    if in_kernel || address == 0 || len <= 0 {
        return;
    }
    let room = if len < TEXT_LEN as i32 { len as u32 } else { TEXT_LEN as u32 };
    let place = address as *const c_void;
    let mut words: Words = [0; 2];
    let mut text: Words = [0; 2];
    // SAFETY: each has room for what is read, and the helpers check the address.
    let (known, text_len) = unsafe {
        let known = if len >= 8 && bpf_probe_read_user((&raw mut words).cast(), 8, place) == 0 {
            8
        } else if len >= 4 && bpf_probe_read_user((&raw mut words).cast(), 4, place) == 0 {
            4
        } else if bpf_probe_read_user((&raw mut words).cast(), 1, place) == 0 {
            1
        } else {
            0
        };
        (known, bpf_probe_read_user_str((&raw mut text).cast(), room, place))
    };
    let (words, known) = if text_len > known { (text, text_len) } else { (words, known) };
    if known > 0 {
        call.requested = Value { known: known as u32, ..Value::new(words, len as u32) };
        call.flags &= !flags::UNREADABLE;
    }
}

/// Reads what the application was shown.
#[inline(always)]
fn read_shown(call: &mut Call) {
    let optlen = Pointer { address: call.optlen, in_kernel: call.flags & flags::OPTLEN_IN_KERNEL != 0 };
    let shown = read_value(optlen, 4).and_then(|len| read_value(optval(call), word_in(&len.words) as i32));
    record_requested(call, shown);
}

#[inline(always)]
fn record_requested(call: &mut Call, value: Option<Value>) {
    match value {
        Some(value) => {
            call.requested = value;
            call.flags &= !flags::UNREADABLE;
        }
        None => call.flags |= flags::UNREADABLE,
    }
}

/// The first bytes of an argument. `None` where they cannot be read.
#[inline(always)]
fn read_value(pointer: Pointer, len: i32) -> Option<Value> {
    if len <= 0 || pointer.address == 0 {
        return Some(Value::UNKNOWN);
    }
    let mut words: Words = [0; 2];
    let read = if len < TEXT_LEN as i32 { len as u32 } else { TEXT_LEN as u32 };
    let place = pointer.address as *const c_void;
    // SAFETY: `words` has room for 16 bytes, and the helpers check the address.
    let ret = unsafe {
        if pointer.in_kernel {
            bpf_probe_read_kernel((&raw mut words).cast(), read, place)
        } else {
            bpf_probe_read_user((&raw mut words).cast(), read, place)
        }
    };
    (ret == 0).then(|| Value::new(words, len as u32))
}
