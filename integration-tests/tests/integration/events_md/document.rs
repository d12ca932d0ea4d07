//! The tables of docs/events.md.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// The section of the events that share one table.
const EVENTS: &str = "events-of-calls-and-sockets";

/// The section of the keys that every line has.
const COMMON: &str = "json-output";

/// The type of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Type {
    String,
    Number,
    Boolean,
    /// The value of an option: of any type.
    Value,
    /// An object with `min` and `max`.
    Limit,
    Object,
    List(Box<Self>),
    /// An object whose keys are names.
    Map(Box<Self>),
}

/// A key of a kind of line.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) kind: Type,
    pub(super) is_optional: bool,
    /// Whether the value can be `null`.
    pub(super) is_nullable: bool,
}

/// The keys of a kind of line, by path: `settings[].sockets.set`.
pub(super) type Keys = BTreeMap<String, Key>;

/// A row of a table of keys.
struct Row {
    paths: Vec<String>,
    kind: String,
    meaning: String,
}

/// The contents of docs/events.md.
pub(super) struct Document {
    /// The section of each kind of line.
    pub(super) sections: BTreeMap<String, String>,
    /// The keys of each kind of line.
    pub(super) kinds: BTreeMap<String, Keys>,
    /// The reasons of losses.
    pub(super) losses: BTreeSet<String>,
}

impl Document {
    pub(super) fn parse(text: &str) -> Self {
        let mut tables: BTreeMap<String, Vec<Row>> = BTreeMap::new();
        let (mut sections, mut losses) = (BTreeMap::new(), BTreeSet::new());
        let (mut section, mut header) = (String::new(), String::new());
        for line in text.lines() {
            if let Some(heading) = line.strip_prefix('#') {
                section = anchor(heading.trim_start_matches('#').trim());
            } else if !line.starts_with('|') {
                header.clear();
            } else if header.is_empty() {
                line.clone_into(&mut header);
            } else if !line.starts_with("| ---") {
                let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
                match (header.as_str(), cells.as_slice()) {
                    ("| key | type | meaning |", [keys, kind, meaning]) => {
                        let [kind, meaning] = [kind, meaning].map(|cell| (*cell).to_owned());
                        tables.entry(section.clone()).or_default().push(Row { paths: quoted(keys), kind, meaning });
                    }
                    ("| command | kinds of lines |", [_, kinds]) => sections.extend(linked(kinds)),
                    ("| reason | what was lost |", [reason, _]) => losses.extend(quoted(reason)),
                    ("| key | type | meaning |", _) => panic!("a row of another shape: {line}"),
                    _ => {}
                }
            }
        }
        let kinds = sections.iter().map(|(kind, section)| (kind.clone(), keys(&tables, section)));
        Self { kinds: kinds.collect(), sections, losses }
    }
}

/// Returns the anchor of a heading.
fn anchor(heading: &str) -> String {
    heading.to_lowercase().replace(' ', "-").replace(',', "")
}

/// Returns the texts in backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Returns the texts in backticks in the names of links, each with the anchor.
fn linked(cell: &str) -> Vec<(String, String)> {
    let links = cell.split('[').skip(1).filter_map(|link| link.split_once("](#"));
    links
        .flat_map(|(names, rest)| {
            let anchor = rest.split(')').next().unwrap_or_default();
            quoted(names).into_iter().map(move |name| (name, anchor.to_owned()))
        })
        .collect()
}

/// Returns the keys of a kind of line that a section describes.
fn keys(tables: &BTreeMap<String, Vec<Row>>, section: &str) -> Keys {
    let mut keys = Keys::new();
    add(&mut keys, tables, COMMON, "");
    add(&mut keys, tables, section, "");
    keys
}

/// Adds the keys of a section, with a prefix.
fn add(keys: &mut Keys, tables: &BTreeMap<String, Vec<Row>>, section: &str, prefix: &str) {
    let rows = tables.get(section).unwrap_or_else(|| panic!("section {section} has no table of keys"));
    for row in rows {
        for path in &row.paths {
            let full = format!("{prefix}{path}");
            let (from, kind, meaning) = if row.kind.is_empty() {
                original(tables, path, &row.meaning)
            } else {
                (path.as_str(), row.kind.as_str(), row.meaning.as_str())
            };
            let (plain, is_optional) = kind.strip_suffix(", optional").map_or((kind, false), |kind| (kind, true));
            let is_nullable = !is_optional || meaning.contains("`null`");
            let (kind, shape) = parse_type(plain);
            if let Some(shape) = shape {
                let inner = if matches!(kind, Type::List(_)) { format!("{full}[].") } else { format!("{full}.") };
                if tables.contains_key(&shape) && shape == "explanation" {
                    add(keys, tables, COMMON, &inner);
                }
                add(keys, tables, &shape, &inner);
            }
            assert!(!from.is_empty(), "{full}");
            keys.insert(full, Key { kind, is_optional, is_nullable });
        }
    }
}

