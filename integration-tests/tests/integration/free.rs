//! Rules that leave options free, as exceptions from a default.

use std::net::Ipv4Addr;

use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    options::{SO_KEEPALIVE, SO_MARK, SO_SNDBUF, TCP_KEEPIDLE, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Kind},
};

use crate::stdout;

#[test]
fn earlier_rule_that_leaves_an_option_free_ends_the_search() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"local\"\nmatch = { remote = [\"127.0.0.2/32\"] }\nfree = [\"TCP_KEEPIDLE\", \"SO_SNDBUFFORCE\"]\n\
         [[rule]]\nname = \"all\"\nset = { SO_KEEPALIVE = true, TCP_KEEPIDLE = \"77s\" }\n\
         limit = { SO_SNDBUF = { max = \"16KiB\" } }\ndeny = [\"TCP_NODELAY\"]\n",
    );
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&target);
    let listener = probe.open(Family::Inet, Kind::Tcp);
    let at = probe.bind(listener, (Ipv4Addr::UNSPECIFIED, 0).into());
    probe.listen(listener);
    let mut values = Vec::new();
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)] {
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.connect(client, (address, at.port()).into());
        let set = [
            probe.set(client, TCP_KEEPIDLE, 99),
            probe.set(client, SO_SNDBUF, 65_536),
            probe.set(client, TCP_NODELAY, 1),
        ];
        values.push((
            probe.int(client, SO_KEEPALIVE),
            probe.int(client, TCP_KEEPIDLE),
            probe.int(client, SO_SNDBUF),
            set.map(|set| set.is_ok()),
        ));
    }
    let [decided, free] = [values[0], values[1]];
    assert_eq!(decided, (1, 77, 32_768, [true, true, false]));
    assert_eq!(
        free,
        (1, 99, 131_072, [true, true, false]),
        "denied by the other rule: it does not leave TCP_NODELAY free"
    );
    drop(probe);
    let report = run.finish();
    assert_eq!(
        report.summary.conflicts, 4,
        "one each on the decided socket, and TCP_NODELAY on both: {:?}",
        report.events
    );
}

#[test]
fn inner_target_can_leave_an_option_free_that_an_outer_one_sets() {
    let top = Cgroup::new();
    let inner = top.child("inner");
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = 7, TCP_KEEPIDLE = \"77s\" }}\n",
        top.name()
    ));
    policy.add("inner.toml", format!("[target]\ncgroup = {:?}\n[[rule]]\nfree = [\"SO_MARK\"]\n", inner.name()));
    let run = Run::on_path(policy.dir(), &[]);
    let mut probe = Probe::start(&inner);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    for fd in [pair.listener, pair.client, pair.server] {
        assert_eq!((probe.int(fd, SO_MARK), probe.int(fd, TCP_KEEPIDLE)), (0, 77));
        probe.set(fd, SO_MARK, 9).unwrap();
        assert_eq!(probe.int(fd, SO_MARK), 9);
    }
    assert_eq!(Probe::start(&top).value_on_new_socket(SO_MARK), 7);
    let verified = agent::output(&["verify", &policy.dir().display().to_string()]);
    assert!(verified.status.success(), "{}", stdout(&verified));
    drop(probe);
    assert_eq!(run.finish().summary.conflicts, 0);
}
