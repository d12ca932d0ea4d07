//! The BPF object: loading, attaching, putting in force, reading.

use std::{
    any::Any,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    thread,
};

use abi::{
    Config, Counters, Losses, calls,
    event::{Event, Executable, ExecutableFile, Tally, TallyKey},
    layout::{Layout, Member, known},
    setting::OptionKey,
};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned,
    maps::{MapData, RingBuf},
    programs::{CgroupAttachMode, Program, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use aya_obj::generated::{bpf_attach_type::BPF_CGROUP_SETSOCKOPT, bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCKOPT};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

use super::{
    Audit, BackendChoice, KernelError, Subjects, Target,
    audit::{self, Aim},
    error::{chain, load_reason},
    layout,
    maps::{self, LossesView},
    misses::misses,
    syscall,
};
use crate::{
    compile::{Desired, Hook},
    host::{
        btf::Types,
        cgroup::{Cgroup, is_initial_namespace},
    },
    policy::model::Calls,
};

/// The programs, as build.rs made them.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockpolicy-bpf"));

/// At the least this long between two events of one process, option and verdict: five a second. Who asks for more than
/// conflicts gets each of them.
const EVENT_INTERVAL_NS: u64 = 200_000_000;

/// Programs in the kernel, and what they are attached to. Ends with this value, or with the process.
pub struct Object {
    /// Before the programs, so that they go first.
    links: Vec<Link>,
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    losses: LossesView,
    abilities: Abilities,
    /// Why the kernel's structures cannot be looked at, if they cannot.
    blindness: Option<String>,
    /// Whether the audit can tell whose calls it sees, and why not.
    can_follow: Result<(), String>,
    /// The hooks for which the kernel did not take our program, and what it said.
    refused: Vec<(Hook, String)>,
    audit: Option<Audit>,
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

/// What programs at cgroup/setsockopt may call on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Read options (5.15).
    pub get: bool,
    /// Choose the errno of a denied call (5.18).
    pub set_retval: bool,
    /// See who calls (6.1).
    pub see_task: bool,
}

impl Abilities {
    /// Where that cannot be told, the program that is loaded next will say why.
    fn find() -> Self {
        let has = |helper| syscall::has_helper(BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_CGROUP_SETSOCKOPT, helper);
        Self {
            get: has(BpfHelper::BPF_FUNC_getsockopt).unwrap_or(true),
            set_retval: has(BpfHelper::BPF_FUNC_set_retval).unwrap_or(true),
            see_task: has(BpfHelper::BPF_FUNC_get_current_pid_tgid).unwrap_or(true)
                && has(BpfHelper::BPF_FUNC_get_current_comm).unwrap_or(true),
        }
    }
}

impl Object {
    /// Loads the programs for the hooks of `desired` and fills their maps. Nothing is attached yet. Programs that this
    /// kernel cannot run are left out: see [`Self::refused`].
    ///
    /// # Errors
    ///
    /// Where this process lacks capabilities, or the kernel has no memory for all this.
    pub fn load(desired: &Desired, subjects: Subjects<'_>) -> Result<Self, KernelError> {
        super::check_privileges()?;
        let _memlock = Memlock::raise();
        let knowledge = Knowledge::gather();
        let mut loader = knowledge.loader(desired.audit.timing);
        loader.verifier_log_level(VerifierLogLevel::DEBUG);
        maps::size(&mut loader, desired, subjects, &knowledge.members);
        let mut ebpf = loader.load(OBJECT)?;
        maps::fill(&mut ebpf, desired, subjects, &knowledge.members)?;
        let refused = load_programs(&mut ebpf, &desired.hooks())?;
        let ring = ebpf.take_map(maps::EVENTS).ok_or(KernelError::Incomplete { what: maps::EVENTS })?;
        let ring = RingBuf::try_from(ring).map_err(|source| KernelError::Map { map: maps::EVENTS, source })?;
        let losses = LossesView::of(&mut ebpf)?;
        Ok(Self {
            links: Vec::new(),
            ebpf,
            ring,
            losses,
            abilities: knowledge.abilities,
            blindness: knowledge.blindness.clone(),
            can_follow: knowledge.can_follow(),
            refused,
            audit: None,
        })
    }

    /// Why events cannot tell what the kernel's structures say of a socket, if they cannot.
    #[must_use]
    pub fn blindness(&self) -> Option<&str> {
        self.blindness.as_deref()
    }

    /// What cgroup/setsockopt can do here, as was found when it was loaded.
    #[must_use]
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// The hooks for which this kernel did not take our program, and what it said.
    #[must_use]
    pub fn refused(&self) -> &[(Hook, String)] {
        &self.refused
    }

    /// Has a scope in force on a cgroup for as long as `during` runs. What is reported meanwhile is dropped.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn in_force_on<T>(
        &mut self,
        desired: &Desired,
        target: &Target,
        during: impl FnOnce() -> T,
    ) -> Result<T, KernelError> {
        let mut links = Vec::new();
        for hook in desired.scopes.get(target.scope).map(|scope| &scope.hooks).into_iter().flatten() {
            links.push(self.attach_to(*hook, target)?);
        }
        maps::enable(&mut self.ebpf, config(desired))?;
        let result = during();
        self.disable()?;
        drop(links);
        while self.next_record().is_some() {}
        Ok(result)
    }

    /// Attaches the programs of `desired` to each target, beside whatever is attached there, and tells them which it is.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses; what was attached until then goes with this value.
    pub fn attach(&mut self, desired: &Desired, targets: &[Target]) -> Result<(), KernelError> {
        let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
        for (hook, target) in desired.attachments(&scopes) {
            let link = self.attach_to(hook, &targets[target])?;
            self.links.push(link);
        }
        Ok(())
    }

    fn attach_to(&mut self, hook: Hook, target: &Target) -> Result<Link, KernelError> {
        let Target { cgroup, .. } = target;
        let program = self.ebpf.program_mut(hook.program()).ok_or(KernelError::Incomplete { what: hook.program() })?;
        let link = attach_program(program, cgroup).map_err(|error| KernelError::Attach {
            hook,
            cgroup: cgroup.path.clone(),
            reason: chain(&error),
        })?;
        maps::place(&mut self.ebpf, hook, target)?;
        log::debug!("attached {hook} to {}", cgroup.path.display());
        Ok(link)
    }

    /// Attaches the audit to the kernel's setsockopt and, if `desired` wants it, getsockopt.
    ///
    /// # Errors
    ///
    /// Where the backend that was asked for cannot be had, or none can.
    pub fn attach_audit(&mut self, desired: &Desired, choice: BackendChoice) -> Result<Option<Audit>, KernelError> {
        if choice != BackendChoice::None {
            self.can_follow.clone().map_err(|reasons| KernelError::NoBackend { reasons })?;
        }
        let _memlock = Memlock::raise();
        let aim = Aim { reads: desired.audit.reads, calls: desired.audit.calls != Calls::Conflicts };
        self.audit = audit::attach(&mut self.ebpf, choice, aim)?;
        Ok(self.audit)
    }

    /// Puts everything in force, at once.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn enable(&mut self, desired: &Desired, subjects: Subjects<'_>) -> Result<(), KernelError> {
        let config = Config {
            calls: match desired.audit.calls {
                Calls::Conflicts => calls::CONFLICTS,
                Calls::Governed => calls::GOVERNED,
                Calls::All => calls::ALL,
            },
            target_levels: target_levels(subjects.targets),
            event_interval_ns: if desired.audit.calls == Calls::Conflicts { EVENT_INTERVAL_NS } else { 0 },
            by_process: u32::from(!subjects.processes.is_empty()),
            ..config(desired)
        };
        maps::enable(&mut self.ebpf, config)
    }

    /// Makes everything inert again, at once.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn disable(&mut self) -> Result<(), KernelError> {
        maps::enable(&mut self.ebpf, Config::default())
    }

    /// The next record, if one is there.
    pub fn next_record(&mut self) -> Option<Record> {
        let record = self.ring.next()?;
        // SAFETY: of the right size, and every bit pattern is valid for both; records are aligned to 8 bytes, but nothing
        // depends on it.
        Some(unsafe {
            match record.len() {
                EVENT_LEN => Record::Event(Box::new(record.as_ptr().cast::<Event>().read_unaligned())),
                FILE_LEN => Record::File(Box::new(record.as_ptr().cast::<ExecutableFile>().read_unaligned())),
                _ => Record::Unknown,
            }
        })
    }

    /// The counters of each setting, in the order of [`Desired::settings`].
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn counters(&self, desired: &Desired) -> Result<Vec<Counters>, KernelError> {
        let mut counters = maps::counters(&self.ebpf)?;
        counters.truncate(desired.settings.len());
        Ok(counters)
    }

    /// What was lost.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.losses.get()
    }

    /// Times that the kernel did not run a program of the audit, because one was running on that CPU.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.audit.map_or(0, |audit| misses(&self.ebpf, audit.programs()))
    }

    /// Calls whose end has not come.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn calls_under_way(&self) -> Result<u64, KernelError> {
        maps::calls_under_way(&self.ebpf)
    }

    /// Drops the records of calls whose threads are gone, and whose ends were therefore not seen; gives how many.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn drop_dead_calls(&mut self) -> Result<u64, KernelError> {
        maps::drop_dead_calls(&mut self.ebpf)
    }

    /// Has the file of an executable told again before its next event.
    pub fn ask_for_file_of(&mut self, executable: &Executable) {
        maps::ask_for_file_of(&mut self.ebpf, executable);
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

/// What the programs are told of the kernel that they are to run in.
struct Knowledge {
    layout: Layout,
    members: Vec<(OptionKey, Member)>,
    abilities: Abilities,
    /// Whether tracing programs have the helper for the cgroups above a task's.
    can_see_ancestors: bool,
    /// Why `layout` says nothing, if it does not.
    blindness: Option<String>,
}

impl Knowledge {
    fn gather() -> Self {
        let types = Types::of_kernel();
        let (layout, members) = match &types {
            Ok(types) => (layout::layout(types), layout::members(types)),
            Err(_) => (Layout::default(), Vec::new()),
        };
        let sees = is_helper_supported(ProgramType::KProbe, BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id);
        Self {
            layout,
            members,
            abilities: Abilities::find(),
            // Where that cannot be told, the program that is loaded next will say why.
            can_see_ancestors: sees.unwrap_or(true),
            blindness: types.err().map(|error| error.to_string()),
        }
    }

    /// Whether programs of the audit can tell which cgroups a task is in; `Err` says why not.
    fn can_follow(&self) -> Result<(), String> {
        if self.can_see_ancestors || self.layout.known & known::ANCESTORS != 0 {
            return Ok(());
        }
        let why = self.blindness.as_deref().unwrap_or("its BTF does not say where a task's cgroups are");
        Err(format!("this kernel does not tell programs which cgroups a task is in, and {why}"))
    }

    /// What every load of the object starts from, with all that is constant to the programs.
    fn loader(&self, timing: bool) -> EbpfLoader<'_> {
        let mut loader = EbpfLoader::new();
        // The programs have no relocations against the kernel's types, and reading those takes
        // longer than all the rest.
        loader.btf(None);
        loader.override_global("LAYOUT", &self.layout, true);
        for (name, is_so) in [
            ("CAN_SEE_ANCESTORS", self.can_see_ancestors),
            ("CAN_GET", self.abilities.get),
            ("CAN_SET_RETVAL", self.abilities.set_retval),
            ("CAN_SEE_TASK", self.abilities.see_task),
            ("TIMING", timing),
        ] {
            loader.override_global(name, if is_so { &1_u8 } else { &0_u8 }, true);
        }
        loader
    }
}

