//! The kernel's functions at which fentry and kprobes see calls. They are looked up, and taken where they are.

use super::{AttachVariant, Hooks, Visibility, entry, exit};

/// The programs of a backend, for calls of one kind.
pub(super) struct Programs {
    /// At the function that is handed the socket, which system calls and io_uring have in common since 6.7.
    pub(super) entry: &'static str,
    pub(super) exit: &'static str,
    /// At the function of the system call, which is handed a descriptor.
    pub(super) outer_entry: &'static str,
    pub(super) outer_exit: &'static str,
    /// Where the security modules are asked: the socket has just been found.
    pub(super) found: &'static str,
}

/// The functions for calls of one kind.
struct Points {
    socket: &'static str,
    system_call: &'static str,
    security: &'static str,
}

const SET: Points =
    Points { socket: "do_sock_setsockopt", system_call: "__sys_setsockopt", security: "security_socket_setsockopt" };

const GET: Points =
    Points { socket: "do_sock_getsockopt", system_call: "__sys_getsockopt", security: "security_socket_getsockopt" };

/// From the one that lets see most to the one that lets see least.
pub(super) const fn variants(set: &Programs, get: &Programs) -> [AttachVariant; 4] {
    [
        AttachVariant { set: nested(&SET, set), get: nested(&GET, get), spans: &[Visibility::All], not_covered: &[] },
        // No call conflicts with anything that does not come as far as this.
        AttachVariant {
            set: common(&SET, set),
            get: common(&GET, get),
            spans: &[Visibility::Ends, Visibility::Conflicts],
            not_covered: &[],
        },
        // Before 6.7 io_uring has no such calls. A kernel that has them but not the common functions is not known; if
        // there is one, this is true of it.
        AttachVariant {
            set: before(&SET, set),
            get: before(&GET, get),
            spans: &[Visibility::Ends, Visibility::Conflicts, Visibility::All],
            not_covered: &["io_uring"],
        },
        // For kernels in which the functions of the system calls cannot be looked up. Calls that fail with EBADF or ENOTSOCK
        // are over before there is a socket.
        AttachVariant {
            set: common(&SET, set),
            get: common(&GET, get),
            spans: &[Visibility::All],
            not_covered: &["descriptors that are no sockets"],
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

const fn before(points: &Points, programs: &Programs) -> Hooks {
    [
        exit(points.system_call, programs.outer_exit),
        entry(points.security, programs.found),
        entry(points.system_call, programs.outer_entry),
        None,
    ]
}
