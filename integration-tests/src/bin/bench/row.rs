//! The rows of the table, and how they are computed from samples.

use serde::Serialize;

use crate::{
    error::{BenchError, Result},
    measure::{self, Spread},
    scene::Samples,
};

/// The unit of an absolute figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Nanoseconds per operation.
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "ms")]
    Milliseconds,
    /// Operations per second.
    #[serde(rename = "1/s")]
    Rate,
    #[serde(rename = "KiB")]
    Kibibytes,
    #[serde(rename = "count")]
    Count,
    #[serde(rename = "% of a core")]
    Percent,
}

/// A performance budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) enum Budget {
    #[serde(rename = "ratio at most")]
    AtMost(f64),
    #[serde(rename = "ratio at least")]
    AtLeast(f64),
    /// A limit on the absolute figure, in its unit.
    #[serde(rename = "plain at most")]
    PlainAtMost(f64),
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) part: &'static str,
    /// What was measured.
    pub(crate) what: String,
    /// What it was compared with.
    pub(crate) versus: String,
    /// The ratio; `None` if it was left out.
    pub(crate) ratio: Option<Spread>,
    /// The absolute figure.
    pub(crate) plain: Option<Spread>,
    pub(crate) unit: Unit,
    pub(crate) budget: Option<Budget>,
    /// The reason why there is no ratio.
    pub(crate) left_out: Option<String>,
}

impl Row {
    /// Returns whether this run met the budget; `None` without a budget or a figure.
    pub(crate) fn is_met(&self) -> Option<bool> {
        match self.budget? {
            Budget::AtMost(most) => Some(self.ratio?.median <= most),
            Budget::AtLeast(least) => Some(self.ratio?.median >= least),
            // This budget needs no comparison.
            Budget::PlainAtMost(most) => Some(self.plain?.median <= most),
        }
    }
}

/// The samples of an arm, or their difference from those of another arm.
#[derive(Clone, Debug)]
pub(crate) struct Term {
    of: String,
    less: Option<String>,
}

impl Term {
    fn arms(&self) -> impl Iterator<Item = &str> {
        [Some(&*self.of), self.less.as_deref()].into_iter().flatten()
    }

    /// Takes the samples of the arms from the front of the iterator.
    fn take(&self, samples: &mut impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
        let of = samples.next().unwrap_or_default();
        if self.less.is_none() { of } else { measure::differences(&of, &samples.next().unwrap_or_default()) }
    }
}

/// The total cost of an arm.
pub(crate) fn total(arm: impl Into<String>) -> Term {
    Term { of: arm.into(), less: None }
}

/// The difference between an arm and another arm.
pub(crate) fn added(arm: impl Into<String>, less: impl Into<String>) -> Term {
    Term { of: arm.into(), less: Some(less.into()) }
}

/// The definition of a row.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) what: String,
    pub(crate) versus: String,
    pub(crate) over: Term,
    pub(crate) under: Term,
    pub(crate) unit: Unit,
    /// The arm that is shown as an absolute figure.
    pub(crate) plain: String,
    pub(crate) budget: Option<Budget>,
}

impl Line {
    /// Compares `over` with `under`. The arm of `over` is shown as an absolute figure.
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

    /// Shows another arm as an absolute figure.
    pub(crate) fn plain(self, arm: impl Into<String>) -> Self {
        Self { plain: arm.into(), ..self }
    }

    pub(crate) fn row(&self, part: &'static str, samples: &Samples) -> Row {
        let ratio = self.ratio(samples);
        let plain = samples.of(&self.plain).ok().and_then(|samples| in_unit(samples, self.unit));
        let (ratio, left_out) = match ratio {
            Ok(ratio) => (Some(ratio), None),
            Err(error) => (None, Some(error.in_short().to_owned())),
        };
        let Self { what, versus, unit, budget, .. } = self.clone();
        Row { part, what, versus, ratio, plain, unit, budget, left_out }
    }

    fn ratio(&self, samples: &Samples) -> Result<Spread> {
        let Self { over, under, .. } = self;
        let arms: Vec<&str> = over.arms().chain(under.arms()).collect();
        // Differences are small compared with their operands, so medians come first.
        let by_round = over.less.is_some() || under.less.is_some();
        let mut samples = samples.paired(&arms, by_round)?.into_iter();
        let (over, under) = (over.take(&mut samples), under.take(&mut samples));
        // A denominator that may be zero makes the ratio meaningless.
        let is_sound = Spread::of(&under).is_some_and(|under| under.low > 0.0);
        let ratio = if is_sound { Spread::of(&measure::ratios(&over, &under)) } else { None };
        ratio.ok_or_else(|| BenchError::new("the reference was below the noise of the machine"))
    }
}

