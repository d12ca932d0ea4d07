//! The syntax of a policy file: text → [`PolicyFile`], the contents of the file with the position of each part.
//!
//! This module knows which keys each table has, and whether they take a string, a list or a table. The meaning is left
//! to [`super::validate`]. Values of options are not interpreted.
//!
//! Invariant: an unknown key is an error, never skipped. One error does not hide the others, except in a file that is
//! not TOML: it gets one error for each line with a syntax error, and no others.

pub(super) mod keys;
mod target;

use std::borrow::Cow;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use self::keys::{AUDIT, LIMIT, MATCH, RULE, SETTING, SOCKET, TEST, TOP, unknown_key};
pub(crate) use self::target::{ContainerFile, TargetFile};
use super::diagnostic::{Findings, Problem, Span, quote};

pub(crate) type Text<'a> = Spanned<Cow<'a, str>>;
pub(crate) type Value<'a> = Spanned<DeValue<'a>>;

/// A list that is not empty.
pub(crate) type List<T> = Spanned<Vec<T>>;

/// A policy as written.
#[derive(Debug, Default)]
pub(crate) struct PolicyFile<'a> {
    pub(crate) name: Option<Text<'a>>,
    pub(crate) description: Option<Text<'a>>,
    pub(crate) mode: Option<Text<'a>>,
    pub(crate) target: TargetFile<'a>,
    pub(crate) audit: AuditFile<'a>,
    pub(crate) rules: Vec<RuleFile<'a>>,
    pub(crate) tests: Vec<TestFile<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct AuditFile<'a> {
    pub(crate) calls: Option<Text<'a>>,
    pub(crate) reads: Option<bool>,
    pub(crate) timing: Option<bool>,
}

#[derive(Debug)]
pub(crate) struct RuleFile<'a> {
    pub(crate) header: Span,
    pub(crate) name: Option<Text<'a>>,
    pub(crate) selector: SelectorFile<'a>,
    pub(crate) set: Vec<SettingFile<'a>>,
    pub(crate) limit: Vec<LimitFile<'a>>,
    pub(crate) deny: Vec<Text<'a>>,
    pub(crate) free: Vec<Text<'a>>,
    pub(crate) on_conflict: Option<Text<'a>>,
    pub(crate) errno: Option<Value<'a>>,
    /// Whether the syntax of the whole rule is correct.
    pub(crate) complete: bool,
}

/// The settings that a socket must get, in the syntax of a rule.
#[derive(Debug)]
pub(crate) struct TestFile<'a> {
    pub(crate) socket: SocketFile<'a>,
    /// Without a selector.
    pub(crate) expected: RuleFile<'a>,
    pub(crate) free: Vec<Text<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct SocketFile<'a> {
    /// The position of the table, or of the header of the test if it has none.
    pub(crate) span: Span,
    pub(crate) protocol: Option<Text<'a>>,
    pub(crate) family: Option<Text<'a>>,
    pub(crate) direction: Option<Text<'a>>,
    pub(crate) local: Option<Text<'a>>,
    pub(crate) remote: Option<Text<'a>>,
    pub(crate) cgroup: Option<Text<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct SelectorFile<'a> {
    pub(crate) protocol: Option<List<Text<'a>>>,
    pub(crate) family: Option<Text<'a>>,
    pub(crate) direction: Option<Text<'a>>,
    pub(crate) local: Option<List<Text<'a>>>,
    pub(crate) remote: Option<List<Text<'a>>>,
    pub(crate) not_remote: Option<List<Text<'a>>>,
    pub(crate) local_port: Option<List<Value<'a>>>,
    pub(crate) remote_port: Option<List<Value<'a>>>,
}

/// One option under `set`.
#[derive(Debug)]
pub(crate) struct SettingFile<'a> {
    pub(crate) option: Text<'a>,
    /// `None` if the value is missing or wrong, which has been reported.
    pub(crate) value: Option<Value<'a>>,
    pub(crate) on_conflict: Option<Text<'a>>,
    pub(crate) errno: Option<Value<'a>>,
}

/// One option under `limit`.
#[derive(Debug)]
pub(crate) struct LimitFile<'a> {
    pub(crate) option: Text<'a>,
    pub(crate) min: Option<Value<'a>>,
    pub(crate) max: Option<Value<'a>>,
    pub(crate) on_conflict: Option<Text<'a>>,
    pub(crate) errno: Option<Value<'a>>,
}

