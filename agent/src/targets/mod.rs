//! The targets of policies: the cgroups of this host on which policies are in force.

mod cgroups;
pub mod containers;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    path::PathBuf,
};

pub use self::cgroups::Candidates;
use abi::RULES_MAX;

use crate::{
    container::Running,
    coverage::{Coverage, GlobError, OtherInstance, SearchScope, Stack, all, stacks_by_target, unmatched_targets},
    escape::{self, Escape},
    host::cgroup::{Cgroup, CgroupError, Mount},
    kernel::Target,
    policy::Policy,
    skipped::{self, Kind, Skip},
};

/// Targets that policies can have at one time. More are skipped: a tenant that creates cgroups which a glob matches must not
/// exhaust the memory of the host.
const TARGETS_MAX: usize = 16 * 1024;

/// How many targets that match nothing an error names.
const PATTERNS_SHOWN: usize = 10;

#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    #[error("policy `{}` names no target", policy.escaped())]
    None { policy: String },
    #[error(transparent)]
    Glob(#[from] GlobError),
    #[error("no cgroup matches {}", patterns.escaped())]
    NoMatch { patterns: String, mount: PathBuf },
    #[error("no cgroup and no container matches {}", patterns.escaped())]
    NoMatchAmong { patterns: String, containers: Vec<Running>, mount: PathBuf },
    #[error("cannot use any target: cgroup {}: {reason}", name.escaped())]
    Skipped { name: String, reason: String },
}

impl TargetError {
    /// Returns whether the targets do not exist now, or cannot be used now. Both can change.
    #[must_use]
    pub fn can_pass(&self) -> bool {
        matches!(self, Self::NoMatch { .. } | Self::NoMatchAmong { .. } | Self::Skipped { .. })
    }
}

/// Policies with the cgroups on which they are in force.
#[derive(Debug, Default)]
pub struct ResolvedTargets {
    /// Each combination of policies that is in force somewhere, as [`Target::scope`] counts them.
    pub stacks: Vec<Stack>,
    pub targets: Vec<Target>,
    /// The containers by which targets were found.
    pub containers: Vec<Running>,
    /// Cgroups that cannot be targets, or that could not be listed.
    pub skipped: Vec<Skip>,
}

/// Returns an error if a policy has no target of its own.
///
/// # Errors
///
/// [`TargetError::None`] names the policy.
pub fn check_targets(policies: &[Policy]) -> Result<(), TargetError> {
    match policies.iter().find(|policy| policy.target.is_empty()) {
        Some(policy) => Err(TargetError::None { policy: policy.name.clone() }),
        None => Ok(()),
    }
}

impl ResolvedTargets {
    /// Returns all policies together, on one cgroup.
    #[must_use]
    pub fn alone(policies: &[Policy], cgroup: Cgroup) -> Self {
        Self {
            stacks: vec![all(policies)],
            targets: vec![Target { cgroup, scope: 0, is_boundary: false }],
            ..Self::default()
        }
    }

    /// Resolves the targets that exist now: the cgroups in `requested` if there are any, else the targets of the policies.
    /// Warns of targets that match nothing.
    ///
    /// # Errors
    ///
    /// Fails if there is no target now, or if none can be used.
    pub fn find(mount: &Mount, requested: &[PathBuf], policies: &[Policy]) -> Result<Self, TargetError> {
        let resolved = if requested.is_empty() {
            check_targets(policies)?;
            Self::of_policies(mount, policies)?
        } else {
            Self::of_requested(mount, requested, policies)?
        };
        match (resolved.targets.is_empty(), resolved.skipped.first()) {
            (true, Some(only)) => Err(TargetError::Skipped { name: only.name.clone(), reason: only.reason.clone() }),
            _ => {
                skipped::warn_of(&resolved.skipped);
                Ok(resolved)
            }
        }
    }

    /// Resolves the targets for an agent that keeps running: it can have none now. The caller lists `containers` first, so that
    /// the cgroups of these containers exist.
    ///
    /// # Errors
    ///
    /// Fails if a policy has no target of its own.
    pub fn find_or_wait(mount: &Mount, policies: &[Policy], containers: Vec<Running>) -> Result<Self, TargetError> {
        check_targets(policies)?;
        let search = SearchScope::of(policies)?;
        let candidates = Candidates::find(mount, policies, &search, &containers, BTreeSet::new())?;
        Self::among(mount, policies, containers, candidates)
    }

