//! The cgroups that programs are attached to, and the links that hold them there.
//!
//! Invariant: a target's number is never given twice, for sockets keep it in their notes.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use abi::Target as Numbered;
use aya::Ebpf;

use super::{KernelError, Target, links::Link, maps, tables::Placed};
use crate::compile::Hook;

/// A hook of a cgroup, which is named by its id.
pub(super) type Point = (u64, Hook);

#[derive(Debug, Default)]
pub(super) struct Attached {
    /// By the cgroup's id.
    held: BTreeMap<u64, Held>,
    /// The last number that was given to a target.
    pub(super) last_id: u32,
}

#[derive(Debug)]
struct Held {
    target: Numbered,
    links: BTreeMap<Hook, Link>,
    /// Whether the cgroup has been removed. Sockets of it may live on.
    is_removed: bool,
}

impl Attached {
    /// Gives targets that have none yet their numbers.
    pub(super) fn place(&mut self, targets: &[Target]) -> Vec<Placed> {
        targets
            .iter()
            .map(|Target { cgroup, scope }| {
                let target = self.number(cgroup.id);
                Placed { target, cgroup: cgroup.id, level: cgroup.level, scope: *scope }
            })
            .collect()
    }

    fn number(&mut self, cgroup: u64) -> Numbered {
        if let Some(held) = self.held.get(&cgroup) {
            return held.target;
        }
        let taken: BTreeSet<u32> = self.held.values().map(|held| held.target.place).collect();
        let place = (0..).find(|place| !taken.contains(place)).unwrap_or_default();
        self.last_id += 1;
        let target = Numbered { place, id: self.last_id };
        self.held.insert(cgroup, Held { target, links: BTreeMap::new(), is_removed: false });
        target
    }

    /// Attaches what is missing of `points` of these targets, and tells the programs which target it is; gives what it has
    /// attached, also where it fails. A cgroup that is removed meanwhile is no failure.
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        points: impl Iterator<Item = (Hook, usize)>,
        targets: &[Target],
    ) -> (Vec<Point>, Result<(), KernelError>) {
        let mut added = Vec::new();
        for (hook, target) in points {
            let cgroup = &targets[target].cgroup;
            let Some(held) = self.held.get_mut(&cgroup.id).filter(|held| !held.links.contains_key(&hook)) else {
                continue;
            };
            let attached = attach_to(ebpf, hook, &targets[target]).and_then(|link| {
                held.links.insert(hook, link);
                added.push((cgroup.id, hook));
                maps::tell_target(ebpf, hook, cgroup.id, held.target)
            });
            match attached {
                Ok(()) => log::debug!("attached {hook} to {}", cgroup.path.display()),
                Err(error) if !cgroup.path.exists() => log::debug!("{error}"),
                Err(error) => return (added, Err(error)),
            }
        }
        (added, Ok(()))
    }

    pub(super) fn holds(&self, cgroup: u64) -> bool {
        self.held.contains_key(&cgroup)
    }

    /// Lets go of what is not among these, but for what still may hold sockets of a cgroup that was removed.
    pub(super) fn keep(&mut self, points: &BTreeSet<Point>) {
        for (cgroup, held) in self.held.iter_mut().filter(|(_, held)| !held.is_removed) {
            held.links.retain(|hook, _| points.contains(&(*cgroup, *hook)));
        }
        self.held.retain(|_, held| !held.links.is_empty());
    }

    /// Notes that the cgroups which are not among these are removed.
    pub(super) fn note_removed(&mut self, targets: &[Target]) {
        let there: BTreeSet<u64> = targets.iter().map(|target| target.cgroup.id).collect();
        for (cgroup, held) in &mut self.held {
            held.is_removed = !there.contains(cgroup);
        }
    }

    /// Whether any cgroup has been removed whose links are still held.
    pub(super) fn has_removed(&self) -> bool {
        self.held.values().any(|held| held.is_removed)
    }

    /// Lets go of removed cgroups that have no sockets any more; gives which targets they were, by the ids of their cgroups.
    pub(super) fn let_go_of_empty(&mut self) -> Vec<(u64, Numbered)> {
        // What cannot be asked about is asked about again.
        let is_empty = |held: &Held| held.links.values().all(|link| link.is_defunct().unwrap_or(false));
        let gone: Vec<_> = self.held.extract_if(.., |_, held| held.is_removed && is_empty(held)).collect();
        gone.into_iter().map(|(cgroup, held)| (cgroup, held.target)).collect()
    }

    /// Lets go of these.
    pub(super) fn let_go(&mut self, points: &[Point]) {
        for (cgroup, hook) in points {
            if let Some(held) = self.held.get_mut(cgroup) {
                held.links.remove(hook);
            }
        }
        self.held.retain(|_, held| !held.links.is_empty());
    }

    pub(super) fn clear(&mut self) {
        mem::take(&mut self.held);
    }
}

fn attach_to(ebpf: &Ebpf, hook: Hook, target: &Target) -> Result<Link, KernelError> {
    let program = ebpf.program(hook.program()).ok_or(KernelError::Incomplete { what: hook.program() })?;
    Link::attach(program, hook, &target.cgroup)
}
