//! The programs that others have attached to cgroups, at the hooks that policies use.
//!
//! They stay as they are: this is for people to know whom else they have there.

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
    /// Path of the cgroup below the mount.
    pub cgroup: PathBuf,
    pub hook: Hook,
    /// The kernel's number of the program.
    pub id: u32,
    /// As much of it as the kernel keeps, 15 characters; empty if it has none, or may not be seen.
    pub name: String,
    /// How it is attached.
    pub mode: AttachMode,
}

/// When a program of others runs for the sockets of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunOrder {
    /// Before ours: it was on the same cgroup first, or is on one below.
    Before,
    /// After ours on one of the targets at least, and so with the last word there: it is on a cgroup above.
    After,
    /// Not at all where a program of ours is attached to the same hook: it is on a cgroup above, and not attached with
    /// BPF_F_ALLOW_MULTI.
    Never,
}

impl ForeignProgram {
    /// Whether it looks like a program of another sockpolicy.
    #[must_use]
    pub fn is_sockpolicy(&self) -> bool {
        self.name == self.hook.program()
    }

    /// As a line of JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "hook": self.hook.name(),
            "cgroup": format!("/{}", escape::plain(&self.cgroup)),
            "program": self.id,
            "name": self.name,
            "attached": self.mode.word(),
            "sockpolicy": self.is_sockpolicy(),
        })
    }

    /// Returns whether its cgroup is above this one, which is a path below the mount.
    #[must_use]
    pub fn is_above(&self, target: &Path) -> bool {
        target.starts_with(&self.cgroup) && *target != self.cgroup
    }

    /// When it runs for the sockets of these targets, which are paths below the mount; `None`: for none of them.
    #[must_use]
    pub fn run_order(&self, targets: &[PathBuf]) -> Option<RunOrder> {
        if targets.iter().any(|target| self.is_above(target)) {
            return Some(if self.mode == AttachMode::Multi { RunOrder::After } else { RunOrder::Never });
        }
        targets.iter().any(|target| self.cgroup.starts_with(target)).then_some(RunOrder::Before)
    }
}

/// Which it is, and where.
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

/// The programs attached to any cgroup, those above before those below, and in each in the order in which they run.
///
/// # Errors
///
/// Where the tree of cgroups cannot be read, or this process may not ask: it takes CAP_NET_ADMIN.
pub fn foreign_programs(mount: &Mount) -> io::Result<Vec<ForeignProgram>> {
    foreign_programs_on(mount, &mount.walk(|_| Wanted::WithChildren, &Budget::default()).found)
}

/// The programs of another sockpolicy above these targets, which are paths below the mount: that one has the last word.
///
/// # Errors
///
/// Where this process may not ask.
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
        for neighbour in &mut found {
            neighbour.name = names.get(&neighbour.id).cloned().unwrap_or_default();
        }
    }
    Ok(found)
}

fn attached_to(mount: &Mount, below: &Path) -> io::Result<Vec<ForeignProgram>> {
    let folder = match open_directory(&mount.path.join(below)) {
        Ok(folder) => folder,
        // Gone since it was listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for hook in Hook::ALL {
        let attached = match syscall::query(&folder, hook, Query::Own) {
            // A kernel without this hook, or a cgroup that is gone by now.
            Err(error)
                if [Some(libc::EINVAL), Some(libc::ENOENT), Some(libc::ENODEV)].contains(&error.raw_os_error()) =>
            {
                continue;
            }
            attached => attached?,
        };
        let Attachment { mode, programs } = attached;
        let neighbour = |id| ForeignProgram { cgroup: below.to_owned(), hook, id, name: String::new(), mode };
        found.extend(programs.into_iter().map(neighbour));
    }
    Ok(found)
}

/// The names of all programs that this process may look at, by number.
fn names() -> HashMap<u32, String> {
    let programs = loaded_programs().filter_map(Result::ok);
    programs.map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned())).collect()
}

/// Returns the name of a program; `None` if it has none, is gone, or must not be looked at.
pub(super) fn name_of(program: u32) -> Option<String> {
    names().remove(&program).filter(|name| !name.is_empty())
}
