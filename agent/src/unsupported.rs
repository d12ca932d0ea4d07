//! What policies need and this kernel does not support.
//!
//! Pure: callers probe the kernel. Messages name kernel versions so that users know which kernel they need. Nothing else
//! depends on versions.

use std::fmt;

use serde_json::{Value, json};

use crate::{
    compile::{Desired, Hook, Scope, SettingSource},
    escape::{self, Escape},
    options::SocketOption,
    policy::model::{Errno, Form, Mode, Named, Wanted},
    schema,
};

/// A setting, or a part of one, that policies need and this kernel does not support.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The options that are not set or not judged, or not everywhere. Not empty.
    pub options: Vec<String>,
    /// The hooks at which the kernel does not support them; empty if it does not support them at all.
    pub hooks: Vec<Hook>,
    /// The kernel's error.
    pub reason: String,
    /// What the user can do.
    pub remedy: String,
    /// Whether an enforced policy needs it.
    pub is_enforced: bool,
}

impl Unsupported {
    /// Returns what the policies lose because the kernel does not accept sockpolicy's program for a hook.
    #[must_use]
    pub fn of_hook(desired: &Desired, hook: Hook, reason: String) -> Option<Self> {
        let scopes: Vec<(usize, &Scope)> =
            desired.scopes.iter().enumerate().filter(|(_, scope)| scope.hooks.contains(&hook)).collect();
        let mut options: Vec<String> = Vec::new();
        for option in scopes.iter().flat_map(|(number, _)| desired.options_at(*number, hook)) {
            let name = option.to_string();
            if !options.contains(&name) {
                options.push(name);
            }
        }
        if options.is_empty() {
            // The program's work for all options alike.
            options = desired.policies().into_iter().map(|(name, _)| format!("policy {name}")).collect();
        }
        let is_enforced = scopes.iter().any(|(_, scope)| scope.mode == Mode::Enforce);
        (!scopes.is_empty()).then(|| Self {
            options,
            hooks: vec![hook],
            reason,
            remedy: known_from(hook.since()),
            is_enforced,
        })
    }

    /// Returns an entry for an option that the kernel refused on every socket with an errno of this name.
    #[must_use]
    pub fn of_option(desired: &Desired, option: &'static SocketOption, errno: &str) -> Self {
        Self {
            options: vec![option.name.to_owned()],
            hooks: Vec::new(),
            reason: format!("refused on every socket, with {errno}"),
            remedy: known_from(option.settable().map_or("", |settable| settable.since)),
            is_enforced: is_enforced(desired, |source| {
                source.option == Named::Known(option) && matches!(source.form, Form::Set(_))
            }),
        }
    }

    /// Returns an entry for an option whose denied calls cannot fail with the errno of this name.
    #[must_use]
    pub fn of_errno(desired: &Desired, denied: &SettingSource, errno: &str) -> Self {
        Self {
            options: vec![denied.option.to_string()],
            hooks: vec![Hook::Setsockopt],
            reason: format!("denied calls fail with EPERM, not with {errno}"),
            remedy: known_from(Errno::SINCE),
            is_enforced: is_enforced(desired, |source| source == denied),
        }
    }

    /// Returns an entry for a congestion control that is not loaded; `available` are loaded.
    #[must_use]
    pub fn of_congestion_control(desired: &Desired, name: &str, available: &[String]) -> Self {
        let option = crate::options::CONGESTION;
        Self {
            options: vec![format!("{} = \"{name}\"", option.name)],
            hooks: Vec::new(),
            reason: format!("not loaded; loaded: {}", available.join(", ")),
            remedy: format!("load it: modprobe tcp_{name}"),
            is_enforced: is_enforced(desired, |source| {
                let is_wanted = matches!(&source.form, Form::Set(Wanted::Text(wanted)) if wanted == name);
                is_wanted && source.option == Named::Known(option)
            }),
        }
    }

    /// Returns the entry as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "options": self.options,
            "hooks": self.hooks.iter().map(|hook| hook.name()).collect::<Vec<_>>(),
            "reason": self.reason,
            "remedy": self.remedy,
        })
    }

    /// Returns the entry as an event.
    #[must_use]
    pub fn to_event(&self, time: jiff::Timestamp) -> Value {
        schema::line_at(time, "unsupported", self.to_json())
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape::join(&self.options, ", "))?;
        if !self.hooks.is_empty() {
            let hooks: Vec<_> = self.hooks.iter().map(|hook| hook.name()).collect();
            write!(f, " at {}", hooks.join(", "))?;
        }
        write!(f, ": {} ({})", self.reason.escaped(), self.remedy.escaped())
    }
}

/// A list of entries, shown one on each line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsupportedList(pub Vec<Unsupported>);

impl FromIterator<Unsupported> for UnsupportedList {
    /// Merges entries that differ only in their hooks.
    fn from_iter<T: IntoIterator<Item = Unsupported>>(unsupported: T) -> Self {
        let mut all: Vec<Unsupported> = Vec::new();
        for entry in unsupported {
            let is_same = |other: &&mut Unsupported| {
                !other.hooks.is_empty() && Unsupported { hooks: entry.hooks.clone(), ..(**other).clone() } == entry
            };
            match all.iter_mut().find(is_same) {
                Some(other) => {
                    let new: Vec<_> = entry.hooks.into_iter().filter(|hook| !other.hooks.contains(hook)).collect();
                    other.hooks.extend(new);
                }
                None => all.push(entry),
            }
        }
        Self(all)
    }
}

impl fmt::Display for UnsupportedList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|entry| write!(f, "\n  {entry}"))
    }
}

fn known_from(version: &str) -> String {
    format!("known to work from {version} on")
}

/// Returns whether an enforced policy has a setting for which `matches` returns true.
fn is_enforced(desired: &Desired, matches: impl Fn(&SettingSource) -> bool) -> bool {
    let mut settings = desired.sources.iter().filter(|source| matches(source));
    settings.any(|source| desired.rules.get(source.rule).is_some_and(|rule| rule.mode == Mode::Enforce))
}
