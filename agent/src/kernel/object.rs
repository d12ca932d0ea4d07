//! The BPF object: loading, attaching, putting in force, reading.
//!
//! Policies come in force in three steps, of which only the last one shows: their tables are written ([`Object::stage`]), the
//! programs attached that they need, and then one number says that they hold ([`Object::enable`]). Those before them stay for
//! the sockets that are being set up by them, until [`Object::retire`].

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

/// The programs, as build.rs made them.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockpolicy-bpf"));

/// At the least this long between two events of one process, option and verdict: five a second. Who asks for more than
/// conflicts gets each of them.
const EVENT_INTERVAL_NS: u64 = 200_000_000;

/// Programs in the kernel, and what they are attached to. Ends with this value, or with the process.
pub struct Object {
    /// Before the programs, so that they go first.
    attached: Attached,
    slots: GenerationMaps,
    /// The tables of the policies in force, if this object has put them so.
    tables: Option<Tables>,
    /// Those that sockets may still be set up by.
    former: Vec<PreviousTables>,
    /// The hooks that the policies in force need.
    needed: BTreeSet<Point>,
    config: Config,
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    losses: MappedLosses,
    abilities: HelperSupport,
    /// Why the kernel's structures cannot be looked at, if they cannot.
    blindness: Option<String>,
    /// Whether the audit can judge calls: it must find the socket of a call, and that socket's cgroup.
    can_judge: bool,
    /// Whether the audit can tell whose calls it sees, and why not.
    can_follow: Result<(), String>,
    /// Whether hooks are to begin the audit's records of calls where they can do so. Not where they stay when this is gone, and
    /// with it whoever sees the end.
    can_begin_calls: bool,
    /// The hooks for which the kernel did not take our program, and what it said.
    refused: Vec<(Hook, String)>,
    audit: Option<Audit>,
    events: PerfLinks,
    by_process: bool,
    /// What was attached for policies that are not in force yet.
    added: Vec<Point>,
}

/// Policies whose tables are there.
pub struct FilledTables(Tables);

/// Policies that are ready to be put in force.
pub struct Staged {
    tables: Tables,
    needed: BTreeSet<Point>,
    target_levels: u64,
    are_nested: bool,
    audit_judges: bool,
    failed: Failed,
}

/// What the audit is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// What the policies ask for.
    pub audit: model::Audit,
    /// Whether it judges the calls, in place of the hooks.
    pub judges: bool,
}

impl AuditConfig {
    #[must_use]
    pub fn of(desired: &Desired) -> Self {
        Self { audit: desired.audit, judges: desired.audit_judges }
    }
}

/// What the programs tell.
pub enum Record {
    Event(Box<Event>),
    /// Comes before the first event of the program.
    File(Box<ExecutableFile>),
    /// Of neither size.
    Unknown,
}

const EVENT_LEN: usize = size_of::<Event>();
const FILE_LEN: usize = size_of::<ExecutableFile>();

impl Record {
    /// Reads the bytes of a record, which its length tells from records of another kind.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        // SAFETY: of the right size, and every bit pattern is valid for both; records are aligned to 8 bytes, but nothing
        // depends on it.
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
    /// What their generation will be numbered.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.tables.generation
    }

    /// The targets that could not be attached to, and why. The policies do not hold there.
    pub fn take_failed(&mut self) -> Failed {
        mem::take(&mut self.failed)
    }
}

