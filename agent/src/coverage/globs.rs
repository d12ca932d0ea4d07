//! Matches the paths of cgroups with many globs at a time: one tree of all globs, with one level for each name in a
//! path.
//!
//! A lookup follows the names of a path, so its cost grows only with the globs that share its first names. Memory is a
//! few times the text of the globs. No automaton is built.
//!
//! The syntax is that of globset with `literal_separator`:
//!
//! - `?` matches one byte, and `*` any number of bytes.
//! - `**` as a whole name matches any number of names.
//! - `[a-z]` and `[!a-z]` match one byte, and `{a,b}` one of several texts.
//! - A backslash quotes the next character.
//!
//! A glob also matches the path that has exactly its text: systemd puts backslashes into names (`system-serial\x2dgetty.slice`).
//! Such a path does not replace what the glob matches otherwise. If it did, a tenant could make a cgroup of this name and
//! take all others out of the target.
//!
//! Unlike globset, classes do not match `/`, and `*` does not match the root. Globs that this module cannot translate
//! are matched by globset, one at a time, if the names before their first special character match the path.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use globset::{Glob, GlobBuilder};

use super::GlobError;

/// The characters with a meaning in globs.
const SPECIAL: [char; 7] = ['*', '?', '[', ']', '{', '}', '\\'];

/// How many texts the braces of a glob may expand to.
const TEXTS_MAX: usize = 256;

/// Globs with their numbers. Several globs may share a number.
#[derive(Debug)]
pub(super) struct Globs {
    /// The first node is the root.
    nodes: Vec<Node>,
}

/// What globs require of the names after those that led to this node.
#[derive(Debug, Default)]
struct Node {
    names: HashMap<Box<[u8]>, usize>,
    /// Names that are not literal, by their literal start; the rest of each name, and the next node.
    patterns: HashMap<Box<[u8]>, Vec<(Name, usize)>>,
    /// The node that any number of names leads to.
    any_depth: Option<usize>,
    /// Whether this node is the `any_depth` node of its parent: each further name also leads to this node.
    is_any_depth: bool,
    ends: Vec<End>,
}

/// The end of a glob.
#[derive(Debug)]
struct End {
    number: usize,
    /// The glob itself, if it was not translated and globset must match the whole path.
    whole: Option<Box<str>>,
}

/// A name in a glob.
type Name = Vec<Token>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    AnyByte,
    AnyBytes,
    Class { is_negated: bool, ranges: Vec<(u8, u8)> },
}

/// A part of a glob between slashes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    AnyDepth,
    Name(Name),
}

