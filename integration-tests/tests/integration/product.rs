//! The differential test of calls: each option, under each of its names, on each kind of socket, with arguments of each length.
//!
//! The oracle is the kernel without a policy: what a policy is not about has the same result, errno, lengths, memory and values.
//! What a policy is about ends up within the policy, by the getsockopt of the owner.
//!
//! One of so many cases runs, and all that are the only ones of their option, name and kind of socket. `SOCKPOLICY_PRODUCT` in the
//! environment says of how many: 1 asks for all, some five million under all policies together. `make vm-test` asks for one of 24, which
//! are over a million calls on each kernel.
//!
//! Effects that every program on a hook has, whatever the program does (kernel/bpf/cgroup.c):
//!
//! - `__cgroup_bpf_run_filter_setsockopt` copies the argument first. An argument that extends past mapped memory fails with EFAULT,
//!   and so does NULL with a length where SOL_IPV6 and MPTCP accept it. The memory of all arguments here is mapped.
//! - `__cgroup_bpf_run_filter_getsockopt` refuses a negative room with EINVAL, whatever the handler said of it.

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
    policy::PolicyFile,
    process,
    product::{Case, KINDS, Key, NO_SOCKET, NOBODY, Outcome, Product, Seen, state},
};

use self::{
    cases::{Agreeing, Listed, describe, is_governed_kind, is_named, product},
    tables::{DEVICES, LIMITS, NOT_LIMITED, SETS, SOCKET, TCP, UDP, UDP_LITE, VOLATILE},
};
use crate::{stderr, stdout};

const EPERM: i32 = -libc::EPERM;

/// Of how many cases one runs.
fn sample() -> u32 {
    const DEFAULT: u32 = 96;
    env::var("SOCKPOLICY_PRODUCT").map_or(DEFAULT, |one_of| one_of.parse().unwrap())
}

