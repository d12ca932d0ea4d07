//! Which policies cover the sockets of which cgroups: `&[Policy]`, cgroups and containers → [`Coverage`].
//!
//! The policies that cover a cgroup form a *stack*. Policies with a deeper target come first; among policies with
//! equally deep targets, the order of the file names decides. Cgroups with the same stack are compiled once.
//!
//! A container's target is the cgroup of its processes: it is as deep as that cgroup, and covers the cgroups below.
//!
//! Pure: callers pass the cgroups and containers.

mod containers;
mod globs;
mod instances;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

pub use self::instances::{OtherInstance, with_others};
use self::{containers::ContainerMatcher, globs::Globs};
use crate::{
    container::Running,
    escape::Escape,
    policy::{
        Policy,
        model::{ContainerSelector, Target},
    },
};

/// Indices of policies, in order of precedence.
pub type Stack = Vec<usize>;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a glob: {}", pattern.escaped(), source.to_string().escaped())]
pub struct GlobError {
    pattern: String,
    source: globset::Error,
}

/// Where programs are attached, and which policies apply there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// The stacks, each once.
    pub stacks: Vec<Stack>,
    /// The paths of cgroups below the mount, parents before children, each with the index of its stack.
    pub targets: Vec<(PathBuf, usize)>,
}

impl Coverage {
    /// Returns what policies cover by their own targets. A policy without a target covers nothing.
    ///
    /// A cgroup below a target is a target itself only if its stack differs.
    ///
    /// # Errors
    ///
    /// Fails if a target is not a glob.
    pub fn of_targets(
        policies: &[Policy],
        mut cgroups: Vec<PathBuf>,
        containers: &[Running],
    ) -> Result<Self, GlobError> {
        let matcher = target_matcher(policies, containers)?;
        // Parents sort before their children.
        cgroups.sort();
        let mut coverage = Self::default();
        // The targets that contain the next cgroup, by index. They sort before it.
        let mut around: Vec<usize> = Vec::new();
        for cgroup in cgroups {
            while around.last().is_some_and(|outer| !cgroup.starts_with(&coverage.targets[*outer].0)) {
                around.pop();
            }
            let above = around.last().map(|outer| coverage.targets[*outer].1);
            let above = above.map(|number| coverage.stacks[number].as_slice()).unwrap_or_default();
            let stack = matcher.stack(&cgroup, above);
            if stack != above {
                let number = coverage.intern(stack);
                around.push(coverage.targets.len());
                coverage.targets.push((cgroup, number));
            }
        }
        Ok(coverage)
    }

    /// Returns a coverage of all policies on each of these cgroups. A cgroup below another one is covered by that one.
    #[must_use]
    pub fn of_all(policies: &[Policy], mut cgroups: Vec<PathBuf>) -> Self {
        cgroups.sort();
        let mut targets: Vec<(PathBuf, usize)> = Vec::new();
        for cgroup in cgroups {
            // Cgroups below a cgroup sort right after it.
            if !targets.last().is_some_and(|(outer, _)| cgroup.starts_with(outer)) {
                targets.push((cgroup, 0));
            }
        }
        Self { stacks: vec![all(policies)], targets }
    }

    /// Returns the index of a stack, which is added if it is new.
    pub fn intern(&mut self, stack: Stack) -> usize {
        self.stacks.iter().position(|known| *known == stack).unwrap_or_else(|| {
            self.stacks.push(stack);
            self.stacks.len() - 1
        })
    }
}

/// Returns the entries of each policy's target that match none of these, as written in the policy, with the policy's
/// index. A container counts only if its cgroup is among the cgroups.
///
/// # Errors
///
/// Fails if a target is not a glob.
pub fn unmatched_targets(
    policies: &[Policy],
    cgroups: &[PathBuf],
    containers: &[Running],
) -> Result<Vec<(usize, String)>, GlobError> {
    let mut unmatched_entries = Vec::new();
    for (number, policy) in policies.iter().enumerate() {
        let Target { cgroups: patterns, containers: selectors } = &policy.target;
        let globs = Globs::new(patterns.iter().map(String::as_str).zip(0..))?;
        let matched: BTreeSet<usize> = cgroups.iter().flat_map(|cgroup| globs.matching(cgroup)).collect();
        let unmatched = patterns.iter().enumerate().filter(|(at, _)| !matched.contains(at));
        unmatched_entries.extend(unmatched.map(|(_, pattern)| (number, pattern.clone())));
        for selector in selectors {
            let selected = selected(std::slice::from_ref(selector), containers)?;
            if !cgroups.iter().any(|cgroup| selected.contains(cgroup)) {
                unmatched_entries.push((number, selector.to_string()));
            }
        }
    }
    Ok(unmatched_entries)
}

/// Returns the cgroups that policies name without a glob, and the cgroups of the containers that they select. These are
/// found without searching the cgroup tree.
///
/// # Errors
///
/// Fails if a target is not a glob.
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

/// Returns the indices of all policies, in order.
#[must_use]
pub fn all(policies: &[Policy]) -> Stack {
    (0..policies.len()).collect()
}

