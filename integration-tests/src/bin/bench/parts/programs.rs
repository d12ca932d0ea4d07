//! Where the time goes: how long each of sockpolicy's programs runs, by the kernel's own clock.
//!
//! The clock is in the figures, also in that of the empty program that they are compared with. It is off in all other parts.

use std::collections::BTreeMap;

use super::{connections, setsockopt};
use crate::{
    bpf::{self, RunTimes},
    guard::{self, Ground},
    measure, peers,
    row::{Findings, Line, whole},
    scene::{Arm, Condition, InForce, Place, Samples, Scene},
    trouble::Result,
    work::{Work, Worker},
};

const PART: &str = "programs";
const ROUNDS: usize = 5;
const MILLIS: u64 = 40;
/// Programs that ran less often did so for something else.
const RUNS_LEAST: u64 = 200;

/// What the empty program is called in samples.
const EMPTY: &str = "empty/set/empty";

pub(crate) fn measure(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    let mut found = Vec::new();
    let _clock = RunTimes::measure()?;
    let scenes = scenes();
    for round in 0..ROUNDS {
        for place in measure::order(scenes.len(), round) {
            let scene = &scenes[place].1;
            for (name, ns) in play(ground, scene)? {
                samples.add(&name, ns);
                if !found.contains(&name) {
                    found.push(name);
                }
            }
            guard::remove(&ground.root.join(&scene.name))?;
        }
    }
    let mut lines = Vec::new();
    for (says, scene) in &scenes {
        for name in found.iter().filter(|name| name.split('/').next() == Some(&*scene.name) && *name != EMPTY) {
            let mut words = name.split('/').skip(1);
            let (arm, program) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let what = format!("{program} ({says}, {arm})");
            lines.push(Line::new(what, whole(name.clone()), "empty program on cgroup/setsockopt", whole(EMPTY)));
        }
    }
    findings.add(PART, &samples, &lines);
    Ok(())
}

fn scenes() -> Vec<(&'static str, Scene)> {
    let set = |call, place| Arm { name: "set", place, work: Work::Set { call, errno: 0 } };
    let scene = |says, name: &str, condition: Condition, arms| {
        (says, Scene { name: name.to_owned(), condition, setup: Vec::new(), arms })
    };
    let agreeing = || vec![set(setsockopt::ON, Place::Inside)];
    vec![
        scene("empty", "empty", peers::empty(&[bpf::SETSOCKOPT]), agreeing()),
        scene("option not named", "program-other", peers::policy(setsockopt::ANOTHER), agreeing()),
        scene("agreeing", "program-agreeing", peers::policy(setsockopt::THIS), agreeing()),
        scene(
            "conflict",
            "program-conflict",
            peers::policy(setsockopt::THIS),
            vec![set(setsockopt::OFF, Place::Inside)],
        ),
        scene("audit, agreeing", "program-audited", peers::audited(setsockopt::THIS), agreeing()),
        scene(
            "audit, outside",
            "program-outside",
            peers::audited(setsockopt::THIS),
            vec![set(setsockopt::ON, Place::Outside)],
        ),
        scene(
            "10 options",
            "program-ten",
            peers::policy(connections::TEN),
            vec![connections::outbound(), connections::accepted()],
        ),
    ]
}

/// What each program took each time, by `SCENE/ARM/PROGRAM`.
fn play(ground: &Ground, scene: &Scene) -> Result<Vec<(String, f64)>> {
    let outside = ground.cgroup("outside")?;
    let newest = bpf::newest_program();
    let mut in_force = InForce::begin(ground, scene)?;
    in_force.wait()?;
    let mut worker = Worker::start(ground, &outside, &scene.condition)?;
    let mut found = Vec::new();
    for arm in &scene.arms {
        let before = run_times(newest);
        let (at, listen_at) = arm.place.cgroups(&in_force.target, &outside);
        worker.perform(at, listen_at, MILLIS, &arm.work)?;
        for (id, (name, ns, runs)) in run_times(newest) {
            let (ns_before, runs_before) = before.get(&id).map_or((0, 0), |(_, ns, runs)| (*ns, *runs));
            let runs = runs.saturating_sub(runs_before);
            if runs >= RUNS_LEAST {
                let each = ns.saturating_sub(ns_before) as f64 / runs as f64;
                found.push((format!("{}/{}/{name}", scene.name, arm.name), each));
            }
        }
    }
    Ok(found)
}

/// By number: name, nanoseconds and runs.
fn run_times(newest: u32) -> BTreeMap<u32, (String, u64, u64)> {
    let programs = bpf::ids_after(newest).into_iter().filter_map(|id| Some((id, bpf::run_time(id).ok()?)));
    programs.collect()
}
