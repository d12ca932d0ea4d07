//! The BPF object: loads and attaches the programs, enables policies, and reads records and counters.
//!
//! Policies are enabled in three steps. [`Object::stage`] writes the tables and attaches the programs that the policies need.
//! [`Object::enable`] then writes one number, and only this step takes effect. The previous policies stay loaded for sockets
//! that they still set up, until [`Object::retire`].

use std::{
    collections::BTreeSet,
    iter, mem,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    panic::resume_unwind,
    path::Path,
    slice,
    sync::{Mutex, PoisonError},
    thread,
};

use abi::{
    Config, Counters, GENERATIONS, Losses, calls,
    event::{Event, Executable, ExecutableFile, Tally, TallyKey},
    index,
    layout::Layout,
};
use aya::{
    Btf, Ebpf, VerifierLogLevel, include_bytes_aligned,
    maps::{MapData, RingBuf},
    programs::{Program, ProgramError},
};

use super::{
    Audit, BackendChoice, ForeignConflict, KernelError, Target,
    attached::{Attached, Failed, Point},
    audit::{self, AuditRequest, PerfLinks},
    error::load_reason,
    kernel_info::{HelperSupport, KernelInfo, loader_without_types},
    maps::{self, MappedLosses},
    memlock::Memlock,
    misses::misses,
    observe::MapIds,
    pins::Pins,
    syscall,
    tables::{GenerationMaps, PreviousTables, SlotAssignment, Tables},
};
use crate::{
    compile::{Desired, Hook},
    fault,
    host::{cgroup::is_initial_namespace, process},
    policy::model::{self, Calls},
};

/// The programs, as build.rs compiled them.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockpolicy-bpf"));

/// Minimum time between two events of one process, option and verdict: five events a second. It applies only if policies
/// request conflicts; `governed` and `all` report every call.
const EVENT_INTERVAL_NS: u64 = 200_000_000;

/// Programs in the kernel, and their attachments. All of it ends with this value or with the process, unless it is pinned.
pub struct Object {
    /// Declared before the programs, so that the links are dropped first.
    attached: Attached,
    generation_maps: GenerationMaps,
    /// The tables of the policies in force; `None` if this object has not enabled any.
    tables: Option<Tables>,
    /// Tables of previous generations, by which sockets may still be set up.
    previous: Vec<PreviousTables>,
    /// The hooks that the policies in force need, by cgroup.
    needed: BTreeSet<Point>,
    config: Config,
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    losses: MappedLosses,
    helper_support: HelperSupport,
    /// Why the kernel's BTF cannot be read; `None` if it can.
    btf_error: Option<String>,
    /// Whether the audit can judge calls. It must find the socket of a call and the cgroup of that socket.
    can_judge: bool,
    /// Whether the audit can identify the caller of a call; `Err` gives the reason why not.
    can_follow: Result<(), String>,
    /// Whether hooks begin the audit's records of calls where they can. Not for pinned programs: after the agent has exited,
    /// nobody would handle the exits of these calls.
    can_begin_calls: bool,
    /// The hooks whose program the kernel refused, each with the kernel's reason.
    refused: Vec<(Hook, String)>,
    audit: Option<Audit>,
    perf_links: PerfLinks,
    by_process: bool,
    /// What was attached for staged policies that are not enabled yet.
    added: Vec<Point>,
}

/// Policies whose tables are filled and installed.
pub struct FilledTables(Tables);

/// Policies that are ready to be enabled.
pub struct Staged {
    tables: Tables,
    needed: BTreeSet<Point>,
    target_levels: u64,
    are_nested: bool,
    audit_judges: bool,
    failed: Failed,
}

/// Configuration of the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// What the policies request.
    pub audit: model::Audit,
    /// Whether the audit judges the calls instead of the hooks.
    pub judges: bool,
}

impl AuditConfig {
    #[must_use]
    pub fn of(desired: &Desired) -> Self {
        Self { audit: desired.audit, judges: desired.audit_judges }
    }
}

