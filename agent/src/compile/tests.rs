//! Compiled policies decide like the policies themselves.
//!
//! The comparison is with [`super::naive`], which evaluates the rules in order, without bits and prefixes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::Path,
};

use abi::{
    setting::words_of,
    socket::{Facts, protocol},
};
use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample};

use super::{
    naive::{Matches, naive_winner, rule_matches, winner_in},
    *,
};
use crate::{
    coverage::all,
    explain::{WhyNot, explain},
    options::by_name,
    policy::model::{Audit, Errno, Selector, Target},
    policy::{Socket, diagnostic::Source},
};

/// Returns one of a few similar addresses, so that networks and addresses overlap.
fn address(family: Family) -> BoxedStrategy<IpAddr> {
    match family {
        Family::Ipv4 => (0u8..3, 0u8..3).prop_map(|(a, b)| Ipv4Addr::new(10, a, 0, b).into()).boxed(),
        Family::Ipv6 => (0u16..3, 0u16..3).prop_map(|(a, b)| Ipv6Addr::new(0xfd00, a, 0, 0, 0, 0, 0, b).into()).boxed(),
    }
}

fn any_family() -> impl Strategy<Value = Family> {
    sample::select(vec![Family::Ipv4, Family::Ipv6])
}

fn port() -> impl Strategy<Value = u16> {
    sample::select(vec![0, 1, 22, 80, 443, 444, 8000, 8001, 8999, 9000, 65534, 65535])
}

fn ports() -> impl Strategy<Value = Vec<RangeInclusive<u16>>> {
    vec((port(), port()).prop_map(|(one, other)| one.min(other)..=one.max(other)), 0..3)
}

fn network() -> impl Strategy<Value = IpNet> {
    any_family().prop_flat_map(|family| {
        let lengths = match family {
            Family::Ipv4 => vec![0, 7, 8, 14, 16, 24, 31, 32],
            Family::Ipv6 => vec![0, 8, 16, 31, 32, 127, 128],
        };
        (address(family), sample::select(lengths)).prop_map(|(address, len)| IpNet::new(address, len).unwrap().trunc())
    })
}

fn selector() -> impl Strategy<Value = Selector> {
    let protocols = vec(sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Other]), 0..3);
    let direction = option::of(sample::select(vec![Direction::Outbound, Direction::Inbound]));
    let networks = || vec(network(), 0..3);
    (protocols, option::of(any_family()), direction, networks(), networks(), networks(), ports(), ports()).prop_map(
        |(protocols, family, direction, local, remote, not_remote, local_ports, remote_ports)| Selector {
            protocols,
            family,
            direction,
            local,
            remote,
            not_remote,
            local_ports,
            remote_ports,
        },
    )
}

const NAMES: [&str; 4] = ["TCP_NODELAY", "SO_MARK", "SO_SNDBUF", "IP_TTL"];

fn clause() -> impl Strategy<Value = Option<Form>> {
    option::of(prop_oneof![
        any::<u32>().prop_map(|value| Form::Set(Wanted::Number { value, mask: u32::MAX })),
        (0i64..9, 9i64..99).prop_map(|(min, max)| Form::Limit { min, max }),
        Just(Form::Deny),
        Just(Form::Free),
    ])
}

fn rule() -> impl Strategy<Value = Rule> {
    (selector(), vec(clause(), NAMES.len())).prop_map(|(selector, forms)| {
        let clauses = NAMES.iter().zip(forms).filter_map(|(name, form)| {
            Some(Clause {
                option: Named::Known(by_name(name).unwrap()),
                line: 1,
                span: 0..0,
                form: form?,
                on_conflict: OnConflict::Rewrite,
                errno: Errno::default(),
            })
        });
        Rule { name: "rule".to_owned(), line: 1, header: 0..0, selector, clauses: clauses.collect() }
    })
}

fn socket() -> impl Strategy<Value = Socket> {
    any_family().prop_flat_map(|family| {
        let protocol = sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Other, Protocol::Icmp]);
        let direction = option::of(sample::select(vec![Direction::Outbound, Direction::Inbound]));
        let remote = option::of((address(family), port()));
        (protocol, any::<bool>(), direction, option::of(address(family)), option::of(port()), remote).prop_map(
            move |(protocol, is_family_known, direction, local, local_port, remote)| Socket {
                protocol: Some(protocol),
                // Programs set the family as soon as they know an address.
                family: (is_family_known || local.is_some() || remote.is_some()).then_some(family),
                direction,
                local,
                local_port,
                remote: remote.map(SocketAddr::from),
                cgroup: None,
            },
        )
    })
}

