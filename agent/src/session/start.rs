//! Starts a session: loads the programs, probes options, resumes what earlier agents of the instance left, and enables the policies.

use std::{collections::BTreeSet, panic::resume_unwind, thread};

use abi::GENERATIONS;

use super::{
    Generation, OnUnsupported, ProbedOptions, Session, SessionError, Setup,
    blocked::{BlockedTargets, without_failed},
    needs_hook,
    record::RecordWriter,
    support::{find_unsupported, refuse},
};
use crate::{
    compile::{Desired, Hook, NeedsHook},
    escape,
    events::{Executables, Filter},
    host::cgroup::{Mount, Names},
    instance::Instance,
    kernel::{self, Audit, AuditConfig, BackendChoice, FilledTables, KernelError, Object, Pins, Target},
    options::SocketOption,
    policy::model::{self, Calls},
    report::{Lost, Report},
    trial::{self, Sample},
};

impl Session {
    /// Enables policies.
    ///
    /// # Errors
    ///
    /// Fails if this kernel refuses. No policies are then in force.
    pub fn start(setup: Setup) -> Result<Self, SessionError> {
        let Setup { desired, mount, targets, containers, backend, on_unsupported, on_blocked, filter, instance } =
            setup;
        let (instance, files) = instance.unzip();
        warn_of_overriding_programs(&mount, &targets, instance.as_ref());
        let pins = instance.as_ref().map_or(Ok(None), Instance::pins)?;
        let probes = on_unsupported != OnUnsupported::DoNotProbe;
        let Loaded { object, mut desired, needs_hook, filled, probed } =
            load(desired, &mount, targets.len(), backend, &filter, pins, probes)?;
        let unsupported = find_unsupported(&object, &mut desired, &probed);
        refuse(on_unsupported, &unsupported)?;
        let mut blocked = BlockedTargets::new(on_blocked);
        let requested = targets.len();
        let targets = blocked.without(&object, &desired, targets)?;
        if targets.is_empty() && requested > 0 {
            return Err(blocked.into_error());
        }
        let mut held = Held { object, record: None, instance };
        let History { draining, retired, report } = held.resume(&desired)?;
        let recreated = held.recreated(&targets);
        // The new tables use the slot of a retired generation, whose counters are in the record by now.
        let mut staged = held.object.stage(&desired, filled, &targets)?;
        let (targets, failed) = without_failed(targets, &staged.take_failed());
        let skipped = blocked.skips().chain(failed).collect();
        let audit = held.object.attach_audit(AuditConfig::of(&desired), backend)?;
        if let (Some(record), Some(files)) = (&mut held.record, files) {
            record.add(staged.generation(), files, &targets, desired.audit_judges, true)?;
        }
        warn_without_audit(audit, desired.audit);
        if let Some(reason) = held.object.btf_error() {
            log::warn!("events will lack the fields that come from sockets: {reason}");
        }
        let number = held.object.enable(staged, desired.audit.calls)?;
        held.object.remove_other_layouts()?;
        let Held { object, record, instance: _ } = held;
        Ok(Self {
            object,
            record,
            skipped,
            current: Generation { number, desired, is_taken_over: false },
            draining,
            retired,
            was_drained: false,
            targets,
            recreated,
            filter,
            backend,
            audit,
            on_unsupported,
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
}

/// What a session holds while it starts. The fields are dropped in this order: the name of the instance is locked until all
/// programs are detached.
struct Held {
    object: Object,
    record: Option<RecordWriter>,
    /// Until [`Self::resume`] has made the record of it.
    instance: Option<Instance>,
}

/// What earlier agents of the instance have left.
#[derive(Default)]
struct History {
    draining: Vec<Generation>,
    retired: Vec<Generation>,
    report: Report,
}

impl Held {
    /// Returns the cgroup ids of targets that were removed and created again while no agent ran.
    fn recreated(&self, targets: &[Target]) -> BTreeSet<u64> {
        let known = self.record.as_ref().map(RecordWriter::targets).unwrap_or_default();
        let cgroups = targets.iter().map(|target| &target.cgroup);
        let recreated =
            cgroups.filter(|cgroup| known.contains(cgroup.name.as_str()) && !self.object.is_attached_to(cgroup.id));
        recreated.map(|cgroup| cgroup.id).collect()
    }

    /// Makes the record of the instance, and resumes the generations and the counters of its earlier agents. Without an
    /// instance there are none.
    fn resume(&mut self, desired: &Desired) -> Result<History, SessionError> {
        let Self { object, record, instance } = self;
        let Some(instance) = instance.take() else { return Ok(History::default()) };
        let previous: Vec<u32> = object.previous().collect();
        let record = record.insert(RecordWriter::new(instance, object.map_ids()?, &previous, object.ring_full()));
        let (mut draining, mut retired) = (record.previous(), record.retired());
        let mut report = Report::resume(record.saved_counters());
        for (number, counters) in object.take_retired()? {
            let Some(at) = draining.iter().position(|generation| generation.number == number) else { continue };
            let generation = draining.remove(at);
            report.count(number, &generation.desired, &counters, false);
            retired.push(generation);
        }
        let next = previous.last().map_or(1, |last| last + 1);
        retired.retain(|generation| next - generation.number < GENERATIONS);
        let active: Vec<u32> = draining.iter().map(|generation| generation.number).collect();
        record.retire(&active, &retired, report.saved_counters(desired));
        let counters = object.previous_counters()?;
        report.begin(counters.iter().filter_map(|(number, counters)| {
            let generation = draining.iter().find(|generation| generation.number == *number)?;
            Some((&generation.desired, counters.as_slice()))
        }));
        Ok(History { draining, retired, report })
    }
}

/// The programs of a session, and the results of its option probes.
struct Loaded {
    object: Object,
    desired: Desired,
    needs_hook: Option<NeedsHook>,
    filled: Option<FilledTables>,
    probed: ProbedOptions,
}

/// Loads the programs. Decides whether the audit judges the calls, or a hook at setsockopt. `probes`: also probes the options that
/// the policies set.
fn load(
    mut desired: Desired,
    mount: &Mount,
    targets: usize,
    backend: BackendChoice,
    filter: &Filter,
    pins: Option<Pins>,
    probes: bool,
) -> Result<Loaded, SessionError> {
    let is_pinned = pins.is_some();
    let options = if probes { desired.set_options() } else { Vec::new() };
    let judged_by_hooks = desired.clone();
    let mut needs_hook = needs_hook(&desired, backend, is_pinned, filter);
    if needs_hook.is_none() {
        desired.judge_by_audit();
    }
    let load = |next: &[(&Desired, usize)]| {
        Object::load(&desired.hooks(), AuditConfig::of(&desired), backend, &filter.processes, pins, next)
    };
    let (mut object, filled, probed) = if is_pinned {
        // The pinned policies may already be in force, so the probes need their own programs.
        (load(&[])?.0, None, probe_separately(&desired, &options, mount)?)
    } else {
        load_and_probe(&desired, &options, mount, Some(targets), load)?
    };
    if desired.audit_judges && !object.can_judge() {
        (desired, needs_hook) = (judged_by_hooks, Some(NeedsHook::Blind));
        object.load_more(&desired.hooks())?;
    }
    Ok(Loaded { object, desired, needs_hook, filled, probed })
}

/// Warns of other sockpolicy processes on ancestors of the targets whose programs override ours. Other instances do not if they
/// know this one.
fn warn_of_overriding_programs(mount: &Mount, targets: &[Target], instance: Option<&Instance>) {
    let paths: Vec<_> = targets.iter().map(|target| mount.below(&target.cgroup)).collect();
    match kernel::overriding_programs(mount, &paths) {
        Ok(found) => {
            let mut ancestors: Vec<_> =
                found.iter().map(|program| format!("/{}", escape::plain(&program.cgroup))).collect();
            ancestors.dedup();
            if let Some(instance) = instance {
                let yielding = instance.yielding(&kernel::names(targets));
                ancestors.retain(|ancestor| !yielding.contains(ancestor));
            }
            if !ancestors.is_empty() {
                log::warn!(
                    "another sockpolicy is attached to ancestor {}: it overrides this one where both decide an option",
                    escape::join(&ancestors, ", ")
                );
            }
        }
        Err(error) => log::debug!("cannot query the programs of ancestors: {error}"),
    }
}

/// Probes options with separate programs, so that the programs in force are not disturbed.
pub(super) fn probe_separately(
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

pub(super) fn warn_without_audit(audit: Option<Audit>, wanted: model::Audit) {
    if audit.is_none() && wanted.calls != Calls::Conflicts {
        log::warn!("without an audit, only conflicts are reported: `calls` in the policy has no effect");
    }
    if audit.is_none() && wanted.timing {
        log::warn!("without an audit, calls are not timed");
    }
}
