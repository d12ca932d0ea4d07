//! Sockets that there are, and what they have: which of it somebody chose, and in [`drift`], what disagrees with policies.
//!
//! Whose doing a value is, the option table says. Somebody's choice is what differs from what a new socket of the kind has, as
//! far as the kernel does not change it by itself. Who chose, a process, a policy or a route, is not known.
//!
//! Pure: what is found on the host is handed in.

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

/// A socket, and what is known of it.
#[derive(Clone, Debug)]
pub struct SocketSnapshot {
    pub entry: Entry,
    /// What policies go by.
    pub facts: Socket,
    /// The name of the cgroup that it belongs to; `None` where that is gone, or was not told.
    pub cgroup: Option<String>,
    pub owner: Option<Owner>,
    pub values: OptionRead,
}

/// Who has a socket.
#[derive(Clone, Debug)]
pub struct Owner {
    /// One for all sockets that it has, where it was asked for them at once.
    pub task: Rc<Task>,
    pub descriptor: i32,
    /// The other processes that have it, with their descriptors.
    pub others: Vec<(u32, i32)>,
}

/// What is known of a socket's options.
#[derive(Clone, Debug)]
pub enum OptionRead {
    /// As many as were asked for, and the socket has.
    Values(Values),
    /// No descriptor leads to it: it was closed, or is not accepted yet, or is a part of an MPTCP socket.
    NoFd,
    /// Nobody may look into it, for this reason.
    Denied(String),
}

/// SO_BUF_LOCK: which of a socket's buffers somebody has set.
pub const BUFFER_LOCKS: OptionKey = OptionKey { level: Level::SOCKET.0, name: 72 };

impl SocketSnapshot {
    #[must_use]
    pub fn value(&self, key: OptionKey) -> Option<&Value> {
        match &self.values {
            OptionRead::Values(values) => find(values, key),
            OptionRead::NoFd | OptionRead::Denied(_) => None,
        }
    }

    /// What it has that somebody chose: what differs from a new socket. All that can be chosen, where that is not known.
    #[must_use]
    pub fn chosen(&self, fresh: Option<&Values>) -> Values {
        let OptionRead::Values(values) = &self.values else { return Values::new() };
        values.iter().filter(|(option, value)| self.is_chosen(option, value, fresh)).copied().collect()
    }

    /// Whether somebody chose the value of an option.
    #[must_use]
    pub fn is_chosen(&self, option: &SocketOption, value: &Value, fresh: Option<&Values>) -> bool {
        let may_be = match option.reading {
            Reading::Chosen => true,
            Reading::UntilConnected | Reading::AtMost => !self.is_connection(),
            Reading::UntilBound => self.facts.local.is_none(),
            Reading::Tuned { lock } => match self.value(BUFFER_LOCKS) {
                Some(locks) => word_in(&locks.words) & lock != 0,
                None => !self.may_be_tuned(option),
            },
            Reading::State | Reading::Never => false,
        };
        let default = fresh.map(|fresh| find(fresh, option.key()));
        may_be
            && default != Some(Some(value))
            && default.flatten().is_none_or(|default| self.differs(option, value, default))
    }

    /// Whether the kernel may have tuned what an option shows, or not: before 5.15 it does not tell. It tunes buffers of TCP.
    #[must_use]
    pub fn may_be_tuned(&self, option: &SocketOption) -> bool {
        matches!(option.reading, Reading::Tuned { .. })
            && self.facts.protocol == Some(Protocol::Tcp)
            && self.value(BUFFER_LOCKS).is_none()
    }

    /// Whether a value is another than that of a new socket, but for bits that the kernel sees to.
    fn differs(&self, option: &SocketOption, value: &Value, default: &Value) -> bool {
        let is_tcp = self.facts.protocol == Some(Protocol::Tcp);
        if is_tcp && option.value == ValueKind::Dscp && value.len == default.len {
            return (word_in(&value.words) ^ word_in(&default.words)) & DSCP_MASK != 0;
        }
        value != default
    }

    /// Whether it is an end of a TCP connection, whatever has become of that.
    #[must_use]
    pub fn is_connection(&self) -> bool {
        self.facts.protocol == Some(Protocol::Tcp) && !matches!(self.entry.state, State::Listening | State::Unconnected)
    }

    #[must_use]
    pub fn is_multipath(&self) -> bool {
        self.entry.protocol == libc::IPPROTO_MPTCP
    }

    /// As events have it.
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

    /// As a line of JSON, with these of its options.
    #[must_use]
    pub fn to_json(&self, options: &Values) -> Json {
        let owner = self.owner.as_ref();
        let task = owner.map(|owner| &*owner.task);
        let shown = options.iter().map(|(option, value)| (option.name.to_owned(), values::json(option.key(), value)));
        let (options, missing) = match &self.values {
            OptionRead::Values(_) => (Json::Object(shown.collect::<Map<_, _>>()), None),
            OptionRead::NoFd => (Json::Null, Some("no descriptor leads to the socket")),
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

/// The sockets of a network namespace that listen, by port.
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

    /// The direction of a connection, or of whatever a socket is: inbound where one listens at its own end, for nobody could
    /// have connected from there; else as its counts tell, if they do.
    #[must_use]
    pub fn direction(&self, entry: &Entry, counted: Option<Direction>) -> Option<Direction> {
        let is_tcp = entry.protocol() == Protocol::Tcp;
        match entry.state {
            State::Listening | State::SynReceived => Some(Direction::Inbound),
            State::SynSent => Some(Direction::Outbound),
            State::Unconnected => None,
            // Only the application itself can have connected it.
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
    fn what_the_kernel_changes_by_itself_nobody_chose() {
        let fresh = table(&[
            ("IP_TOS", 0),
            ("SO_SNDBUF", 1),
            ("SO_RCVBUF", 1),
            ("TCP_MAXSEG", 536),
            ("TCP_NODELAY", 0),
            ("SO_BUF_LOCK", 2),
        ]);
        // ECN, tuning of one buffer, the segment size of the path, and how it fares.
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
        assert_eq!(names(&connected.chosen(Some(&fresh))), ["SO_RCVBUF", "TCP_NODELAY"]);
        let listening = live(entry(State::Listening, "10.0.0.1:1", ""), &values);
        assert_eq!(names(&listening.chosen(Some(&fresh))), ["SO_RCVBUF", "TCP_MAXSEG", "TCP_NODELAY"]);
    }

    #[test]
    fn without_a_new_socket_all_that_can_be_chosen_counts() {
        let live = live(entry(State::Listening, "[::]:1", ""), &[("IPV6_V6ONLY", 1), ("SO_ACCEPTCONN", 1)]);
        assert_eq!(names(&live.chosen(None)), ["IPV6_V6ONLY"]);
        assert_eq!(names(&live.chosen(Some(&table(&[("IPV6_V6ONLY", 1)])))), Vec::<&str>::new());
    }

    #[test]
    fn direction_is_that_of_the_listener_at_ones_own_end_or_what_the_counts_say() {
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
