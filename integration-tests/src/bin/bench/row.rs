//! Rows of the table, and how they come of samples.

use serde::Serialize;

use crate::{
    measure::{self, Spread},
    scene::Samples,
    trouble::{Result, Trouble},
};

/// What a plain figure is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Nanoseconds each.
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "ms")]
    Milliseconds,
    /// How often a second.
    #[serde(rename = "1/s")]
    Rate,
    #[serde(rename = "KiB")]
    Kibibytes,
    #[serde(rename = "count")]
    Count,
    #[serde(rename = "% of a core")]
    Percent,
}

/// What DESIGN.md allows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) enum Budget {
    #[serde(rename = "ratio at most")]
    AtMost(f64),
    #[serde(rename = "ratio at least")]
    AtLeast(f64),
    /// The plain figure, in its unit.
    #[serde(rename = "plain at most")]
    PlainAtMost(f64),
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) part: &'static str,
    /// What was measured.
    pub(crate) what: String,
    /// Against what.
    pub(crate) versus: String,
    /// How many times as much. `None`: left out.
    pub(crate) ratio: Option<Spread>,
    /// What was measured, by itself.
    pub(crate) plain: Option<Spread>,
    pub(crate) unit: Unit,
    pub(crate) budget: Option<Budget>,
    /// Why there is no ratio.
    pub(crate) left_out: Option<String>,
}

impl Row {
    /// Whether the budget was kept in this run, if there is one.
    pub(crate) fn is_met(&self) -> Option<bool> {
        match self.budget? {
            Budget::AtMost(most) => Some(self.ratio?.median <= most),
            Budget::AtLeast(least) => Some(self.ratio?.median >= least),
            // It needs no peer.
            Budget::PlainAtMost(most) => Some(self.plain?.median <= most),
        }
    }
}

/// Samples of an arm, less those of another.
#[derive(Clone, Debug)]
pub(crate) struct Term {
    of: String,
    less: Option<String>,
}

impl Term {
    fn arms(&self) -> impl Iterator<Item = &str> {
        [Some(&*self.of), self.less.as_deref()].into_iter().flatten()
    }

    /// Of the samples of its arms, which come first.
    fn take(&self, samples: &mut impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
        let of = samples.next().unwrap_or_default();
        if self.less.is_none() { of } else { measure::differences(&of, &samples.next().unwrap_or_default()) }
    }
}

/// All that an arm takes.
pub(crate) fn whole(arm: impl Into<String>) -> Term {
    Term { of: arm.into(), less: None }
}

/// What an arm takes more than another.
pub(crate) fn added(arm: impl Into<String>, less: impl Into<String>) -> Term {
    Term { of: arm.into(), less: Some(less.into()) }
}

/// A row, before anything was measured.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) what: String,
    pub(crate) versus: String,
    pub(crate) over: Term,
    pub(crate) under: Term,
    pub(crate) unit: Unit,
    /// The arm that is shown by itself.
    pub(crate) plain: String,
    pub(crate) budget: Option<Budget>,
}

impl Line {
    /// `over` in times of `under`. What is shown by itself is the arm of `over`.
    pub(crate) fn new(what: impl Into<String>, over: Term, versus: impl Into<String>, under: Term) -> Self {
        let plain = over.of.clone();
        Self { what: what.into(), versus: versus.into(), over, under, unit: Unit::Nanoseconds, plain, budget: None }
    }

    pub(crate) fn budget(self, budget: Budget) -> Self {
        Self { budget: Some(budget), ..self }
    }

    pub(crate) fn unit(self, unit: Unit) -> Self {
        Self { unit, ..self }
    }

    /// Shows another arm by itself.
    pub(crate) fn plain(self, arm: impl Into<String>) -> Self {
        Self { plain: arm.into(), ..self }
    }

    pub(crate) fn row(&self, part: &'static str, samples: &Samples) -> Row {
        let ratio = self.ratio(samples);
        let plain = samples.of(&self.plain).ok().and_then(|samples| in_unit(samples, self.unit));
        let (ratio, left_out) = match ratio {
            Ok(ratio) => (Some(ratio), None),
            Err(trouble) => (None, Some(trouble.in_short().to_owned())),
        };
        let Self { what, versus, unit, budget, .. } = self.clone();
        Row { part, what, versus, ratio, plain, unit, budget, left_out }
    }

    fn ratio(&self, samples: &Samples) -> Result<Spread> {
        let Self { over, under, .. } = self;
        let arms: Vec<&str> = over.arms().chain(under.arms()).collect();
        // Differences are small beside what they are differences of: medians first.
        let by_round = over.less.is_some() || under.less.is_some();
        let mut samples = samples.beside_each_other(&arms, by_round)?.into_iter();
        let (over, under) = (over.take(&mut samples), under.take(&mut samples));
        // Where it may as well be nothing, any number can come out.
        let is_sound = Spread::of(&under).is_some_and(|under| under.low > 0.0);
        let ratio = if is_sound { Spread::of(&measure::ratios(&over, &under)) } else { None };
        ratio.ok_or_else(|| Trouble::new("the reference was below the noise of the machine"))
    }
}

