//! Real containers, with a probe in each.
//!
//! What is in them is of our own making: busybox, sockprobe and the libraries that this wants. Everything that an engine keeps
//! lies in a folder of its own, and its containers in a cgroup of its own, so that tests may run at the same time, and beside
//! whatever engines this machine has. Names of containers are this machine's only ones: [`Ground::name`].

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
    policy::{Folder, unique_name},
    probe::{self, Probe},
    script::STAY,
    wait,
};

/// Where the probe is in a container.
const PROBE: &str = "/bin/sockprobe";

/// What a container can have on any machine: not every one lets us raise these.
const ULIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];

/// The image of an engine's containers, without a registry.
const IMAGE: &str = "sockpolicy-probe:1";

/// Every podman of a machine has its locks in one piece of shared memory, wherever its storage is, and a new one begins by letting
/// go of them all. In files they lie beside what they are for.
const CONFIGURATION: &str = "[engine]\nlock_type = \"file\"\n";

/// The OCI runtime that works here: crun wants a machine without cgroups of version 1, and is the quicker one.
#[must_use]
pub fn runtime() -> &'static str {
    if cgroup::mount() == Path::new("/sys/fs/cgroup") { "crun" } else { "runc" }
}

/// A root file system with a shell and the probe.
fn make_root(root: &Path) {
    for folder in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        must(fs::create_dir_all(root.join(folder)), format_args!("make {folder} of a container"));
    }
    must(fs::copy("/bin/busybox", root.join("bin/busybox")), "copy busybox");
    must(symlink("busybox", root.join("bin/sh")), "make a shell of busybox");
    must(fs::copy(probe::program(), root.join(PROBE.trim_start_matches('/'))), "copy sockprobe");
    for library in libraries(&probe::program()) {
        let copy = root.join(library.strip_prefix("/").unwrap_or(&library));
        must(fs::create_dir_all(copy.parent().unwrap_or(root)), "make a folder for libraries");
        must(fs::copy(&library, copy), format_args!("copy {}", library.display()));
    }
}

/// The files that a program is linked to, its loader too.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let list = output(Command::new("ldd").arg(program));
    let words = list.lines().flat_map(str::split_whitespace);
    words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// What a command says, which must succeed.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = must(command.stdin(Stdio::null()).output(), format_args!("run {command:?}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Where containers are made: a folder with their root file system, and the parent of their cgroups.
#[derive(Debug)]
pub struct Ground {
    home: Cgroup,
    folder: Folder,
    /// What the names of its containers begin with.
    prefix: String,
}

impl Ground {
    fn new() -> Self {
        let ground = Self { home: Cgroup::new(), folder: Folder::new(), prefix: unique_name() };
        make_root(&ground.root());
        ground
    }

    /// A name for a container that no other on this machine has.
    #[must_use]
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// The parent of the containers' cgroups.
    #[must_use]
    pub fn home(&self) -> &Cgroup {
        &self.home
    }

    fn root(&self) -> PathBuf {
        self.path("rootfs")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path.join(name)
    }

    /// The root file system, as engines import it.
    fn archive(&self) -> PathBuf {
        let archive = self.path("rootfs.tar");
        output(Command::new("tar").arg("-C").arg(self.root()).arg("-cf").arg(&archive).arg("."));
        archive
    }

    /// The only process of a container's cgroup, and the cgroup as events name it.
    #[track_caller]
    fn member(&self, cgroup: &str) -> (u32, String) {
        let path = self.home.path().join(cgroup).join("cgroup.procs");
        let members = must(fs::read_to_string(&path), format_args!("read {}", path.display()));
        let pid = must(members.trim().parse(), format_args!("tell a process from {members:?}"));
        (pid, format!("{}/{cgroup}", self.home.name()))
    }

    /// What a command leaves in a file of this name.
    #[track_caller]
    fn read(&self, name: &str) -> String {
        let path = self.path(name);
        must(fs::read_to_string(&path), format_args!("read {}", path.display())).trim().to_owned()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Runtimes make a container's cgroup in every hierarchy.
        for path in cgroup::of_version_1(self.home.name().trim_start_matches('/')) {
            wait::until(wait::PATIENCE, || cgroup::remove(&path).is_ok());
        }
    }
}

/// A podman with a storage of its own. Dropping it removes its containers.
#[derive(Debug)]
pub struct Podman(Ground);

impl Podman {
    /// The image that containers are made of.
    pub const IMAGE: &'static str = "localhost/sockpolicy-probe:1";

    /// Makes the image.
    #[must_use]
    pub fn new() -> Self {
        let podman = Self(Ground::new());
        must(fs::write(podman.path("containers.conf"), CONFIGURATION), "configure podman");
        output(podman.command(&["import", "--quiet"]).arg(podman.archive()).arg(Self::IMAGE));
        podman
    }

