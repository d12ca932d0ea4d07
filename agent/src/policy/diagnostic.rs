//! Diagnostics: what is wrong with a policy, where, and what to type instead.
//!
//! A [`Problem`] is what a check finds. A [`Diagnostic`] adds the file, so that it can be shown without context. This
//! module only renders: it writes no messages of its own and prints nothing.
//!
//! Invariant: control characters in text from a file are made visible before they reach a terminal (in messages here,
//! in source lines by the renderer).

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use crate::escape::{self, Escape, visible};

/// A range of bytes in a source file.
pub type Span = Range<usize>;

/// How many characters of the user's text a message quotes.
const QUOTED_MAX: usize = 60;

/// Longer source lines are not shown: they were generated.
const LINE_MAX: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Plain,
    Coloured,
}

/// A file and its contents.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
    line_starts: Vec<usize>,
    /// The number of characters that begin before each [`BLOCK`] of bytes.
    characters: Vec<usize>,
}

/// Bytes between two positions for which [`Source`] knows the number of preceding characters.
const BLOCK: usize = 1024;

/// Returns whether a byte is the first byte of a UTF-8 character.
fn begins_character(byte: u8) -> bool {
    byte & 0b1100_0000 != 0b1000_0000
}

impl Source {
    #[must_use]
    pub fn new(path: &Path, text: String) -> Arc<Self> {
        let after_newlines = text.match_indices('\n').map(|(at, _)| at + 1);
        let line_starts = std::iter::once(0).chain(after_newlines).collect();
        let mut characters = vec![0];
        for block in text.as_bytes().chunks(BLOCK) {
            let before = characters.last().copied().unwrap_or_default();
            characters.push(before + block.iter().filter(|byte| begins_character(**byte)).count());
        }
        Arc::new(Self { path: path.to_owned(), text, line_starts, characters })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the line of the byte at `offset`, counted from 1.
    #[must_use]
    pub fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// Returns the first line that the span touches: its number, its offset, and its text without the newline.
    fn first_line(&self, span: &Span) -> (usize, usize, &str) {
        let number = self.line(span.start);
        let start = self.line_starts.get(number - 1).copied().unwrap_or(0);
        let end = self.line_starts.get(number).map_or(self.text.len(), |next| next - 1);
        let line = self.text.get(start..end).unwrap_or("");
        (number, start, line.strip_suffix('\r').unwrap_or(line))
    }

    /// Returns how many characters begin before the byte at `offset`, in constant time.
    fn characters_before(&self, offset: usize) -> usize {
        let offset = offset.min(self.text.len());
        let block = offset / BLOCK;
        let rest = &self.text.as_bytes()[block * BLOCK..offset];
        let before = self.characters.get(block).copied().unwrap_or_default();
        before + rest.iter().filter(|byte| begins_character(**byte)).count()
    }

    /// Returns the column, counted from 1 in characters, of a byte in the line that starts at `start`.
    fn column(&self, start: usize, offset: usize) -> usize {
        self.characters_before(offset) - self.characters_before(start) + 1
    }
}

/// An error without its file. Callers may add the position and the help if the check does not know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub span: Option<Span>,
    pub message: String,
    pub help: Option<String>,
}

impl Problem {
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self { span: None, message: message.into(), help: None }
    }

    /// Sets what to type. Replaces an earlier help.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Sets the position. An earlier position is kept, since it is more precise.
    #[must_use]
    pub fn at(mut self, span: Span) -> Self {
        self.span.get_or_insert(span);
        self
    }
}

/// An error or a warning about a file.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    pub severity: Severity,
    /// `None` if no text can be shown; the message then names the file.
    pub source: Option<Arc<Source>>,
    pub span: Option<Span>,
    pub message: String,
    pub help: Option<String>,
}

impl Diagnostic {
    /// Returns an error without source text, such as a file that cannot be read.
    #[must_use]
    pub fn without_source(problem: Problem) -> Self {
        let Problem { span: _, message, help } = problem;
        let (message, help) = (visible(&message, false), help.map(|help| visible(&help, false)));
        Self { severity: Severity::Error, source: None, span: None, message, help }
    }

    #[must_use]
    pub fn new(severity: Severity, source: &Arc<Source>, problem: Problem) -> Self {
        let Problem { span, message, help } = problem;
        let (message, help) = (visible(&message, false), help.map(|help| visible(&help, false)));
        Self { severity, source: Some(Arc::clone(source)), span, message, help }
    }

