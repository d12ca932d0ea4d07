//! Turns policies into what the programs read: `&[Policy]` → [`Desired`].
//!
//! Precedence is settled here: the rules of all files, in the order of the files' names and of the
//! rules in them, become the bits of one `u64`, lowest first, and the programs take the lowest that
//! matches and names an option.
//!
//! Pure: it does not ask what this kernel or this host can do.
//!
//! Trade-off: 64 rules for one set of policies, in exchange for matching whose cost does not depend on their
//! number. More than that is an error here, never a truncation.

mod facts;
mod hooks;
mod prefixes;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use abi::{
    RULES_MAX, SiteList,
    select::{Candidates, Selectors, select},
    setting::{Governed, OptionKey, Setting, form, kind, on_conflict, read_back, words_of_text},
    site,
    socket::{Facts, direction, family, protocol},
};

pub use self::{facts::facts, hooks::Hook, prefixes::Prefix};
use crate::{
    options::SocketOption,
    policy::model::{
        Audit, Calls, Clause, Direction, Family, Form, Mode, Named, OnConflict, Policy, Protocol, Rule, Selector,
        Wanted,
    },
};

/// Everything that the kernel side is to be told, and where each part came from.
#[derive(Clone, Debug)]
pub struct Desired {
    pub mode: Mode,
    pub audit: Audit,
    /// Rules by number, as the bits count them.
    pub rules: Vec<RuleSource>,
    pub selectors: Selectors,
    pub prefixes: Vec<Prefix>,
    /// Those that are set come first, in the order in which they are applied.
    pub options: Vec<Governed>,
    pub settings: Vec<Setting>,
    /// Where each of `settings` came from.
    pub sources: Vec<SettingSource>,
    /// By [`site`].
    pub sites: [SiteList; site::COUNT],
    /// The hooks that this policy needs, no more.
    pub hooks: Vec<Hook>,
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSource {
    pub policy: String,
    pub path: PathBuf,
    pub rule: String,
    pub line: usize,
    pub selector: Selector,
}

/// Where a setting stands, and what it says in the words of the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingSource {
    /// Index of [`Desired::rules`].
    pub rule: usize,
    pub option: Named,
    /// Line in the rule's file.
    pub line: usize,
    pub form: Form,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompileError {
    #[error(
        "the policies have {count} rules together, but one set of policies can hold {RULES_MAX}\n  help: put them on \
         different targets, or merge rules that match the same sockets"
    )]
    TooManyRules { count: usize },
    #[error(
        "policies `{enforced}` and `{dry}` cannot be in force together: the one enforces, the other is a dry run\n  \
         help: give --dry-run to try both, or the same `mode` to both files"
    )]
    MixedModes { enforced: String, dry: String },
}

/// Compiles policies that share a target; `policies` are in the order of their files' names.
///
/// # Errors
///
/// Where they have too many rules together, or not the same mode.
pub fn compile(policies: &[Policy]) -> Result<Desired, CompileError> {
    let mode = common_mode(policies)?;
    let mut rules = Vec::new();
    let mut sources = Vec::new();
    for policy in policies {
        for rule in &policy.rules {
            rules.push(rule);
            sources.push(RuleSource {
                policy: policy.name.clone(),
                path: policy.path.clone(),
                rule: rule.name.clone(),
                line: rule.line,
                selector: rule.selector.clone(),
            });
        }
    }
    if rules.len() > RULES_MAX {
        return Err(CompileError::TooManyRules { count: rules.len() });
    }
    let table = settings_table(&rules);
    let selectors = selectors(&rules);
    let sites = hooks::sites(&table.options, &rules);
    let audit = common_audit(policies);
    let hooks = hooks::needed(&table.options, &sites, &rules, audit.reads);
    Ok(Desired {
        mode,
        audit,
        rules: sources,
        selectors,
        prefixes: prefixes::prefixes(&rules),
        options: table.options,
        settings: table.settings,
        sources: table.sources,
        sites,
        hooks,
    })
}

