//! The command line of the benchmark.

use std::{ffi::OsString, path::PathBuf};

use crate::{
    error::{BenchError, Result},
    parts::{self, Part},
};

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) wants_help: bool,
    /// The documentation directory whose benchmark pages are rewritten.
    pub(crate) docs: Option<PathBuf>,
    /// The names of parts; empty for all parts.
    names: Vec<String>,
}

impl Arguments {
    pub(crate) fn parse(words: &[OsString]) -> Result<Self> {
        let mut arguments = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.to_str().unwrap_or_default() {
                "-h" | "--help" => arguments.wants_help = true,
                "--docs" => match words.next() {
                    Some(dir) => arguments.docs = Some(dir.into()),
                    None => return Err(BenchError::new("--docs needs a directory").help("bench --docs docs")),
                },
                name if parts::ALL.iter().any(|part| part.name == name) => arguments.names.push(name.to_owned()),
                _ => {
                    let what = format!("no part is called {}", word.display());
                    let names: Vec<&str> = parts::ALL.iter().map(|part| part.name).collect();
                    return Err(BenchError::new(what).help(format_args!("one of {}", names.join(", "))));
                }
            }
        }
        if arguments.docs.is_some() && !arguments.names.is_empty() {
            return Err(BenchError::new("--docs publishes all parts").help("remove the names of parts"));
        }
        Ok(arguments)
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &'static Part> {
        parts::ALL.iter().filter(|part| self.names.is_empty() || self.names.iter().any(|name| name == part.name))
    }
}

pub(crate) fn help() -> String {
    let mut text = "Measures what sockpolicy costs, compared with alternatives\n\n\
        Usage: bench [PART]... [--docs DIRECTORY]\n\nParts (default: all):\n"
        .to_owned();
    for Part { name, what, .. } in &parts::ALL {
        text += &format!("  {name:<12} {what}\n");
    }
    text + "\n  --docs DIRECTORY  also write the tables and plots of benchmarks.md in this directory\n"
}

#[cfg(test)]
mod tests {
    use super::Arguments;
    use crate::parts;

    fn parse(words: &[&str]) -> Result<Arguments, String> {
        let words: Vec<_> = words.iter().map(Into::into).collect();
        Arguments::parse(&words).map_err(|error| error.to_string())
    }

    #[test]
    fn all_parts_are_selected_if_none_is_named() {
        assert_eq!(parse(&[]).unwrap().parts().count(), parts::ALL.len());
        let names: Vec<_> = parse(&["storm", "live"]).unwrap().parts().map(|part| part.name).collect();
        assert_eq!(names, ["live", "storm"]);
    }

    #[test]
    fn mistakes_are_reported_with_help() {
        assert!(parse(&["strom"]).unwrap_err().contains("no part is called strom\n  help: one of setsockopt"));
        assert!(parse(&["--docs"]).is_err());
        assert!(parse(&["--docs", "docs", "live"]).is_err());
    }
}
