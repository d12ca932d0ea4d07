//! The differential test of calls: each option, under each of its names, on each kind of socket, with arguments of
//! each length.
//!
//! The oracle is the kernel without a policy. A call that no policy covers must have the same result, errno, lengths,
//! memory and values. An option that a policy covers must stay within the policy, as getsockopt of the owner shows.
//!
//! Only a sample of the cases runs: one of N, and all cases that are the only one of their option, name and kind of
//! socket. `SOCKPOLICY_DIFFERENTIAL` in the environment is N. 1 selects all cases, some five million under all
//! policies together. `make vm-test` uses 24, which makes over a million calls on each kernel.
//!
//! Two effects are common to all programs on a hook, whatever they do (kernel/bpf/cgroup.c):
//!
//! - `__cgroup_bpf_run_filter_setsockopt` copies the argument first. An argument that extends past mapped memory
//!   fails with EFAULT. So does NULL with a length, which SOL_IPV6 and MPTCP accept. Therefore all arguments here are
//!   mapped.
//! - `__cgroup_bpf_run_filter_getsockopt` rejects a negative buffer size with EINVAL, whatever the handler returned.

mod cases;
mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{self, Write},
    process::Command,
};

use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    differential::{Case, CaseSet, KINDS, Key, NO_OBSERVER, NO_SOCKET, Observation, Outcome, state},
    policy::PolicyFile,
    process,
};

use self::{
    cases::{Agreeing, Listed, case_set, describe, is_governed_kind, is_named},
    tables::{DEVICES, LIMITS, NOT_LIMITED, SETS, SOCKET, TCP, UDP, UDP_LITE, VOLATILE},
};
use crate::{stderr, stdout};

const EPERM: i32 = -libc::EPERM;

/// Returns N: one of N cases runs.
fn sample() -> u32 {
    const DEFAULT: u32 = 96;
    env::var("SOCKPOLICY_DIFFERENTIAL").map_or(DEFAULT, |one_of| one_of.parse().unwrap())
}

