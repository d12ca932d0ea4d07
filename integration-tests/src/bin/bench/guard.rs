//! Removes everything that the benchmark creates, however it ends.
//!
//! A second process does all the work, in its own cgroup and mount namespace. When that cgroup is removed, its
//! processes and the links to it are gone. The mount namespace ends with the processes, and with it the pins and the
//! files below /run, as do their network namespaces. The first process only waits for the end or a signal, and then
//! removes the cgroup.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
};
use sockpolicy_integration_tests::{cgroup, wait};

use crate::error::{Attempt, BenchError, Result};

/// The argument that tells the second process its cgroup.
pub(crate) const WITHIN: &str = "within";

const AWAITED: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD];

/// Runs this program again with these arguments, in a cgroup that is removed before this returns.
pub(crate) fn place_in_cgroup(arguments: &[OsString]) -> Result<ExitCode> {
    // SAFETY: has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(BenchError::new("cannot attach BPF programs and create cgroups: not root")
            .help("run it as root: make bench"));
    }
    let root = cgroup::mount().join(format!("sockpolicy-bench-{}", std::process::id()));
    fs::create_dir(&root).or_cannot(format_args!("make cgroup {}", root.display()))?;
    let signals: SigSet = AWAITED.into_iter().collect();
    signals.thread_block().or_cannot("block signals")?;
    let ended = spawn(&root, arguments).and_then(|mut child| await_end(&mut child, &signals, &root));
    let removed = remove(&root);
    let code = ended?;
    removed.map(|()| code)
}

fn spawn(root: &Path, arguments: &[OsString]) -> Result<Child> {
    let program = env::current_exe().or_cannot("find this program's own path")?;
    let mut command = Command::new(program);
    command.arg(WITHIN).arg(root).args(arguments);
    let mut home = enter(root)?;
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || {
            SigSet::all().thread_unblock()?;
            die_with_parent()?;
            // Run with priority over other processes, where that is permitted.
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
            home()
        });
    }
    command.spawn().or_cannot("start this program again")
}

/// Returns a function that a child calls before `exec` to join a cgroup.
pub(crate) fn enter(cgroup: &Path) -> Result<impl FnMut() -> io::Result<()> + Send + Sync + 'static> {
    let procs = cgroup.join("cgroup.procs");
    let mut file = File::options().write(true).open(&procs).or_cannot(format_args!("open {}", procs.display()))?;
    // 0 stands for the writing process.
    Ok(move || file.write_all(b"0"))
}

/// Makes the kernel kill the calling process when its parent ends. A child calls this before `exec`.
pub(crate) fn die_with_parent() -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
}

fn await_end(child: &mut Child, signals: &SigSet, root: &Path) -> Result<ExitCode> {
    loop {
        let signal = signals.wait().or_cannot("wait for signals")?;
        if signal != Signal::SIGCHLD {
            kill_all(root)?;
            child.wait().or_cannot("wait for the benchmark")?;
            return Ok(ExitCode::from(128 + signal as u8));
        }
        if let Some(status) = child.try_wait().or_cannot("wait for the benchmark")? {
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from));
        }
    }
}

fn kill_all(root: &Path) -> Result<()> {
    fs::write(root.join("cgroup.kill"), "1").or_cannot(format_args!("kill the processes of cgroup {}", root.display()))
}

/// Kills the processes of a cgroup and of its descendants, and removes them all.
pub(crate) fn remove(root: &Path) -> Result<()> {
    kill_all(root)?;
    let mut last = Ok(());
    wait::until(wait::TIMEOUT, || {
        last = remove_dirs(root);
        last.is_ok()
    });
    last.or_cannot(format_args!("remove cgroup {}", root.display()))
}

fn remove_dirs(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    fs::remove_dir(root)
}

/// Gives this process its own mounts: a BPF file system, tracefs, and an empty /run.
pub(crate) fn mount_privately() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).or_cannot("make a mount namespace")?;
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).or_cannot("make mounts private")?;
    for (kind, at) in [("bpf", "/sys/fs/bpf"), ("tracefs", "/sys/kernel/tracing"), ("tmpfs", "/run")] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), nothing).or_cannot(format_args!("mount {kind} at {at}"))?;
    }
    Ok(())
}

/// The working environment of the second process.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The cgroup that contains all others.
    pub(crate) root: PathBuf,
    /// A directory for files.
    pub(crate) scratch: PathBuf,
    pub(crate) sockpolicy: PathBuf,
    /// This program's binary, for the worker processes.
    pub(crate) bench: PathBuf,
}

impl Workspace {
    pub(crate) fn within(root: PathBuf) -> Result<Self> {
        mount_privately()?;
        let scratch = PathBuf::from("/run/bench");
        fs::create_dir(&scratch).or_cannot("make /run/bench")?;
        let bench = env::current_exe().or_cannot("find this program's own path")?;
        let sockpolicy = bench.with_file_name("sockpolicy");
        if !sockpolicy.is_file() {
            let missing = format_args!("{} does not exist", sockpolicy.display()).to_string();
            return Err(BenchError::new(missing).help("make build"));
        }
        Ok(Self { root, scratch, sockpolicy, bench })
    }

    /// Creates a cgroup.
    pub(crate) fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).or_cannot(format_args!("make cgroup {}", path.display()))?;
        Ok(path)
    }

    /// Creates a file.
    pub(crate) fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.scratch.join(name);
        fs::write(&path, text).or_cannot(format_args!("write {}", path.display()))?;
        Ok(path)
    }

    /// Creates a policy file with these rules, for a cgroup and its descendants.
    pub(crate) fn policy(&self, name: &str, target: &Path, rules: &str) -> Result<PathBuf> {
        let target = target.strip_prefix(cgroup::mount()).unwrap_or(target).display();
        self.file(&format!("{name}.toml"), &format!("name = \"{name}\"\n[target]\ncgroup = \"{target}\"\n{rules}\n"))
    }
}
