//! The protocol of sockprobe: requests and answers, one JSON line each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The argument that makes the probe stay in the network namespace in which it starts.
pub const KEEP_NETNS: &str = "stay";

/// A descriptor in the probe.
pub type Fd = i32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    Inet,
    Inet6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::Inet, Self::Inet6];

    /// Returns the loopback address with port 0.
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
    /// ICMP, with a raw socket.
    Raw,
    /// ICMP, with a datagram socket.
    Ping,
    UdpLite,
    /// AF_UNIX, which policies do not cover.
    Unix,
}

/// An argument of setsockopt: the memory, and the length that is passed to the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Argument {
    /// `None` stands for an unmapped address: NULL, or another one.
    pub bytes: Option<Vec<u8>>,
    pub len: i32,
    /// Whether the page after the bytes is unmapped.
    pub ends_with_memory: bool,
    pub is_null: bool,
}

impl Argument {
    /// Returns a value at the start of `len` bytes; the other bytes are 0.
    #[must_use]
    pub fn padded(value: i32, len: usize) -> Self {
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

    /// Returns a value that ends at an unmapped page, with a passed length of `len`.
    #[must_use]
    pub fn truncated(value: i32, len: i32) -> Self {
        Self::truncated_bytes(&value.to_ne_bytes(), len)
    }

    /// Like [`Self::truncated`], for any bytes.
    #[must_use]
    pub fn truncated_bytes(bytes: &[u8], len: i32) -> Self {
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

/// A request to the probe.
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
    /// Permanently gives up root and every capability.
    DropPrivileges,
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
    /// With a buffer of `len` bytes, or an unmapped address.
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
    /// Writes a file as the probe sees it, such as a file of its network namespace below /proc/sys.
    Write {
        path: String,
        text: String,
    },
    /// Sends one byte, to the peer or to an address.
    Send {
        fd: Fd,
        to: Option<SocketAddr>,
    },
    /// Sends `len` bytes from one end of a connection to the other. The probe has both ends.
    Transfer {
        from: Fd,
        to: Fd,
        len: usize,
    },
    /// Receives one byte.
    Receive {
        fd: Fd,
    },
    Close {
        fd: Fd,
    },
    /// Sockets that are opened afterwards belong to this cgroup.
    EnterCgroup {
        path: String,
    },
}

/// The result of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The return value of the system call.
    pub result: i64,
    /// 0 unless `result` is -1.
    pub errno: i32,
    /// The value that getsockopt returned.
    pub value: Vec<u8>,
    pub address: Option<SocketAddr>,
}

/// The first message of the probe.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    pub pid: u32,
}
