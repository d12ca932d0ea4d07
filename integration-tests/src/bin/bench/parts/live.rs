//! Setting options on existing sockets: `sockpolicy apply` compared with a minimal user-space loop.
//!
//! Both find the sockets of a cgroup's processes and set one or nine options on each. Every run sets new values, so
//! that every socket changes. The loop reads no values and keeps no journal.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use super::run;
use crate::{
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    measure::{self, Spread},
    row::{Budget, Findings, Kind, Line, Plot, Scale, Series, Unit, total},
    scene::{Condition, Samples},
    work::{Work, Worker},
};

const PART: &str = "live";

/// Options for which every value from 1 to 127 is valid.
const OPTIONS: [(&str, libc::c_int, libc::c_int); 9] = [
    ("TCP_KEEPIDLE", libc::SOL_TCP, libc::TCP_KEEPIDLE),
    ("TCP_KEEPINTVL", libc::SOL_TCP, libc::TCP_KEEPINTVL),
    ("TCP_KEEPCNT", libc::SOL_TCP, libc::TCP_KEEPCNT),
    ("TCP_SYNCNT", libc::SOL_TCP, libc::TCP_SYNCNT),
    ("TCP_USER_TIMEOUT", libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
    ("TCP_NOTSENT_LOWAT", libc::SOL_TCP, TCP_NOTSENT_LOWAT),
    ("SO_MARK", libc::SOL_SOCKET, libc::SO_MARK),
    ("SO_PRIORITY", libc::SOL_SOCKET, libc::SO_PRIORITY),
    ("SO_RCVLOWAT", libc::SOL_SOCKET, libc::SO_RCVLOWAT),
];
/// From include/uapi/linux/tcp.h.
const TCP_NOTSENT_LOWAT: libc::c_int = 25;
/// The numbers of options to set.
const COUNTS: [usize; 2] = [1, OPTIONS.len()];

/// The numbers of sockets. Both ends of each connection count.
const SIZES: [usize; 3] = [1000, 10_000, 50_000];
/// The number of sockets of one process, which stays below the limit on open files.
const PER_PROCESS: usize = 18_000;
const ROUNDS: usize = 5;
/// The time limit for one size. If the previous size was slow, the next one has fewer rounds, or is left out.
const PATIENCE: Duration = Duration::from_secs(45);

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    let mut each = Duration::ZERO;
    for size in SIZES {
        let expected = each * size as u32;
        let rounds = if expected.is_zero() { ROUNDS } else { PATIENCE.div_duration_f64(expected).min(5.0) as usize };
        if rounds == 0 {
            let reason = format!("would take {expected:.0?} a round");
            leave_out(&mut samples, size, &BenchError::new(reason));
            continue;
        }
        match of_size(ground, size, rounds, &mut samples) {
            Ok(took) => each = took / size as u32,
            Err(error) => leave_out(&mut samples, size, &error),
        }
    }
    let line = |count: usize, size: usize| {
        let key = |who: &str| format!("{who}-{count}-{size}/all");
        // The unit is a rate, so the ratio is inverted.
        Line::new(
            format!("apply, {size} sockets, options: {count}"),
            total(key("loop")),
            "rate of pidfd_getfd and setsockopt",
            total(key("apply")),
        )
        .plain(key("apply"))
        .unit(Unit::Milliseconds)
        .budget(Budget::AtLeast(5.0))
    };
    let lines: Vec<Line> = COUNTS.into_iter().flat_map(|count| SIZES.map(|size| line(count, size))).collect();
    findings.add(PART, &samples, &lines);
    findings.plots.push(plot(&samples));
    Ok(())
}

fn leave_out(samples: &mut Samples, size: usize, reason: &BenchError) {
    for count in COUNTS {
        for who in ["apply", "loop"] {
            samples.leave_out(&format!("{who}-{count}-{size}"), reason.clone());
        }
    }
}

/// Returns the duration of one round.
fn of_size(ground: &Workspace, size: usize, rounds: usize, samples: &mut Samples) -> Result<Duration> {
    let home = ground.cgroup(&format!("live-{size}"))?;
    let mut workers = Vec::new();
    let mut left = size;
    while left > 0 {
        let sockets = left.min(PER_PROCESS);
        let mut worker = Worker::start(ground, &home, &Condition::default())?;
        worker.perform(&home, &home, 0, &Work::Hold { connections: sockets / 2 })?;
        workers.push(worker);
        left -= sockets;
    }
    let mut round_took = Duration::ZERO;
    let mut value = 0;
    for round in 0..rounds {
        let begin = Instant::now();
        for (count, who) in
            COUNTS.into_iter().flat_map(|count| measure::order(2, round).into_iter().map(move |who| (count, who)))
        {
            value += 1;
            let (name, took) = match who {
                0 => ("apply", apply(ground, &home, size, count, value)?),
                _ => ("loop", set_all(&home, size, count, value)?),
            };
            samples.add(&format!("{name}-{count}-{size}/all"), took.as_nanos() as f64);
        }
        round_took = begin.elapsed();
    }
    drop(workers);
    guard::remove(&home)?;
    Ok(round_took)
}

