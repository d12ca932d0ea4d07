//! Policies in force: from valid policies to events and a summary.
//!
//! Holds the programs and what is needed to put their records into words. It has no loop and does not print:
//! whoever owns it waits on its descriptor and drains it.

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
    compile::{CompileError, Desired, Hook, NeedsHook, compile},
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
    policy::model::{self, Calls, Errno, Mode, Policy},
    report::{CallLine, Counts, Loss, Lost, Report, Summary},
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
    #[error(
        "this kernel cannot do all that the policies say:{0}\n  help: leave that out, or give --allow-unsupported to have the rest \
         in force without it"
    )]
    Unsupported(UnsupportedList),
}

/// Events to drain at a time: some milliseconds' worth.
const BATCH_MAX: usize = 1024;

/// Policies in force on their targets, until this is dropped.
pub struct Session {
    object: Object,
    /// What others are told of it.
    record: Option<RecordWriter>,
    /// Targets that could not be attached to.
    skipped: Vec<Skip>,
    current: Generation,
    /// Those that sockets may still be set up by, the latest last.
    draining: Vec<Generation>,
    /// Those that were so until now, the latest last: what they caused may still be to be told.
    retired: Vec<Generation>,
    /// Whether all has been told since the last of these was retired.
    has_reported: bool,
    targets: Vec<Target>,
    filter: Filter,
    backend: BackendChoice,
    audit: Option<Audit>,
    on_unsupported: OnUnsupported,
    blocked: BlockedTargets,
    unsupported: Vec<Unsupported>,
    needs_hook: Option<NeedsHook>,
    /// What came of trying to set options.
    probed: ProbedOptions,
    mount: Mount,
    names: Names,
    containers: containers::Known,
    executables: Executables,
    report: Report,
    unknown_records: u64,
    /// Calls whose records were dropped because their threads are gone.
    dead_calls: u64,
    /// What had been lost when it was last told.
    reported: Lost,
}

/// Policies that are, or were, in force together.
pub(crate) struct Generation {
    pub(crate) number: u32,
    pub(crate) desired: Desired,
    /// From another agent, or none.
    pub(crate) is_taken_over: bool,
}

/// What to put in force, on whom, and whom to look at.
pub struct Setup {
    pub desired: Desired,
    pub mount: Mount,
    pub targets: Vec<Target>,
    /// What events say of containers.
    pub containers: containers::Known,
    pub backend: BackendChoice,
    /// What to do about what this kernel cannot do.
    pub on_unsupported: OnUnsupported,
    /// What to do about targets that programs of others keep from being attached to.
    pub on_blocked: OnBlocked,
    /// Events to tell of. Its processes are also the only ones whose calls the audit follows, if there are any.
    pub filter: Filter,
    /// As which others find it, if they do, and what the policies' files say.
    pub instance: Option<(Instance, Files)>,
}

/// What to do about targets where attaching is forbidden by a program of others, or would put it out of effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBlocked {
    /// Refuse the policies on all targets.
    Refuse,
    /// Skip these targets, and log each once.
    Skip,
}

/// What to do about what policies ask for and this kernel cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnsupported {
    /// Find out, and refuse policies that are enforced.
    Refuse,
    /// Find out, and go on without it.
    Allow,
    /// Go on without it, as far as it shows by itself: nothing is to be set.
    DoNotProbe,
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
    let mut desired = compile(&policies, &stacks)?;
    desired.audit.timing |= timing;
    leave_out_absent_hooks(&mut desired);
    Ok(desired)
}

/// Leaves out the hooks that policies can do without and that this host does not have.
pub fn leave_out_absent_hooks(desired: &mut Desired) {
    if !kernel::takes_lsm_programs() {
        desired.keep_hooks(|hook| hook != Hook::PostCreate);
    }
}

