//! The containers of this host, found by worker processes while the agent does other things.
//!
//! One worker looks for root's containers, and one for those of each user. A user can block the worker that looks at his; then
//! the agent goes on with what it knew of them, and without a further worker for that user until the first one has ended.

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

use super::{super::cgroup::Mount, Listing, Running, Scope};
use crate::worker::{Abandoned, Job};

/// The name by which this binary lists containers as a worker.
pub const LIST: &str = "list-containers";

/// How long a worker can look for root's containers: nothing that it reads is a tenant's.
const ROOT_TIME: Duration = Duration::from_secs(30);
/// How long a worker can look for a user's containers.
const TENANT_TIME: Duration = Duration::from_secs(2);
/// The most workers that run at one time.
const JOBS_MAX: usize = 8;
/// The most workers that can be stuck.
const STUCK_MAX: usize = 16;
/// The most users that the agent warns of.
const WARNINGS_MAX: usize = 64;

/// Containers, as they were found last.
#[derive(Debug, Default)]
pub struct Search {
    /// When the look for root's containers began that is under way.
    began: Option<Instant>,
    jobs: Vec<(Scope, Job)>,
    /// Whose containers to look for next.
    accounts: VecDeque<u32>,
    root: Vec<Running>,
    tenants: BTreeMap<u32, Vec<Running>>,
    /// Workers that were killed and have not ended, by the account that they looked at.
    stuck: Vec<(Scope, Abandoned)>,
    warned: HashSet<Warned>,
    hidden: usize,
    running: Vec<Running>,
    took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Warned {
    Failed(Option<u32>),
    Limit(Option<u32>),
    Stuck,
}

impl Search {
    /// Begins to look for root's containers, and then for those of users, unless it does so already.
    pub fn begin(&mut self) {
        if self.began.is_none() {
            self.began = Some(Instant::now());
            self.start(Scope::Root);
        }
    }

    /// Whether a look for root's containers is under way. No user can delay that.
    #[must_use]
    pub fn is_looking(&self) -> bool {
        self.began.is_some()
    }

    /// Returns how long the last look for root's containers took.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// What becomes readable when there is more to do.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.jobs.iter().map(|(_, job)| job.as_fd())
    }

