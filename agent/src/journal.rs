//! The journal: the values that `apply` replaced on existing sockets, so that they can be restored.
//!
//! The journal is a file of JSON lines in `/run/sockpolicy`, which the next boot empties. A change is
//! written before it is made, and its result afterwards, so that no value is lost whenever this process ends.
//!
//! Each line ends with a checksum. A line whose checksum is wrong is damaged: its values are not used, all other lines are, and
//! the damaged line is kept in the file.
//!
//! Invariant: one process at a time uses the journal, from its first read or write to its end. Another process is refused,
//! because what it would read is about to change.
//!
//! The journal does not record that sockets are closed. A long file is rewritten without closed sockets.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{self, BufRead, BufReader, BufWriter, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use abi::setting::{OptionKey, Value};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};
use serde::{Deserialize, Serialize};

use crate::{
    escape::Escape,
    fault,
    host::{
        inspect::Inspector,
        private::{PrivateDir, PrivateError},
        process,
        socket_table::SocketTable,
    },
    instance,
};

/// Size in bytes from which a file is rewritten: it may contain many closed sockets. A change takes some 200 bytes.
const COMPACT_LEN: u64 = 64 * 1024;

/// The extension of journals among the files of an instance.
const KIND: &str = "before";

/// Size in bytes of the buffer for writing.
const BUFFER_LEN: usize = 256 * 1024;

/// Maximum length of a valid line in bytes.
const LINE_MAX: usize = 1024;

/// The text before the checksum at the end of a line.
const CHECKSUM_KEY: &str = ",\"sum\":";

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{}: {source}", path.escaped())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "cannot use {}: {holder} is using it\n  help: try again when that process has ended, or choose another journal with \
         --instance",
        path.escaped()
    )]
    Busy { path: PathBuf, holder: String },
    #[error("{0}")]
    Private(#[from] PrivateError),
}

/// Returns a function that adds the path of a file to an error.
fn failed(path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::File { path, source }
}

/// One option of one socket. The cookie identifies the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub cookie: u64,
    pub option: OptionKey,
}

/// A change to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The value before the first change.
    pub before: Value,
    /// The value after the last change. If the socket has another value, something else set it later.
    pub after: Value,
}

/// The process that uses the file.
#[derive(Serialize, Deserialize)]
struct Holder {
    process: u32,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Line {
    cookie: u64,
    level: i32,
    name: i32,
    /// `None` if the line is the result of a change.
    before: Option<Bytes>,
    after: Bytes,
}

/// A value: its length, and its first 16 bytes.
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

/// Returns the names of the instances that have a journal, whether they have policies in force or not.
#[must_use]
pub fn instances() -> Vec<String> {
    let mut names = instance::with_files(&[KIND]);
    names.sort();
    names
}

/// Returns the path of an instance's journal, for messages.
#[must_use]
pub fn path_of(instance: &str) -> PathBuf {
    instance::path_of(instance, KIND)
}

/// The contents of a journal.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The changes to restore.
    pub changes: BTreeMap<Place, Change>,
    /// Number of damaged lines.
    pub damaged: usize,
}

/// The journal of an instance. From its first use on, it is locked until this value is dropped.
#[derive(Debug)]
pub struct Journal {
    /// The name of the file in the directory of all instances.
    name: String,
    /// The path of the file, for messages.
    path: PathBuf,
    file: Option<(PrivateDir, Flock<fs::File>)>,
}

impl Journal {
    #[must_use]
    pub fn of(instance: &str) -> Self {
        let name = instance::file_name(instance, KIND);
        Self { name, path: path_of(instance), file: None }
    }

    /// Records the current value of an option and the value that is about to be set.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written. The option must then not be set.
    pub fn note(&mut self, place: Place, before: &Value, wanted: &Value) -> Result<(), JournalError> {
        self.note_all([(place, Some(*before), *wanted)])
    }

