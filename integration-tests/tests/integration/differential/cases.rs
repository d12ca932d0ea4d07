//! The cases: options and their numbers, kinds of sockets, lengths and values.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use sockpolicy_integration_tests::differential::{Case, CaseSet, KINDS, Key, NO_OBSERVER, OBSERVERS, state};

use super::tables::{
    IP, IPV6, LIMITS, Limit, RAW, SETS, SOCKET, Scale, Set, TCP, UDP, UDP_LITE, UNLISTED, WITHOUT_NAME, observers,
};

/// An option as `sockpolicy options --output json` lists it.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) option: String,
    level: i32,
    optname: i32,
    pub(super) can: BTreeSet<String>,
    min: Option<i64>,
    max: Option<i64>,
}

impl Listed {
    fn key(&self) -> Key {
        (self.level, self.optname)
    }
}

/// The options of the policy, for which a call that agrees precedes the case's call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Agreeing {
    Nothing,
    Sets,
    Limits,
}

/// Argument lengths of setsockopt, and buffer sizes of getsockopt.
const LENGTHS: &[i32] = &[4, 0, 1, 2, 3, 5, 6, 7, 8, 16, 4096, 4097, 8192, -1];
/// Lengths for which all values are tried; for others, only the first ones.
const WHOLE: &[i32] = &[4, 8, 16];
const FIRST_VALUES: usize = 5;
const FAR_VALUES: usize = 3;

const NETLINK: &[Key] = &[(270, 1), (270, 9), (270, 12)];

fn levels(kind: &str) -> &'static [i32] {
    match kind {
        "tcp4" => &[SOCKET, TCP, IP],
        "tcp6" => &[SOCKET, TCP, IP, IPV6],
        "udp4" | "udplite4" => &[SOCKET, UDP, UDP_LITE, IP],
        "udp6" | "udplite6" => &[SOCKET, UDP, UDP_LITE, IP, IPV6],
        "raw4" => &[SOCKET, IP, RAW],
        "raw6" => &[SOCKET, IPV6, RAW, 58],
        "ping4" => &[SOCKET, IP],
        "ping6" => &[SOCKET, IP, IPV6],
        "mptcp4" => &[SOCKET, TCP, IP, 284],
        "mptcp6" => &[SOCKET, TCP, IP, IPV6, 284],
        "netlink" => &[SOCKET, 270],
        _ => &[SOCKET],
    }
}

/// Returns the states of a kind other than fresh.
fn states(kind: &str) -> &'static [i32] {
    match kind {
        "tcp4" | "tcp6" => &[state::BOUND, state::CONNECTED, state::ACCEPTED, state::LISTENING],
        "udp4" | "udp6" | "udplite4" => &[state::BOUND, state::CONNECTED],
        "mptcp4" => &[state::CONNECTED, state::LISTENING],
        _ => &[],
    }
}

/// Returns whether policies cover sockets of this kind.
pub(super) fn is_governed_kind(case: &Case) -> bool {
    let (_, domain, ..) = KINDS[case.kind as usize];
    [libc::AF_INET, libc::AF_INET6].contains(&domain)
}

/// Returns the setting of an option's value.
pub(super) fn setting_of(key: Key) -> Option<&'static Set> {
    SETS.iter()
        .find(|set| set.shown.is_some_and(|(shown, _)| observers(key).first() == Some(&shown)) && owns(set.name, key))
}

/// Returns whether an option belongs to this setting, and not to another one with the same observers.
fn owns(name: &str, key: Key) -> bool {
    match key {
        (SOCKET, 7 | 32) => name == "SO_SNDBUF",
        (SOCKET, 8 | 33) => name == "SO_RCVBUF",
        _ => true,
    }
}

fn limit_of(key: Key) -> Option<&'static Limit> {
    LIMITS.iter().find(|limit| observers(key).contains(&limit.shown) && owns(limit.name, key))
}

/// Describes a case.
pub(super) fn describe(case_set: &CaseSet, case: &Case) -> String {
    let value = case_set.values.get(case.value as usize);
    format!(
        "{} {} {} {:?} len {} value {:x?} prior {:?}",
        state::NAMES[case.state as usize],
        KINDS[case.kind as usize].0,
        if case.reads != 0 { "get" } else { "set" },
        case.key,
        case.len,
        value,
        case_set.values.get(case.prior_value as usize).map(|value| (case.prior, value)),
    )
}

struct Builder {
    case_set: CaseSet,
    values: BTreeMap<Vec<u8>, i32>,
    observers: BTreeMap<Vec<Key>, i32>,
    sample: u32,
    number: u32,
}