impl Globs {
    /// Builds the tree.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not a glob.
    pub(super) fn new<'a>(globs: impl IntoIterator<Item = (&'a str, usize)>) -> Result<Self, GlobError> {
        let mut tree = Self { nodes: vec![Node::default()] };
        for (glob, number) in globs {
            let glob = glob.trim_matches('/');
            // Also finds syntax errors.
            parsed(glob)?;
            if let Some(parts) = literal(glob) {
                tree.add(parts, End { number, whole: None });
            }
            match translated(glob) {
                Some(all) => all.into_iter().for_each(|parts| tree.add(parts, End { number, whole: None })),
                None => tree.add(literal_start(glob), End { number, whole: Some(glob.into()) }),
            }
        }
        Ok(tree)
    }

    fn add(&mut self, parts: Vec<Part>, end: End) {
        let mut at = 0;
        for part in parts {
            at = self.child(at, part);
        }
        self.nodes[at].ends.push(end);
    }

    fn child(&mut self, at: usize, part: Part) -> usize {
        let next = self.nodes.len();
        let node = &mut self.nodes[at];
        let child = match part {
            // A repeated `**` has the meaning of one.
            Part::AnyDepth if node.is_any_depth => return at,
            Part::AnyDepth => *node.any_depth.get_or_insert(next),
            Part::Name(name) => {
                let literal = name.iter().position(|token| !matches!(token, Token::Byte(_))).unwrap_or(name.len());
                let start: Box<[u8]> = name[..literal].iter().filter_map(Token::byte).collect();
                if literal == name.len() {
                    *node.names.entry(start).or_insert(next)
                } else {
                    let rest = &name[literal..];
                    let alike = node.patterns.entry(start).or_default();
                    match alike.iter().find(|(other, _)| other == rest) {
                        Some((_, child)) => *child,
                        None => {
                            alike.push((rest.to_vec(), next));
                            next
                        }
                    }
                }
            }
        };
        if child == next {
            self.nodes.push(Node { is_any_depth: self.nodes[at].any_depth == Some(next), ..Node::default() });
        }
        child
    }

    /// Returns the nodes that the names of a path lead to.
    fn follow(&self, path: &Path) -> BTreeSet<usize> {
        let mut here = self.with_any_depth([0].into());
        for name in path {
            let mut next = BTreeSet::new();
            for at in here {
                self.step(at, name.as_encoded_bytes(), &mut next);
            }
            here = self.with_any_depth(next);
        }
        here
    }

    fn step(&self, at: usize, name: &[u8], next: &mut BTreeSet<usize>) {
        let node = &self.nodes[at];
        next.extend(node.names.get(name));
        if node.is_any_depth {
            next.insert(at);
        }
        if node.patterns.is_empty() {
            return;
        }
        for len in 0..=name.len() {
            let (start, rest) = name.split_at(len);
            let alike = node.patterns.get(start).into_iter().flatten();
            next.extend(alike.filter(|(pattern, _)| is_match(pattern, rest)).map(|(_, child)| child));
        }
    }

    fn with_any_depth(&self, mut nodes: BTreeSet<usize>) -> BTreeSet<usize> {
        let more: Vec<usize> = nodes.iter().filter_map(|at| self.nodes[*at].any_depth).collect();
        nodes.extend(more);
        nodes
    }

    /// Returns the numbers of the globs that match a path.
    pub(super) fn matching(&self, path: &Path) -> BTreeSet<usize> {
        let ends = self.follow(path).into_iter().flat_map(|at| &self.nodes[at].ends);
        let is_whole = |glob: &str| parsed(glob).is_ok_and(|glob| glob.compile_matcher().is_match(path));
        ends.filter(|end| end.whole.as_deref().is_none_or(is_whole)).map(|end| end.number).collect()
    }

    /// Returns whether any glob can match at any depth below a path.
    pub(super) fn leads_below(&self, path: &Path) -> bool {
        self.follow(path).into_iter().any(|at| {
            let Node { names, patterns, any_depth, is_any_depth, ends: _ } = &self.nodes[at];
            *is_any_depth || any_depth.is_some() || !names.is_empty() || !patterns.is_empty()
        })
    }
}

impl Token {
    fn byte(&self) -> Option<u8> {
        if let Self::Byte(byte) = self { Some(*byte) } else { None }
    }

    fn is_match(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::AnyByte | Self::AnyBytes => true,
            Self::Class { is_negated, ranges } => {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&byte)) != *is_negated
            }
        }
    }
}

/// Returns whether a name matches, in time proportional to at most the product of the lengths.
fn is_match(tokens: &[Token], name: &[u8]) -> bool {
    let (mut token, mut at) = (0, 0);
    // The position of the last `*`, and how far it has matched.
    let mut last_star = None;
    while at < name.len() {
        match tokens.get(token) {
            Some(Token::AnyBytes) => {
                last_star = Some((token, at));
                token += 1;
            }
            Some(other) if other.is_match(name[at]) => (token, at) = (token + 1, at + 1),
            _ => {
                let Some((star, reach)) = last_star else { return false };
                last_star = Some((star, reach + 1));
                (token, at) = (star + 1, reach + 1);
            }
        }
    }
    tokens[token..].iter().all(|token| *token == Token::AnyBytes)
}

fn parsed(glob: &str) -> Result<Glob, GlobError> {
    let parsed = GlobBuilder::new(glob).literal_separator(true).build();
    parsed.map_err(|source| GlobError { pattern: glob.to_owned(), source })
}

/// Returns the parts of a glob for each text that its braces expand to; `None` if the glob cannot be translated.
fn translated(glob: &str) -> Option<Vec<Vec<Part>>> {
    let texts = if glob.contains('{') { texts(glob)? } else { vec![glob.to_owned()] };
    texts.iter().map(|text| parts(text)).collect()
}

