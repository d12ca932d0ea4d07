//! The kernel functions at which fentry and kprobes see calls.

use super::{AttachVariant, Hooks, Visibility, entry, exit};

/// The programs of a backend for one kind of call.
pub(super) struct Programs {
    /// At the function that gets the socket as an argument, which system calls and io_uring share since 6.7.
    pub(super) entry: &'static str,
    pub(super) exit: &'static str,
    /// At the function of the system call, which gets the descriptor as an argument.
    pub(super) outer_entry: &'static str,
    pub(super) outer_exit: &'static str,
    /// At the LSM hook, which is called after the socket has been found.
    pub(super) security: &'static str,
}

/// The functions for one kind of call.
struct Points {
    socket: &'static str,
    system_call: &'static str,
    security: &'static str,
}

const SET: Points =
    Points { socket: "do_sock_setsockopt", system_call: "__sys_setsockopt", security: "security_socket_setsockopt" };

const GET: Points =
    Points { socket: "do_sock_getsockopt", system_call: "__sys_getsockopt", security: "security_socket_getsockopt" };

/// Returns the variants, from the one that sees most to the one that sees least.
pub(super) const fn variants(set: &Programs, get: &Programs) -> [AttachVariant; 4] {
    [
        AttachVariant {
            set: nested(&SET, set),
            get: nested(&GET, get),
            visibilities: &[Visibility::All],
            not_covered: &[],
        },
        // A call that does not reach this function cannot conflict.
        AttachVariant {
            set: common(&SET, set),
            get: common(&GET, get),
            visibilities: &[Visibility::Exits, Visibility::Conflicts],
            not_covered: &[],
        },
        // Before 6.7, io_uring has no such calls. No kernel is known that has them but lacks the common functions; if there is
        // one, this variant misses these calls.
        AttachVariant {
            set: before_6_7(&SET, set),
            get: before_6_7(&GET, get),
            visibilities: &[Visibility::Exits, Visibility::Conflicts, Visibility::All],
            not_covered: &["io_uring"],
        },
        // For kernels in which the functions of the system calls cannot be found. Calls that fail with EBADF or ENOTSOCK return
        // before there is a socket.
        AttachVariant {
            set: common(&SET, set),
            get: common(&GET, get),
            visibilities: &[Visibility::All],
            not_covered: &["descriptors that are not sockets"],
        },
    ]
}

const fn nested(points: &Points, programs: &Programs) -> Hooks {
    [
        exit(points.system_call, programs.outer_exit),
        exit(points.socket, programs.exit),
        entry(points.socket, programs.entry),
        entry(points.system_call, programs.outer_entry),
    ]
}

const fn common(points: &Points, programs: &Programs) -> Hooks {
    [exit(points.socket, programs.exit), entry(points.socket, programs.entry), None, None]
}

const fn before_6_7(points: &Points, programs: &Programs) -> Hooks {
    [
        exit(points.system_call, programs.outer_exit),
        entry(points.security, programs.security),
        entry(points.system_call, programs.outer_entry),
        None,
    ]
}
