//! Output whose writer never waits: a bounded queue, and a thread that writes the queue to a file descriptor.
//!
//! A reader can stop or end, and a disk can be full. The code that writes to the queue is not affected. Lines that could not be
//! written are counted by reason. The thread writes the count as soon as it can write again.
//!
//! Invariant: a line is written as a whole, or counted as lost. Where part of it was written already, a line end follows before
//! the next line.

use std::{
    fs::File,
    io, mem,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, sys::signal::SigSet};

use super::{
    descriptor::{Standard, write_some},
    output::Format,
};
use crate::report::{Loss, Lost, Unwritten};

/// The maximum size of the queue, in bytes.
const WAITING_MAX: usize = 1 << 20;
/// The size of one write, in bytes; more if a line is longer. A write to a pipe of at most PIPE_BUF bytes is atomic (pipe(7)).
const PIECE: usize = 4096;
/// The interval of attempts to write the count of lost lines while the queue is empty.
const RETRY: Duration = Duration::from_secs(1);
/// The time that [`Sink::settle`] waits for a reader.
const MOMENT: Duration = Duration::from_millis(200);
/// The time that [`Sink::finish`] waits for a reader that reads nothing.
const PATIENCE: Duration = Duration::from_secs(3);
/// The time that [`Sink::finish`] waits for a slow reader.
const PATIENCE_MAX: Duration = Duration::from_secs(10);

/// The destination of output.
#[derive(Debug)]
pub(super) enum Target {
    Standard(Standard),
    File(OwnedFd),
    /// A named pipe without a reader. The thread opens it, which waits for a reader (fifo(7)).
    Fifo {
        path: PathBuf,
        opened: OnceLock<OwnedFd>,
    },
}

impl Target {
    /// Opens a file, and truncates a regular one. Does not wait for the reader of a named pipe.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be opened for writing.
    pub(super) fn file(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        match options.clone().custom_flags(libc::O_NONBLOCK).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_fifo(path) => {
                Ok(Self::Fifo { path: path.to_owned(), opened: OnceLock::new() })
            }
            opened => Ok(Self::File(opened?.into())),
        }
    }

    fn write_some(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Standard(standard) => io::Write::write(&mut { *standard }, bytes),
            Self::File(file) => write_some(file.as_fd(), bytes),
            Self::Fifo { path, opened } => {
                let file = match opened.get() {
                    Some(file) => file,
                    None => {
                        let file = File::options().write(true).open(path)?;
                        opened.get_or_init(|| file.into())
                    }
                };
                write_some(file.as_fd(), bytes)
            }
        }
    }
}

fn is_fifo(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// A queue in front of a file descriptor. Clones share the queue.
#[derive(Clone, Debug)]
pub(super) struct Sink(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    target: Target,
    /// The format in which losses are written.
    format: Format,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    is_writing: bool,
    /// The number of writes so far.
    progress: u64,
    lost: Unwritten,
    /// The part of `lost` that has been written.
    reported: Unwritten,
    /// Whether the last write ended within a line.
    is_torn: bool,
    /// The error of the last write, if it failed.
    failure: Option<Errno>,
    /// Whether [`Sink::finish`] has waited in vain.
    is_given_up: bool,
}

/// The content of one write.
struct Batch {
    bytes: Vec<u8>,
    /// The start of the queued lines. A line end precedes them if the previous write ended within a line.
    head: usize,
    /// The end of the queued lines. The lines that report losses follow.
    lines: usize,
    /// The losses that these lines report.
    lost: Unwritten,
}

/// The reason why the end of the output is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// The reader reads nothing.
    Stuck,
    Failed(Errno),
}

impl Sink {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Fails if the thread cannot be started.
    pub(super) fn start(target: Target, format: Format) -> io::Result<Self> {
        let shared = Shared { target, format, state: Mutex::default(), changed: Condvar::new() };
        let sink = Self(Arc::new(shared));
        let shared = Arc::clone(&sink.0);
        // The signals of this process are for the thread that reads them from a descriptor.
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
        let started = thread::Builder::new().name("output".to_owned()).spawn(move || shared.work());
        before.thread_set_mask()?;
        started.map(|_| sink)
    }

