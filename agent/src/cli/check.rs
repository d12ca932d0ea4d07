//! `sockpolicy check`: finds every mistake in policy files, without any rights.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

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
    coverage::{Coverage, Stack, stacks_by_target},
    escape::Escape,
    host::{
        routes::{self, Route},
        tcp,
    },
    lint::{self, Host, LockedRoute, Version},
    policy::{
        self, Policy, PolicyErrors, Warnings,
        diagnostic::{Diagnostic, Problem, Severity},
    },
    sources::{self, IfInsecure},
    unsupported::{Unsupported, UnsupportedList},
};

/// Check policy files for errors and likely mistakes
///
/// Without --kernel, the policies are also compared with this host: its congestion controls, routes and buffer limits. `run`, `exec` and `doctor` probe what its kernel supports.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy check /etc/sockpolicy/policies.d/*.toml\n  sockpolicy check --kernel 5.15 web.toml"
)]
pub(super) struct Check {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Check against this kernel version instead of this host, such as 5.15
    #[arg(long, value_name = "VERSION")]
    kernel: Option<Version>,
    /// Output format. Text goes to standard error, JSON to standard output
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Check {
    pub(super) fn run(self) -> ExitCode {
        let (found, is_valid) = self.find();
        let told = match self.output {
            Format::Text => {
                show(&found);
                Ok(())
            }
            Format::Json => tell_programs(&found),
        };
        match told {
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
            Ok(()) if is_valid => ExitCode::SUCCESS,
            Ok(()) => FINDINGS.into(),
        }
    }

    /// Everything there is to say, and whether the policies can be used.
    fn find(&self) -> (Vec<Diagnostic>, bool) {
        let (policies, mut found) = match sources::load_all(&self.files, self.trust.or_warn()) {
            Ok(loaded) => loaded,
            Err(errors) => return (errors.diagnostics, false),
        };
        found.extend(lint::caveats(&policies));
        match compile_together(&policies) {
            Ok(desired) => match self.kernel {
                Some(kernel) => found.extend(on_kernel(&policies, &desired, kernel)),
                None => found.extend(on_this_host(&policies)),
            },
            Err(error) => found.push(Diagnostic::without_source(Problem::new(error.to_string()))),
        }
        policy::sort(&mut found);
        let is_valid = found.iter().all(|diagnostic| diagnostic.severity != Severity::Error);
        (found, is_valid)
    }
}

fn tell_programs(found: &[Diagnostic]) -> io::Result<()> {
    let mut out = stdout(Format::Json);
    ignore_broken_pipe(found.iter().try_for_each(|diagnostic| writeln!(out, "{}", diagnostic.to_json())))
}

/// By the tables: what came with which version.
fn on_kernel(policies: &[Policy], desired: &Desired, kernel: Version) -> Vec<Diagnostic> {
    let mut found = lint::on_kernel(policies, kernel);
    let missing = desired.hooks().into_iter().filter(|hook| !hook.is_optional() && !kernel.has(hook.since()));
    let reason = format!("kernel {kernel} does not let programs set options there");
    let unsupported: UnsupportedList =
        missing.filter_map(|hook| Unsupported::of_hook(desired, hook, reason.clone())).collect();
    found.extend(unsupported.0.into_iter().map(|entry| {
        let problem = Problem::new(entry.to_string())
            .help("`run` and `exec` have the rest in force without it with --allow-unsupported");
        let severity = if entry.is_enforced { Severity::Error } else { Severity::Warning };
        Diagnostic { severity, ..Diagnostic::without_source(problem) }
    }));
    found
}

/// What the host of this process will not let policies have. What cannot be told of it is not held against anybody.
pub(super) fn on_this_host(policies: &[Policy]) -> Vec<Diagnostic> {
    let host = Host {
        congestion_controls: known("its congestion controls", tcp::congestion_controls()),
        locked_routes: if lint::asks_for_routes(policies) {
            known("its routes", routes::with_locked_congestion_control())
                .unwrap_or_default()
                .into_iter()
                .map(locked)
                .collect()
        } else {
            Vec::new()
        },
        wmem_max: known("its largest send buffer", tcp::buffer_max("wmem_max")),
        rmem_max: known("its largest receive buffer", tcp::buffer_max("rmem_max")),
    };
    lint::on_host(policies, &host)
}

fn locked(Route { destination, congestion_control }: Route) -> LockedRoute {
    LockedRoute { destination, congestion_control }
}

fn known<T>(what: &str, answer: io::Result<T>) -> Option<T> {
    answer.inspect_err(|error| log::debug!("cannot tell of this host {what}: {error}")).ok()
}

/// Says that policies with targets of their own are in force elsewhere.
pub(super) fn warn_of_replaced_targets(policies: &[Policy], by: &str) {
    for policy in policies.iter().filter(|policy| !policy.target.is_empty()) {
        log::warn!("the target of policy `{}` gives way to {by}", policy.name.escaped());
    }
}

/// Reads policy files. Says what is wrong with them, and gives `None` if anything is.
pub(super) fn load(files: &[PathBuf], insecure: IfInsecure) -> Option<Vec<Policy>> {
    shown(sources::load_all(files, insecure))
}

/// The policies that were loaded. Says what is wrong, and gives `None` if anything is.
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

/// The same, and compiles those together that have the same target.
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

/// Which others they meet on this host depends on its cgroups.
fn compile_together(policies: &[Policy]) -> Result<Desired, CompileError> {
    let mut coverage = Coverage::default();
    // In the order of the first policy of each.
    let stacks: BTreeSet<Stack> = stacks_by_target(policies).into_values().collect();
    coverage.stacks = stacks.into_iter().collect();
    compile(policies, &coverage.stacks)
}
