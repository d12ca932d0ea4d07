//! Help pages, compared with golden files: `UPDATE_GOLDENS=1 cargo test -p sockpolicy --test help` writes them.

#![expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

use std::{fs, path::Path, process::Command};

const COMMANDS: [&str; 16] = [
    "check", "explain", "test", "plan", "exec", "run", "attach", "apply", "detach", "status", "audit", "ls", "verify",
    "options", "doctor", "help",
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
    for (command, page) in &pages {
        assert_eq!(help(&["help", command]), *page);
    }
    assert_eq!(help(&["help"]), overview);
    for (name, page) in pages.into_iter().chain([("sockpolicy", overview.clone())]) {
        assert!(page.contains("\nExamples:\n  sockpolicy "), "{name} has no examples:\n{page}");
        let golden = dir.join(format!("{name}.txt"));
        if std::env::var_os("UPDATE_GOLDENS").is_some() {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&golden, &page).unwrap();
        }
        let reviewed = fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(page, reviewed, "{name}: review the page, then UPDATE_GOLDENS=1");
        assert!(!page.contains(" \n"), "{name} has spaces at the end of a line");
        if let Some(line) = page.lines().find(|line| line.chars().count() > 80 && !line.contains("  sockpolicy ")) {
            panic!("{name} has a line of more than 80 columns: {line}");
        }
    }
    let listed = overview.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let listed = listed.lines().filter(|line| !line.starts_with("   "));
    let listed: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(listed, COMMANDS);
}

/// Flags with the spellings that every command has for them.
#[test]
fn flags_have_one_spelling() {
    for command in COMMANDS {
        let page = help(&[command, "--help"]);
        for (flag, spelling) in [
            ("--instance", "--instance <NAME>"),
            ("--cgroup", "--cgroup <PATH>"),
            ("--output", "-o, --output <OUTPUT>"),
            ("--report", "--report <FILE>"),
            ("--pid", "--pid <PID>"),
            ("--comm", "--comm <NAME>"),
        ] {
            let rows = page.lines().filter(|line| line.trim_start().starts_with('-'));
            let named: Vec<&str> = rows.filter(|line| line.split([' ', ',']).any(|word| word == flag)).collect();
            assert!(named.iter().all(|line| line.trim_start() == spelling), "{command}: {named:?}");
        }
        let usage = page.lines().find(|line| line.starts_with("Usage: ")).unwrap();
        let takes_policies = usage.contains("FILE");
        assert!(!takes_policies || usage.contains("FILE|DIR"), "{usage}");
        assert!(!usage.contains("NAME") || command == "options", "{usage}");
    }
}

#[test]
fn unknown_command_is_refused_with_a_suggestion() {
    for words in [&["help", "exce"][..], &["exce"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_sockpolicy")).args(words).output().unwrap();
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(printed.starts_with("error: ") && printed.contains("'exec'"), "{printed}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    }
}
