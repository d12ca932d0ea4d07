//! Compiles policies to the tables that the programs read: `&[Policy]` and the stacks that are in force → [`Desired`].
//!
//! Precedence is decided here. The rules of a stack, in the order of the stack and of each policy, become the bits of
//! one `u64`, lowest first. The programs use the lowest bit that matches and names an option. The tables of one stack
//! are a [`Scope`].
//!
//! Pure: the result does not depend on what this kernel or this host supports.
//!
//! Trade-off: the sockets of a target can have at most 64 rules; in exchange, the cost of matching does not depend on
//! their number. More rules are an error and are never truncated.

mod facts;
mod hooks;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod naive;
mod prefixes;
mod rows;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::PathBuf,
};

use abi::{
    ApplyList, RULES_MAX, apply_point,
    judge::agreeing,
    select::{Candidates, Selectors, select},
    setting::{OptionKey, OptionRow, Setting, form, on_conflict, traits, words_of_text},
    socket::{Facts, direction, family, protocol},
};

pub(crate) use self::prefixes::merged;
use self::rows::{Rows, SocketValue};
pub use self::{
    facts::facts,
    hooks::{Hook, may_pass},
    prefixes::Prefix,
};
use crate::{
    coverage::{GlobError, Stack},
    limitations::{self, Concern, Limitation},
    options::SocketOption,
    policy::model::{
        Audit, Calls, Clause, Direction, Family, Form, Mode, Named, OnConflict, Policy, Protocol, Rule, Selector,
        Wanted,
    },
};

/// Everything that the kernel side needs, and the source of each part.
#[derive(Clone, Debug)]
pub struct Desired {
    pub audit: Audit,
    /// Whether the audit judges the calls, without hooks at setsockopt and getsockopt.
    pub audit_judges: bool,
    /// All rules of all policies.
    pub rules: Vec<RuleSource>,
    /// One scope for each stack.
    pub scopes: Vec<Scope>,
    /// Sorted by length and data.
    pub prefixes: Vec<Prefix>,
    /// Every option whose calls rules govern, by number. Options that rules name come first. Among these, options that
    /// rules set come first, in the order in which they are applied. An option may have several numbers.
    pub options: Vec<OptionKey>,
    /// How many options rules name.
    pub named: usize,
    pub settings: Vec<Setting>,
    /// The source of each setting in `settings`.
    pub sources: Vec<SettingSource>,
}

/// The tables for the sockets of all targets with the same stack of policies.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The names of the policies, in order of precedence. Without the policies of other instances.
    pub policies: Vec<String>,
    pub mode: Mode,
    pub selectors: Selectors,
    /// In the order of [`Desired::options`].
    pub options: Vec<OptionRow>,
    /// By [`apply_point`].
    pub sites: [ApplyList; apply_point::COUNT],
    /// Exactly the hooks that these policies need.
    pub hooks: Vec<Hook>,
}

/// The source of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSource {
    pub policy: String,
    /// The other instance that has the policy in force, if the rule only leaves options free here.
    pub instance: Option<String>,
    pub mode: Mode,
    pub path: PathBuf,
    pub rule: String,
    pub line: usize,
    pub selector: Selector,
}

/// The source of a setting, and the form in which the policy has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingSource {
    /// Index of [`Desired::rules`].
    pub rule: usize,
    pub option: Named,
    /// Line in the rule's file.
    pub line: usize,
    pub form: Form,
}

