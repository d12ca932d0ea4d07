//! Probes which options this kernel lets programs set, by setting them.
//!
//! A policy that sets each option to its harmless example from the option table is in force for a moment on a new
//! cgroup. A child process in the cgroup opens sockets of each kind, in a new network namespace. The counters then show
//! what the kernel accepted. All of these are removed afterwards.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
};

use abi::Counters;
use nix::sched::{CloneFlags, unshare};

use crate::{
    compile::{CompileError, Desired, Hook, SettingSource, compile},
    errno,
    host::{cgroup::Mount, network},
    kernel::{Answer, FilledTables, KernelError, Object, Target},
    options::SocketOption,
    policy::{self, Policy, model::Named},
    transient_cgroup::{TransientCgroup, TransientCgroupError},
};

/// The name under which this binary opens sample sockets.
pub const SAMPLE: &str = "sample-sockets";

#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error("{0}")]
    TransientCgroup(#[from] TransientCgroupError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("cannot open sockets to probe options: {0}")]
    Sample(io::Error),
}

/// Returns a policy that sets these options to their examples.
#[expect(clippy::panic, reason = "the option table's own examples are tested to be valid")]
pub fn policy_that_sets(options: &[&'static SocketOption]) -> Policy {
    // A rule can name a value once. If two options are names of one value, TCP sockets get the first, and other sockets
    // the second.
    let (first, others): (Vec<_>, Vec<_>) = options
        .iter()
        .partition(|option| option.other_names().any(|other| other.same_as.is_some() && options.contains(&other)));
    let rule = |selector: &str, options: &[&SocketOption]| {
        let settings: Vec<_> = options.iter().map(|option| format!("{} = {}", option.name, option.example)).collect();
        if settings.is_empty() {
            String::new()
        } else {
            format!("[[rule]]\n{selector}set = {{ {} }}\n", settings.join(", "))
        }
    };
    let rules = rule("match = { protocol = \"tcp\" }\n", &first) + &rule("", &others);
    let text = format!("[audit]\nreads = false\n{rules}");
    match policy::parse(Path::new("trial.toml"), &text) {
        Ok((policy, _)) => policy,
        Err(errors) => panic!("the examples of the option table are not valid:\n{errors}"),
    }
}

/// A child process in a new cgroup, which opens sockets on request. The programs can be loaded while it starts.
pub struct Sample {
    transient: TransientCgroup,
    process: Child,
}

impl Sample {
    /// Starts the process, which waits.
    ///
    /// # Errors
    ///
    /// Fails if the process or its cgroup cannot be made.
    pub fn start(mount: &Mount) -> Result<Self, TrialError> {
        let transient = TransientCgroup::make(mount, "-try")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(SAMPLE).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let process = transient.place_in(&mut command).and_then(|_| command.spawn()).map_err(TrialError::Sample)?;
        Ok(Self { transient, process })
    }

    /// Makes the process open its sockets, and waits until it exits.
    fn open_sockets(&mut self) -> io::Result<()> {
        drop(self.process.stdin.take());
        let mut message = String::new();
        if let Some(stderr) = &mut self.process.stderr {
            stderr.read_to_string(&mut message)?;
        }
        if self.process.wait()?.success() { Ok(()) } else { Err(io::Error::other(message.trim().to_owned())) }
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // Has no effect if the process has exited.
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            log::debug!("cannot kill the process that opens sockets: {error}");
        }
    }
}

/// Returns the tables that set these options to their examples.
///
/// # Errors
///
/// Fails if there are too many options.
pub fn desired(options: &[&'static SocketOption]) -> Result<Desired, CompileError> {
    compile(&[policy_that_sets(options)], &[vec![0]])
}

/// Probes options at these hooks, and returns the result for each.
///
/// # Errors
///
/// Fails if the options cannot be probed.
pub fn try_options(
    object: &mut Object,
    mut desired: Desired,
    tables: Option<FilledTables>,
    hooks: &[Hook],
    mount: &Mount,
    mut sample: Sample,
) -> Result<Vec<(&'static SocketOption, Answer)>, TrialError> {
    desired.keep_hooks(|hook| hooks.contains(&hook));
    let cgroup = mount.open(&sample.transient.cgroup.path).map_err(TransientCgroupError::from)?;
    let target = Target { cgroup, scope: 0, is_boundary: false };
    let (opened, counters) = object.in_force_on(&desired, tables, target, || sample.open_sockets())?;
    opened.map_err(TrialError::Sample)?;
    Ok(answers(&desired, &counters))
}

fn answers(desired: &Desired, counters: &[Counters]) -> Vec<(&'static SocketOption, Answer)> {
    let answer = |(source, counters): (&SettingSource, &Counters)| {
        let Named::Known(option) = source.option else { return None };
        let answer = if counters.set + counters.unchanged > 0 {
            Answer::Yes
        } else if counters.failed > 0 {
            Answer::No(errno::name(counters.failed_errno as i32))
        } else {
            Answer::Unknown("no socket passed the option's apply points".to_owned())
        };
        Some((option, answer))
    };
    desired.sources.iter().zip(counters).filter_map(answer).collect()
}

/// Opens sockets of each kind that policies reach.
///
/// # Errors
///
/// Fails if a socket cannot be opened.
pub fn sample() -> io::Result<()> {
    // Wait until the programs are attached.
    io::stdin().read_to_end(&mut Vec::new())?;
    // The host's firewall or a missing loopback address must not affect the result.
    if unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        network::bring_loopback_up()?;
    }
    let mut addresses = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        addresses.push((Ipv6Addr::LOCALHOST, 0).into());
    }
    for address in addresses {
        let listener = TcpListener::bind(address)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        drop((client, server));
        let receiver = UdpSocket::bind(address)?;
        let sender = UdpSocket::bind(address)?;
        sender.send_to(&[0], receiver.local_addr()?)?;
        sender.connect(receiver.local_addr()?)?;
    }
    Ok(())
}
