//! The cost of connections over loopback. One connection is socket, connect, accept and two closes. A policy covers
//! one end.

use super::call;
use crate::{
    bpf, conditions,
    error::Result,
    guard::Workspace,
    measure::Spread,
    row::{Budget, Findings, Kind, Line, Plot, Scale, Series, Unit, added, total},
    scene::{Arm, Comparison, Condition, Placement, Samples, Scene},
    work::{Call, Work},
};

const PART: &str = "connections";

/// A rule that sets no option of these sockets.
const NOTHING: &str = "[[rule]]\nlimit = { SO_LINGER = { max = \"1h\" } }";
const ONE: &str = "[[rule]]\nset = { SO_KEEPALIVE = true }";
pub(crate) const TEN: &str = "[[rule]]\nset = { SO_KEEPALIVE = true, TCP_KEEPIDLE = \"60s\", TCP_KEEPINTVL = \"10s\", \
    TCP_KEEPCNT = 5, TCP_NODELAY = true, TCP_USER_TIMEOUT = \"30s\", SO_MARK = 32, SO_PRIORITY = 3, IP_TOS = \"AF21\", \
    TCP_NOTSENT_LOWAT = \"128KiB\" }";
/// All options that programs can set on an IPv4 TCP socket, with values with which it still connects.
const ALL: &str = "[[rule]]\nset = { SO_KEEPALIVE = true, TCP_KEEPIDLE = \"60s\", TCP_KEEPINTVL = \"10s\", \
    TCP_KEEPCNT = 5, TCP_NODELAY = true, TCP_USER_TIMEOUT = \"30s\", SO_MARK = 32, SO_PRIORITY = 3, IP_TOS = \"AF21\", \
    TCP_NOTSENT_LOWAT = \"128KiB\", SO_BINDTODEVICE = \"lo\", SO_REUSEADDR = true, SO_SNDBUF = \"64KiB\", \
    SO_RCVBUF = \"64KiB\", SO_RCVLOWAT = 1, SO_MAX_PACING_RATE = \"10gbit\", SO_TXREHASH = 1, TCP_CONGESTION = \"reno\", \
    TCP_MAXSEG = 1400, TCP_SYNCNT = 4, TCP_WINDOW_CLAMP = \"64KiB\", TCP_THIN_LINEAR_TIMEOUTS = true, TCP_SAVE_SYN = 1, \
    TCP_RTO_MAX_MS = \"60s\", TCP_BPF_IW = 20, TCP_BPF_SNDCWND_CLAMP = 1000, TCP_BPF_DELACK_MAX = \"40ms\", \
    TCP_BPF_RTO_MIN = \"200ms\" }";
const ALL_COUNT: f64 = 28.0;
const CONGESTION: &str = "[[rule]]\nmatch = { remote = \"127.0.0.0/8\" }\nset = { TCP_CONGESTION = \"reno\" }";
/// The same congestion control by a route. The addresses are local, so the route is in the local table.
const ROUTE: &str =
    "ip route replace local 127.0.0.0/8 dev lo proto kernel scope host src 127.0.0.1 table local congctl reno";