/// Why the audit cannot judge calls in table_index of the hook at setsockopt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeedsHook {
    #[error("a policy is enforced")]
    Enforced,
    #[error("a rule lets the application win (`on_conflict = \"allow\"`)")]
    Yielding,
    #[error("a rule matches the direction of a connection")]
    Direction,
    #[error("a limit or deny may start to apply when more is known about the socket")]
    Later,
    #[error("the audit does not see the calls")]
    NoAudit,
    #[error("the audit cannot find the socket of a call in this kernel")]
    Blind,
    #[error("the policies persist without an agent, which would have to read the audit")]
    Persists,
    #[error("the audit covers only some processes")]
    SomeProcesses,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompileError {
    #[error(
        "policies {} have {count} rules together: policies that cover the same cgroup can have at most {RULES_MAX}\n  help: put \
         them on different targets, or merge rules that match the same sockets",
        policies.join(", ")
    )]
    TooManyRules { policies: Vec<String>, count: usize },
    #[error(
        "policies `{enforced}` and `{dry}` cannot be in force together: one enforces, the other is a dry run\n  \
         help: use --dry-run for both, or write the same `mode` in both files"
    )]
    MixedModes { enforced: String, dry: String },
    #[error(transparent)]
    Glob(#[from] GlobError),
}

/// Compiles policies for the targets on which they are in force: `stacks` are the combinations of policies, one for each kind of
/// target. `dry_run`: all policies are dry runs.
///
/// # Errors
///
/// Fails if the policies cannot be combined.
pub fn compile_in_force(policies: &[Policy], stacks: &[Stack], dry_run: bool) -> Result<Desired, CompileError> {
    // Policies that are in no stack are left out: they are not probed or counted, and need no hooks.
    let in_force: Vec<usize> =
        (0..policies.len()).filter(|policy| stacks.iter().any(|stack| stack.contains(policy))).collect();
    let renumbered = |stack: &Stack| -> Stack {
        stack.iter().filter_map(|policy| in_force.iter().position(|kept| kept == policy)).collect()
    };
    let stacks: Vec<Stack> = stacks.iter().map(renumbered).collect();
    let mut policies: Vec<Policy> = in_force.iter().map(|policy| policies[*policy].clone()).collect();
    if dry_run {
        policies.iter_mut().for_each(|policy| policy.mode = Mode::DryRun);
    }
    compile(&policies, &stacks)
}

/// Compiles policies for each stack that is in force. `policies` must be in the order of their file names.
///
/// # Errors
///
/// Fails if the policies of a stack have too many rules together, or different modes.
///
/// # Panics
///
/// Panics if a stack contains a number that no policy has.
pub fn compile(policies: &[Policy], stacks: &[Stack]) -> Result<Desired, CompileError> {
    let mut desired = Desired {
        audit: common_audit(policies),
        audit_judges: false,
        rules: Vec::new(),
        scopes: Vec::new(),
        prefixes: Vec::new(),
        options: Vec::new(),
        named: 0,
        settings: Vec::new(),
        sources: Vec::new(),
    };
    // For each policy, the number of its first rule.
    let mut first_rules = Vec::new();
    for policy in policies {
        first_rules.push(desired.rules.len());
        desired.rules.extend(policy.rules.iter().map(|rule| RuleSource {
            policy: policy.name.clone(),
            instance: policy.instance.clone(),
            mode: policy.mode,
            path: policy.path().to_owned(),
            rule: rule.name.clone(),
            line: rule.line,
            selector: rule.selector.clone(),
        }));
    }
    let named = named_options(policies);
    let rows = Rows::new(&named);
    desired.options = rows.rows.iter().map(|row| row.template.key).collect();
    desired.named = named.len();
    for stack in stacks {
        let stacked: Vec<&Policy> = stack.iter().map(|policy| &policies[*policy]).collect();
        let numbered = stack.iter().flat_map(|policy| (first_rules[*policy]..).zip(&policies[*policy].rules));
        let (numbers, rules): (Vec<usize>, Vec<&Rule>) = numbered.unzip();
        add_scope(&mut desired, &stacked, &rows, &rules, &numbers)?;
    }
    desired.prefixes.sort_unstable_by_key(prefixes::key);
    Ok(desired)
}

