//! What would change if other policies replaced those in force: two [`Snapshot`]s → [`Change`]s.
//!
//! Pure: both snapshots are made from compiled policies.

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

/// The effects of policies, in a form that can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    attached: BTreeSet<(String, Hook)>,
    /// The settings, by cgroup, policy, rule and option.
    settings: BTreeMap<SettingId, SettingView>,
}

/// What a setting wants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SettingView {
    wanted: String,
    /// The sockets that the rule matches, the answer to conflicting calls, and the precedence of the rule. Compared but
    /// not shown.
    conditions: String,
}

/// Identifies a setting and the cgroup that it applies to.
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
    Detach {
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
    /// Same value, but other sockets, another answer to conflicting calls, or another precedence.
    Condition {
        place: SettingId,
        wanted: String,
    },
}

impl Snapshot {
    /// Returns the snapshot of policies on targets: names of cgroups with the indices of their scopes.
    #[must_use]
    pub fn of(desired: &Desired, targets: &[(String, usize)]) -> Self {
        let mut snapshot = Self::default();
        for (cgroup, number) in targets {
            let Some(scope) = desired.scopes.get(*number) else { continue };
            snapshot.attached.extend(scope.hooks.iter().map(|hook| (cgroup.clone(), *hook)));
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
                snapshot.settings.insert(place, SettingView { wanted: format!("{wanted}{mode}"), conditions });
            }
        }
        snapshot
    }
}

/// Returns the changes from `before` to `after`, in the order in which a reload makes them: attach, change settings,
/// detach.
#[must_use]
pub fn changes(before: &Snapshot, after: &Snapshot) -> Vec<Change> {
    let attach = after.attached.difference(&before.attached);
    let attach = attach.map(|(cgroup, hook)| Change::Attach { hook: *hook, cgroup: cgroup.clone() });
    let removed = before.settings.iter().filter(|(place, _)| !after.settings.contains_key(place));
    let removed = removed.map(|(place, was)| Change::Remove { place: place.clone(), was: was.wanted.clone() });
    let others = after.settings.iter().filter_map(|(place, changed)| {
        let (place, wanted) = (place.clone(), changed.wanted.clone());
        match before.settings.get(&place) {
            None => Some(Change::Add { place, wanted }),
            Some(was) if was == changed => None,
            Some(was) if was.wanted == wanted => Some(Change::Condition { place, wanted }),
            Some(was) => Some(Change::Alter { place, was: was.wanted.clone(), wanted }),
        }
    });
    let detach = before.attached.difference(&after.attached);
    let detach = detach.map(|(cgroup, hook)| Change::Detach { hook: *hook, cgroup: cgroup.clone() });
    attach.chain(removed).chain(others).chain(detach).collect()
}

impl Change {
    /// Returns the change as a JSON object.
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
            Self::Detach { hook, cgroup } => {
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
            Self::Detach { hook, cgroup } => write!(f, "detach {hook} from {}", cgroup.escaped()),
            Self::Add { place, wanted } => write!(f, "+ {} = {wanted}  ({place})", place.option),
            Self::Remove { place, was } => write!(f, "- {} = {was}  ({place})", place.option),
            Self::Alter { place, was, wanted } => write!(f, "~ {} = {was} -> {wanted}  ({place})", place.option),
            Self::Condition { place, wanted } => {
                write!(f, "~ {} = {wanted}: changed match, precedence, on_conflict or errno  ({place})", place.option)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{compile::compile, policy};

    fn snapshot(rules: &str, targets: &[&str]) -> Snapshot {
        let policy = policy::parse(Path::new("web.toml"), rules).unwrap().0;
        let desired = compile(&[policy], &[vec![0]]).unwrap();
        Snapshot::of(&desired, &targets.iter().map(|target| ((*target).to_owned(), 0)).collect::<Vec<_>>())
    }

    fn changed(before: &Snapshot, after: &Snapshot) -> Vec<String> {
        changes(before, after).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_differences_are_listed() {
        let before = snapshot("[[rule]]\nname = \"r\"\nset = { SO_MARK = 1, TCP_NODELAY = true }\n", &["/a"]);
        let after = snapshot("[[rule]]\nname = \"r\"\nset = { SO_MARK = 2, TCP_KEEPCNT = 3 }\n", &["/a"]);
        assert_eq!(changed(&before, &before), [""; 0]);
        assert_eq!(
            changed(&before, &after),
            [
                "- TCP_NODELAY = true  (web, rule r, on /a)",
                "~ SO_MARK = 0x1 -> 0x2  (web, rule r, on /a)",
                "+ TCP_KEEPCNT = 3  (web, rule r, on /a)",
            ]
        );
    }

    #[test]
    fn changed_conditions_are_listed() {
        let rule = |more: &str| format!("[[rule]]\nname = \"r\"\nset = {{ SO_MARK = 1 }}\n{more}");
        let changed = changed(&snapshot(&rule(""), &["/a"]), &snapshot(&rule("on_conflict = \"deny\"\n"), &["/a"]));
        let expected = "~ SO_MARK = 0x1: changed match, precedence, on_conflict or errno  (web, rule r, on /a)";
        assert_eq!(changed, [expected]);
    }

    #[test]
    fn programs_are_attached_to_new_targets_and_detached_from_old_ones() {
        let rules =
            "[audit]\nreads = false\n[[rule]]\nname = \"r\"\nmatch = { protocol = \"udp\" }\ndeny = [\"SO_MARK\"]\n";
        assert_eq!(
            changed(&snapshot(rules, &["/a"]), &snapshot(rules, &["/b"])),
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
