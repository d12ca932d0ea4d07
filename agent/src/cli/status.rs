//! `sockpolicy status`: the policies in force on this host, their instances and their counters.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use abi::GENERATIONS;
use serde_json::json;

use super::{FAILURE, descriptor::stdout, help, ignore_broken_pipe, output::Format, print_error};
use crate::{
    compile::{Desired, Hook},
    escape::{self, Escape},
    host::{cgroup::Mount, private::PrivateError},
    instance::{self, Generation, InstanceError, InstanceStatus, RecordError, Reload},
    journal,
    kernel::{self, AttachMode, ForeignProgram, KernelError, MapIds},
    policy::model::Mode,
    report::{Counts, Lost, Report, Summary},
    schema, session,
    skipped::SkippedList,
};

/// Show the policies in force on this host
///
/// Shows the instances with their targets, hooks and counters, and the foreign programs on the same cgroups.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy status\n  sockpolicy status --instance default --output json")]
pub(super) struct Status {
    /// Show only this instance
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Output format: text, or one line of JSON for each instance
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum StatusError {
    #[error("no instance `{}`{}", name.escaped(), list(.others))]
    None { name: String, others: Vec<String> },
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("the policies of instance `{}` are unknown: {source}", name.escaped())]
    Unknown { name: String, source: Box<Unknown> },
    #[error("cannot read what is in force on this host: {cause}{}", visible_help(.cause))]
    Hidden { cause: InstanceError },
    #[error("cannot write the status: {0}")]
    Write(#[from] io::Error),
}

/// Returns the help for a missing permission. The texts of other errors contain their help.
fn visible_help(error: &InstanceError) -> &'static str {
    let is_refused = matches!(
        error,
        InstanceError::Private(PrivateError::Io { source, .. })
            | InstanceError::Kernel(KernelError::Private(PrivateError::Io { source, .. }))
            if source.kind() == io::ErrorKind::PermissionDenied
    );
    if is_refused { "\n  help: run it as root" } else { "" }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("\n  help: the instances are: {}", escape::join(names, ", ")) }
}

/// Why the policies of an instance are unknown.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unknown {
    #[error("there is no record that this build can read")]
    NoRecord,
    #[error("the record does not contain the policies in force")]
    NotRecorded,
    #[error("{0}")]
    Record(#[from] RecordError),
    #[error("{0}")]
    Kernel(#[from] KernelError),
}

/// The policies that an instance has in force.
pub(super) struct InForce {
    pub(super) generation: Generation,
    pub(super) desired: Desired,
    /// Whether the policies stay in force without an agent.
    pub(super) persists: bool,
    summary: Summary,
    /// The state of each target, in the order of the generation.
    targets: io::Result<Vec<TargetState>>,
    /// Number of events that found the ring buffer full while no agent ran.
    unread: u64,
}

/// What the kernel shows of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TargetState {
    InForce,
    /// The cgroup does not exist any more.
    Removed,
    /// The cgroup was created again, and no program is attached to the new one.
    Recreated,
    /// No program is attached to these hooks.
    Missing(Vec<&'static str>),
}

impl TargetState {
    fn name(&self) -> &'static str {
        match self {
            Self::InForce => "in_force",
            Self::Removed => "removed",
            Self::Recreated => "recreated",
            Self::Missing(_) => "not_attached",
        }
    }

    /// Returns the hooks that no program is attached to.
    fn missing(&self) -> &[&'static str] {
        match self {
            Self::Missing(hooks) => hooks,
            _ => &[],
        }
    }
}

impl fmt::Display for TargetState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InForce => Ok(()),
            Self::Removed => f.write_str(": not in force, the cgroup was removed"),
            Self::Recreated => f.write_str(": not in force, the cgroup was removed and created again"),
            Self::Missing(hooks) => write!(f, ": no program is attached to {}", hooks.join(", ")),
        }
    }
}

