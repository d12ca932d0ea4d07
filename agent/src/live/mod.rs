//! Live sockets: which of their options were set by something other than the kernel and, in [`drift`], which differ from
//! policies.
//!
//! The option table says which values the kernel changes by itself. Any other value counts as chosen if it differs from that of
//! a new socket of the same kind. Whether a process, a policy or a route chose it is unknown.
//!
//! Pure: the caller reads the facts from the host.

pub mod drift;
mod text;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
};

use abi::setting::{OptionKey, Value, word_in};
use serde_json::{Map, Value as Json, json};

pub use self::text::Table;
pub use crate::host::socket::Values;
use crate::{
    events::{self, Task},
    host::socket::{Entry, State},
    options::{DSCP_MASK, Level, Reading, SocketOption, ValueKind},
    policy::{
        Socket,
        model::{Direction, Family, Protocol},
    },
    schema, values,
};

/// A socket and what is known of it.
#[derive(Clone, Debug)]
pub struct SocketSnapshot {
    pub entry: Entry,
    /// The facts that rules match.
    pub facts: Socket,
    /// The name of the socket's cgroup; `None` if the cgroup has been removed or is unknown.
    pub cgroup: Option<String>,
    pub owner: Option<Owner>,
    pub values: OptionRead,
}

/// A process that has a socket.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Shared by all sockets of the process that were found together.
    pub task: Rc<Task>,
    pub descriptor: i32,
    /// The other processes that have the socket, each with its descriptor.
    pub others: Vec<(u32, i32)>,
}

/// What is known of the options of a socket.
#[derive(Clone, Debug)]
pub enum OptionRead {
    /// The requested options that the socket has.
    Values(Values),
    /// No process has a descriptor of the socket: it was closed, has not been accepted yet, or is a subflow of an MPTCP socket.
    NoFd,
    /// The socket cannot be inspected, for this reason.
    Denied(String),
}

/// SO_BUF_LOCK: which buffers of a socket were set by setsockopt.
pub const BUFFER_LOCKS: OptionKey = OptionKey { level: Level::SOCKET.0, name: 72 };

impl SocketSnapshot {
    #[must_use]
    pub fn value(&self, key: OptionKey) -> Option<&Value> {
        match &self.values {
            OptionRead::Values(values) => find(values, key),
            OptionRead::NoFd | OptionRead::Denied(_) => None,
        }
    }

    /// Returns the options that were chosen: those that differ from a new socket. Without a new socket, returns all options
    /// that can be chosen.
    #[must_use]
    pub fn chosen(&self, baseline: Option<&Values>) -> Values {
        let OptionRead::Values(values) = &self.values else { return Values::new() };
        values.iter().filter(|(option, value)| self.is_chosen(option, value, baseline)).copied().collect()
    }

    /// Returns whether the value of an option was chosen.
    #[must_use]
    pub fn is_chosen(&self, option: &SocketOption, value: &Value, baseline: Option<&Values>) -> bool {
        let can_be_chosen = match option.reading {
            Reading::Chosen => true,
            Reading::UntilConnected | Reading::AtMost => !self.is_connection(),
            Reading::UntilBound => self.facts.local.is_none(),
            Reading::Tuned { lock } => match self.value(BUFFER_LOCKS) {
                Some(locks) => word_in(&locks.words) & lock != 0,
                None => !self.may_be_tuned(option),
            },
            Reading::State | Reading::Never => false,
        };
        let default = baseline.map(|baseline| find(baseline, option.key()));
        can_be_chosen
            && default != Some(Some(value))
            && default.flatten().is_none_or(|default| self.differs(option, value, default))
    }

    /// Returns whether the kernel may have tuned the value of an option. The kernel tunes TCP buffers, and does not show before
    /// 5.15 whether it has done so.
    #[must_use]
    pub fn may_be_tuned(&self, option: &SocketOption) -> bool {
        matches!(option.reading, Reading::Tuned { .. })
            && self.facts.protocol == Some(Protocol::Tcp)
            && self.value(BUFFER_LOCKS).is_none()
    }

