//! Judges a call of an application that a setting governs.

use crate::{
    setting::{
        LINGER_LEN, MICROSECONDS, OptionRow, Setting, TEXT_LEN, TIMEVAL_LEN, Value, Words, argument, effective, form,
        kind, on_conflict, traits, word_in, words_of,
    },
    shared,
};

/// What was done about a call. In a dry run: what would have been done.
pub mod verdict {
    /// The call agrees with the policy, or no setting governs it.
    pub const NONE: u8 = 0;
    pub const ALLOWED: u8 = 1;
    pub const REWRITTEN: u8 = 2;
    pub const CLAMPED: u8 = 3;
    pub const IGNORED: u8 = 4;
    pub const DENIED: u8 = 5;
    /// The number of verdicts on a conflict: `ALLOWED` to `DENIED`.
    pub const COUNT: usize = 5;
}

/// The value that an application passed, interpreted as the kernel does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Argument {
    /// The number, for kinds that are numbers.
    pub number: i64,
    /// The text, padded with NUL, for the kind that is text.
    pub text: Words,
}
shared!(Argument, size 8 + 16);

impl Argument {
    /// Interprets the first bytes of an argument of `len` bytes as the kernel's handler of the option does.
    ///
    /// `None` if the kernel refuses the length (EINVAL) or the time (EDOM): such a call changes nothing.
    #[inline(always)]
    #[must_use]
    pub fn read(option: &OptionRow, len: i32, words: &Words) -> Option<Self> {
        // The program of a deeper cgroup has made the call do nothing.
        if len < 0 {
            return None;
        }
        let mut requested = Self::default();
        match option.kind {
            kind::OPAQUE => {}
            kind::TEXT => requested.text = text(len, words),
            kind::LINGER => requested.number = linger(len, words)?,
            kind::TIMEVAL => requested.number = timeval(len, words)?,
            _ => requested.number = number(option, len, words)?,
        }
        Some(requested)
    }
}

/// Returns the number in an argument; `None` if the kernel refuses its length.
#[inline(always)]
fn number(option: &OptionRow, len: i32, words: &Words) -> Option<i64> {
    let int = word_in(words);
    if option.argument == argument::RATE && len >= 8 {
        return Some(match words[0] {
            u64::MAX => i64::from(u32::MAX),
            // 32 bits of ones mean "unlimited" only in an argument of four bytes: in eight bytes they are a rate.
            wide if wide == u64::from(u32::MAX) => wide as i64 + 1,
            wide if wide > i64::MAX as u64 => i64::MAX,
            wide => wide as i64,
        });
    }
    if len < 4 || (option.argument == argument::INT_EXACT && len != 4) {
        let first = i64::from(words[0].to_ne_bytes()[0]);
        return match option.argument {
            argument::INT_OR_ZERO => Some(0),
            argument::BYTE if len == 0 => Some(0),
            argument::BYTE | argument::BYTE_REQUIRED if len > 0 => Some(first),
            _ => None,
        };
    }
    if option.traits & traits::LOW_BYTE != 0 {
        return Some(i64::from(int & 0xff));
    }
    if option.traits & traits::MINUS_ONE_IS_ZERO != 0 && int == u32::MAX {
        return Some(0);
    }
    Some(match option.kind {
        kind::UNSIGNED => i64::from(int),
        kind::BOOL => i64::from(int != 0),
        _ => i64::from(int as i32),
    })
}

/// Returns the seconds for which close waits: 0 if it does not wait, and the maximum if they are negative (`sk_setsockopt`,
/// net/core/sock.c; 5.10 reads them as unsigned, which is practically the same).
#[inline(always)]
fn linger(len: i32, words: &Words) -> Option<i64> {
    if len < LINGER_LEN {
        return None;
    }
    let (is_on, seconds) = (words[0] as u32 != 0, (words[0] >> 32) as i32);
    Some(if !is_on {
        0
    } else if seconds < 0 {
        i64::MAX
    } else {
        i64::from(seconds)
    })
}

