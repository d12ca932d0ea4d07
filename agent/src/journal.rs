//! What sockets had before policies changed them while they were there, kept so that it can be put back.
//!
//! A file of JSON lines below `/run/sockpolicy`, which is gone when the sockets are: with the next boot. A change is written
//! before it is made, and what came of it after, so that nothing is lost whenever this process ends.
//!
//! Invariant: one process at a time works on it, from its first line or look on to its end. Another one is refused: what it would
//! find is about to change.
//!
//! What has become of sockets is not told. A file that has grown long is written anew without those that are gone.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, OpenOptions},
    io::{self, BufRead as _, BufReader, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use abi::setting::{OptionKey, Value};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize};

use crate::{
    escape::Escape,
    fault,
    host::{process, survey::Survey},
    instance,
};

/// A file of so many bytes may be about many sockets that are gone: it has some 200 for each change.
const LONG: u64 = 64 * 1024;

/// Of files among those of an instance.
const KIND: &str = "before";

/// Bytes that are written at a time, and kept until then.
const AT_A_TIME: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{}: {source}", path.escaped())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{holder} works on {} just now\n  help: do it again when that has ended, or keep what sockets had under another name, with \
         --instance",
        path.escaped()
    )]
    Busy { path: PathBuf, holder: String },
}

/// Adds of which file.
fn failed(path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::File { path, source }
}

/// One option of one socket, which its cookie tells from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub cookie: u64,
    pub option: OptionKey,
}

/// What there is to put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it showed before the first change.
    pub before: Value,
    /// What it has shown since the last one: whoever finds something else there finds what somebody chose later.
    pub after: Value,
}

/// Who works on the file.
#[derive(Serialize, Deserialize)]
struct Worker {
    process: u32,
}

#[derive(Serialize, Deserialize)]
struct Line {
    cookie: u64,
    level: i32,
    name: i32,
    /// `None` where this is what came of a change.
    before: Option<Bytes>,
    after: Bytes,
}

/// A value: its length, and as much of it as matters.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Bytes {
    len: u32,
    words: [u64; 2],
}

impl From<&Value> for Bytes {
    fn from(value: &Value) -> Self {
        Self { len: value.len, words: value.words }
    }
}

impl From<Bytes> for Value {
    fn from(bytes: Bytes) -> Self {
        Self::new(bytes.words, bytes.len)
    }
}

/// The instances that have one, whether they have policies in force or not.
#[must_use]
pub fn instances() -> Vec<String> {
    let mut names: Vec<String> = instance::with_files(&[KIND]).collect();
    names.sort();
    names
}

/// The journal of an instance, which is nobody else's as long as this is there and has been used.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<Flock<fs::File>>,
}

impl Journal {
    #[must_use]
    pub fn of(instance: &str) -> Self {
        Self { path: instance::path_of(instance, KIND), file: None }
    }

    /// Notes what an option shows, and what it is about to be given.
    ///
    /// # Errors
    ///
    /// Where it cannot be written: then it must not be done.
    pub fn note(&mut self, place: Place, before: &Value, wanted: &Value) -> Result<(), JournalError> {
        self.note_all([(place, Some(*before), *wanted)])
    }

