//! Shows the values of options: as JSON, and as text in the syntax of policies.
//!
//! Decodes values from the kernel, of which events contain at most 16 bytes. This module does not know whether a value
//! was passed or returned, nor the kind of socket.
//!
//! Invariant: a value shorter than its type is not completed by guessing. It is shown as hexadecimal digits, like all
//! values without another form.

mod shape;

use abi::setting::{OptionKey, TEXT_LEN, Value, argument, kind};
use serde_json::{Value as Json, json};

use crate::{
    escape::Escape,
    options::{self, Shape, SocketOption, UNLIMITED, ValueKind},
    policy::{
        model::{Form, Wanted},
        units::show,
    },
};

/// Returns a value from the kernel as JSON; null if it is unknown.
///
/// Numbers are numbers, even if they have names. Names and addresses are strings. Times of two parts are strings in the
/// syntax of policies (`"1500ms"`), since a number would need a unit. Structures are objects with the known fields.
/// Everything else is the hexadecimal digits of the first 16 bytes.
#[must_use]
pub fn json(key: OptionKey, value: &Value) -> Json {
    decode(key, value).json
}

/// Returns a value from the kernel as text.
#[must_use]
pub fn text(key: OptionKey, value: &Value) -> String {
    decode(key, value).text
}

/// Returns the first 16 bytes of a value, in memory order, as hexadecimal digits.
#[must_use]
pub fn bytes_text(value: &Value) -> String {
    hex_digits(Captured::new(value, &value.bytes()).bytes)
}

/// Returns the text of what a policy wants for an option.
#[must_use]
pub fn form_text(key: OptionKey, form: &Form) -> String {
    let kind = kind_of(key);
    match form {
        Form::Set(Wanted::Text(text)) => text.escaped().to_string(),
        Form::Set(Wanted::Number { value, .. }) => match mask(key, form) {
            Some(mask) => format!("{value:#x}/{mask:#x}"),
            None => show(kind, number(kind, *value)),
        },
        Form::Limit { min, max } => format!("{} to {}", show(kind, *min), show(kind, *max)),
        Form::Deny => "denied".to_owned(),
        Form::Free => "free".to_owned(),
    }
}

/// Returns the text of a number of an option, as policies write it.
#[must_use]
pub fn number_text(key: OptionKey, number: i64) -> String {
    show(kind_of(key), number)
}

/// Returns the JSON fields for what a policy wants of an option: `form`, and either `wanted`, in the form that [`json()`] uses,
/// or `limit`. A mark of which the policy sets only some bits also has `mask`.
#[must_use]
pub fn form_fields(key: OptionKey, form: &Form) -> Json {
    let kind = kind_of(key);
    match form {
        Form::Set(Wanted::Text(text)) => json!({ "form": "set", "wanted": text }),
        Form::Set(Wanted::Number { value, .. }) => match mask(key, form) {
            Some(mask) => json!({ "form": "set", "wanted": value, "mask": mask }),
            None => json!({ "form": "set", "wanted": number(kind, *value) }),
        },
        Form::Limit { min, max } => json!({ "form": "limit", "limit": { "min": min, "max": max } }),
        Form::Deny => json!({ "form": "deny" }),
        Form::Free => json!({ "form": "free" }),
    }
}

/// Returns the bits that a policy sets, if it sets only some bits of an option (SO_MARK).
#[must_use]
pub fn mask(key: OptionKey, form: &Form) -> Option<u32> {
    match form {
        Form::Set(Wanted::Number { mask, .. }) if kind_of(key) == ValueKind::Mark && *mask != u32::MAX => Some(*mask),
        _ => None,
    }
}

/// Returns the unit of an option's numbers in JSON; `None` if they have no unit.
#[must_use]
pub fn unit(key: OptionKey) -> Option<&'static str> {
    match kind_of(key) {
        ValueKind::Seconds | ValueKind::Linger => Some("s"),
        ValueKind::Milliseconds => Some("ms"),
        ValueKind::Microseconds | ValueKind::Timeval => Some("us"),
        ValueKind::Bytes => Some("bytes"),
        ValueKind::Rate => Some("bytes/s"),
        _ => None,
    }
}

/// Returns whether a value enables an option (is not 0); `None` if it is not a number.
#[must_use]
pub fn is_on(option: &SocketOption, value: &Value) -> Option<bool> {
    let bytes = value.bytes();
    read_number(option, Captured::new(value, &bytes).bytes).map(|number| number != 0)
}

/// A value in both forms.
struct Shown {
    json: Json,
    text: String,
}

impl Shown {
    /// Returns a value whose text is that of its JSON.
    fn plain(json: Json) -> Self {
        let text = json.as_str().map_or_else(|| json.to_string(), str::to_owned);
        Self { json, text }
    }
}

/// The available bytes of a value: all of them, or the first [`TEXT_LEN`].
struct Captured<'a> {
    bytes: &'a [u8],
    /// The length of the whole value.
    len: usize,
}

