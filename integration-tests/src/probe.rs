//! A running sockprobe: the process whose sockets the tests examine.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use nix::errno::Errno;

use crate::{
    built_binary,
    cgroup::Cgroup,
    must,
    options::SocketOption,
    process::workload,
    script::{Answer, Argument, Family, Fd, Hello, Kind, Step},
};

/// A sockprobe, which ends when this value is dropped.
#[derive(Debug)]
pub struct Probe {
    pub pid: u32,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// The child process, if this fixture has started it and not the agent.
    child: Option<Child>,
}

/// A TCP connection within a probe.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub listener: Fd,
    /// The address of `listener`.
    pub address: SocketAddr,
    /// The outbound end.
    pub client: Fd,
    /// The inbound end, accepted from `listener`.
    pub server: Fd,
}

/// Returns the path of the binary.
#[must_use]
pub fn program() -> PathBuf {
    built_binary("sockprobe")
}

impl Probe {
    /// Starts a probe in a cgroup, without an agent.
    #[must_use]
    pub fn start(cgroup: &Cgroup) -> Self {
        Self::start_copy(&program(), cgroup)
    }

    /// Starts a probe from a copy of the binary.
    #[must_use]
    pub fn start_copy(program: &Path, cgroup: &Cgroup) -> Self {
        let mut command = Command::new(program);
        cgroup.run_inside(&mut command);
        Self::launch(&mut command)
    }

    /// Starts a probe with this process id, which must be unused.
    #[must_use]
    #[track_caller]
    pub fn start_with_pid(pid: u32, cgroup: &Cgroup) -> Self {
        let mut command = Command::new(workload());
        command.args(["as", &pid.to_string()]).arg(program());
        cgroup.run_inside(&mut command);
        let probe = Self::launch(&mut command);
        assert_eq!(probe.pid, pid);
        probe
    }

    /// Starts a command that becomes a probe, or starts one.
    #[track_caller]
    pub(crate) fn launch(command: &mut Command) -> Self {
        let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = must(started, format_args!("start {command:?}"));
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut probe = Self::from_pipes(input, output)
            .unwrap_or_else(|reason| panic!("{command:?} did not start sockprobe: {reason}"));
        probe.child = Some(child);
        probe
    }

    /// Connects to a probe that another process has started.
    pub(crate) fn from_pipes(input: Option<ChildStdin>, output: Option<ChildStdout>) -> Result<Self, String> {
        let mut output = BufReader::new(output.ok_or("no standard output")?);
        let mut line = String::new();
        output.read_line(&mut line).map_err(|error| error.to_string())?;
        let Hello { pid } = serde_json::from_str(&line).map_err(|error| format!("{error} in {line:?}"))?;
        Ok(Self { pid, input, output, child: None })
    }

    /// Performs one request.
    #[track_caller]
    pub fn perform(&mut self, step: &Step) -> Answer {
        let line = must(serde_json::to_string(step), "write a step");
        let Some(input) = &mut self.input else { panic!("the probe has ended") };
        must(writeln!(input, "{line}"), format_args!("send {line} to the probe"));
        let mut line = String::new();
        must(self.output.read_line(&mut line), format_args!("read the answer to {step:?}"));
        assert!(!line.is_empty(), "the probe ended at {step:?}");
        must(serde_json::from_str(&line), format_args!("parse {line:?}"))
    }

    /// Performs a request, and returns the error of its system call.
    #[track_caller]
    fn call(&mut self, step: &Step) -> Result<Answer, Errno> {
        let answer = self.perform(step);
        if answer.result < 0 { Err(Errno::from_raw(answer.errno)) } else { Ok(answer) }
    }

    /// Performs a request that must succeed.
    #[track_caller]
    fn succeed(&mut self, step: &Step) -> Answer {
        match self.call(step) {
            Ok(answer) => answer,
            Err(errno) => panic!("{step:?} failed with {errno:?}"),
        }
    }

    pub fn try_open(&mut self, family: Family, kind: Kind) -> Result<Fd, Errno> {
        self.call(&Step::Socket { family, kind }).map(|answer| descriptor(&answer))
    }

    #[track_caller]
    pub fn open(&mut self, family: Family, kind: Kind) -> Fd {
        descriptor(&self.succeed(&Step::Socket { family, kind }))
    }

    /// Binds a socket, and returns its address.
    #[track_caller]
    pub fn bind(&mut self, fd: Fd, to: SocketAddr) -> SocketAddr {
        self.succeed(&Step::Bind { fd, to });
        self.local_address(fd)
    }

    #[track_caller]
    pub fn local_address(&mut self, fd: Fd) -> SocketAddr {
        self.succeed(&Step::LocalAddress { fd }).address.unwrap_or_else(|| panic!("socket {fd} has no address"))
    }

    #[track_caller]
    pub fn peer_address(&mut self, fd: Fd) -> SocketAddr {
        self.succeed(&Step::PeerAddress { fd }).address.unwrap_or_else(|| panic!("socket {fd} has no peer"))
    }

    /// Writes a file as the probe sees it, such as a file of its network namespace below /proc/sys.
    pub fn try_write(&mut self, path: &str, text: &str) -> Result<(), Errno> {
        self.call(&Step::Write { path: path.to_owned(), text: text.to_owned() }).map(drop)
    }

    #[track_caller]
    pub fn write(&mut self, path: &str, text: &str) {
        if let Err(errno) = self.try_write(path, text) {
            panic!("cannot write {path}: {errno:?}");
        }
    }

    #[track_caller]
    pub fn listen(&mut self, fd: Fd) {
        self.succeed(&Step::Listen { fd });
    }

