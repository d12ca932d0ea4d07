//! Policies: from files to values that are valid.
//!
//! [`parse`] is a function of text; [`load`] and [`load_all`] put the file system before
//! it. Nothing here prints, or asks what the kernel can do.
//!
//! Invariant: who holds a [`Policy`] need not check it again.

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

/// Longest policy file in bytes: it has room for the addresses of some 100,000 networks.
const SIZE_MAX: u64 = 4 << 20;

/// How many diagnostics are shown: nobody reads on, and a file of garbage has an error a line.
const SHOWN_MAX: usize = 100;

/// What is odd about policies that are valid.
pub type Warnings = Vec<Diagnostic>;

/// Why there is no policy: every error of every file, never empty.
#[derive(Clone, Debug)]
pub struct PolicyErrors {
    pub diagnostics: Vec<Diagnostic>,
}

impl PolicyErrors {
    /// The number of errors, without the warnings among them.
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

/// Diagnostics for people, an empty line between any two.
#[must_use]
pub fn render(diagnostics: &[Diagnostic], style: Style) -> String {
    let shown: Vec<_> = diagnostics.iter().take(SHOWN_MAX).map(|diagnostic| diagnostic.render(style)).collect();
    let mut text = shown.join("\n");
    if diagnostics.len() > SHOWN_MAX {
        text.push_str(&format!("\n… and {} more\n", diagnostics.len() - SHOWN_MAX));
    }
    text
}

/// The policy that a text describes. `path` is what to call the file, and, where the text gives no
/// name, the policy.
///
/// # Errors
///
/// All that is wrong with it.
pub fn parse(path: &Path, text: &str) -> Result<(Policy, Warnings), PolicyErrors> {
    let source = Source::new(path, text.to_owned());
    let Checked { policy, mut warnings, name: _ } =
        validate::check(&source).map_err(|diagnostics| PolicyErrors { diagnostics })?;
    warnings.extend(lint::lint(slice::from_ref(&policy)));
    sort(&mut warnings);
    Ok((policy, warnings))
}

/// The policy that a file describes, without a check of who can change the file.
///
/// # Errors
///
/// All that is wrong with it, or why it cannot be read.
pub fn load(path: &Path) -> Result<(Policy, Warnings), PolicyErrors> {
    let (policies, warnings) = load_all(&[path.to_owned()], IfInsecure::Accept)?;
    match policies.into_iter().next() {
        Some(policy) => Ok((policy, warnings)),
        None => Err(PolicyErrors { diagnostics: Vec::new() }),
    }
}

/// The policies that these files describe, and those in these folders, in the order of the files' names.
///
/// # Errors
///
/// All that is wrong with any of them.
pub fn load_all(paths: &[PathBuf], insecure: IfInsecure) -> Result<(Vec<Policy>, Warnings), PolicyErrors> {
    Sources::new(paths, insecure).read().policies()
}

fn same_name(source: &Arc<Source>, name: &str, span: Span, first: &Path) -> Diagnostic {
    let problem = if source.path() == first {
        Problem::new("this file is given twice").help("name it once")
    } else {
        let message = format!("two policies have the name {}: the other is in {}", quote(name), first.escaped());
        Problem::new(message).help("give this one another: name = \"…\" at the top of the file")
    };
    Diagnostic::new(Severity::Error, source, problem.at(span))
}

/// Opens a policy file.
///
/// # Errors
///
/// Fails where it cannot be opened, is no regular file, or is larger than policies are.
fn open(path: &Path) -> Result<File, Diagnostic> {
    let failed = |error: io::Error| Diagnostic::without_source(unreadable(path, &error));
    // A fifo must not keep us waiting for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(failed)?;
    if let Some(problem) = unsuitable(path, &file).map_err(failed)? {
        return Err(Diagnostic::without_source(problem));
    }
    Ok(file)
}

/// Reads what is in a policy file.
///
/// # Errors
///
/// Fails where it cannot be read, is larger than policies are, or is not UTF-8.
fn read(path: &Path, file: File) -> Result<Arc<Source>, Diagnostic> {
    let failed = |error: io::Error| Diagnostic::without_source(unreadable(path, &error));
    let mut bytes = Vec::new();
    file.take(SIZE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > SIZE_MAX {
        return Err(Diagnostic::without_source(too_large(path)));
    }
    String::from_utf8(bytes).map(|text| Source::new(path, text)).map_err(|error| not_utf8(path, &error))
}

/// What kind of thing the file is, if not one that holds a policy.
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
    Ok(Some(Problem::new(format!("{shown} is {what}")).help("write the policy to a file and name that")))
}

fn too_large(path: &Path) -> Problem {
    Problem::new(format!("{} is larger than {} MiB, and so no policy", path.escaped(), SIZE_MAX >> 20))
        .help("name a policy file, such as those in /etc/sockpolicy/policies.d")
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    let errno = error.raw_os_error().map(Errno::from_raw);
    let why = errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_lowercase());
    let problem = Problem::new(format!("cannot read {}: {why}", path.escaped()));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match errno {
        Some(Errno::ENOENT) => problem.help(format!("see what is there: ls {}", parent.escaped())),
        Some(Errno::EACCES | Errno::EPERM) => {
            problem.help(format!("run as root, or see who may read it: ls -l {}", path.escaped()))
        }
        _ => problem,
    }
}

/// Shows the line with the first byte that is wrong.
fn not_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Diagnostic {
    let bytes = error.as_bytes();
    let at = error.utf8_error().valid_up_to();
    let byte = bytes.get(at).copied().unwrap_or(0);
    let problem = Problem::new(format!("this file is not UTF-8: it has the byte {byte:#04x} here"))
        .help(format!("convert it: iconv -f LATIN1 -t UTF-8 {}", path.escaped()))
        .at(at..at + char::REPLACEMENT_CHARACTER.len_utf8());
    let source = Source::new(path, String::from_utf8_lossy(bytes).into_owned());
    Diagnostic::new(Severity::Error, &source, problem)
}