/// Returns the glob that matches only this name.
fn escaped(name: &str) -> String {
    let escaped = |character: char| {
        let is_special = matches!(character, '*' | '?' | '[' | ']' | '{' | '}' | ',' | '!' | '\\');
        is_special.then_some('\\').into_iter().chain([character])
    };
    // A name that is no glob is found without a search of the cgroup tree.
    if is_glob(name) { name.chars().flat_map(escaped).collect() } else { name.to_owned() }
}

/// Returns the policies with these cgroups, which are paths below the mount, as their targets.
#[must_use]
pub fn with_targets(policies: Vec<Policy>, cgroups: &[PathBuf]) -> Vec<Policy> {
    let cgroups = cgroups.iter().map(|path| escaped(&path.to_string_lossy())).collect();
    let target = Target { cgroups, ..Target::default() };
    policies.into_iter().map(|policy| Policy { target: target.clone(), ..policy }).collect()
}

/// Returns the policies that cover a cgroup, whether the cgroup exists or not. A policy without a target covers all
/// cgroups, with the lowest precedence.
///
/// # Errors
///
/// Fails if a target is not a glob.
pub fn stack_of(policies: &[Policy], cgroup: &Path, containers: &[Running]) -> Result<Stack, GlobError> {
    let matcher = target_matcher(policies, containers)?;
    let templates = (0..policies.len()).filter(|policy| policies[*policy].target.is_empty()).collect();
    let from_the_top = cgroup.ancestors().collect::<Vec<_>>().into_iter().rev();
    Ok(from_the_top.fold(templates, |above, cgroup| matcher.stack(cgroup, &above)))
}

/// Returns the policies with the same target as this policy, in order.
#[must_use]
pub fn stack_with(policies: &[Policy], policy: usize) -> Stack {
    (0..policies.len()).filter(|other| policies[*other].target == policies[policy].target).collect()
}

/// Returns the policies of each target, in order.
#[must_use]
pub fn stacks_by_target(policies: &[Policy]) -> BTreeMap<&Target, Stack> {
    let mut stacks: BTreeMap<&Target, Stack> = BTreeMap::new();
    for (number, policy) in policies.iter().enumerate() {
        stacks.entry(&policy.target).or_default().push(number);
    }
    stacks
}

/// Which cgroups can have targets below them, and must be searched for new cgroups.
#[derive(Debug)]
pub struct SearchScope {
    /// The targets that are globs.
    globs: Globs,
    /// The ancestors of the cgroups that are named without a glob.
    above_named: BTreeSet<PathBuf>,
}

impl SearchScope {
    /// Returns the search scope of these policies.
    ///
    /// # Errors
    ///
    /// Fails if a target is not a glob.
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

    /// Returns whether a target can be at any depth below this cgroup.
    #[must_use]
    pub fn is_within(&self, cgroup: &Path) -> bool {
        self.above_named.contains(cgroup) || self.is_walked(cgroup)
    }

    /// Returns whether a glob can match at any depth below this cgroup.
    #[must_use]
    pub fn is_walked(&self, cgroup: &Path) -> bool {
        self.globs.leads_below(cgroup)
    }

    /// Returns whether a glob matches this cgroup.
    #[must_use]
    pub fn is_match(&self, cgroup: &Path) -> bool {
        !self.globs.matching(cgroup).is_empty()
    }

    /// Returns the ancestors of the cgroups that are named without a glob, whether they exist or not.
    pub fn above_named(&self) -> impl Iterator<Item = &PathBuf> {
        self.above_named.iter()
    }
}

/// Matches cgroups with the targets of policies.
struct TargetMatcher {
    /// Each glob has the index of its policy.
    globs: Globs,
    /// The policies that select a container, by the container's cgroup.
    selected: BTreeMap<PathBuf, BTreeSet<usize>>,
}

impl TargetMatcher {
    /// Returns the stack of a cgroup whose parent has the stack `above`.
    fn stack(&self, cgroup: &Path, above: &[usize]) -> Stack {
        let mut own = self.globs.matching(cgroup);
        own.extend(self.selected.get(cgroup).into_iter().flatten());
        let inherited = above.iter().copied().filter(|policy| !own.contains(policy)).collect::<Vec<_>>();
        own.iter().copied().chain(inherited).collect()
    }
}

/// Returns a matcher for the targets of all policies.
fn target_matcher(policies: &[Policy], containers: &[Running]) -> Result<TargetMatcher, GlobError> {
    let globs = policies.iter().enumerate();
    let globs =
        globs.flat_map(|(number, policy)| policy.target.cgroups.iter().map(move |glob| (glob.as_str(), number)));
    let mut matcher = TargetMatcher { globs: Globs::new(globs)?, selected: BTreeMap::new() };
    for (number, policy) in policies.iter().enumerate() {
        for cgroup in selected(&policy.target.containers, containers)? {
            matcher.selected.entry(cgroup).or_default().insert(number);
        }
    }
    Ok(matcher)
}