/// Compares the targets of a generation with the kernel.
fn target_states(generation: &Generation, desired: &Desired, maps: MapIds) -> io::Result<Vec<TargetState>> {
    let mount = Mount::find().map_err(io::Error::other)?;
    let below = |(name, _): &(String, usize)| PathBuf::from(name.trim_start_matches('/'));
    let cgroups: Vec<PathBuf> = generation.targets.iter().map(below).collect();
    let attached = maps.attached_hooks(&mount, &cgroups)?;
    let state = |((name, scope), (cgroup, attached)): (&(String, usize), (&PathBuf, BTreeSet<Hook>))| {
        let Ok(now) = mount.open_below(cgroup) else { return TargetState::Removed };
        let hooks = desired.scopes.get(*scope).map(|scope| scope.hooks.as_slice()).unwrap_or_default();
        // The kernel does not list attachments to the optional hook.
        let expected = hooks.iter().filter(|hook| !hook.is_optional());
        let missing: Vec<_> = expected.filter(|hook| !attached.contains(hook)).map(|hook| hook.name()).collect();
        match generation.cgroup_ids.get(name) {
            _ if missing.is_empty() => TargetState::InForce,
            Some(recorded) if *recorded != now.id && attached.is_empty() => TargetState::Recreated,
            _ => TargetState::Missing(missing),
        }
    };
    Ok(generation.targets.iter().zip(cgroups.iter().zip(attached)).map(state).collect())
}

