//! `set`, `limit`, `deny` and `free` of one rule → one [`Clause`] for each option that it names.

use std::collections::BTreeMap;

use abi::setting::{OptionKey, effective};

use super::values;
use crate::{
    options::{self, Class, OPTIONS, SocketOption, ValueKind},
    policy::{
        diagnostic::{Findings, Problem, nearest, quote},
        file::{LimitFile, RuleFile, SettingFile, Text, Value},
        model::{Clause, Errno, Form, Named, OnConflict},
        units, words,
    },
};

/// What applies to options of a rule that do not set their own.
struct Defaults {
    on_conflict: OnConflict,
    errno: Option<Errno>,
}

/// Returns a clause for each option that the rule names, in the order of the file.
pub(super) fn clauses(rule: &RuleFile<'_>, findings: &mut Findings) -> Vec<Clause> {
    let before = findings.errors();
    let defaults = Defaults {
        on_conflict: on_conflict(rule.on_conflict.as_ref(), findings).unwrap_or_default(),
        errno: rule.errno.as_ref().and_then(|errno| findings.ok(words::errno(errno))),
    };
    let mut clauses = Vec::new();
    clauses.extend(rule.set.iter().filter_map(|setting| set(setting, &defaults, findings)));
    clauses.extend(rule.limit.iter().filter_map(|limit| limited(limit, &defaults, findings)));
    clauses.extend(rule.deny.iter().filter_map(|option| denied(option, &defaults, findings)));
    clauses.extend(rule.free.iter().filter_map(|option| freed(option, findings)));
    clauses.sort_by_key(|clause: &Clause| clause.span.start);
    refuse_duplicates(&clauses, findings);
    // After another error, the errno may have been meant for the faulty part.
    if rule.complete && findings.errors() == before {
        refuse_unused_errno(rule, &clauses, findings);
        refuse_empty_rule(rule, &clauses, findings);
    }
    clauses
}

fn set(file: &SettingFile<'_>, defaults: &Defaults, findings: &mut Findings) -> Option<Clause> {
    let SettingFile { option, value, on_conflict: own_action, errno } = file;
    let action = on_conflict(own_action.as_ref(), findings).unwrap_or(defaults.on_conflict);
    let errno = own_errno(errno.as_ref(), action, defaults, findings);
    let option = findings.ok(writable_option(option))?;
    if option.settable().is_none() {
        findings.error(
            Problem::new(format!("the kernel does not let programs set {}", option.name))
                .help(how_to_guard(option))
                .at(file.option.span()),
        );
        return None;
    }
    let wanted = findings.ok(values::wanted(option, value.as_ref()?))?;
    Some(clause_at(&file.option, Named::Known(option), Form::Set(wanted), action, errno?, findings))
}

/// Returns help about what can be done with an option that cannot be set.
fn how_to_guard(option: &SocketOption) -> String {
    let deny = format!("deny = [\"{}\"]", option.name);
    if !option.can_be_limited() {
        return format!("keep applications from setting it: {deny}");
    }
    format!(
        "keep applications from setting it: {deny}, or within bounds: limit = {{ {} = {{ max = … }} }}",
        option.name
    )
}

fn limited(file: &LimitFile<'_>, defaults: &Defaults, findings: &mut Findings) -> Option<Clause> {
    let LimitFile { option, min, max, on_conflict: own_action, errno } = file;
    let action = on_conflict(own_action.as_ref(), findings).unwrap_or(defaults.on_conflict);
    let errno = own_errno(errno.as_ref(), action, defaults, findings);
    let option = findings.ok(writable_option(option))?;
    if !option.can_be_limited() {
        findings.error(no_bounds(option).at(file.option.span()));
        return None;
    }
    let mut bound = |value: Option<&Value<'_>>, default| match value {
        Some(value) => findings.ok(values::number(option, value)),
        None => Some(default),
    };
    let (least, most) = (bound(min.as_ref(), option.range.0), bound(max.as_ref(), option.range.1));
    let (least, most) = (least?, most?);
    refuse_default_as_bound(option, max.as_ref(), most, findings)?;
    if least > most {
        let [least, most] = [least, most].map(|bound| units::show_literal(option.value, bound));
        let span = max.as_ref().or(min.as_ref()).map_or_else(|| file.option.span(), Value::span);
        findings.error(
            Problem::new(format!("the limit of {} holds no value: its `max` is below its `min`", option.name))
                .help(format!("write {{ min = {most}, max = {least} }}"))
                .at(span),
        );
        return None;
    }
    let form = Form::Limit { min: least, max: most };
    Some(clause_at(&file.option, Named::Known(option), form, action, errno?, findings))
}

