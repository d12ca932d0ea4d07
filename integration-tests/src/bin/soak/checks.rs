//! The oracle of the soak test: processes under a policy check their own sockets with getsockopt.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io::{self, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    policies::VERSIONS,
    sockets::{
        self, IP_TOS, IP_TTL, Option, SO_BUF_LOCK, SO_KEEPALIVE, SO_MARK, SO_PRIORITY, SO_SNDBUF, SO_SNDBUFFORCE,
        TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY, TCP_QUICKACK, get, set,
    },
};

/// The number of mismatches that are printed; all are counted.
const DESCRIBED: u64 = 20;
/// The buffer that the limit permits. The kernel doubles the value of a call (`sock_setsockopt`, net/core/sock.c).
const BUFFER: i32 = 2 * 32 * 1024;

/// The counters of a process: checks, mismatches, and by option the calls that conflict with the policy.
#[derive(Debug, Default)]
pub(crate) struct Counts(pub(crate) BTreeMap<&'static str, u64>);

impl Counts {
    pub(crate) fn add(&mut self, what: &'static str) {
        *self.0.entry(what).or_insert(0) += 1;
    }

    /// Compares a value with the permitted ones, and prints a mismatch.
    pub(crate) fn check<T: PartialEq + Debug>(&mut self, what: &str, found: &T, permitted: &[T]) {
        self.add("checks");
        if permitted.contains(found) {
            return;
        }
        self.add("mismatches");
        if self.0["mismatches"] <= DESCRIBED {
            let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let _ = writeln!(io::stdout(), "mismatch at {time} ms: {what} is {found:?}, permitted {permitted:?}");
        }
    }

    fn expect_value(&mut self, what: &str, fd: &impl AsRawFd, option: Option, wanted: i32) {
        self.check(
            &format!("{} {what}", option.2),
            &get(fd, option).map_err(|error| error.raw_os_error()),
            &[Ok(wanted)],
        );
    }

    /// Makes a call that conflicts with the policy. The socket must have the policy's value afterwards.
    fn set_conflicting(
        &mut self,
        what: &str,
        fd: &impl AsRawFd,
        option: Option,
        requested: i32,
        wanted: i32,
    ) -> io::Result<()> {
        set(fd, option, requested)?;
        self.add(option.2);
        self.expect_value(what, fd, option, wanted);
        Ok(())
    }
}

/// The address that a client connects to.
#[derive(Clone, Copy, Debug)]
enum ConnectTarget {
    Loopback,
    AnyAddress,
    Itself,
}

/// Checks all sockets under the policy that does not change.
pub(crate) fn constant(counts: &mut Counts) -> io::Result<()> {
    for home in [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), (Ipv6Addr::LOCALHOST, 0).into()] {
        for way in [ConnectTarget::Loopback, ConnectTarget::AnyAddress, ConnectTarget::Itself] {
            tcp(counts, home, way)?;
        }
    }
    datagrams(counts)
}

