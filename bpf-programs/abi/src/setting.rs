//! Policies as the programs see them: options, and a setting for each rule that names an option.

use crate::{judge, select::Candidates, shared};

/// The longest text of an option: the name of a congestion control or of a device, with its NUL (`TCP_CA_NAME_MAX` and
/// `IFNAMSIZ` are both 16).
pub const TEXT_LEN: usize = 16;

/// The first [`TEXT_LEN`] bytes of a value as they are in memory. Words, because a program that copies bytes runs out of
/// registers.
pub type Words = [u64; 2];

/// Length of a `struct linger`: whether close waits, and the seconds; two `int`s.
pub const LINGER_LEN: i32 = 8;

/// Length of a `struct timeval`: seconds and microseconds; two `long`s.
pub const TIMEVAL_LEN: i32 = 16;

/// Microseconds in a second.
pub(crate) const MICROSECONDS: u64 = 1_000_000;

/// The level and name of an option in the kernel. Key of map `OPTION_INDEX`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OptionKey {
    pub level: i32,
    pub name: i32,
}
shared!(OptionKey, size 4 + 4);

/// The numbers of the options that rules name, by a hash of level and name. With it, most calls need no map lookup: those on
/// options that no rule names, and most of the others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionFilter {
    /// 0: absent; [`OptionFilter::FALLBACK`]; or the number plus one.
    bytes: [u8; Self::LEN],
}
shared!(OptionFilter, size OptionFilter::LEN);

/// The result of a lookup in an [`OptionFilter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// No rule names the option.
    Absent,
    /// If a rule names the option, this is its number. It may be the number of another option.
    Maybe(u32),
    /// If a rule names the option, map `OPTION_INDEX` has its number.
    Fallback,
}

impl Default for OptionFilter {
    fn default() -> Self {
        Self { bytes: [0; Self::LEN] }
    }
}

impl OptionFilter {
    /// A power of two. With this length, no two of the known options have the same index.
    const LEN: usize = 512;
    const FALLBACK: u8 = u8::MAX;

    pub fn add(&mut self, key: OptionKey, number: u32) {
        let entry = &mut self.bytes[Self::index(key)];
        let is_free = *entry == 0 && number < u32::from(Self::FALLBACK) - 1;
        *entry = if is_free { number as u8 + 1 } else { Self::FALLBACK };
    }

    #[inline(always)]
    #[must_use]
    pub fn get(&self, key: OptionKey) -> Lookup {
        match self.bytes[Self::index(key)] {
            0 => Lookup::Absent,
            Self::FALLBACK => Lookup::Fallback,
            number => Lookup::Maybe(u32::from(number) - 1),
        }
    }

    /// Returns the index of an option. The names of a level are small consecutive numbers. This factor puts the ranges of all
    /// levels side by side.
    #[inline(always)]
    fn index(key: OptionKey) -> usize {
        (key.level as u32).wrapping_mul(135).wrapping_add(key.name as u32) as usize & (Self::LEN - 1)
    }
}

/// Values of [`OptionRow::kind`]: how the bytes of a value are interpreted.
pub mod kind {
    /// Not interpreted: the option can only be denied.
    pub const OPAQUE: u8 = 0;
    /// `int`
    pub const INT: u8 = 1;
    /// `unsigned int`
    pub const UNSIGNED: u8 = 2;
    /// `int`, where every value except 0 means on
    pub const BOOL: u8 = 3;
    /// Up to [`super::TEXT_LEN`] bytes, ended by NUL or by the length
    pub const TEXT: u8 = 4;
    /// `struct linger`, as its seconds: 0 if it is off, and the maximum if they are negative
    pub const LINGER: u8 = 5;
    /// `struct timeval`, as microseconds; zero, which means no time-out, is greater than every other value
    pub const TIMEVAL: u8 = 6;
    /// SO_BUF_LOCK under a setting of a buffer: the bit [`super::OptionRow::lock`] must stay set, or the kernel tunes the
    /// buffer
    pub const LOCK: u8 = 7;
    /// SO_RCVLOWAT under a rule for SO_RCVBUF: an `int`, for which the kernel enlarges the buffer of a TCP socket
    pub const ROOM: u8 = 8;
}

/// The largest SO_RCVLOWAT for which every receive buffer is large enough: half of SOCK_MIN_RCVBUF (include/net/sock.h).
pub const ROOM_ALWAYS: u32 = 1152;

