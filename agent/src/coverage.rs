//! Which policies say what becomes of the sockets of which cgroups: `&[Policy]`, and the cgroups and containers there
//! are → [`Coverage`].
//!
//! The policies that cover a cgroup make a *stack*: those with the deepest target come first, and among equals those whose
//! files' names come first. Cgroups that have the same stack are compiled once, however many there are.
//!
//! A container is to a policy the cgroup that its processes are in: as deep as that, and covering what is below.
//!
//! Pure: it is told which cgroups and which containers there are.

mod containers;
mod globs;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use self::{containers::ContainerMatcher, globs::Globs};
use crate::{
    escape::Escape,
    host::containers::Running,
    policy::{
        Policy,
        model::{ContainerSelector, Target},
    },
};

/// Policies by their place among all that are in force together; the first decides first.
pub type Stack = Vec<usize>;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a glob: {}", pattern.escaped(), source.to_string().escaped())]
pub struct GlobError {
    pattern: String,
    source: globset::Error,
}

/// Where programs are to be attached, and which policies hold there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Each once.
    pub stacks: Vec<Stack>,
    /// Cgroups by their paths below the mount, parents before children, each with the number of its stack.
    pub targets: Vec<(PathBuf, usize)>,
}

impl Coverage {
    /// What policies cover by their own targets. A policy without one covers nothing.
    ///
    /// A cgroup below a target is one itself only where other policies hold, or the same in another order.
    ///
    /// # Errors
    ///
    /// Where a target is no glob.
    pub fn of_targets(
        policies: &[Policy],
        mut cgroups: Vec<PathBuf>,
        containers: &[Running],
    ) -> Result<Self, GlobError> {
        let meant = target_matcher(policies, containers)?;
        // Parents sort before their children.
        cgroups.sort();
        let mut coverage = Self::default();
        // The targets around the next cgroup, which come before it, each by its index.
        let mut around: Vec<usize> = Vec::new();
        for cgroup in cgroups {
            while around.last().is_some_and(|outer| !cgroup.starts_with(&coverage.targets[*outer].0)) {
                around.pop();
            }
            let above = around.last().map(|outer| coverage.targets[*outer].1);
            let above = above.map(|number| coverage.stacks[number].as_slice()).unwrap_or_default();
            let stack = meant.stack(&cgroup, above);
            if stack != above {
                let number = coverage.intern(stack);
                around.push(coverage.targets.len());
                coverage.targets.push((cgroup, number));
            }
        }
        Ok(coverage)
    }

    /// All policies, on each of these cgroups; those below another one are covered by it.
    #[must_use]
    pub fn of_all(policies: &[Policy], mut cgroups: Vec<PathBuf>) -> Self {
        cgroups.sort();
        let mut targets: Vec<(PathBuf, usize)> = Vec::new();
        for cgroup in cgroups {
            // Those within a cgroup come right after it.
            if !targets.last().is_some_and(|(outer, _)| cgroup.starts_with(outer)) {
                targets.push((cgroup, 0));
            }
        }
        Self { stacks: vec![all(policies)], targets }
    }

    /// The number of a stack, which is a new one if it was not there.
    pub fn intern(&mut self, stack: Stack) -> usize {
        self.stacks.iter().position(|known| *known == stack).unwrap_or_else(|| {
            self.stacks.push(stack);
            self.stacks.len() - 1
        })
    }
}

/// What each policy's target says that matches none of these, in the policy's words, with the policy's number. A container
/// counts only where its cgroup is among the cgroups.
///
/// # Errors
///
/// Where a target is no glob.
pub fn unmatched_targets(
    policies: &[Policy],
    cgroups: &[PathBuf],
    containers: &[Running],
) -> Result<Vec<(usize, String)>, GlobError> {
    let mut idle = Vec::new();
    for (number, policy) in policies.iter().enumerate() {
        let Target { cgroups: patterns, containers: selectors } = &policy.target;
        let globs = Globs::new(patterns.iter().map(String::as_str).zip(0..))?;
        let matched: BTreeSet<usize> = cgroups.iter().flat_map(|cgroup| globs.matching(cgroup)).collect();
        let unmatched = patterns.iter().enumerate().filter(|(at, _)| !matched.contains(at));
        idle.extend(unmatched.map(|(_, pattern)| (number, pattern.clone())));
        for selector in selectors {
            let selected = selected(std::slice::from_ref(selector), containers)?;
            if !cgroups.iter().any(|cgroup| selected.contains(cgroup)) {
                idle.push((number, selector.to_string()));
            }
        }
    }
    Ok(idle)
}

