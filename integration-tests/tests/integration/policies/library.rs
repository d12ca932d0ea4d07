//! Each of the example policies, applied to a program from Debian's packages in a new network namespace.

use std::{
    fs,
    net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    thread,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, setsockopt, socket, sockopt},
};
use sockpolicy_integration_tests::{
    agent,
    options::{
        IP_TOS, SO_MAX_PACING_RATE, SO_PRIORITY, SO_RCVBUF, SO_SNDBUF, TCP_CONGESTION, TCP_NODELAY, TCP_NOTSENT_LOWAT,
        TCP_SYNCNT, TCP_THIN_LINEAR_TIMEOUTS, TCP_USER_TIMEOUT,
    },
    pidfd_sockets::PidfdSocket,
    policy::PolicyFile,
    process::{self, Running, read_report},
    report::Report,
    require, wait,
};

use super::repository;
use crate::{stderr, stdout};

/// Performs `work` in a new network namespace, which the script `prepare` sets up.
fn in_a_network(prepare: &str, work: impl FnOnce() + Send) {
    let finished = thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                shell(prepare);
                work();
            })
            .join()
    });
    if let Err(panic) = finished {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a script, and returns its output.
#[track_caller]
fn shell(script: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    let output = process::output(command);
    assert!(output.status.success(), "{script}: {}", stderr(&output));
    stdout(&output)
}

/// A command under one of the policies.
struct UnderPolicy {
    running: Running,
    report: String,
    /// Its directory is used for files.
    scratch: PolicyFile,
}

impl UnderPolicy {
    fn start(policy: &str, command: impl FnOnce(&str) -> Vec<String>) -> Self {
        let scratch = PolicyFile::new("");
        let dir = scratch.dir().display().to_string();
        let report = format!("{dir}/report");
        let policy = repository().join("policies").join(policy).display().to_string();
        let mut agent = agent::command(&["exec", "-o", "json", "--report", &report, &policy, "--"]);
        agent.args(command(&dir));
        Self { running: Running::start(agent), report, scratch }
    }

    /// Waits for the first child process of this name.
    #[track_caller]
    fn process(&self, name: &str) -> u32 {
        let mut found = None;
        let is_there = wait::until(wait::TIMEOUT, || {
            let children = self.running.children();
            found = children.into_iter().find(|(_, command)| command.contains(name)).map(|(pid, _)| pid);
            found.is_some()
        });
        assert!(is_there, "no {name}: {}{}", self.running.stdout(), self.running.stderr());
        found.unwrap()
    }

    /// Waits for the end of the command, and returns the report.
    fn finish(self) -> Report {
        let Self { running, report, scratch } = self;
        drop(running.finish());
        let report = read_report(&report);
        drop(scratch);
        report
    }
}

/// Connects with this congestion control. Returns `None` if no socket listens.
fn connect(congestion: &str, to: SocketAddrV4) -> Option<TcpStream> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&socket, sockopt::TcpCongestion, &congestion.into()).unwrap();
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrIn::from(to)).ok()?;
    Some(socket.into())
}

/// A Redis server at PREFIX.1:6379 that has a client, and replicates from PREFIX.3 at this port.
struct Redis {
    under: UnderPolicy,
    inbound: PidfdSocket,
    outbound: PidfdSocket,
    _ends: (TcpStream, TcpListener, TcpStream),
}

impl Redis {
    const NETWORKS: &str = "ip link set lo up; ip addr add 198.51.100.1/24 dev lo; ip addr add 10.0.0.1/8 dev lo; \
                            echo reno >/proc/sys/net/ipv4/tcp_congestion_control";

    #[track_caller]
    fn start(policy: &str, prefix: &str, master_port: u16) -> Self {
        Self::start_with("reno", policy, prefix, master_port)
    }

