//! Policies in force: from compiled policies to events and a summary.
//!
//! Owns the programs and what is needed to decode their records. It has no loop and prints nothing: the caller waits on the
//! session's descriptor and calls [`Session::drain`].

mod record;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    os::fd::{AsFd, BorrowedFd},
    panic::resume_unwind,
    thread,
};

use abi::{
    GENERATIONS,
    event::{Call, flags},
    index,
    setting::{Setting, form, on_conflict},
};
use nix::time::{ClockId, clock_gettime};

use self::record::RecordWriter;
use crate::{
    compile::{CompileError, Desired, Hook, NeedsHook, compile_in_force},
    coverage::Stack,
    errno,
    escape::Escape,
    events::{Event, Executables, Filter, HostContext, decode},
    host::{
        cgroup::{Mount, Names},
        containers, process, tcp,
    },
    instance::{Files, Instance, InstanceError},
    kernel::{
        self, Answer, Audit, AuditConfig, BackendChoice, Failed, FilledTables, ForeignConflict, KernelError, Object,
        Record, Target,
    },
    options::SocketOption,
    policy::model::{self, Calls, Errno, Policy},
    report::{AuditFacts, CallLine, Counts, Loss, Lost, Report, Summary},
    skipped::{Kind, Skip, SkippedList},
    trial::{self, Sample},
    unsupported::{Unsupported, UnsupportedList},
};

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("cannot enforce the policies on this kernel:{0}")]
    Unsupported(UnsupportedList),
}