/// Refuses a value that the kernel reads as its default or as "no limit" as an upper bound.
fn refuse_default_as_bound(
    option: &SocketOption,
    file: Option<&Value<'_>>,
    most: i64,
    findings: &mut Findings,
) -> Option<()> {
    let Some(file) = file.filter(|_| ![effective::SAME, most].contains(&option.stands_for(most))) else {
        return Some(());
    };
    let shown = units::show_literal(option.value, most);
    let meaning = match option.stands_for(most) {
        effective::UNCERTAIN => "different things to different kernels".to_owned(),
        i64::MAX => "no limit".to_owned(),
        number => units::show(option.value, number),
    };
    findings.error(
        Problem::new(format!("{} cannot be at most {shown}: to the kernel {shown} means {meaning}", option.name))
            .help(format!("write a larger `max`, or keep applications from setting it: deny = [\"{}\"]", option.name))
            .at(file.span()),
    );
    None
}

fn no_bounds(option: &SocketOption) -> Problem {
    let (kind, aside) = match option.value {
        ValueKind::Bool => ("either true or false", ""),
        ValueKind::Opaque(_) => (option.value.describe(), ", which policies do not interpret"),
        kind => (kind.describe(), ""),
    };
    let problem = Problem::new(format!("{} cannot be limited: it is {kind}{aside}", option.name));
    let deny = format!("deny = [\"{}\"]", option.name);
    if option.settable().is_some() {
        problem.help(format!("give it a value: set = {{ {} = {} }}, or {deny}", option.name, option.example))
    } else {
        problem.help(format!("keep applications from setting it: {deny}"))
    }
}

fn denied(option: &Text<'_>, defaults: &Defaults, findings: &mut Findings) -> Option<Clause> {
    let named = findings.ok(option_named(option))?;
    let errno = defaults.errno.unwrap_or_default();
    Some(clause_at(option, named, Form::Deny, OnConflict::Deny, errno, findings))
}

fn freed(option: &Text<'_>, findings: &mut Findings) -> Option<Clause> {
    let named = findings.ok(option_named(option))?;
    Some(clause_at(option, named, Form::Free, OnConflict::Allow, Errno::default(), findings))
}

/// Returns the option with this name, or with this number.
pub(super) fn option_named(name: &Text<'_>) -> Result<Named, Problem> {
    match numeric(name.get_ref()) {
        Some(key) => Ok(options::by_spelling(key).map_or(Named::Numeric(key), Named::Known)),
        None => named_option(name).map(Named::Known),
    }
}

fn clause_at(
    name: &Text<'_>,
    option: Named,
    form: Form,
    on_conflict: OnConflict,
    errno: Errno,
    findings: &Findings,
) -> Clause {
    let span = name.span();
    Clause { option, line: findings.line(&span), span, form, on_conflict, errno }
}

fn on_conflict(word: Option<&Text<'_>>, findings: &mut Findings) -> Option<OnConflict> {
    findings.ok(words::pick("on_conflict", word?, words::ON_CONFLICT))
}

/// Returns the errno for one option; `None` if the file's value is wrong, which has been reported.
fn own_errno(
    value: Option<&Value<'_>>,
    action: OnConflict,
    defaults: &Defaults,
    findings: &mut Findings,
) -> Option<Errno> {
    let Some(value) = value else { return Some(defaults.errno.unwrap_or_default()) };
    let errno = findings.ok(words::errno(value))?;
    if action == OnConflict::Deny {
        return Some(errno);
    }
    findings.error(unused_errno(value));
    None
}