/// Samples of nanoseconds, or of what the unit says by itself.
fn in_unit(samples: &[f64], unit: Unit) -> Option<Spread> {
    match unit {
        Unit::Rate => Spread::of(&samples.iter().map(|ns| 1e9 / ns).collect::<Vec<_>>()),
        Unit::Milliseconds => Spread::of(samples).map(|spread| spread.scaled(1e-6)),
        Unit::Nanoseconds | Unit::Kibibytes | Unit::Count | Unit::Percent => Spread::of(samples),
    }
}

/// One figure against its size.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// Size and figure.
    pub(crate) points: Vec<(f64, Spread)>,
}

/// Of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scale {
    Linear,
    Logarithmic,
}

/// What becomes a plot.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Plot {
    /// The name of its file.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) kind: Kind,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Curves {
        size: &'static str,
        sizes: Scale,
        figure: &'static str,
        figures: Scale,
        series: Vec<Series>,
    },
    /// A logarithmic bar for each.
    Bars {
        figure: &'static str,
        bars: Vec<(String, Spread)>,
    },
}

/// All that was found out.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Findings {
    pub(crate) rows: Vec<Row>,
    pub(crate) plots: Vec<Plot>,
}

impl Findings {
    /// A part that could not be measured at all.
    pub(crate) fn leave_out(&mut self, part: &'static str, reason: &Trouble) {
        let (what, left_out) = ("all of it".to_owned(), Some(reason.in_short().to_owned()));
        let (ratio, plain, versus) = (None, None, String::new());
        self.rows.push(Row { part, what, versus, ratio, plain, unit: Unit::Count, budget: None, left_out });
    }

    pub(crate) fn add(&mut self, part: &'static str, samples: &Samples, lines: &[Line]) {
        self.rows.extend(lines.iter().map(|line| line.row(part, samples)));
    }
}

#[cfg(test)]
mod tests {
    use super::{Budget, Line, Unit, added, whole};
    use crate::{scene::Samples, trouble::Trouble};

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (none, limit, ours) in [(100.0, 150.0, 200.0), (200.0, 300.0, 400.0)] {
            samples.add("none/set", none);
            samples.add("limit/set", limit);
            samples.add("ours/set", ours);
        }
        samples.leave_out("other", Trouble::new("other is not installed"));
        samples
    }

    #[test]
    fn added_cost_is_compared_with_added_cost() {
        let line = Line::new("ours", added("ours/set", "none/set"), "limit", added("limit/set", "none/set"));
        let row = line.budget(Budget::AtMost(1.9)).row("part", &samples());
        assert!((row.ratio.unwrap().median - 2.0).abs() < 1e-9);
        assert!((row.plain.unwrap().median - 300.0).abs() < 1e-9);
        assert_eq!(row.is_met(), Some(false));
    }

    #[test]
    fn budgets_can_be_about_the_plain_figure_or_a_least_ratio() {
        let line = Line::new("ours", whole("ours/set"), "none", whole("none/set")).unit(Unit::Milliseconds);
        assert_eq!(line.clone().budget(Budget::PlainAtMost(0.001)).row("part", &samples()).is_met(), Some(true));
        assert_eq!(line.clone().budget(Budget::AtLeast(2.0)).row("part", &samples()).is_met(), Some(true));
        assert_eq!(line.clone().budget(Budget::AtLeast(2.1)).row("part", &samples()).is_met(), Some(false));
        assert_eq!(line.row("part", &samples()).is_met(), None);
    }

    #[test]
    fn what_may_be_nothing_is_no_measure() {
        let mut samples = samples();
        samples.add("noise/set", 90.0);
        samples.add("noise/set", 210.0);
        let row = Line::new("ours", added("ours/set", "none/set"), "noise", added("noise/set", "none/set"));
        assert!(row.row("part", &samples).left_out.is_some());
    }

    #[test]
    fn what_was_not_measured_is_left_out_with_the_reason() {
        let row = Line::new("other", whole("other/set"), "none", whole("none/set")).row("part", &samples());
        assert_eq!((row.ratio, row.left_out.as_deref()), (None, Some("other is not installed")));
        assert_eq!(row.is_met(), None);
        // What is about the figure itself needs nothing to compare it with.
        let line = Line::new("ours", whole("ours/set"), "other", whole("other/set")).budget(Budget::PlainAtMost(400.0));
        assert_eq!(line.row("part", &samples()).is_met(), Some(true));
    }

    #[test]
    fn rates_are_the_inverse_of_time() {
        let row =
            Line::new("ours", whole("ours/set"), "none", whole("none/set")).unit(Unit::Rate).row("part", &samples());
        assert!((row.plain.unwrap().median - 3_750_000.0).abs() < 1.0);
    }
}
