//! `sockpolicy check`: finds every mistake in policy files, without any rights.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
};

use super::FINDINGS;
use crate::{
    compile::compile,
    policy::{self, Policy, diagnostic::Style},
};

/// Check policy files: all mistakes at once, and what looks like one
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// Policy files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl Check {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = load(&self.files) else { return FINDINGS.into() };
        if let Err(error) = compile(&policies) {
            super::complain(&error);
            return FINDINGS.into();
        }
        ExitCode::SUCCESS
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