    /// Returns whether a value differs from that of a new socket, except for bits that the kernel manages.
    fn differs(&self, option: &SocketOption, value: &Value, default: &Value) -> bool {
        let is_tcp = self.facts.protocol == Some(Protocol::Tcp);
        if is_tcp && option.value == ValueKind::Dscp && value.len == default.len {
            return (word_in(&value.words) ^ word_in(&default.words)) & DSCP_MASK != 0;
        }
        value != default
    }

    /// Returns whether the socket is or was an end of a TCP connection.
    #[must_use]
    pub fn is_connection(&self) -> bool {
        self.facts.protocol == Some(Protocol::Tcp) && !matches!(self.entry.state, State::Listening | State::Unconnected)
    }

    #[must_use]
    pub fn is_multipath(&self) -> bool {
        self.entry.protocol == libc::IPPROTO_MPTCP
    }

    /// Returns the socket as events contain it.
    #[must_use]
    pub fn socket(&self) -> events::Socket {
        let Entry { local, remote, cookie, .. } = &self.entry;
        let canonical = |address: &SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let has_local = self.facts.local.is_some() || self.facts.local_port.is_some();
        events::Socket {
            protocol: self.facts.protocol.map(Protocol::name),
            family: self.facts.family().map(Family::name),
            local: has_local.then(|| canonical(local)),
            remote: remote.as_ref().map(canonical),
            cookie: Some(*cookie),
            cgroup: self.cgroup.clone(),
        }
    }

    /// Returns the socket as a line of JSON, with these options.
    #[must_use]
    pub fn to_json(&self, options: &Values) -> Json {
        let owner = self.owner.as_ref();
        let task = owner.map(|owner| &*owner.task);
        let shown = options.iter().map(|(option, value)| (option.name.to_owned(), values::json(option.key(), value)));
        let (options, missing) = match &self.values {
            OptionRead::Values(_) => (Json::Object(shown.collect::<Map<_, _>>()), None),
            OptionRead::NoFd => (Json::Null, Some("no process has a descriptor of the socket")),
            OptionRead::Denied(why) => (Json::Null, Some(why.as_str())),
        };
        let fields = json!({
            "socket": self.socket(),
            "state": self.entry.state.name(),
            "pid": task.map(|task| task.pid),
            "comm": task.map(|task| &task.comm),
            "fd": owner.map(|owner| owner.descriptor),
            "exe": task.and_then(|task| task.exe.as_ref()),
            "cgroup": task.and_then(|task| task.cgroup.as_ref()),
            "container": task.and_then(|task| task.container.as_ref()),
            "values": options,
        });
        let mut line = schema::line("socket", fields);
        if let Some(others) = owner.map(|owner| &owner.others).filter(|others| !others.is_empty()) {
            line["shared_with"] = others.iter().map(|(pid, fd)| json!({ "pid": pid, "fd": fd })).collect();
        }
        if let Some(why) = missing {
            line["missing"] = json!({ "values": why });
        }
        line
    }
}

fn find(values: &Values, key: OptionKey) -> Option<&Value> {
    values.iter().find(|(option, _)| option.key() == key).map(|(_, value)| value)
}

/// The listening addresses of a network namespace, by port.
#[derive(Clone, Debug, Default)]
pub struct Listeners(HashMap<u16, Vec<IpAddr>>);

impl Listeners {
    #[must_use]
    pub fn of<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Self {
        let mut listeners = Self::default();
        for entry in entries.into_iter().filter(|entry| entry.state == State::Listening) {
            listeners.0.entry(entry.local.port()).or_default().push(entry.local.ip().to_canonical());
        }
        listeners
    }

    /// Returns the direction of a socket. It is inbound if a socket listens at the local address, because no connection could
    /// have been made from there. Otherwise it is the one that the socket's counters indicate, if they do.
    #[must_use]
    pub fn direction(&self, entry: &Entry, counted: Option<Direction>) -> Option<Direction> {
        let is_tcp = entry.protocol() == Protocol::Tcp;
        match entry.state {
            State::Listening | State::SynReceived => Some(Direction::Inbound),
            State::SynSent => Some(Direction::Outbound),
            State::Unconnected => None,
            // A connected datagram socket was connected by its application.
            _ if !is_tcp => Some(Direction::Outbound),
            _ if self.has(entry) => Some(Direction::Inbound),
            _ => counted,
        }
    }

