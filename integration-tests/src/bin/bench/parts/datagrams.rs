//! The cost of datagrams over loopback, each sent and received.

use super::connections;
use crate::{
    bpf, conditions,
    error::Result,
    guard::Workspace,
    row::{Findings, Line, added, total},
    scene::{Arm, Comparison, Condition, Placement, Scene},
    work::Work,
};

const PART: &str = "datagrams";

const ONE: &str = "[[rule]]\nset = { SO_PRIORITY = 3 }";

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let samples = Comparison { rounds: 11, millis: 60, turns: 5, scenes: scenes() }.run(ground)?;
    let mut lines = Vec::new();
    for (arm, label) in [("sendto", "sendto, unconnected"), ("send", "send, connected")] {
        for (scene, under) in [("empty", "an empty program on sendmsg4"), ("one", "1 option"), ("ten", "10 options")] {
            let (over, none) = (format!("{scene}/{arm}"), format!("none/{arm}"));
            lines.push(Line::new(format!("{label}, {under}"), total(over), "no tool", total(none)));
        }
    }
    let limit = added("empty/sendto", "none/sendto");
    let ten = added("ten/sendto", "none/sendto");
    lines.push(Line::new("sendto, 10 options: added", ten, "empty program on sendmsg4: added", limit));
    findings.add(PART, &samples, &lines);
    Ok(())
}

fn scenes() -> Vec<Scene> {
    let arm = |name, connected| Arm { name, placement: Placement::Inside, work: Work::Send { connected } };
    let arms = || vec![arm("sendto", false), arm("send", true)];
    let scene =
        |name: &str, condition: Condition| Scene { name: name.to_owned(), condition, setup: vec![], arms: arms() };
    vec![
        scene("none", conditions::nothing()),
        scene("empty", conditions::empty(&[bpf::SENDMSG4])),
        scene("one", conditions::policy(ONE)),
        scene("ten", conditions::policy(connections::TEN)),
    ]
}
