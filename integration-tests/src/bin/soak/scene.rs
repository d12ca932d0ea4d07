//! The whole setup: cgroups, policies, agents, victims and hostile tenants.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent as fixtures, bpf_objects::BpfObjects, bpffs::Instance, cgroup::Cgroup, policy::PolicyFile, wait,
};

use crate::{
    agent::{Agent, OutputStats, Sample},
    findings::Findings,
    policies::{INVALID, PEERS, RULES, policy, version},
    tenants::Tenants,
    worker::Worker,
};

/// The time between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);
/// The lifetime of the persistent agent.
const KILL_INTERVAL: Duration = Duration::from_secs(7);
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// A bound on output: the most conflict lines per second of all targets (`Rate` in bpf-programs/abi/src/event.rs),
/// times the bytes of a line.
const OUTPUT_PER_SECOND: u64 = 2_000_000;
/// Counters of workers that are not options.
const NOT_OPTIONS: [&str; 3] = ["checks", "mismatches", "rounds"];
const CLAIMED_NAME: &str = "soak-claimed";
/// A network namespace where sockets get no memory beyond their buffers (6.8 and later).
const NO_MEMORY: &str = "ip link set lo up && { echo 0 >/proc/sys/net/core/optmem_max; exec \"$@\"; }";
const FEW_DESCRIPTORS: &str = "ip link set lo up && ulimit -n 64 && exec \"$@\"";

/// The workers under the first agent: kind, policy, and a script that prepares the worker.
const WORKERS: [(&str, &str, Option<&str>); 8] = [
    ("constant", "set", None),
    ("constant", "starved", Some(NO_MEMORY)),
    ("constant", "inner", None),
    ("versions", "flip", None),
    ("peers", "peers", None),
    ("storm", "storm", None),
    ("forks", "forks", None),
    ("descriptors", "descriptors", Some(FEW_DESCRIPTORS)),
];

/// The fields are dropped in this order: processes before cgroups.
#[derive(Debug)]
pub(crate) struct Scene {
    tenants: Tenants,
    workers: Vec<Worker>,
    persistent_worker: Option<Worker>,
    agent: Agent,
    persistent_agent: Agent,
    /// Reports every call. A separate agent, since `calls = "all"` of one policy applies to all policies of its
    /// agent.
    all_calls_agent: Agent,
    held: BpfObjects,
    policies: PolicyFile,
    persistent_policy: PolicyFile,
    _all_calls_policy: PolicyFile,
    instance: Instance,
    root: Cgroup,
}

impl Scene {
    /// Starts everything.
    pub(crate) fn begin() -> io::Result<Self> {
        let root = Cgroup::new();
        let policies = PolicyFile::named("flip.toml", policy("flip", &format!("{}/flip", root.name()), &version(0)));
        for (_, name, _) in WORKERS.iter().filter(|(_, name, _)| *name != "flip") {
            let rules = if *name == "peers" { PEERS } else { RULES };
            policies.add(&format!("{name}.toml"), policy(name, &format!("{}/{name}*", root.name()), rules));
        }
        policies.add("churn.toml", policy("churn", &format!("{}/churn/**", root.name()), RULES));
        policies.add(
            "claimed.toml",
            format!("name = \"claimed\"\n[target]\ncontainer = {{ name = \"{CLAIMED_NAME}\" }}\n{RULES}"),
        );
        let persistent_policy = PolicyFile::new(policy("kept", &format!("{}/kept", root.name()), RULES));
        let rules = format!("[audit]\ncalls = \"all\"\n{RULES}");
        let all_calls_policy = PolicyFile::new(policy("numbers", &format!("{}/numbers", root.name()), &rules));
        let (instance, churn) = (Instance::new(), root.child("churn"));
        let cgroups: Vec<Cgroup> = WORKERS.iter().map(|(_, name, _)| root.child(name)).collect();
        let [kept, numbers] = ["kept", "numbers"].map(|name| root.child(name));
        let mut agent = Agent::start(&[&policies.dir().display().to_string()])?;
        let mut persistent_agent = Self::start_persistent(&instance, &persistent_policy)?;
        let mut all_calls_agent = Agent::start(&[&all_calls_policy.path().display().to_string()])?;
        for agent in [&mut agent, &mut persistent_agent, &mut all_calls_agent] {
            agent.wait_in_force()?;
        }
        let held = agent.bpf_objects();
        let workers = WORKERS.iter().zip(cgroups);
        let workers = workers.map(|((kind, name, script), cgroup)| Worker::start(kind, name, cgroup, *script));
        let mut workers = workers.collect::<io::Result<Vec<_>>>()?;
        workers.push(Worker::start("numbers", "numbers", numbers, None)?);
        let persistent_worker = Some(Worker::start("constant", "kept", kept, None)?);
        let mut tenants = Tenants::default();
        tenants.churn(churn.path().to_owned());
        tenants.overlong(churn.path().to_owned());
        tenants.impostors(CLAIMED_NAME);
        // Removed with the root cgroup.
        std::mem::forget(churn);
        Ok(Self {
            tenants,
            workers,
            persistent_worker,
            agent,
            persistent_agent,
            all_calls_agent,
            held,
            policies,
            persistent_policy,
            _all_calls_policy: all_calls_policy,
            instance,
            root,
        })
    }