impl Object {
    /// Loads the programs for these hooks, and those that an audit by the backend of `choice` will most likely take. Nothing is
    /// attached yet. Programs that this kernel cannot run are left out: see [`Self::refused`].
    ///
    /// Where there are `processes`, the audit follows the calls of these only, as far as they are in a target.
    ///
    /// With `pins`, what is put in force stays when this value is gone. What is pinned there and in force already is taken over:
    /// it goes on by these programs, until other policies take its place.
    ///
    /// The tables of what is to come in force next are written meanwhile, for so many targets, in the order in which they
    /// will be.
    ///
    /// # Errors
    ///
    /// Where this process lacks capabilities, or the kernel has no memory for all this.
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
        let knowledge = KernelInfo::gather()?;
        // Where policies stay when this process is gone, nobody reads what an audit says.
        let is_pinned = pins.is_some();
        let can_begin_calls = knowledge.can_begin_calls() && !is_pinned;
        let AuditConfig { audit, judges } = audit;
        let mut loader = knowledge.loader(audit.timing);
        loader.verifier_log_level(VerifierLogLevel::DEBUG);
        maps::size(&mut loader, audit.calls, processes, &knowledge.members);
        let mut hooks = hooks.to_vec();
        if let Some(pins) = &mut pins {
            if !maps::is_in_force(pins)? {
                // What is left of a start that was cut off.
                pins.remove_ours()?;
            }
            pins.make_folders()?;
            maps::pin_maps(&mut loader, pins)?;
            hooks.extend(pins.hooks()?.into_iter().filter(|hook| !hooks.contains(hook)).collect::<Vec<_>>());
        }
        let mut ebpf = loader.load(OBJECT)?;
        if pins.is_some() {
            fault::point("maps-made");
        }
        maps::fill(&mut ebpf, processes, &knowledge.members)?;
        let config = maps::config(&ebpf)?;
        let mut slots = GenerationMaps::of(&ebpf)?;
        let next = next.iter().zip(config.generation + 1..);
        let tables = next.map(|((desired, targets), generation)| Tables::make(generation, desired, *targets));
        let tables: Vec<_> = tables.collect::<Result<_, _>>()?;
        let (refused, put) = thread::scope(|scope| {
            let putting = scope.spawn(|| slots.put(&tables));
            let refused = load_programs(
                &mut ebpf,
                &hooks,
                &audit::likely(choice, AuditRequest::of(audit, can_begin_calls && !judges)),
            );
            (refused, putting.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        put?;
        let refused = refused?;
        let mut attached = Attached::new(pins);
        attached.last_id = config.last_target;
        attached.take_over(&ebpf)?;
        // All that have a place. Those before the oldest are retired, and may not have been counted: an agent that comes after
        // others which retired none retires one as it begins ([`Self::enable`]), and may be killed before it counts.
        let generations = if config.in_force == 0 { 0..0 } else { 1..config.generation + 1 };
        let generations = generations.rev().take(GENERATIONS as usize).rev();
        let is_retired = |number: &u32| *number < config.oldest;
        let former = generations.filter_map(|number| match PreviousTables::taken_over(&ebpf, number) {
            Err(_) if is_retired(&number) => None,
            former => Some(former),
        });
        let former = former.collect::<Result<_, _>>()?;
        let ring = ebpf.take_map(maps::EVENTS).ok_or(KernelError::Incomplete { what: maps::EVENTS })?;
        let ring = RingBuf::try_from(ring).map_err(|source| KernelError::Map { map: maps::EVENTS, source })?;
        let losses = MappedLosses::of(&ebpf)?;
        let object = Self {
            attached,
            slots,
            tables: None,
            former,
            needed: BTreeSet::new(),
            config,
            ebpf,
            ring,
            losses,
            abilities: knowledge.abilities,
            blindness: knowledge.blindness.clone(),
            can_follow: knowledge.can_follow(),
            can_begin_calls,
            can_judge: knowledge.can_judge() && !is_pinned,
            refused,
            audit: None,
            events: PerfLinks::default(),
            by_process: !processes.is_empty(),
            added: Vec::new(),
        };
        Ok((object, tables.into_iter().map(FilledTables).collect()))
    }

    /// Loads the programs for further hooks.
    ///
    /// # Errors
    ///
    /// As of [`Self::load`].
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

    /// The latest generations that were in force before this object's, as far as it has not retired them.
    pub fn previous(&self) -> impl Iterator<Item = u32> {
        self.former.iter().map(|former| former.generation)
    }

    /// Those of them that had been retired when this was loaded, by an agent that was gone before it could say so; with what they
    /// have counted.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn take_retired(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        let oldest = self.config.oldest;
        let retired = self.former.extract_if(.., |former| former.generation < oldest);
        retired.map(|former| Ok((former.generation, former.counters()?))).collect()
    }

    /// What those that are left have counted by now.
    ///
    /// # Errors
    ///
    /// Where the counters cannot be read.
    pub fn previous_counters(&self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        self.former.iter().map(|former| Ok((former.generation, former.counters()?))).collect()
    }

    /// By which others can look at what comes of it.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell.
    pub fn map_ids(&self) -> Result<MapIds, KernelError> {
        MapIds::of(&self.ebpf)
    }

    /// Removes what another build with another layout has pinned: what it had in force is by now beside what this one has.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed.
    pub fn replace_others(&self) -> Result<(), KernelError> {
        self.attached.pins().map_or(Ok(()), Pins::remove_others)
    }

    /// Why events cannot tell what the kernel's structures say of a socket, if they cannot.
    #[must_use]
    pub fn btf_error(&self) -> Option<&str> {
        self.blindness.as_deref()
    }

    /// Returns whether the audit can judge calls, for as long as this process lives.
    #[must_use]
    pub fn can_judge(&self) -> bool {
        self.can_judge && self.can_follow.is_ok()
    }

    /// What cgroup/setsockopt can do here, as was found when it was loaded.
    #[must_use]
    pub fn helper_support(&self) -> HelperSupport {
        self.abilities
    }

    /// The hooks for which this kernel did not take our program, and what it said.
    #[must_use]
    pub fn refused(&self) -> &[(Hook, String)] {
        &self.refused
    }

    /// Has policies in force on a cgroup for as long as `during` runs, and gives their counters. What is reported meanwhile is
    /// dropped.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn in_force_on<T>(
        &mut self,
        desired: &Desired,
        tabled: Option<FilledTables>,
        target: Target,
        during: impl FnOnce() -> T,
    ) -> Result<(T, Vec<Counters>), KernelError> {
        let staged = self.stage(desired, tabled, &[target])?;
        self.enable(staged, Calls::Conflicts)?;
        let result = during();
        self.disable()?;
        let counters = self.counters()?;
        self.attached.detach_all();
        self.tables = None;
        while self.next_record().is_some() {}
        Ok((result, counters))
    }

