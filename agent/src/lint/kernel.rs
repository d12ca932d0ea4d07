//! Errors about settings that a given kernel version does not support, from the option table and without that kernel.
//!
//! On the running kernel, versions decide nothing: sockpolicy probes it.

use std::{fmt, str::FromStr};

use super::clauses;
use crate::policy::{
    diagnostic::{Diagnostic, Problem, Severity},
    model::{Errno, Form, Mode, Named, OnConflict, Policy},
};

/// A kernel version: the two numbers on which features depend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a kernel version, such as 5.15 or 6.1.0-56-amd64")]
pub struct NoVersion;

impl FromStr for Version {
    type Err = NoVersion;

    /// Parses a version, or the output of `uname -r`.
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
    /// Returns whether a kernel of this version has a feature that came with `first`.
    #[must_use]
    pub fn has(self, first: &str) -> bool {
        first.parse().is_ok_and(|first: Self| first <= self)
    }
}

/// Returns the settings of the policies that a kernel of this version does not support.
#[must_use]
pub fn on_kernel(policies: &[Policy], kernel: Version) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for policy in policies {
        // A dry run continues without the setting.
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
                    "remove it; or use `run` or `exec` with --allow-unsupported, which enforces the rest".to_owned(),
                );
            }
            if clause.on_conflict == OnConflict::Deny && clause.errno != Errno::EPERM && !kernel.has(Errno::SINCE) {
                add(
                    format!(
                        "on kernel {kernel}, denied calls can only fail with EPERM: {} is the first that supports `errno`",
                        Errno::SINCE
                    ),
                    "remove `errno`".to_owned(),
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