impl Session {
    /// Puts a policy in force.
    ///
    /// # Errors
    ///
    /// Where this kernel cannot do it; then nothing is in force.
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
        // Its name stays its own until all that it has attached is gone: what is declared first goes last.
        let mut word = None;
        let options = if choice == OnUnsupported::DoNotProbe { Vec::new() } else { desired.set_options() };
        let by_hooks = desired.clone();
        let mut needs_hook = desired.needs_hook().or_else(|| needs_hook_for(backend, is_pinned, &filter));
        if needs_hook.is_none() {
            desired.judge_by_audit();
        }
        let load = |next: &[(&Desired, usize)]| {
            Object::load(&desired.hooks(), AuditConfig::of(&desired), backend, &filter.processes, pins, next)
        };
        let (mut object, tabled, tried) = if is_pinned {
            // What is pinned may be in force already.
            (load(&[])?.0, None, probe_separately(&desired, &options, &mount)?)
        } else {
            load_and_probe(&desired, &options, &mount, Some(targets.len()), load)?
        };
        if desired.audit_judges && !object.can_judge() {
            (desired, needs_hook) = (by_hooks, Some(NeedsHook::Blind));
            object.load_more(&desired.hooks())?;
        }
        let unsupported = find_unsupported(&object, &mut desired, &tried);
        refuse(choice, &unsupported)?;
        let mut blocked = BlockedTargets::new(blocked);
        let wanted = targets.len();
        targets = blocked.without(&object, &desired, targets)?;
        if targets.is_empty() && wanted > 0 {
            return Err(blocked.into_error());
        }
        let (mut before, mut retired, mut report) = (Vec::new(), Vec::new(), Report::default());
        let (instance, files) = instance.unzip();
        if let Some(instance) = instance {
            let former: Vec<u32> = object.previous().collect();
            let word = word.insert(RecordWriter::of(instance, object.map_ids()?, &former, object.ring_full()));
            (before, retired, report) = (word.previous(), word.retired(), Report::resume(word.saved_counters()));
            for (number, counters) in object.take_retired()? {
                let Some(at) = before.iter().position(|generation| generation.number == number) else { continue };
                let generation = before.remove(at);
                report.count(number, &generation.desired, &counters, false);
                retired.push(generation);
            }
            let next = former.last().map_or(1, |last| last + 1);
            retired.retain(|generation| next - generation.number < GENERATIONS);
            let there: Vec<u32> = before.iter().map(|generation| generation.number).collect();
            word.retire(&there, &retired, report.saved_counters(&desired));
            let counters = object.previous_counters()?;
            report.begin(counters.iter().filter_map(|(number, counters)| {
                let generation = before.iter().find(|generation| generation.number == *number)?;
                Some((&generation.desired, counters.as_slice()))
            }));
        }
        // It takes the place of one that has been retired, whose counts are in the record by now.
        let mut staged = object.stage(&desired, tabled, &targets)?;
        let (targets, failed) = without_failed(targets, &staged.take_failed());
        let skipped = blocked.skips().chain(failed).collect();
        let audit = object.attach_audit(AuditConfig::of(&desired), backend)?;
        if let (Some(word), Some(files)) = (&mut word, files) {
            word.add(staged.generation(), files, &targets, desired.audit_judges, true)?;
        }
        warn_without_audit(audit, desired.audit);
        if let Some(reason) = object.btf_error() {
            log::warn!("events will lack what sockets say of themselves: {reason}");
        }
        let number = object.enable(staged, desired.audit.calls)?;
        object.remove_other_layouts()?;
        Ok(Self {
            object,
            record: word,
            skipped,
            current: Generation { number, desired, is_taken_over: false },
            draining: before,
            retired,
            has_reported: false,
            targets,
            filter,
            backend,
            audit,
            on_unsupported: choice,
            blocked,
            unsupported: unsupported.0,
            needs_hook,
            probed: tried,
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

    /// Puts other policies in force in place of these, or these on other targets. Each event of a socket sees the ones or the
    /// others.
    ///
    /// # Errors
    ///
    /// Where this kernel cannot do it; then what was in force still is.
    pub fn reload(&mut self, mut desired: Desired, targets: Vec<Target>, files: Files) -> Result<(), SessionError> {
        let needs_hook = desired
            .needs_hook()
            .or_else(|| needs_hook_for(self.backend, self.stays(), &self.filter))
            .or_else(|| self.blind());
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
        let (before, wish) = (AuditConfig::of(&self.current.desired), AuditConfig::of(&desired));
        if desired.audit.timing && !before.audit.timing {
            log::warn!("calls are not timed until sockpolicy starts anew");
        }
        let mut staged = self.object.stage(&desired, None, &targets)?;
        let (targets, failed) = without_failed(targets, &staged.take_failed());
        if let Some(word) = &mut self.record
            && let Err(error) = word.add(staged.generation(), files, &targets, desired.audit_judges, false)
        {
            self.object.abandon(staged);
            return Err(error.into());
        }
        // Last, for it does not wait for the policies.
        if wish != before {
            match self.object.attach_audit(wish, self.backend) {
                Ok(audit) => self.audit = audit,
                Err(error) => {
                    if let Some(word) = &mut self.record {
                        word.withdraw(staged.generation());
                    }
                    self.object.abandon(staged);
                    // As it was. What could be attached then can be now.
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

    fn blind(&self) -> Option<NeedsHook> {
        (!self.object.can_judge()).then_some(NeedsHook::Blind)
    }

    /// Returns why a hook at setsockopt judges the calls; `None`: the audit does.
    #[must_use]
    pub fn needs_hook(&self) -> Option<NeedsHook> {
        self.needs_hook
    }

    /// Has the policies hold on these targets, as cgroups come and go.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses; then they hold on those that were there and still are.
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
        if let Some(word) = &mut self.record {
            word.retarget(&targets)?;
        }
        if let Some(failed) = self.object.retarget(&self.current.desired, &targets)? {
            let (targets, failed_targets) = without_failed(targets, &failed);
            self.targets = targets;
            self.skipped = self.blocked.skips().chain(failed_targets).collect();
            if let Some(word) = self.record.as_mut().filter(|_| !failed.is_empty()) {
                word.retarget(&self.targets)?;
            }
            return Ok(());
        }
        let desired = self.current.desired.clone();
        let files = self.record.as_ref().map(RecordWriter::files).unwrap_or_default();
        self.reload(desired, targets, files)
    }

    /// Has events name these containers from now on.
    pub fn set_containers(&mut self, containers: containers::Known) {
        self.containers = containers;
    }

    /// Removes from `targets` those that are new and belong to another instance, whose records are read for that. Returns
    /// them as skipped.
    pub fn leave_to_others(&self, targets: &mut Vec<Target>) -> Vec<Skip> {
        let Some(word) = &self.record else { return Vec::new() };
        let own: HashSet<&str> = self.targets.iter().map(|target| target.cgroup.name.as_str()).collect();
        let new = targets.iter().map(|target| target.cgroup.name.as_str()).filter(|name| !own.contains(name));
        let governed = word.governed_by_others(&new.collect());
        targets.retain(|target| !governed.contains_key(&target.cgroup.name));
        let skip = |(name, instance): (String, String)| {
            let reason = format!("it is a target of instance `{}` already", instance.escaped());
            Skip::new(Kind::Cgroup, name, reason).transient_if(true)
        };
        governed.into_iter().map(skip).collect()
    }

    /// Targets that could not be attached to when these were last put in force.
    #[must_use]
    pub fn skipped(&self) -> &[Skip] {
        &self.skipped
    }

    /// Records the objects that are skipped now.
    pub fn note_skipped(&mut self, skipped: &SkippedList) {
        if let Some(word) = &mut self.record {
            word.note_skipped(skipped);
        }
    }

    /// Has the policies in force take what a process calls that looks at sockets for this one for no application's doing; or no
    /// process.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn exempt_process(&mut self, process: Option<u32>) -> Result<(), SessionError> {
        Ok(self.object.exempt_process(process)?)
    }

    /// Whether there are targets that have been removed, and that [`Self::detach_removed`] is to be called for.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        self.object.has_removed()
    }

    /// Lets go of targets that have been removed and whose last sockets are closed.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
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

    /// Whether there are policies before those in force by which sockets may still be set up.
    #[must_use]
    pub fn has_draining(&self) -> bool {
        self.object.previous().next().is_some()
    }

    /// Has sockets that are still being set up by policies of before go on by those in force.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn retire(&mut self) -> Result<(), SessionError> {
        for (number, counters) in self.object.retire()? {
            if let Some(generation) = self.draining.iter().find(|generation| generation.number == number) {
                self.report.count(number, &generation.desired, &counters, !generation.is_taken_over);
            }
        }
        if mem::take(&mut self.has_reported) {
            self.retired.clear();
        }
        self.retired.append(&mut self.draining);
        // Others have the places of those before.
        self.retired.retain(|generation| self.current.number - generation.number < GENERATIONS);
        if let Some(word) = &mut self.record {
            word.retire(&[self.current.number], &self.retired, self.report.saved_counters(&self.current.desired));
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

    /// What the policies ask for and this kernel cannot do.
    #[must_use]
    pub fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
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
                None => {
                    self.has_reported = true;
                    return false;
                }
                Some(Record::File(file)) => {
                    self.executables.learn(&file);
                    continue;
                }
                Some(Record::Event(raw)) => {
                    let surroundings = self.host_context(&raw);
                    self.generation_of(&raw.call).and_then(|generation| {
                        decode(&raw, &generation.desired, surroundings).ok().map(|event| (generation.number, event))
                    })
                }
                Some(Record::Unknown) => None,
            };
            match event {
                Some((generation, event)) if self.filter.admits(&event) => {
                    self.report.fold(generation, &event);
                    tell(&event);
                }
                Some(_) => {}
                None => self.unknown_records += 1,
            }
        }
        true
    }

    /// The policies that an event's setting is of, by its number among those of all generations; those in force where no
    /// setting decided it. `None`: they were another agent's, and its record of them is gone.
    fn generation_of(&self, call: &Call) -> Option<&Generation> {
        if call.flags & flags::DECIDED == 0 {
            return Some(&self.current);
        }
        let is_its = |generation: &&Generation| index::slot_of(generation.number) == index::slot(call.setting);
        let later_first =
            [&self.current].into_iter().chain(self.draining.iter().rev()).chain(self.retired.iter().rev());
        later_first.into_iter().find(is_its)
    }

    fn exe(&mut self, raw: &abi::event::Event) -> Result<String, &'static str> {
        if raw.executable.pid == 0 {
            // The kernel does not say what it was. This is what it is by now.
            return process::executable(raw.pid).ok_or("the process was gone when the event was read");
        }
        match self.executables.told(&raw.executable) {
            Some(told) => told.ok_or("its path is not known, or too long"),
            None => {
                self.object.request_exe_path(&raw.executable);
                Err("what the kernel told of it was lost")
            }
        }
    }

