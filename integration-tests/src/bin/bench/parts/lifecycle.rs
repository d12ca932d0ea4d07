//! The time to start, to put policies in force, to reload and to take over, and the memory and disk space that this
//! needs.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::wait;

use super::{connections, run};
use crate::{
    bpf::{self, EmptyProgram},
    conditions,
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    measure::{self, Spread},
    row::{Budget, Findings, Kind, Line, Plot, Row, Scale, Series, Unit, total},
    scene::{BackgroundProcess, Samples, check_installed},
};

const PART: &str = "lifecycle";

const TARGETS: [usize; 4] = [1, 10, 100, 1000];
const MANY: usize = 1000;
const COUNTING: &str = "tracepoint:syscalls:sys_enter_setsockopt { @[pid, args->level, args->optname] = count(); }";

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let mut samples = Samples::default();
    start_up(ground, &mut samples)?;
    attach(ground, &mut samples)?;
    reload(ground, &mut samples)?;
    take_over(ground, &mut samples)?;
    memory(ground, &mut samples)?;
    findings.add(PART, &samples, &lines());
    findings.rows.extend(sizes(ground)?);
    findings.plots.push(plot(&samples));
    Ok(())
}

/// Runs these commands in turn, and records the duration of each. A failing command is left out.
fn in_turn(ground: &Workspace, rounds: usize, commands: &[(&str, Vec<&str>)], samples: &mut Samples) {
    for round in 0..rounds {
        for place in measure::order(commands.len(), round) {
            let (name, words) = &commands[place];
            match check_installed(&words[..1]).and_then(|()| run(ground, words)) {
                Ok((took, _)) => samples.add(name, took.as_nanos() as f64),
                Err(error) => samples.leave_out(name, error),
            }
        }
    }
}

fn start_up(ground: &Workspace, samples: &mut Samples) -> Result<()> {
    let policy = ground.file("exec.toml", connections::TEN)?.display().to_string();
    let sockpolicy = ground.sockpolicy.display().to_string();
    let commands = [
        ("true/run", vec!["/bin/true"]),
        ("exec/run", vec![&*sockpolicy, "exec", "-q", &policy, "--", "/bin/true"]),
        ("exec-quiet/run", vec![&*sockpolicy, "exec", "-q", "--audit-backend", "none", &policy, "--", "/bin/true"]),
        ("strace/run", vec!["strace", "-f", "-e", "trace=setsockopt,getsockopt", "-o", "/dev/null", "/bin/true"]),
        ("perf/run", vec!["perf", "trace", "-e", "setsockopt,getsockopt", "-o", "/run/bench/perf.out", "/bin/true"]),
        ("bpftrace/run", vec!["bpftrace", "-o", "/run/bench/bpftrace.out", "-e", COUNTING, "-c", "/bin/true"]),
    ];
    in_turn(ground, 7, &commands, samples);
    Ok(())
}

/// Creates cgroups below a new one, and a policy for them.
fn targets(ground: &Workspace, name: &str, count: usize) -> Result<String> {
    for number in 0..count {
        ground.cgroup(&format!("{name}/target-{number}"))?;
    }
    let policy = ground.policy(name, &ground.root.join(name).join("*"), connections::TEN)?;
    Ok(policy.display().to_string())
}

fn attach(ground: &Workspace, samples: &mut Samples) -> Result<()> {
    let sockpolicy = ground.sockpolicy.display().to_string();
    let names = TARGETS.map(|count| format!("attach-{count}"));
    let policies: Vec<String> =
        TARGETS.iter().zip(&names).map(|(count, name)| targets(ground, name, *count)).collect::<Result<_>>()?;
    for round in 0..5 {
        for place in measure::order(TARGETS.len(), round) {
            let (name, policy) = (&names[place], &policies[place]);
            let (took, _) = run(ground, &[&sockpolicy, "attach", "--instance", name, policy])?;
            samples.add(&format!("{name}/attach"), took.as_nanos() as f64);
            let (took, _) = run(ground, &[&sockpolicy, "detach", "--instance", name])?;
            samples.add(&format!("{name}/detach"), took.as_nanos() as f64);
        }
    }
    names.iter().try_for_each(|name| guard::remove(&ground.root.join(name)))
}

