//! What policies mean, that every policy in this repository is valid, and that no text makes the parser panic.
//!
//! In Markdown, a block that begins with three backquotes and `toml` is a whole policy and must load. A part of a
//! policy, or other TOML, is marked `toml fragment`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use abi::setting::OptionKey;
use proptest::prelude::*;
use sockpolicy::{
    explain::try_all,
    lint,
    options::{DSCP_MASK, OPTIONS},
    policy::{
        Policy,
        diagnostic::Style,
        model::{Calls, Direction, Errno, Family, Form, Mode, Named, OnConflict, Protocol, Wanted},
        render, units,
    },
    reference::reference,
    sources,
};

const EVERYTHING: &str = r#"
name = "web-frontend"
description = "WAN clients get BBR; nobody disables keepalive"
mode = "dry-run"

[target]
cgroup = ["/system.slice/nginx.service/", "kubepods.slice/**/cri-containerd-*.scope", "/"]

[audit]
calls = "governed"
reads = false
timing = true

[[rule]]
name = "wan"
match = { protocol = ["tcp", "sctp"], family = "ipv4", direction = "inbound", local = "192.0.2.1", remote = ["0.0.0.0/0"], not_remote = ["10.0.0.0/8"], local_port = [443, "8000-8999"], remote_port = 1024 }
set = { TCP_CONGESTION = "bbr", TCP_NOTSENT_LOWAT = "128KiB", SO_MAX_PACING_RATE = "200mbit" }

[[rule]]
deny = ["SO_BINDTODEVICE", "6:99", "6:19"]
limit = { SO_SNDBUF = { max = "4MiB" }, SO_RCVBUF = { min = "64KiB", max = "4MiB", on_conflict = "ignore" } }
on_conflict = "deny"
errno = "EACCES"

[rule.set]
SO_KEEPALIVE = true
SO_TXREHASH = -1
IP_TOS = "af21"
SO_MARK = { value = "0x20/0xff", on_conflict = "rewrite" }
TCP_KEEPIDLE = { value = "2min", errno = "EINVAL" }
"#;

fn parsed(text: &str) -> Policy {
    let (policy, warnings) =
        sources::parse(Path::new("dir/web.toml"), text).unwrap_or_else(|errors| panic!("{errors}"));
    assert!(warnings.is_empty(), "{}", render(&warnings, Style::Plain));
    policy
}

fn warned(text: &str) -> Vec<String> {
    let (_, warnings) = sources::parse(Path::new("web.toml"), text).unwrap_or_else(|errors| panic!("{errors}"));
    warnings.into_iter().map(|warning| warning.message).collect()
}

#[test]
fn policy_has_the_contents_of_its_file() {
    let policy = parsed(EVERYTHING);
    assert_eq!(policy.path(), Path::new("dir/web.toml"));
    assert_eq!(policy.name, "web-frontend");
    assert_eq!(policy.description.as_deref(), Some("WAN clients get BBR; nobody disables keepalive"));
    assert_eq!(policy.mode, Mode::DryRun);
    assert_eq!(policy.target.cgroups, ["", "kubepods.slice/**/cri-containerd-*.scope", "system.slice/nginx.service"]);
    assert_eq!(policy.audit.calls, Calls::Governed);
    assert!(!policy.audit.reads && policy.audit.timing);
    let rules: Vec<_> = policy.rules.iter().map(|rule| (rule.name.as_str(), rule.line)).collect();
    assert_eq!(rules, [("wan", 14), ("rule-2", 19)]);
}

