//! Warnings about marks with bits that other software on the host may use.
//!
//! Only bits that a policy sets to 1 are checked: other software expects a bit to be 0 on a new socket.

use super::{clauses, warning};
use crate::{
    options::ValueKind,
    policy::{
        diagnostic::{Diagnostic, Problem},
        model::{Clause, Form, Named, Policy, Wanted},
        units,
    },
};

/// Which software uses which bits, from <https://github.com/fwmark/registry>. Tailscale's whole byte is from its source
/// (tsconst/linuxfw.go). Cilium's are the bits that identify where packets come from; it uses others internally.
const USERS: &[(&str, u32)] = &[
    ("the AWS VPC CNI", 0x0000_0080),
    ("Cilium", 0x0000_0f00),
    ("the portmap CNI plugin", 0x0000_2000),
    ("Kubernetes (kube-proxy)", 0x0000_c000),
    ("Tailscale", 0x00ff_0000),
    ("Calico", 0xffff_0000),
];

/// Marks of which software compares all bits.
const WHOLE: &[(&str, u32)] = &[("Istio", 0x1337), ("Istio", 1337), ("AWS App Mesh", 0x1e77_00ce)];

pub(super) fn lint(policy: &Policy) -> Vec<Diagnostic> {
    let problem = |clause: &Clause| match (clause.option, &clause.form) {
        (Named::Known(option), Form::Set(Wanted::Number { value, mask })) if option.value == ValueKind::Mark => {
            shared_bits(*value, *mask)
        }
        _ => None,
    };
    clauses(policy).filter_map(|(_, clause)| Some(warning(policy, problem(clause)?.at(clause.span.clone())))).collect()
}

fn shared_bits(value: u32, mask: u32) -> Option<Problem> {
    let shown = |bits: u32| units::show_literal(ValueKind::Mark, bits.into());
    let whole = WHOLE.iter().filter(|(_, mark)| mask == u32::MAX && *mark == value).map(|(user, _)| (*user, value));
    let bits = USERS.iter().filter(|(_, bits)| bits & value != 0).map(|(user, bits)| (*user, bits & value));
    let used: Vec<String> = whole.chain(bits).map(|(user, bits)| format!("{user} ({})", shown(bits))).collect();
    (!used.is_empty()).then(|| {
        Problem::new(format!("this mark has bits that other software uses: {}", used.join(", ")))
            .help("if that software runs on this host, use other bits, such as \"0x20/0x20\"")
    })
}
