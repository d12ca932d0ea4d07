//! Examines the tree of cgroups, within bounds that no owner of a subtree can exceed or use up for others.
//!
//! Directories are examined in turn: first one of each child of the top, then the next one of each, and so at each level. A
//! subtree of any size so takes no more than its equal share of the budget as long as others have directories left.
//!
//! A directory that cannot be examined is left out and named. Nothing is an error of the whole walk.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io, mem,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use nix::dir::{Dir, Type};

use super::{Mount, is_removed, is_transient, open_directory};
use crate::{
    escape,
    skipped::{Kind, Skip},
};

/// How much a walk may examine.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Directories that are examined.
    pub directories: usize,
    /// Bytes of the paths of these, and of names of directories that wait to be examined.
    pub bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { directories: 64 * 1024, bytes: 32 * 1024 * 1024 }
    }
}

/// What a walk does with a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Leaves it out.
    No,
    /// Notes it.
    Alone,
    /// Notes it, and looks at those right below it.
    WithChildren,
}

/// What a walk has found.
#[derive(Debug, Default)]
pub struct Tree {
    /// Paths below the mount, in the order in which they were examined.
    pub found: Vec<PathBuf>,
    /// Directories below which cgroups are not known.
    pub skipped: Vec<Skip>,
}

/// The names in one directory take at most one part in so many of the bytes that are left.
const NAMES_SHARE: usize = 8;

/// Subtrees that are named if the budget is used up: those with the most left to examine.
const NAMED_MAX: usize = 8;

impl Mount {
    /// Examines the top, and those of the cgroups below it that are `wanted`, down to [`abi::CGROUP_LEVELS_MAX`] levels.
    pub fn walk(&self, wanted: impl Fn(&Path) -> Wanted, budget: &Budget) -> Tree {
        let mut walk = Walk { mount: self, wanted, budget: *budget, tree: Tree::default(), unnamed: Vec::new() };
        let mut top = Node::new(PathBuf::new());
        while walk.has_budget() && top.advance(&mut walk) {}
        walk.name_unexamined(top);
        walk.tree
    }
}

struct Walk<'a, W> {
    mount: &'a Mount,
    wanted: W,
    /// What is left of it.
    budget: Budget,
    tree: Tree,
    /// Directories with children for whose names there was no room, and how many.
    unnamed: Vec<(usize, PathBuf)>,
}

/// A directory, and what is left to examine below it.
struct Node {
    below: PathBuf,
    is_examined: bool,
    /// Those of its children that have something left, the one whose turn it is first.
    children: VecDeque<Node>,
    /// Names of children that are not examined yet.
    names: Vec<OsString>,
}

impl Node {
    fn new(below: PathBuf) -> Self {
        Self { below, is_examined: false, children: VecDeque::new(), names: Vec::new() }
    }

    /// Examines one directory of this subtree. Returns whether there was any left.
    fn advance<W: Fn(&Path) -> Wanted>(&mut self, walk: &mut Walk<'_, W>) -> bool {
        if !self.is_examined {
            self.is_examined = true;
            walk.examine(self);
            return true;
        }
        if let Some(name) = self.names.pop() {
            let mut child = Self::new(self.below.join(name));
            child.advance(walk);
            if child.is_left() {
                self.children.push_back(child);
            }
            return true;
        }
        let Some(mut child) = self.children.pop_front() else { return false };
        child.advance(walk);
        if child.is_left() {
            self.children.push_back(child);
        }
        true
    }

    fn is_left(&self) -> bool {
        !self.names.is_empty() || !self.children.is_empty()
    }
}