#[test]
fn target_names_cgroups_and_containers() {
    let text = "[target]\ncgroup = \"web.slice\"\n\
                container = [{ name = \"web-*\", runtime = \"cri-o\" }, { id = \"4f7c2a9b01de\", image = \"*/nginx:1\" }]\n\
                [[rule]]\nset = { TCP_NODELAY = true }\n";
    let target = parsed(text).target;
    assert_eq!(target.cgroups, ["web.slice"]);
    // In a fixed order, so that equal targets compare equal.
    assert_eq!(
        target.containers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "container = { image = \"*/nginx:1\", id = \"4f7c2a9b01de\" }",
            "container = { name = \"web-*\", runtime = \"cri-o\" }"
        ]
    );
    let rule = "[[rule]]\nset = { TCP_NODELAY = true }\n";
    let alone = parsed(&format!("target.container = {{ name = \"web\" }}\n{rule}")).target;
    let tables =
        parsed(&format!("[[target.container]]\nname = \"web\"\n[[target.container]]\nname = \"web\"\n{rule}")).target;
    assert_eq!((alone.cgroups.len(), alone.containers.len()), (0, 1));
    assert_eq!(alone, tables);
}

#[test]
fn image_without_a_tag_causes_a_warning() {
    let warned = |image: &str| {
        warned(&format!("target.container = {{ image = \"{image}\" }}\n[[rule]]\nset = {{ TCP_NODELAY = true }}\n"))
    };
    for image in ["docker.io/library/nginx:1.27", "nginx:*", "nginx@sha256:*", "quay.io/me/*", "*"] {
        assert!(warned(image).is_empty(), "{image}");
    }
    for image in ["nginx", "registry.example:5000/nginx"] {
        assert_eq!(warned(image), [format!("image `{image}` has no tag, and runtimes name images with one")]);
    }
}