    /// Returns why these policies cannot be put in force on targets as things are, each with the number of the target: because of
    /// programs of others.
    #[must_use]
    pub fn conflicts(&self, desired: &Desired, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
        self.attached.conflicts(attachments(desired, targets), targets)
    }

    /// Makes policies ready to be put in force: writes their tables, unless [`Self::load`] has, and attaches what they need
    /// beside what is attached.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses; then everything is as before.
    pub fn stage(
        &mut self,
        desired: &Desired,
        tabled: Option<FilledTables>,
        targets: &[Target],
    ) -> Result<Staged, KernelError> {
        let _memlock = Memlock::raise();
        let counts_calls = desired.audit.timing || desired.audit.calls != Calls::Conflicts;
        if counts_calls && !maps::reserve_tallies(&mut self.ebpf, &desired.options)? {
            log::warn!("rules give too many options by number: the report does not count calls on each of them");
        }
        let placed = self.attached.assign_slots(targets);
        let mut tables = match tabled {
            Some(FilledTables(tables)) => tables,
            None => {
                let places = placed.iter().map(|placed| placed.target.place as usize + 1).max().unwrap_or(0);
                let tables = Tables::make(self.config.generation + 1, desired, places)?;
                self.slots.put(slice::from_ref(&tables))?;
                tables
            }
        };
        placed.iter().try_for_each(|placed| tables.place(placed))?;
        self.attached.done("tables-installed");
        let (added, mut failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(&mut tables, &placed, &failed)?;
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

    /// Whether there is room for the tables of one more generation beside those that are kept.
    #[must_use]
    pub fn has_room(&self) -> bool {
        // Sockets that find their generation's number among those that are kept may look at its tables a moment later.
        self.config.in_force == 0 || self.config.generation - self.config.oldest < GENERATIONS - 2
    }

    /// Undoes what [`Self::stage`] did.
    pub fn abandon(&mut self, _: Staged) {
        self.detach_added();
    }

    fn detach_added(&mut self) {
        let added = mem::take(&mut self.added);
        self.attached.detach(&added);
    }

    /// Puts policies in force, at once and in place of others. Gives the number of their generation.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn enable(&mut self, staged: Staged, calls: Calls) -> Result<u32, KernelError> {
        let Staged { tables, needed, target_levels, are_nested, audit_judges, failed: _ } = staged;
        // It stays so: a target that is none any more may have sockets for long.
        let are_nested = self.config.are_nested | u32::from(are_nested);
        let mut numbers = self.config.numbers;
        numbers[index::slot_of(tables.generation) as usize] = tables.numbers;
        // Before the number by which programs look there.
        maps::configure(&mut self.ebpf, Config { numbers, are_nested, ..self.config })?;
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
                // Agents that come one after another may each be gone before they retire any.
                self.config.oldest.max((tables.generation + 2).saturating_sub(GENERATIONS))
            },
            last_target: self.attached.last_id,
            audit: self.config.audit,
            are_nested,
            numbers,
            // Nobody: whoever looked may have been killed.
            ..Config::default()
        };
        maps::configure(&mut self.ebpf, config)?;
        self.attached.done("enabled");
        self.config = config;
        self.former.extend(self.tables.replace(tables).map(Tables::into_previous));
        self.needed = needed;
        self.added.clear();
        Ok(config.generation)
    }

    /// Has the policies in force hold on these targets, as cgroups come and go. Those that are not there any more stay targets
    /// until [`Self::detach_removed`]. Gives those that could not be attached to; `None` if there was no room for the new
    /// ones: then nothing is done.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses; then new ones are no targets.
    pub fn retarget(&mut self, desired: &Desired, targets: &[Target]) -> Result<Option<Failed>, KernelError> {
        let _memlock = Memlock::raise();
        let Some(tables) = &mut self.tables else { return Ok(None) };
        let placed = self.attached.assign_slots(targets);
        if !placed.iter().all(|placed| tables.has_room(placed.target.place)) {
            self.attached.detach_except(&self.needed);
            return Ok(None);
        }
        for placed in &placed {
            tables.place(placed)?;
        }
        let config = Config {
            target_levels: self.config.target_levels | target_levels(targets),
            last_target: self.attached.last_id,
            are_nested: self.config.are_nested | u32::from(are_nested(targets)),
            ..self.config
        };
        maps::configure(&mut self.ebpf, config)?;
        self.config = config;
        let (_, failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(tables, &placed, &failed)?;
        self.attached.drop_unattached(&failed);
        let was_needed = mem::replace(&mut self.needed, needed(desired, targets, &failed));
        for (cgroup, target) in self.attached.note_removed(targets) {
            let points: Vec<Point> = was_needed.iter().copied().filter(|(needed, _)| *needed == cgroup).collect();
            // Others are of policies before these.
            if !points.is_empty() {
                tables.clear(target, cgroup)?;
                self.attached.detach(&points);
            }
        }
        Ok(Some(failed))
    }

    /// Whether there are targets that have been removed.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        self.attached.has_removed()
    }

    /// Lets go of targets that have been removed and whose last sockets are closed. The kernel does not tell when that is.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn detach_removed(&mut self) -> Result<(), KernelError> {
        let gone = self.attached.detach_removed();
        let Some(tables) = &mut self.tables else { return Ok(()) };
        gone.into_iter().try_for_each(|(cgroup, target)| tables.clear(target, cgroup))
    }

    /// Lets go of what only policies before those in force needed: sockets that are still being set up by them go on with
    /// these. Gives the counters of each of them.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written, or the counters not be read.
    pub fn retire(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        let config = Config { oldest: self.config.generation, ..self.config };
        maps::configure(&mut self.ebpf, config)?;
        self.attached.done("retired");
        self.config = config;
        self.attached.detach_except(&self.needed);
        self.attached.done("let-go");
        let counted = self.previous_counters()?;
        self.former.clear();
        Ok(counted)
    }

    /// Attaches the audit to the kernel's setsockopt and, if that is wanted, getsockopt; in place of one that is there.
    ///
    /// # Errors
    ///
    /// Where the backend that was asked for cannot be had, or none can.
    pub fn attach_audit(&mut self, wish: AuditConfig, choice: BackendChoice) -> Result<Option<Audit>, KernelError> {
        let AuditConfig { audit: wanted, judges } = wish;
        if choice != BackendChoice::None {
            self.can_follow.clone().map_err(|reasons| KernelError::NoBackend { reasons })?;
        }
        self.write_audit(abi::audit::NONE)?;
        // No call is to be seen by this one and by the next.
        mem::take(&mut self.events).take();
        if let Some(audit) = self.audit.take() {
            audit.unload(&mut self.ebpf);
        }
        let _memlock = Memlock::raise();
        if let Some((audit, events)) =
            audit::attach(&mut self.ebpf, choice, AuditRequest::of(wanted, self.can_begin_calls && !judges))?
        {
            (self.audit, self.events) = (Some(audit), events);
            self.write_audit(match (audit.sees_only_exits(), wanted.reads) {
                (false, _) => abi::audit::CALLS,
                (true, false) => abi::audit::ENDS,
                (true, true) => abi::audit::ENDS | abi::audit::READ_ENDS,
            })?;
        }
        Ok(self.audit)
    }

    /// Tells hooks what the audit sees of calls: before it does not any more, and when it does.
    fn write_audit(&mut self, audit: u32) -> Result<(), KernelError> {
        let config = Config { audit, ..self.config };
        if config != self.config {
            maps::configure(&mut self.ebpf, config)?;
            self.config = config;
        }
        Ok(())
    }

    /// Has the programs take what a process of ours calls, while it looks at sockets, for no application's call; or no process.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn exempt_process(&mut self, process: Option<u32>) -> Result<(), KernelError> {
        let process = process.filter(|_| process::is_initial_namespace());
        let started = process.and_then(|process| Some((process, process::start(process)?)));
        let (agent, agent_start) = started.unwrap_or_default();
        let config = Config { agent, agent_start, ..self.config };
        maps::configure(&mut self.ebpf, config)?;
        self.config = config;
        Ok(())
    }

    /// Makes everything inert again, at once.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn disable(&mut self) -> Result<(), KernelError> {
        let config = Config { in_force: 0, ..self.config };
        maps::configure(&mut self.ebpf, config)?;
        self.config = config;
        Ok(())
    }

    /// The next record, if one is there.
    pub fn next_record(&mut self) -> Option<Record> {
        self.ring.next().map(|record| Record::read(&record))
    }

    /// The counters of each setting of the policies in force, in the order of [`Desired::settings`].
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        self.tables.as_ref().map_or(Ok(Vec::new()), Tables::counters)
    }

    /// What was lost.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.losses.get()
    }

    /// Events that have found the ring buffer full since it was made, by whichever agent.
    #[must_use]
    pub fn ring_full(&self) -> u64 {
        self.losses.all().ring_full
    }

    /// Times that the kernel did not run a program of the audit, because one was running on that CPU.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.audit.map_or(0, |audit| misses(&self.ebpf, audit.programs()))
    }

    /// Calls of which there would be something to tell, but for their end, which has not come.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn open_calls(&self) -> Result<u64, KernelError> {
        maps::open_calls(&self.ebpf, self.config.calls)
    }

    /// Drops the records of calls whose threads are gone, and whose ends were therefore not seen; gives of how many there would
    /// have been something to tell.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn drop_dead_calls(&mut self) -> Result<u64, KernelError> {
        maps::drop_dead_calls(&mut self.ebpf, self.config.calls)
    }

    /// Has the file of an executable told again before its next event.
    pub fn request_exe_path(&mut self, executable: &Executable) {
        maps::request_exe_path(&mut self.ebpf, executable);
    }

    /// The calls that the audit saw, by option.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn tallies(&self) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
        maps::tallies(&self.ebpf)
    }
}

