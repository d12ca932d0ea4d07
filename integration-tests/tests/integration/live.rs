//! `sockpolicy ls` and `sockpolicy verify`, compared with getsockopt in the owner and with `ss`.

mod drift;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    process::Command,
};

use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    kernels::Kernel,
    options::{
        SO_BUF_LOCK, SO_COOKIE, SO_LINGER, SO_MARK, SO_RCVBUF, SO_SNDBUF, SocketOption, TCP_CONGESTION, TCP_MAXSEG,
        TCP_NODELAY,
    },
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running},
    script::{Family, Fd, Kind},
};

use crate::{stderr, stdout};

/// Returns the JSON lines of `sockpolicy ls` for the sockets of a cgroup.
#[track_caller]
fn listed(cgroup: &Cgroup, arguments: &[&str]) -> Vec<Value> {
    let path = cgroup.path().display().to_string();
    let output = agent::output(&[&["ls", "-o", "json", "--cgroup", &path], arguments].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Like [`listed`], by descriptor.
#[track_caller]
fn by_descriptor(cgroup: &Cgroup, arguments: &[&str]) -> BTreeMap<Fd, Value> {
    let open = listed(cgroup, arguments).into_iter().filter(|line| !line["values"].is_null());
    open.map(|line| (Fd::try_from(line["fd"].as_i64().unwrap()).unwrap(), line)).collect()
}

/// Opens sockets of every kind and persistent state, each with a description.
fn sockets(probe: &mut Probe) -> Vec<(String, Fd)> {
    let mut sockets = Vec::new();
    for family in Family::BOTH {
        let mut add = |what: &str, fd| sockets.push((format!("{family:?} {what}"), fd));
        let pair = probe.pair(family, Kind::Tcp);
        for (what, fd) in [("listener", pair.listener), ("client", pair.client), ("server", pair.server)] {
            add(what, fd);
        }
        probe.exchange_bytes(pair.client, pair.server);
        for kind in [Kind::Tcp, Kind::Udp, Kind::Raw] {
            add(&format!("new {kind:?}"), probe.open(family, kind));
        }
        let bound = probe.open(family, Kind::Tcp);
        probe.bind(bound, family.loopback());
        add("bound Tcp", bound);
        let receiver = probe.open(family, Kind::Udp);
        let address = probe.bind(receiver, family.loopback());
        add("bound Udp", receiver);
        let connected = probe.open(family, Kind::Udp);
        probe.connect(connected, address);
        add("connected Udp", connected);
        let sender = probe.open(family, Kind::Udp);
        probe.send(sender, Some(address));
        add("sending Udp", sender);
        probe.receive(receiver);
        probe.send(connected, None);
        probe.receive(receiver);
    }
    let both = probe.open(Family::Inet6, Kind::Tcp);
    let port = probe.bind(both, "[::]:0".parse().unwrap()).port();
    probe.listen(both);
    let client = probe.open(Family::Inet6, Kind::Tcp);
    probe.connect(client, format!("[::ffff:127.0.0.1]:{port}").parse().unwrap());
    let server = probe.accept(both);
    sockets.extend([("dual-stack listener", both), ("mapped client", client), ("mapped server", server)].map(named));
    if Kernel::current().has("mptcp") {
        let pair = probe.pair(Family::Inet, Kind::Mptcp);
        probe.exchange_bytes(pair.client, pair.server);
        let ends = [("listener", pair.listener), ("client", pair.client), ("server", pair.server)];
        sockets.extend(ends.map(|(what, fd)| named((&format!("Mptcp {what}"), fd))));
    }
    sockets
}

fn named((what, fd): (&str, Fd)) -> (String, Fd) {
    (what.to_owned(), fd)
}

/// Returns every option that the agent knows, with its level and number.
fn known_options() -> Vec<(String, SocketOption)> {
    let lines = stdout(&agent::output(&["options", "-o", "json"]));
    let number = |value: &Value| i32::try_from(value.as_i64().unwrap()).unwrap();
    let options = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).map(|line| {
        let option = SocketOption { name: "", level: number(&line["level"]), number: number(&line["optname"]) };
        (line["option"].as_str().unwrap().to_owned(), option)
    });
    options.collect()
}

/// Returns whether a JSON value is the value that getsockopt returned.
fn is_same(shown: &Value, bytes: &[u8]) -> bool {
    let word = |at: usize| bytes.get(at..at + 4).map(|word| i32::from_ne_bytes(word.try_into().unwrap()));
    match shown {
        Value::Null => bytes.is_empty(),
        Value::Number(number) => match (number.as_i64(), bytes.len()) {
            (Some(number), 1) => number == i64::from(bytes[0]),
            (Some(number), 4) => {
                let word = word(0).unwrap();
                // The index of an interface can be in network byte order.
                [i64::from(word), i64::from(word.cast_unsigned()), i64::from(i32::from_be(word))].contains(&number)
            }
            (_, 8) => {
                let wide = u64::from_ne_bytes(bytes.try_into().unwrap());
                let unlimited = wide == u64::MAX && number.as_u64() == Some(u64::from(u32::MAX));
                unlimited || number.as_u64() == Some(wide)
            }
            _ => false,
        },
        Value::Object(fields) => {
            // struct linger, or struct ucred.
            let names: &[&str] = if bytes.len() == 8 { &["onoff", "linger"] } else { &["pid", "uid", "gid"] };
            names.iter().enumerate().all(|(at, name)| {
                let word = word(4 * at);
                let number = fields[*name].as_i64();
                word.is_some_and(|word| [i64::from(word), i64::from(word.cast_unsigned())].map(Some).contains(&number))
            })
        }
        Value::String(text) if text.starts_with("0x") => {
            let hex: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            *text == format!("0x{hex}")
        }
        // A duration, an IPv4 address, or a name.
        Value::String(text) if text == "0" => bytes.iter().all(|byte| *byte == 0),
        Value::String(text) => {
            let address = <[u8; 4]>::try_from(bytes).map(|octets| IpAddr::from(octets).to_string());
            let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            address.is_ok_and(|address| address == *text) || name == text.as_bytes()
        }
        _ => false,
    }
}

/// Options that `ls` does not read: reading changes the socket, or needs an argument.
const NEVER_READ: [&str; 9] = [
    "SO_ERROR",
    "SO_ATTACH_FILTER",
    "TCP_SAVED_SYN",
    "TCP_ZEROCOPY_RECEIVE",
    "IP_MSFILTER",
    "IPV6_FLOWLABEL_MGR",
    "MPTCP_TCPINFO",
    "MPTCP_SUBFLOW_ADDRS",
    "MPTCP_FULL_INFO",
];

#[test]
fn every_option_is_shown_as_its_owner_reads_it() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let sockets = sockets(&mut probe);
    let options = known_options();
    let mut read = |fd| -> Vec<_> { options.iter().map(|(_, option)| probe.get(fd, *option, 256)).collect() };
    let before: Vec<_> = sockets.iter().map(|(_, fd)| read(*fd)).collect();
    let shown = by_descriptor(&cgroup, &["--all"]);
    let mut compared = BTreeSet::new();
    for ((what, fd), before) in sockets.iter().zip(before) {
        let Some(line) = shown.get(fd) else { panic!("{what} is not listed: {shown:#?}") };
        for (((name, _), before), after) in options.iter().zip(before).zip(read(*fd)) {
            let shown = line["values"].get(name);
            match (shown, &after) {
                // Statistics of the connection, which change.
                _ if before != after => {}
                (Some(shown), Ok(value)) => {
                    assert!(is_same(shown, value), "{what}: {name} is {shown}, its owner reads {value:?}");
                    compared.insert(name.as_str());
                }
                (None, Ok(_)) => assert!(NEVER_READ.contains(&name.as_str()), "{what}: {name} is not shown"),
                (None, Err(_)) => {}
                (Some(shown), Err(errno)) => panic!("{what}: {name} is {shown}, its owner gets {errno:?}"),
            }
        }
    }
    for name in
        ["SO_SNDBUF", "TCP_NODELAY", "TCP_CONGESTION", "IPV6_TCLASS", "IP_TOS", "SO_LINGER", "UDP_GRO", "IP_MTU"]
    {
        assert!(compared.contains(name), "{name} was never compared");
    }
}

