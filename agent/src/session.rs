//! One policy in force: from valid policies to events and a summary.
//!
//! Holds the programs and what is needed to put their records into words. It has no loop and does not print:
//! whoever owns it waits on its descriptor and drains it.

use std::os::fd::{AsFd, BorrowedFd};

use abi::setting::{Setting, form, on_conflict};
use nix::time::{ClockId, clock_gettime};

use crate::{
    compile::{CompileError, Desired},
    coverage::Stack,
    events::{Event, Executables, Filter, Surroundings, decode},
    gaps::{Gap, Gaps},
    host::{
        cgroup::{Mount, Names},
        process, tcp,
    },
    kernel::{self, Answer, Audit, BackendChoice, KernelError, Object, Record, Subjects, Target},
    policy::model::{Calls, Errno, Mode, Policy},
    report::{CallLine, Counts, Loss, Lost, Report, Summary, errno_name},
    trial::{self, compile_with_trial},
};

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "this kernel cannot do all that the policies say:{0}\n  help: leave that out, or give --allow-gaps to have the rest \
         in force without it"
    )]
    Gaps(Gaps),
}

/// Events to drain at a time: some milliseconds' worth.
const BATCH_MAX: usize = 1024;

/// A policy in force on its targets, until this is dropped.
pub struct Session {
    object: Object,
    desired: Desired,
    targets: Vec<Target>,
    filter: Filter,
    audit: Option<Audit>,
    gaps: Vec<Gap>,
    names: Names,
    executables: Executables,
    report: Report,
    unknown_records: u64,
    /// Calls whose records were dropped because their threads are gone.
    dead_calls: u64,
    /// What had been lost when it was last told.
    told: Lost,
}

/// What to put in force, on whom, and whom to look at.
pub struct Setup {
    pub desired: Desired,
    pub mount: Mount,
    pub targets: Vec<Target>,
    pub backend: BackendChoice,
    /// What to do about what this kernel cannot do.
    pub gaps: GapsChoice,
    /// Events to tell of. Its processes are also the only ones whose calls the audit follows, if there are any.
    pub filter: Filter,
}

/// What to do about what policies ask for and this kernel cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapsChoice {
    /// Find out, and refuse policies that are enforced.
    Refuse,
    /// Find out, and go on without it.
    Allow,
    /// Go on without it, as far as it shows by itself: nothing is to be set.
    DoNotTry,
}

/// Compiles policies for a session, for each stack of them that is in force on a target.
///
/// # Errors
///
/// Where they do not go together.
pub fn prepare(policies: &[Policy], stacks: &[Stack], dry_run: bool, timing: bool) -> Result<Desired, SessionError> {
    // Those that hold nowhere are not tried, counted or listened to.
    let in_force: Vec<usize> =
        (0..policies.len()).filter(|policy| stacks.iter().any(|stack| stack.contains(policy))).collect();
    let renumbered = |stack: &Stack| -> Stack {
        stack.iter().filter_map(|policy| in_force.iter().position(|kept| kept == policy)).collect()
    };
    let stacks: Vec<Stack> = stacks.iter().map(renumbered).collect();
    let mut policies: Vec<Policy> = in_force.iter().map(|policy| policies[*policy].clone()).collect();
    if dry_run {
        policies.iter_mut().for_each(|policy| policy.mode = Mode::DryRun);
    }
    let mut desired = compile_with_trial(&policies, &stacks)?;
    desired.audit.timing |= timing;
    Ok(desired)
}