/// Returns the row of another section that a row without a type refers to.
fn original<'a>(tables: &'a BTreeMap<String, Vec<Row>>, path: &str, meaning: &str) -> (&'a str, &'a str, &'a str) {
    let section = meaning.split_once("](#").and_then(|(_, rest)| rest.split(')').next()).unwrap_or(EVENTS);
    let name = path.rsplit('.').next().unwrap_or(path);
    let rows = tables.get(section).unwrap_or_else(|| panic!("no section {section} for {path}"));
    let found = rows.iter().find_map(|row| Some((row, row.paths.iter().find(|path| *path == name)?)));
    let (row, path) = found.unwrap_or_else(|| panic!("section {section} has no key {name}"));
    (path, &row.kind, &row.meaning)
}

/// Returns a type, and the section that describes its keys.
fn parse_type(text: &str) -> (Type, Option<String>) {
    let shape = text.split_once("](#").and_then(|(_, rest)| rest.strip_suffix(')')).map(str::to_owned);
    let kind = match text {
        "string" => Type::String,
        "number" => Type::Number,
        "boolean" => Type::Boolean,
        "value" => Type::Value,
        "limit" => Type::Limit,
        "object" => Type::Object,
        "list of strings" => Type::List(Box::new(Type::String)),
        "list of objects" => Type::List(Box::new(Type::Object)),
        "map of strings" => Type::Map(Box::new(Type::String)),
        "map of numbers" => Type::Map(Box::new(Type::Number)),
        "map of values" => Type::Map(Box::new(Type::Value)),
        _ if text.starts_with("list of [") && shape.is_some() => Type::List(Box::new(Type::Object)),
        _ if text.starts_with('[') && shape.is_some() => Type::Object,
        _ => panic!("no type: {text:?}"),
    };
    (kind, shape)
}

impl Type {
    /// Returns whether a value that is not `null` has this type. Elements of lists of objects are not examined.
    pub(super) fn admits(&self, value: &Value) -> bool {
        match self {
            Self::String => value.is_string(),
            Self::Number => value.is_number(),
            Self::Boolean => value.is_boolean(),
            Self::Value => true,
            Self::Limit => value.as_object().is_some_and(|limit| {
                limit.len() == 2 && ["min", "max"].iter().all(|bound| limit.get(*bound).is_some_and(Value::is_number))
            }),
            Self::Object => value.is_object(),
            Self::List(element) => value.as_array().is_some_and(|all| all.iter().all(|one| element.admits(one))),
            Self::Map(element) => value.as_object().is_some_and(|all| all.values().all(|one| element.admits(one))),
        }
    }
}

/// Returns whether a path has keys below it.
fn has_keys_below(keys: &Keys, path: &str) -> bool {
    keys.range(format!("{path}.")..).next().is_some_and(|(key, _)| key.starts_with(&format!("{path}.")))
}

/// Compares an object with the documented keys: adds a complaint for each difference, and the paths of the keys that are not
/// `null` to `seen`.
pub(super) fn compare(
    keys: &Keys,
    object: &Value,
    prefix: &str,
    seen: &mut BTreeSet<String>,
    wrong: &mut BTreeSet<String>,
) {
    let Some(object) = object.as_object() else { return };
    for (path, key) in keys {
        let Some(name) = path.strip_prefix(prefix).filter(|name| !name.contains(['.', '['])) else { continue };
        match object.get(name) {
            None if !key.is_optional => drop(wrong.insert(format!("{path} is absent, and not documented as optional"))),
            Some(Value::Null) if !key.is_nullable => {
                wrong.insert(format!("{path} is null, and documented as optional without null"));
            }
            _ => {}
        }
    }
    for (name, value) in object {
        let path = format!("{prefix}{name}");
        if value.is_null() {
            if !keys.contains_key(&path) && !has_keys_below(keys, &path) {
                wrong.insert(format!("{path} is not documented"));
            }
            continue;
        }
        match keys.get(&path) {
            Some(key) if !key.kind.admits(value) => {
                wrong.insert(format!("{path} is {value}, documented as {:?}", key.kind));
            }
            Some(_) => {}
            None if value.is_object() && has_keys_below(keys, &path) => {}
            None => drop(wrong.insert(format!("{path} is not documented"))),
        }
        seen.insert(path.clone());
        match keys.get(&path).map(|key| &key.kind) {
            Some(Type::Map(_) | Type::Value | Type::Limit) => {}
            Some(Type::List(_)) => {
                for element in value.as_array().into_iter().flatten() {
                    compare(keys, element, &format!("{path}[]."), seen, wrong);
                }
            }
            _ => compare(keys, value, &format!("{path}."), seen, wrong),
        }
    }
}
