//! Values as users write them and as they are shown: `"60s"`, `"4MiB"`, `"200mbit"`, `"AF21"`, `"0x20/0xff"`.
//!
//! This module knows units and names. It does not know options, nor which values an option takes.
//!
//! Invariant: the output of [`show`] parses to the same value.

use crate::{
    options::{DSCP_MASK, DSCP_NAMES, UNLIMITED, ValueKind},
    policy::diagnostic::{Problem, nearest, quote},
};

/// A family of units.
#[derive(Clone, Copy, Debug)]
struct Scale {
    /// Each unit, and its size in the smallest one.
    units: &'static [(&'static str, i64)],
    /// The size of the option's own unit.
    own: i64,
    /// The name of the option's own unit, for messages.
    own_name: &'static str,
    /// The units to choose from, for messages.
    choice: &'static str,
}

const TIMES: &[(&str, i64)] = &[("us", 1), ("ms", 1000), ("s", 1_000_000), ("min", 60_000_000), ("h", 3_600_000_000)];
const TIMES_CHOICE: &str = "`us`, `ms`, `s`, `min` or `h`";

const SIZES: &[(&str, i64)] = &[
    ("B", 1),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// In bits per second.
const RATES: &[(&str, i64)] = &[
    ("bit", 1),
    ("kbit", 1000),
    ("mbit", 1_000_000),
    ("gbit", 1_000_000_000),
    ("B/s", 8),
    ("kB/s", 8000),
    ("MB/s", 8_000_000),
    ("GB/s", 8_000_000_000),
];

fn scale(kind: ValueKind) -> Option<Scale> {
    let times = |own, own_name| Scale { units: TIMES, own, own_name, choice: TIMES_CHOICE };
    match kind {
        ValueKind::Seconds | ValueKind::Linger => Some(times(1_000_000, "seconds")),
        ValueKind::Milliseconds => Some(times(1000, "milliseconds")),
        ValueKind::Microseconds | ValueKind::Timeval => Some(times(1, "microseconds")),
        ValueKind::Bytes => Some(Scale {
            units: SIZES,
            own: 1,
            own_name: "bytes",
            choice: "`kB`, `MB`, `GB` (powers of 1000) or `KiB`, `MiB`, `GiB` (powers of 1024)",
        }),
        ValueKind::Rate => Some(Scale {
            units: RATES,
            own: 8,
            own_name: "bytes per second",
            choice: "`kbit`, `mbit`, `gbit` (bits per second) or `kB/s`, `MB/s`, `GB/s` (bytes per second)",
        }),
        _ => None,
    }
}

/// Parses a number with a unit. The result is in the option's own unit.
///
/// Numbers outside the range of `i64` become the largest or smallest `i64`, which no option takes.
///
/// # Errors
///
/// Fails if the text is not a number with a unit of `kind`, or not a whole number of the option's own unit.
pub fn quantity(kind: ValueKind, text: &str) -> Result<i64, Problem> {
    if kind == ValueKind::Rate && text == "unlimited" {
        return Ok(i64::from(UNLIMITED));
    }
    let Some(scale) = scale(kind) else {
        return Err(Problem::new(format!("{} is a string, not {}", quote(text), kind.describe())));
    };
    let (number, unit) = number_and_unit(text).ok_or_else(|| {
        Problem::new(format!("{} is not {}", quote(text), kind.describe()))
            .help(format!("write a whole number and a unit: {}", scale.choice))
    })?;
    if unit.is_empty() {
        return Err(Problem::new(format!("{} has no unit", quote(text))).help(readings(kind, number)));
    }
    if unit.starts_with('.') {
        return Err(Problem::new(format!("{} is not a whole number", quote(text)))
            .help(format!("write a whole number of a smaller unit: {}", scale.choice)));
    }
    let Some((_, size)) = scale.units.iter().find(|(name, _)| *name == unit) else {
        return Err(Problem::new(format!("unknown unit {} in {}", quote(unit), quote(text)))
            .help(format!("the units here are {}", scale.choice)));
    };
    in_own_unit(kind, &scale, text, i128::from(number) * i128::from(*size))
}

/// Returns whether a number of this kind needs a unit: options measure times in three units, and rates are written in
/// bits.
#[must_use]
pub fn needs_unit(kind: ValueKind) -> bool {
    scale(kind).is_some() && kind != ValueKind::Bytes
}

/// Returns help about what a number without a unit may mean.
#[must_use]
pub fn readings(kind: ValueKind, number: i64) -> String {
    let Some(scale) = scale(kind) else { return format!("write {number} without quotes") };
    let unit_of = |size| scale.units.iter().find(|(_, known)| *known == size).map_or("", |(unit, _)| *unit);
    let (own, other) = match kind {
        ValueKind::Bytes => {
            return format!("write {number} without quotes for {number} bytes, or add a unit: {}", scale.choice);
        }
        ValueKind::Rate => ("B/s", "bit"),
        ValueKind::Seconds | ValueKind::Linger => ("s", "min"),
        _ => (unit_of(scale.own), "s"),
    };
    let second = match other {
        "bit" => "bits per second",
        "min" => "minutes",
        _ => "seconds",
    };
    format!("write \"{number}{own}\" for {number} {}, or \"{number}{other}\" for {number} {second}", scale.own_name)
}

fn in_own_unit(kind: ValueKind, scale: &Scale, text: &str, smallest: i128) -> Result<i64, Problem> {
    let own = i128::from(scale.own);
    let below = saturate(smallest.div_euclid(own));
    if smallest.rem_euclid(own) == 0 {
        return Ok(below);
    }
    let above = show_literal(kind, below.saturating_add(1));
    let choice = match below {
        0 => above,
        _ => format!("{} or {above}", show_literal(kind, below)),
    };
    Err(Problem::new(format!("{} is not a whole number of {}", quote(text), scale.own_name))
        .help(format!("write {choice}")))
}

fn number_and_unit(text: &str) -> Option<(i64, &str)> {
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    let digits = unsigned.len() - unsigned.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if digits == 0 {
        return None;
    }
    let (number, unit) = text.split_at(text.len() - unsigned.len() + digits);
    let number = number.parse().unwrap_or(if unsigned.len() < text.len() { i64::MIN } else { i64::MAX });
    Some((number, unit.strip_prefix(' ').unwrap_or(unit)))
}

fn saturate(number: i128) -> i64 {
    i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX })
}

