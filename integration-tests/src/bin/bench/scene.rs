//! Scenes: work under a condition (a policy in force, a tracer, an empty program, nothing), and how they are run beside each other.
//!
//! What touches only its own processes stays in force for the whole comparison. What touches every process of the host,
//! as programs on tracepoints do, comes in force for its own turn and goes after it, or it would be measured in all others
//! too. A scene that cannot be set is left out, with the reason; the others go on.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sockpolicy_integration_tests::wait;

use crate::{
    bpf::{Empty, Hook},
    guard::{self, Ground},
    measure,
    trouble::{Attempt, Result, Trouble},
    work::{Work, Worker},
};

/// Stands in a command for the path of the agent.
pub(crate) const SOCKPOLICY: &str = "{sockpolicy}";
/// Stands in a command for the file that has the scene's rules.
pub(crate) const POLICY: &str = "{policy}";

/// What holds while the work is done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condition {
    /// Programs that it takes, by the names that they have in PATH, or files.
    pub(crate) needs: Vec<&'static str>,
    /// Empty programs on the scene's cgroup.
    pub(crate) empty: Vec<Hook>,
    /// Tracepoints with an empty program each.
    pub(crate) traced: Vec<&'static str>,
    /// Rules of a policy for the scene's cgroup.
    pub(crate) rules: Option<String>,
    /// Cgroups below the scene's that are targets, if not that one itself.
    pub(crate) targets: Option<usize>,
    /// A process that runs meanwhile, and what it says when it is ready.
    pub(crate) beside: Vec<String>,
    pub(crate) ready: &'static str,
    /// What the worker is run by, and whether that takes the worker's command line as one word.
    pub(crate) wrap: Vec<String>,
    pub(crate) is_one_word: bool,
    /// Variables of the worker.
    pub(crate) variables: Vec<(String, String)>,
    /// Whether it touches every process of the host.
    pub(crate) is_everywhere: bool,
}

/// Where the sockets of the work are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Those of the work in the scene's cgroup, its listener's outside.
    Inside,
    /// The listener's in the scene's cgroup, the others outside.
    Accepting,
    Outside,
}

impl Place {
    /// Of the sockets of the work, and of its listener.
    pub(crate) fn cgroups<'a>(self, target: &'a Path, outside: &'a Path) -> (&'a Path, &'a Path) {
        match self {
            Self::Inside => (target, outside),
            Self::Accepting => (outside, target),
            Self::Outside => (outside, outside),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Arm {
    pub(crate) name: &'static str,
    pub(crate) place: Place,
    pub(crate) work: Work,
}

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) name: String,
    pub(crate) condition: Condition,
    /// Done once, before all else.
    pub(crate) setup: Vec<Work>,
    pub(crate) arms: Vec<Arm>,
}

/// What comes in force for its own turn has all its time there, and a machine that is shared with others is faster or slower for
/// tenths of a second.
const IN_ONE_PIECE: u64 = 5;

#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) rounds: usize,
    /// For how long each arm works in each round; [`IN_ONE_PIECE`] times that where it does so in one.
    pub(crate) millis: u64,
    /// In how many turns each round goes over the scenes that stay: the shorter, the less changes within one.
    pub(crate) turns: usize,
    pub(crate) scenes: Vec<Scene>,
}

/// What came of a comparison: nanoseconds for each arm (`SCENE/ARM`), one for each turn of each round; and why of some there are
/// none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    by_arm: BTreeMap<String, Vec<f64>>,
    rounds: usize,
    /// Turns in a round, of arms that have more than one; 0 if none has.
    turns: usize,
    left_out: BTreeMap<String, Trouble>,
}

impl Samples {
    pub(crate) fn of(&self, arm: &str) -> Result<&[f64]> {
        if let Some(samples) = self.by_arm.get(arm) {
            return Ok(samples);
        }
        let scene = arm.split('/').next().unwrap_or(arm);
        let reason = self.left_out.get(arm).or_else(|| self.left_out.get(scene));
        Err(reason.cloned().unwrap_or_else(|| Trouble::new(format_args!("{arm} was not measured"))))
    }

