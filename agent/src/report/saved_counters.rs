//! What settings have come to, as it is kept from one agent, and one set of policies, to the next.

use abi::{Counters, judge::verdict};
use serde::{Deserialize, Serialize};

use super::Line;

/// What a setting has come to. Whether another one is the same is known by what it says, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedCounters {
    policy: String,
    rule: String,
    /// `FILE:LINE`
    place: String,
    option: String,
    wanted: String,
    mode: String,
    #[serde(with = "Kept")]
    counters: Counters,
}

/// The fields of [`Counters`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "Counters")]
struct Kept {
    set: u64,
    unchanged: u64,
    failed: u64,
    failed_errno: u64,
    agreed: u64,
    verdicts: [u64; verdict::COUNT],
    reads: u64,
    reported: u64,
    suppressed: u64,
    /// Taken from the others before.
    #[serde(skip)]
    undone: u64,
    #[serde(skip)]
    _pad: [u64; 2],
}

impl From<&Line> for SavedCounters {
    fn from(line: &Line) -> Self {
        Self {
            policy: line.policy.clone(),
            rule: line.rule.clone(),
            place: line.place.clone(),
            option: line.option.to_string(),
            wanted: line.wanted(),
            mode: line.mode.name().to_owned(),
            counters: line.counters,
        }
    }
}

impl SavedCounters {
    fn is_of_same_setting(&self, other: &Self) -> bool {
        let Self { policy, rule, place, option, wanted, mode, counters: _ } = self;
        (policy, rule, place, option, wanted, mode)
            == (&other.policy, &other.rule, &other.place, &other.option, &other.wanted, &other.mode)
    }
}

/// Takes what was counted of a line's setting; nothing, where nothing was.
pub(super) fn take(counted: &mut Vec<SavedCounters>, line: &Line) -> Counters {
    if counted.is_empty() {
        return Counters::default();
    }
    let wanted = SavedCounters::from(line);
    let found = counted.iter().position(|one| one.is_of_same_setting(&wanted));
    found.map_or_else(Counters::default, |at| counted.swap_remove(at).counters)
}
