//! Real containers, each with a probe.
//!
//! Their root file system consists of busybox, sockprobe and the libraries of sockprobe. Each engine keeps its files
//! in a new directory and its containers in a new cgroup. Tests can therefore run in parallel, and next to the
//! engines of this machine. Container names are unique on this machine: [`Workspace::name`].

use std::{
    fs,
    ops::Deref,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    cgroup::{self, Cgroup},
    impostor::Tenant,
    must,
    policy::{TempDir, unique_name},
    probe::{self, Probe},
    script::KEEP_NETNS,
    wait,
};

/// The path of the probe in a container.
const PROBE: &str = "/bin/sockprobe";

/// Limits that a container can have on any machine: not every machine permits raising them.
const ULIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];

/// The image of the containers, which is imported without a registry.
const IMAGE: &str = "sockpolicy-probe:1";

/// All podman processes of a machine share one shared-memory segment for locks, also with different storages. A new
/// podman begins by releasing all of these locks. With `file`, each storage has its own lock files.
const CONFIGURATION: &str = "[engine]\nlock_type = \"file\"\n";

/// Returns the OCI runtime that works here. crun needs a machine without cgroup v1, and is faster than runc.
#[must_use]
pub fn runtime() -> &'static str {
    if cgroup::mount() == Path::new("/sys/fs/cgroup") { "crun" } else { "runc" }
}

/// Creates a root file system with a shell and the probe.
fn make_root(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        must(fs::create_dir_all(root.join(dir)), format_args!("make {dir} of a container"));
    }
    crate::process::copy_program("/bin/busybox", root.join("bin/busybox"));
    must(symlink("busybox", root.join("bin/sh")), "make a shell of busybox");
    crate::process::copy_program(probe::program(), root.join(PROBE.trim_start_matches('/')));
    for library in libraries(&probe::program()) {
        let copy = root.join(library.strip_prefix("/").unwrap_or(&library));
        must(fs::create_dir_all(copy.parent().unwrap_or(root)), "make a directory for libraries");
        must(fs::copy(&library, copy), format_args!("copy {}", library.display()));
    }
}

