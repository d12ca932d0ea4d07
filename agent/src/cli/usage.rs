//! The words of the command line: how they are parsed, and what is printed if they are wrong.

use std::{
    ffi::{OsStr, OsString},
    io::Write,
    path::Path,
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};

use super::{
    Arguments, FAILURE,
    descriptor::Standard,
    exec::EXIT_INTERNAL,
    ignore_broken_pipe,
    messages::{self, print_error},
};
use crate::{escape::Escape, wrap};

/// The longest name of a task that the kernel keeps, in bytes: `TASK_COMM_LEN` with its null byte (include/linux/sched.h).
const COMM_MAX: usize = 15;

/// Parses the command line. An error repeats words: these are escaped.
pub(super) fn parse(words: &[OsString]) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(words).map_err(|error| {
        let escaped = words.iter().map(|word| OsString::from(word.escaped().to_string()));
        Arguments::try_parse_from(escaped).err().unwrap_or(error)
    })
}

/// Prints the help of a command, or of sockpolicy.
pub(super) fn help(command: Option<&str>) -> ExitCode {
    let words = ["sockpolicy"].into_iter().chain(command).chain(["--help"]).map(OsString::from);
    // `--help` is an error of the parser.
    match parse(&words.collect::<Vec<_>>()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => show(&error, &[]),
    }
}

/// Prints an error of the command line, or the help that was requested. Returns the exit status.
pub(super) fn show(error: &clap::Error, words: &[OsString]) -> ExitCode {
    if !error.use_stderr() {
        return match ignore_broken_pipe(Standard::Output.write_all(rendered(error, Standard::Output).as_bytes())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        };
    }
    match missing_separator(error, words) {
        Some(missing) => print_error(&missing),
        None => messages::write_styled(&rendered(error, Standard::Error)),
    }
    let is_exec = words.get(1).is_some_and(|command| command == "exec");
    if is_exec { EXIT_INTERNAL.into() } else { FAILURE.into() }
}

/// Returns the text of an error, with colours if the descriptor takes them.
fn rendered(error: &clap::Error, standard: Standard) -> String {
    let text = error.render();
    let text = if standard.takes_colours() { text.ansi().to_string() } else { text.to_string() };
    // clap has fitted the lines of help pages.
    wrap::lines(&text, usize::MAX)
}

#[derive(Debug, thiserror::Error)]
#[error("there is no `--` before the command {}\n  help: type: {corrected}", command.escaped())]
struct MissingSeparator {
    command: OsString,
    corrected: String,
}

/// Returns the command line with the `--` that separates a command from policy files, if its absence explains an error.
fn missing_separator(error: &clap::Error, words: &[OsString]) -> Option<MissingSeparator> {
    if !matches!(error.kind(), ErrorKind::MissingRequiredArgument | ErrorKind::UnknownArgument)
        || words.iter().any(|word| word == "--")
    {
        return None;
    }
    let with_separator = |at: &usize| {
        let (before, command) = words.split_at(*at);
        [before, &["--".into()], command].concat()
    };
    let can_be_command =
        |at: &usize| !words[*at].as_encoded_bytes().starts_with(b"-") && !is_like_a_policy(&words[*at]);
    let at = (2..words.len()).filter(can_be_command).find(|at| parse(&with_separator(at)).is_ok())?;
    let quoted: Vec<String> = with_separator(&at).iter().skip(1).map(|word| quoted(word)).collect();
    Some(MissingSeparator { command: words[at].clone(), corrected: format!("sockpolicy {}", quoted.join(" ")) })
}

fn is_like_a_policy(word: &OsStr) -> bool {
    let path = Path::new(word);
    path.extension().is_some_and(|extension| extension == "toml") || path.is_dir()
}

/// Returns a word as a shell reads it.
fn quoted(word: &OsStr) -> String {
    let escaped = word.escaped().to_string();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:=,+@%".contains(&byte);
    if !escaped.is_empty() && escaped.bytes().all(is_plain) {
        escaped
    } else {
        format!("'{}'", escaped.replace('\'', r"'\''"))
    }
}

/// Parses the name of a task.
///
/// # Errors
///
/// Refuses names that are longer than those that the kernel keeps: no task can have them.
pub(super) fn comm(name: &str) -> Result<String, String> {
    if name.len() <= COMM_MAX {
        return Ok(name.to_owned());
    }
    let kept = (0..=COMM_MAX).rev().find(|end| name.is_char_boundary(*end)).map_or("", |end| &name[..end]);
    Err(format!("the kernel keeps only the first {COMM_MAX} bytes of the name of a task: write {}", kept.escaped()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrected(words: &[&str]) -> Option<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        missing_separator(&parse(&words).unwrap_err(), &words).map(|missing| missing.corrected)
    }

    #[test]
    fn separator_is_suggested_before_the_first_word_that_is_no_policy() {
        for (words, expected) in [
            (
                &["sockpolicy", "exec", "web.toml", "nginx", "-g", "daemon off;"][..],
                Some("sockpolicy exec web.toml -- nginx -g 'daemon off;'"),
            ),
            (
                &["sockpolicy", "exec", "--report", "r", "a.toml", "b.toml", "it's", "-x"],
                Some("sockpolicy exec --report r a.toml b.toml -- 'it'\\''s' -x"),
            ),
            (&["sockpolicy", "exec", "web.toml", "true"], Some("sockpolicy exec web.toml -- true")),
            (&["sockpolicy", "audit", "curl", "-s", "x"], Some("sockpolicy audit -- curl -s x")),
            (&["sockpolicy", "exec", "web.toml"], None),
            (&["sockpolicy", "exec", "--no-such", "web.toml", "--", "true"], None),
            (&["sockpolicy", "run", "--no-such", "web.toml"], None),
        ] {
            assert_eq!(corrected(words).as_deref(), expected, "{words:?}");
        }
    }

    #[test]
    fn name_that_no_task_can_have_is_refused() {
        assert_eq!(comm("fifteen-bytes-x").as_deref(), Ok("fifteen-bytes-x"));
        assert!(comm("sixteen-bytes-xy").unwrap_err().ends_with(": write sixteen-bytes-x"));
        assert!(comm("fourteen-bytesé").unwrap_err().ends_with(": write fourteen-bytes"));
    }
}
