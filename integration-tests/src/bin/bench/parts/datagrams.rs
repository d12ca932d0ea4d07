//! Datagrams over loopback, each sent and received: what policies add to sending.

use super::connections;
use crate::{
    bpf,
    guard::Ground,
    peers,
    row::{Findings, Line, added, whole},
    scene::{Arm, Comparison, Condition, Place, Scene},
    trouble::Result,
    work::Work,
};

const PART: &str = "datagrams";

const ONE: &str = "[[rule]]\nset = { SO_PRIORITY = 3 }";

pub(crate) fn measure(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let samples = Comparison { rounds: 11, millis: 60, turns: 5, scenes: scenes() }.run(ground)?;
    let mut lines = Vec::new();
    for (arm, says) in [("sendto", "sendto, unconnected"), ("send", "send, connected")] {
        for (scene, under) in [("empty", "an empty program on sendmsg4"), ("one", "1 option"), ("ten", "10 options")] {
            let (over, none) = (format!("{scene}/{arm}"), format!("none/{arm}"));
            lines.push(Line::new(format!("{says}, {under}"), whole(over), "no tool", whole(none)));
        }
    }
    let limit = added("empty/sendto", "none/sendto");
    let ten = added("ten/sendto", "none/sendto");
    lines.push(Line::new("sendto, 10 options: added", ten, "empty program on sendmsg4: added", limit));
    findings.add(PART, &samples, &lines);
    Ok(())
}

fn scenes() -> Vec<Scene> {
    let arm = |name, connected| Arm { name, place: Place::Inside, work: Work::Send { connected } };
    let arms = || vec![arm("sendto", false), arm("send", true)];
    let scene =
        |name: &str, condition: Condition| Scene { name: name.to_owned(), condition, setup: vec![], arms: arms() };
    vec![
        scene("none", peers::nothing()),
        scene("empty", peers::empty(&[bpf::SENDMSG4])),
        scene("one", peers::policy(ONE)),
        scene("ten", peers::policy(connections::TEN)),
    ]
}