/// Values of [`OptionRow::argument`]: which lengths of an argument the kernel accepts, and which of the bytes it reads.
///
/// Each was tested on 5.10, 6.1, 6.12, 6.18 and 7.2; other lengths fail with EINVAL.
pub mod argument {
    /// Four bytes or more: an `int` in the first four (`sk_setsockopt`, net/core/sock.c; `do_tcp_setsockopt`, net/ipv4/tcp.c;
    /// `udp_lib_setsockopt`, net/ipv4/udp.c).
    pub const INT: u8 = 0;
    /// Four bytes or more: an `int`. One to three: the first byte, unsigned. None: 0 (`do_ip_setsockopt`,
    /// net/ipv4/ip_sockglue.c).
    pub const BYTE: u8 = 1;
    /// As [`BYTE`], but the kernel refuses an empty argument.
    pub const BYTE_REQUIRED: u8 = 2;
    /// Four bytes or more: an `int`. Less: 0 (`do_ipv6_setsockopt`, net/ipv6/ipv6_sockglue.c, for options that do not check
    /// the length).
    pub const INT_OR_ZERO: u8 = 3;
    /// Exactly four bytes: an `int`.
    pub const INT_EXACT: u8 = 4;
    /// Four to seven bytes: 32 bits. Eight or more: 64 bits (SO_MAX_PACING_RATE in `sk_setsockopt`).
    pub const RATE: u8 = 5;
}

/// Values of [`OptionRow::zero`] and [`OptionRow::negative`] that are no numbers: how a limit compares such an argument.
pub mod effective {
    /// The value itself.
    pub const SAME: i64 = i64::MIN;
    /// Depends on the kernel or on the queueing discipline: the value violates every bound.
    pub const UNCERTAIN: i64 = i64::MIN + 1;
}

/// Bits of [`OptionRow::traits`].
pub mod traits {
    /// Exists on TCP sockets only.
    pub const TCP: u8 = 1;
    /// Affects IPv4 traffic only: that of AF_INET sockets, and of AF_INET6 sockets with an IPv4-mapped peer.
    pub const INET: u8 = 2;
    /// Exists on AF_INET6 sockets only.
    pub const INET6: u8 = 4;
    /// The kernel keeps the lowest byte of the `int` (IP_TOS, `__ip_sock_set_tos` in net/ipv4/ip_sockglue.c).
    pub const LOW_BYTE: u8 = 8;
    /// The kernel reads -1 as 0 (IPV6_TCLASS, `do_ipv6_setsockopt` in net/ipv6/ipv6_sockglue.c).
    pub const MINUS_ONE_IS_ZERO: u8 = 16;
    /// Names the device to which a socket is bound: the kernel may refuse another one (`sock_bindtoindex_locked`,
    /// net/core/sock.c).
    pub const DEVICE: u8 = 32;
    /// Programs can read and set the option. A value that the application requested before the facts were known is corrected
    /// when they are known. For an option without this trait, a limit or a deny applies while its rule may still match.
    pub const CORRECTED: u8 = 64;
}

/// Values of [`OptionRow::read_back`]: what getsockopt shows after the option was set to v.
pub mod read_back {
    /// Nothing: a program cannot read the option, or the result does not depend on v.
    pub const NONE: u8 = 0;
    /// v
    pub const SAME: u8 = 1;
    /// 2v: the kernel doubles buffer sizes, for its own bookkeeping.
    pub const DOUBLED: u8 = 2;
}

/// The keys of a device by name and by index (see [`OptionRow::helper_key`]).
pub const DEVICE_BY_NAME: OptionKey = OptionKey { level: 1, name: 25 };
pub const DEVICE_BY_INDEX: OptionKey = OptionKey { level: 1, name: 62 };

impl OptionKey {
    /// Returns whether programs alone can set the option: the kernel refuses each call of an application
    /// (`bpf_sol_tcp_setsockopt`, net/core/filter.c; include/uapi/linux/bpf.h has the numbers).
    #[inline(always)]
    #[must_use]
    pub fn is_for_programs(self) -> bool {
        const SOL_SOCKET: i32 = 1;
        const SOL_TCP: i32 = 6;
        const FIRST: i32 = 1000;
        self.name >= FIRST && (self.level == SOL_SOCKET || self.level == SOL_TCP)
    }
}

/// IP_TOS, with which the kernel also sets SO_PRIORITY.
pub const TYPE_OF_SERVICE: OptionKey = OptionKey { level: 0, name: 1 };

