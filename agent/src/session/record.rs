//! Writes the record of an instance, on behalf of its session.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::Generation;
use crate::{
    fault,
    instance::{self, Files, Instance, InstanceError, Record, RingOverflow},
    kernel::{MapIds, Target, boundaries, names_and_scopes},
    report::SavedCounters,
    skipped::SkippedList,
};

/// An instance and its record.
pub(super) struct RecordWriter {
    instance: Instance,
    record: Record,
    /// Whether the record on disk is older than `record`, because writing it failed.
    is_behind: bool,
}

impl RecordWriter {
    /// Makes the first record of an instance that takes over the generations with the numbers `previous`. `ring_full` is the
    /// number of events that have found the ring buffer full so far.
    pub(super) fn new(instance: Instance, maps: MapIds, previous: &[u32], ring_full: u64) -> Self {
        let before = instance.record();
        let record = Record {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            persists: instance.persists(),
            maps,
            unread: RingOverflow::at_start(ring_full, None),
            generations: Vec::new(),
            retired: Vec::new(),
            counted: Vec::new(),
            skipped: SkippedList::default(),
            reload: None,
        };
        // A record with other maps is not about the policies that are taken over.
        let record = match before.filter(|before| before.maps == maps) {
            Some(Record { unread, mut generations, retired, counted, .. }) => {
                generations.retain(|generation| previous.contains(&generation.number));
                Record {
                    unread: RingOverflow::at_start(ring_full, Some(unread)),
                    generations,
                    retired,
                    counted,
                    ..record
                }
            }
            None => record,
        };
        Self { instance, record, is_behind: false }
    }

    /// Returns the names of the targets of the generations that were taken over.
    pub(super) fn targets(&self) -> BTreeSet<&str> {
        self.record.targets().collect()
    }

    /// Returns the generations that were taken over.
    pub(super) fn previous(&self) -> Vec<Generation> {
        readable(&self.record.generations)
    }

    /// Returns the retired generations that were taken over.
    pub(super) fn retired(&self) -> Vec<Generation> {
        readable(&self.record.retired)
    }

    /// Returns the counters that the previous agent had saved.
    pub(super) fn saved_counters(&self) -> Vec<SavedCounters> {
        self.record.counted.clone()
    }

    /// Adds a generation before it is enabled. For the first generation of a persistent instance it is an error if the record
    /// cannot be written; otherwise the record is written later.
    pub(super) fn add(
        &mut self,
        number: u32,
        files: Files,
        targets: &[Target],
        audit_judges: bool,
        is_first: bool,
    ) -> Result<(), InstanceError> {
        let generation = instance::Generation {
            number,
            files,
            targets: names_and_scopes(targets),
            boundaries: boundaries(targets),
            cgroup_ids: ids(targets),
            audit_judges,
        };
        let mut record = self.record.clone();
        // An earlier generation with this number was never enabled.
        record.generations.retain(|other| other.number != number);
        record.generations.push(generation);
        self.write(record, is_first && self.instance.persists())?;
        fault::point("recorded");
        Ok(())
    }

    /// Removes a generation that was not enabled.
    pub(super) fn withdraw(&mut self, number: u32) {
        self.record.generations.retain(|generation| generation.number != number);
        self.write_if_possible();
    }

    /// Replaces the targets of the latest generation.
    pub(super) fn retarget(&mut self, targets: &[Target]) -> Result<(), InstanceError> {
        let mut record = self.record.clone();
        if let Some(last) = record.generations.last_mut() {
            (last.targets, last.boundaries) = (names_and_scopes(targets), boundaries(targets));
            last.cgroup_ids = ids(targets);
        }
        // A full disk does not keep policies from new cgroups.
        self.write(record, false)
    }

    /// Returns which of these cgroups are targets of other instances, each with the name of the instance.
    pub(super) fn governed_by_others(&self, cgroups: &HashSet<&str>) -> BTreeMap<String, String> {
        self.instance.governed_by_others(cgroups)
    }