impl<'a> Captured<'a> {
    fn new(value: &Value, bytes: &'a [u8; TEXT_LEN]) -> Self {
        let len = value.len as usize;
        let known = if value.known == 0 { TEXT_LEN } else { value.known as usize };
        Self { bytes: &bytes[..len.min(TEXT_LEN).min(known)], len }
    }

    fn is_cut(&self) -> bool {
        self.len > self.bytes.len()
    }
}

fn kind_of(key: OptionKey) -> ValueKind {
    options::by_key(key).map_or(ValueKind::Opaque(Shape::Bytes), |option| option.value)
}

fn decode(key: OptionKey, value: &Value) -> Shown {
    let bytes = value.bytes();
    let captured = Captured::new(value, &bytes);
    if captured.len == 0 {
        return Shown { json: Json::Null, text: "unknown".to_owned() };
    }
    let shown = options::by_key(key).and_then(|option| match option.value {
        ValueKind::Opaque(shape) => shape::decode(shape, &captured),
        ValueKind::Linger => shape::linger(captured.bytes),
        ValueKind::Timeval => shape::timeval(captured.bytes),
        ValueKind::CongestionControl | ValueKind::Device => Some(chars(&captured)),
        kind => read_number(option, captured.bytes).map(|number| named(kind, number)),
    });
    shown.unwrap_or_else(|| hex(&captured))
}

/// Returns the value as a number, in the option's own unit.
fn read_number(option: &SocketOption, bytes: &[u8]) -> Option<i64> {
    let takes_byte = matches!(option.argument, argument::BYTE | argument::BYTE_REQUIRED);
    match *bytes {
        [a, b, c, d, e, f, g, h, ..] if option.argument == argument::RATE => {
            match u64::from_ne_bytes([a, b, c, d, e, f, g, h]) {
                u64::MAX => Some(i64::from(UNLIMITED)),
                wide => i64::try_from(wide).ok(),
            }
        }
        [a, b, c, d, ..] => Some(number(option.value, u32::from_ne_bytes([a, b, c, d]))),
        [byte] if takes_byte => Some(byte.into()),
        _ => None,
    }
}

/// Returns the 32 bits of a value as the kernel reads them.
fn number(kind: ValueKind, word: u32) -> i64 {
    if kind.abi_kind() == kind::UNSIGNED { i64::from(word) } else { i64::from(word as i32) }
}

fn named(kind: ValueKind, number: i64) -> Shown {
    let name = match kind {
        ValueKind::Choice(names) => names.iter().find(|(_, named)| *named == number).map(|(name, _)| *name),
        _ => None,
    };
    Shown { json: json!(number), text: name.map_or_else(|| show(kind, number), str::to_owned) }
}

/// Returns the characters up to a NUL or the end. They come from an application, so the text is escaped.
fn chars(captured: &Captured<'_>) -> Shown {
    let end = captured.bytes.iter().position(|byte| *byte == 0);
    let bytes = &captured.bytes[..end.unwrap_or(captured.bytes.len())];
    let chars = String::from_utf8_lossy(bytes);
    let rest = if end.is_none() && captured.is_cut() { "…" } else { "" };
    let text = if chars.is_empty() { "\"\"".to_owned() } else { format!("{}{rest}", bytes.escaped()) };
    Shown { json: json!(chars), text }
}

fn hex(captured: &Captured<'_>) -> Shown {
    let hex = hex_digits(captured.bytes);
    let rest = if captured.is_cut() { "…" } else { "" };
    Shown { text: format!("{hex}{rest}"), json: json!(hex) }
}

