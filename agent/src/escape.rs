//! Escapes untrusted text for display: names of processes, files, cgroups, containers, devices and instances.
//!
//! All such text in terminals, logs and text reports passes [`Escape::escaped`]. JSON has its own escapes.
//!
//! Invariants:
//! - Escaped text contains no control character, no line end, and nothing that hides or reorders text: no Unicode
//!   general categories C and Z except the space, and no combining marks.
//! - Two different texts have different escaped texts.

use std::{
    ffi::OsStr,
    fmt::{self, Write as _},
    path::Path,
};

/// Untrusted text.
pub trait Escape {
    /// Returns the text escaped for display.
    ///
    /// Letters of all scripts are kept. Characters that move the cursor, end the line or reorder it are escaped as in
    /// Rust (`\n`, `\u{1b}`), and bytes that are not UTF-8 as `\xNN`. A backslash is doubled, unless `x` and a digit
    /// from 0 to 7 follow, as in names that systemd makes (`\x2d`): no escape of this module begins like that.
    fn escaped(&self) -> Escaped<'_>;
}

/// Untrusted text that is escaped when it is displayed. See [`Escape::escaped`].
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(&'a [u8]);

impl Escape for [u8] {
    fn escaped(&self) -> Escaped<'_> {
        Escaped(self)
    }
}

impl Escape for str {
    fn escaped(&self) -> Escaped<'_> {
        Escaped(self.as_bytes())
    }
}

impl Escape for OsStr {
    fn escaped(&self) -> Escaped<'_> {
        Escaped(self.as_encoded_bytes())
    }
}

impl Escape for Path {
    fn escaped(&self) -> Escaped<'_> {
        Escaped(self.as_os_str().as_encoded_bytes())
    }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            let mut rest = chunk.valid().chars();
            while let Some(character) = rest.next() {
                match character {
                    '\\' if is_systemd_escape(rest.as_str()) => f.write_char('\\')?,
                    '\\' => f.write_str("\\\\")?,
                    other => write_visible(f, other)?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

fn is_systemd_escape(after_backslash: &str) -> bool {
    matches!(after_backslash.as_bytes(), [b'x', b'0'..=b'7', ..])
}

/// Quotes are kept: escaped text is not put in quotes.
fn write_visible(f: &mut impl fmt::Write, character: char) -> fmt::Result {
    match character {
        '"' | '\'' | '\\' => f.write_char(character),
        _ => write!(f, "{}", character.escape_debug()),
    }
}

/// Escapes a text whose parts may be escaped already: characters that are not visible, but not backslashes. With
/// `keeps_lines`, line ends are kept.
#[must_use]
pub fn visible(text: &str, keeps_lines: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if keeps_lines && character == '\n' {
            out.push('\n');
        } else {
            // Writing to a string does not fail.
            let _ = write_visible(&mut out, character);
        }
    }
    out
}

/// Returns a path for JSON or for comparison. Not for display.
#[must_use]
pub fn plain(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Returns several untrusted texts, escaped and separated by `between`.
#[must_use]
pub fn join<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, between: &str) -> String {
    let escaped: Vec<String> = texts.into_iter().map(|text| text.as_ref().escaped().to_string()).collect();
    escaped.join(between)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn text(text: &str) -> String {
        text.escaped().to_string()
    }

    #[test]
    fn letters_of_all_scripts_are_kept() {
        for plain in ["", "nginx: worker process", "/system.slice/a b.service", "naïve", "日本", "Ω", "\"it's\"", "🙂"]
        {
            assert_eq!(text(plain), plain);
        }
    }

    #[test]
    fn characters_that_move_the_cursor_end_or_reorder_lines_are_escaped() {
        let escaped_codes = (0..0x20).chain(0x7f..0xa0).chain([0xad, 0x61c, 0x180e, 0xfeff, 0xe0001, 0x3000]);
        let escaped_codes = escaped_codes.chain(0x200b..0x2010).chain(0x2028..0x202f).chain(0x2060..0x2070);
        for character in escaped_codes.filter_map(char::from_u32) {
            let escaped = text(&format!("a{character}b"));
            assert!(escaped.starts_with("a\\") && escaped.ends_with('b'), "{character:?}: {escaped}");
            assert!(escaped.chars().all(|c| c.is_ascii_graphic()), "{character:?}: {escaped}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_escaped() {
        assert_eq!(b"a\xff\x1b[0m\xc3".escaped().to_string(), r"a\xff\u{1b}[0m\xc3");
    }

    #[test]
    fn names_of_systemd_are_kept() {
        assert_eq!(text(r"dev-disk\x2dby\x2duuid.device"), r"dev-disk\x2dby\x2duuid.device");
        assert_eq!(text(r"a\n\x80\"), r"a\\n\\x80\\");
    }

    #[test]
    fn different_texts_have_different_escaped_texts() {
        let parts: [&[u8]; 9] = [b"\\", b"n", b"\n", b"x2d", b"x80", b"\x80", b"u{1b}", b"\x1b", b"\\\\"];
        let mut texts: HashSet<Vec<u8>> = HashSet::from([Vec::new()]);
        for _ in 0..4 {
            let longer = texts.iter().flat_map(|text| parts.map(|part| [text, part].concat()));
            texts = longer.chain(texts.clone()).collect();
        }
        let shown: HashSet<String> = texts.iter().map(|text| text.escaped().to_string()).collect();
        assert_eq!(shown.len(), texts.len());
    }

    #[test]
    fn escaped_parts_are_not_escaped_twice() {
        let whole = format!("cannot read {}: \u{1b}[0m", "a\\\nb".escaped());
        assert_eq!(visible(&format!("{whole}\n"), true), "cannot read a\\\\\\nb: \\u{1b}[0m\n");
        assert_eq!(visible("a\nb", false), "a\\nb");
    }
}
