//! `sockpolicy check`: finds every mistake in policy files, without any rights.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

pub(super) use super::messages::show;
use super::{
    FAILURE, FINDINGS,
    descriptor::stdout,
    ignore_broken_pipe,
    output::{Format, TrustArgs},
    print_error,
};
use crate::{
    compile::{CompileError, Desired, compile},
    coverage::{Coverage, Stack, named, stacks_by_target},
    escape::Escape,
    host::{
        routes::{self, Route},
        tcp,
    },
    lint::{self, Host, LockedRoute, Version},
    plural::counted,
    policy::{
        self, Policy, PolicyErrors, Warnings,
        diagnostic::{Diagnostic, Problem, Severity},
    },
    schema,
    sources::{self, IfInsecure},
    unsupported::{Unsupported, UnsupportedList},
};

/// Check policy files for errors and likely mistakes
///
/// Prints errors and warnings, or `ok` with the numbers of policies, rules, settings and targets. The exit status is 0 if there is no error, and 1 otherwise.
///
/// Without --kernel, the policies are also compared with this host: its congestion controls, routes and buffer limits. `run`, `exec` and `doctor` probe what its kernel supports.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy check /etc/sockpolicy/policies.d/*.toml\n  sockpolicy check --deny-warnings web.toml\n  sockpolicy check --kernel 5.15 web.toml"
)]
pub(super) struct Check {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Exit with status 1 if there are warnings
    #[arg(long)]
    deny_warnings: bool,
    /// Check against this kernel version instead of this host, such as 5.15
    #[arg(long, value_name = "VERSION")]
    kernel: Option<Version>,
    /// Output format. Text goes to standard error, JSON to standard output
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Check {
    pub(super) fn run(self) -> ExitCode {
        let (found, counts) = self.find();
        let number = |severity| found.iter().filter(|diagnostic| diagnostic.severity == severity).count();
        let (errors, warnings) = (number(Severity::Error), number(Severity::Warning));
        let is_refused = errors > 0 || counts.is_none() || (self.deny_warnings && warnings > 0);
        let written = match self.output {
            Format::Text => {
                show(&found);
                match counts.filter(|_| !is_refused) {
                    Some(counts) => writeln!(stdout(Format::Text), "ok: {counts}"),
                    None => Ok(()),
                }
            }
            Format::Json => write_json(&found, errors, warnings, counts),
        };
        match ignore_broken_pipe(written) {
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
            Ok(()) if is_refused => FINDINGS.into(),
            Ok(()) => ExitCode::SUCCESS,
        }
    }

    /// Returns all findings, and the counts if the files could be parsed.
    fn find(&self) -> (Vec<Diagnostic>, Option<Counts>) {
        let (policies, mut found) = match sources::load_all(&self.files, self.trust.or_warn()) {
            Ok(loaded) => loaded,
            Err(errors) => return (errors.diagnostics, None),
        };
        found.extend(lint::caveats(&policies));
        match compile_together(&policies) {
            Ok(desired) => match self.kernel {
                Some(kernel) => found.extend(on_kernel(&policies, &desired, kernel)),
                None => found.extend(on_this_host(&policies)),
            },
            Err(error) => found.push(Diagnostic::without_source(problem_of(&error))),
        }
        policy::sort(&mut found);
        (found, Some(Counts::of(&policies)))
    }
}

/// The size of valid policies.
#[derive(Clone, Copy)]
struct Counts {
    policies: usize,
    rules: usize,
    settings: usize,
    targets: usize,
}

impl Counts {
    fn of(policies: &[Policy]) -> Self {
        let rules = || policies.iter().flat_map(|policy| &policy.rules);
        let targets = policies.iter().map(|policy| policy.target.cgroups.len() + policy.target.containers.len());
        Self {
            policies: policies.len(),
            rules: rules().count(),
            settings: rules().map(|rule| rule.clauses.len()).sum(),
            targets: targets.sum(),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policies, rules, settings, targets } = *self;
        let policies = match policies {
            1 => "1 policy".to_owned(),
            _ => format!("{policies} policies"),
        };
        let [rules, settings, targets] = [(rules, "rule"), (settings, "setting"), (targets, "target")]
            .map(|(count, noun)| counted(count as u64, noun));
        write!(f, "{policies}, {rules}, {settings}, {targets}")
    }
}

/// Returns the problem of policies that cannot be in force together. The text of the error contains its help.
fn problem_of(error: &CompileError) -> Problem {
    let text = error.to_string();
    match text.split_once("\n  help: ") {
        Some((message, help)) => Problem::new(message.to_owned()).help(help.to_owned()),
        None => Problem::new(text),
    }
}

fn write_json(found: &[Diagnostic], errors: usize, warnings: usize, counts: Option<Counts>) -> io::Result<()> {
    let mut out = stdout(Format::Json);
    found.iter().try_for_each(|diagnostic| writeln!(out, "{}", diagnostic.to_json()))?;
    let mut fields = json!({ "errors": errors, "warnings": warnings });
    if let Some(Counts { policies, rules, settings, targets }) = counts {
        fields = json!({
            "errors": errors, "warnings": warnings,
            "policy_count": policies, "rule_count": rules, "setting_count": settings, "target_count": targets,
        });
    }
    writeln!(out, "{}", schema::line("check-summary", fields))
}

/// Returns what a kernel of this version does not support, by the tables.
fn on_kernel(policies: &[Policy], desired: &Desired, kernel: Version) -> Vec<Diagnostic> {
    let mut found = lint::on_kernel(policies, kernel);
    let missing = desired.hooks().into_iter().filter(|hook| !hook.is_optional() && !kernel.has(hook.since()));
    let reason = format!("kernel {kernel} does not let programs set options there");
    let unsupported: UnsupportedList =
        missing.filter_map(|hook| Unsupported::of_hook(desired, hook, reason.clone())).collect();
    found.extend(unsupported.0.into_iter().map(|entry| {
        let problem =
            Problem::new(entry.to_string()).help("`run` and `exec` enforce the rest with --allow-unsupported");
        let severity = if entry.is_enforced { Severity::Error } else { Severity::Warning };
        Diagnostic { severity, ..Diagnostic::without_source(problem) }
    }));
    found
}

/// Returns warnings about settings that this host does not permit. Facts about the host that cannot be read cause no warning.
pub(super) fn on_this_host(policies: &[Policy]) -> Vec<Diagnostic> {
    let host = Host {
        congestion_controls: known("the congestion controls", tcp::congestion_controls()),
        locked_routes: if lint::asks_for_routes(policies) {
            known("the routes", routes::with_locked_congestion_control())
                .unwrap_or_default()
                .into_iter()
                .map(locked)
                .collect()
        } else {
            Vec::new()
        },
        wmem_max: known("the limits of send buffers", tcp::buffer_max("wmem_max")),
        rmem_max: known("the limits of receive buffers", tcp::buffer_max("rmem_max")),
    };
    lint::on_host(policies, &host)
}

fn locked(Route { destination, congestion_control }: Route) -> LockedRoute {
    LockedRoute { destination, congestion_control }
}

fn known<T>(what: &str, answer: io::Result<T>) -> Option<T> {
    answer.inspect_err(|error| log::debug!("{what} of this host are unknown: {error}")).ok()
}

/// Warns that the targets of policies are replaced.
pub(super) fn warn_of_replaced_targets(policies: &[Policy], by: &str) {
    for policy in policies.iter().filter(|policy| !policy.target.is_empty()) {
        log::warn!("{by} replaces the target of policy `{}`", policy.name.escaped());
    }
}

/// Reads policy files. Prints their errors and warnings. Returns `None` if there are errors.
pub(super) fn load(files: &[PathBuf], insecure: IfInsecure) -> Option<Vec<Policy>> {
    shown(sources::load_all(files, insecure))
}

/// Prints the errors and warnings of loaded policies. Returns `None` if there are errors.
pub(super) fn shown(loaded: Result<(Vec<Policy>, Warnings), PolicyErrors>) -> Option<Vec<Policy>> {
    match loaded {
        Ok((policies, warnings)) => {
            show(&warnings);
            Some(policies)
        }
        Err(errors) => {
            show(&errors.diagnostics);
            None
        }
    }
}

/// Like [`load`]. Also compiles the policies that are in force together, and returns `None` if that fails.
pub(super) fn load_compiled(files: &[PathBuf], insecure: IfInsecure) -> Option<Vec<Policy>> {
    let policies = load(files, insecure)?;
    match compile_together(&policies) {
        Ok(_) => Some(policies),
        Err(error) => {
            print_error(&error);
            None
        }
    }
}

/// Compiles the policies that are in force together: those with the same target, and those whose targets are names of cgroups
/// of which one contains the other. What a glob or a container matches depends on the host.
fn compile_together(policies: &[Policy]) -> Result<Desired, CompileError> {
    let names = named(policies, &[])?.into_iter().collect();
    let nested = Coverage::of_targets(policies, names, &[])?.stacks;
    // In the order of the first policy of each.
    let stacks: BTreeSet<Stack> = stacks_by_target(policies).into_values().chain(nested).collect();
    let stacks: Vec<Stack> = stacks.into_iter().collect();
    compile(policies, &stacks)
}