fn hex_digits(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

/// Returns a duration in the largest unit that it fills.
#[must_use]
pub fn duration_text(nanoseconds: u64) -> String {
    let units = [("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1000)];
    match units.into_iter().find(|(_, size)| nanoseconds >= *size) {
        Some((unit, size)) => format!("{:.1}{unit}", nanoseconds as f64 / size as f64),
        None => format!("{nanoseconds}ns"),
    }
}

#[cfg(test)]
mod tests {
    use abi::setting::words_of_text;

    use super::*;
    use crate::options::OPTIONS;

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
    fn names_of_numbers_are_only_in_the_text() {
        for (name, value, shown) in [
            ("SO_TYPE", 1, "SOCK_STREAM"),
            ("SO_TYPE", 99, "99"),
            ("SO_DOMAIN", 10, "AF_INET6"),
            ("SO_PROTOCOL", 262, "IPPROTO_MPTCP"),
            ("SO_PROTOCOL", 0, "0"),
            ("IP_MTU_DISCOVER", 2, "IP_PMTUDISC_DO"),
            ("IPV6_MTU_DISCOVER", 2, "IPV6_PMTUDISC_DO"),
            ("SO_ERROR", 111, "ECONNREFUSED"),
            ("SO_ERROR", 0, "0"),
            ("SO_ATTACH_BPF", 7, "7"),
        ] {
            assert_eq!(text(key(name), &Value::int(value)), shown, "{name} {value}");
            assert_eq!(json(key(name), &Value::int(value)), value, "{name} {value}");
        }
    }

    #[test]
    fn names_end_at_their_nul_and_are_escaped() {
        let bbr = Value::text(words_of_text(b"bbr"));
        assert_eq!(text(key("TCP_CONGESTION"), &bbr), "bbr");
        assert_eq!(text(key("TCP_ULP"), &of(b"tls", 3)), "tls");
        assert_eq!(text(key("SO_BINDTODEVICE"), &of(b"\0", 1)), "\"\"");
        assert_eq!(text(key("TCP_CONGESTION"), &of(b"\x1b[2J", 4)), "\\u{1b}[2J");
        let label = of(b"system_u:object_r:http_t", 24);
        assert_eq!(text(key("SO_PEERSEC"), &label), "system_u:object_…");
        assert_eq!(json(key("SO_PEERSEC"), &label), "system_u:object_");
        assert_eq!(text(key("TCP_CONGESTION"), &of(b"cubic\0and more than", 64)), "cubic");
    }

    #[test]
    fn unknown_values_are_hexadecimal_and_truncation_is_marked_in_the_text() {
        assert_eq!(json(OptionKey { level: 6, name: 99 }, &Value::int(1)), "0x01000000");
        let info = of(&[1, 7], 232);
        assert_eq!(json(key("TCP_INFO"), &info), "0x01070000000000000000000000000000");
        assert_eq!(text(key("TCP_INFO"), &info), "0x01070000000000000000000000000000…");
        assert_eq!(text(key("TCP_INFO"), &of(&[1, 7], 2)), "0x0107");
    }

    #[test]
    fn limits_of_times_in_two_parts_have_a_unit() {
        assert_eq!(unit(key("SO_RCVTIMEO")), Some("us"));
        let limit = Form::Limit { min: 0, max: 5_000_000 };
        assert_eq!(
            form_fields(key("SO_RCVTIMEO"), &limit),
            json!({ "form": "limit", "limit": { "min": 0, "max": 5_000_000 } })
        );
    }

    #[test]
    fn rates_have_four_bytes_or_eight() {
        let rate = key("SO_MAX_PACING_RATE");
        assert_eq!(text(rate, &of(&25_000_000_u64.to_ne_bytes(), 8)), "200mbit");
        assert_eq!(text(rate, &of(&(1_u64 << 40).to_ne_bytes(), 8)), "8796093022208bit");
        assert_eq!(text(rate, &of(&[0xff; 8], 8)), "unlimited");
    }

    #[test]
    fn short_and_unknown_values_are_not_guessed() {
        assert_eq!(json(key("IP_TOS"), &of(&[0xb8], 1)), 0xb8);
        assert_eq!(text(key("IP_TOS"), &of(&[0xb8, 0], 2)), "0xb800");
        assert_eq!(json(key("TCP_NODELAY"), &Value::UNKNOWN), Json::Null);
        for option in OPTIONS {
            let Some(size) = size(option.value) else { continue };
            let takes_byte = matches!(option.argument, argument::BYTE | argument::BYTE_REQUIRED);
            let shortest = if takes_byte { 2 } else { 1 };
            for len in shortest..size {
                let value = of(&[2; TEXT_LEN], len);
                let hex = format!("0x{}", "02".repeat(len.min(TEXT_LEN)));
                assert_eq!(json(option.key(), &value), hex, "{len} bytes of {}", option.name);
            }
        }
    }

    /// Returns the smallest size of a value of this kind; `None` if any length is valid.
    fn size(kind: ValueKind) -> Option<usize> {
        match kind {
            ValueKind::CongestionControl | ValueKind::Device => None,
            ValueKind::Opaque(shape) => match shape {
                Shape::Bytes | Shape::Text => None,
                Shape::Errno | Shape::Descriptor | Shape::InterfaceIndex | Shape::MulticastInterface => Some(4),
                Shape::Wide | Shape::Membership => Some(8),
                Shape::Credentials | Shape::SourceMembership => Some(12),
                Shape::SocketAddress => Some(16),
                Shape::Ipv6Membership | Shape::Ipv6PacketInfo => Some(20),
            },
            ValueKind::Linger | ValueKind::Timeval => Some(8),
            _ => Some(4),
        }
    }

    /// Returns a value of `len` bytes that begins with these.
    fn of(bytes: &[u8], len: usize) -> Value {
        let mut captured = [0; TEXT_LEN];
        let known = bytes.len().min(TEXT_LEN);
        captured[..known].copy_from_slice(&bytes[..known]);
        let (words, _) = captured.as_chunks();
        Value::new([u64::from_ne_bytes(words[0]), u64::from_ne_bytes(words[1])], len as u32)
    }

    #[test]
    fn durations_are_in_their_natural_unit() {
        assert_eq!(duration_text(999), "999ns");
        assert_eq!(duration_text(1500), "1.5µs");
        assert_eq!(duration_text(2_500_000), "2.5ms");
        assert_eq!(duration_text(3_000_000_000), "3.0s");
    }
}