    fn host_context(&mut self, raw: &abi::event::Event) -> HostContext {
        let cgroup = self.names.name(raw.cgroup).map(|name| name.to_string());
        HostContext {
            // Where the kernel does not say what it was, this is what it is by now.
            exe: self.exe(raw),
            container: cgroup.as_deref().and_then(|cgroup| self.containers.of_cgroup(cgroup)),
            cgroup,
            socket_cgroup: self.names.name(raw.call.socket_cgroup).map(|name| name.to_string()),
            monotonic_epoch_ns: monotonic_epoch_ns(),
            blindness: self.object.btf_error().map(str::to_owned),
        }
    }

    /// Takes the policies out of force, so that what there is to drain comes to an end, unless they are to stay.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn end(&mut self) -> Result<(), SessionError> {
        if self.stays() {
            return Ok(());
        }
        Ok(self.object.disable()?)
    }

    /// The name under which what is in force stays so when this is gone, if it does.
    #[must_use]
    pub fn persistent_name(&self) -> Option<&str> {
        self.record.as_ref().and_then(RecordWriter::persistent_name)
    }

    fn stays(&self) -> bool {
        self.persistent_name().is_some()
    }

    /// What has been lost since this was last asked.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn new_losses(&mut self) -> Result<Vec<Loss>, SessionError> {
        let lost = self.lost();
        if lost.losses.calls_full > self.reported.losses.calls_full {
            self.dead_calls += self.object.drop_dead_calls()?;
        }
        let new = lost.since(&self.reported);
        self.reported = lost;
        self.count_unread();
        Ok(new)
    }

    /// What finds no room from now on is another agent's matter, or nobody's.
    fn count_unread(&mut self) {
        if let Some(word) = &mut self.record {
            word.count(self.object.ring_full());
        }
    }

    fn lost(&self) -> Lost {
        let mut losses = self.object.losses();
        losses.exit_missed += self.dead_calls;
        Lost { losses, prog_missed: self.object.misses(), unknown_records: self.unknown_records, ..Lost::default() }
    }

    /// Sums up, and removes the programs.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn finish(mut self) -> Result<Summary, SessionError> {
        self.retire()?;
        self.count_unread();
        let tallies = self.object.tallies()?;
        let mut lost = self.lost();
        // Whatever has not returned by now will not be seen to.
        lost.losses.exit_missed += self.object.open_calls()?;
        let Self { object, current, targets, filter, audit, unsupported, mut report, .. } = self;
        let tallies = tallies.into_iter().filter(|(key, _)| filter.admits_option(key.key));
        let counts = Counts { calls: tallies.filter_map(|(key, tally)| CallLine::new(key, tally)).collect(), lost };
        report.count(current.number, &current.desired, &object.counters()?, true);
        let targets = kernel::names(&targets).into_iter().map(str::to_owned).collect();
        let mut summary = report.summarize(&current.desired, counts, targets, audit, unsupported);
        summary.lines.retain(|line| filter.admits_option(line.option.key()));
        Ok(summary)
    }
}

