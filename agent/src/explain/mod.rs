//! Which rule decides each option of a socket, and why the other rules do not: `Desired` and a [`Socket`] →
//! [`Explanation`].
//!
//! The deciding rule comes from the compiled tables and the code that the kernel runs. The reasons for the other rules
//! come from the rules themselves. Pure: this module does not know where the socket comes from.

mod conditions;
mod text;
mod trial;

use abi::{
    select::Candidates,
    setting::{OptionKey, OptionRow, traits},
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
    policy::{
        Socket,
        model::{Family, Form, Protocol},
    },
    schema, values,
};

/// The result for each option that the policies name, on one socket.
#[derive(Clone, Debug)]
pub struct Explanation {
    pub socket: Socket,
    /// In the order in which the policies name them.
    pub options: Vec<OptionExplained>,
}

#[derive(Clone, Debug)]
pub struct OptionExplained {
    /// The clause that decides; `None` if none decides, or none yet.
    pub winner: Option<Clause>,
    /// The other rules that name the option, in order. Not empty if there is no winner.
    pub others: Vec<(Clause, WhyNot)>,
    /// The limitations that apply to the winner on such a socket.
    pub unsupported: Vec<&'static Limitation>,
}

/// A rule's setting for an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    pub source: SettingSource,
    pub rule: RuleSource,
}

/// Why a rule that names an option does not decide it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// The socket does not meet these conditions.
    Unmet(Vec<Unmet>),
    /// The rule depends on facts that are unknown.
    NotYet(Vec<Unmet>),
    /// The rule sets an option that such a socket does not have. The sockets that have it.
    Absent(&'static str),
    /// The rule matches, but this rule has precedence.
    After(RuleSource),
    /// The rule matches, but this rule has precedence, may match later, and would then forbid the rule to set the
    /// option.
    Waits(RuleSource),
}

/// Returns what the policies of a scope do with a socket.
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

/// Returns the first of an option's settings, as an index of [`Desired::settings`].
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
    let absent = only_on(option, socket).filter(|_| decides.as_ref().is_some_and(Clause::sets));
    // The first rule that may match later and forbid. If there is no winner, the other rules wait for it.
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
                // A rule that matches always has a winner or a rule that it waits for.
                (None, None) => continue,
            }
        };
        others.push((other, why));
    }
    let (decides, absent) = match absent {
        Some(sockets) => (None, decides.map(|clause| (clause, WhyNot::Absent(sockets)))),
        None => (decides, None),
    };
    others.splice(0..0, absent);
    let unsupported = decides.as_ref().map_or_else(Vec::new, |Clause { rule, source }| {
        limitations::of_socket(socket, &rule.selector, source.option, &source.form)
    });
    OptionExplained { winner: decides, others, unsupported }
}

/// Returns which sockets have an option, if such a socket does not have it.
fn only_on(option: &OptionRow, socket: &Socket) -> Option<&'static str> {
    let has = |bit| option.traits & bit != 0;
    if has(traits::TCP) && socket.protocol.is_some_and(|protocol| protocol != Protocol::Tcp) {
        Some("TCP sockets")
    } else if has(traits::INET6) && socket.family() == Some(Family::Ipv4) {
        Some("IPv6 sockets")
    } else if has(traits::INET) && socket.family() == Some(Family::Ipv6) {
        Some("IPv4 sockets")
    } else {
        None
    }
}

impl Clause {
    fn sets(&self) -> bool {
        matches!(self.source.form, Form::Set(_))
    }

    /// Returns the clause as written in a policy.
    #[must_use]
    pub fn says(&self) -> String {
        values::form_text(self.source.option.key(), &self.source.form)
    }

    /// Returns `FILE:LINE`.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", escape::plain(&self.rule.path), self.source.line)
    }
}

impl OptionExplained {
    fn clauses(&self) -> impl Iterator<Item = &Clause> {
        self.winner.iter().chain(self.others.iter().map(|(clause, _)| clause))
    }

    /// Returns the key that all names of the option share.
    fn value_key(&self) -> Option<OptionKey> {
        self.clauses().next().map(|clause| clause.source.option.value_key())
    }

    /// Returns the name of the option.
    #[must_use]
    pub fn name(&self) -> String {
        self.clauses().next().map_or_else(String::new, |clause| clause.source.option.to_string())
    }

    /// Returns the explanation as a JSON object.
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
