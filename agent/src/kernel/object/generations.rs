//! The generations of policies: staged, enabled, moved to other targets, and retired.
//!
//! [`Object::stage`] writes the tables and attaches the programs that the policies need. [`Object::enable`] then writes one
//! number, and only this step takes effect. The previous policies stay loaded for sockets that they still set up, until
//! [`Object::retire`].

use std::{collections::BTreeSet, mem, path::Path, slice};

use abi::{Config, Counters, GENERATIONS, calls, index};

use super::{
    super::{
        ForeignConflict, KernelError, Target,
        attached::{Failed, Point},
        maps,
        memlock::Memlock,
        tables::{SlotAssignment, Tables},
    },
    Object,
};
use crate::{
    compile::{Desired, Hook},
    host::cgroup::is_initial_namespace,
    policy::model::Calls,
};

/// Minimum time between two events of one process, option and verdict: five events a second. It applies only if policies
/// request conflicts; `governed` and `all` report every call.
const EVENT_INTERVAL_NS: u64 = 200_000_000;

/// Policies whose tables are filled and installed.
pub struct FilledTables(pub(super) Tables);

/// Policies that are ready to be enabled.
pub struct Staged {
    tables: Tables,
    needed: BTreeSet<Point>,
    target_levels: u64,
    are_nested: bool,
    audit_judges: bool,
    failed: Failed,
}

impl Staged {
    /// Returns the number that the generation of these policies will have.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.tables.generation
    }

    /// Returns the targets that the programs could not be attached to, each with its error. The policies will not be in force
    /// there.
    pub fn take_failed(&mut self) -> Failed {
        mem::take(&mut self.failed)
    }
}

impl Object {
    /// Returns the previous generations that this object has not retired, the latest last.
    pub fn previous(&self) -> impl Iterator<Item = u32> {
        self.previous.iter().map(|previous| previous.generation)
    }

    /// Returns the previous generations that an earlier agent had retired but not counted before it exited, with their
    /// counters. Removes these generations from [`Self::previous`].
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn take_retired(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        let oldest = self.config.oldest;
        let retired = self.previous.extract_if(.., |previous| previous.generation < oldest);
        retired.map(|previous| Ok((previous.generation, previous.counters()?))).collect()
    }

    /// Returns the counters of the previous generations that are left.
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read.
    pub fn previous_counters(&self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        self.previous.iter().map(|previous| Ok((previous.generation, previous.counters()?))).collect()
    }

