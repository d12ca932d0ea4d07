//! `sockpolicy explain`: which rule decides each option of a socket, and why the others do not.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{
    FAILURE, FINDINGS, check,
    descriptor::stdout,
    ignore_broken_pipe,
    output::{Format, TrustArgs},
    print_error,
    status::{self, InForce, StatusError},
};
use crate::{
    compile::{CompileError, compile},
    coverage::{all, stack_of},
    escape::Escape,
    explain::{Explanation, explain},
    host::{
        cgroup::{self, Mount},
        inspect::InspectError,
    },
    kernel,
    live::SocketSnapshot,
    policy::{
        End, Policy, Socket, TwoFamilies,
        model::{Direction, Family, Protocol},
        parse_end,
    },
    reconcile::{Selection, Sockets},
    targets::containers,
};

/// Show which rule decides each option of a socket, and why other rules do not
///
/// The options below describe the socket, or select a socket of a process. Facts that are not given are unknown, as they are when a socket is created.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy explain web.toml --direction inbound --local :443\n  sockpolicy explain web.toml --pid 812 --fd 7\n  sockpolicy explain --instance default --pid 812 --fd 7"
)]
pub(super) struct Explain {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required_unless_present = "instance", value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    /// Use the policies that this instance has in force, instead of files
    #[arg(long, value_name = "NAME", conflicts_with = "files")]
    instance: Option<String>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Use a socket of this process. If it has several, select one with --fd, --local or --remote
    #[arg(long, value_name = "PID", conflicts_with_all = ["protocol", "family"])]
    pid: Option<u32>,
    /// File descriptor of the socket in the process
    #[arg(long, value_name = "NUMBER", requires = "pid")]
    fd: Option<i32>,
    /// Protocol: tcp (default), udp, icmp, sctp or other
    #[arg(long, value_name = "NAME", value_parser = one_of(Protocol::WORDS))]
    protocol: Option<Protocol>,
    /// Address family: ipv4 or ipv6. An address implies it
    #[arg(long, value_name = "NAME", value_parser = one_of(Family::WORDS))]
    family: Option<Family>,
    /// outbound (connects) or inbound (listens, or was accepted). It is unknown for a connected socket of a process
    #[arg(long, value_name = "WORD", value_parser = one_of(Direction::WORDS))]
    direction: Option<Direction>,
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = end,
        help = "Local address, port or both: 10.0.0.1, :443, 10.0.0.1:443, [::1]:443"
    )]
    local: Option<End>,
    #[arg(long, value_name = "ADDRESS:PORT", help = "Remote address and port: 192.0.2.1:443, [2001:db8::1]:443")]
    remote: Option<SocketAddr>,
    /// Cgroup in which the socket is created: a path below the cgroup2 mount. The cgroup need not exist. With --pid, the default is the cgroup of the process
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
enum NoSocket {
    #[error("{0}\n  help: give addresses of one family; an IPv4-mapped address is an IPv4 one")]
    Impossible(#[from] TwoFamilies),
    #[error("cannot inspect process {pid}: {source}\n  help: check that it exists: ps {pid}; run sockpolicy as root")]
    Process { pid: u32, source: InspectError },
    #[error("process {pid} has no IPv4 or IPv6 socket")]
    None { pid: u32 },
    #[error("process {pid} has no such socket; it has{}\n  help: choose one with --fd", list(.sockets))]
    Others { pid: u32, sockets: Vec<(i32, Socket)> },
    #[error("process {pid} has several such sockets:{}\n  help: choose one with --fd", list(.sockets))]
    Several { pid: u32, sockets: Vec<(i32, Socket)> },
}

#[derive(Debug, thiserror::Error)]
enum ExplainError {
    #[error("{0}")]
    Compile(#[from] CompileError),
    #[error(
        "policies `{one}` and `{other}` have different targets: which of them cover the socket depends on its \
         cgroup\n  help: name the cgroup: --cgroup PATH"
    )]
    WhichCgroup { one: String, other: String },
    #[error(
        "which policies of the instance cover the socket depends on its cgroup\n  help: name the cgroup: --cgroup PATH"
    )]
    NoCgroup,
    #[error("{0}")]
    InForce(#[from] Box<StatusError>),
    #[error("none of the policies covers cgroup /{}", .0.escaped())]
    Uncovered(PathBuf),
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
}

fn explanation(policies: &[Policy], socket: &Socket) -> Result<Explanation, ExplainError> {
    let stack = match &socket.cgroup {
        Some(cgroup) => {
            let listing = containers::wanted_by(policies);
            containers::warn_of_hidden(&listing);
            stack_of(policies, cgroup, &listing.running).map_err(CompileError::from)?
        }
        None => match policies.iter().find(|policy| policy.target != policies[0].target) {
            None => all(policies),
            Some(other) => {
                let (one, other) = (policies[0].name.clone(), other.name.clone());
                return Err(ExplainError::WhichCgroup { one, other });
            }
        },
    };
    if let (true, Some(cgroup)) = (stack.is_empty(), &socket.cgroup) {
        return Err(ExplainError::Uncovered(cgroup.clone()));
    }
    let desired = compile(policies, &[stack])?;
    Ok(explain(&desired, &desired.scopes[0], socket))
}

