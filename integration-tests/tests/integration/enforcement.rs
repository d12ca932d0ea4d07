//! Every option that can be set is set on every kind of socket that has it, as getsockopt in the owner shows.
//!
//! One run of the agent creates sockets of all kinds under a policy of all options, and the tests examine their
//! values. Another run without an agent shows that the sockets would not have had these values anyway.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    cgroup::Cgroup,
    kernels::{Kernel, skip},
    options::{SO_BINDTODEVICE, SO_BINDTOIFINDEX, SO_REUSEADDR, TCP_INFO, TCP_SAVED_SYN},
    policy::PolicyFile,
    probe::Probe,
    report::Report,
    require,
    script::{Family, Fd, Kind},
};

use crate::{
    number,
    settings::{Place, SETTINGS, Seen, Setting},
};

/// The values that the owner has read, by socket and option.
pub(crate) type Observed = BTreeMap<(Family, Place), BTreeMap<&'static str, Result<Vec<u8>, Errno>>>;

static ENFORCED: LazyLock<(Observed, Report)> = LazyLock::new(|| {
    for absent in SETTINGS.iter().filter(|setting| !is_here(setting)) {
        skip("enforcement", absent.option.name);
    }
    let mut exec = Exec::start(&policy_of_all());
    let observed = observe(&mut exec.probe);
    (observed, exec.finish())
});

/// Returns a policy that sets every option that this kernel can set.
pub(crate) fn policy_of_all() -> PolicyFile {
    let settings = SETTINGS.iter().filter(|setting| is_here(setting) && setting.option != SO_BINDTOIFINDEX);
    let lines: Vec<String> = settings.map(|setting| format!("{} = {}", setting.option.name, setting.policy)).collect();
    // Without these hooks, the options of datagram sockets cannot be set.
    let matches = if Kernel::current().has("cgroup/bind4") { "" } else { "match = { protocol = \"tcp\" }\n" };
    PolicyFile::new(format!("[[rule]]\n{matches}set = {{ {} }}\n", lines.join(", ")))
}

fn is_here(setting: &Setting) -> bool {
    let kernel = Kernel::current();
    // The device is also set at bind, or not at all.
    kernel.has(setting.option.name) && (setting.option != SO_BINDTODEVICE || kernel.has("cgroup/bind4"))
}

fn has(setting: &Setting, family: Family, place: Place) -> bool {
    is_here(setting) && setting.families.contains(&family) && setting.places.contains(&place)
}

/// Opens sockets of every kind, which stay open, and reads every option of each.
pub(crate) fn observe(probe: &mut Probe) -> Observed {
    let mut observed = Observed::new();
    for family in Family::BOTH {
        let pair = probe.pair(family, Kind::Tcp);
        let bound = probe.open(family, Kind::Udp);
        let address = probe.bind(bound, family.loopback());
        let connected = probe.open(family, Kind::Udp);
        probe.connect(connected, address);
        let sent = probe.open(family, Kind::Udp);
        probe.send(sent, Some(address));
        for (place, fd) in [
            (Place::Client, pair.client),
            (Place::Server, pair.server),
            (Place::Listener, pair.listener),
            (Place::UdpBound, bound),
            (Place::UdpConnected, connected),
            (Place::UdpSent, sent),
        ] {
            let of_this = SETTINGS.iter().filter(|setting| has(setting, family, place));
            let values = of_this.map(|setting| (setting.option.name, read(probe, fd, setting))).collect();
            observed.insert((family, place), values);
        }
        probe.exchange_bytes(pair.client, pair.server);
    }
    observed
}

fn read(probe: &mut Probe, fd: Fd, setting: &Setting) -> Result<Vec<u8>, Errno> {
    let (option, len) = match setting.seen {
        Seen::Info { .. } => (TCP_INFO, 104),
        Seen::Text(_) => (setting.option, 16),
        Seen::Int(_) | Seen::Between(..) => (setting.option, 4),
        Seen::Nowhere => return Ok(Vec::new()),
    };
    probe.get(fd, option, len)
}

/// Returns the options at `place` for which `is_wrong` returns true, and those that could not be read.
fn wrong(observed: &Observed, place: Place, is_wrong: impl Fn(&Setting, &[u8]) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for family in Family::BOTH {
        let values = &observed[&(family, place)];
        for setting in SETTINGS.iter().filter(|setting| has(setting, family, place)) {
            let Some(value) = values.get(setting.option.name) else { continue };
            let name = setting.option.name;
            match value {
                Ok(value) if is_wrong(setting, value) => {
                    found.push(format!(
                        "{name} on {family:?} {place:?}: {}, wanted {}",
                        setting.show(value),
                        setting.policy
                    ));
                }
                Ok(_) => {}
                Err(errno) => found.push(format!("{name} on {family:?} {place:?}: {errno:?}")),
            }
        }
    }
    found
}

