//! Errors of the benchmark: the failed operation, its object and reason, and help.

use std::{
    fmt::{self, Display},
    result,
};

pub(crate) type Result<T> = result::Result<T, BenchError>;

#[derive(Clone, Debug)]
pub(crate) struct BenchError {
    what: String,
    help: Option<String>,
}

impl BenchError {
    pub(crate) fn new(what: impl Display) -> Self {
        Self { what: what.to_string(), help: None }
    }

    pub(crate) fn help(self, help: impl Display) -> Self {
        Self { help: Some(help.to_string()), ..self }
    }

    /// Returns a one-line description for a table.
    pub(crate) fn in_short(&self) -> &str {
        &self.what
    }
}

impl Display for BenchError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "error: {}", self.what)?;
        match &self.help {
            Some(help) => write!(out, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

pub(crate) trait Attempt<T> {
    /// Adds the operation that failed to an error.
    fn or_cannot(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Attempt<T> for result::Result<T, E> {
    fn or_cannot(self, what: impl Display) -> Result<T> {
        self.map_err(|error| BenchError::new(format_args!("cannot {what}: {error}")))
    }
}
