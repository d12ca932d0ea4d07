//! `sockpolicy doctor`: what this kernel can do, found by doing it.
//!
//! The options are tried by the real thing: a policy that sets every one of them, in force on a
//! cgroup of our own in which a process of ours opens sockets of each kind, in a network namespace of
//! its own. The counters then say what the kernel took.

use std::{
    fs,
    io::{self, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Command, ExitCode},
};

use comfy_table::{Table, presets};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use super::{
    FAILURE, complain,
    output::{Format, describe_audit},
    unless_closed,
};
use crate::{
    compile::{Hook, compile},
    enclosure::{Enclosure, EnclosureError},
    events::Filter,
    host::{
        btf::Types,
        cgroup::{CgroupError, Mount},
        network, privileges,
    },
    kernel::{self, Answer, Backend, BackendChoice, KernelError, Neighbour, Target, Tried},
    options::{OPTIONS, SocketOption},
    policy,
    report::{Summary, errno_name},
    session::{Session, SessionError, Setup},
};

/// The name by which this binary opens sample sockets.
pub(super) const SAMPLE: &str = "sample-sockets";

/// Show what this kernel can do: hooks, audit backends, options
///
/// Everything is tried: on a cgroup made for it, with sockets made for it, in a network namespace
/// made for it, all of which are gone afterwards.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
enum DoctorError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Enclosure(#[from] EnclosureError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot tell which programs are attached to cgroups: {0}")]
    Neighbours(io::Error),
    #[error("cannot run the sample of sockets: {0}")]
    Sample(io::Error),
    #[error("cannot write the answer: {0}")]
    Write(#[source] io::Error),
}

/// Everything that was found.
struct Findings {
    kernel: String,
    cgroup2: String,
    /// Why the kernel's types are not known, if they are not.
    btf: Result<(), String>,
    hooks: Vec<(Hook, Answer)>,
    backends: Vec<(Backend, Tried)>,
    options: Vec<(&'static SocketOption, Answer)>,
    /// The programs that are attached to cgroups already.
    neighbours: Vec<Neighbour>,
}

impl Doctor {
    pub(super) fn run(self) -> ExitCode {
        match examine().and_then(|findings| self.tell(&findings)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        }
    }

    fn tell(&self, findings: &Findings) -> Result<(), DoctorError> {
        let mut out = io::stdout().lock();
        let written = match self.output {
            Format::Text => findings.write_text(&mut out),
            Format::Json => findings.write_json(&mut out),
        };
        unless_closed(written).map_err(DoctorError::Write)
    }
}

fn examine() -> Result<Findings, DoctorError> {
    kernel::check_privileges()?;
    let mount = Mount::find()?;
    let enclosure = Enclosure::make(&mount)?;
    let hooks = kernel::hooks(&enclosure.cgroup)?;
    let backends = kernel::audit_backends()?;
    let options = try_options(&mount, &enclosure, &hooks)?;
    enclosure.remove()?;
    let neighbours = kernel::neighbours(&mount).map_err(DoctorError::Neighbours)?;
    Ok(Findings {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        cgroup2: mount.path.display().to_string(),
        btf: Types::of_kernel().map(drop).map_err(|error| error.to_string()),
        hooks,
        backends,
        options,
        neighbours,
    })
}

/// Sets every option on sockets of our own.
fn try_options(
    mount: &Mount,
    enclosure: &Enclosure,
    hooks: &[(Hook, Answer)],
) -> Result<Vec<(&'static SocketOption, Answer)>, DoctorError> {
    // One at a time would be exact about each, and slow; all at once disturb each other only where
    // one option resets another.
    let (policy, _) =
        policy::parse(Path::new("doctor.toml"), &sample_policy()).unwrap_or_else(|errors| unreachable_policy(&errors));
    let mut desired = compile(&[policy], &[vec![0]]).map_err(SessionError::from)?;
    desired.keep_hooks(|hook| hooks.iter().any(|(known, answer)| *known == hook && *answer == Answer::Yes));
    let target = Target { cgroup: mount.open(&enclosure.cgroup.path)?, scope: 0 };
    let session = Session::start(Setup {
        desired,
        mount: mount.clone(),
        targets: vec![target],
        backend: BackendChoice::None,
        filter: Filter::default(),
    })?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(SAMPLE);
    enclosure.enclose(&mut command).map_err(DoctorError::Sample)?;
    let output = command.output().map_err(DoctorError::Sample)?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(DoctorError::Sample(io::Error::other(reason)));
    }
    Ok(answers(&session.finish()?))
}

#[expect(clippy::panic, reason = "the option table's own examples are tested to be valid")]
fn unreachable_policy(errors: &policy::PolicyErrors) -> ! {
    panic!("the examples of the option table are not valid:\n{errors}")
}

/// A policy that sets every option to its example.
fn sample_policy() -> String {
    let settable = OPTIONS.iter().filter(|option| option.settable().is_some());
    let settings: Vec<String> = settable.map(|option| format!("{} = {}", option.name, option.example)).collect();
    format!("[[rule]]\nset = {{ {} }}\n", settings.join(", "))
}

fn answers(summary: &Summary) -> Vec<(&'static SocketOption, Answer)> {
    let settable = OPTIONS.iter().filter(|option| option.settable().is_some());
    let answer = |option: &'static SocketOption| {
        let line = summary.lines.iter().find(|line| line.source.option.key() == option.key());
        let answer = match line.map(|line| line.counters) {
            Some(counters) if counters.set + counters.unchanged > 0 => Answer::Yes,
            Some(counters) if counters.failed > 0 => Answer::No(errno_name(counters.failed_errno as i32)),
            _ => Answer::Unknown("no socket came by".to_owned()),
        };
        (option, answer)
    };
    settable.map(answer).collect()
}

