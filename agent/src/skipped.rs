//! Objects that sockpolicy cannot handle. Each is skipped, counted, logged once, and listed by `status`.
//!
//! The owners of cgroups and sockets choose the number and the names of these objects. Therefore the list is bounded,
//! and names are escaped.
//!
//! Pure: callers pass the time.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::escape::{self, Escape};

/// The kind of a skipped object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Cgroup,
    Container,
    Process,
    Socket,
    File,
    /// A network namespace.
    Namespace,
    /// A directory that the kernel does not watch.
    Watch,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Container => "container",
            Self::Process => "process",
            Self::Socket => "socket",
            Self::File => "file",
            Self::Namespace => "namespace",
            Self::Watch => "watch",
        }
    }
}

/// A skipped object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    pub kind: Kind,
    /// The unescaped name.
    pub name: String,
    pub reason: String,
    /// Whether a later attempt may succeed although the object does not change.
    pub is_transient: bool,
}

/// Characters of a name that are kept. A cgroup path can have 8 KiB.
const NAME_MAX: usize = 512;

impl Skip {
    #[must_use]
    pub fn new(kind: Kind, name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { kind, name: name.into(), reason: reason.into(), is_transient: false }
    }

    #[must_use]
    pub fn transient_if(self, is_transient: bool) -> Self {
        Self { is_transient, ..self }
    }

    /// Returns the name as shown and stored: escaped, and shortened in the middle.
    fn shown_name(&self) -> String {
        let escaped = self.name.escaped().to_string();
        let count = escaped.chars().count();
        if count <= NAME_MAX {
            return escaped;
        }
        let half = NAME_MAX / 2;
        let (start, end): (String, String) =
            (escaped.chars().take(half).collect(), escaped.chars().skip(count - half).collect());
        format!("{start}...{end}")
    }
}

/// A skipped object, as `status` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub kind: Kind,
    pub name: String,
    pub reason: String,
    /// When the object was first skipped, in seconds since the epoch.
    pub since: i64,
}

impl Skipped {
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Self { kind, name, reason, .. } = self;
        json!({ "kind": kind.name(), "name": name, "reason": reason, "since": self.since_text() })
    }

    fn since_text(&self) -> Option<String> {
        jiff::Timestamp::from_second(self.since).ok().map(|since| since.to_string())
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, name, reason, .. } = self;
        write!(f, "{} {name}: {reason}", kind.name())?;
        match self.since_text() {
            Some(since) => write!(f, " (since {since})"),
            None => Ok(()),
        }
    }
}

/// The objects that an instance skips now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedList {
    pub objects: Vec<Skipped>,
    /// The number of objects that are not listed.
    pub others: u64,
}

/// The most objects that are listed. More are only counted.
const OBJECTS_MAX: usize = 256;

impl SkippedList {
    /// Replaces the list. Returns the listed objects that were not listed before.
    pub fn replace(&mut self, now: &[Skip], seconds: i64) -> Vec<Skipped> {
        let before: BTreeMap<(Kind, &str), i64> =
            self.objects.iter().map(|known| ((known.kind, known.name.as_str()), known.since)).collect();
        let mut listed: BTreeMap<(Kind, String), Skipped> = BTreeMap::new();
        let (mut new, mut others) = (Vec::new(), 0);
        for skip in now {
            let name = skip.shown_name();
            let since = before.get(&(skip.kind, name.as_str())).copied();
            let is_full = listed.len() >= OBJECTS_MAX;
            match listed.entry((skip.kind, name.clone())) {
                Entry::Occupied(_) => {}
                Entry::Vacant(_) if is_full => others += 1,
                Entry::Vacant(vacant) => {
                    let reason = escape::visible(&skip.reason, false);
                    let skipped = Skipped { kind: skip.kind, name, reason, since: since.unwrap_or(seconds) };
                    if since.is_none() {
                        new.push(skipped.clone());
                    }
                    vacant.insert(skipped);
                }
            }
        }
        (self.objects, self.others) = (listed.into_values().collect(), others);
        new
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Returns the number of skipped objects.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.objects.len() as u64 + self.others
    }

    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({ "count": self.count(), "objects": self.objects.iter().map(Skipped::to_json).collect::<Vec<_>>() })
    }
}

/// Objects that one message names.
const NAMED_MAX: usize = 16;

/// Logs objects that are skipped by a command that ends soon.
pub fn warn_of(skipped: &[Skip]) {
    let mut list = SkippedList::default();
    warn_of_new(&list.replace(skipped, now()), skipped.len());
}

/// Logs objects that are skipped since now. `count` is the number of all objects that are skipped.
pub fn warn_of_new(new: &[Skipped], count: usize) {
    for skipped in new.iter().take(NAMED_MAX) {
        log::warn!("skipped: {} {}: {}", skipped.kind.name(), skipped.name, skipped.reason);
    }
    if new.len() > NAMED_MAX {
        log::warn!("skipped: {} more, of {count} objects in all", new.len() - NAMED_MAX);
    }
}

/// Returns the time in seconds since 1970.
#[must_use]
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skip(name: &str) -> Skip {
        Skip::new(Kind::Cgroup, name, "too deep")
    }

    #[test]
    fn object_is_new_only_once_and_keeps_its_time() {
        let mut list = SkippedList::default();
        assert_eq!(list.replace(&[skip("/a"), skip("/a")], 1).len(), 1);
        assert_eq!(list.replace(&[skip("/a"), skip("/b")], 2).len(), 1);
        let since: Vec<_> = list.objects.iter().map(|known| (known.name.as_str(), known.since)).collect();
        assert_eq!(since, [("/a", 1), ("/b", 2)]);
        assert!(list.replace(&[], 3).is_empty() && list.is_empty());
    }

    #[test]
    fn list_is_bounded_and_counts_the_others() {
        let many: Vec<Skip> = (0..1000).map(|number| skip(&format!("/{number}"))).collect();
        let mut list = SkippedList::default();
        assert_eq!(list.replace(&many, 1).len(), OBJECTS_MAX);
        assert_eq!((list.objects.len(), list.count()), (OBJECTS_MAX, 1000));
    }

    #[test]
    fn names_are_escaped_and_shortened() {
        let mut list = SkippedList::default();
        list.replace(&[skip("/a\nerror: \x1b[2J"), skip(&"\n".repeat(9000))], 1);
        assert!(list.objects.iter().all(|known| !known.name.contains(char::is_control) && known.name.len() < 600));
    }
}
