//! The run time of each of sockpolicy's programs, measured by the kernel.
//!
//! The figures include the cost of measuring, also those of the empty program. The other parts do not measure run
//! times.

use std::collections::BTreeMap;

use super::{connections, setsockopt};
use crate::{
    bpf::{self, RunTimes},
    conditions,
    error::Result,
    guard::{self, Workspace},
    measure,
    row::{Findings, Line, total},
    scene::{ActiveCondition, Arm, Condition, Placement, Samples, Scene},
    work::{Work, Worker},
};

const PART: &str = "programs";
const ROUNDS: usize = 5;
const MILLIS: u64 = 40;
/// Programs with fewer runs did not run for this work.
const RUNS_LEAST: u64 = 200;

/// The name of the empty program in samples.
const EMPTY: &str = "empty/set/empty";

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    let mut found = Vec::new();
    let _clock = RunTimes::measure()?;
    let scenes = scenes();
    for round in 0..ROUNDS {
        for place in measure::order(scenes.len(), round) {
            let scene = &scenes[place].1;
            for (name, ns) in run_arms(ground, scene)? {
                samples.add(&name, ns);
                if !found.contains(&name) {
                    found.push(name);
                }
            }
            guard::remove(&ground.root.join(&scene.name))?;
        }
    }
    let mut lines = Vec::new();
    for (label, scene) in &scenes {
        for name in found.iter().filter(|name| name.split('/').next() == Some(&*scene.name) && *name != EMPTY) {
            let mut words = name.split('/').skip(1);
            let (arm, program) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let what = format!("{program} ({label}, {arm})");
            lines.push(Line::new(what, total(name.clone()), "empty program on cgroup/setsockopt", total(EMPTY)));
        }
    }
    findings.add(PART, &samples, &lines);
    Ok(())
}

fn scenes() -> Vec<(&'static str, Scene)> {
    let set = |call, placement| Arm { name: "set", placement, work: Work::Set { call, errno: 0 } };
    let scene = |label, name: &str, condition: Condition, arms| {
        (label, Scene { name: name.to_owned(), condition, setup: Vec::new(), arms })
    };
    let agreeing = || vec![set(setsockopt::ON, Placement::Inside)];
    vec![
        scene("empty", "empty", conditions::empty(&[bpf::SETSOCKOPT]), agreeing()),
        scene("option not named", "program-other", conditions::policy(setsockopt::ANOTHER), agreeing()),
        scene("agreeing", "program-agreeing", conditions::policy(setsockopt::THIS), agreeing()),
        scene(
            "conflict",
            "program-conflict",
            conditions::policy(setsockopt::THIS),
            vec![set(setsockopt::OFF, Placement::Inside)],
        ),
        scene("audit, agreeing", "program-audited", conditions::audited(setsockopt::THIS), agreeing()),
        scene(
            "audit, outside",
            "program-outside",
            conditions::audited(setsockopt::THIS),
            vec![set(setsockopt::ON, Placement::Outside)],
        ),
        scene(
            "10 options",
            "program-ten",
            conditions::policy(connections::TEN),
            vec![connections::outbound(), connections::accepted()],
        ),
    ]
}

/// Returns the time per run of each program, by `SCENE/ARM/PROGRAM`.
fn run_arms(ground: &Workspace, scene: &Scene) -> Result<Vec<(String, f64)>> {
    let outside = ground.cgroup("outside")?;
    let newest = bpf::newest_program();
    let mut in_force = ActiveCondition::begin(ground, scene)?;
    in_force.wait()?;
    let mut worker = Worker::start(ground, &outside, &scene.condition)?;
    let mut found = Vec::new();
    for arm in &scene.arms {
        let before = run_times(newest);
        let (at, listen_at) = arm.placement.cgroups(&in_force.target, &outside);
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

/// Returns name, nanoseconds and runs, by program id.
fn run_times(newest: u32) -> BTreeMap<u32, (String, u64, u64)> {
    let programs = bpf::ids_after(newest).into_iter().filter_map(|id| Some((id, bpf::run_time(id).ok()?)));
    programs.collect()
}
