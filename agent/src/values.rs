//! How values of options are shown: as JSON, and as people write them in a policy.

use abi::setting::{OptionKey, TEXT_LEN, Value, kind};
use serde_json::json;

use crate::{
    options::{self, UNLIMITED, ValueKind},
    policy::{
        model::{Form, Wanted},
        units::show,
    },
};

/// A value as it crossed from the kernel, for programs: a number, a string, or null where it is not
/// known. What is neither a number nor a name is shown as hex, its first 16 bytes.
#[must_use]
pub fn json(key: OptionKey, value: &Value) -> serde_json::Value {
    match decode(key, value) {
        Decoded::Unknown => serde_json::Value::Null,
        Decoded::Number(number) => json!(number),
        Decoded::Text(text) => json!(text),
        Decoded::Bytes(hex) => json!(hex),
    }
}

/// A value as it crossed from the kernel, for people.
#[must_use]
pub fn text(key: OptionKey, value: &Value) -> String {
    match decode(key, value) {
        Decoded::Unknown => "unknown".to_owned(),
        Decoded::Number(number) => show(kind_of(key), number),
        Decoded::Text(text) => text,
        Decoded::Bytes(hex) => hex,
    }
}

/// What a policy wants of an option, for people.
#[must_use]
pub fn form_text(key: OptionKey, form: &Form) -> String {
    let kind = kind_of(key);
    match form {
        Form::Set(Wanted::Text(text)) => text.clone(),
        Form::Set(Wanted::Number { value, mask }) if kind == ValueKind::Mark && *mask != u32::MAX => {
            format!("{value:#x}/{mask:#x}")
        }
        Form::Set(Wanted::Number { value, .. }) => show(kind, number(kind, *value)),
        Form::Limit { min, max } => format!("{} to {}", show(kind, *min), show(kind, *max)),
        Form::Deny => "denied".to_owned(),
    }
}

enum Decoded {
    Unknown,
    Number(i64),
    Text(String),
    Bytes(String),
}

fn kind_of(key: OptionKey) -> ValueKind {
    options::by_key(key).map_or(ValueKind::Opaque, |option| option.value)
}

fn decode(key: OptionKey, value: &Value) -> Decoded {
    let kind = kind_of(key);
    let len = value.len as usize;
    let bytes = &value.bytes()[..len.min(TEXT_LEN)];
    match (kind.abi_kind(), bytes) {
        (_, []) => Decoded::Unknown,
        (kind::TEXT, _) => {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            Decoded::Text(String::from_utf8_lossy(&bytes[..end]).into_owned())
        }
        (kind::OPAQUE, _) => Decoded::Bytes(hex(bytes)),
        (_, &[a, b, c, d, e, f, g, h]) if kind == ValueKind::Rate => {
            let wide = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
            Decoded::Number(i64::try_from(wide).unwrap_or(i64::from(UNLIMITED)))
        }
        (_, &[a, b, c, d, ..]) => Decoded::Number(number(kind, u32::from_ne_bytes([a, b, c, d]))),
        (_, &[byte, ..]) => Decoded::Number(byte.into()),
    }
}

/// The 32 bits of a value as the kernel reads them.
fn number(kind: ValueKind, word: u32) -> i64 {
    if kind.abi_kind() == kind::UNSIGNED { i64::from(word) } else { i64::from(word as i32) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use abi::setting::words_of_text;

    use super::*;

    fn key(name: &str) -> OptionKey {
        options::by_name(name).unwrap().key()
    }

    #[test]
    fn numbers_are_shown_in_the_unit_of_the_option() {
        for (name, value, shown) in [
            ("TCP_NODELAY", 1, "true"),
            ("TCP_KEEPIDLE", 60, "60s"),
            ("TCP_USER_TIMEOUT", 1500, "1500ms"),
            ("TCP_BPF_RTO_MIN", 40_000, "40ms"),
            ("SO_SNDBUF", 128 * 1024, "128KiB"),
            ("SO_SNDBUF", 0, "0"),
            ("SO_MAX_PACING_RATE", 25_000_000, "200mbit"),
            ("SO_MAX_PACING_RATE", u32::MAX, "unlimited"),
            ("IP_TOS", 0x48, "AF21"),
            ("IP_TOS", 0x49, "0x49"),
            ("SO_MARK", 0x20, "0x20"),
            ("SO_PRIORITY", u32::MAX, "-1"),
        ] {
            assert_eq!(text(key(name), &Value::int(value)), shown, "{name} {value}");
        }
    }

    #[test]
    fn names_end_at_their_nul_and_structures_are_hex() {
        let bbr = Value::text(words_of_text(b"bbr"));
        assert_eq!(text(key("TCP_CONGESTION"), &bbr), "bbr");
        assert_eq!(json(key("SO_LINGER"), &Value::new([0x0000_0005_0000_0001, 0], 8)), "0x0100000005000000");
        assert_eq!(json(OptionKey { level: 6, name: 99 }, &Value::int(1)), "0x01000000");
    }

    #[test]
    fn short_and_unknown_values_are_not_made_up() {
        assert_eq!(json(key("IP_TOS"), &Value::new([0xb8, 0], 1)), 0xb8);
        assert_eq!(json(key("TCP_NODELAY"), &Value::UNKNOWN), serde_json::Value::Null);
    }
}