    /// Keeps policies in force on one cgroup while `during` runs. Returns the result of `during` and the counters of the
    /// policies. Drops the records of that time.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn in_force_on<T>(
        &mut self,
        desired: &Desired,
        filled: Option<FilledTables>,
        target: Target,
        during: impl FnOnce() -> T,
    ) -> Result<(T, Vec<Counters>), KernelError> {
        let staged = self.stage(desired, filled, &[target])?;
        self.enable(staged, Calls::Conflicts)?;
        let result = during();
        self.disable()?;
        let counters = self.counters()?;
        self.attached.detach_all();
        self.tables = None;
        while self.next_record().is_some() {}
        Ok((result, counters))
    }

    /// Returns the foreign programs that prevent these policies from being attached now, each with the index of the target.
    #[must_use]
    pub fn conflicts(&self, desired: &Desired, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
        self.attached.conflicts(attachments(desired, targets), targets)
    }

    /// Makes policies ready to be enabled: fills their tables, unless [`Self::load`] has done so, and attaches the programs
    /// that they need in addition to those that are attached.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. Everything is then as before.
    pub fn stage(
        &mut self,
        desired: &Desired,
        filled: Option<FilledTables>,
        targets: &[Target],
    ) -> Result<Staged, KernelError> {
        let _memlock = Memlock::raise();
        let counts_calls = desired.audit.timing || desired.audit.calls != Calls::Conflicts;
        if counts_calls && !maps::reserve_tallies(&mut self.ebpf, &desired.options)? {
            log::warn!("rules name too many options by number: the report does not count the calls on each of them");
        }
        let assigned = self.attached.assign_slots(targets);
        let mut tables = match filled {
            Some(FilledTables(tables)) => tables,
            None => {
                let slots = assigned.iter().map(|assigned| assigned.target.place as usize + 1).max().unwrap_or(0);
                let tables = Tables::make(self.config.generation + 1, desired, slots)?;
                self.generation_maps.install(slice::from_ref(&tables))?;
                tables
            }
        };
        assigned.iter().try_for_each(|assigned| tables.assign(assigned))?;
        self.attached.fault_point("tables-installed");
        let (added, mut failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(&mut tables, &assigned, &failed)?;
        self.attached.drop_unattached(&failed);
        let all_failed = targets.iter().all(|target| failed.contains_key(&target.cgroup.id));
        if all_failed && let Some((_, first)) = failed.pop_first() {
            self.attached.detach(&added);
            return Err(first);
        }
        self.added = added;
        Ok(Staged {
            audit_judges: desired.audit_judges,
            tables,
            needed: needed(desired, targets, &failed),
            target_levels: target_levels(targets),
            are_nested: are_nested(targets),
            failed,
        })
    }

    /// Returns whether there is a free slot for one more generation.
    #[must_use]
    pub fn has_room(&self) -> bool {
        // A socket that finds its generation among those that are kept may read the tables of this generation a moment later.
        self.config.in_force == 0 || self.config.generation - self.config.oldest < GENERATIONS - 2
    }

    /// Detaches what [`Self::stage`] attached.
    pub fn abandon(&mut self, _: Staged) {
        self.detach_added();
    }

    pub(super) fn detach_added(&mut self) {
        let added = mem::take(&mut self.added);
        self.attached.detach(&added);
    }

    /// Enables staged policies in place of those in force, by one write. Returns the number of their generation.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn enable(&mut self, staged: Staged, calls: Calls) -> Result<u32, KernelError> {
        let Staged { tables, needed, target_levels, are_nested, audit_judges, failed: _ } = staged;
        // This bit is not cleared: sockets of a former target may live long.
        let are_nested = self.config.are_nested | u32::from(are_nested);
        let mut numbers = self.config.numbers;
        numbers[index::slot_of(tables.generation) as usize] = tables.option_filter;
        // Written before the generation number, by which programs choose the filter.
        self.config.update(&mut self.ebpf, |config| {
            config.numbers = numbers;
            config.are_nested = are_nested;
        })?;
        let enabled = Config {
            in_force: 1,
            audit_judges: audit_judges.into(),
            calls: match calls {
                Calls::Conflicts => calls::CONFLICTS,
                Calls::Governed => calls::GOVERNED,
                Calls::All => calls::ALL,
            },
            target_levels,
            event_interval_ns: if calls == Calls::Conflicts { EVENT_INTERVAL_NS } else { 0 },
            by_process: u32::from(self.by_process),
            generation: tables.generation,
            oldest: if self.config.in_force == 0 {
                tables.generation
            } else {
                // Successive agents may each exit before they retire a generation.
                self.config.oldest.max((tables.generation + 2).saturating_sub(GENERATIONS))
            },
            last_target: self.attached.last_id,
            audit: self.config.audit,
            are_nested,
            numbers,
            ..Config::default()
        };
        self.config.update(&mut self.ebpf, |config| *config = enabled)?;
        self.attached.fault_point("enabled");
        self.previous.extend(self.tables.replace(tables).map(Tables::into_previous));
        self.needed = needed;
        self.added.clear();
        Ok(enabled.generation)
    }

    /// Moves the policies in force to these targets, as cgroups come and go. Removed cgroups stay targets until
    /// [`Self::detach_removed`]. Returns the targets that the programs could not be attached to; `None`, without any change, if
    /// the tables have no room for the new targets.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. The new cgroups are then no targets.
    pub fn retarget(&mut self, desired: &Desired, targets: &[Target]) -> Result<Option<Failed>, KernelError> {
        let _memlock = Memlock::raise();
        let Some(tables) = &mut self.tables else { return Ok(None) };
        let assigned = self.attached.assign_slots(targets);
        if !assigned.iter().all(|assigned| tables.has_slot(assigned.target.place)) {
            self.attached.detach_except(&self.needed);
            return Ok(None);
        }
        for assigned in &assigned {
            tables.assign(assigned)?;
        }
        let last_target = self.attached.last_id;
        self.config.update(&mut self.ebpf, |config| {
            config.target_levels |= target_levels(targets);
            config.last_target = last_target;
            config.are_nested |= u32::from(are_nested(targets));
        })?;
        let (_, failed) = self.attached.attach(&mut self.ebpf, attachments(desired, targets), targets);
        clear_failed(tables, &assigned, &failed)?;
        self.attached.drop_unattached(&failed);
        let was_needed = mem::replace(&mut self.needed, needed(desired, targets, &failed));
        for (cgroup, target) in self.attached.note_removed(targets) {
            let points: Vec<Point> = was_needed.iter().copied().filter(|(needed, _)| *needed == cgroup).collect();
            // Other cgroups belong to previous policies.
            if !points.is_empty() {
                tables.clear(target, cgroup)?;
                self.attached.detach(&points);
            }
        }
        Ok(Some(failed))
    }

    /// Returns whether a target's cgroup has been removed.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        self.attached.has_removed()
    }

    /// Detaches from targets that have been removed and whose last sockets are closed. The kernel does not notify of that, so
    /// the caller has to poll.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn detach_removed(&mut self) -> Result<(), KernelError> {
        let removed = self.attached.detach_removed();
        let Some(tables) = &mut self.tables else { return Ok(()) };
        removed.into_iter().try_for_each(|(cgroup, target)| tables.clear(target, cgroup))
    }

    /// Detaches what only previous policies needed. Sockets that these still set up continue with the policies in force.
    /// Returns the counters of each previous generation.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written or the counters cannot be read.
    pub fn retire(&mut self) -> Result<Vec<(u32, Vec<Counters>)>, KernelError> {
        self.config.update(&mut self.ebpf, |config| config.oldest = config.generation)?;
        self.attached.fault_point("retired");
        self.attached.detach_except(&self.needed);
        self.attached.fault_point("detached");
        let counted = self.previous_counters()?;
        self.previous.clear();
        Ok(counted)
    }

    /// Makes all programs inert, by one write.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn disable(&mut self) -> Result<(), KernelError> {
        self.config.update(&mut self.ebpf, |config| config.in_force = 0)
    }
}