    /// Starts it with peers that have this congestion control.
    #[track_caller]
    fn start_with(congestion: &str, policy: &str, prefix: &str, master_port: u16) -> Self {
        let master = TcpListener::bind((format!("{prefix}.3").as_str(), master_port)).unwrap();
        setsockopt(&master, sockopt::TcpCongestion, &congestion.into()).unwrap();
        let under = UnderPolicy::start(policy, |dir| {
            let arguments = format!(
                "redis-server --bind {prefix}.1 --port 6379 --protected-mode no --save  --appendonly no --dir {dir} \
                 --replicaof {prefix}.3 {master_port}"
            );
            arguments.split(' ').map(str::to_owned).collect()
        });
        let server: SocketAddrV4 = format!("{prefix}.1:6379").parse().unwrap();
        let mut client = None;
        let answers = wait::until(wait::TIMEOUT, || {
            client = connect(congestion, server);
            client.is_some()
        });
        assert!(answers, "{}{}", under.running.stdout(), under.running.stderr());
        let client = client.unwrap();
        let (replica, from) = master.accept().unwrap();
        let pid = under.process("redis-server");
        let taken = |is_it: &dyn Fn(&PidfdSocket) -> bool| {
            let mut found = None;
            let is_there = wait::until(wait::TIMEOUT, || {
                found = PidfdSocket::all_of(pid).into_iter().find(is_it);
                found.is_some()
            });
            assert!(is_there, "no such socket");
            found.unwrap()
        };
        let peer = client.local_addr().unwrap();
        let inbound = taken(&|socket| socket.remote() == Some(peer));
        let outbound = taken(&|socket| socket.local() == Some(from) && socket.remote().is_some());
        Self { under, inbound, outbound, _ends: (client, master, replica) }
    }

    fn finish(self) -> Report {
        self.under.running.signal(nix::sys::signal::Signal::SIGTERM);
        self.under.finish()
    }
}

#[test]
fn hung_connections_time_out_after_half_a_minute() {
    in_a_network(Redis::NETWORKS, || {
        let redis = Redis::start("hung-connections.toml", "198.51.100", 6380);
        for socket in [&redis.inbound, &redis.outbound] {
            assert_eq!((socket.int(TCP_USER_TIMEOUT), socket.int(TCP_SYNCNT)), (30_000, 4), "{socket:?}");
        }
        redis.finish().assert_nothing_lost();
    });
}

#[test]
fn low_latency_applies_to_inbound_and_outbound_connections() {
    require!("TCP_NODELAY");
    in_a_network(Redis::NETWORKS, || {
        let redis = Redis::start("low-latency.toml", "198.51.100", 6380);
        for socket in [&redis.inbound, &redis.outbound] {
            let options = [TCP_NODELAY, TCP_THIN_LINEAR_TIMEOUTS, TCP_NOTSENT_LOWAT, SO_PRIORITY];
            assert_eq!(options.map(|option| socket.int(option)), [1, 1, 16 << 10, 6], "{socket:?}");
        }
        redis.finish().assert_nothing_lost();
    });
}

#[test]
fn bulk_over_long_paths_applies_only_to_public_peers() {
    for (prefix, is_far) in [("198.51.100", true), ("10.0.0", false)] {
        in_a_network(Redis::NETWORKS, || {
            let redis = Redis::start("bulk-over-long-paths.toml", prefix, 6380);
            for socket in [&redis.inbound, &redis.outbound] {
                let is_bbr = socket.get(TCP_CONGESTION).starts_with(b"bbr\0");
                assert_eq!(is_bbr, is_far, "{socket:?}");
                assert_eq!(socket.int(TCP_NOTSENT_LOWAT) == 128 << 10, is_far, "{socket:?}");
                assert_eq!(socket.int(SO_MAX_PACING_RATE) == 250_000_000, is_far, "{socket:?}");
            }
            redis.finish().assert_nothing_lost();
        });
    }
}

/// The report shows the settings that getsockopt cannot read.
#[test]
fn data_centre_applies_to_inbound_and_outbound_connections_with_dctcp_peers() {
    require!("dctcp");
    in_a_network(Redis::NETWORKS, || {
        let redis = Redis::start_with("dctcp", "data-centre.toml", "10.0.0", 6380);
        for socket in [&redis.inbound, &redis.outbound] {
            let name = socket.get(TCP_CONGESTION);
            // Without ECN, the name would be dctcp-reno.
            assert!(name.starts_with(b"dctcp\0"), "{socket:?}: {}", String::from_utf8_lossy(&name));
        }
        let report = redis.finish();
        for option in ["TCP_BPF_RTO_MIN", "TCP_BPF_DELACK_MAX"] {
            let sockets = report.setting(option).sockets;
            assert!(sockets.set >= 2 && sockets.failed == 0, "{option}: {sockets:?}");
        }
        report.assert_nothing_lost();
    });
}

#[test]
fn dscp_depends_on_the_port_of_the_peer() {
    require!("cgroup/bind4");
    for (port, code_point) in [(873, 10), (22, 18), (5060, 40), (6380, 0)] {
        in_a_network(Redis::NETWORKS, || {
            let redis = Redis::start("dscp-by-class.toml", "198.51.100", port);
            assert_eq!(redis.outbound.int(IP_TOS) >> 2, code_point, "to port {port}");
            assert_eq!(redis.inbound.int(IP_TOS) >> 2, 0);
            redis.finish().assert_nothing_lost();
        });
    }
}

