//! What sockets that are there are to be given: decided by the agent, done by a program that the kernel runs for each TCP
//! socket of a network namespace.
//!
//! In two steps, for what a socket has is to be written down before it is changed.

use crate::{
    SETTABLE_MAX,
    setting::{OptionKey, OptionRow, Setting, Value, Words, read_back, words_of},
    shared,
};

/// Values of [`IterControl::step`]: what the program does with sockets that have a [`SocketJob`].
pub mod step {
    /// A zeroed map: nothing.
    pub const NONE: u32 = 0;
    /// Reads what they have.
    pub const READ: u32 = 1;
    /// Gives them what they are to have.
    pub const SET: u32 = 2;
}

/// What a walk is for. Map `ITER_CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IterControl {
    /// See [`step`].
    pub step: u32,
    /// See [`places`].
    pub shift: u32,
}
shared!(IterControl, size 4 + 4);

/// How many places a job can stand at. With four for each job there is a free one, as good as always.
pub const REACH: u32 = 16;

/// The indices of map `JOBS` at which the job of a socket can stand: in a table of `1 << (64 - shift)`, and as many more as the
/// last of them reaches beyond.
#[inline(always)]
pub fn places(cookie: u64, shift: u32) -> impl Iterator<Item = u32> {
    // Cookies come in long rows: multiplied by the golden ratio they lie far from each other.
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let first = cookie.wrapping_mul(GOLDEN).wrapping_shr(shift) as u32;
    (0..REACH).map(move |step| first.wrapping_add(step))
}

/// What is to be done with one socket. Map `JOBS`, at the first of its [`places`] that was free: what an array in the agent's own
/// memory takes no time to write, a hash map takes two calls for each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketJob {
    /// The socket's; 0 where there is no job.
    pub cookie: u64,
    /// Index of map `ASSIGNMENT_LISTS`: what it is to be given.
    pub list: u32,
    /// Index of map `OUTCOMES` of what comes of the first of these; those of the others follow.
    pub first: u32,
}
shared!(SocketJob, size 8 + 4 + 4);

/// What one or more sockets are to be given. Map `ASSIGNMENT_LISTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AssignmentList {
    pub len: u32,
    /// Indices of map `ASSIGNMENTS`, in the order in which to set them.
    pub assignments: [u32; SETTABLE_MAX],
}
shared!(AssignmentList, size 4 + 4 * SETTABLE_MAX);

impl Default for AssignmentList {
    fn default() -> Self {
        Self { len: 0, assignments: [0; SETTABLE_MAX] }
    }
}

/// A value that an option is to have. Map `ASSIGNMENTS`.
///
/// As the bytes lie in memory, so that a number and a text are one to the program: each branch in it counts as often as
/// there can be assignments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Assignment {
    pub key: OptionKey,
    /// What to set; bits outside `mask` are 0.
    pub value: Words,
    /// The bits that are to be set; the others stay as they are.
    pub mask: Words,
    /// Whether it is a text, of [`TEXT_LEN`](crate::setting::TEXT_LEN) bytes, and not an `int` (0 or 1).
    pub is_text: u32,
    /// Whether the kernel shows twice the number that it was given (0 or 1).
    pub is_doubled: u32,
}
shared!(Assignment, size 8 + 16 + 16 + 4 + 4);

impl Assignment {
    /// What a setting says of an option.
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

    /// How many bytes the value has.
    #[inline(always)]
    #[must_use]
    pub fn bytes(&self) -> i32 {
        4 + (self.is_text & 1) as i32 * 12
    }

    /// What to set on a socket that shows `now`.
    #[inline(always)]
    #[must_use]
    pub fn given(&self, now: &Words) -> Words {
        [(now[0] & !self.mask[0]) | self.value[0], (now[1] & !self.mask[1]) | self.value[1]]
    }

    /// What the socket shows when it has that. Not doubled beyond an `int`: no buffer is as large.
    #[inline(always)]
    #[must_use]
    pub fn shown(&self, given: &Words) -> Words {
        [given[0] << (self.is_doubled & 1), given[1]]
    }

    /// Words as what the option shows.
    #[must_use]
    pub fn shows(&self, words: Words) -> Value {
        Value::new(words, self.bytes() as u32)
    }
}

/// Values of [`Outcome::state`].
pub mod state {
    /// No such socket has come by.
    pub const NONE: u32 = 0;
    /// The option was read, or could not be.
    pub const LOOKED_AT: u32 = 1;
    /// The socket had the value when it was to be set.
    pub const UNCHANGED: u32 = 2;
    /// It was set, or could not be.
    pub const SET: u32 = 3;
}

/// What came of one assignment on one socket. Map `OUTCOMES`: written by the program, read and zeroed by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What getsockopt showed when it was looked at.
    pub before: Words,
    /// What it shows since it was set.
    pub after: Words,
    /// See [`state`].
    pub state: u32,
    /// Why it could not be read or set; positive, 0 if it could.
    pub errno: u32,
}
shared!(Outcome, size 16 + 16 + 4 + 4);

impl Outcome {
    /// Whether `before` has been read.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.state == state::LOOKED_AT && self.errno == 0
    }
}

/// A descriptor of a process that is a socket: what the program tells that is run for each file of each process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FdEntry {
    /// What `/proc/PID/fd` calls the socket.
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
    fn places_are_within_the_table_and_what_it_has_beyond() {
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
    fn doubled_value_shows_twice_what_was_given() {
        let setting = Setting { value: 4096, mask: u32::MAX, ..Setting::default() };
        let buffer = Assignment::new(&OptionRow { read_back: read_back::DOUBLED, ..option() }, &setting);
        let given = buffer.given(&words_of(87380));
        assert_eq!((given, buffer.shown(&given)), (words_of(4096), words_of(8192)));
    }

    #[test]
    fn text_takes_the_place_of_what_was_there() {
        let setting = Setting { text: words_of_text(b"bbr"), is_text: 1, ..Setting::default() };
        let text = Assignment::new(&OptionRow { kind: kind::TEXT, ..option() }, &setting);
        let given = text.given(&words_of_text(b"cubic-and-more"));
        assert_eq!(text.shows(text.shown(&given)), Value::text(words_of_text(b"bbr")));
        let number = Assignment::new(&option(), &Setting::default());
        assert_eq!(number.shows(words_of(7)), Value::int(7));
    }
}
