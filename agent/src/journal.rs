//! What sockets had before policies changed them while they were there, kept so that it can be put back.
//!
//! A file of JSON lines below `/run/sockpolicy`, which is gone when the sockets are: with the next boot. A change is written
//! before it is made, and what came of it after, so that nothing is lost whenever this process ends.
//!
//! Each line ends with a sum of its bytes. A line that does not agree with its sum is damaged: no value of it is used, every
//! other line counts, and the damaged line stays in the file.
//!
//! Invariant: one process at a time works on it, from its first line or look on to its end. Another one is refused: what it would
//! find is about to change.
//!
//! What has become of sockets is not told. A file that has grown long is written anew without those that are gone.

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

/// A file of so many bytes may be about many sockets that are gone: it has some 200 for each change.
const LONG: u64 = 64 * 1024;

/// Of files among those of an instance.
const KIND: &str = "before";

/// Bytes that are written at a time, and kept until then.
const AT_A_TIME: usize = 256 * 1024;

/// No line is longer, in bytes: one that is was not written so.
const LINE_MAX: usize = 1024;

/// What stands before the sum at the end of a line.
const SUM: &str = ",\"sum\":";

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
    #[error(transparent)]
    Private(#[from] PrivateError),
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

#[derive(Clone, Copy, Serialize, Deserialize)]
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
    let mut names = instance::with_files(&[KIND]);
    names.sort();
    names
}

/// Returns where the journal of an instance is, for messages.
#[must_use]
pub fn path_of(instance: &str) -> PathBuf {
    instance::path_of(instance, KIND)
}

/// What a journal says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// All that there is to put back.
    pub changes: BTreeMap<Place, Change>,
    /// How many lines are damaged.
    pub damaged: usize,
}

/// The journal of an instance, which is nobody else's as long as this is there and has been used.
#[derive(Debug)]
pub struct Journal {
    /// The name of the file in the directory of all instances.
    name: String,
    /// Where that is, for messages.
    path: PathBuf,
    file: Option<(PrivateDir, Flock<fs::File>)>,
}

impl Journal {
    #[must_use]
    pub fn of(instance: &str) -> Self {
        let name = instance::file_name(instance, KIND);
        Self { name, path: path_of(instance), file: None }
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
        let Some((_, file)) = &mut self.file else { return Ok(()) };
        append(file, text).map_err(failed(&self.path))
    }

    /// Has the file, if there is one or it is to be made, for this process alone.
    fn open(&mut self, is_to_be_made: bool) -> Result<(), JournalError> {
        while self.file.is_none() {
            let folder = if is_to_be_made { Some(instance::make_folder()?) } else { instance::folder()? };
            let made = if is_to_be_made { OFlag::O_CREAT } else { OFlag::empty() };
            let Some(folder) = folder else { return Ok(()) };
            let Some(file) = folder.open_file(&self.name, OFlag::O_RDWR | OFlag::O_APPEND | made)? else {
                return Ok(());
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Who had it may have written it anew, or removed it.
                Ok(lock) if folder.is_entry(&lock, &self.name) => self.file = Some((folder, lock)),
                Ok(_) => {}
                Err((file, Errno::EAGAIN)) => {
                    return Err(JournalError::Busy { path: self.path.clone(), holder: holder(file) });
                }
                Err((_, errno)) => return Err(failed(&self.path)(errno.into())),
            }
        }
        let Some((_, file)) = &mut self.file else { return Ok(()) };
        say_whose(file).map_err(failed(&self.path))?;
        fault::point("journal-opened");
        Ok(())
    }

    /// Forgets sockets that are gone, where there may be many.
    fn shorten(&mut self) -> Result<(), JournalError> {
        let Some((_, file)) = &self.file else { return Ok(()) };
        if file.metadata().map_err(failed(&self.path))?.len() < LONG {
            return Ok(());
        }
        let mut inspector = Inspector::default();
        let survey = SocketTable::read(|_| true, || None, &mut inspector);
        let Ok(survey) = survey.inspect_err(|error| log::debug!("{error}")) else {
            return Ok(());
        };
        // What does not answer may be any of them.
        if survey.has_unlisted || !inspector.skipped().is_empty() {
            return Ok(());
        }
        let there: HashSet<u64> = survey.sockets.iter().map(|found| found.entry.cookie).collect();
        let Contents { mut changes, .. } = self.read()?;
        changes.retain(|place, _| there.contains(&place.cookie));
        self.replace(&changes)
    }

