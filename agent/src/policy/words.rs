//! Words from a fixed set: modes, protocols, conflict actions, errnos.

use nix::errno::Errno as Known;

use crate::{
    container,
    policy::{
        diagnostic::{Problem, list_of, nearest, quote},
        file::{Text, Value, keys, type_of},
        model::{Calls, Errno, Mode, OnConflict},
    },
};

pub(crate) const MODES: &[(&str, Mode)] = &[(Mode::Enforce.name(), Mode::Enforce), (Mode::DryRun.name(), Mode::DryRun)];

pub(crate) const CALLS: &[(&str, Calls)] =
    &[("conflicts", Calls::Conflicts), ("governed", Calls::Governed), ("all", Calls::All)];

pub(crate) const ON_CONFLICT: &[(&str, OnConflict)] = &[
    ("rewrite", OnConflict::Rewrite),
    ("ignore", OnConflict::Ignore),
    ("deny", OnConflict::Deny),
    ("allow", OnConflict::Allow),
];

/// The runtime of a container.
pub(crate) const RUNTIMES: &[(&str, &str)] = &[
    (container::PODMAN, container::PODMAN),
    (container::DOCKER, container::DOCKER),
    (container::CONTAINERD, container::CONTAINERD),
    (container::CRI_O, container::CRI_O),
    (container::RUNC, container::RUNC),
    (container::CRUN, container::CRUN),
];

/// Returns the words of a choice, as they are written.
pub(crate) fn list<T>(choice: &[(&str, T)]) -> String {
    list_of(&choice.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>(), "or")
}

/// Returns the keys of a socket in a `[[test]]`.
pub(crate) fn socket_keys() -> String {
    keys::SOCKET.keys().iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
}

/// Other names in errno.h for the same numbers.
const SYNONYMS: &[(&str, Known)] =
    &[("EWOULDBLOCK", Known::EAGAIN), ("ENOTSUP", Known::EOPNOTSUPP), ("EDEADLOCK", Known::EDEADLK)];

/// The largest errno with a name: EHWPOISON.
const ERRNO_MAX: i32 = 133;

/// Returns the meaning of a word.
pub(crate) fn pick<T: Copy>(key: &str, word: &Text<'_>, choice: &[(&str, T)]) -> Result<T, Problem> {
    let text = word.get_ref().as_ref();
    if let Some((_, meaning)) = choice.iter().find(|(name, _)| *name == text) {
        return Ok(*meaning);
    }
    let names = choice.iter().map(|(name, _)| *name);
    let problem = Problem::new(format!("`{key}` cannot be {}", quote(text))).at(word.span());
    Err(match nearest(text, names.clone()) {
        Some(near) => problem.help(format!("did you mean \"{near}\"?")),
        None => {
            let names: Vec<_> = names.map(|name| format!("\"{name}\"")).collect();
            problem.help(format!("write {}", list_of(&names, "or")))
        }
    })
}

/// Parses the name of an errno.
pub(crate) fn errno(value: &Value<'_>) -> Result<Errno, Problem> {
    let problem = |message: String| Problem::new(message).at(value.span());
    let number = |known: Known| u16::try_from(known as i32).ok().map(Errno);
    if let Some(name) = value.get_ref().as_str() {
        let found = named().find(|(known, _)| *known == name).and_then(|(_, errno)| number(errno));
        return found.ok_or_else(|| {
            let problem = problem(format!("unknown errno {}", quote(name)));
            let names: Vec<_> = named().map(|(name, _)| name).collect();
            match nearest(name, names.iter().map(String::as_str)) {
                Some(near) => problem.help(format!("did you mean \"{near}\"?")),
                None => problem.help("write its name, such as \"EPERM\" or \"EACCES\""),
            }
        });
    }
    let wrong = problem(format!("`errno` takes the name of an errno, not {}", type_of(value.get_ref())));
    let known = value.get_ref().as_integer().and_then(|number| number.as_str().parse().ok()).map(Known::from_raw);
    Err(match known {
        Some(known) if known != Known::UnknownErrno => wrong.help(format!("write \"{known:?}\"")),
        _ => wrong.help("write errno = \"EACCES\""),
    })
}

fn named() -> impl Iterator<Item = (String, Known)> {
    let first = (1..=ERRNO_MAX).map(Known::from_raw).filter(|known| *known != Known::UnknownErrno);
    let synonyms = SYNONYMS.iter().map(|(name, known)| ((*name).to_owned(), *known));
    first.map(|known| (format!("{known:?}"), known)).chain(synonyms)
}

#[cfg(test)]
mod tests {
    use toml::{Spanned, de::DeValue};

    use super::*;

    #[test]
    fn errnos_are_found_by_name() {
        for (name, number) in [("EPERM", 1), ("EACCES", 13), ("EWOULDBLOCK", 11), ("EHWPOISON", 133)] {
            let value = Spanned::new(0..1, DeValue::String(name.into()));
            assert_eq!(errno(&value), Ok(Errno(number)), "{name}");
        }
        let value = Spanned::new(0..1, DeValue::String("UnknownErrno".into()));
        assert!(errno(&value).is_err());
    }
}
