//! Values for existing sockets: the agent decides, and a program sets them that the kernel runs for each TCP socket of a
//! network namespace.
//!
//! There are two steps, because the old values must be written to the journal before the new ones are set.

use crate::{
    SETTABLE_MAX,
    setting::{OptionKey, OptionRow, Setting, Value, Words, read_back, words_of},
    shared,
};

/// Values of [`IterControl::step`]: what the program does with sockets that have a [`SocketJob`].
pub mod step {
    /// A zeroed map: the program does nothing.
    pub const NONE: u32 = 0;
    /// Reads the current values.
    pub const READ: u32 = 1;
    /// Sets the new values.
    pub const SET: u32 = 2;
}

/// What the program does in one iteration. Map `ITER_CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IterControl {
    /// See [`step`].
    pub step: u32,
    /// See [`places`].
    pub shift: u32,
}
shared!(IterControl, size 4 + 4);

/// The number of places of a job. With four places for each job in the table, one of these is free in practice.
pub const REACH: u32 = 16;

/// Returns the indices into map `JOBS` at which the job of a socket can be. The table has `1 << (64 - shift)` entries, and
/// one less than [`REACH`] more for the places of the last entries.
#[inline(always)]
pub fn places(cookie: u64, shift: u32) -> impl Iterator<Item = u32> {
    // Cookies are consecutive numbers: multiplication by the golden ratio spreads them.
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let first = cookie.wrapping_mul(GOLDEN).wrapping_shr(shift) as u32;
    (0..REACH).map(move |step| first.wrapping_add(step))
}

/// The job of one socket. Map `JOBS`, at the first of its [`places`] that was free. The agent writes the array through mmap,
/// at almost no cost; a hash map would take two system calls for each job.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketJob {
    /// The socket's cookie; 0 if there is no job.
    pub cookie: u64,
    /// Index into map `ASSIGNMENT_LISTS`.
    pub list: u32,
    /// Index into map `OUTCOMES` of the outcome of the first assignment; the others follow.
    pub first: u32,
}
shared!(SocketJob, size 8 + 4 + 4);

/// The values for one or more sockets. Map `ASSIGNMENT_LISTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AssignmentList {
    pub len: u32,
    /// Indices into map `ASSIGNMENTS`, in the order in which to set them.
    pub assignments: [u32; SETTABLE_MAX],
}
shared!(AssignmentList, size 4 + 4 * SETTABLE_MAX);

impl Default for AssignmentList {
    fn default() -> Self {
        Self { len: 0, assignments: [0; SETTABLE_MAX] }
    }
}

/// A value to set on an option. Map `ASSIGNMENTS`.
///
/// The value is bytes as in memory, so that the program treats numbers and texts alike: the verifier follows each branch for
/// each possible assignment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Assignment {
    pub key: OptionKey,
    /// What to set; bits outside `mask` are 0.
    pub value: Words,
    /// The bits to set; the others stay unchanged.
    pub mask: Words,
    /// Whether the value is a text of [`TEXT_LEN`](crate::setting::TEXT_LEN) bytes, and not an `int` (0 or 1).
    pub is_text: u32,
    /// Whether the kernel shows twice the number that was set (0 or 1).
    pub is_doubled: u32,
}
shared!(Assignment, size 8 + 16 + 16 + 4 + 4);

impl Assignment {
    /// Makes the assignment of a setting to an option.
    #[must_use]
    pub fn new(option: &OptionRow, setting: &Setting) -> Self {
        let is_text = setting.is_text();
        let (value, mask) = match is_text {
            true => (setting.text, [u64::MAX; 2]),
            false => (words_of(setting.value), words_of(setting.mask)),
        };
        let is_doubled = option.read_back == read_back::DOUBLED;
        Self { key: option.helper_key(setting), value, mask, is_text: is_text.into(), is_doubled: is_doubled.into() }
    }

    /// Returns the length of the value in bytes.
    #[inline(always)]
    #[must_use]
    pub fn bytes(&self) -> i32 {
        4 + (self.is_text & 1) as i32 * 12
    }

