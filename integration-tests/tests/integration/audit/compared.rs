//! The audit against strace, on the same run: call by call, thread by thread.

use std::{collections::BTreeMap, fs, net::TcpListener};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    kernels::Kernel,
    process::{Running, read_report, workload},
    report::Event,
};

use super::auditing;
use crate::stderr;

/// A call, as both see it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    call: String,
    level: i32,
    optname: i32,
    /// The name of the errno, or empty.
    error: String,
    /// The first bytes of the argument, where they could be read.
    value: Option<Vec<u8>>,
}

/// By thread.
type Calls = BTreeMap<u32, Vec<Seen>>;

/// How many bytes of an argument events hold.
const SHOWN: usize = 16;

/// Reads a line such as `setsockopt(3, 0x6, 0x1, [1], 4) = -1 EINVAL (Invalid argument)`.
fn parse(line: &str) -> Option<Seen> {
    let (call, rest) = line.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(") ").and_then(|(arguments, rest)| {
        // The words for the errno are in parentheses, too.
        arguments.rsplit_once(") ").map_or(Some((arguments, rest)), |(arguments, result)| Some((arguments, result)))
    })?;
    let mut parts = arguments.splitn(4, ", ");
    let level = number(parts.nth(1)?)?;
    let optname = number(parts.next()?)?;
    let (value, _len) = parts.next()?.rsplit_once(", ")?;
    let error = result.split_once("-1 ").and_then(|(_, error)| error.split_whitespace().next());
    let error = error.unwrap_or_default().to_owned();
    Some(Seen { call: call.to_owned(), level, optname, error, value: bytes(value) })
}

fn number(text: &str) -> Option<i32> {
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| i32::from_str_radix(hex, 16).ok())
}

/// The bytes of an argument; `None` for an address.
fn bytes(value: &str) -> Option<Vec<u8>> {
    if let Some(text) = value.strip_prefix('"') {
        return Some(unescape(text.trim_end_matches("...").strip_suffix('"')?));
    }
    if let Some(list) = value.strip_prefix('[') {
        let words = list.strip_suffix(']')?.split(", ").filter_map(number);
        return Some(words.flat_map(i32::to_ne_bytes).collect());
    }
    let fields = value.strip_prefix('{')?.strip_suffix('}')?.split(", ");
    Some(fields.filter_map(|field| number(field.split_once('=')?.1)).flat_map(i32::to_ne_bytes).collect())
}

/// Undoes the escapes of C strings.
fn unescape(text: &str) -> Vec<u8> {
    let mut found = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'\\' {
            found.push(*byte);
            continue;
        }
        let digits = rest.iter().take(3).take_while(|byte| (b'0'..b'8').contains(byte)).count();
        if digits > 0 {
            let octal = str::from_utf8(&rest[..digits]).unwrap();
            found.push(u8::from_str_radix(octal, 8).unwrap());
            rest = &rest[digits..];
        } else {
            let letters = [(b'n', b'\n'), (b't', b'\t'), (b'r', b'\r'), (b'v', 11), (b'f', 12)];
            found.push(letters.iter().find(|(letter, _)| *letter == rest[0]).map_or(rest[0], |(_, byte)| *byte));
            rest = &rest[1..];
        }
    }
    found
}

/// What strace wrote: a file for each thread.
fn traced(prefix: &str) -> Calls {
    let (folder, name) = prefix.rsplit_once('/').unwrap();
    let mut calls = Calls::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let file = entry.file_name().into_string().unwrap();
        let Some(thread) = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')) else { continue };
        for line in fs::read_to_string(entry.path()).unwrap().lines() {
            if line.starts_with("---") || line.starts_with("+++") {
                continue;
            }
            let seen = parse(line).unwrap_or_else(|| panic!("strace says {line}"));
            calls.entry(thread.parse().unwrap()).or_default().push(seen);
        }
    }
    calls
}

