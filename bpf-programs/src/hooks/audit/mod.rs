//! The audit: setsockopt and getsockopt calls of the targets' tasks, from entry to exit.
//!
//! Three kinds of hook run the same code, each in a file of its own: [`fentry`], [`kprobe`], [`tracepoint`]. Each passes what
//! it sees of a call in the same form ([`CallEntry`]), and the call's result.
//!
//! Some functions get the socket as an argument ([`Subject::Socket`]): there the socket is certain. The functions around them
//! get a descriptor ([`Subject::Descriptor`]), also one that is no socket. If both run, they share one record, which the
//! outer function creates and removes. Tracepoints get only the descriptor ([`Subject::DescriptorAlone`]).
//!
//! If only conflicts are reported, the cgroup hooks may create the records ([`cgroup_hook`]).
//!
//! The audit changes nothing. It judges only the calls that no other hook sees: those of 32-bit programs, for which the
//! kernel does not run the cgroup hooks, and all calls of a dry run without hooks ([`without_hook`]).
//!
//! Invariant: an event describes one call. If the exit of a call was missed, its record is dropped and counted at the next
//! call of the thread. A socket that the kernel does not hold is read only while the descriptor refers to it.

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
    record::LossesRef,
};

// As in `sockopt`, constants for the verifier.

/// Whether calls are timed.
#[unsafe(no_mangle)]
static TIMING: Global<u8> = Global::new(0);
/// `bpf_get_current_ancestor_cgroup_id` in tracing programs: 5.15 and later.
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

/// The object of a call.
#[derive(Clone, Copy)]
enum Subject {
    /// A `struct socket`, which the kernel holds while the function runs.
    Socket(*const c_void),
    /// A descriptor of the task. Another hook gets the socket.
    Descriptor(i32),
    /// A descriptor of the task. No other hook gets the socket.
    DescriptorAlone(i32),
}

/// A call at its entry.
struct CallEntry {
    /// See [`call`].
    kind: u32,
    /// What the backend knows of how the call was made: bits of [`flags`].
    via: u32,
    subject: Subject,
    key: OptionKey,
    optval: Pointer,
    /// setsockopt: the length of the argument, in the address field. getsockopt: the address of the length.
    optlen: Pointer,
}

/// A call at its exit.
struct CallExit {
    /// See [`event::source`](abi::event::source).
    source: u32,
    result: i64,
    /// What the backend knows about which call this is: its kind, 0 if unknown, and its option.
    kind: u32,
    key: Option<OptionKey>,
}

/// Returns the value of a `bool` argument, or of the bit that tells which memory a `sockptr_t` is in. The other bits of the
/// register are undefined.
#[inline(always)]
fn is_set(argument: u64) -> bool {
    argument & 1 != 0
}

/// Returns the flags for the argument `compat` of a call.
#[inline(always)]
fn via(compat: u64) -> u32 {
    if is_set(compat) { flags::COMPAT } else { 0 }
}

/// The system call numbers of setsockopt and getsockopt. They distinguish the two calls from each other, and from a call by
/// io_uring.
#[cfg(bpf_target_arch = "x86_64")]
const SYSTEM_CALLS: [i64; 2] = [54, 55];
#[cfg(not(bpf_target_arch = "x86_64"))]
const SYSTEM_CALLS: [i64; 2] = [208, 209];

/// Returns the system call number of a kind of call.
#[inline(always)]
fn system_call(kind: u32) -> i64 {
    SYSTEM_CALLS[if kind == call::SETSOCKOPT { 0 } else { 1 }]
}