impl Session {
    /// Puts a policy in force.
    ///
    /// # Errors
    ///
    /// Where this kernel cannot do it; then nothing is in force.
    pub fn start(setup: Setup) -> Result<Self, SessionError> {
        let Setup { mut desired, mount, targets, backend, gaps: choice, filter } = setup;
        warn_of_overruling(&mount, &targets);
        let subjects = Subjects { targets: &targets, processes: &filter.processes };
        let mut object = Object::load(&desired, subjects)?;
        let gaps = find_gaps(&mut object, &mut desired, &mount, choice);
        if choice == GapsChoice::Refuse && gaps.0.iter().any(|gap| gap.is_enforced) {
            return Err(SessionError::Gaps(gaps));
        }
        object.attach(&desired, &targets)?;
        let audit = object.attach_audit(&desired, backend)?;
        if audit.is_none() && desired.audit.calls != Calls::Conflicts {
            log::warn!("without an audit only conflicts are seen: the policy's `calls` has no effect");
        }
        if audit.is_none() && desired.audit.timing {
            log::warn!("without an audit calls are not timed");
        }
        if let Some(reason) = object.blindness() {
            log::warn!("events will lack what sockets say of themselves: {reason}");
        }
        object.enable(&desired, subjects)?;
        Ok(Self {
            object,
            desired,
            targets,
            filter,
            audit,
            gaps: gaps.0,
            names: Names::new(mount),
            executables: Executables::default(),
            report: Report::default(),
            unknown_records: 0,
            dead_calls: 0,
            told: Lost::default(),
        })
    }

    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// What the policies ask for and this kernel cannot do.
    #[must_use]
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    #[must_use]
    pub fn audit(&self) -> Option<Audit> {
        self.audit
    }

    /// Hands events that are there to `tell`; gives whether there may be more. They may come faster than
    /// they go, and whoever calls this has other things to do too.
    pub fn drain(&mut self, mut tell: impl FnMut(&Event)) -> bool {
        for _ in 0..BATCH_MAX {
            let event = match self.object.next_record() {
                None => return false,
                Some(Record::File(file)) => {
                    self.executables.learn(&file);
                    continue;
                }
                Some(Record::Event(raw)) => {
                    let surroundings = self.surroundings(&raw);
                    decode(&raw, &self.desired, surroundings).ok()
                }
                Some(Record::Unknown) => None,
            };
            match event {
                Some(event) if self.filter.admits(&event) => {
                    self.report.fold(&event);
                    tell(&event);
                }
                Some(_) => {}
                None => self.unknown_records += 1,
            }
        }
        true
    }

    fn exe(&mut self, raw: &abi::event::Event) -> Result<String, &'static str> {
        if raw.executable.pid == 0 {
            // The kernel does not say what it was. This is what it is by now.
            return process::executable(raw.pid).ok_or("the process was gone when the event was read");
        }
        match self.executables.told(&raw.executable) {
            Some(told) => told.ok_or("its path is not known, or too long"),
            None => {
                self.object.ask_for_file_of(&raw.executable);
                Err("what the kernel told of it was lost")
            }
        }
    }

    fn surroundings(&mut self, raw: &abi::event::Event) -> Surroundings {
        Surroundings {
            // Where the kernel does not say what it was, this is what it is by now.
            exe: self.exe(raw),
            cgroup: self.names.name(raw.cgroup).map(str::to_owned),
            socket_cgroup: self.names.name(raw.call.socket_cgroup).map(str::to_owned),
            monotonic_epoch_ns: monotonic_epoch_ns(),
            blindness: self.object.blindness().map(str::to_owned),
        }
    }

    /// Takes the policy out of force, so that what there is to drain comes to an end.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn end(&mut self) -> Result<(), SessionError> {
        Ok(self.object.disable()?)
    }

    /// What has been lost since this was last asked.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn new_losses(&mut self) -> Result<Vec<Loss>, SessionError> {
        let lost = self.lost();
        if lost.losses.calls_full > self.told.losses.calls_full {
            self.dead_calls += self.object.drop_dead_calls()?;
        }
        let new = lost.since(&self.told);
        self.told = lost;
        Ok(new)
    }

    fn lost(&self) -> Lost {
        let mut losses = self.object.losses();
        losses.no_return += self.dead_calls;
        Lost { losses, not_run: self.object.misses(), unknown_records: self.unknown_records }
    }

    /// Sums up, and removes the programs.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn finish(self) -> Result<Summary, SessionError> {
        let tallies = self.object.tallies()?;
        let mut lost = self.lost();
        // Whatever has not returned by now will not be seen to.
        lost.losses.no_return += self.object.calls_under_way()?;
        let counts = Counts {
            counters: self.object.counters(&self.desired)?,
            calls: tallies.into_iter().filter_map(|(key, tally)| CallLine::new(key, tally)).collect(),
            lost,
        };
        let targets = self.targets.iter().map(|target| target.cgroup.name.clone()).collect();
        Ok(self.report.summarize(&self.desired, counts, targets, self.audit, self.gaps))
    }
}

