//! Scenes: work under a condition (a policy in force, a tracer, an empty program, nothing), and how they are
//! interleaved.
//!
//! A condition that affects only its own processes stays in force for the whole comparison. A condition that affects
//! every process of the host, such as a program on a tracepoint, is in force only during its turn, since the other
//! scenes would measure it too. A scene that cannot be set up is left out with the reason.

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
    bpf::{EmptyProgram, Hook},
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    measure,
    work::{Work, Worker},
};

/// Stands for the path of the agent in a command.
pub(crate) const SOCKPOLICY: &str = "{sockpolicy}";
/// Stands for the file with the scene's rules in a command.
pub(crate) const POLICY: &str = "{policy}";

/// The condition under which work is measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condition {
    /// Required programs: names that are found in PATH, or paths.
    pub(crate) needs: Vec<&'static str>,
    /// Hooks of the scene's cgroup that get an empty program.
    pub(crate) empty: Vec<Hook>,
    /// Tracepoints that get an empty program.
    pub(crate) traced: Vec<&'static str>,
    /// Rules of a policy for the scene's cgroup.
    pub(crate) rules: Option<String>,
    /// The number of child cgroups that are the targets; `None` if the scene's cgroup itself is the target.
    pub(crate) targets: Option<usize>,
    /// A process that runs in the background, and in `ready` the text that it prints when it is ready.
    pub(crate) background: Vec<String>,
    pub(crate) ready: &'static str,
    /// The wrapper of the worker, and whether it takes the worker's command line as one word.
    pub(crate) wrap: Vec<String>,
    pub(crate) is_one_word: bool,
    /// Environment variables of the worker.
    pub(crate) variables: Vec<(String, String)>,
    /// Whether it affects every process of the host.
    pub(crate) is_everywhere: bool,
}

/// Which sockets are in the scene's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The sockets of the work are, and its listener is outside.
    Inside,
    /// The listener is, and the other sockets are outside.
    Accepting,
    Outside,
}

impl Placement {
    /// Returns the cgroup of the sockets, and that of the listener.
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
    pub(crate) placement: Placement,
    pub(crate) work: Work,
}

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) name: String,
    pub(crate) condition: Condition,
    /// Performed once, before the measurements.
    pub(crate) setup: Vec<Work>,
    pub(crate) arms: Vec<Arm>,
}

/// The factor on the time of a condition that is in force only for one turn per round. A shared machine is faster or
/// slower for tenths of a second, which this averages out.
const SINGLE_TURN_FACTOR: u64 = 5;

#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) rounds: usize,
    /// The working time of each arm in each round, in milliseconds; [`SINGLE_TURN_FACTOR`] times that with a single
    /// turn.
    pub(crate) millis: u64,
    /// The number of turns of each round for scenes that stay. Shorter turns reduce drift within a turn.
    pub(crate) turns: usize,
    pub(crate) scenes: Vec<Scene>,
}

/// The samples of a comparison: nanoseconds for each arm (`SCENE/ARM`), one for each turn of each round. `left_out`
/// has the reasons for missing arms.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    by_arm: BTreeMap<String, Vec<f64>>,
    rounds: usize,
    /// The turns in a round, for arms with more than one; 0 if no arm has more.
    turns: usize,
    left_out: BTreeMap<String, BenchError>,
}

impl Samples {
    pub(crate) fn of(&self, arm: &str) -> Result<&[f64]> {
        if let Some(samples) = self.by_arm.get(arm) {
            return Ok(samples);
        }
        let scene = arm.split('/').next().unwrap_or(arm);
        let reason = self.left_out.get(arm).or_else(|| self.left_out.get(scene));
        Err(reason.cloned().unwrap_or_else(|| BenchError::new(format_args!("{arm} was not measured"))))
    }