impl Drop for Object {
    fn drop(&mut self) {
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

/// What is in force is told by the maps; this says that it is.
fn config(desired: &Desired) -> Config {
    Config { in_force: 1, options: desired.options.len() as u32, ..Config::default() }
}

/// The levels at which targets are. In a cgroup namespace these are not what the kernel counts, and
/// any may be one.
fn target_levels(targets: &[Target]) -> u64 {
    if !is_initial_namespace() {
        return u64::MAX;
    }
    targets.iter().fold(0, |levels, target| levels | 1 << target.cgroup.level)
}

/// Has the kernel check the programs, several at a time: that is what takes the time. Gives those that it did not take.
fn load_programs(ebpf: &mut Ebpf, hooks: &[Hook]) -> Result<Vec<(Hook, String)>, KernelError> {
    let programs: Vec<(Hook, &mut Program)> = ebpf
        .programs_mut()
        .filter_map(|(name, program)| {
            let hook = hooks.iter().find(|hook| hook.program() == name)?;
            Some((*hook, program))
        })
        .collect();
    if programs.len() != hooks.len() {
        return Err(KernelError::Incomplete { what: "program for one of the hooks" });
    }
    let mut results: Vec<(Hook, Result<(), ProgramError>)> = thread::scope(|scope| {
        let threads: Vec<_> =
            programs.into_iter().map(|(hook, program)| (hook, scope.spawn(move || load_program(program)))).collect();
        let joined = threads.into_iter().map(|(hook, thread)| {
            let result = thread.join().unwrap_or_else(|_| Err(ProgramError::NotLoaded));
            (hook, result)
        });
        joined.collect()
    });
    // The same error each time, whichever thread was first.
    results.sort_by_key(|(hook, _)| *hook);
    let mut refused = Vec::new();
    for (hook, result) in results {
        let Err(error) = result else { continue };
        let reason = load_reason(&error);
        if !is_refusal(&error) {
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
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// What holds a program on a cgroup, until this is dropped.
pub(super) type Link = Box<dyn Any + Send>;

/// Attaches by link. `Single` gives the link no flags, which is what the kernel wants of links: they
/// always stand beside each other.
pub(super) fn attach_program(program: &mut Program, target: &Cgroup) -> Result<Link, ProgramError> {
    const BY_LINK: CgroupAttachMode = CgroupAttachMode::Single;
    // The entry of map `TARGETS`, which the kernel makes now, is charged too.
    let _memlock = Memlock::raise();
    macro_rules! attach {
        ($program:expr) => {{
            let link = $program.attach(&target.folder, BY_LINK)?;
            Ok(Box::new($program.take_link(link)?))
        }};
    }
    match program {
        Program::CgroupSock(program) => attach!(program),
        Program::CgroupSockAddr(program) => attach!(program),
        Program::CgroupSockopt(program) => attach!(program),
        Program::SockOps(program) => attach!(program),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

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
pub(super) struct Bare {
    pub(super) ebpf: Ebpf,
    /// Whether the audit can tell whose calls it sees, and why not.
    pub(super) can_follow: Result<(), String>,
}

pub(super) fn bare() -> Result<Bare, KernelError> {
    let _memlock = Memlock::raise();
    let knowledge = Knowledge::gather();
    let ebpf = knowledge.loader(true).load(OBJECT)?;
    Ok(Bare { ebpf, can_follow: knowledge.can_follow() })
}

/// RLIMIT_MEMLOCK, out of the way for as long as this lives: before 5.11 maps, their entries and programs are charged to it,
/// when they are made. Where it cannot be raised, loading says so. Commands inherit limits, so it does not stay.
struct Memlock {
    before: Option<(rlim_t, rlim_t)>,
}

impl Memlock {
    fn raise() -> Self {
        let raised = getrlimit(Resource::RLIMIT_MEMLOCK).and_then(|before| {
            setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
            Ok(before)
        });
        Self { before: raised.inspect_err(|errno| log::debug!("cannot raise RLIMIT_MEMLOCK: {errno}")).ok() }
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        let Some((soft, hard)) = self.before else { return };
        if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard) {
            log::debug!("cannot restore RLIMIT_MEMLOCK: {errno}");
        }
    }
}