/// Readable when there are events.
impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

/// Says where another sockpolicy will have the last word.
fn warn_of_overruling(mount: &Mount, targets: &[Target]) {
    let paths: Vec<_> = targets.iter().map(|target| mount.below(&target.cgroup)).collect();
    match kernel::overruling(mount, &paths) {
        Ok(found) => {
            let mut places: Vec<_> = found.iter().map(|neighbour| format!("/{}", neighbour.cgroup.display())).collect();
            places.dedup();
            if !places.is_empty() {
                log::warn!(
                    "another sockpolicy is attached to {}, above: where both decide an option, that one wins",
                    places.join(", ")
                );
            }
        }
        Err(error) => log::debug!("cannot tell which programs are attached above: {error}"),
    }
}

/// What the policies ask for and this kernel cannot do. Of `desired`, what is left is what it can do: hooks, and no trial.
fn find_gaps(object: &mut Object, desired: &mut Desired, mount: &Mount, choice: GapsChoice) -> Gaps {
    let trial = desired.scopes.len() - usize::from(desired.has_trial);
    let mut asked = desired.clone();
    asked.end_trial();
    let refused = object.refused().to_vec();
    desired.keep_hooks(|hook| !refused.iter().any(|(other, _)| *other == hook));
    let mut gaps: Vec<Gap> =
        refused.into_iter().filter_map(|(hook, reason)| Gap::of_hook(&asked, hook, reason)).collect();
    if desired.has_trial && choice != GapsChoice::DoNotTry {
        match trial::try_scope(object, desired, trial, mount) {
            Ok(answers) => gaps.extend(answers.into_iter().filter_map(|(option, answer)| match answer {
                Answer::No(errno) => Some(Gap::of_option(&asked, option, &errno)),
                Answer::Yes | Answer::Unknown(_) => None,
            })),
            Err(error) => log::warn!("cannot try whether this kernel sets the options: {error}"),
        }
    }
    desired.end_trial();
    gaps.extend(missing_congestion_controls(desired));
    if !object.abilities().set_retval {
        gaps.extend(impossible_errnos(desired));
    }
    gaps.into_iter().collect()
}

fn missing_congestion_controls(desired: &Desired) -> Vec<Gap> {
    let wanted = desired.congestion_controls();
    if wanted.is_empty() {
        return Vec::new();
    }
    match tcp::congestion_controls() {
        Ok(available) => {
            let missing = wanted.into_iter().filter(|name| !available.iter().any(|known| known == name));
            missing.map(|name| Gap::of_congestion_control(desired, name, &available)).collect()
        }
        Err(error) => {
            // Then a refusal on a socket will say it.
            log::warn!("cannot tell which congestion controls this kernel has: {error}");
            Vec::new()
        }
    }
}

fn impossible_errnos(desired: &Desired) -> Vec<Gap> {
    let denies = |setting: &Setting| setting.form == form::DENY || setting.on_conflict == on_conflict::DENY;
    let all = desired.settings.iter().zip(&desired.sources);
    all.filter(|(setting, _)| denies(setting) && setting.errno != Errno::EPERM.0)
        .map(|(setting, source)| Gap::of_errno(desired, source, &errno_name(setting.errno.into())))
        .collect()
}

/// What to add to the kernel's time stamps. Not the same for long: clocks are set, and machines suspended.
fn monotonic_epoch_ns() -> i128 {
    let now = |clock| {
        clock_gettime(clock).map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}
