//! Hostile tenants that run as threads of the test: cgroups that come and go, and processes that pose as container
//! monitors.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use sockpolicy_integration_tests::impostor::{Disguise, Tenant};

const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";
/// More levels than sockpolicy's programs examine of a cgroup's ancestors.
const DEPTH: usize = 40;
/// With this many components of 200 bytes, a path is longer than PATH_MAX.
const OVERLONG: usize = 24;
/// The number of cgroups that are created and removed per second.
const PER_SECOND: u64 = 100;

/// Threads, which end when this value is dropped.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Tenants {
    /// Starts a thread that repeats `work` until the end, with the number of the repetition.
    fn start(&mut self, pause: Duration, mut work: impl FnMut(u64) -> io::Result<()> + Send + 'static) {
        let is_over = Arc::clone(&self.is_over);
        self.threads.push(thread::spawn(move || {
            let begin = Instant::now();
            let mut done = 0;
            while !is_over.load(Ordering::Relaxed) {
                match work(done) {
                    Ok(()) => done += 1,
                    // A resource of the machine is temporarily exhausted.
                    Err(_) => thread::yield_now(),
                }
                let due = pause.saturating_mul(done as u32);
                thread::sleep(due.saturating_sub(begin.elapsed()).min(Duration::from_secs(1)));
            }
            done
        }));
    }

    /// Creates and removes cgroups. One in a hundred is deeply nested.
    pub(crate) fn churn(&mut self, below: PathBuf) {
        self.start(Duration::from_micros(1_000_000 / PER_SECOND), move |number| {
            let top = below.join(format!("c{number}"));
            fs::create_dir(&top)?;
            if number.is_multiple_of(100) {
                nest(&top, DEPTH, "n")?;
            }
            fs::remove_dir(&top)
        });
    }

    /// Creates cgroups whose paths are too long for a system call.
    pub(crate) fn overlong(&mut self, below: PathBuf) {
        self.start(Duration::from_secs(2), move |_| nest(&below, OVERLONG, &"x".repeat(200)));
    }

    /// Makes users pose as conmon, for containers that a policy names.
    pub(crate) fn impostors(&mut self, claim: &'static str) {
        self.start(Duration::from_secs(5), move |number| {
            let tenant = Tenant::new();
            let cgroup = tenant.cgroup("own");
            let conmon = Disguise { copies: 20, ..Disguise::conmon(&tenant, ID, claim) };
            let fuse = tenant.path("blocked");
            fs::create_dir(&fuse)?;
            let blocked_by = (number % 2 == 0 && Path::new("/dev/fuse").exists()).then_some(fuse);
            let impostor = Disguise { blocked_by, ..conmon }.in_cgroup(cgroup.path()).start();
            thread::sleep(Duration::from_secs(2));
            drop(impostor);
            Ok(())
        });
    }

    /// Ends all threads, and returns how often each one completed its work.
    pub(crate) fn end(&mut self) -> Vec<u64> {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.drain(..).map(|thread| thread.join().unwrap_or(0)).collect()
    }
}

impl Drop for Tenants {
    fn drop(&mut self) {
        self.end();
    }
}

/// Creates nested cgroups, and removes them.
fn nest(below: &Path, depth: usize, name: &str) -> io::Result<()> {
    let mut dirs = vec![nix::dir::Dir::open(below, nix::fcntl::OFlag::O_RDONLY, nix::sys::stat::Mode::empty())?];
    let mut made = Ok(());
    while let (Some(last), true) = (dirs.last(), dirs.len() <= depth) {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        let open = || {
            nix::sys::stat::mkdirat(last, name, mode)?;
            nix::dir::Dir::openat(last, name, nix::fcntl::OFlag::O_RDONLY, mode)
        };
        match open() {
            Ok(dir) => dirs.push(dir),
            Err(error) => {
                made = Err(error);
                break;
            }
        }
    }
    while dirs.pop().is_some() {
        if let Some(parent) = dirs.last() {
            nix::unistd::unlinkat(parent, name, nix::unistd::UnlinkatFlags::RemoveDir)?;
        }
    }
    Ok(made?)
}
