//! `[target]`: cgroups and containers as written → as matched.
//!
//! Does not check which of them exist.

use globset::GlobBuilder;

use crate::policy::{
    diagnostic::{Findings, Problem, quote},
    file::{ContainerFile, List, TargetFile, Text},
    model::{ContainerSelector, Target},
    words,
};

/// The usual cgroup2 mounts, from which users copy paths.
const USUAL_MOUNTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

/// Longest path that the kernel accepts, from limits.h.
const PATH_MAX: usize = 4096;

/// Fewest digits of a container id: as many as runtimes show. No two containers share them.
const ID_MIN: usize = 12;
/// Number of digits of a whole id.
const ID_MAX: usize = 64;

pub(super) fn target(file: &TargetFile<'_>, findings: &mut Findings) -> Target {
    let TargetFile { cgroup, containers } = file;
    // The order has no meaning, and policies with equal targets must compare equal.
    Target {
        cgroups: ordered(cgroups(cgroup.as_ref(), findings)),
        containers: ordered(containers.iter().map(|file| container(file, findings)).collect()),
    }
}

fn ordered<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items.dedup();
    items
}

fn cgroups(cgroups: Option<&List<Text<'_>>>, findings: &mut Findings) -> Vec<String> {
    let globs = cgroups.map(|cgroups| cgroups.get_ref().iter()).into_iter().flatten();
    globs
        .filter_map(|glob| {
            if let Some(problem) = hexadecimal_escape(glob, findings) {
                findings.warning(problem);
            }
            findings.ok(path_glob(glob))
        })
        .collect()
}

/// Returns a warning about a name of systemd, such as `a\x2db`, in double quotes: TOML decodes the escape.
fn hexadecimal_escape(glob: &Text<'_>, findings: &Findings) -> Option<Problem> {
    let written = findings.text(&glob.span());
    let without_backslashes = written.replace(r"\\", "");
    (written.starts_with('"') && without_backslashes.contains(r"\x")).then(|| {
        Problem::new(format!("TOML decodes the escape in {written}: the cgroup is {}", quote(glob.get_ref())))
            .help(format!(
                "for a cgroup whose name has a backslash, use single quotes: '{}'",
                written.trim_matches('"')
            ))
            .at(glob.span())
    })
}

fn container(file: &ContainerFile<'_>, findings: &mut Findings) -> ContainerSelector {
    let ContainerFile { name, image, id, runtime } = file;
    let mut checked = |text: &Option<Text<'_>>, check: fn(&str) -> Result<(), Problem>| {
        let text = text.as_ref()?;
        let checked = check(text.get_ref()).map(|()| text.get_ref().clone().into_owned());
        findings.ok(checked.map_err(|problem| problem.at(text.span())))
    };
    let selector = ContainerSelector {
        name: checked(name, check_name),
        image: checked(image, check_image),
        id: checked(id, check_id),
        runtime: None,
    };
    if let Some(text) = image.as_ref().filter(|text| selector.image.is_some() && !can_have_tag(text.get_ref())) {
        findings.warning(
            Problem::new(format!("image {} has no tag, and runtimes name images with one", quote(text.get_ref())))
                .help(format!("write \"{}:*\" for every tag", text.get_ref()))
                .at(text.span()),
        );
    }
    let runtime = runtime.as_ref().and_then(|word| findings.ok(words::pick("runtime", word, words::RUNTIMES)));
    ContainerSelector { runtime, ..selector }
}

/// Returns whether a glob can match an image with a tag or a digest.
fn can_have_tag(glob: &str) -> bool {
    glob.rsplit('/').next().is_some_and(|last| last.contains([':', '@', '*', '?', '[', '{']))
}

fn check_name(text: &str) -> Result<(), Problem> {
    if let Some(name) = text.strip_prefix('/').filter(|name| !name.is_empty()) {
        return Err(Problem::new(format!("no container is called {}", quote(text))).help(format!("write \"{name}\"")));
    }
    check_words(text, "\"web-*\"")
}

fn check_image(text: &str) -> Result<(), Problem> {
    if let Some((transport, image)) = text.split_once("://") {
        return Err(Problem::new(format!("{} has a transport, which is not part of an image's name", quote(text)))
            .help(format!("remove `{transport}://`: write \"{image}\"")));
    }
    check_words(text, "\"docker.io/library/nginx:*\"")
}

