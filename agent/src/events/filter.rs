//! Which events are reported.

use abi::setting::OptionKey;

use super::{Action, Event, Kind};

/// The conditions for an event to be reported. An empty list matches every event.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub options: Vec<OptionKey>,
    /// Only conflicts with one of these verdicts, or with the dry-run verdict for it.
    pub verdicts: Vec<Action>,
    pub processes: Vec<u32>,
    /// Names of tasks, as in `/proc/PID/comm`.
    pub comms: Vec<String>,
}

impl Filter {
    /// Returns whether to report an event.
    #[must_use]
    pub fn admits(&self, event: &Event) -> bool {
        let Self { options: _, verdicts, processes, comms } = self;
        let verdict = match event.kind {
            Kind::Conflict { verdict } => Some(verdict.what),
            Kind::Mismatch
            | Kind::Call(_)
            | Kind::Outcome { .. }
            | Kind::Drift
            | Kind::Applied { .. }
            | Kind::WouldApply
            | Kind::Unknown { .. } => None,
        };
        let task = event.task.as_ref();
        self.admits_option(event.key)
            && admits(verdicts, verdict.as_ref())
            && admits(processes, task.map(|task| &task.pid))
            && admits(comms, task.map(|task| &task.comm))
    }

    /// Returns whether to report an option. Other options are not counted either.
    #[must_use]
    pub fn admits_option(&self, key: OptionKey) -> bool {
        admits(&self.options, Some(&key))
    }
}

fn admits<T: PartialEq>(accepted: &[T], value: Option<&T>) -> bool {
    accepted.is_empty() || value.is_some_and(|value| accepted.contains(value))
}