    /// Reads all that there is.
    ///
    /// # Errors
    ///
    /// Fails where the file cannot be read, or another process works on it.
    pub fn contents(&mut self) -> Result<Contents, JournalError> {
        self.open(false)?;
        self.read()
    }

    fn read(&mut self) -> Result<Contents, JournalError> {
        let Some((_, file)) = &mut self.file else { return Ok(Contents::default()) };
        file.rewind().map_err(failed(&self.path))?;
        parse(&mut BufReader::new(&mut **file)).map_err(failed(&self.path))
    }

    /// Keeps only these to be put back, and the lines that are damaged.
    ///
    /// # Errors
    ///
    /// Fails where that cannot be written. All that was there is then kept.
    pub fn keep(mut self, contents: &Contents) -> Result<(), JournalError> {
        match &self.file {
            // There was none.
            None => Ok(()),
            Some(_) if contents.changes.is_empty() && contents.damaged == 0 => self.remove(),
            Some(_) => self.replace(&contents.changes),
        }
    }

    /// Puts a file that says only this in the place of the one that is there, which is ours. Lines that are damaged are copied.
    fn replace(&mut self, changes: &BTreeMap<Place, Change>) -> Result<(), JournalError> {
        let Some((folder, file)) = &mut self.file else { return Ok(()) };
        let new = format!("{}.new", self.name);
        // Nobody else's, as long as the other one is ours.
        folder.remove_file(&new)?;
        let Some(made) = folder.open_file(&new, OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_EXCL)?
        else {
            return Ok(());
        };
        let path = folder.path().join(&new);
        let mut made =
            Flock::lock(made, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| failed(&path)(errno.into()))?;
        if let Err(error) = copy(file, changes, &mut made) {
            let _ = folder.remove_file(&new);
            return Err(failed(&path)(error));
        }
        folder.rename(&new, &self.name)?;
        *file = made;
        Ok(())
    }

    /// There is nothing to put back any more.
    ///
    /// # Errors
    ///
    /// Fails where the file cannot be removed, or another process works on it.
    pub fn remove(mut self) -> Result<(), JournalError> {
        self.open(false)?;
        match &self.file {
            None => Ok(()),
            Some((folder, _)) => Ok(folder.remove_file(&self.name)?),
        }
    }
}

/// Appends whole lines, or nothing: where there is no room for all of it, the file ends as before.
fn append(file: &mut fs::File, text: &[u8]) -> io::Result<()> {
    let end = file.metadata()?.len();
    file.write_all(text).inspect_err(|_| {
        // A line that is cut off would be damaged, and so would the one after it.
        if let Err(error) = file.set_len(end) {
            log::debug!("the last line of the journal is cut off: {error}");
        }
    })
}

/// Writes these changes, and what is damaged in `old`.
fn copy(old: &mut fs::File, changes: &BTreeMap<Place, Change>, new: &mut fs::File) -> io::Result<()> {
    say_whose(new)?;
    let mut out = BufWriter::new(new);
    let mut line = Vec::new();
    for (place, Change { before, after }) in changes {
        line.clear();
        write_line(&mut line, *place, Some(before), after)?;
        out.write_all(&line)?;
    }
    old.rewind()?;
    each_line(&mut BufReader::new(old), |line| match line {
        Raw::Damaged(bytes) => out.write_all(bytes).and_then(|()| out.write_all(b"\n")),
        Raw::Line(_) | Raw::Worker(_) => Ok(()),
    })?;
    out.flush()
}

/// Reads the text of a journal. It is read once, and no more of it is kept than there are changes.
///
/// # Errors
///
/// Fails where `text` does.
pub fn parse(text: &mut impl BufRead) -> io::Result<Contents> {
    let (mut lines, mut damaged) = (Fold::default(), 0);
    each_line(text, |line| {
        match line {
            Raw::Line(line) => lines.add(line),
            Raw::Damaged(_) => damaged += 1,
            Raw::Worker(_) => {}
        }
        Ok(())
    })?;
    Ok(Contents { changes: lines.0, damaged })
}

/// A line as it stands in a journal.
enum Raw<'a> {
    Line(Line),
    Worker(Worker),
    /// The bytes of one that says nothing, at most [`LINE_MAX`] of them. The rest follows as another line.
    Damaged(&'a [u8]),
}

