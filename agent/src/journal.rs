//! What sockets had before policies changed them while they were there, kept so that it can be put back.
//!
//! A file of JSON lines below `/run/sockpolicy`, which is gone when the sockets are: with the next boot. A change is written
//! before it is made, and what came of it after, so that nothing is lost whenever this process ends.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use abi::setting::{OptionKey, Value};
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct JournalError {
    path: PathBuf,
    source: io::Error,
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

#[derive(Serialize, Deserialize)]
struct Line {
    cookie: u64,
    level: i32,
    name: i32,
    /// `None` where this is what came of a change.
    before: Option<Bytes>,
    after: Bytes,
}

impl Line {
    fn of(place: Place, before: Option<&Value>, after: &Value) -> Self {
        let Place { cookie, option } = place;
        Self {
            cookie,
            level: option.level,
            name: option.name,
            before: before.map(Bytes::from),
            after: Bytes::from(after),
        }
    }

    fn write_to(&self, text: &mut Vec<u8>) -> io::Result<()> {
        serde_json::to_writer(&mut *text, self)?;
        text.push(b'\n');
        Ok(())
    }
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

/// The journal of an instance.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<File>,
}

impl Journal {
    #[must_use]
    pub fn of(instance: &str) -> Self {
        Self { path: crate::instance::path_of(instance, "before"), file: None }
    }

    /// Notes what an option shows, and what it is about to be given.
    ///
    /// # Errors
    ///
    /// Where it cannot be written: then it must not be done.
    pub fn note(&mut self, place: Place, before: &Value, wanted: &Value) -> Result<(), JournalError> {
        self.write(place, Some(before), wanted)
    }

    /// Notes what an option shows after that.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn note_after(&mut self, place: Place, after: &Value) -> Result<(), JournalError> {
        self.write(place, None, after)
    }

    /// The same of many, at once: what options show and are about to be given or, without that, show after.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn note_all(
        &mut self,
        notes: impl IntoIterator<Item = (Place, Option<Value>, Value)>,
    ) -> Result<(), JournalError> {
        let mut text = Vec::new();
        for (place, before, after) in notes {
            Line::of(place, before.as_ref(), &after).write_to(&mut text).map_err(|source| self.error(source))?;
        }
        if text.is_empty() {
            return Ok(());
        }
        self.open().and_then(|file| file.write_all(&text)).map_err(|source| self.error(source))
    }

    fn write(&mut self, place: Place, before: Option<&Value>, after: &Value) -> Result<(), JournalError> {
        self.note_all([(place, before.copied(), *after)])
    }

    fn error(&self, source: io::Error) -> JournalError {
        JournalError { path: self.path.clone(), source }
    }

    fn open(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            if let Some(folder) = self.path.parent() {
                fs::create_dir_all(folder)?;
            }
            self.file = Some(OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?);
        }
        self.file.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// All that there is to put back. A line that was cut off says nothing.
    ///
    /// # Errors
    ///
    /// Where it cannot be read.
    pub fn changes(&self) -> Result<BTreeMap<Place, Change>, JournalError> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            file => file.map_err(|source| JournalError { path: self.path.clone(), source })?,
        };
        let lines = BufReader::new(file).lines().map_while(Result::ok);
        Ok(fold(lines.filter_map(|line| serde_json::from_str(&line).ok())))
    }

    /// Only these are left to put back.
    ///
    /// # Errors
    ///
    /// Where that cannot be written: then all are.
    pub fn keep(self, changes: &BTreeMap<Place, Change>) -> Result<(), JournalError> {
        if changes.is_empty() {
            return self.remove();
        }
        let mut shorter = Self { path: self.path.with_extension("new-before"), file: None };
        for (place, change) in changes {
            shorter.note(*place, &change.before, &change.after)?;
        }
        fs::rename(&shorter.path, &self.path).map_err(|source| JournalError { path: self.path.clone(), source })
    }

    /// There is nothing to put back any more.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed.
    pub fn remove(self) -> Result<(), JournalError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(JournalError { path: self.path, source: error })
            }
            _ => Ok(()),
        }
    }
}

fn fold(lines: impl Iterator<Item = Line>) -> BTreeMap<Place, Change> {
    let mut changes: BTreeMap<Place, Change> = BTreeMap::new();
    for Line { cookie, level, name, before, after } in lines {
        let place = Place { cookie, option: OptionKey { level, name } };
        match (changes.get_mut(&place), before) {
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

    fn line(before: Option<u32>, after: u32) -> Line {
        let bytes = |number| Bytes::from(&Value::int(number));
        Line { cookie: 1, level: 6, name: 1, before: before.map(bytes), after: bytes(after) }
    }

    #[test]
    fn first_value_and_last_one_count() {
        let lines = [line(Some(1), 2), line(None, 3), line(Some(3), 4), line(None, 5)];
        let change = *fold(lines.into_iter()).values().next().unwrap();
        assert_eq!(change, Change { before: Value::int(1), after: Value::int(5) });
    }

    #[test]
    fn change_that_was_cut_off_has_the_value_that_was_wanted() {
        let change = *fold([line(Some(1), 2)].into_iter()).values().next().unwrap();
        assert_eq!(change.after, Value::int(2));
        assert!(fold([line(None, 2)].into_iter()).is_empty());
    }
}
