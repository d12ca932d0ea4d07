//! Whether a program can be attached to a cgroup without a foreign program losing its effect.
//!
//! The rules are those of the kernel (`hierarchy_allows_attach` and `compute_effective_progs`, kernel/bpf/cgroup.c, 5.10 to
//! 6.18):
//!
//! - A program that is attached without flags permits no other program on its cgroup and its descendants.
//! - A program that is attached with BPF_F_ALLOW_OVERRIDE permits no other program on its cgroup. It takes effect on a
//!   descendant only if no cgroup between them, and not the descendant itself, has a program.
//! - Programs that are attached with BPF_F_ALLOW_MULTI, as all links are, always take effect and permit others.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, fstat},
        statfs::{CGROUP2_SUPER_MAGIC, fstatfs},
    },
};

use super::{
    ForeignProgram, KernelError, Target,
    foreign_programs::name_of,
    syscall::{self, Attachment, Query},
};
use crate::{
    compile::{Desired, Hook},
    escape::Escape,
    host::cgroup::Cgroup,
};

/// How programs are attached to a cgroup at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// Without flags.
    Exclusive,
    /// With BPF_F_ALLOW_OVERRIDE.
    Override,
    /// With BPF_F_ALLOW_MULTI, or by a link.
    Multi,
}

impl AttachMode {
    /// Reads the flags that BPF_PROG_QUERY returns.
    pub(super) fn from_flags(flags: u32) -> Self {
        const ALLOW_OVERRIDE: u32 = 1;
        const ALLOW_MULTI: u32 = 2;
        match flags {
            _ if flags & ALLOW_MULTI != 0 => Self::Multi,
            _ if flags & ALLOW_OVERRIDE != 0 => Self::Override,
            _ => Self::Exclusive,
        }
    }

    /// Returns the name of the mode in JSON.
    pub(super) fn json_name(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Override => "override",
            Self::Multi => "multi",
        }
    }

    /// Returns how the program is attached, in the kernel's terms.
    #[must_use]
    pub fn flags(self) -> &'static str {
        match self {
            Self::Exclusive => "without flags",
            Self::Override => "with BPF_F_ALLOW_OVERRIDE",
            Self::Multi => "with BPF_F_ALLOW_MULTI",
        }
    }
}

/// The obstacle to attaching to a cgroup. `level` counts cgroups upwards from that cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    /// The kernel refuses to attach because of the program of this level.
    Forbidden { level: usize },
    /// The program of this level takes effect now and would not afterwards.
    Displaced { level: usize },
    /// This program takes effect but is attached to none of the levels, so the mode in which it is attached is unknown.
    Hidden { program: u32 },
}

/// Returns the obstacle to attaching a link to the first of these cgroups. Each cgroup is followed by its parent. `effective`
/// are the programs that take effect on the first cgroup.
fn obstacle(levels: &[Attachment], effective: &[u32]) -> Option<Obstacle> {
    let (own, above) = levels.split_first()?;
    if !own.programs.is_empty() && own.mode != AttachMode::Multi {
        return Some(Obstacle::Forbidden { level: 0 });
    }
    let nearest = above.iter().position(|level| !level.programs.is_empty()).map(|at| at + 1);
    match nearest.map(|level| (level, levels[level].mode)) {
        Some((level, AttachMode::Exclusive)) => Some(Obstacle::Forbidden { level }),
        // If the cgroup already has a program, that program has displaced the one above.
        Some((level, AttachMode::Override)) => own.programs.is_empty().then_some(Obstacle::Displaced { level }),
        // A program further above that still takes effect must be attached with BPF_F_ALLOW_MULTI.
        Some((_, AttachMode::Multi)) => None,
        None if !own.programs.is_empty() => None,
        None => effective.first().map(|program| Obstacle::Hidden { program: *program }),
    }
}