    /// A container without a network.
    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str, image: &str) -> Container {
        let name = self.name(name);
        let probe = Probe::launch(&mut self.started(self.command(&["run"]), &name, image));
        self.container(probe, name, image)
    }

    /// A container of another podman, which sees other processes than we, and has its storage in a mount that we do not see.
    #[must_use]
    #[track_caller]
    pub fn run_apart(&self, name: &str) -> Container {
        let (name, storage) = (self.name(name), self.path("apart"));
        must(fs::create_dir(&storage), "make a folder for another podman");
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
        run.args([image, PROBE, STAY]);
        run
    }

    #[track_caller]
    fn container(&self, probe: Probe, name: String, image: &str) -> Container {
        let id = self.read(&format!("{name}.id"));
        let (pid, cgroup) = self.member(&format!("libpod-{id}"));
        Container { probe, runtime: "podman", id, name, image: Some(image.to_owned()), pid, cgroup }
    }

    /// Gives an image another name beside its own.
    pub fn tag(&self, image: &str, other: &str) {
        output(&mut self.command(&["tag", image, other]));
    }

    /// Gives a container another name, and takes away its own.
    pub fn rename(&self, container: &Container, name: &str) {
        output(&mut self.command(&["rename", &container.id, &self.name(name)]));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_in(&self.folder.path, arguments)
    }

    fn command_in(&self, storage: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.env("CONTAINERS_CONF", self.path("containers.conf"));
        let [root, run, tmp] = ["storage", "run", "tmp"].map(|folder| storage.join(folder));
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
    type Target = Ground;

    fn deref(&self) -> &Ground {
        &self.0
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Also what it has mounted.
        let removed = self.command(&["rm", "--all", "--force", "--time", "0"]).stdin(Stdio::null()).output();
        if !removed.is_ok_and(|output| output.status.success()) && !std::thread::panicking() {
            panic!("cannot remove the containers of {}", self.folder.path.display());
        }
    }
}

/// A Docker of its own, with a containerd of its own. Dropping it ends both, and removes their containers.
#[derive(Debug)]
pub struct Docker {
    daemon: Child,
    ground: Ground,
}

impl Docker {
    /// Starts it and makes the image.
    #[must_use]
    pub fn new() -> Self {
        let ground = Ground::new();
        let log = must(fs::File::create(ground.path("log")), "make a log for dockerd");
        let mut command = Command::new("dockerd");
        command.arg("--data-root").arg(ground.path("data")).arg("--exec-root").arg(ground.path("exec"));
        command.arg("--pidfile").arg(ground.path("pid")).arg("--host").arg(address(&ground));
        command.args(["--bridge", "none", "--iptables=false", "--storage-driver", "vfs"]);
        let daemon = must(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn(), "start dockerd");
        let docker = Self { daemon, ground };
        let answers = || docker.command(&["version"]).output().is_ok_and(|output| output.status.success());
        assert!(wait::until(wait::PATIENCE, answers), "dockerd does not answer: {}", docker.read("log"));
        output(docker.command(&["import"]).arg(docker.archive()).arg(IMAGE));
        docker
    }

    /// A container without a network.
    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str) -> Container {
        let name = self.name(name);
        let mut command = self.command(&["run", "--rm", "--interactive", "--network", "none", "--name", &name]);
        // Its profile takes a program that need not be there.
        command.args(["--security-opt", "apparmor=unconfined", "--cgroup-parent", &self.home.name()]);
        let id_file = format!("{name}.id");
        command.arg("--cidfile").arg(self.path(&id_file));
        let probe = Probe::launch(command.args([IMAGE, PROBE, STAY]));
        let id = self.read(&id_file);
        let (pid, cgroup) = self.member(&id);
        Container { probe, runtime: "docker", id, name, image: Some(IMAGE.to_owned()), pid, cgroup }
    }

    /// A container that containerd runs for somebody else.
    #[must_use]
    #[track_caller]
    pub fn run_by_containerd(&self, name: &str) -> Container {
        let name = self.name(name);
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.path("exec/containerd/containerd.sock")).args(["--namespace", &self.prefix]);
        command.args(["run", "--rm", "--cgroup"]).arg(format!("{}/{name}", self.home.name()));
        let probe = Probe::launch(command.arg("--rootfs").arg(self.root()).args([&name, PROBE, STAY]));
        let (pid, cgroup) = self.member(&name);
        Container { probe, runtime: "containerd", id: name.clone(), name, image: None, pid, cgroup }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(address(self)).args(arguments);
        command
    }
}

