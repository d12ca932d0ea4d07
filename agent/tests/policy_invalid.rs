//! The messages for invalid policies, word for word.
//!
//! Each `tests/invalid/NAME.toml` has its `NAME.stderr`. To accept the current messages, run `UPDATE_GOLDENS=1 cargo
//! test --test policy_invalid` and review `git diff`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use sockpolicy::{
    policy::{PolicyErrors, diagnostic::Style},
    sources::{self, IfInsecure},
};

/// A relative path, as users write it: tests run in the directory of their crate.
const INVALID: &str = "tests/invalid";

fn files_with(extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(INVALID).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries.filter(|path| path.extension().is_some_and(|it| it == extension)).collect();
    paths.sort();
    paths
}

fn errors_of(path: &Path) -> PolicyErrors {
    match sources::load(path) {
        Ok(_) => panic!("{} is valid", path.display()),
        Err(errors) => errors,
    }
}

#[test]
fn each_invalid_policy_is_refused_with_its_golden_message() {
    let update = env::var_os("UPDATE_GOLDENS").is_some();
    let mut different = Vec::new();
    for path in files_with("toml") {
        let golden = path.with_extension("stderr");
        let messages = errors_of(&path).render(Style::Plain);
        if update {
            fs::write(&golden, messages).unwrap();
        } else if fs::read_to_string(&golden).ok().as_ref() != Some(&messages) {
            different.push(format!("{}:\n{messages}", golden.display()));
        }
    }
    assert!(
        different.is_empty(),
        "messages differ from these files; to accept them: UPDATE_GOLDENS=1 cargo test --test policy_invalid\n\n{}",
        different.join("\n")
    );
}

#[test]
fn json_has_the_message_with_line_and_columns() {
    let path = Path::new("policy.toml");
    let errors = sources::parse(path, "[[rule]]\nset = { TCP_NODELA = 1 }\n").unwrap_err();
    let lines: Vec<String> = errors.diagnostics.iter().map(|diagnostic| diagnostic.to_json().to_string()).collect();
    assert_eq!(
        lines,
        [
            r#"{"column":9,"end_column":19,"event":"diagnostic","file":"policy.toml","help":"did you mean `TCP_NODELAY`?","line":2,"message":"unknown option `TCP_NODELA`","schema":1,"severity":"error"}"#
        ]
    );
    let errors = errors_of(Path::new("/nowhere/policy.toml"));
    assert_eq!(errors.diagnostics[0].to_json()["line"], serde_json::Value::Null);
}

#[test]
fn each_golden_has_its_policy() {
    let stems =
        |extension| -> BTreeSet<_> { files_with(extension).into_iter().map(|path| path.with_extension("")).collect() };
    assert_eq!(stems("stderr"), stems("toml"));
}

#[test]
fn each_error_has_a_position_and_help() {
    for path in files_with("toml") {
        for diagnostic in errors_of(&path).diagnostics {
            let messages = diagnostic.render(Style::Plain);
            assert!(messages.contains(&format!("--> {}", path.display())), "{messages}");
            assert!(diagnostic.help.is_some(), "{messages}");
        }
    }
}