/// Expands the braces of a glob. As in globset, an empty alternative among several is ignored.
fn texts(glob: &str) -> Option<Vec<String>> {
    // Next to braces, these characters have other meanings.
    if glob.contains("**") || glob.contains(['[', '\\']) {
        return None;
    }
    let mut done = Vec::new();
    let mut left = vec![glob.to_owned()];
    while let Some(text) = left.pop() {
        let Some(close) = text.find('}') else {
            done.push(text);
            continue;
        };
        let open = text[..close].rfind('{')?;
        let (before, after) = (&text[..open], &text[close + 1..]);
        let choices: Vec<&str> = text[open + 1..close].split(',').filter(|choice| !choice.is_empty()).collect();
        // An empty choice, or a choice inside another choice.
        if choices.is_empty() || text[..open].contains('{') {
            return None;
        }
        left.extend(choices.into_iter().map(|choice| format!("{before}{choice}{after}")));
        if done.len() + left.len() > TEXTS_MAX {
            return None;
        }
    }
    // A `**` that results from a choice has another meaning.
    done.iter().all(|text| !text.contains("**") && !text.contains('{')).then_some(done)
}

/// Returns the parts of a glob without braces.
fn parts(glob: &str) -> Option<Vec<Part>> {
    if glob.is_empty() {
        return Some(Vec::new());
    }
    let mut parts = Vec::new();
    let mut names = glob.split('/').peekable();
    while let Some(name) = names.next() {
        match name {
            "" => return None,
            "**" => {
                parts.push(Part::AnyDepth);
                // A final `**` matches what is below a cgroup, but not the cgroup itself. A glob that is only `**`
                // matches everything.
                if names.peek().is_none() && parts.iter().any(|part| *part != Part::AnyDepth) {
                    parts.push(Part::Name(vec![Token::AnyBytes]));
                }
            }
            _ => parts.push(Part::Name(tokens(name)?)),
        }
    }
    Some(parts)
}

fn tokens(name: &str) -> Option<Name> {
    let mut tokens = Vec::new();
    let mut bytes = name.bytes();
    while let Some(byte) = bytes.next() {
        tokens.push(match byte {
            b'*' => Token::AnyBytes,
            b'?' => Token::AnyByte,
            b'\\' => Token::Byte(bytes.next()?),
            b'[' => class(&mut bytes)?,
            b']' | b'{' | b'}' => return None,
            byte => Token::Byte(byte),
        });
    }
    Some(tokens)
}

/// Parses a class after its `[`. Supports only some ASCII characters, and no bracket.
fn class(bytes: &mut impl Iterator<Item = u8>) -> Option<Token> {
    let mut content = Vec::new();
    loop {
        match bytes.next()? {
            b']' => break,
            byte if byte.is_ascii_alphanumeric() || b"-_.:@ !^".contains(&byte) => content.push(byte),
            _ => return None,
        }
    }
    let is_negated = matches!(content.first(), Some(b'!' | b'^'));
    let mut content = &content[usize::from(is_negated)..];
    let mut ranges = Vec::new();
    loop {
        content = match content {
            [] => break,
            [first, b'-', last, rest @ ..] if *first != b'-' && *last != b'-' && first <= last => {
                ranges.push((*first, *last));
                rest
            }
            [byte, rest @ ..] if *byte != b'-' || rest.is_empty() => {
                ranges.push((*byte, *byte));
                rest
            }
            _ => return None,
        };
    }
    (!ranges.is_empty()).then_some(Token::Class { is_negated, ranges })
}

/// Returns the names in a glob as if it had no special characters; `None` if the glob matches these names anyway: `*` and `?` match
/// themselves.
fn literal(glob: &str) -> Option<Vec<Part>> {
    let is_needed = glob.contains(['[', ']', '{', '}', '\\']) && !glob.contains("//");
    is_needed.then(|| glob.split('/').map(literal_name).collect())
}

fn literal_name(name: &str) -> Part {
    Part::Name(name.bytes().map(Token::Byte).collect())
}