/// Readable when there are events.
impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

/// The targets that are skipped because of programs of others.
struct BlockedTargets {
    choice: OnBlocked,
    /// The name of each and why it is skipped, by the id of its cgroup: only those that were targets when they were last looked at.
    skipped: BTreeMap<u64, (String, ForeignConflict)>,
}

impl BlockedTargets {
    fn new(choice: OnBlocked) -> Self {
        Self { choice, skipped: BTreeMap::new() }
    }

    /// Returns the targets that can be attached to. Logs those that were not skipped before.
    ///
    /// # Errors
    ///
    /// Where one cannot be attached to and none is to be skipped.
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
            log::error!("target skipped, as {} of {} are: {conflict}", self.skipped.len(), targets.len());
        }
        Ok(targets.into_iter().filter(|target| !self.skipped.contains_key(&target.cgroup.id)).collect())
    }

    /// Returns them as skipped. Programs of others may go.
    fn skips(&self) -> impl Iterator<Item = Skip> {
        let skip = |(name, conflict): &(String, ForeignConflict)| {
            Skip::new(Kind::Cgroup, name.clone(), without_help(conflict)).transient_if(true)
        };
        self.skipped.values().map(skip)
    }

    /// Returns why none is left.
    fn into_error(mut self) -> SessionError {
        let first = self.skipped.pop_first().map(|(_, (_, conflict))| KernelError::from(conflict));
        first.unwrap_or(KernelError::Incomplete { what: "target" }).into()
    }
}

