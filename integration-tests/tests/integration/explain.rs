//! `sockpolicy explain` and `sockpolicy test`, compared with the values of sockets.

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::Cgroup,
    options::{SocketOption, TCP_KEEPCNT, TCP_SYNCNT},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Kind},
};

use crate::{stderr, stdout};

const OPTIONS: [SocketOption; 2] = [TCP_KEEPCNT, TCP_SYNCNT];

const POLICY: &str = "\
[[rule]]
name = \"out\"
match = { protocol = \"tcp\", direction = \"outbound\", local = \"127.1.0.0/16\" }
set = { TCP_KEEPCNT = 11 }
[[rule]]
name = \"near\"
match = { protocol = \"tcp\", remote = \"127.1.0.0/16\" }
set = { TCP_KEEPCNT = 22, TCP_SYNCNT = 3 }
[[rule]]
name = \"rest\"
match = { protocol = \"tcp\" }
set = { TCP_KEEPCNT = 33, TCP_SYNCNT = 4 }
";

/// Returns the deciding value of each option, from `explain`.
fn explained(policy: &PolicyFile, socket: &[&str]) -> [String; 2] {
    let path = policy.path().to_str().unwrap();
    let output = agent::output(&[&["explain", "-o", "json", path], socket].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let lines: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    OPTIONS.map(|option| {
        let line = lines.iter().find(|line| line["option"] == option.name).unwrap();
        line["decides"]["says"].as_str().unwrap().to_owned()
    })
}

#[test]
fn explained_values_are_those_that_the_owner_reads() {
    let policy = PolicyFile::new(POLICY);
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    for (local, expected) in [("127.1.2.3:0", [["11", "4"], ["22", "3"]]), ("127.2.2.3:0", [["33", "4"], ["33", "4"]])]
    {
        let client = probe.open(Family::Inet, Kind::Tcp);
        let local = probe.bind(client, local.parse().unwrap());
        probe.connect(client, address);
        let server = probe.accept(listener);
        let ends = [(client, "outbound", local, address), (server, "inbound", address, local)];
        for ((fd, direction, local, remote), expected) in ends.into_iter().zip(expected) {
            let reported = OPTIONS.map(|option| probe.int(fd, option).to_string());
            assert_eq!(reported, expected, "{direction} from {local}");
            let (local, remote, pid) = (local.to_string(), remote.to_string(), probe.pid.to_string());
            let described = ["--direction", direction, "--local", &local, "--remote", &remote];
            assert_eq!(explained(&policy, &described), reported, "{direction} from {local}");
            let found = [&["--pid", &pid], &described[..]].concat();
            assert_eq!(explained(&policy, &found), reported, "{direction} from {local}, found in its process");
        }
    }
    drop(exec.finish());
}

#[test]
fn policy_tests_pass_or_fail() {
    let case = |set: &str| {
        format!(
            "[[test]]\nsocket = {{ direction = \"inbound\", remote = \"127.1.0.1:5\" }}\nset = {{ {set} }}\nfree = \
             [\"SO_MARK\"]\n"
        )
    };
    for (set, failed) in [("TCP_KEEPCNT = 22", None), ("TCP_KEEPCNT = 22, TCP_SYNCNT = 4", Some("TCP_SYNCNT: 4"))] {
        let policy = PolicyFile::new(format!("{POLICY}{}", case(set)));
        let output = agent::output(&["test", policy.path().to_str().unwrap()]);
        let printed = stdout(&output);
        assert_eq!(output.status.code(), Some(i32::from(failed.is_some())), "{printed}{}", stderr(&output));
        match failed {
            None => assert_eq!(printed, "passed: 1\n"),
            Some(failed) => {
                assert!(
                    printed.contains(&format!("\n  expected {failed}\n  found TCP_SYNCNT: 3, by rule near (")),
                    "{printed}"
                );
                assert!(printed.ends_with("\npassed: 0, failed: 1\n"), "{printed}");
            }
        }
    }
}

/// A service manager creates a listener and passes it on (socket activation): the listener belongs to the manager's cgroup.
#[test]
fn inherited_socket_is_explained_by_the_cgroup_in_which_it_was_created() {
    let (manager, service) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nname = \"theirs\"\nset = {{ TCP_KEEPCNT = 5 }}\ndeny = [\"SO_MARK\"]\n",
        service.name()
    ));
    let mut probe = Probe::start(&manager);
    let inherited = probe.listener(Family::Inet, Kind::Tcp).0;
    probe.enter(&service);
    let own = probe.listener(Family::Inet, Kind::Tcp).0;
    let name = format!("{}-explain", service.name().trim_matches('/'));
    let run = Run::start_with(&policy, &["--instance", &name]);
    let pid = probe.pid.to_string();
    for source in [&[policy.path().to_str().unwrap()][..], &["--instance", &name]] {
        let explain = |fd: i32| {
            let socket = ["explain", "-o", "json", "--pid", &pid, "--fd", &fd.to_string()].map(str::to_owned);
            agent::output(&[socket.to_vec(), source.iter().map(|word| (*word).to_owned()).collect()].concat())
        };
        let output = explain(own);
        assert!(
            output.status.success() && stdout(&output).contains("theirs"),
            "{}{}",
            stdout(&output),
            stderr(&output)
        );
        let output = explain(inherited);
        assert!(!output.status.success() && !stdout(&output).contains("theirs"), "{}", stdout(&output));
        assert!(stderr(&output).contains(&manager.name()), "{}", stderr(&output));
    }
    run.finish();
}

#[test]
fn option_that_a_socket_does_not_have_is_not_set() {
    let policy = PolicyFile::new(
        "[[rule]]\nset = { TCP_KEEPCNT = 5, IP_TOS = 8, IPV6_TCLASS = 8 }\n\
         [[test]]\nsocket = { protocol = \"udp\", remote = \"192.0.2.1:53\" }\nset = { IP_TOS = 8 }\nfree = [\"TCP_KEEPCNT\", \"IPV6_TCLASS\"]\n\
         [[test]]\nsocket = { protocol = \"tcp\", remote = \"[2001:db8::1]:53\" }\nset = { TCP_KEEPCNT = 5, IPV6_TCLASS = 8 }\nfree = [\"IP_TOS\"]\n",
    );
    let output = agent::output(&["test", policy.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
}
