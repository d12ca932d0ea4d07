//! The cgroups that programs are attached to, and the links that attach them.
//!
//! Invariant: the id of a target is never used again, because sockets keep it in their notes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use abi::Target as TargetNumbers;
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

/// The id of a cgroup, and a hook of this cgroup.
pub(super) type Point = (u64, Hook);

/// The targets that the programs could not be attached to, by the id of the cgroup, each with its error.
pub type Failed = BTreeMap<u64, KernelError>;

#[derive(Debug, Default)]
pub(super) struct Attached {
    /// By the id of the cgroup.
    targets: BTreeMap<u64, AttachedTarget>,
    /// The highest id of a target so far.
    pub(super) last_id: u32,
    /// The pins; `None` if links are not pinned.
    pins: Option<Pins>,
}

#[derive(Debug)]
struct AttachedTarget {
    target: TargetNumbers,
    links: BTreeMap<Hook, Link>,
    /// The path of the cgroup; `None` if an earlier agent attached to it and it is not a target of this agent yet.
    path: Option<PathBuf>,
    /// Whether the cgroup has been removed. Its sockets may outlive it.
    is_removed: bool,
}

impl AttachedTarget {
    fn new(target: TargetNumbers) -> Self {
        Self { target, links: BTreeMap::new(), path: None, is_removed: false }
    }
}

/// Returns whether the cgroup at this path still has this id.
fn is_at(path: &Path, cgroup: u64) -> bool {
    id_at(path) == Some(cgroup)
}

/// Logs that an optional hook could not be attached to. Policies are in force without it, except on sockets that pass no other
/// hook.
fn warn_of_optional(hook: Hook, reason: &dyn fmt::Display) {
    log::warn!("cannot attach to {hook}: raw, ping and UDP-Lite sockets keep some of their options: {reason}");
}

impl Attached {
    /// Returns a value without attachments.
    pub(super) fn new(pins: Option<Pins>) -> Self {
        Self { pins, ..Self::default() }
    }

    /// Triggers a fault point, for tests, if policies are pinned.
    pub(super) fn fault_point(&self, step: &'static str) {
        if self.pins.is_some() {
            fault::point(step);
        }
    }