/// Opens sockets of each kind that policies reach.
pub(super) fn sample() -> ExitCode {
    match open_sockets() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            FAILURE.into()
        }
    }
}

fn open_sockets() -> io::Result<()> {
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
        sender.connect(receiver.local_addr()?)?;
    }
    Ok(())
}

impl Findings {
    fn write_text(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { kernel, cgroup2, btf, hooks, backends, options, neighbours } = self;
        writeln!(out, "kernel {kernel}, cgroup2 at {cgroup2}, {}", if btf.is_ok() { "BTF" } else { "no BTF" })?;
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["", "works", "why not", "since"]);
        for (hook, answer) in hooks {
            table.add_row(row(hook.name(), answer, hook.since()));
        }
        for (backend, found) in backends {
            table.add_row(row(&format!("audit by {backend}"), &backend_answer(found), ""));
        }
        for (option, answer) in options {
            let since = option.settable().map_or("", |settable| settable.since);
            table.add_row(row(&format!("set {}", option.name), answer, since));
        }
        writeln!(out, "\n{table}\n")?;
        match backends.iter().find_map(|(_, found)| found.as_ref().ok()) {
            Some(audit) => writeln!(out, "applications' calls are seen: {}", describe_audit(*audit))?,
            None => writeln!(out, "the calls of applications cannot be seen: only conflicts, without their results")?,
        }
        if let Err(reason) = btf {
            writeln!(out, "events do not tell what sockets say of themselves: {reason}")?;
        }
        writeln!(
            out,
            "no cgroup hook sees the setsockopt calls of 32-bit programs: they are judged by fentry and kprobe only, \
             and never changed"
        )?;
        for neighbour in neighbours {
            writeln!(out, "attached already, at {}: {neighbour}", neighbour.hook)?;
        }
        Ok(())
    }

    fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { kernel, cgroup2, btf, hooks, backends, options, neighbours } = self;
        let missing = privileges::missing_capabilities();
        let answer = json!({
            "schema": crate::events::SCHEMA,
            "kernel": kernel,
            "cgroup2": cgroup2,
            "btf": btf.is_ok(),
            "missing_capabilities": missing,
            "hooks": hooks.iter().map(|(hook, answer)| line(hook.name(), answer)).collect::<Vec<_>>(),
            "audit": backends.iter().map(|(backend, found)| backend_line(*backend, found)).collect::<Vec<_>>(),
            "options": options.iter().map(|(option, answer)| line(option.name, answer)).collect::<Vec<_>>(),
            "attached": neighbours.iter().map(Neighbour::to_json).collect::<Vec<_>>(),
        });
        writeln!(out, "{answer}")
    }
}

fn words(answer: &Answer) -> (&'static str, &str) {
    match answer {
        Answer::Yes => ("yes", ""),
        Answer::No(reason) => ("no", reason),
        Answer::Unknown(reason) => ("could not tell", reason),
    }
}

fn backend_answer(found: &Tried) -> Answer {
    match found {
        Ok(_) => Answer::Yes,
        Err(reason) => Answer::No(reason.clone()),
    }
}

fn backend_line(backend: Backend, found: &Tried) -> serde_json::Value {
    let mut line = line(backend.name(), &backend_answer(found));
    if let Ok(audit) = found {
        line["points"] = audit.points().collect();
        line["blind_to"] = audit.blind_to().into();
    }
    line
}

fn row(name: &str, answer: &Answer, since: &str) -> [String; 4] {
    let (word, reason) = words(answer);
    // Who has it need not know since when it is there.
    let since = if *answer == Answer::Yes { "" } else { since };
    [name, word, reason, since].map(str::to_owned)
}

fn line(name: &str, answer: &Answer) -> serde_json::Value {
    let (word, reason) = words(answer);
    json!({ "name": name, "works": word, "reason": (!reason.is_empty()).then_some(reason) })
}
