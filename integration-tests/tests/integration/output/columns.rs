//! Text for people in a terminal of 80 columns: lines are wrapped, have no blanks at their ends, and have colours only where the
//! terminal takes them.

use std::process::Command;

use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    policy::PolicyFile,
    process::{self, workload},
    terminal::Terminal,
};

use crate::{stderr, stdout};

const COLUMNS: usize = 80;
/// Words of this length can make a line too long: a word is not split.
const LONG_WORD: usize = 20;

/// Rules with long names, and options with long values and names.
const POLICY: &str = r#"name = "a-policy-with-a-long-name"
[[rule]]
name = "everyone-inside-and-outside"
match = { protocol = "tcp" }
set = { SO_KEEPALIVE = true, TCP_KEEPIDLE = "60s", TCP_CONGESTION = "reno" }
on_conflict = "allow"
[[rule]]
name = "second"
limit = { SO_SNDBUF = { max = "4MiB" } }
deny = ["SO_BINDTODEVICE"]
[[test]]
name = "keepalive of an inbound connection is set by the first rule of this policy, whatever the port is"
socket = { protocol = "tcp", direction = "inbound", local = ":443" }
set = { SO_KEEPALIVE = true }
"#;

/// A policy with errors whose messages are long.
const INVALID: &str =
    "[[rule]]\nset = { TCP_KEEPIDEL = 60, SO_KEEPALIVE = \"perhaps\", TCP_USER_TIMEOUT = 30 }\n[[rules]]\n";

#[track_caller]
fn assert_fits(text: &str, what: &str) {
    let text = text.replace('\r', "");
    for block in text.split("\n\n") {
        let has_long_word = |text: &str| text.split_whitespace().any(|word| word.chars().count() >= LONG_WORD);
        for line in block.lines() {
            assert!(!line.ends_with(' '), "{what}: blanks at the end of {line:?}\n{text}");
            let is_source = line.contains(" | ") || line.contains('^');
            let is_command = line.starts_with("Usage: ") || line.starts_with("  sockpolicy ");
            // In a table, a long word makes all lines longer.
            let is_row = line.trim().contains("  ") && has_long_word(block);
            let fits = line.chars().count() <= COLUMNS || is_source || is_command || is_row || has_long_word(line);
            assert!(fits, "{what}: {} columns: {line}\n{text}", line.chars().count());
        }
    }
}

/// Returns each command that prints text and ends, with its arguments.
fn commands(policy: &str, invalid: &str, cgroup: &str) -> Vec<Vec<String>> {
    let workload = workload();
    let commands: Vec<Vec<&str>> = vec![
        vec!["check", policy],
        vec!["check", "--kernel", "5.10", policy],
        vec!["check", invalid],
        vec!["check", "/no/such/policy"],
        vec!["test", policy],
        vec!["explain", "--protocol", "tcp", policy],
        vec!["explain", "--protocol", "udp", policy],
        vec!["plan", "--cgroup", cgroup, policy],
        vec!["status"],
        vec!["status", "--instance", "none"],
        vec!["ls"],
        vec!["ls", "--all"],
        vec!["verify", "--cgroup", "/", policy],
        vec!["apply", "--dry-run", "--cgroup", "/", policy],
        vec!["options"],
        vec!["doctor"],
        vec!["detach", "--instance", "none"],
        vec!["run", "--cgroup", "/no/such/cgroup", policy],
        vec!["run", policy],
        vec!["exec", policy, "nginx", "-g", "daemon off;"],
        vec!["exec", policy, "--", &workload, "storm", "1", "3"],
        vec!["exec", "--dry-run", policy, "--", &workload, "calls"],
        vec!["audit", "--timing", "--", &workload, "calls"],
        vec!["no-such-command"],
        vec![],
    ];
    commands.into_iter().map(|words| words.into_iter().map(str::to_owned).collect()).collect()
}

#[test]
fn text_fits_80_columns_in_a_pipe_and_in_a_terminal() {
    let policy = PolicyFile::new(POLICY);
    let invalid = PolicyFile::new(INVALID);
    let target = Cgroup::new();
    // `status` has an instance to show.
    let run = Run::with(&policy, &target, &[]);
    let commands =
        commands(policy.path().to_str().unwrap(), invalid.path().to_str().unwrap(), target.path().to_str().unwrap());
    for words in commands {
        let mut command = agent::command(&words);
        command.env("COLUMNS", "80");
        let output = process::output(command);
        for text in [stdout(&output), stderr(&output)] {
            assert_fits(&text, &format!("{words:?} in a pipe"));
            assert!(!text.contains('\x1b'), "{words:?}: {text:?}");
        }
        let mut command = agent::command(&words);
        command.env("NO_COLOR", "1").env_remove("COLUMNS");
        let mut terminal = Terminal::start(command);
        terminal.wait();
        let screen = terminal.screen();
        // The sequences that end with `m` select colours. Others erase a progress bar.
        let selects_colour = |part: &str| {
            part.starts_with('[') && part.trim_start_matches(|c: char| !c.is_alphabetic()).starts_with('m')
        };
        assert!(!screen.split('\x1b').skip(1).any(selects_colour), "{words:?}: {screen:?}");
        if !screen.contains('\x1b') {
            assert_fits(&screen, &format!("{words:?} in a terminal"));
        }
    }
    drop(run);
}

#[test]
fn pipe_without_columns_has_one_line_for_each_message() {
    let mut command = agent::command(&["run", "--cgroup", "/no/such/cgroup/with/a/long/name", "/no/such/policy"]);
    command.env_remove("COLUMNS");
    let one = process::output(command);
    let mut command =
        agent::command(&["exec", "/no/such/policy", "/no/such/other/policy", "nginx", "-g", "daemon off;"]);
    command.env_remove("COLUMNS");
    let printed = stderr(&process::output(command));
    assert!(printed.lines().count() == 2 && printed.lines().any(|line| line.chars().count() > COLUMNS), "{printed}");
    drop(one);
}

#[test]
fn errors_have_colours_only_in_a_terminal_that_takes_them() {
    let invalid = PolicyFile::new(INVALID);
    let path = invalid.path().to_str().unwrap();
    let is_coloured = |change: &dyn Fn(&mut Command)| {
        let mut command = agent::command(&["check", path]);
        command.env_remove("NO_COLOR");
        let mut terminal = Terminal::start_with(command, change);
        terminal.wait();
        terminal.wait_for("unknown option");
        terminal.screen().contains("\x1b[")
    };
    assert!(is_coloured(&|_| ()));
    assert!(!is_coloured(&|command| _ = command.env("NO_COLOR", "1")));
    assert!(is_coloured(&|command| _ = command.env("NO_COLOR", "")));
    assert!(!is_coloured(&|command| _ = command.env("TERM", "dumb")));
}
