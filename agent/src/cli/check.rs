//! `sockpolicy check`: finds every mistake in policy files, without any rights.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use super::{FAILURE, FINDINGS, complain, output::Format, unless_closed};
use crate::{
    compile::{CompileError, Desired, compile},
    coverage::{Coverage, stack_with},
    policy::{
        self, Policy,
        diagnostic::{Diagnostic, Problem, Style},
    },
};

/// Check policy files: all mistakes at once, and what looks like one
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// Policy files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Form of what is found: text to standard error, or a line of JSON for each to standard output
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Check {
    pub(super) fn run(self) -> ExitCode {
        if self.output == Format::Json {
            return self.tell_programs();
        }
        if load_compiled(&self.files).is_some() { ExitCode::SUCCESS } else { FINDINGS.into() }
    }

    fn tell_programs(&self) -> ExitCode {
        let (found, is_valid) = match policy::load_all(&self.files) {
            Ok((policies, mut found)) => {
                let error = compile_together(&policies).err();
                found.extend(error.iter().map(|error| Diagnostic::without_source(Problem::new(error.to_string()))));
                (found, error.is_none())
            }
            Err(errors) => (errors.diagnostics, false),
        };
        let mut out = io::stdout().lock();
        let told = unless_closed(found.iter().try_for_each(|diagnostic| writeln!(out, "{}", diagnostic.to_json())));
        if let Err(error) = told {
            complain(&error);
            return FAILURE.into();
        }
        if is_valid { ExitCode::SUCCESS } else { FINDINGS.into() }
    }
}

/// Says that policies with targets of their own are in force elsewhere.
pub(super) fn warn_of_replaced_targets(policies: &[Policy], by: &str) {
    for policy in policies.iter().filter(|policy| !policy.target.is_empty()) {
        log::warn!("the target of policy `{}` gives way to {by}", policy.name);
    }
}

/// Reads policy files. Says what is wrong with them, and gives `None` if anything is.
#[expect(clippy::print_stderr, reason = "this is the command line")]
pub(super) fn load(files: &[PathBuf]) -> Option<Vec<Policy>> {
    let style = if io::stderr().is_terminal() { Style::Coloured } else { Style::Plain };
    match policy::load_all(files) {
        Ok((policies, warnings)) => {
            if !warnings.is_empty() {
                eprintln!("{}", policy::render(&warnings, style));
            }
            Some(policies)
        }
        Err(errors) => {
            eprintln!("{}", errors.render(style));
            None
        }
    }
}

/// The same, and compiles those together that have the same target.
pub(super) fn load_compiled(files: &[PathBuf]) -> Option<Vec<Policy>> {
    let policies = load(files)?;
    match compile_together(&policies) {
        Ok(_) => Some(policies),
        Err(error) => {
            complain(&error);
            None
        }
    }
}

/// Which others they meet on this host depends on its cgroups.
fn compile_together(policies: &[Policy]) -> Result<Desired, CompileError> {
    let mut coverage = Coverage::default();
    for policy in 0..policies.len() {
        coverage.number(stack_with(policies, policy));
    }
    compile(policies, &coverage.stacks)
}
