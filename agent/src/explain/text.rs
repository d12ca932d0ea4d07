//! The text of an explanation: each option with the rule that decides it, and below it why the other rules do not.

use std::fmt;

use super::{Explanation, OptionExplained, Unmet, WhyNot};
use crate::escape::Escape;

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.socket)?;
        self.options.iter().try_for_each(|option| writeln!(f, "\n{option}"))
    }
}

impl fmt::Display for OptionExplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match &self.winner {
            Some(winner) => write!(
                f,
                "{name}: {}, by rule {} ({})",
                winner.says(),
                winner.rule.rule.escaped(),
                winner.place().escaped()
            )?,
            None => write!(f, "{name}: the application decides")?,
        }
        self.unsupported.iter().try_for_each(|entry| write!(f, "\n  unsupported: {entry}"))?;
        self.others.iter().try_for_each(|(other, why)| {
            write!(
                f,
                "\n  not {}, by rule {} ({}): {why}",
                other.says(),
                other.rule.rule.escaped(),
                other.place().escaped()
            )
        })
    }
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |unmet: &[Unmet]| unmet.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        match self {
            Self::Unmet(unmet) | Self::NotYet(unmet) => f.write_str(&list(unmet)),
            Self::Absent(sockets) => write!(f, "only {sockets} have the option"),
            Self::After(rule) => {
                write!(f, "rule {} of policy {} has precedence", rule.rule.escaped(), rule.policy.escaped())
            }
            Self::Waits(rule) => {
                write!(
                    f,
                    "rule {} of policy {} has precedence, and may match later",
                    rule.rule.escaped(),
                    rule.policy.escaped()
                )
            }
        }
    }
}
