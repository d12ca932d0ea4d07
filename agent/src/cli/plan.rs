//! `sockpolicy plan`: what `run` would do, without doing it and without any rights.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

use super::{
    FAILURE, FINDINGS, check,
    descriptor::stdout,
    help, ignore_broken_pipe,
    output::{DEFAULT_BACKEND, Format, TrustArgs, backend_parser},
    print_error,
    run::RunError,
    status,
};
use crate::{
    compile::{Desired, Hook, NeedsHook, Scope},
    escape::{self, Escape},
    events::Filter,
    host::cgroup::Mount,
    instance::{self, InstanceError},
    kernel::{self, BackendChoice, ForeignConflict, ForeignProgram, RunOrder, Target},
    policy::{Policy, model::Mode},
    policy_diff::{Change, Snapshot, changes},
    schema, session,
    targets::{ResolvedTargets, containers},
};

/// Show what `run` would do
///
/// Lists the programs that `run` would attach, their cgroups and options, and foreign programs that would prevent this. Changes nothing and needs no privileges. `doctor` shows whether this kernel supports it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy plan web.toml\n  sockpolicy plan web.toml --instance default")]
pub(super) struct Plan {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Cgroup to use instead of the targets of the policies: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Show only the differences from what this instance enforces
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Plan a dry run: evaluate and report, without changing anything
    #[arg(long)]
    dry_run: bool,
    /// How to observe calls
    #[arg(long, value_name = "BACKEND", value_parser = backend_parser(), default_value = DEFAULT_BACKEND)]
    audit_backend: BackendChoice,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Plan {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files, self.trust.or_warn()) else { return FINDINGS.into() };
        match self.print(&policies) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn print(&self, policies: &[Policy]) -> Result<(), PlanError> {
        check::show(&check::on_this_host(policies));
        let mount = Mount::find().map_err(RunError::from)?;
        if self.cgroup.is_empty() {
            match ResolvedTargets::find(&mount, &[], policies) {
                Err(error) if error.can_pass() => {
                    log::warn!("`run` would wait for a target: {error}{}", help::line(&error));
                }
                resolved => drop(resolved.map_err(RunError::from)?),
            }
        }
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        let containers = if self.cgroup.is_empty() { containers::wanted_by(policies).running } else { Vec::new() };
        let ResolvedTargets { stacks, targets, .. } = match self.cgroup.is_empty() {
            true => ResolvedTargets::find_or_wait(&mount, policies, containers),
            false => ResolvedTargets::find(&mount, &self.cgroup, policies),
        }
        .map_err(RunError::from)?;
        let mut desired = session::prepare(policies, &stacks, self.dry_run, false).map_err(RunError::from)?;
        if let Some(name) = &self.instance {
            let in_force = status::in_force(name).map_err(Box::new)?;
            // Where its policies need the hook themselves, they do not tell whether it has an audit.
            let has_audit =
                in_force.generation.audit_judges || (in_force.desired.needs_hook().is_some() && !in_force.persists);
            if has_audit && desired.needs_hook().is_none() {
                desired.judge_by_audit();
            }
            let before = Snapshot::of(&in_force.desired, &in_force.generation.targets);
            let changes = changes(&before, &Snapshot::of(&desired, &kernel::names_and_scopes(&targets)));
            let written = match self.output {
                Format::Text => write_changes(name, &changes),
                Format::Json => {
                    let mut out = stdout(Format::Json);
                    changes.iter().try_for_each(|change| writeln!(out, "{}", change.to_json()))
                }
            };
            return Ok(ignore_broken_pipe(written)?);
        }
        let needs_hook = session::needs_hook(&desired, self.audit_backend, false, &Filter::default());
        if needs_hook.is_none() {
            desired.judge_by_audit();
        }
        let steps = Steps {
            desired: &desired,
            needs_hook: needs_hook.filter(|_| desired.is_dry_run() && desired.is_judged_by_hook()),
            targets: &targets,
            tried: desired.set_options().iter().map(|option| option.name).collect(),
            conflicts: kernel::conflicts(&desired, &targets),
            others: foreign_beside(&mount, &targets),
            refused: instance::check_others(None, &kernel::names(&targets)).err(),
        };
        let written = match self.output {
            Format::Text => self.write_text(&steps),
            Format::Json => self.write_json(&steps),
        };
        Ok(ignore_broken_pipe(written)?)
    }

