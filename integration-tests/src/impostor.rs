//! A user's process that poses as the monitor of a container: sockprobe under another name, with arguments that the
//! test chooses.

use std::{
    env,
    ffi::CString,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{prctl, signal::Signal},
    unistd::{ForkResult, Gid, Uid, chown, fork, pause, setgroups, setresgid, setresuid},
};
use serde::{Deserialize, Serialize};

use crate::{cgroup::Cgroup, must, policy::TempDir, probe, wait};

/// The environment variable that makes sockprobe pose as another program.
pub const DISGUISE_VAR: &str = "SOCKPROBE_IMPOSTOR";

/// What to pose as.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Disguise {
    /// The user that the process runs as.
    pub uid: u32,
    /// The file name of the program.
    pub program: String,
    /// The command name that the process sets for itself.
    pub comm: Option<String>,
    pub arguments: Vec<String>,
    pub dir: PathBuf,
    /// The file to which the process writes the process id of its child.
    pub pid_file: Option<PathBuf>,
    /// The cgroup that the child joins.
    pub cgroup: Option<PathBuf>,
    /// Whether root gives up its capabilities.
    pub without_capabilities: bool,
    /// The number of additional processes of the same kind.
    pub copies: u32,
    /// Where to mount a FUSE file system that answers no request. Only this mount namespace has it; others reach it
    /// through this process's /proc/PID/root.
    pub blocked_by: Option<PathBuf>,
}

/// The process. Killed when dropped.
#[derive(Debug)]
pub struct Impostor {
    process: Child,
    /// The process id of the child.
    pub child: u32,
    _program: TempDir,
}

impl Disguise {
    /// Returns a conmon that claims to monitor a container with this id and name.
    #[must_use]
    pub fn conmon(tenant: &Tenant, id: &str, name: &str) -> Self {
        let pid_file = tenant.path("pidfile");
        let [dir, pid] = [tenant.dir(), &pid_file].map(|path| path.display().to_string());
        let words = ["-c", id, "-n", name, "-b", &dir, "-p", &pid];
        Self {
            uid: tenant.uid,
            program: "conmon".to_owned(),
            arguments: words.map(str::to_owned).to_vec(),
            dir: tenant.dir().to_owned(),
            pid_file: Some(pid_file),
            ..Self::default()
        }
    }

    /// Makes the child join a cgroup.
    #[must_use]
    pub fn in_cgroup(self, cgroup: &Path) -> Self {
        Self { cgroup: Some(cgroup.to_owned()), ..self }
    }

    /// Starts the process, which is ready when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(&self) -> Impostor {
        let dir = TempDir::new();
        must(fs::set_permissions(&dir.path, fs::Permissions::from_mode(0o755)), "open a directory to all");
        let program = dir.path.join(&self.program);
        crate::process::copy_program(probe::program(), &program);
        let order = must(serde_json::to_string(self), "serialize a disguise");
        let mut command = Command::new(&program);
        command.arg0(&self.program).args(&self.arguments).env(DISGUISE_VAR, order).current_dir(&self.dir);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = command.spawn();
        // Until it calls execve, a child that another test has just forked has the copy open for writing.
        wait::until(wait::TIMEOUT, || {
            let is_busy = matches!(&started, Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy);
            if is_busy {
                started = command.spawn();
            }
            !is_busy
        });
        let mut process = must(started, format_args!("start {}", self.program));
        let mut line = String::new();
        let output = process.stdout.take().map(BufReader::new);
        must(
            output.ok_or(io::ErrorKind::BrokenPipe.into()).and_then(|mut output| output.read_line(&mut line)),
            "read a child's process id",
        );
        let child = must(line.trim().parse(), format_args!("pose as {}: {line}", self.program));
        Impostor { process, child, _program: dir }
    }
}

impl Impostor {
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A user without an account, which no other test uses. It has a directory, and cgroups in a cgroup that is not its
/// own.
#[derive(Debug)]
pub struct Tenant {
    pub uid: u32,
    dir: TempDir,
    home: Cgroup,
}

impl Tenant {
    #[must_use]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let uid = 1_000_000 + std::process::id() % 1_000_000 * 100 + COUNT.fetch_add(1, Ordering::Relaxed);
        let tenant = Self { uid, dir: TempDir::new(), home: Cgroup::new() };
        must(fs::set_permissions(tenant.dir(), fs::Permissions::from_mode(0o755)), "open a directory to all");
        tenant.chown_to(tenant.dir());
        tenant
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Returns the parent of the user's cgroups, which belongs to root.
    #[must_use]
    pub fn home(&self) -> &Cgroup {
        &self.home
    }

