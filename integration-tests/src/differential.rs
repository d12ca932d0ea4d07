//! The cases of `workload differential` and their outcomes. Files contain native `i32`s, which an emulated processor
//! reads fast.

/// The number of options that a case reads before and after its call.
pub const OBSERVERS: usize = 4;

/// The level and number of an option.
pub type Key = (i32, i32);

/// Stands for an unused observer.
pub const NO_OBSERVER: Key = (-1, -1);

/// The kinds of sockets, by their number in a case: name, then domain, type and protocol of socket(2).
pub const KINDS: &[(&str, i32, i32, i32)] = &[
    ("tcp4", libc::AF_INET, libc::SOCK_STREAM, 0),
    ("tcp6", libc::AF_INET6, libc::SOCK_STREAM, 0),
    ("udp4", libc::AF_INET, libc::SOCK_DGRAM, 0),
    ("udp6", libc::AF_INET6, libc::SOCK_DGRAM, 0),
    // A protocol number for experiments (RFC 3692): nothing else receives it.
    ("raw4", libc::AF_INET, libc::SOCK_RAW, 253),
    ("raw6", libc::AF_INET6, libc::SOCK_RAW, 253),
    ("ping4", libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
    ("ping6", libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6),
    ("udplite4", libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
    ("udplite6", libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
    ("mptcp4", libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    ("mptcp6", libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    ("unix stream", libc::AF_UNIX, libc::SOCK_STREAM, 0),
    ("unix datagram", libc::AF_UNIX, libc::SOCK_DGRAM, 0),
    ("netlink", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
];

/// The state of a socket before the call of its case, by number.
pub mod state {
    pub const FRESH: i32 = 0;
    pub const BOUND: i32 = 1;
    /// Connected to a listener, or to its own address for datagrams.
    pub const CONNECTED: i32 = 2;
    pub const ACCEPTED: i32 = 3;
    pub const LISTENING: i32 = 4;
    pub const NAMES: [&str; 5] = ["fresh", "bound", "connected", "accepted", "listening"];
}

/// A call of setsockopt or getsockopt on a new socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Case {
    /// Index into [`KINDS`].
    pub kind: i32,
    /// One of [`state`].
    pub state: i32,
    /// Whether the call is getsockopt (0 or 1).
    pub reads: i32,
    pub key: Key,
    /// setsockopt: length of the argument. getsockopt: size of the buffer.
    pub len: i32,
    /// setsockopt: index into [`CaseSet::values`].
    pub value: i32,
    /// An earlier call of setsockopt: its option, and in `prior_value` the index of its value.
    pub prior: Key,
    /// -1 if there is no such call.
    pub prior_value: i32,
    /// Index into [`CaseSet::observers`].
    pub observers: i32,
}

/// The number of `i32`s of a [`Case`].
const CASE: usize = 11;

impl Case {
    fn words(&self) -> [i32; CASE] {
        let Self { kind, state, reads, key, len, value, prior, prior_value, observers } = *self;
        [kind, state, reads, key.0, key.1, len, value, prior.0, prior.1, prior_value, observers]
    }

    fn of(words: [i32; CASE]) -> Self {
        let [kind, state, reads, level, name, len, value, prior_level, prior_name, prior_value, observers] = words;
        let (key, prior) = ((level, name), (prior_level, prior_name));
        Self { kind, state, reads, key, len, value, prior, prior_value, observers }
    }
}

/// Cases, with the values and observers that they refer to by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaseSet {
    pub values: Vec<Vec<u8>>,
    pub observers: Vec<[Key; OBSERVERS]>,
    pub cases: Vec<Case>,
}

impl CaseSet {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |number: i32| bytes.extend_from_slice(&number.to_ne_bytes());
        for count in [self.values.len(), self.observers.len(), self.cases.len()] {
            put(i32::try_from(count).unwrap_or(i32::MAX));
        }
        for value in &self.values {
            put(i32::try_from(value.len()).unwrap_or(i32::MAX));
            value.iter().for_each(|byte| put((*byte).into()));
        }
        self.observers.iter().flatten().for_each(|(level, name)| [*level, *name].into_iter().for_each(&mut put));
        self.cases.iter().flat_map(Case::words).for_each(put);
        bytes
    }

    /// Returns `None` if the bytes do not encode a case set.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = words(bytes);
        let mut count = || usize::try_from(words.next()?).ok();
        let [values, observers, cases] = [count()?, count()?, count()?];
        let mut product = Self::default();
        for _ in 0..values {
            let len = usize::try_from(words.next()?).ok()?;
            product.values.push(words.by_ref().take(len).map(|word| word as u8).collect());
        }
        for _ in 0..observers {
            let mut keys = [NO_OBSERVER; OBSERVERS];
            for key in &mut keys {
                *key = (words.next()?, words.next()?);
            }
            product.observers.push(keys);
        }
        for _ in 0..cases {
            let mut case = [0; CASE];
            for word in &mut case {
                *word = words.next()?;
            }
            product.cases.push(Case::of(case));
        }
        Some(product)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = i32> + '_ {
    bytes.chunks_exact(4).filter_map(|word| word.try_into().ok()).map(i32::from_ne_bytes)
}

/// A value that an observer read: the length that getsockopt returned, or a negative errno, and the first 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Observation {
    pub len: i32,
    pub words: [i32; 4],
}

impl Observation {
    /// Returns a value of 4 bytes, or the first 8 bytes of a longer one, as a number; `None` if it could not be read.
    #[must_use]
    pub fn number(&self) -> Option<i64> {
        match self.len {
            4 => Some(self.words[0].into()),
            8.. => Some(i64::from(self.words[1]) << 32 | i64::from(self.words[0] as u32)),
            _ => None,
        }
    }

    /// Returns the two 64-bit numbers of a 16-byte value.
    #[must_use]
    pub fn pair(&self) -> Option<[i64; 2]> {
        let wide = |low: i32, high: i32| i64::from(high) << 32 | i64::from(low as u32);
        let [a, b, c, d] = self.words;
        (self.len == 16).then(|| [wide(a, b), wide(c, d)])
    }
}

/// The outcome of a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Outcome {
    /// The return value of the call, or a negative errno. At most `NO_SOCKET`: the socket could not be created.
    pub result: i32,
    /// The length that getsockopt returned.
    pub len: i32,
    /// Whether the call changed any byte of the caller's memory (0 or 1). getsockopt: any byte beyond the returned
    /// length.
    pub is_changed: i32,
    /// A checksum of the bytes that getsockopt returned.
    pub sum: i32,
    /// The return value of the earlier call.
    pub prior: i32,
    pub before: [Observation; OBSERVERS],
    pub after: [Observation; OBSERVERS],
}

/// If a socket could not be created, `result` is this number minus the errno.
pub const NO_SOCKET: i32 = -100_000;

const OUTCOME: usize = 5 + 2 * OBSERVERS * 5;

impl Outcome {
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let mut put = |number: i32| bytes.extend_from_slice(&number.to_ne_bytes());
        [self.result, self.len, self.is_changed, self.sum, self.prior].into_iter().for_each(&mut put);
        for seen in self.before.iter().chain(&self.after) {
            put(seen.len);
            seen.words.into_iter().for_each(&mut put);
        }
    }

    /// Decodes all outcomes of a file.
    #[must_use]
    pub fn decode_all(bytes: &[u8]) -> Vec<Self> {
        let words: Vec<i32> = words(bytes).collect();
        words.chunks_exact(OUTCOME).map(Self::of).collect()
    }

    fn of(words: &[i32]) -> Self {
        let mut words = words.iter().copied();
        let mut next = || words.next().unwrap_or_default();
        let [result, len, is_changed, sum, prior] = [next(), next(), next(), next(), next()];
        let mut outcome = Self { result, len, is_changed, sum, prior, ..Self::default() };
        for seen in outcome.before.iter_mut().chain(&mut outcome.after) {
            *seen = Observation { len: next(), words: [next(), next(), next(), next()] };
        }
        outcome
    }
}
