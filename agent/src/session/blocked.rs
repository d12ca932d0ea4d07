//! Targets that the programs cannot be attached to.

use std::{collections::BTreeMap, mem};

use super::{OnBlocked, SessionError};
use crate::{
    compile::Desired,
    kernel::{Failed, ForeignConflict, KernelError, Object, Target},
    skipped::{Kind, Skip},
};

/// The targets that are skipped because of foreign programs.
pub(super) struct BlockedTargets {
    choice: OnBlocked,
    /// For each cgroup id, the name of the target and the conflict. Contains only cgroups that were targets at the last check.
    skipped: BTreeMap<u64, (String, ForeignConflict)>,
}

impl BlockedTargets {
    pub(super) fn new(choice: OnBlocked) -> Self {
        Self { choice, skipped: BTreeMap::new() }
    }

    /// Returns the targets that the programs can be attached to. Logs the others once.
    ///
    /// # Errors
    ///
    /// Fails if a target has a conflict and targets must not be skipped.
    pub(super) fn without(
        &mut self,
        object: &Object,
        desired: &Desired,
        targets: Vec<Target>,
    ) -> Result<Vec<Target>, SessionError> {
        let mut conflicts = object.conflicts(desired, &targets).into_iter();
        if self.choice == OnBlocked::Refuse {
            let first = conflicts.next();
            return first.map_or(Ok(targets), |(_, conflict)| Err(KernelError::from(conflict).into()));
        }
        let mut skipped = BTreeMap::new();
        for (target, conflict) in conflicts {
            let cgroup = &targets[target].cgroup;
            skipped.entry(cgroup.id).or_insert_with(|| (cgroup.name.clone(), conflict));
        }
        let before = mem::replace(&mut self.skipped, skipped);
        for (_, (_, conflict)) in self.skipped.iter().filter(|(cgroup, _)| !before.contains_key(cgroup)) {
            log::error!("target skipped ({} of {}): {conflict}", self.skipped.len(), targets.len());
        }
        Ok(targets.into_iter().filter(|target| !self.skipped.contains_key(&target.cgroup.id)).collect())
    }

    /// Returns the skipped targets. They are transient, because foreign programs may be detached.
    pub(super) fn skips(&self) -> impl Iterator<Item = Skip> {
        let skip = |(name, conflict): &(String, ForeignConflict)| {
            Skip::new(Kind::Cgroup, name.clone(), without_help(conflict)).transient_if(true)
        };
        self.skipped.values().map(skip)
    }

    /// Returns the conflict of the first skipped target, as the error for a session without targets.
    pub(super) fn into_error(mut self) -> SessionError {
        let first = self.skipped.pop_first().map(|(_, (_, conflict))| KernelError::from(conflict));
        first.unwrap_or(KernelError::Incomplete { what: "target" }).into()
    }
}

/// Returns the first line of an error, without its help.
fn without_help(error: impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Splits targets into those that could be attached to and those that failed, which are returned as skipped.
pub(super) fn without_failed(targets: Vec<Target>, failed: &Failed) -> (Vec<Target>, Vec<Skip>) {
    let (left, others): (Vec<_>, Vec<_>) =
        targets.into_iter().partition(|target| !failed.contains_key(&target.cgroup.id));
    let skip = |target: &Target| {
        let reason = failed.get(&target.cgroup.id).map(without_help).unwrap_or_default();
        Skip::new(Kind::Cgroup, target.cgroup.name.clone(), reason).transient_if(true)
    };
    let skipped = others.iter().map(skip).collect();
    (left, skipped)
}
