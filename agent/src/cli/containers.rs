//! The containers of this host, for commands whose policies are about any.

use std::{
    error::Error,
    io::{self, Write as _},
    time::{Duration, Instant},
};

use crate::{
    escape::Escape,
    host::containers::{Listing, Running, Scope, Search, list as list_containers},
    policy::Policy,
    worker,
};

/// How long a command looks for containers before it goes on with those that it has found.
pub(super) const TIME: Duration = Duration::from_secs(5);

/// Returns the containers there are; none if no policy asks for one.
pub(super) fn wanted_by(policies: &[Policy]) -> Listing {
    if !are_wanted_by(policies) {
        return Listing::default();
    }
    let mut search = Search::default();
    search.look(TIME);
    search.listing()
}

/// Lists the containers of root, or of an account, to the agent that started this process.
pub(super) fn list_for(agent: u32, account: &str) -> Result<(), Box<dyn Error>> {
    worker::begin(agent)?;
    let scope = if account.is_empty() { Scope::Root } else { Scope::Account(account.parse()?) };
    let listing = serde_json::to_vec(&list_containers(scope)?)?;
    Ok(io::stdout().write_all(&worker::framed(&listing))?)
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
    let line = |Running { container, cgroup, .. }: &Running| {
        let image = container.image.as_ref().map_or_else(String::new, |image| format!(" ({})", image.escaped()));
        format!("\n    {container}{image} in /{}", cgroup.escaped())
    };
    containers.iter().map(line).collect()
}

/// When to look for containers after a cgroup has come: soon, and then each time after twice as long. Who makes a container makes
/// its cgroup first, and leaves word of whose it is later.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Instant,
    pause: Duration,
    /// Cgroups can come faster than it is possible to look.
    not_before: Instant,
}

impl Backoff {
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    /// Containers that take longer are found when something else changes.
    const LAST_PAUSE: Duration = Duration::from_secs(5);
    /// Looks for containers take at most one part in so many of the time, as long as one takes less than a second.
    const SHARE: u32 = 5;

    /// Begins anew, for another cgroup has come.
    pub(super) fn again(looks: Option<Self>) -> Self {
        let now = Instant::now();
        let not_before = looks.map_or(now, |looks| looks.not_before);
        Self { next: not_before.max(now), pause: Self::FIRST_PAUSE, not_before }
    }

    /// Returns when to look next, if a look takes so long. `None`: it was the last.
    pub(super) fn after_one(self, took: Duration) -> Option<Self> {
        let Self { pause, .. } = self;
        let now = Instant::now();
        let not_before = now + (took * Self::SHARE).min(Self::LAST_PAUSE);
        (pause <= Self::LAST_PAUSE).then(|| Self { next: not_before.max(now + pause), pause: pause * 2, not_before })
    }

    pub(super) fn are_due(&self) -> bool {
        self.next <= Instant::now()
    }

    /// How long it is until the next one, in milliseconds and rounded up.
    pub(super) fn poll_timeout_ms(&self) -> u16 {
        let left = self.next.saturating_duration_since(Instant::now());
        u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX)
    }
}
