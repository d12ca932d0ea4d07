//! What would be different if other policies took the place of those in force: two [`Snapshot`] → [`Change`]s.
//!
//! Pure: both are told as they are compiled.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde_json::{Value, json};

use crate::{
    compile::{Desired, Hook},
    escape::Escape,
    policy::model::Mode,
    schema, values,
};

/// What policies come to, in words that can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    attached: BTreeSet<(String, Hook)>,
    /// By cgroup, policy, rule and option: what it is to be, and under which conditions.
    settings: BTreeMap<SettingId, SettingView>,
}

/// What a setting says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SettingView {
    wanted: String,
    /// Which sockets it is for, what becomes of calls that disagree, and which rules come first: not for people.
    conditions: String,
}

/// Where a setting holds, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SettingId {
    pub cgroup: String,
    pub policy: String,
    pub rule: String,
    pub option: String,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Attach {
        hook: Hook,
        cgroup: String,
    },
    LetGo {
        hook: Hook,
        cgroup: String,
    },
    Add {
        place: SettingId,
        wanted: String,
    },
    Remove {
        place: SettingId,
        was: String,
    },
    Alter {
        place: SettingId,
        was: String,
        wanted: String,
    },
    /// The same value, for other sockets, with another answer to calls, or after other rules.
    Condition {
        place: SettingId,
        wanted: String,
    },
}

impl Snapshot {
    /// Of policies on targets, which are names of cgroups with the numbers of their scopes.
    #[must_use]
    pub fn of(desired: &Desired, targets: &[(String, usize)]) -> Self {
        let mut held = Self::default();
        for (cgroup, number) in targets {
            let Some(scope) = desired.scopes.get(*number) else { continue };
            held.attached.extend(scope.hooks.iter().map(|hook| (cgroup.clone(), *hook)));
            let mut ranks = BTreeMap::new();
            for setting in desired.settings_of(*number) {
                let Some((source, rule)) = desired.source(setting as u32) else { continue };
                let place = SettingId {
                    cgroup: cgroup.clone(),
                    policy: rule.policy.clone(),
                    rule: rule.rule.clone(),
                    option: source.option.to_string(),
                };
                let wanted = values::form_text(source.option.key(), &source.form);
                let mode = if rule.mode == Mode::DryRun { " (dry run)" } else { "" };
                let row = desired.settings.get(setting);
                let rank: &mut u32 = ranks.entry(source.option.key()).or_default();
                *rank += 1;
                let conditions =
                    format!("{rank} {:?} {:?}", rule.selector, row.map(|row| (row.on_conflict, row.errno)));
                held.settings.insert(place, SettingView { wanted: format!("{wanted}{mode}"), conditions });
            }
        }
        held
    }
}

/// What there is to do to get from the one to the other: attach, then decide otherwise, then let go, as it is done.
#[must_use]
pub fn changes(before: &Snapshot, after: &Snapshot) -> Vec<Change> {
    let attach = after.attached.difference(&before.attached);
    let attach = attach.map(|(cgroup, hook)| Change::Attach { hook: *hook, cgroup: cgroup.clone() });
    let removed = before.settings.iter().filter(|(place, _)| !after.settings.contains_key(place));
    let removed = removed.map(|(place, was)| Change::Remove { place: place.clone(), was: was.wanted.clone() });
    let others = after.settings.iter().filter_map(|(place, said)| {
        let (place, wanted) = (place.clone(), said.wanted.clone());
        match before.settings.get(&place) {
            None => Some(Change::Add { place, wanted }),
            Some(was) if was == said => None,
            Some(was) if was.wanted == wanted => Some(Change::Condition { place, wanted }),
            Some(was) => Some(Change::Alter { place, was: was.wanted.clone(), wanted }),
        }
    });
    let let_go = before.attached.difference(&after.attached);
    let let_go = let_go.map(|(cgroup, hook)| Change::LetGo { hook: *hook, cgroup: cgroup.clone() });
    attach.chain(removed).chain(others).chain(let_go).collect()
}

