//! Statistics of samples: medians, quartiles, and ratios of interleaved runs.
//!
//! The samples of one round are taken within about a second. A longer disturbance affects all samples of the round.
//! Ratios are therefore computed within each round, and their median is reported.

use serde::Serialize;

/// The distribution of many samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    /// The first and the third quartile.
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) runs: usize,
}

impl Spread {
    /// Returns `None` if there are no samples, or if one is not finite.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        if samples.is_empty() || samples.iter().any(|sample| !sample.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let [low, median, high] = [0.25, 0.5, 0.75].map(|part| quantile(&sorted, part));
        Some(Self { median, low, high, runs: samples.len() })
    }

    /// Returns the distribution in another unit.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        Self { median: self.median * factor, low: self.low * factor, high: self.high * factor, runs: self.runs }
    }
}

/// Returns a quantile of sorted samples, interpolated between neighbouring samples.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// Returns the median; NaN if there are no samples.
pub(crate) fn median(samples: &[f64]) -> f64 {
    Spread::of(samples).map_or(f64::NAN, |spread| spread.median)
}

/// Returns the difference of each round.
pub(crate) fn differences(of: &[f64], less: &[f64]) -> Vec<f64> {
    of.iter().zip(less).map(|(of, less)| of - less).collect()
}

/// Returns the ratio of each round.
pub(crate) fn ratios(over: &[f64], under: &[f64]) -> Vec<f64> {
    over.iter().zip(under).map(|(over, under)| over / under).collect()
}

/// Returns the order in which a round visits `count` items. No item is always first, or always after the same item.
pub(crate) fn order(count: usize, round: usize) -> Vec<usize> {
    let rotated = |place: usize| (place + round.wrapping_mul(7)) % count.max(1);
    let forth = (0..count).map(rotated);
    if round.is_multiple_of(2) { forth.collect() } else { forth.rev().collect() }
}

#[cfg(test)]
mod tests {
    use super::{Spread, differences, median, order, ratios};

    #[test]
    fn spread_is_median_and_quartiles() {
        let spread = Spread::of(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!(spread, Spread { median: 3.0, low: 2.0, high: 4.0, runs: 5 });
        let spread = Spread::of(&[1.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 1.5, low: 1.25, high: 1.75, runs: 2 });
        let spread = Spread::of(&[7.0]).unwrap();
        assert_eq!((spread.median, spread.low, spread.high), (7.0, 7.0, 7.0));
    }

    #[test]
    fn spread_of_no_samples_or_of_infinite_samples_is_none() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[f64::INFINITY]), None);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn one_outlier_does_not_move_the_median() {
        assert!((median(&[1.0, 1.0, 1.0, 1.0, 1000.0]) - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn ratios_are_computed_within_rounds() {
        // The machine is half as fast in the second round: the ratio is the same.
        assert_eq!(ratios(&[30.0, 60.0], &[10.0, 20.0]), [3.0, 3.0]);
        assert_eq!(
            ratios(&differences(&[30.0, 60.0], &[20.0, 40.0]), &differences(&[25.0, 50.0], &[20.0, 40.0])),
            [2.0; 2]
        );
    }

    #[test]
    fn each_round_visits_all_items_in_varying_order() {
        for count in [1, 2, 5, 7, 14] {
            for round in 0..5 {
                let mut places = order(count, round);
                places.sort_unstable();
                assert!(places.into_iter().eq(0..count), "{count} in round {round}");
            }
        }
        assert_ne!(order(5, 0), order(5, 1));
        assert_ne!(order(5, 0), order(5, 2));
        assert!(order(0, 3).is_empty());
    }
}
