//! Real containers, with a probe in each.
//!
//! The image is of our own making: busybox, sockprobe and the libraries that this wants. Everything that an engine keeps lies in
//! a folder of its own, and its containers in a cgroup of its own, so that tests may run at the same time, and beside whatever
//! engines this machine has. The images of two engines are the same; the names of their containers are not, as tests choose
//! them by [`Podman::name`].

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    cgroup::{self, Cgroup},
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

/// A podman with a storage of its own. Dropping it removes its containers.
#[derive(Debug)]
pub struct Podman {
    /// The parent of its containers' cgroups.
    pub home: Cgroup,
    folder: Folder,
    /// What the names of its containers begin with.
    prefix: String,
}

impl Podman {
    /// The image that containers are made of.
    pub const IMAGE: &'static str = "localhost/sockpolicy-probe:1";

    /// Makes the image.
    #[must_use]
    pub fn new() -> Self {
        let podman = Self { home: Cgroup::new(), folder: Folder::new(), prefix: unique_name() };
        let (root, archive) = (podman.path("rootfs"), podman.path("rootfs.tar"));
        make_root(&root);
        output(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&archive).arg("."));
        output(podman.command(&["import", "--quiet"]).arg(&archive).arg(Self::IMAGE));
        podman
    }

    /// A name for a container that no other on this machine has.
    #[must_use]
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// A container without a network.
    #[must_use]
    #[track_caller]
    pub fn run(&self, name: &str, image: &str) -> Container {
        let name = self.name(name);
        let (id_file, pid_file) = (self.path(&format!("{name}.id")), self.path(&format!("{name}.pid")));
        let mut command = self.command(&["run", "--rm", "--interactive", "--network", "none", "--name", &name]);
        command.args(ULIMITS).arg("--cgroup-parent").arg(self.home.name());
        command.arg("--cidfile").arg(&id_file).arg("--pidfile").arg(&pid_file).args([image, PROBE, STAY]);
        let probe = Probe::launch(command);
        let read = |path: &Path| must(fs::read_to_string(path), format_args!("read {}", path.display()));
        let (id, pid) = (read(&id_file), must(read(&pid_file).trim().parse(), "tell a container's process"));
        let cgroup = format!("{}/libpod-{id}", self.home.name());
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path.join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.path("root")).arg("--runroot").arg(self.path("run"));
        command.arg("--tmpdir").arg(self.path("tmp"));
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

impl Drop for Podman {
    fn drop(&mut self) {
        // Also what it has mounted.
        let removed = self.command(&["rm", "--all", "--force", "--time", "0"]).stdin(Stdio::null()).output();
        if !removed.is_ok_and(|output| output.status.success()) && !std::thread::panicking() {
            panic!("cannot remove the containers of {}", self.folder.path.display());
        }
        remove_of_version_1(&self.home);
    }
}

/// Runtimes make a container's cgroup in every hierarchy.
fn remove_of_version_1(home: &Cgroup) {
    for path in cgroup::of_version_1(home.name().trim_start_matches('/')) {
        wait::until(wait::PATIENCE, || cgroup::remove(&path).is_ok());
    }
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
