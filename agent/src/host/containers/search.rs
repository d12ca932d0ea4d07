//! Searches the containers of this host in worker processes, without blocking the agent.
//!
//! One worker searches root's containers, and one worker searches the containers of each user. A user can block the worker for
//! the containers of that user. The agent then keeps the containers that it found before, and starts no other worker for that
//! user until the first one has ended.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    fs,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    time::{Duration, Instant},
};

use super::{super::cgroup::Mount, Listing, Scope};
use crate::container::Running;
use crate::worker::{Abandoned, Job};

/// The hidden command that lists containers, as a worker.
pub const LIST: &str = "list-containers";

/// The deadline of the worker for root's containers. This worker reads no data of tenants.
const ROOT_TIME: Duration = Duration::from_secs(30);
/// The deadline of a worker for a user's containers.
const TENANT_TIME: Duration = Duration::from_secs(2);
/// The maximum number of workers at one time.
const JOBS_MAX: usize = 8;
/// The maximum number of killed workers that have not ended.
const STUCK_MAX: usize = 16;
/// The maximum number of warnings.
const WARNINGS_MAX: usize = 64;

/// A repeated search, and the containers that it found last.
#[derive(Debug, Default)]
pub struct Search {
    /// The start of the current search for root's containers, if one runs.
    started: Option<Instant>,
    jobs: Vec<(Scope, Job)>,
    /// The users whose containers are searched next.
    accounts: VecDeque<u32>,
    root: Vec<Running>,
    tenants: BTreeMap<u32, Vec<Running>>,
    /// Workers that were killed and have not ended, with their scopes.
    stuck: Vec<(Scope, Abandoned)>,
    /// The warnings that were logged. Each is logged once.
    warned: HashSet<Warning>,
    hidden: usize,
    running: Vec<Running>,
    took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Warning {
    Failed(Option<u32>),
    Limit(Option<u32>),
    Stuck,
}

impl Search {
    /// Starts a search of root's containers, unless one runs already. The search of users' containers follows.
    pub fn begin(&mut self) {
        if self.started.is_none() {
            self.started = Some(Instant::now());
            self.start(Scope::Root);
        }
    }

    /// Returns whether a search of root's containers runs. No user can delay this search.
    #[must_use]
    pub fn is_looking(&self) -> bool {
        self.started.is_some()
    }

    /// Returns the duration of the last search of root's containers.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Returns descriptors that become readable when [`Self::advance`] has work to do.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.jobs.iter().map(|(_, job)| job.as_fd())
    }

