//! Rules of ARCHITECTURE.md that the compiler does not check.

#![expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Each module of the agent, and the modules that it may import. A module imports modules in later rows only, so that there is no
/// cycle. ARCHITECTURE.md has the same table (`UPDATE_GOLDENS=1 cargo test -p sockpolicy --test architecture` writes it there).
const MODULES: [(&str, &str); 37] = [
    (
        "cli",
        "compile container coverage daemon escape events explain host instance journal kernel lint live options policy \
         plural policy_diff reconcile reference report schema session skipped sources targets transient_cgroup trial unsupported worker \
         wrap",
    ),
    ("fuzz", "compile coverage events explain host instance journal kernel lint options policy sources worker"),
    (
        "daemon",
        "container coverage escape events host instance journal kernel policy reconcile report session skipped sources targets",
    ),
    (
        "session",
        "compile coverage errno escape events fault host instance kernel options policy report skipped trial unsupported",
    ),
    ("reconcile", "compile container escape events host journal kernel live options policy skipped worker"),
    ("targets", "container coverage escape host kernel policy skipped"),
    ("trial", "compile errno host kernel options policy transient_cgroup"),
    ("journal", "escape fault host instance"),
    ("instance", "compile coverage escape fault host kernel policy report skipped sources"),
    ("kernel", "compile escape fault host options policy"),
    ("sources", "escape host lint policy"),
    ("transient_cgroup", "escape host"),
    ("live", "compile escape events host limitations options policy schema values"),
    ("host", "container escape fault options policy recent skipped worker"),
    ("report", "compile errno escape events limitations options plural policy schema unsupported values wrap"),
    ("events", "compile container errno escape options policy recent schema values"),
    ("unsupported", "compile escape options policy schema"),
    ("policy_diff", "compile escape policy schema values"),
    ("explain", "compile coverage escape limitations policy schema values"),
    ("lint", "compile coverage escape limitations options policy"),
    ("reference", "limitations options policy"),
    ("compile", "coverage limitations options policy"),
    ("limitations", "options policy"),
    ("values", "errno escape options policy"),
    ("coverage", "container escape policy"),
    ("policy", "container escape options schema"),
    ("skipped", "escape"),
    ("container", "escape"),
    ("worker", "fault"),
    ("options", ""),
    ("schema", ""),
    ("errno", ""),
    ("escape", ""),
    ("plural", ""),
    ("recent", ""),
    ("wrap", ""),
    ("fault", ""),
];

/// Returns the Rust files below a folder of the agent's sources.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Fails for each file outside `allowed` that contains one of `words`.
fn only_in(allowed: &[&str], words: &[&str], reason: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    assert!(files.len() > 20, "found only {} files below {}", files.len(), root.display());
    for file in files {
        let below = file.strip_prefix(&root).unwrap();
        if allowed.iter().any(|place| below.starts_with(place)) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for word in words {
                assert!(!line.contains(word), "{}: `{word}` in `{}`: {reason}", below.display(), line.trim());
            }
        }
    }
}

#[test]
fn only_the_kernel_module_uses_aya() {
    only_in(&["kernel"], &["aya::", "use aya"], "only the module `kernel` uses aya");
}

#[test]
fn only_the_command_line_prints() {
    only_in(&["cli"], &["println!", "print!(", "stdout()", "stderr()"], "only the module `cli` prints");
}

#[test]
fn shown_paths_are_escaped() {
    only_in(&["escape.rs"], &[".display()", "escape_debug", "escape_default"], "use the module `escape`");
}

#[test]
fn failing_output_does_not_panic() {
    only_in(&[], &["println!", "print!(", "dbg!("], "these panic if a write fails");
}

#[test]
fn pure_modules_do_no_io() {
    let io = ["std::fs", "std::process", "std::thread", "nix::", "File::open", "File::create"];
    let places = [
        "cli",
        "daemon",
        "reconcile",
        "targets",
        "transient_cgroup.rs",
        "fault.rs",
        "fuzz.rs",
        "host",
        "instance.rs",
        "journal.rs",
        "kernel",
        "main.rs",
        "session",
        "trial.rs",
        "worker",
        "policy/model.rs",
        "sources",
    ];
    let words_and_errnos = ["policy/words.rs", "errno.rs"];
    only_in(&[places.as_slice(), &words_and_errnos].concat(), &io, "pure modules do no I/O");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The module at the top of the crate that a file belongs to.
fn module_of(file: &Path) -> String {
    let below = file.strip_prefix(root()).unwrap();
    below.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The code of a file without comments, and without the unit tests at its end.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The modules at the top of the crate that some code imports.
fn imports(code: &str) -> BTreeSet<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        let mut depth = 0;
        let mut item = String::new();
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(name(item.trim()));
                    item.clear();
                    continue;
                }
                _ => {}
            }
            item.push(c);
        }
        found.insert(name(item.trim()));
    }
    found.remove("");
    found
}

#[test]
fn import_lists_are_read() {
    let code = "use crate::{\n a::{b, c::{d}},\n e, f::g,\n};\nuse crate::h;\nlet x = crate::i::j(crate::k);";
    let expected = ["a", "e", "f", "h", "i", "k"].map(str::to_owned);
    assert_eq!(imports(code), expected.into_iter().collect());
}

#[test]
fn modules_import_only_what_their_row_permits() {
    let permitted: BTreeMap<&str, BTreeSet<&str>> =
        MODULES.iter().map(|(module, imports)| (*module, imports.split_whitespace().collect())).collect();
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources(&root()) {
        // Files of unit tests may import anything.
        let is_test = file.file_name().is_some_and(|name| name == "tests.rs");
        let module = module_of(&file);
        if is_test || ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let row = permitted.get(module.as_str());
        let row = row.unwrap_or_else(|| panic!("module {module} has no row in MODULES of {}", file!()));
        let mut imports = imports(&code(&file));
        imports.remove(&module);
        for import in &imports {
            assert!(
                row.contains(import.as_str()),
                "{}: {module} imports {import}. Data flows one way: move the code to a module that may import both, or, if this is \
                 right, permit the import in MODULES of {}",
                file.display(),
                file!()
            );
        }
        used.entry(module).or_default().extend(imports);
    }
    for (at, (module, imports)) in MODULES.iter().enumerate() {
        let later: BTreeSet<&str> = MODULES[at + 1..].iter().map(|(module, _)| *module).collect();
        for import in imports.split_whitespace() {
            assert!(later.contains(import), "MODULES: {module} imports {import}, whose row is not below");
            assert!(used[*module].contains(import), "MODULES: {module} does not import {import} any more");
        }
    }
}

#[test]
fn architecture_md_has_the_table_of_imports() {
    const BEGIN: &str = "<!-- modules: written by agent/tests/architecture.rs -->\n";
    const END: &str = "<!-- end of modules -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let row = |(module, imports): &(&str, &str)| {
        let imports: Vec<&str> = imports.split_whitespace().collect();
        format!("| `{module}` | {} |\n", imports.join(", "))
    };
    let rows: String = MODULES.iter().map(row).collect();
    let expected = format!("{before}{BEGIN}| module | imports |\n| --- | --- |\n{rows}{END}{after}");
    if std::env::var_os("UPDATE_GOLDENS").is_some() {
        fs::write(&path, &expected).unwrap();
    }
    assert_eq!(text, expected, "update it: UPDATE_GOLDENS=1 cargo test -p sockpolicy --test architecture");
}