fn options() -> Vec<Listed> {
    let listed = stdout(&agent::output(&["options", "--output", "json"]));
    listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A product in a file, and what comes of it without a policy.
struct Trial {
    product: Product,
    /// Where the files are.
    files: PolicyFile,
    /// Who makes the calls: `root` or `nobody`.
    user: &'static str,
    baseline: Vec<Outcome>,
}

impl Trial {
    fn new(options: &[Listed], agreeing: Agreeing, user: &'static str) -> Self {
        let product = product(options, agreeing, sample());
        let files = PolicyFile::new("");
        files.add("spec", product.encode());
        let mut trial = Self { product, files, user, baseline: Vec::new() };
        trial.baseline = trial.run(None, &[]);
        trial
    }

    /// What comes of all cases, under a policy if there is one.
    fn run(&self, policy: Option<&PolicyFile>, arguments: &[&str]) -> Vec<Outcome> {
        let path = |name: &str| self.files.folder().join(name).display().to_string();
        let (spec, out) = (path("spec"), path("out"));
        let workload = [&process::workload(), "product", &spec, &out, self.user];
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
        assert_eq!(outcomes.len(), self.product.cases.len());
        outcomes
    }

    /// The cases for which a judge complains of what came of them, each with the complaint.
    #[track_caller]
    fn assert(
        &self,
        what: &str,
        outcomes: &[Outcome],
        judge: impl Fn(&Case, &Outcome, &Outcome) -> Result<(), String>,
    ) {
        let mut complaints: BTreeMap<(Key, i32), (usize, String)> = BTreeMap::new();
        let mut count = 0;
        for ((case, before), outcome) in self.product.cases.iter().zip(&self.baseline).zip(outcomes) {
            if let Err(complaint) = judge(case, before, outcome) {
                count += 1;
                let entry = complaints.entry((case.key, case.kind)).or_default();
                entry.0 += 1;
                if entry.1.is_empty() {
                    entry.1 = format!("{}: {complaint}", describe(&self.product, case));
                }
            }
        }
        let list: Vec<String> =
            complaints.values().take(60).map(|(count, example)| format!("{count} such as {example}")).collect();
        assert!(count == 0, "{what}: {count} of {} cases\n{}", outcomes.len(), list.join("\n"));
    }

    fn observers(&self, case: &Case) -> impl Iterator<Item = (usize, Key)> {
        let keys = self.product.observers[case.observers as usize];
        keys.into_iter().enumerate().filter(|(_, key)| *key != NOBODY)
    }

    /// Complains unless all that can be seen is as it is without a policy.
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

/// Whether the kernel has refused a negative room because there is a program on cgroup/getsockopt.
fn is_refused_room(case: &Case, outcome: &Outcome) -> bool {
    case.reads != 0 && case.len < 0 && outcome.result == -libc::EINVAL
}

/// Runs a command to its end, however long that takes.
#[track_caller]
fn run(mut command: Command) {
    let home = Cgroup::new();
    home.enclose(&mut command);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}: {}", output.status, stderr(&output));
}

fn table(entries: impl Iterator<Item = String>) -> String {
    entries.collect::<Vec<_>>().join(", ")
}

/// Which rule a setting is in: one device has two names, and a rule can have one of these.
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
fn tables_of_this_test_are_complete() {
    let options = options();
    let that_can = |what: &str| -> BTreeSet<String> {
        options.iter().filter(|option| option.can.contains(what)).map(|option| option.option.clone()).collect()
    };
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(that_can("set"), names(&mut SETS.iter().map(|set| set.name)));
    let limited = LIMITS.iter().map(|limit| limit.name).chain(NOT_LIMITED.iter().copied());
    assert_eq!(that_can("limit"), names(&mut limited.into_iter()));
}

/// No policy, a policy about other sockets or other options, and a dry run: the calls cannot tell which.
#[test]
fn calls_that_no_policy_governs_are_as_without_one() {
    let options = options();
    let trial = Trial::new(&options, Agreeing::Nothing, "root");
    assert_kinds(&trial);
    let again = trial.run(None, &[]);
    trial.assert("no policy, twice", &again, |case, before, outcome| trial.same(case, before, outcome));
    // A rule about a peer may yet match a socket that has none: there a limit or a deny can hold already.
    let elsewhere = "match = { protocol = \"sctp\" }\n";
    let other_sockets =
        [set_policy(elsewhere, "rewrite"), limit_policy(elsewhere, "rewrite"), deny_policy(elsewhere, &options)];
    for (what, text, arguments) in [
        ("other options", "[[rule]]\ndeny = [\"6:77\"]\nset = { TCP_BPF_IW = 10 }\n".to_owned(), &[][..]),
        (
            "other options, seen by the audit of all",
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

/// Kinds of sockets that a kernel may lack: it says so for each case.
fn assert_kinds(trial: &Trial) {
    let mut lacking = BTreeSet::new();
    for (case, outcome) in trial.product.cases.iter().zip(&trial.baseline) {
        if outcome.result <= NO_SOCKET && case.state == 0 {
            lacking.insert(KINDS[case.kind as usize].0);
        }
    }
    let may_lack = ["udplite4", "udplite6", "mptcp4", "mptcp6"];
    assert!(lacking.iter().all(|kind| may_lack.contains(kind)), "no sockets of {lacking:?}");
    if !lacking.is_empty() {
        // Not by eprintln, which the test harness keeps to itself.
        let _ = writeln!(io::stderr(), "not compared, for this kernel has none: sockets of {lacking:?}");
    }
}

#[test]
fn value_that_a_policy_sets_stays_whatever_is_called() {
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
                    let is_it = |seen: &Seen| seen.number().is_some_and(|number| (number ^ value) & mask == 0);
                    is_it(after) || !is_it(before) && before == after
                })
            })
        });
    }
}

/// Where the application may win, it does.
#[test]
fn value_that_an_application_may_change_is_what_the_kernel_makes_of_it() {
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

/// A caller without rights has from a policy no value but the policy's own.
#[test]
fn unprivileged_caller_gains_nothing() {
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
            // A governed value is not the kernel's, but where the two low bits of DSCP are the application's.
            // SO_BUF_LOCK: the buffers that the policy sets are locked.
            if !is_own && !is_policys && !is_dscp(key, after) && key != (SOCKET, 72) {
                return Err(format!("result {}, {key:?} shows {after:?}, not {:?}", outcome.result, before.after[at]));
            }
        }
        Ok(())
    });
}