fn policy(rules: Vec<Rule>) -> Policy {
    Policy {
        source: Source::new(Path::new("test.toml"), String::new()),
        name: "test".to_owned(),
        description: None,
        mode: Mode::Enforce,
        target: Target::default(),
        audit: Audit::default(),
        rules,
        tests: Vec::new(),
        instance: None,
    }
}

/// Compiles all policies into one scope.
fn compile_all(policies: &[Policy]) -> Result<Desired, CompileError> {
    compile(policies, &[all(policies)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compiled_policy_decides_as_the_policy_itself(
        rules in vec(rule(), 1..12),
        sockets in vec(socket(), 1..8),
    ) {
        let desired = compile_all(&[policy(rules.clone())]).unwrap();
        for socket in sockets {
            for name in NAMES {
                let named = Named::Known(by_name(name).unwrap());
                let compiled = winner_in(&desired, 0, named, &facts(&socket));
                prop_assert_eq!(compiled, naive_winner(&rules, named, &socket), "{} on {:?}", name, socket);
            }
            for option in explain(&desired, &desired.scopes[0], &socket).options {
                for (clause, why) in option.others {
                    let expected = rule_matches(&rules[clause.source.rule].selector, &socket);
                    let explained = match why {
                        WhyNot::Unmet(_) => Matches::No,
                        WhyNot::NotYet(_) => Matches::Perhaps,
                        WhyNot::Absent(_) | WhyNot::After(_) | WhyNot::Waits(_) => Matches::Yes,
                    };
                    prop_assert_eq!(explained, expected, "{:?} on {:?}", clause, socket);
                }
            }
        }
    }
}

fn plain_rule(name: &str, selector: Selector, forms: &[(&str, Form)]) -> Rule {
    let clauses = forms.iter().map(|(option, form)| Clause {
        option: Named::Known(by_name(option).unwrap()),
        line: 1,
        span: 0..0,
        form: form.clone(),
        on_conflict: OnConflict::Rewrite,
        errno: Errno::default(),
    });
    Rule { name: name.to_owned(), line: 1, header: 0..0, selector, clauses: clauses.collect() }
}

fn on() -> Form {
    Form::Set(Wanted::Number { value: 1, mask: u32::MAX })
}

#[test]
fn agreeing_argument_is_precomputed_if_one_setting_governs_all_sockets() {
    let tcp = Selector { protocols: vec![Protocol::Tcp], ..Selector::default() };
    let limit = Form::Limit { min: 0, max: 1 };
    for (selector, form, agrees) in
        [(Selector::default(), on(), true), (tcp, on(), false), (Selector::default(), limit, false)]
    {
        let rule = plain_rule("r", selector, &[("TCP_NODELAY", form)]);
        let desired = compile_all(&[policy(vec![rule])]).unwrap();
        let option = desired.scopes[0].options[0];
        assert_eq!(option.fast_match(4, &words_of(1)), agrees);
        assert!(!option.fast_match(4, &words_of(0)) && !option.fast_match(8, &words_of(1)));
    }
}

#[test]
fn sixty_four_rules_fit_and_one_more_does_not() {
    let rules = |count| vec![plain_rule("r", Selector::default(), &[("TCP_NODELAY", on())]); count];
    assert!(compile_all(&[policy(rules(64))]).is_ok());
    assert_eq!(
        compile_all(&[policy(rules(32)), policy(rules(33))]).unwrap_err(),
        CompileError::TooManyRules { policies: vec!["test".to_owned(); 2], count: 65 }
    );
}

#[test]
fn enforcing_and_dry_policies_do_not_mix() {
    let enforced = policy(Vec::new());
    let dry = Policy { mode: Mode::DryRun, ..enforced.clone() };
    assert!(matches!(compile_all(&[enforced, dry]), Err(CompileError::MixedModes { .. })));
}

#[test]
fn only_the_hooks_that_a_policy_needs_are_attached() {
    let hooks = |selector, forms: &[(&str, Form)]| {
        compile_all(&[policy(vec![plain_rule("r", selector, forms)])]).unwrap().hooks()
    };
    let tcp = Selector { protocols: vec![Protocol::Tcp], ..Selector::default() };
    assert_eq!(
        hooks(tcp.clone(), &[("TCP_NODELAY", on())]),
        [Hook::SockCreate, Hook::SockOps, Hook::Setsockopt, Hook::Getsockopt]
    );
    assert_eq!(
        hooks(Selector::default(), &[("IP_TTL", Form::Deny)]),
        [Hook::SockCreate, Hook::SockOps, Hook::Setsockopt]
    );
    let udp = Selector { protocols: vec![Protocol::Udp], ..Selector::default() };
    assert_eq!(hooks(udp, &[("IP_TTL", Form::Deny)]), [Hook::SockCreate, Hook::Setsockopt]);
    assert_eq!(compile_all(&[policy(Vec::new())]).unwrap().hooks(), []);
    assert_eq!(
        hooks(tcp, &[("SO_MARK", on())]),
        [Hook::SockCreate, Hook::Connect4, Hook::Connect6, Hook::SockOps, Hook::Setsockopt, Hook::Getsockopt]
    );
}

#[test]
fn rules_are_in_the_order_of_the_files() {
    let first = policy(vec![plain_rule("a", Selector::default(), &[("TCP_NODELAY", on())])]);
    let second = policy(vec![plain_rule("b", Selector::default(), &[("TCP_NODELAY", Form::Deny)])]);
    let desired = compile_all(&[first, second]).unwrap();
    let socket = Facts { protocol: protocol::TCP, ..Facts::default() };
    let named = Named::Known(by_name("TCP_NODELAY").unwrap());
    assert_eq!(winner_in(&desired, 0, named, &socket), Some(0));
    assert_eq!(desired.rules.iter().map(|rule| rule.rule.as_str()).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn each_scope_has_the_rules_of_its_policies_in_its_own_order() {
    let port = |port| Selector { local_ports: vec![port..=port], ..Selector::default() };
    let one = policy(vec![plain_rule("one", port(1), &[("TCP_NODELAY", on())])]);
    let two = policy(vec![
        plain_rule("two", port(2), &[("TCP_NODELAY", on())]),
        plain_rule("both", Selector::default(), &[("TCP_NODELAY", on())]),
    ]);
    let desired = compile(&[one, two], &[vec![0, 1], vec![1, 0], vec![0]]).unwrap();
    let socket = |port| Facts { local_port: port, known: abi::socket::known::LOCAL_PORT, ..Facts::default() };
    let named = Named::Known(by_name("TCP_NODELAY").unwrap());
    let winners = |scope| [1, 2, 3].map(|port| winner_in(&desired, scope, named, &socket(port)));
    assert_eq!(winners(0), [Some(0), Some(1), Some(2)]);
    assert_eq!(winners(1), [Some(2), Some(1), Some(2)]);
    assert_eq!(winners(2), [Some(0), None, None]);
}

#[test]
fn policies_of_different_modes_can_be_on_different_targets() {
    let enforced = policy(vec![plain_rule("a", Selector::default(), &[("TCP_NODELAY", on())])]);
    let dry = Policy { mode: Mode::DryRun, ..enforced.clone() };
    let desired = compile(&[enforced, dry], &[vec![0], vec![1]]).unwrap();
    assert_eq!(desired.settings.iter().map(Setting::is_dry_run).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn dry_run_needs_a_hook_if_verdicts_depend_on_notes_of_sockets() {
    let limit = || Form::Limit { min: 0, max: 9 };
    let tcp = || Selector { protocols: vec![Protocol::Tcp], ..Selector::default() };
    let inbound = || Selector { direction: Some(Direction::Inbound), ..Selector::default() };
    let ssh = || Selector { remote_ports: vec![22..=22], ..Selector::default() };
    let needs = |mode, rules| compile_all(&[Policy { mode, ..policy(rules) }]).unwrap().needs_hook();
    for (rules, expected) in [
        (vec![plain_rule("a", tcp(), &[("TCP_NODELAY", on()), ("TCP_KEEPCNT", limit())])], None),
        (vec![plain_rule("a", ssh(), &[("TCP_NODELAY", on())])], None),
        (vec![plain_rule("a", inbound(), &[("TCP_NODELAY", on())])], Some(NeedsHook::Direction)),
        (vec![plain_rule("a", ssh(), &[("TCP_KEEPCNT", limit())])], Some(NeedsHook::Later)),
        (
            vec![
                plain_rule("a", tcp(), &[("TCP_KEEPCNT", limit())]),
                plain_rule("b", Selector::default(), &[("TCP_KEEPCNT", on())]),
            ],
            Some(NeedsHook::Later),
        ),
        (
            vec![
                plain_rule("a", Selector::default(), &[("TCP_KEEPCNT", limit())]),
                plain_rule("b", Selector::default(), &[("TCP_KEEPCNT", on())]),
            ],
            None,
        ),
    ] {
        assert_eq!(needs(Mode::DryRun, rules.clone()), expected, "{rules:?}");
        assert_eq!(needs(Mode::Enforce, rules), Some(NeedsHook::Enforced));
    }
    let mut yielding = plain_rule("a", Selector::default(), &[("TCP_NODELAY", on())]);
    yielding.clauses[0].on_conflict = OnConflict::Allow;
    assert_eq!(needs(Mode::DryRun, vec![yielding]), Some(NeedsHook::Yielding));
}
