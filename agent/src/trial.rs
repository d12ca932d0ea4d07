//! Which options this kernel lets programs set, found by setting them.
//!
//! A policy that sets each of them to a harmless value, the option table's example, is in force for a moment on a cgroup made
//! for it, where a process of ours opens sockets of each kind in a network namespace of its own. The counters then say what
//! the kernel took. Nothing of all this is left.

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

/// The name by which this binary opens sample sockets.
pub const SAMPLE: &str = "sample-sockets";

#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error(transparent)]
    Enclosure(#[from] TransientCgroupError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("cannot open sockets to try options on: {0}")]
    Sample(io::Error),
}

/// A policy that sets these options to their examples.
#[expect(clippy::panic, reason = "the option table's own examples are tested to be valid")]
pub fn policy_that_sets(options: &[&'static SocketOption]) -> Policy {
    // A rule names a value once. Where an option is another name of one, TCP sockets are given the one, all others the other.
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

/// A process of ours in a cgroup made for it, that is to open sockets. It takes a while to get there, in which the programs can
/// be loaded.
pub struct Sample {
    enclosure: TransientCgroup,
    process: Child,
}

impl Sample {
    /// Starts the process. It waits.
    ///
    /// # Errors
    ///
    /// Where it cannot be started, or not in a cgroup of its own.
    pub fn start(mount: &Mount) -> Result<Self, TrialError> {
        let enclosure = TransientCgroup::make(mount, "-try")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(SAMPLE).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let process = enclosure.enclose(&mut command).and_then(|()| command.spawn()).map_err(TrialError::Sample)?;
        Ok(Self { enclosure, process })
    }

    /// Has the process open its sockets, and end.
    fn open_sockets(&mut self) -> io::Result<()> {
        drop(self.process.stdin.take());
        let mut complaint = String::new();
        if let Some(stderr) = &mut self.process.stderr {
            stderr.read_to_string(&mut complaint)?;
        }
        if self.process.wait()?.success() { Ok(()) } else { Err(io::Error::other(complaint.trim().to_owned())) }
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // Nothing happens where it has ended.
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            log::debug!("cannot end the process that opens sockets: {error}");
        }
    }
}

/// What has these options tried when it is in force.
///
/// # Errors
///
/// Where there are too many of them.
pub fn desired(options: &[&'static SocketOption]) -> Result<Desired, CompileError> {
    compile(&[policy_that_sets(options)], &[vec![0]])
}

/// Tries options at these hooks; gives what came of each.
///
/// # Errors
///
/// Where it cannot be tried.
pub fn try_options(
    object: &mut Object,
    mut desired: Desired,
    tabled: Option<FilledTables>,
    hooks: &[Hook],
    mount: &Mount,
    mut sample: Sample,
) -> Result<Vec<(&'static SocketOption, Answer)>, TrialError> {
    desired.keep_hooks(|hook| hooks.contains(&hook));
    let cgroup = mount.open(&sample.enclosure.cgroup.path).map_err(TransientCgroupError::from)?;
    let target = Target { cgroup, scope: 0 };
    let (sampled, counters) = object.in_force_on(&desired, tabled, target, || sample.open_sockets())?;
    sampled.map_err(TrialError::Sample)?;
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
            Answer::Unknown("no socket came by".to_owned())
        };
        Some((option, answer))
    };
    desired.sources.iter().zip(counters).filter_map(answer).collect()
}

/// Opens sockets of each kind that policies reach.
///
/// # Errors
///
/// Where one cannot be opened.
pub fn sample() -> io::Result<()> {
    // Until there is something to try.
    io::stdin().read_to_end(&mut Vec::new())?;
    // A firewall or a missing loopback address of the host must not tell us about the kernel.
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
