//! The cgroups of this host that can be targets of policies.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use crate::{
    container::Running,
    coverage::{GlobError, SearchScope, named},
    host::cgroup::{Budget, Mount, Tree, Wanted},
    policy::Policy,
    skipped::Skip,
};

/// Cgroups that can be targets.
#[derive(Debug)]
pub struct Candidates {
    /// Paths below the mount, each once. The cgroups that policies name come first.
    pub cgroups: Vec<PathBuf>,
    /// Cgroups that could not be listed.
    pub skipped: Vec<Skip>,
}

impl Candidates {
    /// Finds the cgroups that policies name, the cgroups in `known`, and those that globs can match. Does not enter a subtree
    /// in which no glob can match.
    ///
    /// # Errors
    ///
    /// Fails if a glob cannot be compiled.
    pub fn find(
        mount: &Mount,
        policies: &[Policy],
        search: &SearchScope,
        containers: &[Running],
        known: BTreeSet<PathBuf>,
    ) -> Result<Self, GlobError> {
        let wanted = |below: &Path| match (search.is_walked(below), search.is_match(below)) {
            (true, _) => Wanted::WithChildren,
            (false, true) => Wanted::Alone,
            (false, false) => Wanted::No,
        };
        // Without globs, the tree is not walked.
        let Tree { found, skipped } = match search.is_walked(Path::new("")) {
            true => mount.walk(wanted, &Budget::default()),
            false => Tree::default(),
        };
        let mut seen: HashSet<PathBuf> = HashSet::new();
        let first: BTreeSet<PathBuf> = named(policies, containers)?.into_iter().chain(known).collect();
        let first = first.into_iter().filter(|below| mount.has(below));
        let cgroups = first.chain(found).filter(|below| seen.insert(below.clone())).collect();
        Ok(Self { cgroups, skipped })
    }

    /// Returns the directories to watch: a target can appear directly below each.
    #[must_use]
    pub fn watched(&self, mount: &Mount, search: &SearchScope) -> BTreeSet<PathBuf> {
        let walked = self.cgroups.iter().filter(|below| search.is_walked(below));
        walked.chain(search.above_named()).map(|below| mount.path.join(below)).collect()
    }
}