    fn write_text(&self, steps: &Steps<'_>) -> io::Result<()> {
        let Steps { desired, needs_hook, targets, tried, conflicts, others, refused } = steps;
        let mut out = stdout(self.output);
        if !tried.is_empty() {
            writeln!(
                out,
                "on a cgroup made for it, and gone again:\n  try whether this kernel sets {}\n",
                tried.join(", ")
            )?;
        }
        for (number, scope) in desired.scopes.iter().enumerate() {
            let on: Vec<_> = targets.iter().filter(|target| target.scope == number).collect();
            writeln!(out, "{}", heading(scope, &on))?;
            for hook in &scope.hooks {
                let options: Vec<_> = desired.options_at(number, *hook).iter().map(ToString::to_string).collect();
                let does = match (hook, options.is_empty(), scope.mode) {
                    (Hook::Setsockopt, ..) => "judges calls on",
                    (Hook::Getsockopt, ..) => "compares reads of",
                    (_, true, _) => "keeps notes of each socket",
                    (_, false, Mode::Enforce) => "sets",
                    (_, false, Mode::DryRun) => "would set",
                };
                writeln!(out, "  attach {:18}  {}", hook.name(), format!("{does} {}", options.join(", ")).trim_end())?;
            }
            if desired.audit_judges {
                let options: Vec<_> =
                    desired.options_at(number, Hook::Setsockopt).iter().map(ToString::to_string).collect();
                writeln!(out, "  {:25}  judges calls on {}", "audit, without a hook", options.join(", "))?;
            }
            if let Some(reason) = needs_hook {
                writeln!(out, "  a dry run takes {} here: {reason}", Hook::Setsockopt)?;
            }
            for entry in desired.unsupported(number) {
                writeln!(out, "  unsupported: {entry}")?;
            }
            writeln!(out)?;
        }
        let calls = if desired.audit.reads { "setsockopt and getsockopt" } else { "setsockopt" };
        match self.backends()[..] {
            [] => writeln!(out, "no audit: results of calls are not seen"),
            ref backends => writeln!(out, "in the kernel:\n  attach to {calls}, by {}", backends.join(", or else ")),
        }?;
        if desired.audit_judges {
            for (backend, not_covered) in self.backends_with_gaps() {
                writeln!(out, "  calls that {backend} would not see are not judged: {}", not_covered.join(", "))?;
            }
        }
        if let Some(error) = refused {
            writeln!(out, "\nunless it takes over that instance, it would be refused as things are:\n  {error}")?;
        }
        self.write_conflicts(&mut out, conflicts, targets.len())?;
        match others {
            Err(error) => writeln!(out, "\nunknown: which foreign programs are attached there: {error}"),
            Ok(others) if others.is_empty() => Ok(()),
            Ok(others) => {
                let others = others.iter().filter(|(foreign, _)| !is_in_conflict(foreign, conflicts));
                let mut others = others.peekable();
                if others.peek().is_some() {
                    writeln!(out, "\nattached there by others, and staying:")?;
                }
                others.try_for_each(|(foreign, order)| {
                    let when = match order {
                        RunOrder::Before => "runs before ours",
                        RunOrder::After => "runs after ours",
                        RunOrder::Never => "takes no effect below it where programs are attached to this hook",
                    };
                    writeln!(out, "  {:18}  {foreign}: {when}", foreign.hook.name())
                })
            }
        }
    }

    fn write_conflicts(
        &self,
        out: &mut impl Write,
        conflicts: &[(usize, ForeignConflict)],
        targets: usize,
    ) -> io::Result<()> {
        if let Some((_, unknown)) = conflicts.iter().find(|(_, conflict)| conflict.is_unknown()) {
            writeln!(out, "\nunknown: whether foreign programs permit that:\n  {unknown}")?;
        }
        let known = conflicts.iter().rev().filter(|(_, conflict)| !conflict.is_unknown());
        let blocked: BTreeMap<usize, &ForeignConflict> = known.map(|(target, conflict)| (*target, conflict)).collect();
        match blocked.len() {
            0 => return Ok(()),
            some if some < targets && self.cgroup.is_empty() => {
                writeln!(out, "\n`run` would skip {some} of {targets} targets, and `attach` would fail:")?;
            }
            _ => writeln!(out, "\n`run` would fail now:")?,
        }
        blocked.values().try_for_each(|conflict| writeln!(out, "  {conflict}"))
    }