/// Returns a value as shown to users: `60s`, `4MiB`, `200mbit`, `AF21`, `0x20`, `5`.
#[must_use]
pub fn show(kind: ValueKind, value: i64) -> String {
    match kind {
        ValueKind::Bool => (value != 0).to_string(),
        ValueKind::Rate if value == i64::from(UNLIMITED) => "unlimited".to_owned(),
        ValueKind::Dscp => show_dscp(value),
        ValueKind::Mark => format!("{value:#x}"),
        ValueKind::Timeval if value == i64::MAX => "forever".to_owned(),
        ValueKind::Seconds | ValueKind::Linger => format!("{value}s"),
        ValueKind::Milliseconds | ValueKind::Microseconds | ValueKind::Timeval => {
            show_scaled(kind, value, &["s", "ms", "us"])
        }
        ValueKind::Bytes => show_scaled(kind, value, &["GiB", "MiB", "KiB"]),
        ValueKind::Rate => show_scaled(kind, value, &["gbit", "mbit", "kbit", "bit"]),
        ValueKind::Int
        | ValueKind::Unsigned
        | ValueKind::Choice(_)
        | ValueKind::CongestionControl
        | ValueKind::Device
        | ValueKind::Interface
        | ValueKind::Opaque(_) => value.to_string(),
    }
}

/// Returns a value as written in a policy: the output of [`show`], in quotes if TOML needs them.
#[must_use]
pub fn show_literal(kind: ValueKind, value: i64) -> String {
    let shown = show(kind, value);
    let bare = shown == "true" || shown == "false" || !shown.contains(|c: char| c.is_ascii_alphabetic());
    if bare || shown.starts_with("0x") { shown } else { format!("\"{shown}\"") }
}

/// Returns help with the range of values.
#[must_use]
pub fn show_range(kind: ValueKind, (min, max): (i64, i64)) -> String {
    let least = show_literal(kind, min);
    if kind == ValueKind::Rate && max == i64::from(UNLIMITED) {
        // Rounded down to a value that policies can write.
        let gigabits = max.saturating_mul(8) / 1_000_000_000;
        return format!("write a rate from {least} to \"{gigabits}gbit\", or \"unlimited\"");
    }
    format!("write a value from {least} to {}", show_literal(kind, max))
}

