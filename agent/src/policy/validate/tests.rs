//! `[[test]]`: a socket, and the settings that it must get.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use super::{clauses, target};
use crate::policy::{
    diagnostic::{Findings, Problem, quote},
    file::{RuleFile, SocketFile, TestFile, Text},
    model::{Direction, Expected, Family, Named, Protocol, Test},
    socket::{End, Socket, parse_end},
    words,
};

pub(super) fn tests(files: &[TestFile<'_>], findings: &mut Findings) -> Vec<Test> {
    let mut lines_by_name = BTreeMap::new();
    let mut tests = Vec::new();
    for (at, file) in files.iter().enumerate() {
        let line = findings.line(&file.expected.header);
        let given = file.expected.name.as_ref();
        let name = given.map_or_else(|| format!("test-{}", at + 1), |name| name.get_ref().clone().into_owned());
        if let Some(first) = lines_by_name.insert(name.clone(), line) {
            findings.error(
                Problem::new(format!("two tests have the name {}: the first one is on line {first}", quote(&name)))
                    .help("give this test another name")
                    .at(given.map_or_else(|| file.expected.header.clone(), Text::span)),
            );
        }
        let expected = expected(file, findings);
        if let Some(socket) = socket(&file.socket, findings) {
            tests.push(Test { name, line, socket, expected });
        }
    }
    tests
}

fn expected(file: &TestFile<'_>, findings: &mut Findings) -> Vec<Expected> {
    let actions = file.expected.set.iter().filter_map(|setting| setting.on_conflict.as_ref());
    let limits = file.expected.limit.iter().filter_map(|limit| limit.on_conflict.as_ref());
    for action in actions.chain(limits) {
        findings.error(
            Problem::new("a test cannot expect `on_conflict`: it tests only which settings win")
                .help("remove `on_conflict`")
                .at(action.span()),
        );
    }
    let mut expected: Vec<Expected> = clauses::clauses(&file.expected, findings)
        .into_iter()
        .map(|clause| Expected { option: clause.option, line: clause.line, form: Some(clause.form) })
        .collect();
    for name in &file.free {
        if let Some(option) = findings.ok(clauses::option_named(name)) {
            refuse_second(&expected, option, name, findings);
            expected.push(Expected { option, line: findings.line(&name.span()), form: None });
        }
    }
    let RuleFile { set, limit, deny, .. } = &file.expected;
    if set.is_empty() && limit.is_empty() && deny.is_empty() && file.free.is_empty() {
        findings.error(
            Problem::new("this test expects nothing, so it cannot fail")
                .help("add what the socket must have: set = { TCP_NODELAY = true }, or free = [\"TCP_NODELAY\"]")
                .at(file.expected.header.clone()),
        );
    }
    expected.sort_by_key(|expected| expected.line);
    expected
}

fn refuse_second(expected: &[Expected], option: Named, name: &Text<'_>, findings: &mut Findings) {
    if expected.iter().any(|other| other.option == option) {
        findings.error(
            Problem::new(format!("{} is expected both to be free and to be decided", quote(name.get_ref())))
                .help("remove one of the two")
                .at(name.span()),
        );
    }
}

fn socket(file: &SocketFile<'_>, findings: &mut Findings) -> Option<Socket> {
    let SocketFile { span, protocol, family, direction, local, remote, cgroup } = file;
    let before = findings.errors();
    let protocol = protocol.as_ref().and_then(|word| findings.ok(words::pick("protocol", word, Protocol::WORDS)));
    let family = family.as_ref().and_then(|word| findings.ok(words::pick("family", word, Family::WORDS)));
    let direction = direction.as_ref().and_then(|word| findings.ok(words::pick("direction", word, Direction::WORDS)));
    let local = local.as_ref().and_then(|text| findings.ok(end(text))).unwrap_or_default();
    let remote = remote.as_ref().and_then(|text| findings.ok(peer(text)));
    let cgroup = cgroup.as_ref().and_then(|path| findings.ok(target::path(path)));
    if findings.errors() > before {
        return None;
    }
    let socket = Socket::new(protocol.unwrap_or(Protocol::Tcp), family, direction, local, remote);
    let socket =
        socket.map_err(|error| Problem::new(error.to_string()).help("give addresses of one family").at(span.clone()));
    findings.ok(socket).map(|socket| Socket { cgroup: cgroup.map(PathBuf::from), ..socket })
}

fn end(text: &Text<'_>) -> Result<End, Problem> {
    parse_end(text.get_ref()).ok_or_else(|| {
        Problem::new(format!("{} is not an address, a port, or both", quote(text.get_ref())))
            .help("write such as \"10.0.0.1\", \":443\", \"[2001:db8::1]:443\"")
            .at(text.span())
    })
}

fn peer(text: &Text<'_>) -> Result<SocketAddr, Problem> {
    let peer = text.get_ref().parse().ok();
    peer.ok_or_else(|| {
        Problem::new(format!("{} is not an address with a port", quote(text.get_ref())))
            .help("write \"192.0.2.1:443\" or \"[2001:db8::1]:443\"")
            .at(text.span())
    })
}