/// Converts samples from nanoseconds, except those that already are in the unit.
fn in_unit(samples: &[f64], unit: Unit) -> Option<Spread> {
    match unit {
        Unit::Rate => Spread::of(&samples.iter().map(|ns| 1e9 / ns).collect::<Vec<_>>()),
        Unit::Milliseconds => Spread::of(samples).map(|spread| spread.scaled(1e-6)),
        Unit::Nanoseconds | Unit::Kibibytes | Unit::Count | Unit::Percent => Spread::of(samples),
    }
}

/// A figure by size.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// Pairs of size and figure.
    pub(crate) points: Vec<(f64, Spread)>,
}

/// The scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scale {
    Linear,
    Logarithmic,
}

/// The contents of a plot.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Plot {
    /// The name of the file, without its extension.
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
    /// One logarithmic bar for each figure.
    Bars {
        figure: &'static str,
        bars: Vec<(String, Spread)>,
    },
}

/// The results of the benchmark.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Findings {
    pub(crate) rows: Vec<Row>,
    pub(crate) plots: Vec<Plot>,
}

impl Findings {
    /// Records that a part could not be measured.
    pub(crate) fn leave_out(&mut self, part: &'static str, reason: &BenchError) {
        let (what, left_out) = ("the whole part".to_owned(), Some(reason.in_short().to_owned()));
        let (ratio, plain, versus) = (None, None, String::new());
        self.rows.push(Row { part, what, versus, ratio, plain, unit: Unit::Count, budget: None, left_out });
    }

    pub(crate) fn add(&mut self, part: &'static str, samples: &Samples, lines: &[Line]) {
        self.rows.extend(lines.iter().map(|line| line.row(part, samples)));
    }
}

#[cfg(test)]
mod tests {
    use super::{Budget, Line, Unit, added, total};
    use crate::{error::BenchError, scene::Samples};

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (none, limit, ours) in [(100.0, 150.0, 200.0), (200.0, 300.0, 400.0)] {
            samples.add("none/set", none);
            samples.add("limit/set", limit);
            samples.add("ours/set", ours);
        }
        samples.leave_out("other", BenchError::new("other is not installed"));
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
    fn budgets_limit_the_absolute_figure_or_the_ratio() {
        let line = Line::new("ours", total("ours/set"), "none", total("none/set")).unit(Unit::Milliseconds);
        assert_eq!(line.clone().budget(Budget::PlainAtMost(0.001)).row("part", &samples()).is_met(), Some(true));
        assert_eq!(line.clone().budget(Budget::AtLeast(2.0)).row("part", &samples()).is_met(), Some(true));
        assert_eq!(line.clone().budget(Budget::AtLeast(2.1)).row("part", &samples()).is_met(), Some(false));
        assert_eq!(line.row("part", &samples()).is_met(), None);
    }

    #[test]
    fn denominators_that_may_be_zero_give_no_ratio() {
        let mut samples = samples();
        samples.add("noise/set", 90.0);
        samples.add("noise/set", 210.0);
        let row = Line::new("ours", added("ours/set", "none/set"), "noise", added("noise/set", "none/set"));
        assert!(row.row("part", &samples).left_out.is_some());
    }

    #[test]
    fn unmeasured_rows_are_left_out_with_the_reason() {
        let row = Line::new("other", total("other/set"), "none", total("none/set")).row("part", &samples());
        assert_eq!((row.ratio, row.left_out.as_deref()), (None, Some("other is not installed")));
        assert_eq!(row.is_met(), None);
        // A budget on the absolute figure needs no comparison.
        let line = Line::new("ours", total("ours/set"), "other", total("other/set")).budget(Budget::PlainAtMost(400.0));
        assert_eq!(line.row("part", &samples()).is_met(), Some(true));
    }

    #[test]
    fn rates_are_the_inverse_of_time() {
        let row =
            Line::new("ours", total("ours/set"), "none", total("none/set")).unit(Unit::Rate).row("part", &samples());
        assert!((row.plain.unwrap().median - 3_750_000.0).abs() < 1.0);
    }
}
