//! What kernels.toml expects of the running kernel.

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
    features: Features,
    kernel: Vec<Row>,
}

/// The names of features, by kind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// Kernel hooks that the agent can attach to.
    pub hooks: BTreeSet<String>,
    /// Backends of the agent's audit.
    pub audit: BTreeSet<String>,
    /// Options that BPF programs can set.
    pub options: BTreeSet<String>,
    /// Other properties that the tests check.
    pub sockets: BTreeSet<String>,
    /// Functions that the kernel offers to BPF programs.
    pub helpers: BTreeSet<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// The prefix of `uname -r`.
    release: String,
    without: BTreeSet<String>,
}

/// The running kernel, as the table describes it.
#[derive(Debug)]
pub struct Kernel {
    pub release: String,
    /// All features that the table knows.
    pub known: Features,
    without: BTreeSet<String>,
}

impl Kernel {
    /// Finds the running kernel in the table. Panics if the table does not have it.
    #[must_use]
    pub fn current() -> &'static Self {
        static CURRENT: LazyLock<Kernel> = LazyLock::new(|| {
            let Table { features, kernel } = must(toml::from_str(TABLE), "read kernels.toml");
            let release = must(fs::read_to_string("/proc/sys/kernel/osrelease"), "read the kernel release");
            let release = release.trim().to_owned();
            let Some(row) = kernel.into_iter().find(|row| release.starts_with(&row.release)) else {
                panic!(
                    "kernel {release} is not in integration-tests/kernels.toml\n  help: add a [[kernel]] with the features that it lacks"
                )
            };
            Kernel { release, known: features, without: row.without }
        });
        &CURRENT
    }

    /// Returns whether the kernel has a feature. Panics if the table does not know the feature.
    #[must_use]
    #[track_caller]
    pub fn has(&self, feature: &str) -> bool {
        let Features { hooks, audit, options, sockets, helpers } = &self.known;
        let is_known = [hooks, audit, options, sockets, helpers].into_iter().any(|names| names.contains(feature));
        assert!(is_known, "kernels.toml has no feature `{feature}`");
        !self.without.contains(feature)
    }
}

/// Records that a test is skipped. The skipped tests are listed when the process exits.
pub fn skip(test: &str, feature: &str) {
    /// Tests by the feature that they need.
    static SKIPPED: Mutex<BTreeMap<String, BTreeSet<String>>> = Mutex::new(BTreeMap::new());
    extern "C" fn print_skipped() {
        let skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = &Kernel::current().release;
        for (feature, tests) in &*skipped {
            let tests = tests.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            // Not eprintln, whose output libtest captures. vm/matrix shows these lines too.
            let _ = writeln!(io::stderr(), "skipped on {kernel}, no {feature}: {tests}");
        }
    }
    let mut skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
    if skipped.is_empty() {
        // SAFETY: the function has the type that atexit expects.
        unsafe { libc::atexit(print_skipped) };
    }
    skipped.entry(feature.to_owned()).or_default().insert(test.to_owned());
}

/// Skips the rest of a test if kernels.toml says that the running kernel does not have the feature. Must be the first
/// line of the test.
#[macro_export]
macro_rules! require {
    ($feature:expr) => {
        if !$crate::kernels::Kernel::current().has($feature) {
            let thread = std::thread::current();
            $crate::kernels::skip(thread.name().unwrap_or("a test"), $feature);
            return;
        }
    };
}