impl Desired {
    /// What a setting came from.
    #[must_use]
    pub fn source(&self, setting: u32) -> Option<(&SettingSource, &RuleSource)> {
        let source = self.sources.get(setting as usize)?;
        Some((source, self.rules.get(source.rule)?))
    }

    /// What the program at a hook is about: the options that it sets, judges or compares.
    #[must_use]
    pub fn options_at(&self, hook: Hook) -> Vec<Named> {
        let options = hooks::options_at(hook, &self.options, &self.sites);
        let named = |index: usize| Some(self.sources.get(self.options.get(index)?.first_setting as usize)?.option);
        options.into_iter().filter_map(named).collect()
    }

    /// The programs to attach, and to which of so many targets, in that order.
    pub fn attachments(&self, targets: usize) -> impl Iterator<Item = (Hook, usize)> {
        (0..targets).flat_map(|target| self.hooks.iter().map(move |hook| (*hook, target)))
    }

    /// The rules that match a socket, as the kernel finds them.
    #[must_use]
    pub fn candidates(&self, facts: &Facts) -> Candidates {
        select(facts, &self.selectors, &prefixes::Table(&self.prefixes))
    }

    /// Has the audit count these options among those that rules name, although none does.
    pub fn look_at(&mut self, options: &[OptionKey]) {
        for key in options {
            if !self.options.iter().any(|option| option.key == *key) {
                self.options.push(Governed { key: *key, ..Governed::default() });
            }
        }
    }