/// Returns the SO_PRIORITY that the kernel sets with an IP_TOS (`rt_tos2priority`, include/net/route.h; `ip_tos2prio`,
/// net/ipv4/route.c; 5.10 to 7.2).
#[inline(always)]
#[must_use]
pub fn priority_of_tos(tos: u32) -> i64 {
    /// By bits 3 and 4 of the type of service: TC_PRIO_BESTEFFORT, _BULK, _INTERACTIVE and _INTERACTIVE_BULK.
    const PRIORITIES: u32 = 0x4620;
    i64::from(PRIORITIES >> (4 * (tos >> 3 & 3)) & 0xf)
}

/// IPV6_FLOWLABEL_MGR, whose handler writes the label into the caller's memory (`ipv6_flowlabel_get`,
/// net/ipv6/ip6_flowlabel.c).
pub const FLOW_LABEL_MANAGER: OptionKey = OptionKey { level: 41, name: 32 };

/// How one option of the socket API is interpreted, and the rules of one scope that govern it. Map `OPTIONS`.
///
/// An option that has several names or levels has a row for each of them. The rows share the settings.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct OptionRow {
    /// The rules that name the option, in any form and under any of its names.
    pub names: u64,
    /// The rules that set the option, and do not limit or deny it.
    pub sets: u64,
    pub key: OptionKey,
    /// The option that the helpers set instead: a name of the same value that they know.
    pub set_as: OptionKey,
    /// The value that a limit compares if the application passes 0. See [`effective`].
    pub zero: i64,
    /// The value that a limit compares if the application passes a negative number. See [`effective`].
    pub negative: i64,
    /// Index into map `SETTINGS` of the setting of the first rule that names the option. Those of the other rules follow in
    /// the order of the rules.
    pub first_setting: u32,
    /// Number plus one of the row that also governs calls on this option; 0: there is none.
    pub next: u32,
    /// Number plus one of the row of the option that the kernel resets when it sets this one; 0: there is none.
    pub resets: u32,
    /// The four-byte argument of most calls that agree with the first setting, and of which nothing must be recorded
    /// ([`crate::judge::agreeing`]).
    pub agreeing: u32,
    /// See [`kind`].
    pub kind: u8,
    /// See [`argument`].
    pub argument: u8,
    /// See [`traits`].
    pub traits: u8,
    /// See [`read_back`].
    pub read_back: u8,
    /// The bit for this option in [`crate::socket::State`], if any rule sets the option.
    pub bit: u8,
    /// Whether the first rule that names the option matches every socket (0 or 1): then the socket need not be read.
    pub certain: u8,
    /// Whether `certain` is set and `agreeing` is valid (0 or 1).
    pub has_agreeing: u8,
    /// The bit of SO_BUF_LOCK, for [`kind::LOCK`].
    pub lock: u8,
    /// Whether no rule names the option under this name (0 or 1): the row exists to judge calls.
    pub is_alias: u32,
    pub _pad: u32,
}
shared!(OptionRow, size 6 * 8 + 4 * 4 + 8 + 2 * 4);

impl OptionRow {
    /// Returns whether the option's first setting governs it on every socket.
    #[inline(always)]
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.certain != 0
    }

    /// Returns whether no rule names the option under this name.
    #[inline(always)]
    #[must_use]
    pub fn is_alias(&self) -> bool {
        self.is_alias != 0
    }

    /// Returns the option that the helpers set to apply a setting of this option.
    ///
    /// A device has two options of different kinds, which share their settings.
    #[inline(always)]
    #[must_use]
    pub fn helper_key(&self, setting: &Setting) -> OptionKey {
        match (self.is_text(), setting.is_text()) {
            (true, false) => DEVICE_BY_INDEX,
            (false, true) => DEVICE_BY_NAME,
            _ => self.set_as,
        }
    }

    /// Returns whether the option takes a text.
    #[inline(always)]
    #[must_use]
    pub fn is_text(&self) -> bool {
        self.kind == kind::TEXT
    }

    /// Returns the minimum length with which the kernel reads the whole of an argument that it accepts; 0 if it accepts only
    /// the length that the application passed.
    #[inline(always)]
    #[must_use]
    pub fn needed_len(&self) -> i32 {
        match self.kind {
            kind::OPAQUE => 0,
            kind::TEXT => TEXT_LEN as i32,
            kind::LINGER => LINGER_LEN,
            kind::TIMEVAL => TIMEVAL_LEN,
            _ if self.argument == argument::INT_EXACT => 0,
            _ if self.argument == argument::RATE => 8,
            _ => 4,
        }
    }

    /// Returns whether a call with this argument agrees with its setting, as far as this row shows. Judging finds the other
    /// calls that agree.
    #[inline(always)]
    #[must_use]
    pub fn fast_match(&self, len: i32, words: &Words) -> bool {
        self.has_agreeing != 0 && len == 4 && word_in(words) == self.agreeing
    }

    /// Returns the setting that governs this option on a socket that `rules` may match: an index into map `SETTINGS`, or
    /// `None` if no rule decides (yet).
    ///
    /// The first rule that names the option and surely matches wins. If an earlier rule may still match and limits or denies
    /// the option, nothing is decided: the later rule could set a value that the earlier one forbids. An earlier rule that
    /// *sets* the option does so at a later hook, and overwrites the value.
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

    /// Returns the setting that governs a call, if the value that the call sets cannot be corrected later. As
    /// [`Self::winner`], but a limit or a deny of a rule that may still match applies.
    #[inline(always)]
    #[must_use]
    pub fn cautious_winner(&self, rules: Candidates) -> Option<u32> {
        let deciding = self.names & (rules.sure | (rules.possible & !self.sets));
        if deciding == 0 {
            return None;
        }
        let first = deciding & deciding.wrapping_neg();
        Some(self.first_setting + (self.names & (first - 1)).count_ones())
    }
}

