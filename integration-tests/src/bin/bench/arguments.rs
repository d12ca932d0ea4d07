//! What the benchmark is asked for.

use std::{ffi::OsString, path::PathBuf};

use crate::{
    parts::{self, Part},
    trouble::{Result, Trouble},
};

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) wants_help: bool,
    /// A folder of documentation to be written anew.
    pub(crate) docs: Option<PathBuf>,
    /// Parts by name; all if none is named.
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
                    Some(folder) => arguments.docs = Some(folder.into()),
                    None => return Err(Trouble::new("--docs needs a folder").help("bench --docs docs")),
                },
                name if parts::ALL.iter().any(|part| part.name == name) => arguments.names.push(name.to_owned()),
                _ => {
                    let what = format!("there is no part {}", word.display());
                    let names: Vec<&str> = parts::ALL.iter().map(|part| part.name).collect();
                    return Err(Trouble::new(what).help(format_args!("one of {}", names.join(", "))));
                }
            }
        }
        if arguments.docs.is_some() && !arguments.names.is_empty() {
            return Err(Trouble::new("--docs publishes all parts").help("remove the names of parts"));
        }
        Ok(arguments)
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &'static Part> {
        parts::ALL.iter().filter(|part| self.names.is_empty() || self.names.iter().any(|name| name == part.name))
    }
}

pub(crate) fn help() -> String {
    let mut text = "Measures what sockpolicy costs, compared with alternatives\n\n\
        Usage: bench [PART]... [--docs FOLDER]\n\nParts (default: all):\n"
        .to_owned();
    for Part { name, what, .. } in &parts::ALL {
        text += &format!("  {name:<12} {what}\n");
    }
    text + "\n  --docs FOLDER  also write the tables and plots of benchmarks.md in this folder\n"
}

#[cfg(test)]
mod tests {
    use super::Arguments;
    use crate::parts;

    fn parse(words: &[&str]) -> Result<Arguments, String> {
        let words: Vec<_> = words.iter().map(Into::into).collect();
        Arguments::parse(&words).map_err(|trouble| trouble.to_string())
    }

    #[test]
    fn all_parts_are_meant_if_none_is_named() {
        assert_eq!(parse(&[]).unwrap().parts().count(), parts::ALL.len());
        let names: Vec<_> = parse(&["storm", "live"]).unwrap().parts().map(|part| part.name).collect();
        assert_eq!(names, ["live", "storm"]);
    }

    #[test]
    fn mistakes_are_told_with_what_helps() {
        assert!(parse(&["strom"]).unwrap_err().contains("no part strom\n  help: one of setsockopt"));
        assert!(parse(&["--docs"]).is_err());
        assert!(parse(&["--docs", "docs", "live"]).is_err());
    }
}