/// A foreign program that prevents a program from being attached to a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignConflict {
    hook: Hook,
    cgroup: PathBuf,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reason {
    Forbidden {
        id: u32,
        program: String,
        at: PathBuf,
        mode: AttachMode,
    },
    Displaced {
        id: u32,
        program: String,
        at: PathBuf,
    },
    Hidden {
        program: String,
    },
    /// The programs of this cgroup cannot be queried.
    Unknown {
        at: PathBuf,
        error: String,
    },
}

impl std::error::Error for ForeignConflict {}

impl ForeignConflict {
    /// Returns a short reason, for a table.
    pub(super) fn reason(&self) -> String {
        match &self.reason {
            Reason::Forbidden { program, at, mode, .. } => format!("{program} on {} {}", at.escaped(), mode.flags()),
            Reason::Displaced { program, at, .. } => {
                format!("{program} on {} {}", at.escaped(), AttachMode::Override.flags())
            }
            Reason::Hidden { program } => format!("{program} on a cgroup that is not visible here"),
            Reason::Unknown { error, .. } => error.clone(),
        }
    }

    /// Returns whether the programs could not be queried.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self.reason, Reason::Unknown { .. })
    }

    /// Returns whether the conflict is with this foreign program.
    #[must_use]
    pub fn is_about(&self, program: &ForeignProgram) -> bool {
        match &self.reason {
            Reason::Forbidden { id, .. } | Reason::Displaced { id, .. } => {
                (self.hook, *id) == (program.hook, program.id)
            }
            Reason::Hidden { .. } | Reason::Unknown { .. } => false,
        }
    }
}

impl fmt::Display for ForeignConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hook, cgroup, reason } = self;
        write!(f, "cannot attach to {hook} of cgroup {}: ", cgroup.escaped())?;
        match reason {
            Reason::Forbidden { program, at, mode, .. } => write!(
                f,
                "{program} on {at} is attached {}, and the kernel permits no other program there{}\n  help: attach that program \
                 by a bpf_link or with BPF_F_ALLOW_MULTI; `bpftool cgroup show {at}` lists it",
                mode.flags(),
                if *mode == AttachMode::Exclusive { " or below" } else { "" },
                at = at.escaped()
            ),
            Reason::Displaced { program, at, .. } => write!(
                f,
                "{program} on {at} would no longer take effect there, because it is attached {}\n  help: attach that program by \
                 a bpf_link or with BPF_F_ALLOW_MULTI, or take a cgroup above {at} as the target; `bpftool cgroup show {at}` \
                 lists it",
                AttachMode::Override.flags(),
                at = at.escaped()
            ),
            Reason::Hidden { program } => write!(
                f,
                "{program} takes effect there from a cgroup that this process cannot see, and whether it would still do so is \
                 unknown\n  help: run sockpolicy in the host's cgroup namespace, with the host's cgroup2 file system"
            ),
            Reason::Unknown { at, error } => write!(
                f,
                "the programs on {} are unknown: {error}\n  help: BPF_PROG_QUERY takes CAP_NET_ADMIN",
                at.escaped()
            ),
        }
    }
}