    /// Returns the value to set on a socket that shows `now`.
    #[inline(always)]
    #[must_use]
    pub fn given(&self, now: &Words) -> Words {
        [(now[0] & !self.mask[0]) | self.value[0], (now[1] & !self.mask[1]) | self.value[1]]
    }

    /// Returns what the socket shows after `given` was set. Doubling beyond an `int` is ignored: no buffer is as large.
    #[inline(always)]
    #[must_use]
    pub fn shown(&self, given: &Words) -> Words {
        [given[0] << (self.is_doubled & 1), given[1]]
    }

    /// Returns words as a value that the option shows.
    #[must_use]
    pub fn shows(&self, words: Words) -> Value {
        Value::new(words, self.bytes() as u32)
    }
}

/// Values of [`Outcome::state`].
pub mod state {
    /// The program has not seen the socket.
    pub const NONE: u32 = 0;
    /// The option was read, or could not be read.
    pub const READ: u32 = 1;
    /// The socket already had the value that was to be set.
    pub const UNCHANGED: u32 = 2;
    /// The option was set, or could not be set.
    pub const SET: u32 = 3;
}

/// The result of one assignment on one socket. Map `OUTCOMES`: written by the program, read and zeroed by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The value in the step [`step::READ`].
    pub before: Words,
    /// The value after it was set.
    pub after: Words,
    /// See [`state`].
    pub state: u32,
    /// The errno of the failed read or write; positive, 0 if it succeeded.
    pub errno: u32,
}
shared!(Outcome, size 16 + 16 + 4 + 4);

impl Outcome {
    /// Returns whether `before` was read.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.state == state::READ && self.errno == 0
    }
}

/// A descriptor of a socket: the program writes one record for each such file of each process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FdEntry {
    /// The inode number of the socket in `/proc/PID/fd`.
    pub inode: u64,
    pub process: u32,
    pub descriptor: u32,
}
shared!(FdEntry, size 8 + 4 + 4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setting::{kind, words_of_text};

    #[test]
    fn places_are_within_the_table_and_its_extension() {
        for bits in [1, 6, 18] {
            let mut all = (1..10_000).flat_map(|cookie| places(cookie, 64 - bits));
            assert!(all.all(|place| place < (1 << bits) + REACH - 1));
        }
    }

    const KEY: OptionKey = OptionKey { level: 1, name: 7 };

    fn option() -> OptionRow {
        OptionRow {
            names: 1,
            sets: 1,
            key: KEY,
            set_as: KEY,
            kind: kind::INT,
            read_back: read_back::SAME,
            ..OptionRow::default()
        }
    }

    #[test]
    fn bits_outside_the_mask_stay() {
        let setting = Setting { value: 0x20, mask: 0xff, ..Setting::default() };
        let mark = Assignment::new(&option(), &setting);
        assert_eq!(mark.given(&words_of(0x1234)), words_of(0x1220));
    }

    #[test]
    fn doubled_value_shows_twice_the_number() {
        let setting = Setting { value: 4096, mask: u32::MAX, ..Setting::default() };
        let buffer = Assignment::new(&OptionRow { read_back: read_back::DOUBLED, ..option() }, &setting);
        let given = buffer.given(&words_of(87380));
        assert_eq!((given, buffer.shown(&given)), (words_of(4096), words_of(8192)));
    }

    #[test]
    fn text_replaces_the_whole_value() {
        let setting = Setting { text: words_of_text(b"bbr"), is_text: 1, ..Setting::default() };
        let text = Assignment::new(&OptionRow { kind: kind::TEXT, ..option() }, &setting);
        let given = text.given(&words_of_text(b"cubic-and-more"));
        assert_eq!(text.shows(text.shown(&given)), Value::text(words_of_text(b"bbr")));
        let number = Assignment::new(&option(), &Setting::default());
        assert_eq!(number.shows(words_of(7)), Value::int(7));
    }
}
