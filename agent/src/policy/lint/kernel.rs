//! Findings about what a kernel of a given version cannot do, by the option table, without that kernel.
//!
//! On the kernel that runs nothing is decided by versions: that is tried.

use std::{fmt, str::FromStr};

use super::clauses;
use crate::policy::{
    diagnostic::{Diagnostic, Problem, Severity},
    model::{Errno, Form, Mode, Named, OnConflict, Policy},
};

/// A kernel's version, as far as abilities go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a kernel's version, such as 5.15 or 6.1.0-56-amd64")]
pub struct NoVersion;

impl FromStr for Version {
    type Err = NoVersion;

    /// Takes what `uname -r` says, too.
    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let mut parts = text.split(|c: char| !c.is_ascii_digit());
        let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or(NoVersion);
        Ok(Self { major: number()?, minor: number()? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Version {
    /// Whether a kernel of this version has what came with `first`.
    #[must_use]
    pub fn has(self, first: &str) -> bool {
        first.parse().is_ok_and(|first: Self| first <= self)
    }
}

/// What a kernel of this version cannot do of the policies.
#[must_use]
pub fn on_kernel(policies: &[Policy], kernel: Version) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for policy in policies {
        // A dry run goes on without.
        let severity = if policy.mode == Mode::Enforce { Severity::Error } else { Severity::Warning };
        for (_, clause) in clauses(policy) {
            let first = match (clause.option, &clause.form) {
                (Named::Known(option), Form::Set(_)) => option.settable().map(|settable| settable.since),
                _ => None,
            };
            let option = clause.option;
            let mut add = |message: String, help: String| {
                let problem = Problem::new(message).help(help).at(clause.span.clone());
                found.push(Diagnostic::new(severity, &policy.source, problem));
            };
            if let Some(first) = first.filter(|first| !kernel.has(first)) {
                add(
                    format!("kernel {kernel} does not let programs set {option}: {first} is the first that does"),
                    "leave it out; `run` and `exec` have the rest in force without it with --allow-unsupported"
                        .to_owned(),
                );
            }
            if clause.on_conflict == OnConflict::Deny && clause.errno != Errno::EPERM && !kernel.has(Errno::SINCE) {
                add(
                    format!(
                        "on kernel {kernel} denied calls fail with EPERM only: {} is the first that lets programs choose",
                        Errno::SINCE
                    ),
                    "leave `errno` out".to_owned(),
                );
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert!(version("6.1.0-56-amd64").has("5.15"));
        assert!(version("5.15").has("5.15"));
        assert!(!version("5.10.0").has("5.15"));
        assert!(version("6.10").has("6.9"));
        for text in ["", "5", "latest", "v6.1", "5.x"] {
            assert_eq!(text.parse::<Version>(), Err(NoVersion), "{text}");
        }
    }
}