#[test]
fn selector_has_the_conditions_of_match() {
    let selector = &parsed(EVERYTHING).rules[0].selector;
    assert_eq!(selector.protocols, [Protocol::Tcp, Protocol::Sctp]);
    assert_eq!(selector.family, Some(Family::Ipv4));
    assert_eq!(selector.direction, Some(Direction::Inbound));
    assert_eq!(selector.local, ["192.0.2.1/32".parse().unwrap()]);
    assert_eq!(selector.remote, ["0.0.0.0/0".parse().unwrap()]);
    assert_eq!(selector.not_remote, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(selector.local_ports, [443..=443, 8000..=8999]);
    assert_eq!(selector.remote_ports, [1024..=1024]);
    assert!(parsed(EVERYTHING).rules[1].selector.matches_everything());
}

#[test]
fn clauses_are_in_the_order_of_the_file_with_values_in_kernel_units() {
    let number = |value: i32, mask| Form::Set(Wanted::Number { value: value as u32, mask });
    let policy = parsed(EVERYTHING);
    let forms = |rule: usize| -> Vec<_> {
        let clauses = policy.rules[rule].clauses.iter();
        clauses.map(|clause| (clause.option.to_string(), clause.line, clause.form.clone())).collect()
    };
    let expected = |all: &[(&str, usize, Form)]| -> Vec<_> {
        all.iter().map(|(name, line, form)| ((*name).to_owned(), *line, form.clone())).collect()
    };
    assert_eq!(
        forms(0),
        expected(&[
            ("TCP_CONGESTION", 17, Form::Set(Wanted::Text("bbr".to_owned()))),
            ("TCP_NOTSENT_LOWAT", 17, number(128 << 10, u32::MAX)),
            ("SO_MAX_PACING_RATE", 17, number(25_000_000, u32::MAX)),
        ])
    );
    assert_eq!(
        forms(1),
        expected(&[
            ("SO_BINDTODEVICE", 20, Form::Deny),
            ("6:99", 20, Form::Deny),
            ("TCP_REPAIR", 20, Form::Deny),
            ("SO_SNDBUF", 21, Form::Limit { min: 0, max: 4 << 20 }),
            ("SO_RCVBUF", 21, Form::Limit { min: 64 << 10, max: 4 << 20 }),
            ("SO_KEEPALIVE", 26, number(1, u32::MAX)),
            ("SO_TXREHASH", 27, number(-1, u32::MAX)),
            ("IP_TOS", 28, number(0x48, DSCP_MASK)),
            ("SO_MARK", 29, number(0x20, 0xff)),
            ("TCP_KEEPIDLE", 30, number(120, u32::MAX)),
        ])
    );
    let numeric = policy.rules[1].clauses[1].option;
    assert_eq!(numeric, Named::Numeric(OptionKey { level: 6, name: 99 }));
}

#[test]
fn option_has_the_action_and_errno_of_its_rule_unless_it_has_its_own() {
    let policy = parsed(EVERYTHING);
    let of = |rule: usize, option: &str| {
        let mut clauses = policy.rules[rule].clauses.iter();
        let clause = clauses.find(|clause| clause.option.to_string() == option).unwrap();
        (clause.on_conflict, clause.errno)
    };
    let eacces = Errno(libc::EACCES as u16);
    assert_eq!(of(0, "TCP_CONGESTION"), (OnConflict::Rewrite, Errno::EPERM));
    assert_eq!(of(1, "6:99"), (OnConflict::Deny, eacces));
    assert_eq!(of(1, "SO_SNDBUF"), (OnConflict::Deny, eacces));
    assert_eq!(of(1, "SO_RCVBUF").0, OnConflict::Ignore);
    assert_eq!(of(1, "SO_MARK").0, OnConflict::Rewrite);
    assert_eq!(of(1, "TCP_KEEPIDLE"), (OnConflict::Deny, Errno(libc::EINVAL as u16)));
}

#[test]
fn missing_keys_have_defaults() {
    let policy = parsed("[[rule]]\ndeny = \"TCP_REPAIR\"\non_conflict = \"allow\"\n");
    assert_eq!((policy.name.as_str(), policy.mode), ("web", Mode::Enforce));
    assert!(policy.description.is_none() && policy.target.is_empty());
    assert_eq!(policy.audit.calls, Calls::Conflicts);
    assert!(policy.audit.reads && !policy.audit.timing);
    let clause = &policy.rules[0].clauses[0];
    assert_eq!((clause.on_conflict, clause.errno), (OnConflict::Deny, Errno::EPERM));
}

#[test]
fn policy_that_reports_all_calls_needs_no_rules() {
    let policy = parsed("[audit]\ncalls = \"all\"\n");
    assert_eq!((policy.audit.calls, policy.rules.len()), (Calls::All, 0));
}

#[test]
fn each_option_accepts_its_example_and_all_its_forms() {
    for option in OPTIONS {
        let name = option.name;
        parsed(&format!("[[rule]]\ndeny = [\"{name}\"]\n"));
        parsed(&format!("[[rule]]\ndeny = [\"{}:{}\"]\n", option.level.0, option.number));
        if option.settable().is_some() {
            parsed(&format!("[[rule]]\nset = {{ {name} = {} }}\n", option.example));
        }
        if option.can_be_limited() {
            // "forever", the longest time, cannot be written in a policy.
            let (least, most) = (option.range.0, option.range.1.min(i64::from(u32::MAX)));
            let [min, max] = [least, most].map(|bound| units::show_literal(option.value, bound));
            parsed(&format!("[[rule]]\nlimit = {{ {name} = {{ min = {min}, max = {max} }} }}\n"));
        }
    }
}

#[test]
fn byte_order_mark_and_windows_line_ends_are_accepted() {
    let text = format!("\u{feff}{}", EVERYTHING.replace('\n', "\r\n"));
    assert_eq!(parsed(&text).rules[1].line, 19);
}

#[test]
fn rule_after_one_that_matches_all_its_sockets_causes_a_warning() {
    for (first, second, warning) in [
        ("", "match = { protocol = \"tcp\" }", true),
        ("", "", true),
        ("match = { protocol = \"tcp\" }", "", false),
        ("match = { protocol = [\"tcp\", \"udp\"] }", "match = { protocol = \"tcp\", family = \"ipv4\" }", true),
        ("match = { remote = \"10.0.0.0/8\" }", "match = { remote = [\"10.1.0.0/16\", \"10.2.0.1\"] }", true),
        ("match = { remote = \"10.1.0.0/16\" }", "match = { remote = \"10.0.0.0/8\" }", false),
        ("match = { not_remote = \"10.1.0.0/16\" }", "match = { not_remote = \"10.0.0.0/8\" }", true),
        ("match = { not_remote = \"10.0.0.0/8\" }", "match = { remote = \"192.0.2.0/24\" }", false),
        ("match = { local_port = \"1-1023\" }", "match = { local_port = [80, \"400-500\"] }", true),
        ("match = { local_port = 80 }", "match = { local_port = [80, 443] }", false),
        ("match = { direction = \"inbound\" }", "match = { direction = \"outbound\" }", false),
    ] {
        let rule = |name: &str, selector: &str| {
            format!("[[rule]]\nname = \"{name}\"\n{selector}\nset = {{ TCP_NODELAY = true }}\n")
        };
        let text = format!("{}{}", rule("first", first), rule("second", second));
        let messages = warned(&text);
        let expected = "rule `second` can never win: rule `first` on line 1 decides all of its options";
        assert_eq!(messages, if warning { vec![expected] } else { vec![] }, "{text}");
    }
}

#[test]
fn options_that_a_rule_cannot_win_cause_warnings() {
    let text = "[[rule]]\nset = { SO_MARK = 1 }\n\n[[rule]]\nname = \"b\"\nset = { SO_MARK = 2, SO_RCVLOWAT = 1 }\n";
    assert_eq!(warned(text), ["rule `b` can never win SO_MARK: rule `rule-1` on line 1 decides it"]);
    let text = "[[rule]]\nset = { SO_MARK = 1 }\n[[rule]]\nset = { SO_RCVLOWAT = 2 }\n
        [[rule]]\nset = { SO_MARK = 2, SO_RCVLOWAT = 1 }\n";
    assert_eq!(warned(text), ["rule `rule-3` can never win: earlier rules decide all of its options"]);
}

#[test]
fn rule_may_use_two_names_of_a_value_if_the_settings_are_equal() {
    for rule in [
        "deny = [\"SO_BINDTODEVICE\", \"SO_BINDTOIFINDEX\"]",
        "limit = { SO_SNDBUF = { max = \"64KiB\" }, SO_SNDBUFFORCE = { max = \"64KiB\" } }",
    ] {
        assert_eq!(parsed(&format!("[[rule]]\n{rule}\n")).rules[0].clauses.len(), 2, "{rule}");
    }
}

#[test]
fn settings_that_the_host_cannot_apply_cause_warnings() {
    let locked = |destination: &str, control: Option<&str>| lint::LockedRoute {
        destination: destination.to_owned(),
        congestion_control: control.map(str::to_owned),
    };
    let host = lint::Host {
        congestion_controls: Some(vec!["reno".to_owned(), "cubic".to_owned()]),
        locked_routes: vec![locked("10.0.0.0/8", Some("reno")), locked("default", None)],
        wmem_max: Some(4096),
        rmem_max: None,
    };
    let found = |set: &str| {
        let policy = parsed(&format!("[[rule]]\n{set}\n"));
        lint::on_host(&[policy], &host).into_iter().map(|found| found.message).collect::<Vec<_>>()
    };
    assert_eq!(
        found("set = { TCP_CONGESTION = \"cubicc\" }"),
        [
            "congestion control `cubicc` is not loaded on this host, which has reno, cubic",
            "connections over routes that lock another congestion control do not get `cubicc`: 10.0.0.0/8, and 1 more",
        ]
    );
    assert_eq!(
        found("set = { TCP_CONGESTION = \"reno\" }"),
        ["connections over routes that lock another congestion control do not get `reno`: default"],
    );
    let clamped =
        |wanted| vec![format!("net.core.wmem_max limits SO_SNDBUF to \"4KiB\" on this host: \"{wanted}\" is more")];
    assert_eq!(found("set = { SO_SNDBUF = \"8KiB\" }"), clamped("8KiB"));
    assert_eq!(found("limit = { SO_SNDBUF = { min = \"5KiB\" } }"), clamped("5KiB"));
    for fine in [
        "set = { SO_SNDBUF = \"4KiB\" }",
        "limit = { SO_SNDBUF = { max = \"8KiB\" } }",
        "set = { SO_RCVBUF = \"512MiB\" }",
    ] {
        assert_eq!(found(fine), Vec::<String>::new(), "{fine}");
    }
}

#[test]
fn settings_that_are_applied_too_late_cause_warnings() {
    let rule = |selector: &str, set: &str| warned(&format!("[[rule]]\nmatch = {{ {selector} }}\nset = {{ {set} }}\n"));
    let never = |option, what| {
        vec![format!("{option} is never set by this rule: it takes effect before {what} of a socket is known")]
    };
    let none: Vec<String> = Vec::new();
    let (peer, direction) = ("the peer", "the direction");
    assert_eq!(rule("remote = \"10.0.0.0/8\"", "TCP_SAVE_SYN = 1"), never("TCP_SAVE_SYN", peer));
    assert_eq!(
        rule("direction = \"outbound\"", "TCP_SAVE_SYN = 1"),
        ["TCP_SAVE_SYN has no effect on outbound sockets, and this rule matches no others"]
    );
    assert_eq!(rule("local_port = 80", "TCP_SAVE_SYN = 1"), none);
    assert_eq!(rule("direction = \"inbound\"", "SO_REUSEADDR = true"), never("SO_REUSEADDR", direction));
    assert_eq!(rule("local_port = 80", "SO_REUSEADDR = true"), none);
    let late = |option, what| {
        vec![format!("{option} is set too late for accepted connections: when their peer is known, {what}")]
    };
    let scale = "the window scale has been negotiated";
    assert_eq!(rule("remote_port = 443", "SO_RCVBUF = 4096"), late("SO_RCVBUF", scale));
    assert_eq!(rule("remote_port = 443, direction = \"outbound\"", "SO_RCVBUF = 4096"), none);
    assert_eq!(rule("remote_port = 443, protocol = \"udp\"", "SO_RCVBUF = 4096"), none);
    assert_eq!(
        rule("remote_port = 443", "TCP_MAXSEG = 1000"),
        late("TCP_MAXSEG", "the peer has received the segment size")
    );
    assert_eq!(rule("remote_port = 443", "TCP_NODELAY = true"), none);
}

#[test]
fn options_and_networks_that_no_socket_of_a_rule_has_cause_warnings() {
    let rule = |selector: &str, option: &str| format!("[[rule]]\nmatch = {{ {selector} }}\n{option}\n");
    let nodelay = "set = { TCP_NODELAY = true }";
    assert_eq!(
        warned(&rule("protocol = \"udp\"", nodelay)),
        ["TCP_NODELAY is for TCP sockets, and this rule matches none"]
    );
    assert_eq!(
        warned(&rule("family = \"ipv6\"", "set = { IP_TOS = \"EF\" }")),
        ["IP_TOS is for IPv4 sockets, and this rule matches none"]
    );
    assert_eq!(
        warned(&rule("family = \"ipv6\", remote = \"10.0.0.0/8\"", nodelay)),
        ["this rule matches no socket: `family` is \"ipv6\" and `remote` is IPv4"]
    );
    assert_eq!(warned(&rule("protocol = \"udp\"", "deny = [\"TCP_NODELAY\"]")), Vec::<String>::new());
}

#[test]
fn warning_shows_the_rule_and_help() {
    let text = "[[rule]]\nset = { SO_MARK = 1 }\n\n[[rule]]\nname = \"b\"\nset = { SO_MARK = 2 }\n";
    let (_, warnings) = sources::parse(Path::new("web.toml"), text).unwrap();
    assert_eq!(
        render(&warnings, Style::Plain),
        "warning: rule `b` can never win: rule `rule-1` on line 1 decides all of its options
 --> web.toml:4:1
  |
4 | [[rule]]
  | ^^^^^^^^
  |
  = help: the first rule that matches wins: move this one above line 1
"
    );
}

#[test]
fn mark_bits_that_other_software_uses_cause_warnings() {
    let of_mark = |mark: &str| warned(&format!("[[rule]]\nset = {{ SO_MARK = {mark} }}\n"));
    for free in ["32", "\"0x20/0xff\"", "\"0x1000/0x1000\"", "\"0/0xff00\""] {
        assert!(of_mark(free).is_empty(), "{free}");
    }
    for (mark, users) in [
        ("\"0x4000/0xffff\"", "Kubernetes (kube-proxy) (0x4000)"),
        ("\"0x40100/0x40100\"", "Cilium (0x100), Tailscale (0x40000), Calico (0x40000)"),
        ("1337", "Istio (0x539), Cilium (0x500)"),
    ] {
        assert_eq!(of_mark(mark), [format!("this mark has bits that other software uses: {users}")], "{mark}");
    }
}

/// Returns the root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the files with this extension below a directory of the repository.
fn files_below(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut files = Vec::new();
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            files.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|it| it == extension) {
            files.push(path);
        }
    }
    files
}