fn each_line(text: &mut impl BufRead, mut each: impl FnMut(Raw<'_>) -> io::Result<()>) -> io::Result<()> {
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

fn read_line(line: &[u8]) -> Raw<'_> {
    let Some(body) = body_of(line) else { return Raw::Damaged(line) };
    if let Ok(line) = serde_json::from_slice(&body) {
        return Raw::Line(line);
    }
    serde_json::from_slice(&body).map_or(Raw::Damaged(line), Raw::Worker)
}

/// Returns a line without its sum; `None` where the line has none, or another one.
fn body_of(line: &[u8]) -> Option<Vec<u8>> {
    let line = str::from_utf8(line).ok()?;
    let (body, sum) = line.strip_suffix('}')?.rsplit_once(SUM)?;
    let body = [body.as_bytes(), b"}"].concat();
    (sum == sum_of(&body).to_string()).then_some(body)
}

/// Returns the sum of a line: FNV-1a with 64 bits. Each byte changes it one-to-one, so that no single byte can change unseen.
fn sum_of(bytes: &[u8]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(BASIS, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(PRIME))
}

/// Writes an object of JSON as a line with its sum.
fn write_summed(text: &mut Vec<u8>, object: &impl Serialize) -> io::Result<()> {
    let start = text.len();
    serde_json::to_writer(&mut *text, object)?;
    let sum = sum_of(&text[start..]);
    // The object's last brace.
    text.pop();
    writeln!(text, "{SUM}{sum}}}")
}

/// A line as `apply` writes one.
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
    write_summed(text, &line)
}

/// Writes which process works on the file, for others that find it locked.
fn say_whose(file: &mut fs::File) -> io::Result<()> {
    let mut text = Vec::new();
    if is_cut_off(file)? {
        text.push(b'\n');
    }
    write_summed(&mut text, &Worker { process: std::process::id() })?;
    append(file, &text)
}

/// Whether the last line has no end: who wrote it was killed, or had no room.
fn is_cut_off(file: &mut fs::File) -> io::Result<bool> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        io::Read::read_exact(file, &mut last)?;
    }
    Ok(last != *b"\n")
}

/// Who has locked a file, in words.
fn holder(file: fs::File) -> String {
    let mut last = None;
    let read = each_line(&mut BufReader::new(file), |line| {
        if let Raw::Worker(worker) = line {
            last = Some(worker);
        }
        Ok(())
    });
    if let Err(error) = read {
        log::debug!("{error}");
    }
    // It may just be about to say so, and the last one who did be gone.
    match last.filter(|worker| process::has_thread(worker.process)) {
        Some(Worker { process }) => format!("another sockpolicy, process {process},"),
        None => "another sockpolicy".to_owned(),
    }
}

/// What lines say together.
#[derive(Default)]
struct Fold(BTreeMap<Place, Change>);

impl Fold {
    fn add(&mut self, line: Line) {
        let Line { cookie, level, name, before, after } = line;
        let place = Place { cookie, option: OptionKey { level, name } };
        match (self.0.get_mut(&place), before) {
            // Nothing came of what was noted before.
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
        write_summed(&mut text, &Worker { process: 1 }).unwrap();
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
    fn flipped_bit_loses_the_line_that_it_is_in_and_no_other() {
        let whole = text_of(1..=3);
        let lines: Vec<usize> =
            whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut text = whole.clone();
                text[at] ^= 1 << bit;
                // The line of the process counts as the first.
                let line = lines.iter().filter(|end| **end < at).count() as u64;
                let Contents { changes, damaged } = parse(&mut &*text).unwrap();
                // Where the end of a line is damaged, so is the next line.
                let is_lost = |cookie: u64| cookie == line || (whole[at] == b'\n' && cookie == line + 1);
                let left: Vec<u64> = (1..=3).filter(|cookie| !is_lost(*cookie)).collect();
                let found: Vec<u64> = changes.keys().map(|place| place.cookie).collect();
                assert_eq!((found, damaged > 0), (left, true), "bit {bit} of byte {at}");
                assert!(changes.values().all(|change| change.before == Value::int(500)));
            }
        }
    }

    #[test]
    fn whatever_stands_between_lines_loses_none_of_them() {
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
    fn line_that_is_cut_off_is_damaged() {
        let text = text_of(1..=2);
        let last = text[..text.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        // Without its end it is whole still.
        for end in last + 1..text.len() - 1 {
            let contents = parse(&mut &text[..end]).unwrap();
            assert_eq!((cookies(&contents), contents.damaged), (vec![1], 1), "{end}");
        }
        assert_eq!(parse(&mut &text[..last]).unwrap().damaged, 0);
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
