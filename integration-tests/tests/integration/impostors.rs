//! Users who claim containers. A claim counts only for the user's own cgroups, and no claim stops the agent.

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use sockpolicy_integration_tests::{
    agent::Run,
    cgroup::Cgroup,
    container::{BareRuntime, Container, Rootless},
    impostor::{Disguise, Impostor, Tenant},
    options::SO_MARK,
    policy::PolicyFile,
    probe::Probe,
    process::{descriptors, is_alive},
    script::{Family, Kind},
    wait,
};

use crate::containers::planned;

const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

/// Returns whether this machine has FUSE, with which a user can block readers.
fn has_fuse() -> bool {
    Path::new("/dev/fuse").exists()
}

macro_rules! require_fuse {
    () => {
        if !has_fuse() {
            sockpolicy_integration_tests::kernels::skip(std::thread::current().name().unwrap_or("a test"), "/dev/fuse");
            return;
        }
    };
}

/// A time limit for commands that examine all containers, whatever users do. It is far longer than they take.
const AT_ONCE: Duration = Duration::from_secs(40);

/// A container that root runs, with a policy in force on it.
struct Victim {
    runtime: BareRuntime,
    container: Container,
    _policy: PolicyFile,
    run: Option<Run>,
}

impl Victim {
    fn new() -> Self {
        let runtime = BareRuntime::new();
        let container = runtime.run("victim");
        let policy = PolicyFile::new(format!(
            "[target]\ncontainer = {{ name = \"{}\" }}\n[[rule]]\nset = {{ SO_MARK = 32 }}\n",
            runtime.name("*")
        ));
        let run = Some(Run::start_with(&policy, &[]));
        Self { runtime, container, _policy: policy, run }
    }

    fn run(&self) -> &Run {
        self.run.as_ref().unwrap()
    }

    /// Asserts that the agent has examined all containers by now, and that the policy still covers the container.
    fn assert_covered(&mut self, name: &str) {
        let mut other = self.runtime.run(name);
        let is_covered = || {
            let fd = other.probe.open(Family::Inet, Kind::Tcp);
            let mark = other.probe.int(fd, SO_MARK);
            other.probe.close(fd);
            mark == 32
        };
        assert!(wait::until(AT_ONCE, is_covered), "{name}: {}", self.run().stderr());
        assert_eq!(self.container.probe.value_on_new_socket(SO_MARK), 32, "{name}: {}", self.run().stderr());
        for notice in self.run().notices("targets") {
            let removed = notice["removed"].as_array().unwrap();
            assert!(!removed.iter().any(|target| *target == self.container.cgroup), "{name}: {notice}");
        }
    }

    /// Asserts that `plan` also finds the container.
    fn assert_planned(&self, name: &str) {
        let target = format!("container = {{ name = \"{}\" }}", self.container.name);
        assert_eq!(planned(&target), [self.container.cgroup.as_str()], "{name}");
    }

    /// Asserts that the agent reloads its policies on SIGHUP.
    fn assert_reloads(&self) {
        let begun = Instant::now();
        let before = self.run().notices("reload").len();
        self.run().signal(Signal::SIGHUP);
        self.run().notice("reload", before + 1);
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }

    fn finish(mut self) {
        let begun = Instant::now();
        self.run.take().unwrap().finish();
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }
}