    /// The samples of several arms, as many of each: where some have one a round and some have turns, or if it is asked for, the
    /// medians of these.
    pub(crate) fn beside_each_other(&self, arms: &[&str], by_round: bool) -> Result<Vec<Vec<f64>>> {
        let all = arms.iter().map(|arm| self.of(arm)).collect::<Result<Vec<_>>>()?;
        let least = all.iter().map(|samples| samples.len()).min().unwrap_or_default();
        let is_by_round = |samples: &[f64]| samples.len() == self.rounds;
        let as_many = |samples: &&[f64]| {
            let stays = is_by_round(samples) || !by_round && samples.len() == least || self.turns == 0;
            if stays { samples.to_vec() } else { samples.chunks(self.turns).map(measure::median).collect() }
        };
        Ok(all.iter().map(as_many).collect())
    }

    pub(crate) fn add(&mut self, arm: &str, sample: f64) {
        self.by_arm.entry(arm.to_owned()).or_default().push(sample);
    }

    pub(crate) fn leave_out(&mut self, what: &str, reason: Trouble) {
        self.by_arm.retain(|arm, _| arm != what && arm.split('/').next() != Some(what));
        self.left_out.entry(what.to_owned()).or_insert(reason);
    }

    fn is_left_out(&self, scene: &str) -> bool {
        self.left_out.contains_key(scene)
    }
}

impl Comparison {
    pub(crate) fn run(&self, ground: &Ground) -> Result<Samples> {
        let mut samples = Samples { rounds: self.rounds, turns: self.turns, ..Samples::default() };
        let outside = ground.cgroup("outside")?;
        let mut stages = self.set(ground, &outside, &mut samples)?;
        for round in 0..self.rounds {
            for turn in 0..self.turns {
                for place in measure::order(self.scenes.len(), round * self.turns + turn) {
                    let scene = &self.scenes[place];
                    if let Some(stage) = stages.get_mut(&scene.name).filter(|_| !samples.is_left_out(&scene.name)) {
                        let result = self.play(stage, scene, &outside, self.millis / self.turns as u64, &mut samples);
                        result.unwrap_or_else(|trouble| samples.leave_out(&scene.name, trouble));
                    }
                }
            }
            for place in measure::order(self.scenes.len(), round) {
                let scene = &self.scenes[place];
                if !stages.contains_key(&scene.name) && !samples.is_left_out(&scene.name) {
                    let result = Stage::set(ground, scene, &outside).and_then(|mut stage| {
                        self.play(&mut stage, scene, &outside, IN_ONE_PIECE * self.millis, &mut samples)
                    });
                    result.unwrap_or_else(|trouble| samples.leave_out(&scene.name, trouble));
                }
            }
        }
        drop(stages);
        for scene in &self.scenes {
            let home = ground.root.join(&scene.name);
            if home.is_dir() {
                guard::remove(&home)?;
            }
        }
        Ok(samples)
    }

    /// Sets all scenes that stay, at the same time.
    fn set(&self, ground: &Ground, outside: &Path, samples: &mut Samples) -> Result<BTreeMap<String, Stage>> {
        let staying = self.scenes.iter().filter(|scene| !scene.condition.is_everywhere);
        let begun: Vec<_> = staying.map(|scene| (scene, InForce::begin(ground, scene))).collect();
        let mut stages = BTreeMap::new();
        for (scene, in_force) in begun {
            match in_force.and_then(|in_force| Stage::on(ground, scene, outside, in_force)) {
                Ok(stage) => drop(stages.insert(scene.name.clone(), stage)),
                Err(trouble) => samples.leave_out(&scene.name, trouble),
            }
        }
        Ok(stages)
    }

    fn play(&self, stage: &mut Stage, scene: &Scene, outside: &Path, millis: u64, samples: &mut Samples) -> Result<()> {
        for arm in &scene.arms {
            let (at, listen_at) = arm.place.cgroups(&stage.target, outside);
            let took = stage.worker.perform(at, listen_at, millis, &arm.work)?;
            samples.add(&format!("{}/{}", scene.name, arm.name), took.ns);
        }
        Ok(())
    }
}

/// A scene that is set.
struct Stage {
    // Dropped in this order: the worker is in the cgroup that the policy is in force on.
    worker: Worker,
    _in_force: InForce,
    target: PathBuf,
}

impl Stage {
    fn set(ground: &Ground, scene: &Scene, outside: &Path) -> Result<Self> {
        Self::on(ground, scene, outside, InForce::begin(ground, scene)?)
    }

    fn on(ground: &Ground, scene: &Scene, outside: &Path, mut in_force: InForce) -> Result<Self> {
        in_force.wait()?;
        let mut worker = Worker::start(ground, outside, &scene.condition)?;
        let target = in_force.target.clone();
        for work in &scene.setup {
            worker.perform(&target, &target, 0, work)?;
        }
        Ok(Self { worker, _in_force: in_force, target })
    }
}