/// Parses an endpoint in the format of `ss`.
fn end(text: &str) -> (Option<IpAddr>, u16) {
    let (address, port) = text.rsplit_once(':').unwrap();
    let address = address.trim_start_matches('[').trim_end_matches(']');
    // Dual-stack sockets have an asterisk.
    let address = address.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    (address.filter(|address| !address.is_unspecified()), port.parse().unwrap_or(0))
}

/// State and endpoints of sockets, by cookie. An unspecified address is `None`.
type Sockets = BTreeMap<u64, (String, [(Option<IpAddr>, u16); 2])>;

/// Returns the sockets that `ss` shows in the network namespace of a process.
fn shown_by_ss(pid: u32) -> Sockets {
    let mut ss = Command::new("nsenter");
    ss.arg(format!("--net=/proc/{pid}/ns/net"));
    ss.args(["ss", "--tcp", "--udp", "--all", "--numeric", "--extended", "--no-header", "--oneline"]);
    let shown = stdout(&process::output(ss));
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let cookie = words.iter().find_map(|word| word.strip_prefix("sk:")).unwrap();
        let cookie = u64::from_str_radix(cookie, 16).unwrap();
        (cookie, (words[1].to_owned(), [end(words[4]), end(words[5])]))
    };
    shown.lines().map(line).collect()
}