/// Returns the literal names before the first special character of a glob, followed by [`Part::AnyDepth`].
fn literal_start(glob: &str) -> Vec<Part> {
    let special = glob.find(SPECIAL).unwrap_or(glob.len());
    let names = glob[..special].rsplit_once('/').map_or("", |(names, _)| names);
    let names = names.split('/').filter(|name| !name.is_empty());
    names.map(literal_name).chain([Part::AnyDepth]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator whose numbers are the same in each run (xorshift).
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % end as u64) as usize
        }

        fn text(&mut self, pieces: &[&str], most: usize) -> String {
            (0..self.below(most + 1)).map(|_| pieces[self.below(pieces.len())]).collect()
        }
    }

    fn one(glob: &str) -> Globs {
        Globs::new([(glob, 0)]).unwrap()
    }

    fn matches(globs: &Globs, path: &str) -> bool {
        !globs.matching(Path::new(path)).is_empty()
    }

    #[test]
    fn globs_match_what_globset_matches() {
        let pieces = [
            "a", "b", "ab", "/", "/", "*", "?", "**", "/**/", "**/", "{a,b}", "{a,b/a}", "[ab]", "[a-b]", "\\*", "é",
            "{b*,}",
        ];
        let names = ["a", "b", "ab", "/", "/", "é", "*", "c"];
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let mut compared = 0;
        for _ in 0..3_000 {
            let glob = random.text(&pieces, 6);
            let glob = glob.trim_matches('/');
            let Ok(by_globset) = parsed(glob).map(|glob| glob.compile_matcher()) else { continue };
            let globs = one(glob);
            for _ in 0..8 {
                let path = random.text(&names, 6);
                let path = path.trim_matches('/');
                // Only the root has an empty name, and names with a special character do not match the root.
                if path.contains("//") || glob.contains("//") || path.is_empty() {
                    continue;
                }
                assert_eq!(matches(&globs, path), by_globset.is_match(path), "{glob:?} and {path:?}");
                compared += 1;
            }
        }
        assert!(compared > 5_000);
    }

    #[test]
    fn ancestors_of_a_match_lead_below() {
        let pieces = ["a", "b", "/", "*", "?", "**/", "{a,b/a}", "[ab]", "/"];
        let names = ["a", "b", "/", "c"];
        let mut random = Random(88_172_645_463_325_252);
        for _ in 0..5_000 {
            let glob = random.text(&pieces, 5);
            let Ok(globs) = Globs::new([(&*glob, 0)]) else { continue };
            let path = random.text(&names, 5);
            let path = Path::new(path.trim_matches('/'));
            if !globs.matching(path).is_empty() {
                for above in path.ancestors().skip(1) {
                    assert!(globs.leads_below(above), "{glob:?} matches {path:?}, and does not lead below {above:?}");
                }
            }
        }
    }

    #[test]
    fn path_with_the_text_of_a_glob_is_matched_too() {
        let globs = one(r"system-serial\x2dgetty.slice/a[1].service");
        for (path, expected) in [
            (r"system-serial\x2dgetty.slice/a[1].service", true),
            ("system-serialx2dgetty.slice/a1.service", true),
            (r"system-serial\x2dgetty.slice/a1.service", false),
            (r"system-serial\x2dgetty.slice", false),
        ] {
            assert_eq!(matches(&globs, path), expected, "{path}");
        }
        assert!(globs.leads_below(Path::new(r"system-serial\x2dgetty.slice")));
        // The name of a cgroup must not take others out of a target.
        assert!(["a/*", "a/b"].iter().all(|path| matches(&one("a/*"), path)));
    }

    #[test]
    fn root_is_matched_by_the_empty_glob_and_by_two_stars() {
        assert_eq!(["", "**", "*", "a*"].map(|glob| matches(&one(glob), "")), [true, true, false, false]);
    }

    #[test]
    fn classes_do_not_match_a_slash() {
        assert!(matches(&one("a[!b]c"), "axc"));
        assert!(!matches(&one("a[!b]c"), "a/c"));
    }

    #[test]
    fn matching_returns_the_numbers_of_the_globs() {
        let globs = [("a/*", 3), ("a/b", 1), ("**/b", 1), ("a/b*", 2), ("c", 4)];
        let globs = Globs::new(globs).unwrap();
        assert_eq!(globs.matching(Path::new("a/b")), [1, 2, 3].into());
        assert_eq!(globs.matching(Path::new("x/y/b")), [1].into());
        assert_eq!(globs.matching(Path::new("a")), [].into());
        assert!(Globs::new([("a[", 0)]).is_err());
    }

    #[test]
    fn nodes_grow_with_the_globs_and_lookups_only_with_similar_globs() {
        let count = 2000;
        let texts: Vec<String> = (0..count).map(|at| format!("system.slice/service-{at}-*.scope")).collect();
        let globs = Globs::new(texts.iter().map(|glob| (&**glob, 0))).unwrap();
        assert_eq!(globs.nodes.len(), count + 2);
        let slice = &globs.nodes[1];
        assert_eq!(slice.patterns.len(), count);
        assert!(slice.patterns.values().all(|alike| alike.len() == 1));
    }

    #[test]
    fn stars_take_no_exponential_time() {
        let glob = "*a".repeat(60) + "b";
        let name = "a".repeat(250);
        assert!(!matches(&one(&glob), &name));
    }
}
