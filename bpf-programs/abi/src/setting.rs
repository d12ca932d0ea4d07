//! Policies as the programs see them: options, and for each rule that names one, a setting.

use crate::{judge, select::Candidates, shared};

/// Longest text an option takes: a congestion control or a device name with its NUL
/// (`TCP_CA_NAME_MAX` and `IFNAMSIZ` are both 16).
pub const TEXT_LEN: usize = 16;

/// The first [`TEXT_LEN`] bytes of a value as they lie in memory. Words, because a program that
/// moves them byte by byte runs out of registers.
pub type Words = [u64; 2];

/// Length of a `struct linger`: whether close waits, and for how many seconds; two `int`s.
pub const LINGER_LEN: i32 = 8;

/// Length of a `struct timeval`: seconds and microseconds; two `long`s.
pub const TIMEVAL_LEN: i32 = 16;

/// In a second.
pub(crate) const MICROSECONDS: u64 = 1_000_000;

/// What the kernel calls an option. Key of map `OPTION_INDEX`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OptionKey {
    pub level: i32,
    pub name: i32,
}
shared!(OptionKey, size 4 + 4);

/// The numbers of the options that rules name, by a hash of level and name: for the calls on options that no rule names, which are
/// most of them, and for all others but a few a map need not be searched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// 0: none; [`Numbers::ELSEWHERE`]; or the number plus one.
    bytes: [u8; Self::LEN],
}
shared!(Numbers, size Numbers::LEN);

/// What [`Numbers`] say of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbered {
    /// No rule names it.
    No,
    /// If a rule names it, this is its number. It may be that of another option.
    Perhaps(u32),
    /// If a rule names it, map `OPTION_INDEX` has its number.
    Elsewhere,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { bytes: [0; Self::LEN] }
    }
}

impl Numbers {
    /// A power of two. No two of the options that we know have the same place among so many.
    const LEN: usize = 512;
    const ELSEWHERE: u8 = u8::MAX;

    pub fn add(&mut self, key: OptionKey, number: u32) {
        let place = &mut self.bytes[Self::place(key)];
        let is_free = *place == 0 && number < u32::from(Self::ELSEWHERE) - 1;
        *place = if is_free { number as u8 + 1 } else { Self::ELSEWHERE };
    }

    #[inline(always)]
    #[must_use]
    pub fn get(&self, key: OptionKey) -> Numbered {
        match self.bytes[Self::place(key)] {
            0 => Numbered::No,
            Self::ELSEWHERE => Numbered::Elsewhere,
            number => Numbered::Perhaps(u32::from(number) - 1),
        }
    }

    /// The names of a level are small numbers in a row. By this factor the rows of all levels lie beside one another.
    #[inline(always)]
    fn place(key: OptionKey) -> usize {
        (key.level as u32).wrapping_mul(135).wrapping_add(key.name as u32) as usize & (Self::LEN - 1)
    }
}

/// Values of [`Governed::kind`]: how the bytes of a value are read.
pub mod kind {
    /// No value that we understand: the option can only be denied.
    pub const OPAQUE: u8 = 0;
    /// `int`
    pub const INT: u8 = 1;
    /// `unsigned int`
    pub const UNSIGNED: u8 = 2;
    /// `int`, where everything but 0 means on
    pub const BOOL: u8 = 3;
    /// Up to [`super::TEXT_LEN`] bytes, ended by NUL or by the length
    pub const TEXT: u8 = 4;
    /// `struct linger`, as its seconds; one that is off says nothing
    pub const LINGER: u8 = 5;
    /// `struct timeval`, as microseconds; zero, which means for ever, is more than any
    pub const TIMEVAL: u8 = 6;
}

/// Bits of [`Governed::traits`].
pub mod traits {
    /// Exists on TCP sockets only.
    pub const TCP: u8 = 1;
    /// Matters to IPv4 traffic only: that of AF_INET sockets, and of AF_INET6 sockets with an
    /// IPv4-mapped peer.
    pub const INET: u8 = 2;
    /// Exists on AF_INET6 sockets only.
    pub const INET6: u8 = 4;
    /// The kernel also takes the value as one byte (`do_ip_setsockopt`).
    pub const BYTE: u8 = 8;
    /// The kernel also takes the value as eight bytes (SO_MAX_PACING_RATE in `sk_setsockopt`).
    pub const WIDE: u8 = 16;
    /// Is applied to a socket once: a second time the kernel may refuse it (SO_BINDTODEVICE).
    pub const ONCE: u8 = 32;
}

/// Values of [`Governed::read_back`]: what getsockopt shows after the option was set to v.
pub mod read_back {
    /// Nothing: the option cannot be read by a program, or what it shows says nothing about v.
    pub const NONE: u8 = 0;
    /// v
    pub const SAME: u8 = 1;
    /// 2v: the kernel doubles buffer sizes to have room for its own bookkeeping.
    pub const DOUBLED: u8 = 2;
}

