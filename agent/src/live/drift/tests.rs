//! Tests of drift on made-up sockets.

use std::{net::SocketAddr, path::Path};

use abi::setting::words_of_text;

use super::*;
use crate::{
    compile::{Hook, compile},
    coverage::all,
    host::socket::{Entry, State::*},
    live::OptionRead,
    policy,
};

/// Makes a socket of a protocol with these option values.
fn live(protocol: i32, state: State, ends: [&str; 2], values: &[(&str, Value)]) -> SocketSnapshot {
    let [local, remote] = ends.map(|end| end.parse::<SocketAddr>().ok());
    let local = local.unwrap_or_else(|| "0.0.0.0:0".parse().unwrap());
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let entry = Entry { family, protocol, state, local, remote, inode: 1, cookie: 1, cgroup: None };
    let values = values.iter().map(|(name, value)| (options::by_name(name).unwrap(), *value)).collect();
    SocketSnapshot {
        facts: entry.facts().unwrap(),
        entry,
        cgroup: None,
        owner: None,
        values: OptionRead::Values(values),
    }
}

fn tcp(state: State, values: &[(&str, Value)]) -> SocketSnapshot {
    let remote = if matches!(state, Listening | Unconnected) { "" } else { "192.0.2.1:443" };
    live(libc::IPPROTO_TCP, state, ["10.0.0.1:5000", remote], values)
}

fn towards(direction: Direction, live: SocketSnapshot) -> SocketSnapshot {
    SocketSnapshot { facts: Socket { direction: Some(direction), ..live.facts }, ..live }
}

fn outbound(values: &[(&str, Value)]) -> SocketSnapshot {
    towards(Direction::Outbound, tcp(Established, values))
}

fn inbound(values: &[(&str, Value)]) -> SocketSnapshot {
    towards(Direction::Inbound, tcp(Established, values))
}

fn udp(ends: [&str; 2], values: &[(&str, Value)]) -> SocketSnapshot {
    live(libc::IPPROTO_UDP, if ends[1].is_empty() { Unconnected } else { Established }, ends, values)
}

/// The baseline of a test.
#[derive(Default)]
struct New {
    values: Values,
    after: Option<Value>,
}

impl Baseline for New {
    fn values(&mut self) -> Option<&Values> {
        Some(&self.values)
    }

    fn after(&mut self, _: &SocketOption, _: Value) -> Option<Value> {
        self.after
    }
}

/// Returns the findings about a socket if the BPF LSM is not active: the name of each option, and why it is unknown.
fn found_with(rules: &str, live: &SocketSnapshot, new: New) -> Vec<(&'static str, Option<&'static str>)> {
    found_on(rules, live, new, false)
}

fn found_on(
    rules: &str,
    live: &SocketSnapshot,
    mut new: New,
    has_lsm: bool,
) -> Vec<(&'static str, Option<&'static str>)> {
    let policy = policy::parse(Path::new("test.toml"), rules).unwrap().0;
    let policies = [policy];
    let mut desired = compile(&policies, &[all(&policies)]).unwrap();
    desired.keep_hooks(|hook| has_lsm || hook != Hook::PostCreate);
    let findings = find(&desired, &desired.scopes[0], live, &mut new).into_iter();
    findings
        .map(|finding| match finding {
            Finding::Drift { option, .. } => (option.name, None),
            Finding::Unknown { option, why } => (option.name, Some(why)),
        })
        .collect()
}

fn found(rules: &str, live: &SocketSnapshot) -> Vec<(&'static str, Option<&'static str>)> {
    found_with(rules, live, New::default())
}

const NONE: [(&str, Option<&str>); 0] = [];

fn number(value: u32) -> Value {
    Value::int(value)
}

#[test]
fn only_values_that_differ_from_the_setting_are_drift() {
    let rules =
        "[[rule]]\nset = { TCP_KEEPCNT = 5, TCP_CONGESTION = \"bbr\", SO_MARK = \"0x20/0xff\", SO_SNDBUF = 1000 }\n";
    let name = |name: &[u8]| Value::text(words_of_text(name));
    let values = |count, name, mark, buffer| {
        [
            ("TCP_KEEPCNT", number(count)),
            ("TCP_CONGESTION", name),
            ("SO_MARK", number(mark)),
            ("SO_SNDBUF", number(buffer)),
        ]
    };
    assert_eq!(found(rules, &outbound(&values(5, name(b"bbr"), 0x1120, 2000))), NONE);
    let drifted = found(rules, &outbound(&values(6, name(b"reno"), 0x1121, 1000)));
    assert_eq!(drifted.len(), 4, "{drifted:?}");
    assert!(drifted.iter().all(|(_, why)| why.is_none()), "{drifted:?}");
}