    /// Returns equally many samples for each of several arms. Uses the median of each round if some arms have one
    /// sample per round, or if `by_round` is set.
    pub(crate) fn paired(&self, arms: &[&str], by_round: bool) -> Result<Vec<Vec<f64>>> {
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

    pub(crate) fn leave_out(&mut self, what: &str, reason: BenchError) {
        self.by_arm.retain(|arm, _| arm != what && arm.split('/').next() != Some(what));
        self.left_out.entry(what.to_owned()).or_insert(reason);
    }

    fn is_left_out(&self, scene: &str) -> bool {
        self.left_out.contains_key(scene)
    }
}

impl Comparison {
    pub(crate) fn run(&self, ground: &Workspace) -> Result<Samples> {
        let mut samples = Samples { rounds: self.rounds, turns: self.turns, ..Samples::default() };
        let outside = ground.cgroup("outside")?;
        let mut stages = self.set(ground, &outside, &mut samples)?;
        for round in 0..self.rounds {
            for turn in 0..self.turns {
                for place in measure::order(self.scenes.len(), round * self.turns + turn) {
                    let scene = &self.scenes[place];
                    if let Some(stage) = stages.get_mut(&scene.name).filter(|_| !samples.is_left_out(&scene.name)) {
                        let result =
                            self.run_arms(stage, scene, &outside, self.millis / self.turns as u64, &mut samples);
                        result.unwrap_or_else(|error| samples.leave_out(&scene.name, error));
                    }
                }
            }
            for place in measure::order(self.scenes.len(), round) {
                let scene = &self.scenes[place];
                if !stages.contains_key(&scene.name) && !samples.is_left_out(&scene.name) {
                    let result = RunningScene::set(ground, scene, &outside).and_then(|mut stage| {
                        self.run_arms(&mut stage, scene, &outside, SINGLE_TURN_FACTOR * self.millis, &mut samples)
                    });
                    result.unwrap_or_else(|error| samples.leave_out(&scene.name, error));
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

    /// Sets up all scenes that stay, in parallel.
    fn set(&self, ground: &Workspace, outside: &Path, samples: &mut Samples) -> Result<BTreeMap<String, RunningScene>> {
        let staying = self.scenes.iter().filter(|scene| !scene.condition.is_everywhere);
        let begun: Vec<_> = staying.map(|scene| (scene, ActiveCondition::begin(ground, scene))).collect();
        let mut stages = BTreeMap::new();
        for (scene, in_force) in begun {
            match in_force.and_then(|in_force| RunningScene::on(ground, scene, outside, in_force)) {
                Ok(stage) => drop(stages.insert(scene.name.clone(), stage)),
                Err(error) => samples.leave_out(&scene.name, error),
            }
        }
        Ok(stages)
    }

    fn run_arms(
        &self,
        stage: &mut RunningScene,
        scene: &Scene,
        outside: &Path,
        millis: u64,
        samples: &mut Samples,
    ) -> Result<()> {
        for arm in &scene.arms {
            let (at, listen_at) = arm.placement.cgroups(&stage.target, outside);
            let took = stage.worker.perform(at, listen_at, millis, &arm.work)?;
            samples.add(&format!("{}/{}", scene.name, arm.name), took.ns);
        }
        Ok(())
    }
}

/// A scene that is set up.
struct RunningScene {
    // Dropped in this order: the worker is in the cgroup on which the policy is in force.
    worker: Worker,
    _in_force: ActiveCondition,
    target: PathBuf,
}

impl RunningScene {
    fn set(ground: &Workspace, scene: &Scene, outside: &Path) -> Result<Self> {
        Self::on(ground, scene, outside, ActiveCondition::begin(ground, scene)?)
    }

    fn on(ground: &Workspace, scene: &Scene, outside: &Path, mut in_force: ActiveCondition) -> Result<Self> {
        in_force.wait()?;
        let mut worker = Worker::start(ground, outside, &scene.condition)?;
        let target = in_force.target.clone();
        for work in &scene.setup {
            worker.perform(&target, &target, 0, work)?;
        }
        Ok(Self { worker, _in_force: in_force, target })
    }
}

/// A condition in force, until this value is dropped.
#[derive(Debug)]
pub(crate) struct ActiveCondition {
    _empty: Vec<EmptyProgram>,
    background: Option<BackgroundProcess>,
    /// A cgroup that the condition covers.
    pub(crate) target: PathBuf,
}

impl ActiveCondition {
    /// Starts the condition. [`ActiveCondition::wait`] waits until it is in force.
    pub(crate) fn begin(ground: &Workspace, scene: &Scene) -> Result<Self> {
        let Scene { name, condition, .. } = scene;
        check_installed(&condition.needs)?;
        let home = ground.cgroup(name)?;
        let mut target = home.clone();
        for number in 0..condition.targets.unwrap_or_default() {
            target = ground.cgroup(&format!("{name}/target-{number}"))?;
        }
        let mut empty = Vec::new();
        for hook in &condition.empty {
            empty.push(EmptyProgram::on_cgroup(*hook, &target)?);
        }
        for tracepoint in &condition.traced {
            empty.push(EmptyProgram::on_tracepoint(tracepoint)?);
        }
        let covered = if condition.targets.is_some() { home.join("*") } else { home };
        let policy = condition.rules.as_ref().map(|rules| ground.policy(name, &covered, rules)).transpose()?;
        let background = match condition.background.as_slice() {
            [] => None,
            words => {
                let replaced = words.iter().map(|word| match word.as_str() {
                    SOCKPOLICY => ground.sockpolicy.display().to_string(),
                    POLICY => policy.as_deref().unwrap_or(Path::new("")).display().to_string(),
                    _ => word.clone(),
                });
                let words: Vec<String> = replaced.collect();
                Some(BackgroundProcess::start(ground, name, &words, condition.ready)?)
            }
        };
        Ok(Self { _empty: empty, background, target })
    }

    /// Returns the background process, and drops the rest.
    pub(crate) fn into_background(self) -> Option<BackgroundProcess> {
        self.background
    }

    pub(crate) fn wait(&mut self) -> Result<()> {
        self.background.as_mut().map_or(Ok(()), BackgroundProcess::wait)
    }
}

/// Checks that all of these programs are in PATH, or exist as files.
pub(crate) fn check_installed(programs: &[&str]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Joining an absolute path replaces the directory.
    let is_there = |program: &str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    match programs.iter().find(|program| !is_there(program)) {
        None => Ok(()),
        Some(missing) => {
            Err(BenchError::new(format_args!("{missing} is not installed (./bootstrap --bench installs it)")))
        }
    }
}

/// A background process, until this value is dropped.
#[derive(Debug)]
pub(crate) struct BackgroundProcess {
    child: Child,
    program: String,
    /// The file with its standard output and standard error.
    pub(crate) log: PathBuf,
    ready: &'static str,
}

impl BackgroundProcess {
    pub(crate) fn start(ground: &Workspace, name: &str, words: &[String], ready: &'static str) -> Result<Self> {
        let log = ground.scratch.join(format!("{name}.log"));
        let out = fs::File::create(&log).or_cannot(format_args!("write {}", log.display()))?;
        let err = out.try_clone().or_cannot(format_args!("write {}", log.display()))?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(out).stderr(err).env("SOCKPOLICY_LOG", "info");
        let mut enter = guard::enter(&ground.cgroup("background")?)?;
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

    /// Waits until the process is ready.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let Self { child, log, ready, program } = self;
        let mut printed = String::new();
        let is_ready = wait::until(wait::TIMEOUT, || {
            printed = fs::read_to_string(&log).unwrap_or_default();
            printed.contains(*ready) || !matches!(child.try_wait(), Ok(None))
        });
        if is_ready && matches!(child.try_wait(), Ok(None)) {
            return Ok(());
        }
        let why = printed.lines().rfind(|line| line.contains("rror")).or(printed.lines().last()).unwrap_or("no output");
        Err(BenchError::new(format_args!("{program} did not become ready: {why}")))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // Fails only if the process has ended.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Ends the process with SIGINT, as Ctrl-C does, and returns its output.
    pub(crate) fn end(mut self) -> String {
        self.stop();
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn stop(&mut self) {
        self.signal(Signal::SIGINT);
        if !wait::until(wait::TIMEOUT, || !matches!(self.child.try_wait(), Ok(None))) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Drop for BackgroundProcess {
    fn drop(&mut self) {
        self.stop();
    }
}