/// Checks that a link can be attached, and that no foreign program loses its effect by that.
///
/// `ours` is the id of our program if it is already attached. The check then finds what attaching it has displaced.
///
/// # Errors
///
/// Names the foreign program. Also fails if the programs cannot be queried. A hook that this kernel does not have is no error.
pub(super) fn check(hook: Hook, cgroup: &Cgroup, ours: Option<u32>) -> Result<(), ForeignConflict> {
    let conflict = |reason| ForeignConflict { hook, cgroup: cgroup.path.clone(), reason };
    let unknown = |(at, error): (PathBuf, io::Error)| conflict(Reason::Unknown { at, error: error.to_string() });
    let Some(mut levels) = levels(hook, cgroup).map_err(unknown)? else { return Ok(()) };
    let Attachment { programs: mut effective, .. } = syscall::query(&cgroup.folder, hook, Query::Effective)
        .map_err(|error| unknown((cgroup.path.clone(), error)))?;
    if let Some(ours) = ours {
        levels[0].programs.retain(|program| *program != ours);
        effective.retain(|program| *program != ours);
    }
    let Some(obstacle) = obstacle(&levels, &effective) else { return Ok(()) };
    Err(conflict(match obstacle {
        Obstacle::Forbidden { level } => {
            let Attachment { mode, programs } = &levels[level];
            let (id, at) = (programs[0], path_at(&cgroup.path, level));
            Reason::Forbidden { id, program: program_name(id), at, mode: *mode }
        }
        Obstacle::Displaced { level } => {
            let (id, at) = (levels[level].programs[0], path_at(&cgroup.path, level));
            Reason::Displaced { id, program: program_name(id), at }
        }
        Obstacle::Hidden { program } => Reason::Hidden { program: program_name(program) },
    }))
}

/// Returns the foreign programs that prevent policies from being attached to these targets now, each with the index of the
/// target.
#[must_use]
pub fn conflicts(desired: &Desired, targets: &[Target]) -> Vec<(usize, ForeignConflict)> {
    let scopes: Vec<_> = targets.iter().map(|target| target.scope).collect();
    let points = desired.attachments(&scopes);
    let points = points.filter(|(hook, _)| !hook.is_optional());
    points.filter_map(|(hook, target)| Some((target, check(hook, &targets[target].cgroup, None).err()?))).collect()
}

impl From<ForeignConflict> for KernelError {
    fn from(conflict: ForeignConflict) -> Self {
        Self::Foreign(Box::new(conflict))
    }
}

fn program_name(program: u32) -> String {
    match name_of(program) {
        Some(name) => format!("program {program} ({name})"),
        None => format!("program {program}"),
    }
}

fn path_at(path: &Path, level: usize) -> PathBuf {
    path.ancestors().nth(level).unwrap_or(path).to_owned()
}

/// Queries a cgroup and its visible ancestors; `None` if this kernel does not have the hook.
fn levels(hook: Hook, cgroup: &Cgroup) -> Result<Option<Vec<Attachment>>, (PathBuf, io::Error)> {
    let mut levels = Vec::new();
    let mut folder = cgroup.folder.try_clone().map_err(|error| (cgroup.path.clone(), error))?;
    loop {
        match syscall::query(&folder, hook, Query::Own) {
            Ok(attachment) => levels.push(attachment),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && levels.is_empty() => return Ok(None),
            Err(error) => return Err((path_at(&cgroup.path, levels.len()), error)),
        }
        match parent(&folder) {
            Ok(Some(above)) => folder = above,
            Ok(None) => return Ok(Some(levels)),
            Err(error) => return Err((path_at(&cgroup.path, levels.len()), error)),
        }
    }
}

/// Opens the parent of a cgroup; `None` at the top of the mount. Opened relative to the cgroup, because the length of a path is
/// limited.
fn parent(folder: &File) -> io::Result<Option<File>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let above = File::from(openat(folder, "..", flags, Mode::empty())?);
    let (here, there) = (fstat(folder)?, fstat(&above)?);
    let is_cgroup = fstatfs(above.as_fd())?.filesystem_type() == CGROUP2_SUPER_MAGIC;
    Ok((is_cgroup && here.st_dev == there.st_dev && here.st_ino != there.st_ino).then_some(above))
}

#[cfg(test)]
mod tests {
    use super::{AttachMode::*, Obstacle::*, *};

    /// Returns levels with or without a program. The number of a program is that of its level, counted upwards from 1.
    fn levels(modes: &[Option<AttachMode>]) -> Vec<Attachment> {
        let level = |(mode, number): (&Option<AttachMode>, u32)| Attachment {
            mode: mode.unwrap_or(Exclusive),
            programs: mode.map(|_| number).into_iter().collect(),
        };
        modes.iter().zip(1..).map(level).collect()
    }

