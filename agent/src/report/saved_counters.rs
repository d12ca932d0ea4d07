//! The counters of settings, saved for the next agent and for the next set of policies.

use abi::{Counters, judge::verdict};
use serde::{Deserialize, Serialize};

use super::Line;

/// The counters of a setting. The other fields identify the setting.
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
    /// Already subtracted from the other counters.
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

/// Removes and returns the counters of a line's setting; zeros if there are none.
pub(super) fn take(counted: &mut Vec<SavedCounters>, line: &Line) -> Counters {
    if counted.is_empty() {
        return Counters::default();
    }
    let wanted = SavedCounters::from(line);
    let found = counted.iter().position(|one| one.is_of_same_setting(&wanted));
    found.map_or_else(Counters::default, |at| counted.swap_remove(at).counters)
}
