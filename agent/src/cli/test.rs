//! `sockpolicy test`: whether policies do what their own tests say, without any rights.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use super::{
    FAILURE, FINDINGS, check,
    descriptor::stdout,
    ignore_broken_pipe,
    output::{Format, TrustArgs},
    print_error,
};
use crate::explain::{Trial, try_all};

/// Run the [[test]] tables of policy files
///
/// Each test is evaluated with all policies that cover its socket, by the code that decides in the kernel. These are the policies that cover the test's `cgroup` or, without one, the policies with the same target.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy test web.toml")]
pub(super) struct Test {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Test {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load_compiled(&self.files, self.trust.or_warn()) else { return FINDINGS.into() };
        let trials = match try_all(&policies) {
            Ok(trials) => trials,
            Err(error) => {
                print_error(&error);
                return FINDINGS.into();
            }
        };
        if let Err(error) = ignore_broken_pipe(self.write(&trials)) {
            print_error(&error);
            return FAILURE.into();
        }
        if trials.iter().all(Trial::passed) { ExitCode::SUCCESS } else { FINDINGS.into() }
    }

    fn write(&self, trials: &[Trial]) -> io::Result<()> {
        let mut out = stdout(self.output);
        if self.output == Format::Json {
            return trials.iter().try_for_each(|trial| writeln!(out, "{}", trial.to_json()));
        }
        let failed: Vec<_> = trials.iter().filter(|trial| !trial.passed()).collect();
        failed.iter().try_for_each(|trial| writeln!(out, "{trial}"))?;
        match (trials.len() - failed.len(), failed.len()) {
            (0, 0) => writeln!(out, "no tests: write a [[test]] for each kind of socket that matters"),
            (passed, 0) => writeln!(out, "passed: {passed}"),
            (passed, failed) => writeln!(out, "passed: {passed}, failed: {failed}"),
        }
    }
}
