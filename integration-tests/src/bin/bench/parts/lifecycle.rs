//! Starting, coming in force, reloading and taking over, and what all of it takes up.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::wait;

use super::{connections, run};
use crate::{
    bpf::{self, Empty},
    guard::{self, Ground},
    measure::{self, Spread},
    peers,
    row::{Budget, Findings, Kind, Line, Plot, Row, Scale, Series, Unit, whole},
    scene::{Beside, Samples, check_installed},
    trouble::{Attempt, Result, Trouble},
};

const PART: &str = "lifecycle";

const TARGETS: [usize; 4] = [1, 10, 100, 1000];
const MANY: usize = 1000;
const COUNTING: &str = "tracepoint:syscalls:sys_enter_setsockopt { @[pid, args->level, args->optname] = count(); }";

pub(crate) fn measure(ground: &Ground, findings: &mut Findings) -> Result<()> {
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

/// Runs these commands in turn, and takes down how long each took. One that fails is left out.
fn in_turn(ground: &Ground, rounds: usize, commands: &[(&str, Vec<&str>)], samples: &mut Samples) {
    for round in 0..rounds {
        for place in measure::order(commands.len(), round) {
            let (name, words) = &commands[place];
            match check_installed(&words[..1]).and_then(|()| run(ground, words)) {
                Ok((took, _)) => samples.add(name, took.as_nanos() as f64),
                Err(trouble) => samples.leave_out(name, trouble),
            }
        }
    }
}

fn start_up(ground: &Ground, samples: &mut Samples) -> Result<()> {
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

/// Cgroups below one, and a policy for them.
fn targets(ground: &Ground, name: &str, count: usize) -> Result<String> {
    for number in 0..count {
        ground.cgroup(&format!("{name}/target-{number}"))?;
    }
    let policy = ground.policy(name, &ground.root.join(name).join("*"), connections::TEN)?;
    Ok(policy.display().to_string())
}

fn attach(ground: &Ground, samples: &mut Samples) -> Result<()> {
    let sockpolicy = ground.sockpolicy.display().to_string();
    let names = TARGETS.map(|count| format!("attach-{count}"));
    let policies: Vec<String> =
        TARGETS.iter().zip(&names).map(|(count, name)| targets(ground, name, *count)).collect::<Result<_>>()?;
    for round in 0..5 {
        for place in measure::order(TARGETS.len(), round) {
            let (name, policy) = (&names[place], &policies[place]);
            let (took, _) = run(ground, &[&sockpolicy, "attach", "--instance", name, policy])?;
            samples.add(&format!("{name}/attach"), took.as_nanos() as f64);
            let (took, _) = run(ground, &[&sockpolicy, "detach", name])?;
            samples.add(&format!("{name}/detach"), took.as_nanos() as f64);
        }
    }
    names.iter().try_for_each(|name| guard::remove(&ground.root.join(name)))
}

/// `sockpolicy run` with these arguments, and how long it took to be in force.
fn start(ground: &Ground, name: &str, arguments: &[&str], policy: &str) -> Result<(Beside, Duration)> {
    let own = [&*ground.sockpolicy.display().to_string(), "run", "-o", "json"].map(str::to_owned);
    let more = arguments.iter().chain([&policy]).map(|word| (*word).to_owned());
    let words: Vec<String> = own.into_iter().chain(more).collect();
    let begin = Instant::now();
    let mut agent = Beside::start(ground, name, &words, peers::IN_FORCE)?;
    agent.wait()?;
    Ok((agent, begin.elapsed()))
}

/// From a changed file to the agent's word that it is in force.
fn reload(ground: &Ground, samples: &mut Samples) -> Result<()> {
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
            if !wait::until(wait::PATIENCE, || reloads() > round) {
                return Err(Trouble::new(format_args!("sockpolicy run did not reload {policy}")));
            }
            samples.add(&format!("{name}/reload"), begin.elapsed().as_nanos() as f64);
        }
        drop(agent);
        guard::remove(&ground.root.join(&name))?;
    }
    Ok(())
}

/// From the start of an agent to its word that it has what another left in force.
fn take_over(ground: &Ground, samples: &mut Samples) -> Result<()> {
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
        run(ground, &[&sockpolicy, "detach", "taken"])?;
    }
    guard::remove(&ground.root.join("taken"))
}

/// What the kernel has in use for itself, in KiB: slabs, memory for each CPU, and areas such as programs and maps.
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
        .ok_or_else(|| Trouble::new("/proc/meminfo does not say what the kernel has"))
}

/// What a target takes: the difference that a thousand make, each.
fn memory(ground: &Ground, samples: &mut Samples) -> Result<()> {
    let policy = targets(ground, "memory", MANY)?;
    let sockpolicy = ground.sockpolicy.display().to_string();
    let folders: Vec<_> = (0..MANY).map(|number| ground.root.join(format!("memory/target-{number}"))).collect();
    for _ in 0..3 {
        settle();
        let before = kernel_memory()?;
        let empty =
            folders.iter().map(|folder| Empty::on_cgroup(bpf::SETSOCKOPT, folder)).collect::<Result<Vec<_>>>()?;
        samples.add("memory/empty", (kernel_memory()? - before) / MANY as f64);
        drop(empty);
        settle();
        let before = kernel_memory()?;
        run(ground, &[&sockpolicy, "attach", "--instance", "memory", &policy])?;
        samples.add("memory/targets", (kernel_memory()? - before) / MANY as f64);
        run(ground, &[&sockpolicy, "detach", "memory"])?;
    }
    guard::remove(&ground.root.join("memory"))
}

/// Waits until the kernel has freed what it frees a moment later: until its memory is the same twice.
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
        Line::new(what, whole(over), versus, whole(under)).unit(Unit::Milliseconds)
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

/// Files, of which each has one size.
fn sizes(ground: &Ground) -> Result<Vec<Row>> {
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
        row("BPF object within it", object(ground), "the binary", binary, "the object is not where cargo leaves it"),
    ])
}

/// The BPF object's size in KiB: the newest that cargo has built for this binary.
fn object(ground: &Ground) -> Option<f64> {
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