fn apply(ground: &Workspace, home: &Path, size: usize, count: usize, value: i32) -> Result<Duration> {
    let settings = OPTIONS[..count].iter().map(|(name, ..)| format!("{name} = {value}"));
    let rules = format!("[[rule]]\nset = {{ {} }}", settings.collect::<Vec<_>>().join(", "));
    let policy = ground.policy("live", home, &rules)?;
    let program = ground.sockpolicy.display().to_string();
    // A new instance, so that the journal does not contain earlier rounds.
    let instance = format!("live-{size}-{value}");
    let (took, printed) =
        run(ground, &[&program, "apply", "--quiet", "--instance", &instance, &policy.display().to_string()])?;
    // The listener can be counted too; it is closed after the setup.
    let summary = printed.lines().last().unwrap_or_default();
    let changed = summary.split("changed: ").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
    match changed {
        Some(changed) if (size..=size + size / 10 + 10).contains(&changed) => Ok(took),
        _ => Err(BenchError::new(format_args!("sockpolicy apply did not change {size} sockets: {summary}"))),
    }
}

/// Sets options from user space: for every process of the cgroup, every descriptor, every TCP socket.
fn set_all(home: &Path, size: usize, count: usize, value: i32) -> Result<Duration> {
    let begin = Instant::now();
    let found = try_set_all(home, &OPTIONS[..count], value).or_cannot("set options on sockets of other processes")?;
    if found < size {
        return Err(BenchError::new(format_args!("found {found} of {size} sockets")));
    }
    Ok(begin.elapsed())
}

fn try_set_all(home: &Path, options: &[(&str, libc::c_int, libc::c_int)], value: i32) -> io::Result<usize> {
    let mut count = 0;
    let pids = fs::read_to_string(home.join("cgroup.procs"))?;
    for pid in pids.lines().filter_map(|line| line.parse::<libc::pid_t>().ok()) {
        // SAFETY: takes numbers.
        let process = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // A descriptor that has been closed since.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
            let Some(number) = number.filter(|_| target.as_os_str().as_encoded_bytes().starts_with(b"socket:")) else {
                continue;
            };
            // SAFETY: takes numbers.
            let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
            let Ok(socket) = descriptor(taken) else { continue };
            count += usize::from(set_if_tcp(&socket, options, value)?);
        }
    }
    Ok(count)
}

fn set_if_tcp(socket: &OwnedFd, options: &[(&str, libc::c_int, libc::c_int)], value: i32) -> io::Result<bool> {
    let (mut protocol, mut len) = (0i32, 4);
    // SAFETY: room for an int.
    let result = unsafe {
        let room = (&raw mut protocol).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL, room, &raw mut len)
    };
    if result < 0 || protocol != libc::IPPROTO_TCP {
        return Ok(false);
    }
    for (_, level, name) in options {
        // SAFETY: points to an int.
        let result = unsafe { libc::setsockopt(socket.as_raw_fd(), *level, *name, (&raw const value).cast(), 4) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(true)
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

fn plot(samples: &Samples) -> Plot {
    let all = COUNTS.into_iter().flat_map(|count| {
        [("apply", "sockpolicy apply"), ("loop", "pidfd_getfd and setsockopt")].map(|(who, name)| (count, who, name))
    });
    let series = all.map(|(count, who, name)| {
        let point = |size: usize| {
            let spread = Spread::of(samples.of(&format!("{who}-{count}-{size}/all")).ok()?)?;
            Some((size as f64, spread.scaled(1e-6)))
        };
        Series { name: format!("{name}, options: {count}"), points: SIZES.into_iter().filter_map(point).collect() }
    });
    let (sizes, figures, series) = (Scale::Logarithmic, Scale::Logarithmic, series.collect());
    let kind = Kind::Curves { size: "live sockets", sizes, figure: "milliseconds", figures, series };
    Plot { name: "live", title: "Options set on all sockets of a cgroup", kind }
}
