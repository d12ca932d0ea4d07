//! A user's process that poses as one that watches a container: sockprobe by another name, with arguments of the test's choice.

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

use crate::{cgroup::Cgroup, must, policy::Folder, probe, wait};

/// Has sockprobe pose as another program.
pub const ORDER: &str = "SOCKPROBE_IMPOSTOR";

/// What to pose as.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Disguise {
    /// The user that the process runs as.
    pub uid: u32,
    /// The name of the program's file.
    pub program: String,
    /// A name that the process gives itself.
    pub comm: Option<String>,
    pub arguments: Vec<String>,
    pub folder: PathBuf,
    /// Where to write the number of the child.
    pub pid_file: Option<PathBuf>,
    /// Where the child goes.
    pub cgroup: Option<PathBuf>,
    /// Whether root gives up what root can do.
    pub without_capabilities: bool,
    /// How many more processes of the kind there are.
    pub copies: u32,
    /// Where to mount a file system that answers nothing. Other processes do not see it, but by this process's root.
    pub blocked_by: Option<PathBuf>,
}

/// The process. Killed when dropped.
#[derive(Debug)]
pub struct Impostor {
    process: Child,
    /// Of the process's child.
    pub child: u32,
    _program: Folder,
}

impl Disguise {
    /// A conmon that claims to watch a container with this id and name.
    #[must_use]
    pub fn conmon(tenant: &Tenant, id: &str, name: &str) -> Self {
        let pid_file = tenant.path("pidfile");
        let [folder, pid] = [tenant.folder(), &pid_file].map(|path| path.display().to_string());
        let words = ["-c", id, "-n", name, "-b", &folder, "-p", &pid];
        Self {
            uid: tenant.uid,
            program: "conmon".to_owned(),
            arguments: words.map(str::to_owned).to_vec(),
            folder: tenant.folder().to_owned(),
            pid_file: Some(pid_file),
            ..Self::default()
        }
    }

    /// The child joins a cgroup.
    #[must_use]
    pub fn in_cgroup(self, cgroup: &Path) -> Self {
        Self { cgroup: Some(cgroup.to_owned()), ..self }
    }

    /// Starts the process, which is ready when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(&self) -> Impostor {
        let folder = Folder::new();
        must(fs::set_permissions(&folder.path, fs::Permissions::from_mode(0o755)), "open a folder to all");
        let program = folder.path.join(&self.program);
        must(fs::copy(probe::program(), &program), "copy sockprobe");
        let order = must(serde_json::to_string(self), "write an order");
        let mut command = Command::new(&program);
        command.arg0(&self.program).args(&self.arguments).env(ORDER, order).current_dir(&self.folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = command.spawn();
        // A child that another test has just forked has the copy open to be written until it becomes another program.
        wait::until(wait::PATIENCE, || {
            let is_busy = matches!(&started, Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy);
            if is_busy {
                started = command.spawn();
            }
            !is_busy
        });
        let mut process = must(started, format_args!("start {}", self.program));
        let mut line = String::new();
        let output = process.stdout.take().map(BufReader::new);
        must(output.ok_or(io::ErrorKind::BrokenPipe.into()).and_then(|mut output| output.read_line(&mut line)), "hear");
        let child = must(line.trim().parse(), format_args!("be {}: {line}", self.program));
        Impostor { process, child, _program: folder }
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

/// A user of no account, and of no other test: with a folder, and cgroups in one that is not his.
#[derive(Debug)]
pub struct Tenant {
    pub uid: u32,
    folder: Folder,
    home: Cgroup,
}

impl Tenant {
    #[must_use]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let uid = 1_000_000 + std::process::id() % 1_000_000 * 100 + COUNT.fetch_add(1, Ordering::Relaxed);
        let tenant = Self { uid, folder: Folder::new(), home: Cgroup::new() };
        must(fs::set_permissions(tenant.folder(), fs::Permissions::from_mode(0o755)), "open a folder to all");
        tenant.own(tenant.folder());
        tenant
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// The parent of the user's cgroups, which is root's.
    #[must_use]
    pub fn home(&self) -> &Cgroup {
        &self.home
    }

    /// Makes a cgroup of this user's.
    #[must_use]
    pub fn cgroup(&self, name: &str) -> Cgroup {
        let cgroup = self.home.child(name);
        self.own(cgroup.path());
        cgroup
    }

    /// What this user calls containers.
    #[must_use]
    pub fn claim(&self) -> String {
        self.home.name().trim_start_matches('/').to_owned()
    }

    /// A policy's target by that name.
    #[must_use]
    pub fn selector(&self) -> String {
        format!("container = {{ name = \"{}\" }}", self.claim())
    }

    /// Makes a file this user's.
    #[track_caller]
    pub fn own(&self, path: &Path) {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
        must(chown(path, Some(uid), Some(gid)), format_args!("give {}", path.display()));
    }

    /// Writes a file of this user's.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        must(fs::write(&path, content), format_args!("write {}", path.display()));
        self.own(&path);
        path
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self::new()
    }
}

/// Is what an [`ORDER`] says, if there is one, until standard input ends.
///
/// # Errors
///
/// If the process cannot be that.
pub fn pose() -> io::Result<bool> {
    let Ok(order) = env::var(ORDER) else { return Ok(false) };
    let disguise: Disguise = serde_json::from_str(&order)?;
    if let Some(folder) = &disguise.blocked_by {
        mount_without_answers(folder)?;
    }
    let child = start_child(&disguise)?;
    disguise.drop_rights()?;
    for _ in 0..disguise.copies {
        copy()?;
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
    // _LINUX_CAPABILITY_VERSION_3 and this process; then none, three times two words (capset(2)).
    let (mut header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    // SAFETY: of the sizes that this version has.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), none.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn start_child(disguise: &Disguise) -> io::Result<i32> {
    // SAFETY: the child makes system calls only.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            // The file system ends with its server only if nobody else has its device.
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

fn copy() -> io::Result<()> {
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

/// Mounts a file system that answers nothing, in this process's own mounts.
fn mount_without_answers(folder: &Path) -> io::Result<()> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    mount(Some("none"), folder, Some("fuse"), MsFlags::empty(), Some(options.as_str()))?;
    thread::spawn(move || serve(device));
    Ok(())
}

/// Serves it (include/uapi/linux/fuse.h), until its last descriptor is closed.
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
