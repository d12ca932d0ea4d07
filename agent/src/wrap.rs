//! Fits text for people into the columns of a terminal: lines are wrapped at words, and tables at words within cells.
//!
//! A word is never split, so that paths and addresses can be copied. A line can therefore be longer than the width.

use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The width of tables, and of other text if the width of the terminal is unknown, in columns.
pub const WIDTH: usize = 80;

/// The least number of columns for the text of continuation lines. If the indentation leaves less, a line is not wrapped.
const ROOM_MIN: usize = 24;

/// Wraps the lines of a text at words.
///
/// Continuation lines are indented as deeply as the text that they continue: the text after a label (`help:`), or the last
/// column of a line with columns, which are separated by two spaces or more. Lines that show the source of a policy are not
/// wrapped. Escape sequences (`ESC [ … letter`) have no width. Removes spaces at the ends of lines.
#[must_use]
pub fn lines(text: &str, width: usize) -> String {
    let mut wrapped = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let (content, end) = line.strip_suffix('\n').map_or((line, ""), |content| (content, "\n"));
        push_wrapped(&mut wrapped, content.trim_end_matches(' '), width);
        wrapped.push_str(end);
    }
    wrapped
}

fn push_wrapped(wrapped: &mut String, line: &str, width: usize) {
    if columns(line) <= width || is_source(line) {
        return wrapped.push_str(line);
    }
    let start = start_of_text(line);
    let indent = columns(&line[..start]);
    if indent + ROOM_MIN > width {
        return wrapped.push_str(line);
    }
    let (head, text) = line.split_at(start);
    wrapped.push_str(head);
    let mut at = indent;
    for (number, word) in text.split(' ').enumerate() {
        let word_columns = columns(word);
        if number > 0 && at > indent && at + 1 + word_columns > width {
            wrapped.push('\n');
            wrapped.extend(std::iter::repeat_n(' ', indent));
            at = indent;
        } else if number > 0 {
            wrapped.push(' ');
            at += 1;
        }
        wrapped.push_str(word);
        at += word_columns;
    }
}

/// Returns where the text of a line starts to which continuation lines are aligned, in bytes.
fn start_of_text(line: &str) -> usize {
    const LABELS: [&str; 3] = ["help: ", "= help: ", "= note: "];
    let first = line.len() - line.trim_start_matches(' ').len();
    if let Some(label) = LABELS.iter().find(|label| line[first..].starts_with(**label)) {
        return first + label.len();
    }
    match line[first..].rfind("  ") {
        Some(gap) => first + gap + 2,
        // Deeper than the line itself, so that the next line is not taken for another one.
        None if first == 0 => 0,
        None => first,
    }
}

/// Returns whether a line is one of a policy's source in a diagnostic, which has the source below its number: `12 | text`.
fn is_source(line: &str) -> bool {
    let (number, rest) = line.split_once('|').unwrap_or((line, ""));
    !rest.is_empty() && number.chars().all(|character| character == ' ' || character.is_ascii_digit())
}

/// Returns the width of a text in columns, without its escape sequences.
fn columns(text: &str) -> usize {
    if !text.contains('\x1b') {
        return text.width();
    }
    let mut is_escape = false;
    let mut columns = 0;
    for character in text.chars() {
        match (is_escape, character) {
            (false, '\x1b') => is_escape = true,
            (false, _) => columns += character.width().unwrap_or(0),
            (true, _) => is_escape = !character.is_ascii_alphabetic(),
        }
    }
    columns
}

/// Returns a table as text of [`WIDTH`] columns, or as wide as its longest words require. Cells are wrapped at words, and headers
/// too if they do not fit otherwise. Lines have no spaces at their ends.
#[must_use]
pub fn table(mut table: Table) -> String {
    /// The space on either side of a cell.
    const PADDING: usize = 2;
    let word = |text: &str| text.split([' ', '\n']).map(UnicodeWidthStr::width).max().unwrap_or(0) + PADDING;
    let header: Vec<String> =
        table.header().into_iter().flat_map(|row| row.cell_iter()).map(comfy_table::Cell::content).collect();
    let mut words: Vec<usize> = header.iter().map(|text| word(text)).collect();
    for (column, cell) in table.row_iter().flat_map(|row| row.cell_iter().enumerate()) {
        words.resize(words.len().max(column + 1), 0);
        words[column] = words[column].max(word(&cell.content()));
    }
    let headers = words.iter().enumerate().map(|(column, word)| {
        let header = header.get(column).map_or(0, |text| text.width() + PADDING);
        header.max(*word)
    });
    let headers: Vec<usize> = headers.collect();
    let least = if headers.iter().sum::<usize>() > WIDTH { words } else { headers };
    let width = least.iter().sum::<usize>().max(WIDTH);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width as u16);
    for (column, least) in table.column_iter_mut().zip(least) {
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(least as u16)));
    }
    lines(&table.to_string(), usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_at_words_and_aligned_to_their_text() {
        let text = "error: cannot do it: one two three four five six seven eight nine\n  help: type this command and then \
                    type the other command\nshort   \n  attach cgroup/bind4  sets one option and another option\n";
        let expected = "error: cannot do it: one two three four five six\nseven eight nine\n  help: type this command and \
                        then type the other\n        command\nshort\n  attach cgroup/bind4  sets one option and \
                        another\n                       option\n";
        assert_eq!(lines(text, 50), expected);
    }

    #[test]
    fn words_and_sources_are_not_split() {
        let path = "/a/very/long/path/that/has/no/space/in/it";
        assert_eq!(lines(&format!("cannot read {path} at all"), 30), format!("cannot read\n{path}\nat all"));
        let source = format!("193 | set = {{ a = 1 }} # {path} is a path\n    | ^^^ {path} is one\n");
        assert_eq!(lines(&source, 30), source);
    }

    #[test]
    fn escape_sequences_have_no_width() {
        let styled = "\x1b[1m\x1b[31merror\x1b[0m: ten letters\n";
        assert_eq!(lines(styled, 30), styled);
    }

    #[test]
    fn table_is_wrapped_at_words_within_cells() {
        let mut long = Table::new();
        long.load_preset(comfy_table::presets::NOTHING).set_header(["name", "what it does"]);
        long.add_row(["SO_KEEPALIVE", &"probe idle connections and more ".repeat(5)]);
        long.add_row(["x", &"a/path/without/spaces".repeat(5)]);
        let text = table(long);
        let path_line = text.lines().find(|line| line.contains("a/path"));
        assert!(path_line.is_some_and(|line| line.contains(&"a/path/without/spaces".repeat(5))), "{text}");
        assert!(text.lines().all(|line| !line.ends_with(' ')), "{text}");
        let mut short = Table::new();
        short.load_preset(comfy_table::presets::NOTHING);
        short.add_row(["SO_KEEPALIVE", &"probe idle connections and more ".repeat(5)]);
        let text = table(short);
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.len() <= WIDTH), "{text}");
    }
}