fn name_of(cgroup: &Cgroup) -> String {
    cgroup.path().file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn process_name_proves_no_container() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let id = victim.container.id.clone();
    let conmon = Disguise::conmon(&tenant, &id, &tenant.container_name());
    let pid = tenant.write("victim", &victim.container.pid.to_string()).display().to_string();
    let bundle = tenant.path("work").join(&id);
    fs::create_dir_all(&bundle).unwrap();
    tenant.write(&format!("work/{id}/init.pid"), &victim.container.pid.to_string());
    tenant.write(
        &format!("work/{id}/config.json"),
        &format!(r#"{{"annotations":{{"nerdctl/name":"{}"}}}}"#, tenant.container_name()),
    );
    let shim = Disguise { uid: tenant.uid, dir: bundle.clone(), ..Disguise::default() };
    let with_pid_of_victim = |disguise: &Disguise| {
        let mut arguments = disguise.arguments.clone();
        arguments[7].clone_from(&pid);
        Disguise { arguments, ..disguise.clone() }
    };
    for (name, disguise) in [
        ("program", conmon.clone()),
        ("comm", Disguise { program: "innocent".to_owned(), comm: Some("conmon".to_owned()), ..conmon.clone() }),
        ("pid-of-victim", with_pid_of_victim(&conmon)),
        ("shim", Disguise { program: "containerd-shim-runc-v2".to_owned(), ..shim.clone() }),
        ("shim-comm", Disguise { program: "innocent".to_owned(), comm: Some("containerd-shim".to_owned()), ..shim }),
    ] {
        let _impostor = disguise.start();
        victim.assert_covered(name);
        victim.assert_planned(name);
        assert!(planned(&tenant.selector()).is_empty(), "{name}");
    }
    victim.finish();
}

#[test]
fn claim_counts_only_for_a_cgroup_of_the_user() {
    let tenant = Tenant::new();
    let (own, other) = (tenant.cgroup("own"), tenant.home().child("other"));
    let claimed = |id: &str, cgroup: &Cgroup| {
        let _impostor = Disguise::conmon(&tenant, id, &tenant.container_name()).in_cgroup(cgroup.path()).start();
        planned(&tenant.selector())
    };
    // The id is the name of an ancestor.
    assert_eq!(claimed(&name_of(tenant.home()), &own), [own.name()]);
    assert!(claimed("2", &other).is_empty());

    // A cgroup of root, with a complete id.
    let named = tenant.home().child(&format!("libpod-{ID}.scope"));
    let below = named.child("below");
    tenant.chown_to(below.path());
    assert!(claimed(ID, &below).is_empty());
    tenant.chown_to(named.path());
    assert_eq!(claimed(ID, &below), [named.name()]);
}

/// Root in a container can be uid 0 of the initial user namespace.
#[test]
fn root_without_capabilities_claims_nothing() {
    let tenant = Tenant::new();
    let own = tenant.home().child("own");
    let claimed = |without_capabilities| {
        let conmon = Disguise::conmon(&tenant, "2", &tenant.container_name()).in_cgroup(own.path());
        let _impostor = Disguise { uid: 0, without_capabilities, ..conmon }.start();
        planned(&tenant.selector())
    };
    assert_eq!(claimed(false), [own.name()]);
    assert!(claimed(true).is_empty());
}

#[test]
fn claims_of_the_same_id_do_not_affect_each_other() {
    let tenant = Tenant::new();
    let cgroups = ["one", "two"].map(|name| tenant.cgroup(name));
    let claim = |cgroup: &Cgroup| {
        let pid_file = tenant.path(&name_of(cgroup));
        let mut disguise = Disguise::conmon(&tenant, "same", &tenant.container_name()).in_cgroup(cgroup.path());
        disguise.arguments[7] = pid_file.display().to_string();
        Disguise { pid_file: Some(pid_file), ..disguise }.start()
    };
    let _impostors: Vec<Impostor> = cgroups.iter().map(claim).collect();
    assert_eq!(planned(&tenant.selector()), cgroups.each_ref().map(Cgroup::name));
}

/// The cgroup belongs to the user, as a cgroup that systemd delegates does.
#[test]
fn container_of_a_user_is_found_by_its_name() {
    let tenant = Tenant::new();
    let mut container = Rootless::run(&tenant, &tenant.container_name());
    let policy = PolicyFile::new(format!("[target]\n{}\n[[rule]]\nset = {{ SO_MARK = 32 }}\n", tenant.selector()));
    assert_eq!(planned(&tenant.selector()), [container.cgroup.name()]);
    let run = Run::start_with(&policy, &[]);
    assert_eq!(container.probe.value_on_new_socket(SO_MARK), 32);
    let report = run.finish();
    assert_eq!(report.summary.targets, [container.cgroup.name()]);
}

#[test]
fn invalid_pid_file_affects_no_other_container() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let path = |name: &str| tenant.path(name);
    symlink(format!("/run/{}/{}/state.json", victim.container.runtime, victim.container.id), path("link")).unwrap();
    mkfifo(&path("fifo"), Mode::from_bits_truncate(0o666)).unwrap();
    tenant.chown_to(&path("fifo"));
    let _socket = UnixListener::bind(path("socket")).unwrap();
    let huge = fs::File::create(path("huge")).unwrap();
    huge.set_len(1 << 40).unwrap();
    tenant.chown_to(&path("huge"));
    fs::create_dir(path("folder")).unwrap();
    let own = tenant.cgroup("own");
    let names = ["link", "fifo", "socket", "huge", "folder"].map(|name| path(name).display().to_string());
    let files = names.iter().map(String::as_str).chain(["/proc/kmsg", "/dev/zero", "/proc/self/fd/0", "/dev/tty"]);
    let impostors = files.map(|file| {
        let mut disguise =
            Disguise::conmon(&tenant, &victim.container.id, &tenant.container_name()).in_cgroup(own.path());
        disguise.arguments[7] = file.to_owned();
        disguise.start()
    });
    let _impostors: Vec<Impostor> = impostors.collect();
    victim.assert_covered("files");
    victim.assert_planned("files");
    assert!(planned(&tenant.selector()).is_empty());
    victim.assert_reloads();
    victim.finish();
}

