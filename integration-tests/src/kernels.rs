//! What kernels.toml expects of the kernel that runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write},
    sync::{LazyLock, Mutex, PoisonError},
};

use serde::Deserialize;

use crate::must;

const TABLE: &str = include_str!("../kernels.toml");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    abilities: Abilities,
    kernel: Vec<Row>,
}

/// Names of abilities, by what they are abilities for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Abilities {
    /// Kernel hooks that the agent can attach to.
    pub hooks: BTreeSet<String>,
    /// The agent's backends for the audit.
    pub audit: BTreeSet<String>,
    /// Options that BPF programs can set.
    pub options: BTreeSet<String>,
    /// What the tests look at beside these.
    pub sockets: BTreeSet<String>,
    /// What BPF programs can ask the kernel for.
    pub helpers: BTreeSet<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// What `uname -r` starts with.
    release: String,
    without: BTreeSet<String>,
}

/// The kernel that runs, as the table has it.
#[derive(Debug)]
pub struct Kernel {
    pub release: String,
    /// Everything that the table knows.
    pub known: Abilities,
    without: BTreeSet<String>,
}

impl Kernel {
    /// Finds it in the table.
    #[must_use]
    pub fn current() -> &'static Self {
        static CURRENT: LazyLock<Kernel> = LazyLock::new(|| {
            let Table { abilities, kernel } = must(toml::from_str(TABLE), "read kernels.toml");
            let release = must(fs::read_to_string("/proc/sys/kernel/osrelease"), "tell which kernel this is");
            let release = release.trim().to_owned();
            let Some(row) = kernel.into_iter().find(|row| release.starts_with(&row.release)) else {
                panic!("kernel {release} is not in integration-tests/kernels.toml\n  help: add what it can do")
            };
            Kernel { release, known: abilities, without: row.without }
        });
        &CURRENT
    }

    /// Whether the table says that it has this ability, which the table must know.
    #[must_use]
    #[track_caller]
    pub fn has(&self, ability: &str) -> bool {
        let Abilities { hooks, audit, options, sockets, helpers } = &self.known;
        let is_known = [hooks, audit, options, sockets, helpers].into_iter().any(|names| names.contains(ability));
        assert!(is_known, "kernels.toml knows no ability `{ability}`");
        !self.without.contains(ability)
    }
}

/// Notes that a test is skipped, for the list at the end.
pub fn skip(test: &str, ability: &str) {
    /// Tests, by the ability that they want.
    static SKIPPED: Mutex<BTreeMap<String, BTreeSet<String>>> = Mutex::new(BTreeMap::new());
    extern "C" fn tell() {
        let skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = &Kernel::current().release;
        for (ability, tests) in &*skipped {
            let tests = tests.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            // Not by eprintln, which the test harness keeps to itself. vm/matrix shows these lines, too.
            let _ = writeln!(io::stderr(), "skipped on {kernel}, no {ability}: {tests}");
        }
    }
    let mut skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
    if skipped.is_empty() {
        // SAFETY: a function of the kind that exit calls.
        unsafe { libc::atexit(tell) };
    }
    skipped.entry(ability.to_owned()).or_default().insert(test.to_owned());
}

/// The first line of a test that not every kernel can pass: skips it where kernels.toml says that this
/// kernel has not got the ability.
#[macro_export]
macro_rules! require {
    ($ability:expr) => {
        if !$crate::kernels::Kernel::current().has($ability) {
            let thread = std::thread::current();
            $crate::kernels::skip(thread.name().unwrap_or("a test"), $ability);
            return;
        }
    };
}