fn options() -> Vec<Listed> {
    let listed = stdout(&agent::output(&["options", "--output", "json"]));
    listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Cases in a file, and their outcomes without a policy.
struct Trial {
    case_set: CaseSet,
    /// The directory of the files.
    files: PolicyFile,
    /// The user that makes the calls: `root` or `nobody`.
    user: &'static str,
    baseline: Vec<Outcome>,
}

impl Trial {
    fn new(options: &[Listed], agreeing: Agreeing, user: &'static str) -> Self {
        let case_set = case_set(options, agreeing, sample());
        let files = PolicyFile::new("");
        files.add("spec", case_set.encode());
        let mut trial = Self { case_set, files, user, baseline: Vec::new() };
        trial.baseline = trial.run(None, &[]);
        trial
    }

    /// Returns the outcomes of all cases, under a policy if there is one.
    fn run(&self, policy: Option<&PolicyFile>, arguments: &[&str]) -> Vec<Outcome> {
        let path = |name: &str| self.files.dir().join(name).display().to_string();
        let (spec, out) = (path("spec"), path("out"));
        let workload = [&process::workload(), "differential", &spec, &out, self.user];
        let arguments = [&["--quiet", "--report", "/dev/null"], arguments].concat();
        let command = match policy {
            Some(policy) => process::exec(&arguments, policy, &workload),
            None => {
                let mut command = Command::new(workload[0]);
                command.args(&workload[1..]);
                command
            }
        };
        run(command);
        let outcomes = Outcome::decode_all(&fs::read(&out).unwrap());
        fs::remove_file(&out).unwrap();
        assert_eq!(outcomes.len(), self.case_set.cases.len());
        outcomes
    }

    /// Panics with the cases for which `judge` returns an error, grouped by option and kind of socket.
    #[track_caller]
    fn assert(
        &self,
        what: &str,
        outcomes: &[Outcome],
        judge: impl Fn(&Case, &Outcome, &Outcome) -> Result<(), String>,
    ) {
        let mut complaints: BTreeMap<(Key, i32), (usize, String)> = BTreeMap::new();
        let mut count = 0;
        for ((case, before), outcome) in self.case_set.cases.iter().zip(&self.baseline).zip(outcomes) {
            if let Err(complaint) = judge(case, before, outcome) {
                count += 1;
                let entry = complaints.entry((case.key, case.kind)).or_default();
                entry.0 += 1;
                if entry.1.is_empty() {
                    entry.1 = format!("{}: {complaint}", describe(&self.case_set, case));
                }
            }
        }
        let list: Vec<String> =
            complaints.values().take(60).map(|(count, example)| format!("{count} such as {example}")).collect();
        assert!(count == 0, "{what}: {count} of {} cases\n{}", outcomes.len(), list.join("\n"));
    }

    fn observers(&self, case: &Case) -> impl Iterator<Item = (usize, Key)> {
        let keys = self.case_set.observers[case.observers as usize];
        keys.into_iter().enumerate().filter(|(_, key)| *key != NO_OBSERVER)
    }

    /// Returns an error unless all visible effects are those without a policy.
    fn same(&self, case: &Case, before: &Outcome, outcome: &Outcome) -> Result<(), String> {
        let head = |outcome: &Outcome| {
            let sum = if VOLATILE.contains(&case.key) { 0 } else { outcome.sum };
            (outcome.result, outcome.len, outcome.is_changed, sum, outcome.prior)
        };
        if is_refused_room(case, outcome) {
            return Ok(());
        }
        if head(before) != head(outcome) {
            return Err(format!("{:?}, not {:?}", head(outcome), head(before)));
        }
        let is_same = |(at, key): (usize, Key)| {
            VOLATILE.contains(&key) || (before.before[at], before.after[at]) == (outcome.before[at], outcome.after[at])
        };
        if self.observers(case).all(is_same) {
            return Ok(());
        }
        let shown = |outcome: &Outcome| self.observers(case).map(|(at, _)| outcome.after[at]).collect::<Vec<_>>();
        Err(format!("shows {:?}, not {:?}", shown(outcome), shown(before)))
    }
}

/// Returns whether the kernel has rejected a negative buffer size because a program is on cgroup/getsockopt.
fn is_refused_room(case: &Case, outcome: &Outcome) -> bool {
    case.reads != 0 && case.len < 0 && outcome.result == -libc::EINVAL
}

/// Runs a command to its end, without a time limit.
#[track_caller]
fn run(mut command: Command) {
    let home = Cgroup::new();
    home.run_inside(&mut command);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}: {}", output.status, stderr(&output));
}

fn table(entries: impl Iterator<Item = String>) -> String {
    entries.collect::<Vec<_>>().join(", ")
}

/// Returns the rules that set all options. SO_BINDTODEVICE and SO_BINDTOIFINDEX set the same device, so they are in
/// separate rules.
fn set_policy(matching: &str, on_conflict: &str) -> String {
    let entry = |set: &&tables::Set| format!("{} = {}", set.name, set.toml);
    let is_second = |set: &&tables::Set| set.name == "SO_BINDTODEVICE";
    let first = table(SETS.iter().filter(|set| !is_second(set)).map(|set| entry(&set)));
    let second = table(SETS.iter().filter(is_second).map(|set| entry(&set)));
    let rule = |sets| format!("[[rule]]\n{matching}on_conflict = \"{on_conflict}\"\nset = {{ {sets} }}\n");
    rule(first) + &rule(second)
}

fn limit_policy(matching: &str, on_conflict: &str) -> String {
    let limits = table(LIMITS.iter().map(|limit| format!("{} = {}", limit.name, limit.toml)));
    format!("[[rule]]\n{matching}on_conflict = \"{on_conflict}\"\nlimit = {{ {limits} }}\n")
}