/// Explains a socket by the policies that an instance has in force.
fn explanation_by(instance: &str, socket: &Socket) -> Result<Explanation, ExplainError> {
    let InForce { generation, desired, .. } = status::in_force(instance).map_err(Box::new)?;
    let Some(cgroup) = &socket.cgroup else { return Err(ExplainError::NoCgroup) };
    let name = Path::new("/").join(cgroup);
    let targets = generation.targets.iter().chain(&generation.boundaries);
    let around = targets.filter(|(target, _)| name.starts_with(target));
    let deepest = around.max_by_key(|(target, _)| Path::new(target).components().count());
    let scope = deepest.and_then(|(_, scope)| desired.scopes.get(*scope));
    let scope = scope.ok_or_else(|| ExplainError::Uncovered(cgroup.clone()))?;
    Ok(explain(&desired, scope, socket))
}

/// Returns the path of a cgroup below the mount, from a path on the command line.
fn below_mount(path: &Path) -> PathBuf {
    let in_mount = Mount::find().ok().and_then(|mount| path.strip_prefix(&mount.path).ok().map(Path::to_owned));
    in_mount.unwrap_or_else(|| path.strip_prefix("/").unwrap_or(path).to_owned())
}

fn list(sockets: &[(i32, Socket)]) -> String {
    let lines: Vec<_> = sockets.iter().map(|(fd, socket)| format!("\n  --fd {fd}: {socket}")).collect();
    lines.concat()
}

impl Explain {
    pub(super) fn run(self) -> ExitCode {
        let socket = match self.socket() {
            Ok(socket) => socket,
            Err(error) => {
                print_error(&error);
                return FAILURE.into();
            }
        };
        let explained = match &self.instance {
            Some(name) => explanation_by(name, &socket),
            None => match check::load_compiled(&self.files, self.trust.or_warn()) {
                Some(policies) => explanation(&policies, &socket),
                None => return FINDINGS.into(),
            },
        };
        let told =
            explained.and_then(|explanation| ignore_broken_pipe(self.write(&explanation)).map_err(ExplainError::Write));
        match told {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn socket(&self) -> Result<Socket, NoSocket> {
        let local = self.local.unwrap_or_default();
        let protocol = self.protocol.unwrap_or(Protocol::Tcp);
        let described = Socket::new(protocol, self.family, self.direction, local, self.remote)?;
        let asked = self.cgroup.as_deref().map(below_mount);
        let Some(pid) = self.pid else { return Ok(Socket { cgroup: asked, ..described }) };
        let all = kernel::inspector().all_of(pid).map_err(|source| NoSocket::Process { pid, source })?;
        let cookies: HashMap<i32, u64> = all.iter().map(|(fd, entry)| (*fd, entry.cookie)).collect();
        let sockets = all.into_iter().filter_map(|(fd, entry)| Some((fd, entry.facts()?)));
        let is_match = |(fd, socket): &(i32, Socket)| {
            self.fd.is_none_or(|asked| asked == *fd)
                && described.local.is_none_or(|asked| socket.local == Some(asked))
                && described.local_port.is_none_or(|asked| socket.local_port == Some(asked))
                && described.remote.is_none_or(|asked| socket.remote == Some(asked))
        };
        let (mut matching, others): (Vec<_>, Vec<_>) = sockets.partition(is_match);
        match (matching.pop(), matching.is_empty()) {
            (Some((fd, socket)), true) => {
                let listed = cookies.get(&fd).and_then(|cookie| listed(*cookie));
                let (direction, home) = match listed {
                    Some(SocketSnapshot { facts, cgroup, .. }) => (facts.direction, cgroup),
                    None => (None, None),
                };
                // The kernel does not list a socket that is neither bound nor connected.
                let home = home.map(|home| PathBuf::from(home.trim_start_matches('/')));
                Ok(Socket {
                    direction: self.direction.or(direction).or(socket.direction),
                    cgroup: asked.or(home).or_else(|| cgroup::of_process(pid)),
                    ..socket
                })
            }
            (Some(last), false) => {
                matching.push(last);
                Err(NoSocket::Several { pid, sockets: matching })
            }
            (None, _) if others.is_empty() => Err(NoSocket::None { pid }),
            (None, _) => Err(NoSocket::Others { pid, sockets: others }),
        }
    }

    fn write(&self, explanation: &Explanation) -> io::Result<()> {
        let mut out = stdout(self.output);
        match self.output {
            Format::Text => write!(out, "{explanation}")?,
            Format::Json => explanation.options.iter().try_for_each(|option| writeln!(out, "{}", option.to_json()))?,
        }
        out.flush()
    }
}

/// Returns the socket with this cookie, as `verify` describes it.
fn listed(cookie: u64) -> Option<SocketSnapshot> {
    let mount = Mount::find().inspect_err(|error| log::debug!("{error}")).ok()?;
    let sockets = Sockets::find(mount, Selection::All, || None, kernel::inspector());
    sockets.inspect_err(|error| log::debug!("{error}")).ok()?.find_by_cookie(cookie)
}

/// A word of policy files.
fn one_of<T: Copy + Send + Sync + 'static>(
    words: &'static [(&'static str, T)],
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let found = words.iter().find(|(word, _)| *word == text);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            format!("it is one of {}", words.join(", "))
        })
    }
}

fn end(text: &str) -> Result<End, &'static str> {
    parse_end(text).ok_or("write an address, a port after a colon, or both")
}