/// Returns one of `sample` cases, and at least one for each option and kind.
pub(super) fn case_set(options: &[Listed], agreeing: Agreeing, sample: u32) -> CaseSet {
    let mut builder = Builder {
        case_set: CaseSet::default(),
        values: BTreeMap::new(),
        observers: BTreeMap::new(),
        sample,
        number: 0,
    };
    let listed = options.iter().map(|option| (option.key(), Some(option)));
    let unlisted = UNLISTED.iter().chain(NETLINK).map(|key| (*key, None));
    let spellings: Vec<(Key, Option<&Listed>)> = listed.chain(unlisted).collect();
    for (key, option) in spellings {
        let values = values(key, option);
        let prior = prior(key, agreeing);
        for (kind, (name, ..)) in (0..).zip(KINDS) {
            let case = Case {
                kind,
                state: state::FRESH,
                reads: 0,
                key,
                len: 4,
                value: 0,
                prior: NO_OBSERVER,
                prior_value: -1,
                observers: builder.observers(key),
            };
            if !levels(name).contains(&key.0) {
                builder.add_always(case, &1i32.to_ne_bytes());
                continue;
            }
            builder.add_fresh(case, &values);
            if let Some((prior, value)) = &prior {
                let prior_value = builder.value(value);
                builder.add_fresh(Case { prior: *prior, prior_value, ..case }, &values);
            }
            for state in states(name) {
                for value in values.iter().take(FIRST_VALUES) {
                    builder.add(Case { state: *state, len: value.len() as i32, ..case }, value);
                }
                builder.add(Case { state: *state, reads: 1, len: 64, ..case }, &[]);
            }
            for len in LENGTHS.iter().chain(&[64]) {
                builder.add(Case { reads: 1, len: *len, ..case }, &[]);
            }
        }
    }
    builder.case_set
}

impl Builder {
    fn value(&mut self, value: &[u8]) -> i32 {
        let next = self.values.len() as i32;
        *self.values.entry(value.to_vec()).or_insert_with(|| {
            self.case_set.values.push(value.to_vec());
            next
        })
    }

    fn observers(&mut self, key: Key) -> i32 {
        let next = self.observers.len() as i32;
        let keys = observers(key);
        *self.observers.entry(keys.clone()).or_insert_with(|| {
            let mut padded = [NO_OBSERVER; OBSERVERS];
            padded[..keys.len()].copy_from_slice(&keys);
            self.case_set.observers.push(padded);
            next
        })
    }

    fn add_fresh(&mut self, case: Case, values: &[Vec<u8>]) {
        self.add_always(case, &values[0]);
        for (place, value) in values.iter().enumerate() {
            for len in LENGTHS {
                let most = match *len {
                    len if WHOLE.contains(&len) => usize::MAX,
                    ..=16 => FIRST_VALUES,
                    _ => FAR_VALUES,
                };
                if place < most {
                    self.add(Case { len: *len, ..case }, value);
                }
            }
            if !LENGTHS.contains(&(value.len() as i32)) {
                self.add(Case { len: value.len() as i32, ..case }, value);
            }
        }
    }

    /// Adds one of many cases.
    fn add(&mut self, case: Case, value: &[u8]) {
        self.number = self.number.wrapping_add(1);
        // Multiples of a number without common factors with others visit all values (Knuth, volume 3, 6.4).
        let place = self.number.wrapping_mul(0x9e37_79b1) >> 16;
        if place.is_multiple_of(self.sample) {
            self.add_always(case, value);
        }
    }

    fn add_always(&mut self, case: Case, value: &[u8]) {
        let value = self.value(value);
        self.case_set.cases.push(Case { value, ..case });
    }
}

/// Returns a call that agrees with the policy.
fn prior(key: Key, agreeing: Agreeing) -> Option<(Key, Vec<u8>)> {
    match agreeing {
        Agreeing::Nothing => None,
        Agreeing::Sets => {
            let (shown, value) = setting_of(key)?.shown?;
            let bytes = match shown {
                (SOCKET, 7 | 8) => int(value / 2),
                (SOCKET, 47) => value.to_ne_bytes().to_vec(),
                (TCP, 13) => b"reno".to_vec(),
                _ => int(value),
            };
            Some((shown, bytes))
        }
        Agreeing::Limits => {
            let Limit { shown, scale, within, .. } = limit_of(key)?;
            let bytes = match scale {
                Scale::Linger | Scale::Rate => within.to_ne_bytes().to_vec(),
                Scale::Time => [within.to_ne_bytes(), [0; 8]].concat(),
                _ => int(*within),
            };
            Some((*shown, bytes))
        }
    }
}

fn int(value: i64) -> Vec<u8> {
    (value as i32).to_ne_bytes().to_vec()
}

fn wide(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Returns values of an option, the most important ones first.
fn values(key: Key, option: Option<&Listed>) -> Vec<Vec<u8>> {
    let mut values = structures(key);
    let mut numbers = vec![1, -1, 0];
    if let Some(Limit { range: (low, high), within, .. }) = limit_of(key) {
        numbers.extend([*high + 1, *low - 1, *low, *high, *within]);
    }
    if let Some(Set { shown: Some((_, value)), .. }) = setting_of(key) {
        numbers.extend([*value, value / 2, value | 1, value | 0x100]);
    }
    if let Some(Listed { min: Some(min), max: Some(max), .. }) = option {
        numbers.extend([*min, *max, min.saturating_sub(1), max.saturating_add(1), max / 2]);
    }
    numbers.extend([2, 3, 7, 255, 256, 0x148, i32::MAX.into(), i32::MIN.into(), 0x0100_0000]);
    let fits = |number: &i64| (i64::from(i32::MIN)..=i64::from(u32::MAX)).contains(number);
    values.extend(numbers.into_iter().filter(fits).map(int));
    let mut seen = BTreeSet::new();
    values.retain(|value| seen.insert(value.clone()));
    values
}

/// 239.1.2.3, 127.0.0.1 and ff02::1:3.
const GROUP: [u8; 4] = [239, 1, 2, 3];
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];
const GROUP6: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3];