/// Checks a glob of a text without spaces.
fn check_words(text: &str, example: &str) -> Result<(), Problem> {
    if text.is_empty() || text.len() > PATH_MAX || text.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Err(Problem::new(format!("{} matches no container", quote(text)))
            .help(format!("write {example}, or \"*\" for all")));
    }
    build_glob(&GlobBuilder::new(text), text)
}

fn check_id(text: &str) -> Result<(), Problem> {
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex && (ID_MIN..=ID_MAX).contains(&text.len()) {
        let lower = text.to_lowercase();
        return if lower == text {
            Ok(())
        } else {
            Err(Problem::new(format!("{} has upper-case letters, which container ids do not have", quote(text)))
                .help(format!("write \"{lower}\"")))
        };
    }
    let problem = Problem::new(format!("{} is not a container id or its beginning", quote(text)));
    Err(if is_hex || text.starts_with("sha256:") {
        problem.help(format!("write from {ID_MIN} to {ID_MAX} of its digits, as `podman ps` and `docker ps` show them"))
    } else {
        problem.help("ids are hexadecimal digits; write the name of a container under `name`")
    })
}

/// Returns the path of one cgroup, without slashes at its ends.
pub(super) fn path(path: &Text<'_>) -> Result<String, Problem> {
    check_path(path.get_ref()).map(str::to_owned).map_err(|problem| problem.at(path.span()))
}

/// Returns a glob without slashes at its ends. The root of the hierarchy is the empty glob.
fn path_glob(glob: &Text<'_>) -> Result<String, Problem> {
    check_glob(glob.get_ref()).map_err(|problem| problem.at(glob.span()))
}

fn check_path(text: &str) -> Result<&str, Problem> {
    if text.is_empty() {
        return Err(Problem::new("this cgroup has no name").help("write \"/\" for every process of the machine"));
    }
    let below = |mount| text.strip_prefix(mount).filter(|path: &&str| path.is_empty() || path.starts_with('/'));
    if let Some(path) = USUAL_MOUNTS.into_iter().find_map(below).map(|path| path.trim_matches('/')) {
        return Err(Problem::new(format!("{} is a path in the file system, not in the cgroup hierarchy", quote(text)))
            .help(format!("write \"{}\"", if path.is_empty() { "/" } else { path })));
    }
    if text.len() > PATH_MAX {
        return Err(Problem::new(format!("{} is longer than a path can be", quote(text)))
            .help(format!("write at most {PATH_MAX} bytes")));
    }
    let path = text.trim_matches('/');
    let is_invalid = |part: &str| part.is_empty() || part == "." || part == "..";
    if text.contains(char::is_control) || (!path.is_empty() && path.split('/').any(is_invalid)) {
        return Err(Problem::new(format!("{} is not the path of a cgroup", quote(text)))
            .help("write the path below the cgroup2 mount, such as \"system.slice/nginx.service\""));
    }
    Ok(path)
}

fn check_glob(text: &str) -> Result<String, Problem> {
    let path = check_path(text)?;
    build_glob(GlobBuilder::new(path).literal_separator(true), text).map(|()| path.to_owned())
}

fn build_glob(glob: &GlobBuilder<'_>, text: &str) -> Result<(), Problem> {
    glob.build().map(drop).map_err(|error| {
        Problem::new(format!("{} is not a glob: {}", quote(text), error.kind()))
            .help("put [brackets] around a literal character, such as \"[*]\"")
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::policy::{self, diagnostic::Style};

    #[test]
    fn escape_of_systemd_that_toml_decodes_is_a_warning() {
        for (cgroup, expected) in [
            (r#""a\x2db""#, Some(("a-b", true))),
            (r"'a\x2db'", Some((r"a\x2db", false))),
            (r#""a\\x2db""#, Some((r"a\x2db", false))),
        ] {
            let text = format!("[target]\ncgroup = {cgroup}\n[[rule]]\nset = {{ SO_MARK = 1 }}\n");
            let parsed = policy::parse(Path::new("p.toml"), &text).ok();
            let found = parsed.as_ref().map(|(policy, warnings)| {
                (policy.target.cgroups[0].as_str(), policy::render(warnings, Style::Plain).contains("single quotes"))
            });
            assert_eq!(found, expected, "{cgroup}");
        }
    }
}