fn deny_policy(matching: &str, options: &[Listed]) -> String {
    let denied = options.iter().filter(|option| option.can.contains("deny"));
    let denied = table(denied.map(|option| format!("{:?}", option.option)));
    format!("[[rule]]\n{matching}deny = [{denied}]\n")
}

#[test]
fn tables_of_the_differential_test_are_complete() {
    let options = options();
    let that_can = |what: &str| -> BTreeSet<String> {
        options.iter().filter(|option| option.can.contains(what)).map(|option| option.option.clone()).collect()
    };
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(that_can("set"), names(&mut SETS.iter().map(|set| set.name)));
    let limited = LIMITS.iter().map(|limit| limit.name).chain(NOT_LIMITED.iter().copied());
    assert_eq!(that_can("limit"), names(&mut limited.into_iter()));
}

/// Without a policy, under policies for other sockets or options, and in a dry run, all calls have the same effects.
#[test]
fn uncovered_calls_behave_as_without_a_policy() {
    let options = options();
    let trial = Trial::new(&options, Agreeing::Nothing, "root");
    assert_kinds(&trial);
    let again = trial.run(None, &[]);
    trial.assert("no policy, twice", &again, |case, before, outcome| trial.same(case, before, outcome));
    // A rule about a peer may still match a socket without a peer, so its limit or deny can apply already. No rule
    // here is about a peer.
    let elsewhere = "match = { protocol = \"sctp\" }\n";
    let other_sockets =
        [set_policy(elsewhere, "rewrite"), limit_policy(elsewhere, "rewrite"), deny_policy(elsewhere, &options)];
    for (what, text, arguments) in [
        ("other options", "[[rule]]\ndeny = [\"6:77\"]\nset = { TCP_BPF_IW = 10 }\n".to_owned(), &[][..]),
        (
            "other options, with an audit of all calls",
            "[audit]\ncalls = \"all\"\nreads = true\n[[rule]]\ndeny = [\"6:77\"]\n".to_owned(),
            &[],
        ),
        ("other sockets", other_sockets.concat(), &["--audit-backend", "none"]),
        ("dry run of set", set_policy("", "rewrite"), &["--dry-run"]),
        ("dry run of limit", limit_policy("", "rewrite"), &["--dry-run"]),
        ("dry run of deny", deny_policy("", &options), &["--dry-run"]),
    ] {
        let outcomes = trial.run(Some(&PolicyFile::new(text)), arguments);
        trial.assert(what, &outcomes, |case, before, outcome| trial.same(case, before, outcome));
    }
}

/// Checks which kinds of sockets the kernel lacks. Each case reports that.
fn assert_kinds(trial: &Trial) {
    let mut lacking = BTreeSet::new();
    for (case, outcome) in trial.case_set.cases.iter().zip(&trial.baseline) {
        if outcome.result <= NO_SOCKET && case.state == 0 {
            lacking.insert(KINDS[case.kind as usize].0);
        }
    }
    let may_lack = ["udplite4", "udplite6", "mptcp4", "mptcp6"];
    assert!(lacking.iter().all(|kind| may_lack.contains(kind)), "no sockets of {lacking:?}");
    if !lacking.is_empty() {
        // Not eprintln, whose output libtest captures.
        let _ = writeln!(io::stderr(), "not compared: this kernel has no sockets of {lacking:?}");
    }
}

#[test]
fn set_value_stays_whatever_the_application_calls() {
    let trial = Trial::new(&options(), Agreeing::Sets, "root");
    for on_conflict in ["rewrite", "ignore", "deny"] {
        let policy = PolicyFile::new(set_policy("", on_conflict));
        let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
        trial.assert(&format!("set, {on_conflict}"), &outcomes, |case, before, outcome| {
            trial.common(case, before, outcome, on_conflict)?;
            trial.shown(case, outcome, |key, before, after| {
                let sets = SETS.iter().filter_map(|set| Some((set.shown?, set.mask)));
                let mut wanted = sets.filter(|((shown, _), _)| *shown == key);
                wanted.all(|((_, value), mask)| {
                    let is_it = |seen: &Observation| seen.number().is_some_and(|number| (number ^ value) & mask == 0);
                    is_it(after) || !is_it(before) && before == after
                })
            })
        });
    }
}

