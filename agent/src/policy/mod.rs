//! Policies: from files to validated values.
//!
//! [`parse`] takes text. This module prints nothing and does not depend on what the kernel supports.
//!
//! Invariant: a [`Policy`] is valid and needs no further checks.

pub mod diagnostic;
pub(crate) mod file;
pub mod model;
mod socket;
pub mod units;
pub mod validate;
pub(crate) mod words;

use std::{fmt, path::Path};

pub use self::{
    diagnostic::sort,
    model::Policy,
    socket::{End, Socket, TwoFamilies, parse_end},
    validate::clauses::nearest_option,
};
use self::{
    diagnostic::{Diagnostic, Severity, Source, Style},
    validate::Checked,
};

/// How many diagnostics are shown: a file that is not a policy has an error on every line.
const SHOWN_MAX: usize = 100;

/// Likely mistakes in policies that are valid.
pub type Warnings = Vec<Diagnostic>;

/// Why there is no policy: every error of every file. Not empty.
#[derive(Clone, Debug)]
pub struct PolicyErrors {
    pub diagnostics: Vec<Diagnostic>,
}

impl PolicyErrors {
    /// Returns the number of errors, without the warnings.
    #[must_use]
    pub fn count(&self) -> usize {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count()
    }

    #[must_use]
    pub fn render(&self, style: Style) -> String {
        render(&self.diagnostics, style)
    }
}

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(Style::Plain).trim_end())
    }
}

impl std::error::Error for PolicyErrors {}

/// Returns the diagnostics as text, separated by empty lines.
#[must_use]
pub fn render(diagnostics: &[Diagnostic], style: Style) -> String {
    let shown: Vec<_> = diagnostics.iter().take(SHOWN_MAX).map(|diagnostic| diagnostic.render(style)).collect();
    let mut text = shown.join("\n");
    if diagnostics.len() > SHOWN_MAX {
        text.push_str(&format!("\n… and {} more\n", diagnostics.len() - SHOWN_MAX));
    }
    text
}

/// Parses the text of a policy. `path` names the file, and the policy if the text has no `name`.
///
/// # Errors
///
/// Returns every error of the text.
pub fn parse(path: &Path, text: &str) -> Result<(Policy, Warnings), PolicyErrors> {
    let source = Source::new(path, text.to_owned());
    let Checked { policy, mut warnings, name: _ } =
        validate::check(&source).map_err(|diagnostics| PolicyErrors { diagnostics })?;
    sort(&mut warnings);
    Ok((policy, warnings))
}