/// Returns the first line of an error, which has no help.
fn without_help(error: impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Removes targets that could not be attached to. Returns the others, and these as skipped.
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

/// Says where another sockpolicy will have the last word.
fn warn_of_overriding_programs(mount: &Mount, targets: &[Target]) {
    let paths: Vec<_> = targets.iter().map(|target| mount.below(&target.cgroup)).collect();
    match kernel::overriding_programs(mount, &paths) {
        Ok(found) => {
            let mut places: Vec<_> = found.iter().map(|neighbour| format!("/{}", neighbour.cgroup.escaped())).collect();
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

/// By the option's name.
type ProbedOptions = BTreeMap<&'static str, Answer>;

/// The same by programs of their own: those in force are not to be disturbed.
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
    let (_, _, tried) = load_and_probe(desired, options, mount, None, load)?;
    Ok(tried)
}

/// Loads programs and tries these options with them, at the hooks that the policies need. The process that this takes is started
/// meanwhile, and where the policies are to be in force next on so many `targets`, their tables written.
fn load_and_probe(
    desired: &Desired,
    options: &[&'static SocketOption],
    mount: &Mount,
    targets: Option<usize>,
    load: impl FnOnce(&[(&Desired, usize)]) -> Result<(Object, Vec<FilledTables>), KernelError>,
) -> Result<(Object, Option<FilledTables>, ProbedOptions), SessionError> {
    let wanted = targets.map(|targets| (desired, targets));
    if options.is_empty() {
        let (object, mut tabled) = load(wanted.as_slice())?;
        return Ok((object, tabled.pop(), ProbedOptions::default()));
    }
    let trial = trial::desired(options)?;
    let next: Vec<_> = [(&trial, 1)].into_iter().chain(wanted).collect();
    let (loaded, sample) = thread::scope(|scope| {
        let starting = scope.spawn(|| Sample::start(mount));
        let loaded = load(&next);
        (loaded, starting.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let (mut object, tabled) = loaded?;
    let mut tabled = tabled.into_iter();
    let (of_trial, of_policies) = (tabled.next(), tabled.next());
    let has = |hook: &Hook| !object.refused().iter().any(|(refused, _)| refused == hook);
    let hooks: Vec<Hook> = desired.hooks().into_iter().filter(has).collect();
    let answers = sample.and_then(|sample| trial::try_options(&mut object, trial, of_trial, &hooks, mount, sample));
    let tried = match answers {
        Ok(answers) => answers.into_iter().map(|(option, answer)| (option.name, answer)).collect(),
        Err(error) => {
            log::warn!("cannot try whether this kernel sets the options: {error}");
            ProbedOptions::default()
        }
    };
    Ok((object, of_policies, tried))
}

/// What the policies ask for and this kernel cannot do. Of `desired`, the hooks are left that it has.
fn find_unsupported(object: &Object, desired: &mut Desired, tried: &ProbedOptions) -> UnsupportedList {
    let refused = object.refused();
    let at_hooks = refused
        .iter()
        .filter(|(hook, _)| !hook.is_optional())
        .filter_map(|(hook, reason)| Unsupported::of_hook(desired, *hook, reason.clone()));
    let mut unsupported: Vec<Unsupported> = at_hooks.collect();
    desired.keep_hooks(|hook| !refused.iter().any(|(other, _)| *other == hook));
    unsupported.extend(desired.set_options().into_iter().filter_map(|option| match tried.get(option.name)? {
        Answer::No(errno) => Some(Unsupported::of_option(desired, option, errno)),
        Answer::Yes | Answer::Unknown(_) => None,
    }));
    unsupported.extend(missing_congestion_controls(desired));
    if !object.helper_support().set_retval {
        unsupported.extend(impossible_errnos(desired));
    }
    unsupported.into_iter().collect()
}

/// Returns why a hook at setsockopt has to judge the calls, whatever the policies are.
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
        log::warn!("without an audit only conflicts are seen: the policy's `calls` has no effect");
    }
    if audit.is_none() && wanted.timing {
        log::warn!("without an audit calls are not timed");
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
            // Then a refusal on a socket will say it.
            log::warn!("cannot tell which congestion controls this kernel has: {error}");
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

/// What to add to the kernel's time stamps. Not the same for long: clocks are set, and machines suspended.
fn monotonic_epoch_ns() -> i128 {
    let now = |clock| {
        clock_gettime(clock).map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}