/// Returns the microseconds in a time; `None` if the kernel refuses it (`sock_set_timeout`, net/core/sock.c).
#[inline(always)]
fn timeval(len: i32, words: &Words) -> Option<i64> {
    if len < TIMEVAL_LEN {
        return None;
    }
    let [seconds, microseconds] = words.map(|word| word as i64);
    if microseconds < 0 || microseconds >= MICROSECONDS as i64 {
        return None;
    }
    // Zero means no time-out, and a negative time means zero. More seconds than fit are practically no time-out.
    Some(match seconds {
        0 if microseconds == 0 => i64::MAX,
        ..0 => 0,
        0..SECONDS_MAX => seconds * MICROSECONDS as i64 + microseconds,
        _ => i64::MAX,
    })
}

/// Seconds that fit an `i64` as microseconds.
const SECONDS_MAX: i64 = i64::MAX / MICROSECONDS as i64 - 1;

/// Returns the text in `words`, which ends at the first NUL or after `len` bytes, padded with NUL.
#[inline(always)]
fn text(len: i32, words: &Words) -> Words {
    // One byte less than the buffer: the kernel's own copy ends in NUL.
    let len = if len < 0 { 0 } else { len.min(TEXT_LEN as i32 - 1) as u32 };
    let first = until_nul(words[0] & first_bytes(len));
    let is_longer = len > 8 && first >> 56 != 0;
    let second = if is_longer { until_nul(words[1] & first_bytes(len - 8)) } else { 0 };
    [first, second]
}

/// Returns a mask of the first `len` bytes of a word. Little-endian, as is the target.
#[inline(always)]
fn first_bytes(len: u32) -> u64 {
    if len >= 8 { u64::MAX } else { (1 << (8 * len)) - 1 }
}

/// Returns the bytes of a word before its first zero byte, with the others cleared.
#[inline(always)]
fn until_nul(word: u64) -> u64 {
    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    // The lowest bit that remains is the top bit of the first zero byte.
    let zeros = word.wrapping_sub(LOW) & !word & HIGH;
    if zeros == 0 { word } else { word & ((zeros & zeros.wrapping_neg()) - 1) }
}

#[cfg(not(target_endian = "little"))]
compile_error!("texts are read as little-endian words");

/// The decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// See [`verdict`].
    pub verdict: u8,
    /// The value that the kernel gets in place of the application's; unknown if the call continues unchanged or not at all.
    pub applied: Value,
}

impl Judgement {
    const NONE: Self = Self::of(verdict::NONE);
    const DENIED: Self = Self::of(verdict::DENIED);

    const fn of(verdict: u8) -> Self {
        Self { verdict, applied: Value::UNKNOWN }
    }
}

/// Returns the four-byte argument that agrees with a setting because it is the setting's value. `None` if there is none, and
/// if the application may win: then the winner must be recorded.
#[must_use]
pub fn agreeing(option: &OptionRow, setting: &Setting) -> Option<u32> {
    let requested = Argument::read(option, 4, &words_of(setting.value))?;
    let agrees = setting.form == form::SET
        && option.kind != kind::ROOM
        && setting.on_conflict != on_conflict::ALLOW
        && judge(option, setting, &requested).verdict == verdict::NONE;
    agrees.then_some(setting.value)
}

/// Judges a call with an argument of `len` bytes, of which `words` are the first. `None` if the kernel itself refuses the
/// argument.
#[inline(always)]
#[must_use]
pub fn judge_argument(option: &OptionRow, setting: &Setting, len: i32, words: &Words) -> Option<Judgement> {
    // Denied whatever the argument is. A call that the program of a deeper cgroup has skipped does nothing.
    if setting.form == form::DENY && len >= 0 {
        return Some(Judgement::DENIED);
    }
    if option.key.is_for_programs() {
        return None;
    }
    Some(judge(option, setting, &Argument::read(option, len, words)?))
}

