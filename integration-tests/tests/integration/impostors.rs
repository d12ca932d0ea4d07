//! Users who claim containers: a claim counts for cgroups of the user's own, and no claim stops the agent.

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
    container::{Alone, Container, Rootless},
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

/// Whether this machine has file systems in user space, for a user to block readers with.
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

/// A command that looks at all containers must not take longer, whatever users do. Far more than it takes.
const AT_ONCE: Duration = Duration::from_secs(40);

/// Another user's container, which root runs, with a policy in force on it.
struct Victim {
    alone: Alone,
    container: Container,
    _policy: PolicyFile,
    run: Option<Run>,
}

impl Victim {
    fn new() -> Self {
        let alone = Alone::new();
        let container = alone.run("victim");
        let policy = PolicyFile::new(format!(
            "[target]\ncontainer = {{ name = \"{}\" }}\n[[rule]]\nset = {{ SO_MARK = 32 }}\n",
            alone.name("*")
        ));
        let run = Some(Run::started(&policy, &[]));
        Self { alone, container, _policy: policy, run }
    }

    fn run(&self) -> &Run {
        self.run.as_ref().unwrap()
    }

    /// Asserts that the agent has looked at what there is by now, and that the policy still covers the container.
    fn assert_covered(&mut self, name: &str) {
        let mut other = self.alone.run(name);
        let is_covered = || {
            let fd = other.probe.open(Family::Inet, Kind::Tcp);
            let mark = other.probe.int(fd, SO_MARK);
            other.probe.close(fd);
            mark == 32
        };
        assert!(wait::until(AT_ONCE, is_covered), "{name}: {}", self.run().stderr());
        assert_eq!(self.container.probe.fresh(SO_MARK), 32, "{name}: {}", self.run().stderr());
        for notice in self.run().notices("targets") {
            let removed = notice["removed"].as_array().unwrap();
            assert!(!removed.iter().any(|target| *target == self.container.cgroup), "{name}: {notice}");
        }
    }

    /// Asserts that a command that looks at containers says so too.
    fn assert_planned(&self, name: &str) {
        let target = format!("container = {{ name = \"{}\" }}", self.container.name);
        assert_eq!(planned(&target), [self.container.cgroup.as_str()], "{name}");
    }

