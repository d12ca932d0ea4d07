//! `sockpolicy apply`: existing sockets get the values of policies, and `--restore` gives them their former values.

mod running;

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
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

/// Options are set in the order of the option table. IP_TOS comes before SO_PRIORITY, which it resets.
const SET: &str = "set = { SO_MARK = 7, IP_TOS = \"AF21\", SO_PRIORITY = 5, SO_SNDBUF = \"32KiB\" }\n";
const SET_TCP: &str = "set = { TCP_NODELAY = true, TCP_KEEPIDLE = \"61s\", TCP_CONGESTION = \"reno\" }\n";
const OF_ALL: [SocketOption; 4] = [SO_MARK, IP_TOS, SO_PRIORITY, SO_SNDBUF];
const OF_TCP: [SocketOption; 2] = [TCP_NODELAY, TCP_KEEPIDLE];

fn policy(target: &Cgroup, more: &str) -> PolicyFile {
    let rules = format!("[[rule]]\n{SET}[[rule]]\nmatch = {{ protocol = \"tcp\" }}\n{SET_TCP}");
    PolicyFile::new(format!("{more}[target]\ncgroup = {:?}\n{rules}", target.name()))
}

/// Returns the values of a socket, from getsockopt in its owner.
fn values(probe: &mut Probe, socket: Fd, is_tcp: bool) -> (Vec<i32>, Option<String>) {
    let numbers = OF_ALL.iter().chain(OF_TCP.iter().filter(|_| is_tcp));
    let numbers = numbers.map(|option| probe.int(socket, *option)).collect();
    (numbers, is_tcp.then(|| probe.text(socket, TCP_CONGESTION)))
}

/// Opens a socket of each kind; the bool is whether it is a TCP socket.
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
fn existing_sockets_get_the_policys_values_and_restore_undoes_that() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = policy(&target, "");
    let elsewhere = Cgroup::new();
    let (mut probe, mut outside) = (Probe::start(&target), Probe::start(&elsewhere));
    let foreign = outside.open(Family::Inet, Kind::Tcp);
    let sockets = sockets(&mut probe);
    let all =
        |probe: &mut Probe| -> Vec<_> { sockets.iter().map(|(socket, tcp)| values(probe, *socket, *tcp)).collect() };
    let before = all(&mut probe);

    let printed = apply(&instance, &policy, &["--dry-run"]);
    assert!(
        printed.contains("SO_MARK: 0x0 -> 0x7 (dry run)") && printed.contains("dry run: would change "),
        "{printed}"
    );
    assert_eq!(all(&mut probe), before);

    let printed = apply(&instance, &policy, &["--quiet"]);
    assert!(printed.starts_with("changed ") && printed.contains(" on 7 of 7 sockets\n"), "{printed}");
    // AF21 is 18, in the upper six bits; the kernel doubles buffers.
    let common = [7, 18 << 2, 5, 2 * 32 * 1024];
    for ((socket, is_tcp), (numbers, congestion)) in sockets.iter().zip(all(&mut probe)) {
        if !is_tcp && *socket == sockets[5].0 {
            // Neither bound nor connected: only options that are set at creation.
            assert_eq!((numbers[0], numbers[2]), (7, 5));
        } else if *is_tcp {
            assert_eq!((numbers, congestion.as_deref()), ([&common[..], &[1, 61]].concat(), Some("reno")));
        } else {
            assert_eq!(numbers, common);
        }
    }
    assert_eq!(outside.int(foreign, SO_MARK), 0);
    let again = apply(&instance, &policy, &["--quiet"]);
    assert!(again.contains("changed 0 options on 0 of 7 sockets\n"), "{again}");

    // A value that the application has changed since is not restored.
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
    let default = probe.value_on_new_socket(TCP_KEEPIDLE);
    probe.set(client, TCP_KEEPIDLE, default).unwrap();
    assert_eq!(all(&mut probe), before);
    assert!(instance.left().is_empty(), "{:?}", instance.left());
}

/// More than are worth a walk over all sockets.
const MANY: usize = 150;

#[test]
fn many_tcp_sockets_are_set_without_duplicating_a_descriptor() {
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
    assert!(again.contains(&format!("changed 0 options on 0 of {} sockets\n", sockets.len())), "{again}");

    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("changed by others since: 0; refused: 0"), "{}", stdout(&output));
    assert_eq!(all(&mut probe), before);
}

/// Applies a policy. Returns the calls that duplicated or set sockets of other processes.
fn calls_on_sockets(instance: &Instance, policy: &PolicyFile) -> Vec<String> {
    let of_netlink = |line: &&str| line.contains("SOL_NETLINK");
    traced("pidfd_getfd,setsockopt", instance, policy)
        .lines()
        .filter(|line| line.contains("sockopt(") || line.contains("pidfd_getfd("))
        .filter(|line| !of_netlink(line))
        .map(str::to_owned)
        .collect()
}

