//! What becomes of an application's call that a setting governs.

use crate::{
    setting::{
        LINGER_LEN, MICROSECONDS, Setting, TEXT_LEN, TIMEVAL_LEN, Value, Words, form, kind, on_conflict, traits,
        word_in, words_of,
    },
    shared,
};

/// What was done about a call. In dry-run: what would have been done.
pub mod verdict {
    /// The call agrees with the policy, or no setting governs it.
    pub const NONE: u8 = 0;
    pub const ALLOWED: u8 = 1;
    pub const REWRITTEN: u8 = 2;
    pub const CLAMPED: u8 = 3;
    pub const IGNORED: u8 = 4;
    pub const DENIED: u8 = 5;
    /// How many verdicts a conflict can get: `ALLOWED` to `DENIED`.
    pub const COUNT: usize = 5;
}

/// The value that an application passed, read as the kernel would read it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The number, for the kinds that are numbers.
    pub number: i64,
    /// The text, NUL-padded, for the kind that is text.
    pub text: Words,
}
shared!(Asked, size 8 + 16);

impl Asked {
    /// Reads the first bytes of an argument of `len` bytes.
    ///
    /// `None` where the kernel would refuse the length (`EINVAL`): such a call changes nothing and
    /// is none of our business.
    #[inline(always)]
    #[must_use]
    pub fn read(kind: u8, traits: u8, len: i32, words: &Words) -> Option<Self> {
        // A program further down has seen to it that the call does nothing.
        if len < 0 {
            return None;
        }
        let mut asked = Self::default();
        if kind == kind::OPAQUE {
            return Some(asked);
        }
        if kind == kind::TEXT {
            asked.text = text(len, words);
            return Some(asked);
        }
        if kind == kind::LINGER || kind == kind::TIMEVAL {
            asked.number = duration(kind, len, words)?;
            return Some(asked);
        }
        let word = word_in(words);
        asked.number = if traits & traits::WIDE != 0 && len == 8 {
            // All ones mean "unlimited", in either width.
            match words[0] {
                u64::MAX => i64::from(u32::MAX),
                wide if wide > i64::MAX as u64 => i64::MAX,
                wide => wide as i64,
            }
        } else if len >= 4 {
            match kind {
                kind::UNSIGNED => i64::from(word),
                kind::BOOL => i64::from(word != 0),
                _ => i64::from(word as i32),
            }
        } else if traits & traits::BYTE != 0 {
            // do_ip_setsockopt (net/ipv4/ip_sockglue.c): one byte where there is no int, 0 where
            // there is nothing at all.
            if len >= 1 { i64::from(words[0].to_ne_bytes()[0]) } else { 0 }
        } else {
            return None;
        };
        Some(asked)
    }
}

/// The time in a structure. `None` where the kernel refuses its length, and where it asks for none.
#[inline(always)]
fn duration(kind: u8, len: i32, words: &Words) -> Option<i64> {
    if kind == kind::LINGER {
        let is_on = words[0] as u32 != 0;
        return (len >= LINGER_LEN && is_on).then_some((words[0] >> 32) as i64);
    }
    if len < TIMEVAL_LEN {
        return None;
    }
    let [seconds, microseconds] = words.map(|word| word as i64);
    if microseconds < 0 || microseconds >= MICROSECONDS as i64 {
        return None;
    }
    // sock_set_timeout (net/core/sock.c): for ever, and not at all; and EDOM above. More seconds than fit are as good as for
    // ever.
    Some(match seconds {
        0 if microseconds == 0 => i64::MAX,
        ..0 => 0,
        0..SECONDS_MAX => seconds * MICROSECONDS as i64 + microseconds,
        _ => i64::MAX,
    })
}

/// As microseconds they fit.
const SECONDS_MAX: i64 = i64::MAX / MICROSECONDS as i64 - 1;

/// The text in `words`, which ends at the first NUL or after `len` bytes, padded with NUL.
#[inline(always)]
fn text(len: i32, words: &Words) -> Words {
    // One byte less than there is room for: the kernel's own copy ends in NUL.
    let len = if len < 0 { 0 } else { len.min(TEXT_LEN as i32 - 1) as u32 };
    let first = until_nul(words[0] & first_bytes(len));
    let is_longer = len > 8 && first >> 56 != 0;
    let second = if is_longer { until_nul(words[1] & first_bytes(len - 8)) } else { 0 };
    [first, second]
}

/// The bits of the first `len` bytes of a word. Little-endian, as is the target.
#[inline(always)]
fn first_bytes(len: u32) -> u64 {
    if len >= 8 { u64::MAX } else { (1 << (8 * len)) - 1 }
}

/// The bytes of a word before its first zero byte, the others cleared.
#[inline(always)]
fn until_nul(word: u64) -> u64 {
    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    // The lowest bit that this leaves is the top bit of the first zero byte.
    let zeros = word.wrapping_sub(LOW) & !word & HIGH;
    if zeros == 0 { word } else { word & ((zeros & zeros.wrapping_neg()) - 1) }
}

#[cfg(not(target_endian = "little"))]
compile_error!("texts are taken apart as little-endian words");