/// Judges a call that `setting` governs.
#[inline(always)]
#[must_use]
pub fn judge(option: &OptionRow, setting: &Setting, requested: &Argument) -> Judgement {
    let conflict = match setting.form {
        form::DENY => return Judgement::DENIED,
        _ if option.kind == kind::OPAQUE => None,
        form::SET if option.kind == kind::LOCK => unlocked(option, requested, verdict::REWRITTEN),
        form::LIMIT if option.kind == kind::LOCK => unlocked(option, requested, verdict::CLAMPED),
        form::SET => other_value(option, setting, requested).map(|value| (value, verdict::REWRITTEN)),
        form::LIMIT => {
            beyond(option, setting, requested.number).map(|bound| (Value::number(option.kind, bound), verdict::CLAMPED))
        }
        _ => None,
    };
    let Some((applied, replacing)) = conflict else { return Judgement::NONE };
    match setting.on_conflict {
        on_conflict::REWRITE => Judgement { verdict: replacing, applied },
        on_conflict::IGNORE => Judgement::of(verdict::IGNORED),
        on_conflict::DENY => Judgement::DENIED,
        _ => Judgement::of(verdict::ALLOWED),
    }
}

/// Returns the SO_BUF_LOCK to set instead, if the application requests the tuning of a governed buffer.
#[inline(always)]
fn unlocked(option: &OptionRow, requested: &Argument, verdict: u8) -> Option<(Value, u8)> {
    let (number, lock) = (requested.number as u32, u32::from(option.lock));
    (number & lock != lock).then(|| (Value::int(number | lock), verdict))
}

/// Returns the value that a setting wants in place of the application's; `None` if they agree.
#[inline(always)]
fn other_value(option: &OptionRow, setting: &Setting, requested: &Argument) -> Option<Value> {
    if setting.is_text() != option.is_text() {
        return Some(setting.whole_value());
    }
    if option.is_text() {
        return (setting.text != requested.text).then(|| setting.whole_value());
    }
    // A number that does not fit 32 bits conflicts with every policy.
    let fits = requested.number >= i64::from(i32::MIN) && requested.number <= i64::from(u32::MAX);
    let int = requested.number as u32;
    let agrees = fits && (int ^ setting.value) & setting.mask == 0;
    (!agrees).then(|| Value::int(setting.apply_to(int)))
}