fn unused_errno(value: &Value<'_>) -> Problem {
    Problem::new("`errno` has no effect: no call is denied here")
        .help("write on_conflict = \"deny\" beside it, or remove `errno`")
        .at(value.span())
}

fn refuse_unused_errno(rule: &RuleFile<'_>, clauses: &[Clause], findings: &mut Findings) {
    let denies = clauses.iter().any(|clause| clause.on_conflict == OnConflict::Deny);
    if let Some(errno) = rule.errno.as_ref().filter(|_| !denies) {
        findings.error(unused_errno(errno));
    }
}

fn refuse_empty_rule(rule: &RuleFile<'_>, clauses: &[Clause], findings: &mut Findings) {
    if clauses.is_empty() {
        findings.error(
            Problem::new("this rule names no option, so it does nothing")
                .help("add an option, such as set = { TCP_NODELAY = true }, or remove the rule")
                .at(rule.header.clone()),
        );
    }
}

fn refuse_duplicates(clauses: &[Clause], findings: &mut Findings) {
    let mut first_by_key: BTreeMap<OptionKey, &Clause> = BTreeMap::new();
    for second in clauses {
        let option = second.option;
        let Some(first) = first_by_key.insert(option.value_key(), second) else { continue };
        let (line, other) = (first.line, first.option);
        let is_same = (&first.form, first.on_conflict, first.errno) == (&second.form, second.on_conflict, second.errno);
        if other != option && is_same && !matches!(first.form, Form::Set(_)) {
            continue;
        }
        let message = if other == option {
            format!("this rule names {option} twice: the first time on line {line}")
        } else {
            format!("this rule names {option} and, on line {line}, {other}: both set the same value")
        };
        findings.error(
            Problem::new(message).help("remove one of the two, or move one to another rule").at(second.span.clone()),
        );
    }
}

/// Returns the option with this name, if applications can set it.
fn writable_option(name: &Text<'_>) -> Result<&'static SocketOption, Problem> {
    let option = named_option(name)?;
    if option.class == Class::ReadOnly {
        return Err(Problem::new(format!("{} can only be read: there is nothing to set or to limit", option.name))
            .help("remove it: the kernel refuses every call that sets it")
            .at(name.span()));
    }
    Ok(option)
}

/// Returns the option with this name.
fn named_option(name: &Text<'_>) -> Result<&'static SocketOption, Problem> {
    let word = name.get_ref().as_ref();
    if let Some(option) = options::by_name(word) {
        return Ok(option);
    }
    if let Some(key) = numeric(word) {
        let problem = Problem::new(format!("{}: options given by number can only be denied", quote(word)));
        return Err(match options::by_key(key) {
            Some(option) => problem.help(format!("write {} for it", option.name)),
            None => problem.help(format!("write deny = [\"{word}\"]")),
        }
        .at(name.span()));
    }
    let problem = Problem::new(format!("unknown option {}", quote(word))).at(name.span());
    Err(match nearest_option(word) {
        Some(near) => problem.help(format!("did you mean {}?", quote(near))),
        None if word.contains(':') => problem.help("write LEVEL:NUMBER with two numbers, such as \"6:99\""),
        None => problem.help("list the options: sockpolicy options"),
    })
}

/// Returns the option that was probably meant, also if the prefix or the capitals are missing.
#[must_use]
pub fn nearest_option(word: &str) -> Option<&'static str> {
    let names = || OPTIONS.iter().map(|option| option.name);
    let without_prefix = |name: &str| name.split_once('_').map(|(_, rest)| rest.to_owned());
    names()
        .find(|name| without_prefix(name).is_some_and(|rest| rest.eq_ignore_ascii_case(word)))
        .or_else(|| nearest(word, names()))
}

/// Parses `LEVEL:NUMBER`.
fn numeric(text: &str) -> Option<OptionKey> {
    let number = |text: &str| text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let (level, name) = text.split_once(':')?;
    Some(OptionKey { level: number(level)?, name: number(name)? })
}
