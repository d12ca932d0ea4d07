//! Where policies come from: files, and folders of which all `*.toml` are policies.
//!
//! Reads them all, or says all that is wrong; tells where to look for changes. Does not watch, which is
//! [`crate::host::inotify`]'s. A file that other users can change is refused, since they would decide what root does
//! ([`crate::host::ownership`]).
//!
//! Invariant: what was a file when it was named is no folder later, and the other way round: then it is an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use super::{
    Policy, PolicyErrors, Warnings,
    diagnostic::{Diagnostic, Problem, Severity, Source, Style},
    lint, open, read, same_name, sort, unreadable,
    validate::{self, Checked},
};
use crate::{
    escape::Escape,
    host::ownership::{Owners, Reason, Weakness, weaknesses},
};

/// How many symbolic links are followed one after the other, as the kernel does (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// What to do about a policy file that users other than root and those who run this can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfInsecure {
    Refuse,
    Warn,
    Accept,
}

/// Files and folders, as they were named.
#[derive(Clone, Debug)]
pub struct Sources {
    named: Vec<Named>,
    insecure: IfInsecure,
}

#[derive(Clone, Debug)]
struct Named {
    path: PathBuf,
    is_folder: bool,
}

/// What policy files say, in the order of their names; of those that cannot be read, why.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    texts: Vec<Result<Arc<Source>, Diagnostic>>,
    /// About the files, not about what they say.
    warnings: Warnings,
}

/// Whether they say the same, so that nothing new can come of them.
impl PartialEq for Texts {
    fn eq(&self, other: &Self) -> bool {
        let said = |texts: &Self| -> Vec<Result<(PathBuf, String), String>> {
            let said = texts.texts.iter().map(|text| match text {
                Ok(source) => Ok((source.path().to_owned(), source.text().to_owned())),
                Err(problem) => Err(problem.render(Style::Plain)),
            });
            said.collect()
        };
        said(self) == said(other)
    }
}

impl Sources {
    #[must_use]
    pub fn new(paths: &[PathBuf], insecure: IfInsecure) -> Self {
        let named = |path: &PathBuf| Named { path: path.clone(), is_folder: path.is_dir() };
        Self { named: paths.iter().map(named).collect(), insecure }
    }

    /// The files that they stand for, in the order of their names, and what is wrong with folders.
    fn files(&self) -> (Vec<PathBuf>, Vec<Diagnostic>) {
        let (mut files, mut errors) = (Vec::new(), Vec::new());
        for Named { path, is_folder } in &self.named {
            if !is_folder {
                files.push(path.clone());
                continue;
            }
            match policies_in(path) {
                Ok(found) if found.is_empty() => {
                    let problem = Problem::new(format!("no policy in {}: it has no *.toml", path.escaped()))
                        .help("put one there, or name the file");
                    errors.push(Diagnostic::without_source(problem));
                }
                Ok(found) => files.extend(found),
                Err(error) => errors.push(Diagnostic::without_source(unreadable(path, &error))),
            }
        }
        files.sort_by(|one, other| (one.file_name(), one).cmp(&(other.file_name(), other)));
        (files, errors)
    }

    /// Reads them all.
    #[must_use]
    pub fn read(&self) -> Texts {
        let (files, problems) = self.files();
        let mut texts = Texts { texts: problems.into_iter().map(Err).collect(), warnings: Warnings::new() };
        let mut inspection = Inspection::new(self.insecure);
        for path in files {
            let file = match open(&path) {
                Ok(file) => file,
                Err(problem) => {
                    texts.texts.push(Err(problem));
                    continue;
                }
            };
            let found = inspection.inspect(&path, &file);
            match (self.insecure, found) {
                (IfInsecure::Refuse, Found::Insecure(problem)) => {
                    texts.texts.extend(problem.map(|problem| Err(Diagnostic::without_source(problem))));
                }
                (_, found) => {
                    if let Found::Insecure(Some(problem)) = found {
                        let severity = Severity::Warning;
                        texts.warnings.push(Diagnostic { severity, ..Diagnostic::without_source(problem) });
                    }
                    texts.texts.push(read(&path, file));
                }
            }
        }
        texts
    }

    /// The folders in which a change may change what these paths stand for: theirs, and those of the symbolic links on the
    /// way.
    #[must_use]
    pub fn folders(&self) -> BTreeSet<PathBuf> {
        let mut folders = BTreeSet::new();
        let (files, _) = self.files();
        for Named { path, is_folder } in &self.named {
            note_folders(path, &mut folders);
            if *is_folder {
                folders.insert(path.clone());
            }
        }
        for file in files {
            note_folders(&file, &mut folders);
        }
        folders
    }
}

impl Texts {
    /// What was read before.
    #[must_use]
    pub fn of(files: impl Iterator<Item = (PathBuf, String)>) -> Self {
        let texts = files.map(|(path, text)| Ok(Source::new(&path, text))).collect();
        Self { texts, warnings: Warnings::new() }
    }

