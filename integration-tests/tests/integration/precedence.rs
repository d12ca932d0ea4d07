//! Nested targets: the innermost one decides, although the kernel runs the programs of outer targets later.

use nix::errno::Errno;
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    options::{SO_PRIORITY, SO_RCVLOWAT, SocketOption, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_SYNCNT, TCP_USER_TIMEOUT},
    policy::PolicyFile,
    probe::Probe,
    report::Report,
    require,
    script::{Family, Kind},
};

use crate::{stderr, stdout};

/// Three nested cgroups, and a policy for each. The names of the files are in the opposite order.
struct Tree {
    top: Cgroup,
    middle: Cgroup,
    leaf: Cgroup,
    policies: PolicyFile,
    /// The paths of the other two files.
    others: [String; 2],
}

const TOP: &str = "
[[rule]]
name = \"top\"
match = { protocol = \"tcp\" }
set = { SO_PRIORITY = 1, TCP_KEEPCNT = 3, TCP_KEEPIDLE = \"10s\" }
deny = [\"SO_RCVLOWAT\", \"TCP_USER_TIMEOUT\"]
";
const MIDDLE: &str = "
[[rule]]
name = \"middle-in\"
match = { protocol = \"tcp\", direction = \"inbound\" }
set = { TCP_KEEPIDLE = \"20s\" }
[[rule]]
name = \"middle\"
match = { protocol = \"tcp\" }
set = { SO_PRIORITY = 2, TCP_KEEPCNT = 4 }
";
const LEAF: &str = "
[[rule]]
name = \"leaf\"
match = { protocol = \"tcp\" }
set = { SO_PRIORITY = 3, TCP_SYNCNT = 5 }
limit = { SO_RCVLOWAT = { max = 100 } }
";

impl Tree {
    fn new() -> Self {
        let top = Cgroup::new();
        let middle = top.child("middle");
        let leaf = middle.child("leaf");
        let text = |name: &str, cgroup: &Cgroup, rules: &str| {
            format!("name = \"{name}\"\n[target]\ncgroup = {:?}\n{rules}", cgroup.name())
        };
        let policies = PolicyFile::named("1.toml", text("top", &top, TOP));
        let others = [("2.toml", "middle", &middle, MIDDLE), ("3.toml", "leaf", &leaf, LEAF)];
        let others = others.map(|(file, name, cgroup, rules)| {
            policies.add(file, text(name, cgroup, rules)).to_str().unwrap().to_owned()
        });
        Self { top, middle, leaf, policies, others }
    }

    fn files(&self) -> [&str; 3] {
        [self.policies.path().to_str().unwrap(), &self.others[0], &self.others[1]]
    }

    fn run(&self) -> Run {
        Run::start_with(&self.policies, &[&self.others[0], &self.others[1]])
    }
}

/// Returns SO_PRIORITY, TCP_KEEPCNT, TCP_KEEPIDLE and TCP_SYNCNT of a socket.
fn values(probe: &mut Probe, fd: i32) -> [i32; 4] {
    [SO_PRIORITY, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_SYNCNT].map(|option| probe.int(fd, option))
}

/// Asserts the values of connections in a cgroup: priority, keepalive count, idle times of both ends, and SYN
/// retries.
#[track_caller]
fn assert_sockets(probe: &mut Probe, what: &str, [priority, count, idle_out, idle_in, retries]: [i32; 5]) {
    for family in Family::BOTH {
        let pair = probe.pair(family, Kind::Tcp);
        let reported = [pair.client, pair.server, pair.listener].map(|fd| values(probe, fd));
        let expected = [idle_out, idle_in, idle_in].map(|idle| [priority, count, idle, retries]);
        assert_eq!(reported, expected, "{what}, {family:?}");
    }
}

#[test]
fn innermost_target_decides_each_option_that_it_names() {
    let tree = Tree::new();
    let retries = Probe::start(&tree.top).value_on_new_socket(TCP_SYNCNT);
    let run = tree.run();
    let beside = tree.middle.child("beside");
    let below = tree.leaf.child("below");
    for (cgroup, what, expected) in [
        (&tree.top, "top", [1, 3, 10, 10, retries]),
        (&tree.middle, "middle", [2, 4, 10, 20, retries]),
        (&beside, "beside the leaf", [2, 4, 10, 20, retries]),
        (&tree.leaf, "leaf", [3, 4, 10, 20, 5]),
        (&below, "below the leaf", [3, 4, 10, 20, 5]),
    ] {
        assert_sockets(&mut Probe::start(cgroup), what, expected);
    }
    let report = run.finish();
    assert_eq!(report.summary.targets, [&tree.top, &tree.middle, &tree.leaf].map(Cgroup::name));
    assert_eq!(report.summary.conflicts, 0, "{:#?}", report.events);
    // Each socket is counted by the one rule that decided: 3 of each family in a cgroup.
    let counted_sockets = |rule| report.setting_of(rule, "SO_PRIORITY").sockets.set;
    assert_eq!([counted_sockets("top"), counted_sockets("middle"), counted_sockets("leaf")], [6, 12, 12]);
    let refused: Vec<_> = report.summary.settings.iter().filter(|setting| setting.sockets.failed > 0).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    report.assert_nothing_lost();
}

#[test]
fn innermost_target_judges_calls_on_the_options_that_it_names() {
    let tree = Tree::new();
    let run = tree.run();
    let ask = |cgroup, option: SocketOption, value: i32| {
        let mut probe = Probe::start(cgroup);
        let fd = probe.open(Family::Inet, Kind::Tcp);
        let result = probe.set(fd, option, value);
        (result, probe.int(fd, option))
    };
    let denied = Err(Errno::EPERM);
    assert_eq!(ask(&tree.top, SO_PRIORITY, 6), (Ok(()), 1));
    assert_eq!(ask(&tree.middle, SO_PRIORITY, 6), (Ok(()), 2));
    assert_eq!(ask(&tree.leaf, SO_PRIORITY, 6), (Ok(()), 3));
    assert_eq!(ask(&tree.leaf, TCP_KEEPCNT, 9), (Ok(()), 4), "the middle target decides");
    assert_eq!(ask(&tree.leaf, TCP_KEEPIDLE, 99), (Ok(()), 10), "the top target decides");
    assert_eq!(ask(&tree.leaf, TCP_USER_TIMEOUT, 99), (denied, 0), "the top target decides");
    assert_eq!(ask(&tree.middle, SO_RCVLOWAT, 50), (denied, 1), "the top target decides");
    assert_eq!(ask(&tree.leaf, SO_RCVLOWAT, 50), (Ok(()), 50), "the leaf permits it");
    assert_eq!(ask(&tree.leaf, SO_RCVLOWAT, 200), (Ok(()), 100), "up to its limit");
    // Outer targets do not judge a call with which the innermost one agrees.
    assert_eq!(ask(&tree.leaf, SO_PRIORITY, 3), (Ok(()), 3));
    let report = run.finish();

    let verdicts = |rule, option| calls(&report, rule, option);
    assert_eq!(verdicts("top", "SO_PRIORITY"), vec![("rewritten".to_owned(), 1)]);
    assert_eq!(verdicts("middle", "SO_PRIORITY"), vec![("rewritten".to_owned(), 1)]);
    assert_eq!(verdicts("leaf", "SO_PRIORITY"), vec![("rewritten".to_owned(), 1)]);
    assert_eq!(verdicts("middle", "TCP_KEEPCNT"), vec![("rewritten".to_owned(), 1)]);
    assert_eq!(verdicts("top", "TCP_KEEPCNT"), vec![]);
    assert_eq!(verdicts("top", "TCP_USER_TIMEOUT"), vec![("denied".to_owned(), 1)]);
    assert_eq!(verdicts("top", "SO_RCVLOWAT"), vec![("denied".to_owned(), 1)]);
    assert_eq!(verdicts("leaf", "SO_RCVLOWAT"), vec![("clamped".to_owned(), 1)]);
    assert_eq!(report.setting_of("leaf", "SO_PRIORITY").calls.agreed, 1);
    let event = &report.conflicts("setsockopt", "TCP_KEEPCNT")[0];
    assert_eq!((event.policy.as_deref(), event.cgroup.clone()), (Some("middle"), Some(tree.leaf.name())));
    report.assert_nothing_lost();
}

fn calls(report: &Report, rule: &str, option: &str) -> Vec<(String, u64)> {
    let verdicts = report.setting_of(rule, option).calls.verdicts();
    verdicts.into_iter().map(|(verdict, count)| (verdict.to_owned(), count)).collect()
}

/// An accepted socket belongs to the cgroup of its listener; a listener belongs to the cgroup in which it was
/// created.
#[test]
fn accepted_socket_has_the_policy_of_its_listeners_cgroup() {
    let tree = Tree::new();
    let run = tree.run();
    let mut probe = Probe::start(&tree.leaf);
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    probe.enter(&tree.top);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, address);
    let server = probe.accept(listener);
    assert_eq!((probe.int(client, SO_PRIORITY), probe.int(server, SO_PRIORITY)), (1, 3));
    assert_eq!((probe.int(client, TCP_KEEPIDLE), probe.int(server, TCP_KEEPIDLE)), (10, 20));
    drop(probe);
    drop(run.finish());
}

#[test]
fn enforced_and_dry_run_policies_work_side_by_side() {
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let text = |name: &str, mode: &str, cgroup: &Cgroup| {
        format!(
            "name = \"{name}\"\nmode = \"{mode}\"\n[target]\ncgroup = {:?}\n[[rule]]\nname = \"{name}\"\n\
             match = {{ protocol = \"tcp\" }}\nset = {{ TCP_KEEPCNT = 5 }}\n",
            cgroup.name()
        )
    };
    let policy = PolicyFile::named("1.toml", text("enforced", "enforce", &one));
    let dry = policy.add("2.toml", text("dry", "dry-run", &other));
    let run = Run::start_with(&policy, &[dry.to_str().unwrap()]);
    let ask = |cgroup| {
        let mut probe = Probe::start(cgroup);
        let pair = probe.pair(Family::Inet, Kind::Tcp);
        probe.set(pair.client, TCP_KEEPCNT, 7).unwrap();
        probe.int(pair.client, TCP_KEEPCNT)
    };
    assert_eq!((ask(&one), ask(&other)), (5, 7));
    let report = run.finish();
    assert_eq!(report.summary.mode, "mixed");
    assert_eq!(calls(&report, "enforced", "TCP_KEEPCNT"), vec![("rewritten".to_owned(), 1)]);
    assert_eq!(calls(&report, "dry", "TCP_KEEPCNT"), vec![("would-rewrite".to_owned(), 1)]);
    assert!(report.setting_of("dry", "TCP_KEEPCNT").sockets.set > 0);
}

#[test]
fn innermost_target_also_decides_for_datagram_sockets() {
    require!("cgroup/sendmsg4");
    let (outer, options) = (Cgroup::new(), [SO_PRIORITY, SO_RCVLOWAT]);
    let inner = outer.child("inner");
    let text = |name: &str, cgroup: &Cgroup, set: &str| {
        format!("name = \"{name}\"\n[target]\ncgroup = {:?}\n[[rule]]\nset = {{ {set} }}\n", cgroup.name())
    };
    let policy = PolicyFile::named("1.toml", text("outer", &outer, "SO_PRIORITY = 1, SO_RCVLOWAT = 10"));
    let other = policy.add("2.toml", text("inner", &inner, "SO_PRIORITY = 2"));
    let run = Run::start_with(&policy, &[other.to_str().unwrap()]);
    for (cgroup, expected) in [(&outer, [1, 10]), (&inner, [2, 10])] {
        let mut probe = Probe::start(cgroup);
        for family in Family::BOTH {
            let sockets = [(); 3].map(|()| probe.open(family, Kind::Udp));
            let address = probe.bind(sockets[0], family.loopback());
            probe.connect(sockets[1], address);
            probe.send(sockets[2], Some(address));
            let reported = sockets.map(|fd| options.map(|option| probe.int(fd, option)));
            assert_eq!(reported, [expected; 3], "bound, connected, sending; {family:?}");
        }
    }
    drop(run.finish());
}

#[test]
fn plan_and_explain_show_the_precedence() {
    let tree = Tree::new();
    let lines = |arguments: &[&str]| -> Vec<Value> {
        let output = agent::output(&[arguments, &tree.files()].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let steps = lines(&["plan", "-o", "json"]);
    for (cgroup, policies) in
        [(&tree.top, vec!["top"]), (&tree.middle, vec!["middle", "top"]), (&tree.leaf, vec!["leaf", "middle", "top"])]
    {
        let step = steps.iter().find(|step| step["cgroup"] == cgroup.name() && step["hook"] == "cgroup/setsockopt");
        assert_eq!(step.unwrap()["policies"], Value::from(policies), "{}", cgroup.name());
    }
    let below = format!("{}/below", tree.leaf.name());
    let decides = |option: &str, cgroup: &str| {
        let lines = lines(&["explain", "-o", "json", "--direction", "outbound", "--cgroup", cgroup]);
        lines.iter().find(|line| line["option"] == option).unwrap()["decides"]["rule"].clone()
    };
    assert_eq!(decides("SO_PRIORITY", &below), "leaf");
    assert_eq!(decides("TCP_KEEPIDLE", &below), "top");
    assert_eq!(decides("SO_PRIORITY", &tree.middle.name()), "middle");
    let output = agent::output(&[&["explain"][..], &tree.files()].concat());
    let expected = "error: policies `top` and `middle` have different targets: which of them cover the socket depends on \
                    its cgroup\n  help: name the cgroup: --cgroup PATH\n";
    assert_eq!(stderr(&output), expected);
}