/// Creates a record of a call that the audit follows.
///
/// If only conflicts are reported, the cgroup hooks decide which calls and arguments matter, if they see the call. They find
/// no conflict in most calls, and most callers are in no target.
#[inline(always)]
fn handle_entry(entry: CallEntry) {
    let Some(config) = maps::config() else { return };
    let thread = bpf_get_current_pid_tgid();
    if let Some(call) = maps::call(thread) {
        if let Subject::Socket(socket) = entry.subject
            && is_inner_of(&entry, call)
        {
            call.sk = kernel::sock_of(socket);
            call.flags |= flags::HELD;
            if entry.via != 0 {
                // The kernel's argument has precedence over our own test, which does not recognise x32.
                call.flags = call.flags & !flags::SYSCALL | entry.via | flags::UNHOOKED;
            }
            return;
        }
        discard_stale(thread, call);
    }
    if config.calls != calls::ALL && !config.may_name(entry.key) {
        return;
    }
    let via = via_of(&entry);
    let is_unhooked = via & flags::COMPAT != 0 || config.audit_judges != 0;
    let is_hooked = config.calls == calls::CONFLICTS && !is_unhooked;
    let is_certain = !is_hooked || TIMING.load() != 0;
    if is_certain && !must_record(config, &entry) {
        return;
    }
    let Some(call) = maps::reserve_call(thread) else {
        // Most callers would not have been reported.
        if is_certain || must_record(config, &entry) {
            count_loss(LossesRef::calls_full);
        }
        return;
    };
    *call = Call {
        key: entry.key,
        kind: entry.kind,
        flags: if is_unhooked { via | flags::UNHOOKED } else { via },
        fd: -1,
        optval: entry.optval.address,
        optlen: entry.optlen.address,
        thread,
        ..Call::default()
    };
    if entry.optval.in_kernel {
        call.flags |= flags::OPTVAL_IN_KERNEL;
    }
    if entry.optlen.in_kernel {
        call.flags |= flags::OPTLEN_IN_KERNEL;
    }
    match entry.subject {
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
    if !is_hooked && entry.kind == call::SETSOCKOPT {
        read_requested(call, entry.optlen.address as i32);
    }
    if TIMING.load() != 0 {
        // SAFETY: has no arguments.
        call.start_ns = unsafe { bpf_ktime_get_ns() };
    }
}

/// Returns whether the audit must record a call. This holds for a call of a task that the audit follows. If the audit judges
/// calls, it also holds for a call on a socket of a target.
#[inline(always)]
fn must_record(config: &Config, entry: &CallEntry) -> bool {
    let is_named = maps::option_number(config.generation, entry.key).is_some();
    let is_followed = (is_named || config.calls == calls::ALL) && followed_slot(config).is_some();
    (is_followed || (is_named && config.audit_judges != 0 && may_be_governed(config, entry.subject)))
        && !kernel::is_exempt(entry.kind == call::GETSOCKOPT)
}

/// Returns whether the socket of a call may belong to a target.
#[inline(always)]
fn may_be_governed(config: &Config, subject: Subject) -> bool {
    match subject {
        Subject::Socket(socket) => kernel::slot_of_sock(config.generation, kernel::sock_of(socket)) != 0,
        Subject::DescriptorAlone(fd) => kernel::slot_of_descriptor(config.generation, fd) != 0,
        Subject::Descriptor(_) => true,
    }
}

/// Returns how a call was made: bits of [`flags`].
#[inline(always)]
fn via_of(entry: &CallEntry) -> u32 {
    match entry.subject {
        _ if entry.via != 0 => entry.via,
        Subject::Socket(_) => kernel::via(system_call(entry.kind)),
        _ => kernel::via_by_descriptor(),
    }
}

/// Returns whether a call that starts with its socket is the call that started with a descriptor.
#[inline(always)]
fn is_inner_of(entry: &CallEntry, outer: &Call) -> bool {
    outer.flags & flags::OUTER != 0
        && outer.sk == 0
        && outer.kind == entry.kind
        && outer.key == entry.key
        && outer.optval == entry.optval.address
        && outer.optlen == entry.optlen.address
        && via_of(entry) & flags::RING == 0
}

/// Records the socket of the current task's call, which the kernel has just found.
#[inline(always)]
fn record_socket(socket: *const c_void, kind: u32, key: OptionKey) {
    let thread = bpf_get_current_pid_tgid();
    let Some(call) = maps::call_matching(thread, kind, key) else { return };
    // For all other calls, the cgroup hook knows the socket.
    if reports_everything() || call.flags & flags::UNHOOKED != 0 {
        call.sk = kernel::sock_of(socket);
        fill_socket(thread);
    }
}

/// Handles the exit of the function that got the socket as an argument.
#[inline(always)]
fn handle_socket_exit(exit: CallExit) {
    let Some((thread, call)) = current_record(&exit) else { return };
    if call.flags & flags::OUTER == 0 {
        finish(thread, call, &exit);
        return;
    }
    // The system call continues, and may release the socket before its exit.
    if should_report(call) {
        complete(thread, call.kind, call.flags, exit.result);
    }
    if let Some(call) = maps::call(thread) {
        call.flags = (call.flags | flags::COMPLETE) & !flags::HELD;
    }
}

/// Handles the exit of the function that started the call.
#[inline(always)]
fn handle_exit(exit: CallExit) {
    let Some((thread, call)) = current_record(&exit) else { return };
    if call.flags & flags::OUTER != 0 {
        // Also if the exit of the function that got the socket was missed.
        call.flags &= !flags::HELD;
    }
    finish(thread, call, &exit);
}

/// Reports a recorded call with its result, and removes the record.
#[inline(always)]
fn finish(thread: u64, call: &Call, exit: &CallExit) {
    let CallExit { source, result, .. } = *exit;
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
    if (reports_everything() || TIMING.load() != 0) && is_counted() {
        maps::tally(&TallyKey { key: call.key, kind: call.kind, _pad: 0 }, result < 0, duration_ns);
    }
    if should_report(call) {
        if call.flags & flags::COMPLETE == 0 {
            complete(thread, call.kind, call.flags, result);
        }
        emit_call(thread, source, result, duration_ns);
    }
    maps::release_call(thread);
}

/// Returns the current thread, and the record of its call.
///
/// The kernel may skip the exit of one call and the entry of the next, which may be in another thread with the same number.
/// The record of the first call is then dropped and counted, if it can be distinguished from the second.
#[inline(always)]
fn current_record(exit: &CallExit) -> Option<(u64, &'static mut Call)> {
    let thread = bpf_get_current_pid_tgid();
    let call = maps::call(thread)?;
    let is_this = (exit.kind == 0 || exit.kind == call.kind) && exit.key.is_none_or(|key| key == call.key);
    if !is_this {
        discard_stale(thread, call);
        return None;
    }
    Some((thread, call))
}

/// Returns whether a thread's record belongs to the system call that exits, as far as this is known (0 or 1).
///
/// From 5.15 on, the arguments come from the registers with which the thread entered the kernel. If two calls have the same
/// address as argument, the memory at that address is compared. After a hook has judged the first call, this is not needed.
/// If the second call reaches a hook, the hook drops the record. If its descriptor is no socket, or it is a read that failed,
/// the result shows that. On a socket of no target, the second call cannot be distinguished from the first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn record_matches_syscall(thread: u64, result: i64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    // The registers are those of a system call, and say nothing about calls that are made in other ways.
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
    (may_be && (!means_no_socket(result) || call.sk == 0 || is_reference_held(call))).into()
}