    /// The files' paths, and what they say.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.texts.iter().flatten().map(|source| (source.path(), source.text()))
    }

    /// The policies that they describe.
    ///
    /// # Errors
    ///
    /// All that is wrong with any of them, those included that could not be read.
    pub fn policies(&self) -> Result<(Vec<Policy>, Warnings), PolicyErrors> {
        let (mut policies, mut warnings, mut errors) = (Vec::new(), self.warnings.clone(), Vec::new());
        let mut paths_by_name = BTreeMap::new();
        for text in &self.texts {
            let source = match text {
                Ok(source) => source,
                Err(problem) => {
                    errors.push(problem.clone());
                    continue;
                }
            };
            match validate::check(source) {
                Ok(Checked { policy, warnings: more, name }) => {
                    if let Some(first) = paths_by_name.insert(policy.name.clone(), source.path()) {
                        errors.push(same_name(source, &policy.name, name, first));
                    }
                    policies.push(policy);
                    warnings.extend(more);
                }
                Err(more) => errors.extend(more),
            }
        }
        if !errors.is_empty() {
            return Err(PolicyErrors { diagnostics: errors });
        }
        warnings.extend(lint::lint(&policies));
        sort(&mut warnings);
        Ok((policies, warnings))
    }
}

/// Looks who can change files. What many have in common, a directory, is said once.
struct Inspection {
    insecure: IfInsecure,
    owners: Owners,
    said: BTreeSet<PathBuf>,
}

enum Found {
    Secure,
    /// With what to say of it, if that has not been said of another file.
    Insecure(Option<Problem>),
}

impl Inspection {
    fn new(insecure: IfInsecure) -> Self {
        Self { insecure, owners: Owners::of_this_process(), said: BTreeSet::new() }
    }

    fn inspect(&mut self, path: &Path, file: &fs::File) -> Found {
        if self.insecure == IfInsecure::Accept {
            return Found::Secure;
        }
        let found = weaknesses(path, file, &self.owners);
        if found.is_empty() {
            return Found::Secure;
        }
        let new: Vec<Weakness> = found.into_iter().filter(|weakness| self.said.insert(weakness.path.clone())).collect();
        Found::Insecure((!new.is_empty()).then(|| problem(self.insecure, path, &new)))
    }
}

fn problem(insecure: IfInsecure, path: &Path, found: &[Weakness]) -> Problem {
    let reasons = found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let message = match insecure {
        IfInsecure::Refuse => format!("cannot use {}: {reasons}", path.escaped()),
        IfInsecure::Warn | IfInsecure::Accept => {
            format!("`run`, `attach`, `exec` and `apply` refuse {}: {reasons}", path.escaped())
        }
    };
    Problem::new(message).help(format!("{}or accept it with --insecure-policies", remedies(found)))
}

/// What to type, with a comma after it.
fn remedies(found: &[Weakness]) -> String {
    let about = |is_meant: fn(&Reason) -> bool| {
        let paths = found.iter().filter(|weakness| is_meant(&weakness.reason));
        paths.map(|weakness| format!(" {}", weakness.path.escaped())).collect::<String>()
    };
    let written = about(|reason| matches!(reason, Reason::Writable(_)));
    let owned = about(|reason| matches!(reason, Reason::Owner(_)));
    let commands = [("chmod go-w", written), ("chown -h root", owned)];
    let commands = commands.into_iter().filter(|(_, paths)| !paths.is_empty());
    commands.map(|(command, paths)| format!("{command}{paths}, ")).collect()
}

/// The policy files right in a folder. Hidden ones are not: editors and ConfigMaps have such.
fn policies_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_policy = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "toml")
            && !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
    };
    let paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    Ok(paths.collect::<io::Result<Vec<_>>>()?.into_iter().filter(is_policy).collect())
}

/// Notes the folder of a path, and of each symbolic link that is followed on the way to what it stands for.
fn note_folders(path: &Path, folders: &mut BTreeSet<PathBuf>) {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folders.insert(parent.to_owned());
    let mut left = vec![path.to_owned()];
    let mut links = 0;
    while let Some(path) = left.pop() {
        let mut walked = PathBuf::new();
        let mut components = path.components();
        while let Some(component) = components.next() {
            let folder = walked.clone();
            walked.push(component);
            let Component::Normal(_) = component else { continue };
            let Ok(target) = fs::read_link(&walked) else { continue };
            folders.insert(if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.clone() });
            links += 1;
            if links <= LINKS_MAX {
                left.push(folder.join(target).join(components.as_path()));
            }
            break;
        }
        if components.as_path().as_os_str().is_empty()
            && let Some(parent) = walked.parent().filter(|parent| !parent.as_os_str().is_empty())
        {
            folders.insert(parent.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_on_the_way_are_looked_for_in_their_folders() {
        let top = std::env::temp_dir().join(format!("sockpolicy-sources-{}", std::process::id()));
        fs::create_dir_all(top.join("..1")).unwrap();
        fs::write(top.join("..1/a.toml"), "").unwrap();
        symlink("..1", top.join("..data")).unwrap();
        symlink("..data/a.toml", top.join("a.toml")).unwrap();
        symlink("a.toml", top.join("loop.toml")).unwrap();
        symlink("round.toml", top.join("round.toml")).unwrap();

        let folders = Sources::new(&[top.join("a.toml")], IfInsecure::Accept).folders();
        assert_eq!(folders, [top.clone(), top.join("..1")].into_iter().collect());
        assert_eq!(Sources::new(&[top.join("loop.toml")], IfInsecure::Accept).folders(), folders);
        assert_eq!(
            Sources::new(&[top.join("round.toml")], IfInsecure::Accept).folders(),
            [top.clone()].into_iter().collect()
        );
        let (files, errors) = Sources::new(std::slice::from_ref(&top), IfInsecure::Accept).files();
        assert_eq!(files, ["a.toml", "loop.toml", "round.toml"].map(|name| top.join(name)));
        assert!(errors.is_empty());
        fs::remove_dir_all(top).unwrap();
    }
}
