//! One precedence for all instances of a host: the deepest target decides an option, whichever instance has the target.
//!
//! The kernel runs the programs of a cgroup first and those of its ancestors afterwards. An instance with a target above that of
//! another instance would therefore override the other one. For this reason, an instance also has a target at each target of
//! another instance below its own. The policies of the other instance are part of the stack there, as rules that leave
//! their options free ([`Policy::freed`]).
//!
//! Pure: callers pass the records of the other instances.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
};

use super::{Coverage, Stack};
use crate::policy::Policy;

/// The policies of another instance, and where they are in force.
#[derive(Clone, Debug, Default)]
pub struct OtherInstance {
    pub policies: Vec<Policy>,
    /// The paths of cgroups below the mount, each with indices of `policies` in order of precedence.
    pub targets: Vec<(PathBuf, Stack)>,
}

/// Returns the own policies, followed by those of the other instances.
#[must_use]
pub fn with_others(own: &[Policy], others: &[OtherInstance]) -> Vec<Policy> {
    own.iter().chain(others.iter().flat_map(|other| &other.policies)).cloned().collect()
}

impl Coverage {
    /// Returns this coverage with the targets of other instances below its own ones. Its stacks contain indices of the `own`
    /// policies, followed by those of the other instances in their order.
    #[must_use]
    pub fn beside(self, own: usize, others: &[OtherInstance]) -> Self {
        let own_paths: HashSet<&Path> = self.targets.iter().map(|(path, _)| path.as_path()).collect();
        let is_below_own = |path: &Path| path.ancestors().any(|ancestor| own_paths.contains(ancestor));
        let others_targets = others.iter().flat_map(|other| &other.targets).map(|(path, _)| path);
        let below_own: BTreeSet<PathBuf> = others_targets.filter(|path| is_below_own(path)).cloned().collect();
        if below_own.is_empty() {
            return self;
        }
        let mut layers = vec![Layers::of_own(&self)];
        let mut first = own;
        for other in others {
            layers.push(Layers::of_other(other, first));
            first += other.policies.len();
        }
        // Parents sort before their children.
        let paths: BTreeSet<&PathBuf> = self.targets.iter().map(|(path, _)| path).chain(&below_own).collect();
        // The stacks without a target keep their indices.
        let mut coverage = Self { stacks: self.stacks.clone(), targets: Vec::new() };
        let mut around: Vec<(&PathBuf, usize)> = Vec::new();
        for path in paths {
            while around.last().is_some_and(|(outer, _)| !path.starts_with(outer)) {
                around.pop();
            }
            let number = coverage.intern(combined(&layers, path, own));
            if around.last().map(|(_, above)| *above) != Some(number) {
                around.push((path, number));
                coverage.targets.push((path.clone(), number));
            }
        }
        coverage
    }
}

/// The targets of one instance.
struct Layers<'a> {
    targets: HashMap<&'a Path, Stack>,
}

impl<'a> Layers<'a> {
    fn of_own(coverage: &'a Coverage) -> Self {
        let targets = coverage.targets.iter();
        Self { targets: targets.map(|(path, number)| (path.as_path(), coverage.stacks[*number].clone())).collect() }
    }

    /// `first` is the index of the instance's first policy among all.
    fn of_other(other: &'a OtherInstance, first: usize) -> Self {
        let shifted = |stack: &Stack| stack.iter().map(|policy| first + policy).collect();
        Self { targets: other.targets.iter().map(|(path, stack)| (path.as_path(), shifted(stack))).collect() }
    }

    /// Returns the policies that cover a cgroup in order of precedence, each with the depth of its target.
    fn at(&self, cgroup: &Path) -> Vec<(usize, usize)> {
        // The deepest first.
        let around = cgroup.ancestors().filter_map(|path| self.targets.get(path).map(|stack| (path, stack)));
        let around: Vec<(&Path, &Stack)> = around.collect();
        let Some((_, stack)) = around.first() else { return Vec::new() };
        let mut deepest = usize::MAX;
        let depth_of = |policy: &usize| {
            // A policy comes from the outermost of the targets, counted from the cgroup, that all have it.
            let with_policy = around.iter().take_while(|(_, stack)| stack.contains(policy));
            let outermost = with_policy.last().map_or(0, |(path, _)| depth(path));
            deepest = deepest.min(outermost);
            (*policy, deepest)
        };
        stack.iter().map(depth_of).collect()
    }
}