/// Adds the scope of a stack of policies. `rules` are its rules in order, and `numbers` are their numbers in
/// [`Desired::rules`].
fn add_scope(
    desired: &mut Desired,
    stack: &[&Policy],
    rows: &Rows,
    rules: &[&Rule],
    numbers: &[usize],
) -> Result<(), CompileError> {
    let mode = common_mode(stack)?;
    let own = stack.iter().filter(|policy| policy.instance.is_none());
    let policies: Vec<String> = own.map(|policy| policy.name.clone()).collect();
    if rules.len() > RULES_MAX {
        return Err(CompileError::TooManyRules { policies, count: rules.len() });
    }
    let clauses: Vec<Clauses<'_>> = rules
        .iter()
        .map(|rule| rule.clauses.iter().rev().map(|clause| (clause.option.value_key(), clause)).collect())
        .collect();
    let value_rules: Vec<ValueRules> =
        rows.values.iter().map(|value| add_settings(desired, *value, rules, &clauses, numbers, mode)).collect();
    let options: Vec<OptionRow> = rows
        .rows
        .iter()
        .map(|row| match row.value {
            Some(value) => value_rules[value].complete(row.template, desired),
            None => row.template,
        })
        .collect();
    let scope = desired.scopes.len() as u32;
    let sites = hooks::sites(&options, rules);
    let hooks = hooks::needed(&options, &sites, rules, desired.audit.reads);
    desired.prefixes.extend(prefixes::prefixes(scope, rules));
    desired.scopes.push(Scope { policies, mode, selectors: selectors(scope, rules), options, sites, hooks });
    Ok(())
}

/// The rules of a scope that name one value.
struct ValueRules {
    names: u64,
    sets: u64,
    first_setting: u32,
    is_certain: bool,
}

/// The clauses of a rule, by [`Named::value_key`].
type Clauses<'a> = BTreeMap<OptionKey, &'a Clause>;

