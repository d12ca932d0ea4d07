//! The calls that the audit counted, by option: how many, how many failed, and their durations.

use abi::event::{BUCKETS, Tally, TallyKey, call};
use comfy_table::Table;
use serde_json::{Value, json};

use super::table::{align_right, table};
use crate::{options::display_name, values};

/// Stands for options without a name that are too many to count one by one.
const OTHER: &str = "other";

/// One kind of call on one option.
#[derive(Clone, Debug)]
pub struct CallLine {
    /// The name of the option, or `OTHER`.
    pub option: String,
    /// `setsockopt` or `getsockopt`.
    pub call: &'static str,
    pub tally: Tally,
}

impl CallLine {
    /// Returns `None` for a kind of call that this build does not know.
    #[must_use]
    pub fn new(key: TallyKey, tally: Tally) -> Option<Self> {
        let call = match key.kind {
            call::SETSOCKOPT => "setsockopt",
            call::GETSOCKOPT => "getsockopt",
            _ => return None,
        };
        let option = if key.key == TallyKey::OTHER { OTHER.to_owned() } else { display_name(key.key) };
        Some(Self { option, call, tally })
    }

    pub(super) fn to_json(&self) -> Value {
        let Self { option, call, tally } = self;
        let Tally { calls, failed, total_ns, buckets } = tally;
        let is_timed = *total_ns != 0;
        let counted = buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        let histogram: Vec<Value> =
            counted.map(|(bucket, count)| json!({ "from_ns": lower_bound(bucket), "count": count })).collect();
        json!({
            "option": option,
            "call": call,
            "count": calls,
            "failed": failed,
            "total_ns": is_timed.then_some(total_ns),
            "histogram": is_timed.then_some(histogram),
        })
    }
}

/// Returns the shortest duration of a bucket, in nanoseconds.
fn lower_bound(bucket: usize) -> u64 {
    if bucket == 0 { 0 } else { 1 << bucket }
}

/// Returns an upper bound in nanoseconds for the durations of this part of the calls: the end of the bucket that the
/// quantile is in.
fn quantile(tally: &Tally, part: f64) -> u64 {
    let wanted = (tally.calls as f64 * part).ceil() as u64;
    let mut seen = 0;
    for (bucket, count) in tally.buckets.iter().enumerate() {
        seen += count;
        if seen >= wanted {
            return lower_bound(bucket + 1);
        }
    }
    lower_bound(BUCKETS)
}

/// Returns a table of the calls, the most frequent first.
pub(super) fn calls_table(lines: &[CallLine]) -> Table {
    let is_timed = lines.iter().any(|line| line.tally.total_ns != 0);
    let mut header = vec!["option", "call", "calls", "failed"];
    if is_timed {
        header.extend(["mean", "50 % below", "99 % below", "histogram (from 128 ns, doubling)"]);
    }
    let mut sorted: Vec<&CallLine> = lines.iter().collect();
    sorted.sort_by(|one, other| {
        (other.tally.calls, &one.option, one.call).cmp(&(one.tally.calls, &other.option, other.call))
    });
    let mut table = table(&header);
    for CallLine { option, call, tally } in sorted {
        let mut row = vec![option.clone(), (*call).to_owned(), tally.calls.to_string(), tally.failed.to_string()];
        if is_timed {
            row.push(values::duration_text(tally.total_ns / tally.calls.max(1)));
            row.extend([0.5, 0.99].map(|part| values::duration_text(quantile(tally, part))));
            row.push(sparkline(tally));
        }
        table.add_row(row);
    }
    for column in 2..if is_timed { 7 } else { 4 } {
        align_right(&mut table, column);
    }
    table
}

/// Returns a small histogram: one block for each bucket, from 128 ns (and below) to 1 ms (and above).
fn sparkline(tally: &Tally) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const FIRST: usize = 7;
    const LAST: usize = 20;
    let (below, rest) = tally.buckets.split_at(FIRST);
    let (within, above) = rest.split_at(LAST - FIRST);
    let mut counts = within.to_vec();
    if let Some(first) = counts.first_mut() {
        *first += below.iter().sum::<u64>();
    }
    counts.push(above.iter().sum());
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let block = |count: u64| {
        if count == 0 { ' ' } else { BLOCKS[((count * 8).div_ceil(most) as usize - 1).min(7)] }
    };
    counts.into_iter().map(block).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(durations: &[u64]) -> Tally {
        let mut tally = Tally { calls: durations.len() as u64, ..Tally::default() };
        for duration in durations {
            tally.total_ns += duration;
            tally.buckets[abi::event::bucket(*duration)] += 1;
        }
        tally
    }

    #[test]
    fn quantile_is_an_upper_bound_for_that_part_of_the_calls() {
        let tally = tally(&[100, 100, 100, 5000]);
        assert_eq!(quantile(&tally, 0.5), 128);
        assert_eq!(quantile(&tally, 0.99), 8192);
    }

    #[test]
    fn histogram_counts_short_and_long_calls_in_its_end_buckets() {
        assert_eq!(sparkline(&tally(&[10, 200, 300])), "█▄");
        assert!(sparkline(&tally(&[200, 5_000_000_000])).ends_with('█'));
    }
}
