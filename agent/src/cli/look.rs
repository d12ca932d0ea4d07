//! A look at the cgroups of this host: which of them can be targets of policies.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use crate::{
    coverage::{GlobError, SearchScope, named},
    host::{
        cgroup::{Budget, Mount, Tree, Wanted},
        containers::Running,
    },
    policy::Policy,
    skipped::Skip,
};

/// Cgroups that can be targets.
#[derive(Debug)]
pub(super) struct Look {
    /// Paths below the mount, each once. Those that policies name come first.
    pub(super) cgroups: Vec<PathBuf>,
    /// What could not be looked at.
    pub(super) skipped: Vec<Skip>,
}

impl Look {
    /// Looks for the cgroups that policies name, those that are `known` already, and those that globs can match. A subtree
    /// in which no glob can match is not looked at.
    pub(super) fn at(
        mount: &Mount,
        policies: &[Policy],
        reach: &SearchScope,
        containers: &[Running],
        known: BTreeSet<PathBuf>,
    ) -> Result<Self, GlobError> {
        let wanted = |below: &Path| match (reach.is_walked(below), reach.is_match(below)) {
            (true, _) => Wanted::WithChildren,
            (false, true) => Wanted::Alone,
            (false, false) => Wanted::No,
        };
        // Without globs there is nothing to walk.
        let Tree { found, skipped } = match reach.is_walked(Path::new("")) {
            true => mount.walk(wanted, &Budget::default()),
            false => Tree::default(),
        };
        let mut seen: HashSet<PathBuf> = HashSet::new();
        let first: BTreeSet<PathBuf> = named(policies, containers)?.into_iter().chain(known).collect();
        let first = first.into_iter().filter(|below| mount.has(below));
        let cgroups = first.chain(found).filter(|below| seen.insert(below.clone())).collect();
        Ok(Self { cgroups, skipped })
    }

    /// The cgroups that are to be watched, as paths in the file system: a target can come right below each.
    pub(super) fn watched(&self, mount: &Mount, reach: &SearchScope) -> BTreeSet<PathBuf> {
        let walked = self.cgroups.iter().filter(|below| reach.is_walked(below));
        walked.chain(reach.above_named()).map(|below| mount.path.join(below)).collect()
    }
}
