//! The cgroups that programs are attached to, and the links that hold them there.
//!
//! Invariant: a target's number is never given twice, for sockets keep it in their notes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use abi::Target as Numbered;
use aya::{Ebpf, programs::Program};

use super::{
    ForeignConflict, KernelError, Target, attach_conflict,
    links::{self, Link},
    maps,
    pins::{Pinned, Pins},
    syscall,
    tables::SlotAssignment,
};
use crate::{
    compile::Hook,
    escape::Escape,
    fault,
    host::cgroup::{Cgroup, id_at},
};

/// A hook of a cgroup, which is named by its id.
pub(super) type Point = (u64, Hook);

/// Why targets could not be attached to, by their cgroups' ids.
pub type Failed = BTreeMap<u64, KernelError>;

#[derive(Debug, Default)]
pub(super) struct Attached {
    /// By the cgroup's id.
    held: BTreeMap<u64, Held>,
    /// The last number that was given to a target.
    pub(super) last_id: u32,
    /// Where links are pinned, if they are.
    pins: Option<Pins>,
}

#[derive(Debug)]
struct Held {
    target: Numbered,
    links: BTreeMap<Hook, Link>,
    /// Of the cgroup; `None` where it was another agent's target and is none of this one's yet.
    path: Option<PathBuf>,
    /// Whether the cgroup has been removed. Sockets of it may live on.
    is_removed: bool,
}

impl Held {
    fn new(target: Numbered) -> Self {
        Self { target, links: BTreeMap::new(), path: None, is_removed: false }
    }
}

/// Whether the cgroup of this id is still what this path names.
fn is_at(path: &Path, cgroup: u64) -> bool {
    id_at(path) == Some(cgroup)
}

/// Policies hold without the hook, but not on sockets that come by no other.
fn warn_of_optional(hook: Hook, reason: &dyn fmt::Display) {
    log::warn!("cannot attach to {hook}: raw, ping and UDP-Lite sockets keep some of their options: {reason}");
}

impl Attached {
    /// Nothing yet.
    pub(super) fn new(pins: Option<Pins>) -> Self {
        Self { pins, ..Self::default() }
    }

    /// A step is done of what stays in force.
    pub(super) fn done(&self, step: &'static str) {
        if self.pins.is_some() {
            fault::point(step);
        }
    }