/// Adds the settings of one value: one for each rule that names it. A value that rules only leave free has no settings.
fn add_settings(
    desired: &mut Desired,
    value: SocketValue,
    rules: &[&Rule],
    clauses: &[Clauses<'_>],
    numbers: &[usize],
    mode: Mode,
) -> ValueRules {
    let mut value_rules =
        ValueRules { names: 0, sets: 0, first_setting: desired.settings.len() as u32, is_certain: false };
    if clauses.iter().all(|clauses| clauses.get(&value.key()).is_none_or(|clause| clause.form == Form::Free)) {
        return value_rules;
    }
    for (bit, rule) in rules.iter().enumerate() {
        let Some(clause) = clauses[bit].get(&value.key()) else { continue };
        value_rules.is_certain |= value_rules.names == 0 && rule.selector == Selector::default();
        value_rules.names |= 1 << bit;
        if matches!(clause.form, Form::Set(_)) {
            value_rules.sets |= 1 << bit;
        }
        desired.settings.push(setting(clause, mode));
        let form = clause.form.clone();
        desired.sources.push(SettingSource { rule: numbers[bit], option: clause.option, line: clause.line, form });
    }
    value_rules
}

impl ValueRules {
    /// Returns the row of an option that sets the value.
    fn complete(&self, template: OptionRow, desired: &Desired) -> OptionRow {
        let Self { names, sets, first_setting, is_certain } = *self;
        let mut option = OptionRow { names, sets, first_setting, certain: is_certain.into(), ..template };
        // If other rows can affect the option, this row alone does not decide it.
        let is_alone = option.next == 0 && option.resets == 0;
        if let Some(setting) = desired.settings.get(first_setting as usize)
            && let Some(value) = agreeing(&option, setting)
            && is_certain
            && is_alone
        {
            (option.has_agreeing, option.agreeing) = (1, value);
        }
        option
    }
}

impl Desired {
    /// Returns the options by which a call is found, each with its number.
    pub fn numbered(&self) -> impl Iterator<Item = (OptionKey, u32)> {
        let mut seen = BTreeSet::new();
        self.options.iter().copied().zip(0..).filter(move |(key, _)| seen.insert(*key))
    }

    /// Returns the source of a setting.
    #[must_use]
    pub fn source(&self, setting: u32) -> Option<(&SettingSource, &RuleSource)> {
        let source = self.sources.get(setting as usize)?;
        Some((source, self.rules.get(source.rule)?))
    }

    /// Returns the option that a number in a scope stands for.
    fn named(&self, scope: usize, number: usize) -> Option<Named> {
        let option = self.scopes.get(scope)?.options.get(number)?;
        let is_named = option.names != 0 && !option.is_alias();
        let settings = option.first_setting as usize..;
        let sources = self.sources.get(settings)?.iter().take(option.names.count_ones() as usize);
        let mut named = sources.map(|source| source.option).filter(|named| is_named && named.key() == option.key);
        named.next()
    }

    /// Returns the options that the program at a hook sets, judges or compares.
    #[must_use]
    pub fn options_at(&self, scope: usize, hook: Hook) -> Vec<Named> {
        let Some(Scope { options, sites, .. }) = self.scopes.get(scope) else { return Vec::new() };
        let numbers = hooks::options_at(hook, options, sites);
        numbers.into_iter().filter_map(|number| self.named(scope, number)).collect()
    }

    /// Returns the limitations that apply to the settings of a scope.
    pub fn unsupported(&self, scope: usize) -> impl Iterator<Item = &'static Limitation> {
        let entries: Vec<_> = self.settings_of(scope).flat_map(|setting| self.unsupported_of(setting)).collect();
        let concerns = move |entry: &Limitation| entries.iter().any(|(concerned, _)| *concerned == entry);
        limitations::ALL.iter().copied().filter(move |entry| concerns(entry))
    }

    /// Returns the limitations that apply to a setting, given the hooks of its scope.
    #[must_use]
    pub fn unsupported_of(&self, setting: usize) -> Vec<(&'static Limitation, Concern)> {
        let Some(source) = self.sources.get(setting) else { return Vec::new() };
        let Some(rule) = self.rules.get(source.rule) else { return Vec::new() };
        let scope = (0..self.scopes.len()).find(|scope| self.settings_of(*scope).contains(&setting));
        let has_lsm = scope.is_some_and(|scope| self.scopes[scope].hooks.contains(&Hook::PostCreate));
        let entries = limitations::of_rule(&rule.selector, source.option, &source.form).into_iter();
        entries.filter(|(entry, _)| !(has_lsm && limitations::WITHOUT_LSM.contains(entry))).collect()
    }

    /// Returns the programs to attach, each with the index of its target. `scopes` are the scopes of the targets.
    pub fn attachments(&self, scopes: &[usize]) -> impl Iterator<Item = (Hook, usize)> {
        let hooks = |scope: usize| self.scopes.get(scope).map_or(&[][..], |scope| &scope.hooks);
        scopes.iter().enumerate().flat_map(move |(target, scope)| hooks(*scope).iter().map(move |hook| (*hook, target)))
    }

    /// Returns the hooks that any target needs, each once.
    #[must_use]
    pub fn hooks(&self) -> Vec<Hook> {
        Hook::ALL.into_iter().filter(|hook| self.scopes.iter().any(|scope| scope.hooks.contains(hook))).collect()
    }

    /// Keeps only the hooks for which `keep` returns true.
    pub fn keep_hooks(&mut self, keep: impl Fn(Hook) -> bool) {
        for scope in &mut self.scopes {
            scope.hooks.retain(|hook| keep(*hook));
        }
    }

    /// Returns why these policies need a hook at setsockopt; `None` if the audit can judge the calls.
    ///
    /// The audit decides like the hook, unless a verdict depends on a socket's notes or changes them.
    #[must_use]
    pub fn needs_hook(&self) -> Option<NeedsHook> {
        if !self.is_dry_run() {
            return Some(NeedsHook::Enforced);
        }
        let is_yielding = |setting: &Setting| setting.form == form::SET && setting.on_conflict == on_conflict::ALLOW;
        if self.settings.iter().any(is_yielding) {
            return Some(NeedsHook::Yielding);
        }
        let depends = |asked: fn(&Selector) -> bool| {
            move |source: &&SettingSource| self.rules.get(source.rule).is_some_and(|rule| asked(&rule.selector))
        };
        if self.sources.iter().any(|source| depends(|selector| selector.direction.is_some())(&source)) {
            return Some(NeedsHook::Direction);
        }
        // A value that an application requests before all facts are known is compared with a limit later.
        let mut forbidding = self.sources.iter().filter(|source| !matches!(source.form, Form::Set(_)));
        let is_held_later = |option: &OptionRow| {
            let has_both = option.sets != 0 && option.names & !option.sets != 0;
            has_both && !option.is_certain() && option.traits & traits::CORRECTED != 0
        };
        let is_later = forbidding.any(|source| depends(hooks::needs_initially_unknown_facts)(&source))
            || self.scopes.iter().flat_map(|scope| &scope.options).any(is_held_later);
        is_later.then_some(NeedsHook::Later)
    }

    /// Returns whether the policies change nothing.
    #[must_use]
    pub fn is_dry_run(&self) -> bool {
        self.scopes.iter().all(|scope| scope.mode == Mode::DryRun)
    }

    /// Returns whether there are calls to judge, and a hook judges them.
    #[must_use]
    pub fn is_judged_by_hook(&self) -> bool {
        self.scopes.iter().any(|scope| scope.hooks.contains(&Hook::Setsockopt))
    }

    /// Makes the audit judge calls in table_index of the hooks at setsockopt and getsockopt. For these hooks, the kernel
    /// copies the whole argument of a call, and fails calls whose argument is shorter than its length says.
    pub fn judge_by_audit(&mut self) {
        self.audit_judges = self.is_judged_by_hook();
        self.keep_hooks(|hook| !matches!(hook, Hook::Setsockopt | Hook::Getsockopt));
    }

    /// Attaches the hook that gives each new socket a cookie, which identifies the socket in events. For audits without
    /// policies.
    pub fn note_births(&mut self) {
        for scope in &mut self.scopes {
            scope.hooks.push(Hook::SockCreate);
        }
    }

    /// Returns the indices of the settings of a scope.
    #[must_use]
    pub fn settings_of(&self, scope: usize) -> Range<usize> {
        let first = |scope: usize| Some(self.scopes.get(scope)?.options.first()?.first_setting as usize);
        first(scope).unwrap_or(self.settings.len())..first(scope + 1).unwrap_or(self.settings.len())
    }

    /// Returns the options that any rule sets, each once.
    #[must_use]
    pub fn set_options(&self) -> Vec<&'static SocketOption> {
        let mut options = Vec::new();
        for source in &self.sources {
            if let (Named::Known(option), Form::Set(_)) = (source.option, &source.form)
                && !options.contains(&option)
            {
                options.push(option);
            }
        }
        options
    }

    /// Returns the rules that match a socket, as the kernel finds them.
    #[must_use]
    pub fn candidates(&self, scope: &Scope, facts: &Facts) -> Candidates {
        select(facts, &scope.selectors, &prefixes::Table(&self.prefixes))
    }

    /// Makes the audit count these options like options that rules name.
    pub fn look_at(&mut self, options: &[OptionKey]) {
        for key in options {
            if !self.options.contains(key) {
                self.options.push(*key);
                for scope in &mut self.scopes {
                    scope.options.push(OptionRow { key: *key, ..OptionRow::default() });
                }
            }
        }
    }

    /// Returns the congestion controls that the policies set, each once.
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

    /// Returns the policies that have rules, each once. Leaves out the policies of other instances.
    #[must_use]
    pub fn policies(&self) -> Vec<(&str, Mode)> {
        let own = self.rules.iter().filter(|rule| rule.instance.is_none());
        let mut policies: Vec<_> = own.map(|rule| (rule.policy.as_str(), rule.mode)).collect();
        policies.dedup();
        policies
    }
}