    /// Records the value of an option after it was set.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written.
    pub fn note_after(&mut self, place: Place, after: &Value) -> Result<(), JournalError> {
        self.note_all([(place, None, *after)])
    }

    /// Records many options together: the current value and the value that is about to be set or, without a current value, the
    /// value after it was set.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written, or if another process uses the journal.
    pub fn note_all(
        &mut self,
        notes: impl IntoIterator<Item = (Place, Option<Value>, Value)>,
    ) -> Result<(), JournalError> {
        let mut text = Vec::new();
        for (place, before, after) in notes {
            write_line(&mut text, place, before.as_ref(), &after).map_err(failed(&self.path))?;
            if text.len() >= BUFFER_LEN {
                self.append(&text)?;
                text.clear();
            }
        }
        if text.is_empty() { Ok(()) } else { self.append(&text) }
    }

    fn append(&mut self, text: &[u8]) -> Result<(), JournalError> {
        if self.file.is_none() {
            self.open(true)?;
            self.compact()?;
        }
        let Some((_, file)) = &mut self.file else { return Ok(()) };
        append(file, text).map_err(failed(&self.path))
    }

    /// Opens and locks the file. With `create`, makes it if there is none.
    fn open(&mut self, create: bool) -> Result<(), JournalError> {
        while self.file.is_none() {
            let dir = if create { Some(instance::make_dir()?) } else { instance::dir()? };
            let create_flag = if create { OFlag::O_CREAT } else { OFlag::empty() };
            let Some(dir) = dir else { return Ok(()) };
            let Some(file) = dir.open_file(&self.name, OFlag::O_RDWR | OFlag::O_APPEND | create_flag)? else {
                return Ok(());
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // The previous holder may have rewritten or removed the file.
                Ok(lock) if dir.is_entry(&lock, &self.name) => self.file = Some((dir, lock)),
                Ok(_) => {}
                Err((file, Errno::EAGAIN)) => {
                    return Err(JournalError::Busy { path: self.path.clone(), holder: holder(file) });
                }
                Err((_, errno)) => return Err(failed(&self.path)(errno.into())),
            }
        }
        let Some((_, file)) = &mut self.file else { return Ok(()) };
        write_holder(file).map_err(failed(&self.path))?;
        fault::point("journal-opened");
        Ok(())
    }

    /// Removes closed sockets from a long file.
    fn compact(&mut self) -> Result<(), JournalError> {
        let Some((_, file)) = &self.file else { return Ok(()) };
        if file.metadata().map_err(failed(&self.path))?.len() < COMPACT_LEN {
            return Ok(());
        }
        let mut inspector = Inspector::default();
        let table = SocketTable::read(|_| true, || None, &mut inspector);
        let Ok(table) = table.inspect_err(|error| log::debug!("{error}")) else {
            return Ok(());
        };
        // A socket that could not be inspected may be one of those in the journal.
        if table.has_unlisted || !inspector.skipped().is_empty() {
            return Ok(());
        }
        let open: HashSet<u64> = table.sockets.iter().map(|found| found.entry.cookie).collect();
        let Contents { mut changes, .. } = self.read()?;
        changes.retain(|place, _| open.contains(&place.cookie));
        self.replace(&changes)
    }

    /// Reads the journal.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, or if another process uses the journal.
    pub fn contents(&mut self) -> Result<Contents, JournalError> {
        self.open(false)?;
        self.read()
    }

    fn read(&mut self) -> Result<Contents, JournalError> {
        let Some((_, file)) = &mut self.file else { return Ok(Contents::default()) };
        file.rewind().map_err(failed(&self.path))?;
        parse(&mut BufReader::new(&mut **file)).map_err(failed(&self.path))
    }

    /// Replaces the changes in the file, and keeps the damaged lines. Removes the file if nothing is left.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written. The old contents are then kept.
    pub fn keep(mut self, contents: &Contents) -> Result<(), JournalError> {
        match &self.file {
            // There is no file.
            None => Ok(()),
            Some(_) if contents.changes.is_empty() && contents.damaged == 0 => self.remove(),
            Some(_) => self.replace(&contents.changes),
        }
    }

