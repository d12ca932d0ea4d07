//! The word that a session leaves of itself, as an instance's record.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::Generation;
use crate::{
    fault,
    instance::{self, Files, Instance, InstanceError, Record, RingOverflow},
    kernel::{MapIds, Target, names_and_scopes},
    report::SavedCounters,
    skipped::SkippedList,
};

/// An instance, and what it says of itself.
pub(super) struct RecordWriter {
    instance: Instance,
    record: Record,
    /// Whether the record that others read is older than this one: there was no space for it, for example.
    is_behind: bool,
}

impl RecordWriter {
    /// Of an instance that takes over generations of these numbers, if any, when so many events had found no room.
    pub(super) fn of(instance: Instance, maps: MapIds, former: &[u32], ring_full: u64) -> Self {
        let before = instance.record();
        let record = Record {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            persists: instance.persists(),
            maps,
            unread: RingOverflow::begun(ring_full, None),
            generations: Vec::new(),
            retired: Vec::new(),
            counted: Vec::new(),
            skipped: SkippedList::default(),
        };
        // Else it is not what goes on.
        let record = match before.filter(|before| before.maps == maps) {
            Some(Record { unread, mut generations, retired, counted, .. }) => {
                generations.retain(|generation| former.contains(&generation.number));
                Record { unread: RingOverflow::begun(ring_full, Some(unread)), generations, retired, counted, ..record }
            }
            None => record,
        };
        Self { instance, record, is_behind: false }
    }

    /// The policies that were taken over.
    pub(super) fn previous(&self) -> Vec<Generation> {
        readable(&self.record.generations)
    }

    /// Those before them.
    pub(super) fn retired(&self) -> Vec<Generation> {
        readable(&self.record.retired)
    }

    /// What had been counted when what was taken over was put in force.
    pub(super) fn saved_counters(&self) -> Vec<SavedCounters> {
        self.record.counted.clone()
    }

    /// Says what will be in force in a moment. A record that cannot be written is an error if it is the first one of what stays
    /// without an agent; else it is written later.
    pub(super) fn add(
        &mut self,
        number: u32,
        files: Files,
        targets: &[Target],
        audit_judges: bool,
        is_first: bool,
    ) -> Result<(), InstanceError> {
        let generation = instance::Generation { number, files, targets: names_and_scopes(targets), audit_judges };
        let mut record = self.record.clone();
        // One of this number never came in force.
        record.generations.retain(|other| other.number != number);
        record.generations.push(generation);
        self.write(record, is_first && self.instance.persists())?;
        fault::point("recorded");
        Ok(())
    }

    /// Says that this will not be in force after all.
    pub(super) fn withdraw(&mut self, number: u32) {
        self.record.generations.retain(|generation| generation.number != number);
        self.write_if_possible();
    }

    /// Says where that is in force.
    pub(super) fn retarget(&mut self, targets: &[Target]) -> Result<(), InstanceError> {
        let mut record = self.record.clone();
        if let Some(last) = record.generations.last_mut() {
            last.targets = names_and_scopes(targets);
        }
        // New cgroups do not wait for room on a disk.
        self.write(record, false)
    }

    /// Which of these cgroups are targets of another instance, each with its name.
    pub(super) fn governed_by_others(&self, cgroups: &HashSet<&str>) -> BTreeMap<String, String> {
        self.instance.governed_by_others(cgroups)
    }

    /// Says what is skipped.
    pub(super) fn note_skipped(&mut self, skipped: &SkippedList) {
        if self.record.skipped != *skipped {
            self.record.skipped = skipped.clone();
            self.write_if_possible();
        }
    }

    /// Says this from now on, unless another instance has one of the targets that are new in it. A record that cannot be written
    /// is an error if `must_be_written`; else it is written later.
    fn write(&mut self, record: Record, must_be_written: bool) -> Result<(), InstanceError> {
        let own: BTreeSet<&str> = self.record.targets().collect();
        let new: Vec<&str> = record.targets().filter(|name| !own.contains(name)).collect();
        let written =
            if new.is_empty() { self.instance.write(&record) } else { self.instance.write_exclusive(&record, &new) };
        self.is_behind = written.is_err();
        match written {
            Err(error @ (InstanceError::File { .. } | InstanceError::Private(_))) if !must_be_written => {
                log::warn!("`sockpolicy status` will not show this as it is: {error}");
            }
            written => written?,
        }
        self.record = record;
        Ok(())
    }

    /// Says that only these are there still, that those are history of which may be to be told yet, and what had been counted by then.
    pub(super) fn retire(&mut self, there: &[u32], to_be_told: &[Generation], counted: Vec<SavedCounters>) {
        let Record { generations, retired, .. } = &self.record;
        let is_to_be_told = |generation: &&instance::Generation| {
            to_be_told.iter().any(|other| other.number == generation.number) && !there.contains(&generation.number)
        };
        let retired = retired.iter().chain(generations).filter(is_to_be_told).cloned().collect();
        let is_there = |generation: &&instance::Generation| there.contains(&generation.number);
        let generations = generations.iter().filter(is_there).cloned().collect();
        let record = Record { generations, retired, counted, ..self.record.clone() };
        if record != self.record {
            self.record = record;
            // The others are told of too long, no more.
            self.write_if_possible();
        }
    }

    /// Says that so many events have found no room by now, and what could not be said before.
    pub(super) fn count(&mut self, ring_full: u64) {
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

    /// What the files said that are in force.
    pub(super) fn files(&self) -> Files {
        self.record.generations.last().map(|last| last.files.clone()).unwrap_or_default()
    }

    /// The name under which what is in force stays so, if it does.
    pub(super) fn persistent_name(&self) -> Option<&str> {
        self.instance.persists().then(|| self.instance.name())
    }
}

/// Those that this build understands.
fn readable(generations: &[instance::Generation]) -> Vec<Generation> {
    let understood = generations.iter().filter_map(|generation| {
        let desired = generation.desired();
        let desired = desired.inspect_err(|error| log::debug!("generation {}: {error}", generation.number)).ok()?;
        Some(Generation { number: generation.number, desired, is_taken_over: true })
    });
    understood.collect()
}