/// Returns the shared libraries of a program, and its dynamic loader.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let list = output(Command::new("ldd").arg(program));
    let words = list.lines().flat_map(str::split_whitespace);
    words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Returns the standard output of a command. Panics if the command fails.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = must(command.stdin(Stdio::null()).output(), format_args!("run {command:?}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The workspace of an engine: a directory with the root file system, and the parent of the containers' cgroups.
#[derive(Debug)]
pub struct Workspace {
    home: Cgroup,
    dir: TempDir,
    /// The prefix of container names.
    prefix: String,
}

impl Workspace {
    fn new() -> Self {
        let ground = Self { home: Cgroup::new(), dir: TempDir::new(), prefix: unique_name() };
        make_root(&ground.root());
        ground
    }

    /// Returns a container name that is unique on this machine.
    #[must_use]
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Returns the parent of the containers' cgroups.
    #[must_use]
    pub fn home(&self) -> &Cgroup {
        &self.home
    }

    fn root(&self) -> PathBuf {
        self.path("rootfs")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path.join(name)
    }

    /// Returns a tar archive of the root file system, for import.
    fn archive(&self) -> PathBuf {
        let archive = self.path("rootfs.tar");
        output(Command::new("tar").arg("-C").arg(self.root()).arg("-cf").arg(&archive).arg("."));
        archive
    }

    /// Returns the only process of a container's cgroup, and the cgroup's name in events.
    #[track_caller]
    fn member(&self, cgroup: &str) -> (u32, String) {
        let path = self.home.path().join(cgroup).join("cgroup.procs");
        let members = must(fs::read_to_string(&path), format_args!("read {}", path.display()));
        let pid = must(members.trim().parse(), format_args!("read a process id from {members:?}"));
        (pid, format!("{}/{cgroup}", self.home.name()))
    }

    /// Returns the contents of a file in the workspace.
    #[track_caller]
    fn read(&self, name: &str) -> String {
        let path = self.path(name);
        must(fs::read_to_string(&path), format_args!("read {}", path.display())).trim().to_owned()
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // Runtimes create a container's cgroup in every hierarchy.
        for path in cgroup::in_v1_hierarchies(self.home.name().trim_start_matches('/')) {
            wait::until(wait::TIMEOUT, || cgroup::remove(&path).is_ok());
        }
    }
}

/// A podman with its own storage. Dropping it removes its containers.
#[derive(Debug)]
pub struct Podman(Workspace);

impl Podman {
    /// The image of the containers.
    pub const IMAGE: &'static str = "localhost/sockpolicy-probe:1";

    /// Creates the storage and imports the image.
    #[must_use]
    pub fn new() -> Self {
        let podman = Self(Workspace::new());
        must(fs::write(podman.path("containers.conf"), CONFIGURATION), "configure podman");
        output(podman.command(&["import", "--quiet"]).arg(podman.archive()).arg(Self::IMAGE));
        podman
    }

    /// Runs a container without a network.
    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str, image: &str) -> Container {
        let name = self.name(name);
        let probe = Probe::launch(&mut self.started(self.command(&["run"]), &name, image));
        self.container(probe, name, image)
    }

    /// Runs a container of another podman that has its own PID namespace, and its storage in a mount that only it
    /// sees.
    #[must_use]
    #[track_caller]
    pub fn run_in_other_namespaces(&self, name: &str) -> Container {
        let (name, storage) = (self.name(name), self.path("apart"));
        must(fs::create_dir(&storage), "make a directory for another podman");
        let import = self.command_in(&storage, &["import", "--quiet"]);
        let run = self.started(self.command_in(&storage, &["run"]), &name, Self::IMAGE);
        let script = "mount -t tmpfs none \"$0\" && import=$1 && shift && \
                      eval \"$import\" >/dev/null && exec \"$@\"";
        let mut import: Vec<_> = words(&import);
        import.extend([self.archive().display().to_string(), Self::IMAGE.to_owned()]);
        let mut outer = Command::new("unshare");
        outer.env("CONTAINERS_CONF", self.path("containers.conf"));
        outer
            .args(["--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script])
            .arg(&storage)
            .arg(import.join(" "));
        let probe = Probe::launch(outer.args(words(&run)));
        self.container(probe, name, Self::IMAGE)
    }

    fn started(&self, mut run: Command, name: &str, image: &str) -> Command {
        run.args(["--rm", "--interactive", "--network", "none", "--name", name]).args(ULIMITS);
        run.arg("--cgroup-parent").arg(self.home.name()).arg("--cidfile").arg(self.path(&format!("{name}.id")));
        run.args([image, PROBE, KEEP_NETNS]);
        run
    }

    #[track_caller]
    fn container(&self, probe: Probe, name: String, image: &str) -> Container {
        let id = self.read(&format!("{name}.id"));
        let (pid, cgroup) = self.member(&format!("libpod-{id}"));
        Container { probe, runtime: "podman", id, name, image: Some(image.to_owned()), pid, cgroup }
    }

    /// Gives an image an additional name.
    pub fn tag(&self, image: &str, other: &str) {
        output(&mut self.command(&["tag", image, other]));
    }

    /// Renames a container.
    pub fn rename(&self, container: &Container, name: &str) {
        output(&mut self.command(&["rename", &container.id, &self.name(name)]));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_in(&self.dir.path, arguments)
    }

    fn command_in(&self, storage: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.env("CONTAINERS_CONF", self.path("containers.conf"));
        let [root, run, tmp] = ["storage", "run", "tmp"].map(|dir| storage.join(dir));
        command.arg("--root").arg(root).arg("--runroot").arg(run).arg("--tmpdir").arg(tmp);
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.args(["--runtime", runtime()]).args(arguments);
        command
    }
}

impl Default for Podman {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Podman {
    type Target = Workspace;

    fn deref(&self) -> &Workspace {
        &self.0
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Also unmounts the file systems of the containers.
        let removed = self.command(&["rm", "--all", "--force", "--time", "0"]).stdin(Stdio::null()).output();
        if !removed.is_ok_and(|output| output.status.success()) && !std::thread::panicking() {
            panic!("cannot remove the containers of {}", self.dir.path.display());
        }
    }
}

/// A Docker daemon with its own containerd. Dropping it stops both, and removes their containers.
#[derive(Debug)]
pub struct Docker {
    daemon: Child,
    ground: Workspace,
}

impl Docker {
    /// Starts the daemon and imports the image.
    #[must_use]
    pub fn new() -> Self {
        let ground = Workspace::new();
        let log = must(fs::File::create(ground.path("log")), "make a log for dockerd");
        let mut command = Command::new("dockerd");
        command.arg("--data-root").arg(ground.path("data")).arg("--exec-root").arg(ground.path("exec"));
        command.arg("--pidfile").arg(ground.path("pid")).arg("--host").arg(address(&ground));
        command.args(["--bridge", "none", "--iptables=false", "--storage-driver", "vfs"]);
        let daemon = must(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn(), "start dockerd");
        let docker = Self { daemon, ground };
        let answers = || docker.command(&["version"]).output().is_ok_and(|output| output.status.success());
        assert!(wait::until(wait::TIMEOUT, answers), "dockerd does not answer: {}", docker.read("log"));
        output(docker.command(&["import"]).arg(docker.archive()).arg(IMAGE));
        docker
    }

    /// Runs a container without a network.
    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str) -> Container {
        let name = self.name(name);
        let mut command = self.command(&["run", "--rm", "--interactive", "--network", "none", "--name", &name]);
        // Docker's AppArmor profile needs a program that may not be installed.
        command.args(["--security-opt", "apparmor=unconfined", "--cgroup-parent", &self.home.name()]);
        let id_file = format!("{name}.id");
        command.arg("--cidfile").arg(self.path(&id_file));
        let probe = Probe::launch(command.args([IMAGE, PROBE, KEEP_NETNS]));
        let id = self.read(&id_file);
        let (pid, cgroup) = self.member(&id);
        Container { probe, runtime: "docker", id, name, image: Some(IMAGE.to_owned()), pid, cgroup }
    }

    /// Runs a container with `ctr`, without Docker.
    #[must_use]
    #[track_caller]
    pub fn run_by_containerd(&self, name: &str) -> Container {
        let name = self.name(name);
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.path("exec/containerd/containerd.sock")).args(["--namespace", &self.prefix]);
        command.args(["run", "--rm", "--cgroup"]).arg(format!("{}/{name}", self.home.name()));
        let probe = Probe::launch(command.arg("--rootfs").arg(self.root()).args([&name, PROBE, KEEP_NETNS]));
        let (pid, cgroup) = self.member(&name);
        Container { probe, runtime: "containerd", id: name.clone(), name, image: None, pid, cgroup }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(address(self)).args(arguments);
        command
    }
}

fn address(ground: &Workspace) -> String {
    format!("unix://{}", ground.path("docker.sock").display())
}

impl Default for Docker {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Docker {
    type Target = Workspace;

    fn deref(&self) -> &Workspace {
        &self.ground
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // dockerd first stops its containers, then its containerd.
        if let Ok(pid) = i32::try_from(self.daemon.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let has_ended = wait::until(wait::TIMEOUT, || matches!(self.daemon.try_wait(), Ok(Some(_))));
        if !has_ended && !std::thread::panicking() {
            panic!("dockerd does not end: {}", self.read("log"));
        }
    }
}

/// Containers that an OCI runtime runs without an engine.
#[derive(Debug)]
pub struct BareRuntime(Workspace);

impl BareRuntime {
    #[must_use]
    pub fn new() -> Self {
        Self(Workspace::new())
    }

    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str) -> Container {
        let name = self.name(name);
        let cgroup = format!("of-{name}");
        let namespaces = ["pid", "network", "mount", "ipc", "uts"].map(|kind| json!({ "type": kind }));
        let config = json!({
            "ociVersion": "1.0.2",
            "process": { "args": [PROBE, KEEP_NETNS], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": self.root() },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "cgroupsPath": format!("{}/{cgroup}", self.home.name()), "namespaces": namespaces },
        });
        must(fs::write(self.path("config.json"), config.to_string()), "write a bundle");
        let mut command = Command::new(runtime());
        let probe = Probe::launch(command.args(["run", "--bundle"]).arg(&self.dir.path).arg(&name));
        let (pid, cgroup) = self.member(&cgroup);
        Container { probe, runtime: runtime(), id: name.clone(), name, image: None, pid, cgroup }
    }
}

impl Default for BareRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for BareRuntime {
    type Target = Workspace;

    fn deref(&self) -> &Workspace {
        &self.0
    }
}

/// A container of a user's podman, in a cgroup of that user. Dropping it stops the container.
#[derive(Debug)]
pub struct Rootless {
    pub probe: Probe,
    pub cgroup: Cgroup,
}

impl Rootless {
    /// Runs a container. On a machine with cgroup v1, rootless podman creates no cgroups. The test therefore creates
    /// one and moves the container into it.
    #[must_use]
    #[track_caller]
    pub fn run(tenant: &Tenant, name: &str) -> Self {
        let [root, run, id, pid] = ["rootfs", "run", "id", "pid"].map(|file| tenant.path(file));
        make_root(&root);
        for dir in [&run, &tenant.path("home")] {
            must(fs::create_dir(dir), "make a directory of a user");
        }
        let user = tenant.uid.to_string();
        output(Command::new("chown").args(["-R", &user]).arg(tenant.dir()));
        must(fs::set_permissions(&run, fs::Permissions::from_mode(0o700)), "restrict a directory");
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "podman"]);
        command.env("HOME", tenant.path("home")).env("XDG_RUNTIME_DIR", &run).current_dir(tenant.dir());
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.args(["--runtime", runtime(), "run", "--rm", "--interactive", "--network", "none", "--name", name]);
        command.args(ULIMITS).arg("--cidfile").arg(&id).arg("--pidfile").arg(&pid);
        let probe = Probe::launch(command.arg("--rootfs").arg(&root).args([PROBE, KEEP_NETNS]));
        let read = |path: &Path| must(fs::read_to_string(path), format_args!("read {}", path.display()));
        let cgroup = tenant.cgroup(&format!("libpod-{}", read(&id).trim()));
        must(fs::write(cgroup.path().join("cgroup.procs"), read(&pid).trim()), "move a container");
        Self { probe, cgroup }
    }
}

/// Returns the words of a command line.
fn words(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}

/// A container, with the probe that is its first process.
#[derive(Debug)]
pub struct Container {
    pub probe: Probe,
    /// The name of the runtime or engine in events.
    pub runtime: &'static str,
    pub id: String,
    pub name: String,
    /// `None` if the runtime has no images, or does not record them.
    pub image: Option<String>,
    /// The process id of the first process in the host's PID namespace.
    pub pid: u32,
    /// The name of the cgroup in events.
    pub cgroup: String,
}

impl Container {
    /// Returns the description of the container in events.
    #[must_use]
    pub fn named(&self) -> Value {
        let Self { runtime, id, name, image, .. } = self;
        json!({ "runtime": runtime, "id": id, "pod": null, "name": name, "image": image })
    }

    /// Runs `ip` in the container's network namespace.
    #[track_caller]
    pub fn ip(&self, arguments: &[&str]) {
        let namespace = format!("--net=/proc/{}/ns/net", self.pid);
        output(Command::new("nsenter").arg(namespace).arg("ip").args(arguments));
    }

    /// Connects two containers with a veth pair. Their addresses are 192.0.2.1 and 192.0.2.2.
    #[track_caller]
    pub fn connect(&self, other: &Self) {
        let [own, others] = [self, other].map(|container| container.pid.to_string());
        let peer = ["type", "veth", "peer", "name", "eth0", "netns", &others];
        output(Command::new("ip").args(["link", "add", "eth0", "netns", &own]).args(peer));
        for (container, address) in [(self, "192.0.2.1/24"), (other, "192.0.2.2/24")] {
            container.ip(&["address", "add", address, "dev", "eth0"]);
            container.ip(&["link", "set", "eth0", "up"]);
        }
    }
}
