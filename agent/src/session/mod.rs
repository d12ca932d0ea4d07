//! Policies in force: from compiled policies to events and a summary.
//!
//! Owns the programs and what is needed to decode their records. It has no loop and prints nothing: the caller waits on the
//! session's descriptor and calls [`Session::drain`].

mod blocked;
mod drain;
mod record;
mod start;
mod support;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    os::fd::{AsFd, BorrowedFd},
};

use abi::GENERATIONS;

use self::{
    blocked::{BlockedTargets, without_failed},
    record::RecordWriter,
    start::{probe_separately, warn_without_audit},
    support::{find_unsupported, refuse},
};
use crate::{
    compile::{CompileError, Desired, NeedsHook, compile_in_force},
    coverage::Stack,
    escape::Escape,
    events::{Executables, Filter},
    host::{
        cgroup::{Mount, Names},
        containers, tcp,
    },
    instance::{Files, Instance, InstanceError},
    kernel::{self, Answer, Audit, AuditConfig, BackendChoice, KernelError, Object, Target},
    policy::model::Policy,
    report::{AuditFacts, BufferMax, CallLine, Counts, Loss, Lost, Repaired, Report, Summary},
    skipped::{Kind, Skip, SkippedList},
    unsupported::{Unsupported, UnsupportedList},
};

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("{0}")]
    Instance(#[from] InstanceError),
    #[error("cannot enforce the policies on this kernel:{0}")]
    Unsupported(UnsupportedList),
}

/// Policies in force on their targets, until this is dropped.
pub struct Session {
    object: Object,
    /// The record of the instance; `None` if the session has no instance.
    record: Option<RecordWriter>,
    /// Targets that the programs could not be attached to.
    skipped: Vec<Skip>,
    current: Generation,
    /// Previous generations by which sockets may still be set up, the latest last.
    draining: Vec<Generation>,
    /// Retired generations, the latest last. The ring buffer may still contain their events.
    retired: Vec<Generation>,
    /// Whether the ring buffer was empty at some time since the last of these was retired.
    was_drained: bool,
    targets: Vec<Target>,
    /// The cgroup ids of targets that were removed and created again before this session took over.
    recreated: BTreeSet<u64>,
    filter: Filter,
    backend: BackendChoice,
    audit: Option<Audit>,
    on_unsupported: OnUnsupported,
    blocked: BlockedTargets,
    unsupported: Vec<Unsupported>,
    needs_hook: Option<NeedsHook>,
    /// The results of the option probes.
    probed: ProbedOptions,
    mount: Mount,
    names: Names,
    containers: containers::Known,
    executables: Executables,
    report: Report,
    unknown_records: u64,
    /// Number of calls whose records were dropped because their threads had exited.
    dead_calls: u64,
    /// The losses that have been reported.
    reported: Lost,
}

/// Policies that are or were in force together.
pub(crate) struct Generation {
    pub(crate) number: u32,
    pub(crate) desired: Desired,
    /// Whether an earlier agent enabled the generation.
    pub(crate) is_taken_over: bool,
}

/// The input of [`Session::start`].
pub struct Setup {
    pub desired: Desired,
    pub mount: Mount,
    pub targets: Vec<Target>,
    /// The containers that events name.
    pub containers: containers::Known,
    pub backend: BackendChoice,
    /// What to do about settings that this kernel does not support.
    pub on_unsupported: OnUnsupported,
    /// What to do about targets that foreign programs keep from being attached to.
    pub on_blocked: OnBlocked,
    /// The events to report. If it names processes, the audit sees only the calls of these.
    pub filter: Filter,
    /// The instance, if other processes can find the session, and the policy files.
    pub instance: Option<(Instance, Files)>,
}

/// What to do about targets at which a foreign program forbids attaching, or would lose its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBlocked {
    /// Reject the policies on all targets.
    Refuse,
    /// Skip these targets, and log each once.
    Skip,
}

/// What to do about settings that this kernel does not support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnsupported {
    /// Probe the settings, and reject enforced policies with unsupported ones.
    Refuse,
    /// Probe the settings, and continue without unsupported ones.
    Allow,
    /// Do not probe options, since no option is to be set. Continue without what the kernel refuses when the programs are
    /// loaded.
    DoNotProbe,
}

