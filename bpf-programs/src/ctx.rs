//! Reads the socket of each kind of context.
//!
//! The kernel rewrites each access to a context into an access to its own structures, and requires the field's own size.
//! Hence `read_volatile` for each field, which prevents the compiler from merging neighbours.

use abi::{
    setting::{DEVICE_BY_INDEX, FLOW_LABEL_MANAGER, OptionKey, TEXT_LEN, Words, word_in, words_of},
    socket::{Address, Facts, direction, known, protocol, sk_family},
};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sockopt},
    cty::c_void,
    helpers::generated::{bpf_getsockopt, bpf_setsockopt},
    programs::LsmContext,
};

use crate::{
    facts::{IPPROTO_MPTCP, apply_state, is_connected, is_inet, mark_local, protocol},
    kernel,
    maps::count_loss,
    record::LossesRef,
};

/// Reads one field of a context or of a socket.
macro_rules! field {
    ($base:expr, $($path:tt)+) => {
        // SAFETY: the pointer is from the kernel, and the verifier checks this access.
        unsafe { core::ptr::read_volatile(&raw const (*$base).$($path)+) }
    };
}

/// Writes one field of a context.
macro_rules! set_field {
    ($base:expr, $field:ident, $value:expr) => {
        // SAFETY: as in `field!`.
        unsafe { core::ptr::write_volatile(&raw mut (*$base).$field, $value) }
    };
}

/// Reads one address of a context or of a socket. Only the fields of the socket's own family may be read.
macro_rules! address {
    ($base:expr, $inet6:expr, $ip6:ident, $ip4:ident) => {
        if $inet6 {
            [field!($base, $ip6[0]), field!($base, $ip6[1]), field!($base, $ip6[2]), field!($base, $ip6[3])]
        } else {
            [field!($base, $ip4), 0, 0, 0]
        }
    };
}

/// A hook that can read and set options.
pub(crate) trait Socket {
    /// Returns the argument for the socket option helpers.
    fn as_ptr(&self) -> *mut c_void;

    /// Returns the socket.
    fn socket(&self) -> *mut c_void;

    /// Reads an option; `Err` is the errno.
    #[inline(always)]
    fn get(&self, level: i32, name: i32, value: &mut Words, len: i32) -> Result<(), i32> {
        // SAFETY: `value` has room for `len` bytes, which the verifier checks.
        let ret = unsafe { bpf_getsockopt(self.as_ptr(), level, name, value.as_mut_ptr().cast(), len) };
        if ret == 0 { Ok(()) } else { Err(-(ret as i32)) }
    }

    /// Binds the socket to the device with an index, 0 for any; `Err` is the errno. Returns ENODEV if no such device exists,
    /// which the kernel does not check ([`kernel::has_device`]).
    #[inline(always)]
    fn set_device(&self, index: u32) -> Result<(), i32> {
        let OptionKey { level, name } = DEVICE_BY_INDEX;
        if has_device(self.socket(), index) { self.set(level, name, &words_of(index), 4) } else { Err(ENODEV) }
    }

    /// Sets an option; `Err` is the errno.
    #[inline(always)]
    fn set(&self, level: i32, name: i32, value: &Words, len: i32) -> Result<(), i32> {
        // SAFETY: as in `get`; the helper does not write through the pointer.
        let ret = unsafe { bpf_setsockopt(self.as_ptr(), level, name, value.as_ptr().cast_mut().cast(), len) };
        if ret == 0 { Ok(()) } else { Err(-(ret as i32)) }
    }
}

pub(crate) const ENODEV: i32 = 19;

/// Returns whether a socket can be bound to the device with an index; 0 stands for any device.
#[inline(always)]
pub(crate) fn has_device(socket: *mut c_void, index: u32) -> bool {
    index == 0 || kernel::has_device(kernel::address_of(socket), index) != 0
}

/// A socket whose hook shows to which device it is bound.
pub(crate) trait HasDevice: Socket {
    /// Returns the interface index; 0 for any.
    fn device(&self) -> u32;
}

/// cgroup/sock_create: a socket that has just been created.
pub(crate) struct SockCreate(pub(crate) *mut bpf_sock);