/// Returns the value in the first unit of which it is a whole number.
fn show_scaled(kind: ValueKind, value: i64, units: &[&str]) -> String {
    let Some(scale) = scale(kind) else { return value.to_string() };
    let smallest = i128::from(value) * i128::from(scale.own);
    for unit in units {
        let size = scale.units.iter().find(|(name, _)| name == unit).map(|(_, size)| i128::from(*size));
        if let Some(size) = size.filter(|size| smallest != 0 && smallest % size == 0) {
            return format!("{}{unit}", smallest / size);
        }
    }
    value.to_string()
}

fn show_dscp(value: i64) -> String {
    match DSCP_NAMES.iter().find(|(_, code)| i64::from(*code) == value) {
        Some((name, _)) => (*name).to_owned(),
        None => format!("{value:#x}"),
    }
}

/// Returns the code point with this name, at its position in the byte. Case is ignored.
///
/// # Errors
///
/// Fails if there is none.
pub fn dscp_by_name(name: &str) -> Result<u32, Problem> {
    if let Some((_, code)) = DSCP_NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        return Ok(u32::from(*code));
    }
    let problem = Problem::new(format!("unknown DSCP name {}", quote(name)));
    if let Some(number) = integer(name) {
        return Err(problem.help(format!("write {number} without quotes, or one of the names such as \"AF21\"")));
    }
    let names = || DSCP_NAMES.iter().map(|(name, _)| *name);
    Err(match nearest(name, names()) {
        Some(near) => problem.help(format!("did you mean \"{near}\"?")),
        None => problem.help(format!("the names are {}", names().collect::<Vec<_>>().join(", "))),
    })
}

/// Returns a code point given as the whole byte.
///
/// # Errors
///
/// Fails if the number does not fit into a byte, or sets one of the two ECN bits.
pub fn dscp_by_number(number: i64) -> Result<u32, Problem> {
    let byte = u32::try_from(number).ok().filter(|byte| *byte <= 0xff);
    let Some(byte) = byte else {
        return Err(Problem::new(format!("{number} does not fit the byte that holds a DSCP"))
            .help("write a name such as \"AF21\", or a number from 0 to 252 whose two lowest bits are 0"));
    };
    if byte & !DSCP_MASK == 0 {
        return Ok(byte);
    }
    let problem = Problem::new(format!("{number} sets one of the two lowest bits, which are ECN"));
    // Probably the six bits alone, as other tools write them.
    let shifted = i64::from(byte) << 2;
    Err(if shifted <= 0xff {
        problem.help(format!("for the code point {number}, write {}", show_literal(ValueKind::Dscp, shifted)))
    } else {
        problem.help(format!("write {:#x}", byte & DSCP_MASK))
    })
}

/// Parses `value` or `value/mask`, decimal or hexadecimal.
///
/// # Errors
///
/// Fails if one of them is not a 32-bit number, or if the value has bits outside the mask.
pub fn mark(text: &str) -> Result<(u32, u32), Problem> {
    let number = |text: &str| integer(text).and_then(|number| u32::try_from(number).ok());
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    let (Some(value), Some(mask)) = (number(value), number(mask)) else {
        return Err(Problem::new(format!("{} is not a 32-bit mark", quote(text)))
            .help("write a number such as 0x20, or \"value/mask\" such as \"0x20/0xff\""));
    };
    if mask == 0 {
        return Err(Problem::new(format!("the mask of {} is 0, so nothing would be set", quote(text)))
            .help(format!("write the bits that the policy sets, such as \"{value:#x}/0xff\"")));
    }
    if value & !mask != 0 {
        let outside = value & !mask;
        return Err(Problem::new(format!("{} has bits outside its mask: {outside:#x}", quote(text))).help(format!(
            "write \"{value:#x}/{:#x}\" or \"{:#x}/{mask:#x}\"",
            mask | value,
            value & mask
        )));
    }
    Ok((value, mask))
}

