//! The summary as text: a table of the settings, and a table of the conflicts.

use std::fmt;

use super::{
    Cap, Example, Line, Repaired, Summary,
    calls::calls_table,
    common_mode,
    table::{align_right, table},
};
use crate::{
    errno,
    escape::{self, Escape},
    events::Action,
    limitations::{self, Concern},
    plural::counted,
    policy::model::Mode,
    values, wrap,
};

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.policies.is_empty() && self.targets.is_empty() && self.calls.is_empty() {
            writeln!(f, "sockpolicy: no policy is in force")?;
            return self.write_lost(f);
        }
        let targets = if self.targets.is_empty() { "no cgroup".to_owned() } else { escape::join(&self.targets, ", ") };
        if self.policies.is_empty() {
            writeln!(f, "sockpolicy: the calls of {targets}")?;
        } else {
            writeln!(f, "sockpolicy: {}", self.policies_on(&targets))?;
            self.tables().fmt(f)?;
            self.unsupported.iter().try_for_each(|unsupported| writeln!(f, "\nunsupported: {unsupported}"))?;
            self.write_unsupported(f)?;
        }
        if let Repaired { sockets: sockets @ 1.., listeners } = self.repaired {
            let [sockets, listeners] = [counted(sockets, "socket"), counted(listeners, "listener")];
            writeln!(
                f,
                "\nrepaired: {sockets} ({listeners}), created before the programs were attached to their cgroup"
            )?;
        }
        if !self.calls.is_empty() {
            writeln!(f, "\n{}", wrap::table(calls_table(&self.calls)))?;
        } else if self.policies.is_empty() {
            writeln!(f, "\nno application called setsockopt or getsockopt")?;
        }
        if self.audit.is_none() {
            writeln!(f, "\nno audit: results of calls are unknown")?;
        }
        self.write_lost(f)
    }
}

/// The tables of settings and conflicts.
struct Tables<'a>(&'a Summary);

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write_settings(f)?;
        self.0.write_conflicts(f)?;
        self.0.write_mismatches(f)?;
        self.0.write_suppressed(f)?;
        self.0.write_other_cgroups(f)
    }
}

impl Summary {
    fn write_lost(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = self.lost.by_reason();
        lost.into_iter()
            .filter(|(_, count)| *count > 0)
            .try_for_each(|(reason, count)| writeln!(f, "\nlost: {}", reason.counted(count)))
    }

    /// Returns only the tables of settings and conflicts.
    #[must_use]
    pub fn tables(&self) -> impl fmt::Display {
        Tables(self)
    }

    fn policies_on(&self, targets: &str) -> String {
        let mode_text = |mode| match mode {
            Mode::Enforce => "enforced",
            Mode::DryRun => "dry run, nothing was changed",
        };
        match common_mode(&self.policies) {
            Some(mode) => {
                let names = escape::join(self.policies.iter().map(|(name, _)| name), ", ");
                format!("{names} on {targets} ({})", mode_text(mode))
            }
            None => {
                let names: Vec<_> = self
                    .policies
                    .iter()
                    .map(|(name, mode)| format!("{} ({})", name.escaped(), mode_text(*mode)))
                    .collect();
                format!("{} on {targets}", names.join(", "))
            }
        }
    }

    /// Writes the limitations for sockets that rules match explicitly.
    fn write_unsupported(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for entry in limitations::ALL {
            let is_explicit = |line: &&Line| line.unsupported.contains(&(entry, Concern::Asked));
            let mut options: Vec<String> =
                self.lines.iter().filter(is_explicit).map(|line| line.option.to_string()).collect();
            options.dedup();
            if !options.is_empty() {
                writeln!(f, "\nunsupported: {}: {entry}", options.join(", "))?;
            }
        }
        Ok(())
    }

