//! Parses strace's output strictly: an unexpected line fails the test.

use std::{fs, path::Path};

use super::{Calls, SHOWN, Seen, Value};

/// Returns the strace command for a command and all its children, with a file `TRACE.THREAD` for each thread.
///
/// Numbers are raw and strings in hexadecimal, so there are no names or escapes to parse. With the seccomp filter,
/// strace stops threads only for the traced calls.
pub(super) fn command(trace: &str) -> Vec<&str> {
    let calls = "trace=setsockopt,getsockopt";
    // As many bytes as `SHOWN`.
    vec!["strace", "-ff", "--seccomp-bpf", "-X", "raw", "-xx", "-s", "16", "-e", calls, "-o", trace]
}

/// Reads these files.
pub(super) fn read(trace: &Path) -> Calls {
    let name = trace.file_name().unwrap().to_str().unwrap();
    let mut calls = Calls::new();
    for entry in fs::read_dir(trace.parent().unwrap()).unwrap().flatten() {
        let file = entry.file_name().into_string().unwrap();
        let Some(thread) = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let text = fs::read_to_string(entry.path()).unwrap();
        // The trace also has signals and exits.
        let lines = text.lines().filter(|line| !line.starts_with("---") && !line.starts_with("+++"));
        let seen: Vec<Seen> = lines.map(|line| call(line).unwrap_or_else(|| panic!("strace says: {line}"))).collect();
        if !seen.is_empty() {
            calls.insert(thread.parse().unwrap(), seen);
        }
    }
    calls
}

/// Parses a line such as `setsockopt(3, 0x6, 0x1, [1], 4) = -1 EINVAL (Invalid argument)`.
fn call(line: &str) -> Option<Seen> {
    let (call, rest) = line.split_once('(')?;
    let (arguments, result) = rest.split_once(" = ")?;
    let mut parts = arguments.trim_end().strip_suffix(')')?.splitn(4, ", ");
    let (_fd, level, optname) = (parts.next()?, number(parts.next()?)?, number(parts.next()?)?);
    let (value, len) = parts.next()?.rsplit_once(", ")?;
    let error = match result.split(' ').collect::<Vec<_>>().as_slice() {
        ["0"] => "",
        ["-1", name, ..] => name,
        _ => return None,
    };
    let value = match bytes(value)? {
        Shown::Address => None,
        Shown::Bytes(bytes) => Some(Value { len: length(len)?, bytes }),
    };
    Some(Seen { call: call.to_owned(), level, optname, error: error.to_owned(), value })
}

/// Parses the length of an argument, after the call if that changed it: `4`, `[4]` or `[16 => 4]`.
fn length(text: &str) -> Option<u32> {
    let Some(list) = text.strip_prefix('[') else { return text.parse().ok() };
    let list = list.strip_suffix(']')?;
    list.split_once(" => ").map_or(list, |(_, after)| after).parse().ok()
}

enum Shown {
    /// strace could not read the argument, or shows only its address because the call failed.
    Address,
    /// The bytes of the argument, up to [`SHOWN`].
    Bytes(Vec<u8>),
}

fn bytes(value: &str) -> Option<Shown> {
    if value == "NULL" || value.starts_with("0x") {
        return Some(Shown::Address);
    }
    let bytes = if let Some(text) = value.strip_prefix('"') {
        hex(text.strip_suffix("...").unwrap_or(text).strip_suffix('"')?)?
    } else if let Some(word) = value.strip_prefix('[') {
        number(word.strip_suffix(']')?)?.to_ne_bytes().to_vec()
    } else {
        fields(value.strip_prefix('{')?.strip_suffix('}')?)?
    };
    assert!(bytes.len() <= SHOWN, "{value}");
    Some(Shown::Bytes(bytes))
}

/// Parses `\x01\x02`.
fn hex(text: &str) -> Option<Vec<u8>> {
    let mut digits = text.split("\\x");
    if digits.next() != Some("") {
        return None;
    }
    digits.map(|digits| u8::from_str_radix(digits, 16).ok()).collect()
}

/// Parses structures of four-byte numbers: linger and ucred.
fn fields(text: &str) -> Option<Vec<u8>> {
    let (names, numbers): (Vec<&str>, Vec<&str>) = text.split(", ").filter_map(|field| field.split_once('=')).unzip();
    if names != ["l_onoff", "l_linger"] && names != ["pid", "uid", "gid"] {
        return None;
    }
    let numbers: Option<Vec<i32>> = numbers.into_iter().map(number).collect();
    Some(numbers?.into_iter().flat_map(i32::to_ne_bytes).collect())
}

fn number(text: &str) -> Option<i32> {
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| i32::from_str_radix(hex, 16).ok())
}