#[test]
fn huge_files_and_thousands_of_claims_delay_no_other_container() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let own = tenant.cgroup("own");
    tenant.write("config.json", &format!("{{\"annotations\":{{\"a\":\"{}\"}}}}", "x".repeat(15 << 20)));
    let disguise = Disguise::conmon(&tenant, "many", &tenant.container_name()).in_cgroup(own.path());
    let _impostor = Disguise { copies: 2000, ..disguise }.start();
    // Each process claims a containerd namespace with thousands of containers.
    for number in 0..2000 {
        let id = tenant.path("space").join(number.to_string());
        fs::create_dir_all(&id).unwrap();
        fs::write(id.join("init.pid"), number.to_string()).unwrap();
    }
    let shim = Disguise { uid: tenant.uid, dir: tenant.path("space/0"), ..Disguise::default() };
    let _shim = Disguise { program: "containerd-shim".to_owned(), copies: 500, ..shim }.start();
    victim.assert_covered("many");
    victim.assert_planned("many");
    victim.assert_reloads();
    victim.finish();
}

/// Returns a disguise whose pid file blocks processes that open it.
fn blocking(tenant: &Tenant) -> Disguise {
    let mount = tenant.path("mount");
    fs::create_dir(&mount).unwrap();
    let mut disguise = Disguise::conmon(tenant, ID, &tenant.container_name());
    disguise.arguments[7] = mount.join("pid").display().to_string();
    Disguise { blocked_by: Some(mount), ..disguise }
}

/// Returns the child processes of the agent.
fn children(agent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fields(*pid).is_some_and(|(_, parent)| parent == agent)).collect()
}

/// Returns the children that hang in the kernel.
fn stuck_children(agent: u32) -> Vec<u32> {
    children(agent).into_iter().filter(|child| fields(*child).is_some_and(|(state, _)| state == "D")).collect()
}

/// Waits until exactly one child hangs. Other workers can sleep in the kernel for a moment, but a worker that hangs
/// stays.
#[track_caller]
fn stuck_child(run: &Run) -> u32 {
    let mut stuck = Vec::new();
    let is_one = wait::until(AT_ONCE, || {
        stuck = stuck_children(run.pid());
        stuck.len() == 1
    });
    assert!(is_one, "{stuck:?}: {}", run.stderr());
    stuck[0]
}