    /// Records the result of a reload.
    pub(super) fn note_reload(&mut self, refused: Option<String>) {
        self.record.reload = Some(instance::Reload { time: jiff::Timestamp::now().to_string(), refused });
        self.write_if_possible();
    }

    /// Records what is skipped.
    pub(super) fn note_skipped(&mut self, skipped: &SkippedList) {
        if self.record.skipped != *skipped {
            self.record.skipped = skipped.clone();
            self.write_if_possible();
        }
    }

    /// Writes a record, unless a target that is new in it belongs to another instance. If the record cannot be written, that is
    /// an error if `must_be_written`; otherwise the record is written later.
    fn write(&mut self, record: Record, must_be_written: bool) -> Result<(), InstanceError> {
        let own: BTreeSet<&str> = self.record.targets().collect();
        let new: Vec<&str> = record.targets().filter(|name| !own.contains(name)).collect();
        let written =
            if new.is_empty() { self.instance.write(&record) } else { self.instance.write_exclusive(&record, &new) };
        self.is_behind = written.is_err();
        match written {
            Err(error @ (InstanceError::File { .. } | InstanceError::Private(_))) if !must_be_written => {
                log::warn!("`sockpolicy status` will show outdated information: {error}");
            }
            written => written?,
        }
        self.record = record;
        Ok(())
    }

    /// Keeps the generations with the numbers `active`. Moves those of `undelivered`, whose events may not have been reported
    /// yet, to the retired ones. `counted` are the counters at this point.
    pub(super) fn retire(&mut self, active: &[u32], undelivered: &[Generation], counted: Vec<SavedCounters>) {
        let Record { generations, retired, .. } = &self.record;
        let is_undelivered = |generation: &&instance::Generation| {
            undelivered.iter().any(|other| other.number == generation.number) && !active.contains(&generation.number)
        };
        let retired = retired.iter().chain(generations).filter(is_undelivered).cloned().collect();
        let is_active = |generation: &&instance::Generation| active.contains(&generation.number);
        let generations = generations.iter().filter(is_active).cloned().collect();
        let record = Record { generations, retired, counted, ..self.record.clone() };
        if record != self.record {
            self.record = record;
            // If this fails, other processes only see the retired generations for longer.
            self.write_if_possible();
        }
    }

    /// Updates the number of events that have found the ring buffer full, and writes a record that could not be written before.
    pub(super) fn count_ring_overflow(&mut self, ring_full: u64) {
        let unread = self.record.unread.counted(ring_full);
        if self.record.unread != unread || self.is_behind {
            self.record.unread = unread;
            self.write_if_possible();
        }
    }

    fn write_if_possible(&mut self) {
        let written = self.instance.write(&self.record);
        self.is_behind = written.is_err();
        if let Err(error) = written {
            log::warn!("{error}");
        }
    }

    /// Returns the policy files of the latest generation.
    pub(super) fn files(&self) -> Files {
        self.record.generations.last().map(|last| last.files.clone()).unwrap_or_default()
    }

    /// Returns the name of the instance if its policies persist.
    pub(super) fn persistent_name(&self) -> Option<&str> {
        self.instance.persists().then(|| self.instance.name())
    }
}

fn ids(targets: &[Target]) -> BTreeMap<String, u64> {
    targets.iter().map(|target| (target.cgroup.name.clone(), target.cgroup.id)).collect()
}

/// Returns the generations whose policies this build can compile.
fn readable(generations: &[instance::Generation]) -> Vec<Generation> {
    let compiled = generations.iter().filter_map(|generation| {
        let desired = generation.desired();
        let desired = desired.inspect_err(|error| log::debug!("generation {}: {error}", generation.number)).ok()?;
        Some(Generation { number: generation.number, desired, is_taken_over: true })
    });
    compiled.collect()
}