/// Compiles policies for a session, for each stack of them that is in force on a target.
///
/// # Errors
///
/// Fails if the policies cannot be combined.
pub fn prepare(policies: &[Policy], stacks: &[Stack], dry_run: bool, timing: bool) -> Result<Desired, SessionError> {
    let mut desired = compile_in_force(policies, stacks, dry_run)?;
    desired.audit.timing |= timing;
    kernel::leave_out_absent_hooks(&mut desired);
    Ok(desired)
}

impl Session {
    /// Enables other policies in place of the current ones, or the same policies on other targets. Each event of a socket sees
    /// either the old policies or the new ones.
    ///
    /// # Errors
    ///
    /// Fails if this kernel refuses. The old policies are then still in force.
    pub fn reload(&mut self, mut desired: Desired, targets: Vec<Target>, files: Files) -> Result<(), SessionError> {
        let needs_hook = needs_hook(&desired, self.backend, self.persists(), &self.filter)
            .or_else(|| self.needs_hook_without_socket());
        if needs_hook.is_none() {
            desired.judge_by_audit();
        }
        self.object.load_more(&desired.hooks())?;
        if self.on_unsupported != OnUnsupported::DoNotProbe {
            self.probe_new_options(&desired)?;
        }
        let unsupported = find_unsupported(&self.object, &mut desired, &self.probed);
        refuse(self.on_unsupported, &unsupported)?;
        let targets = self.blocked.without(&self.object, &desired, targets)?;
        if !self.object.has_room() {
            self.retire()?;
        }
        let (before, requested) = (AuditConfig::of(&self.current.desired), AuditConfig::of(&desired));
        if desired.audit.timing && !before.audit.timing {
            log::warn!("calls are not timed until sockpolicy is restarted");
        }
        let mut staged = self.object.stage(&desired, None, &targets)?;
        let (targets, failed) = without_failed(targets, &staged.take_failed());
        if let Some(record) = &mut self.record
            && let Err(error) = record.add(staged.generation(), files, &targets, desired.audit_judges, false)
        {
            self.object.abandon(staged);
            return Err(error.into());
        }
        // The audit comes last, because it takes effect before the policies do.
        if requested != before {
            match self.object.attach_audit(requested, self.backend) {
                Ok(audit) => self.audit = audit,
                Err(error) => {
                    if let Some(record) = &mut self.record {
                        record.withdraw(staged.generation());
                    }
                    self.object.abandon(staged);
                    // Restores the previous audit. What could be attached then can be attached now.
                    self.audit = self.object.attach_audit(before, self.backend)?;
                    return Err(error.into());
                }
            }
            warn_without_audit(self.audit, desired.audit);
        }
        let number = self.object.enable(staged, desired.audit.calls)?;
        let before = mem::replace(&mut self.current, Generation { number, desired, is_taken_over: false });
        self.draining.push(before);
        self.targets = targets;
        self.skipped = self.blocked.skips().chain(failed).collect();
        self.unsupported = unsupported.0;
        self.needs_hook = needs_hook;
        Ok(())
    }

    fn needs_hook_without_socket(&self) -> Option<NeedsHook> {
        (!self.object.can_judge()).then_some(NeedsHook::Blind)
    }

    /// Returns why a hook at setsockopt judges the calls; `None` if the audit judges them.
    #[must_use]
    pub fn needs_hook(&self) -> Option<NeedsHook> {
        self.needs_hook
    }

    /// Moves the policies in force to these targets, as cgroups come and go.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. The policies are then in force on the old targets that still exist.
    pub fn retarget(&mut self, targets: Vec<Target>) -> Result<(), SessionError> {
        let targets = self.blocked.without(&self.object, &self.current.desired, targets)?;
        let ids = |targets: &[Target]| -> BTreeSet<(u64, usize)> {
            targets.iter().map(|target| (target.cgroup.id, target.scope)).collect()
        };
        if ids(&targets) == ids(&self.targets) {
            self.skipped = self.blocked.skips().collect();
            return Ok(());
        }
        self.replace_targets(targets)
    }