    fn has(&self, entry: &Entry) -> bool {
        let own = entry.local.ip().to_canonical();
        let at_port = self.0.get(&entry.local.port());
        at_port.is_some_and(|listening| listening.iter().any(|address| address.is_unspecified() || *address == own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn entry(state: State, local: &str, remote: &str) -> Entry {
        let local: SocketAddr = local.parse().unwrap();
        Entry {
            family: if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 },
            protocol: libc::IPPROTO_TCP,
            state,
            local,
            remote: remote.parse().ok(),
            inode: 1,
            cookie: 7,
            cgroup: None,
        }
    }

    fn live(entry: Entry, values: &[(&str, u32)]) -> SocketSnapshot {
        SocketSnapshot {
            facts: entry.facts().unwrap(),
            entry,
            cgroup: None,
            owner: None,
            values: OptionRead::Values(table(values)),
        }
    }

    fn table(values: &[(&str, u32)]) -> Values {
        values.iter().map(|(name, value)| (options::by_name(name).unwrap(), Value::int(*value))).collect()
    }

    fn names(values: &Values) -> Vec<&'static str> {
        values.iter().map(|(option, _)| option.name).collect()
    }

    #[test]
    fn values_that_the_kernel_changes_are_not_chosen() {
        let baseline = table(&[
            ("IP_TOS", 0),
            ("SO_SNDBUF", 1),
            ("SO_RCVBUF", 1),
            ("TCP_MAXSEG", 536),
            ("TCP_NODELAY", 0),
            ("SO_BUF_LOCK", 2),
        ]);
        // Changed by the kernel: ECN bits, a tuned buffer, the segment size of the path, and the state of delayed
        // acknowledgements.
        let values = [
            ("IP_TOS", 2),
            ("SO_SNDBUF", 9),
            ("SO_RCVBUF", 9),
            ("TCP_MAXSEG", 1448),
            ("TCP_NODELAY", 1),
            ("TCP_QUICKACK", 1),
            ("SO_BUF_LOCK", 2),
        ];
        let connected = live(entry(State::Established, "10.0.0.1:1", "10.0.0.2:2"), &values);
        assert_eq!(names(&connected.chosen(Some(&baseline))), ["SO_RCVBUF", "TCP_NODELAY"]);
        let listening = live(entry(State::Listening, "10.0.0.1:1", ""), &values);
        assert_eq!(names(&listening.chosen(Some(&baseline))), ["SO_RCVBUF", "TCP_MAXSEG", "TCP_NODELAY"]);
    }

    #[test]
    fn without_a_new_socket_all_options_that_can_be_chosen_count() {
        let live = live(entry(State::Listening, "[::]:1", ""), &[("IPV6_V6ONLY", 1), ("SO_ACCEPTCONN", 1)]);
        assert_eq!(names(&live.chosen(None)), ["IPV6_V6ONLY"]);
        assert_eq!(names(&live.chosen(Some(&table(&[("IPV6_V6ONLY", 1)])))), Vec::<&str>::new());
    }

    #[test]
    fn direction_is_inbound_at_a_listening_address_and_otherwise_that_of_the_counters() {
        let listening = [entry(State::Listening, "10.0.0.1:80", ""), entry(State::Listening, "[::]:443", "")];
        let listeners = Listeners::of(&listening);
        let direction =
            |state, local: &str| listeners.direction(&entry(state, local, "10.0.0.9:9"), Some(Direction::Outbound));
        for (local, expected) in [
            ("10.0.0.1:80", Direction::Inbound),
            ("10.0.0.2:80", Direction::Outbound),
            ("10.0.0.2:443", Direction::Inbound),
            ("[::ffff:10.0.0.1]:80", Direction::Inbound),
            ("10.0.0.1:5000", Direction::Outbound),
        ] {
            assert_eq!(direction(State::Established, local), Some(expected), "{local}");
        }
        assert_eq!(direction(State::SynSent, "10.0.0.1:5000"), Some(Direction::Outbound));
        assert_eq!(direction(State::Unconnected, "10.0.0.1:80"), None);
        assert_eq!(listeners.direction(&entry(State::LastAck, "10.0.0.1:5000", "10.0.0.9:9"), None), None);
    }
}