/// A record of the ring buffer.
pub enum Record {
    Event(Box<Event>),
    /// The path of an executable. It comes before the first event of that executable.
    File(Box<ExecutableFile>),
    /// A record whose length is that of neither kind.
    Unknown,
}

const EVENT_LEN: usize = size_of::<Event>();
const FILE_LEN: usize = size_of::<ExecutableFile>();

impl Record {
    /// Reads the bytes of a record. The length of a record identifies its kind.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        // SAFETY: the length is that of the type, and every bit pattern is valid for both types. Records are aligned to 8
        // bytes, but unaligned reads do not depend on that.
        unsafe {
            match bytes.len() {
                EVENT_LEN => Self::Event(Box::new(bytes.as_ptr().cast::<Event>().read_unaligned())),
                FILE_LEN => Self::File(Box::new(bytes.as_ptr().cast::<ExecutableFile>().read_unaligned())),
                _ => Self::Unknown,
            }
        }
    }
}

impl Staged {
    /// Returns the number that the generation of these policies will have.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.tables.generation
    }

    /// Returns the targets that the programs could not be attached to, each with its error. The policies will not be in force
    /// there.
    pub fn take_failed(&mut self) -> Failed {
        mem::take(&mut self.failed)
    }
}

impl Object {
    /// Loads the programs for these hooks, and the audit programs that the backend of `choice` will most likely use. Attaches
    /// nothing. Leaves out programs that this kernel refuses: see [`Self::refused`].
    ///
    /// If `processes` is not empty, the audit records only the calls of these processes on sockets of a target.
    ///
    /// With `pins`, policies stay in force after this value is dropped. Policies that are already pinned and in force are taken
    /// over: the new programs enforce them until other policies replace them.
    ///
    /// Meanwhile fills and installs the tables of the policies in `next`, each with its number of targets. `next` is in the
    /// order in which the policies will be enabled.
    ///
    /// # Errors
    ///
    /// Fails if this process lacks capabilities, if a map or a required program cannot be created, or if the pins cannot be
    /// read.
    pub fn load(
        hooks: &[Hook],
        audit: AuditConfig,
        choice: BackendChoice,
        processes: &[u32],
        mut pins: Option<Pins>,
        next: &[(&Desired, usize)],
    ) -> Result<(Self, Vec<FilledTables>), KernelError> {
        super::check_privileges()?;
        let _memlock = Memlock::raise();
        let info = KernelInfo::gather()?;
        // Nobody reads the audit's records of pinned policies after this process has exited.
        let is_pinned = pins.is_some();
        let can_begin_calls = info.can_begin_calls() && !is_pinned;
        let AuditConfig { audit, judges } = audit;
        let mut loader = info.loader(audit.timing);
        loader.verifier_log_level(VerifierLogLevel::DEBUG);
        maps::set_sizes(&mut loader, audit.calls, processes, &info.members);
        let mut hooks = hooks.to_vec();
        if let Some(pins) = &mut pins {
            if !maps::is_in_force(pins)? {
                // Pins that an agent left when it was killed while it started.
                pins.remove_current_layout()?;
            }
            pins.make_dirs()?;
            maps::pin_maps(&mut loader, pins)?;
            hooks.extend(pins.hooks()?.into_iter().filter(|hook| !hooks.contains(hook)).collect::<Vec<_>>());
        }
        let mut ebpf = loader.load(OBJECT)?;
        if pins.is_some() {
            fault::point("maps-made");
        }
        maps::fill(&mut ebpf, processes, &info.members)?;
        let config = maps::config(&ebpf)?;
        let mut generation_maps = GenerationMaps::open(&ebpf)?;
        let next = next.iter().zip(config.generation + 1..);
        let tables = next.map(|((desired, targets), generation)| Tables::make(generation, desired, *targets));
        let tables: Vec<_> = tables.collect::<Result<_, _>>()?;
        let (refused, installed) = thread::scope(|scope| {
            let installing = scope.spawn(|| generation_maps.install(&tables));
            let refused = load_programs(
                &mut ebpf,
                &hooks,
                &audit::likely(choice, AuditRequest::of(audit, can_begin_calls && !judges)),
            );
            (refused, installing.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        installed?;
        let refused = refused?;
        let mut attached = Attached::new(pins);
        attached.last_id = config.last_target;
        attached.take_over(&ebpf)?;
        // All generations that have a slot. The generations before the oldest are retired, but may not have been counted: an
        // agent that follows agents which retired nothing retires a generation in [`Self::enable`], and may be killed before it
        // counts.
        let generations = if config.in_force == 0 { 0..0 } else { 1..config.generation + 1 };
        let generations = generations.rev().take(GENERATIONS as usize).rev();
        let is_retired = |number: &u32| *number < config.oldest;
        let previous = generations.filter_map(|number| match PreviousTables::open(&ebpf, number) {
            Err(_) if is_retired(&number) => None,
            previous => Some(previous),
        });
        let previous = previous.collect::<Result<_, _>>()?;
        let ring = ebpf.take_map(maps::EVENTS).ok_or(KernelError::Incomplete { what: maps::EVENTS })?;
        let ring = RingBuf::try_from(ring).map_err(|source| KernelError::Map { map: maps::EVENTS, source })?;
        let losses = MappedLosses::new(&ebpf)?;
        let object = Self {
            attached,
            generation_maps,
            tables: None,
            previous,
            needed: BTreeSet::new(),
            config,
            ebpf,
            ring,
            losses,
            helper_support: info.helper_support,
            btf_error: info.btf_error.clone(),
            can_follow: info.can_follow(),
            can_begin_calls,
            can_judge: info.can_judge() && !is_pinned,
            refused,
            audit: None,
            perf_links: PerfLinks::default(),
            by_process: !processes.is_empty(),
            added: Vec::new(),
        };
        Ok((object, tables.into_iter().map(FilledTables).collect()))
    }

    /// Loads the programs for additional hooks.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Self::load`].
    pub fn load_more(&mut self, hooks: &[Hook]) -> Result<(), KernelError> {
        let is_tried = |hook: &Hook| {
            self.refused.iter().any(|(refused, _)| refused == hook)
                || self.ebpf.program(hook.program()).is_some_and(|program| program.fd().is_ok())
        };
        let new: Vec<Hook> = hooks.iter().copied().filter(|hook| !is_tried(hook)).collect();
        let _memlock = Memlock::raise();
        self.refused.extend(load_programs(&mut self.ebpf, &new, &[])?);
        Ok(())
    }

    /// Returns the previous generations that this object has not retired, the latest last.
    pub fn previous(&self) -> impl Iterator<Item = u32> {
        self.previous.iter().map(|previous| previous.generation)
    }

    /// Returns the previous generations that an earlier agent had retired but not counted before it exited, with their
    /// counters. Removes these generations from [`Self::previous`].
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn take_retired(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        let oldest = self.config.oldest;
        let retired = self.previous.extract_if(.., |previous| previous.generation < oldest);
        retired.map(|previous| Ok((previous.generation, previous.counters()?))).collect()
    }

    /// Returns the counters of the previous generations that are left.
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn previous_counters(&self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        self.previous.iter().map(|previous| Ok((previous.generation, previous.counters()?))).collect()
    }

    /// Returns the ids of the maps by which other processes can observe the policies in force.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not return the ids.
    pub fn map_ids(&self) -> Result<MapIds, KernelError> {
        MapIds::new(&self.ebpf)
    }

    /// Removes what a build with another layout has pinned for this instance. At this point the policies of this object are in
    /// force too.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be removed.
    pub fn remove_other_layouts(&self) -> Result<(), KernelError> {
        self.attached.pins().map_or(Ok(()), Pins::remove_other_layouts)
    }

    /// Returns why events lack the fields that come from the kernel's structures; `None` if they have them.
    #[must_use]
    pub fn btf_error(&self) -> Option<&str> {
        self.btf_error.as_deref()
    }

    /// Returns whether the audit can judge calls while this process lives.
    #[must_use]
    pub fn can_judge(&self) -> bool {
        self.can_judge && self.can_follow.is_ok()
    }

    /// Returns what programs at cgroup/setsockopt can do on this kernel.
    #[must_use]
    pub fn helper_support(&self) -> HelperSupport {
        self.helper_support
    }

    /// Returns the hooks whose program this kernel refused, each with the kernel's reason.
    #[must_use]
    pub fn refused(&self) -> &[(Hook, String)] {
        &self.refused
    }

    /// Keeps policies in force on one cgroup while `during` runs. Returns the result of `during` and the counters of the
    /// policies. Drops the records of that time.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn in_force_on<T>(
        &mut self,
        desired: &Desired,
        filled: Option<FilledTables>,
        target: Target,
        during: impl FnOnce() -> T,
    ) -> Result<(T, Vec<Counters>), KernelError> {
        let staged = self.stage(desired, filled, &[target])?;
        self.enable(staged, Calls::Conflicts)?;
        let result = during();
        self.disable()?;
        let counters = self.counters()?;
        self.attached.detach_all();
        self.tables = None;
        while self.next_record().is_some() {}
        Ok((result, counters))
    }

    /// Returns the foreign programs that prevent these policies from being attached now, each with the index of the target.
    #[must_use]
    pub fn conflicts(&self, desired: &Desired, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
        self.attached.conflicts(attachments(desired, targets), targets)
    }

    /// Makes policies ready to be enabled: fills their tables, unless [`Self::load`] has done so, and attaches the programs
    /// that they need in addition to those that are attached.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. Everything is then as before.
    pub fn stage(
        &mut self,
        desired: &Desired,
        filled: Option<FilledTables>,
        targets: &[Target],
    ) -> Result<Staged, KernelError> {
        let _memlock = Memlock::raise();
        let counts_calls = desired.audit.timing || desired.audit.calls != Calls::Conflicts;
        if counts_calls && !maps::reserve_tallies(&mut self.ebpf, &desired.options)? {
            log::warn!("rules name too many options by number: the report does not count the calls on each of them");
        }
        let assigned = self.attached.assign_slots(targets);
        let mut tables = match filled {
            Some(FilledTables(tables)) => tables,
            None => {
                let slots = assigned.iter().map(|assigned| assigned.target.place as usize + 1).max().unwrap_or(0);
                let tables = Tables::make(self.config.generation + 1, desired, slots)?;
                self.generation_maps.install(slice::from_ref(&tables))?;
                tables
            }
        };
        assigned.iter().try_for_each(|assigned| tables.assign(assigned))?;
        self.attached.fault_point("tables-installed");
        let (added, mut failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(&mut tables, &assigned, &failed)?;
        self.attached.drop_unattached(&failed);
        let all_failed = targets.iter().all(|target| failed.contains_key(&target.cgroup.id));
        if all_failed && let Some((_, first)) = failed.pop_first() {
            self.attached.detach(&added);
            return Err(first);
        }
        self.added = added;
        Ok(Staged {
            audit_judges: desired.audit_judges,
            tables,
            needed: needed(desired, targets, &failed),
            target_levels: target_levels(targets),
            are_nested: are_nested(targets),
            failed,
        })
    }

    /// Returns whether there is a free slot for one more generation.
    #[must_use]
    pub fn has_room(&self) -> bool {
        // A socket that finds its generation among those that are kept may read the tables of this generation a moment later.
        self.config.in_force == 0 || self.config.generation - self.config.oldest < GENERATIONS - 2
    }

    /// Detaches what [`Self::stage`] attached.
    pub fn abandon(&mut self, _: Staged) {
        self.detach_added();
    }

    fn detach_added(&mut self) {
        let added = mem::take(&mut self.added);
        self.attached.detach(&added);
    }

    /// Enables staged policies in place of those in force, by one write. Returns the number of their generation.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn enable(&mut self, staged: Staged, calls: Calls) -> Result<u32, KernelError> {
        let Staged { tables, needed, target_levels, are_nested, audit_judges, failed: _ } = staged;
        // This bit is not cleared: sockets of a former target may live long.
        let are_nested = self.config.are_nested | u32::from(are_nested);
        let mut numbers = self.config.numbers;
        numbers[index::slot_of(tables.generation) as usize] = tables.option_filter;
        // Written before the generation number, by which programs choose the filter.
        maps::write_config(&mut self.ebpf, Config { numbers, are_nested, ..self.config })?;
        let config = Config {
            in_force: 1,
            audit_judges: audit_judges.into(),
            calls: match calls {
                Calls::Conflicts => calls::CONFLICTS,
                Calls::Governed => calls::GOVERNED,
                Calls::All => calls::ALL,
            },
            target_levels,
            event_interval_ns: if calls == Calls::Conflicts { EVENT_INTERVAL_NS } else { 0 },
            by_process: u32::from(self.by_process),
            generation: tables.generation,
            oldest: if self.config.in_force == 0 {
                tables.generation
            } else {
                // Successive agents may each exit before they retire a generation.
                self.config.oldest.max((tables.generation + 2).saturating_sub(GENERATIONS))
            },
            last_target: self.attached.last_id,
            audit: self.config.audit,
            are_nested,
            numbers,
            // No exempt process: the worker of an earlier agent may have been killed.
            ..Config::default()
        };
        maps::write_config(&mut self.ebpf, config)?;
        self.attached.fault_point("enabled");
        self.config = config;
        self.previous.extend(self.tables.replace(tables).map(Tables::into_previous));
        self.needed = needed;
        self.added.clear();
        Ok(config.generation)
    }

    /// Moves the policies in force to these targets, as cgroups come and go. Removed cgroups stay targets until
    /// [`Self::detach_removed`]. Returns the targets that the programs could not be attached to; `None`, without any change, if
    /// the tables have no room for the new targets.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. The new cgroups are then no targets.
    pub fn retarget(&mut self, desired: &Desired, targets: &[Target]) -> Result<Option<Failed>, KernelError> {
        let _memlock = Memlock::raise();
        let Some(tables) = &mut self.tables else { return Ok(None) };
        let assigned = self.attached.assign_slots(targets);
        if !assigned.iter().all(|assigned| tables.has_slot(assigned.target.place)) {
            self.attached.detach_except(&self.needed);
            return Ok(None);
        }
        for assigned in &assigned {
            tables.assign(assigned)?;
        }
        let config = Config {
            target_levels: self.config.target_levels | target_levels(targets),
            last_target: self.attached.last_id,
            are_nested: self.config.are_nested | u32::from(are_nested(targets)),
            ..self.config
        };
        maps::write_config(&mut self.ebpf, config)?;
        self.config = config;
        let (_, failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(tables, &assigned, &failed)?;
        self.attached.drop_unattached(&failed);
        let was_needed = mem::replace(&mut self.needed, needed(desired, targets, &failed));
        for (cgroup, target) in self.attached.note_removed(targets) {
            let points: Vec<Point> = was_needed.iter().copied().filter(|(needed, _)| *needed == cgroup).collect();
            // Other cgroups belong to previous policies.
            if !points.is_empty() {
                tables.clear(target, cgroup)?;
                self.attached.detach(&points);
            }
        }
        Ok(Some(failed))
    }

    /// Returns whether a target's cgroup has been removed.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        self.attached.has_removed()
    }

    /// Detaches from targets that have been removed and whose last sockets are closed. The kernel does not notify of that, so
    /// the caller has to poll.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn detach_removed(&mut self) -> Result<(), KernelError> {
        let removed = self.attached.detach_removed();
        let Some(tables) = &mut self.tables else { return Ok(()) };
        removed.into_iter().try_for_each(|(cgroup, target)| tables.clear(target, cgroup))
    }

    /// Detaches what only previous policies needed. Sockets that these still set up continue with the policies in force.
    /// Returns the counters of each previous generation.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written or the counters cannot be read.
    pub fn retire(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        let config = Config { oldest: self.config.generation, ..self.config };
        maps::write_config(&mut self.ebpf, config)?;
        self.attached.fault_point("retired");
        self.config = config;
        self.attached.detach_except(&self.needed);
        self.attached.fault_point("detached");
        let counted = self.previous_counters()?;
        self.previous.clear();
        Ok(counted)
    }

    /// Attaches the audit to the kernel's setsockopt and, if requested, getsockopt. Replaces the audit that is attached.
    ///
    /// # Errors
    ///
    /// Fails if the requested backend cannot be attached, or if no backend can.
    pub fn attach_audit(
        &mut self,
        requested: AuditConfig,
        choice: BackendChoice,
    ) -> Result<Option<Audit>, KernelError> {
        let AuditConfig { audit: wanted, judges } = requested;
        if choice != BackendChoice::None {
            self.can_follow.clone().map_err(|reasons| KernelError::NoBackend { reasons })?;
        }
        self.write_audit(abi::audit::NONE)?;
        // Detached first, so that no call is seen by both audits.
        mem::take(&mut self.perf_links).detach();
        if let Some(audit) = self.audit.take() {
            audit.unload(&mut self.ebpf);
        }
        let _memlock = Memlock::raise();
        if let Some((audit, perf_links)) =
            audit::attach(&mut self.ebpf, choice, AuditRequest::of(wanted, self.can_begin_calls && !judges))?
        {
            (self.audit, self.perf_links) = (Some(audit), perf_links);
            self.write_audit(match (audit.sees_only_exits(), wanted.reads) {
                (false, _) => abi::audit::CALLS,
                (true, false) => abi::audit::ENDS,
                (true, true) => abi::audit::ENDS | abi::audit::READ_ENDS,
            })?;
        }
        Ok(self.audit)
    }

    /// Writes what the audit sees of calls, for the hooks. To be called before the audit is detached and after it is attached.
    fn write_audit(&mut self, audit: u32) -> Result<(), KernelError> {
        let config = Config { audit, ..self.config };
        if config != self.config {
            maps::write_config(&mut self.ebpf, config)?;
            self.config = config;
        }
        Ok(())
    }

    /// Makes the programs ignore the calls of one worker process; `None` ends the exemption.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn exempt_process(&mut self, process: Option<u32>) -> Result<(), KernelError> {
        let process = process.filter(|_| process::is_initial_namespace());
        let started = process.and_then(|process| Some((process, process::start(process)?)));
        let (agent, agent_start) = started.unwrap_or_default();
        let config = Config { agent, agent_start, ..self.config };
        maps::write_config(&mut self.ebpf, config)?;
        self.config = config;
        Ok(())
    }

