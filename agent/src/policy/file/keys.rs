//! The keys of each table of a policy file, and the errors for misplaced keys.

use super::Text;
use crate::{
    options,
    policy::diagnostic::{Problem, list_of, nearest, quote},
};

/// A table with its own keys.
#[derive(Debug)]
pub(crate) struct Section {
    /// The name after "in" in messages; empty for the top of the file.
    name: &'static str,
    keys: &'static [&'static str],
}

pub(super) const TOP: Section =
    Section { name: "", keys: &["name", "description", "mode", "target", "audit", "rule", "test"] };
pub(super) const TARGET: Section = Section { name: "[target]", keys: &["cgroup", "container"] };
pub(super) const CONTAINER: Section = Section { name: "`container`", keys: &["name", "image", "id", "runtime"] };
pub(super) const AUDIT: Section = Section { name: "[audit]", keys: &["calls", "reads", "timing"] };
pub(super) const RULE: Section =
    Section { name: "[[rule]]", keys: &["name", "match", "set", "limit", "deny", "free", "on_conflict", "errno"] };
pub(super) const MATCH: Section = Section {
    name: "`match`",
    keys: &["protocol", "family", "direction", "local", "remote", "not_remote", "local_port", "remote_port"],
};
pub(super) const TEST: Section =
    Section { name: "[[test]]", keys: &["name", "socket", "set", "limit", "deny", "free"] };
pub(crate) const SOCKET: Section =
    Section { name: "`socket`", keys: &["protocol", "family", "direction", "local", "remote", "cgroup"] };
pub(super) const SETTING: Section = Section { name: "a setting", keys: &["value", "on_conflict", "errno"] };
pub(super) const LIMIT: Section = Section { name: "a limit", keys: &["min", "max", "on_conflict", "errno"] };

impl Section {
    pub(crate) fn keys(&self) -> &'static [&'static str] {
        self.keys
    }
}

/// Returns an error with help about what to do with the key.
pub(super) fn unknown_key(key: &Text<'_>, section: &Section) -> Problem {
    let word = key.get_ref().as_ref();
    let context = if section.name.is_empty() { String::new() } else { format!(" in {}", section.name) };
    let problem = Problem::new(format!("unknown key {}{context}", quote(word))).at(key.span());
    if TOP.keys.contains(&word) {
        return problem.help(format!("move {} to the top of the file, above every [section]", quote(word)));
    }
    if let Some(home) = [TARGET, CONTAINER, AUDIT, MATCH].iter().find(|home| home.keys.contains(&word)) {
        return problem.help(format!("{} goes into {}", quote(word), home.name));
    }
    if options::by_name(word).is_some() {
        return problem.help("options go under `set`, `limit` or `deny` of a [[rule]]");
    }
    if RULE.keys.contains(&word) {
        return problem.help(format!("{} goes into a [[rule]]", quote(word)));
    }
    match nearest(word, section.keys.iter().copied()) {
        Some(near) => problem.help(format!("did you mean {}?", quote(near))),
        None => problem.help(match section.keys {
            [only] => format!("the only key here is {}", quote(only)),
            keys => {
                let keys: Vec<_> = keys.iter().map(|key| quote(key)).collect();
                format!("the keys here are {}", list_of(&keys, "and"))
            }
        }),
    }
}
