//! Messages for people, on standard error: errors, warnings and diagnostics of files.
//!
//! Writing a message does not panic and returns no error. In commands that keep running, a message waits in a queue
//! ([`start`]), and of messages from the same place in the code only the first ones and then one per second are written: what
//! causes a message can be under the control of a tenant. The number of messages that were left out is written.

use std::{
    collections::HashMap,
    error::Error,
    io::{self, Write},
    panic::Location,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use super::{
    descriptor::Standard,
    help,
    output::Format,
    sink::{Sink, Target},
};
use crate::{
    escape::{Escape, visible},
    policy::diagnostic::{Diagnostic, Style},
    report::Unwritten,
};

/// The number of messages from one place that are written without a limit.
const BURST: u32 = 20;
/// The interval of messages from one place after these.
const INTERVAL: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Sink> = OnceLock::new();
static LIMITS: OnceLock<Mutex<Limits>> = OnceLock::new();

/// By place in the code: file and line.
type Limits = HashMap<(String, u32), Throttle>;

/// Puts messages into a queue from now on, and limits their rate. `format` is that of the report, which is used if standard error
/// and standard output are one file.
pub(super) fn start(format: Format) {
    let target = Target::Standard(Standard::Error);
    let format = if Standard::are_one() { format } else { Format::Text };
    // Without a thread, messages are written at once.
    if let Ok(sink) = Sink::start(target, format) {
        let _ = QUEUE.set(sink);
        let _ = LIMITS.set(Mutex::default());
    }
}

/// Returns the queue of standard error, if there is one.
pub(super) fn queue() -> Option<Sink> {
    QUEUE.get().cloned()
}

/// Returns the number of messages that could not be written, by reason.
pub(super) fn lost() -> Unwritten {
    QUEUE.get().map_or_else(Unwritten::default, Sink::lost)
}

/// Writes the queued messages, and the number of messages that were left out.
pub(super) fn finish() {
    let left_out: u64 = limits().map_or(0, |limits| limits.values().map(|throttle| throttle.left_out).sum());
    if left_out > 0 {
        write(&format!("warning: left out: {left_out} messages like earlier ones\n"));
    }
    if let Some(queue) = QUEUE.get() {
        // A failure cannot be reported anywhere.
        let _ = queue.finish();
    }
}

/// Writes whole lines, without control characters.
pub(super) fn write(lines: &str) {
    write_styled(&visible(lines, true));
}

/// Writes whole lines with their escape sequences, wrapped.
pub(super) fn write_styled(lines: &str) {
    let lines = &Standard::Error.wrapped(lines);
    match QUEUE.get() {
        Some(queue) => queue.put(lines),
        None => {
            // A failure cannot be reported anywhere.
            let _ = Standard::Error.write_all(lines.as_bytes());
        }
    }
}

/// Writes an error with its causes.
#[track_caller]
pub(super) fn print_error(error: &(dyn Error + 'static)) {
    let place = Location::caller();
    if let Some(left_out) = admit(place.file(), place.line()) {
        write(&format!("error: {}{}{}\n", with_causes(error), left_out_text(left_out), help::line(error)));
    }
}

/// Returns the text of an error, and of those causes that it does not contain.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) && !text.contains(&part.escaped().to_string()) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}

/// Shows diagnostics.
pub(super) fn show(found: &[Diagnostic]) {
    if found.is_empty() {
        return;
    }
    if Standard::Error.takes_colours() {
        write_styled(&format!("{}\n", crate::policy::render(found, Style::Coloured)));
    } else {
        write(&format!("{}\n", crate::policy::render(found, Style::Plain)));
    }
}

/// Writes the log of the program as messages.
pub(super) fn init_log() {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("SOCKPOLICY_LOG", "warn"))
        .target(env_logger::Target::Pipe(Box::new(Log)))
        .write_style(env_logger::WriteStyle::Never)
        .format(|out, record| {
            let (file, line) = (record.file().unwrap_or_default(), record.line().unwrap_or_default());
            let Some(left_out) = admit(file, line) else { return Ok(()) };
            let level = match record.level() {
                log::Level::Warn => "warning".to_owned(),
                level => level.as_str().to_lowercase(),
            };
            writeln!(out, "{level}: {}{}", record.args(), left_out_text(left_out))
        })
        .init();
}

struct Log;

impl Write for Log {
    /// Takes whole records.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            write(&String::from_utf8_lossy(bytes));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn limits() -> Option<MutexGuard<'static, Limits>> {
    // Each change of a limit is whole.
    LIMITS.get().map(|limits| limits.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Returns the number of messages that were left out before this one, or `None` to leave this one out too.
fn admit(file: &str, line: u32) -> Option<u64> {
    let Some(mut limits) = limits() else { return Some(0) };
    limits.entry((file.to_owned(), line)).or_default().admit(Instant::now())
}

fn left_out_text(left_out: u64) -> String {
    if left_out == 0 { String::new() } else { format!(" (left out: {left_out} like this one)") }
}

/// Passes a burst, and then one message per interval.
#[derive(Clone, Copy, Debug, Default)]
struct Throttle {
    passed: u32,
    /// The time of the last message that passed.
    last: Option<Instant>,
    left_out: u64,
}

impl Throttle {
    /// Returns the number of messages that were left out before this one, or `None` to leave this one out too.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = self.last.map_or(Duration::MAX, |last| now.saturating_duration_since(last));
        if since >= INTERVAL * BURST {
            self.passed = 0;
        }
        if self.passed >= BURST && since < INTERVAL {
            self.left_out += 1;
            return None;
        }
        self.passed = self.passed.saturating_add(1);
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_then_one_in_each_interval_with_the_number_left_out() {
        let mut throttle = Throttle::default();
        let begin = Instant::now();
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        assert!((0..BURST).all(|number| throttle.admit(at(number.into())) == Some(0)));
        assert_eq!((100..1000).filter_map(|number| throttle.admit(at(number))).count(), 0);
        assert_eq!(throttle.admit(at(1100)), Some(900));
        assert_eq!(throttle.admit(at(1200)), None);
        // After a quiet time there is a burst again.
        let later = begin + INTERVAL * (2 * BURST);
        assert_eq!((0..BURST).map(|_| throttle.admit(later)).collect::<Vec<_>>()[..2], [Some(1), Some(0)]);
    }
}