/// A temporary directory of one test, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("sockpolicy-{name}-{}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// Returns the message about a path, with the scratch directory replaced by `DIR`.
    fn refusal(&self, path: &Path) -> String {
        errors_of(path).render(Style::Plain).replace(&self.0.display().to_string(), "DIR")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const MINIMAL: &str = "[[rule]]\nset = { TCP_NODELAY = true }\n";

#[test]
fn paths_that_are_not_regular_files_are_refused_by_type() {
    let dir = Scratch::new("kinds");
    mkfifo(&dir.path("fifo"), Mode::S_IRUSR).unwrap();
    symlink(dir.path("loop"), dir.path("loop")).unwrap();
    for (path, message) in [
        (
            dir.path("gone.toml"),
            "error: cannot read DIR/gone.toml: no such file or directory\n |\n = help: list the files: ls DIR\n",
        ),
        (dir.path(""), "error: no policy in DIR/: it has no *.toml\n |\n = help: add one, or list the file itself\n"),
        (dir.path("fifo"), "error: DIR/fifo is a pipe\n |\n = help: write the policy to a regular file\n"),
        (PathBuf::from("/dev/null"), "error: /dev/null is a device\n |\n = help: write the policy to a regular file\n"),
        (dir.path("loop"), "error: cannot read DIR/loop: too many symbolic links encountered\n"),
    ] {
        assert_eq!(dir.refusal(&path), message);
    }
}

#[test]
fn too_large_file_is_not_read() {
    let dir = Scratch::new("size");
    let mut content = MINIMAL.to_owned();
    content.push_str(&"#".repeat((4 << 20) - content.len()));
    let path = dir.file("web.toml", &content);
    assert!(sources::load(&path).is_ok());
    content.push('#');
    dir.file("web.toml", &content);
    assert!(dir.refusal(&path).starts_with("error: DIR/web.toml is not a policy: it is larger than 4 MiB\n"));
}

#[test]
fn invalid_utf8_is_reported_with_its_position() {
    let dir = Scratch::new("utf8");
    let path = dir.file("web.toml", b"name = \"web\"\ndescription = \"caf\xe9\"\n");
    assert_eq!(
        dir.refusal(&path),
        "error: the file is not UTF-8: invalid byte 0xe9
 --> DIR/web.toml:2:19
  |
2 | description = \"caf\u{fffd}\"
  |                   ^
  |
  = help: convert it: iconv -f LATIN1 -t UTF-8 DIR/web.toml
"
    );
}

#[test]
fn policies_are_in_the_order_of_file_names_and_errors_of_all_files_are_reported() {
    let dir = Scratch::new("several");
    fs::create_dir(dir.path("a")).unwrap();
    let late = dir.file("a/20-late.toml", MINIMAL);
    let early = dir.file("10-early.toml", MINIMAL);
    let (policies, warnings) = sources::load_all(&[late.clone(), early.clone()], IfInsecure::Accept).unwrap();
    assert_eq!(policies.iter().map(|policy| policy.name.as_str()).collect::<Vec<_>>(), ["10-early", "20-late"]);
    // The first policy decides all options of the second.
    let messages: Vec<_> = warnings.iter().map(|warning| warning.message.as_str()).collect();
    let early_rule = format!("`rule-1` of {}:1", early.display());
    assert_eq!(messages, [format!("rule `rule-1` can never win: rule {early_rule} decides all of its options")]);

    fs::write(&early, "nmae = \"x\"\n[[rule]]\nset = { TCP_NODELAY = 1 }\n").unwrap();
    fs::write(&late, "[[rule]\n").unwrap();
    let errors = sources::load_all(&[late, dir.path("gone.toml"), early], IfInsecure::Accept).unwrap_err();
    let messages: Vec<_> = errors.diagnostics.iter().map(|diagnostic| diagnostic.message.as_str()).collect();
    assert_eq!(messages.len(), 4, "{messages:?}");
    assert_eq!(errors.count(), 4);
    assert!(
        messages[0].contains("`nmae`") && messages[1].contains("TCP_NODELAY") && messages[3].contains("gone.toml"),
        "{messages:?}"
    );
}

#[test]
fn two_policies_with_one_name_are_refused() {
    let dir = Scratch::new("names");
    let first = dir.file("a.toml", format!("name = \"web\"\n{MINIMAL}"));
    let second = dir.file("web.toml", MINIMAL);
    let errors = sources::load_all(&[second, first.clone()], IfInsecure::Accept).unwrap_err();
    let messages = errors.to_string().replace(&dir.0.display().to_string(), "DIR");
    assert_eq!(
        messages,
        "error: two policies have the name `web`: the other is in DIR/a.toml
 --> DIR/web.toml:1:1
  |
1 | [[rule]]
  | ^
  |
  = help: give this policy another name: name = \"…\" at the top of the file"
    );
    let errors = sources::load_all(&[first.clone(), first], IfInsecure::Accept).unwrap_err();
    assert!(errors.to_string().contains("the file is listed twice"), "{errors}");
}

#[test]
fn policy_needs_a_name_if_the_file_name_is_not_a_valid_one() {
    let dir = Scratch::new("stems");
    let path = dir.file("my policy.toml", MINIMAL);
    assert!(dir.refusal(&path).starts_with("error: a policy cannot be named after this file\n"));
    dir.file("my policy.toml", format!("name = \"mine\"\n{MINIMAL}"));
    assert_eq!(sources::load(&path).unwrap().0.name, "mine");
}

#[test]
fn at_most_a_hundred_errors_are_shown() {
    let text = (0..1000).map(|n| format!("x{n} = 1\n")).collect::<String>();
    let errors = sources::parse(Path::new("web.toml"), &text).unwrap_err();
    assert_eq!(errors.count(), 1000);
    assert!(errors.render(Style::Plain).ends_with("\n… and 900 more\n"));
}