/// Returns values that are not plain numbers, for options that take such values.
fn structures(key: Key) -> Vec<Vec<u8>> {
    match key {
        (SOCKET, 13) => {
            [[0, 0], [1, 0], [1, -1], [0, 7], [1, 5], [1, 100], [-1, 3], [1, i32::MIN]].map(|pair| ints(&pair)).into()
        }
        (SOCKET, 20 | 21 | 66 | 67) => [
            [0, 0],
            [-1, 0],
            [100, 5],
            [2, 0],
            [0, 1],
            [0, 999_999],
            [0, 1_000_000],
            [1, -1],
            [i64::MAX, 0],
            [i64::MIN, 5],
            [1 << 62, 0],
        ]
        .map(|pair| wide(&pair))
        .into(),
        (SOCKET, 47) => {
            [-1, 0xffff_ffff, 1 << 40, 0, 1, 2_000_000, 10_000_000, 10_000_001, i64::MAX, i64::MIN, 0x1_0000_0000]
                .map(|rate| wide(&[rate]))
                .into()
        }
        (SOCKET, 25) => ["lo", "lo\0", "", "nosuch", "l", "lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0x", "0123456789abcdefg"]
            .map(|name| name.as_bytes().to_vec())
            .into(),
        (TCP, 13) => ["reno", "cubic", "nosuch", "reno\0x", "cubic\0", "ren", "", "0123456789abcdefg"]
            .map(|name| name.as_bytes().to_vec())
            .into(),
        (TCP, 31) => ["nosuch", "tls", ""].map(|name| name.as_bytes().to_vec()).into(),
        (SOCKET, 61) => vec![ints(&[1, 0]), ints(&[11, 3]), ints(&[1, 9])],
        (SOCKET, 37 | 65) => vec![ints(&[0x58, 0]), ints(&[2])],
        (IP, 32) => vec![[[0; 4], LOOPBACK, [1, 0, 0, 0]].concat(), LOOPBACK.to_vec()],
        (IP, 35 | 36) => vec![[GROUP, LOOPBACK, [1, 0, 0, 0]].concat(), [GROUP, LOOPBACK].concat()],
        (IP, 37..=40) => vec![[GROUP, LOOPBACK, [127, 0, 0, 2]].concat()],
        (IP, 41) => vec![[GROUP, LOOPBACK, [1, 0, 0, 0], [1, 0, 0, 0], [127, 0, 0, 2]].concat()],
        (IP | IPV6, 42..=48) => vec![group_request(key)],
        (IP, 51) => vec![ints(&[0x9000_8000_u32 as i32])],
        (IPV6, 20 | 21 | 27 | 28) => vec![[&GROUP6[..], &[1, 0, 0, 0]].concat()],
        (IPV6, 32) => {
            let mut request = vec![0; 32];
            request[15] = 1; // to ::1
            request[21] = 1; // IPV6_FL_S_EXCL
            request[22] = 1; // IPV6_FL_F_CREATE
            vec![request]
        }
        (IPV6, 50) => vec![[&[0; 16][..], &[1, 0, 0, 0]].concat(), vec![0; 20]],
        (IPV6, 54 | 55 | 59) => vec![vec![0, 0, 1, 4, 0, 0, 0, 0], Vec::new()],
        (IPV6, 6 | 57) => vec![Vec::new()],
        _ => Vec::new(),
    }
}

/// Returns a `struct group_source_req`, which starts like a `struct group_req`.
fn group_request((level, _): Key) -> Vec<u8> {
    let mut request = vec![0; 264];
    request[0] = 1;
    let family = if level == IP { libc::AF_INET } else { libc::AF_INET6 };
    for at in [8, 136] {
        request[at..at + 2].copy_from_slice(&(family as u16).to_ne_bytes());
    }
    if level == IP {
        request[12..16].copy_from_slice(&GROUP);
        request[140..144].copy_from_slice(&[127, 0, 0, 2]);
    } else {
        request[16..32].copy_from_slice(&GROUP6);
        request[159] = 1;
    }
    request
}

/// Returns whether a policy that names every option covers calls on this level and number.
pub(super) fn is_named(options: &[Listed], key: Key) -> bool {
    let is_listed = options.iter().any(|option| option.key() == key);
    is_listed || UNLISTED.contains(&key) && !WITHOUT_NAME.contains(&key)
}