    fn replace_targets(&mut self, targets: Vec<Target>) -> Result<(), SessionError> {
        if let Some(record) = &mut self.record {
            record.retarget(&targets)?;
        }
        if let Some(failed) = self.object.retarget(&self.current.desired, &targets)? {
            let (targets, failed_targets) = without_failed(targets, &failed);
            self.targets = targets;
            self.skipped = self.blocked.skips().chain(failed_targets).collect();
            if let Some(record) = self.record.as_mut().filter(|_| !failed.is_empty()) {
                record.retarget(&self.targets)?;
            }
            return Ok(());
        }
        let desired = self.current.desired.clone();
        let files = self.record.as_ref().map(RecordWriter::files).unwrap_or_default();
        self.reload(desired, targets, files)
    }

    /// Sets the containers that events name.
    pub fn set_containers(&mut self, containers: containers::Known) {
        self.containers = containers;
    }

    /// Removes from `targets` those that are new and belong to another instance, according to the records of instances. Returns
    /// them as skipped.
    pub fn leave_to_others(&self, targets: &mut Vec<Target>) -> Vec<Skip> {
        let Some(record) = &self.record else { return Vec::new() };
        let own: HashSet<&str> = kernel::names(&self.targets).into_iter().collect();
        let new = kernel::names(targets).into_iter().filter(|name| !own.contains(name));
        let governed = record.governed_by_others(&new.collect());
        targets.retain(|target| target.is_boundary || !governed.contains_key(&target.cgroup.name));
        let skip = |(name, instance): (String, String)| {
            let reason = format!("it is already a target of instance `{}`", instance.escaped());
            Skip::new(Kind::Cgroup, name, reason).transient_if(true)
        };
        governed.into_iter().map(skip).collect()
    }

    /// Returns the targets that were skipped when the current targets were set.
    #[must_use]
    pub fn skipped(&self) -> &[Skip] {
        &self.skipped
    }

    /// Records the result of a reload. `refused`: why the policies were not replaced.
    pub fn note_reload(&mut self, refused: Option<String>) {
        if let Some(record) = &mut self.record {
            record.note_reload(refused);
        }
    }

    /// Records the objects that are skipped now.
    pub fn note_skipped(&mut self, skipped: &SkippedList) {
        if let Some(record) = &mut self.record {
            record.note_skipped(skipped);
        }
    }

    /// Returns the cgroup ids of targets that were removed and created again while no agent ran. Their sockets may have been
    /// created before the programs were attached.
    #[must_use]
    pub fn recreated(&self) -> &BTreeSet<u64> {
        &self.recreated
    }

    /// Counts the sockets of new targets that were repaired, for the report.
    pub fn note_repaired(&mut self, repaired: Repaired) {
        self.report.note_repaired(repaired);
    }

