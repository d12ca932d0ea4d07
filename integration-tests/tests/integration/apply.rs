//! Sockets that were there before: brought in line with policies, and given back what they had.

use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::{IP_TOS, SO_MARK, SO_PRIORITY, SO_SNDBUF, SocketOption, TCP_CONGESTION, TCP_KEEPIDLE, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Fd, Kind},
};

use crate::{stderr, stdout};

/// Set in the order of the option table, in which IP_TOS comes before SO_PRIORITY, which it resets.
const SET: &str = "set = { SO_MARK = 7, IP_TOS = \"AF21\", SO_PRIORITY = 5, SO_SNDBUF = \"32KiB\" }\n";
const SET_TCP: &str = "set = { TCP_NODELAY = true, TCP_KEEPIDLE = \"61s\", TCP_CONGESTION = \"reno\" }\n";
const OF_ALL: [SocketOption; 4] = [SO_MARK, IP_TOS, SO_PRIORITY, SO_SNDBUF];
const OF_TCP: [SocketOption; 2] = [TCP_NODELAY, TCP_KEEPIDLE];

fn policy(target: &Cgroup, more: &str) -> PolicyFile {
    let rules = format!("[[rule]]\n{SET}[[rule]]\nmatch = {{ protocol = \"tcp\" }}\n{SET_TCP}");
    PolicyFile::new(format!("{more}[target]\ncgroup = {:?}\n{rules}", target.name()))
}

/// What a socket has of the options, as its owner is told.
fn values(probe: &mut Probe, socket: Fd, is_tcp: bool) -> (Vec<i32>, Option<String>) {
    let numbers = OF_ALL.iter().chain(OF_TCP.iter().filter(|_| is_tcp));
    let numbers = numbers.map(|option| probe.int(socket, *option)).collect();
    (numbers, is_tcp.then(|| probe.text(socket, TCP_CONGESTION)))
}

/// A socket of each kind, and whether it is one of TCP.
fn sockets(probe: &mut Probe) -> Vec<(Fd, bool)> {
    let (listener, _) = probe.listener(Family::Inet, Kind::Tcp);
    let connection = probe.pair(Family::Inet, Kind::Tcp);
    let [bound, connected, idle] = [(); 3].map(|()| probe.open(Family::Inet, Kind::Udp));
    let address = probe.bind(bound, "127.0.0.1:0".parse().unwrap());
    probe.connect(connected, address);
    let tcp = [listener, connection.client, connection.server].map(|socket| (socket, true));
    let udp = [bound, connected, idle].map(|socket| (socket, false));
    [tcp, udp].concat()
}

fn apply(instance: &Instance, policy: &PolicyFile, arguments: &[&str]) -> String {
    let path = policy.path().to_str().unwrap();
    let output = instance.run("apply", &[&[path], arguments].concat());
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

#[test]
fn sockets_that_were_there_before_are_brought_in_line_and_given_back_what_they_had() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = policy(&target, "");
    let elsewhere = Cgroup::new();
    let (mut probe, mut outside) = (Probe::start(&target), Probe::start(&elsewhere));
    let foreign = outside.open(Family::Inet, Kind::Tcp);
    let sockets = sockets(&mut probe);
    let all =
        |probe: &mut Probe| -> Vec<_> { sockets.iter().map(|(socket, tcp)| values(probe, *socket, *tcp)).collect() };
    let before = all(&mut probe);

    let said = apply(&instance, &policy, &["--dry-run"]);
    assert!(said.contains("SO_MARK: 0x0, would be given 0x7") && said.contains("changed: 0"), "{said}");
    assert_eq!(all(&mut probe), before);

    apply(&instance, &policy, &[]);
    // AF21 is 18, six bits from the second on; the kernel doubles buffers.
    let common = [7, 18 << 2, 5, 2 * 32 * 1024];
    for ((socket, is_tcp), (numbers, congestion)) in sockets.iter().zip(all(&mut probe)) {
        if !is_tcp && *socket == sockets[5].0 {
            // Neither bound nor connected: what is set at birth, no more.
            assert_eq!((numbers[0], numbers[2]), (7, 5));
        } else if *is_tcp {
            assert_eq!((numbers, congestion.as_deref()), ([&common[..], &[1, 61]].concat(), Some("reno")));
        } else {
            assert_eq!(numbers, common);
        }
    }
    assert_eq!(outside.int(foreign, SO_MARK), 0);
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains(", changed: 0, in 0 options\n"), "{again}");

    // What somebody has changed since is left.
    let (client, _) = sockets[1];
    probe.set(client, TCP_KEEPIDLE, 99).unwrap();
    let output = instance.run("apply", &["--restore"]);
    assert!(
        stdout(&output).contains("changed by others since: 1; refused: 0"),
        "{}{}",
        stdout(&output),
        stderr(&output)
    );
    assert_eq!(probe.int(client, TCP_KEEPIDLE), 99);
    let default = probe.fresh(TCP_KEEPIDLE);
    probe.set(client, TCP_KEEPIDLE, default).unwrap();
    assert_eq!(all(&mut probe), before);
    assert!(instance.left().is_empty(), "{:?}", instance.left());
}

#[test]
fn limits_bring_within_bounds() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let text =
        format!("[target]\ncgroup = {:?}\n[[rule]]\nlimit = {{ TCP_KEEPIDLE = {{ max = 60 }} }}\n", target.name());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    probe.set(pair.client, TCP_KEEPIDLE, 100).unwrap();
    probe.set(pair.server, TCP_KEEPIDLE, 50).unwrap();
    apply(&instance, &PolicyFile::new(text), &[]);
    assert_eq!([pair.client, pair.server].map(|socket| probe.int(socket, TCP_KEEPIDLE)), [60, 50]);
    instance.run("apply", &["--restore"]);
    assert_eq!(probe.int(pair.client, TCP_KEEPIDLE), 100);
}

#[test]
fn policy_of_a_dry_run_is_not_applied() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = policy(&target, "mode = \"dry-run\"\n");
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let said = apply(&instance, &policy, &[]);
    assert!(said.contains("would be given"), "{said}");
    assert_eq!(probe.int(pair.client, SO_MARK), 0);
}

#[test]
fn detach_gives_back_what_sockets_had_if_it_is_asked_to() {
    for is_asked in [true, false] {
        let (target, instance) = (Cgroup::new(), Instance::new());
        let policy = policy(&target, "");
        let mut probe = Probe::start(&target);
        let pair = probe.pair(Family::Inet, Kind::Tcp);
        instance.attach(policy.path());
        assert_eq!(probe.int(pair.client, SO_MARK), 0, "attach leaves live sockets alone");
        apply(&instance, &policy, &[]);
        assert_eq!(probe.int(pair.client, SO_MARK), 7);
        let arguments: &[&str] = if is_asked { &["detach", "--restore"] } else { &["detach"] };
        let output = agent::output(&[arguments, &[&instance.name]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(probe.int(pair.client, SO_MARK), if is_asked { 0 } else { 7 });
        assert!(instance.left().is_empty(), "{:?}", instance.left());
    }
}
