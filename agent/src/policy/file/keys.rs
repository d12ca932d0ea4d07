//! Which keys go into which table of a policy file, and where one belongs that is not where it should be.

use super::Text;
use crate::{
    options,
    policy::diagnostic::{Problem, list_of, nearest, quote},
};

/// A table with keys of its own.
#[derive(Debug)]
pub(crate) struct Place {
    /// After "in", for people; empty for the top of the file.
    name: &'static str,
    keys: &'static [&'static str],
}

pub(super) const TOP: Place =
    Place { name: "", keys: &["name", "description", "mode", "target", "audit", "rule", "test"] };
pub(super) const TARGET: Place = Place { name: "[target]", keys: &["cgroup", "container"] };
pub(super) const CONTAINER: Place = Place { name: "`container`", keys: &["name", "image", "id", "runtime"] };
pub(super) const AUDIT: Place = Place { name: "[audit]", keys: &["calls", "reads", "timing"] };
pub(super) const RULE: Place =
    Place { name: "[[rule]]", keys: &["name", "match", "set", "limit", "deny", "on_conflict", "errno"] };
pub(super) const MATCH: Place = Place {
    name: "`match`",
    keys: &["protocol", "family", "direction", "local", "remote", "not_remote", "local_port", "remote_port"],
};
pub(super) const TEST: Place = Place { name: "[[test]]", keys: &["name", "socket", "set", "limit", "deny", "free"] };
pub(crate) const SOCKET: Place =
    Place { name: "`socket`", keys: &["protocol", "family", "direction", "local", "remote", "cgroup"] };
pub(super) const SETTING: Place = Place { name: "a setting", keys: &["value", "on_conflict", "errno"] };
pub(super) const LIMIT: Place = Place { name: "a limit", keys: &["min", "max", "on_conflict", "errno"] };

impl Place {
    pub(crate) fn keys(&self) -> &'static [&'static str] {
        self.keys
    }
}

/// An error that says what to do with the key instead.
pub(super) fn unknown_key(key: &Text<'_>, place: &Place) -> Problem {
    let word = key.get_ref().as_ref();
    let place_name = if place.name.is_empty() { String::new() } else { format!(" in {}", place.name) };
    let problem = Problem::new(format!("unknown key {}{place_name}", quote(word))).at(key.span());
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
    match nearest(word, place.keys.iter().copied()) {
        Some(near) => problem.help(format!("did you mean {}?", quote(near))),
        None => problem.help(match place.keys {
            [only] => format!("the only key here is {}", quote(only)),
            keys => {
                let keys: Vec<_> = keys.iter().map(|key| quote(key)).collect();
                format!("the keys here are {}", list_of(&keys, "and"))
            }
        }),
    }
}