    pub fn try_connect(&mut self, fd: Fd, to: SocketAddr) -> Result<(), Errno> {
        self.call(&Step::Connect { fd, to }).map(drop)
    }

    #[track_caller]
    pub fn connect(&mut self, fd: Fd, to: SocketAddr) {
        self.succeed(&Step::Connect { fd, to });
    }

    pub fn try_bind(&mut self, fd: Fd, to: SocketAddr) -> Result<(), Errno> {
        self.call(&Step::Bind { fd, to }).map(drop)
    }

    /// Sends a byte to an address.
    pub fn try_send(&mut self, fd: Fd, to: SocketAddr) -> Result<(), Errno> {
        self.call(&Step::Send { fd, to: Some(to) }).map(drop)
    }

    /// Permanently gives up root and every capability.
    #[track_caller]
    pub fn drop_privileges(&mut self) {
        self.succeed(&Step::DropPrivileges);
    }

    /// Disconnects a socket: connect(2) with AF_UNSPEC.
    #[track_caller]
    pub fn disconnect(&mut self, fd: Fd) {
        self.succeed(&Step::Disconnect { fd });
    }

    #[track_caller]
    pub fn accept(&mut self, fd: Fd) -> Fd {
        descriptor(&self.succeed(&Step::Accept { fd }))
    }

    /// Sends a byte, to the peer or to an address.
    #[track_caller]
    pub fn send(&mut self, fd: Fd, to: Option<SocketAddr>) {
        self.succeed(&Step::Send { fd, to });
    }

    /// Waits for a byte.
    #[track_caller]
    pub fn receive(&mut self, fd: Fd) {
        let answer = self.succeed(&Step::Receive { fd });
        assert_eq!(answer.result, 1, "received nothing: the connection is closed");
    }

    #[track_caller]
    pub fn close(&mut self, fd: Fd) {
        self.succeed(&Step::Close { fd });
    }

    /// Moves the probe to `cgroup`. Sockets that are opened afterwards belong to it.
    #[track_caller]
    pub fn enter(&mut self, cgroup: &Cgroup) {
        self.succeed(&Step::EnterCgroup { path: cgroup.path().display().to_string() });
    }

    /// Calls setsockopt.
    #[track_caller]
    pub fn set(&mut self, fd: Fd, option: SocketOption, argument: impl Into<Argument>) -> Result<(), Errno> {
        let SocketOption { level, number: name, .. } = option;
        self.call(&Step::Set { fd, level, name, argument: argument.into() }).map(drop)
    }

    /// Calls getsockopt with a buffer of `len` bytes.
    #[track_caller]
    pub fn get(&mut self, fd: Fd, option: SocketOption, len: u32) -> Result<Vec<u8>, Errno> {
        let SocketOption { level, number: name, .. } = option;
        self.call(&Step::Get { fd, level, name, len, bad_pointer: false }).map(|answer| answer.value)
    }

    /// Returns the value of an `int` option. Panics if getsockopt fails.
    #[track_caller]
    pub fn int(&mut self, fd: Fd, option: SocketOption) -> i32 {
        let value = self.get(fd, option, 4).unwrap_or_else(|errno| panic!("{} cannot be read: {errno:?}", option.name));
        let bytes = value.as_slice().try_into();
        i32::from_ne_bytes(bytes.unwrap_or_else(|_| panic!("{} is no int: {value:?}", option.name)))
    }

    /// Returns the value of an option that is a name. Panics if getsockopt fails.
    #[track_caller]
    pub fn text(&mut self, fd: Fd, option: SocketOption) -> String {
        let value =
            self.get(fd, option, 16).unwrap_or_else(|errno| panic!("{} cannot be read: {errno:?}", option.name));
        let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// Returns the value that a new TCP socket has.
    #[track_caller]
    pub fn value_on_new_socket(&mut self, option: SocketOption) -> i32 {
        let fd = self.open(Family::Inet, Kind::Tcp);
        self.int(fd, option)
    }

    /// Opens a listener on a loopback address.
    #[track_caller]
    pub fn listener(&mut self, family: Family, kind: Kind) -> (Fd, SocketAddr) {
        let fd = self.open(family, kind);
        let address = self.bind(fd, family.loopback());
        self.listen(fd);
        (fd, address)
    }

    /// Returns the value of an option that is an int on a new TCP listener.
    #[track_caller]
    pub fn value_on_listener(&mut self, option: SocketOption) -> i32 {
        let (listener, _) = self.listener(Family::Inet, Kind::Tcp);
        self.int(listener, option)
    }

    /// Opens a connection over a loopback address.
    #[track_caller]
    pub fn pair(&mut self, family: Family, kind: Kind) -> Pair {
        let (listener, address) = self.listener(family, kind);
        let client = self.open(family, kind);
        self.connect(client, address);
        let server = self.accept(listener);
        Pair { listener, address, client, server }
    }

    /// Sends a byte in each direction.
    #[track_caller]
    pub fn exchange_bytes(&mut self, one: Fd, other: Fd) {
        self.send(one, None);
        self.receive(other);
        self.send(other, None);
        self.receive(one);
    }

    /// Sends many bytes in one direction, as fast as they are received.
    #[track_caller]
    pub fn transfer(&mut self, from: Fd, to: Fd, len: usize) {
        self.succeed(&Step::Transfer { from, to, len });
    }

    /// Closes the probe's input, which makes it end.
    pub fn end(&mut self) {
        drop(self.input.take());
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.end();
        if let Some(child) = &mut self.child {
            // The probe waits only for its input, and its alarm ends it otherwise.
            let _ = child.wait();
        }
    }
}

fn descriptor(answer: &Answer) -> Fd {
    i32::try_from(answer.result).unwrap_or(-1)
}