/// What is not in force leaves no pins.
impl Drop for Object {
    fn drop(&mut self) {
        self.detach_added();
        if let Some(pins) = self.attached.pins().filter(|_| self.config.in_force == 0)
            && let Err(error) = pins.remove_ours()
        {
            log::warn!("{error}");
        }
        let events = mem::take(&mut self.events);
        if self.config.in_force == 0 {
            events.leave();
        } else {
            events.take();
        }
        if let Some(audit) = self.audit {
            audit.unload(&mut self.ebpf);
        }
    }
}

/// Readable when there are events.
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

/// The hooks that policies need on these targets, but for those that failed.
fn needed(desired: &Desired, targets: &[Target], failed: &Failed) -> BTreeSet<Point> {
    let points = attachments(desired, targets).into_iter().map(|(hook, target)| (targets[target].cgroup.id, hook));
    points.filter(|(cgroup, _)| !failed.contains_key(cgroup)).collect()
}

/// Has nothing hold on targets that failed.
fn clear_failed(tables: &mut Tables, placed: &[SlotAssignment], failed: &Failed) -> Result<(), KernelError> {
    let placed = placed.iter().filter(|placed| failed.contains_key(&placed.cgroup));
    placed.into_iter().try_for_each(|placed| tables.clear(placed.target, placed.cgroup))
}