    /// Returns the diagnostic as a JSON object. Lines and columns are counted from 1, columns in characters.
    /// `end_column` is that of the span or, if the span has several lines, of its first line.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let place = self.source.as_ref().map(|source| (source, self.span.as_ref()));
        let (line, columns) = match place {
            Some((source, Some(span))) => {
                let (number, start, line) = source.first_line(span);
                let column = |at: usize| {
                    let at = line.floor_char_boundary(at.saturating_sub(start).min(line.len()));
                    source.column(start, start + at)
                };
                (Some(number), Some((column(span.start), column(span.end))))
            }
            _ => (None, None),
        };
        let fields = serde_json::json!({
            "severity": match self.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            },
            "file": self.source.as_ref().map(|source| escape::plain(&source.path)),
            "line": line,
            "column": columns.map(|(from, _)| from),
            "end_column": columns.map(|(_, to)| to),
            "message": self.message,
            "help": self.help,
        });
        crate::schema::line("diagnostic", fields)
    }

    /// Returns several lines, each with its newline: the message, the position with the source line, and `help:`.
    #[must_use]
    pub fn render(&self, style: Style) -> String {
        let renderer = match style {
            Style::Plain => Renderer::plain(),
            Style::Coloured => Renderer::styled(),
        };
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(&self.message));
        if let Some(source) = &self.source {
            let path = source.path.escaped().to_string();
            group = match &self.span {
                Some(span) => with_place(group, source, path, span),
                None => group.element(Origin::path(path)),
            };
        }
        if let Some(help) = &self.help {
            group = group.element(Level::HELP.message(help));
        }
        let mut text = renderer.render(&[group]);
        text.push('\n');
        text
    }
}

/// Sorts diagnostics by file name and position.
pub fn sort(diagnostics: &mut [Diagnostic]) {
    diagnostics.sort_by_key(|diagnostic| {
        let path = diagnostic.source.as_ref().map(|source| source.path().to_owned());
        let name = path.as_ref().and_then(|path| path.file_name()).map(ToOwned::to_owned);
        (name, path, diagnostic.span.as_ref().map(|span| span.start))
    });
}

/// Adds `--> file:line:column` and the source line.
fn with_place<'a>(group: Group<'a>, source: &'a Source, path: String, span: &Span) -> Group<'a> {
    let (number, start, line) = source.first_line(span);
    let from = line.floor_char_boundary((span.start - start).min(line.len()));
    let to = line.floor_char_boundary((span.end.max(span.start) - start).min(line.len()));
    if line.len() > LINE_MAX {
        let column = source.column(start, start + from);
        return group.element(Origin::path(path).line(number).char_column(column));
    }
    let underlined = AnnotationKind::Primary.span(from..to.max(from));
    // The renderer replaces the other control characters. The replacement is equally long, so that spans stay correct.
    let line = line.replace(|c| matches!(c, '\u{80}'..='\u{9f}'), "¿");
    group.element(Snippet::source(line).line_start(number).path(path).annotation(underlined))
}

/// Quotes the user's text in a message: in backquotes, on one line, at most `QUOTED_MAX` characters.
#[must_use]
pub fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("`{}…`", text[..end].escaped()),
        None => format!("`{}`", text.escaped()),
    }
}

/// Returns the candidate that the user probably meant.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    // Longer than any candidate.
    if word.len() > QUOTED_MAX {
        return None;
    }
    let len = word.chars().count();
    let tolerated = (len / 3).max(1);
    candidates
        .into_iter()
        // The edit distance is at least the difference in length.
        .filter(|candidate| candidate.chars().count().abs_diff(len) <= tolerated)
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= tolerated && *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Joins words: `a, b or c`.
#[must_use]
pub fn list_of(words: &[String], last: &str) -> String {
    match words {
        [] => String::new(),
        [only] => only.clone(),
        [all @ .., end] => format!("{} {last} {end}", all.join(", ")),
    }
}

/// The findings in one file so far.
#[derive(Debug)]
pub(crate) struct Findings {
    source: Arc<Source>,
    found: Vec<Diagnostic>,
    /// The number of errors among `found`.
    errors: usize,
}

impl Findings {
    pub(crate) fn new(source: &Arc<Source>) -> Self {
        Self { source: Arc::clone(source), found: Vec::new(), errors: 0 }
    }

