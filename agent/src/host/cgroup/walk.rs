//! Examines the tree of cgroups, within a budget that no owner of a subtree can use up for the others.
//!
//! Subtrees are examined round-robin, at each level: one directory of each subtree, then the next one of each. While other
//! subtrees have directories left, a subtree of any size therefore takes only its equal share of the budget.
//!
//! A directory that cannot be examined is skipped and named. The walk as a whole cannot fail.

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

/// The limits of a walk.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The number of directories to examine.
    pub directories: usize,
    /// The size of the paths of examined directories and of the names of directories that wait, in bytes.
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
    /// Ignores the cgroup.
    No,
    /// Records the cgroup.
    Alone,
    /// Records the cgroup and examines its children.
    WithChildren,
}

/// The result of a walk.
#[derive(Debug, Default)]
pub struct Tree {
    /// The paths of the cgroups below the mount, in the order in which they were examined.
    pub found: Vec<PathBuf>,
    /// Directories whose cgroups below are unknown.
    pub skipped: Vec<Skip>,
}

/// The names in one directory use at most this fraction (1/8) of the remaining bytes.
const NAMES_SHARE: usize = 8;

/// The maximum number of subtrees that are named if the budget is used up: those with the most directories left.
const NAMED_MAX: usize = 8;

impl Mount {
    /// Examines the top of the mount and the cgroups below it that are `wanted`, down to [`abi::CGROUP_LEVELS_MAX`] levels.
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
    /// The remaining budget.
    budget: Budget,
    tree: Tree,
    /// The number of children whose names exceeded the budget, and the path of their directory.
    unnamed: Vec<(usize, PathBuf)>,
}

/// A directory, and the directories that are left to examine below it.
struct Node {
    below: PathBuf,
    is_examined: bool,
    /// The children that have directories left. The first one is examined next.
    children: VecDeque<Node>,
    /// The names of children that are not examined yet.
    names: Vec<OsString>,
}

impl Node {
    fn new(below: PathBuf) -> Self {
        Self { below, is_examined: false, children: VecDeque::new(), names: Vec::new() }
    }

    /// Examines one directory of this subtree. Returns `false` if none was left.
    fn advance<W: Fn(&Path) -> Wanted>(&mut self, walk: &mut Walk<'_, W>) -> bool {
        if !self.is_examined {
            self.is_examined = true;
            walk.examine(self);
            return true;
        }
        if let Some(name) = self.names.pop() {
            let mut child = Self::new(self.below.join(name));
            child.advance(walk);
            if child.has_unexamined() {
                self.children.push_back(child);
            }
            return true;
        }
        let Some(mut child) = self.children.pop_front() else { return false };
        child.advance(walk);
        if child.has_unexamined() {
            self.children.push_back(child);
        }
        true
    }

    fn has_unexamined(&self) -> bool {
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

    /// Records the names of the child directories of a node, unless the node is at the deepest level. Returns whether the node
    /// has any children.
    fn list(&mut self, node: &mut Node, is_deepest: bool) -> io::Result<bool> {
        // One directory must not use up the budget of the others.
        let mut bytes_left = self.budget.bytes / NAMES_SHARE;
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
            if bytes_left > bytes && node.names.len() < self.budget.directories {
                bytes_left -= bytes;
                self.budget.bytes -= bytes;
                node.names.push(name.to_owned());
            } else {
                unnamed += 1;
            }
        }
        if unnamed > 0 {
            self.unnamed.push((unnamed, node.below.clone()));
        }
        Ok(unnamed > 0 || node.has_unexamined())
    }

    fn skip(&mut self, below: &Path, reason: String, is_transient: bool) {
        self.tree.skipped.push(Skip::new(Kind::Cgroup, cgroup_name(below), reason).transient_if(is_transient));
    }

    /// Records the subtrees with the most unexamined directories as skipped.
    fn name_unexamined(&mut self, top: Node) {
        let mut unexamined = mem::take(&mut self.unnamed);
        let mut nodes = vec![top];
        while let Some(Node { below, is_examined: _, children, names }) = nodes.pop() {
            let count = names.len();
            if count > 0 {
                unexamined.push((count, below));
            }
            nodes.extend(children);
        }
        unexamined.sort_by(|(one, _), (other, _)| other.cmp(one));
        let others = unexamined.len().saturating_sub(NAMED_MAX);
        for (count, below) in unexamined.into_iter().take(NAMED_MAX) {
            let reason = format!("{count} of its child cgroups were not examined: too many cgroups");
            self.skip(&below, reason, false);
        }
        if others > 0 {
            self.skip(Path::new(""), format!("{others} more subtrees were not examined: too many cgroups"), false);
        }
    }
}

/// Returns the name of a cgroup, as the kernel writes it, from its path below the mount.
pub(super) fn cgroup_name(below: &Path) -> String {
    format!("/{}", escape::plain(below))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Makes a tree of ordinary directories.
    fn tree(paths: &[String]) -> (PathBuf, Mount) {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let top = std::env::temp_dir().join(format!("sockpolicy-walk-{}-{number}", std::process::id()));
        for path in paths {
            fs::create_dir_all(top.join(path)).unwrap();
        }
        (top.clone(), Mount { path: top, root: PathBuf::new() })
    }

    #[test]
    fn large_subtree_uses_only_its_share_of_the_budget() {
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
    fn long_names_use_only_the_byte_budget_of_their_subtree() {
        let long = (0..200).map(|number| format!("a/{}/{}", "l".repeat(250), "l".repeat(240) + &number.to_string()));
        let (top, mount) = tree(&long.chain(["a/b/c/d".to_owned()]).collect::<Vec<_>>());
        let walked = mount.walk(|_| Wanted::WithChildren, &Budget { bytes: 16 * 1024, ..Budget::default() });
        fs::remove_dir_all(top).unwrap();
        assert!(walked.found.contains(&"a/b/c/d".into()), "{:?}", walked.found.len());
        assert!(!walked.skipped.is_empty());
    }

    #[test]
    fn walk_stops_at_the_deepest_level_and_reports_it() {
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
    fn path_longer_than_path_max_is_examined() {
        // Such a path can only be made one component at a time.
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
