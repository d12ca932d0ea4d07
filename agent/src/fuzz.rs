//! The targets of `fuzz/`: one function for each kind of input that other programs, users or the kernel write.
//!
//! A target panics on a finding. The unit tests run all targets with the inputs in `fuzz/corpus`.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::LazyLock,
};

use abi::setting::OptionKey;

use crate::{
    compile::{
        Desired, compile, facts,
        naive::{Matches, governing_in, naive_governing, naive_winner, rule_matches, winner_in},
    },
    coverage::all,
    events::{Executables, HostContext, decode},
    explain::{WhyNot, explain},
    host::{containers, routes, sock_diag},
    instance, journal,
    kernel::Record,
    lint,
    options::{GUARDS, SocketOption, by_name, by_spelling},
    policy::{
        self, Policy, Socket,
        diagnostic::Style,
        model::{Direction, Family, Named, Protocol},
    },
    sources,
    worker::{Response, framed, response},
};

/// A function that takes bytes.
pub type Target = fn(&[u8]);

/// All targets, by the names of their folders in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 7] = [
    ("policy", policy),
    ("ring", ring),
    ("netlink", netlink),
    ("journal", journal),
    ("record", record),
    ("containers", containers),
    ("watchers", watchers),
];

/// Bytes of an input that describe a socket. The rest is a policy.
const SOCKET_LEN: usize = 16;

/// Compiles a policy if it is valid, and compares the decisions of the tables with those of the rules.
pub fn policy(input: &[u8]) {
    let Some((bytes, text)) = input.split_at_checked(SOCKET_LEN) else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    let parsed = sources::parse(Path::new("fuzz.toml"), text);
    let policy = match parsed {
        Ok((policy, warnings)) => {
            drop(policy::render(&warnings, Style::Plain));
            policy
        }
        Err(errors) => {
            assert!(errors.count() > 0, "refused without an error");
            drop(errors.render(Style::Coloured));
            errors.diagnostics.iter().for_each(|diagnostic| drop(diagnostic.to_json()));
            return;
        }
    };
    let policies = [policy];
    drop(lint::caveats(&policies));
    // Too many rules are an error, not a panic.
    let Ok(desired) = compile(&policies, &[all(&policies)]) else { return };
    assert_same_decisions(&policies[0], &desired, &socket(bytes));
}

fn assert_same_decisions(policy: &Policy, desired: &Desired, socket: &Socket) {
    let options: Vec<Named> = policy.rules.iter().flat_map(|rule| &rule.clauses).map(|clause| clause.option).collect();
    for option in options {
        let compiled = winner_in(desired, 0, option, &facts(socket));
        assert_eq!(compiled, naive_winner(&policy.rules, option, socket), "{option} on {socket:?}");
    }
    // Also compares calls on other names of the same values, and calls on options that undo a setting.
    for key in governed_keys(desired) {
        let expected = naive_governing(&policy.rules, key, socket);
        assert_eq!(governing_in(desired, 0, key, &facts(socket)), expected, "{key:?} on {socket:?}");
    }
    for option in explain(desired, &desired.scopes[0], socket).options {
        for (clause, why) in option.others {
            let explained = match why {
                WhyNot::Unmet(_) => Matches::No,
                WhyNot::NotYet(_) => Matches::Perhaps,
                WhyNot::Absent(_) | WhyNot::After(_) | WhyNot::Waits(_) => Matches::Yes,
            };
            let expected = rule_matches(&policy.rules[clause.source.rule].selector, socket);
            assert_eq!(explained, expected, "{clause:?} on {socket:?}");
        }
    }
}

/// Returns the options that may have rows in the tables, and all other names of options that rules name.
fn governed_keys(desired: &Desired) -> BTreeSet<OptionKey> {
    let values: BTreeSet<OptionKey> = desired.sources.iter().map(|source| source.option.value_key()).collect();
    let spellings = values.into_iter().filter_map(by_spelling).flat_map(SocketOption::spellings).map(|(key, _)| key);
    let guards = GUARDS.iter().filter_map(|guard| by_name(guard.option)).map(SocketOption::key);
    desired.options.iter().copied().chain(spellings).chain(guards).collect()
}

/// Returns a socket made from bytes. Addresses are few and similar, so that they match those of policies.
fn socket(bytes: &[u8]) -> Socket {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    let family = if byte(0) & 1 == 0 { Family::Ipv4 } else { Family::Ipv6 };
    let address = |at: usize| -> IpAddr {
        let (a, b, c, d) = (byte(at), byte(at + 1), byte(at + 2), byte(at + 3));
        match family {
            Family::Ipv4 => Ipv4Addr::new(a, b, c, d).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd00 | u16::from(a), b.into(), 0, 0, 0, 0, c.into(), d.into()).into(),
        }
    };
    let port = |at: usize| u16::from_be_bytes([byte(at), byte(at + 1)]);
    let has = |bit: u8| byte(1) & 1 << bit != 0;
    let (local, remote) = (has(0).then(|| address(2)), has(1).then(|| SocketAddr::new(address(6), port(10))));
    Socket {
        protocol: Some([Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Other][usize::from(byte(0) >> 1 & 3)]),
        family: (has(2) || local.is_some() || remote.is_some()).then_some(family),
        direction: has(3).then_some(if has(4) { Direction::Inbound } else { Direction::Outbound }),
        local,
        local_port: has(5).then(|| port(12)),
        remote,
        cgroup: None,
    }
}