/// Applies a policy. Returns strace's output for these calls of the agent.
fn traced(calls: &str, instance: &Instance, policy: &PolicyFile) -> String {
    let mut command = Command::new("strace");
    command.args(["-f", "-e", &format!("trace={calls}")]).arg(agent::program());
    command.args(["apply", "--instance", &instance.name]).arg(policy.path());
    let output = command.output().unwrap_or_else(|error| panic!("strace: {error}"));
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    stderr(&output)
}

/// Keeps so many files open that finding sockets with a BPF program is faster than reading /proc/PID/fd.
const MANY_FILES: &str =
    "ulimit -n 10000; for ((file = 0; file < 8500; file++)); do exec {descriptor}< /dev/null; done; echo there; read";

#[test]
fn socket_owners_are_found_without_reading_fd_directories_if_many_files_are_open() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let files = format!("/proc/{}/fd", probe.pid);
    let policy = policy(&target, "");
    let mut bash = Command::new("bash");
    let mut many = bash.args(["-c", MANY_FILES]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut printed = String::new();
    BufReader::new(many.stdout.take().unwrap()).read_line(&mut printed).unwrap();
    assert_eq!(printed, "there\n");
    assert!(!traced("%file", &instance, &policy).contains(&files));
    assert_eq!([pair.client, pair.server].map(|socket| probe.int(socket, SO_MARK)), [7, 7]);
    drop(many.stdin.take());
    many.wait().unwrap();
}

#[test]
fn connection_in_the_accept_queue_is_set_and_restored() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let clients = [(); 2].map(|()| probe.open(Family::Inet, Kind::Tcp));
    for client in clients {
        probe.connect(client, address);
    }
    // No buffer size: restoring a size beyond the configured maximum, which the kernel has tuned, needs a descriptor.
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
fn refused_value_is_reported_and_counted_and_other_options_are_set() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    // The iterator sets options of a socket in the accept queue.
    let set = "set = { TCP_CONGESTION = \"no-such\", TCP_KEEPIDLE = \"61s\" }";
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\n{set}\n", target.name());
    let before = probe.text(client, TCP_CONGESTION);
    let policy = PolicyFile::new(text);
    let output = instance.run("apply", &[policy.path().to_str().unwrap()]);
    let printed = stdout(&output);
    assert_eq!(output.status.code(), Some(2), "{printed}{}", stderr(&output));
    assert_eq!(printed.matches("ENOENT").count(), 3, "{printed}");
    assert!(printed.contains("3 options refused by the kernel"), "{printed}");
    let server = probe.accept(listener);
    for socket in [listener, client, server] {
        assert_eq!(probe.int(socket, TCP_KEEPIDLE), 61);
        assert_eq!(probe.text(socket, TCP_CONGESTION), before);
    }
}

#[test]
fn options_that_only_programs_can_access_are_set_and_restored() {
    require!("iter/tcp");
    require!("TCP_RTO_MAX_MS"); // Since 6.15, as is reading TCP_BPF_RTO_MIN.
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_BPF_RTO_MIN = \"40ms\" }}\n", target.name());
    let policy = PolicyFile::new(text);
    let printed = apply(&instance, &policy, &[]);
    assert!(printed.contains("TCP_BPF_RTO_MIN: 200ms -> 40ms"), "{printed}");
    assert!(printed.contains("changed 3 options on 3 of 3 sockets"), "{printed}");
    // getsockopt does not show the value, but `ss` shows the kernel's timeout, which approaches the new value with
    // each round trip.
    let server = probe.accept(listener);
    // The probe has its own network namespace.
    let network = format!("--net=/proc/{}/ns/net", probe.pid);
    let mut ss = Command::new("nsenter");
    ss.args([&network, "ss", "--tcp", "--info", "--numeric", "--no-header"]);
    let mut waits_less = || {
        probe.exchange_bytes(client, server);
        stdout(&ss.output().unwrap()).contains(" rto:4")
    };
    assert!(wait::until(wait::TIMEOUT, &mut waits_less), "the retransmission timeout does not change");
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains("changed 0 options on 0 of "), "{again}");
    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("restored: 3 options;"), "{}{}", stdout(&output), stderr(&output));
    let again = apply(&instance, &policy, &[]);
    assert!(again.contains("TCP_BPF_RTO_MIN: 200ms -> 40ms"), "{again}");
}

#[test]
fn option_that_cannot_be_read_from_an_existing_socket_is_reported_for_each_socket() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let text = format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nmatch = {{ protocol = \"tcp\" }}\nset = {{ TCP_BPF_IW = 20, SO_MARK = 7 }}\n",
        target.name()
    );
    let printed = apply(&instance, &PolicyFile::new(text), &[]);
    let unknown: Vec<&str> = printed.lines().filter(|line| line.starts_with("unknown ")).collect();
    assert_eq!(unknown.len(), 2, "{printed}");
    assert!(unknown[0].contains("TCP_BPF_IW: getsockopt does not show it"), "{printed}");
    assert!(printed.contains("2 options unknown"), "{printed}");
    assert_eq!([pair.client, pair.server].map(|socket| probe.int(socket, SO_MARK)), [7, 7]);
}