/// Values of [`Setting::form`].
pub mod form {
    /// Decides nothing: a zeroed setting, or a rule that leaves the option free.
    pub const NONE: u8 = 0;
    pub const SET: u8 = 1;
    pub const LIMIT: u8 = 2;
    pub const DENY: u8 = 3;
}

/// Values of [`Setting::on_conflict`].
pub mod on_conflict {
    /// The application wins; the call is reported.
    pub const ALLOW: u8 = 0;
    /// The application's value is replaced; its call succeeds.
    pub const REWRITE: u8 = 1;
    /// The call succeeds and does nothing.
    pub const IGNORE: u8 = 2;
    /// The call fails with [`super::Setting::errno`].
    pub const DENY: u8 = 3;
}

/// The setting of one rule for one option. Map `SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// The limit's lower bound.
    pub min: i64,
    /// The limit's upper bound.
    pub max: i64,
    /// The value to set; bits outside `mask` are 0.
    pub value: u32,
    /// The bits of the value that the policy sets; the others stay the application's.
    pub mask: u32,
    /// The text to set, padded with NUL.
    pub text: Words,
    /// See [`form`].
    pub form: u8,
    /// See [`on_conflict`].
    pub on_conflict: u8,
    /// The errno of a denied call; positive.
    pub errno: u16,
    /// Whether this is a dry run: the setting is evaluated and reported, but changes nothing (0 or 1).
    pub dry_run: u16,
    /// Whether the value to set is `text` (0 or 1).
    pub is_text: u16,
}
shared!(Setting, size 8 + 8 + 4 + 4 + 16 + 4 + 4);

impl Setting {
    /// Returns the value to set on an option that has `current`.
    #[inline(always)]
    #[must_use]
    pub fn apply_to(&self, current: u32) -> u32 {
        (current & !self.mask) | self.value
    }

    /// Returns a number that distinguishes the device that the setting names from others; never 0.
    #[inline(always)]
    #[must_use]
    pub fn device(&self) -> u32 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let words = self.text[0].wrapping_mul(GOLDEN) ^ self.text[1].wrapping_add(u64::from(self.value));
        (words.wrapping_mul(GOLDEN) >> 32) as u32 | 1
    }

    #[inline(always)]
    #[must_use]
    pub fn is_dry_run(&self) -> bool {
        self.dry_run != 0
    }

    #[inline(always)]
    #[must_use]
    pub fn is_text(&self) -> bool {
        self.is_text != 0
    }

    /// Returns the value to set, if no bit of it is the application's.
    #[inline(always)]
    #[must_use]
    pub fn whole_value(&self) -> Value {
        if self.is_text() { Value::text(self.text) } else { Value::int(self.value) }
    }

    /// Returns whether setting the option leaves some of its bits unchanged, so that its current value must be read first.
    #[inline(always)]
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.mask != u32::MAX
    }
}

/// A value of an option as it is passed to user space: its length, and as many of its bytes as fit. A length of 0 means that
/// the value is unknown.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Value {
    pub words: Words,
    pub len: u32,
    /// How many of the first bytes are known, if an argument ends before its length; 0: as many as fit.
    pub known: u32,
}
shared!(Value, size 16 + 4 + 4);

impl Value {
    pub const UNKNOWN: Self = Self { words: [0; 2], len: 0, known: 0 };

    #[inline(always)]
    #[must_use]
    pub fn new(words: Words, len: u32) -> Self {
        Self { words, len, known: 0 }
    }

    #[inline(always)]
    #[must_use]
    pub fn int(value: u32) -> Self {
        Self::new(words_of(value), 4)
    }

