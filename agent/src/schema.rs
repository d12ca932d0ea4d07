//! What all lines of JSON output have in common.
//!
//! docs/events.md describes each kind of line. Two kinds of line that have a field of the same name give that field the same
//! type and meaning.

use serde_json::{Value, json};

/// The version of the format. A field that is added does not change the version.
pub const VERSION: u32 = 1;

/// Returns a line of a kind: an object with these fields, the version and the kind.
#[must_use]
pub fn line(event: &str, fields: Value) -> Value {
    let mut line = json!({ "schema": VERSION, "event": event });
    if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
        line.extend(fields);
    }
    line
}

/// Returns a line of a kind that reports what happened at a time.
#[must_use]
pub fn line_at(time: jiff::Timestamp, event: &str, fields: Value) -> Value {
    let mut line = line(event, fields);
    line["time"] = time_text(time).into();
    line
}

/// Returns a time as RFC 3339 text in UTC, with microseconds.
#[must_use]
pub fn time_text(time: jiff::Timestamp) -> String {
    format!("{time:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_has_its_kind_the_version_and_the_time() {
        let time = jiff::Timestamp::from_second(1).unwrap();
        let expected = json!({ "schema": 1, "event": "loss", "time": "1970-01-01T00:00:01.000000Z", "count": 3 });
        assert_eq!(line_at(time, "loss", json!({ "count": 3 })), expected);
    }
}