impl SockCreate {
    #[inline(always)]
    pub(crate) fn facts(&self) -> Facts {
        let mut facts =
            Facts { protocol: protocol(field!(self.0, type_), field!(self.0, protocol)), ..Facts::default() };
        facts.set_family(field!(self.0, family));
        facts
    }

    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut c_void {
        self.0.cast()
    }

    #[inline(always)]
    pub(crate) fn fields(&self) -> SockCreateFields {
        SockCreateFields {
            mark: field!(self.0, mark),
            priority: field!(self.0, priority),
            device: field!(self.0, bound_dev_if),
        }
    }

    /// Writes all fields. The verifier accepts writes to a context only at constant offsets, and the compiler would turn a
    /// choice between fields into a computed offset.
    #[inline(always)]
    pub(crate) fn set_fields(&self, fields: &SockCreateFields) {
        set_field!(self.0, mark, fields.mark);
        set_field!(self.0, priority, fields.priority);
        set_field!(self.0, bound_dev_if, fields.device);
    }
}

/// The fields of a new socket that a program can change.
pub(crate) struct SockCreateFields {
    pub(crate) mark: u32,
    pub(crate) priority: u32,
    /// Interface index; 0 for any.
    pub(crate) device: u32,
}

/// lsm_cgroup/socket_post_create: a socket whose creation is complete.
pub(crate) struct PostCreate {
    sk: *mut c_void,
    family: u32,
}

impl PostCreate {
    /// Returns `None` for address families that policies do not cover, and for the kernel's own sockets.
    #[inline(always)]
    pub(crate) fn new(ctx: &LsmContext) -> Option<Self> {
        // The protocol in the context is the application's: 0 if the kernel chooses it.
        let (family, kern): (i32, i32) = (ctx.arg(1), ctx.arg(4));
        if kern != 0 || !is_inet(family as u32) {
            return None;
        }
        let socket: *const c_void = ctx.arg(0);
        let sk = kernel::sk_of(socket);
        (!sk.is_null()).then_some(Self { sk, family: family as u32 })
    }

    #[inline(always)]
    pub(crate) fn facts(&self) -> Facts {
        let mut facts = Facts { protocol: kernel::protocol_of(kernel::address_of(self.sk)), ..Facts::default() };
        facts.set_family(self.family);
        facts
    }

    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut c_void {
        self.sk
    }

    #[inline(always)]
    pub(crate) fn is_inet6(&self) -> bool {
        self.family == sk_family::INET6
    }
}

impl Socket for PostCreate {
    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.sk
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        self.sk
    }
}

impl HasDevice for PostCreate {
    /// A new socket has no device, unless cgroup/sock_create bound it.
    #[inline(always)]
    fn device(&self) -> u32 {
        let mut device = [0; 2];
        let OptionKey { level, name } = DEVICE_BY_INDEX;
        if self.get(level, name, &mut device, 4).is_ok() { word_in(&device) } else { 0 }
    }
}

/// cgroup/bind, connect and sendmsg: a socket and the address that it is about to bind or to reach.
pub(crate) struct SockAddr {
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
}

impl SockAddr {
    #[inline(always)]
    pub(crate) fn new(ctx: *mut bpf_sock_addr) -> Option<Self> {
        let sk = field!(ctx, __bindgen_anon_1.sk);
        (!sk.is_null()).then_some(Self { ctx, sk })
    }

    #[inline(always)]
    pub(crate) fn ctx(&self) -> *mut bpf_sock_addr {
        self.ctx
    }

    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut c_void {
        self.sk.cast()
    }

    #[inline(always)]
    pub(crate) fn is_inet6(&self) -> bool {
        field!(self.ctx, family) == sk_family::INET6
    }

    /// Returns whether the socket has a peer.
    #[inline(always)]
    pub(crate) fn is_connected(&self) -> bool {
        is_connected(field!(self.sk, state))
    }