    /// Makes all programs inert, by one write.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn disable(&mut self) -> Result<(), KernelError> {
        let config = Config { in_force: 0, ..self.config };
        maps::write_config(&mut self.ebpf, config)?;
        self.config = config;
        Ok(())
    }

    /// Returns the next record; `None` if the ring buffer is empty.
    pub fn next_record(&mut self) -> Option<Record> {
        self.ring.next().map(|record| Record::read(&record))
    }

    /// Returns the counters of each setting of the policies in force, in the order of [`Desired::settings`].
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        self.tables.as_ref().map_or(Ok(Vec::new()), Tables::counters)
    }

    /// Returns what was lost since this agent started.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.losses.get()
    }

    /// Returns the number of events that found the ring buffer full since the buffer was made, also under earlier agents.
    #[must_use]
    pub fn ring_full(&self) -> u64 {
        self.losses.all().ring_full
    }

    /// Returns how often the kernel skipped a program of the audit because another one was running on that CPU.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.audit.map_or(0, |audit| misses(&self.ebpf, audit.programs()))
    }

    /// Returns the number of calls that would be reported, but whose exit has not been seen.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn open_calls(&self) -> Result<u64, KernelError> {
        maps::open_calls(&self.ebpf, self.config.calls)
    }

    /// Drops the records of calls whose threads have exited, so that their exits were not seen. Returns how many of these calls
    /// would have been reported.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn drop_dead_calls(&mut self) -> Result<u64, KernelError> {
        maps::drop_dead_calls(&mut self.ebpf, self.config.calls)
    }

    /// Makes the programs send the path of an executable again before its next event.
    pub fn request_exe_path(&mut self, executable: &Executable) {
        maps::request_exe_path(&mut self.ebpf, executable);
    }

    /// Returns the calls that the audit saw, by option.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn tallies(&self) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
        maps::tallies(&self.ebpf)
    }
}