/// Returns the hooks that policies need on these targets, without those of failed targets.
fn needed(desired: &Desired, targets: &[Target], failed: &Failed) -> BTreeSet<Point> {
    let points = attachments(desired, targets).into_iter().map(|(hook, target)| (targets[target].cgroup.id, hook));
    points.filter(|(cgroup, _)| !failed.contains_key(cgroup)).collect()
}

/// Clears the slots of failed targets.
fn clear_failed(tables: &mut Tables, assigned: &[SlotAssignment], failed: &Failed) -> Result<(), KernelError> {
    let assigned = assigned.iter().filter(|assigned| failed.contains_key(&assigned.cgroup));
    assigned.into_iter().try_for_each(|assigned| tables.clear(assigned.target, assigned.cgroup))
}

/// Returns the hooks to attach to, each with the index of a target.
fn attachments(desired: &Desired, targets: &[Target]) -> Vec<(Hook, usize)> {
    let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
    desired.attachments(&scopes).collect()
}

/// Returns whether one of the targets is a descendant of another.
fn are_nested(targets: &[Target]) -> bool {
    let mut names: Vec<&Path> = targets.iter().map(|target| Path::new(&target.cgroup.name)).collect();
    // Sorted, so that the first descendant of a cgroup directly follows it.
    names.sort_unstable();
    names.windows(2).any(|pair| pair[1].starts_with(pair[0]))
}

/// Returns a bit for each level of the cgroup tree at which there is a target. In a cgroup namespace the levels are not those
/// that the kernel counts, so all bits are set.
fn target_levels(targets: &[Target]) -> u64 {
    if !is_initial_namespace() {
        return u64::MAX;
    }
    targets.iter().fold(0, |levels, target| levels | 1 << target.cgroup.level)
}
