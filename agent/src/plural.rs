//! Counts with their nouns, in text for people.

/// Returns a count with its noun: `1 socket`, `2 sockets`, `2 processes`.
#[must_use]
pub fn counted(count: u64, noun: &str) -> String {
    let ending = match (count, noun.ends_with('s')) {
        (1, _) => "",
        (_, false) => "s",
        (_, true) => "es",
    };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noun_agrees_with_its_count() {
        let texts = [(0, "socket"), (1, "socket"), (2, "socket"), (1, "process"), (2, "process")];
        let texts = texts.map(|(count, noun)| counted(count, noun));
        assert_eq!(texts, ["0 sockets", "1 socket", "2 sockets", "1 process", "2 processes"]);
    }
}