/// An option that at least one rule names, and the rules of one scope that do. Map `OPTIONS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Governed {
    /// The rules that name the option, in any way.
    pub names: u64,
    /// Those of them that set it (and do not limit or deny it).
    pub sets: u64,
    pub key: OptionKey,
    /// Index in map `SETTINGS` of the setting of the first rule that names the option; those of
    /// the others follow in the order of the rules.
    pub first_setting: u32,
    /// See [`kind`].
    pub kind: u8,
    /// See [`traits`].
    pub traits: u8,
    /// See [`read_back`].
    pub read_back: u8,
    /// Which bit of [`crate::socket::State`] this is, if any rule sets it.
    pub bit: u8,
    /// Whether the first rule that names the option matches every socket (0 or 1): then nobody has to look at the socket.
    pub certain: u16,
    /// Whether moreover `agreeing` says something (0 or 1).
    pub has_agreeing: u16,
    /// The argument of four bytes that most of the calls have which agree with the first setting, and of which nothing is to be
    /// noted ([`crate::judge::agreeing`]).
    pub agreeing: u32,
}
shared!(Governed, size 8 + 8 + 8 + 4 + 4 + 2 + 2 + 4);

impl Governed {
    /// Whether the option's first setting governs it on every socket.
    #[inline(always)]
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.certain != 0
    }

    /// Whether a call with this argument agrees with what governs it, for all that can be told without the setting. What else
    /// agrees is found by judging it.
    #[inline(always)]
    #[must_use]
    pub fn surely_agrees(&self, len: i32, words: &Words) -> bool {
        self.has_agreeing != 0 && len == 4 && word_in(words) == self.agreeing
    }

    /// The setting that governs this option on a socket that `rules` may match: an index of map
    /// `SETTINGS`, or `None` where no rule decides (yet).
    ///
    /// The first rule that names the option and surely matches wins. Where an earlier rule may yet
    /// turn out to match and does not set but limit or deny the option, nothing is decided: what
    /// this rule would set now, that rule would never have set. (An earlier rule that *sets* it
    /// comes into its own at a later hook and overwrites.)
    #[inline(always)]
    #[must_use]
    pub fn winner(&self, rules: Candidates) -> Option<u32> {
        let matching = self.names & rules.sure;
        if matching == 0 {
            return None;
        }
        let first = matching & matching.wrapping_neg();
        let earlier = first - 1;
        if self.names & !self.sets & rules.possible & earlier != 0 {
            return None;
        }
        Some(self.first_setting + (self.names & earlier).count_ones())
    }
}

/// Values of [`Setting::form`].
pub mod form {
    /// A zeroed setting: decides nothing.
    pub const NONE: u8 = 0;
    pub const SET: u8 = 1;
    pub const LIMIT: u8 = 2;
    pub const DENY: u8 = 3;
}

/// Values of [`Setting::on_conflict`].
pub mod on_conflict {
    /// The application wins; it is reported.
    pub const ALLOW: u8 = 0;
    /// The application's value is replaced; its call succeeds.
    pub const REWRITE: u8 = 1;
    /// The call succeeds and does nothing.
    pub const IGNORE: u8 = 2;
    /// The call fails with [`super::Setting::errno`].
    pub const DENY: u8 = 3;
}

/// What one rule says about one option. Map `SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// The limit's lower bound.
    pub min: i64,
    /// The limit's upper bound.
    pub max: i64,
    /// The value to set; bits outside `mask` are 0.
    pub value: u32,
    /// The bits of the value that are the policy's; the others stay the application's.
    pub mask: u32,
    /// The text to set, padded with NUL.
    pub text: Words,
    /// See [`form`].
    pub form: u8,
    /// See [`on_conflict`].
    pub on_conflict: u8,
    /// What a denied call fails with; positive.
    pub errno: u16,
    /// Whether the setting is tried only: decided and reported, but nothing done (0 or 1).
    pub dry_run: u32,
}
shared!(Setting, size 8 + 8 + 4 + 4 + 16 + 4 + 4);

impl Setting {
    /// The value that an option which now has `current` is to be given.
    #[inline(always)]
    #[must_use]
    pub fn apply_to(&self, current: u32) -> u32 {
        (current & !self.mask) | self.value
    }

    #[inline(always)]
    #[must_use]
    pub fn is_dry_run(&self) -> bool {
        self.dry_run != 0
    }

    /// Whether setting the option leaves some of its bits as they are, so that its current value
    /// must be known first.
    #[inline(always)]
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.mask != u32::MAX
    }
}

/// A value of an option as it crosses to user space: its length and, as far as they fit, its bytes.
/// A length of 0 means that the value is not known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Value {
    pub words: Words,
    pub len: u32,
    pub _pad: u32,
}
shared!(Value, size 16 + 4 + 4);

impl Value {
    pub const UNKNOWN: Self = Self { words: [0; 2], len: 0, _pad: 0 };

    #[inline(always)]
    #[must_use]
    pub fn new(words: Words, len: u32) -> Self {
        Self { words, len, _pad: 0 }
    }