/// Maximum number of events that one call drains, which takes some milliseconds.
const BATCH_MAX: usize = 1024;

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
    /// Enables policies.
    ///
    /// # Errors
    ///
    /// Fails if this kernel refuses. No policies are then in force.
    pub fn start(setup: Setup) -> Result<Self, SessionError> {
        let Setup {
            mut desired,
            mount,
            mut targets,
            containers,
            backend,
            on_unsupported: choice,
            on_blocked: blocked,
            filter,
            instance,
        } = setup;
        let pins = instance.as_ref().map_or(Ok(None), |(instance, _)| instance.pins())?;
        let is_pinned = pins.is_some();
        warn_of_overriding_programs(&mount, &targets);
        // Declared first, so that it is dropped last: the name of the instance must be locked until everything is detached.
        let mut record = None;
        let options = if choice == OnUnsupported::DoNotProbe { Vec::new() } else { desired.set_options() };
        let judged_by_hooks = desired.clone();
        let mut needs_hook = desired.needs_hook().or_else(|| needs_hook_for(backend, is_pinned, &filter));
        if needs_hook.is_none() {
            desired.judge_by_audit();
        }
        let load = |next: &[(&Desired, usize)]| {
            Object::load(&desired.hooks(), AuditConfig::of(&desired), backend, &filter.processes, pins, next)
        };
        let (mut object, filled, probed) = if is_pinned {
            // The pinned policies may already be in force, so the probes need their own programs.
            (load(&[])?.0, None, probe_separately(&desired, &options, &mount)?)
        } else {
            load_and_probe(&desired, &options, &mount, Some(targets.len()), load)?
        };
        if desired.audit_judges && !object.can_judge() {
            (desired, needs_hook) = (judged_by_hooks, Some(NeedsHook::Blind));
            object.load_more(&desired.hooks())?;
        }
        let unsupported = find_unsupported(&object, &mut desired, &probed);
        refuse(choice, &unsupported)?;
        let mut blocked = BlockedTargets::new(blocked);
        let wanted = targets.len();
        targets = blocked.without(&object, &desired, targets)?;
        if targets.is_empty() && wanted > 0 {
            return Err(blocked.into_error());
        }
        let (mut draining, mut retired, mut report) = (Vec::new(), Vec::new(), Report::default());
        let (instance, files) = instance.unzip();
        if let Some(instance) = instance {
            let previous: Vec<u32> = object.previous().collect();
            let record = record.insert(RecordWriter::new(instance, object.map_ids()?, &previous, object.ring_full()));
            (draining, retired, report) =
                (record.previous(), record.retired(), Report::resume(record.saved_counters()));
            for (number, counters) in object.take_retired()? {
                let Some(at) = draining.iter().position(|generation| generation.number == number) else { continue };
                let generation = draining.remove(at);
                report.count(number, &generation.desired, &counters, false);
                retired.push(generation);
            }
            let next = previous.last().map_or(1, |last| last + 1);
            retired.retain(|generation| next - generation.number < GENERATIONS);
            let active: Vec<u32> = draining.iter().map(|generation| generation.number).collect();
            record.retire(&active, &retired, report.saved_counters(&desired));
            let counters = object.previous_counters()?;
            report.begin(counters.iter().filter_map(|(number, counters)| {
                let generation = draining.iter().find(|generation| generation.number == *number)?;
                Some((&generation.desired, counters.as_slice()))
            }));
        }
        // The new tables use the slot of a retired generation, whose counters are in the record by now.
        let mut staged = object.stage(&desired, filled, &targets)?;
        let (targets, failed) = without_failed(targets, &staged.take_failed());
        let skipped = blocked.skips().chain(failed).collect();
        let audit = object.attach_audit(AuditConfig::of(&desired), backend)?;
        if let (Some(record), Some(files)) = (&mut record, files) {
            record.add(staged.generation(), files, &targets, desired.audit_judges, true)?;
        }
        warn_without_audit(audit, desired.audit);
        if let Some(reason) = object.btf_error() {
            log::warn!("events will lack the fields that come from sockets: {reason}");
        }
        let number = object.enable(staged, desired.audit.calls)?;
        object.remove_other_layouts()?;
        Ok(Self {
            object,
            record,
            skipped,
            current: Generation { number, desired, is_taken_over: false },
            draining,
            retired,
            was_drained: false,
            targets,
            filter,
            backend,
            audit,
            on_unsupported: choice,
            blocked,
            unsupported: unsupported.0,
            needs_hook,
            probed,
            names: Names::new(mount.clone()),
            mount,
            containers,
            executables: Executables::default(),
            report,
            unknown_records: 0,
            dead_calls: 0,
            reported: Lost::default(),
        })
    }

    /// Enables other policies in place of the current ones, or the same policies on other targets. Each event of a socket sees
    /// either the old policies or the new ones.
    ///
    /// # Errors
    ///
    /// Fails if this kernel refuses. The old policies are then still in force.
    pub fn reload(&mut self, mut desired: Desired, targets: Vec<Target>, files: Files) -> Result<(), SessionError> {
        let needs_hook = desired
            .needs_hook()
            .or_else(|| needs_hook_for(self.backend, self.persists(), &self.filter))
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
        let own: HashSet<&str> = self.targets.iter().map(|target| target.cgroup.name.as_str()).collect();
        let new = targets.iter().map(|target| target.cgroup.name.as_str()).filter(|name| !own.contains(name));
        let governed = record.governed_by_others(&new.collect());
        targets.retain(|target| !governed.contains_key(&target.cgroup.name));
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

    /// Records the objects that are skipped now.
    pub fn note_skipped(&mut self, skipped: &SkippedList) {
        if let Some(record) = &mut self.record {
            record.note_skipped(skipped);
        }
    }

    /// Makes the policies in force ignore the calls of one worker process, which inspects sockets; `None` ends the exemption.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn exempt_process(&mut self, process: Option<u32>) -> Result<(), SessionError> {
        Ok(self.object.exempt_process(process)?)
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

    /// Passes pending events to `handle`. Returns whether there may be more: a call handles a limited number, so that the
    /// caller can do other work in between.
    pub fn drain(&mut self, mut handle: impl FnMut(&Event)) -> bool {
        for _ in 0..BATCH_MAX {
            let event = match self.object.next_record() {
                None => {
                    self.was_drained = true;
                    return false;
                }
                Some(Record::File(file)) => {
                    self.executables.learn(&file);
                    continue;
                }
                Some(Record::Event(raw)) => {
                    let context = self.host_context(&raw);
                    self.generation_of(&raw.call).and_then(|generation| {
                        decode(&raw, &generation.desired, context).ok().map(|event| (generation.number, event))
                    })
                }
                Some(Record::Unknown) => None,
            };
            match event {
                Some((generation, event)) if self.filter.admits(&event) => {
                    self.report.fold(generation, &event);
                    handle(&event);
                }
                Some(_) => {}
                None => self.unknown_records += 1,
            }
        }
        true
    }

    /// Returns the generation that an event's setting belongs to, by the number of the setting; the current generation if no
    /// setting decided the call; `None` if the record of the generation is gone.
    fn generation_of(&self, call: &Call) -> Option<&Generation> {
        if call.flags & flags::DECIDED == 0 {
            return Some(&self.current);
        }
        let is_generation_of_call =
            |generation: &&Generation| index::slot_of(generation.number) == index::slot(call.setting);
        let later_first =
            [&self.current].into_iter().chain(self.draining.iter().rev()).chain(self.retired.iter().rev());
        later_first.into_iter().find(is_generation_of_call)
    }

    fn exe(&mut self, raw: &abi::event::Event) -> Result<String, &'static str> {
        if raw.executable.pid == 0 {
            // The kernel did not report the executable, so the current one is read.
            return process::executable(raw.pid).ok_or("the process had exited when the event was read");
        }
        match self.executables.told(&raw.executable) {
            Some(path) => path.ok_or("its path is unknown or too long"),
            None => {
                self.object.request_exe_path(&raw.executable);
                Err("the record of its path was lost")
            }
        }
    }

    fn host_context(&mut self, raw: &abi::event::Event) -> HostContext {
        let cgroup = self.names.name(raw.cgroup).map(|name| name.to_string());
        HostContext {
            // If the kernel did not report the executable, this is the current one.
            exe: self.exe(raw),
            container: cgroup.as_deref().and_then(|cgroup| self.containers.of_cgroup(cgroup)),
            cgroup,
            socket_cgroup: self.names.name(raw.call.socket_cgroup).map(|name| name.to_string()),
            monotonic_epoch_ns: monotonic_epoch_ns(),
            blindness: self.object.btf_error().map(str::to_owned),
        }
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
        let counts = Counts { calls: tallies.filter_map(|(key, tally)| CallLine::new(key, tally)).collect(), lost };
        report.count(current.number, &current.desired, &object.counters()?, true);
        let targets = kernel::names(&targets).into_iter().map(str::to_owned).collect();
        let mut summary = report.summarize(&current.desired, counts, targets, audit.map(facts), unsupported);
        summary.lines.retain(|line| filter.admits_option(line.option.key()));
        Ok(summary)
    }
}