#[test]
fn states_addresses_and_cookies_are_those_of_ss() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let sockets = sockets(&mut probe);
    let ours: Sockets = listed(&cgroup, &[])
        .into_iter()
        .map(|line| {
            let socket = &line["socket"];
            let end = |which: &str| match socket[which].as_str().map(|end| end.parse::<SocketAddr>().unwrap()) {
                Some(end) => (Some(end.ip()).filter(|ip| !ip.is_unspecified()), end.port()),
                None => (None, 0),
            };
            let shown = (line["state"].as_str().unwrap().to_owned(), [end("local"), end("remote")]);
            (socket["cookie"].as_u64().unwrap(), shown)
        })
        .collect();
    let theirs = shown_by_ss(probe.pid);
    assert!(theirs.len() >= 15, "{theirs:?}");
    for (cookie, shown) in &theirs {
        assert_eq!(ours.get(cookie), Some(shown), "cookie {cookie:#x}");
    }
    // Also the sockets that `ss` does not show.
    for (what, fd) in &sockets {
        let cookie = u64::from_ne_bytes(probe.get(*fd, SO_COOKIE, 8).unwrap().try_into().unwrap());
        assert!(ours.contains_key(&cookie), "{what}");
    }
}

#[test]
fn unchanged_sockets_show_no_options_after_any_traffic() {
    const MUCH: usize = 8 << 20;
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let mut sockets = sockets(&mut probe);
    let fresh = probe.value_on_new_socket(SO_RCVBUF);
    let kinds = if Kernel::current().has("mptcp") { &[Kind::Tcp, Kind::Mptcp][..] } else { &[Kind::Tcp] };
    for kind in kinds {
        let pair = probe.pair(Family::Inet, *kind);
        probe.transfer(pair.client, pair.server, MUCH);
        probe.transfer(pair.server, pair.client, MUCH);
        sockets.extend([named(("busy client", pair.client)), named(("busy server", pair.server))]);
        if *kind == Kind::Tcp {
            assert_ne!(probe.int(pair.server, SO_RCVBUF), fresh, "the kernel tunes the buffer");
        }
    }
    let shown = by_descriptor(&cgroup, &[]);
    for (what, fd) in sockets {
        assert_eq!(shown[&fd]["values"], json!({}), "{what}");
    }
}

#[test]
fn only_options_that_the_owner_has_set_are_shown() {
    let cgroup = Cgroup::new();
    let mut probe = Probe::start(&cgroup);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    probe.set(pair.client, TCP_NODELAY, 1).unwrap();
    probe.set(pair.client, SO_SNDBUF, 50_000).unwrap();
    probe.set(pair.client, TCP_CONGESTION, "reno").unwrap();
    probe.set(pair.listener, TCP_MAXSEG, 1000).unwrap();
    probe.set(pair.server, SO_LINGER, linger(1, 9)).unwrap();
    let unbound = probe.open(Family::Inet6, Kind::Udp);
    probe.set(unbound, SO_MARK, 7).unwrap();
    let raw = probe.open(Family::Inet, Kind::Raw);
    let shown = by_descriptor(&cgroup, &[]);
    let mut client = json!({ "TCP_NODELAY": 1, "TCP_CONGESTION": "reno" });
    // Before 5.15 (SO_BUF_LOCK), it is unknown whether the kernel has tuned the buffer.
    if probe.get(pair.client, SO_BUF_LOCK, 4).is_ok() {
        client["SO_SNDBUF"] = json!(100_000);
        client["SO_BUF_LOCK"] = json!(1);
    }
    for (fd, expected) in [
        (pair.client, client),
        (pair.listener, json!({ "TCP_MAXSEG": 1000 })),
        (pair.server, json!({ "SO_LINGER": { "onoff": 1, "linger": 9 } })),
        (unbound, json!({ "SO_MARK": 7 })),
    ] {
        assert_eq!(shown[&fd]["values"], expected);
        assert_eq!(shown[&fd]["pid"], probe.pid);
        assert_eq!(shown[&fd]["comm"], "sockprobe");
        assert_eq!(shown[&fd]["cgroup"], cgroup.name());
        assert_eq!(shown[&fd]["socket"]["cgroup"], cgroup.name());
    }
    assert_eq!(shown[&unbound]["socket"]["protocol"], "udp");
    assert_eq!(shown[&raw]["socket"]["protocol"], "other", "the name of raw sockets in policies");
    let path = cgroup.path().display().to_string();
    let text = stdout(&agent::output(&["ls", "--cgroup", &path]));
    assert!(text.starts_with(&format!("{}\n  protocol  state", cgroup.name())), "{text}");
    assert!(text.contains(&format!("sockprobe[{}] fd {unbound}\n    SO_MARK = 0x7\n", probe.pid)), "{text}");
}