/// Parses a whole number as in TOML, without signs and underscores.
fn integer(text: &str) -> Option<i64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let only_digits = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    if only_digits { i64::from_str_radix(digits, radix).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WITH_UNITS: [ValueKind; 5] =
        [ValueKind::Seconds, ValueKind::Milliseconds, ValueKind::Microseconds, ValueKind::Bytes, ValueKind::Rate];

    #[test]
    fn quantities_are_in_the_unit_of_the_option() {
        for (kind, text, value) in [
            (ValueKind::Seconds, "60s", 60),
            (ValueKind::Seconds, "2min", 120),
            (ValueKind::Seconds, "3000ms", 3),
            (ValueKind::Milliseconds, "1500ms", 1500),
            (ValueKind::Milliseconds, "1h", 3_600_000),
            (ValueKind::Microseconds, "8000us", 8000),
            (ValueKind::Microseconds, "40 ms", 40_000),
            (ValueKind::Seconds, "-1s", -1),
            (ValueKind::Bytes, "128KiB", 128 << 10),
            (ValueKind::Bytes, "4MiB", 4 << 20),
            (ValueKind::Bytes, "1kB", 1000),
            (ValueKind::Rate, "200mbit", 25_000_000),
            (ValueKind::Rate, "25MB/s", 25_000_000),
            (ValueKind::Rate, "10kbit", 1250),
            (ValueKind::Rate, "unlimited", 0xffff_ffff),
            (ValueKind::Seconds, "99999999999999999999s", 9_223_372_036_854_775_807),
        ] {
            assert_eq!(quantity(kind, text), Ok(value), "{text}");
        }
    }

    /// Returns the message and the help of an error.
    fn refusal<T>(result: Result<T, Problem>) -> (String, String) {
        let problem = result.err().unwrap_or_else(|| Problem::new("accepted"));
        (problem.message, problem.help.unwrap_or_default())
    }

    #[test]
    fn fractions_of_the_unit_are_refused_with_the_nearest_values() {
        let (message, help) = refusal(quantity(ValueKind::Seconds, "1500ms"));
        assert_eq!(message, "`1500ms` is not a whole number of seconds");
        assert_eq!(help, "write \"1s\" or \"2s\"");
        assert_eq!(refusal(quantity(ValueKind::Rate, "1bit")).1, "write \"8bit\"");
    }

    #[test]
    fn texts_that_are_not_quantities_are_refused() {
        for text in ["", "s", "-s", "60", "1.5s", "60S", "60sec", "s60", "60s ", " 60s", "6_0s", "+6s", "٣s"] {
            assert!(quantity(ValueKind::Seconds, text).is_err(), "{text}");
        }
    }

    #[test]
    fn marks_are_numbers_with_or_without_a_mask() {
        assert_eq!(mark("0x20"), Ok((0x20, u32::MAX)));
        assert_eq!(mark("32"), Ok((32, u32::MAX)));
        assert_eq!(mark("0x20/0xff"), Ok((0x20, 0xff)));
        assert_eq!(mark("0/0xff"), Ok((0, 0xff)));
        for text in ["", "/", "0x", "0x1/", "-1", "0x20/0x0f", "1/0", "0x100000000", "1/1/1", "0X20", "+1"] {
            assert!(mark(text).is_err(), "{text}");
        }
    }

    #[test]
    fn code_points_are_names_or_numbers_without_the_ecn_bits() {
        assert_eq!(dscp_by_name("ef"), Ok(0xb8));
        assert_eq!(dscp_by_number(0xb8), Ok(0xb8));
        assert_eq!(refusal(dscp_by_number(46)).1, "for the code point 46, write \"EF\"");
        assert_eq!(refusal(dscp_by_number(0xb9)).1, "write 0xb8");
        assert_eq!(refusal(dscp_by_name("AF24")).1, "did you mean \"AF21\"?");
        assert!(dscp_by_number(-4).is_err());
        assert!(dscp_by_number(256).is_err());
    }

    proptest! {
        #[test]
        fn shown_values_parse_to_the_same_value(kind in prop::sample::select(&WITH_UNITS[..]), value in 1..=i64::from(u32::MAX)) {
            let shown = show(kind, value);
            let parsed = shown.parse().or_else(|_| quantity(kind, &shown));
            prop_assert_eq!(parsed, Ok(value), "{}", shown);
        }

        #[test]
        fn shown_code_points_parse_to_the_same_value(code in 0_u32..64) {
            let shown = show(ValueKind::Dscp, i64::from(code << 2));
            let parsed = integer(&shown).map_or_else(|| dscp_by_name(&shown), dscp_by_number);
            prop_assert_eq!(parsed, Ok(code << 2));
        }

        #[test]
        fn shown_marks_parse_to_the_same_value(value: u32, mask in 1_u32..) {
            let shown = format!("{}/{mask:#x}", show(ValueKind::Mark, i64::from(value & mask)));
            prop_assert_eq!(mark(&shown), Ok((value & mask, mask)));
        }

        #[test]
        fn any_text_is_parsed_without_panic(kind in prop::sample::select(&WITH_UNITS[..]), text: String) {
            let _ = quantity(kind, &text);
            let _ = mark(&text);
            let _ = dscp_by_name(&text);
        }
    }
}
