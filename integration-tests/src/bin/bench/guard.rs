//! Whatever the benchmark makes is gone when it ends, however it ends.
//!
//! All of it happens in a second process: in a cgroup of its own, with its own view of mounts. Processes, cgroups and the links
//! to them go with that cgroup, pins and files below /run with that view, network namespaces with the processes in
//! them. The first process does nothing but wait for the end, or for a signal, and remove that cgroup.

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

use crate::trouble::{Attempt, Result, Trouble};

/// What the first process tells the second: which cgroup is theirs.
pub(crate) const WITHIN: &str = "within";

const AWAITED: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD];

/// Runs this program anew with these arguments, in a cgroup that is gone when this returns.
pub(crate) fn enclose(arguments: &[OsString]) -> Result<ExitCode> {
    // SAFETY: has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(
            Trouble::new("attaching BPF programs and making cgroups takes root").help("run it as root: make bench")
        );
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
            // Before whatever else the machine does; where that may not be, as all else.
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
            home()
        });
    }
    command.spawn().or_cannot("start this program anew")
}

/// What a process calls before `exec` to be in a cgroup.
pub(crate) fn enter(cgroup: &Path) -> Result<impl FnMut() -> io::Result<()> + Send + Sync + 'static> {
    let procs = cgroup.join("cgroup.procs");
    let mut file = File::options().write(true).open(&procs).or_cannot(format_args!("open {}", procs.display()))?;
    // 0 is the process that writes.
    Ok(move || file.write_all(b"0"))
}

/// What a process calls before `exec` so that it does not outlive the one that starts it.
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
    fs::write(root.join("cgroup.kill"), "1").or_cannot(format_args!("kill what is in cgroup {}", root.display()))
}

/// Kills who is in a cgroup or below it, and removes all of it.
pub(crate) fn remove(root: &Path) -> Result<()> {
    kill_all(root)?;
    let mut last = Ok(());
    wait::until(wait::PATIENCE, || {
        last = remove_folders(root);
        last.is_ok()
    });
    last.or_cannot(format_args!("remove cgroup {}", root.display()))
}

fn remove_folders(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_folders(&entry.path())?;
        }
    }
    fs::remove_dir(root)
}

/// Gives this process mounts of its own: a BPF file system, tracefs, and an empty /run.
pub(crate) fn mount_privately() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).or_cannot("make a mount namespace")?;
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).or_cannot("keep mounts private")?;
    for (kind, at) in [("bpf", "/sys/fs/bpf"), ("tracefs", "/sys/kernel/tracing"), ("tmpfs", "/run")] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), nothing).or_cannot(format_args!("mount {kind} at {at}"))?;
    }
    Ok(())
}

/// Where the second process may work.
#[derive(Debug)]
pub(crate) struct Ground {
    /// A cgroup that holds all others.
    pub(crate) root: PathBuf,
    /// A folder for files.
    pub(crate) scratch: PathBuf,
    pub(crate) sockpolicy: PathBuf,
    /// Itself, for the processes that do the measured work.
    pub(crate) bench: PathBuf,
}

impl Ground {
    pub(crate) fn within(root: PathBuf) -> Result<Self> {
        mount_privately()?;
        let scratch = PathBuf::from("/run/bench");
        fs::create_dir(&scratch).or_cannot("make /run/bench")?;
        let bench = env::current_exe().or_cannot("find this program's own path")?;
        let sockpolicy = bench.with_file_name("sockpolicy");
        if !sockpolicy.is_file() {
            let missing = format_args!("{} is not there", sockpolicy.display()).to_string();
            return Err(Trouble::new(missing).help("make build"));
        }
        Ok(Self { root, scratch, sockpolicy, bench })
    }

    /// Makes a cgroup.
    pub(crate) fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).or_cannot(format_args!("make cgroup {}", path.display()))?;
        Ok(path)
    }

    /// Makes a file.
    pub(crate) fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.scratch.join(name);
        fs::write(&path, text).or_cannot(format_args!("write {}", path.display()))?;
        Ok(path)
    }

    /// A policy in a file: these rules, for a cgroup and all below it.
    pub(crate) fn policy(&self, name: &str, target: &Path, rules: &str) -> Result<PathBuf> {
        let target = target.strip_prefix(cgroup::mount()).unwrap_or(target).display();
        self.file(&format!("{name}.toml"), &format!("name = \"{name}\"\n[target]\ncgroup = \"{target}\"\n{rules}\n"))
    }
}