    /// Notes what an option shows after that.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn note_after(&mut self, place: Place, after: &Value) -> Result<(), JournalError> {
        self.note_all([(place, None, *after)])
    }

    /// The same of many, at once: what options show and are about to be given or, without that, show after.
    ///
    /// # Errors
    ///
    /// Where it cannot be written, or another process works on it.
    pub fn note_all(
        &mut self,
        notes: impl IntoIterator<Item = (Place, Option<Value>, Value)>,
    ) -> Result<(), JournalError> {
        let mut text = Vec::new();
        for (place, before, after) in notes {
            write_line(&mut text, place, before.as_ref(), &after).map_err(failed(&self.path))?;
            if text.len() >= AT_A_TIME {
                self.append(&text)?;
                text.clear();
            }
        }
        if text.is_empty() { Ok(()) } else { self.append(&text) }
    }

    fn append(&mut self, text: &[u8]) -> Result<(), JournalError> {
        if self.file.is_none() {
            self.open(true)?;
            self.shorten()?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(text).map_err(failed(&self.path))
    }

    /// Has the file, if there is one or it is to be made, for this process alone.
    fn open(&mut self, is_to_be_made: bool) -> Result<(), JournalError> {
        while self.file.is_none() {
            if is_to_be_made {
                instance::make_folder().map_err(failed(&self.path))?;
            }
            let file = OpenOptions::new().read(true).append(true).create(is_to_be_made).mode(0o600).open(&self.path);
            let file = match file {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !is_to_be_made => return Ok(()),
                file => file.map_err(failed(&self.path))?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Who had it may have written it anew, or removed it.
                Ok(lock) if instance::is_same(&lock, &self.path) => self.file = Some(lock),
                Ok(_) => {}
                Err((file, Errno::EAGAIN)) => {
                    return Err(JournalError::Busy { path: self.path.clone(), holder: holder(file) });
                }
                Err((_, errno)) => return Err(failed(&self.path)(errno.into())),
            }
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        say_whose(file).map_err(failed(&self.path))?;
        fault::point("journal-opened");
        Ok(())
    }

    /// Forgets sockets that are gone, where there may be many.
    fn shorten(&mut self) -> Result<(), JournalError> {
        let Some(file) = &self.file else { return Ok(()) };
        if file.metadata().map_err(failed(&self.path))?.len() < LONG {
            return Ok(());
        }
        let Ok(survey) = Survey::make(|_| true, || None).inspect_err(|error| log::debug!("{error}")) else {
            return Ok(());
        };
        if survey.has_unlisted {
            return Ok(());
        }
        let there: HashSet<u64> = survey.sockets.iter().map(|found| found.entry.cookie).collect();
        let mut changes = self.read()?;
        changes.retain(|place, _| there.contains(&place.cookie));
        self.replace(&changes)
    }

    /// All that there is to put back. A line that was cut off says nothing.
    ///
    /// # Errors
    ///
    /// Where it cannot be read, or another process works on it.
    pub fn changes(&mut self) -> Result<BTreeMap<Place, Change>, JournalError> {
        self.open(false)?;
        self.read()
    }

    fn read(&mut self) -> Result<BTreeMap<Place, Change>, JournalError> {
        let Some(file) = &mut self.file else { return Ok(BTreeMap::new()) };
        file.rewind().map_err(failed(&self.path))?;
        let lines = BufReader::new(&mut **file).lines().map_while(Result::ok);
        Ok(fold(lines.filter_map(|line| serde_json::from_str(&line).ok())))
    }

    /// Only these are left to put back.
    ///
    /// # Errors
    ///
    /// Where that cannot be written: then all are.
    pub fn keep(mut self, changes: &BTreeMap<Place, Change>) -> Result<(), JournalError> {
        match &self.file {
            // There was none.
            None => Ok(()),
            Some(_) if changes.is_empty() => self.remove(),
            Some(_) => self.replace(changes),
        }
    }

    /// Puts a file that says only this in the place of the one that is there, which is ours.
    fn replace(&mut self, changes: &BTreeMap<Place, Change>) -> Result<(), JournalError> {
        let mut text = Vec::new();
        for (place, Change { before, after }) in changes {
            write_line(&mut text, *place, Some(before), after).map_err(failed(&self.path))?;
        }
        let path = self.path.with_extension("new-before");
        // Nobody else's, as long as the other one is ours.
        let _ = fs::remove_file(&path);
        let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(failed(&path))?;
        let mut file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| failed(&path)(errno.into()))?;
        say_whose(&mut file).and_then(|()| file.write_all(&text)).map_err(failed(&path))?;
        fs::rename(&path, &self.path).map_err(failed(&self.path))?;
        self.file = Some(file);
        Ok(())
    }

    /// There is nothing to put back any more.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed, or another process works on it.
    pub fn remove(mut self) -> Result<(), JournalError> {
        self.open(false)?;
        match self.file {
            None => Ok(()),
            Some(_) => fs::remove_file(&self.path).map_err(failed(&self.path)),
        }
    }
}

fn write_line(text: &mut Vec<u8>, place: Place, before: Option<&Value>, after: &Value) -> io::Result<()> {
    let Place { cookie, option: OptionKey { level, name } } = place;
    let line = Line { cookie, level, name, before: before.map(Bytes::from), after: Bytes::from(after) };
    serde_json::to_writer(&mut *text, &line)?;
    text.push(b'\n');
    Ok(())
}

/// Whoever finds the file locked reads by whom.
fn say_whose(file: &mut fs::File) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Worker { process: std::process::id() })?;
    text.push(b'\n');
    file.write_all(&text)
}

/// Who has locked a file, in words.
fn holder(file: fs::File) -> String {
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    let last = lines.filter_map(|line| serde_json::from_str::<Worker>(&line).ok()).last();
    // It may just be about to say so, and the last one who did be gone.
    match last.filter(|worker| process::has_thread(worker.process)) {
        Some(Worker { process }) => format!("another sockpolicy, process {process},"),
        None => "another sockpolicy".to_owned(),
    }
}

fn fold(lines: impl Iterator<Item = Line>) -> BTreeMap<Place, Change> {
    let mut changes: BTreeMap<Place, Change> = BTreeMap::new();
    for Line { cookie, level, name, before, after } in lines {
        let place = Place { cookie, option: OptionKey { level, name } };
        match (changes.get_mut(&place), before) {
            // Nothing came of what was noted before.
            (Some(change), Some(before)) if change.before == change.after => {
                *change = Change { before: before.into(), after: after.into() };
            }
            (Some(change), _) => change.after = after.into(),
            (None, Some(before)) => drop(changes.insert(place, Change { before: before.into(), after: after.into() })),
            (None, None) => {}
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(before: Option<u32>, after: u32) -> Line {
        let bytes = |number| Bytes::from(&Value::int(number));
        Line { cookie: 1, level: 6, name: 1, before: before.map(bytes), after: bytes(after) }
    }

    #[test]
    fn first_value_and_last_one_count() {
        let lines = [written(Some(1), 2), written(None, 3), written(Some(3), 4), written(None, 5)];
        let change = *fold(lines.into_iter()).values().next().unwrap();
        assert_eq!(change, Change { before: Value::int(1), after: Value::int(5) });
    }

    #[test]
    fn change_that_was_refused_leaves_no_value_to_be_put_back() {
        // 1, and 2 refused; then somebody set 3, which was replaced by 2.
        let lines = [written(Some(1), 2), written(None, 1), written(Some(3), 2)];
        let change = *fold(lines.into_iter()).values().next().unwrap();
        assert_eq!(change, Change { before: Value::int(3), after: Value::int(2) });
    }

    #[test]
    fn change_that_was_cut_off_has_the_value_that_was_wanted() {
        let change = *fold([written(Some(1), 2)].into_iter()).values().next().unwrap();
        assert_eq!(change.after, Value::int(2));
        assert!(fold([written(None, 2)].into_iter()).is_empty());
    }
}