    fn write_json(&self, steps: &Steps<'_>) -> io::Result<()> {
        let Steps { desired, needs_hook, targets, tried, conflicts, others, refused } = steps;
        let mut out = stdout(self.output);
        if let Some(error) = refused {
            let instance = match error {
                InstanceError::Governed { name, .. } => Some(name),
                _ => None,
            };
            let step = schema::line(
                "plan",
                json!({
                    "step": "refuse",
                    "unless_taken_over": instance,
                    "why": error.to_string(),
                }),
            );
            writeln!(out, "{step}")?;
        }
        for (target, conflict) in conflicts {
            let cgroup = &targets[*target].cgroup.name;
            let step = if conflict.is_unknown() { "unknown" } else { "refuse" };
            let line = schema::line("plan", json!({ "step": step, "cgroup": cgroup, "why": conflict.to_string() }));
            writeln!(out, "{line}")?;
        }
        if !tried.is_empty() {
            writeln!(out, "{}", schema::line("plan", json!({ "step": "try", "options": tried })))?;
        }
        let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
        for (hook, target) in desired.attachments(&scopes) {
            let Target { cgroup, scope, .. } = &targets[target];
            let options: Vec<_> = desired.options_at(*scope, hook).iter().map(ToString::to_string).collect();
            let step = schema::line(
                "plan",
                json!({
                    "step": "attach",
                    "hook": hook.name(),
                    "cgroup": cgroup.name,
                    "policies": desired.scopes[*scope].policies,
                    "options": options,
                }),
            );
            writeln!(out, "{step}")?;
        }
        for (number, scope) in desired.scopes.iter().enumerate() {
            for entry in desired.unsupported(number) {
                let line = schema::line(
                    "plan",
                    json!({
                        "step": "unsupported",
                        "policies": scope.policies,
                        "name": entry.name,
                        "of": entry.of,
                        "what": entry.what,
                        "why": entry.why,
                    }),
                );
                writeln!(out, "{line}")?;
            }
        }
        let audit = schema::line(
            "plan",
            json!({
                "step": "audit",
                "backends": self.backends(),
                "audits_reads": desired.audit.reads,
                "judges": desired.audit_judges,
                "needs_hook": needs_hook.map(|reason| reason.to_string()),
            }),
        );
        writeln!(out, "{audit}")?;
        let others = others.iter().flatten().filter(|(foreign, _)| !is_in_conflict(foreign, conflicts));
        for (foreign, order) in others {
            let mut line = schema::line("plan", foreign.to_json());
            line["step"] = "leave".into();
            line["runs"] = match order {
                RunOrder::Before => "before",
                RunOrder::After => "after",
                RunOrder::Never => "never",
            }
            .into();
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    /// The backends that may be taken and that do not see all calls, with those that they do not see.
    fn backends_with_gaps(&self) -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
        let backends = kernel::candidates(self.audit_backend).into_iter();
        backends
            .map(|backend| (backend.name(), backend.never_sees()))
            .filter(|(_, not_covered)| !not_covered.is_empty())
    }

    fn backends(&self) -> Vec<&'static str> {
        kernel::candidates(self.audit_backend).into_iter().map(kernel::Backend::name).collect()
    }
}

/// The contents of a plan.
struct Steps<'a> {
    desired: &'a Desired,
    /// Why a dry run takes a hook at setsockopt, if it does.
    needs_hook: Option<NeedsHook>,
    targets: &'a [Target],
    /// Names of the options that are tried first.
    tried: Vec<&'static str>,
    /// Why it would be refused, or would skip targets, because of foreign programs; each with the number of the target.
    conflicts: Vec<(usize, ForeignConflict)>,
    others: Others,
    /// Why it would be refused, as far as this process may know.
    refused: Option<InstanceError>,
}

/// The foreign programs that run for the same sockets, or the reason why they are unknown.
type Others = io::Result<Vec<(ForeignProgram, RunOrder)>>;

fn foreign_beside(mount: &Mount, targets: &[Target]) -> Others {
    let paths: Vec<_> = targets.iter().map(|target| mount.below(&target.cgroup)).collect();
    let all = kernel::foreign_programs(mount)?.into_iter();
    Ok(all.filter_map(|foreign| foreign.run_order(&paths).map(|order| (foreign, order))).collect())
}

/// Whether policies cannot be in force on a target because of this program.
fn is_in_conflict(foreign: &ForeignProgram, conflicts: &[(usize, ForeignConflict)]) -> bool {
    conflicts.iter().any(|(_, conflict)| conflict.is_about(foreign))
}

/// Where the policies of a scope are to be in force, and in which order they decide.
fn heading(scope: &Scope, targets: &[&Target]) -> String {
    let mode = match scope.mode {
        Mode::Enforce => "enforced",
        Mode::DryRun => "dry run, nothing is changed",
    };
    let policies = format!("{} ({mode})", escape::join(&scope.policies, ", then "));
    match targets {
        [] => format!("on no cgroup yet, and on those that come to be its targets: {policies}"),
        [only] => format!("on {}, and all below it: {policies}", only.cgroup.name.escaped()),
        several => {
            let names: Vec<_> =
                several.iter().map(|target| format!("\n    {}", target.cgroup.name.escaped())).collect();
            format!("on each of these {}, and all below it: {policies}{}", several.len(), names.concat())
        }
    }
}

fn write_changes(instance: &str, changes: &[Change]) -> io::Result<()> {
    let mut out = stdout(Format::Text);
    let instance = instance.escaped();
    if changes.is_empty() {
        return writeln!(out, "no difference from what instance {instance} has in force");
    }
    writeln!(out, "different from what instance {instance} has in force:")?;
    changes.iter().try_for_each(|change| writeln!(out, "  {change}"))
}

#[derive(Debug, thiserror::Error)]
enum PlanError {
    #[error("{0}")]
    Status(#[from] Box<status::StatusError>),
    #[error("{0}")]
    Run(#[from] RunError),
    #[error("cannot write the plan: {0}")]
    Write(#[from] io::Error),
}
