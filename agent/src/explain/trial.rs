//! Runs the `[[test]]`s of policies.

use std::{fmt, path::PathBuf};

use serde_json::{Value, json};

use super::{Explanation, OptionExplained, explain};
use crate::{
    compile::{CompileError, compile},
    coverage::{Coverage, stack_of, stack_with},
    escape::{self, Escape},
    policy::{
        Policy,
        model::{Expected, Form, Test},
    },
    schema, values,
};

/// The result of a test.
#[derive(Clone, Debug)]
pub struct Trial {
    pub policy: String,
    pub path: PathBuf,
    pub test: Test,
    /// Empty if the test passed.
    pub failures: Vec<Failure>,
}

/// An option whose result differs from the test.
#[derive(Clone, Debug)]
pub struct Failure {
    pub expected: Expected,
    /// What the policies decide for the option; `None` if no rule names it.
    pub found: Option<OptionExplained>,
}

/// Runs the tests of each policy with the policies that would be in force together: the policies that cover the test's
/// cgroup or, if it names none, those with the same target.
///
/// # Errors
///
/// Fails if the policies cannot be in force together.
pub fn try_all(policies: &[Policy]) -> Result<Vec<Trial>, CompileError> {
    let mut coverage = Coverage::default();
    let mut tests = Vec::new();
    for (number, policy) in policies.iter().enumerate() {
        for test in &policy.tests {
            let stack = match &test.socket.cgroup {
                // The test is not about this host, so containers are unknown.
                Some(cgroup) => stack_of(policies, cgroup, &[])?,
                None => stack_with(policies, number),
            };
            tests.push((policy, test, coverage.intern(stack)));
        }
    }
    let desired = compile(policies, &coverage.stacks)?;
    let trial = |(policy, test, stack): (&Policy, &Test, usize)| {
        let explanation = explain(&desired, &desired.scopes[stack], &test.socket);
        Trial {
            policy: policy.name.clone(),
            path: policy.path().to_owned(),
            test: test.clone(),
            failures: test.expected.iter().filter_map(|expected| failure(&explanation, expected)).collect(),
        }
    };
    Ok(tests.into_iter().map(trial).collect())
}

fn failure(explanation: &Explanation, expected: &Expected) -> Option<Failure> {
    let found = explanation.options.iter().find(|option| option.value_key() == Some(expected.option.value_key()));
    let decided = found.and_then(|option| option.winner.as_ref()).map(|winner| &winner.source.form);
    let decided = decided.filter(|form| **form != Form::Free);
    (decided != expected.form.as_ref()).then(|| Failure { expected: expected.clone(), found: found.cloned() })
}

impl Trial {
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// Returns the result as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let failure = |failure: &Failure| {
            json!({
                "option": failure.expected.option.to_string(),
                "file": format!("{}:{}", escape::plain(&self.path), failure.expected.line),
                "expected": failure.wanted(),
                "found": failure.found.as_ref().map(OptionExplained::to_json),
            })
        };
        let fields = json!({
            "policy": self.policy,
            "test": self.test.name,
            "file": format!("{}:{}", escape::plain(&self.path), self.test.line),
            "passed": self.passed(),
            "failures": self.failures.iter().map(failure).collect::<Vec<_>>(),
        });
        schema::line("test", fields)
    }
}

impl Failure {
    /// Returns the form that the test expects to win; `None` if it expects none.
    fn wanted(&self) -> Option<String> {
        self.expected.form.as_ref().map(|form| values::form_text(self.expected.option.key(), form))
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, test, failures, .. } = self;
        for failure in failures {
            let wanted = failure.wanted().unwrap_or_else(|| "the application decides".to_owned());
            writeln!(
                f,
                "{}:{}: test {}, on {}",
                path.escaped(),
                failure.expected.line,
                test.name.escaped(),
                test.socket
            )?;
            writeln!(f, "  expected {}: {wanted}", failure.expected.option)?;
            match &failure.found {
                Some(found) => writeln!(f, "  found {found}")?,
                None => writeln!(f, "  found no rule that names the option")?,
            }
        }
        Ok(())
    }
}
