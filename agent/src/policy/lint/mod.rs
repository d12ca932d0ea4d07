//! What looks like a mistake in policies that are valid: one file for each kind.
//!
//! Pure: what is to be known of a host or of a kernel is handed in. Finds nothing that is certain, or it would be an error;
//! but for [`on_kernel`], which is asked about a kernel that is known.

mod effects;
mod host;
mod kernel;
mod marks;
mod shadow;

pub use self::{
    host::{Host, LockedRoute, asks_for_routes, on_host},
    kernel::{Version, on_kernel},
};
use super::{
    diagnostic::{Diagnostic, Problem, Severity},
    model::{Clause, Policy, Rule},
};

/// What is odd about policies that are in force together, by themselves.
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

/// What may come between policies and what they are for. Who has read it once knows it, so it is said when it is asked for.
#[must_use]
pub fn caveats(policies: &[Policy]) -> Vec<Diagnostic> {
    policies.iter().flat_map(effects::caveats).collect()
}

fn warning(policy: &Policy, problem: Problem) -> Diagnostic {
    Diagnostic::new(Severity::Warning, &policy.source, problem)
}

/// Each clause of a policy, with its rule.
fn clauses(policy: &Policy) -> impl Iterator<Item = (&Rule, &Clause)> {
    policy.rules.iter().flat_map(|rule| rule.clauses.iter().map(move |clause| (rule, clause)))
}