#[test]
fn value_beyond_a_system_limit_is_set_once_and_not_reported_as_a_change_again() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    // No process accepts the connection, so the iterator sets all options.
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let text = format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_SNDBUF = \"300MiB\" }}\n", target.name());
    let policy = PolicyFile::new(text);
    assert!(apply(&instance, &policy, &[]).contains(" on 3 of "));
    let most = probe.int(client, SO_SNDBUF);
    assert!(apply(&instance, &policy, &[]).contains("changed 0 options on 0 of "));
    assert_eq!(probe.int(client, SO_SNDBUF), most);
}

#[test]
fn sockets_are_set_in_each_network_namespace() {
    require!("iter/tcp");
    let (target, instance) = (Cgroup::new(), Instance::new());
    // Each probe has its own network namespace.
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
fn journal_is_kept_while_policies_in_force_set_their_values_again() {
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
    assert!(stderr(&output).contains("policies in force set these options again"), "{}", stderr(&output));
    assert_eq!(probe.int(pair.client, SO_MARK), 7);
    let output = agent::output(&["detach", "--restore", "--instance", &instance.name]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    assert_eq!(probe.int(pair.client, SO_MARK), 0);
}

#[test]
fn option_that_another_option_resets_is_restored_too() {
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

/// The kernel sets SO_PRIORITY when IP_TOS is set. The application chose a priority afterwards.
#[test]
fn option_that_no_rule_names_is_restored_if_another_one_reset_it() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy =
        PolicyFile::new(format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ IP_TOS = \"EF\" }}\n", target.name()));
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let udp = probe.open(Family::Inet, Kind::Udp);
    for socket in [pair.client, udp] {
        probe.set(socket, IP_TOS, 0x28).unwrap();
        probe.set(socket, SO_PRIORITY, 0).unwrap();
    }
    apply(&instance, &policy, &["--quiet"]);
    assert_eq!(probe.int(pair.client, IP_TOS), 0xb8);
    assert_ne!(probe.int(pair.client, SO_PRIORITY), 0, "the kernel has reset it");
    let output = instance.run("apply", &["--restore", "-o", "json"]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["event"], &summary["failed"]), (&"restore-summary".into(), &0.into()), "{summary}");
    for socket in [pair.client, udp] {
        assert_eq!([IP_TOS, SO_PRIORITY].map(|option| probe.int(socket, option)), [0x28, 0]);
    }
    let output = agent::output(&["apply", "--restore", "--instance", "no-such-instance"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no values are recorded for instance `no-such-instance`"), "{}", stderr(&output));
}

#[test]
fn apply_brings_values_within_limits() {
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
fn dry_run_policy_is_not_applied() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = policy(&target, "mode = \"dry-run\"\n");
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let printed = apply(&instance, &policy, &[]);
    assert!(printed.contains("(dry run)"), "{printed}");
    assert_eq!(probe.int(pair.client, SO_MARK), 0);
}

#[test]
fn detach_restores_values_if_requested() {
    for restores in [true, false] {
        let (target, instance) = (Cgroup::new(), Instance::new());
        let policy = policy(&target, "");
        let mut probe = Probe::start(&target);
        let pair = probe.pair(Family::Inet, Kind::Tcp);
        instance.attach(policy.path());
        assert_eq!(probe.int(pair.client, SO_MARK), 0, "attach does not change existing sockets");
        apply(&instance, &policy, &[]);
        assert_eq!(probe.int(pair.client, SO_MARK), 7);
        let kept = format!("\nrecorded values of instance {}: ", instance.name);
        let status = || stdout(&agent::output(&["status"]));
        assert!(status().contains(&kept), "{}", status());
        let arguments: &[&str] = if restores { &["detach", "--restore"] } else { &["detach"] };
        let output = agent::output(&[arguments, &["--instance", &instance.name]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(probe.int(pair.client, SO_MARK), if restores { 0 } else { 7 });
        assert!(instance.left().is_empty(), "{:?}", instance.left());
        assert!(!status().contains(&kept), "{}", status());
    }
}

#[test]
fn value_that_the_kernel_caps_is_reported_as_capped_in_the_unit_of_the_policy() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Udp);
    probe.bind(socket, "127.0.0.1:0".parse().unwrap());
    let before = probe.int(socket, SO_SNDBUF) / 2;
    let text =
        format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_SNDBUF = \"512MiB\", SO_MARK = 7 }}\n", target.name());
    let printed = apply(&instance, &PolicyFile::new(text), &["--output", "json"]);
    let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let event = lines.iter().find(|line| line["option"] == "SO_SNDBUF").unwrap();
    let after = probe.int(socket, SO_SNDBUF) / 2;
    assert!(after < 512 << 20, "this test needs net.core.wmem_max below 512 MiB");
    let shown = ["event", "outcome", "wanted", "before", "current"].map(|key| &event[key]);
    assert_eq!(shown, [&json!("applied"), &json!("capped"), &json!(512 << 20), &json!(before), &json!(after)]);
    let summary = lines.last().unwrap();
    assert_eq!(
        [&summary["set"], &summary["capped"], &summary["changed"]],
        [1, 1, 1].map(|count| json!(count)).each_ref()
    );
}