/// Returns the cgroups that policies name without a glob, and those of the containers that they select: these are found
/// without a look at the tree.
///
/// # Errors
///
/// Where a target is no glob.
pub fn named(policies: &[Policy], containers: &[Running]) -> Result<BTreeSet<PathBuf>, GlobError> {
    let mut named = BTreeSet::new();
    for Policy { target: Target { cgroups, containers: selectors }, .. } in policies {
        let literal = cgroups.iter().filter(|pattern| !is_glob(pattern));
        named.extend(literal.map(|pattern| PathBuf::from(pattern.trim_matches('/'))));
        named.append(&mut selected(selectors, containers)?);
    }
    Ok(named)
}

/// Returns whether a pattern can match anything but itself.
fn is_glob(pattern: &str) -> bool {
    pattern.contains(['*', '?', '[', '{', '\\'])
}

/// All policies, in order.
#[must_use]
pub fn all(policies: &[Policy]) -> Stack {
    (0..policies.len()).collect()
}

/// The policies that cover a cgroup, whether there is one or not. A policy without a target covers all, after the others.
///
/// # Errors
///
/// Where a target is no glob.
pub fn stack_of(policies: &[Policy], cgroup: &Path, containers: &[Running]) -> Result<Stack, GlobError> {
    let meant = target_matcher(policies, containers)?;
    let templates = (0..policies.len()).filter(|policy| policies[*policy].target.is_empty()).collect();
    let from_the_top = cgroup.ancestors().collect::<Vec<_>>().into_iter().rev();
    Ok(from_the_top.fold(templates, |above, cgroup| meant.stack(cgroup, &above)))
}

/// The policies with the same target as one of them, in order.
#[must_use]
pub fn stack_with(policies: &[Policy], policy: usize) -> Stack {
    (0..policies.len()).filter(|other| policies[*other].target == policies[policy].target).collect()
}

/// The policies with each target, in order.
#[must_use]
pub fn stacks_by_target(policies: &[Policy]) -> BTreeMap<&Target, Stack> {
    let mut stacks: BTreeMap<&Target, Stack> = BTreeMap::new();
    for (number, policy) in policies.iter().enumerate() {
        stacks.entry(&policy.target).or_default().push(number);
    }
    stacks
}

/// Which cgroups can have targets below them: where to look for new ones.
#[derive(Debug)]
pub struct SearchScope {
    /// Of the targets that are globs.
    globs: Globs,
    /// The cgroups above those that are named without a glob.
    above_named: BTreeSet<PathBuf>,
}

impl SearchScope {
    /// # Errors
    ///
    /// Where a target is no glob.
    pub fn of(policies: &[Policy]) -> Result<Self, GlobError> {
        // Several policies can have the same target.
        let targets: BTreeSet<&String> = policies.iter().flat_map(|policy| &policy.target.cgroups).collect();
        let (globs, named): (Vec<&String>, Vec<&String>) = targets.into_iter().partition(|pattern| is_glob(pattern));
        // The cgroup of a container can be anywhere.
        let anywhere = policies.iter().any(|policy| !policy.target.containers.is_empty()).then_some("**");
        let above = |pattern: &String| -> Vec<PathBuf> {
            Path::new(pattern.trim_matches('/')).ancestors().skip(1).map(Path::to_owned).collect()
        };
        let globs = globs.into_iter().map(String::as_str).chain(anywhere);
        Ok(Self {
            globs: Globs::new(globs.map(|glob| (glob, 0)))?,
            above_named: named.into_iter().flat_map(above).collect(),
        })
    }

