//! Sockets that were there before: brought in line with policies, and given back what they had.

mod running;

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::{IP_TOS, SO_MARK, SO_PRIORITY, SO_SNDBUF, SocketOption, TCP_CONGESTION, TCP_KEEPIDLE, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    require,
    script::{Family, Fd, Kind},
    wait,
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
    assert!(said.contains("SO_MARK: 0x0 -> 0x7 (dry run)") && said.contains("dry run: would change "), "{said}");
    assert_eq!(all(&mut probe), before);

    let said = apply(&instance, &policy, &["--quiet"]);
    assert!(said.starts_with("sockets: 7, changed: 7, in "), "{said}");
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
    let again = apply(&instance, &policy, &["--quiet"]);
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

/// More than are worth a walk over all of them.
const MANY: usize = 150;

#[test]
fn many_tcp_sockets_are_brought_in_line_without_a_look_into_any() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let mut sockets = vec![listener];
    for _ in 0..MANY {
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.connect(client, address);
        sockets.extend([client, probe.accept(listener)]);
    }
    let policy = policy(&target, "");
    let all = |probe: &mut Probe| -> Vec<_> { sockets.iter().map(|socket| values(probe, *socket, true)).collect() };
    let before = all(&mut probe);

    assert_eq!(calls_on_sockets(&instance, &policy), Vec::<String>::new());
    let wanted = ([7, 18 << 2, 5, 2 * 32 * 1024, 1, 61].to_vec(), Some("reno".to_owned()));
    assert!(all(&mut probe).iter().all(|socket| *socket == wanted), "{:?}", all(&mut probe));
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains(&format!("sockets: {}, changed: 0, in 0 options\n", sockets.len())), "{again}");

    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("changed by others since: 0; refused: 0"), "{}", stdout(&output));
    assert_eq!(all(&mut probe), before);
}

/// Applies a policy, and gives the calls by which a socket of another process was taken or set meanwhile.
fn calls_on_sockets(instance: &Instance, policy: &PolicyFile) -> Vec<String> {
    let of_netlink = |line: &&str| line.contains("SOL_NETLINK");
    traced("pidfd_getfd,setsockopt", instance, policy)
        .lines()
        .filter(|line| line.contains("sockopt(") || line.contains("pidfd_getfd("))
        .filter(|line| !of_netlink(line))
        .map(str::to_owned)
        .collect()
}

/// Applies a policy, and gives what strace says of these calls of the agent's.
fn traced(calls: &str, instance: &Instance, policy: &PolicyFile) -> String {
    let mut command = Command::new("strace");
    command.args(["-f", "-e", &format!("trace={calls}")]).arg(agent::program());
    command.args(["apply", "--instance", &instance.name]).arg(policy.path());
    let output = command.output().unwrap_or_else(|error| panic!("strace: {error}"));
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    stderr(&output)
}

/// Keeps so many files open that it is worth a program to tell who has which sockets.
const MANY_FILES: &str =
    "ulimit -n 10000; for ((file = 0; file < 8500; file++)); do exec {descriptor}< /dev/null; done; echo there; read";

#[test]
fn who_has_sockets_is_told_without_a_look_at_files_where_many_are_open() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let files = format!("/proc/{}/fd", probe.pid);
    let policy = policy(&target, "");
    let mut bash = Command::new("bash");
    let mut many = bash.args(["-c", MANY_FILES]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(many.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "there\n");
    assert!(!traced("%file", &instance, &policy).contains(&files));
    assert_eq!([pair.client, pair.server].map(|socket| probe.int(socket, SO_MARK)), [7, 7]);
    drop(many.stdin.take());
    many.wait().unwrap();
}

#[test]
fn connection_that_nobody_has_accepted_yet_is_brought_in_line_and_given_back_what_it_had() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let clients = [(); 2].map(|()| probe.open(Family::Inet, Kind::Tcp));
    for client in clients {
        probe.connect(client, address);
    }
    // No buffer: what the kernel has tuned beyond what may be set takes a descriptor to be put back.
    let set = "set = { SO_MARK = 7, TCP_CONGESTION = \"reno\" }";
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\n{set}\n", target.name());
    apply(&instance, &PolicyFile::new(text), &[]);
    let server = probe.accept(listener);
    for socket in [listener, clients[0], clients[1], server] {
        assert_eq!(probe.int(socket, SO_MARK), 7);
        assert_eq!(probe.text(socket, TCP_CONGESTION), "reno");
    }
    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("; changed by others since: 0; refused: 0"), "{}", stdout(&output));
    let late = probe.accept(listener);
    for socket in [clients[1], server, late] {
        assert_eq!(probe.int(socket, SO_MARK), 0);
    }
}

#[test]
fn value_that_the_kernel_refuses_on_many_sockets_is_told_and_counted_and_the_rest_is_set() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    // Whoever is not accepted yet has it done by the iterator.
    let set = "set = { TCP_CONGESTION = \"no-such\", TCP_KEEPIDLE = \"61s\" }";
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\n{set}\n", target.name());
    let before = probe.text(client, TCP_CONGESTION);
    let policy = PolicyFile::new(text);
    let output = instance.run("apply", &[policy.path().to_str().unwrap()]);
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(2), "{said}{}", stderr(&output));
    assert_eq!(said.matches("ENOENT").count(), 3, "{said}");
    assert!(said.contains("3 values were refused by the kernel"), "{said}");
    let server = probe.accept(listener);
    for socket in [listener, client, server] {
        assert_eq!(probe.int(socket, TCP_KEEPIDLE), 61);
        assert_eq!(probe.text(socket, TCP_CONGESTION), before);
    }
}

