//! Policies that change while they are in force: at once, as a whole or not at all.

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
    agent::Run,
    cgroup::Cgroup,
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT},
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::{Running, workload},
    script::{Family, Kind},
    wait,
};

/// The mark that a new socket has.
fn mark(probe: &mut Probe) -> i32 {
    probe.fresh(SO_MARK)
}

/// Puts a file in the place of another, as editors do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn file_that_is_changed_is_put_in_force() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::started(&policy, &[]);
    let mut probe = Probe::start(&target);
    assert_eq!(mark(&mut probe), 1);
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
fn hooks_options_and_targets_of_the_new_policy_take_the_place_of_the_old() {
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(sets_mark(&one, 1));
    let run = Run::started(&policy, &[]);
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
    // A call that the old policy judged, and one that the new one does.
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
fn hangup_has_the_files_read_and_says_so_also_where_nothing_is_new() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let run = Run::started(&policy, &[]);
    run.signal(Signal::SIGHUP);
    assert_eq!(run.notice("reload", 1)["in_force"], true);
    assert_eq!(mark(&mut Probe::start(&target)), 1);
    run.finish();
}

#[test]
fn what_is_no_valid_set_of_policies_leaves_the_old_one_in_force() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let valid = policy.add("z.toml", sets_mark(&target, 5));
    let run = Run::of(policy.folder(), &[]);
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
        // A folder that lacks one of its policies is a valid set. It may be seen, or the two changes as one.
        let before = run.notices("reload").len();
        spoil();
        let is_refused = || run.notices("reload")[before..].iter().any(|notice| notice["in_force"] == false);
        assert!(wait::until(wait::PATIENCE, is_refused), "{count}");
        assert!(wait::until(wait::PATIENCE, || run.stderr().contains(complaint)), "{complaint}: {}", run.stderr());
        assert!([1, 5].contains(&mark(&mut probe)), "{complaint}");
    }
    remove();
    fs::remove_file(valid).unwrap();
    let count = run.notices("reload").len();
    fs::write(path, sets_mark(&target, 7)).unwrap();
    run.notice("reload", count + 1);
    assert!(wait::until(wait::PATIENCE, || mark(&mut probe) == 7));
    run.finish();
}

#[test]
fn files_of_a_folder_come_and_go_and_decide_by_their_names() {
    let target = Cgroup::new();
    let policy = PolicyFile::named("m.toml", sets_mark(&target, 1));
    let run = Run::of(policy.folder(), &[]);
    let mut probe = Probe::start(&target);
    policy.add("z.toml", sets_mark(&target, 2));
    assert_eq!(run.notice("reload", 1)["policies"], json!(["m", "z"]));
    assert_eq!(mark(&mut probe), 1);
    let first = policy.add("a.toml", sets_mark(&target, 3));
    assert_eq!(run.notice("reload", 2)["policies"], json!(["a", "m", "z"]));
    assert_eq!(mark(&mut probe), 3);
    // Neither of these is a policy.
    policy.add(".hidden.toml", "garbage");
    policy.add("notes.txt", "garbage");
    fs::remove_file(first).unwrap();
    assert_eq!(run.notice("reload", 3)["policies"], json!(["m", "z"]));
    assert_eq!(mark(&mut probe), 1);
    run.finish();
}

#[test]
fn swap_of_a_config_map_is_seen() {
    let target = Cgroup::new();
    let policy = PolicyFile::named("unused", "");
    // As kubelet does (pkg/volume/util/atomic_writer.go): the files are links through one that is replaced.
    let version = |number: i32| {
        let folder = policy.folder().join(format!("..{number}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("mark.toml"), sets_mark(&target, number)).unwrap();
        symlink(format!("..{number}"), policy.folder().join("..data_tmp")).unwrap();
        fs::rename(policy.folder().join("..data_tmp"), policy.folder().join("..data")).unwrap();
    };
    version(1);
    symlink("..data/mark.toml", policy.folder().join("mark.toml")).unwrap();
    for named in [policy.folder().to_owned(), policy.folder().join("mark.toml")] {
        let run = Run::of(&named, &[]);
        let mut probe = Probe::start(&target);
        let before = mark(&mut probe);
        version(before + 1);
        run.notice("reload", 1);
        assert_eq!(mark(&mut probe), before + 1);
        fs::remove_dir_all(policy.folder().join(format!("..{before}"))).unwrap();
        run.finish();
    }
}

/// Values that the workload's options have under a policy.
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
fn no_socket_has_a_mixture_of_policies_that_flip_all_the_time() {
    const FLIPS: usize = 12;
    let target = Cgroup::new();
    let policy = PolicyFile::new(flipping(&target, "odd"));
    let run = Run::started(&policy, &[]);
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