/// Starts `sockpolicy run` with these arguments, and returns the time until its policy was in force.
fn start(ground: &Workspace, name: &str, arguments: &[&str], policy: &str) -> Result<(BackgroundProcess, Duration)> {
    let own = [&*ground.sockpolicy.display().to_string(), "run", "-o", "json"].map(str::to_owned);
    let more = arguments.iter().chain([&policy]).map(|word| (*word).to_owned());
    let words: Vec<String> = own.into_iter().chain(more).collect();
    let begin = Instant::now();
    let mut agent = BackgroundProcess::start(ground, name, &words, conditions::IN_FORCE)?;
    agent.wait()?;
    Ok((agent, begin.elapsed()))
}

/// Measures the time from a changed policy file to the agent's `reload` event.
fn reload(ground: &Workspace, samples: &mut Samples) -> Result<()> {
    for count in [1, MANY] {
        let name = format!("reload-{count}");
        let policy = targets(ground, &name, count)?;
        let text = fs::read_to_string(&policy).or_cannot(format_args!("read {policy}"))?;
        let (agent, _) = start(ground, &name, &[], &policy)?;
        for round in 0..5 {
            let changed = text.replace("\"30s\"", &format!("\"{}s\"", 31 + round));
            let begin = Instant::now();
            let new = ground.file("new", &changed)?;
            fs::rename(new, &policy).or_cannot(format_args!("replace {policy}"))?;
            let reloads = || fs::read_to_string(&agent.log).unwrap_or_default().matches("\"event\":\"reload\"").count();
            if !wait::until(wait::TIMEOUT, || reloads() > round) {
                return Err(BenchError::new(format_args!("sockpolicy run did not reload {policy}")));
            }
            samples.add(&format!("{name}/reload"), begin.elapsed().as_nanos() as f64);
        }
        drop(agent);
        guard::remove(&ground.root.join(&name))?;
    }
    Ok(())
}

/// Measures the time from the start of an agent until it has taken over the policies of another agent.
fn take_over(ground: &Workspace, samples: &mut Samples) -> Result<()> {
    let sockpolicy = ground.sockpolicy.display().to_string();
    let policy = targets(ground, "taken", 1)?;
    let persist = ["--persist", "--instance", "taken"];
    for _ in 0..5 {
        let (agent, took) = start(ground, "taken", &persist, &policy)?;
        samples.add("taken/first", took.as_nanos() as f64);
        agent.signal(Signal::SIGKILL);
        drop(agent);
        let (agent, took) = start(ground, "taken", &persist, &policy)?;
        samples.add("taken/next", took.as_nanos() as f64);
        drop(agent);
        run(ground, &[&sockpolicy, "detach", "--instance", "taken"])?;
    }
    guard::remove(&ground.root.join("taken"))
}

/// Returns the memory in use by the kernel itself, in KiB: slabs, per-CPU memory, and vmalloc areas such as programs
/// and maps.
fn kernel_memory() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").or_cannot("read /proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok())
    };
    let fields = ["Slab", "Percpu", "VmallocUsed"].map(field);
    fields
        .into_iter()
        .sum::<Option<f64>>()
        .ok_or_else(|| BenchError::new("/proc/meminfo lacks Slab, Percpu or VmallocUsed"))
}

/// Measures the kernel memory of one target, as the increase for 1000 targets divided by 1000.
fn memory(ground: &Workspace, samples: &mut Samples) -> Result<()> {
    let policy = targets(ground, "memory", MANY)?;
    let sockpolicy = ground.sockpolicy.display().to_string();
    let dirs: Vec<_> = (0..MANY).map(|number| ground.root.join(format!("memory/target-{number}"))).collect();
    for _ in 0..3 {
        settle();
        let before = kernel_memory()?;
        let empty = dirs.iter().map(|dir| EmptyProgram::on_cgroup(bpf::SETSOCKOPT, dir)).collect::<Result<Vec<_>>>()?;
        samples.add("memory/empty", (kernel_memory()? - before) / MANY as f64);
        drop(empty);
        settle();
        let before = kernel_memory()?;
        run(ground, &[&sockpolicy, "attach", "--instance", "memory", &policy])?;
        samples.add("memory/targets", (kernel_memory()? - before) / MANY as f64);
        run(ground, &[&sockpolicy, "detach", "--instance", "memory"])?;
    }
    guard::remove(&ground.root.join("memory"))
}

/// Waits until the kernel has finished deferred freeing, which shows as the same memory use twice.
fn settle() {
    let mut last = f64::NAN;
    wait::until(Duration::from_secs(2), || {
        let now = kernel_memory().unwrap_or_default();
        let is_settled = (now - last).abs() < 64.0;
        last = now;
        is_settled
    });
}