/// Returns the cgroups of the selected containers.
fn selected(selectors: &[ContainerSelector], containers: &[Running]) -> Result<BTreeSet<PathBuf>, GlobError> {
    let wanted = selectors.iter().map(ContainerMatcher::new).collect::<Result<Vec<_>, _>>()?;
    let is_wanted = |running: &&Running| wanted.iter().any(|wanted| wanted.is_match(&running.container));
    Ok(containers.iter().filter(is_wanted).map(|running| running.cgroup.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        container::{Container, PODMAN},
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
    fn escaped_name_matches_only_itself() {
        for name in ["a", "a*", "server[1]\\x2d*", "{a,b}", "a,b!", "?", "]", "a b"] {
            let globs = Globs::new([(escaped(name).as_str(), 0)]).unwrap();
            let matches = |other: &str| !globs.matching(Path::new(other)).is_empty();
            assert!(matches(name), "{name}");
            for other in ["b", "ab", "server1x2d", "server1-2", "{a", "a,b", "x"] {
                assert!(other == name || !matches(other), "{name} {other}");
            }
        }
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
    fn each_selector_that_matches_nothing_is_found() {
        let policies =
            policies_of(&["cgroup = \"a\"\ncontainer = [{ name = \"web\" }, { name = \"db\", runtime = \"docker\" }]"]);
        // The cgroup of this container is gone.
        let containers = [container("web", "gone"), container("db", "a")];
        let expected = ["container = { name = \"db\", runtime = \"docker\" }", "container = { name = \"web\" }"];
        let unmatched_entries = unmatched_targets(&policies, &["a".into()], &containers).unwrap();
        assert_eq!(unmatched_entries, expected.map(|text| (0, text.to_owned())));
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
    fn file_names_decide_between_equally_deep_targets() {
        assert_eq!(covered(&[&["a"], &["*"]], &["a", "b"]), expected(&[("a", &[0, 1]), ("b", &[1])]));
    }

    #[test]
    fn policy_is_as_deep_as_its_deepest_target() {
        // The first policy moves to the front where it has a target of its own.
        assert_eq!(
            covered(&[&["a", "a/b/c"], &["a/b"]], &["a", "a/b", "a/b/c", "a/b/c/d"]),
            expected(&[("a", &[0]), ("a/b", &[1, 0]), ("a/b/c", &[0, 1])])
        );
    }

    #[test]
    fn cgroup_with_the_stack_of_its_parent_is_not_a_target() {
        assert_eq!(covered(&[&["a/**"], &["a"]], &["a", "a/b", "a/b/c"]), expected(&[("a", &[1]), ("a/b", &[0, 1])]));
    }

    #[test]
    fn cgroups_with_the_same_policies_share_a_stack() {
        let cgroups = vec!["pods/1".into(), "pods/2".into()];
        let coverage = Coverage::of_targets(&policies(&[&["pods/*"]]), cgroups, &[]).unwrap();
        assert_eq!((coverage.stacks.len(), coverage.targets.len()), (1, 2));
    }

    #[test]
    fn cgroup_that_does_not_exist_has_a_stack() {
        let policies = policies(&[&["a"], &[], &["a/*/c"]]);
        let stack = |cgroup| stack_of(&policies, Path::new(cgroup), &[]).unwrap();
        assert_eq!((stack("a/b/c/d"), stack("a/b"), stack("x")), (vec![2, 0, 1], vec![0, 1], vec![1]));
    }

    #[test]
    fn each_glob_that_matches_nothing_is_found() {
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
    fn new_targets_are_searched_only_where_globs_can_match() {
        let scope = SearchScope::of(&policies(&[&["a/*/c", "/b"], &["d/**/e-*", "/"]])).unwrap();
        let within = |cgroup: &str| scope.is_within(Path::new(cgroup));
        assert!(["", "a", "a/x", "d", "d/x", "d/x/e-1"].iter().all(|cgroup| within(cgroup)));
        assert!(!["b", "a/x/c", "c", "x/a"].iter().any(|cgroup| within(cgroup)));
        let scope = SearchScope::of(&policies(&[&["a/{b/c,d}/e"]])).unwrap();
        assert!(scope.is_within(Path::new("a/b/c")) && !scope.is_within(Path::new("b")));
        let scope = SearchScope::of(&policies_of(&["cgroup = \"a/b\"\ncontainer = { name = \"web\" }"])).unwrap();
        assert!(["", "a/b", "c/d"].iter().all(|cgroup| scope.is_within(Path::new(cgroup))));
        // Named cgroups are found without searching the tree.
        let scope = SearchScope::of(&policies(&[&["a/b/c", "d/e-*"]])).unwrap();
        assert!(scope.is_within(Path::new("a/b")) && !scope.is_walked(Path::new("a/b")));
        assert!(scope.is_walked(Path::new("d")) && scope.is_match(Path::new("d/e-1")));
        assert!(!scope.is_match(Path::new("d/f")) && !scope.is_match(Path::new("d")));
    }

    #[test]
    fn named_cgroups_are_found_without_the_tree() {
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