    /// Whether a target can be right or further below this cgroup.
    #[must_use]
    pub fn is_within(&self, cgroup: &Path) -> bool {
        self.above_named.contains(cgroup) || self.is_walked(cgroup)
    }

    /// Whether a glob can match right or further below this cgroup.
    #[must_use]
    pub fn is_walked(&self, cgroup: &Path) -> bool {
        self.globs.leads_below(cgroup)
    }

    /// Whether a glob matches this cgroup.
    #[must_use]
    pub fn is_match(&self, cgroup: &Path) -> bool {
        !self.globs.matching(cgroup).is_empty()
    }

    /// The cgroups above those that are named without a glob, whether there are such cgroups or not.
    pub fn above_named(&self) -> impl Iterator<Item = &PathBuf> {
        self.above_named.iter()
    }
}

/// The cgroups that policies' targets are about.
struct TargetMatcher {
    /// Each with the number of its policy.
    globs: Globs,
    /// The policies about a container, by its cgroup.
    selected: BTreeMap<PathBuf, BTreeSet<usize>>,
}

impl TargetMatcher {
    /// The stack of a cgroup in one that has the stack `above`.
    fn stack(&self, cgroup: &Path, above: &[usize]) -> Stack {
        let mut own = self.globs.matching(cgroup);
        own.extend(self.selected.get(cgroup).into_iter().flatten());
        let inherited = above.iter().copied().filter(|policy| !own.contains(policy)).collect::<Vec<_>>();
        own.iter().copied().chain(inherited).collect()
    }
}

/// Of all policies.
fn target_matcher(policies: &[Policy], containers: &[Running]) -> Result<TargetMatcher, GlobError> {
    let globs = policies.iter().enumerate();
    let globs =
        globs.flat_map(|(number, policy)| policy.target.cgroups.iter().map(move |glob| (glob.as_str(), number)));
    let mut meant = TargetMatcher { globs: Globs::new(globs)?, selected: BTreeMap::new() };
    for (number, policy) in policies.iter().enumerate() {
        for cgroup in selected(&policy.target.containers, containers)? {
            meant.selected.entry(cgroup).or_default().insert(number);
        }
    }
    Ok(meant)
}