    /// Resolves the targets of the policies among candidates. A policy that has no target now has a stack too.
    ///
    /// # Errors
    ///
    /// Fails if a glob cannot be compiled.
    pub fn among(
        mount: &Mount,
        policies: &[Policy],
        containers: Vec<Running>,
        candidates: Candidates,
    ) -> Result<Self, TargetError> {
        let Candidates { cgroups, skipped } = candidates;
        let mut coverage = Coverage::of_targets(policies, cgroups.clone(), &containers)?;
        let covered: BTreeSet<usize> = coverage.stacks.iter().flatten().copied().collect();
        let by_target = stacks_by_target(policies).into_values();
        // In the order of the first policy of each.
        let others: BTreeSet<Stack> =
            by_target.filter(|stack| stack.iter().any(|policy| !covered.contains(policy))).collect();
        others.into_iter().for_each(|stack| _ = coverage.intern(stack));
        Ok(Self::open(mount, coverage, &cgroups).with(containers, skipped))
    }

    /// Adds a boundary at each target of another instance below an own one, and the policies of that instance to the stacks there:
    /// the deepest target decides, whichever instance has it. In the stacks, the policies of the other instances follow the own
    /// `policies`. Skips a boundary with too many rules.
    #[must_use]
    pub fn beside(mut self, mount: &Mount, policies: &[Policy], others: &[OtherInstance]) -> Self {
        if others.is_empty() {
            return self;
        }
        let mut known: BTreeMap<PathBuf, Target> =
            mem::take(&mut self.targets).into_iter().map(|target| (mount.below(&target.cgroup), target)).collect();
        let targets = known.iter().map(|(path, target)| (path.clone(), target.scope)).collect();
        let own = policies.len();
        let mut coverage = Coverage { stacks: mem::take(&mut self.stacks), targets }.beside(own, others);
        let all = || policies.iter().chain(others.iter().flat_map(|other| &other.policies));
        let rules: Vec<usize> = all().map(|policy| policy.rules.len()).collect();
        for (path, scope) in mem::take(&mut coverage.targets) {
            let mut scope = scope;
            let count: usize = coverage.stacks[scope].iter().map(|policy| rules[*policy]).sum();
            if count > RULES_MAX {
                let reason = format!(
                    "its policies and those of other instances have {count} rules together, more than {RULES_MAX}: this \
                     instance overrides the others there"
                );
                self.skipped.push(skip(&path, reason));
                if !known.contains_key(&path) {
                    continue;
                }
                let own_stack = coverage.stacks[scope].iter().copied().filter(|policy| *policy < own).collect();
                scope = coverage.intern(own_stack);
            }
            let target = match known.remove(&path) {
                Some(target) => Ok(target),
                None => mount.open_below(&path).map(|cgroup| Target { cgroup, scope, is_boundary: true }),
            };
            match target {
                Ok(target) => self.targets.push(Target { scope, ..target }),
                Err(error) if error.is_gone() => {}
                Err(error) => self.skipped.push(skip(&path, error.to_string()).transient_if(error.is_transient())),
            }
        }
        self.stacks = coverage.stacks;
        self
    }

    fn of_requested(mount: &Mount, requested: &[PathBuf], policies: &[Policy]) -> Result<Self, TargetError> {
        let below = |path: &PathBuf| mount.open(path).map(|cgroup| mount.below(&cgroup));
        let cgroups = requested.iter().map(below).collect::<Result<_, _>>()?;
        Ok(Self::open(mount, Coverage::of_all(policies, cgroups), &[]))
    }

    fn of_policies(mount: &Mount, policies: &[Policy]) -> Result<Self, TargetError> {
        // Listed before the tree, so that the tree contains the cgroups of these containers.
        let listing = containers::wanted_by(policies);
        containers::warn_of_hidden(&listing);
        let containers = listing.running;
        let search = SearchScope::of(policies)?;
        let Candidates { cgroups, skipped } = Candidates::find(mount, policies, &search, &containers, BTreeSet::new())?;
        let unmatched = unmatched_targets(policies, &cgroups, &containers)?;
        let count = |policy: &Policy| policy.target.cgroups.len() + policy.target.containers.len();
        if unmatched.len() == policies.iter().map(count).sum::<usize>() {
            return Err(no_match(mount, policies, containers, unmatched));
        }
        for (policy, pattern) in unmatched {
            log::warn!("target {} of policy `{}` matches nothing now", pattern.escaped(), policies[policy].name);
        }
        let coverage = Coverage::of_targets(policies, cgroups.clone(), &containers)?;
        Ok(Self::open(mount, coverage, &cgroups).with(containers, skipped))
    }