/// Removes the pins if no policies are in force.
impl Drop for Object {
    fn drop(&mut self) {
        self.detach_added();
        if let Some(pins) = self.attached.pins().filter(|_| self.config.in_force == 0)
            && let Err(error) = pins.remove_current_layout()
        {
            log::warn!("{error}");
        }
        let perf_links = mem::take(&mut self.perf_links);
        if self.config.in_force == 0 {
            perf_links.detach_in_background();
        } else {
            perf_links.detach();
        }
        if let Some(audit) = self.audit {
            audit.unload(&mut self.ebpf);
        }
    }
}

/// The descriptor is readable when there are records.
impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl AsRawFd for Object {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Returns the hooks that policies need on these targets, without those of failed targets.
fn needed(desired: &Desired, targets: &[Target], failed: &Failed) -> BTreeSet<Point> {
    let points = attachments(desired, targets).into_iter().map(|(hook, target)| (targets[target].cgroup.id, hook));
    points.filter(|(cgroup, _)| !failed.contains_key(cgroup)).collect()
}

/// Clears the slots of failed targets.
fn clear_failed(tables: &mut Tables, assigned: &[SlotAssignment], failed: &Failed) -> Result<(), KernelError> {
    let assigned = assigned.iter().filter(|assigned| failed.contains_key(&assigned.cgroup));
    assigned.into_iter().try_for_each(|assigned| tables.clear(assigned.target, assigned.cgroup))
}

/// Returns the hooks to attach to, each with the index of a target.
fn attachments(desired: &Desired, targets: &[Target]) -> Vec<(Hook, usize)> {
    let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
    desired.attachments(&scopes).collect()
}

/// Returns whether one of the targets is a descendant of another.
fn are_nested(targets: &[Target]) -> bool {
    let mut names: Vec<&Path> = targets.iter().map(|target| Path::new(&target.cgroup.name)).collect();
    // Sorted, so that the first descendant of a cgroup directly follows it.
    names.sort_unstable();
    names.windows(2).any(|pair| pair[1].starts_with(pair[0]))
}

/// Returns a bit for each level of the cgroup tree at which there is a target. In a cgroup namespace the levels are not those
/// that the kernel counts, so all bits are set.
fn target_levels(targets: &[Target]) -> u64 {
    if !is_initial_namespace() {
        return u64::MAX;
    }
    targets.iter().fold(0, |levels, target| levels | 1 << target.cgroup.level)
}

/// Loads programs, as many in parallel as there are CPUs: verification takes most of the start-up time. Returns the hooks whose
/// program the kernel refused. Errors of `others` show when these are attached.
fn load_programs(ebpf: &mut Ebpf, hooks: &[Hook], others: &[&str]) -> Result<Vec<(Hook, String)>, KernelError> {
    // The longest programs first, so that no CPU still verifies one at the end: those of the audit, then those of the hooks at
    // calls.
    let of_hooks = hooks.iter().rev().map(|hook| (hook.program(), Some(*hook)));
    let order: Vec<_> = others.iter().map(|name| (*name, None)).chain(of_hooks).collect();
    let position = |name| order.iter().position(|(wanted, _)| *wanted == name);
    let mut programs: Vec<_> =
        ebpf.programs_mut().filter_map(|(name, program)| Some((position(name)?, program))).collect();
    programs.sort_by_key(|(position, _)| *position);
    let programs: Vec<_> = programs.into_iter().map(|(position, program)| (order[position].1, program)).collect();
    if programs.iter().filter(|(hook, _)| hook.is_some()).count() != hooks.len() {
        return Err(KernelError::Incomplete { what: "program for one of the hooks" });
    }
    let queue = Mutex::new(programs.into_iter());
    let load = || {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        iter::from_fn(next).filter_map(|(hook, program)| Some((load_program(program), hook?))).collect::<Vec<_>>()
    };
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut results = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(load)).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        results.flatten().collect::<Vec<_>>()
    });
    // Sorted, so that the same error is returned each time.
    results.sort_by_key(|(_, hook)| *hook);
    let mut refused = Vec::new();
    for (result, hook) in results {
        let Err(error) = result else { continue };
        let reason = load_reason(&error);
        if !is_refusal(&error) && !hook.is_optional() {
            return Err(KernelError::Load { hook, reason });
        }
        refused.push((hook, reason));
    }
    Ok(refused)
}