    fn start_persistent(instance: &Instance, policy: &PolicyFile) -> io::Result<Agent> {
        let path = policy.path().display().to_string();
        Agent::start(&["--persist", "--instance", &instance.name, &path])
    }

    fn replace(&self, name: &str, text: &str) -> io::Result<()> {
        let new = self.policies.dir().join("new");
        fs::write(&new, text)?;
        fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        fs::rename(new, self.policies.dir().join(name))
    }

    /// Changes the policies. In each five reloads, one adds an invalid policy and the next one removes it.
    fn reload(&self, number: usize) -> io::Result<()> {
        match number % 5 {
            3 => self.replace("invalid.toml", INVALID),
            4 => fs::remove_file(self.policies.dir().join("invalid.toml")),
            _ => self.replace("flip.toml", &policy("flip", &format!("{}/flip", self.root.name()), &version(number))),
        }
    }

    /// Runs everything for a time, then ends it and checks the results.
    pub(crate) fn run_for(mut self, length: Duration, findings: &mut Findings) -> io::Result<()> {
        let begin = Instant::now();
        let (mut samples, mut persistent_samples, mut all_calls_samples) = (Vec::new(), Vec::new(), Vec::new());
        let (mut reloads, mut kills, mut takeovers) = (0, 0, 0);
        let mut wrong = Vec::new();
        let due = |step: Duration, done: u32| begin.elapsed() >= step * (done + 1);
        while begin.elapsed() < length {
            if due(RELOAD_INTERVAL, reloads) {
                self.reload(reloads as usize)?;
                reloads += 1;
            }
            if due(SAMPLE_INTERVAL, samples.len() as u32) {
                samples.push(self.agent.sample());
                // An agent that is still starting holds less.
                if self.persistent_agent.is_in_force() {
                    persistent_samples.push(self.persistent_agent.sample());
                }
                all_calls_samples.push(self.all_calls_agent.sample());
                progress(begin, &samples);
            }
            if due(KILL_INTERVAL, kills) {
                takeovers += u32::from(self.persistent_agent.is_in_force());
                self.persistent_agent.end(Signal::SIGKILL)?;
                wrong.extend(self.persistent_agent.with_stats(|stats| stats.wrong.clone()));
                self.persistent_agent = Self::start_persistent(&self.instance, &self.persistent_policy)?;
                kills += 1;
            }
            for agent in [&mut self.agent, &mut self.persistent_agent, &mut self.all_calls_agent] {
                if agent.has_ended() {
                    return Err(agent.failure("has ended"));
                }
            }
            if let Some(worker) = self.workers.iter_mut().chain(&mut self.persistent_worker).find_map(Worker::ended) {
                findings.add(false, format_args!("{} under {}", worker.kind, worker.policy), "it ended early");
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        findings.add(reloads > 0, "changes of policies", reloads);
        findings.add(
            takeovers > 0,
            "kills of the persistent agent, and takeovers before",
            format_args!("{kills}, {takeovers}"),
        );
        findings.flat("run", &samples);
        findings.flat("run --persist", &persistent_samples);
        findings.flat("run with calls = all", &all_calls_samples);
        self.end(begin, wrong, findings)
    }

    fn end(mut self, begin: Instant, mut wrong: Vec<String>, findings: &mut Findings) -> io::Result<()> {
        for (done, what) in self.tenants.end().into_iter().zip(["cgroups made", "overlong paths made", "impostors"]) {
            findings.add(done > 0, what, done);
        }
        let mut caused = BTreeMap::new();
        let kept = self.persistent_worker.take();
        for worker in self.workers.drain(..).chain(kept) {
            let policy = worker.policy;
            let name = format!("{} under {policy}", worker.kind);
            match worker.end() {
                Ok(outcome) => {
                    let count = |what: &str| outcome.counts.get(what).copied().unwrap_or(0);
                    let (checks, mismatches) = (count("checks"), count("mismatches"));
                    let text = format!(
                        "{checks} checks, {mismatches} mismatches, {} rounds\n{}",
                        count("rounds"),
                        outcome.lines
                    );
                    findings.add(mismatches == 0 && count("rounds") > 0, name, text.trim_end());
                    caused.insert(policy, outcome.counts);
                }
                Err(error) => findings.add(false, name, error),
            }
        }
        self.persistent_agent.wait_in_force()?;
        let persistent_status = self.persistent_agent.end(Signal::SIGTERM)?;
        let status = self.agent.end(Signal::SIGTERM)?;
        let all_calls_status = self.all_calls_agent.end(Signal::SIGTERM)?;
        for agent in [&self.agent, &self.persistent_agent, &self.all_calls_agent] {
            wrong.extend(agent.with_stats(|stats| stats.wrong.clone()));
        }
        findings.add(status.success(), "run: its end", status);
        findings.add(all_calls_status.success(), "run with calls = all: its end", all_calls_status);
        findings.add(persistent_status.success(), "run --persist: its end", persistent_status);
        findings.add(wrong.is_empty(), "lines that are no JSON, panics, control characters", format_args!("{wrong:?}"));
        let seconds = begin.elapsed().as_secs();
        self.agent.with_stats(|stats| {
            findings.add(
                stats.reloads[0] > 0 && stats.reloads[1] > 0,
                "reloads in force, refused",
                format_args!("{:?}", stats.reloads),
            );
            let output = format!("{} bytes in {seconds} s, {} messages", stats.bytes, stats.messages);
            findings.add(stats.bytes <= OUTPUT_PER_SECOND * (seconds + 1), "run: output", output);
            conflicts(stats, &caused, findings);
        });
        // Counters of calls survive the agents of an instance: the last agent reports all calls.
        self.persistent_agent.with_stats(|stats| counts(&stats.summary, "kept", &caused, findings));
        self.all_calls_agent.with_stats(|stats| tallies(stats, caused.get("numbers"), findings));
        self.leave(findings);
        Ok(())
    }

    /// Removes the persistent policies, and checks that nothing else is left.
    fn leave(self, findings: &mut Findings) {
        let detached = fixtures::output(&["detach", "--instance", &self.instance.name]);
        let text = String::from_utf8_lossy(&detached.stderr).into_owned();
        findings.add(detached.status.success(), "detach", format_args!("{} {text}", detached.status));
        let left = self.instance.left();
        findings.add(left.is_empty(), "pins and records left", format_args!("{left:?}"));
        let held = &self.held;
        let is_gone = wait::until(Duration::from_secs(20), || held.left() == BpfObjects::default());
        findings.add(is_gone, "links and programs left", format_args!("{:?}", held.left()));
        let root: PathBuf = self.root.path().to_owned();
        drop(self);
        findings.add(!root.exists(), "cgroups left", if root.exists() { "yes" } else { "none" });
    }
}

/// Prints the progress once a minute.
fn progress(begin: Instant, samples: &[Sample]) {
    if let (Some(last), true) = (samples.last(), samples.len().is_multiple_of(30)) {
        let _ = writeln!(io::stderr(), "soak: {} s, agent {last:?}", begin.elapsed().as_secs());
    }
}

fn settings<'a>(summary: &'a Value, policy: &'a str) -> impl Iterator<Item = &'a Value> {
    summary["settings"].as_array().into_iter().flatten().filter(move |setting| setting["policy"] == policy)
}

fn sum(values: &Value) -> u64 {
    values.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_u64()).sum()
}

/// Compares the conflicts that the processes under a policy caused with those that the agent counted.
fn counts(summary: &Value, policy: &str, caused: &BTreeMap<&str, BTreeMap<String, u64>>, findings: &mut Findings) {
    let Some(caused) = caused.get(policy) else { return };
    let mut counted: BTreeMap<&str, u64> = BTreeMap::new();
    for setting in settings(summary, policy) {
        *counted.entry(setting["option"].as_str().unwrap_or("")).or_insert(0) += sum(&setting["calls"]["conflicts"]);
    }
    // An option without a line in the report was not counted.
    for option in caused.keys().map(String::as_str).filter(|what| !NOT_OPTIONS.contains(what)) {
        counted.entry(option).or_insert(0);
    }
    for (option, count) in counted.into_iter().filter(|(option, count)| *count > 0 || caused.contains_key(*option)) {
        let wanted = caused.get(option).copied().unwrap_or(0);
        findings.equal(format_args!("conflicts about {option} under {policy}"), count, wanted);
    }
}

/// Checks that the counts are exact, and that every missing event has a reason.
fn conflicts(stats: &OutputStats, caused: &BTreeMap<&str, BTreeMap<String, u64>>, findings: &mut Findings) {
    for (_, policy, _) in WORKERS {
        counts(&stats.summary, policy, caused, findings);
    }
    let all = || stats.summary["settings"].as_array().into_iter().flatten();
    let total = |field: &str| all().filter_map(|setting| setting["events"][field].as_u64()).sum::<u64>();
    // A read also conflicts if the socket still has the value of the policy before the last reload.
    let of_setting =
        |setting: &Value| sum(&setting["calls"]["conflicts"]) + setting["calls"]["reads"].as_u64().unwrap_or(0);
    let conflicts: u64 = all().map(of_setting).sum();
    let losses = &stats.summary["losses"];
    let lost = |reason: &str| losses[reason].as_u64().unwrap_or(0);
    let unwritten =
        ["output_blocked", "output_closed", "output_no_space", "output_failed"].map(lost).iter().sum::<u64>();
    let lines: u64 = ["conflict", "mismatch"].iter().filter_map(|kind| stats.events.get(*kind)).sum();
    findings.equal(
        "conflicts reported, suppressed or lost in the ring",
        total("reported") + total("suppressed") + lost("ring_full"),
        conflicts,
    );
    // Prints the settings that make up a difference.
    for setting in all() {
        let events: u64 = ["reported", "suppressed"].iter().filter_map(|field| setting["events"][field].as_u64()).sum();
        let conflicts = of_setting(setting);
        if events > conflicts || events < conflicts && lost("ring_full") == 0 {
            findings.add(
                false,
                "events and conflicts of one setting",
                format_args!("{events} of {conflicts}: {setting}"),
            );
        }
    }
    let (reported, found) = (total("reported"), format!("{lines} and {unwritten} of {}", total("reported")));
    let is_explained = lines <= reported && reported <= lines + unwritten;
    findings.add(is_explained, "conflict lines read, and lines lost in output", found);
    findings.add(!losses.is_null(), "losses", losses);
    findings.add(lines > 0, "lines by event", format_args!("{:?}", stats.events));
}

/// Checks that each call on an invented option is counted, and that the number of counted options is bounded.
fn tallies(stats: &OutputStats, made: Option<&BTreeMap<String, u64>>, findings: &mut Findings) {
    let lines = || stats.summary["call_counts"].as_array().into_iter().flatten();
    for call in ["setsockopt", "getsockopt"] {
        let counted = lines().filter(|line| line["call"] == call).filter_map(|line| line["count"].as_u64()).sum();
        let made = made.and_then(|made| made.get(call)).copied().unwrap_or(0);
        findings.equal(format_args!("calls of {call} on invented options"), counted, made);
    }
    let count = lines().count();
    findings.add(count > 0 && count < 1000, "options that the audit counts", count);
    findings.add(true, "run with calls = all: losses", &stats.summary["losses"]);
}