/// What the events say, in the same words.
fn seen(event: &Event) -> Seen {
    let value = event.optval.as_deref().map(|hex| {
        let digits = hex.strip_prefix("0x").unwrap().as_bytes().chunks(2);
        digits.map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    });
    let error = match event.result.unwrap() {
        0 => String::new(),
        result => format!("{:?}", Errno::from_raw(i32::try_from(-result).unwrap())),
    };
    Seen { call: event.call.clone().unwrap(), level: event.level, optname: event.optname, error, value }
}

/// Cuts what one of the two does not show: bytes beyond the 16th, those of a name beyond its NUL, those of a number
/// beyond its first four.
fn cut(strace: &mut Seen, event: &mut Seen) {
    let (Some(theirs), Some(ours)) = (&mut strace.value, &mut event.value) else { return };
    theirs.truncate(SHOWN);
    ours.truncate(theirs.len());
}

/// Runs a command under strace under us, and compares.
fn compare(backend: &str, command: &[&str]) -> Calls {
    let policy = auditing("calls = \"all\"");
    let report = policy.folder().join("report").display().to_string();
    let prefix = policy.folder().join("strace").display().to_string();
    let strace = ["strace", "-ff", "-o", &prefix, "-X", "raw", "-e", "trace=setsockopt,getsockopt"];
    let arguments = ["-o", "json", "--report", &report, "--audit-backend", backend];
    let output = Running::exec(&arguments, &policy, &[&strace, command].concat()).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    let report = read_report(&report);
    let mut traced = traced(&prefix);
    let mut audited = Calls::new();
    for event in &report.events {
        let thread = event.tid.unwrap();
        let mut seen = seen(event);
        let calls = audited.entry(thread).or_default();
        if let Some(strace) = traced.get_mut(&thread).and_then(|all| all.get_mut(calls.len())) {
            cut(strace, &mut seen);
        }
        calls.push(seen);
    }
    for (thread, traced) in &traced {
        let audited = audited.get(thread).map_or(&[][..], Vec::as_slice);
        for (traced, audited) in traced.iter().zip(audited) {
            assert_eq!(traced, audited, "strace on the left, {backend}");
        }
        assert_eq!(traced.len(), audited.len(), "calls of thread {thread}, strace on the left");
    }
    assert_eq!(traced.keys().collect::<Vec<_>>(), audited.keys().collect::<Vec<_>>());
    assert_eq!(report.summary.losses["ring_full"], 0);
    assert_eq!(report.summary.losses["calls_full"], 0);
    for event in &report.events {
        assert_eq!(event.event, "call");
    }
    audited
}

fn backends() -> impl Iterator<Item = &'static str> {
    let kernel = Kernel::current();
    kernel.known.audit.iter().map(String::as_str).filter(|backend| kernel.has(backend))
}

#[test]
fn every_call_of_processes_threads_and_children_is_seen_with_its_result() {
    for backend in backends() {
        let calls = compare(backend, &[&workload(), "calls"]);
        assert_eq!(calls.len(), 3, "the process, its thread, its child");
        for calls in calls.values() {
            let errors: Vec<&str> = calls.iter().map(|call| &*call.error).filter(|error| !error.is_empty()).collect();
            for error in ["EBADF", "ENOPROTOOPT", "EINVAL", "EFAULT", "ENOENT", "ENOTSOCK"] {
                assert!(errors.contains(&error), "no call failed with {error}: {errors:?}");
            }
        }
    }
}

#[test]
fn every_call_of_redis_is_seen_with_its_result() {
    // Free now, and nobody else is given it soon.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let script = "redis-server --port \"$0\" --bind 127.0.0.1 --save '' --appendonly no --logfile /dev/null & \
                  until redis-cli -p \"$0\" ping 2>/dev/null | grep -q PONG; do :; done; \
                  redis-cli -p \"$0\" set key value; redis-cli -p \"$0\" shutdown nosave; wait";
    for backend in backends() {
        let calls = compare(backend, &["sh", "-c", script, &port]);
        assert!(calls.len() >= 2, "the server and a client: {calls:?}");
    }
}