/// Returns a `struct linger`.
fn linger(on: i32, seconds: i32) -> Vec<u8> {
    [on.to_ne_bytes(), seconds.to_ne_bytes()].concat()
}

/// For a bound socket, the kernel reports its cgroup; for an unbound socket, the process's cgroup counts.
#[test]
fn socket_belongs_to_the_cgroup_in_which_it_was_created() {
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let below = one.child("below");
    let mut probe = Probe::start(&one);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    probe.enter(&below);
    let (listener, _) = probe.listener(Family::Inet, Kind::Tcp);
    probe.enter(&other);
    let unbound = probe.open(Family::Inet, Kind::Udp);
    let found = |cgroup: &Cgroup| by_descriptor(cgroup, &[]).into_keys().collect::<Vec<_>>();
    assert_eq!(found(&one), [pair.listener, pair.client, pair.server, listener]);
    assert_eq!(found(&below), [listener]);
    assert_eq!(found(&other), [unbound]);
    let host = agent::output(&["ls", "-o", "json"]);
    let ours = stdout(&host).lines().filter(|line| line.contains(&format!("\"pid\":{},", probe.pid))).count();
    assert_eq!(ours, 5, "without a target, all sockets are shown");
}

#[test]
fn shared_socket_is_shown_once_with_all_its_processes() {
    let mut python = Command::new("python3");
    let script = "import os, signal, socket\n\
                  s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n\
                  child = os.fork()\n\
                  if child: print(os.getpid(), child, s.fileno(), flush=True)\n\
                  signal.pause()\n";
    python.args(["-c", script]);
    let mut running = Running::start(python);
    let printed = running.lines(1).remove(0);
    let numbers: Vec<i64> = printed.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let lines = listed(&running.home, &[]);
    let [line] = lines.as_slice() else { panic!("expected one socket: {lines:#?}") };
    let [parent, child, fd] = numbers[..] else { panic!("{printed}") };
    let (first, second) = (parent.min(child), parent.max(child));
    assert_eq!((&line["pid"], &line["fd"], &line["state"]), (&json!(first), &json!(fd), &json!("LISTEN")));
    assert_eq!(line["shared_with"], json!([{ "pid": second, "fd": fd }]));
}

/// Only the socket keeps its network namespace alive.
#[test]
fn socket_in_a_network_namespace_without_processes_is_found_with_its_state() {
    let mut python = Command::new("unshare");
    let script = "import ctypes, signal, socket\n\
                  s = socket.socket(); s.bind(('0.0.0.0', 7)); s.listen()\n\
                  new_network = 0x40000000\n\
                  print(ctypes.CDLL(None).unshare(new_network), flush=True)\n\
                  signal.pause()\n";
    python.args(["--net", "python3", "-c", script]);
    let mut running = Running::start(python);
    assert_eq!(running.lines(1), ["0"]);
    let lines = listed(&running.home, &[]);
    let [line] = lines.as_slice() else { panic!("expected one socket: {lines:#?}") };
    assert_eq!((&line["state"], &line["socket"]["local"]), (&json!("LISTEN"), &json!("0.0.0.0:7")));
    assert_eq!((&line["pid"], &line["values"]), (&json!(running.pid()), &json!({})));
}

#[test]
fn ls_of_a_policy_shows_the_sockets_of_its_targets() {
    let (target, other) = (Cgroup::new(), Cgroup::new());
    let below = target.child("below");
    let mut probe = Probe::start(&other);
    probe.listener(Family::Inet, Kind::Tcp);
    probe.enter(&below);
    let (listener, _) = probe.listener(Family::Inet, Kind::Tcp);
    let policy = format!("[target]\ncgroup = \"{}\"\n[[rule]]\nset = {{ TCP_NODELAY = true }}\n", target.name());
    let policy = PolicyFile::new(policy);
    let shown = stdout(&agent::output(&["ls", "-o", "json", policy.path().to_str().unwrap()]));
    let line: Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert_eq!((&line["fd"], &line["socket"]["cgroup"]), (&json!(listener), &json!(below.name())));
    let template = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n");
    for arguments in [["ls", template.path().to_str().unwrap()], ["ls", "--cgroup=/no/such/cgroup"]] {
        let output = agent::output(&arguments);
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{}", stderr(&output));
        assert!(stderr(&output).contains("help: "), "{}", stderr(&output));
    }
}