fn common_mode(policies: &[&Policy]) -> Result<Mode, CompileError> {
    let own = || policies.iter().filter(|policy| policy.instance.is_none());
    let first = |mode| own().find(|policy| policy.mode == mode);
    match (first(Mode::Enforce), first(Mode::DryRun)) {
        (Some(enforced), Some(dry)) => {
            Err(CompileError::MixedModes { enforced: enforced.name.clone(), dry: dry.name.clone() })
        }
        (None, Some(_)) => Ok(Mode::DryRun),
        _ => Ok(Mode::Enforce),
    }
}

/// Returns an audit that reports what any of the policies wants reported.
fn common_audit(policies: &[Policy]) -> Audit {
    Audit {
        calls: policies.iter().map(|policy| policy.audit.calls).max().unwrap_or(Calls::Conflicts),
        reads: policies.iter().any(|policy| policy.audit.reads),
        timing: policies.iter().any(|policy| policy.audit.timing),
    }
}

/// Returns the set of the rules for which `matches` returns true.
fn rules_where(rules: &[&Rule], matches: impl Fn(&Rule) -> bool) -> u64 {
    rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| matches(rule))
        .map(|(number, _)| 1 << number)
        .fold(0, |set, bit| set | bit)
}

fn selectors(scope: u32, rules: &[&Rule]) -> Selectors {
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
        scope,
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

/// Returns every option that a rule names. Options that rules set come first, in the order of the option table, which
/// is the order in which they are applied.
fn named_options(policies: &[Policy]) -> Vec<Named> {
    // Each option, with whether a rule sets it.
    let mut named: BTreeMap<OptionKey, (Named, bool)> = BTreeMap::new();
    for clause in policies.iter().flat_map(|policy| &policy.rules).flat_map(|rule| &rule.clauses) {
        let (_, is_set) = named.entry(clause.option.key()).or_insert((clause.option, false));
        *is_set |= matches!(clause.form, Form::Set(_));
    }
    let mut named: Vec<(Named, bool)> = named.into_values().collect();
    named.sort_by_key(|(named, is_set)| (!is_set, table_index(*named), named.key()));
    named.into_iter().map(|(named, _)| named).collect()
}

fn table_index(named: Named) -> usize {
    match named {
        Named::Known(option) => crate::options::OPTIONS.iter().position(|known| known == option).unwrap_or(usize::MAX),
        Named::Numeric(_) => usize::MAX,
    }
}

fn setting(clause: &Clause, mode: Mode) -> Setting {
    let mut setting = Setting {
        on_conflict: match clause.on_conflict {
            OnConflict::Allow => on_conflict::ALLOW,
            OnConflict::Rewrite => on_conflict::REWRITE,
            OnConflict::Ignore => on_conflict::IGNORE,
            OnConflict::Deny => on_conflict::DENY,
        },
        errno: clause.errno.0,
        dry_run: u16::from(mode == Mode::DryRun),
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
            setting.is_text = 1;
            setting.text = words_of_text(text.as_bytes());
        }
        Form::Limit { min, max } => {
            setting.form = form::LIMIT;
            (setting.min, setting.max) = open_bounds(clause.option, *min, *max);
        }
        Form::Deny => setting.form = form::DENY,
        Form::Free => setting.form = form::NONE,
    }
    setting
}

/// Returns the bounds of a limit. A bound at the end of an option's range limits nothing, not even values that the
/// kernel reads as "no limit" or as its default.
fn open_bounds(option: Named, min: i64, max: i64) -> (i64, i64) {
    let Named::Known(SocketOption { range, .. }) = option else { return (min, max) };
    (if min <= range.0 { i64::MIN } else { min }, if max >= range.1 { i64::MAX } else { max })
}
