//! `sockpolicy explain`: which rule decides each option of a socket, and why the others do not.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use super::{FAILURE, FINDINGS, check, complain, output::Format, unless_closed};
use crate::{
    compile::compile,
    explain::{Explanation, explain},
    policy::{
        End, Socket, TwoFamilies,
        model::{Direction, Family, Protocol},
        parse_end,
    },
};

/// Say which rule decides each option of a socket, and why the others do not
///
/// The socket is described by what is known of it. What is left out may yet be anything, as it is when a socket has just
/// been made.
#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    /// Policy files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The socket's protocol: tcp, udp, icmp, sctp or other
    #[arg(long, value_name = "NAME", default_value = "tcp", value_parser = one_of(Protocol::WORDS))]
    protocol: Protocol,
    /// ipv4 or ipv6; addresses say it too
    #[arg(long, value_name = "NAME", value_parser = one_of(Family::WORDS))]
    family: Option<Family>,
    /// outbound (it connects) or inbound (it listens, or was accepted)
    #[arg(long, value_name = "WORD", value_parser = one_of(Direction::WORDS))]
    direction: Option<Direction>,
    /// Its own address, port or both: 10.0.0.1, :443, 10.0.0.1:443, [::1]:443
    #[arg(long, value_name = "ADDRESS", value_parser = end)]
    local: Option<End>,
    /// Its peer: 192.0.2.1:443, [2001:db8::1]:443
    #[arg(long, value_name = "ADDRESS:PORT")]
    remote: Option<SocketAddr>,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}\n  help: give addresses of one family; an IPv4-mapped address is an IPv4 one")]
struct Impossible(#[from] TwoFamilies);

impl Explain {
    pub(super) fn run(self) -> ExitCode {
        let socket = match self.socket() {
            Ok(socket) => socket,
            Err(error) => {
                complain(&error);
                return FAILURE.into();
            }
        };
        let Some(policies) = check::load(&self.files) else { return FINDINGS.into() };
        let desired = match compile(&policies) {
            Ok(desired) => desired,
            Err(error) => {
                complain(&error);
                return FINDINGS.into();
            }
        };
        match unless_closed(self.tell(&explain(&desired, &socket))) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        }
    }

    fn socket(&self) -> Result<Socket, Impossible> {
        Ok(Socket::new(self.protocol, self.family, self.direction, self.local.unwrap_or_default(), self.remote)?)
    }

    fn tell(&self, explanation: &Explanation) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self.output {
            Format::Text => write!(out, "{explanation}"),
            Format::Json => explanation.options.iter().try_for_each(|option| writeln!(out, "{}", option.to_json())),
        }
    }
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