/// The descriptor is readable when there are events.
impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

/// The targets that are skipped because of foreign programs.
struct BlockedTargets {
    choice: OnBlocked,
    /// For each cgroup id, the name of the target and the conflict. Contains only cgroups that were targets at the last check.
    skipped: BTreeMap<u64, (String, ForeignConflict)>,
}

impl BlockedTargets {
    fn new(choice: OnBlocked) -> Self {
        Self { choice, skipped: BTreeMap::new() }
    }

    /// Returns the targets that the programs can be attached to. Logs the others once.
    ///
    /// # Errors
    ///
    /// Fails if a target has a conflict and targets must not be skipped.
    fn without(
        &mut self,
        object: &Object,
        desired: &Desired,
        targets: Vec<Target>,
    ) -> Result<Vec<Target>, SessionError> {
        let mut conflicts = object.conflicts(desired, &targets).into_iter();
        if self.choice == OnBlocked::Refuse {
            let first = conflicts.next();
            return first.map_or(Ok(targets), |(_, conflict)| Err(KernelError::from(conflict).into()));
        }
        let mut skipped = BTreeMap::new();
        for (target, conflict) in conflicts {
            let cgroup = &targets[target].cgroup;
            skipped.entry(cgroup.id).or_insert_with(|| (cgroup.name.clone(), conflict));
        }
        let before = mem::replace(&mut self.skipped, skipped);
        for (_, (_, conflict)) in self.skipped.iter().filter(|(cgroup, _)| !before.contains_key(cgroup)) {
            log::error!("target skipped ({} of {}): {conflict}", self.skipped.len(), targets.len());
        }
        Ok(targets.into_iter().filter(|target| !self.skipped.contains_key(&target.cgroup.id)).collect())
    }