fn family(address: SocketAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn tcp(counts: &mut Counts, home: SocketAddr, way: ConnectTarget) -> io::Result<()> {
    let listener = TcpListener::bind(home)?;
    let there = listener.local_addr()?;
    let what = format!("{way:?} {}", if home.is_ipv4() { "IPv4" } else { "IPv6" });
    let fd = sockets::open(family(home), libc::SOCK_STREAM)?;
    set(&fd, TCP_NODELAY, 0)?;
    counts.add(TCP_NODELAY.2);
    sockets::reset_on_close(&fd)?;
    match way {
        ConnectTarget::Loopback => sockets::connect(&fd, there)?,
        ConnectTarget::AnyAddress => sockets::connect(&fd, sockets::any(there))?,
        ConnectTarget::Itself => {
            sockets::bind(&fd, home)?;
            let client = TcpStream::from(fd.try_clone()?);
            sockets::connect(&fd, client.local_addr()?)?;
        }
    }
    governed(counts, &format!("outbound {what}"), &fd)?;
    if !matches!(way, ConnectTarget::Itself) {
        governed(counts, &format!("inbound {what}"), &listener.accept()?.0)?;
    }
    Ok(())
}

/// Checks that a connected socket has the values of [`crate::policies::RULES`], and keeps them.
fn governed(counts: &mut Counts, what: &str, fd: &impl AsRawFd) -> io::Result<()> {
    let settings = [(TCP_NODELAY, 1, 0), (SO_KEEPALIVE, 1, 0), (TCP_KEEPIDLE, 60, 999), (TCP_KEEPCNT, 4, 9)];
    for (option, wanted, requested) in settings.into_iter().chain([(SO_MARK, 0x20, 7)]) {
        counts.expect_value(what, fd, option, wanted);
        counts.set_conflicting(what, fd, option, requested, wanted)?;
    }
    counts.set_conflicting(what, fd, SO_SNDBUF, 1 << 20, BUFFER)?;
    set(fd, SO_SNDBUFFORCE, 1 << 20)?;
    counts.add(SO_SNDBUFFORCE.2);
    // Without SO_SNDBUF locked, the kernel may let the buffer grow.
    let _ = set(fd, SO_BUF_LOCK, 0);
    counts.add(SO_BUF_LOCK.2);
    let buffer = get(fd, SO_SNDBUF)?;
    counts.check(&format!("SO_SNDBUF {what} after SO_SNDBUFFORCE and SO_BUF_LOCK"), &(buffer <= BUFFER), &[true]);
    if what.ends_with("IPv4") {
        counts.set_conflicting(what, fd, IP_TTL, 99, 9)?;
    }
    let denied = set(fd, TCP_QUICKACK, 1).map_err(|error| error.raw_os_error());
    counts.add(TCP_QUICKACK.2);
    counts.check(&format!("TCP_QUICKACK {what}"), &denied, &[Err(Some(libc::EPERM))]);
    Ok(())
}

fn datagrams(counts: &mut Counts) -> io::Result<()> {
    let fd = sockets::open(libc::AF_INET, libc::SOCK_DGRAM)?;
    for peer in [[127, 1, 0, 1], [0, 0, 0, 0], [127, 2, 0, 1]] {
        sockets::connect(&fd, (Ipv4Addr::from(peer), 9).into())?;
        counts.expect_value("datagrams", &fd, SO_MARK, 0x20);
        counts.set_conflicting("datagrams", &fd, SO_MARK, 7, 0x20)?;
    }
    Ok(())
}

/// Checks that a mark depends on the current peer. connect(2) on a datagram socket changes the peer.
pub(crate) fn peers(counts: &mut Counts) -> io::Result<()> {
    let fd = sockets::open(libc::AF_INET, libc::SOCK_DGRAM)?;
    set(&fd, SO_MARK, 7)?;
    for (peer, mark) in [([127, 1, 0, 1], 5), ([127, 2, 0, 1], 7), ([127, 1, 0, 2], 5), ([0, 0, 0, 0], 7)] {
        sockets::connect(&fd, (Ipv4Addr::from(peer), 9).into())?;
        counts.expect_value(&format!("with peer {peer:?}"), &fd, SO_MARK, mark);
    }
    // The kernel sets the priority by the type of service (`do_ip_setsockopt`, net/ipv4/ip_sockglue.c).
    set(&fd, IP_TOS, 0x10)?;
    counts.expect_value("after IP_TOS", &fd, SO_PRIORITY, 3);
    Ok(())
}

/// Checks that connections have the values of one of the two alternating policies, and no mixture.
pub(crate) fn versions(counts: &mut Counts) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    sockets::reset_on_close(&client)?;
    for (what, fd) in [("outbound", &client), ("inbound", &listener.accept()?.0)] {
        let mut values = [0; 3];
        for (value, option) in values.iter_mut().zip([SO_MARK, TCP_KEEPCNT, TCP_KEEPIDLE]) {
            *value = get(fd, option)?;
        }
        counts.check(&format!("mark, count and idle time {what}"), &values, &VERSIONS);
    }
    Ok(())
}