/// Parses a policy. Returns `None` if the text is not TOML; otherwise the parts that are correct. Errors are added to
/// `findings`.
pub(crate) fn parse<'a>(text: &'a str, findings: &mut Findings) -> Option<PolicyFile<'a>> {
    let (document, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Some(policy(document.into_inner(), findings));
    }
    let mut problems: Vec<_> = errors
        .iter()
        .map(|error| {
            let span = error.span().unwrap_or_else(|| findings.end());
            syntax(error.message(), text.get(span.clone()).unwrap_or("")).at(span)
        })
        .collect();
    problems.sort_by_key(|problem| problem.span.as_ref().map(|span| span.start));
    // After the first error in a line, the parser's other errors for the line are noise.
    problems.dedup_by_key(|problem| problem.span.as_ref().map(|span| findings.line(span)));
    problems.into_iter().for_each(|problem| findings.error(problem));
    None
}

/// Returns the parser's error, reworded if the parser does not say what to write. The parser does not always know what
/// it expected.
fn syntax(message: &str, written: &str) -> Problem {
    let (what, expected) = match message.split_once(", expected ") {
        Some((what, expected)) => (what, Some(expected)),
        None => (message, None),
    };
    match (what, expected) {
        ("duplicate key", _) => {
            Problem::new("duplicate key").help("remove one of the two, or make a [[rule]] for each")
        }
        ("string values must be quoted", _) => {
            Problem::new("text must be in quotes").help(format!("write \"{written}\""))
        }
        ("key with no value", _) => Problem::new(what).help("write `key = value`"),
        // Most often an open bracket in the line before is the cause.
        ("missing comma between key-value pairs" | "missing key for inline table element", _) => {
            Problem::new(what).help("write `,` here, or close the `{` before it with `}`")
        }
        ("missing comma between array elements", _) => {
            Problem::new(what).help("write `,` here, or close the `[` before it with `]`")
        }
        _ if written.starts_with("//") => Problem::new("this is not TOML").help("comments begin with #"),
        (_, Some(expected)) => Problem::new(what).help(format!("write {} here", expected.replace(", ", " or "))),
        (_, None) => Problem::new(what),
    }
}

fn policy<'a>(table: DeTable<'a>, findings: &mut Findings) -> PolicyFile<'a> {
    let mut file = PolicyFile::default();
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "name" => file.name = findings.ok(text(&key, value)),
            "description" => file.description = findings.ok(text(&key, value)),
            "mode" => file.mode = findings.ok(text(&key, value)),
            "target" => file.target = target::target(&key, value, findings),
            "audit" => file.audit = audit(&key, value, findings),
            "rule" => file.rules = tables(&key, value, findings, rule),
            "test" => file.tests = tables(&key, value, findings, test),
            _ => findings.error(unknown_key(&key, &TOP)),
        }
    }
    file
}

fn audit<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> AuditFile<'a> {
    let mut audit = AuditFile::default();
    let Some((_, table)) = findings.ok(table(key, value, "write [audit] on a line of its own")) else {
        return audit;
    };
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "calls" => audit.calls = findings.ok(text(&key, value)),
            "reads" => audit.reads = findings.ok(boolean(&key, &value)),
            "timing" => audit.timing = findings.ok(boolean(&key, &value)),
            _ => findings.error(unknown_key(&key, &AUDIT)),
        }
    }
    audit
}

/// Reads the tables of a `[[key]]`, each with the position of its header.
fn tables<'a, T>(
    key: &Text<'a>,
    value: Value<'a>,
    findings: &mut Findings,
    read: impl Fn(Span, DeTable<'a>, &mut Findings) -> T,
) -> Vec<T> {
    let key = key.get_ref();
    let help = format!("write [[{key}]], with two brackets on each side");
    let span = value.span();
    let DeValue::Array(items) = value.into_inner() else {
        findings.error(Problem::new(format!("`{key}` is not a list of {key}s")).help(help).at(span));
        return Vec::new();
    };
    let mut tables = Vec::new();
    for item in items {
        let span = item.span();
        match item.into_inner() {
            DeValue::Table(table) => tables.push(read(span, table, findings)),
            other => {
                let message = format!("a {key} must be a table, not {}", type_of(&other));
                findings.error(Problem::new(message).help(help.clone()).at(span));
            }
        }
    }
    tables
}

fn empty_rule<'a>(header: Span) -> RuleFile<'a> {
    RuleFile {
        header,
        name: None,
        selector: SelectorFile::default(),
        set: Vec::new(),
        limit: Vec::new(),
        deny: Vec::new(),
        free: Vec::new(),
        on_conflict: None,
        errno: None,
        complete: true,
    }
}

fn rule<'a>(header: Span, table: DeTable<'a>, findings: &mut Findings) -> RuleFile<'a> {
    let mut rule = empty_rule(header);
    let before = findings.errors();
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "name" => rule.name = findings.ok(text(&key, value)),
            "match" => rule.selector = selector(&key, value, findings),
            "set" => rule.set = settings(&key, value, findings),
            "limit" => rule.limit = limits(&key, value, findings),
            "deny" => rule.deny = options(&key, value, findings),
            "free" => rule.free = options(&key, value, findings),
            "on_conflict" => rule.on_conflict = findings.ok(text(&key, value)),
            "errno" => rule.errno = Some(value),
            _ => findings.error(unknown_key(&key, &RULE)),
        }
    }
    rule.complete = findings.errors() == before;
    rule
}

