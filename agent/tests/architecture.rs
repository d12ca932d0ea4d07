//! Rules of ARCHITECTURE.md that the compiler does not check.

#![expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Returns the Rust files below a folder of the agent's sources.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Fails for each file outside `allowed` that contains one of `words`.
fn only_in(allowed: &[&str], words: &[&str], reason: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    assert!(files.len() > 20, "found only {} files below {}", files.len(), root.display());
    for file in files {
        let below = file.strip_prefix(&root).unwrap();
        if allowed.iter().any(|place| below.starts_with(place)) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for word in words {
                assert!(!line.contains(word), "{}: `{word}` in `{}`: {reason}", below.display(), line.trim());
            }
        }
    }
}

#[test]
fn only_the_kernel_module_uses_aya() {
    only_in(&["kernel"], &["aya::", "use aya"], "only the module `kernel` uses aya");
}

#[test]
fn only_the_command_line_prints() {
    only_in(&["cli"], &["println!", "print!(", "stdout()", "stderr()"], "only the module `cli` prints");
}

#[test]
fn shown_paths_are_escaped() {
    only_in(&["escape.rs"], &[".display()", "escape_debug", "escape_default"], "use the module `escape`");
}

#[test]
fn failing_output_does_not_panic() {
    only_in(&[], &["println!", "print!(", "dbg!("], "these panic if a write fails");
}

#[test]
fn pure_modules_do_no_io() {
    let io = ["std::fs", "std::process", "std::thread", "nix::", "File::open", "File::create"];
    let places = [
        "cli",
        "daemon",
        "reconcile",
        "targets",
        "transient_cgroup.rs",
        "fault.rs",
        "fuzz.rs",
        "host",
        "instance.rs",
        "journal.rs",
        "kernel",
        "main.rs",
        "session.rs",
        "trial.rs",
        "worker",
        "policy/model.rs",
        "sources",
    ];
    let words_and_errnos = ["policy/words.rs", "errno.rs"];
    only_in(&[places.as_slice(), &words_and_errnos].concat(), &io, "pure modules do no I/O");
}