/// Returns the bound of a limit that a number violates, if any.
#[inline(always)]
fn beyond(option: &OptionRow, setting: &Setting, number: i64) -> Option<i64> {
    let effective = match number {
        0 => option.zero,
        ..0 => option.negative,
        _ => effective::SAME,
    };
    let (low, high) = match effective {
        effective::SAME => (number, number),
        effective::UNCERTAIN => (i64::MIN, i64::MAX),
        value => (value, value),
    };
    if high > setting.max {
        Some(setting.max)
    } else if low < setting.min {
        Some(setting.min)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(value: &[u8]) -> Words {
        let mut bytes = [0; TEXT_LEN];
        bytes[..value.len()].copy_from_slice(value);
        let (first, second) = bytes.split_at(8);
        [first, second].map(|half| u64::from_ne_bytes(half.try_into().unwrap()))
    }

    fn option(kind: u8) -> OptionRow {
        OptionRow { kind, zero: effective::SAME, negative: effective::SAME, ..OptionRow::default() }
    }

    fn taking(kind: u8, argument: u8) -> OptionRow {
        OptionRow { argument, ..option(kind) }
    }

    fn number(option: &OptionRow, value: &[u8]) -> Option<i64> {
        Argument::read(option, value.len() as i32, &words(value)).map(|requested| requested.number)
    }

    #[test]
    fn argument_is_read_as_the_kernel_reads_it() {
        assert_eq!(number(&option(kind::INT), &(-1i32).to_ne_bytes()), Some(-1));
        assert_eq!(number(&option(kind::UNSIGNED), &(-1i32).to_ne_bytes()), Some(0xffff_ffff));
        assert_eq!(number(&option(kind::BOOL), &7i32.to_ne_bytes()), Some(1));
        assert_eq!(number(&option(kind::INT), &[1, 0]), None, "too short for an int");
        assert_eq!(number(&option(kind::UNSIGNED), &(1u64 << 40).to_ne_bytes()), Some(0));
    }

    #[test]
    fn short_arguments_are_read_by_the_rule_of_the_option() {
        let read = |rule, value: &[u8]| number(&taking(kind::INT, rule), value);
        for (rule, empty, two, eight) in [
            (argument::INT, None, None, Some(0x0201)),
            (argument::BYTE, Some(0), Some(5), Some(0x0201)),
            (argument::BYTE_REQUIRED, None, Some(5), Some(0x0201)),
            (argument::INT_OR_ZERO, Some(0), Some(0), Some(0x0201)),
            (argument::INT_EXACT, None, None, None),
        ] {
            assert_eq!(read(rule, &[]), empty, "{rule}");
            assert_eq!(read(rule, &[5, 1]), two, "{rule}");
            assert_eq!(read(rule, &[1, 2, 0, 0]), Some(0x0201), "{rule}");
            assert_eq!(read(rule, &[1, 2, 0, 0, 9, 9, 9, 9]), eight, "{rule}");
        }
        assert_eq!(read(argument::BYTE_REQUIRED, &[0xff]), Some(255), "a byte is unsigned");
    }

    #[test]
    fn rate_has_32_or_64_bits() {
        let rate = taking(kind::UNSIGNED, argument::RATE);
        assert_eq!(number(&rate, &(1u64 << 40).to_ne_bytes()), Some(1 << 40));
        let longer = [(1u64 << 40).to_ne_bytes(), [0; 8]].concat();
        for len in 9..16 {
            assert_eq!(number(&rate, &longer[..len]), Some(1 << 40), "{len}");
        }
        for len in 4..8 {
            assert_eq!(number(&rate, &longer[..len]), Some(0), "{len}");
        }
        let unlimited = i64::from(u32::MAX);
        assert_eq!(number(&rate, &u32::MAX.to_ne_bytes()), Some(unlimited));
        assert_eq!(number(&rate, &u64::MAX.to_ne_bytes()), Some(unlimited));
        assert_ne!(number(&rate, &u64::from(u32::MAX).to_ne_bytes()), Some(unlimited));
    }

    #[test]
    fn values_are_narrowed_as_the_kernel_narrows_them() {
        let tos = OptionRow { traits: traits::LOW_BYTE, ..taking(kind::INT, argument::BYTE) };
        assert_eq!(number(&tos, &0x148_u32.to_ne_bytes()), Some(0x48));
        assert_eq!(number(&tos, &(-1_i32).to_ne_bytes()), Some(0xff));
        let traffic_class = OptionRow { traits: traits::MINUS_ONE_IS_ZERO, ..option(kind::INT) };
        assert_eq!(number(&traffic_class, &(-1_i32).to_ne_bytes()), Some(0));
        assert_eq!(number(&traffic_class, &(-2_i32).to_ne_bytes()), Some(-2));
    }

    #[test]
    fn text_ends_at_its_length_or_nul() {
        let read = |len, value: &[u8]| Argument::read(&option(kind::TEXT), len, &words(value)).unwrap().text;
        assert_eq!(read(3, b"bbrxyz"), words(b"bbr"));
        assert_eq!(read(16, b"bbr\0junk"), words(b"bbr"));
        assert_eq!(read(4096, b"0123456789abcdef"), words(b"0123456789abcde"));
        assert_eq!(read(0, b"bbr"), words(b""));
        assert_eq!(Argument::read(&option(kind::TEXT), -1, &words(b"bbr")), None);
        assert_eq!(read(8, b"01234567zz"), words(b"01234567"));
        assert_eq!(read(9, b"01234567zz"), words(b"01234567z"));
        assert_eq!(read(12, b"0123\x001234567"), words(b"0123"));
        assert_eq!(read(12, b"\x80\xff\x01"), words(b"\x80\xff\x01"));
    }

    fn set(value: u32, mask: u32, on_conflict: u8) -> Setting {
        Setting { form: form::SET, value, mask, on_conflict, ..Setting::default() }
    }

    fn requested(number: i64) -> Argument {
        Argument { number, ..Argument::default() }
    }

    #[test]
    fn call_with_the_policys_value_agrees() {
        let setting = set(1, u32::MAX, on_conflict::DENY);
        assert_eq!(judge(&option(kind::BOOL), &setting, &requested(1)).verdict, verdict::NONE);
    }

    #[test]
    fn value_of_a_setting_agrees_unless_the_winner_must_be_recorded() {
        let mask = |mask, value, action| agreeing(&option(kind::INT), &set(value, mask, action));
        assert_eq!(mask(u32::MAX, 7, on_conflict::DENY), Some(7));
        assert_eq!(mask(0xff, 7, on_conflict::REWRITE), Some(7));
        assert_eq!(mask(u32::MAX, 7, on_conflict::ALLOW), None);
        // Interpreted as true, which is 1.
        assert_eq!(agreeing(&option(kind::BOOL), &set(7, u32::MAX, on_conflict::DENY)), None);
        let text = Setting { text: words(b"bbr"), is_text: 1, ..set(0, u32::MAX, on_conflict::DENY) };
        assert_eq!(agreeing(&option(kind::TEXT), &text), None);
        let limit = Setting { form: form::LIMIT, min: 0, max: 9, ..Setting::default() };
        assert_eq!(agreeing(&option(kind::INT), &limit), None);
        assert_eq!(agreeing(&option(kind::INT), &Setting { form: form::DENY, ..limit }), None);
    }

    #[test]
    fn each_action_gives_its_verdict() {
        for (action, verdict, applied) in [
            (on_conflict::ALLOW, verdict::ALLOWED, Value::UNKNOWN),
            (on_conflict::REWRITE, verdict::REWRITTEN, Value::int(1)),
            (on_conflict::IGNORE, verdict::IGNORED, Value::UNKNOWN),
            (on_conflict::DENY, verdict::DENIED, Value::UNKNOWN),
        ] {
            let judgement = judge(&option(kind::BOOL), &set(1, u32::MAX, action), &requested(0));
            assert_eq!(judgement, Judgement { verdict, applied });
        }
    }

    #[test]
    fn bits_outside_the_mask_stay_the_applications() {
        let setting = set(0x20, 0xff, on_conflict::REWRITE);
        assert_eq!(judge(&option(kind::UNSIGNED), &setting, &requested(0x1120)).verdict, verdict::NONE);
        assert_eq!(judge(&option(kind::UNSIGNED), &setting, &requested(0x1133)).applied, Value::int(0x1120));
    }

    #[test]
    fn limit_clamps_to_the_nearer_end() {
        let setting =
            Setting { form: form::LIMIT, min: 10, max: 20, on_conflict: on_conflict::REWRITE, ..Setting::default() };
        assert_eq!(judge(&option(kind::INT), &setting, &requested(15)).verdict, verdict::NONE);
        assert_eq!(
            judge(&option(kind::INT), &setting, &requested(9)),
            Judgement { verdict: verdict::CLAMPED, applied: Value::int(10) }
        );
        assert_eq!(
            judge(&option(kind::INT), &setting, &requested(99)),
            Judgement { verdict: verdict::CLAMPED, applied: Value::int(20) }
        );
    }

    #[test]
    fn linger_and_timeval_are_limited_by_their_duration() {
        let limit =
            |min, max| Setting { form: form::LIMIT, min, max, on_conflict: on_conflict::REWRITE, ..Setting::default() };
        let judged = |kind, setting: &Setting, words, len| {
            judge_argument(&option(kind), setting, len, &words).map(|judgement| judgement.applied)
        };
        let linger = |on: u64, seconds: u64| [on | seconds << 32, 0];
        let five_seconds = limit(0, 5);
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 9), 8), Some(Value::new(linger(1, 5), 8)));
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 3), 8), Some(Value::UNKNOWN));
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(0, 9), 8), Some(Value::UNKNOWN), "it does not wait");
        let negative = linger(1, 0xffff_ffff);
        assert_eq!(
            judged(kind::LINGER, &five_seconds, negative, 8),
            Some(Value::new(linger(1, 5), 8)),
            "waits for ever"
        );
        assert_eq!(judged(kind::LINGER, &limit(2, 5), linger(0, 9), 8), Some(Value::new(linger(1, 2), 8)));
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 9), 4), None, "the kernel refuses it");
        let setting = limit(1_000_000, 2_500_000);
        let applied = |words| judged(kind::TIMEVAL, &setting, words, 16);
        assert_eq!(applied([9, 0]), Some(Value::new([2, 500_000], 16)));
        assert_eq!(applied([0, 0]), Some(Value::new([2, 500_000], 16)), "no time-out");
        assert_eq!(applied([0, 5]), Some(Value::new([1, 0], 16)));
        assert_eq!(applied([u64::MAX, 0]), Some(Value::new([1, 0], 16)), "zero");
        assert_eq!(applied([2, 0]), Some(Value::UNKNOWN));
        assert_eq!(applied([i64::MAX as u64, 0]), Some(Value::new([2, 500_000], 16)));
        for (words, len) in [([9, 0], 8), ([9, 1_000_000], 16)] {
            assert_eq!(judged(kind::TIMEVAL, &setting, words, len), None, "the kernel refuses it");
        }
    }

    #[test]
    fn limit_compares_the_effective_value() {
        let limit =
            |min, max| Setting { form: form::LIMIT, min, max, on_conflict: on_conflict::REWRITE, ..Setting::default() };
        let judged = |zero, negative, setting: &Setting, number| {
            judge(&OptionRow { zero, negative, ..option(kind::INT) }, setting, &requested(number)).applied
        };
        let (at_most, at_least) = (limit(i64::MIN, 8), limit(100, i64::MAX));
        // A default of 64.
        assert_eq!(judged(64, effective::SAME, &at_most, 0), Value::int(8));
        assert_eq!(judged(64, effective::SAME, &at_least, 0), Value::int(100));
        assert_eq!(judged(effective::SAME, 64, &at_most, -1), Value::int(8));
        assert_eq!(judged(effective::SAME, 4, &at_most, -1), Value::UNKNOWN);
        // Unlimited.
        assert_eq!(judged(i64::MAX, effective::SAME, &at_most, 0), Value::int(8));
        assert_eq!(judged(i64::MAX, effective::SAME, &at_least, 0), Value::UNKNOWN);
        // Unknown: violates both bounds.
        assert_eq!(judged(effective::UNCERTAIN, effective::SAME, &at_most, 0), Value::int(8));
        assert_eq!(judged(effective::UNCERTAIN, effective::SAME, &at_least, 0), Value::int(100));
        // The value itself.
        assert_eq!(judged(effective::SAME, effective::SAME, &at_most, 0), Value::UNKNOWN);
        assert_eq!(judged(effective::SAME, effective::SAME, &at_least, -1), Value::int(100));
    }

    #[test]
    fn governed_buffer_stays_locked() {
        let lock = OptionRow { lock: 1, ..option(kind::LOCK) };
        let (set, limit) = (
            set(65536, u32::MAX, on_conflict::REWRITE),
            Setting { form: form::LIMIT, on_conflict: on_conflict::REWRITE, ..Setting::default() },
        );
        for (setting, verdict) in [(set, verdict::REWRITTEN), (limit, verdict::CLAMPED)] {
            assert_eq!(judge(&lock, &setting, &requested(2)), Judgement { verdict, applied: Value::int(3) });
            assert_eq!(judge(&lock, &setting, &requested(3)).verdict, verdict::NONE);
        }
    }

    #[test]
    fn name_and_index_of_a_device_disagree() {
        let by_name = Setting { is_text: 1, text: words(b"eth0"), ..set(0, u32::MAX, on_conflict::REWRITE) };
        let judgement = judge(&option(kind::INT), &by_name, &requested(3));
        assert_eq!(judgement, Judgement { verdict: verdict::REWRITTEN, applied: Value::text(words(b"eth0")) });
        let by_index = set(3, u32::MAX, on_conflict::REWRITE);
        let name = Argument { text: words(b"eth0"), ..Argument::default() };
        assert_eq!(judge(&option(kind::TEXT), &by_index, &name).applied, Value::int(3));
    }

    #[test]
    fn deny_denies_every_argument() {
        let setting = Setting { form: form::DENY, ..Setting::default() };
        for kind in [kind::OPAQUE, kind::INT, kind::TEXT, kind::LINGER, kind::TIMEVAL] {
            for len in [0, 1, 3, 4, 8, 16, 4097, i32::MAX] {
                let judgement = judge_argument(&option(kind), &setting, len, &[0; 2]);
                assert_eq!(judgement.map(|judgement| judgement.verdict), Some(verdict::DENIED), "{kind} {len}");
            }
            assert_eq!(judge_argument(&option(kind), &setting, -1, &[0; 2]), None, "a program has skipped it");
        }
    }

    #[test]
    fn zeroed_setting_is_inert() {
        assert_eq!(judge(&option(kind::INT), &Setting::default(), &requested(5)).verdict, verdict::NONE);
    }
}