impl<W: Fn(&Path) -> Wanted> Walk<'_, W> {
    fn has_budget(&self) -> bool {
        self.budget.directories > 0 && self.budget.bytes > 0
    }

    fn examine(&mut self, node: &mut Node) {
        self.budget.directories -= 1;
        self.budget.bytes = self.budget.bytes.saturating_sub(node.below.as_os_str().len());
        self.tree.found.push(node.below.clone());
        if (self.wanted)(&node.below) != Wanted::WithChildren {
            return;
        }
        let is_deepest = self.mount.level_of(&node.below) >= abi::CGROUP_LEVELS_MAX;
        match self.list(node, is_deepest) {
            Ok(true) if is_deepest => {
                let max = abi::CGROUP_LEVELS_MAX;
                self.skip(&node.below, format!("cgroups below it are more than {max} levels deep"), false);
            }
            Ok(_) => {}
            Err(error) if is_removed(&error) => {}
            Err(error) => {
                self.skip(&node.below, format!("cannot list the cgroups below it: {error}"), is_transient(&error));
            }
        }
    }

    /// Notes the names of the directories right below a node, unless it is a deepest one. Returns whether there is any.
    fn list(&mut self, node: &mut Node, is_deepest: bool) -> io::Result<bool> {
        // One directory is not to use up what others need.
        let mut room = self.budget.bytes / NAMES_SHARE;
        let mut unnamed = 0;
        let folder = open_directory(&self.mount.path.join(&node.below))?;
        for entry in Dir::from_fd(folder.into())?.iter() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if entry.file_type() != Some(Type::Directory) || name == b"." || name == b".." {
                continue;
            }
            let bytes = name.len() + size_of::<OsString>();
            let name = OsStr::from_bytes(name);
            if (self.wanted)(&node.below.join(name)) == Wanted::No {
                continue;
            }
            if is_deepest {
                return Ok(true);
            }
            if room > bytes && node.names.len() < self.budget.directories {
                room -= bytes;
                self.budget.bytes -= bytes;
                node.names.push(name.to_owned());
            } else {
                unnamed += 1;
            }
        }
        if unnamed > 0 {
            self.unnamed.push((unnamed, node.below.clone()));
        }
        Ok(unnamed > 0 || node.is_left())
    }

    fn skip(&mut self, below: &Path, reason: String, is_transient: bool) {
        self.tree.skipped.push(Skip::new(Kind::Cgroup, cgroup_name(below), reason).transient_if(is_transient));
    }

    /// Names the subtrees with the most left to examine.
    fn name_unexamined(&mut self, top: Node) {
        let mut left = mem::take(&mut self.unnamed);
        let mut nodes = vec![top];
        while let Some(Node { below, is_examined: _, children, names }) = nodes.pop() {
            let count = names.len();
            if count > 0 {
                left.push((count, below));
            }
            nodes.extend(children);
        }
        left.sort_by(|(one, _), (other, _)| other.cmp(one));
        let others = left.len().saturating_sub(NAMED_MAX);
        for (count, below) in left.into_iter().take(NAMED_MAX) {
            let reason = format!("{count} cgroups right below it were not examined: there are too many");
            self.skip(&below, reason, false);
        }
        if others > 0 {
            self.skip(Path::new(""), format!("{others} more subtrees were not examined: there are too many"), false);
        }
    }
}

/// Returns the name of a cgroup at a path below the mount, as the kernel writes it.
pub(super) fn cgroup_name(below: &Path) -> String {
    format!("/{}", escape::plain(below))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A tree of plain directories.
    fn tree(paths: &[String]) -> (PathBuf, Mount) {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let top = std::env::temp_dir().join(format!("sockpolicy-walk-{}-{number}", std::process::id()));
        for path in paths {
            fs::create_dir_all(top.join(path)).unwrap();
        }
        (top.clone(), Mount { path: top, depth: 0 })
    }

    #[test]
    fn large_subtree_takes_no_share_of_others() {
        let large = (0..500).map(|number| format!("a/large/{number}/x"));
        let small = (0..20).map(|number| format!("a/small/{number}/x"));
        let (top, mount) = tree(&large.chain(small).collect::<Vec<_>>());
        let walked = mount.walk(|_| Wanted::WithChildren, &Budget { directories: 100, ..Budget::default() });
        let below_small = walked.found.iter().filter(|below| below.starts_with("a/small")).count();
        fs::remove_dir_all(top).unwrap();
        assert_eq!((walked.found.len(), below_small), (100, 41));
        assert_eq!(walked.skipped[0].name, "/a/large");
    }

    #[test]
    fn long_names_use_up_the_bytes_of_their_own_subtree() {
        let long = (0..200).map(|number| format!("a/{}/{}", "l".repeat(250), "l".repeat(240) + &number.to_string()));
        let (top, mount) = tree(&long.chain(["a/b/c/d".to_owned()]).collect::<Vec<_>>());
        let walked = mount.walk(|_| Wanted::WithChildren, &Budget { bytes: 16 * 1024, ..Budget::default() });
        fs::remove_dir_all(top).unwrap();
        assert!(walked.found.contains(&"a/b/c/d".into()), "{:?}", walked.found.len());
        assert!(!walked.skipped.is_empty());
    }

    #[test]
    fn walk_ends_at_the_deepest_level_and_names_it() {
        let deep = vec!["d"; 40].join("/");
        let (top, mount) = tree(&[deep, "e".to_owned()]);
        let walked = mount.walk(|_| Wanted::WithChildren, &Budget::default());
        fs::remove_dir_all(top).unwrap();
        assert_eq!(walked.found.len(), 1 + abi::CGROUP_LEVELS_MAX as usize + 1);
        let deepest = vec!["d"; abi::CGROUP_LEVELS_MAX as usize].join("/");
        assert_eq!(walked.skipped.len(), 1);
        assert_eq!(walked.skipped[0].name, format!("/{deepest}"));
    }

    #[test]
    fn path_longer_than_the_kernel_takes_is_examined() {
        // Made from the inside.
        let name = "n".repeat(250);
        let (top, mount) = tree(&["a".to_owned()]);
        let mut at = open_directory(&top.join("a")).unwrap();
        for _ in 0..18 {
            nix::sys::stat::mkdirat(&at, name.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
            at = super::super::open_below(&at, OsStr::new(&name)).unwrap();
        }
        let walked = mount.walk(|_| Wanted::WithChildren, &Budget::default());
        let longest = top.join(walked.found.iter().max_by_key(|below| below.as_os_str().len()).unwrap());
        let id = super::super::id_at(&longest);
        std::process::Command::new("rm").arg("-rf").arg(&top).status().unwrap();
        assert_eq!((walked.found.len(), walked.skipped.len(), id.is_some()), (20, 0, true));
        assert!(longest.as_os_str().len() > libc::PATH_MAX as usize);
    }
}