    /// Replaces the file, which this process has locked, with one that contains these changes and the damaged lines.
    fn replace(&mut self, changes: &BTreeMap<Place, Change>) -> Result<(), JournalError> {
        let Some((dir, file)) = &mut self.file else { return Ok(()) };
        let new = format!("{}.new", self.name);
        // No other process uses this name while this process has locked the journal.
        dir.remove_file(&new)?;
        let Some(made) = dir.open_file(&new, OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_EXCL)? else {
            return Ok(());
        };
        let path = dir.path().join(&new);
        let mut made =
            Flock::lock(made, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| failed(&path)(errno.into()))?;
        if let Err(error) = copy(file, changes, &mut made) {
            let _ = dir.remove_file(&new);
            return Err(failed(&path)(error));
        }
        dir.rename(&new, &self.name)?;
        *file = made;
        Ok(())
    }

    /// Removes the journal, because there is nothing to restore any more.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be removed, or if another process uses the journal.
    pub fn remove(mut self) -> Result<(), JournalError> {
        self.open(false)?;
        match &self.file {
            None => Ok(()),
            Some((dir, _)) => Ok(dir.remove_file(&self.name)?),
        }
    }
}

/// Appends whole lines or nothing: if there is no space for all of them, the file is truncated to its old length.
fn append(file: &mut fs::File, text: &[u8]) -> io::Result<()> {
    let end = file.metadata()?.len();
    file.write_all(text).inspect_err(|_| {
        // An incomplete line would be damaged, and so would the line after it.
        if let Err(error) = file.set_len(end) {
            log::debug!("cannot truncate the journal, whose last line is incomplete: {error}");
        }
    })
}

/// Writes these changes, and the damaged lines of `old`.
fn copy(old: &mut fs::File, changes: &BTreeMap<Place, Change>, new: &mut fs::File) -> io::Result<()> {
    write_holder(new)?;
    let mut out = BufWriter::new(new);
    let mut line = Vec::new();
    for (place, Change { before, after }) in changes {
        line.clear();
        write_line(&mut line, *place, Some(before), after)?;
        out.write_all(&line)?;
    }
    old.rewind()?;
    for_each_line(&mut BufReader::new(old), |line| match line {
        RawLine::Damaged(bytes) => out.write_all(bytes).and_then(|()| out.write_all(b"\n")),
        RawLine::Line(_) | RawLine::Holder(_) => Ok(()),
    })?;
    out.flush()
}

/// Parses a journal. Reads the text once, and keeps no more of it in memory than the changes.
///
/// # Errors
///
/// Fails if `text` cannot be read.
pub fn parse(text: &mut impl BufRead) -> io::Result<Contents> {
    let (mut lines, mut damaged) = (Fold::default(), 0);
    for_each_line(text, |line| {
        match line {
            RawLine::Line(line) => lines.add(line),
            RawLine::Damaged(_) => damaged += 1,
            RawLine::Holder(_) => {}
        }
        Ok(())
    })?;
    Ok(Contents { changes: lines.0, damaged })
}

/// A line of a journal.
enum RawLine<'a> {
    Line(Line),
    Holder(Holder),
    /// At most [`LINE_MAX`] bytes of a damaged line. The rest follows as another line.
    Damaged(&'a [u8]),
}

fn for_each_line(text: &mut impl BufRead, mut each: impl FnMut(RawLine<'_>) -> io::Result<()>) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        io::Read::take(&mut *text, LINE_MAX as u64).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if !line.is_empty() {
            each(read_line(&line))?;
        }
    }
}

fn read_line(line: &[u8]) -> RawLine<'_> {
    let Some(body) = body_of(line) else { return RawLine::Damaged(line) };
    if let Ok(line) = serde_json::from_slice(&body) {
        return RawLine::Line(line);
    }
    serde_json::from_slice(&body).map_or(RawLine::Damaged(line), RawLine::Holder)
}