/// Returns whether the kernel returns a result for a descriptor that is no socket.
#[inline(always)]
fn means_no_socket(result: i64) -> bool {
    const EBADF: i64 = 9;
    const ENOTSOCK: i64 = 88;
    result == -EBADF || result == -ENOTSOCK
}

/// Returns whether the kernel returns a result for an argument that it cannot read.
#[inline(always)]
fn means_unreadable(result: i64) -> bool {
    const EFAULT: i64 = 14;
    result == -EFAULT
}

/// Returns whether the system call of the current task has the arguments of a record.
#[inline(always)]
fn args_match(call: &Call) -> bool {
    let [fd, level, name, optval, optlen] = kernel::arguments();
    // A record that started with the socket has no descriptor.
    (call.fd < 0 || call.fd == fd as i32)
        && call.key == OptionKey { level: level as i32, name: name as i32 }
        && call.optval == optval
        // A length is an int, and the upper bits of its register are undefined.
        && call.optlen as u32 == optlen as u32
}

/// Returns whether the memory of a call's argument still has the value that was read.
#[inline(always)]
fn optval_unchanged(call: &Call) -> bool {
    let was_read = call.requested.len != 0 && call.flags & flags::UNREADABLE == 0;
    if call.kind != call::SETSOCKOPT || !was_read {
        return true;
    }
    read_value(optval(call), call.optlen as i32).is_none_or(|value| value.words == call.requested.words)
}

/// Drops the record of a call whose exit was missed, so that it is not taken for another call.
#[inline(always)]
fn discard_stale(thread: u64, call: &Call) {
    if should_report(call) || TIMING.load() != 0 {
        count_loss(LossesRef::exit_missed);
    }
    maps::release_call(thread);
}

