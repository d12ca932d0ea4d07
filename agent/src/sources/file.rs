//! Policy files: opened and read, or a diagnostic that says why they cannot be.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
};

use nix::errno::Errno;

use crate::{
    escape::Escape,
    policy::diagnostic::{Diagnostic, Problem, Severity, Source},
};

/// Longest policy file in bytes; enough for the addresses of some 100,000 networks.
const SIZE_MAX: u64 = 4 << 20;

/// Opens a policy file.
///
/// # Errors
///
/// Fails if the file cannot be opened, is not a regular file, or is larger than [`SIZE_MAX`].
pub(super) fn open(path: &Path) -> Result<File, Diagnostic> {
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
pub(super) fn read(path: &Path, file: File) -> Result<Arc<Source>, Diagnostic> {
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

pub(super) fn unreadable(path: &Path, error: &io::Error) -> Problem {
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