    /// Returns whether the address in the context of bind6 is link-local. The kernel then binds the socket to the device of
    /// the address, if it has one, after this hook (`__inet6_bind`, net/ipv6/af_inet6.c). The context does not show the
    /// device.
    #[inline(always)]
    pub(crate) fn is_link_local(&self) -> bool {
        u32::from_be(field!(self.ctx, user_ip6[0])) >> 22 == 0xfe80 >> 6
    }

    /// Returns the address in the context. Only the fields of the hook's own family may be read.
    #[inline(always)]
    fn address(&self, inet6: bool) -> Address {
        address!(self.ctx, inet6, user_ip6, user_ip4)
    }

    /// Returns the port in the context.
    #[inline(always)]
    fn port(&self) -> u16 {
        u16::from_be(field!(self.ctx, user_port) as u16)
    }

    /// Returns what is known at connect. `inet6` must be a constant: whether this is connect6.
    #[inline(always)]
    pub(crate) fn connect_facts(&self, inet6: bool) -> Facts {
        let mut facts = self.facts();
        facts.direction = direction::OUTBOUND;
        facts.remote = self.address(inet6);
        facts.remote_port = self.port();
        facts.known |= known::REMOTE;
        local_facts(self.sk, inet6, &mut facts);
        let local = facts.local;
        facts.set_remote(inet6, &local, self.device() != 0);
        // An IPv6 datagram socket that connects to an AF_INET address runs connect4 (`udpv6_pre_connect`, net/ipv6/udp.c):
        // the hook decides the family.
        facts.set_family(if inet6 { sk_family::INET6 } else { sk_family::INET });
        facts
    }

    /// Returns what is known at bind. `inet6` must be a constant: whether this is bind6.
    #[inline(always)]
    pub(crate) fn bind_facts(&self, inet6: bool) -> Facts {
        let mut facts = self.facts();
        facts.local = self.address(inet6);
        facts.local_port = self.port();
        mark_local(&mut facts);
        facts.set_family(field!(self.ctx, family));
        facts
    }

    /// Returns what is known when a datagram is sent. The peer is left out, because the next datagram may have another.
    #[inline(always)]
    pub(crate) fn send_facts(&self) -> Facts {
        let mut facts = self.facts();
        local_facts(self.sk, self.is_inet6(), &mut facts);
        facts.set_family(field!(self.ctx, family));
        facts
    }

    #[inline(always)]
    fn facts(&self) -> Facts {
        Facts { protocol: protocol(field!(self.ctx, type_), field!(self.ctx, protocol)), ..Facts::default() }
    }
}

impl Socket for SockAddr {
    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        self.sk()
    }
}

impl HasDevice for SockAddr {
    #[inline(always)]
    fn device(&self) -> u32 {
        field!(self.sk, bound_dev_if)
    }
}

/// Adds the local end of a socket from its own fields.
#[inline(always)]
fn local_facts(sk: *mut bpf_sock, inet6: bool, facts: &mut Facts) {
    facts.local = address!(sk, inet6, src_ip6, src_ip4);
    facts.local_port = field!(sk, src_port) as u16; // host byte order
    mark_local(facts);
}

/// sock_ops: a TCP socket at an event of its connection.
pub(crate) struct SockOps {
    ctx: *mut bpf_sock_ops,
    sk: *mut bpf_sock,
}

impl SockOps {
    /// Returns `None` if there is no full socket (for example, for a connection request).
    #[inline(always)]
    pub(crate) fn new(ctx: *mut bpf_sock_ops) -> Option<Self> {
        let sk = field!(ctx, __bindgen_anon_2.sk);
        (!sk.is_null()).then_some(Self { ctx, sk })
    }

    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut c_void {
        self.sk.cast()
    }

    #[inline(always)]
    pub(crate) fn is_inet6(&self) -> bool {
        field!(self.ctx, family) == sk_family::INET6
    }

    /// Returns whether the socket has sent a segment. A socket that is being accepted has not: its SYN-ACK is not counted
    /// (`tcp_v4_send_synack`, net/ipv4/tcp_ipv4.c). A socket that is connected by a simultaneous open has sent a SYN.
    #[inline(always)]
    pub(crate) fn has_sent(&self) -> bool {
        field!(self.ctx, segs_out) != 0
    }