    /// The congestion controls that the policies set, each once.
    #[must_use]
    pub fn congestion_controls(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .sources
            .iter()
            .filter(|source| source.option == Named::Known(crate::options::CONGESTION))
            .filter_map(|source| match &source.form {
                Form::Set(Wanted::Text(name)) => Some(name.as_str()),
                _ => None,
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

fn common_mode(policies: &[Policy]) -> Result<Mode, CompileError> {
    let first = |mode| policies.iter().find(|policy| policy.mode == mode);
    match (first(Mode::Enforce), first(Mode::DryRun)) {
        (Some(enforced), Some(dry)) => {
            Err(CompileError::MixedModes { enforced: enforced.name.clone(), dry: dry.name.clone() })
        }
        (None, Some(_)) => Ok(Mode::DryRun),
        _ => Ok(Mode::Enforce),
    }
}

/// What any of the policies wants to see is looked at.
fn common_audit(policies: &[Policy]) -> Audit {
    Audit {
        calls: policies.iter().map(|policy| policy.audit.calls).max().unwrap_or(Calls::Conflicts),
        reads: policies.iter().any(|policy| policy.audit.reads),
        timing: policies.iter().any(|policy| policy.audit.timing),
    }
}

/// The set of the rules for which `matches` holds.
fn rules_where(rules: &[&Rule], matches: impl Fn(&Rule) -> bool) -> u64 {
    rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| matches(rule))
        .map(|(number, _)| 1 << number)
        .fold(0, |set, bit| set | bit)
}

fn selectors(rules: &[&Rule]) -> Selectors {
    let of = |matches: &dyn Fn(&Rule) -> bool| rules_where(rules, matches);
    let any_port =
        [of(&|rule| rule.selector.local_ports.is_empty()), of(&|rule| rule.selector.remote_ports.is_empty())];
    let any_address = [
        of(&|rule| rule.selector.local.is_empty()),
        of(&|rule| rule.selector.remote.is_empty() && rule.selector.not_remote.is_empty()),
    ];
    let all = of(&|_| true);
    let mut selectors = Selectors {
        all,
        any_port,
        any_address,
        asks_port: any_port.map(|unasked| u32::from(unasked != all)),
        asks_address: any_address.map(|unasked| u32::from(unasked != all)),
        ..Selectors::default()
    };
    selectors.family[usize::from(family::UNKNOWN)] = of(&|rule| rule.selector.family.is_none());
    for (_, asked) in Family::WORDS {
        let matches = |rule: &Rule| rule.selector.family.is_none_or(|wanted| wanted == *asked);
        selectors.family[usize::from(asked.code())] = of(&matches);
    }
    selectors.protocol[usize::from(protocol::UNKNOWN)] = of(&|rule| rule.selector.protocols.is_empty());
    for (_, asked) in Protocol::WORDS {
        let matches = |rule: &Rule| rule.selector.protocols.is_empty() || rule.selector.protocols.contains(asked);
        selectors.protocol[usize::from(asked.code())] = of(&matches);
    }
    selectors.direction[usize::from(direction::UNKNOWN)] = of(&|rule| rule.selector.direction.is_none());
    for (_, asked) in Direction::WORDS {
        let matches = |rule: &Rule| rule.selector.direction.is_none_or(|wanted| wanted == *asked);
        selectors.direction[usize::from(asked.code())] = of(&matches);
    }
    selectors
}

/// Options, their settings, and where these came from.
struct SettingsTable {
    options: Vec<Governed>,
    settings: Vec<Setting>,
    sources: Vec<SettingSource>,
}

fn settings_table(rules: &[&Rule]) -> SettingsTable {
    let mut table = SettingsTable { options: Vec::new(), settings: Vec::new(), sources: Vec::new() };
    for named in named_options(rules) {
        let mut option = governed(named);
        option.first_setting = table.settings.len() as u32;
        for (number, rule) in rules.iter().enumerate() {
            let Some(clause) = rule.clauses.iter().find(|clause| clause.option == named) else { continue };
            option.names |= 1 << number;
            if matches!(clause.form, Form::Set(_)) {
                option.sets |= 1 << number;
            }
            table.settings.push(setting(clause));
            table.sources.push(SettingSource {
                rule: number,
                option: named,
                line: clause.line,
                form: clause.form.clone(),
            });
        }
        table.options.push(option);
    }
    table
}

/// Every option that a rule names, those that are set first and in the order of the option table,
/// which is the order in which they are to be applied.
fn named_options(rules: &[&Rule]) -> Vec<Named> {
    let clauses = || rules.iter().flat_map(|rule| &rule.clauses);
    let is_set = |named: Named| clauses().any(|clause| clause.option == named && matches!(clause.form, Form::Set(_)));
    let mut named: Vec<Named> = Vec::new();
    for clause in clauses() {
        if !named.contains(&clause.option) {
            named.push(clause.option);
        }
    }
    named.sort_by_key(|named| (!is_set(*named), place(*named), named.key()));
    named
}

fn place(named: Named) -> usize {
    match named {
        Named::Known(option) => crate::options::OPTIONS.iter().position(|known| known == option).unwrap_or(usize::MAX),
        Named::Numeric(_) => usize::MAX,
    }
}

fn governed(named: Named) -> Governed {
    let mut option = Governed { key: named.key(), kind: kind::OPAQUE, ..Governed::default() };
    if let Named::Known(known) = named {
        let SocketOption { value, traits, .. } = *known;
        option.kind = value.abi_kind();
        if option.kind == kind::INT && known.range.1 > i64::from(i32::MAX) {
            option.kind = kind::UNSIGNED;
        }
        option.traits = traits;
        option.read_back = known.settable().map_or(read_back::NONE, |settable| settable.read_back);
    }
    option
}

fn setting(clause: &Clause) -> Setting {
    let mut setting = Setting {
        on_conflict: match clause.on_conflict {
            OnConflict::Allow => on_conflict::ALLOW,
            OnConflict::Rewrite => on_conflict::REWRITE,
            OnConflict::Ignore => on_conflict::IGNORE,
            OnConflict::Deny => on_conflict::DENY,
        },
        errno: clause.errno.0,
        ..Setting::default()
    };
    match &clause.form {
        Form::Set(Wanted::Number { value, mask }) => {
            setting.form = form::SET;
            setting.value = *value;
            setting.mask = *mask;
        }
        Form::Set(Wanted::Text(text)) => {
            setting.form = form::SET;
            setting.mask = u32::MAX;
            setting.text = words_of_text(text.as_bytes());
        }
        Form::Limit { min, max } => {
            setting.form = form::LIMIT;
            setting.min = *min;
            setting.max = *max;
        }
        Form::Deny => setting.form = form::DENY,
    }
    setting
}
