//! Policies that change while they are in force: changes apply at once and completely, or not at all.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::json;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    bpf_objects::BpfObjects,
    cgroup::Cgroup,
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT},
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::{Running, workload},
    script::{Family, Kind},
    wait,
};

/// Returns the mark of a new socket.
fn mark(probe: &mut Probe) -> i32 {
    probe.value_on_new_socket(SO_MARK)
}

/// Replaces a file by renaming, as editors do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn changed_file_is_put_in_force() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::start_with(&policy, &[]);
    let mut probe = Probe::start(&target);
    assert_eq!(mark(&mut probe), 1);
    let lines = run.lines();
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((&first["event"], &first["targets"]), (&json!("started"), &json!([target.name()])));
    assert_eq!((&first["policies"], &first["mode"]), (&json!(["policy"]), &json!("enforce")));
    fs::write(policy.path(), sets_mark(&target, 2)).unwrap();
    let notice = run.notice("reload", 1);
    assert_eq!((&notice["in_force"], &notice["policies"]), (&json!(true), &json!(["policy"])));
    assert_eq!(mark(&mut probe), 2);
    replace(policy.path(), &sets_mark(&target, 3));
    run.notice("reload", 2);
    assert_eq!(mark(&mut probe), 3);
    let report = run.finish();
    let lines: Vec<_> = report.summary.settings.iter().map(|line| (line.wanted.as_u64(), line.sockets.set)).collect();
    assert_eq!(lines, [(Some(1), 1), (Some(2), 1), (Some(3), 1)]);
}

#[test]
fn hooks_options_and_targets_of_the_new_policy_replace_the_old_ones() {
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(sets_mark(&one, 1));
    let run = Run::start_with(&policy, &[]);
    let (mut in_one, mut in_other) = (Probe::start(&one), Probe::start(&other));
    let text =
        format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ TCP_KEEPCNT = 3, SO_PRIORITY = 2 }}\n", other.name());
    replace(policy.path(), &text);
    assert_eq!(run.notice("reload", 1)["targets"], json!([other.name()]));
    assert_eq!((mark(&mut in_one), mark(&mut in_other)), (0, 0));
    let pair = in_other.pair(Family::Inet, Kind::Tcp);
    for socket in [pair.client, pair.server] {
        assert_eq!((in_other.int(socket, TCP_KEEPCNT), in_other.int(socket, SO_PRIORITY)), (3, 2));
    }
    // A call that the old policy judged, and a call that the new policy judges.
    let socket = in_one.open(Family::Inet, Kind::Tcp);
    in_one.set(socket, SO_MARK, 9).unwrap();
    assert_eq!(in_one.int(socket, SO_MARK), 9);
    in_other.set(pair.client, TCP_KEEPCNT, 9).unwrap();
    assert_eq!(in_other.int(pair.client, TCP_KEEPCNT), 3);
    let report = run.finish();
    assert_eq!(report.verdicts("TCP_KEEPCNT"), ["rewritten"]);
    assert_eq!(report.summary.conflicts, 1);
}

#[test]
fn sighup_reloads_unchanged_files_and_reports_it() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::start_with(&policy, &[]);
    run.signal(Signal::SIGHUP);
    assert_eq!(run.notice("reload", 1)["in_force"], true);
    assert_eq!(mark(&mut Probe::start(&target)), 1);
    run.finish();
}

#[test]
fn invalid_policies_leave_the_old_ones_in_force() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let valid = policy.add("z.toml", sets_mark(&target, 5));
    let run = Run::on_path(policy.dir(), &[]);
    let mut probe = Probe::start(&target);
    let path = policy.path();
    let remove = || drop(fs::remove_file(path).or_else(|_| fs::remove_dir(path)));
    let bad: [(&dyn Fn(), &str); 6] = [
        (&|| fs::write(path, "garbage").unwrap(), "key with no value"),
        (&|| fs::write(path, sets_mark(&target, 2).replace("SO_MARK", "SO_MRAK")).unwrap(), "SO_MRAK"),
        (&|| fs::create_dir(path).unwrap(), "is a directory"),
        (&|| mkfifo(path, Mode::S_IRWXU).unwrap(), "is a pipe"),
        (&|| symlink(path, path).unwrap(), "too many symbolic links"),
        (
            &|| fs::write(path, "name = \"z\"\n".to_owned() + &sets_mark(&target, 2)).unwrap(),
            "two policies have the name",
        ),
    ];
    for ((spoil, complaint), count) in bad.into_iter().zip(1..) {
        remove();
        // A directory without one of its policies is valid. The agent may see it, or both changes as one.
        let before = run.notices("reload").len();
        spoil();
        let is_refused = || {
            let reloads = run.notices("reload");
            reloads[before..].iter().any(|reload| {
                reload["in_force"] == false && reload["error"].as_str().is_some_and(|error| error.contains(complaint))
            })
        };
        assert!(wait::until(wait::TIMEOUT, is_refused), "{count}");
        assert!(wait::until(wait::TIMEOUT, || run.stderr().contains(complaint)), "{complaint}: {}", run.stderr());
        assert!([1, 5].contains(&mark(&mut probe)), "{complaint}");
        let instance = format!("run-{}", run.pid());
        let status = agent::output(&["status", "-o", "json", "--instance", &instance]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        let error = status["reload"]["error"].as_str().unwrap_or_default();
        assert!(error.contains(complaint), "{complaint}: {status}");
    }
    remove();
    fs::remove_file(valid).unwrap();
    let count = run.notices("reload").len();
    fs::write(path, sets_mark(&target, 7)).unwrap();
    run.notice("reload", count + 1);
    assert!(wait::until(wait::TIMEOUT, || mark(&mut probe) == 7));
    run.finish();
}