    /// Returns the time until the next deadline of a worker, or `None` if no worker runs.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.jobs.iter().map(|(_, job)| job.left()).min()
    }

    /// Receives the listings of workers, and starts other workers. Returns whether the containers have changed. Does not wait.
    pub fn advance(&mut self) -> bool {
        let mut has_changed = false;
        let mut index = 0;
        while let Some((scope, job)) = self.jobs.get_mut(index) {
            let scope = *scope;
            let Some(polled) = job.poll() else {
                index += 1;
                continue;
            };
            let (_, job) = self.jobs.swap_remove(index);
            self.abandon(scope, job);
            match polled.map_err(|error| error.to_string()).and_then(|json| parse(&json)) {
                Ok(listing) => has_changed |= self.update(scope, listing),
                Err(error) => self.warn_of_failure(scope, &error),
            }
        }
        self.stuck.retain_mut(|(_, abandoned)| !abandoned.has_ended());
        let is_root = |(scope, _): &(Scope, Job)| *scope == Scope::Root;
        if let Some(started) = self.started.take_if(|_| !self.jobs.iter().any(is_root)) {
            self.took = started.elapsed();
        }
        self.start_next();
        has_changed
    }

    /// Searches all containers, and waits for at most `time`.
    pub fn look(&mut self, time: Duration) {
        let until = Instant::now() + time;
        self.begin();
        loop {
            self.advance();
            let left = until.saturating_duration_since(Instant::now());
            if self.jobs.is_empty() || left == Duration::ZERO {
                return;
            }
            crate::worker::await_any(self.descriptors(), left.min(self.left().unwrap_or_default()));
        }
    }

    /// Returns the containers that were found last. Leaves out containers whose cgroup was removed: a new cgroup at the same
    /// path can belong to another user.
    #[must_use]
    pub fn listing(&self) -> Listing {
        let mount = Mount::find().ok();
        let exists = |running: &&Running| {
            let cgroup = mount.as_ref().map(|mount| fs::metadata(mount.path.join(&running.cgroup)));
            cgroup.is_some_and(|cgroup| cgroup.is_ok_and(|cgroup| cgroup.ino() == running.cgroup_id))
        };
        let running = self.running.iter().filter(exists).cloned().collect();
        Listing { running, hidden: self.hidden, ..Listing::default() }
    }

    fn start(&mut self, scope: Scope) {
        let account = match scope {
            Scope::Root => String::new(),
            Scope::Account(account) => account.to_string(),
        };
        let time = if scope == Scope::Root { ROOT_TIME } else { TENANT_TIME };
        match Job::start(&[LIST, &std::process::id().to_string(), &account], b"", time) {
            Ok(job) => self.jobs.push((scope, job)),
            Err(error) => self.warn_of_failure(scope, &error.to_string()),
        }
    }

    fn start_next(&mut self) {
        while self.jobs.len() < JOBS_MAX {
            let Some(account) = self.accounts.pop_front() else { return };
            let scope = Scope::Account(account);
            let stuck = self.stuck.iter().map(|(stuck, _)| *stuck);
            if stuck.chain(self.jobs.iter().map(|(running, _)| *running)).any(|busy| busy == scope) {
                continue;
            }
            if self.stuck.len() < STUCK_MAX {
                self.start(scope);
            } else if self.warned.insert(Warning::Stuck) {
                log::warn!("cannot search the containers of users: {STUCK_MAX} worker processes hang in the kernel");
            }
        }
    }

    fn abandon(&mut self, scope: Scope, job: Job) {
        self.stuck.extend(job.abandon().map(|abandoned| (scope, abandoned)));
    }

    /// Replaces the containers of a scope. An incomplete listing only adds containers. Returns whether the containers have
    /// changed.
    fn update(&mut self, scope: Scope, listing: Listing) -> bool {
        let Listing { running, hidden, accounts, skipped, is_incomplete } = listing;
        if is_incomplete || skipped > 0 {
            self.warn_of_limit(scope);
        }
        let found = match scope {
            Scope::Root => {
                self.hidden = hidden;
                self.tenants.retain(|account, _| skipped > 0 || accounts.contains(account));
                self.accounts.retain(|account| accounts.contains(account));
                let waiting: BTreeSet<u32> = self.accounts.iter().copied().collect();
                self.accounts.extend(accounts.difference(&waiting));
                &mut self.root
            }
            Scope::Account(account) => self.tenants.entry(account).or_default(),
        };
        let previous = std::mem::replace(found, running);
        if is_incomplete {
            let cgroups: BTreeSet<_> = found.iter().map(|running| running.cgroup.clone()).collect();
            found.extend(previous.into_iter().filter(|running| !cgroups.contains(&running.cgroup)));
        }
        let running = merge(&self.root, self.tenants.values().flatten());
        let has_changed = running != self.running;
        self.running = running;
        has_changed
    }

    fn warn_of_failure(&mut self, scope: Scope, reason: &str) {
        if self.should_warn(Warning::Failed(scope.account())) {
            log::warn!("cannot search the containers of {scope}: {reason}; keeping those found before");
        }
    }

    fn warn_of_limit(&mut self, scope: Scope) {
        if self.should_warn(Warning::Limit(scope.account())) {
            log::warn!("cannot find all containers of {scope}: the search exceeded its limits");
        }
    }

    fn should_warn(&mut self, warned: Warning) -> bool {
        self.warned.len() < WARNINGS_MAX && self.warned.insert(warned)
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        for (_, job) in self.jobs.drain(..) {
            drop(job.abandon());
        }
    }
}