fn address(ground: &Ground) -> String {
    format!("unix://{}", ground.path("docker.sock").display())
}

impl Default for Docker {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Docker {
    type Target = Ground;

    fn deref(&self) -> &Ground {
        &self.ground
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // It ends its containers first, and then its containerd.
        if let Ok(pid) = i32::try_from(self.daemon.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let has_ended = wait::until(wait::PATIENCE, || matches!(self.daemon.try_wait(), Ok(Some(_))));
        if !has_ended && !std::thread::panicking() {
            panic!("dockerd does not end: {}", self.read("log"));
        }
    }
}

/// Containers that the OCI runtime runs by itself, with nobody else to know of them.
#[derive(Debug)]
pub struct Alone(Ground);

impl Alone {
    #[must_use]
    pub fn new() -> Self {
        Self(Ground::new())
    }

    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str) -> Container {
        let name = self.name(name);
        let cgroup = format!("of-{name}");
        let namespaces = ["pid", "network", "mount", "ipc", "uts"].map(|kind| json!({ "type": kind }));
        let config = json!({
            "ociVersion": "1.0.2",
            "process": { "args": [PROBE, STAY], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": self.root() },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "cgroupsPath": format!("{}/{cgroup}", self.home.name()), "namespaces": namespaces },
        });
        must(fs::write(self.path("config.json"), config.to_string()), "write a bundle");
        let mut command = Command::new(runtime());
        let probe = Probe::launch(command.args(["run", "--bundle"]).arg(&self.folder.path).arg(&name));
        let (pid, cgroup) = self.member(&cgroup);
        Container { probe, runtime: runtime(), id: name.clone(), name, image: None, pid, cgroup }
    }
}

impl Default for Alone {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Alone {
    type Target = Ground;

    fn deref(&self) -> &Ground {
        &self.0
    }
}

/// A container of a user's own podman, in a cgroup of that user's. Dropping it ends the container.
#[derive(Debug)]
pub struct Rootless {
    pub probe: Probe,
    pub cgroup: Cgroup,
}

impl Rootless {
    /// Runs one. On a machine with cgroups of version 1, rootless podman makes no cgroups: so the test does, and moves the
    /// container there.
    #[must_use]
    #[track_caller]
    pub fn run(tenant: &Tenant, name: &str) -> Self {
        let [root, run, id, pid] = ["rootfs", "run", "id", "pid"].map(|file| tenant.path(file));
        make_root(&root);
        for folder in [&run, &tenant.path("home")] {
            must(fs::create_dir(folder), "make a folder of a user's");
        }
        let user = tenant.uid.to_string();
        output(Command::new("chown").args(["-R", &user]).arg(tenant.folder()));
        must(fs::set_permissions(&run, fs::Permissions::from_mode(0o700)), "close a folder");
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "podman"]);
        command.env("HOME", tenant.path("home")).env("XDG_RUNTIME_DIR", &run).current_dir(tenant.folder());
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.args(["--runtime", runtime(), "run", "--rm", "--interactive", "--network", "none", "--name", name]);
        command.args(ULIMITS).arg("--cidfile").arg(&id).arg("--pidfile").arg(&pid);
        let probe = Probe::launch(command.arg("--rootfs").arg(&root).args([PROBE, STAY]));
        let read = |path: &Path| must(fs::read_to_string(path), format_args!("read {}", path.display()));
        let cgroup = tenant.cgroup(&format!("libpod-{}", read(&id).trim()));
        must(fs::write(cgroup.path().join("cgroup.procs"), read(&pid).trim()), "move a container");
        Self { probe, cgroup }
    }
}

/// A command line.
fn words(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}

/// A container, and the probe in it, which is its first process.
#[derive(Debug)]
pub struct Container {
    pub probe: Probe,
    /// Who runs it, as events have it.
    pub runtime: &'static str,
    pub id: String,
    pub name: String,
    /// `None`: its runtime does not know of images, or keeps it to itself.
    pub image: Option<String>,
    /// Of its first process, on this machine.
    pub pid: u32,
    /// As events name it.
    pub cgroup: String,
}

impl Container {
    /// As events name it.
    #[must_use]
    pub fn named(&self) -> Value {
        let Self { runtime, id, name, image, .. } = self;
        json!({ "runtime": runtime, "id": id, "pod": null, "name": name, "image": image })
    }

    /// `ip` in its network.
    #[track_caller]
    pub fn ip(&self, arguments: &[&str]) {
        let namespace = format!("--net=/proc/{}/ns/net", self.pid);
        output(Command::new("nsenter").arg(namespace).arg("ip").args(arguments));
    }

    /// Lays a cable to another container. They have 192.0.2.1 and 192.0.2.2 then.
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