/// The cgroups of the containers that are selected.
fn selected(selectors: &[ContainerSelector], containers: &[Running]) -> Result<BTreeSet<PathBuf>, GlobError> {
    let wanted = selectors.iter().map(ContainerMatcher::new).collect::<Result<Vec<_>, _>>()?;
    let is_wanted = |running: &&Running| wanted.iter().any(|wanted| wanted.is_match(&running.container));
    Ok(containers.iter().filter(is_wanted).map(|running| running.cgroup.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::container::{Container, PODMAN},
        policy,
    };

    fn policies(targets: &[&[&str]]) -> Vec<Policy> {
        let policy = |(at, target): (usize, &&[&str])| {
            let target = if target.is_empty() { String::new() } else { format!("[target]\ncgroup = {target:?}\n") };
            let text = format!("{target}[[rule]]\nset = {{ TCP_NODELAY = true }}\n");
            policy::parse(Path::new(&format!("{at}.toml")), &text).unwrap().0
        };
        targets.iter().enumerate().map(policy).collect()
    }

    fn covered(targets: &[&[&str]], cgroups: &[&str]) -> Vec<(String, Stack)> {
        covered_with(&policies(targets), cgroups, &[])
    }

    fn covered_with(policies: &[Policy], cgroups: &[&str], containers: &[Running]) -> Vec<(String, Stack)> {
        let cgroups = cgroups.iter().map(PathBuf::from).collect();
        let coverage = Coverage::of_targets(policies, cgroups, containers).unwrap();
        let name = |path: &Path| path.to_string_lossy().into_owned();
        coverage.targets.iter().map(|(path, number)| (name(path), coverage.stacks[*number].clone())).collect()
    }

    fn container(name: &str, cgroup: &str) -> Running {
        let container =
            Container { runtime: PODMAN, id: name.to_owned(), pod: None, name: Some(name.to_owned()), image: None };
        Running { container, cgroup: cgroup.into(), cgroup_id: 1 }
    }

    fn policies_of(targets: &[&str]) -> Vec<Policy> {
        let policy = |(at, target): (usize, &&str)| {
            let text = format!("[target]\n{target}\n[[rule]]\nset = {{ TCP_NODELAY = true }}\n");
            policy::parse(Path::new(&format!("{at}.toml")), &text).unwrap().0
        };
        targets.iter().enumerate().map(policy).collect()
    }

    #[test]
    fn containers_are_targets_by_their_cgroups() {
        let containers = [container("web-1", "pods/1"), container("web-2", "pods/2"), container("db", "pods/3")];
        let cgroups = ["pods", "pods/1", "pods/1/init.scope", "pods/2", "pods/3"];
        let policies = policies_of(&[
            "cgroup = \"pods\"",
            "container = { name = \"web-*\" }",
            "cgroup = \"nosuch\"\ncontainer = [{ name = \"db\" }, { name = \"web-2\" }]",
        ]);
        assert_eq!(
            covered_with(&policies, &cgroups, &containers),
            expected(&[("pods", &[0]), ("pods/1", &[1, 0]), ("pods/2", &[1, 2, 0]), ("pods/3", &[2, 0])])
        );
        let stack = |cgroup| stack_of(&policies, Path::new(cgroup), &containers).unwrap();
        assert_eq!((stack("pods/1/init.scope"), stack("pods/4")), (vec![1, 0], vec![0]));
    }

    #[test]
    fn selectors_that_match_nothing_are_found_one_by_one() {
        let policies =
            policies_of(&["cgroup = \"a\"\ncontainer = [{ name = \"web\" }, { name = \"db\", runtime = \"docker\" }]"]);
        // The cgroup of one is gone by now.
        let containers = [container("web", "gone"), container("db", "a")];
        let expected = ["container = { name = \"db\", runtime = \"docker\" }", "container = { name = \"web\" }"];
        let idle = unmatched_targets(&policies, &["a".into()], &containers).unwrap();
        assert_eq!(idle, expected.map(|said| (0, said.to_owned())));
    }

    fn expected(targets: &[(&str, &[usize])]) -> Vec<(String, Stack)> {
        targets.iter().map(|(path, stack)| ((*path).to_owned(), stack.to_vec())).collect()
    }

    #[test]
    fn deeper_target_comes_first() {
        let cgroups = ["", "a", "a/b", "a/b/c", "a-b", "d"];
        assert_eq!(
            covered(&[&["a"], &["a/b/c"], &["a/b"]], &cgroups),
            expected(&[("a", &[0]), ("a/b", &[2, 0]), ("a/b/c", &[1, 2, 0])])
        );
        assert_eq!(covered(&[&["/"]], &cgroups), expected(&[("", &[0])]));
    }

    #[test]
    fn among_equals_the_files_names_decide() {
        assert_eq!(covered(&[&["a"], &["*"]], &["a", "b"]), expected(&[("a", &[0, 1]), ("b", &[1])]));
    }

    #[test]
    fn policy_is_as_deep_as_its_deepest_target() {
        // The first one comes back to the front where it has a target of its own.
        assert_eq!(
            covered(&[&["a", "a/b/c"], &["a/b"]], &["a", "a/b", "a/b/c", "a/b/c/d"]),
            expected(&[("a", &[0]), ("a/b", &[1, 0]), ("a/b/c", &[0, 1])])
        );
    }

    #[test]
    fn cgroup_where_nothing_changes_is_no_target() {
        assert_eq!(covered(&[&["a/**"], &["a"]], &["a", "a/b", "a/b/c"]), expected(&[("a", &[1]), ("a/b", &[0, 1])]));
    }

    #[test]
    fn cgroups_with_the_same_policies_share_a_stack() {
        let cgroups = vec!["pods/1".into(), "pods/2".into()];
        let coverage = Coverage::of_targets(&policies(&[&["pods/*"]]), cgroups, &[]).unwrap();
        assert_eq!((coverage.stacks.len(), coverage.targets.len()), (1, 2));
    }

    #[test]
    fn cgroup_that_is_not_there_has_a_stack_too() {
        let policies = policies(&[&["a"], &[], &["a/*/c"]]);
        let stack = |cgroup| stack_of(&policies, Path::new(cgroup), &[]).unwrap();
        assert_eq!((stack("a/b/c/d"), stack("a/b"), stack("x")), (vec![2, 0, 1], vec![0, 1], vec![1]));
    }

    #[test]
    fn globs_that_match_nothing_are_found_one_by_one() {
        let policies = policies(&[&["a", "nosuch/*"], &["b"]]);
        let cgroups = ["a", "a/b"].map(PathBuf::from);
        let expected = [(0, "nosuch/*".to_owned()), (1, "b".to_owned())];
        assert_eq!(unmatched_targets(&policies, &cgroups, &[]).unwrap(), expected);
    }

    #[test]
    fn given_cgroups_within_one_another_are_one_target() {
        let coverage = Coverage::of_all(&policies(&[&[], &[]]), vec!["a/b".into(), "a".into(), "c".into(), "a".into()]);
        assert_eq!(coverage.stacks, [[0, 1]]);
        assert_eq!(coverage.targets, [(PathBuf::from("a"), 0), (PathBuf::from("c"), 0)]);
    }

    #[test]
    fn new_targets_are_looked_for_where_they_can_be() {
        let reach = SearchScope::of(&policies(&[&["a/*/c", "/b"], &["d/**/e-*", "/"]])).unwrap();
        let within = |cgroup: &str| reach.is_within(Path::new(cgroup));
        assert!(["", "a", "a/x", "d", "d/x", "d/x/e-1"].iter().all(|cgroup| within(cgroup)));
        assert!(!["b", "a/x/c", "c", "x/a"].iter().any(|cgroup| within(cgroup)));
        let reach = SearchScope::of(&policies(&[&["a/{b/c,d}/e"]])).unwrap();
        assert!(reach.is_within(Path::new("a/b/c")) && !reach.is_within(Path::new("b")));
        let reach = SearchScope::of(&policies_of(&["cgroup = \"a/b\"\ncontainer = { name = \"web\" }"])).unwrap();
        assert!(["", "a/b", "c/d"].iter().all(|cgroup| reach.is_within(Path::new(cgroup))));
        // What is named is not looked for in the tree.
        let reach = SearchScope::of(&policies(&[&["a/b/c", "d/e-*"]])).unwrap();
        assert!(reach.is_within(Path::new("a/b")) && !reach.is_walked(Path::new("a/b")));
        assert!(reach.is_walked(Path::new("d")) && reach.is_match(Path::new("d/e-1")));
        assert!(!reach.is_match(Path::new("d/f")) && !reach.is_match(Path::new("d")));
    }

    #[test]
    fn cgroups_that_are_named_need_no_look_at_the_tree() {
        let policies = policies(&[&["/a/b", "a/*", "c"], &["d[x]", "/"]]);
        let expected = ["", "a/b", "c"].map(PathBuf::from);
        assert_eq!(named(&policies, &[]).unwrap(), BTreeSet::from(expected));
    }

    #[test]
    fn star_stays_within_a_level_and_two_stars_do_not() {
        let globs = Globs::new([("kubepods.slice/**/cri-*.scope", 0), ("a/*", 1)]).unwrap();
        let matching = |path| globs.matching(Path::new(path));
        assert_eq!(matching("kubepods.slice/x/y/cri-1.scope"), [0].into());
        assert_eq!((matching("a/b"), matching("a/b/c")), ([1].into(), [].into()));
    }
}
