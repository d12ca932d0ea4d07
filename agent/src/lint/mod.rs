//! Likely mistakes in policies that are valid: one file for each kind.
//!
//! Pure: callers pass the facts about a host or a kernel. A certain mistake would be an error; only [`on_kernel`]
//! returns errors, since its kernel is known.

mod effects;
mod host;
mod kernel;
mod marks;
mod shadow;

pub use self::{
    host::{Host, LockedRoute, asks_for_routes, on_host},
    kernel::{Version, on_kernel},
};
use crate::policy::{
    diagnostic::{Diagnostic, Problem, Severity},
    model::{Clause, Policy, Rule},
};

/// Returns the likely mistakes in policies that are in force together, without facts about a host.
#[must_use]
pub fn lint(policies: &[Policy]) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for policy in policies {
        found.extend(marks::lint(policy));
        found.extend(effects::lint(policy));
    }
    found.extend(shadow::lint(policies));
    found
}

/// Returns documented limitations that apply to the policies. They are shown only on request, since they do not change.
#[must_use]
pub fn caveats(policies: &[Policy]) -> Vec<Diagnostic> {
    policies.iter().flat_map(effects::caveats).collect()
}

fn warning(policy: &Policy, problem: Problem) -> Diagnostic {
    Diagnostic::new(Severity::Warning, &policy.source, problem)
}

/// Returns each clause of a policy, with its rule.
fn clauses(policy: &Policy) -> impl Iterator<Item = (&Rule, &Clause)> {
    policy.rules.iter().flat_map(|rule| rule.clauses.iter().map(move |clause| (rule, clause)))
}
