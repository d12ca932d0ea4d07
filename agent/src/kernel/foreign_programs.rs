//! Foreign programs: those that other software has attached to cgroups at the hooks that policies use.
//!
//! They are only reported, never changed.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, io,
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;
use serde_json::{Value, json};

use super::{
    attach_conflict::AttachMode,
    syscall::{self, Attachment, Query},
};
use crate::{
    compile::Hook,
    escape::{self, Escape},
    host::cgroup::{Budget, Mount, Wanted, open_directory},
};

/// A program that is attached to a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignProgram {
    /// Path of the cgroup, relative to the mount.
    pub cgroup: PathBuf,
    pub hook: Hook,
    /// The kernel's id of the program.
    pub id: u32,
    /// The name, of which the kernel keeps 15 characters. Empty if the program has none or must not be inspected.
    pub name: String,
    /// How it is attached.
    pub mode: AttachMode,
}

/// When a foreign program runs for the sockets of a target, relative to our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunOrder {
    /// Before ours: it was attached to the same cgroup first, or is on a descendant.
    Before,
    /// After ours on at least one target, where it can override our programs: it is on an ancestor.
    After,
    /// It does not run if a program of ours is attached to the same hook: it is on an ancestor, and not attached with
    /// BPF_F_ALLOW_MULTI.
    Never,
}

impl ForeignProgram {
    /// Returns whether the name is that of a program of sockpolicy.
    #[must_use]
    pub fn is_sockpolicy(&self) -> bool {
        self.name == self.hook.program()
    }

    /// Returns the program as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "hook": self.hook.name(),
            "cgroup": format!("/{}", escape::plain(&self.cgroup)),
            "program": self.id,
            "name": self.name,
            "attached": self.mode.json_name(),
            "sockpolicy": self.is_sockpolicy(),
        })
    }

    /// Returns whether the program's cgroup is an ancestor of `target`, a path relative to the mount.
    #[must_use]
    pub fn is_above(&self, target: &Path) -> bool {
        target.starts_with(&self.cgroup) && *target != self.cgroup
    }

    /// Returns when the program runs for the sockets of these targets, which are paths relative to the mount; `None` if it runs
    /// for none of them.
    #[must_use]
    pub fn run_order(&self, targets: &[PathBuf]) -> Option<RunOrder> {
        if targets.iter().any(|target| self.is_above(target)) {
            return Some(if self.mode == AttachMode::Multi { RunOrder::After } else { RunOrder::Never });
        }
        targets.iter().any(|target| self.cgroup.starts_with(target)).then_some(RunOrder::Before)
    }
}

/// The program and its cgroup.
impl fmt::Display for ForeignProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cgroup, id, name, .. } = self;
        match name.as_str() {
            _ if self.is_sockpolicy() => write!(f, "another sockpolicy's (program {id})")?,
            "" => write!(f, "program {id}")?,
            name => write!(f, "{} (program {id})", name.escaped())?,
        }
        write!(f, " on /{}", cgroup.escaped())
    }
}

/// Returns the programs of all cgroups. Ancestors come before descendants; the programs of one cgroup are in the order in which
/// they run.
///
/// # Errors
///
/// Fails if the tree of cgroups cannot be read or this process may not query it, which takes CAP_NET_ADMIN.
pub fn foreign_programs(mount: &Mount) -> io::Result<Vec<ForeignProgram>> {
    foreign_programs_on(mount, &mount.walk(|_| Wanted::WithChildren, &Budget::default()).found)
}

/// Returns the programs of other sockpolicy processes on ancestors of these targets, which override ours. The targets are paths
/// relative to the mount.
///
/// # Errors
///
/// Fails if this process may not query the programs.
pub fn overriding_programs(mount: &Mount, targets: &[PathBuf]) -> io::Result<Vec<ForeignProgram>> {
    let above: BTreeSet<PathBuf> =
        targets.iter().flat_map(|target| target.ancestors().skip(1)).map(Path::to_owned).collect();
    let mut found = foreign_programs_on(mount, &above)?;
    found.retain(ForeignProgram::is_sockpolicy);
    Ok(found)
}

fn foreign_programs_on<'a>(
    mount: &Mount,
    cgroups: impl IntoIterator<Item = &'a PathBuf>,
) -> io::Result<Vec<ForeignProgram>> {
    let mut found = Vec::new();
    for cgroup in cgroups {
        found.extend(attached_to(mount, cgroup)?);
    }
    if !found.is_empty() {
        let names = names();
        for program in &mut found {
            program.name = names.get(&program.id).cloned().unwrap_or_default();
        }
    }
    Ok(found)
}

pub(super) fn attached_to(mount: &Mount, path: &Path) -> io::Result<Vec<ForeignProgram>> {
    let folder = match open_directory(&mount.path.join(path)) {
        Ok(folder) => folder,
        // The cgroup was removed after it had been listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for hook in Hook::ALL {
        let attached = match syscall::query(&folder, hook, Query::Own) {
            // The kernel does not have the hook, or the cgroup has been removed.
            Err(error)
                if [Some(libc::EINVAL), Some(libc::ENOENT), Some(libc::ENODEV)].contains(&error.raw_os_error()) =>
            {
                continue;
            }
            attached => attached?,
        };
        let Attachment { mode, programs } = attached;
        let program = |id| ForeignProgram { cgroup: path.to_owned(), hook, id, name: String::new(), mode };
        found.extend(programs.into_iter().map(program));
    }
    Ok(found)
}

/// Returns the names of all programs that this process may inspect, by id.
fn names() -> HashMap<u32, String> {
    let programs = loaded_programs().filter_map(Result::ok);
    programs.map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned())).collect()
}

/// Returns the name of a program; `None` if it has none, is gone, or must not be inspected.
pub(super) fn name_of(program: u32) -> Option<String> {
    names().remove(&program).filter(|name| !name.is_empty())
}
