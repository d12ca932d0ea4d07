//! Where policies come from: files, and folders in which every `*.toml` is a policy.
//!
//! Reads all of them, or returns everything that is wrong, and lists the folders to watch for changes;
//! [`crate::host::inotify`] watches. A file that other users can change is refused, since they would decide what root
//! does ([`crate::host::ownership`]).
//!
//! Invariant: a path that was a file at start is never read as a folder later, and the other way round: that is an
//! error.

mod file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
    slice,
    sync::Arc,
};

use self::file::{open, read, unreadable};
use crate::{
    escape::Escape,
    host::ownership::{Owners, Reason, Weakness, weaknesses},
    lint,
    policy::{
        self, Policy, PolicyErrors, Warnings,
        diagnostic::{Diagnostic, Problem, Severity, Source, Span, Style, quote},
        sort,
        validate::{self, Checked},
    },
};

/// How many symbolic links in a row are followed, as in the kernel (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// What to do about a policy file that users other than root and the user of this process can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfInsecure {
    Refuse,
    Warn,
    Accept,
}

/// Files and folders, as given by the user.
#[derive(Clone, Debug)]
pub struct Sources {
    named: Vec<Named>,
    insecure: IfInsecure,
    /// Whether a folder without a policy is no error.
    may_be_empty: bool,
}

#[derive(Clone, Debug)]
struct Named {
    path: PathBuf,
    is_folder: bool,
}

/// The texts of policy files, in the order of their names; an error for each file that cannot be read.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    texts: Vec<Result<Arc<Source>, Diagnostic>>,
    /// About the files, not about their contents.
    warnings: Warnings,
}

/// Equal texts give equal policies.
impl PartialEq for Texts {
    fn eq(&self, other: &Self) -> bool {
        let contents = |texts: &Self| -> Vec<Result<(PathBuf, String), String>> {
            let contents = texts.texts.iter().map(|text| match text {
                Ok(source) => Ok((source.path().to_owned(), source.text().to_owned())),
                Err(problem) => Err(problem.render(Style::Plain)),
            });
            contents.collect()
        };
        contents(self) == contents(other)
    }
}

/// Parses the text of a policy, and searches it for likely mistakes. `path` names the file, and the policy if the text has no
/// `name`.
///
/// # Errors
///
/// Returns every error of the text.
pub fn parse(path: &Path, text: &str) -> Result<(Policy, Warnings), PolicyErrors> {
    let (policy, mut warnings) = policy::parse(path, text)?;
    warnings.extend(lint::lint(slice::from_ref(&policy)));
    sort(&mut warnings);
    Ok((policy, warnings))
}

/// Reads and parses a policy file without checking who can change the file.
///
/// # Errors
///
/// Returns every error of the file, or why it cannot be read.
pub fn load(path: &Path) -> Result<(Policy, Warnings), PolicyErrors> {
    let (policies, warnings) = load_all(&[path.to_owned()], IfInsecure::Accept)?;
    match policies.into_iter().next() {
        Some(policy) => Ok((policy, warnings)),
        None => Err(PolicyErrors { diagnostics: Vec::new() }),
    }
}

/// Reads the policies in these files and folders, in the order of their file names.
///
/// # Errors
///
/// Returns every error of every file.
pub fn load_all(paths: &[PathBuf], insecure: IfInsecure) -> Result<(Vec<Policy>, Warnings), PolicyErrors> {
    Sources::new(paths, insecure).read().policies()
}

impl Sources {
    #[must_use]
    pub fn new(paths: &[PathBuf], insecure: IfInsecure) -> Self {
        let named = |path: &PathBuf| Named { path: path.clone(), is_folder: path.is_dir() };
        Self { named: paths.iter().map(named).collect(), insecure, may_be_empty: false }
    }

    /// Accepts folders without a policy: the caller waits for policies.
    #[must_use]
    pub fn may_be_empty(self) -> Self {
        Self { may_be_empty: true, ..self }
    }

    /// Returns the policy files in the order of their names, and the errors of folders.
    fn files(&self) -> (Vec<PathBuf>, Vec<Diagnostic>) {
        let (mut files, mut errors) = (Vec::new(), Vec::new());
        for Named { path, is_folder } in &self.named {
            if !is_folder {
                files.push(path.clone());
                continue;
            }
            match policies_in(path) {
                Ok(found) if found.is_empty() && !self.may_be_empty => {
                    let problem = Problem::new(format!("no policy in {}: it has no *.toml", path.escaped()))
                        .help("add one, or list the file itself");
                    errors.push(Diagnostic::without_source(problem));
                }
                Ok(found) => files.extend(found),
                Err(error) => errors.push(Diagnostic::without_source(unreadable(path, &error))),
            }
        }
        files.sort_by(|one, other| (one.file_name(), one).cmp(&(other.file_name(), other)));
        (files, errors)
    }

    /// Reads all files.
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

    /// Returns the folders to watch for changes: those of the paths, and those of the symbolic links in the paths.
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
    /// Returns texts that were read earlier.
    #[must_use]
    pub fn of(files: impl Iterator<Item = (PathBuf, String)>) -> Self {
        let texts = files.map(|(path, text)| Ok(Source::new(&path, text))).collect();
        Self { texts, warnings: Warnings::new() }
    }

    /// Returns the path and the text of each file.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.texts.iter().flatten().map(|source| (source.path(), source.text()))
    }

    /// Parses the policies.
    ///
    /// # Errors
    ///
    /// Returns every error of every file, including files that cannot be read.
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

/// Checks who can change files. A weakness that several files share, such as that of a directory, is reported once.
struct Inspection {
    insecure: IfInsecure,
    owners: Owners,
    reported: BTreeSet<PathBuf>,
}

enum Found {
    Secure,
    /// With the problem, unless it was reported for another file.
    Insecure(Option<Problem>),
}

impl Inspection {
    fn new(insecure: IfInsecure) -> Self {
        Self { insecure, owners: Owners::of_this_process(), reported: BTreeSet::new() }
    }

    fn inspect(&mut self, path: &Path, file: &fs::File) -> Found {
        if self.insecure == IfInsecure::Accept {
            return Found::Secure;
        }
        let found = weaknesses(path, file, &self.owners);
        if found.is_empty() {
            return Found::Secure;
        }
        let new: Vec<Weakness> =
            found.into_iter().filter(|weakness| self.reported.insert(weakness.path.clone())).collect();
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

/// Returns the commands that remove the weaknesses, each followed by a comma.
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

/// Returns the policy files directly in a folder. Hidden files are ignored: editors and ConfigMaps create such files.
fn policies_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_policy = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "toml")
            && !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
    };
    let paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    Ok(paths.collect::<io::Result<Vec<_>>>()?.into_iter().filter(is_policy).collect())
}

/// Adds the folder of a path, and of each symbolic link that is followed to resolve it.
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

fn same_name(source: &Arc<Source>, name: &str, span: Span, first: &Path) -> Diagnostic {
    let problem = if source.path() == first {
        Problem::new("the file is listed twice").help("list it once")
    } else {
        let message = format!("two policies have the name {}: the other is in {}", quote(name), first.escaped());
        Problem::new(message).help("give this policy another name: name = \"…\" at the top of the file")
    };
    Diagnostic::new(Severity::Error, source, problem.at(span))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn folders_of_symbolic_links_are_watched() {
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
        let (files, errors) = Sources::new(slice::from_ref(&top), IfInsecure::Accept).files();
        assert_eq!(files, ["a.toml", "loop.toml", "round.toml"].map(|name| top.join(name)));
        assert!(errors.is_empty());
        fs::remove_dir_all(top).unwrap();
    }
}