    fn write_settings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: Vec<&Line> = self.lines.iter().filter(|line| line.is_set()).collect();
        if set.is_empty() {
            return Ok(());
        }
        let mode = common_mode(&self.policies);
        let done = if mode == Some(Mode::DryRun) { "would set" } else { "set" };
        let mut table = table(&["option", "value", "rule", &format!("sockets {done}"), "unchanged", "failed"]);
        for line in &set {
            let counters = &line.counters;
            let failed = if counters.failed == 0 {
                "0".to_owned()
            } else {
                format!("{} ({})", counters.failed, errno::name(counters.failed_errno as i32))
            };
            table.add_row([
                line.option.to_string(),
                line.wanted(),
                format!("{} ({})", line.rule.escaped(), line.place.escaped()),
                sockets_set(line, mode.is_none()),
                counters.unchanged.to_string(),
                failed,
            ]);
        }
        for column in 3..6 {
            align_right(&mut table, column);
        }
        writeln!(f, "\n{}", wrap::table(table))?;
        let caps = set.into_iter().filter_map(|line| Some((line.option, line.cap_in_effect()?)));
        caps.into_iter().try_for_each(|(option, Cap { max, sysctl })| {
            let max = values::number_text(option.key(), max);
            writeln!(f, "\ncapped: the kernel takes at most {max} for {option} ({sysctl})")
        })
    }

    fn write_conflicts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<&Line> = self.lines.iter().filter(|line| line.conflicts() > 0).collect();
        if lines.is_empty() {
            return writeln!(
                f,
                "\nno call conflicted with the policy\n(calls on sockets of other cgroups are not judged)"
            );
        }
        let mut table = table(&["option", "policy", "requested by applications", "calls", "verdict", "winner"]);
        for line in lines {
            for (verdict, count) in line.verdicts() {
                table.add_row([
                    line.option.to_string(),
                    line.wanted(),
                    examples(line, Some(verdict.what)),
                    count.to_string(),
                    verdict.to_string(),
                    winner(verdict.what, line.mode).to_owned(),
                ]);
            }
        }
        align_right(&mut table, 3);
        writeln!(f, "\n{}", wrap::table(table))
    }

    /// Writes which reads showed another value than the policy's.
    fn write_mismatches(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<&Line> = self.lines.iter().filter(|line| line.counters.reads > 0).collect();
        if lines.is_empty() {
            return Ok(());
        }
        let mut table = table(&["option", "policy", "read by applications", "reads"]);
        for line in lines {
            let read = [line.option.to_string(), line.wanted(), examples(line, None), line.counters.reads.to_string()];
            table.add_row(read);
        }
        align_right(&mut table, 3);
        writeln!(f, "\n{}", wrap::table(table))
    }

    /// Writes which reported calls were on sockets that no target covers.
    fn write_other_cgroups(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.other_cgroups.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nnot judged, on sockets of other cgroups:")?;
        let mut cgroups = self.other_cgroups.iter();
        cgroups.try_for_each(|(cgroup, calls)| writeln!(f, "  {}: {}", cgroup.escaped(), counted(*calls, "call")))
    }

    fn write_suppressed(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lines.iter().map(|line| line.counters.suppressed).sum() {
            0 => Ok(()),
            suppressed => {
                writeln!(f, "\nsuppressed: {} of calls that repeat a recent one", counted(suppressed, "event"))
            }
        }
    }
}

/// Returns the number of sockets on which the setting changed the value. `is_mixed`: policies have different modes.
fn sockets_set(line: &Line, is_mixed: bool) -> String {
    let dry_run = if is_mixed && line.mode == Mode::DryRun { " (dry run)" } else { "" };
    let capped = if line.cap_in_effect().is_some() { " (capped)" } else { "" };
    format!("{}{dry_run}{capped}", line.counters.set)
}

/// Returns the values that were requested with this verdict, or read if there is no verdict, one on each line.
fn examples(line: &Line, verdict: Option<Action>) -> String {
    let examples = line.requested.iter().filter(|example| example.verdict == verdict);
    examples.map(Example::text).collect::<Vec<_>>().join("\n")
}

fn winner(action: Action, mode: Mode) -> &'static str {
    if action == Action::Allowed || mode == Mode::DryRun { "application" } else { "policy" }
}