    /// Returns what is known of a socket that listens or, with `peer`, is connected.
    #[inline(always)]
    pub(crate) fn facts(&self, direction: u8, peer: bool) -> Facts {
        let mut facts = Facts { protocol: protocol::TCP, direction, ..Facts::default() };
        let inet6 = self.is_inet6();
        facts.local = address!(self.ctx, inet6, local_ip6, local_ip4);
        facts.local_port = field!(self.ctx, local_port) as u16; // host byte order
        mark_local(&mut facts);
        if peer {
            facts.remote = address!(self.ctx, inet6, remote_ip6, remote_ip4);
            facts.remote_port = u32::from_be(field!(self.ctx, remote_port)) as u16;
            facts.known |= known::REMOTE;
        }
        facts.set_family(field!(self.ctx, family));
        facts
    }
}

impl Socket for SockOps {
    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        self.sk()
    }
}

impl HasDevice for SockOps {
    #[inline(always)]
    fn device(&self) -> u32 {
        field!(self.sk, bound_dev_if)
    }
}

/// cgroup/setsockopt and cgroup/getsockopt: a call of an application.
pub(crate) struct Sockopt {
    ctx: *mut bpf_sockopt,
    sk: *mut bpf_sock,
}

/// Bytes of an argument that the kernel passes to programs (PAGE_SIZE). A program that does not change a longer argument must
/// set `optlen` to 0, or older kernels fail the call with EFAULT (`__cgroup_bpf_run_filter_setsockopt`, kernel/bpf/cgroup.c).
const ARGUMENT_MAX: i32 = 4096;

impl Sockopt {
    #[inline(always)]
    pub(crate) fn new(ctx: *mut bpf_sockopt) -> Self {
        Self { ctx, sk: field!(ctx, __bindgen_anon_1.sk) }
    }

    #[inline(always)]
    pub(crate) fn sk(&self) -> *mut c_void {
        self.sk.cast()
    }

