//! Reconciliation of sockets that a test makes up.

use std::{cell::RefCell, collections::BTreeMap, path::Path, rc::Rc};

use super::*;
use crate::{
    compile::compile,
    coverage::all,
    host::socket::{Entry, State},
    policy,
};

/// The kernel's side of a socket.
#[derive(Default)]
struct FakeSocket {
    values: BTreeMap<&'static str, u32>,
    refused: Option<&'static str>,
    /// Setting the first option changes the second to 0.
    resets: Option<(&'static str, &'static str)>,
    is_hung: bool,
}

impl SocketHandle for FakeSocket {
    fn value(&mut self, key: OptionKey) -> Option<Value> {
        self.values.get(options::by_key(key)?.name).copied().map(Value::int)
    }

    fn values(&mut self, _: &[&'static SocketOption]) -> Option<Values> {
        (!self.is_hung).then(|| values(&self.values))
    }

    fn set(&mut self, key: OptionKey, value: &Value) -> io::Result<Option<Value>> {
        let name = options::by_key(key).unwrap().name;
        if self.refused == Some(name) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.values.insert(name, word_in(&value.words));
        if let Some((set, other)) = self.resets.take_if(|(set, _)| *set == name) {
            assert_eq!(set, name);
            self.values.insert(other, 0);
        }
        Ok(self.value(key))
    }
}

fn values(all: &BTreeMap<&'static str, u32>) -> Values {
    all.iter().map(|(name, value)| (options::by_name(name).unwrap(), Value::int(*value))).collect()
}

struct FreshSocket;

impl Baseline for FreshSocket {
    fn values(&mut self) -> Option<&Values> {
        None
    }

    fn after(&mut self, _: &SocketOption, _: Value) -> Option<Value> {
        None
    }
}

/// A change that was recorded: the name of the option, the value before, and the value after.
type Recorded = (String, Option<u32>, u32);

#[derive(Clone, Default)]
struct FakeLog(Rc<RefCell<Vec<Recorded>>>);

impl ChangeLog for FakeLog {
    fn record(&mut self, changes: &mut dyn Iterator<Item = (Place, Option<Value>, Value)>) -> Result<(), JournalError> {
        let number = |value: Value| word_in(&value.words);
        let change = |(place, before, after): (Place, Option<Value>, Value)| {
            (options::display_name(place.option), before.map(number), number(after))
        };
        self.0.borrow_mut().extend(changes.map(change));
        Ok(())
    }
}

/// Reconciles a connected TCP socket with rules. Returns the counts, the recorded changes, and the kinds of the events.
fn reconcile(rules: &str, dry_run: bool, socket: &mut FakeSocket) -> (Tally, Vec<Recorded>, Vec<String>) {
    let policies = [policy::parse(Path::new("test.toml"), rules).unwrap().0];
    let desired = compile(&policies, &[all(&policies)]).unwrap();
    let entry = Entry {
        family: libc::AF_INET,
        protocol: libc::IPPROTO_TCP,
        state: State::Established,
        local: "10.0.0.1:5000".parse().unwrap(),
        remote: "192.0.2.1:443".parse().ok(),
        inode: 1,
        cookie: 7,
        cgroup: None,
    };
    let live = SocketSnapshot {
        facts: entry.facts().unwrap(),
        entry,
        cgroup: None,
        owner: None,
        values: OptionRead::Values(values(&socket.values)),
    };
    let (log, mut events) = (FakeLog::default(), Vec::new());
    let mut report = |event: &Event| {
        events.push(event.to_json());
        Ok(())
    };
    let mut reconciler = Reconciler::new(&desired, dry_run, log.clone(), Some(&mut report));
    reconciler.reconcile_socket(live, 0, &mut FreshSocket, socket).unwrap();
    let tally = reconciler.tally();
    let kind = |line: String| {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        format!("{} {}", event["event"].as_str().unwrap(), event["option"].as_str().unwrap())
    };
    let recorded = log.0.borrow().clone();
    (tally, recorded, events.into_iter().map(kind).collect())
}

const RULES: &str = "[[rule]]\nset = { TCP_KEEPCNT = 5, TCP_SYNCNT = 3 }\n";

fn socket(values: &[(&'static str, u32)]) -> FakeSocket {
    FakeSocket { values: values.iter().copied().collect(), ..FakeSocket::default() }
}

#[test]
fn option_that_differs_is_recorded_and_set() {
    let mut socket = socket(&[("TCP_KEEPCNT", 9), ("TCP_SYNCNT", 3)]);
    let (tally, recorded, events) = reconcile(RULES, false, &mut socket);
    assert_eq!(tally, Tally { sockets: 1, changed: 1, set: 1, ..Tally::default() });
    assert_eq!(recorded, [("TCP_KEEPCNT".to_owned(), Some(9), 5), ("TCP_KEEPCNT".to_owned(), None, 5)]);
    assert_eq!(events, ["applied TCP_KEEPCNT"]);
    assert_eq!(socket.values["TCP_KEEPCNT"], 5);
}

#[test]
fn dry_run_records_and_sets_nothing() {
    let mut socket = socket(&[("TCP_KEEPCNT", 9), ("TCP_SYNCNT", 9)]);
    let (tally, recorded, events) = reconcile(RULES, true, &mut socket);
    assert_eq!(tally, Tally { sockets: 1, would_change: 1, would_set: 2, ..Tally::default() });
    assert!(recorded.is_empty());
    assert_eq!(events, ["would-apply TCP_KEEPCNT", "would-apply TCP_SYNCNT"]);
    assert_eq!(socket.values["TCP_KEEPCNT"], 9);
}

#[test]
fn option_that_the_kernel_refuses_is_counted_once_and_recorded_as_unchanged() {
    let mut socket = FakeSocket { refused: Some("TCP_KEEPCNT"), ..socket(&[("TCP_KEEPCNT", 9), ("TCP_SYNCNT", 9)]) };
    let (tally, recorded, events) = reconcile(RULES, false, &mut socket);
    assert_eq!(tally, Tally { sockets: 1, changed: 1, set: 1, failed: 1, ..Tally::default() });
    assert_eq!(recorded[1], ("TCP_KEEPCNT".to_owned(), None, 9));
    assert_eq!(events, ["outcome TCP_KEEPCNT", "applied TCP_SYNCNT"]);
}

#[test]
fn option_that_another_one_changed_is_set_again() {
    let resets = Some(("TCP_SYNCNT", "TCP_KEEPCNT"));
    let mut socket = FakeSocket { resets, ..socket(&[("TCP_KEEPCNT", 9), ("TCP_SYNCNT", 9)]) };
    let (tally, ..) = reconcile(RULES, false, &mut socket);
    assert_eq!((tally.set, tally.changed), (3, 1));
    assert_eq!(socket.values["TCP_KEEPCNT"], 5);
}

#[test]
fn socket_that_hangs_after_a_change_is_counted() {
    let mut socket = FakeSocket { is_hung: true, ..socket(&[("TCP_KEEPCNT", 9), ("TCP_SYNCNT", 3)]) };
    let (tally, ..) = reconcile(RULES, false, &mut socket);
    assert_eq!((tally.set, tally.denied), (1, 1));
}
