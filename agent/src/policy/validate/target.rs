//! `[target]`: globs of cgroup paths, as they are written → as they are matched.
//!
//! Does not look at the cgroups there are.

use globset::GlobBuilder;

use crate::policy::{
    diagnostic::{Findings, Problem, quote},
    file::{List, Text},
};

/// Where people's cgroup2 mount most often is: they copy paths from there.
const USUAL_MOUNTS: [&str; 2] = ["/sys/fs/cgroup/unified/", "/sys/fs/cgroup/"];

/// Longest path that the kernel takes, from limits.h.
const PATH_MAX: usize = 4096;

pub(super) fn target(cgroups: Option<&List<Text<'_>>>, findings: &mut Findings) -> Vec<String> {
    let globs = cgroups.map(|cgroups| cgroups.get_ref().iter()).into_iter().flatten();
    let mut globs: Vec<String> = globs.filter_map(|glob| findings.ok(path_glob(glob))).collect();
    // The order means nothing, and files with the same targets are known by them.
    globs.sort();
    globs.dedup();
    globs
}

/// The path of one cgroup, without slashes at its ends.
pub(super) fn path(path: &Text<'_>) -> Result<String, Problem> {
    check_path(path.get_ref()).map(str::to_owned).map_err(|problem| problem.at(path.span()))
}

/// A glob without slashes at its ends. The root of the hierarchy is the empty one.
fn path_glob(glob: &Text<'_>) -> Result<String, Problem> {
    check_glob(glob.get_ref()).map_err(|problem| problem.at(glob.span()))
}

fn check_path(text: &str) -> Result<&str, Problem> {
    if text.is_empty() {
        return Err(Problem::new("this cgroup has no name").help("write \"/\" for every process of the machine"));
    }
    if let Some(path) = USUAL_MOUNTS.iter().find_map(|mount| text.strip_prefix(mount)) {
        return Err(Problem::new(format!("{} is a path in the file system, not in the cgroup hierarchy", quote(text)))
            .help(format!("write \"{}\"", if path.is_empty() { "/" } else { path })));
    }
    if text.len() > PATH_MAX {
        return Err(Problem::new(format!("{} is longer than a path can be", quote(text)))
            .help(format!("write at most {PATH_MAX} bytes")));
    }
    let path = text.trim_matches('/');
    let strange = |part: &str| part.is_empty() || part == "." || part == "..";
    if text.contains(char::is_control) || (!path.is_empty() && path.split('/').any(strange)) {
        return Err(Problem::new(format!("{} is not the path of a cgroup", quote(text)))
            .help("write the path below the cgroup2 mount, such as \"system.slice/nginx.service\""));
    }
    Ok(path)
}

fn check_glob(text: &str) -> Result<String, Problem> {
    let path = check_path(text)?;
    match GlobBuilder::new(path).literal_separator(true).build() {
        Ok(_) => Ok(path.to_owned()),
        Err(error) => Err(Problem::new(format!("{} is not a glob: {}", quote(text), error.kind()))
            .help("put [brackets] around a character that stands for itself, such as \"[*]\"")),
    }
}
