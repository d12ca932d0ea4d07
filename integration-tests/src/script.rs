//! What sockprobe is told to do, and what it answers: a JSON line each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What the probe is told by its argument: to stay in the network namespace that it is started in.
pub const STAY: &str = "stay";

/// A descriptor in the probe.
pub type Fd = i32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    Inet,
    Inet6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::Inet, Self::Inet6];

    /// The loopback address, any port.
    #[must_use]
    pub fn loopback(self) -> SocketAddr {
        match self {
            Self::Inet => ([127, 0, 0, 1], 0).into(),
            Self::Inet6 => ([0, 0, 0, 0, 0, 0, 0, 1], 0).into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    Tcp,
    Mptcp,
    Udp,
    /// ICMP, by a raw socket.
    Raw,
    /// ICMP, by a datagram socket.
    Ping,
    UdpLite,
    /// AF_UNIX, of which policies know nothing.
    Unix,
}

/// An argument of setsockopt: memory, and what the kernel is told of its length.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Argument {
    /// `None`: an address where nothing is, NULL or another.
    pub bytes: Option<Vec<u8>>,
    pub len: i32,
    /// Whether nothing is mapped behind the bytes.
    pub ends_with_memory: bool,
    pub is_null: bool,
}

impl Argument {
    /// A value at the start of `len` bytes, the others 0.
    #[must_use]
    pub fn long(value: i32, len: usize) -> Self {
        let mut bytes = value.to_ne_bytes().to_vec();
        bytes.resize(len, 0);
        Self::from(bytes)
    }

    #[must_use]
    pub fn bad_pointer(len: i32) -> Self {
        Self { bytes: None, len, ends_with_memory: false, is_null: false }
    }

    #[must_use]
    pub fn null(len: i32) -> Self {
        Self { is_null: true, ..Self::bad_pointer(len) }
    }

    /// A value with nothing mapped behind it, of which the kernel is told that it has `len` bytes.
    #[must_use]
    pub fn cut_off(value: i32, len: i32) -> Self {
        Self::cut_off_bytes(&value.to_ne_bytes(), len)
    }

    /// The same of any bytes.
    #[must_use]
    pub fn cut_off_bytes(bytes: &[u8], len: i32) -> Self {
        Self { len, ends_with_memory: true, ..Self::from(bytes) }
    }
}

impl From<Vec<u8>> for Argument {
    fn from(bytes: Vec<u8>) -> Self {
        let len = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
        Self { bytes: Some(bytes), len, ends_with_memory: false, is_null: false }
    }
}

impl From<&[u8]> for Argument {
    fn from(bytes: &[u8]) -> Self {
        Self::from(bytes.to_vec())
    }
}

impl From<&str> for Argument {
    fn from(text: &str) -> Self {
        Self::from(text.as_bytes())
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self::from(value.to_ne_bytes().to_vec())
    }
}

impl From<u8> for Argument {
    fn from(value: u8) -> Self {
        Self::from(vec![value])
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::from(value.to_ne_bytes().to_vec())
    }
}

/// One thing to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    Socket {
        family: Family,
        kind: Kind,
    },
    Bind {
        fd: Fd,
        to: SocketAddr,
    },
    Listen {
        fd: Fd,
    },
    Connect {
        fd: Fd,
        to: SocketAddr,
    },
    /// Gives up root and every capability, for good.
    BecomeNobody,
    /// connect(AF_UNSPEC)
    Disconnect {
        fd: Fd,
    },
    Accept {
        fd: Fd,
    },
    Set {
        fd: Fd,
        level: i32,
        name: i32,
        argument: Argument,
    },
    /// With room for `len` bytes, or at an address where nothing is.
    Get {
        fd: Fd,
        level: i32,
        name: i32,
        len: u32,
        bad_pointer: bool,
    },
    LocalAddress {
        fd: Fd,
    },
    PeerAddress {
        fd: Fd,
    },
    /// Writes a file as the probe sees it, such as one of its network namespace's below /proc/sys.
    Write {
        path: String,
        text: String,
    },
    /// One byte, to the peer or to an address.
    Send {
        fd: Fd,
        to: Option<SocketAddr>,
    },
    /// As many bytes from one end of a connection to the other, both of which the probe has.
    Pour {
        from: Fd,
        to: Fd,
        len: usize,
    },
    /// One byte.
    Receive {
        fd: Fd,
    },
    Close {
        fd: Fd,
    },
    /// Sockets opened from now on belong to this cgroup.
    EnterCgroup {
        path: String,
    },
}

/// What a step came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What the system call returned.
    pub result: i64,
    /// 0 unless `result` is -1.
    pub errno: i32,
    /// What getsockopt left.
    pub value: Vec<u8>,
    pub address: Option<SocketAddr>,
}

/// What the probe says first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    pub pid: u32,
}