/// What holds in a scene, until this is dropped.
#[derive(Debug)]
pub(crate) struct InForce {
    _empty: Vec<Empty>,
    beside: Option<Beside>,
    /// A cgroup that the condition is about.
    pub(crate) target: PathBuf,
}

impl InForce {
    /// Begins; what takes its time is awaited by [`InForce::wait`].
    pub(crate) fn begin(ground: &Ground, scene: &Scene) -> Result<Self> {
        let Scene { name, condition, .. } = scene;
        check_installed(&condition.needs)?;
        let home = ground.cgroup(name)?;
        let mut target = home.clone();
        for number in 0..condition.targets.unwrap_or_default() {
            target = ground.cgroup(&format!("{name}/target-{number}"))?;
        }
        let mut empty = Vec::new();
        for hook in &condition.empty {
            empty.push(Empty::on_cgroup(*hook, &target)?);
        }
        for tracepoint in &condition.traced {
            empty.push(Empty::on_tracepoint(tracepoint)?);
        }
        let covered = if condition.targets.is_some() { home.join("*") } else { home };
        let policy = condition.rules.as_ref().map(|rules| ground.policy(name, &covered, rules)).transpose()?;
        let beside = match condition.beside.as_slice() {
            [] => None,
            words => {
                let replaced = words.iter().map(|word| match word.as_str() {
                    SOCKPOLICY => ground.sockpolicy.display().to_string(),
                    POLICY => policy.as_deref().unwrap_or(Path::new("")).display().to_string(),
                    _ => word.clone(),
                });
                let words: Vec<String> = replaced.collect();
                Some(Beside::start(ground, name, &words, condition.ready)?)
            }
        };
        Ok(Self { _empty: empty, beside, target })
    }

    /// The process that runs beside, alone.
    pub(crate) fn into_beside(self) -> Option<Beside> {
        self.beside
    }

    pub(crate) fn wait(&mut self) -> Result<()> {
        self.beside.as_mut().map_or(Ok(()), Beside::wait)
    }
}

/// That all of these are in PATH, or there.
pub(crate) fn check_installed(programs: &[&str]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An absolute name stays what it is when it is joined.
    let is_there = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    match programs.iter().find(|program| !is_there(program)) {
        None => Ok(()),
        Some(missing) => Err(Trouble::new(format_args!("{missing} is not installed, ./bootstrap --bench does that"))),
    }
}

/// A process that runs while others work, until this is dropped.
#[derive(Debug)]
pub(crate) struct Beside {
    child: Child,
    program: String,
    /// What it says, on both ways.
    pub(crate) log: PathBuf,
    ready: &'static str,
}

impl Beside {
    pub(crate) fn start(ground: &Ground, name: &str, words: &[String], ready: &'static str) -> Result<Self> {
        let log = ground.scratch.join(format!("{name}.log"));
        let out = fs::File::create(&log).or_cannot(format_args!("write {}", log.display()))?;
        let err = out.try_clone().or_cannot(format_args!("write {}", log.display()))?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(out).stderr(err).env("SOCKPOLICY_LOG", "info");
        let mut enter = guard::enter(&ground.cgroup("beside")?)?;
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(move || {
                guard::die_with_parent()?;
                enter()
            });
        }
        let child = command.spawn().or_cannot(format_args!("run {}", words[0]))?;
        Ok(Self { child, program: words[..words.len().min(2)].join(" "), log, ready })
    }

    /// Waits until it is ready.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let Self { child, log, ready, program } = self;
        let mut said = String::new();
        let is_ready = wait::until(wait::PATIENCE, || {
            said = fs::read_to_string(&log).unwrap_or_default();
            said.contains(*ready) || !matches!(child.try_wait(), Ok(None))
        });
        if is_ready && matches!(child.try_wait(), Ok(None)) {
            return Ok(());
        }
        let why = said.lines().rfind(|line| line.contains("rror")).or(said.lines().last()).unwrap_or("it said nothing");
        Err(Trouble::new(format_args!("{program} did not get ready: {why}")))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // One that has ended needs no signal.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Ends it as a user would, by Ctrl-C, and gives what it has said.
    pub(crate) fn end(mut self) -> String {
        self.stop();
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn stop(&mut self) {
        self.signal(Signal::SIGINT);
        if !wait::until(wait::PATIENCE, || !matches!(self.child.try_wait(), Ok(None))) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop();
    }
}