    /// Returns the skipped targets. They are transient, because foreign programs may be detached.
    fn skips(&self) -> impl Iterator<Item = Skip> {
        let skip = |(name, conflict): &(String, ForeignConflict)| {
            Skip::new(Kind::Cgroup, name.clone(), without_help(conflict)).transient_if(true)
        };
        self.skipped.values().map(skip)
    }

    /// Returns the conflict of the first skipped target, as the error for a session without targets.
    fn into_error(mut self) -> SessionError {
        let first = self.skipped.pop_first().map(|(_, (_, conflict))| KernelError::from(conflict));
        first.unwrap_or(KernelError::Incomplete { what: "target" }).into()
    }
}

/// Returns the first line of an error, without its help.
fn without_help(error: impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Splits targets into those that could be attached to and those that failed, which are returned as skipped.
fn without_failed(targets: Vec<Target>, failed: &Failed) -> (Vec<Target>, Vec<Skip>) {
    let (left, others): (Vec<_>, Vec<_>) =
        targets.into_iter().partition(|target| !failed.contains_key(&target.cgroup.id));
    let skip = |target: &Target| {
        let reason = failed.get(&target.cgroup.id).map(without_help).unwrap_or_default();
        Skip::new(Kind::Cgroup, target.cgroup.name.clone(), reason).transient_if(true)
    };
    let skipped = others.iter().map(skip).collect();
    (left, skipped)
}

/// Warns of other sockpolicy processes on ancestors of the targets, whose programs override ours.
fn warn_of_overriding_programs(mount: &Mount, targets: &[Target]) {
    let paths: Vec<_> = targets.iter().map(|target| mount.below(&target.cgroup)).collect();
    match kernel::overriding_programs(mount, &paths) {
        Ok(found) => {
            let mut ancestors: Vec<_> = found.iter().map(|program| format!("/{}", program.cgroup.escaped())).collect();
            ancestors.dedup();
            if !ancestors.is_empty() {
                log::warn!(
                    "another sockpolicy is attached to ancestor {}: it overrides this one where both decide an option",
                    ancestors.join(", ")
                );
            }
        }
        Err(error) => log::debug!("cannot query the programs of ancestors: {error}"),
    }
}

/// The results of option probes, by the name of the option.
type ProbedOptions = BTreeMap<&'static str, Answer>;

/// Probes options with separate programs, so that the programs in force are not disturbed.
fn probe_separately(
    desired: &Desired,
    options: &[&'static SocketOption],
    mount: &Mount,
) -> Result<ProbedOptions, SessionError> {
    if options.is_empty() {
        return Ok(ProbedOptions::default());
    }
    let load = |next: &[(&Desired, usize)]| {
        Object::load(&desired.hooks(), AuditConfig::of(desired), BackendChoice::None, &[], None, next)
    };
    let (_, _, probed) = load_and_probe(desired, options, mount, None, load)?;
    Ok(probed)
}

/// Loads programs and probes these options with them, at the hooks that the policies need. Meanwhile starts the process that
/// the probes need. If the policies will be enabled next, on `targets` targets, also fills and installs their tables.
fn load_and_probe(
    desired: &Desired,
    options: &[&'static SocketOption],
    mount: &Mount,
    targets: Option<usize>,
    load: impl FnOnce(&[(&Desired, usize)]) -> Result<(Object, Vec<FilledTables>), KernelError>,
) -> Result<(Object, Option<FilledTables>, ProbedOptions), SessionError> {
    let wanted = targets.map(|targets| (desired, targets));
    if options.is_empty() {
        let (object, mut filled) = load(wanted.as_slice())?;
        return Ok((object, filled.pop(), ProbedOptions::default()));
    }
    let trial = trial::desired(options)?;
    let next: Vec<_> = [(&trial, 1)].into_iter().chain(wanted).collect();
    let (loaded, sample) = thread::scope(|scope| {
        let starting = scope.spawn(|| Sample::start(mount));
        let loaded = load(&next);
        (loaded, starting.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let (mut object, filled) = loaded?;
    let mut filled = filled.into_iter();
    let (trial_tables, policy_tables) = (filled.next(), filled.next());
    let is_loaded = |hook: &Hook| !object.refused().iter().any(|(refused, _)| refused == hook);
    let hooks: Vec<Hook> = desired.hooks().into_iter().filter(is_loaded).collect();
    let answers = sample.and_then(|sample| trial::try_options(&mut object, trial, trial_tables, &hooks, mount, sample));
    let probed = match answers {
        Ok(answers) => answers.into_iter().map(|(option, answer)| (option.name, answer)).collect(),
        Err(error) => {
            log::warn!("cannot probe which options this kernel supports: {error}");
            ProbedOptions::default()
        }
    };
    Ok((object, policy_tables, probed))
}

/// Returns the settings that this kernel does not support. Removes unsupported hooks from `desired`.
fn find_unsupported(object: &Object, desired: &mut Desired, probed: &ProbedOptions) -> UnsupportedList {
    let refused = object.refused();
    let at_hooks = refused
        .iter()
        .filter(|(hook, _)| !hook.is_optional())
        .filter_map(|(hook, reason)| Unsupported::of_hook(desired, *hook, reason.clone()));
    let mut unsupported: Vec<Unsupported> = at_hooks.collect();
    desired.keep_hooks(|hook| !refused.iter().any(|(other, _)| *other == hook));
    unsupported.extend(desired.set_options().into_iter().filter_map(|option| match probed.get(option.name)? {
        Answer::No(errno) => Some(Unsupported::of_option(desired, option, errno)),
        Answer::Yes | Answer::Unknown(_) => None,
    }));
    unsupported.extend(missing_congestion_controls(desired));
    if !object.helper_support().set_retval {
        unsupported.extend(impossible_errnos(desired));
    }
    unsupported.into_iter().collect()
}

/// Returns why a hook at setsockopt must judge the calls, independent of the policies.
#[must_use]
pub fn needs_hook_for(backend: BackendChoice, persists: bool, filter: &Filter) -> Option<NeedsHook> {
    match backend {
        BackendChoice::None => Some(NeedsHook::NoAudit),
        _ if persists => Some(NeedsHook::Persists),
        _ => (!filter.processes.is_empty()).then_some(NeedsHook::SomeProcesses),
    }
}

fn refuse(choice: OnUnsupported, unsupported: &UnsupportedList) -> Result<(), SessionError> {
    if choice == OnUnsupported::Refuse && unsupported.0.iter().any(|entry| entry.is_enforced) {
        return Err(SessionError::Unsupported(unsupported.clone()));
    }
    Ok(())
}

fn warn_without_audit(audit: Option<Audit>, wanted: model::Audit) {
    if audit.is_none() && wanted.calls != Calls::Conflicts {
        log::warn!("without an audit, only conflicts are reported: `calls` in the policy has no effect");
    }
    if audit.is_none() && wanted.timing {
        log::warn!("without an audit, calls are not timed");
    }
}

fn missing_congestion_controls(desired: &Desired) -> Vec<Unsupported> {
    let wanted = desired.congestion_controls();
    if wanted.is_empty() {
        return Vec::new();
    }
    match tcp::congestion_controls() {
        Ok(available) => {
            let missing = wanted.into_iter().filter(|name| !available.iter().any(|known| known == name));
            missing.map(|name| Unsupported::of_congestion_control(desired, name, &available)).collect()
        }
        Err(error) => {
            // A refusal on a socket will then be reported.
            log::warn!("cannot read which congestion controls this kernel has: {error}");
            Vec::new()
        }
    }
}

fn impossible_errnos(desired: &Desired) -> Vec<Unsupported> {
    let denies = |setting: &Setting| setting.form == form::DENY || setting.on_conflict == on_conflict::DENY;
    let all = desired.settings.iter().zip(&desired.sources);
    all.filter(|(setting, _)| denies(setting) && setting.errno != Errno::EPERM.0)
        .map(|(setting, source)| Unsupported::of_errno(desired, source, &errno::name(setting.errno.into())))
        .collect()
}

/// Returns the offset in nanoseconds between the kernel's time stamps and the time of day. It changes when the clock is set or
/// the machine is suspended.
fn monotonic_epoch_ns() -> i128 {
    let now = |clock| {
        clock_gettime(clock).map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}

/// Returns what the report says of the audit.
fn facts(audit: Audit) -> AuditFacts {
    AuditFacts { backend: audit.backend.name(), not_covered: audit.not_covered() }
}