#[test]
fn tenant_pacing_applies_to_inbound_and_outbound_connections() {
    in_a_network(Redis::NETWORKS, || {
        let redis = Redis::start("tenant-pacing.toml", "198.51.100", 6380);
        for socket in [&redis.inbound, &redis.outbound] {
            assert_eq!(socket.int(SO_MAX_PACING_RATE), 12_500_000, "{socket:?}");
        }
        redis.finish().assert_nothing_lost();
    });
}

#[test]
fn marked_connections_use_the_other_route() {
    require!("cgroup/bind4");
    // Packets leave by `first`, and marked packets by `second`. No host receives them; the sent bytes are counted.
    const TWO_WAYS: &str = "
        echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
        ip link set lo up
        for way in first:10.1.0 second:10.2.0; do
          device=${way%:*} network=${way#*:}
          ip link add $device type veth peer name $device-peer
          ip link set $device-peer up; ip link set $device up
          ip addr add $network.1/24 dev $device
          ip neigh add $network.254 lladdr 02:00:00:00:00:01 dev $device
        done
        ip route add default via 10.1.0.254
        ip route add default via 10.2.0.254 table 100
        ip rule add fwmark 0x20/0xff table 100";
    let curl = ["curl", "--silent", "--max-time", "2", "http://192.0.2.1/"].map(str::to_owned);
    let sent = || {
        ["first", "second"].map(|device| {
            let words = shell(&format!("ip -s link show {device}"));
            // The last line has bytes, packets …
            words.lines().last().unwrap().split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        })
    };
    in_a_network(TWO_WAYS, || {
        let begin = sent();
        let mut command = Command::new(&curl[0]);
        command.args(&curl[1..]);
        assert!(!process::output(command).status.success());
        let unmarked = sent();
        assert!(unmarked[0] > begin[0] && unmarked[1] == begin[1], "without a policy: {begin:?}, then {unmarked:?}");
        let under = UnderPolicy::start("mark-for-policy-routing.toml", |_| curl.to_vec());
        let report = under.finish();
        let marked = sent();
        assert!(marked[0] == unmarked[0] && marked[1] > unmarked[1], "{unmarked:?}, then {marked:?}");
        assert!(report.setting("SO_MARK").sockets.set > 0);
    });
}

#[test]
fn buffers_are_limited_also_if_the_application_requests_more() {
    // The limit is the lower of the host's and the policy's.
    let most: i32 = fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap().trim().parse().unwrap();
    let most = most.min(256 << 10);
    in_a_network("ip link set lo up", || {
        let under = UnderPolicy::start("buffer-ceilings.toml", |dir| {
            let configuration = format!("{dir}/nginx.conf");
            let text = format!(
                "daemon off; master_process off; pid {dir}/pid; error_log stderr; events {{ }}
                 http {{ access_log off; server {{ listen 127.0.0.1:8080 sndbuf=4m rcvbuf=100k; }} }}"
            );
            fs::write(&configuration, text).unwrap();
            ["nginx", "-c", &configuration].map(str::to_owned).to_vec()
        });
        let address: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        assert!(wait::until(wait::TIMEOUT, || TcpStream::connect(address).is_ok()), "{}", under.running.stderr());
        let sockets = PidfdSocket::all_of(under.process("nginx"));
        let listener = sockets.iter().find(|socket| socket.local() == Some(address)).unwrap();
        // The kernel doubles the value that is set.
        assert_eq!((listener.int(SO_SNDBUF), listener.int(SO_RCVBUF)), (2 * most, 200 << 10));
        under.running.signal(nix::sys::signal::Signal::SIGQUIT);
        let report = under.finish();
        let event = report.conflict("SO_SNDBUF");
        assert_eq!((event.verdict.as_deref(), &event.requested), (Some("clamped"), &(4 << 20).into()));
        assert!(report.of("conflict", "SO_RCVBUF").is_empty());
    });
}

#[test]
fn tenants_cannot_bind_to_devices() {
    in_a_network("ip link set lo up", || {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", server.local_addr().unwrap());
        let curl = |arguments: &[&str]| {
            let words = [&["curl", "--silent", "--max-time", "1"], arguments, &[&url]].concat();
            let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
            UnderPolicy::start("tenants-stay-in-their-lane.toml", |_| words).finish()
        };
        let report = curl(&["--interface", "if!lo"]);
        assert_eq!(report.verdicts("SO_BINDTODEVICE"), ["denied"]);
        assert_eq!(report.conflict("SO_BINDTODEVICE").comm.as_deref(), Some("curl"));
        assert_eq!(curl(&[]).summary.conflicts, 0);
        drop(server);
    });
}