    pub(crate) fn error(&mut self, problem: Problem) {
        self.errors += 1;
        self.found.push(Diagnostic::new(Severity::Error, &self.source, problem));
    }

    pub(crate) fn warning(&mut self, problem: Problem) {
        self.found.push(Diagnostic::new(Severity::Warning, &self.source, problem));
    }

    /// Returns the value, or adds the error to the findings.
    pub(crate) fn ok<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.error(problem)).ok()
    }

    pub(crate) fn errors(&self) -> usize {
        self.errors
    }

    /// Returns the findings in the order of the file.
    pub(crate) fn into_sorted(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|diagnostic| diagnostic.span.as_ref().map(|span| span.start));
        self.found
    }

    /// Returns the end of the file, without trailing empty lines.
    pub(crate) fn end(&self) -> Span {
        let end = self.source.text.trim_end().len();
        end..end
    }

    /// Returns the text of the file at a span.
    pub(crate) fn text(&self, span: &Span) -> &str {
        self.source.text.get(span.clone()).unwrap_or_default()
    }

    pub(crate) fn line(&self, span: &Span) -> usize {
        self.source.line(span.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_from_one_and_begin_after_the_newline() {
        let source = Source::new(Path::new("a.toml"), "a\nb\n\nc".to_owned());
        assert_eq!([0, 1, 2, 4, 5, 6].map(|offset| source.line(offset)), [1, 1, 2, 3, 4, 4]);
    }

    #[test]
    fn columns_are_counted_in_characters_also_far_into_a_line() {
        let line = "aé√𝄞".repeat(1000);
        let source = Source::new(Path::new("a.toml"), format!("x\n{line}\ny"));
        for (count, (offset, _)) in line.char_indices().enumerate().step_by(97) {
            assert_eq!(source.column(2, 2 + offset), count + 1);
        }
        assert_eq!(source.column(2, usize::MAX), 4000 + 3);
    }

    #[test]
    fn quoted_text_is_on_one_line_and_without_terminal_escapes() {
        assert_eq!(quote("a\n\u{1b}[31m\u{202e}é\"\\"), "`a\\n\\u{1b}[31m\\u{202e}é\"\\\\`");
        assert_eq!(quote(&"x".repeat(100)), format!("`{}…`", "x".repeat(60)));
    }

    #[test]
    fn nearest_name_must_be_similar() {
        let names = ["TCP_NODELAY", "TCP_CORK", "SO_MARK"];
        assert_eq!(nearest("TCP_NODELY", names), Some("TCP_NODELAY"));
        assert_eq!(nearest("so_mrak", names), Some("SO_MARK"));
        assert_eq!(nearest("keepalive", names), None);
        assert_eq!(nearest("", names), None);
    }

    #[test]
    fn a_position_in_a_very_long_line_is_named_but_not_shown() {
        let source = Source::new(Path::new("a.toml"), format!("x\n{}", "é".repeat(LINE_MAX)));
        let problem = Problem::new("too long").at(6..8);
        let shown = Diagnostic::new(Severity::Error, &source, problem).render(Style::Plain);
        assert_eq!(shown, "error: too long\n--> a.toml:2:3\n");
    }

    #[test]
    fn nothing_in_a_file_moves_the_cursor_or_reorders_the_line() {
        let strange = "a\u{1b}[2J\u{202e}b\u{9b}c\r\u{7}";
        let source = Source::new(Path::new(strange), strange.to_owned());
        let diagnostic = Diagnostic::new(Severity::Error, &source, Problem::new(strange).help(strange).at(0..1));
        let shown = diagnostic.render(Style::Plain);
        assert!(!shown.contains(['\u{1b}', '\u{202e}', '\u{9b}', '\r', '\u{7}']), "{shown:?}");
    }

    #[test]
    fn coloured_diagnostic_has_the_same_text() {
        let source = Source::new(Path::new("a.toml"), "a = 1\n".to_owned());
        let diagnostic = Diagnostic::new(Severity::Warning, &source, Problem::new("odd").help("write 2").at(4..5));
        let coloured = diagnostic.render(Style::Coloured);
        assert!(coloured.contains("\u{1b}["), "{coloured}");
        assert!(coloured.contains("a.toml:1:5"), "{coloured}");
    }
}
