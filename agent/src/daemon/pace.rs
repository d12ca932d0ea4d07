//! When to look for cgroups: after a change, but never so often that it takes much of the time. The owners of cgroups decide how
//! long one look takes and how often cgroups change.

use std::time::{Duration, Instant};

/// The times of the looks.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Whether something changed since the last look began.
    has_changed: bool,
    began: Option<Instant>,
    /// No look before this time.
    not_before: Option<Instant>,
    /// When to repeat a look that failed.
    retry: Option<Instant>,
    /// When to look without a notification, because the kernel does not watch all directories.
    poll: Option<Instant>,
    is_polling: bool,
    took: Duration,
}

impl Pace {
    /// After a look, the agent waits this many times as long as the look took.
    const REST: u32 = 2;
    const RETRY: Duration = Duration::from_secs(1);
    /// The interval of looks without a notification, if a look takes less than a tenth of that.
    pub(super) const POLL: Duration = Duration::from_secs(2);

    /// Returns whether something changed since the last look began.
    pub(super) fn has_changed(&self) -> bool {
        self.has_changed
    }

    pub(super) fn note_change(&mut self) {
        self.has_changed = true;
    }

    pub(super) fn retry(&mut self, now: Instant) {
        self.retry = Some(now + Self::RETRY.max(self.took * Self::REST));
    }

    /// Sets whether to look without notifications. Returns whether that starts now.
    pub(super) fn set_polling(&mut self, is_polling: bool) -> bool {
        let is_new = is_polling && !self.is_polling;
        self.is_polling = is_polling;
        is_new
    }

    /// Returns whether a look is due.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let is_past = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let is_wanted = self.has_changed || is_past(self.retry) || is_past(self.poll);
        is_wanted && self.not_before.is_none_or(|not_before| not_before <= now)
    }

    pub(super) fn begin(&mut self, now: Instant) {
        (self.has_changed, self.retry, self.began) = (false, None, Some(now));
    }

    pub(super) fn end(&mut self, now: Instant) {
        self.took = self.began.take().map(|began| now.saturating_duration_since(began)).unwrap_or_default();
        self.not_before = Some(now + self.took * Self::REST);
        self.poll = self.is_polling.then(|| now + Self::POLL.max(self.took * 10));
    }

    /// Returns when the next look is due, if that is known.
    pub(super) fn next(&self) -> Option<Instant> {
        let wanted = if self.has_changed { self.not_before } else { None };
        let due = [wanted, self.retry, self.poll].into_iter().flatten().min();
        due.map(|due| due.max(self.not_before.unwrap_or(due)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn look_follows_a_change_after_a_rest_of_twice_its_time() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert!(!pace.is_due(start) && pace.next().is_none());
        pace.note_change();
        assert!(pace.is_due(start));
        pace.begin(start);
        pace.note_change();
        pace.end(start + ms(100));
        let rested = start + ms(300);
        assert!(!pace.is_due(rested - ms(1)) && pace.is_due(rested));
        assert_eq!(pace.next(), Some(rested));
    }

    #[test]
    fn failed_look_is_repeated_after_a_second() {
        let start = Instant::now();
        let mut pace = Pace::default();
        pace.begin(start);
        pace.end(start);
        pace.retry(start);
        assert!(!pace.is_due(start + ms(999)) && pace.is_due(start + ms(1000)));
        pace.begin(start + ms(1000));
        pace.end(start + ms(1000));
        assert!(!pace.is_due(start + ms(5000)), "a look that succeeds ends the repetition");
    }

    #[test]
    fn polling_takes_a_tenth_of_the_time_at_most() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert!(pace.set_polling(true));
        assert!(!pace.set_polling(true), "it is not new");
        for (took, next) in [(ms(10), ms(2000)), (ms(1000), ms(10_000))] {
            pace.begin(start);
            pace.end(start + took);
            assert_eq!(pace.next(), Some(start + took + next));
        }
        assert!(!pace.set_polling(false));
        pace.begin(start);
        pace.end(start);
        assert_eq!(pace.next(), None);
    }
}