#[track_caller]
fn assert_enforced(place: Place) {
    let wrong = wrong(&ENFORCED.0, place, |setting, value| {
        setting.option != SO_BINDTOIFINDEX && setting.is_seen_in(value) == Some(false)
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_option_is_set_on_outbound_tcp() {
    assert_enforced(Place::Client);
}

#[test]
fn every_option_is_set_on_inbound_tcp() {
    assert_enforced(Place::Server);
}

#[test]
fn every_option_is_set_on_listeners() {
    assert_enforced(Place::Listener);
}

#[test]
fn every_option_is_set_on_bound_udp() {
    require!("cgroup/bind4");
    assert_enforced(Place::UdpBound);
}

#[test]
fn every_option_is_set_on_connected_udp() {
    require!("cgroup/bind4");
    assert_enforced(Place::UdpConnected);
}

#[test]
fn every_option_is_set_on_udp_that_only_sends() {
    require!("cgroup/sendmsg4");
    assert_enforced(Place::UdpSent);
}

#[test]
fn no_socket_has_these_values_without_a_policy() {
    let cgroup = Cgroup::new();
    let observed = observe(&mut Probe::start(&cgroup));
    let places = [Place::Client, Place::Server, Place::Listener, Place::UdpBound, Place::UdpConnected, Place::UdpSent];
    let same = places.map(|place| wrong(&observed, place, |setting, value| setting.is_seen_in(value) == Some(true)));
    let same: Vec<String> = same.into_iter().flatten().collect();
    assert!(same.is_empty(), "these settings prove nothing: {same:#?}");
}

/// This also proves the options that no process can read (TCP_BPF_DELACK_MAX, the *_CB_FLAGS).
#[test]
fn every_option_is_counted_as_set_and_none_as_failed() {
    let report = &ENFORCED.1;
    for setting in SETTINGS.iter().filter(|setting| is_here(setting) && setting.option != SO_BINDTOIFINDEX) {
        let counted = report.setting(setting.option.name).sockets;
        assert!(counted.set > 0 && counted.failed == 0, "{}: {counted:?}", setting.option.name);
    }
    assert_eq!(report.summary.conflicts, 0, "the owner of the sockets read other values: {:?}", report.events);
    report.assert_nothing_lost();
}

#[test]
fn every_option_of_the_table_is_tested() {
    let tested: BTreeSet<String> = SETTINGS.iter().map(|setting| setting.option.name.to_owned()).collect();
    assert_eq!(tested, Kernel::current().known.options);
}

/// In a separate test, because SO_BINDTODEVICE is another name for the option.
#[test]
fn interface_by_index_is_set_on_every_kind_of_socket() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_BINDTOIFINDEX = 1 }\n");
    let mut exec = Exec::start(&policy);
    let observed = observe(&mut exec.probe);
    let report = exec.finish();
    for ((family, place), values) in observed {
        let value = &values[SO_BINDTOIFINDEX.name];
        assert_eq!(value, &Ok(1i32.to_ne_bytes().to_vec()), "{family:?} {place:?}");
    }
    assert_eq!(report.setting("SO_BINDTOIFINDEX").sockets.failed, 0);
}

#[test]
fn saved_syn_is_available_on_the_accepted_socket() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_SAVE_SYN = 1 }\n");
    let mut exec = Exec::start(&policy);
    for family in Family::BOTH {
        let pair = exec.probe.pair(family, Kind::Tcp);
        let syn = exec.probe.get(pair.server, TCP_SAVED_SYN, 200).unwrap();
        assert!(syn.len() >= 40, "{family:?}: IP and TCP header, not {syn:?}");
    }
    drop(exec.finish());
}

#[test]
fn raw_sockets_have_the_options_that_are_set_at_creation() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 7, SO_PRIORITY = 5, SO_BINDTOIFINDEX = 1 }\n");
    let mut exec = Exec::start(&policy);
    for family in Family::BOTH {
        let fd = exec.probe.open(family, Kind::Raw);
        for (level, name, value) in [(1, libc::SO_MARK, 7), (1, libc::SO_PRIORITY, 5), (1, 62, 1)] {
            assert_eq!(exec.probe.int(fd, number(level, name)), value, "{family:?} {name}");
        }
    }
    drop(exec.finish());
}

#[test]
fn address_can_be_bound_twice_if_the_policy_sets_reuse() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_REUSEADDR = true, SO_REUSEPORT = true }\n");
    let mut exec = Exec::start(&policy);
    let one = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.int(one, SO_REUSEADDR), 0, "not before bind");
    let address = exec.probe.bind(one, Family::Inet.loopback());
    exec.probe.listen(one);
    let other = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.bind(other, address), address);
    exec.probe.listen(other);
    drop(exec.finish());
}

impl Setting {
    fn show(&self, value: &[u8]) -> String {
        match self.seen {
            Seen::Text(_) => String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            Seen::Info { at, .. } => value.get(at..at + 4).map_or_else(String::new, |bytes| format!("{}", word(bytes))),
            _ => value.try_into().map_or_else(|_| format!("{value:?}"), |bytes| i32::from_ne_bytes(bytes).to_string()),
        }
    }

    /// Returns whether the owner reads the policy's value; `None` if the option cannot be read.
    fn is_seen_in(&self, value: &[u8]) -> Option<bool> {
        match self.seen {
            Seen::Int(wanted) => Some(value == wanted.to_ne_bytes()),
            Seen::Between(min, max) => {
                Some(value.try_into().is_ok_and(|bytes| (min..=max).contains(&i32::from_ne_bytes(bytes))))
            }
            Seen::Text(wanted) => Some(value.split(|byte| *byte == 0).next() == Some(wanted.as_bytes())),
            Seen::Info { at, min, max } => {
                Some(value.get(at..at + 4).is_some_and(|bytes| (min..=max).contains(&word(bytes))))
            }
            Seen::Nowhere => None,
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_ne_bytes)
}
