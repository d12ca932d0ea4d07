//! The value of one option: as written in the file → as passed to the kernel.
//!
//! Takes kinds and ranges from the option table. Does not know about rules.

use std::ops::RangeInclusive;

use toml::de::{DeInteger, DeValue};

use crate::{
    options::{DSCP_MASK, SocketOption, ValueKind},
    policy::{
        diagnostic::{Problem, quote},
        file::{Value, type_of},
        model::Wanted,
        units,
    },
};

/// Longest name of a congestion control or a device: `TCP_CA_NAME_MAX` and `IFNAMSIZ`, less the NUL.
const NAME_MAX: usize = abi::setting::TEXT_LEN - 1;

/// Returns the value that `set` wants.
pub(super) fn wanted(option: &SocketOption, value: &Value<'_>) -> Result<Wanted, Problem> {
    let result = match option.value {
        ValueKind::Bool => boolean(option, value).map(|on| whole(u32::from(on))),
        ValueKind::Dscp => dscp(option, value).map(|value| Wanted::Number { value, mask: DSCP_MASK }),
        ValueKind::Mark => mark(option, value).map(|(value, mask)| Wanted::Number { value, mask }),
        ValueKind::CongestionControl => text(option, value).and_then(congestion_control).map(Wanted::Text),
        ValueKind::Device => text(option, value).and_then(device).map(Wanted::Text),
        // None of these can be set.
        ValueKind::Opaque(_) | ValueKind::Linger | ValueKind::Timeval => Err(wrong_type(option, value)),
        // Negative numbers are passed as the kernel reads them: an `int` in 32 bits.
        _ => number(option, value).map(|number| whole(number as u32)),
    };
    result.map_err(|problem| problem.at(value.span()))
}

/// Returns a number in the option's own unit and range.
pub(super) fn number(option: &SocketOption, value: &Value<'_>) -> Result<i64, Problem> {
    let number = match value.get_ref() {
        DeValue::Integer(number) => with_unit(option, integer(number)).map_err(|problem| problem.at(value.span()))?,
        // Without units, a number in quotes is a wrong type.
        DeValue::String(text)
            if !matches!(
                option.value,
                ValueKind::Int | ValueKind::Unsigned | ValueKind::Interface | ValueKind::Choice(_)
            ) =>
        {
            units::quantity(option.value, text)
                .map_err(|problem| Problem { message: format!("{}: {}", option.name, problem.message), ..problem })
                .map_err(|problem| problem.at(value.span()))?
        }
        _ => return Err(wrong_type(option, value)),
    };
    let (min, max) = option.range;
    if (min..=max).contains(&number) {
        return Ok(number);
    }
    let shown = match value.get_ref() {
        DeValue::String(text) => text.clone().into_owned(),
        DeValue::Integer(number) => number.to_string(),
        _ => String::new(),
    };
    Err(Problem::new(format!("{} cannot be {}", option.name, quote(&shown)))
        .help(units::show_range(option.value, option.range))
        .at(value.span()))
}

/// Refuses a number without a unit, except 0, if the kind needs units.
fn with_unit(option: &SocketOption, number: i64) -> Result<i64, Problem> {
    if number == 0 || !units::needs_unit(option.value) {
        return Ok(number);
    }
    Err(Problem::new(format!("{} takes a unit: {number} has none", option.name))
        .help(units::readings(option.value, number)))
}

fn whole(value: u32) -> Wanted {
    Wanted::Number { value, mask: u32::MAX }
}

/// Returns a number, or the nearest `i64` if it does not fit; no option takes either extreme.
pub(super) fn integer(number: &DeInteger<'_>) -> i64 {
    let negative = number.as_str().starts_with('-');
    let saturated = if negative { i64::MIN } else { i64::MAX };
    i64::from_str_radix(number.as_str(), number.radix()).unwrap_or(saturated)
}

/// Returns an integer of the file if it is in the range.
pub(super) fn integer_in(number: &DeInteger<'_>, range: RangeInclusive<i64>) -> Option<i64> {
    Some(integer(number)).filter(|number| range.contains(number))
}

fn wrong_type(option: &SocketOption, value: &Value<'_>) -> Problem {
    let found = type_of(value.get_ref());
    let problem =
        Problem::new(format!("{} takes {}, not {found}", option.name, option.value.describe())).at(value.span());
    match value.get_ref() {
        DeValue::String(text) if option.value == ValueKind::Bool && (text == "true" || text == "false") => {
            problem.help(format!("write {text} without quotes"))
        }
        DeValue::String(text) if option.can_be_limited() && text.parse::<i64>().is_ok() => {
            problem.help(format!("write {text} without quotes"))
        }
        DeValue::Integer(number) if option.value == ValueKind::Bool => {
            problem.help(format!("write {}", integer(number) != 0))
        }
        _ if !option.example.is_empty() => problem.help(format!("write {} = {}", option.name, option.example)),
        _ => problem,
    }
}

fn boolean(option: &SocketOption, value: &Value<'_>) -> Result<bool, Problem> {
    value.get_ref().as_bool().ok_or_else(|| wrong_type(option, value))
}

fn text<'v>(option: &SocketOption, value: &'v Value<'_>) -> Result<&'v str, Problem> {
    value.get_ref().as_str().ok_or_else(|| wrong_type(option, value))
}

fn dscp(option: &SocketOption, value: &Value<'_>) -> Result<u32, Problem> {
    match value.get_ref() {
        DeValue::Integer(number) => units::dscp_by_number(integer(number)),
        DeValue::String(name) => units::dscp_by_name(name),
        _ => Err(wrong_type(option, value)),
    }
}

fn mark(option: &SocketOption, value: &Value<'_>) -> Result<(u32, u32), Problem> {
    match value.get_ref() {
        DeValue::Integer(number) => {
            let mark = u32::try_from(integer(number)).ok().ok_or_else(|| {
                Problem::new(format!("a mark has 32 bits: {} does not fit", quote(&number.to_string())))
                    .help("write a number from 0 to 0xffffffff")
            })?;
            Ok((mark, u32::MAX))
        }
        DeValue::String(text) => units::mark(text),
        _ => Err(wrong_type(option, value)),
    }
}

fn short(name: &str, what: &str) -> Result<(), Problem> {
    if name.is_empty() {
        return Err(Problem::new(format!("the name of {what} is empty")).help("remove the option, or write a name"));
    }
    if name.len() > NAME_MAX {
        let message = format!("{} is {} bytes long, which is too long for the name of {what}", quote(name), name.len());
        return Err(Problem::new(message).help(format!("write a name of at most {NAME_MAX} bytes")));
    }
    Ok(())
}

fn congestion_control(name: &str) -> Result<String, Problem> {
    short(name, "a congestion control")?;
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if name.chars().all(known) {
        return Ok(name.to_owned());
    }
    let problem = Problem::new(format!("{} is not the name of a congestion control", quote(name)));
    let lower = name.to_ascii_lowercase();
    Err(if lower.chars().all(known) {
        problem.help(format!("write \"{lower}\""))
    } else {
        problem.help("list them: sysctl net.ipv4.tcp_available_congestion_control")
    })
}

/// Checks a name as `dev_valid_name` in net/core/dev.c does.
fn device(name: &str) -> Result<String, Problem> {
    short(name, "a network interface")?;
    let strange = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name == "." || name == ".." || name.contains(strange) {
        return Err(
            Problem::new(format!("{} is not the name of a network interface", quote(name))).help("list them: ip link")
        );
    }
    Ok(name.to_owned())
}
