//! The reference of the language and of every option, as Markdown: docs/reference.md.
//!
//! What the code knows is not written down again: words, kinds of values and all facts about options come from where they are
//! defined. A test holds the file against this.

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

/// The whole page.
#[must_use]
pub fn reference() -> String {
    let mut page = language();
    page.push_str(
        "\n## Options that can be set\n\nIn the order in which they are applied. *Since* is the first kernel that is known to let \
         programs set the option; what this one can do `sockpolicy doctor` tries.\n",
    );
    for option in OPTIONS.iter().filter(|option| option.settable().is_some()) {
        describe(&mut page, option);
    }
    page.push_str("\n## Options that can be limited or denied\n\n");
    table(&mut page, |option| option.class == Class::Guardable);
    page.push_str("\n## Options that can be denied\n\nApplications can only read them; who tries to set one is refused by the kernel.\n\n");
    table(&mut page, |option| option.class == Class::ReadOnly);
    page
}

fn language() -> String {
    let settable = OPTIONS.iter().filter(|option| option.settable().is_some()).count();
    let replaced = [
        ("{modes}", words::of(words::MODES)),
        ("{calls}", words::of(words::CALLS)),
        ("{actions}", words::of(words::ON_CONFLICT)),
        ("{runtimes}", words::of(words::RUNTIMES)),
        ("{protocols}", words::of(Protocol::WORDS)),
        ("{families}", words::of(Family::WORDS)),
        ("{directions}", words::of(Direction::WORDS)),
        ("{socket_keys}", words::socket_keys()),
        ("{settable}", settable.to_string()),
        ("{kinds}", kinds()),
        ("{unsupported}", unsupported()),
    ];
    replaced.into_iter().fold(LANGUAGE.to_owned(), |text, (mark, words)| text.replace(mark, &words))
}

/// Each kind of value that an option has, with the options of that kind as examples.
fn kinds() -> String {
    let kinds = [
        ("switch", ValueKind::Bool),
        ("number", ValueKind::Int),
        ("time", ValueKind::Seconds),
        ("size", ValueKind::Bytes),
        ("rate", ValueKind::Rate),
        ("code point", ValueKind::Dscp),
        ("mark", ValueKind::Mark),
        ("congestion control", ValueKind::CongestionControl),
        ("device", ValueKind::Device),
    ];
    let rows: Vec<_> = kinds.iter().map(|(name, kind)| format!("| {name} | {} |", kind.describe())).collect();
    rows.join("\n")
}

/// What is not done.
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
        line(format!("- by a rule about the peer, too late for accepted connections: {negotiated} by then"));
    }
}

/// How the kernel reads an option, beyond its range.
fn facts(option: &'static SocketOption) -> Vec<String> {
    let mut facts = vec![format!("read by {}; {}", option.handler(), lengths(option))];
    for (value, effective) in [("0", option.zero), ("a negative number", option.negative)] {
        if let Some(meaning) = meaning(option, effective) {
            facts.push(format!("to a limit {value} is {meaning}"));
        }
    }
    let others: Vec<_> =
        option.spellings().filter(|(key, _)| *key != option.key()).map(|(key, _)| spelling(key)).collect();
    if !others.is_empty() {
        facts.push(format!("other names of the same value, which the same rules govern: {}", others.join(", ")));
    }
    for guard in GUARDS.iter().filter(|guard| guard.keeps == option.name) {
        facts.push(match guard.kind {
            kind::OPAQUE => format!("a rule that denies it also denies {}", guard.option),
            kind::ROOM => format!(
                "the kernel enlarges it for {0}: a limit of it also limits {0} on TCP sockets, and a rule that denies it also \
                 denies {0} above {ROOM_ALWAYS}",
                guard.option
            ),
            _ => format!("a rule for it also governs {}", guard.option),
        });
    }
    if let Some(Relation::Resets(other)) = option.relation {
        let otherwise = if option.name == "IP_TOS" { ", or the call fails or does nothing" } else { "" };
        facts.push(format!(
            "the kernel resets {other} with it: where a rule governs {other}, the value stays{otherwise}"
        ));
    }
    facts
}

fn spelling(key: OptionKey) -> String {
    options::by_key(key).map_or_else(|| format!("{}:{}", key.level, key.name), |option| option.name.to_owned())
}

/// What a value stands for; `None`: for itself.
fn meaning(option: &SocketOption, effective: i64) -> Option<String> {
    Some(match effective {
        effective::SAME => return None,
        effective::UNCERTAIN => "beyond any bound: kernels differ in what they make of it".to_owned(),
        i64::MAX => "more than any bound".to_owned(),
        number if number >= i64::from(i32::MAX) => "more than any bound".to_owned(),
        number => units::show(option.value, number),
    })
}

fn lengths(option: &SocketOption) -> &'static str {
    match (option.value.abi_kind(), option.argument) {
        (kind::OPAQUE, _) => "policies do not read the argument",
        (kind::TEXT, _) => "up to 15 bytes, ended by NUL or by the length",
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

fn table(page: &mut String, is_meant: impl Fn(&SocketOption) -> bool) {
    page.push_str(
        "| option | number | value | what it does | how the kernel reads it |\n| --- | --- | --- | --- | --- |\n",
    );
    for option in OPTIONS.iter().filter(|option| is_meant(option)) {
        let number = format!("{} {}", level(option.level), option.number);
        let [about, facts] = [option.about.to_owned(), facts(option).join("; ")].map(|text| text.replace('|', "\\|"));
        // As above.
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

/// When the option is set, in words.
fn places(option: &SocketOption) -> String {
    const WORDS: &[(&[u32], &str)] = &[
        (&[apply_point::SOCK_CREATE], "when a socket is made"),
        (&[apply_point::POST_CREATE], "when a socket other than a TCP one is made, where the BPF LSM is active"),
        (&[apply_point::BIND_STREAM, apply_point::BIND_DATAGRAM], "at bind"),
        (&[apply_point::CONNECT_STREAM, apply_point::CONNECT_DATAGRAM], "at connect, before the route is looked up"),
        (&[apply_point::SEND], "with the first datagram of a socket without a peer"),
        (&[apply_point::SYN], "before the SYN"),
        (&[apply_point::ACTIVE], "when a connection that was made is there"),
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