#[test]
fn what_only_programs_can_read_and_set_is_set_and_put_back() {
    require!("iter/tcp");
    require!("TCP_RTO_MAX_MS"); // From 6.15 on, as what can be read of TCP_BPF_RTO_MIN.
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_BPF_RTO_MIN = \"40ms\" }}\n", target.name());
    let policy = PolicyFile::new(text);
    let said = apply(&instance, &policy, &[]);
    assert!(said.contains("TCP_BPF_RTO_MIN: 200ms -> 40ms"), "{said}");
    assert!(said.contains("changed: 3, in 3 options"), "{said}");
    // Its owner is not told, but `ss` knows for how long the kernel waits: with each round trip more of what it is to.
    let server = probe.accept(listener);
    // The probe has a network of its own.
    let network = format!("--net=/proc/{}/ns/net", probe.pid);
    let mut ss = Command::new("nsenter");
    ss.args([&network, "ss", "--tcp", "--info", "--numeric", "--no-header"]);
    let mut waits_less = || {
        probe.talk(client, server);
        stdout(&ss.output().unwrap()).contains(" rto:4")
    };
    assert!(wait::until(wait::PATIENCE, &mut waits_less), "it waits as long as it did");
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains("changed: 0, in 0 options"), "{again}");
    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("restored: 3 options;"), "{}{}", stdout(&output), stderr(&output));
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains("TCP_BPF_RTO_MIN: 200ms -> 40ms"), "{again}");
}

#[test]
fn option_that_cannot_be_changed_on_a_live_socket_is_told_of_each() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let text = format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nmatch = {{ protocol = \"tcp\" }}\nset = {{ TCP_BPF_IW = 20, SO_MARK = 7 }}\n",
        target.name()
    );
    let said = apply(&instance, &PolicyFile::new(text), &[]);
    let untold: Vec<&str> = said.lines().filter(|line| line.starts_with("unknown ")).collect();
    assert_eq!(untold.len(), 2, "{said}");
    assert!(untold[0].contains("TCP_BPF_IW: getsockopt does not show it"), "{said}");
    assert!(said.contains("2 options are in an unknown state"), "{said}");
    assert_eq!([pair.client, pair.server].map(|socket| probe.int(socket, SO_MARK)), [7, 7]);
}

#[test]
fn value_that_the_system_does_not_allow_is_set_once_and_is_no_change_then() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    // Nobody accepts it: the iterator does it all.
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_SNDBUF = \"300MiB\" }}\n", target.name());
    let policy = PolicyFile::new(text);
    assert!(apply(&instance, &policy, &[]).contains("changed: 3,"));
    let most = probe.int(client, SO_SNDBUF);
    assert!(apply(&instance, &policy, &[]).contains("changed: 0, in 0 options"));
    assert_eq!(probe.int(client, SO_SNDBUF), most);
}

#[test]
fn sockets_are_brought_in_line_in_each_network_namespace() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    // Each probe has a network of its own.
    let mut probes = [(); 2].map(|()| Probe::start(&target));
    let connect = |probe: &mut Probe| {
        let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.connect(client, address);
        [listener, client]
    };
    let sockets = probes.each_mut().map(connect);
    apply(&instance, &policy(&target, ""), &[]);
    for (probe, [listener, client]) in probes.iter_mut().zip(sockets) {
        let server = probe.accept(listener);
        assert_eq!([listener, client, server].map(|socket| probe.int(socket, SO_MARK)), [7; 3]);
    }
}

#[test]
fn what_policies_in_force_set_again_is_kept_to_be_put_back_when_they_end() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = policy(&target, "");
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    instance.attach(policy.path());
    apply(&instance, &policy, &["--quiet"]);
    let output = instance.run("apply", &["--restore"]);
    assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
    assert!(
        stdout(&output).starts_with("restored: 0 options; changed by others since: 0; refused: 21"),
        "{}",
        stdout(&output)
    );
    assert!(stderr(&output).contains("policies that are in force set their values again"), "{}", stderr(&output));
    assert_eq!(probe.int(pair.client, SO_MARK), 7);
    let output = agent::output(&["detach", "--restore", &instance.name]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    assert_eq!(probe.int(pair.client, SO_MARK), 0);
}

#[test]
fn option_that_another_one_resets_is_given_back_too() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    probe.set(pair.client, SO_PRIORITY, 3).unwrap();
    apply(&instance, &policy(&target, ""), &["--quiet"]);
    assert_eq!(probe.int(pair.client, SO_PRIORITY), 5);
    let output = instance.run("apply", &["--restore"]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    assert_eq!([IP_TOS, SO_PRIORITY].map(|option| probe.int(pair.client, option)), [0, 3]);
}

#[test]
fn limits_bring_within_bounds() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let text =
        format!("[target]\ncgroup = {:?}\n[[rule]]\nlimit = {{ TCP_KEEPIDLE = {{ max = \"60s\" }} }}\n", target.name());
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
    assert!(said.contains("(dry run)"), "{said}");
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
        let kept = format!("\nkept with instance {}: ", instance.name);
        let status = || stdout(&agent::output(&["status"]));
        assert!(status().contains(&kept), "{}", status());
        let arguments: &[&str] = if is_asked { &["detach", "--restore"] } else { &["detach"] };
        let output = agent::output(&[arguments, &[&instance.name]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(probe.int(pair.client, SO_MARK), if is_asked { 0 } else { 7 });
        assert!(instance.left().is_empty(), "{:?}", instance.left());
        assert!(!status().contains(&kept), "{}", status());
    }
}