    pub(super) fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }

    /// Takes over the links that are pinned: each goes on with this object's program, without a moment between.
    pub(super) fn take_over(&mut self, ebpf: &Ebpf) -> Result<(), KernelError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        for Pinned { cgroup, target, hook, link, path } in pins.links()? {
            if links::is_defunct(&link).unwrap_or(false) {
                unpin(&path);
                continue;
            }
            // Also one that never came in force.
            self.last_id = self.last_id.max(target.id);
            fault::point_for("link-found", cgroup);
            let Some(link) = Link::take_over(link, program(ebpf, hook)?, hook)? else {
                // It has gone since.
                unpin(&path);
                continue;
            };
            fault::point("link-taken-over");
            let held = self.held.entry(cgroup);
            held.or_insert_with(|| Held::new(target)).links.insert(hook, link);
        }
        Ok(())
    }

    /// Gives targets that have none yet their numbers.
    pub(super) fn assign_slots(&mut self, targets: &[Target]) -> Vec<SlotAssignment> {
        let taken: BTreeSet<u32> = self.held.values().map(|held| held.target.place).collect();
        let mut free = (0..).filter(|place| !taken.contains(place));
        targets
            .iter()
            .map(|Target { cgroup, scope }| {
                let target = self.number(cgroup, || free.next().unwrap_or_default());
                SlotAssignment { target, cgroup: cgroup.id, level: cgroup.level, scope: *scope }
            })
            .collect()
    }

    fn number(&mut self, cgroup: &Cgroup, free_place: impl FnOnce() -> u32) -> Numbered {
        if let Some(held) = self.held.get_mut(&cgroup.id) {
            held.path = Some(cgroup.path.clone());
            return held.target;
        }
        let place = free_place();
        self.last_id += 1;
        let target = Numbered { place, id: self.last_id };
        self.held.insert(cgroup.id, Held { path: Some(cgroup.path.clone()), ..Held::new(target) });
        target
    }

    /// Attaches what is missing of `points` of these targets, and tells the programs which target it is; gives what it has
    /// attached. A cgroup that is removed meanwhile is no failure. A target that fails has nothing of it attached, and the
    /// others go on.
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        points: Vec<(Hook, usize)>,
        targets: &[Target],
    ) -> (Vec<Point>, Failed) {
        let (mut added, mut failed) = (Vec::new(), Failed::new());
        let mut points = self.missing(points, targets);
        // One target after the other, those high in the tree first: it is in whole or not at all that one fails.
        points.sort_by_key(|(_, target)| (targets[*target].cgroup.level, *target));
        points.retain(|(hook, target)| {
            let check = || attach_conflict::check(*hook, &targets[*target].cgroup, None);
            !hook.is_optional() || check().inspect_err(|conflict| warn_of_optional(*hook, conflict)).is_ok()
        });
        // All of them before the first is attached.
        for (hook, target) in points.iter().filter(|(hook, _)| !hook.is_optional()) {
            let cgroup = &targets[*target].cgroup;
            match attach_conflict::check(*hook, cgroup, None) {
                Err(conflict) if is_at(&cgroup.path, cgroup.id) => {
                    failed.entry(cgroup.id).or_insert_with(|| conflict.into());
                }
                Err(conflict) => log::debug!("{conflict}"),
                Ok(()) => {}
            }
        }
        for (hook, target) in points {
            let cgroup = &targets[target].cgroup;
            if failed.contains_key(&cgroup.id) {
                continue;
            }
            match self.attach_one(ebpf, hook, cgroup, &mut added) {
                Ok(()) => {}
                Err(error) if !is_at(&cgroup.path, cgroup.id) => {
                    log::debug!("{error}");
                    if let Some(held) = self.held.get_mut(&cgroup.id) {
                        held.is_removed = true;
                    }
                }
                Err(error) if hook.is_optional() => {
                    warn_of_optional(hook, &error);
                    added.retain(|point| *point != (cgroup.id, hook));
                    if let Some(held) = self.held.get_mut(&cgroup.id) {
                        held.links.remove(&hook);
                    }
                }
                Err(error) => drop(failed.insert(cgroup.id, error)),
            }
        }
        let (undone, added): (Vec<_>, Vec<_>) = added.into_iter().partition(|(cgroup, _)| failed.contains_key(cgroup));
        self.detach(&undone);
        (added, failed)
    }

    fn attach_one(
        &mut self,
        ebpf: &mut Ebpf,
        hook: Hook,
        cgroup: &Cgroup,
        added: &mut Vec<Point>,
    ) -> Result<(), KernelError> {
        let Some(held) = self.held.get_mut(&cgroup.id) else { return Ok(()) };
        let link = Link::attach(program(ebpf, hook)?, hook, cgroup)?;
        let link = held.links.entry(hook).insert_entry(link).into_mut();
        added.push((cgroup.id, hook));
        // Others may have attached programs since the check.
        attach_conflict::check(hook, cgroup, Some(program_id(ebpf, hook)?))?;
        maps::write_target(ebpf, hook, cgroup.id, held.target)?;
        if let Some(pins) = &self.pins {
            fault::point("link-attached");
            pins.pin_link(link, cgroup.id, held.target, hook)?;
            fault::point("link-pinned");
        }
        log::debug!("attached {hook} to {}", cgroup.path.escaped());
        Ok(())
    }

    /// Returns the points of these that have no link of ours.
    fn missing(&self, mut points: Vec<(Hook, usize)>, targets: &[Target]) -> Vec<(Hook, usize)> {
        let has =
            |hook, target: &Target| self.held.get(&target.cgroup.id).is_some_and(|held| held.links.contains_key(&hook));
        points.retain(|(hook, target)| !has(*hook, &targets[*target]));
        points
    }

    /// Returns why our programs cannot be attached to these targets as things are, each with the number of the target. What is
    /// attached already stays so. A cgroup that is removed has no conflict.
    pub(super) fn conflicts(&self, points: Vec<(Hook, usize)>, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
        let points = self.missing(points, targets).into_iter().filter(|(hook, _)| !hook.is_optional());
        let conflict = |(hook, target): (Hook, usize)| {
            let cgroup = &targets[target].cgroup;
            let conflict = attach_conflict::check(hook, cgroup, None).err()?;
            is_at(&cgroup.path, cgroup.id).then_some((target, conflict))
        };
        points.filter_map(conflict).collect()
    }

    /// Lets go of what is not among these, but for what still may hold sockets of a cgroup that was removed.
    pub(super) fn detach_except(&mut self, points: &BTreeSet<Point>) {
        self.detach_where(|point, is_removed| !is_removed && !points.contains(point));
    }

    /// Lets go of these.
    pub(super) fn detach(&mut self, points: &[Point]) {
        let points: BTreeSet<&Point> = points.iter().collect();
        self.detach_where(|point, _| points.contains(point));
    }

    /// Lets go of targets of which nothing is attached.
    pub(super) fn drop_unattached(&mut self, cgroups: &Failed) {
        self.held.retain(|cgroup, held| !cgroups.contains_key(cgroup) || !held.links.is_empty());
    }

    /// Lets go of all.
    pub(super) fn detach_all(&mut self) {
        self.detach_where(|_, _| true);
    }

    /// `is_meant` is also told whether the cgroup has been removed.
    fn detach_where(&mut self, is_meant: impl Fn(&Point, bool) -> bool) {
        for (cgroup, Held { target, links, is_removed, path: _ }) in &mut self.held {
            links.retain(|hook, _| {
                let goes = is_meant(&(*cgroup, *hook), *is_removed);
                // There is a path only where links are pinned.
                if let Some(Ok(path)) = self.pins.as_ref().filter(|_| goes).map(|p| p.link(*cgroup, *target, *hook)) {
                    unpin(&path);
                }
                !goes
            });
        }
        // One that was removed before anything was attached still has its place in the tables.
        self.held.retain(|_, held| held.is_removed || !held.links.is_empty());
    }

    /// Notes which cgroups have been removed of those that are not among these. Gives the others: they are there, and no targets
    /// any more.
    pub(super) fn note_removed(&mut self, targets: &[Target]) -> Vec<(u64, Numbered)> {
        let there: BTreeSet<u64> = targets.iter().map(|target| target.cgroup.id).collect();
        let mut others = Vec::new();
        for (cgroup, held) in self.held.iter_mut().filter(|(cgroup, _)| !there.contains(cgroup)) {
            if held.path.as_deref().is_some_and(|path| !is_at(path, *cgroup)) {
                held.is_removed = true;
            } else if !held.is_removed {
                others.push((*cgroup, held.target));
            }
        }
        others
    }

    /// Whether any cgroup has been removed whose links are still held.
    pub(super) fn has_removed(&self) -> bool {
        self.held.values().any(|held| held.is_removed)
    }

    /// Lets go of removed cgroups that have no sockets any more; gives which targets they were, by the ids of their cgroups.
    pub(super) fn detach_removed(&mut self) -> Vec<(u64, Numbered)> {
        // What cannot be asked about is asked about again.
        let is_empty = |held: &Held| held.links.values().all(|link| link.is_defunct().unwrap_or(false));
        let empty = self.held.iter().filter(|(_, held)| held.is_removed && is_empty(held));
        let gone: Vec<_> = empty.map(|(cgroup, held)| (*cgroup, held.target)).collect();
        let ids: BTreeSet<u64> = gone.iter().map(|(cgroup, _)| *cgroup).collect();
        self.detach_where(|(cgroup, _), _| ids.contains(cgroup));
        self.held.retain(|cgroup, _| !ids.contains(cgroup));
        gone
    }
}

/// Removes a link's path. One that is not there was not pinned yet.
fn unpin(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove {}: {error}", path.escaped());
        }
        _ => {}
    }
}

fn program(ebpf: &Ebpf, hook: Hook) -> Result<&Program, KernelError> {
    ebpf.program(hook.program()).ok_or(KernelError::Incomplete { what: hook.program() })
}

fn program_id(ebpf: &Ebpf, hook: Hook) -> Result<u32, KernelError> {
    let error = |reason| KernelError::Load { hook, reason };
    let fd = program(ebpf, hook)?.fd().map_err(|source| error(source.to_string()))?;
    Ok(syscall::info(fd).map_err(|source| error(source.to_string()))?.id)
}