#[test]
fn settings_of_hooks_that_have_not_run_yet_are_no_drift() {
    let rules = "[[rule]]\nset = { TCP_NODELAY = true, SO_MARK = 1, SO_REUSEADDR = true }\n";
    let values = [("TCP_NODELAY", number(0)), ("SO_MARK", number(0)), ("SO_REUSEADDR", number(0))];
    let new = live(libc::IPPROTO_TCP, Unconnected, ["", ""], &values);
    assert_eq!(found(rules, &new), [("SO_MARK", None)], "only what sockets get when they are created");
    assert_eq!(found(rules, &tcp(Unconnected, &values)), [("SO_MARK", None), ("SO_REUSEADDR", None)], "bound");
    for connected in [outbound(&values), inbound(&values), tcp(Listening, &values)] {
        assert_eq!(found(rules, &connected).len(), 3, "{:?}", connected.facts);
    }
    let unbound = udp(["", ""], &values);
    assert_eq!(found("[[rule]]\nset = { IP_TOS = \"AF21\" }\n", &unbound), NONE);
}

#[test]
fn rules_about_the_peer_do_not_apply_to_listeners_nor_to_inherited_values() {
    let rules =
        "[[rule]]\nmatch = { remote = \"192.0.2.0/24\" }\nset = { SO_KEEPALIVE = true, SO_BINDTODEVICE = \"eth0\" }\n";
    let values = [("SO_KEEPALIVE", number(0)), ("SO_BINDTODEVICE", Value::new([0; 2], 1))];
    assert_eq!(found(rules, &tcp(Listening, &values)), NONE);
    assert_eq!(
        found(rules, &inbound(&values)),
        [("SO_KEEPALIVE", None)],
        "accepted sockets have their listener's device"
    );
    assert_eq!(found(rules, &outbound(&values)).len(), 2);
    assert_eq!(found("[[rule]]\nset = { SO_BINDTODEVICE = \"eth0\" }\n", &inbound(&values)).len(), 1);
}

#[test]
fn options_of_listeners_do_not_apply_to_other_sockets() {
    let rules = "[[rule]]\nset = { TCP_SAVE_SYN = 1 }\n";
    let values = [("TCP_SAVE_SYN", number(0))];
    assert_eq!(found(rules, &tcp(Listening, &values)), [("TCP_SAVE_SYN", None)]);
    assert_eq!(found(rules, &inbound(&values)), NONE);
    assert_eq!(found(rules, &outbound(&values)), NONE);
}

#[test]
fn unknown_direction_is_reported_only_if_it_decides() {
    let values = [("TCP_KEEPCNT", number(9)), ("TCP_SYNCNT", number(9))];
    let rules = "\
[[rule]]\nmatch = { direction = \"outbound\" }\nset = { TCP_KEEPCNT = 5 }\n\
[[rule]]\nset = { TCP_SYNCNT = 3 }\n";
    let unknown = tcp(Established, &values);
    let expected = [("TCP_KEEPCNT", Some(NO_DIRECTION)), ("TCP_SYNCNT", None)];
    assert_eq!(found(rules, &unknown), expected);
    assert_eq!(found(rules, &inbound(&values)), [("TCP_SYNCNT", None)]);
    assert_eq!(found(rules, &outbound(&values)).len(), 2);
}

#[test]
fn whether_a_datagram_socket_was_bound_is_unknown() {
    let rules = "[[rule]]\nset = { SO_REUSEADDR = true, IP_TOS = \"AF21\" }\n";
    let values = |reuse| [("SO_REUSEADDR", number(reuse)), ("IP_TOS", number(0x48))];
    assert_eq!(found(rules, &udp(["0.0.0.0:5000", ""], &values(0))), [("SO_REUSEADDR", Some(WHETHER_BOUND))]);
    assert_eq!(found(rules, &udp(["0.0.0.0:5000", ""], &values(1))), NONE);
    let connected = udp(["10.0.0.1:5000", "10.0.0.2:53"], &values(0));
    assert_eq!(found(rules, &connected), [("SO_REUSEADDR", None)]);
}

#[test]
fn sockets_other_than_tcp_get_all_options_at_creation_if_the_bpf_lsm_is_active() {
    let rules = "[[rule]]\nset = { SO_RCVLOWAT = 3 }\n";
    let values = [("SO_RCVLOWAT", number(1))];
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_UDPLITE] {
        let new = live(protocol, Unconnected, ["", ""], &values);
        assert_eq!(found_on(rules, &new, New::default(), true), [("SO_RCVLOWAT", None)], "{protocol}");
        assert!(!found_on(rules, &new, New::default(), false).contains(&("SO_RCVLOWAT", None)), "{protocol}");
    }
    let tcp = live(libc::IPPROTO_TCP, Unconnected, ["", ""], &values);
    assert_eq!(found_on(rules, &tcp, New::default(), true), NONE);
}

#[test]
fn connection_may_show_less_than_the_value_that_was_set() {
    let rules = "[[rule]]\nset = { TCP_MAXSEG = 1000, TCP_WINDOW_CLAMP = 60000 }\n";
    let values = |segment, clamp| [("TCP_MAXSEG", number(segment)), ("TCP_WINDOW_CLAMP", number(clamp))];
    let clamp = ("TCP_WINDOW_CLAMP", Some(NOT_KEPT));
    assert_eq!(found(rules, &outbound(&values(988, 50_000))), [clamp]);
    assert_eq!(found(rules, &outbound(&values(1448, 60_000))), [("TCP_MAXSEG", None)]);
    assert_eq!(found(rules, &tcp(Listening, &values(988, 50_000))).len(), 2, "listeners show what was set");
}

