//! One policy in force: from valid policies to events and a summary.
//!
//! Holds the programs and what is needed to put their records into words. It has no loop and does not print:
//! whoever owns it waits on its descriptor and drains it.

use std::os::fd::{AsFd, BorrowedFd};

use abi::setting::on_conflict;
use nix::time::{ClockId, clock_gettime};

use crate::{
    compile::{CompileError, Desired, compile},
    coverage::Stack,
    events::{Event, Executables, Filter, Surroundings, decode},
    host::{
        cgroup::{Mount, Names},
        process, tcp,
    },
    kernel::{self, Audit, BackendChoice, KernelError, Object, Record, Subjects, Target},
    policy::model::{Calls, Errno, Mode, Policy},
    report::{CallLine, Counts, Loss, Lost, Report, Summary, errno_name},
};

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "congestion control `{name}` is not loaded in this kernel, which has {}\n  help: modprobe tcp_{name}, or name \
         one of those",
        available.join(", ")
    )]
    CongestionControl { name: String, available: Vec<String> },
    #[error(
        "this kernel cannot let a denied call fail with {errno}: only EPERM\n  help: leave `errno` out of {place}; \
         5.18 is the first kernel that lets programs choose"
    )]
    Errno { errno: String, place: String },
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
    /// Events to tell of. Its processes are also the only ones whose calls the audit follows, if there are any.
    pub filter: Filter,
}

/// Compiles policies for a session, for each stack of them that is in force on a target.
///
/// # Errors
///
/// Where they do not go together, or want a congestion control that this kernel does not have.
pub fn prepare(policies: &[Policy], stacks: &[Stack], dry_run: bool, timing: bool) -> Result<Desired, SessionError> {
    let mut policies = policies.to_vec();
    if dry_run {
        policies.iter_mut().for_each(|policy| policy.mode = Mode::DryRun);
    }
    let mut desired = compile(&policies, stacks)?;
    desired.audit.timing |= timing;
    check_congestion_controls(&desired)?;
    Ok(desired)
}

impl Session {
    /// Puts a policy in force.
    ///
    /// # Errors
    ///
    /// Where this kernel cannot do it; then nothing is in force.
    pub fn start(setup: Setup) -> Result<Self, SessionError> {
        let Setup { desired, mount, targets, backend, filter } = setup;
        warn_of_overruling(&mount, &targets);
        let subjects = Subjects { targets: &targets, processes: &filter.processes };
        let mut object = Object::load(&desired, subjects)?;
        if !object.abilities().set_retval {
            check_errnos(&desired)?;
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
        Ok(self.report.summarize(&self.desired, counts, targets, self.audit))
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

fn check_congestion_controls(desired: &Desired) -> Result<(), SessionError> {
    let wanted = desired.congestion_controls();
    if wanted.is_empty() {
        return Ok(());
    }
    let available = match tcp::congestion_controls() {
        Ok(available) => available,
        Err(error) => {
            // Then a refusal on a socket will say it.
            log::warn!("cannot tell which congestion controls this kernel has: {error}");
            return Ok(());
        }
    };
    match wanted.into_iter().find(|name| !available.iter().any(|known| known == name)) {
        Some(name) => Err(SessionError::CongestionControl { name: name.to_owned(), available }),
        None => Ok(()),
    }
}

fn check_errnos(desired: &Desired) -> Result<(), SessionError> {
    let denies = |setting: &abi::setting::Setting| {
        setting.form == abi::setting::form::DENY || setting.on_conflict == on_conflict::DENY
    };
    let other = |setting: &abi::setting::Setting| denies(setting) && setting.errno != Errno::EPERM.0;
    let Some(index) = desired.settings.iter().position(other) else { return Ok(()) };
    let place = desired.source(index as u32).map(|(source, rule)| format!("{}:{}", rule.path.display(), source.line));
    Err(SessionError::Errno {
        errno: errno_name(desired.settings[index].errno.into()),
        place: place.unwrap_or_default(),
    })
}

/// What to add to the kernel's time stamps. Not the same for long: clocks are set, and machines suspended.
fn monotonic_epoch_ns() -> i128 {
    let now = |clock| {
        clock_gettime(clock).map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}
