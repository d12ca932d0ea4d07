//! Help pages, compared with golden files: `UPDATE_GOLDENS=1 cargo test -p sockpolicy --test help` writes them.

#![expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

use std::{fs, path::Path, process::Command};

const COMMANDS: [&str; 15] = [
    "check", "explain", "test", "plan", "exec", "run", "attach", "apply", "detach", "status", "audit", "ls", "verify",
    "options", "doctor",
];

fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sockpolicy")).args(arguments).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn help_pages_are_as_reviewed_and_have_examples() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help");
    let overview = help(&["--help"]);
    let pages = COMMANDS.map(|command| (command, help(&[command, "--help"])));
    for (name, page) in pages.into_iter().chain([("sockpolicy", overview.clone())]) {
        assert!(page.contains("\nExamples:\n  sockpolicy "), "{name} has no examples:\n{page}");
        let golden = dir.join(format!("{name}.txt"));
        if std::env::var_os("UPDATE_GOLDENS").is_some() {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&golden, &page).unwrap();
        }
        let reviewed = fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(page, reviewed, "{name}: review the page, then UPDATE_GOLDENS=1");
        if let Some(line) = page.lines().find(|line| line.chars().count() > 80 && !line.contains("  sockpolicy ")) {
            panic!("{name} has a line of more than 80 columns: {line}");
        }
    }
    let listed = overview.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let listed = listed.lines().filter(|line| !line.starts_with("   "));
    let listed: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(listed, COMMANDS);
}
