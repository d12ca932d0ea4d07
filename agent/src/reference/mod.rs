//! Writes the reference of the policy language and of every option, docs/reference.md, as Markdown.
//!
//! Words, kinds of values and all facts about options come from the tables of the code. A test compares the file with
//! the output of this module.

use std::fmt::Write as _;

use abi::{
    apply_point,
    setting::{OptionKey, ROOM_ALWAYS, argument, effective, kind},
};

use crate::{
    limitations::{self, Limitation},
    options::{self, Class, GUARDS, Level, OPTIONS, Relation, SocketOption, ValueKind},
    policy::{
        model::{Direction, Family, Protocol},
        units, words,
    },
};

const LANGUAGE: &str = include_str!("language.md");

/// Returns the whole page.
#[must_use]
pub fn reference() -> String {
    let mut page = language();
    page.push_str(
        "\n## Options that can be set\n\nIn the order in which they are applied. *Since* is the first kernel known to let \
         programs set the option. `sockpolicy doctor` probes what the running kernel supports.\n",
    );
    for option in OPTIONS.iter().filter(|option| option.settable().is_some()) {
        describe(&mut page, option);
    }
    page.push_str("\n## Options that can be limited or denied\n\n");
    table(&mut page, |option| option.class == Class::Guardable);
    page.push_str("\n## Options that can be denied\n\nApplications can only read these options: the kernel refuses calls that set them.\n\n");
    table(&mut page, |option| option.class == Class::ReadOnly);
    page
}

fn language() -> String {
    let settable = OPTIONS.iter().filter(|option| option.settable().is_some()).count();
    let replaced = [
        ("{modes}", words::list(words::MODES)),
        ("{calls}", words::list(words::CALLS)),
        ("{actions}", words::list(words::ON_CONFLICT)),
        ("{runtimes}", words::list(words::RUNTIMES)),
        ("{protocols}", words::list(Protocol::WORDS)),
        ("{families}", words::list(Family::WORDS)),
        ("{directions}", words::list(Direction::WORDS)),
        ("{socket_keys}", words::socket_keys()),
        ("{settable}", settable.to_string()),
        ("{kinds}", kinds()),
        ("{unsupported}", unsupported()),
    ];
    replaced.into_iter().fold(LANGUAGE.to_owned(), |text, (mark, words)| text.replace(mark, &words))
}

/// Returns a table of the kinds of values.
fn kinds() -> String {
    let kinds = [
        ("boolean", ValueKind::Bool),
        ("number", ValueKind::Int),
        ("time", ValueKind::Seconds),
        ("size", ValueKind::Bytes),
        ("rate", ValueKind::Rate),
        ("DSCP", ValueKind::Dscp),
        ("mark", ValueKind::Mark),
        ("congestion control", ValueKind::CongestionControl),
        ("device", ValueKind::Device),
    ];
    let rows: Vec<_> = kinds.iter().map(|(name, kind)| format!("| {name} | {} |", kind.describe())).collect();
    rows.join("\n")
}

/// Returns a table of the limitations.
fn unsupported() -> String {
    let row = |entry: &&Limitation| format!("| {} | {} | {} | {} |", entry.name, entry.of, entry.what, entry.why);
    limitations::ALL.iter().map(row).collect::<Vec<_>>().join("\n")
}

fn describe(page: &mut String, option: &'static SocketOption) {
    let Some(settable) = option.settable() else { return };
    let mut line = |text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(page, "{text}");
    };
    line(format!("\n### {}\n\n{}.\n", option.name, capitalized(option.about)));
    line(format!("```toml\n[[rule]]\nset = {{ {} = {} }}\n```\n", option.name, option.example));
    line(format!("- number: {} {}", level(option.level), option.number));
    line(format!("- value: {}", value(option)));
    line(format!("- since: {}", settable.since));
    line(format!("- set: {}", places(option)));
    if option.can_be_limited() {
        line("- can be limited".to_owned());
    }
    for fact in facts(option) {
        line(format!("- {fact}"));
    }
    if let Some(negotiated) = option.negotiated {
        line(format!("- a rule about the peer sets it too late for accepted connections: {negotiated}"));
    }
}