impl Scope {
    fn account(self) -> Option<u32> {
        match self {
            Self::Root => None,
            Self::Account(account) => Some(account),
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Root => f.write_str("root"),
            Self::Account(account) => write!(f, "user {account}"),
        }
    }
}

pub(super) fn parse(json: &[u8]) -> Result<Listing, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// Returns root's containers, and the containers of users whose cgroup and its ancestors have no container of root.
fn merge<'a>(root: &'a [Running], tenants: impl Iterator<Item = &'a Running>) -> Vec<Running> {
    let roots: HashSet<&Path> = root.iter().map(|running| running.cgroup.as_path()).collect();
    let is_free = |running: &&Running| !running.cgroup.ancestors().any(|cgroup| roots.contains(cgroup));
    let mut merge: Vec<Running> = root.iter().chain(tenants.filter(is_free)).cloned().collect();
    merge.sort_by(|one, other| (&one.cgroup, &one.container.id).cmp(&(&other.cgroup, &other.container.id)));
    merge
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{Container, PODMAN};

    fn running(cgroup: &str, id: &str) -> Running {
        let container = Container { runtime: PODMAN, id: id.to_owned(), pod: None, name: None, image: None };
        Running { container, cgroup: cgroup.into(), cgroup_id: 1 }
    }

    fn ids(running: &[Running]) -> Vec<&str> {
        running.iter().map(|running| running.container.id.as_str()).collect()
    }

    #[test]
    fn containers_of_root_take_precedence() {
        let root = [running("a/web", "root")];
        let tenants = ["a/web", "a/web/below", "a/webx", "a", "b"].map(|cgroup| running(cgroup, cgroup));
        assert_eq!(ids(&merge(&root, tenants.iter())), ["a", "root", "a/webx", "b"]);
    }

    #[test]
    fn several_claims_for_one_id_are_kept() {
        let tenants = [running("u/one", "web"), running("u/two", "web")];
        assert_eq!(ids(&merge(&[running("r", "web")], tenants.iter())), ["web"; 3]);
    }

    #[test]
    fn incomplete_listing_removes_nothing() {
        let mut search = Search::default();
        let listing = |cgroups: &[&str], is_incomplete| Listing {
            running: cgroups.iter().map(|cgroup| running(cgroup, cgroup)).collect(),
            is_incomplete,
            ..Listing::default()
        };
        search.update(Scope::Root, listing(&["a", "b"], false));
        search.update(Scope::Root, listing(&["b", "c"], true));
        assert_eq!(ids(&search.root), ["b", "c", "a"]);
        search.update(Scope::Root, listing(&["c"], false));
        assert_eq!(ids(&search.root), ["c"]);
    }

    #[test]
    fn containers_of_a_user_without_watchers_are_removed() {
        let mut search = Search::default();
        let of_root = |accounts: &[u32]| Listing { accounts: accounts.iter().copied().collect(), ..Listing::default() };
        search.update(Scope::Root, of_root(&[1000]));
        search.update(Scope::Account(1000), Listing { running: vec![running("u", "u")], ..Listing::default() });
        search.warn_of_failure(Scope::Account(1000), "blocked");
        assert_eq!(search.tenants[&1000].len(), 1);
        search.update(Scope::Root, of_root(&[]));
        assert!(search.tenants.is_empty());
    }

    #[test]
    fn listing_survives_json() {
        let listing = Listing { running: vec![running("a", "a")], hidden: 3, ..Listing::default() };
        assert_eq!(parse(&serde_json::to_vec(&listing).unwrap()), Ok(listing));
        assert!(parse(b"{").is_err());
    }
}