#[inline(always)]
fn should_report(call: &Call) -> bool {
    maps::config().is_none_or(|config| call.should_report(config.calls))
}

/// Adds to the record of a thread's call what can be read at its exit.
#[inline(always)]
fn complete(thread: u64, kind: u32, call_flags: u32, result: i64) {
    // Only the functions that the call needs are called, because each function looks up the record again.
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

/// Returns whether the audit counts a call without a conflict, and reports it if requested. If the audit judges calls, it
/// also has records of tasks that are in no target.
#[inline(always)]
fn is_counted() -> bool {
    maps::config().is_none_or(|config| config.audit_judges == 0 || followed_slot(config).is_some())
}

/// Returns whether calls without a conflict are reported.
#[inline(always)]
fn reports_everything() -> bool {
    maps::config().is_some_and(|config| config.calls != calls::CONFLICTS)
}

// The verifier checks each of the functions below once. As one function, they took half a million steps before 6.3, because
// their branches multiply.

/// Adds to the record of a thread's call the argument, if it could not be read at the entry.
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
        // The page may have been absent at the entry. The kernel has accessed it since.
        read_requested(call, call.optlen as i32);
        if call.flags & flags::UNREADABLE != 0 && !means_unreadable(result) {
            read_part(call);
        }
    }
    // A call whose argument the kernel could not read either has done nothing.
    if call.flags & flags::UNREADABLE != 0 && (reports_everything() || !means_unreadable(result)) {
        count_loss(LossesRef::unreadable);
    }
    0
}

/// Adds to the record of a thread's call what its socket shows, if the socket still exists and was not read before.
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
        read_socket(call);
    }
    0
}

/// Adds to the record of a thread's call what its socket shows. The kernel holds the socket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn fill_socket(thread: u64) -> u32 {
    let Some(call) = maps::call(thread) else { return 0 };
    read_socket(call);
    0
}

#[inline(always)]
fn read_socket(call: &mut Call) {
    call.flags |= flags::VALUES_READ;
    kernel::fill_socket(call, call.sk);
}

/// Adds to the record of a thread's setsockopt call the current value of its socket.
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
    } else if reports_everything() && is_counted() {
        emit::call(head, slot_index_of_task, Task::current(), executable, |record| *record = *call);
    }
    0
}

/// Returns the executable of the current task, after sending its path to the agent.
#[inline(always)]
fn executable() -> Executable {
    let executable = kernel::current_executable();
    if executable.pid != 0 && !maps::is_exe_sent(&executable) {
        emit_exe_path(executable.start_ns, executable.pid, executable.exec_id);
    }
    executable
}

/// Sends the path of the file that the current task runs, for the executable with these numbers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_exe_path(start_ns: u64, pid: u32, exec_id: u32) -> u32 {
    emit::executable_file(&Executable { start_ns, pid, exec_id }, kernel::write_exe_path);
    0
}

/// Returns whether the socket of a call is unchanged: held by the kernel, or by a descriptor. Cookies are unique.
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

/// Returns the slot of the deepest target of the current task; `None` if the audit does not follow the task.
#[inline(always)]
fn followed_slot(config: &Config) -> Option<&'static TargetSlot> {
    slot_of_task(config).map(|(_, slot)| slot)
}

/// Returns the index of that slot too.
#[inline(always)]
fn slot_of_task(config: &Config) -> Option<(u32, &'static TargetSlot)> {
    if config.by_process != 0 && !maps::is_followed_process((bpf_get_current_pid_tgid() >> 32) as u32) {
        return None;
    }
    let place = find_slot(config.generation, config.target_levels).checked_sub(1)?;
    maps::slot_at(config.generation, place).map(|slot| (place, slot))
}

/// Returns the index of the slot of the target for which the audit follows the current task.
#[inline(always)]
fn slot_index_of_task() -> u32 {
    maps::config().and_then(slot_of_task).map_or(0, |(place, _)| place)
}

/// Returns the index of the slot of the deepest target of the current task, plus one; 0 if there is none. `levels` are the
/// levels at which targets are.
///
/// A global function, so that the verifier checks it once.
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

/// Returns the id of the ancestor of the current task's cgroup at a level counted from the root; 0 if there is none.
#[inline(always)]
fn ancestor(level: u32) -> u64 {
    if CAN_SEE_ANCESTORS.load() != 0 {
        // SAFETY: the helper takes a number.
        unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
    } else {
        kernel::ancestor_cgroup(level)
    }
}