    /// Queues whole lines, or counts them as lost if the queue is full.
    pub(super) fn put(&self, lines: &str) {
        let mut state = self.0.lock();
        if !state.waiting.is_empty() && state.waiting.len() + lines.len() > WAITING_MAX {
            state.lost.blocked += count_lines(lines.as_bytes());
            return;
        }
        self.push(&mut state, lines);
    }

    /// Queues whole lines even if the queue is full. For the last lines.
    pub(super) fn put_last(&self, lines: &str) {
        self.push(&mut self.0.lock(), lines);
    }

    fn push(&self, state: &mut State, lines: &str) {
        state.waiting.extend_from_slice(lines.as_bytes());
        if !state.is_writing {
            self.0.changed.notify_all();
        }
    }

    /// Returns the number of lines that could not be written, by reason.
    pub(super) fn lost(&self) -> Unwritten {
        self.0.lock().lost
    }

    /// Returns whether writes fail because the reader is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.0.lock().failure == Some(Errno::EPIPE)
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits up to [`MOMENT`] until everything is written, so that the writes of other processes to the same file come later.
    pub(super) fn settle(&self) {
        let begin = Instant::now();
        let mut state = self.0.lock();
        while (state.is_writing || !state.waiting.is_empty()) && begin.elapsed() < MOMENT {
            state = self.0.wait(state, MOMENT / 10);
        }
    }

    /// Waits until everything is written, for a bounded time.
    ///
    /// # Errors
    ///
    /// Fails if the last lines or the count of lost lines could not be written.
    pub(super) fn finish(&self) -> Result<(), Unfinished> {
        let begin = Instant::now();
        let mut state = self.0.lock();
        let (mut progress, mut since) = (state.progress, begin);
        while state.is_writing || !state.waiting.is_empty() || (state.failure.is_none() && state.lost != state.reported)
        {
            if state.is_given_up || since.elapsed() >= PATIENCE || begin.elapsed() >= PATIENCE_MAX {
                state.is_given_up = true;
                return Err(Unfinished::Stuck);
            }
            state = self.0.wait(state, PATIENCE / 10);
            if state.progress != progress {
                (progress, since) = (state.progress, Instant::now());
            }
        }
        match state.failure {
            Some(errno) => Err(Unfinished::Failed(errno)),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, timeout: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, timeout);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn work(&self) {
        loop {
            let Batch { bytes, head, lines, lost } = self.take();
            let (written, failure) = self.write(&bytes);
            let mut state = self.lock();
            state.is_writing = false;
            state.failure = failure;
            state.is_torn = bytes[..written].last().map_or(state.is_torn, |last| *last != b'\n');
            match failure {
                None => state.reported = lost,
                Some(errno) => state.lost.add(errno as i32, count_lines(&bytes[written.clamp(head, lines)..lines])),
            }
            self.changed.notify_all();
        }
    }

    /// Waits for something to write.
    fn take(&self) -> Batch {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.lost == state.reported {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if state.failure.is_some() {
                state = self.wait(state, RETRY);
                break;
            } else {
                break;
            }
        }
        let mut bytes = mem::take(&mut state.waiting);
        let head = usize::from(state.is_torn);
        bytes.splice(0..0, vec![b'\n'; head]);
        let lines = bytes.len();
        let before = Lost { unwritten: state.reported, ..Lost::default() };
        for loss in (Lost { unwritten: state.lost, ..Lost::default() }).since(&before) {
            bytes.extend_from_slice(loss_line(&loss, self.format).as_bytes());
        }
        state.is_writing = true;
        Batch { bytes, head, lines, lost: state.lost }
    }

    /// Returns how many bytes were written, and the error that ended the write early, if any.
    fn write(&self, bytes: &[u8]) -> (usize, Option<Errno>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.target.write_some(&bytes[written..written + piece(&bytes[written..])]) {
                Ok(more) => {
                    written += more;
                    self.lock().progress += 1;
                }
                Err(error) => return (written, Some(errno(&error))),
            }
        }
        (written, None)
    }
}

