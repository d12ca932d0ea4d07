//! Writes the results as files: JSON, plots, the text table, and the tables of docs/benchmarks.md.
//!
//! In docs/benchmarks.md, only the text between `<!-- bench: NAME -->` and `<!-- end -->` is replaced.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    error::{Attempt, BenchError, Result},
    machine::Machine,
    plot,
    row::{Findings, Row},
    table,
};

/// Returns the heading of the table.
pub(crate) fn head(machine: &Machine, took: Duration) -> String {
    format!(
        "{}\nEach ratio is the median over rounds, and comes from two runs of the same round. The benchmark took {:.0} s.",
        machine.text(),
        took.as_secs_f64()
    )
}

/// Writes all files into a directory.
pub(crate) fn write(dir: &Path, machine: &Machine, took: Duration, findings: &Findings) -> Result<()> {
    make_dir(dir)?;
    let json = json(machine, took, findings).or_cannot("write JSON")?;
    write_file(&dir.join("bench.json"), &json)?;
    write_file(&dir.join("bench.txt"), &table::text(&head(machine, took), &findings.rows))?;
    write_plots(dir, findings)
}

/// Updates the plots and tables of the documentation.
pub(crate) fn write_docs(dir: &Path, machine: &Machine, took: Duration, findings: &Findings) -> Result<()> {
    let page = dir.join("benchmarks.md");
    let old = fs::read_to_string(&page).or_cannot(format_args!("read {}", page.display()))?;
    let head = format!("{}\n", head(machine, took).replace('\n', "\n\n"));
    let sections = [("machine", head), ("budgets", budgets(&findings.rows)), ("table", markdown(&findings.rows))];
    let mut new = old;
    for (name, text) in sections {
        new = replaced(&new, name, &text)
            .ok_or_else(|| BenchError::new(format_args!("{} has no section {name}", page.display())))?;
    }
    write_file(&page, &new)?;
    let plots = dir.join("bench");
    make_dir(&plots)?;
    write_plots(&plots, findings)
}

fn write_plots(dir: &Path, findings: &Findings) -> Result<()> {
    findings.plots.iter().try_for_each(|plot| write_file(&dir.join(format!("{}.svg", plot.name)), &plot::svg(plot)))
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).or_cannot(format_args!("make {}", path.display()))?;
    give_away(path)
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).or_cannot(format_args!("write {}", path.display()))?;
    give_away(path)
}

/// Gives a file that root has created to the owner of its directory.
fn give_away(path: &Path) -> Result<()> {
    let owner = path.parent().map(fs::metadata).and_then(std::result::Result::ok);
    let Some(owner) = owner else { return Ok(()) };
    chown(path, Some(owner.uid()), Some(owner.gid())).or_cannot(format_args!("change the owner of {}", path.display()))
}

fn json(machine: &Machine, took: Duration, findings: &Findings) -> serde_json::Result<String> {
    let rows = findings.rows.iter().map(|row| {
        let mut value = serde_json::to_value(row)?;
        value["met"] = row.is_met().map_or(Value::Null, Value::from);
        Ok(value)
    });
    let rows = rows.collect::<serde_json::Result<Vec<_>>>()?;
    let all = json!({ "schema": 1, "machine": machine, "seconds": took.as_secs_f64(), "rows": rows, "plots": findings.plots });
    Ok(format!("{}\n", serde_json::to_string_pretty(&all)?))
}

fn markdown_line(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Returns a Markdown table for each part.
fn markdown(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut part = "";
    for row in rows {
        if row.part != part {
            part = row.part;
            text += &format!("\n**{part}**\n\n{}", markdown_line(&table::HEADS.map(str::to_owned)));
            text += "| --- | ---: | ---: | ---: | --- | ---: | --- |\n";
        }
        text += &markdown_line(&table::cells(row));
    }
    format!("{}\n", text.trim_start())
}

/// Returns a Markdown table of the rows that have a budget.
fn budgets(rows: &[Row]) -> String {
    let heads = ["part", "what", "compared with", "ratio", "absolute", "budget"].map(str::to_owned);
    let mut text = markdown_line(&heads) + "| --- | --- | --- | ---: | ---: | --- |\n";
    for row in rows.iter().filter(|row| row.budget.is_some()) {
        let [what, ratio, _, _, versus, figure, budget] = table::cells(row);
        text += &markdown_line(&[row.part.to_owned(), what, versus, ratio, figure, budget]);
    }
    text + "\n"
}

/// Replaces the text between the marks of this name. Returns `None` if the page does not have them.
fn replaced(page: &str, name: &str, text: &str) -> Option<String> {
    let mark = format!("<!-- bench: {name} -->\n");
    let begin = page.find(&mark)? + mark.len();
    let end = begin + page[begin..].find("<!-- end -->")?;
    Some(format!("{}\n{text}{}", &page[..begin], &page[end..]))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{budgets, json, markdown, replaced};
    use crate::{
        machine::Machine,
        measure::Spread,
        row::{Budget, Findings, Row, Unit},
    };

    fn row(part: &'static str, budget: Option<Budget>) -> Row {
        let spread = Spread { median: 1.5, low: 1.4, high: 1.6, runs: 7 };
        let (what, versus) = ("a | b".to_owned(), "none".to_owned());
        Row { part, what, versus, ratio: Some(spread), plain: None, unit: Unit::Rate, budget, left_out: None }
    }

    #[test]
    fn only_text_between_the_marks_is_replaced() {
        let page = "before\n<!-- bench: table -->\nold\n<!-- end -->\nafter <!-- end -->\n";
        let new = replaced(page, "table", "new\n").unwrap();
        assert_eq!(new, "before\n<!-- bench: table -->\n\nnew\n<!-- end -->\nafter <!-- end -->\n");
        assert_eq!(replaced(&new, "table", "new\n").unwrap(), new);
        assert_eq!(replaced(page, "other", ""), None);
    }

    #[test]
    fn tables_have_a_line_for_each_row_and_a_head_for_each_part() {
        let rows = [row("calls", None), row("calls", Some(Budget::AtMost(1.0))), row("live", None)];
        let text = markdown(&rows);
        assert_eq!(text.matches("**calls**").count(), 1);
        assert_eq!(text.matches("a \\| b").count(), 3);
        assert_eq!(budgets(&rows).matches("NOT MET").count(), 1);
        assert_eq!(budgets(&rows).lines().filter(|line| line.starts_with('|')).count(), 3);
    }

    #[test]
    fn json_says_whether_budgets_are_met() {
        let rows = vec![row("calls", None), row("calls", Some(Budget::AtLeast(1.0)))];
        let text = json(&Machine::read(), Duration::from_secs(1), &Findings { rows, plots: Vec::new() }).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["rows"][0]["met"], serde_json::Value::Null);
        assert_eq!(value["rows"][1]["met"], true);
        assert_eq!(value["rows"][1]["ratio"]["median"], 1.5);
        assert_eq!(value["rows"][1]["unit"], "1/s");
    }
}