/// Returns the state of a process, and its parent.
fn fields(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// Tests with hanging processes run one at a time, since the processes of different tests cannot be distinguished.
static HANGING: Mutex<()> = Mutex::new(());

#[test]
fn file_that_blocks_open_stops_only_a_worker() {
    require_fuse!();
    let _only = HANGING.lock();
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let impostor = blocking(&tenant).start();
    victim.assert_covered("blocked");
    stuck_child(victim.run());
    // The agent warns when the worker's deadline has passed.
    let warnings = || victim.run().stderr().matches(&format!("user {}", tenant.uid)).count();
    assert!(wait::until(AT_ONCE, || warnings() == 1), "{}", victim.run().stderr());
    // The search continues, without another worker for this user.
    victim.assert_covered("again");
    victim.assert_reloads();
    stuck_child(victim.run());
    let warnings = victim.run().stderr().matches(&format!("user {}", tenant.uid)).count();
    assert_eq!(warnings, 1, "{}", victim.run().stderr());

    // The policies of another agent come in force nevertheless.
    let policy = PolicyFile::new(format!("[target]\n{}\n[[rule]]\nset = {{ SO_MARK = 64 }}\n", tenant.selector()));
    let another = Run::start_with(&policy, &[]);
    another.signal(Signal::SIGTERM);
    assert!(wait::until(AT_ONCE, || !is_alive(another.pid())));
    drop(impostor);
    another.finish_with_status();
    victim.finish();
}

#[test]
fn hanging_worker_holds_no_descriptors_of_the_agent() {
    require_fuse!();
    let _only = HANGING.lock();
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let impostor = blocking(&tenant).start();
    let run = victim.run.take().unwrap();
    let _cgroup = Cgroup::new();
    let stuck = stuck_child(&run);
    let descriptors = descriptors(stuck).into_iter().map(|(_, path)| path.display().to_string());
    let held = |path: &String| {
        let is_harmless =
            ["pipe:", "/dev/null", "/memfd:sockpolicy-job"].iter().any(|harmless| path.starts_with(harmless));
        !is_harmless && path != "/"
    };
    assert_eq!(descriptors.filter(held).collect::<Vec<_>>(), Vec::<String>::new());

    // SIGKILL ends the agent although the worker hangs, and no program stays attached.
    run.signal(Signal::SIGKILL);
    assert!(wait::until(AT_ONCE, || !is_alive(run.pid())));
    assert!(is_alive(stuck), "{stuck} did not hang");
    run.bpf_objects().assert_gone();
    assert_eq!(victim.container.probe.value_on_new_socket(SO_MARK), 0);
    drop(impostor);
    assert!(wait::until(AT_ONCE, || !is_alive(stuck)));
}

/// SIGTERM ends an agent whose worker hangs.
#[test]
fn agent_ends_although_a_worker_hangs() {
    require_fuse!();
    let _only = HANGING.lock();
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let impostor = blocking(&tenant).start();
    let run = victim.run.take().unwrap();
    let _cgroup = Cgroup::new();
    stuck_child(&run);
    run.signal(Signal::SIGTERM);
    assert!(wait::until(AT_ONCE, || !is_alive(run.pid())));
    run.bpf_objects().assert_gone();
    drop(impostor);
    run.finish_with_status();
}

#[test]
fn containers_are_searched_only_if_a_policy_names_any() {
    require_fuse!();
    let _only = HANGING.lock();
    let tenant = Tenant::new();
    let _impostor = blocking(&tenant).start();
    let target = Cgroup::new();
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 32 }\n");
    let run = Run::start(&policy, &target);
    let below = target.child(&format!("libpod-{ID}.scope"));
    let mut probe = Probe::start(&below);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_MARK, 9).unwrap();
    assert!(wait::until(AT_ONCE, || run.lines().contains(ID)), "{}", run.lines());
    assert!(children(run.pid()).is_empty());
    run.finish();
}
