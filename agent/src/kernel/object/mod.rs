//! The BPF object of an agent: the programs, their attachments, their configuration, and the audit. [`generations`] enables
//! policies; [`ring`] reads records and counters.

mod generations;
mod ring;

use std::{collections::BTreeSet, mem, panic::resume_unwind, thread};

use abi::GENERATIONS;
use aya::{
    Ebpf, VerifierLogLevel,
    maps::{MapData, RingBuf},
};

pub use self::{
    generations::{FilledTables, Staged},
    ring::Record,
};
use super::{
    Audit, BackendChoice, KernelError,
    attached::{Attached, Point},
    audit::{self, AuditRequest, PerfLinks},
    kernel_info::{HelperSupport, KernelInfo},
    loader::{OBJECT, load_programs},
    maps::{self, ConfigCell, MappedLosses},
    memlock::Memlock,
    observe::MapIds,
    pins::Pins,
    tables::{GenerationMaps, PreviousTables, Tables},
};
use crate::{
    compile::{Desired, Hook},
    fault,
    policy::model,
};

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
    config: ConfigCell,
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

/// Configuration of the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// What the policies request.
    pub audit: model::Audit,
    /// Whether the audit judges the calls instead of the hooks.
    pub judges: bool,
    /// Whether there is anything to audit: not without policies and targets.
    pub is_needed: bool,
}

impl AuditConfig {
    #[must_use]
    pub fn of(desired: &Desired) -> Self {
        let Desired { audit, audit_judges, scopes, .. } = desired;
        Self { audit: *audit, judges: *audit_judges, is_needed: !scopes.is_empty() }
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
        super::check_descriptor_limit()?;
        let _memlock = Memlock::raise();
        let info = KernelInfo::gather()?;
        // Nobody reads the audit's records of pinned policies after this process has exited.
        let is_pinned = pins.is_some();
        let can_begin_calls = info.can_begin_calls() && !is_pinned;
        let AuditConfig { audit, judges, .. } = audit;
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
        let config = ConfigCell::read(&ebpf)?;
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
        let AuditConfig { audit: wanted, judges, is_needed } = requested;
        let choice = if is_needed { choice } else { BackendChoice::None };
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
        if self.config.audit == audit {
            Ok(())
        } else {
            self.config.update(&mut self.ebpf, |config| config.audit = audit)
        }
    }

    /// Returns whether programs are attached to this cgroup, by its id.
    #[must_use]
    pub fn is_attached_to(&self, cgroup: u64) -> bool {
        self.attached.is_attached_to(cgroup)
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