fn options<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> Vec<Text<'a>> {
    let help = format!("name an option, or leave {} out", quote(key.get_ref()));
    texts(key, value, &help, findings).map(Spanned::into_inner).unwrap_or_default()
}

fn test<'a>(header: Span, table: DeTable<'a>, findings: &mut Findings) -> TestFile<'a> {
    let mut test = TestFile {
        socket: SocketFile { span: header.clone(), ..SocketFile::default() },
        // A test need not name an option.
        expected: RuleFile { complete: false, ..empty_rule(header) },
        free: Vec::new(),
    };
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "name" => test.expected.name = findings.ok(text(&key, value)),
            "socket" => test.socket = socket(&key, value, findings),
            "set" => test.expected.set = settings(&key, value, findings),
            "limit" => test.expected.limit = limits(&key, value, findings),
            "deny" => test.expected.deny = options(&key, value, findings),
            "free" => test.free = options(&key, value, findings),
            _ => findings.error(unknown_key(&key, &TEST)),
        }
    }
    test
}

fn socket<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> SocketFile<'a> {
    let mut socket = SocketFile { span: value.span(), ..SocketFile::default() };
    let help = "write socket = { protocol = \"tcp\", remote = \"192.0.2.1:443\" }";
    let Some((_, table)) = findings.ok(table(key, value, help)) else { return socket };
    for (key, value) in in_order(table) {
        let part = match key.get_ref().as_ref() {
            "protocol" => &mut socket.protocol,
            "family" => &mut socket.family,
            "direction" => &mut socket.direction,
            "local" => &mut socket.local,
            "remote" => &mut socket.remote,
            "cgroup" => &mut socket.cgroup,
            _ => {
                findings.error(unknown_key(&key, &SOCKET));
                continue;
            }
        };
        *part = findings.ok(text(&key, value));
    }
    socket
}

fn selector<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> SelectorFile<'a> {
    const EMPTY: &str = "an empty list matches no socket; a key that is left out matches every socket";
    let mut selector = SelectorFile::default();
    let help = "write match = { protocol = \"tcp\" }";
    let Some((_, table)) = findings.ok(table(key, value, help)) else { return selector };
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "protocol" => selector.protocol = texts(&key, value, EMPTY, findings),
            "family" => selector.family = findings.ok(one_word(&key, value)),
            "direction" => selector.direction = findings.ok(one_word(&key, value)),
            "local" => selector.local = texts(&key, value, EMPTY, findings),
            "remote" => selector.remote = texts(&key, value, EMPTY, findings),
            "not_remote" => selector.not_remote = texts(&key, value, EMPTY, findings),
            "local_port" => selector.local_port = findings.ok(list(&key, value, EMPTY)),
            "remote_port" => selector.remote_port = findings.ok(list(&key, value, EMPTY)),
            _ => findings.error(unknown_key(&key, &MATCH)),
        }
    }
    selector
}

fn settings<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> Vec<SettingFile<'a>> {
    let help = "write set = { TCP_NODELAY = true }";
    let Some((_, table)) = findings.ok(table(key, value, help)) else { return Vec::new() };
    in_order(table).into_iter().map(|(option, value)| setting(option, value, findings)).collect()
}

fn setting<'a>(option: Text<'a>, value: Value<'a>, findings: &mut Findings) -> SettingFile<'a> {
    let mut setting = SettingFile { option, value: None, on_conflict: None, errno: None };
    if !value.get_ref().is_table() {
        setting.value = Some(value);
        return setting;
    }
    let before = findings.errors();
    let DeValue::Table(table) = value.into_inner() else { return setting };
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "value" => setting.value = Some(value),
            "on_conflict" => setting.on_conflict = findings.ok(text(&key, value)),
            "errno" => setting.errno = Some(value),
            "min" | "max" => findings.error(
                Problem::new(format!("{} belongs to a limit", quote(key.get_ref())))
                    .help(format!("move {} from `set` to `limit`", quote(setting.option.get_ref())))
                    .at(key.span()),
            ),
            _ => findings.error(unknown_key(&key, &SETTING)),
        }
    }
    if setting.value.is_none() && findings.errors() == before {
        let option = setting.option.get_ref();
        findings.error(
            Problem::new(format!("{} has no `value`", quote(option)))
                .help(format!("write {option} = {{ value = … }}, with the value that the option must have"))
                .at(setting.option.span()),
        );
    }
    setting
}