impl Status {
    pub(super) fn run(self) -> ExitCode {
        match self.print() {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => FAILURE.into(),
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    /// Returns whether the state of every instance is known.
    fn print(&self) -> Result<bool, StatusError> {
        kernel::check_privileges()?;
        let mut seen = instance::all();
        let visible = instance::check_visible().map_err(|cause| StatusError::Hidden { cause });
        if let Some(name) = &self.instance {
            let others = seen.iter().map(|seen| seen.name.clone()).collect();
            seen.retain(|seen| seen.name == *name);
            if seen.is_empty() {
                visible?;
                return Err(StatusError::None { name: name.clone(), others });
            }
        }
        let mut out = stdout(self.output);
        let mut written = Ok(());
        let mut is_told = true;
        if seen.is_empty() && visible.is_ok() && self.output == Format::Text {
            written = writeln!(out, "no policies are in force");
        }
        for (number, seen) in seen.iter().enumerate() {
            let looked = look(seen);
            is_told &= looked.is_ok();
            written = written.and_then(|()| match self.output {
                Format::Text if number > 0 => writeln!(out).and_then(|()| write_text(&mut out, seen, &looked)),
                Format::Text => write_text(&mut out, seen, &looked),
                Format::Json => write_json(&mut out, seen, &looked),
            });
        }
        if self.output == Format::Text {
            let kept = journal::instances().into_iter();
            let mut kept = kept.filter(|name| self.instance.as_ref().is_none_or(|asked| asked == name));
            written = written.and_then(|()| kept.try_for_each(|name| write_kept(&mut out, &name)));
        }
        ignore_broken_pipe(written.and_then(|()| out.flush()))?;
        visible?;
        Ok(is_told)
    }
}

fn write_kept(out: &mut impl Write, instance: &str) -> io::Result<()> {
    writeln!(
        out,
        "\nrecorded values of instance {instance}: restore them with `sockpolicy apply --restore --instance \
         {instance}`",
        instance = instance.escaped()
    )
}

/// Returns what an instance has in force.
pub(super) fn in_force(name: &str) -> Result<InForce, StatusError> {
    kernel::check_privileges()?;
    let Some(seen) = instance::inspect(name) else {
        let others = instance::all().into_iter().map(|seen| seen.name).collect();
        return Err(StatusError::None { name: name.to_owned(), others });
    };
    look(&seen).map_err(|source| StatusError::Unknown { name: name.to_owned(), source: Box::new(source) })
}

/// Returns what is in force now. Reads the record again if a reload happened between reading the record and the kernel.
fn look(seen: &InstanceStatus) -> Result<InForce, Unknown> {
    let again = || instance::inspect(&seen.name).ok_or(Unknown::NoRecord);
    match look_once(seen) {
        Err(Unknown::NotRecorded) => look_once(&again()?),
        looked => looked,
    }
}

fn look_once(seen: &InstanceStatus) -> Result<InForce, Unknown> {
    let record = seen.record.as_ref().ok_or(Unknown::NoRecord)?;
    let observed = record.maps.observe()?;
    let is_in_force = |generation: &&Generation| Some(generation.number) == observed.generation;
    let generation = record.generations.iter().find(is_in_force).ok_or(Unknown::NotRecorded)?.clone();
    let desired = generation.desired()?;
    // Sockets may still be set up by earlier generations, which count until they are retired.
    let mut before = Report::resume(record.counted.clone());
    let is_former = |other: &&Generation| (1..GENERATIONS).contains(&generation.number.abs_diff(other.number));
    for former in record.generations.iter().filter(is_former) {
        if let (Ok(desired), Ok(counters)) = (former.desired(), observed.counters(former.number)) {
            before.count(former.number, &desired, &counters, true);
        }
    }
    let mut report = Report::resume(before.saved_counters(&desired));
    report.count(generation.number, &desired, &observed.counters(generation.number)?, true);
    let targets = generation.targets.iter().map(|(name, _)| name.clone()).collect();
    let mut losses = observed.losses;
    let unread = record.unread.of(losses.ring_full, seen.is_running);
    losses.ring_full = losses.ring_full.saturating_sub(unread);
    let lost = Lost { losses, ..Lost::default() };
    let counts = Counts { calls: Vec::new(), lost, buffer_max: session::buffer_max() };
    let summary = report.summarize(&desired, counts, targets, None, Vec::new());
    let targets = target_states(&generation, &desired, record.maps);
    Ok(InForce { generation, desired, persists: record.persists, summary, targets, unread })
}

fn holder(seen: &InstanceStatus) -> String {
    let persists = seen.record.as_ref().is_some_and(|record| record.persists);
    match seen.pid {
        Some(pid) if persists => format!("process {pid}; the policies stay when it ends"),
        Some(pid) => format!("process {pid}"),
        None if seen.is_running => "starting".to_owned(),
        None => "no agent".to_owned(),
    }
}

fn write_text(out: &mut impl Write, seen: &InstanceStatus, looked: &Result<InForce, Unknown>) -> io::Result<()> {
    writeln!(out, "instance {}: {}", seen.name.escaped(), holder(seen))?;
    let InForce { generation, desired, summary, targets, unread, .. } = match looked {
        Ok(in_force) => in_force,
        Err(error) => return writeln!(out, "  policies unknown: {error}{}", help::line(error)),
    };
    for (number, scope) in desired.scopes.iter().enumerate() {
        let mode = match scope.mode {
            Mode::Enforce => "enforced",
            Mode::DryRun => "dry run",
        };
        writeln!(out, "  {} ({mode})", escape::join(&scope.policies, ", then "))?;
        let mut is_somewhere = false;
        for (at, (target, _)) in generation.targets.iter().enumerate().filter(|(_, (_, scope))| *scope == number) {
            is_somewhere = true;
            let state = targets.as_ref().ok().and_then(|states| states.get(at));
            writeln!(out, "    on {}{}", target.escaped(), state.unwrap_or(&TargetState::InForce))?;
        }
        if !is_somewhere {
            let waits = if seen.is_running { "waiting for a target" } else { "no cgroup matched when it was attached" };
            writeln!(out, "    on no cgroup: {waits}")?;
        }
        let mut hooks: Vec<_> = scope.hooks.iter().map(|hook| hook.name()).collect();
        hooks.extend(desired.audit_judges.then_some("the audit"));
        writeln!(out, "    by {}", hooks.join(", "))?;
    }
    if let Err(error) = targets {
        writeln!(out, "  which programs are attached is unknown: {error}")?;
    }
    if let Some(record) = &seen.record {
        if let Some(Reload { time, refused }) = &record.reload {
            match refused {
                None => writeln!(out, "  last reload {}: the policies were replaced", time.escaped())?,
                Some(reason) => writeln!(out, "  last reload {}: refused: {}", time.escaped(), reason.escaped())?,
            }
        }
        write_skipped(out, &record.skipped)?;
    }
    write!(out, "{}", summary.tables())?;
    for (reason, count) in summary.lost.by_reason().into_iter().filter(|(_, count)| *count > 0) {
        writeln!(out, "\nlost: {}", reason.counted(count))?;
    }
    if *unread > 0 {
        writeln!(out, "\nlost without an agent: {unread} events that found the buffer full")?;
    }
    match others_beside(generation) {
        Err(error) => writeln!(out, "\nforeign programs unknown: {error}"),
        Ok(others) if others.is_empty() => Ok(()),
        Ok(others) => {
            writeln!(out, "\nforeign programs:")?;
            others.iter().try_for_each(|other| {
                let effect =
                    if is_displaced(other, generation, desired) { ": takes no effect on targets below" } else { "" };
                writeln!(out, "  {:18}  {other}{effect}", other.hook.name())
            })
        }
    }
}

fn reload_json(reload: &Reload) -> serde_json::Value {
    json!({ "time": reload.time, "error": reload.refused })
}

fn write_skipped(out: &mut impl Write, skipped: &SkippedList) -> io::Result<()> {
    if skipped.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nskipped: {}", skipped.count())?;
    skipped.objects.iter().try_for_each(|object| writeln!(out, "  {object}"))?;
    match skipped.others {
        0 => Ok(()),
        others => writeln!(out, "  and {others} more"),
    }
}

fn write_json(out: &mut impl Write, seen: &InstanceStatus, looked: &Result<InForce, Unknown>) -> io::Result<()> {
    let mut line = schema::line(
        "instance",
        json!({
            "instance": seen.name,
            "pid": seen.pid,
            "persists": seen.record.as_ref().map(|record| record.persists),
            "version": seen.record.as_ref().map(|record| &record.version),
            "reload": seen.record.as_ref().and_then(|record| record.reload.as_ref()).map(reload_json),
            "skipped": seen.record.as_ref().map(|record| record.skipped.to_json()),
        }),
    );
    match looked {
        Err(error) => line["error"] = error.to_string().into(),
        Ok(InForce { generation, desired, summary, targets, unread, .. }) => {
            let target = |(at, (name, scope)): (usize, &(String, usize))| {
                let state = targets.as_ref().ok().and_then(|states| states.get(at));
                let scope = desired.scopes.get(*scope);
                json!({
                    "cgroup": name,
                    "state": state.map(TargetState::name),
                    "missing_hooks": state.map(TargetState::missing),
                    "policies": scope.map(|scope| &scope.policies),
                    "mode": scope.map(|scope| scope.mode.name()),
                    "hooks": scope.map(|scope| scope.hooks.iter().map(|hook| hook.name()).collect::<Vec<_>>()),
                })
            };
            line["generation"] = generation.number.into();
            line["cgroups"] = generation.targets.iter().enumerate().map(target).collect();
            line["settings"] = summary.settings_json().into();
            let lost = summary.lost.by_reason().into_iter();
            line["losses"] = lost.map(|(reason, count)| (reason.name.to_owned(), json!(count))).collect();
            line["unread"] = (*unread).into();
            let to_json = |other: &ForeignProgram| {
                let mut line = other.to_json();
                line["displaced"] = is_displaced(other, generation, desired).into();
                line
            };
            line["foreign_programs"] = others_beside(generation)
                .ok()
                .map_or_else(|| serde_json::Value::Null, |others| others.iter().map(to_json).collect());
        }
    }
    writeln!(out, "{line}")
}

/// Returns whether a foreign program has no effect on a target because a program of ours is attached there. Its owner has attached
/// it above the target, after ours, and without BPF_F_ALLOW_MULTI.
fn is_displaced(other: &ForeignProgram, generation: &Generation, desired: &Desired) -> bool {
    let has_hook = |scope: &usize| desired.scopes.get(*scope).is_some_and(|scope| scope.hooks.contains(&other.hook));
    let is_below = |name: &str| other.is_above(Path::new(name.trim_start_matches('/')));
    other.mode != AttachMode::Multi && generation.targets.iter().any(|(name, scope)| is_below(name) && has_hook(scope))
}

/// Returns the foreign programs that run for sockets of these targets.
fn others_beside(generation: &Generation) -> io::Result<Vec<ForeignProgram>> {
    let mount = Mount::find().map_err(io::Error::other)?;
    let targets: Vec<PathBuf> =
        generation.targets.iter().map(|(name, _)| name.trim_start_matches('/').into()).collect();
    let all = kernel::foreign_programs(&mount)?.into_iter();
    Ok(all.filter(|foreign| !foreign.is_sockpolicy() && foreign.run_order(&targets).is_some()).collect())
}