/// The policies with which records are decoded.
static POLICIES: LazyLock<Option<Desired>> = LazyLock::new(|| {
    let text = "[[rule]]\nset = { SO_MARK = 1, TCP_NODELAY = true }\nlimit = { SO_SNDBUF = { max = \"4MiB\" } }\n\
                deny = [\"SO_BINDTODEVICE\"]\n";
    let (policy, _) = sources::parse(Path::new("fuzz.toml"), text).ok()?;
    compile(&[policy], &[vec![0]]).ok()
});

/// Decodes a record of the ring buffer, and formats it. The first byte is the kind of record. The other bytes are the
/// record, padded or cut to its size.
pub fn ring(input: &[u8]) {
    let (Some(desired), Some((kind, input))) = (&*POLICIES, input.split_first()) else { return };
    let mut bytes = input.to_vec();
    match kind {
        0 => bytes.resize(size_of::<abi::event::Event>(), 0),
        1 => bytes.resize(size_of::<abi::event::ExecutableFile>(), 0),
        _ => {}
    }
    match Record::read(&bytes) {
        Record::Event(event) => {
            let context = HostContext {
                exe: Err("unknown"),
                cgroup: Some("/a".to_owned()),
                container: None,
                socket_cgroup: None,
                monotonic_epoch_ns: 1 << 60,
                btf_error: None,
            };
            if let Ok(event) = decode(&event, desired, context) {
                assert!(!event.to_string().is_empty());
                drop(event.to_json());
            }
        }
        Record::File(file) => {
            let mut executables = Executables::default();
            executables.learn(&file);
            assert!(executables.path_of(&file.executable).is_some());
        }
        Record::Unknown => {}
    }
}

/// Parses netlink messages of the kernel.
pub fn netlink(input: &[u8]) {
    // Both may fail, but must not panic.
    let (_, _): (io::Result<_>, io::Result<_>) = (sock_diag::in_datagram(input), routes::in_datagram(input));
}

/// Parses a journal, or a part of one, and then the same with another line.
pub fn journal(input: &[u8]) {
    let read = |text: &[u8]| journal::parse(&mut &*text).unwrap_or_default();
    let before = read(input);
    let line = journal::sample_line();
    let after = read(&[input, b"\n", &line].concat());
    let alone = read(&line);
    assert_eq!((alone.changes.len(), alone.damaged), (1, 0));
    // A line is read whatever comes before it, and does not affect the lines before.
    assert!(alone.changes.keys().all(|place| after.changes.contains_key(place)));
    assert!(before.changes.keys().all(|place| after.changes.contains_key(place)));
    assert_eq!(before.damaged, after.damaged);
}

/// Parses the record of an instance, and compiles its policies as `status` and the next agent do.
pub fn record(input: &[u8]) {
    let Ok(record) = instance::parse_record(input) else { return };
    assert!(record.targets().count() <= input.len());
    for generation in record.generations.iter().chain(&record.retired) {
        // The policies may be invalid, or may not be allowed together.
        let _ = generation.desired();
    }
}

/// Parses a state file of a container runtime or engine, and the response of a worker that read such files.
pub fn containers(input: &[u8]) {
    containers::fuzz::state_file(input);
    if let Response::Whole(bytes) = response(input) {
        containers::fuzz::state_file(bytes);
    }
    let framed = framed(input);
    assert!(matches!(response(&framed), Response::Whole(bytes) if bytes == input));
    // A truncated response is partial.
    let cut = framed.len() / 2;
    assert!(matches!(response(&framed[..cut]), Response::Partial));
}

/// Parses the command line of a process with the name of a watcher, and the kernel's facts about the process.
pub fn watchers(input: &[u8]) {
    containers::fuzz::watcher(input);
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::escape::Escape;

    #[test]
    fn targets_accept_the_corpus() {
        for (name, target) in TARGETS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
            let inputs: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(inputs.len() > 1, "{} has no inputs", folder.escaped());
            for input in inputs {
                let bytes = fs::read(&input).unwrap();
                target(&bytes);
                // Truncated inputs must not fail either.
                (0..bytes.len()).step_by(bytes.len().div_ceil(64).max(1)).for_each(|end| target(&bytes[..end]));
            }
        }
    }
}
