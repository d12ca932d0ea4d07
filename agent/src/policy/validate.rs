//! The meaning of a policy file: `PolicyFile` → [`Policy`].
//!
//! The only place that checks names, values, ranges and combinations. It does no I/O and does not depend on this
//! machine: whether a congestion control is loaded, for example, is checked elsewhere.
//!
//! Invariant: a [`Policy`] is returned only if there is no error. All errors of the file are found at once.

pub(super) mod clauses;
mod selector;
mod target;
mod tests;
mod values;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use abi::RULES_MAX;

use super::{
    diagnostic::{Diagnostic, Findings, Problem, Source, Span, quote},
    file::{self, AuditFile, PolicyFile, RuleFile, Text},
    model::{Audit, Calls, Policy, Rule},
    words,
};

/// The position of the keys of the file itself, if they are missing.
pub(crate) const TOP: Span = 0..0;

/// Longest name of a policy. It becomes a file name.
const POLICY_NAME_MAX: usize = 64;

/// A valid policy, its warnings, and the position of its name.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) policy: Policy,
    pub(crate) warnings: Vec<Diagnostic>,
    pub(crate) name: Span,
}

/// Checks a policy file.
pub(crate) fn check(source: &Arc<Source>) -> Result<Checked, Vec<Diagnostic>> {
    let mut findings = Findings::new(source);
    let checked = file::parse(source.text(), &mut findings).map(|file| {
        let name = file.name.as_ref().map_or(TOP, Text::span);
        (validate(&file, source, &mut findings), name)
    });
    let valid = findings.errors() == 0;
    let found = findings.into_sorted();
    match checked {
        Some((policy, name)) if valid => Ok(Checked { policy, warnings: found, name }),
        _ => Err(found),
    }
}

/// Returns a policy with the valid parts of the file: all of it if there were no findings.
fn validate(file: &PolicyFile<'_>, source: &Arc<Source>, findings: &mut Findings) -> Policy {
    let shape_is_right = findings.errors() == 0;
    let PolicyFile { name, description, mode, target, audit, rules: rule_files, tests } = file;
    let rules = rules(rule_files, findings);
    let policy = Policy {
        source: Arc::clone(source),
        name: policy_name(name.as_ref(), source.path(), findings),
        description: description.as_ref().map(|text| text.get_ref().clone().into_owned()),
        mode: mode.as_ref().and_then(|word| findings.ok(words::pick("mode", word, words::MODES))).unwrap_or_default(),
        target: target::target(target, findings),
        audit: audit_of(audit, findings),
        rules,
        tests: tests::tests(tests, findings),
        instance: None,
    };
    if shape_is_right && rule_files.is_empty() {
        refuse_inactive(audit, policy.audit.calls, findings);
    }
    policy
}

fn policy_name(given: Option<&Text<'_>>, path: &Path, findings: &mut Findings) -> String {
    if let Some(given) = given {
        let name = given.get_ref().as_ref();
        if !is_policy_name(name) {
            findings.error(
                Problem::new(format!("{} cannot be the name of a policy", quote(name)))
                    .help(format!(
                        "use up to {POLICY_NAME_MAX} letters, digits, `-`, `_` and `.`; do not start with `.`"
                    ))
                    .at(given.span()),
            );
        }
        return name.to_owned();
    }
    match path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| is_policy_name(stem)) {
        Some(stem) => stem.to_owned(),
        None => {
            findings.error(
                Problem::new("a policy cannot be named after this file").help("give it a name: name = \"web\"").at(TOP),
            );
            String::new()
        }
    }
}

fn is_policy_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=POLICY_NAME_MAX).contains(&name.len()) && !name.starts_with('.') && name.chars().all(allowed)
}

fn audit_of(file: &AuditFile<'_>, findings: &mut Findings) -> Audit {
    let AuditFile { calls, reads, timing } = file;
    let default = Audit::default();
    let calls = calls.as_ref().and_then(|word| findings.ok(words::pick("calls", word, words::CALLS)));
    Audit {
        calls: calls.unwrap_or(default.calls),
        reads: reads.unwrap_or(default.reads),
        timing: timing.unwrap_or(default.timing),
    }
}

/// Refuses a policy without rules unless it reports all calls.
fn refuse_inactive(audit: &AuditFile<'_>, calls: Calls, findings: &mut Findings) {
    if calls == Calls::All {
        return;
    }
    // Points to a wrong word, or else to where the rules would be.
    let span = audit.calls.as_ref().map_or_else(|| findings.end(), Text::span);
    findings.error(
        Problem::new("this policy has no rules, so it does nothing")
            .help("add a [[rule]]; or, to see every call and change none, write calls = \"all\" in [audit]")
            .at(span),
    );
}

fn rules(files: &[RuleFile<'_>], findings: &mut Findings) -> Vec<Rule> {
    if let Some(first_too_many) = files.get(RULES_MAX) {
        findings.error(
            Problem::new(format!("this policy has {} rules; it can have at most {RULES_MAX}", files.len()))
                .help("join rules that differ only in an address or a port: `match` takes lists")
                .at(first_too_many.header.clone()),
        );
    }
    let mut lines_by_name = BTreeMap::new();
    let mut rules = Vec::new();
    for (at, file) in files.iter().enumerate() {
        let line = findings.line(&file.header);
        let name = rule_name(file, at, findings);
        if let Some(first) = lines_by_name.insert(name.clone(), line) {
            findings.error(
                Problem::new(format!("two rules have the name {}: the first one is on line {first}", quote(&name)))
                    .help("give this rule another name: reports identify rules by name")
                    .at(file.name.as_ref().map_or_else(|| file.header.clone(), Text::span)),
            );
        }
        rules.push(Rule {
            name,
            line,
            header: file.header.clone(),
            selector: selector::selector(&file.selector, findings),
            clauses: clauses::clauses(file, findings),
        });
    }
    rules
}

fn rule_name(file: &RuleFile<'_>, at: usize, findings: &mut Findings) -> String {
    let Some(given) = &file.name else { return format!("rule-{}", at + 1) };
    let name = given.get_ref().as_ref();
    if name.trim().is_empty() || name.chars().count() > POLICY_NAME_MAX || name.contains(char::is_control) {
        findings.error(
            Problem::new(format!("{} cannot be the name of a rule", quote(name)))
                .help(format!("use one line of up to {POLICY_NAME_MAX} characters, or leave `name` out"))
                .at(given.span()),
        );
    }
    name.to_owned()
}