    /// Returns the programs that take effect on the first level, computed as the kernel does.
    fn effective(levels: &[Attachment]) -> Vec<u32> {
        let mut effective = Vec::new();
        for level in levels {
            if effective.is_empty() || level.mode == Multi {
                effective.extend(&level.programs);
            }
        }
        effective
    }

    /// Returns whether the kernel lets a link be attached to the first level, by the kernel's rules.
    fn is_permitted(levels: &[Attachment]) -> bool {
        let (own, above) = levels.split_first().unwrap();
        let nearest = above.iter().find(|level| level.mode == Multi || !level.programs.is_empty());
        (own.programs.is_empty() || own.mode == Multi) && nearest.is_none_or(|level| level.mode != Exclusive)
    }

    fn all_modes(depth: usize) -> Vec<Vec<Option<AttachMode>>> {
        let one = [None, Some(Exclusive), Some(Override), Some(Multi)];
        (0..depth).fold(vec![Vec::new()], |all, _| {
            all.iter().flat_map(|modes| one.map(|mode| [modes.as_slice(), &[mode]].concat())).collect()
        })
    }

    #[test]
    fn obstacles_agree_with_the_rules_of_the_kernel() {
        const OURS: u32 = 99;
        for modes in all_modes(4) {
            let levels = levels(&modes);
            let before = effective(&levels);
            let mut with_ours = levels.clone();
            with_ours[0].programs.push(OURS);
            with_ours[0].mode = Multi;
            let after = effective(&with_ours);
            let lost = before.iter().find(|program| !after.contains(program));
            match obstacle(&levels, &before) {
                Some(Forbidden { .. }) => assert!(!is_permitted(&levels), "{modes:?}"),
                Some(Displaced { level }) => {
                    assert!(is_permitted(&levels), "{modes:?}");
                    assert_eq!(lost, Some(&(level as u32 + 1)), "{modes:?}");
                }
                Some(Hidden { .. }) => panic!("all programs are visible: {modes:?}"),
                None => assert!(is_permitted(&levels) && lost.is_none(), "{modes:?}"),
            }
        }
    }

    #[test]
    fn deciding_level_is_named() {
        let cases: [(&[_], _); 9] = [
            (&[None, None, None], None),
            (&[Some(Override), None, None], Some(Forbidden { level: 0 })),
            (&[None, Some(Exclusive), Some(Override)], Some(Forbidden { level: 1 })),
            (&[Some(Multi), None, Some(Exclusive)], Some(Forbidden { level: 2 })),
            (&[None, None, Some(Override)], Some(Displaced { level: 2 })),
            (&[None, Some(Override), Some(Exclusive)], Some(Displaced { level: 1 })),
            (&[None, Some(Multi), Some(Override)], None),
            (&[Some(Multi), Some(Override), None], None),
            (&[Some(Multi), Some(Multi), Some(Multi)], None),
        ];
        for (modes, expected) in cases {
            let levels = levels(modes);
            assert_eq!(obstacle(&levels, &effective(&levels)), expected, "{modes:?}");
        }
    }

    #[test]
    fn program_above_the_visible_levels_is_unknown_unless_it_must_be_multi() {
        const HIDDEN: u32 = 7;
        assert_eq!(obstacle(&levels(&[None, None]), &[HIDDEN]), Some(Hidden { program: HIDDEN }));
        assert_eq!(obstacle(&levels(&[None, Some(Multi)]), &[2, HIDDEN]), None);
        assert_eq!(obstacle(&levels(&[Some(Multi), None]), &[1, HIDDEN]), None);
    }

    #[test]
    fn flags_are_read_as_the_kernel_returns_them() {
        assert_eq!([0, 1, 2, 3].map(AttachMode::from_flags), [Exclusive, Override, Multi, Multi]);
    }
}
