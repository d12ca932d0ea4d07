//! The containers of this host, for policies whose targets are containers, and the times at which the agent searches for them.

use std::time::{Duration, Instant};

use crate::{
    host::containers::{Listing, Search},
    policy::Policy,
};

/// How long a command searches for containers before it continues with those that it has found.
const SEARCH_TIME: Duration = Duration::from_secs(5);

/// Returns the containers of this host, or none if no policy has a container as a target.
#[must_use]
pub fn wanted_by(policies: &[Policy]) -> Listing {
    if !are_wanted_by(policies) {
        return Listing::default();
    }
    let mut search = Search::default();
    search.look(SEARCH_TIME);
    search.listing()
}

/// Returns whether a policy has a container as a target.
#[must_use]
pub fn are_wanted_by(policies: &[Policy]) -> bool {
    policies.iter().any(|policy| !policy.target.containers.is_empty())
}

/// Warns if this process may not inspect all processes that watch containers.
pub fn warn_of_hidden(Listing { hidden, .. }: &Listing) {
    if *hidden > 0 {
        log::warn!("cannot inspect {hidden} processes that watch containers: permission denied");
    }
}

/// The time of the next search after a cgroup was created: soon, and then after pauses that double. A runtime creates the
/// cgroup of a container first, and the files that identify the container later.
#[derive(Debug)]
pub struct Backoff {
    next: Instant,
    pause: Duration,
    /// Cgroups can be created faster than a search takes.
    not_before: Instant,
}

impl Backoff {
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    /// The search finds containers that take longer to start when something else changes.
    const LAST_PAUSE: Duration = Duration::from_secs(5);
    /// After a search the agent waits this many times as long as the search took, up to [`Self::LAST_PAUSE`].
    const REST: u32 = 5;

    /// Restarts the pauses at `now`, because another cgroup was created.
    #[must_use]
    pub fn restarted(previous: Option<Self>, now: Instant) -> Self {
        let not_before = previous.map_or(now, |previous| previous.not_before);
        Self { next: not_before.max(now), pause: Self::FIRST_PAUSE, not_before }
    }

    /// Returns the time of the next search, if one ended at `now` and took so long. `None`: that search was the last.
    #[must_use]
    pub fn after_search(self, took: Duration, now: Instant) -> Option<Self> {
        let Self { pause, .. } = self;
        let not_before = now + (took * Self::REST).min(Self::LAST_PAUSE);
        (pause <= Self::LAST_PAUSE).then(|| Self { next: not_before.max(now + pause), pause: pause * 2, not_before })
    }

    /// Returns whether a search is due.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.next <= now
    }

    /// Returns the time of the next search.
    #[must_use]
    pub fn next(&self) -> Instant {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn pauses_double_until_the_last() {
        let start = Instant::now();
        let mut backoff = Some(Backoff::restarted(None, start));
        let (mut now, mut pauses) = (start, Vec::new());
        while let Some(current) = backoff {
            assert!(current.is_due(current.next()) && !current.is_due(current.next() - ms(1)));
            pauses.push(current.next().duration_since(now).as_millis());
            now = current.next();
            backoff = current.after_search(Duration::ZERO, now);
        }
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560]);
    }

    #[test]
    fn long_search_delays_the_next_even_if_cgroups_are_created_meanwhile() {
        let start = Instant::now();
        let backoff = Backoff::restarted(None, start).after_search(ms(100), start).unwrap();
        assert_eq!(backoff.next(), start + ms(500));
        let restarted = Backoff::restarted(Some(backoff), start + ms(1));
        assert_eq!(restarted.next(), start + ms(500));
        let longest = restarted.after_search(Duration::from_secs(60), start).unwrap();
        assert_eq!(longest.next(), start + Backoff::LAST_PAUSE);
    }
}