/// How many bytes to write at once: lines that a pipe takes as a whole, or one line that is longer.
fn piece(bytes: &[u8]) -> usize {
    let whole = bytes[..bytes.len().min(PIECE)].iter().rposition(|byte| *byte == b'\n');
    whole.or_else(|| bytes.iter().position(|byte| *byte == b'\n')).map_or(bytes.len(), |end| end + 1)
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn count_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// A loss as a line of the report.
pub(super) fn loss_line(loss: &Loss, format: Format) -> String {
    match format {
        Format::Text => format!("{loss}\n"),
        Format::Json => format!("{}\n", loss.to_json(jiff::Timestamp::now())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};

    use nix::unistd::pipe;

    use super::*;

    fn lines(reader: impl Read, count: usize) -> Vec<String> {
        BufReader::new(reader).lines().map(Result::unwrap).take(count).collect()
    }

    fn named_pipe(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("sockpolicy-sink-{name}-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    #[test]
    fn lines_arrive_in_order() {
        let (reader, writer) = pipe().unwrap();
        let sink = Sink::start(Target::File(writer), Format::Text).unwrap();
        (0..100).for_each(|number| sink.put(&format!("{number}\n")));
        assert_eq!(sink.finish(), Ok(()));
        let expected: Vec<String> = (0..100).map(|number| number.to_string()).collect();
        assert_eq!(lines(File::from(reader), 100), expected);
        assert_eq!(sink.lost(), Unwritten::default());
    }

    #[test]
    fn reader_that_stops_blocks_nobody_and_learns_how_much_was_lost() {
        let (reader, writer) = pipe().unwrap();
        let sink = Sink::start(Target::File(writer), Format::Text).unwrap();
        let line = format!("{}\n", "x".repeat(99));
        let count = 4 * WAITING_MAX / line.len();
        (0..count).for_each(|_| sink.put(&line));
        let lost = sink.lost().blocked;
        assert!(lost > 0);
        assert_eq!(sink.finish(), Err(Unfinished::Stuck));
        let (mut whole, mut told) = (0, 0);
        for read in BufReader::new(File::from(reader)).lines().map(Result::unwrap) {
            match read.strip_prefix("lost      ") {
                Some(loss) => told += loss.split(' ').next().unwrap().parse::<u64>().unwrap(),
                None => whole += usize::from(read == line.trim_end()),
            }
            if whole + told as usize == count {
                break;
            }
        }
        assert_eq!((told, whole), (lost, count - lost as usize));
    }

    #[test]
    fn full_disk_is_counted() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let sink = Sink::start(Target::File(full.into()), Format::Text).unwrap();
        sink.put("a\nb\n");
        assert_eq!(sink.finish(), Err(Unfinished::Failed(Errno::ENOSPC)));
        assert_eq!(sink.lost(), Unwritten { no_space: 2, ..Unwritten::default() });
    }

    #[test]
    fn reader_that_is_gone_is_counted() {
        let (_, writer) = pipe().unwrap();
        let sink = Sink::start(Target::File(writer), Format::Text).unwrap();
        sink.put("a\n");
        assert_eq!(sink.finish(), Err(Unfinished::Failed(Errno::EPIPE)));
        assert!(sink.is_closed());
        assert_eq!(sink.lost(), Unwritten { closed: 1, ..Unwritten::default() });
    }

    #[test]
    fn named_pipe_waits_for_its_reader_in_the_thread() {
        let path = named_pipe("read");
        let sink = Sink::start(Target::file(&path).unwrap(), Format::Text).unwrap();
        sink.put("a\n");
        sink.settle();
        sink.put("b\n");
        let reader = File::open(&path).unwrap();
        assert_eq!(sink.finish(), Ok(()));
        assert_eq!(lines(reader, 2), ["a", "b"]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn named_pipe_without_a_reader_keeps_nobody() {
        let path = named_pipe("unread");
        let sink = Sink::start(Target::file(&path).unwrap(), Format::Text).unwrap();
        sink.put("a\n");
        assert_eq!(sink.finish(), Err(Unfinished::Stuck));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn piece_is_whole_lines_where_it_can_be() {
        assert_eq!(piece(b"a\nbc\nd"), 5);
        assert_eq!(piece(b"abc"), 3);
        let long = [vec![b'x'; 2 * PIECE], b"\nb\n".to_vec()].concat();
        assert_eq!(piece(&long), 2 * PIECE + 1);
    }
}