fn lines() -> Vec<Line> {
    let line = |what: &str, over: &str, versus: &str, under: &str| {
        Line::new(what, total(over), versus, total(under)).unit(Unit::Milliseconds)
    };
    vec![
        line("exec … -- true", "exec/run", "true", "true/run").budget(Budget::PlainAtMost(150.0)),
        line("exec … -- true", "exec/run", "strace true", "strace/run"),
        line("exec … -- true", "exec/run", "perf trace true", "perf/run"),
        line("exec … -- true", "exec/run", "bpftrace -c true", "bpftrace/run"),
        line("exec --audit-backend none … -- true", "exec-quiet/run", "exec … -- true", "exec/run"),
        line("attach, 1 target", "attach-1/attach", "exec … -- true", "exec/run"),
        line("attach, 1000 targets", "attach-1000/attach", "with 1", "attach-1/attach"),
        line("detach, 1 target", "attach-1/detach", "attach", "attach-1/attach"),
        line("detach, 1000 targets", "attach-1000/detach", "with 1", "attach-1/detach"),
        line("reload, 1 target", "reload-1/reload", "attach", "attach-1/attach"),
        line("reload, 1000 targets", "reload-1000/reload", "with 1", "reload-1/reload"),
        line("take-over by another agent", "taken/next", "first start of an agent", "taken/first"),
        line("kernel memory for each of 1000 targets", "memory/targets", "an empty program on each", "memory/empty")
            .unit(Unit::Kibibytes),
    ]
}

/// Returns the sizes of files, each measured once.
fn sizes(ground: &Workspace) -> Result<Vec<Row>> {
    let size = |path: &Path| Some(fs::metadata(path).ok()?.len() as f64 / 1024.0);
    let binary = size(&ground.sockpolicy);
    let row = |what: &str, over: Option<f64>, versus: &str, under: Option<f64>, missing: &str| {
        let spread = |value| Spread::of(&[value]);
        let ratio = over.zip(under).and_then(|(over, under)| spread(over / under));
        let left_out = ratio.is_none().then(|| missing.to_owned());
        let (what, versus, plain) = (what.to_owned(), versus.to_owned(), over.and_then(spread));
        Row { part: PART, what, versus, ratio, plain, unit: Unit::Kibibytes, budget: None, left_out }
    };
    let peer = |path: &str| size(Path::new(path));
    Ok(vec![
        row("binary", binary, "strace's", peer("/usr/bin/strace"), "strace is not installed"),
        row(
            "binary",
            binary,
            "bpftrace's, without its libraries",
            peer("/usr/bin/bpftrace"),
            "bpftrace is not installed",
        ),
        row(
            "BPF object within it",
            object(ground),
            "the binary",
            binary,
            "the object is not in cargo's build directory",
        ),
    ])
}

/// Returns the size of the newest BPF object that cargo has built next to this binary, in KiB.
fn object(ground: &Workspace) -> Option<f64> {
    let builds = fs::read_dir(ground.sockpolicy.parent()?.join("build")).ok()?;
    let outs = builds.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("sockpolicy-"));
    let files = outs.flat_map(|entry| fs::read_dir(entry.path().join("out")).into_iter().flatten().flatten());
    let objects = files.filter(|file| fs::read(file.path()).is_ok_and(|bytes| is_bpf(&bytes)));
    let newest = objects.filter_map(|file| file.metadata().ok()).max_by_key(|metadata| metadata.modified().ok())?;
    Some(newest.len() as f64 / 1024.0)
}

fn is_bpf(bytes: &[u8]) -> bool {
    const MACHINE: usize = 18;
    const EM_BPF: u8 = 247;
    bytes.starts_with(b"\x7fELF") && bytes.get(MACHINE) == Some(&EM_BPF)
}

fn plot(samples: &Samples) -> Plot {
    let series = ["attach", "detach"].map(|what| {
        let point = |count: usize| {
            let spread = Spread::of(samples.of(&format!("attach-{count}/{what}")).ok()?)?;
            Some((count as f64, spread.scaled(1e-6)))
        };
        Series { name: what.to_owned(), points: TARGETS.into_iter().filter_map(point).collect() }
    });
    let (sizes, figures, series) = (Scale::Logarithmic, Scale::Linear, series.to_vec());
    let kind = Kind::Curves { size: "targets", sizes, figure: "milliseconds", figures, series };
    Plot { name: "lifecycle", title: "Attach and detach", kind }
}