    #[inline(always)]
    pub(crate) fn as_context(&self) -> *mut bpf_sockopt {
        self.ctx
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> OptionKey {
        OptionKey { level: field!(self.ctx, level), name: field!(self.ctx, optname) }
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> i32 {
        field!(self.ctx, optlen)
    }

    /// Returns the return value of the kernel's own getsockopt.
    #[inline(always)]
    pub(crate) fn retval(&self) -> i32 {
        field!(self.ctx, retval)
    }

    #[inline(always)]
    pub(crate) fn is_multipath(&self) -> bool {
        field!(self.sk, protocol) == IPPROTO_MPTCP
    }

    /// Returns whether this is a TCP or MPTCP socket.
    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        protocol(field!(self.sk, type_), field!(self.sk, protocol)) == abi::socket::protocol::TCP
    }

    /// Returns whether the kernel refuses the level of a call that the helpers would make: SOL_IP on a raw AF_INET6 socket
    /// (`rawv6_setsockopt`, net/ipv6/raw.c).
    #[inline(always)]
    pub(crate) fn is_of_refused_level(&self) -> bool {
        const SOL_IP: i32 = 0;
        const SOCK_RAW: u32 = 3;
        self.key().level == SOL_IP && field!(self.sk, family) == sk_family::INET6 && field!(self.sk, type_) == SOCK_RAW
    }

    /// Returns whether the kernel passes only a part of the argument.
    #[inline(always)]
    pub(crate) fn is_long(&self) -> bool {
        self.len() > ARGUMENT_MAX
    }

    /// Makes the kernel handle the call as the application made it.
    ///
    /// A handler that writes to the caller's memory then gets that memory, and not the kernel's copy. Programs that run after
    /// this one see no argument.
    #[inline(always)]
    pub(crate) fn pass(&self) {
        if self.is_long() || self.key() == FLOW_LABEL_MANAGER {
            set_field!(self.ctx, optlen, 0);
        }
    }

    /// Makes the kernel handle a call whose value was judged. Of a long argument, the kernel then uses only the bytes that
    /// the handler reads, which another thread can no longer change. `needed` is
    /// [`OptionRow::needed_len`](abi::setting::OptionRow::needed_len).
    #[inline(always)]
    pub(crate) fn pass_as_read(&self, needed: i32) {
        if self.is_long() && needed > 0 {
            set_field!(self.ctx, optlen, needed);
        }
    }

    /// Returns what the kernel wrote to the caller of getsockopt. If the kernel returned a length beyond the caller's buffer,
    /// a program must set `optlen` to 0, or the call fails with EFAULT (`__cgroup_bpf_run_filter_getsockopt`,
    /// kernel/bpf/cgroup.c). An example is the length that NETLINK_LIST_MEMBERSHIPS needs.
    #[inline(always)]
    pub(crate) fn pass_read(&self) {
        let value = field!(self.ctx, __bindgen_anon_2.optval) as u64;
        let end = field!(self.ctx, __bindgen_anon_3.optval_end) as u64;
        if self.len() as i64 > end.wrapping_sub(value) as i64 {
            set_field!(self.ctx, optlen, 0);
        }
    }

    /// Makes the call succeed without the kernel's own handler.
    #[inline(always)]
    pub(crate) fn skip(&self) {
        set_field!(self.ctx, optlen, -1);
    }

    /// Returns the first bytes of the argument, as far as there are any.
    ///
    /// In setsockopt, the kernel's buffer has room for at least 16 bytes; in getsockopt, it is as long as the caller's.
    #[inline(always)]
    pub(crate) fn argument(&self) -> Words {
        let value = field!(self.ctx, __bindgen_anon_2.optval).cast::<u8>();
        let end = field!(self.ctx, __bindgen_anon_3.optval_end).cast::<u8>();
        if value.wrapping_add(TEXT_LEN) <= end {
            // SAFETY: within the buffer by the comparison above, which the verifier sees too.
            unsafe { value.cast::<Words>().read_unaligned() }
        } else if value.wrapping_add(8) <= end {
            // SAFETY: as above.
            [unsafe { value.cast::<u64>().read_unaligned() }, 0]
        } else if value.wrapping_add(4) <= end {
            // SAFETY: as above.
            words_of(unsafe { value.cast::<u32>().read_unaligned() })
        } else if value.wrapping_add(1) <= end {
            // SAFETY: as above.
            words_of(unsafe { value.read() }.into())
        } else {
            [0; 2]
        }
    }

    /// Replaces the application's argument by another one of `len` bytes (4 or 16).
    ///
    /// Setting `optlen` makes the kernel use the program's buffer even if the application's argument was longer.
    #[inline(always)]
    pub(crate) fn replace(&self, words: Words, len: u32) -> bool {
        let value = field!(self.ctx, __bindgen_anon_2.optval).cast::<u8>();
        let end = field!(self.ctx, __bindgen_anon_3.optval_end).cast::<u8>();
        if value.wrapping_add(TEXT_LEN) > end {
            count_loss(LossesRef::no_room);
            return false;
        }
        // SAFETY: within the buffer by the comparison above, which the verifier sees too.
        unsafe { value.cast::<Words>().write_unaligned(words) };
        set_field!(self.ctx, optlen, len as i32);
        true
    }

    /// Returns whether policies cover the socket's address family: this hook runs for all families.
    #[inline(always)]
    pub(crate) fn is_inet(&self) -> bool {
        is_inet(field!(self.sk, family))
    }

    /// Returns what is known of a socket of these families, except its direction.
    #[inline(always)]
    pub(crate) fn facts(&self) -> Facts {
        let family = field!(self.sk, family);
        let mut facts =
            Facts { protocol: protocol(field!(self.sk, type_), field!(self.sk, protocol)), ..Facts::default() };
        let inet6 = family == sk_family::INET6;
        local_facts(self.sk, inet6, &mut facts);
        apply_state(&mut facts, field!(self.sk, state), || {
            (address!(self.sk, inet6, dst_ip6, dst_ip4), u16::from_be(field!(self.sk, dst_port)))
        });
        facts.set_family(family);
        facts
    }
}

/// In cgroup/setsockopt the helpers take the socket, not the context.
impl Socket for Sockopt {
    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.sk.cast()
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        self.sk()
    }
}