/// The programs to attach, each to one of the targets.
fn attachments(desired: &Desired, targets: &[Target]) -> Vec<(Hook, usize)> {
    let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
    desired.attachments(&scopes).collect()
}

/// Whether one of the targets stands within another.
fn are_nested(targets: &[Target]) -> bool {
    let mut names: Vec<&Path> = targets.iter().map(|target| Path::new(&target.cgroup.name)).collect();
    // Then what is within a cgroup comes right after it.
    names.sort_unstable();
    names.windows(2).any(|pair| pair[1].starts_with(pair[0]))
}

/// The levels at which targets are. In a cgroup namespace these are not what the kernel counts, and
/// any may be one.
fn target_levels(targets: &[Target]) -> u64 {
    if !is_initial_namespace() {
        return u64::MAX;
    }
    targets.iter().fold(0, |levels, target| levels | 1 << target.cgroup.level)
}

/// Has the kernel check the programs, as many at a time as there are CPUs: that is what takes the time. Gives those that it did
/// not take. What comes of `others` shows when they are attached.
fn load_programs(ebpf: &mut Ebpf, hooks: &[Hook], others: &[&str]) -> Result<Vec<(Hook, String)>, KernelError> {
    // The longest first, so that no CPU is left with one of them at the end: those of the audit, then those at calls.
    let of_hooks = hooks.iter().rev().map(|hook| (hook.program(), Some(*hook)));
    let order: Vec<_> = others.iter().map(|name| (*name, None)).chain(of_hooks).collect();
    let place = |name| order.iter().position(|(wanted, _)| *wanted == name);
    let mut programs: Vec<_> =
        ebpf.programs_mut().filter_map(|(name, program)| Some((place(name)?, program))).collect();
    programs.sort_by_key(|(place, _)| *place);
    let programs: Vec<_> = programs.into_iter().map(|(place, program)| (order[place].1, program)).collect();
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
    // The same error each time, whichever was first.
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

/// Whether the kernel has looked at a program and does not take it: not for want of rights or memory, that is.
fn is_refusal(error: &ProgramError) -> bool {
    let ProgramError::LoadError { io_error, .. } = error else { return false };
    !matches!(io_error.raw_os_error(), None | Some(libc::EPERM | libc::ENOMEM | libc::EAGAIN))
}

/// Loads a program unless it is there already: some are attached to several points.
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

/// Where lsm_cgroup programs are attached.
const LSM_HOOK: &str = "socket_post_create";

/// A program that the kernel has taken, as it tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramSize {
    pub name: String,
    /// Instructions that the verifier went through, some of them several times; `None` before 5.16, which does not tell.
    pub verified: Option<u32>,
}

/// The programs of an object that are loaded.
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

/// The object without a policy, for probing: with all that its programs can be made to do.
pub(super) struct ProbeObject {
    pub(super) ebpf: Ebpf,
    /// Whether the audit can tell whose calls it sees, and why not.
    pub(super) can_follow: Result<(), String>,
}

pub(super) fn load_for_probe() -> Result<ProbeObject, KernelError> {
    let _memlock = Memlock::raise();
    let knowledge = KernelInfo::gather()?;
    let ebpf = knowledge.loader(true).load(OBJECT)?;
    Ok(ProbeObject { ebpf, can_follow: knowledge.can_follow() })
}

/// The object for programs that decide nothing and follow nobody, with maps of these sizes.
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