fn depth(path: &Path) -> usize {
    path.components().count()
}

/// Returns the stack of a cgroup, without policies of other instances that come after the last of the `own` ones.
fn combined(layers: &[Layers<'_>], cgroup: &Path, own: usize) -> Stack {
    let mut all: Vec<(usize, usize)> = layers.iter().flat_map(|layers| layers.at(cgroup)).collect();
    // The sort is stable: among equally deep targets, the own policies come first.
    all.sort_by_key(|(_, depth)| Reverse(*depth));
    let len = all.iter().rposition(|(policy, _)| *policy < own).map_or(0, |last| last + 1);
    all.into_iter().take(len).map(|(policy, _)| policy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coverage(targets: &[(&str, &[usize])]) -> Coverage {
        let mut coverage = Coverage::default();
        for (path, stack) in targets {
            let number = coverage.intern(stack.to_vec());
            coverage.targets.push((path.into(), number));
        }
        coverage
    }

    /// Policies only count here by their number.
    fn other(policies: usize, targets: &[(&str, &[usize])]) -> OtherInstance {
        let (policy, _) =
            crate::policy::parse(Path::new("p.toml"), "[[rule]]\nset = { TCP_NODELAY = true }\n").unwrap();
        let targets = targets.iter().map(|(path, stack)| (path.into(), stack.to_vec())).collect();
        OtherInstance { policies: vec![policy; policies], targets }
    }

    fn stacks(coverage: &Coverage) -> Vec<(&str, &[usize])> {
        let targets = coverage.targets.iter();
        targets.map(|(path, number)| (path.to_str().unwrap(), coverage.stacks[*number].as_slice())).collect()
    }

    #[test]
    fn deeper_target_of_another_instance_comes_first() {
        let own = coverage(&[("slice", &[0])]);
        let found = own.beside(1, &[other(1, &[("slice/service", &[0])])]);
        assert_eq!(stacks(&found), [("slice", &[0][..]), ("slice/service", &[1, 0])]);
    }

    #[test]
    fn shallower_equal_and_unrelated_targets_of_others_change_nothing() {
        let own = || coverage(&[("a/b", &[0, 1])]);
        for target in ["a", "a/b", "c", "a/bb", ""] {
            let found = own().beside(2, &[other(1, &[(target, &[0])])]);
            assert_eq!(stacks(&found), [("a/b", &[0, 1][..])], "{target}");
        }
    }

    #[test]
    fn targets_of_two_instances_can_alternate() {
        // The own policies 0 at `a` and 1 at `a/b/c`, the other's at `a/b`.
        let own = coverage(&[("a", &[0]), ("a/b/c", &[1, 0])]);
        let found = own.beside(2, &[other(1, &[("a/b", &[0])])]);
        assert_eq!(stacks(&found), [("a", &[0][..]), ("a/b", &[2, 0]), ("a/b/c", &[1, 2, 0])]);
        let other_side = coverage(&[("a/b", &[0])]).beside(1, &[other(2, &[("a", &[0]), ("a/b/c", &[1, 0])])]);
        assert_eq!(stacks(&other_side), [("a/b", &[0][..]), ("a/b/c", &[2, 0])]);
    }

    #[test]
    fn policies_of_several_others_are_numbered_in_their_order() {
        let own = coverage(&[("", &[0])]);
        let found = own.beside(1, &[other(2, &[("a", &[0, 1])]), other(1, &[("a/b", &[0])])]);
        assert_eq!(stacks(&found), [("", &[0][..]), ("a", &[1, 2, 0]), ("a/b", &[3, 1, 2, 0])]);
    }

    #[test]
    fn subtree_that_another_instance_leaves_out_is_the_own_one() {
        // The other's target `a/b` does not include `a/b/c`.
        let own = coverage(&[("a", &[0])]);
        let found = own.beside(1, &[other(1, &[("a/b", &[0]), ("a/b/c", &[])])]);
        assert_eq!(stacks(&found), [("a", &[0][..]), ("a/b", &[1, 0]), ("a/b/c", &[0])]);
    }
}