/// The settings of `ONE` and `TEN` as calls of an application.
const OWN: [Call; 10] = [
    call(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    call(libc::SOL_TCP, libc::TCP_KEEPIDLE, 60),
    call(libc::SOL_TCP, libc::TCP_KEEPINTVL, 10),
    call(libc::SOL_TCP, libc::TCP_KEEPCNT, 5),
    call(libc::SOL_TCP, libc::TCP_NODELAY, 1),
    call(libc::SOL_TCP, libc::TCP_USER_TIMEOUT, 30_000),
    call(libc::SOL_SOCKET, libc::SO_MARK, 32),
    call(libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
    call(libc::SOL_IP, libc::IP_TOS, 0x48),
    call(libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT, 128 << 10),
];

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let samples = Comparison { rounds: 9, millis: 200, turns: 10, scenes: scenes() }.run(ground)?;
    findings.add(PART, &samples, &lines());
    findings.plots.push(plot(&samples));
    Ok(())
}

/// Returns the arm whose connecting sockets are in the scene's cgroup.
pub(crate) fn outbound() -> Arm {
    Arm { name: "outbound", placement: Placement::Inside, work: Work::Connect { own: Vec::new() } }
}

/// Returns the arm whose accepted sockets are in the scene's cgroup.
pub(crate) fn accepted() -> Arm {
    Arm { name: "accepted", placement: Placement::Accepting, ..outbound() }
}

fn scene(name: &str, condition: Condition, arms: Vec<Arm>) -> Scene {
    Scene { name: name.to_owned(), condition, setup: Vec::new(), arms }
}

fn scenes() -> Vec<Scene> {
    let both = || vec![outbound(), accepted()];
    let own = |count: usize| {
        let work = Work::Connect { own: OWN[..count].to_vec() };
        vec![Arm { work, ..outbound() }]
    };
    let route = ROUTE.split(' ').map(str::to_owned).collect();
    vec![
        scene("none", conditions::nothing(), both()),
        scene("empty", conditions::empty(&[bpf::SOCK_CREATE, bpf::CONNECT4, bpf::SOCK_OPS]), both()),
        scene("nothing", conditions::policy(NOTHING), both()),
        scene("one", conditions::policy(ONE), both()),
        scene("ten", conditions::policy(TEN), both()),
        scene("all", conditions::policy(ALL), both()),
        scene("congestion", conditions::policy(CONGESTION), vec![outbound()]),
        scene("own-one", conditions::nothing(), own(1)),
        scene("own-ten", conditions::nothing(), own(10)),
        scene("libkeepalive", conditions::libkeepalive(), vec![outbound()]),
        Scene {
            setup: vec![Work::Run { command: route }],
            ..scene("route", Condition { needs: vec!["ip"], ..conditions::nothing() }, vec![outbound()])
        },
    ]
}

fn lines() -> Vec<Line> {
    let mut lines = Vec::new();
    for arm in ["outbound", "accepted"] {
        for (scene, label) in [("empty", "empty programs on three hooks"), ("nothing", "policy of 0 options")]
            .into_iter()
            .chain([("one", "policy of 1 option"), ("ten", "policy of 10 options"), ("all", "policy of 28 options")])
        {
            let (over, under) = (format!("{scene}/{arm}"), format!("none/{arm}"));
            lines.push(Line::new(format!("{arm}, {label}"), total(over), "no tool", total(under)).unit(Unit::Rate));
        }
    }
    let more = |what: &str, over: &str, versus: &str, under: &str| {
        let (over, under) = (format!("{over}/outbound"), format!("{under}/outbound"));
        Line::new(what, added(over, "none/outbound"), versus, added(under, "none/outbound")).unit(Unit::Rate)
    };
    lines.extend([
        more("outbound, policy of 10 options: added", "ten", "application's own 10 calls: added", "own-ten")
            .budget(Budget::AtMost(1.0)),
        more("outbound, policy of 1 option: added", "one", "application's own call: added", "own-one"),
        more("outbound, policy of 1 option: added", "one", "LD_PRELOAD libkeepalive: added", "libkeepalive"),
        more("outbound, policy of 10 options: added", "ten", "empty programs on three hooks: added", "empty"),
        Line::new(
            "outbound, congestion control by policy",
            total("congestion/outbound"),
            "by ip route … congctl",
            total("route/outbound"),
        )
        .unit(Unit::Rate),
    ]);
    lines
}

fn plot(samples: &Samples) -> Plot {
    let series = ["outbound", "accepted"].map(|arm| {
        let point = |(scene, size): (&str, f64)| {
            Some((size, Spread::of(samples.of(&format!("{scene}/{arm}")).ok()?)?.scaled(1e-3)))
        };
        let sizes = [("nothing", 0.0), ("one", 1.0), ("ten", 10.0), ("all", ALL_COUNT)];
        Series { name: format!("{arm}, by policy"), points: sizes.into_iter().filter_map(point).collect() }
    });
    let own = [("none", 0.0), ("own-one", 1.0), ("own-ten", 10.0)].into_iter().filter_map(|(scene, size)| {
        Some((size, Spread::of(samples.of(&format!("{scene}/outbound")).ok()?)?.scaled(1e-3)))
    });
    let own = Series { name: "outbound, by the application's own calls".to_owned(), points: own.collect() };
    let series = series.into_iter().chain([own]).collect();
    let (sizes, figures) = (Scale::Linear, Scale::Linear);
    let kind = Kind::Curves { size: "options set", sizes, figure: "microseconds a connection", figures, series };
    Plot { name: "connections", title: "One connection over loopback, by options that are set on it", kind }
}