#[test]
fn files_of_a_directory_can_be_added_and_removed_and_their_names_decide() {
    let target = Cgroup::new();
    let policy = PolicyFile::named("m.toml", sets_mark(&target, 1));
    let run = Run::on_path(policy.dir(), &[]);
    let mut probe = Probe::start(&target);
    policy.add("z.toml", sets_mark(&target, 2));
    assert_eq!(run.notice("reload", 1)["policies"], json!(["m", "z"]));
    assert_eq!(mark(&mut probe), 1);
    let first = policy.add("a.toml", sets_mark(&target, 3));
    assert_eq!(run.notice("reload", 2)["policies"], json!(["a", "m", "z"]));
    assert_eq!(mark(&mut probe), 3);
    // These files are not policies.
    policy.add(".hidden.toml", "garbage");
    policy.add("notes.txt", "garbage");
    fs::remove_file(first).unwrap();
    assert_eq!(run.notice("reload", 3)["policies"], json!(["m", "z"]));
    assert_eq!(mark(&mut probe), 1);
    run.finish();
}

/// GitOps tools create the directory before its files, and may remove the last file.
#[test]
fn run_waits_in_an_empty_directory_and_goes_on_without_the_last_file() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 7));
    fs::remove_file(policy.path()).unwrap();
    let run = Run::on_path(policy.dir(), &[]);
    assert!(run.stderr().contains("waiting for a policy"), "{}", run.stderr());
    let mut probe = Probe::start(&target);
    assert_eq!((mark(&mut probe), BpfObjects::of(run.pid()).links.len()), (0, 0));
    for round in 1..=2 {
        fs::write(policy.path(), sets_mark(&target, 7)).unwrap();
        run.notice("reload", 2 * round - 1);
        assert_eq!(mark(&mut probe), 7);
        fs::remove_file(policy.path()).unwrap();
        run.notice("reload", 2 * round);
        assert_eq!((mark(&mut probe), BpfObjects::of(run.pid()).links.len()), (0, 0));
    }
    let report = run.finish();
    assert_eq!((report.summary.policies.len(), report.summary.targets.len()), (0, 0));
}

#[test]
fn update_of_a_config_map_is_detected() {
    let target = Cgroup::new();
    let policy = PolicyFile::named("unused", "");
    // Like the kubelet (pkg/volume/util/atomic_writer.go): the files are links through a link that is replaced.
    let version = |number: i32| {
        let dir = policy.dir().join(format!("..{number}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("mark.toml"), sets_mark(&target, number)).unwrap();
        symlink(format!("..{number}"), policy.dir().join("..data_tmp")).unwrap();
        fs::rename(policy.dir().join("..data_tmp"), policy.dir().join("..data")).unwrap();
    };
    version(1);
    symlink("..data/mark.toml", policy.dir().join("mark.toml")).unwrap();
    for named in [policy.dir().to_owned(), policy.dir().join("mark.toml")] {
        let run = Run::on_path(&named, &[]);
        let mut probe = Probe::start(&target);
        let before = mark(&mut probe);
        version(before + 1);
        run.notice("reload", 1);
        assert_eq!(mark(&mut probe), before + 1);
        fs::remove_dir_all(policy.dir().join(format!("..{before}"))).unwrap();
        run.finish();
    }
}

/// Returns the values of the options of `workload connections` under a policy.
fn values(policy: &str) -> [&str; 6] {
    match policy {
        "odd" => ["1", "1", "101", "11", "1", "10001"],
        _ => ["2", "2", "102", "12", "2", "10002"],
    }
}

fn flipping(target: &Cgroup, policy: &str) -> String {
    let [mark, priority, idle, count, syn, timeout] = values(policy);
    format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = {mark}, SO_PRIORITY = {priority}, TCP_KEEPIDLE = \"{idle}s\", \
         TCP_KEEPCNT = {count}, TCP_SYNCNT = {syn}, TCP_USER_TIMEOUT = \"{timeout}ms\" }}\n",
        target.name()
    )
}

#[test]
fn no_socket_has_a_mixture_of_alternating_policies() {
    const FLIPS: usize = 12;
    let target = Cgroup::new();
    let policy = PolicyFile::new(flipping(&target, "odd"));
    let run = Run::start_with(&policy, &[]);
    let mut command = Command::new(workload());
    command.arg("connections").stdin(Stdio::piped());
    let mut running = Running::start_in(command, target);
    running.lines(1);
    for flip in 1..=FLIPS {
        replace(policy.path(), &flipping(&running.home, if flip % 2 == 1 { "even" } else { "odd" }));
        run.notice("reload", flip);
    }
    running.close_stdin();
    let output = running.finish();
    assert!(output.status.success(), "{output:?}");
    let text = crate::stdout(&output);
    let seen: BTreeSet<(&str, Vec<&str>)> = text
        .lines()
        .skip(1)
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[0], words[1..7].to_vec())
        })
        .collect();
    let both = |which| ["odd", "even"].map(|policy| (which, values(policy).to_vec()));
    let expected: BTreeSet<_> = [both("accepted"), both("outbound")].concat().into_iter().collect();
    assert_eq!(seen, expected, "{text}");
    assert!(run.notices("reload").iter().all(|notice| notice["in_force"] == true));
    run.finish();
}