    /// Asserts that the agent reads its policy anew when it is asked to.
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
fn name_of_a_process_says_nothing_of_a_container() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let id = victim.container.id.clone();
    let conmon = Disguise::conmon(&tenant, &id, &tenant.claim());
    let pid = tenant.write("victim", &victim.container.pid.to_string()).display().to_string();
    let bundle = tenant.path("work").join(&id);
    fs::create_dir_all(&bundle).unwrap();
    tenant.write(&format!("work/{id}/init.pid"), &victim.container.pid.to_string());
    tenant.write(
        &format!("work/{id}/config.json"),
        &format!(r#"{{"annotations":{{"nerdctl/name":"{}"}}}}"#, tenant.claim()),
    );
    let shim = Disguise { uid: tenant.uid, folder: bundle.clone(), ..Disguise::default() };
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
fn claim_counts_for_a_cgroup_of_the_users_own_only() {
    let tenant = Tenant::new();
    let (own, other) = (tenant.cgroup("own"), tenant.home().child("other"));
    let claimed = |id: &str, cgroup: &Cgroup| {
        let _impostor = Disguise::conmon(&tenant, id, &tenant.claim()).in_cgroup(cgroup.path()).start();
        planned(&tenant.selector())
    };
    // The id is the name of an ancestor.
    assert_eq!(claimed(&name_of(tenant.home()), &own), [own.name()]);
    assert!(claimed("2", &other).is_empty());

    // Root's, with a whole id.
    let named = tenant.home().child(&format!("libpod-{ID}.scope"));
    let below = named.child("below");
    tenant.own(below.path());
    assert!(claimed(ID, &below).is_empty());
    tenant.own(named.path());
    assert_eq!(claimed(ID, &below), [named.name()]);
}

/// Root in a container can be uid 0 of the initial user namespace.
#[test]
fn root_without_capabilities_claims_nothing() {
    let tenant = Tenant::new();
    let own = tenant.home().child("own");
    let claimed = |without_capabilities| {
        let conmon = Disguise::conmon(&tenant, "2", &tenant.claim()).in_cgroup(own.path());
        let _impostor = Disguise { uid: 0, without_capabilities, ..conmon }.start();
        planned(&tenant.selector())
    };
    assert_eq!(claimed(false), [own.name()]);
    assert!(claimed(true).is_empty());
}

#[test]
fn claims_of_one_id_take_nothing_from_each_other() {
    let tenant = Tenant::new();
    let cgroups = ["one", "two"].map(|name| tenant.cgroup(name));
    let claim = |cgroup: &Cgroup| {
        let pid_file = tenant.path(&name_of(cgroup));
        let mut disguise = Disguise::conmon(&tenant, "same", &tenant.claim()).in_cgroup(cgroup.path());
        disguise.arguments[7] = pid_file.display().to_string();
        Disguise { pid_file: Some(pid_file), ..disguise }.start()
    };
    let _impostors: Vec<Impostor> = cgroups.iter().map(claim).collect();
    assert_eq!(planned(&tenant.selector()), cgroups.each_ref().map(Cgroup::name));
}

/// The cgroup is the user's, as it is where systemd delegates one.
#[test]
fn container_of_a_user_is_known_by_its_name() {
    let tenant = Tenant::new();
    let mut container = Rootless::run(&tenant, &tenant.claim());
    let policy = PolicyFile::new(format!("[target]\n{}\n[[rule]]\nset = {{ SO_MARK = 32 }}\n", tenant.selector()));
    assert_eq!(planned(&tenant.selector()), [container.cgroup.name()]);
    let run = Run::started(&policy, &[]);
    assert_eq!(container.probe.fresh(SO_MARK), 32);
    let report = run.finish();
    assert_eq!(report.summary.targets, [container.cgroup.name()]);
}

#[test]
fn pid_file_that_is_none_stops_nobody() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let path = |name: &str| tenant.path(name);
    symlink(format!("/run/{}/{}/state.json", victim.container.runtime, victim.container.id), path("link")).unwrap();
    mkfifo(&path("fifo"), Mode::from_bits_truncate(0o666)).unwrap();
    tenant.own(&path("fifo"));
    let _socket = UnixListener::bind(path("socket")).unwrap();
    let huge = fs::File::create(path("huge")).unwrap();
    huge.set_len(1 << 40).unwrap();
    tenant.own(&path("huge"));
    fs::create_dir(path("folder")).unwrap();
    let own = tenant.cgroup("own");
    let names = ["link", "fifo", "socket", "huge", "folder"].map(|name| path(name).display().to_string());
    let files = names.iter().map(String::as_str).chain(["/proc/kmsg", "/dev/zero", "/proc/self/fd/0", "/dev/tty"]);
    let impostors = files.map(|file| {
        let mut disguise = Disguise::conmon(&tenant, &victim.container.id, &tenant.claim()).in_cgroup(own.path());
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
fn huge_files_and_thousands_of_claims_keep_nobody_waiting() {
    let mut victim = Victim::new();
    let tenant = Tenant::new();
    let own = tenant.cgroup("own");
    tenant.write("config.json", &format!("{{\"annotations\":{{\"a\":\"{}\"}}}}", "x".repeat(15 << 20)));
    let disguise = Disguise::conmon(&tenant, "many", &tenant.claim()).in_cgroup(own.path());
    let _impostor = Disguise { copies: 2000, ..disguise }.start();
    // Each of them a namespace of containerd's with thousands of containers.
    for number in 0..2000 {
        let id = tenant.path("space").join(number.to_string());
        fs::create_dir_all(&id).unwrap();
        fs::write(id.join("init.pid"), number.to_string()).unwrap();
    }
    let shim = Disguise { uid: tenant.uid, folder: tenant.path("space/0"), ..Disguise::default() };
    let _shim = Disguise { program: "containerd-shim".to_owned(), copies: 500, ..shim }.start();
    victim.assert_covered("many");
    victim.assert_planned("many");
    victim.assert_reloads();
    victim.finish();
}

/// Blocks those who open the pid file.
fn blocking(tenant: &Tenant) -> Disguise {
    let mount = tenant.path("mount");
    fs::create_dir(&mount).unwrap();
    let mut disguise = Disguise::conmon(tenant, ID, &tenant.claim());
    disguise.arguments[7] = mount.join("pid").display().to_string();
    Disguise { blocked_by: Some(mount), ..disguise }
}

/// Processes that the agent has started.
fn children(agent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fields(*pid).is_some_and(|(_, parent)| parent == agent)).collect()
}

/// Those of them that hang in the kernel.
fn stuck_children(agent: u32) -> Vec<u32> {
    children(agent).into_iter().filter(|child| fields(*child).is_some_and(|(state, _)| state == "D")).collect()
}

/// Waits until one of them hangs, and no other. A worker that goes on may sleep in the kernel for a moment too; one that hangs
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

/// The state of a process, and its parent.
fn fields(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// Processes that hang are not told apart by whose test they hang in.
static HANGING: Mutex<()> = Mutex::new(());

#[test]
fn file_that_cannot_be_opened_stops_a_worker_only() {
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
    // The search goes on, without another worker for this user.
    victim.assert_covered("again");
    victim.assert_reloads();
    stuck_child(victim.run());
    let warnings = victim.run().stderr().matches(&format!("user {}", tenant.uid)).count();
    assert_eq!(warnings, 1, "{}", victim.run().stderr());

    // One that starts is in force all the same.
    let policy = PolicyFile::new(format!("[target]\n{}\n[[rule]]\nset = {{ SO_MARK = 64 }}\n", tenant.selector()));
    let another = Run::started(&policy, &[]);
    another.signal(Signal::SIGTERM);
    assert!(wait::until(AT_ONCE, || !is_alive(another.pid())));
    drop(impostor);
    another.finish_with_status();
    victim.finish();
}

#[test]
fn worker_that_hangs_holds_nothing_of_the_agents() {
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

    // SIGKILL ends the agent, though the worker hangs; nothing stays attached.
    run.signal(Signal::SIGKILL);
    assert!(wait::until(AT_ONCE, || !is_alive(run.pid())));
    assert!(is_alive(stuck), "{stuck} did not hang");
    run.held().assert_gone();
    assert_eq!(victim.container.probe.fresh(SO_MARK), 0);
    drop(impostor);
    assert!(wait::until(AT_ONCE, || !is_alive(stuck)));
}

/// SIGTERM ends an agent whose worker hangs.
#[test]
fn agent_ends_though_a_worker_hangs() {
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
    run.held().assert_gone();
    drop(impostor);
    run.finish_with_status();
}

#[test]
fn containers_are_looked_for_only_if_a_policy_names_any() {
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