/// Returns a line without its checksum; `None` if the checksum is missing or wrong.
fn body_of(line: &[u8]) -> Option<Vec<u8>> {
    let line = str::from_utf8(line).ok()?;
    let (body, sum) = line.strip_suffix('}')?.rsplit_once(CHECKSUM_KEY)?;
    let body = [body.as_bytes(), b"}"].concat();
    (sum == checksum(&body).to_string()).then_some(body)
}

/// Returns the checksum of a line: 64-bit FNV-1a. Each step is a bijection, so that a change of a single byte is always
/// detected.
fn checksum(bytes: &[u8]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(BASIS, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(PRIME))
}

/// Writes a JSON object as a line with its checksum.
fn write_checked(text: &mut Vec<u8>, object: &impl Serialize) -> io::Result<()> {
    let start = text.len();
    serde_json::to_writer(&mut *text, object)?;
    let sum = checksum(&text[start..]);
    // Removes the closing brace of the object.
    text.pop();
    writeln!(text, "{CHECKSUM_KEY}{sum}}}")
}

/// Returns a line as `apply` writes it.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn sample_line() -> Vec<u8> {
    let mut line = Vec::new();
    let place = Place { cookie: u64::MAX, option: OptionKey { level: -1, name: -1 } };
    let written = write_line(&mut line, place, Some(&Value::int(1)), &Value::int(2));
    if written.is_ok() { line } else { Vec::new() }
}

fn write_line(text: &mut Vec<u8>, place: Place, before: Option<&Value>, after: &Value) -> io::Result<()> {
    let Place { cookie, option: OptionKey { level, name } } = place;
    let line = Line { cookie, level, name, before: before.map(Bytes::from), after: Bytes::from(after) };
    write_checked(text, &line)
}

/// Writes which process uses the file, for processes that find it locked.
fn write_holder(file: &mut fs::File) -> io::Result<()> {
    let mut text = Vec::new();
    if has_incomplete_line(file)? {
        text.push(b'\n');
    }
    write_checked(&mut text, &Holder { process: std::process::id() })?;
    append(file, &text)
}

/// Returns whether the last line is incomplete: its writer was killed or had no disk space.
fn has_incomplete_line(file: &mut fs::File) -> io::Result<bool> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        io::Read::read_exact(file, &mut last)?;
    }
    Ok(last != *b"\n")
}

/// Describes the process that has locked a file.
fn holder(file: fs::File) -> String {
    let mut last = None;
    let read = for_each_line(&mut BufReader::new(file), |line| {
        if let RawLine::Holder(found) = line {
            last = Some(found);
        }
        Ok(())
    });
    if let Err(error) = read {
        log::debug!("{error}");
    }
    // The holder may not have written its PID yet, so the last PID may be that of a process that has exited.
    match last.filter(|found| process::has_thread(found.process)) {
        Some(Holder { process }) => format!("another sockpolicy (process {process})"),
        None => "another sockpolicy".to_owned(),
    }
}

/// Combines lines into changes.
#[derive(Default)]
struct Fold(BTreeMap<Place, Change>);

