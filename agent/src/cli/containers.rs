//! The containers of this host, for commands whose policies are about any.

use std::time::{Duration, Instant};

use crate::{
    escape::Escape,
    host::containers::{Listing, Running, running},
    policy::Policy,
};

/// Those there are; none where no policy asks for one.
pub(super) fn wanted_by(policies: &[Policy]) -> Listing {
    if !are_wanted_by(policies) {
        return Listing::default();
    }
    running().unwrap_or_else(|error| {
        log::warn!("cannot tell which containers there are: {error}");
        Listing::default()
    })
}

/// Whether policies ask for any.
pub(super) fn are_wanted_by(policies: &[Policy]) -> bool {
    policies.iter().any(|policy| !policy.target.containers.is_empty())
}

/// Says that there may be more than those.
pub(super) fn tell_of_hidden(Listing { hidden, .. }: &Listing) {
    if *hidden > 0 {
        log::warn!("{hidden} processes watch over containers that only root can look into");
    }
}

/// For people to find their own among.
pub(super) fn list(containers: &[Running]) -> String {
    if containers.is_empty() {
        return " none that can be seen".to_owned();
    }
    let line = |Running { container, cgroup }: &Running| {
        let image = container.image.as_ref().map_or_else(String::new, |image| format!(" ({})", image.escaped()));
        format!("\n    {container}{image} in /{}", cgroup.escaped())
    };
    containers.iter().map(line).collect()
}

/// When to look for containers after a cgroup has come: soon, and then each time after twice as long. Who makes a container makes
/// its cgroup first, and leaves word of whose it is later.
#[derive(Debug)]
pub(super) struct Looks {
    next: Instant,
    pause: Duration,
}

impl Looks {
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    /// Whoever takes longer is found when something else changes.
    const LAST_PAUSE: Duration = Duration::from_secs(5);

    pub(super) fn begin() -> Self {
        Self { next: Instant::now(), pause: Self::FIRST_PAUSE }
    }

    pub(super) fn are_due(&self) -> bool {
        self.next <= Instant::now()
    }

    /// `None`: it was the last.
    pub(super) fn after_one(self) -> Option<Self> {
        let Self { pause, .. } = self;
        (pause <= Self::LAST_PAUSE).then(|| Self { next: Instant::now() + pause, pause: pause * 2 })
    }

    /// How long it is until the next one, in milliseconds and rounded up.
    pub(super) fn patience_ms(&self) -> u16 {
        let left = self.next.saturating_duration_since(Instant::now());
        u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX)
    }
}