impl Change {
    /// As a line of JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let setting = |step: &str, place: &SettingId, was: Option<&String>, wanted: Option<&String>| {
            let SettingId { cgroup, policy, rule, option } = place;
            schema::line(
                "plan",
                json!({
                    "step": step, "cgroup": cgroup, "policy": policy, "rule": rule, "option": option,
                    "old_setting": was, "new_setting": wanted,
                }),
            )
        };
        match self {
            Self::Attach { hook, cgroup } => {
                schema::line("plan", json!({ "step": "attach", "hook": hook.name(), "cgroup": cgroup }))
            }
            Self::LetGo { hook, cgroup } => {
                schema::line("plan", json!({ "step": "detach", "hook": hook.name(), "cgroup": cgroup }))
            }
            Self::Add { place, wanted } => setting("add", place, None, Some(wanted)),
            Self::Remove { place, was } => setting("remove", place, Some(was), None),
            Self::Alter { place, was, wanted } => setting("alter", place, Some(was), Some(wanted)),
            Self::Condition { place, wanted } => setting("condition", place, Some(wanted), Some(wanted)),
        }
    }
}

impl fmt::Display for SettingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cgroup, policy, rule, option: _ } = self;
        write!(f, "{}, rule {}, on {}", policy.escaped(), rule.escaped(), cgroup.escaped())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach { hook, cgroup } => write!(f, "attach {hook} to {}", cgroup.escaped()),
            Self::LetGo { hook, cgroup } => write!(f, "detach {hook} from {}", cgroup.escaped()),
            Self::Add { place, wanted } => write!(f, "+ {} = {wanted}  ({place})", place.option),
            Self::Remove { place, was } => write!(f, "- {} = {was}  ({place})", place.option),
            Self::Alter { place, was, wanted } => write!(f, "~ {} = {was} -> {wanted}  ({place})", place.option),
            Self::Condition { place, wanted } => {
                write!(
                    f,
                    "~ {} = {wanted}: for other sockets, after other rules, or else enforced  ({place})",
                    place.option
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{compile::compile, policy};

    fn held(rules: &str, targets: &[&str]) -> Snapshot {
        let policy = policy::parse(Path::new("web.toml"), rules).unwrap().0;
        let desired = compile(&[policy], &[vec![0]]).unwrap();
        Snapshot::of(&desired, &targets.iter().map(|target| ((*target).to_owned(), 0)).collect::<Vec<_>>())
    }

    fn said(before: &Snapshot, after: &Snapshot) -> Vec<String> {
        changes(before, after).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_what_is_different_is_said() {
        let before = held("[[rule]]\nname = \"r\"\nset = { SO_MARK = 1, TCP_NODELAY = true }\n", &["/a"]);
        let after = held("[[rule]]\nname = \"r\"\nset = { SO_MARK = 2, TCP_KEEPCNT = 3 }\n", &["/a"]);
        assert_eq!(said(&before, &before), [""; 0]);
        assert_eq!(
            said(&before, &after),
            [
                "- TCP_NODELAY = true  (web, rule r, on /a)",
                "~ SO_MARK = 0x1 -> 0x2  (web, rule r, on /a)",
                "+ TCP_KEEPCNT = 3  (web, rule r, on /a)",
            ]
        );
    }

    #[test]
    fn other_conditions_are_a_difference() {
        let rule = |more: &str| format!("[[rule]]\nname = \"r\"\nset = {{ SO_MARK = 1 }}\n{more}");
        let said = said(&held(&rule(""), &["/a"]), &held(&rule("on_conflict = \"deny\"\n"), &["/a"]));
        let expected = "~ SO_MARK = 0x1: for other sockets, after other rules, or else enforced  (web, rule r, on /a)";
        assert_eq!(said, [expected]);
    }

    #[test]
    fn programs_are_attached_where_a_target_is_new_and_detached_where_one_goes() {
        let rules =
            "[audit]\nreads = false\n[[rule]]\nname = \"r\"\nmatch = { protocol = \"udp\" }\ndeny = [\"SO_MARK\"]\n";
        assert_eq!(
            said(&held(rules, &["/a"]), &held(rules, &["/b"])),
            [
                "attach cgroup/sock_create to /b",
                "attach cgroup/setsockopt to /b",
                "- SO_MARK = denied  (web, rule r, on /a)",
                "+ SO_MARK = denied  (web, rule r, on /b)",
                "detach cgroup/sock_create from /a",
                "detach cgroup/setsockopt from /a",
            ]
        );
    }
}