impl Fold {
    fn add(&mut self, line: Line) {
        let Line { cookie, level, name, before, after } = line;
        let place = Place { cookie, option: OptionKey { level, name } };
        match (self.0.get_mut(&place), before) {
            // The earlier change had no effect.
            (Some(change), Some(before)) if change.before == change.after => {
                *change = Change { before: before.into(), after: after.into() };
            }
            (Some(change), _) => change.after = after.into(),
            (None, Some(before)) => drop(self.0.insert(place, Change { before: before.into(), after: after.into() })),
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    fn written(before: Option<u32>, after: u32) -> Line {
        let bytes = |number| Bytes::from(&Value::int(number));
        Line { cookie: 1, level: 6, name: 1, before: before.map(bytes), after: bytes(after) }
    }

    fn fold(lines: impl Iterator<Item = Line>) -> BTreeMap<Place, Change> {
        let mut fold = Fold::default();
        lines.for_each(|line| fold.add(line));
        fold.0
    }

    fn text_of(cookies: impl Iterator<Item = u64>) -> Vec<u8> {
        let mut text = Vec::new();
        write_checked(&mut text, &Holder { process: 1 }).unwrap();
        for cookie in cookies {
            let place = Place { cookie, option: OptionKey { level: 6, name: 4 } };
            write_line(&mut text, place, Some(&Value::int(500)), &Value::int(61)).unwrap();
        }
        text
    }

    fn cookies(contents: &Contents) -> Vec<u64> {
        contents.changes.keys().map(|place| place.cookie).collect()
    }

    #[test]
    fn flipped_bit_damages_only_its_own_line() {
        let whole = text_of(1..=3);
        let lines: Vec<usize> =
            whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut text = whole.clone();
                text[at] ^= 1 << bit;
                // Line 0 is that of the process.
                let line = lines.iter().filter(|end| **end < at).count() as u64;
                let Contents { changes, damaged } = parse(&mut &*text).unwrap();
                // If the end of a line is damaged, the next line is damaged too.
                let is_lost = |cookie: u64| cookie == line || (whole[at] == b'\n' && cookie == line + 1);
                let left: Vec<u64> = (1..=3).filter(|cookie| !is_lost(*cookie)).collect();
                let found: Vec<u64> = changes.keys().map(|place| place.cookie).collect();
                assert_eq!((found, damaged > 0), (left, true), "bit {bit} of byte {at}");
                assert!(changes.values().all(|change| change.before == Value::int(500)));
            }
        }
    }

    #[test]
    fn damaged_lines_do_not_affect_others() {
        let (one, other) = (text_of(iter::once(1)), text_of(iter::once(2)));
        let long = vec![b'x'; 10 * LINE_MAX];
        for (between, damaged) in [
            (&b""[..], 0),
            (b"\n\n\n", 0),
            (b"\0\0\0\n", 1),
            (b"\xff\xfe\n", 1),
            (b"{}\n[]\nnull\n", 3),
            (b"{\"cookie\":1,\"sum\":0}\n", 1),
            (b"{\"version\":9}\n", 1),
            (&[&long[..], b"\n"].concat(), 10),
            (&one, 0),
        ] {
            let contents = parse(&mut &*[&one, between, &other].concat()).unwrap();
            assert_eq!((cookies(&contents), contents.damaged), (vec![1, 2], damaged));
        }
    }

    #[test]
    fn incomplete_line_is_damaged() {
        let text = text_of(1..=2);
        let last = text[..text.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        // Without only its line feed, a line is complete.
        for end in last + 1..text.len() - 1 {
            let contents = parse(&mut &text[..end]).unwrap();
            assert_eq!((cookies(&contents), contents.damaged), (vec![1], 1), "{end}");
        }
        assert_eq!(parse(&mut &text[..last]).unwrap().damaged, 0);
    }

    #[test]
    fn first_value_before_and_last_value_after_count() {
        let lines = [written(Some(1), 2), written(None, 3), written(Some(3), 4), written(None, 5)];
        let change = *fold(lines.into_iter()).values().next().unwrap();
        assert_eq!(change, Change { before: Value::int(1), after: Value::int(5) });
    }

    #[test]
    fn refused_change_leaves_nothing_to_restore() {
        // The value was 1, and 2 was refused. Then something set 3, which was replaced by 2.
        let lines = [written(Some(1), 2), written(None, 1), written(Some(3), 2)];
        let change = *fold(lines.into_iter()).values().next().unwrap();
        assert_eq!(change, Change { before: Value::int(3), after: Value::int(2) });
    }

    #[test]
    fn interrupted_change_has_the_wanted_value() {
        let change = *fold([written(Some(1), 2)].into_iter()).values().next().unwrap();
        assert_eq!(change.after, Value::int(2));
        assert!(fold([written(None, 2)].into_iter()).is_empty());
    }
}
