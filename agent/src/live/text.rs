//! Prints sockets as text: grouped by cgroup, one line for each socket, followed by its options.

use std::{collections::BTreeMap, fmt};

use unicode_width::UnicodeWidthStr;

use super::{OptionRead, SocketSnapshot, Values};
use crate::{escape::Escape, values};

/// Sockets and the options to show of each.
#[derive(Debug, Default)]
pub struct Table {
    /// By the name of the cgroup. Sockets of an unknown cgroup come first.
    groups: BTreeMap<Option<String>, Vec<Row>>,
    widths: [usize; COLUMNS],
}

#[derive(Debug)]
struct Row {
    cells: [String; COLUMNS],
    options: Vec<String>,
}

/// The last column is not padded.
const COLUMNS: usize = 5;
const HEADER: [&str; COLUMNS] = ["protocol", "state", "local", "remote", "process"];

/// Width at which the options are wrapped.
const WIDTH: usize = 80;
const INDENT: &str = "    ";

impl Table {
    pub fn add(&mut self, live: &SocketSnapshot, options: &Values) {
        let socket = live.socket();
        let address =
            |address: Option<std::net::SocketAddr>| address.map_or_else(|| "-".to_owned(), |it| it.to_string());
        let cells = [
            if live.is_multipath() { "mptcp" } else { socket.protocol.unwrap_or("-") }.to_owned(),
            live.entry.state.name().to_owned(),
            address(socket.local),
            address(socket.remote),
            process(live),
        ];
        let mut shown: Vec<String> = options
            .iter()
            .map(|(option, value)| format!("{} = {}", option.name, values::text(option.key(), value)))
            .collect();
        if let OptionRead::Denied(why) = &live.values {
            shown.push(format!("cannot be inspected: {}", why.escaped()));
        }
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = cell.width().max(*width);
        }
        self.groups.entry(live.cgroup.clone()).or_default().push(Row { cells, options: shown });
    }
}

fn process(live: &SocketSnapshot) -> String {
    let Some(owner) = &live.owner else { return "-".to_owned() };
    let others = match owner.others.len() {
        0 => String::new(),
        count => format!(" (+{count})"),
    };
    format!("{}[{}] fd {}{others}", owner.task.comm.escaped(), owner.task.pid, owner.descriptor)
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> =
            self.widths.iter().zip(HEADER).map(|(width, header)| header.len().max(*width)).collect();
        for (number, (cgroup, rows)) in self.groups.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            writeln!(f, "{}", cgroup.as_deref().unwrap_or("unknown cgroup").escaped())?;
            write_cells(f, &HEADER, &widths)?;
            for row in rows {
                write_cells(f, &row.cells, &widths)?;
                write_options(f, &row.options)?;
            }
        }
        Ok(())
    }
}

fn write_cells(f: &mut fmt::Formatter<'_>, cells: &[impl AsRef<str>], widths: &[usize]) -> fmt::Result {
    let padded = cells.iter().zip(widths).map(|(cell, width)| {
        let cell = cell.as_ref();
        format!("{cell}{}", " ".repeat(width.saturating_sub(cell.width())))
    });
    writeln!(f, "  {}", padded.collect::<Vec<_>>().join("  ").trim_end())
}

/// Writes options, wrapped to [`WIDTH`].
fn write_options(f: &mut fmt::Formatter<'_>, options: &[String]) -> fmt::Result {
    let mut line = String::new();
    for (number, option) in options.iter().enumerate() {
        let end = if number + 1 < options.len() { "," } else { "" };
        if !line.is_empty() && INDENT.len() + line.width() + 1 + option.width() + end.len() > WIDTH {
            writeln!(f, "{INDENT}{line}")?;
            line.clear();
        }
        let space = if line.is_empty() { "" } else { " " };
        line = format!("{line}{space}{option}{end}");
    }
    if line.is_empty() { Ok(()) } else { writeln!(f, "{INDENT}{line}") }
}

#[cfg(test)]
mod tests {
    use std::fmt::{self, Display};

    use super::write_options;

    struct Options(Vec<String>);

    impl Display for Options {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_options(f, &self.0)
        }
    }

    #[test]
    fn options_are_wrapped_to_the_width_of_a_terminal() {
        let options = Options((0..20).map(|number| format!("TCP_OPTION_{number} = {number}")).collect());
        let text = options.to_string();
        assert!(text.lines().all(|line| line.len() <= 80 && line.starts_with("    TCP_")), "{text}");
        assert_eq!(text.split_whitespace().collect::<Vec<_>>().join(" "), options.0.join(", "));
        assert_eq!(Options(Vec::new()).to_string(), "");
    }
}