fn limits<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> Vec<LimitFile<'a>> {
    let help = "write limit = { SO_SNDBUF = { max = \"4MiB\" } }";
    let Some((_, table)) = findings.ok(table(key, value, help)) else { return Vec::new() };
    in_order(table).into_iter().filter_map(|(option, value)| limit(option, value, findings)).collect()
}

fn limit<'a>(option: Text<'a>, value: Value<'a>, findings: &mut Findings) -> Option<LimitFile<'a>> {
    let help = format!("write {} = {{ max = … }}, or put it under `set`", option.get_ref());
    let (_, table) = findings.ok(table(&option, value, help))?;
    let mut limit = LimitFile { option, min: None, max: None, on_conflict: None, errno: None };
    let before = findings.errors();
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "min" => limit.min = Some(value),
            "max" => limit.max = Some(value),
            "on_conflict" => limit.on_conflict = findings.ok(text(&key, value)),
            "errno" => limit.errno = Some(value),
            _ => findings.error(unknown_key(&key, &LIMIT)),
        }
    }
    if limit.min.is_none() && limit.max.is_none() {
        if findings.errors() == before {
            findings.error(
                Problem::new(format!("the limit of {} has no bound", quote(limit.option.get_ref())))
                    .help("give `min`, `max` or both")
                    .at(limit.option.span()),
            );
        }
        return None;
    }
    Some(limit)
}

/// Returns the entries in the order of the file.
fn in_order<'a>(table: DeTable<'a>) -> Vec<(Text<'a>, Value<'a>)> {
    let mut entries: Vec<_> = table.into_iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// Returns the type of a value, for messages.
pub(crate) fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn wrong_type(key: &Text<'_>, value: &Value<'_>, wanted: &str) -> Problem {
    let found = type_of(value.get_ref());
    Problem::new(format!("{} must be {wanted}, not {found}", quote(key.get_ref()))).at(value.span())
}

fn text<'a>(key: &Text<'a>, value: Value<'a>) -> Result<Text<'a>, Problem> {
    let span = value.span();
    match value.into_inner() {
        DeValue::String(text) => Ok(Spanned::new(span, text)),
        other => {
            let problem = wrong_type(key, &Spanned::new(span, other), "a string");
            Err(problem.help(format!("write {} = \"…\"", key.get_ref())))
        }
    }
}

/// Reads a key that takes one word, although similar keys take lists.
fn one_word<'a>(key: &Text<'a>, value: Value<'a>) -> Result<Text<'a>, Problem> {
    if value.get_ref().is_array() {
        let help = format!("leave {} out to match every socket, or make a rule for each", quote(key.get_ref()));
        return Err(wrong_type(key, &value, "a single string").help(help));
    }
    text(key, value)
}

fn boolean(key: &Text<'_>, value: &Value<'_>) -> Result<bool, Problem> {
    value
        .get_ref()
        .as_bool()
        .ok_or_else(|| wrong_type(key, value, "true or false").help(format!("write {} = true", key.get_ref())))
}

fn table<'a>(key: &Text<'a>, value: Value<'a>, help: impl Into<String>) -> Result<(Span, DeTable<'a>), Problem> {
    let span = value.span();
    match value.into_inner() {
        DeValue::Table(table) => Ok((span, table)),
        other => Err(wrong_type(key, &Spanned::new(span, other), "a table").help(help)),
    }
}

/// Reads a list, or one value as a list with one item.
fn list<'a>(key: &Text<'a>, value: Value<'a>, help_if_empty: &str) -> Result<List<Value<'a>>, Problem> {
    let span = value.span();
    let items = match value.into_inner() {
        DeValue::Array(items) => items.into_iter().collect(),
        one => vec![Spanned::new(span.clone(), one)],
    };
    if items.is_empty() {
        return Err(Problem::new(format!("{} is an empty list", quote(key.get_ref()))).help(help_if_empty).at(span));
    }
    Ok(Spanned::new(span, items))
}

fn texts<'a>(key: &Text<'a>, value: Value<'a>, help_if_empty: &str, findings: &mut Findings) -> Option<List<Text<'a>>> {
    let items = findings.ok(list(key, value, help_if_empty))?;
    let span = items.span();
    let mut texts = Vec::new();
    for item in items.into_inner() {
        match item.get_ref() {
            DeValue::String(text) => texts.push(Spanned::new(item.span(), text.clone())),
            other => findings.error(
                Problem::new(format!("{} takes strings, not {}", quote(key.get_ref()), type_of(other)))
                    .help(format!("write {} = [\"…\"]", key.get_ref()))
                    .at(item.span()),
            ),
        }
    }
    if texts.is_empty() { None } else { Some(Spanned::new(span, texts)) }
}