#[test]
fn each_policy_of_the_repository_loads_without_a_warning() {
    let [policies, examples] = ["policies", "examples"].map(|folder| files_below(&root().join(folder), "toml"));
    assert!(!policies.is_empty() && !examples.is_empty(), "there are no policies in policies/ or examples/");
    for file in policies.into_iter().chain(examples) {
        let (_, warnings) = sources::load(&file).unwrap_or_else(|errors| panic!("{errors}"));
        assert!(warnings.is_empty(), "{}", render(&warnings, Style::Plain));
    }
}

#[test]
fn each_policy_of_the_repository_has_tests_that_pass() {
    for file in files_below(&root().join("policies"), "toml") {
        let (policy, _) = sources::load(&file).unwrap();
        let policies = [policy];
        let trials = try_all(&policies).unwrap();
        assert!(!trials.is_empty(), "{} has no [[test]]", file.display());
        for trial in trials {
            assert!(trial.passed(), "{trial}");
        }
    }
}

#[test]
fn each_policy_in_the_documents_loads() {
    let mut documents = vec![root().join("README.md")];
    for directory in ["docs", "examples", "policies"] {
        documents.extend(files_below(&root().join(directory), "md"));
    }
    let mut wrong = String::new();
    for document in documents {
        let text = fs::read_to_string(&document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
        for (line, block) in policies_in(&text) {
            let name = format!("{}:{line}.toml", document.display());
            // A block's name is not a valid policy name, and examples may leave the name out.
            let named = if block.contains("name = ") { block } else { format!("name = \"example\"\n{block}") };
            match sources::parse(Path::new(&name), &named) {
                Err(errors) => wrong.push_str(&errors.to_string()),
                Ok((policy, _)) => {
                    let failed = try_all(&[policy]).unwrap().into_iter().filter(|trial| !trial.passed());
                    wrong.extend(failed.map(|trial| trial.to_string()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "a part of a policy begins with ```toml fragment\n{wrong}");
}

#[test]
fn reference_is_generated_from_the_code() {
    let page = fs::read_to_string(root().join("docs/reference.md")).unwrap();
    assert!(page == reference(), "docs/reference.md is not up to date: run `make docs`");
}

/// Returns the policies among the blocks of a Markdown text, with the lines where they begin.
fn policies_in(text: &str) -> Vec<(usize, String)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let Some(info) = line.trim_start().strip_prefix("```") else { continue };
        let block: Vec<_> =
            lines.by_ref().map(|(_, line)| line).take_while(|line| line.trim_start() != "```").collect();
        if matches!(info.trim(), "toml" | "toml policy") {
            blocks.push((at + 2, block.join("\n") + "\n"));
        }
    }
    blocks
}

#[test]
fn policies_are_distinguished_from_other_blocks_by_their_first_line() {
    let text = "a\n```toml\nx\n```\n```sh\n```\n  ```toml policy\ny\nz\n  ```\n```toml fragment\nw\n```\n";
    assert_eq!(policies_in(text), [(3, "x\n".to_owned()), (8, "y\nz\n".to_owned())]);
}

/// Pieces of valid and invalid policies.
const PIECES: &[&str] = &[
    "[[rule]]",
    "[rule]",
    "[target]",
    "target.container",
    "[audit]",
    "\n",
    "\r\n",
    " = ",
    "\"",
    "'",
    "\"\"\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ".",
    "#",
    "\\u0000",
    "set",
    "limit",
    "deny",
    "match",
    "errno",
    "name",
    "image",
    "id",
    "value",
    "min",
    "max",
    "rule",
    "rule.set",
    "true",
    "-1",
    "99999999999999999999",
    "1e9",
    "nan",
    "0x1F",
    "1979-05-27",
    "\"\"",
    "\"-\"",
    "\"/\"",
    "\"0/0\"",
    "\"1bit\"",
    "\"-9223372036854775808h\"",
    "\"::ffff:0:0/95\"",
    "\"1.2.3.4/5\"",
    "\"65535-0\"",
    "SO_MARK",
    "TCP_CONGESTION",
    "IP_TOS",
    "SO_LINGER",
    "\"6:99\"",
    "\u{feff}",
    "é",
    "\u{202e}",
    "\0",
];

#[derive(Clone, Debug)]
enum Mutation {
    Insert(&'static str),
    Remove(usize),
    Repeat(usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        prop::sample::select(PIECES).prop_map(Mutation::Insert),
        (1_usize..40).prop_map(Mutation::Remove),
        (1_usize..200).prop_map(Mutation::Repeat),
    ]
}

fn mutate(text: &mut String, at: &prop::sample::Index, mutation: &Mutation) {
    let at = text.floor_char_boundary(at.index(text.len() + 1));
    let end = |text: &str, length: usize| text.ceil_char_boundary((at + length).min(text.len()));
    match mutation {
        Mutation::Insert(piece) => text.insert_str(at, piece),
        Mutation::Remove(length) => text.replace_range(at..end(text, *length), ""),
        Mutation::Repeat(length) => {
            let piece = text[at..end(text, *length)].to_owned();
            text.insert_str(at, &piece);
        }
    }
}

/// Parses a text and renders all findings.
fn survives(text: &str) {
    let messages = match sources::parse(Path::new("web.toml"), text) {
        Ok((_, warnings)) => render(&warnings, Style::Plain),
        Err(errors) => {
            assert!(errors.count() > 0, "refused without an error: {text}");
            assert!(!errors.render(Style::Coloured).is_empty());
            errors.render(Style::Plain)
        }
    };
    assert!(!messages.contains('\u{202e}'), "{messages:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_policies_are_parsed_without_panic(
        mutations in prop::collection::vec((any::<prop::sample::Index>(), mutation()), 1..8)
    ) {
        let mut text = EVERYTHING.to_owned();
        for (at, mutation) in &mutations {
            mutate(&mut text, at, mutation);
        }
        survives(&text);
    }

    #[test]
    fn any_text_is_parsed_without_panic(text: String) {
        survives(&text);
    }

    #[test]
    fn any_value_is_parsed_without_panic(
        option in prop::sample::select(OPTIONS),
        value in prop::sample::select(PIECES),
        number: i64,
    ) {
        let name = option.name;
        survives(&format!("[[rule]]\nset = {{ {name} = {value} }}\n"));
        survives(&format!("[[rule]]\nset = {{ {name} = {number} }}\n"));
        survives(&format!("[[rule]]\nlimit = {{ {name} = {{ min = {value}, max = {number} }} }}\n"));
    }
}