    /// Returns how long it is until the deadline of a worker. `None`: no worker runs.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.jobs.iter().map(|(_, job)| job.left()).min()
    }

    /// Takes what workers have found, and starts others. Gives whether the containers are other ones than before. Does not wait.
    pub fn advance(&mut self) -> bool {
        let mut is_other = false;
        let mut at = 0;
        while let Some((scope, job)) = self.jobs.get_mut(at) {
            let scope = *scope;
            let Some(polled) = job.poll() else {
                at += 1;
                continue;
            };
            let (_, job) = self.jobs.swap_remove(at);
            self.end(scope, job);
            match polled.map_err(|error| error.to_string()).and_then(|json| parse(&json)) {
                Ok(listing) => is_other |= self.take(scope, listing),
                Err(error) => self.warn_of_failure(scope, &error),
            }
        }
        self.stuck.retain_mut(|(_, abandoned)| !abandoned.has_ended());
        let is_root = |(scope, _): &(Scope, Job)| *scope == Scope::Root;
        if let Some(began) = self.began.take_if(|_| !self.jobs.iter().any(is_root)) {
            self.took = began.elapsed();
        }
        self.start_next();
        is_other
    }

    /// Looks at all, for no longer than this.
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

    /// Returns the containers, as they were found last, without those whose cgroups are gone: what has a path by now may be
    /// another user's.
    #[must_use]
    pub fn listing(&self) -> Listing {
        let mount = Mount::find().ok();
        let is_there = |running: &&Running| {
            let folder = mount.as_ref().map(|mount| fs::metadata(mount.path.join(&running.cgroup)));
            folder.is_some_and(|folder| folder.is_ok_and(|folder| folder.ino() == running.cgroup_id))
        };
        let running = self.running.iter().filter(is_there).cloned().collect();
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
            } else if self.warned.insert(Warned::Stuck) {
                log::warn!(
                    "{STUCK_MAX} worker processes hang in the kernel: containers of users are not looked for now"
                );
            }
        }
    }

    fn end(&mut self, scope: Scope, job: Job) {
        self.stuck.extend(job.abandon().map(|abandoned| (scope, abandoned)));
    }

    /// Gives whether the containers are other ones than before. A list that is incomplete removes nothing.
    fn take(&mut self, scope: Scope, listing: Listing) -> bool {
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
        let before = std::mem::replace(found, running);
        if is_incomplete {
            let cgroups: BTreeSet<_> = found.iter().map(|running| running.cgroup.clone()).collect();
            found.extend(before.into_iter().filter(|running| !cgroups.contains(&running.cgroup)));
        }
        let running = merged(&self.root, self.tenants.values().flatten());
        let is_other = running != self.running;
        self.running = running;
        is_other
    }

    fn warn_of_failure(&mut self, scope: Scope, reason: &str) {
        if self.is_new(Warned::Failed(scope.account())) {
            log::warn!("cannot look for containers of {scope}: {reason}; those found before stay");
        }
    }

    fn warn_of_limit(&mut self, scope: Scope) {
        if self.is_new(Warned::Limit(scope.account())) {
            log::warn!("cannot look at all containers of {scope}: there is more to read than the limits allow");
        }
    }

    fn is_new(&mut self, warned: Warned) -> bool {
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

/// Root's containers, and those of users in cgroups where root has none: not even further up.
fn merged<'a>(root: &'a [Running], tenants: impl Iterator<Item = &'a Running>) -> Vec<Running> {
    let roots: HashSet<&Path> = root.iter().map(|running| running.cgroup.as_path()).collect();
    let is_free = |running: &&Running| !running.cgroup.ancestors().any(|cgroup| roots.contains(cgroup));
    let mut merged: Vec<Running> = root.iter().chain(tenants.filter(is_free)).cloned().collect();
    merged.sort_by(|one, other| (&one.cgroup, &one.container.id).cmp(&(&other.cgroup, &other.container.id)));
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::container::{Container, PODMAN};

    fn running(cgroup: &str, id: &str) -> Running {
        let container = Container { runtime: PODMAN, id: id.to_owned(), pod: None, name: None, image: None };
        Running { container, cgroup: cgroup.into(), cgroup_id: 1 }
    }

    fn ids(running: &[Running]) -> Vec<&str> {
        running.iter().map(|running| running.container.id.as_str()).collect()
    }

    #[test]
    fn user_has_no_say_where_root_has_a_container() {
        let root = [running("a/web", "root")];
        let tenants = ["a/web", "a/web/below", "a/webx", "a", "b"].map(|cgroup| running(cgroup, cgroup));
        assert_eq!(ids(&merged(&root, tenants.iter())), ["a", "root", "a/webx", "b"]);
    }

    #[test]
    fn several_claims_for_one_id_are_kept() {
        let tenants = [running("u/one", "web"), running("u/two", "web")];
        assert_eq!(ids(&merged(&[running("r", "web")], tenants.iter())), ["web"; 3]);
    }

    #[test]
    fn incomplete_list_removes_nothing() {
        let mut search = Search::default();
        let listing = |cgroups: &[&str], is_incomplete| Listing {
            running: cgroups.iter().map(|cgroup| running(cgroup, cgroup)).collect(),
            is_incomplete,
            ..Listing::default()
        };
        search.take(Scope::Root, listing(&["a", "b"], false));
        search.take(Scope::Root, listing(&["b", "c"], true));
        assert_eq!(ids(&search.root), ["b", "c", "a"]);
        search.take(Scope::Root, listing(&["c"], false));
        assert_eq!(ids(&search.root), ["c"]);
    }

    #[test]
    fn users_containers_go_when_he_has_no_watcher_left() {
        let mut search = Search::default();
        let of_root = |accounts: &[u32]| Listing { accounts: accounts.iter().copied().collect(), ..Listing::default() };
        search.take(Scope::Root, of_root(&[1000]));
        search.take(Scope::Account(1000), Listing { running: vec![running("u", "u")], ..Listing::default() });
        search.warn_of_failure(Scope::Account(1000), "blocked");
        assert_eq!(search.tenants[&1000].len(), 1);
        search.take(Scope::Root, of_root(&[]));
        assert!(search.tenants.is_empty());
    }

    #[test]
    fn listing_is_what_was_written() {
        let listing = Listing { running: vec![running("a", "a")], hidden: 3, ..Listing::default() };
        assert_eq!(parse(&serde_json::to_vec(&listing).unwrap()), Ok(listing));
        assert!(parse(b"{").is_err());
    }
}