fn is_dscp(key: Key, seen: &Seen) -> bool {
    let mut values = SETS.iter().filter(|set| set.mask == 0xfc).filter_map(|set| set.shown);
    values.any(|(shown, value)| shown == key && seen.number().is_some_and(|number| number & 0xfc == value))
}

#[test]
fn value_stays_within_a_limit_whatever_is_called() {
    let trial = Trial::new(&options(), Agreeing::Limits, "root");
    for on_conflict in ["rewrite", "ignore", "deny"] {
        let policy = PolicyFile::new(limit_policy("", on_conflict));
        let outcomes = trial.run(Some(&policy), &["--audit-backend", "none"]);
        trial.assert(&format!("limit, {on_conflict}"), &outcomes, |case, before, outcome| {
            trial.common(case, before, outcome, on_conflict)?;
            trial.shown(case, outcome, |key, before, after| {
                let mut limits = LIMITS.iter().filter(|limit| limit.shown == key);
                limits.all(|limit| {
                    let is_within = |seen: &Seen| {
                        limit.worth.of(seen).is_none_or(|worth| (limit.range.0..=limit.range.1).contains(&worth))
                    };
                    is_within(after) || !is_within(before) && before == after
                })
            })
        });
    }
}

#[test]
fn denied_call_fails_whatever_its_argument() {
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
    /// Complains of what no policy of the test may do.
    fn common(&self, case: &Case, before: &Outcome, outcome: &Outcome, on_conflict: &str) -> Result<(), String> {
        if !is_governed_kind(case) || before.result <= NO_SOCKET {
            return self.same(case, before, outcome);
        }
        if is_refused_room(case, outcome) {
            return Ok(());
        }
        // What the policy sets is longer than nothing: the name of a device, or a SYN that the kernel has saved.
        let is_longer = case.reads != 0 && [(SOCKET, 25), (TCP, 28)].contains(&case.key);
        let is_failed = before.result >= 0 && outcome.result < 0 && !is_longer;
        let is_denied = on_conflict == "deny" && outcome.result == EPERM;
        // Of a socket that the policy has bound to a device, the kernel refuses another choice of a device.
        let is_device = DEVICES.contains(&case.key) && outcome.result == -libc::EINVAL;
        if is_failed && !is_denied && !is_device {
            return Err(format!("result {}, not {}", outcome.result, before.result));
        }
        if before.is_changed != outcome.is_changed {
            return Err(format!("memory changed {}, not {}", outcome.is_changed, before.is_changed));
        }
        // UDP_ENCAP: ENOPROTOOPT is about the value.
        let is_about_value = matches!(case.key, (UDP | UDP_LITE, 100));
        let is_unknown = [-libc::ENOPROTOOPT, -libc::EOPNOTSUPP].contains(&before.result) && !is_about_value;
        if is_unknown && outcome.result != before.result && on_conflict == "rewrite" {
            return Err(format!("result {}, not {}", outcome.result, before.result));
        }
        Ok(())
    }

    /// Complains of an observer with which `is_right` does not agree: what it showed before the call and after.
    fn shown(
        &self,
        case: &Case,
        outcome: &Outcome,
        is_right: impl Fn(Key, &Seen, &Seen) -> bool,
    ) -> Result<(), String> {
        if case.reads != 0 || !is_governed_kind(case) {
            return Ok(());
        }
        for (at, key) in self.observers(case) {
            let (before, after) = (&outcome.before[at], &outcome.after[at]);
            // TCP_REPAIR, for which the kernel asks CAP_NET_ADMIN, sets SO_REUSEADDR. A policy sets it again at bind and connect.
            let is_repair = case.key == (TCP, 19) && key == (SOCKET, 2) && outcome.result == 0;
            if !is_right(key, before, after) && !is_repair {
                return Err(format!("result {}, {key:?} shows {after:?}, before {before:?}", outcome.result));
            }
        }
        Ok(())
    }
}