/// With `on_conflict = "allow"`, the application's value is effective.
#[test]
fn allowed_call_has_the_same_effect_as_without_a_policy() {
    let trial = Trial::new(&options(), Agreeing::Nothing, "root");
    let policy = PolicyFile::new(set_policy("", "allow"));
    let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
    trial.assert("set, allow", &outcomes, |case, before, outcome| {
        trial.common(case, before, outcome, "allow")?;
        if case.reads != 0 || case.state != state::FRESH || DEVICES.contains(&case.key) {
            return Ok(());
        }
        let is_lost = |at: &usize| before.after[*at] != before.before[*at] && outcome.after[*at] != before.after[*at];
        match lost(&trial, case, is_lost) {
            Some(key) => Err(format!("{key:?} shows {:?}, not {:?}", outcome.after, before.after)),
            None => Ok(()),
        }
    });
}

fn lost(trial: &Trial, case: &Case, is_lost: impl Fn(&usize) -> bool) -> Option<Key> {
    trial.observers(case).find(|(at, key)| !VOLATILE.contains(key) && is_lost(at)).map(|(_, key)| key)
}

/// A policy gives an unprivileged caller no value except the policy's own.
#[test]
fn unprivileged_caller_gains_no_values() {
    let trial = Trial::new(&options(), Agreeing::Sets, "nobody");
    let masked = set_policy("", "rewrite").replace("SO_MARK = 0x21", "SO_MARK = \"0x21/0xff\"");
    let policy = PolicyFile::new(&masked);
    let outcomes = trial.run(Some(&policy), &["--dry-run"]);
    trial.assert("dry run", &outcomes, |case, before, outcome| trial.same(case, before, outcome));
    let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
    trial.assert("set", &outcomes, |case, before, outcome| {
        if !is_governed_kind(case) || before.result <= NO_SOCKET {
            return trial.same(case, before, outcome);
        }
        for (at, key) in trial.observers(case).filter(|(_, key)| case.reads == 0 && !VOLATILE.contains(key)) {
            let after = &outcome.after[at];
            let mask = if key == (SOCKET, 36) { 0xff } else { -1 };
            let mut values = SETS.iter().filter_map(|set| set.shown).filter(|(shown, _)| *shown == key);
            let is_policys = values.any(|(_, value)| {
                let others = outcome.before[at].number().unwrap_or_default() & !mask;
                after.number() == Some(value & mask | others)
            });
            let is_own = *after == outcome.before[at] || *after == before.after[at];
            // A covered value need not be the kernel's in two cases: the application owns the two low bits of DSCP,
            // and SO_BUF_LOCK shows that the policy has locked the buffers.
            if !is_own && !is_policys && !is_dscp(key, after) && key != (SOCKET, 72) {
                return Err(format!("result {}, {key:?} shows {after:?}, not {:?}", outcome.result, before.after[at]));
            }
        }
        Ok(())
    });
}

fn is_dscp(key: Key, seen: &Observation) -> bool {
    let mut values = SETS.iter().filter(|set| set.mask == 0xfc).filter_map(|set| set.shown);
    values.any(|(shown, value)| shown == key && seen.number().is_some_and(|number| number & 0xfc == value))
}

