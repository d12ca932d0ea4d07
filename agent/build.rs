//! Builds the BPF object that the agent carries, with whichever toolchain is there:
//!
//! 1. `SOCKPOLICY_BPF_OBJECT`: a finished object, for packagers;
//! 2. a rustup nightly with `rust-src`: the ordinary aya way, `-Z build-std=core`;
//! 3. a rustc that ships `core` for the BPF target, as Debian's `rustc-web` does with
//!    `libstd-rust-web-dev-bpf`.
//!
//! Writes to `OUT_DIR` only. Where nothing fits, the one message says what to type.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "sockpolicy-bpf";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // `cargo::error` shows these lines without the backtrace of a failed build script.
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::SUCCESS
        }
    }
}

fn build() -> Result<(), String> {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bpf-programs");
    for input in ["src", "abi/src", "abi/Cargo.toml", "Cargo.toml", "Cargo.lock", "build.rs", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={}", programs.join(input).display());
    }
    for variable in ["SOCKPOLICY_BPF_OBJECT", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this by cargo")?);
    let object = match env::var_os("SOCKPOLICY_BPF_OBJECT") {
        Some(object) => PathBuf::from(object),
        None => compile(&programs, &out.join("bpf"))?,
    };
    fs::copy(&object, out.join(OBJECT))
        .map_err(|error| format!("cannot copy the BPF object {}: {error}", object.display()))?;
    println!("cargo::rustc-env=SOCKPOLICY_LAYOUT={:016x}", layout(&programs)?);
    Ok(())
}

/// A number that is another wherever maps that outlive the agent may mean something else: of all sources that decide what lies
/// in them. A comment makes another one too, which only means that what is there is replaced rather than gone on with.
fn layout(programs: &Path) -> Result<u64, String> {
    let mut files: Vec<PathBuf> =
        ["src/maps.rs", "src/storage.rs"].into_iter().map(|file| programs.join(file)).collect();
    let abi = programs.join("abi/src");
    let entries = fs::read_dir(&abi).map_err(|error| format!("cannot read {}: {error}", abi.display()))?;
    files.extend(entries.flatten().map(|entry| entry.path()));
    // The places of options are bits in the notes of sockets, and by the order in which policies are compiled events and
    // counters are told whose they are.
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    files.push(agent.join("options/table.rs"));
    let compile = agent.join("compile");
    let entries = fs::read_dir(&compile).map_err(|error| format!("cannot read {}: {error}", compile.display()))?;
    files.extend(entries.flatten().map(|entry| entry.path()));
    files.sort();
    let mut hash = FNV_OFFSET;
    for file in files {
        let bytes = fs::read(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        hash = bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME));
        println!("cargo::rerun-if-changed={}", file.display());
    }
    Ok(hash)
}

/// FNV-1a: the same from one build to the next, which the standard library's does not promise.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// Builds the programs below `target_dir`; gives the path of the object.
fn compile(programs: &Path, target_dir: &Path) -> Result<PathBuf, String> {
    let toolchain = Toolchain::find()?;
    let mut cargo = toolchain.cargo();
    cargo.current_dir(programs).args(["build", "--quiet", "--locked", "--release", "--target", TARGET]);
    cargo.arg("--target-dir").arg(target_dir);
    let output = cargo.output().map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !output.status.success() {
        let log = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cannot build the BPF programs with {toolchain}:\n{log}"));
    }
    Ok(target_dir.join(TARGET).join("release").join(OBJECT))
}

/// What can build for the BPF target.
enum Toolchain {
    /// A rustup nightly that has `core` as source.
    Nightly,
    /// A rustc that has `core` built, and the cargo beside it.
    Prebuilt { rustc: PathBuf, cargo: PathBuf },
}

impl Toolchain {
    fn find() -> Result<Self, String> {
        if !linker_is_there() {
            return Err(missing("bpf-linker"));
        }
        if sysroot(Command::new("rustup").args(["run", "nightly", "rustc"]))
            .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core").is_dir())
        {
            return Ok(Self::Nightly);
        }
        for bin in ["/usr/bin", "/usr/local/bin"] {
            let rustc = Path::new(bin).join("rustc");
            let core = |sysroot: PathBuf| sysroot.join("lib/rustlib").join(TARGET).join("lib");
            if sysroot(&mut Command::new(&rustc)).is_some_and(|sysroot| core(sysroot).is_dir()) {
                return Ok(Self::Prebuilt { rustc, cargo: Path::new(bin).join("cargo") });
            }
        }
        Err(missing("a Rust toolchain for the BPF target"))
    }

    fn cargo(&self) -> Command {
        let mut cargo = match self {
            Self::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo", "-Zbuild-std=core"]);
                rustup
            }
            Self::Prebuilt { cargo, .. } => Command::new(cargo),
        };
        // What the outer cargo set is about the host's target and toolchain.
        for (name, _) in env::vars_os() {
            let Some(name) = name.to_str() else { continue };
            let is_cargos = ["CARGO", "RUST", "CLIPPY"].iter().any(|prefix| name.starts_with(prefix));
            if is_cargos && !KEPT.iter().any(|prefix| name.starts_with(prefix)) {
                cargo.env_remove(name);
            }
        }
        if let Self::Prebuilt { rustc, .. } = self {
            // aya-ebpf uses inline assembly for BPF, which a stable rustc keeps behind a feature.
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
        }
        cargo.env("PATH", path_with_linker());
        cargo
    }
}

/// Where cargo and rustup keep their things, and how they reach the registry.
const KEPT: [&str; 6] = ["CARGO_HOME", "CARGO_HTTP", "CARGO_NET", "CARGO_REGISTR", "CARGO_SOURCE", "RUSTUP_HOME"];

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nightly => f.write_str("rustup's nightly and its rust-src"),
            Self::Prebuilt { rustc, .. } => write!(f, "{}", rustc.display()),
        }
    }
}

fn missing(what: &str) -> String {
    format!(
        "cannot build the BPF programs: {what} is missing\nhelp: run ./bootstrap at the top of the repository, or set \
         SOCKPOLICY_BPF_OBJECT to a finished object"
    )
}

/// Where a rustc keeps its libraries; `None` where there is none.
fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// PATH, and after it the folder into which cargo installs.
fn path_with_linker() -> std::ffi::OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let folders = env::split_paths(&path).chain(cargo_home.map(|home| home.join("bin")));
    env::join_paths(folders).unwrap_or(path)
}

fn linker_is_there() -> bool {
    env::split_paths(&path_with_linker()).any(|folder| folder.join("bpf-linker").is_file())
}
