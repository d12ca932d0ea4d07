//! The table for readers.

use crate::{
    measure::Spread,
    row::{Budget, Row, Unit},
};

/// Formats a number with three significant digits.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        value if value >= 99.95 || value == 0.0 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.0995 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if digits == 0 { grouped(&text) } else { text }
}

/// Separates thousands.
fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    format!("{sign}{text}")
}

pub(crate) fn spread(spread: &Spread) -> String {
    format!("{}–{}", number(spread.low), number(spread.high))
}

pub(crate) fn plain(value: f64, unit: Unit) -> String {
    let unit = match unit {
        Unit::Nanoseconds => " ns",
        Unit::Milliseconds => " ms",
        Unit::Rate => "/s",
        Unit::Kibibytes => " KiB",
        Unit::Count => "",
        Unit::Percent => " %",
    };
    format!("{}{unit}", number(value))
}

pub(crate) fn budget(row: &Row) -> String {
    let Some(budget) = row.budget else { return String::new() };
    let budget = match budget {
        Budget::AtMost(most) => format!("≤ {} ×", number_of_budget(most)),
        Budget::AtLeast(least) => format!("≥ {} ×", number_of_budget(least)),
        Budget::PlainAtMost(most) => format!("≤ {}", plain(most, row.unit)),
    };
    match row.is_met() {
        Some(true) => format!("{budget} met"),
        Some(false) => format!("{budget} NOT MET"),
        None => budget,
    }
}

fn number_of_budget(value: f64) -> String {
    format!("{value}")
}

/// Returns the cells of a row.
pub(crate) fn cells(row: &Row) -> [String; 7] {
    let figure = row.plain.map_or_else(String::new, |figure| plain(figure.median, row.unit));
    let (what, versus) = (row.what.clone(), row.versus.clone());
    match row.ratio {
        Some(ratio) => {
            let (median, runs) = (format!("{} ×", number(ratio.median)), ratio.runs.to_string());
            [what, median, spread(&ratio), runs, versus, figure, budget(row)]
        }
        None => {
            let reason = row.left_out.as_deref().unwrap_or("left out");
            let words = [budget(row), format!("left out: {reason}")];
            let last = words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join("; ");
            [what, "–".to_owned(), String::new(), String::new(), versus, figure, last]
        }
    }
}

pub(crate) const HEADS: [&str; 7] = ["what", "ratio", "quartiles", "runs", "compared with", "absolute", "budget"];

/// Returns all rows, each part below its name.
pub(crate) fn text(head: &str, rows: &[Row]) -> String {
    let lines: Vec<[String; 7]> = rows.iter().map(cells).collect();
    let heads = HEADS.map(str::to_owned);
    let width = |column: usize| lines.iter().chain([&heads]).map(|line| line[column].chars().count()).max();
    let widths: [usize; 7] = std::array::from_fn(|column| width(column).unwrap_or_default());
    let joined = |cells: &[String; 7]| {
        let padded = cells.iter().enumerate().map(|(column, cell)| {
            let blank = " ".repeat(widths[column] - cell.chars().count());
            if (1..4).contains(&column) { format!("{blank}{cell}") } else { format!("{cell}{blank}") }
        });
        let line = padded.collect::<Vec<_>>().join("  ");
        format!("  {}\n", line.trim_end())
    };
    let mut text = format!("{head}\n\n{}", joined(&heads));
    let mut part = "";
    for (row, line) in rows.iter().zip(&lines) {
        if row.part != part {
            part = row.part;
            text.push_str(&format!("{part}\n"));
        }
        text.push_str(&joined(line));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{number, text};
    use crate::{
        measure::Spread,
        row::{Budget, Row, Unit},
    };

    #[test]
    fn numbers_have_three_significant_digits() {
        let shown = [0.0, 0.012_34, 0.5, 1.234, 12.34, 99.99, 1234.5, 1_234_567.0, -1234.0].map(number);
        assert_eq!(shown, ["0", "0.0123", "0.50", "1.23", "12.3", "100", "1,234", "1,234,567", "-1,234"]);
    }

    #[test]
    fn rows_have_ratio_quartiles_runs_and_whether_the_budget_is_met() {
        let spread = Spread { median: 1.5, low: 1.4, high: 1.6, runs: 7 };
        let row = Row {
            part: "calls",
            what: "ours".to_owned(),
            versus: "theirs".to_owned(),
            ratio: Some(spread),
            plain: Some(spread.scaled(100.0)),
            unit: Unit::Nanoseconds,
            budget: Some(Budget::AtMost(1.3)),
            left_out: None,
        };
        let without =
            Row { ratio: None, plain: None, left_out: Some("perf is not installed".to_owned()), ..row.clone() };
        let text = text("head", &[row, without]);
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "head");
        assert_eq!(lines[3], "calls");
        let words: Vec<&str> = lines[4].split("  ").filter(|word| !word.is_empty()).map(str::trim).collect();
        assert_eq!(words, ["ours", "1.50 ×", "1.40–1.60", "7", "theirs", "150 ns", "≤ 1.3 × NOT MET"]);
        assert!(lines[5].ends_with("left out: perf is not installed"), "{}", lines[5]);
    }
}