    /// Returns a number as a value of an option of this kind.
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

    /// Returns the value that the policy wants for an option that the application sets to `requested`.
    #[inline(always)]
    #[must_use]
    pub fn wanted(option: &OptionRow, setting: &Setting, requested: &judge::Argument) -> Self {
        if option.kind == kind::LOCK && setting.form != form::DENY {
            return Self::int(requested.number as u32 | u32::from(option.lock));
        }
        if setting.form != form::SET {
            return Self::UNKNOWN;
        }
        if setting.is_text() { setting.whole_value() } else { Self::int(setting.apply_to(requested.number as u32)) }
    }

    /// Returns the bytes as they are in memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; TEXT_LEN] {
        let mut bytes = [0; TEXT_LEN];
        bytes[..8].copy_from_slice(&self.words[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&self.words[1].to_ne_bytes());
        bytes
    }
}

/// Returns an `int` as the first bytes of a value.
#[inline(always)]
#[must_use]
pub fn words_of(value: u32) -> Words {
    let [a, b, c, d] = value.to_ne_bytes();
    [u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]), 0]
}

/// Returns the `int` in the first bytes of a value.
#[inline(always)]
#[must_use]
pub fn word_in(words: &Words) -> u32 {
    let [a, b, c, d, ..] = words[0].to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// Returns a text as the first bytes of a value. A text that is longer than a name can be is truncated.
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
    fn added_options_are_found_and_others_are_absent() {
        let mut numbers = OptionFilter::default();
        let keys = [(0, 1), (1, 12), (6, 1), (41, 67), (-1, i32::MIN)].map(|(level, name)| OptionKey { level, name });
        assert!(keys.iter().all(|key| numbers.get(*key) == Lookup::Absent));
        for (key, number) in keys.iter().zip(0..) {
            numbers.add(*key, number);
        }
        for (key, number) in keys.iter().zip(0..) {
            assert_eq!(numbers.get(*key), Lookup::Maybe(number));
        }
        // SO_REUSEADDR, SO_KEEPALIVE, TCP_MAXSEG, IP_TTL
        for (level, name) in [(1, 2), (1, 9), (6, 2), (0, 2)] {
            assert_eq!(numbers.get(OptionKey { level, name }), Lookup::Absent, "{level} {name}");
        }
    }

    #[test]
    fn number_that_does_not_fit_is_in_the_map() {
        let mut numbers = OptionFilter::default();
        let [one, same, other] = [1, 513, 2].map(|name| OptionKey { level: 0, name });
        numbers.add(one, 3);
        assert_eq!(numbers.get(same), Lookup::Maybe(3));
        numbers.add(same, 4);
        numbers.add(other, 254);
        for key in [one, same, other] {
            assert_eq!(numbers.get(key), Lookup::Fallback);
        }
    }

    #[test]
    fn priority_follows_the_type_of_service() {
        // Read from sockets of 6.18.
        for (tos, priority) in [(0, 0), (0x10, 6), (0x08, 2), (0xb8, 4), (0x48, 2), (0xff, 4), (0x03, 0)] {
            assert_eq!(priority_of_tos(tos), priority, "{tos:#x}");
        }
    }

    fn winner(sure: u64, possible: u64) -> Option<u32> {
        let option = OptionRow { names: 0b1110, sets: 0b1010, first_setting: 100, ..OptionRow::default() };
        option.winner(Candidates { sure, possible: sure | possible })
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
    fn earlier_rule_that_may_set_the_option_later_does_not_block_it() {
        assert_eq!(winner(0b1000, 0b0010), Some(102));
    }

    #[test]
    fn earlier_rule_that_may_forbid_the_option_blocks_it() {
        assert_eq!(winner(0b1000, 0b0100), None);
    }

    #[test]
    fn rule_that_may_forbid_the_option_governs_a_call_that_cannot_be_corrected() {
        let option = OptionRow { names: 0b1110, sets: 0b1010, first_setting: 100, ..OptionRow::default() };
        let winner = |sure: u64, possible: u64| option.cautious_winner(Candidates { sure, possible: sure | possible });
        assert_eq!(winner(0b1000, 0b0100), Some(101));
        assert_eq!(winner(0, 0b0100), Some(101));
        assert_eq!(winner(0b1000, 0b0010), Some(102), "that rule would set it");
        assert_eq!(winner(0, 0b1010), None);
    }

    #[test]
    fn zeroed_option_is_not_governed() {
        let rules = Candidates { sure: u64::MAX, possible: u64::MAX };
        assert_eq!(OptionRow::default().winner(rules), None);
    }
}