    #[inline(always)]
    #[must_use]
    pub fn int(value: u32) -> Self {
        Self::new(words_of(value), 4)
    }

    /// A number as an option of this kind takes it.
    #[inline(always)]
    #[must_use]
    pub fn number(kind: u8, number: i64) -> Self {
        match kind {
            kind::LINGER => Self::new([1 | (number as u64) << 32, 0], LINGER_LEN as u32),
            kind::TIMEVAL => {
                let microseconds = number as u64;
                Self::new([microseconds / MICROSECONDS, microseconds % MICROSECONDS], TIMEVAL_LEN as u32)
            }
            _ => Self::int(number as u32),
        }
    }

    #[inline(always)]
    #[must_use]
    pub fn text(text: Words) -> Self {
        Self::new(text, TEXT_LEN as u32)
    }

    /// What the policy wants of an option that the application would give `asked`.
    #[inline(always)]
    #[must_use]
    pub fn wanted(kind: u8, setting: &Setting, asked: &judge::Asked) -> Self {
        if setting.form != form::SET {
            return Self::UNKNOWN;
        }
        if kind == kind::TEXT { Self::text(setting.text) } else { Self::int(setting.apply_to(asked.number as u32)) }
    }

    /// The bytes as they lie in memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; TEXT_LEN] {
        let mut bytes = [0; TEXT_LEN];
        bytes[..8].copy_from_slice(&self.words[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&self.words[1].to_ne_bytes());
        bytes
    }
}

/// An `int` as the first bytes of a value.
#[inline(always)]
#[must_use]
pub fn words_of(value: u32) -> Words {
    let [a, b, c, d] = value.to_ne_bytes();
    [u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]), 0]
}

/// The `int` in the first bytes of a value.
#[inline(always)]
#[must_use]
pub fn word_in(words: &Words) -> u32 {
    let [a, b, c, d, ..] = words[0].to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// A text as the first bytes of a value; what is longer than a name can be is cut.
#[must_use]
pub fn words_of_text(text: &[u8]) -> Words {
    let mut bytes = [[0; 8]; 2];
    for (at, byte) in text.iter().take(TEXT_LEN - 1).enumerate() {
        bytes[at / 8][at % 8] = *byte;
    }
    bytes.map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_were_added_are_found_and_their_neighbours_are_not() {
        let mut numbers = Numbers::default();
        let keys = [(0, 1), (1, 12), (6, 1), (41, 67), (-1, i32::MIN)].map(|(level, name)| OptionKey { level, name });
        assert!(keys.iter().all(|key| numbers.get(*key) == Numbered::No));
        for (key, number) in keys.iter().zip(0..) {
            numbers.add(*key, number);
        }
        for (key, number) in keys.iter().zip(0..) {
            assert_eq!(numbers.get(*key), Numbered::Perhaps(number));
        }
        // SO_REUSEADDR, SO_KEEPALIVE, TCP_MAXSEG, IP_TTL
        for (level, name) in [(1, 2), (1, 9), (6, 2), (0, 2)] {
            assert_eq!(numbers.get(OptionKey { level, name }), Numbered::No, "{level} {name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_elsewhere() {
        let mut numbers = Numbers::default();
        let [one, same, other] = [1, 513, 2].map(|name| OptionKey { level: 0, name });
        numbers.add(one, 3);
        assert_eq!(numbers.get(same), Numbered::Perhaps(3));
        numbers.add(same, 4);
        numbers.add(other, 254);
        for key in [one, same, other] {
            assert_eq!(numbers.get(key), Numbered::Elsewhere);
        }
    }

    const OPTION: Governed = Governed {
        names: 0b1110,
        sets: 0b1010,
        key: OptionKey { level: 6, name: 1 },
        first_setting: 100,
        kind: kind::BOOL,
        traits: 0,
        read_back: 0,
        bit: 0,
        certain: 0,
        has_agreeing: 0,
        agreeing: 0,
    };

    fn winner(sure: u64, possible: u64) -> Option<u32> {
        OPTION.winner(Candidates { sure, possible: sure | possible })
    }

    #[test]
    fn first_matching_rule_that_names_the_option_wins() {
        assert_eq!(winner(0b1111, 0), Some(100));
        assert_eq!(winner(0b1100, 0), Some(101));
        assert_eq!(winner(0b1000, 0), Some(102));
    }

    #[test]
    fn rule_that_does_not_name_the_option_does_not_decide() {
        assert_eq!(winner(0b0001, 0), None);
    }

    #[test]
    fn earlier_rule_that_may_set_it_later_does_not_hold_it_up() {
        assert_eq!(winner(0b1000, 0b0010), Some(102));
    }

    #[test]
    fn earlier_rule_that_may_forbid_it_holds_it_up() {
        assert_eq!(winner(0b1000, 0b0100), None);
    }

    #[test]
    fn zeroed_option_is_governed_by_nobody() {
        let rules = Candidates { sure: u64::MAX, possible: u64::MAX };
        assert_eq!(Governed::default().winner(rules), None);
    }
}