    /// Returns whether a target's cgroup has been removed. The caller should then call [`Self::detach_removed`] from time to
    /// time.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        self.object.has_removed()
    }

    /// Detaches from targets that have been removed and whose last sockets are closed.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn detach_removed(&mut self) -> Result<(), SessionError> {
        Ok(self.object.detach_removed()?)
    }

    fn probe_new_options(&mut self, desired: &Desired) -> Result<(), SessionError> {
        let mut new = desired.set_options();
        new.retain(|option| !self.probed.contains_key(option.name));
        if !new.is_empty() {
            self.probed.extend(probe_separately(desired, &new, &self.mount)?);
        }
        Ok(())
    }

    /// Returns whether there are previous policies by which sockets may still be set up.
    #[must_use]
    pub fn has_draining(&self) -> bool {
        self.object.previous().next().is_some()
    }

    /// Makes sockets that previous policies still set up continue with the policies in force.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn retire(&mut self) -> Result<(), SessionError> {
        for (number, counters) in self.object.retire()? {
            if let Some(generation) = self.draining.iter().find(|generation| generation.number == number) {
                self.report.count(number, &generation.desired, &counters, !generation.is_taken_over);
            }
        }
        if mem::take(&mut self.was_drained) {
            self.retired.clear();
        }
        self.retired.append(&mut self.draining);
        // Newer generations use the slots of older ones.
        self.retired.retain(|generation| self.current.number - generation.number < GENERATIONS);
        if let Some(record) = &mut self.record {
            record.retire(&[self.current.number], &self.retired, self.report.saved_counters(&self.current.desired));
        }
        Ok(())
    }

    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.current.desired
    }

    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Returns the settings that this kernel does not support.
    #[must_use]
    pub fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
    }

    #[must_use]
    pub fn audit(&self) -> Option<Audit> {
        self.audit
    }

    /// Disables the policies, unless they persist. After that no new events are produced.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn end(&mut self) -> Result<(), SessionError> {
        if self.persists() {
            return Ok(());
        }
        Ok(self.object.disable()?)
    }

    /// Returns the name of the instance if its policies persist after this session.
    #[must_use]
    pub fn persistent_name(&self) -> Option<&str> {
        self.record.as_ref().and_then(RecordWriter::persistent_name)
    }

    fn persists(&self) -> bool {
        self.persistent_name().is_some()
    }

    /// Returns what was lost since the last call.
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn new_losses(&mut self) -> Result<Vec<Loss>, SessionError> {
        let lost = self.lost();
        if lost.losses.calls_full > self.reported.losses.calls_full {
            self.dead_calls += self.object.drop_dead_calls()?;
        }
        let new = lost.since(&self.reported);
        self.reported = lost;
        self.save_ring_overflow();
        Ok(new)
    }

    /// Saves the number of events that found the ring buffer full. Later ones count for the next agent, or were lost without an
    /// agent.
    fn save_ring_overflow(&mut self) {
        if let Some(record) = &mut self.record {
            record.count_ring_overflow(self.object.ring_full());
        }
    }

    fn lost(&self) -> Lost {
        let mut losses = self.object.losses();
        losses.exit_missed += self.dead_calls;
        Lost { losses, prog_missed: self.object.misses(), unknown_records: self.unknown_records, ..Lost::default() }
    }

    /// Makes the summary, and removes the programs.
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn finish(mut self) -> Result<Summary, SessionError> {
        self.retire()?;
        self.save_ring_overflow();
        let tallies = self.object.tallies()?;
        let mut lost = self.lost();
        // The exits of calls that have not returned yet will not be seen.
        lost.losses.exit_missed += self.object.open_calls()?;
        let Self { object, current, targets, filter, audit, unsupported, mut report, .. } = self;
        let tallies = tallies.into_iter().filter(|(key, _)| filter.admits_option(key.key));
        let calls = tallies.filter_map(|(key, tally)| CallLine::new(key, tally)).collect();
        let counts = Counts { calls, lost, buffer_max: buffer_max() };
        report.count(current.number, &current.desired, &object.counters()?, true);
        let targets = kernel::names(&targets).into_iter().map(str::to_owned).collect();
        let mut summary = report.summarize(&current.desired, counts, targets, audit.map(facts), unsupported);
        summary.lines.retain(|line| filter.admits_option(line.option.key()));
        Ok(summary)
    }
}

/// Returns the largest buffers that setsockopt(2) can set on this host.
#[must_use]
pub fn buffer_max() -> BufferMax {
    let known = |name| tcp::buffer_max(name).inspect_err(|error| log::debug!("net.core.{name}: {error}")).ok();
    BufferMax { send: known("wmem_max"), receive: known("rmem_max") }
}

/// The descriptor is readable when there are events.
impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

/// The results of option probes, by the name of the option.
type ProbedOptions = BTreeMap<&'static str, Answer>;

/// Returns why a hook at setsockopt must judge the calls of these policies; `None` if the audit can judge them.
#[must_use]
pub fn needs_hook(desired: &Desired, backend: BackendChoice, persists: bool, filter: &Filter) -> Option<NeedsHook> {
    let by_session = || match backend {
        BackendChoice::None => Some(NeedsHook::NoAudit),
        _ if persists => Some(NeedsHook::Persists),
        _ => (!filter.processes.is_empty()).then_some(NeedsHook::SomeProcesses),
    };
    desired.needs_hook().or_else(by_session)
}

/// Returns what the report says of the audit.
fn facts(audit: Audit) -> AuditFacts {
    AuditFacts { backend: audit.backend.name(), not_covered: audit.not_covered() }
}
