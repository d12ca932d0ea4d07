//! `[target]`: the cgroups and containers that it names, as written.

use toml::Spanned;

use super::{
    List, Text, Value, in_order,
    keys::{CONTAINER, TARGET, unknown_key},
    list, table, text, texts, wrong_type,
};
use crate::policy::diagnostic::{Findings, Problem};

#[derive(Debug, Default)]
pub(crate) struct TargetFile<'a> {
    pub(crate) cgroup: Option<List<Text<'a>>>,
    pub(crate) containers: Vec<ContainerFile<'a>>,
}

/// The fields of a container selector. At least one is set.
#[derive(Debug, Default)]
pub(crate) struct ContainerFile<'a> {
    pub(crate) name: Option<Text<'a>>,
    pub(crate) image: Option<Text<'a>>,
    pub(crate) id: Option<Text<'a>>,
    pub(crate) runtime: Option<Text<'a>>,
}

pub(super) fn target<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> TargetFile<'a> {
    const HELP: &str =
        "name a cgroup or a container, or leave [target] out: the policy is then a template for `--cgroup`";
    let before = findings.errors();
    let mut target = TargetFile::default();
    let Some((header, table)) = findings.ok(table(key, value, "write [target] on a line of its own")) else {
        return target;
    };
    for (key, value) in in_order(table) {
        match key.get_ref().as_ref() {
            "cgroup" => target.cgroup = texts(&key, value, HELP, findings),
            "container" => target.containers = containers(&key, value, HELP, findings),
            _ => findings.error(unknown_key(&key, &TARGET)),
        }
    }
    if target.cgroup.is_none() && target.containers.is_empty() && findings.errors() == before {
        findings.error(Problem::new("[target] names no cgroup and no container").help(HELP).at(header));
    }
    target
}

fn containers<'a>(
    key: &Text<'a>,
    value: Value<'a>,
    help_if_empty: &str,
    findings: &mut Findings,
) -> Vec<ContainerFile<'a>> {
    let tables = findings.ok(list(key, value, help_if_empty)).map(Spanned::into_inner).unwrap_or_default();
    tables.into_iter().filter_map(|value| container(key, value, findings)).collect()
}

fn container<'a>(key: &Text<'a>, value: Value<'a>, findings: &mut Findings) -> Option<ContainerFile<'a>> {
    const HELP: &str = "write container = { name = \"web-*\" }";
    let before = findings.errors();
    let mut container = ContainerFile::default();
    let (span, table) = findings.ok(table(key, value, HELP))?;
    let is_empty = table.is_empty();
    for (key, value) in in_order(table) {
        let part = match key.get_ref().as_ref() {
            "name" => &mut container.name,
            "image" => &mut container.image,
            "id" => &mut container.id,
            "runtime" => &mut container.runtime,
            _ => {
                findings.error(unknown_key(&key, &CONTAINER));
                continue;
            }
        };
        *part = findings.ok(one_glob(&key, value));
    }
    if is_empty {
        let help = format!("{HELP}, with \"*\" for every container");
        findings.error(Problem::new("the container selector is empty").help(help).at(span));
    }
    (findings.errors() == before).then_some(container)
}

/// Reads a string. Several globs need several tables, although similar keys take lists.
fn one_glob<'a>(key: &Text<'a>, value: Value<'a>) -> Result<Text<'a>, Problem> {
    if value.get_ref().is_array() {
        let key_name = key.get_ref();
        let help = format!("write container = [{{ {key_name} = \"…\" }}, {{ {key_name} = \"…\" }}]");
        return Err(wrong_type(key, &value, "a single string").help(help));
    }
    text(key, value)
}
