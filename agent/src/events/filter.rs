//! Which events to tell of.

use abi::setting::OptionKey;

use super::{Action, Event, Kind};

/// What an event must be to be told of. An empty list asks nothing.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub options: Vec<OptionKey>,
    /// Only conflicts that this was, or in a dry run would have been done about.
    pub verdicts: Vec<Action>,
    pub processes: Vec<u32>,
    /// Names of tasks, as in `/proc/PID/comm`.
    pub comms: Vec<String>,
}

impl Filter {
    /// Whether to tell of an event.
    #[must_use]
    pub fn admits(&self, event: &Event) -> bool {
        let Self { options: _, verdicts, processes, comms } = self;
        let verdict = match event.kind {
            Kind::Conflict { verdict, .. } => Some(verdict.what),
            Kind::Call(_)
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

    /// Whether to tell of an option: the others are not counted either.
    #[must_use]
    pub fn admits_option(&self, key: OptionKey) -> bool {
        admits(&self.options, Some(&key))
    }
}

fn admits<T: PartialEq>(asked: &[T], is: Option<&T>) -> bool {
    asked.is_empty() || is.is_some_and(|is| asked.contains(is))
}
