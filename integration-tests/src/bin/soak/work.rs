//! `soak work KIND`: a process of a victim or of a hostile tenant. It repeats its work until its standard input ends.
//! Then it prints its counters as JSON in the last line.

use std::{
    fs,
    io::{self, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::sys::{prctl, signal::Signal, wait::waitpid};

use crate::{
    checks::{self, Counts},
    sockets::{self, SO_KEEPALIVE, TCP_NODELAY},
};

/// The argument that makes this program such a process.
pub(crate) const WORK: &str = "work";

/// The pause between rounds, so that no process needs a whole CPU.
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) fn serve(kind: &str) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let round: fn(&mut Counts) -> io::Result<()> = match kind {
        "constant" => checks::constant,
        "versions" => checks::versions,
        "peers" => checks::peers,
        "storm" => storm,
        "forks" => forks,
        "numbers" => numbers,
        "descriptors" => descriptors,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let is_over = end_of_input();
    let mut counts = Counts::default();
    while !is_over.load(Ordering::Relaxed) {
        round(&mut counts)?;
        counts.add("rounds");
        thread::sleep(PAUSE);
    }
    writeln!(io::stdout(), "{}", serde_json::to_string(&counts.0)?)
}

fn end_of_input() -> Arc<AtomicBool> {
    let is_over = Arc::new(AtomicBool::new(false));
    let is_over_in_reader = Arc::clone(&is_over);
    thread::spawn(move || {
        let _ = io::stdin().read(&mut [0]);
        is_over_in_reader.store(true, Ordering::Relaxed);
    });
    is_over
}

/// Makes many conflicting calls on one socket.
fn storm(counts: &mut Counts) -> io::Result<()> {
    let fd = sockets::open(libc::AF_INET, libc::SOCK_STREAM)?;
    for _ in 0..2000 {
        for option in [TCP_NODELAY, SO_KEEPALIVE] {
            sockets::set(&fd, option, 0)?;
            counts.add(option.2);
        }
    }
    Ok(())
}

/// Starts processes that each make one conflicting call. Their command name contains terminal escape sequences.
fn forks(counts: &mut Counts) -> io::Result<()> {
    for _ in 0..20 {
        // SAFETY: the child only makes system calls and ends.
        match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Parent { child } => drop(waitpid(child, None)?),
            nix::unistd::ForkResult::Child => {
                let _ = prctl::set_name(c"\x1b[2J\n{\"x\":1}");
                let done =
                    sockets::open(libc::AF_INET, libc::SOCK_STREAM).and_then(|fd| sockets::set(&fd, SO_KEEPALIVE, 0));
                // SAFETY: ends the child without the parent's exit handlers.
                unsafe { libc::_exit(i32::from(done.is_err())) }
            }
        }
        counts.add(SO_KEEPALIVE.2);
    }
    Ok(())
}

/// Uses options that do not exist, with new numbers each time.
fn numbers(counts: &mut Counts) -> io::Result<()> {
    let fd = sockets::open(libc::AF_INET, libc::SOCK_STREAM)?;
    let round = *counts.0.get("rounds").unwrap_or(&0) as i32;
    for number in 0..10 {
        let _ = sockets::set(&fd, (1000 + round % 50_000, number, ""), 1);
        counts.add("setsockopt");
        let _ = sockets::get(&fd, (libc::SOL_TCP, 1000 + 10 * round + number, ""));
        counts.add("getsockopt");
    }
    Ok(())
}

/// Uses up the descriptors of this process.
fn descriptors(counts: &mut Counts) -> io::Result<()> {
    let mut held = Vec::new();
    while let Ok(fd) = sockets::open(libc::AF_INET, libc::SOCK_STREAM) {
        held.push(fd);
        if held.len() == 4096 {
            break;
        }
    }
    for fd in held.iter().take(3) {
        sockets::set(fd, SO_KEEPALIVE, 0)?;
        counts.add(SO_KEEPALIVE.2);
    }
    drop(held);
    fs::read_dir("/proc/self/fd").map(drop)
}
