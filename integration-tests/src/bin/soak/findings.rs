//! The results of the soak test, as a table.

use std::{
    fmt::Display,
    io::{self, Write},
};

use crate::agent::Sample;

/// The permitted growth of the last quarter's median over the second quarter's, in percent.
const GROWTH: u64 = 20;

/// A measured field of a sample.
type Field = fn(&Sample) -> u64;

/// The lines of the table.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    rows: Vec<(bool, String, String)>,
}

impl Findings {
    pub(crate) fn add(&mut self, is_right: bool, what: impl Display, found: impl Display) {
        self.rows.push((is_right, what.to_string(), found.to_string()));
    }

    pub(crate) fn equal(&mut self, what: impl Display, found: u64, wanted: u64) {
        self.add(found == wanted, what, format_args!("{found} of {wanted}"));
    }

    /// Checks that sampled numbers do not grow.
    pub(crate) fn flat(&mut self, name: &str, samples: &[Sample]) {
        let fields: [(&str, Field); 3] = [
            ("memory, KiB", |sample| sample.memory_kib),
            ("descriptors", |sample| sample.descriptors),
            ("links and programs", |sample| sample.links_and_programs),
        ];
        let quarter = samples.len() / 4;
        if quarter == 0 {
            return self.add(false, format_args!("{name}: samples"), samples.len());
        }
        for (what, field) in fields {
            let median = |part: &[Sample]| {
                let mut values: Vec<u64> = part.iter().map(field).collect();
                values.sort_unstable();
                values[values.len() / 2]
            };
            let (second, last) = (median(&samples[quarter..2 * quarter]), median(&samples[samples.len() - quarter..]));
            let max = samples.iter().map(field).max().unwrap_or(0);
            let is_flat = last > 0 && last * 100 <= second * (100 + GROWTH);
            self.add(
                is_flat,
                format_args!("{name}: {what}"),
                format_args!("median {second}, then {last}; at most {max}"),
            );
        }
    }

    /// Prints the table. Returns whether all checks passed.
    pub(crate) fn print(&self) -> io::Result<bool> {
        let width = self.rows.iter().map(|(_, what, _)| what.len()).max().unwrap_or(0);
        let mut out = io::stdout().lock();
        for (is_right, what, found) in &self.rows {
            writeln!(out, "{} {what:width$}  {found}", if *is_right { "ok    " } else { "FAILED" })?;
        }
        Ok(self.rows.iter().all(|(is_right, ..)| *is_right))
    }
}
