//! What went wrong: what, with which object and why, then what helps.

use std::{
    fmt::{self, Display},
    result,
};

pub(crate) type Result<T> = result::Result<T, Trouble>;

#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    what: String,
    help: Option<String>,
}

impl Trouble {
    pub(crate) fn new(what: impl Display) -> Self {
        Self { what: what.to_string(), help: None }
    }

    pub(crate) fn help(self, help: impl Display) -> Self {
        Self { help: Some(help.to_string()), ..self }
    }

    /// In one line, for a table.
    pub(crate) fn in_short(&self) -> &str {
        &self.what
    }
}

impl Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "error: {}", self.what)?;
        match &self.help {
            Some(help) => write!(out, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

pub(crate) trait Attempt<T> {
    /// What could not be done, if it was an error.
    fn or_cannot(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Attempt<T> for result::Result<T, E> {
    fn or_cannot(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Trouble::new(format_args!("cannot {what}: {error}")))
    }
}