#[test]
fn value_that_the_kernel_clamped_agrees() {
    let rules = "[[rule]]\nset = { SO_SNDBUF = \"64MiB\" }\n";
    let clamped = number(8 << 20);
    let live = outbound(&[("SO_SNDBUF", clamped)]);
    assert_eq!(found_with(rules, &live, New { after: Some(clamped), ..New::default() }), NONE);
    let after = Some(number(4 << 20));
    assert_eq!(found_with(rules, &live, New { after, ..New::default() }), [("SO_SNDBUF", None)]);
}

#[test]
fn limit_is_about_values_that_were_set() {
    let rules =
        "[[rule]]\nlimit = { SO_RCVBUF = { max = 1000 }, TCP_SYNCNT = { max = 3 }, SO_LINGER = { max = \"5s\" } }\n";
    let linger = |on: u64| Value::new([on | 9 << 32, 0], 8);
    let values = |locks, count, on| {
        [
            ("SO_RCVBUF", number(3000)),
            ("SO_BUF_LOCK", number(locks)),
            ("TCP_SYNCNT", number(count)),
            ("SO_LINGER", linger(on)),
        ]
    };
    let beyond = |values: &[(&str, Value)]| {
        let defaults = [("TCP_SYNCNT", number(6)), ("SO_RCVBUF", number(2000)), ("SO_LINGER", Value::new([0; 2], 8))];
        let defaults = defaults.iter().map(|(name, value)| (options::by_name(name).unwrap(), *value)).collect();
        found_with(rules, &outbound(values), New { values: defaults, after: None })
    };
    assert_eq!(beyond(&values(1, 6, 0)), NONE, "tuned, the default, and off");
    assert_eq!(beyond(&values(2, 7, 1)).len(), 3);
    assert_eq!(beyond(&values(2, 2, 0)), [("SO_RCVBUF", None)]);
}

#[test]
fn buffer_that_was_set_or_tuned_is_unknown_on_kernels_that_do_not_show_it() {
    let rules = "[[rule]]\nlimit = { SO_RCVBUF = { max = 1000 } }\n";
    let values = [("SO_RCVBUF", number(3000))];
    assert_eq!(found(rules, &outbound(&values)), [("SO_RCVBUF", Some(SET_OR_TUNED))]);
    assert_eq!(found(rules, &udp(["10.0.0.1:1", "10.0.0.2:2"], &values)), [("SO_RCVBUF", None)], "nothing tunes these");
    assert_eq!(found(rules, &outbound(&[("SO_RCVBUF", number(2000))])), NONE);
}

#[test]
fn options_that_cannot_be_read_are_unknown() {
    let rules = "[[rule]]\nset = { TCP_BPF_IW = 20 }\n";
    assert_eq!(found(rules, &outbound(&[])), [("TCP_BPF_IW", Some(NOT_READABLE))]);
    assert_eq!(found(rules, &tcp(Listening, &[])), NONE);
    let rules = "[[rule]]\nset = { SO_MARK = 1, SO_PRIORITY = 1, TCP_NODELAY = true, SO_KEEPALIVE = true }\n";
    let values = ["SO_MARK", "SO_PRIORITY", "TCP_NODELAY"].map(|name| (name, number(0)));
    let values = [&values[..], &[("SO_KEEPALIVE", number(1))]].concat();
    let multipath = live(libc::IPPROTO_MPTCP, Established, ["10.0.0.1:1", "10.0.0.2:2"], &values);
    let expected = [("SO_MARK", None), ("SO_PRIORITY", None), ("TCP_NODELAY", Some(MULTIPATH))];
    assert_eq!(found(rules, &towards(Direction::Outbound, multipath)), expected);
}

#[test]
fn options_that_a_socket_does_not_have_are_no_drift() {
    let rules = "[[rule]]\nset = { TCP_NODELAY = true, IPV6_TCLASS = \"AF21\", IP_TOS = \"AF21\" }\nlimit = { TCP_KEEPCNT = { max = 5 } }\n";
    assert_eq!(found(rules, &udp(["10.0.0.1:1", "10.0.0.2:2"], &[("IP_TOS", number(0x48))])), NONE);
    let values = [("IPV6_TCLASS", number(0x48)), ("IP_TOS", number(0))];
    assert_eq!(found(rules, &udp(["[::1]:1", "[::1]:2"], &values)), NONE);
    assert_eq!(found(rules, &udp(["[::]:1", ""], &values)), NONE, "it may never carry IPv4");
    assert_eq!(found(rules, &udp(["[::ffff:10.0.0.1]:1", "[::ffff:10.0.0.2]:2"], &values)), [("IP_TOS", None)]);
}