    /// Creates a cgroup that belongs to this user.
    #[must_use]
    pub fn cgroup(&self, name: &str) -> Cgroup {
        let cgroup = self.home.child(name);
        self.chown_to(cgroup.path());
        cgroup
    }

    /// Returns the name that this user gives to containers.
    #[must_use]
    pub fn container_name(&self) -> String {
        self.home.name().trim_start_matches('/').to_owned()
    }

    /// Returns a policy's target with that name.
    #[must_use]
    pub fn selector(&self) -> String {
        format!("container = {{ name = \"{}\" }}", self.container_name())
    }

    /// Changes the owner of a file to this user.
    #[track_caller]
    pub fn chown_to(&self, path: &Path) {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
        must(chown(path, Some(uid), Some(gid)), format_args!("change the owner of {}", path.display()));
    }

    /// Writes a file that belongs to this user.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        must(fs::write(&path, content), format_args!("write {}", path.display()));
        self.chown_to(&path);
        path
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self::new()
    }
}

/// Poses as the program that [`DISGUISE_VAR`] describes, until standard input ends. Returns false if the variable is
/// not set.
///
/// # Errors
///
/// If the process cannot take on the disguise.
pub fn run_as_impostor() -> io::Result<bool> {
    let Ok(order) = env::var(DISGUISE_VAR) else { return Ok(false) };
    let disguise: Disguise = serde_json::from_str(&order)?;
    if let Some(dir) = &disguise.blocked_by {
        mount_unresponsive(dir)?;
    }
    let child = start_child(&disguise)?;
    disguise.drop_rights()?;
    for _ in 0..disguise.copies {
        fork_copy()?;
    }
    if let Some(path) = &disguise.pid_file {
        fs::write(path, child.to_string())?;
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{child}")?;
    out.flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(true)
}

impl Disguise {
    fn drop_rights(&self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
        setgroups(&[])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        if self.without_capabilities {
            drop_capabilities()?;
        }
        prctl::set_dumpable(true)?;
        if let Some(comm) = &self.comm {
            prctl::set_name(&CString::new(comm.as_str())?)?;
        }
        Ok(())
    }
}

fn drop_capabilities() -> io::Result<()> {
    // _LINUX_CAPABILITY_VERSION_3 and this process; then empty sets, three times two words (capset(2)).
    let (mut header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    // SAFETY: both have the size of this version.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), none.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn start_child(disguise: &Disguise) -> io::Result<i32> {
    // SAFETY: the child makes system calls only.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            // The connection of a FUSE file system ends with its server only if no other process has the device open.
            // SAFETY: the child uses none of the parent's descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
            let begun = disguise.join().and_then(|()| disguise.drop_rights());
            if begun.is_ok() { wait_for_end() } else { std::process::exit(1) }
        }
    }
}

impl Disguise {
    fn join(&self) -> io::Result<()> {
        match &self.cgroup {
            Some(cgroup) => fs::write(cgroup.join("cgroup.procs"), "0"),
            None => Ok(()),
        }
    }
}

fn fork_copy() -> io::Result<()> {
    // SAFETY: the child makes system calls only.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
            wait_for_end()
        }
    }
}

fn wait_for_end() -> ! {
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    loop {
        pause();
    }
}

/// Mounts a file system that answers no request, in a new mount namespace of this process.
fn mount_unresponsive(dir: &Path) -> io::Result<()> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    mount(Some("none"), dir, Some("fuse"), MsFlags::empty(), Some(options.as_str()))?;
    thread::spawn(move || serve(device));
    Ok(())
}

/// Serves the FUSE protocol (include/uapi/linux/fuse.h) until the last descriptor of the device is closed. Answers
/// only INIT.
fn serve(mut device: File) {
    const INIT: u32 = 26;
    let mut request = vec![0; 1 << 20];
    while device.read(&mut request).is_ok_and(|len| len >= 40) {
        let word = |at: usize| u32::from_ne_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
        if word(4) == INIT {
            // `struct fuse_out_header`, then `struct fuse_init_out` of version 7.31.
            let answer = [&[16 + 64, 0, word(8), word(12)][..], &[7, 31, 0, 0, 0, 1 << 16, 1], &[0; 9]].concat();
            let answer: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let _ = device.write_all(&answer);
        }
    }
}