/// Returns whether the verifier refused a program, as opposed to missing capabilities or memory.
fn is_refusal(error: &ProgramError) -> bool {
    let ProgramError::LoadError { io_error, .. } = error else { return false };
    !matches!(io_error.raw_os_error(), None | Some(libc::EPERM | libc::ENOMEM | libc::EAGAIN))
}

/// Loads a program unless it is loaded: some programs are attached to several points.
pub(super) fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match load_program(program) {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        other => other,
    }
}

pub(super) fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::KProbe(program) => program.load(),
        Program::TracePoint(program) => program.load(),
        Program::LsmCgroup(program) => program.load(LSM_HOOK, &Btf::from_sys_fs()?),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The LSM hook that lsm_cgroup programs attach to.
const LSM_HOOK: &str = "socket_post_create";

/// The size of a loaded program, as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramSize {
    pub name: String,
    /// Instructions that the verifier processed, some of them several times; `None` before 5.16, which does not report them.
    pub verified: Option<u32>,
}

/// Returns the sizes of the loaded programs of an object, by name.
pub(super) fn sizes(ebpf: &Ebpf) -> Vec<ProgramSize> {
    let mut sizes: Vec<_> = ebpf
        .programs()
        .filter_map(|(name, program)| {
            let info = syscall::info(program.fd().ok()?).ok()?;
            let verified = Some(info.verified_insns).filter(|count| *count != 0);
            Some(ProgramSize { name: name.to_owned(), verified })
        })
        .collect();
    sizes.sort_by(|one, other| one.name.cmp(&other.name));
    sizes
}

/// The object without a policy, for probing, with all features of its programs enabled.
pub(super) struct ProbeObject {
    pub(super) ebpf: Ebpf,
    /// Whether the audit can identify the caller of a call; `Err` gives the reason why not.
    pub(super) can_follow: Result<(), String>,
}

pub(super) fn load_for_probe() -> Result<ProbeObject, KernelError> {
    let _memlock = Memlock::raise();
    let info = KernelInfo::gather()?;
    let ebpf = info.loader(true).load(OBJECT)?;
    Ok(ProbeObject { ebpf, can_follow: info.can_follow() })
}

/// Loads the object for programs that make no decisions and record no calls, with maps of these sizes.
pub(super) fn sized(entries: &[(&'static str, u32)], layout: &Layout) -> Result<Ebpf, KernelError> {
    let _memlock = Memlock::raise();
    let mut loader = loader_without_types();
    loader.override_global("LAYOUT", layout, true);
    loader.verifier_log_level(VerifierLogLevel::DEBUG);
    for (map, entries) in entries {
        loader.map_max_entries(map, *entries);
    }
    Ok(loader.load(OBJECT)?)
}