    pub(super) fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }

    /// Takes over the pinned links. The program of each link is replaced by that of this object, without a gap.
    pub(super) fn take_over(&mut self, ebpf: &Ebpf) -> Result<(), KernelError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        for Pinned { cgroup, target, hook, link, path } in pins.links()? {
            if links::is_defunct(&link).unwrap_or(false) {
                unpin(&path);
                continue;
            }
            // Also the id of a target that was never in force.
            self.last_id = self.last_id.max(target.id);
            fault::point_for("link-found", cgroup);
            let Some(link) = Link::take_over(link, program(ebpf, hook)?, hook)? else {
                // The cgroup has been removed since the check.
                unpin(&path);
                continue;
            };
            fault::point("link-taken-over");
            let attached = self.targets.entry(cgroup);
            attached.or_insert_with(|| AttachedTarget::new(target)).links.insert(hook, link);
        }
        Ok(())
    }

    /// Returns whether programs are attached to this cgroup, by its id.
    pub(super) fn is_attached_to(&self, cgroup: u64) -> bool {
        self.targets.contains_key(&cgroup)
    }

    /// Assigns slots to the targets. Targets that have a slot keep it.
    pub(super) fn assign_slots(&mut self, targets: &[Target]) -> Vec<SlotAssignment> {
        let used: BTreeSet<u32> = self.targets.values().map(|attached| attached.target.place).collect();
        let mut free = (0..).filter(|place| !used.contains(place));
        targets
            .iter()
            .map(|Target { cgroup, scope, .. }| {
                let target = self.assign_slot(cgroup, || free.next().unwrap_or_default());
                SlotAssignment { target, cgroup: cgroup.id, level: cgroup.level, scope: *scope }
            })
            .collect()
    }

    fn assign_slot(&mut self, cgroup: &Cgroup, free_place: impl FnOnce() -> u32) -> TargetNumbers {
        if let Some(attached) = self.targets.get_mut(&cgroup.id) {
            attached.path = Some(cgroup.path.clone());
            return attached.target;
        }
        let place = free_place();
        self.last_id += 1;
        let target = TargetNumbers { place, id: self.last_id };
        self.targets
            .insert(cgroup.id, AttachedTarget { path: Some(cgroup.path.clone()), ..AttachedTarget::new(target) });
        target
    }

    /// Attaches the missing programs of `points`, and writes to each program's storage which target it is attached to. Returns
    /// what was attached, and the targets that failed. A failed target has no new attachments; the other targets are not
    /// affected. A cgroup that is removed meanwhile does not count as failed.
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        points: Vec<(Hook, usize)>,
        targets: &[Target],
    ) -> (Vec<Point>, Failed) {
        let (mut added, mut failed) = (Vec::new(), Failed::new());
        let mut points = self.missing(points, targets);
        // Sorted by target, ancestors first, because a target is attached as a whole or not at all.
        points.sort_by_key(|(_, target)| (targets[*target].cgroup.level, *target));
        points.retain(|(hook, target)| {
            let check = || attach_conflict::check(*hook, &targets[*target].cgroup, None);
            !hook.is_optional() || check().inspect_err(|conflict| warn_of_optional(*hook, conflict)).is_ok()
        });
        // All conflicts are checked before the first program is attached.
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
                    if let Some(attached) = self.targets.get_mut(&cgroup.id) {
                        attached.is_removed = true;
                    }
                }
                Err(error) if hook.is_optional() => {
                    warn_of_optional(hook, &error);
                    added.retain(|point| *point != (cgroup.id, hook));
                    if let Some(attached) = self.targets.get_mut(&cgroup.id) {
                        attached.links.remove(&hook);
                    }
                }
                Err(error) => drop(failed.insert(cgroup.id, error)),
            }
        }
        let (failed_points, added): (Vec<_>, Vec<_>) =
            added.into_iter().partition(|(cgroup, _)| failed.contains_key(cgroup));
        self.detach(&failed_points);
        (added, failed)
    }

    fn attach_one(
        &mut self,
        ebpf: &mut Ebpf,
        hook: Hook,
        cgroup: &Cgroup,
        added: &mut Vec<Point>,
    ) -> Result<(), KernelError> {
        let Some(attached) = self.targets.get_mut(&cgroup.id) else { return Ok(()) };
        let link = Link::attach(program(ebpf, hook)?, hook, cgroup)?;
        let link = attached.links.entry(hook).insert_entry(link).into_mut();
        added.push((cgroup.id, hook));
        // Checked again: others may have attached programs since the first check.
        attach_conflict::check(hook, cgroup, Some(program_id(ebpf, hook)?))?;
        maps::write_target(ebpf, hook, cgroup.id, attached.target)?;
        if let Some(pins) = &self.pins {
            fault::point("link-attached");
            pins.pin_link(link, cgroup.id, attached.target, hook)?;
            fault::point("link-pinned");
        }
        log::debug!("attached {hook} to {}", cgroup.path.escaped());
        Ok(())
    }

    /// Returns the points that have no link of this object.
    fn missing(&self, mut points: Vec<(Hook, usize)>, targets: &[Target]) -> Vec<(Hook, usize)> {
        let has = |hook, target: &Target| {
            self.targets.get(&target.cgroup.id).is_some_and(|attached| attached.links.contains_key(&hook))
        };
        points.retain(|(hook, target)| !has(*hook, &targets[*target]));
        points
    }

    /// Returns the foreign programs that prevent our programs from being attached now, each with the index of the target.
    /// Ignores what is already attached, and cgroups that have been removed.
    pub(super) fn conflicts(&self, points: Vec<(Hook, usize)>, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
        let points = self.missing(points, targets).into_iter().filter(|(hook, _)| !hook.is_optional());
        let conflict = |(hook, target): (Hook, usize)| {
            let cgroup = &targets[target].cgroup;
            let conflict = attach_conflict::check(hook, cgroup, None).err()?;
            is_at(&cgroup.path, cgroup.id).then_some((target, conflict))
        };
        points.filter_map(conflict).collect()
    }

    /// Detaches all but these points. Keeps the points of removed cgroups, which may still have sockets.
    pub(super) fn detach_except(&mut self, points: &BTreeSet<Point>) {
        self.detach_where(|point, is_removed| !is_removed && !points.contains(point));
    }

    /// Detaches these points.
    pub(super) fn detach(&mut self, points: &[Point]) {
        let points: BTreeSet<&Point> = points.iter().collect();
        self.detach_where(|point, _| points.contains(point));
    }

    /// Removes those of these targets that have no attachments.
    pub(super) fn drop_unattached(&mut self, cgroups: &Failed) {
        self.targets.retain(|cgroup, attached| !cgroups.contains_key(cgroup) || !attached.links.is_empty());
    }

    /// Detaches everything.
    pub(super) fn detach_all(&mut self) {
        self.detach_where(|_, _| true);
    }

    /// Detaches the points for which `matches` returns true. Its second argument is whether the cgroup has been removed.
    fn detach_where(&mut self, matches: impl Fn(&Point, bool) -> bool) {
        for (cgroup, AttachedTarget { target, links, is_removed, path: _ }) in &mut self.targets {
            links.retain(|hook, _| {
                let is_detached = matches(&(*cgroup, *hook), *is_removed);
                // `link` returns a path only if links are pinned.
                if let Some(Ok(path)) =
                    self.pins.as_ref().filter(|_| is_detached).map(|p| p.link(*cgroup, *target, *hook))
                {
                    unpin(&path);
                }
                !is_detached
            });
        }
        // A cgroup that was removed before anything was attached still has a slot in the tables.
        self.targets.retain(|_, attached| attached.is_removed || !attached.links.is_empty());
    }

    /// Marks the cgroups that are not among `targets` and have been removed. Returns the cgroups that exist but are not targets
    /// any more.
    pub(super) fn note_removed(&mut self, targets: &[Target]) -> Vec<(u64, TargetNumbers)> {
        let current: BTreeSet<u64> = targets.iter().map(|target| target.cgroup.id).collect();
        let mut others = Vec::new();
        for (cgroup, attached) in self.targets.iter_mut().filter(|(cgroup, _)| !current.contains(cgroup)) {
            if attached.path.as_deref().is_some_and(|path| !is_at(path, *cgroup)) {
                attached.is_removed = true;
            } else if !attached.is_removed {
                others.push((*cgroup, attached.target));
            }
        }
        others
    }

    /// Returns whether a cgroup has been removed whose links are still open.
    pub(super) fn has_removed(&self) -> bool {
        self.targets.values().any(|attached| attached.is_removed)
    }

    /// Detaches from removed cgroups that have no sockets any more. Returns the ids of these cgroups and the targets that they
    /// were.
    pub(super) fn detach_removed(&mut self) -> Vec<(u64, TargetNumbers)> {
        // If a link cannot be queried, the next call queries it again.
        let is_empty =
            |attached: &AttachedTarget| attached.links.values().all(|link| link.is_defunct().unwrap_or(false));
        let empty = self.targets.iter().filter(|(_, attached)| attached.is_removed && is_empty(attached));
        let removed: Vec<_> = empty.map(|(cgroup, attached)| (*cgroup, attached.target)).collect();
        let ids: BTreeSet<u64> = removed.iter().map(|(cgroup, _)| *cgroup).collect();
        self.detach_where(|(cgroup, _), _| ids.contains(cgroup));
        self.targets.retain(|cgroup, _| !ids.contains(cgroup));
        removed
    }
}

/// Removes the pin of a link. It is no error if the link was not pinned.
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