/// What is to be done about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// See [`verdict`].
    pub verdict: u8,
    /// What the kernel is to be given in place of the application's value; unknown where the call
    /// goes through as it is or not at all.
    pub given: Value,
}

/// The argument of four bytes that agrees with a setting because it asks for just that. `None` where there is none, and where
/// the application may win: there it is noted who does.
#[must_use]
pub fn agreeing(kind: u8, traits: u8, setting: &Setting) -> Option<u32> {
    let asked = Asked::read(kind, traits, 4, &words_of(setting.value))?;
    let is_it = setting.form == form::SET
        && setting.on_conflict != on_conflict::ALLOW
        && judge(kind, setting, &asked).verdict == verdict::NONE;
    is_it.then_some(setting.value)
}

/// Judges a call that `setting` governs.
#[inline(always)]
#[must_use]
pub fn judge(kind: u8, setting: &Setting, asked: &Asked) -> Judgement {
    let none = Judgement { verdict: verdict::NONE, given: Value::UNKNOWN };
    let (replaced_by, replacing) = match setting.form {
        form::SET => {
            if kind == kind::TEXT {
                if setting.text == asked.text {
                    return none;
                }
                (Value::text(setting.text), verdict::REWRITTEN)
            } else {
                // A number that does not fit 32 bits disagrees with any policy.
                let fits = asked.number >= i64::from(i32::MIN) && asked.number <= i64::from(u32::MAX);
                let word = asked.number as u32;
                if fits && (word ^ setting.value) & setting.mask == 0 {
                    return none;
                }
                (Value::int(setting.apply_to(word)), verdict::REWRITTEN)
            }
        }
        form::LIMIT => {
            let clamped = if asked.number < setting.min {
                setting.min
            } else if asked.number > setting.max {
                setting.max
            } else {
                return none;
            };
            (Value::number(kind, clamped), verdict::CLAMPED)
        }
        form::DENY => return Judgement { verdict: verdict::DENIED, given: Value::UNKNOWN },
        _ => return none,
    };
    match setting.on_conflict {
        on_conflict::REWRITE => Judgement { verdict: replacing, given: replaced_by },
        on_conflict::IGNORE => Judgement { verdict: verdict::IGNORED, given: Value::UNKNOWN },
        on_conflict::DENY => Judgement { verdict: verdict::DENIED, given: Value::UNKNOWN },
        _ => Judgement { verdict: verdict::ALLOWED, given: Value::UNKNOWN },
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

    fn number(kind: u8, traits: u8, value: &[u8]) -> Option<i64> {
        Asked::read(kind, traits, value.len() as i32, &words(value)).map(|asked| asked.number)
    }

    #[test]
    fn argument_is_read_as_the_kernel_reads_it() {
        assert_eq!(number(kind::INT, 0, &(-1i32).to_ne_bytes()), Some(-1));
        assert_eq!(number(kind::UNSIGNED, 0, &(-1i32).to_ne_bytes()), Some(0xffff_ffff));
        assert_eq!(number(kind::BOOL, 0, &7i32.to_ne_bytes()), Some(1));
        assert_eq!(number(kind::INT, 0, &[1, 0]), None, "too short for an int");
        assert_eq!(number(kind::INT, traits::BYTE, &[0xb8]), Some(0xb8));
        assert_eq!(number(kind::INT, traits::BYTE, &[]), Some(0));
        assert_eq!(number(kind::UNSIGNED, traits::WIDE, &(1u64 << 40).to_ne_bytes()), Some(1 << 40));
        assert_eq!(number(kind::UNSIGNED, 0, &(1u64 << 40).to_ne_bytes()), Some(0));
        assert_eq!(number(kind::UNSIGNED, traits::WIDE, &u64::MAX.to_ne_bytes()), Some(0xffff_ffff));
    }

    #[test]
    fn text_ends_at_its_length_or_nul() {
        let read = |len, value: &[u8]| Asked::read(kind::TEXT, 0, len, &words(value)).unwrap().text;
        assert_eq!(read(3, b"bbrxyz"), words(b"bbr"));
        assert_eq!(read(16, b"bbr\0junk"), words(b"bbr"));
        assert_eq!(read(4096, b"0123456789abcdef"), words(b"0123456789abcde"));
        assert_eq!(read(0, b"bbr"), words(b""));
        assert_eq!(Asked::read(kind::TEXT, 0, -1, &words(b"bbr")), None);
        assert_eq!(read(8, b"01234567zz"), words(b"01234567"));
        assert_eq!(read(9, b"01234567zz"), words(b"01234567z"));
        assert_eq!(read(12, b"0123\x001234567"), words(b"0123"));
        assert_eq!(read(12, b"\x80\xff\x01"), words(b"\x80\xff\x01"));
    }

    fn set(value: u32, mask: u32, on_conflict: u8) -> Setting {
        Setting { form: form::SET, value, mask, on_conflict, ..Setting::default() }
    }

    fn asked(number: i64) -> Asked {
        Asked { number, ..Asked::default() }
    }

    #[test]
    fn call_that_asks_for_the_policys_value_agrees() {
        let setting = set(1, u32::MAX, on_conflict::DENY);
        assert_eq!(judge(kind::BOOL, &setting, &asked(1)).verdict, verdict::NONE);
    }

    #[test]
    fn value_of_a_setting_agrees_with_it_unless_it_matters_who_wins() {
        let mask = |mask, value, action| agreeing(kind::INT, 0, &set(value, mask, action));
        assert_eq!(mask(u32::MAX, 7, on_conflict::DENY), Some(7));
        assert_eq!(mask(0xff, 7, on_conflict::REWRITE), Some(7));
        assert_eq!(mask(u32::MAX, 7, on_conflict::ALLOW), None);
        // Read as true, which is 1.
        assert_eq!(agreeing(kind::BOOL, 0, &set(7, u32::MAX, on_conflict::DENY)), None);
        let text = Setting { text: words(b"bbr"), ..set(0, u32::MAX, on_conflict::DENY) };
        assert_eq!(agreeing(kind::TEXT, 0, &text), None);
        let limit = Setting { form: form::LIMIT, min: 0, max: 9, ..Setting::default() };
        assert_eq!(agreeing(kind::INT, 0, &limit), None);
        assert_eq!(agreeing(kind::INT, 0, &Setting { form: form::DENY, ..limit }), None);
    }

    #[test]
    fn each_action_gives_its_verdict() {
        for (action, verdict, given) in [
            (on_conflict::ALLOW, verdict::ALLOWED, Value::UNKNOWN),
            (on_conflict::REWRITE, verdict::REWRITTEN, Value::int(1)),
            (on_conflict::IGNORE, verdict::IGNORED, Value::UNKNOWN),
            (on_conflict::DENY, verdict::DENIED, Value::UNKNOWN),
        ] {
            let judgement = judge(kind::BOOL, &set(1, u32::MAX, action), &asked(0));
            assert_eq!(judgement, Judgement { verdict, given });
        }
    }

    #[test]
    fn bits_outside_the_mask_stay_the_applications() {
        let setting = set(0x20, 0xff, on_conflict::REWRITE);
        assert_eq!(judge(kind::UNSIGNED, &setting, &asked(0x1120)).verdict, verdict::NONE);
        assert_eq!(judge(kind::UNSIGNED, &setting, &asked(0x1133)).given, Value::int(0x1120));
    }

    #[test]
    fn limit_clamps_to_the_nearer_end() {
        let setting =
            Setting { form: form::LIMIT, min: 10, max: 20, on_conflict: on_conflict::REWRITE, ..Setting::default() };
        assert_eq!(judge(kind::INT, &setting, &asked(15)).verdict, verdict::NONE);
        assert_eq!(
            judge(kind::INT, &setting, &asked(9)),
            Judgement { verdict: verdict::CLAMPED, given: Value::int(10) }
        );
        assert_eq!(
            judge(kind::INT, &setting, &asked(99)),
            Judgement { verdict: verdict::CLAMPED, given: Value::int(20) }
        );
    }

    #[test]
    fn times_in_structures_are_limited_as_times() {
        let limit =
            |min, max| Setting { form: form::LIMIT, min, max, on_conflict: on_conflict::REWRITE, ..Setting::default() };
        let judged = |kind, setting: &Setting, words, len| {
            Asked::read(kind, 0, len, &words).map(|asked| judge(kind, setting, &asked).given)
        };
        let linger = |on: u64, seconds: u64| [on | seconds << 32, 0];
        let five_seconds = limit(0, 5);
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 9), 8), Some(Value::new(linger(1, 5), 8)));
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 3), 8), Some(Value::UNKNOWN));
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(0, 9), 8), None, "it is off");
        assert_eq!(judged(kind::LINGER, &five_seconds, linger(1, 9), 4), None, "the kernel refuses it");
        let setting = limit(1_000_000, 2_500_000);
        let given = |words| judged(kind::TIMEVAL, &setting, words, 16);
        assert_eq!(given([9, 0]), Some(Value::new([2, 500_000], 16)));
        assert_eq!(given([0, 0]), Some(Value::new([2, 500_000], 16)), "for ever");
        assert_eq!(given([0, 5]), Some(Value::new([1, 0], 16)));
        assert_eq!(given([u64::MAX, 0]), Some(Value::new([1, 0], 16)), "not at all");
        assert_eq!(given([2, 0]), Some(Value::UNKNOWN));
        assert_eq!(given([i64::MAX as u64, 0]), Some(Value::new([2, 500_000], 16)));
        for (words, len) in [([9, 0], 8), ([9, 1_000_000], 16)] {
            assert_eq!(judged(kind::TIMEVAL, &setting, words, len), None, "the kernel refuses it");
        }
    }

    #[test]
    fn deny_denies_whatever_is_asked() {
        let setting = Setting { form: form::DENY, ..Setting::default() };
        assert_eq!(judge(kind::OPAQUE, &setting, &asked(0)).verdict, verdict::DENIED);
    }

    #[test]
    fn zeroed_setting_is_inert() {
        assert_eq!(judge(kind::INT, &Setting::default(), &asked(5)).verdict, verdict::NONE);
    }
}
