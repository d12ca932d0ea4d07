//! Which rule decides each option of a socket, and why the others do not: `Desired` and a [`Socket`] → [`Explanation`].
//!
//! What decides is found by the compiled tables and the code that the kernel runs. Why the others do not is found in the
//! rules' own words. Pure: whose socket it is, and where it is described, is not known here.

mod conditions;
mod text;
mod trial;

use abi::{
    select::Candidates,
    setting::{OptionKey, OptionRow},
};
use serde_json::{Value, json};

pub use self::{
    conditions::{Unmet, unmet},
    trial::{Failure, Trial, try_all},
};
use crate::{
    compile::{Desired, RuleSource, Scope, SettingSource, facts},
    escape,
    limitations::{self, Limitation},
    policy::{Socket, model::Form},
    schema, values,
};

/// What becomes of each option that the policies name, on one socket.
#[derive(Clone, Debug)]
pub struct Explanation {
    pub socket: Socket,
    /// In the order in which the policies name them.
    pub options: Vec<OptionExplained>,
}

#[derive(Clone, Debug)]
pub struct OptionExplained {
    /// What decides; `None`: nothing, or not yet.
    pub winner: Option<Clause>,
    /// The other rules that name the option, in their order; never empty where there is no winner.
    pub others: Vec<(Clause, WhyNot)>,
    /// What is not done of what decides, on such a socket.
    pub unsupported: Vec<&'static Limitation>,
}

/// What a rule says of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    pub source: SettingSource,
    pub rule: RuleSource,
}

/// Why a rule that names an option does not decide it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// These conditions are not met.
    Unmet(Vec<Unmet>),
    /// It depends on what is not known of the socket.
    NotYet(Vec<Unmet>),
    /// It matches, but this one comes first.
    After(RuleSource),
    /// It matches, but this one comes first, may yet match, and would never have let it set the option.
    Waits(RuleSource),
}

/// Explains what the policies of a scope do with a socket.
#[must_use]
pub fn explain(desired: &Desired, scope: &Scope, socket: &Socket) -> Explanation {
    let candidates = desired.candidates(scope, &facts(socket));
    let mut options: Vec<_> = scope
        .options
        .iter()
        .filter(|option| option.names != 0 && !option.is_alias())
        .map(|option| (first_of(option), explain_option(desired, socket, option, candidates)))
        .collect();
    options.sort_by_key(|(first, _)| desired.sources.get(*first).map(|source| (source.rule, source.line)));
    Explanation { socket: socket.clone(), options: options.into_iter().map(|(_, option)| option).collect() }
}

/// The first of an option's settings, an index of [`Desired::settings`].
fn first_of(option: &OptionRow) -> usize {
    option.first_setting as usize
}

fn explain_option(desired: &Desired, socket: &Socket, option: &OptionRow, candidates: Candidates) -> OptionExplained {
    let first = first_of(option);
    let settings = first..first + option.names.count_ones() as usize;
    let winner = option.winner(candidates).map(|winner| winner as usize);
    let clause = |setting: usize| {
        let source = desired.sources.get(setting)?;
        Some(Clause { source: source.clone(), rule: desired.rules.get(source.rule)?.clone() })
    };
    let decides = winner.and_then(clause);
    // The first that may yet match and forbid: where there is no winner, it is what others wait for.
    let mut open = None;
    let mut others = Vec::new();
    for other in settings.filter(|setting| Some(*setting) != winner).filter_map(clause) {
        let (unmet, unknown): (Vec<_>, Vec<_>) =
            unmet(&other.rule.selector, socket).into_iter().partition(|unmet| unmet.has.is_some());
        let why = if !unmet.is_empty() {
            WhyNot::Unmet(unmet)
        } else if !unknown.is_empty() {
            if open.is_none() && !matches!(other.source.form, Form::Set(_)) {
                open = Some(other.rule.clone());
            }
            WhyNot::NotYet(unknown)
        } else {
            match (&decides, &open) {
                (Some(winner), _) => WhyNot::After(winner.rule.clone()),
                (None, Some(open)) => WhyNot::Waits(open.clone()),
                // Nothing stands before a rule that matches.
                (None, None) => continue,
            }
        };
        others.push((other, why));
    }
    let unsupported = decides.as_ref().map_or_else(Vec::new, |Clause { rule, source }| {
        limitations::of_socket(socket, &rule.selector, source.option, &source.form)
    });
    OptionExplained { winner: decides, others, unsupported }
}

impl Clause {
    /// What it says, as people write it.
    #[must_use]
    pub fn says(&self) -> String {
        values::form_text(self.source.option.key(), &self.source.form)
    }

    /// `FILE:LINE`
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", escape::plain(&self.rule.path), self.source.line)
    }
}

impl OptionExplained {
    fn clauses(&self) -> impl Iterator<Item = &Clause> {
        self.winner.iter().chain(self.others.iter().map(|(clause, _)| clause))
    }

    /// What all names of the option have in common.
    fn value_key(&self) -> Option<OptionKey> {
        self.clauses().next().map(|clause| clause.source.option.value_key())
    }

    /// The option's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.clauses().next().map_or_else(String::new, |clause| clause.source.option.to_string())
    }

    /// As a line of JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let clause = |clause: &Clause| {
            json!({
                "policy": clause.rule.policy,
                "rule": clause.rule.rule,
                "file": clause.place(),
                "says": clause.says(),
            })
        };
        let others = self.others.iter().map(|(other, why)| {
            let mut line = clause(other);
            line["why_not"] = why.to_string().into();
            line
        });
        let fields = json!({
            "option": self.name(),
            "decides": self.winner.as_ref().map(clause),
            "others": others.collect::<Vec<_>>(),
            "limitations": self.unsupported.iter().map(|entry| entry.name).collect::<Vec<_>>(),
        });
        schema::line("explanation", fields)
    }
}