/// Returns facts about how the kernel reads an option, in addition to its range.
fn facts(option: &'static SocketOption) -> Vec<String> {
    let mut facts = vec![format!("read by {}; {}", option.handler(), lengths(option))];
    for (value, effective) in [("0", option.zero), ("a negative number", option.negative)] {
        if let Some(meaning) = meaning(option, effective) {
            facts.push(format!("a limit compares {value} as {meaning}"));
        }
    }
    let others: Vec<_> =
        option.spellings().filter(|(key, _)| *key != option.key()).map(|(key, _)| spelling(key)).collect();
    if !others.is_empty() {
        facts.push(format!("other names of the value, to which the same rules apply: {}", others.join(", ")));
    }
    for guard in GUARDS.iter().filter(|guard| guard.keeps == option.name) {
        facts.push(match guard.kind {
            kind::OPAQUE => format!("a rule that denies it also denies {}", guard.option),
            kind::ROOM => format!(
                "the kernel enlarges it for {0}: a limit of it also limits {0} on TCP sockets, and a rule that denies it also \
                 denies {0} above {ROOM_ALWAYS}",
                guard.option
            ),
            _ => format!("a rule for it also applies to {}", guard.option),
        });
    }
    if let Some(Relation::Resets(other)) = option.relation {
        let otherwise = if option.name == "IP_TOS" { ", or the call fails or has no effect" } else { "" };
        facts
            .push(format!("the kernel resets {other} with it: if a rule covers {other}, its value is kept{otherwise}"));
    }
    facts
}

fn spelling(key: OptionKey) -> String {
    options::by_key(key).map_or_else(|| format!("{}:{}", key.level, key.name), |option| option.name.to_owned())
}

/// Returns what a limit compares in place of a value; `None` for the value itself.
fn meaning(option: &SocketOption, effective: i64) -> Option<String> {
    Some(match effective {
        effective::SAME => return None,
        effective::UNCERTAIN => "beyond any bound: its meaning differs between kernels".to_owned(),
        i64::MAX => "more than any bound".to_owned(),
        number if number >= i64::from(i32::MAX) => "more than any bound".to_owned(),
        number => units::show(option.value, number),
    })
}

fn lengths(option: &SocketOption) -> &'static str {
    match (option.value.abi_kind(), option.argument) {
        (kind::OPAQUE, _) => "policies do not read the argument",
        (kind::TEXT, _) => "up to 15 bytes, terminated by NUL or by the length",
        (kind::LINGER, _) => "8 bytes or more",
        (kind::TIMEVAL, _) => "16 bytes or more",
        (_, argument::BYTE) => "4 bytes or more, or one byte; an empty argument is 0",
        (_, argument::BYTE_REQUIRED) => "4 bytes or more, or one byte",
        (_, argument::INT_OR_ZERO) => "4 bytes or more; a shorter argument is 0",
        (_, argument::INT_EXACT) => "exactly 4 bytes",
        (_, argument::RATE) => "4 bytes, or 64 bits in 8 bytes or more",
        _ => "4 bytes or more",
    }
}

fn table(page: &mut String, is_included: impl Fn(&SocketOption) -> bool) {
    page.push_str(
        "| option | number | value | what it does | how the kernel reads it |\n| --- | --- | --- | --- | --- |\n",
    );
    for option in OPTIONS.iter().filter(|option| is_included(option)) {
        let number = format!("{} {}", level(option.level), option.number);
        let [about, facts] = [option.about.to_owned(), facts(option).join("; ")].map(|text| text.replace('|', "\\|"));
        // Writing to a string does not fail.
        let _ = writeln!(page, "| {} | {number} | {} | {about} | {facts} |", option.name, value(option));
    }
}

fn level(level: Level) -> String {
    level.name().map_or_else(|| level.0.to_string(), str::to_owned)
}

fn value(option: &SocketOption) -> String {
    if !option.can_be_limited() {
        return option.value.describe().to_owned();
    }
    let [min, max] = [option.range.0, option.range.1].map(|bound| units::show_literal(option.value, bound));
    format!("{}, from {min} to {max}", option.value.describe())
}

/// Returns when the option is set, in words.
fn places(option: &SocketOption) -> String {
    const WORDS: &[(&[u32], &str)] = &[
        (&[apply_point::SOCK_CREATE], "at socket creation"),
        (&[apply_point::POST_CREATE], "at creation of a socket other than TCP, if the BPF LSM is active"),
        (&[apply_point::BIND_STREAM, apply_point::BIND_DATAGRAM], "at bind"),
        (&[apply_point::CONNECT_STREAM, apply_point::CONNECT_DATAGRAM], "at connect, before the route lookup"),
        (&[apply_point::SEND], "with the first datagram of a socket without a peer"),
        (&[apply_point::SYN], "before the SYN"),
        (&[apply_point::ACTIVE], "when an outbound connection is established"),
        (&[apply_point::LISTEN], "at listen"),
        (&[apply_point::PASSIVE], "when a connection is accepted"),
    ];
    let Some(settable) = option.settable() else { return String::new() };
    let at = |sites: &[u32]| sites.iter().any(|site| settable.sites.contains(*site));
    let words: Vec<_> = WORDS.iter().filter(|(sites, _)| at(sites)).map(|(_, words)| *words).collect();
    words.join("; ")
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}
