//! Policies: from files to validated values.
//!
//! [`parse`] takes text. [`load`] and [`load_all`] read files first. This module prints nothing and does not depend on
//! what the kernel supports.
//!
//! Invariant: a [`Policy`] is valid and needs no further checks.

pub mod diagnostic;
pub(crate) mod file;
pub mod lint;
pub mod model;
mod socket;
mod sources;
pub mod units;
pub mod validate;
pub(crate) mod words;

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    slice,
    sync::Arc,
};

use nix::errno::Errno;

pub use self::{
    diagnostic::sort,
    model::Policy,
    socket::{End, Socket, TwoFamilies, parse_end},
    sources::{IfInsecure, Sources, Texts},
    validate::clauses::nearest_option,
};
use self::{
    diagnostic::{Diagnostic, Problem, Severity, Source, Span, Style, quote},
    validate::Checked,
};
use crate::escape::Escape;

/// Longest policy file in bytes; enough for the addresses of some 100,000 networks.
const SIZE_MAX: u64 = 4 << 20;

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
    warnings.extend(lint::lint(slice::from_ref(&policy)));
    sort(&mut warnings);
    Ok((policy, warnings))
}

/// Reads and parses a policy file without checking who can change the file.
///
/// # Errors
///
/// Returns every error of the file, or why it cannot be read.
pub fn load(path: &Path) -> Result<(Policy, Warnings), PolicyErrors> {
    let (policies, warnings) = load_all(&[path.to_owned()], IfInsecure::Accept)?;
    match policies.into_iter().next() {
        Some(policy) => Ok((policy, warnings)),
        None => Err(PolicyErrors { diagnostics: Vec::new() }),
    }
}

/// Reads the policies in these files and folders, in the order of their file names.
///
/// # Errors
///
/// Returns every error of every file.
pub fn load_all(paths: &[PathBuf], insecure: IfInsecure) -> Result<(Vec<Policy>, Warnings), PolicyErrors> {
    Sources::new(paths, insecure).read().policies()
}

fn same_name(source: &Arc<Source>, name: &str, span: Span, first: &Path) -> Diagnostic {
    let problem = if source.path() == first {
        Problem::new("the file is listed twice").help("list it once")
    } else {
        let message = format!("two policies have the name {}: the other is in {}", quote(name), first.escaped());
        Problem::new(message).help("give this policy another name: name = \"…\" at the top of the file")
    };
    Diagnostic::new(Severity::Error, source, problem.at(span))
}

/// Opens a policy file.
///
/// # Errors
///
/// Fails if the file cannot be opened, is not a regular file, or is larger than [`SIZE_MAX`].
fn open(path: &Path) -> Result<File, Diagnostic> {
    let failed = |error: io::Error| Diagnostic::without_source(unreadable(path, &error));
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(failed)?;
    if let Some(problem) = unsuitable(path, &file).map_err(failed)? {
        return Err(Diagnostic::without_source(problem));
    }
    Ok(file)
}

/// Reads a policy file.
///
/// # Errors
///
/// Fails if the file cannot be read, is larger than [`SIZE_MAX`], or is not UTF-8.
fn read(path: &Path, file: File) -> Result<Arc<Source>, Diagnostic> {
    let failed = |error: io::Error| Diagnostic::without_source(unreadable(path, &error));
    let mut bytes = Vec::new();
    file.take(SIZE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > SIZE_MAX {
        return Err(Diagnostic::without_source(too_large(path)));
    }
    String::from_utf8(bytes).map(|text| Source::new(path, text)).map_err(|error| not_utf8(path, &error))
}

/// Returns the reason why a file of this type cannot be a policy.
fn unsuitable(path: &Path, file: &File) -> io::Result<Option<Problem>> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    let shown = path.escaped();
    if kind.is_dir() {
        return Ok(Some(
            Problem::new(format!("{shown} is a directory, not a policy"))
                .help(format!("name the files in it: {}/*.toml", shown.to_string().trim_end_matches('/'))),
        ));
    }
    let what = if kind.is_fifo() {
        "a pipe"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else if !kind.is_file() {
        "not a regular file"
    } else {
        return Ok(if metadata.len() > SIZE_MAX { Some(too_large(path)) } else { None });
    };
    Ok(Some(Problem::new(format!("{shown} is {what}")).help("write the policy to a regular file")))
}

fn too_large(path: &Path) -> Problem {
    Problem::new(format!("{} is not a policy: it is larger than {} MiB", path.escaped(), SIZE_MAX >> 20))
        .help("name a policy file, such as those in /etc/sockpolicy/policies.d")
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    let errno = error.raw_os_error().map(Errno::from_raw);
    let why = errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_lowercase());
    let problem = Problem::new(format!("cannot read {}: {why}", path.escaped()));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match errno {
        Some(Errno::ENOENT) => problem.help(format!("list the files: ls {}", parent.escaped())),
        Some(Errno::EACCES | Errno::EPERM) => {
            problem.help(format!("run as root, or check who may read it: ls -l {}", path.escaped()))
        }
        _ => problem,
    }
}

/// Returns a diagnostic at the first invalid byte.
fn not_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Diagnostic {
    let bytes = error.as_bytes();
    let at = error.utf8_error().valid_up_to();
    let byte = bytes.get(at).copied().unwrap_or(0);
    let problem = Problem::new(format!("the file is not UTF-8: invalid byte {byte:#04x}"))
        .help(format!("convert it: iconv -f LATIN1 -t UTF-8 {}", path.escaped()))
        .at(at..at + char::REPLACEMENT_CHARACTER.len_utf8());
    let source = Source::new(path, String::from_utf8_lossy(bytes).into_owned());
    Diagnostic::new(Severity::Error, &source, problem)
}