/// Returns the address of a call's argument.
#[inline(always)]
fn optval(call: &Call) -> Pointer {
    Pointer { address: call.optval, in_kernel: call.flags & flags::OPTVAL_IN_KERNEL != 0 }
}

/// Reads the value that the application requests.
#[inline(always)]
fn read_requested(call: &mut Call, len: i32) {
    store_requested(call, read_value(optval(call), len));
}

/// Returns whether the kernel can read the part of an argument that it copies for hooks, by the first byte and the last.
#[inline(always)]
fn is_readable(call: &Call) -> bool {
    /// Of a longer argument, the kernel copies no more than this (PAGE_SIZE).
    const COPIED_MAX: i32 = 4096;
    let len = call.optlen as i32;
    let Pointer { address, in_kernel } = optval(call);
    if in_kernel || len <= 0 {
        return true;
    }
    let last = if len < COPIED_MAX { len } else { COPIED_MAX } - 1;
    let mut byte = 0u8;
    let mut can_read = |place: u64| {
        // SAFETY: the helper writes one byte, and checks the address.
        unsafe { bpf_probe_read_user((&raw mut byte).cast(), 1, place as *const c_void) == 0 }
    };
    can_read(address) && can_read(address.wrapping_add(last as u64))
}

/// Reads the available part of an argument whose memory ends before its length. Reads what the kernel's handler reads: a
/// byte, a number of four or eight bytes, or a text up to its NUL.
#[inline(always)]
fn read_part(call: &mut Call) {
    let Pointer { address, in_kernel } = optval(call);
    let len = call.optlen as i32;
    if in_kernel || address == 0 || len <= 0 {
        return;
    }
    let room = if len < TEXT_LEN as i32 { len as u32 } else { TEXT_LEN as u32 };
    let from = address as *const c_void;
    let mut words: Words = [0; 2];
    let mut text: Words = [0; 2];
    // SAFETY: each buffer has room for what is read, and the helpers check the address.
    let (known, text_len) = unsafe {
        let known = if len >= 8 && bpf_probe_read_user((&raw mut words).cast(), 8, from) == 0 {
            8
        } else if len >= 4 && bpf_probe_read_user((&raw mut words).cast(), 4, from) == 0 {
            4
        } else if bpf_probe_read_user((&raw mut words).cast(), 1, from) == 0 {
            1
        } else {
            0
        };
        (known, bpf_probe_read_user_str((&raw mut text).cast(), room, from))
    };
    let (words, known) = if text_len > known { (text, text_len) } else { (words, known) };
    if known > 0 {
        call.requested = Value { known: known as u32, ..Value::new(words, len as u32) };
        call.flags &= !flags::UNREADABLE;
    }
}

/// Reads the value that the application got.
#[inline(always)]
fn read_shown(call: &mut Call) {
    let optlen = Pointer { address: call.optlen, in_kernel: call.flags & flags::OPTLEN_IN_KERNEL != 0 };
    let shown = read_value(optlen, 4).and_then(|len| read_value(optval(call), word_in(&len.words) as i32));
    store_requested(call, shown);
}

#[inline(always)]
fn store_requested(call: &mut Call, value: Option<Value>) {
    match value {
        Some(value) => {
            call.requested = value;
            call.flags &= !flags::UNREADABLE;
        }
        None => call.flags |= flags::UNREADABLE,
    }
}

/// Returns the first bytes of an argument. `None` if they cannot be read.
#[inline(always)]
fn read_value(pointer: Pointer, len: i32) -> Option<Value> {
    if len <= 0 || pointer.address == 0 {
        return Some(Value::UNKNOWN);
    }
    let mut words: Words = [0; 2];
    let read = if len < TEXT_LEN as i32 { len as u32 } else { TEXT_LEN as u32 };
    let from = pointer.address as *const c_void;
    // SAFETY: `words` has room for 16 bytes, and the helpers check the address.
    let ret = unsafe {
        if pointer.in_kernel {
            bpf_probe_read_kernel((&raw mut words).cast(), read, from)
        } else {
            bpf_probe_read_user((&raw mut words).cast(), read, from)
        }
    };
    (ret == 0).then(|| Value::new(words, len as u32))
}