#[test]
fn value_stays_within_a_limit_whatever_the_application_calls() {
    let trial = Trial::new(&options(), Agreeing::Limits, "root");
    for on_conflict in ["rewrite", "ignore", "deny"] {
        let policy = PolicyFile::new(limit_policy("", on_conflict));
        let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
        trial.assert(&format!("limit, {on_conflict}"), &outcomes, |case, before, outcome| {
            trial.common(case, before, outcome, on_conflict)?;
            trial.shown(case, outcome, |key, before, after| {
                let mut limits = LIMITS.iter().filter(|limit| limit.shown == key);
                limits.all(|limit| {
                    let is_within = |seen: &Observation| {
                        limit.scale.of(seen).is_none_or(|scale| (limit.range.0..=limit.range.1).contains(&scale))
                    };
                    is_within(after) || !is_within(before) && before == after
                })
            })
        });
    }
}

#[test]
fn denied_call_fails_with_any_argument() {
    let options = options();
    let trial = Trial::new(&options, Agreeing::Nothing, "root");
    let policy = PolicyFile::new(deny_policy("", &options));
    let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
    trial.assert("deny", &outcomes, |case, before, outcome| {
        let is_denied = case.reads == 0 && case.len >= 0 && is_governed_kind(case) && is_named(&options, case.key);
        if !is_denied || before.result <= NO_SOCKET {
            return trial.same(case, before, outcome);
        }
        if (outcome.result, outcome.is_changed) != (EPERM, 0) {
            return Err(format!("result {}, memory changed {}", outcome.result, outcome.is_changed));
        }
        trial.shown(case, outcome, |key, before, after| before == after || VOLATILE.contains(&key))
    });
}

impl Trial {
    /// Returns an error for effects that no policy of the test may have.
    fn common(&self, case: &Case, before: &Outcome, outcome: &Outcome, on_conflict: &str) -> Result<(), String> {
        if !is_governed_kind(case) || before.result <= NO_SOCKET {
            return self.same(case, before, outcome);
        }
        if is_refused_room(case, outcome) {
            return Ok(());
        }
        // The policy makes these values longer: the name of a device, and a SYN that the kernel has saved.
        let is_longer = case.reads != 0 && [(SOCKET, 25), (TCP, 28)].contains(&case.key);
        let is_failed = before.result >= 0 && outcome.result < 0 && !is_longer;
        let is_denied = on_conflict == "deny" && outcome.result == EPERM;
        // The kernel rejects another device for a socket that the policy has bound to a device.
        let is_device = DEVICES.contains(&case.key) && outcome.result == -libc::EINVAL;
        if is_failed && !is_denied && !is_device {
            return Err(format!("result {}, not {}", outcome.result, before.result));
        }
        if before.is_changed != outcome.is_changed {
            return Err(format!("memory changed {}, not {}", outcome.is_changed, before.is_changed));
        }
        // For UDP_ENCAP, ENOPROTOOPT refers to the value.
        let is_about_value = matches!(case.key, (UDP | UDP_LITE, 100));
        let is_unknown = [-libc::ENOPROTOOPT, -libc::EOPNOTSUPP].contains(&before.result) && !is_about_value;
        if is_unknown && outcome.result != before.result && on_conflict == "rewrite" {
            return Err(format!("result {}, not {}", outcome.result, before.result));
        }
        Ok(())
    }

    /// Returns an error for an observer whose values before and after the call `is_right` rejects.
    fn shown(
        &self,
        case: &Case,
        outcome: &Outcome,
        is_right: impl Fn(Key, &Observation, &Observation) -> bool,
    ) -> Result<(), String> {
        if case.reads != 0 || !is_governed_kind(case) {
            return Ok(());
        }
        for (at, key) in self.observers(case) {
            let (before, after) = (&outcome.before[at], &outcome.after[at]);
            // TCP_REPAIR, for which the kernel requires CAP_NET_ADMIN, sets SO_REUSEADDR. A policy sets it again at
            // bind and connect.
            let is_repair = case.key == (TCP, 19) && key == (SOCKET, 2) && outcome.result == 0;
            if !is_right(key, before, after) && !is_repair {
                return Err(format!("result {}, {key:?} shows {after:?}, before {before:?}", outcome.result));
            }
        }
        Ok(())
    }
}