    fn with(mut self, containers: Vec<Running>, skipped: Vec<Skip>) -> Self {
        self.containers = containers;
        self.skipped.extend(skipped);
        self
    }

    /// Opens the cgroups. Of more than [`TARGETS_MAX`], keeps those that come first in `ranked`.
    fn open(mount: &Mount, coverage: Coverage, ranked: &[PathBuf]) -> Self {
        let Coverage { stacks, targets } = coverage;
        let (kept, skipped) = limited(targets, ranked, TARGETS_MAX);
        let mut resolved = Self { stacks, skipped, ..Self::default() };
        for (path, scope) in kept {
            match mount.open_below(&path) {
                Ok(cgroup) => resolved.targets.push(Target { cgroup, scope, is_boundary: false }),
                // The cgroup was removed after it was listed.
                Err(error) if error.is_gone() => {}
                Err(error) => {
                    resolved.skipped.push(skip(&path, error.to_string()).transient_if(error.is_transient()));
                }
            }
        }
        resolved
    }
}

/// Splits cgroups into `max` of them and the others, which are skipped. Keeps those that come first in `ranked`.
fn limited(targets: Vec<(PathBuf, usize)>, ranked: &[PathBuf], max: usize) -> (Vec<(PathBuf, usize)>, Vec<Skip>) {
    let Some(excess) = targets.len().checked_sub(max).filter(|count| *count > 0) else {
        return (targets, Vec::new());
    };
    let ranks: HashMap<&PathBuf, usize> = ranked.iter().zip(0..).collect();
    let rank = |path: &PathBuf| ranks.get(path).copied().unwrap_or(usize::MAX);
    let mut by_rank: Vec<usize> = targets.iter().map(|(path, _)| rank(path)).collect();
    by_rank.sort_unstable();
    let first_skipped = by_rank[max];
    let (kept, others): (Vec<_>, Vec<_>) = targets.into_iter().partition(|(path, _)| rank(path) < first_skipped);
    let reason = format!("{excess} cgroups are too many: policies can have {max} targets");
    (kept, others.iter().map(|(path, _)| skip(path, reason.clone())).collect())
}

fn skip(path: &std::path::Path, reason: String) -> Skip {
    Skip::new(Kind::Cgroup, format!("/{}", escape::plain(path)), reason)
}

fn no_match(
    mount: &Mount,
    policies: &[Policy],
    containers: Vec<Running>,
    unmatched: Vec<(usize, String)>,
) -> TargetError {
    let more = unmatched.len().saturating_sub(PATTERNS_SHOWN);
    let mut patterns: Vec<String> = unmatched.into_iter().take(PATTERNS_SHOWN).map(|(_, pattern)| pattern).collect();
    patterns.extend((more > 0).then(|| format!("and {more} more")));
    let (patterns, mount) = (patterns.join(", "), mount.path.clone());
    match containers::are_wanted_by(policies) {
        true => TargetError::NoMatchAmong { patterns, containers, mount },
        false => TargetError::NoMatch { patterns, mount },
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy;

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn cgroups_beyond_the_limit_are_skipped_by_rank() {
        let targets: Vec<(PathBuf, usize)> =
            paths(&["a", "b", "c", "named"]).into_iter().map(|path| (path, 0)).collect();
        let ranked = paths(&["named", "c", "b", "a"]);
        let (kept, skipped) = limited(targets.clone(), &ranked, 2);
        let kept: Vec<&Path> = kept.iter().map(|(path, _)| path.as_path()).collect();
        assert_eq!(kept, [Path::new("c"), Path::new("named")]);
        assert_eq!(skipped.iter().map(|skip| skip.name.as_str()).collect::<Vec<_>>(), ["/a", "/b"]);
        assert!(skipped[0].reason.contains("2 cgroups are too many"), "{}", skipped[0].reason);
        let (kept, skipped) = limited(targets, &ranked, 4);
        assert_eq!((kept.len(), skipped.len()), (4, 0));
    }

    #[test]
    fn policy_without_a_target_is_named() {
        let parse = |name: &str, target: &str| {
            let text = format!("{target}\n[[rule]]\nset = {{ TCP_NODELAY = true }}\n");
            policy::parse(Path::new(name), &text).unwrap().0
        };
        let policies = [parse("web.toml", "[target]\ncgroup = \"/web\""), parse("db.toml", "")];
        assert!(check_targets(&policies[..1]).is_ok());
        let error = check_targets(&policies).unwrap_err();
        assert!(matches!(&error, TargetError::None { policy } if policy == "db"), "{error}");
        assert!(!error.can_pass());
    }
}
