//! `sockpolicy verify`: which live sockets do not have what the policies say.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

use super::{
    FAILURE, FINDINGS, check,
    descriptor::stdout,
    ignore_broken_pipe,
    live_sockets::LiveSocketsError,
    output::{Format, TrustArgs},
    print_error,
    progress::Progress,
};
use crate::{
    compile::{Desired, compile},
    events::Event,
    host::cgroup::Mount,
    kernel,
    live::{
        OptionRead,
        drift::{self, Finding},
    },
    plural::counted,
    policy::Policy,
    reconcile::{InspectedSocket, Selection, Sockets},
    schema, skipped,
    targets::ResolvedTargets,
};

/// Compare existing sockets with policies
///
/// Compares each socket of the targets with the rules that decide its options, whether or not the policies are in force. Changes nothing. A value that a policy in force would not have set is no drift. A limit applies only to values that somebody set. Exit status: 0 no drift, 1 drift, 2 some sockets could not be inspected.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy verify web.toml\n  sockpolicy verify web.toml --cgroup system.slice/nginx.service --output json"
)]
pub(super) struct Verify {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Cgroup to use instead of the targets of the policies: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// The counts of a comparison.
#[derive(Debug, Default)]
struct Tally {
    /// Sockets that were looked into.
    sockets: u64,
    /// Sockets that drifted, and the number of their options that did.
    drifted: u64,
    drifts: u64,
    /// Sockets to which no descriptor leads.
    no_fd: u64,
    /// Sockets that must not be looked into, and processes of which it is not known what they have.
    denied: u64,
    unread: usize,
    /// Sockets that do not answer, of all that were to be looked into.
    unanswered: usize,
    /// Options for which it is unknown whether they agree, with the reason and the number of sockets.
    unknown: BTreeMap<(&'static str, &'static str), u64>,
}

impl Verify {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files, self.trust.or_warn()) else { return FAILURE.into() };
        match self.verify(&policies) {
            Ok(tally) if tally.drifts > 0 => FINDINGS.into(),
            Ok(tally) if tally.denied > 0 || tally.unread > 0 || tally.unanswered > 0 => FAILURE.into(),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn verify(&self, policies: &[Policy]) -> Result<Tally, LiveSocketsError> {
        let mount = Mount::find()?;
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        let ResolvedTargets { stacks, targets, .. } = ResolvedTargets::find(&mount, &self.cgroup, policies)?;
        let mut desired = compile(policies, &stacks)?;
        kernel::leave_out_absent_hooks(&mut desired);
        let mut sockets = Sockets::find(mount, Selection::of(&targets), || None, kernel::inspector())?;
        let mut tally = Tally { unread: sockets.unread(), ..Tally::default() };
        let progress = Progress::of(sockets.count());
        let mut out = stdout(self.output);
        let written = sockets.each(
            |scope| drift::needed(&desired.scopes[scope]),
            |seen| {
                progress.step(1);
                look(&desired, seen, &mut tally, |event| progress.above(|| self.say(event, &mut out)))
            },
        );
        drop(progress);
        tally.unanswered = sockets.skipped().len();
        skipped::warn_of(&sockets.skipped());
        ignore_broken_pipe(written.and_then(|()| self.write(&tally, &mut out)))?;
        Ok(tally)
    }

    fn say(&self, event: &Event, out: &mut impl Write) -> io::Result<()> {
        match self.output {
            Format::Text => writeln!(out, "{event}"),
            Format::Json => writeln!(out, "{}", event.to_json()),
        }
    }

    fn write(&self, tally: &Tally, out: &mut impl Write) -> io::Result<()> {
        match self.output {
            Format::Text => tally.write_text(out),
            Format::Json => writeln!(out, "{}", tally.to_json()),
        }
    }
}

/// Counts the findings of a socket, and reports its drift.
fn look(
    desired: &Desired,
    seen: InspectedSocket<'_>,
    tally: &mut Tally,
    mut say: impl FnMut(&Event) -> io::Result<()>,
) -> io::Result<()> {
    let InspectedSocket { live, scope, fresh, socket: _ } = seen;
    let Some(mut fresh) = fresh else {
        match live.values {
            OptionRead::Denied(_) => tally.denied += 1,
            OptionRead::NoFd | OptionRead::Values(_) => tally.no_fd += 1,
        }
        return Ok(());
    };
    tally.sockets += 1;
    let before = tally.drifts;
    for finding in drift::find(desired, &desired.scopes[scope], &live, &mut fresh) {
        match finding {
            Finding::Unknown { option, why } => *tally.unknown.entry((option.name, why)).or_default() += 1,
            Finding::Drift { .. } => {
                tally.drifts += 1;
                say(&drift::event(desired, &live, &finding))?;
            }
        }
    }
    tally.drifted += u64::from(tally.drifts > before);
    Ok(())
}

impl Tally {
    fn write_text(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { sockets, drifted, drifts, no_fd, denied, unread, unanswered, unknown } = self;
        let is_complete = *denied == 0 && *unread == 0 && *unanswered == 0;
        let checked = counted(*sockets, "socket");
        match drifts {
            0 if is_complete => writeln!(out, "checked {checked}: no drift")?,
            0 => writeln!(out, "checked {checked}: no drift there")?,
            _ => {
                let drifted = counted(*drifted, "socket");
                writeln!(out, "checked {checked}: drift of {} on {drifted}", counted(*drifts, "option"))?;
            }
        }
        for ((option, why), sockets) in unknown {
            writeln!(out, "unknown: {option} on {}: {why}", counted(*sockets, "socket"))?;
        }
        for (count, noun, why) in [
            (*no_fd, "socket", "no file descriptor refers to it"),
            (*denied, "socket", "permission denied"),
            (*unanswered as u64, "socket", "no answer"),
            (*unread as u64, "process", "permission denied (run sockpolicy as root)"),
        ] {
            if count > 0 {
                writeln!(out, "skipped {}: {why}", counted(count, noun))?;
            }
        }
        Ok(())
    }

    fn to_json(&self) -> serde_json::Value {
        let Self { sockets, drifted, drifts, no_fd, denied, unread, unanswered, unknown } = self;
        let count: u64 = unknown.values().sum();
        let unknown =
            unknown.iter().map(|((option, why), sockets)| json!({ "option": option, "why": why, "sockets": sockets }));
        let fields = json!({
            "checked": sockets,
            "drifted": drifted,
            "drifts": drifts,
            "unknown": count,
            "unknown_options": unknown.collect::<Vec<_>>(),
            "no_fd": no_fd,
            "denied": denied,
            "unread_processes": unread,
            "unanswered": unanswered,
        });
        schema::line_at(jiff::Timestamp::now(), "verify-summary", fields)
    }
}
