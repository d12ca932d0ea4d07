//! `sockpolicy apply`: brings sockets that are there in line with policies, and puts back what they had.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IsTerminal, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    process::ExitCode,
};

use abi::setting::{Value, read_back, word_in};
use serde_json::json;

use super::{
    FAILURE, check, complain,
    output::Format,
    run::{DEFAULT_INSTANCE, Placement, RunError},
    signals::Signals,
    sockets::{Seen, Sockets, SocketsError, Targets},
    unless_closed, verify,
    watch::WatchError,
};
use crate::{
    compile::{Desired, compile},
    events::{Kind, SCHEMA},
    host::{
        cgroup::Mount,
        socket,
        survey::{Survey, SurveyError},
    },
    instance,
    journal::{Change, Journal, JournalError, Place},
    live::{
        Live, Told,
        drift::{self, Finding},
    },
    options::{self, SocketOption},
    policy::{Policy, model::Mode},
    session::SessionError,
};

/// Bring sockets that are there already in line with policies
///
/// What `verify` finds to disagree is set, on each socket through a descriptor of its process; what it had is kept, for `apply
/// --restore` and `detach --restore`. Policies need not be in force for that, and do not come in force. Of a dry-run policy it is only said
/// what would be set.
#[derive(Debug, clap::Args)]
pub(super) struct Apply {
    /// Policy files, and folders whose *.toml are policies
    #[arg(required_unless_present = "restore", value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    /// Target, in place of the files' own: a cgroup's path below the cgroup2 mount, or absolute; can be given
    /// several times
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Change nothing; say what would be set
    #[arg(long)]
    dry_run: bool,
    /// Put back what sockets had before, where nobody has changed it since
    #[arg(long, conflicts_with_all = ["files", "cgroup", "dry_run"])]
    restore: bool,
    /// The instance with which to keep what sockets had
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INSTANCE)]
    instance: String,
    /// Form of what is done
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    #[error(transparent)]
    Sockets(#[from] SocketsError),
    #[error("cannot keep what sockets had, and so leaves them as they are: {0}")]
    Journal(#[from] JournalError),
    #[error("cannot write what was done: {0}")]
    Write(#[from] io::Error),
    #[error(
        "stopped by a signal: some sockets are as they were\n  help: do it again, or put back what they had: sockpolicy apply --restore"
    )]
    Stopped,
}

impl From<RunError> for ApplyError {
    fn from(error: RunError) -> Self {
        Self::Sockets(error.into())
    }
}

impl From<SurveyError> for ApplyError {
    fn from(error: SurveyError) -> Self {
        Self::Sockets(error.into())
    }
}

/// What came of it, in numbers.
#[derive(Debug, Default)]
struct Tally {
    /// That were looked into.
    sockets: u64,
    /// That were changed.
    changed: u64,
    /// Values that were set, and those that the kernel refused.
    set: u64,
    failed: u64,
    /// Options of sockets of which it cannot be told whether they agree.
    untold: u64,
    /// Sockets that could not be looked into.
    closed: u64,
}

impl Apply {
    pub(super) fn run(self) -> ExitCode {
        let done = if self.restore {
            restore(&self.instance)
        } else {
            let Some(policies) = check::load(&self.files) else { return FAILURE.into() };
            self.apply(&policies).map(|tally| tally.failed == 0 && tally.closed == 0)
        };
        match done {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => FAILURE.into(),
            Err(error) => {
                complain(&error);
                FAILURE.into()
            }
        }
    }

    fn apply(&self, policies: &[Policy]) -> Result<Tally, ApplyError> {
        instance::check_name(&self.instance).map_err(RunError::from)?;
        let mut signals = Signals::watch().map_err(WatchError::Watch).map_err(RunError::from)?;
        let mount = Mount::find().map_err(RunError::from)?;
        let Placement { stacks, targets } = Placement::find(&mount, &self.cgroup, policies)?;
        let desired = compile(policies, &stacks).map_err(|error| RunError::from(SessionError::from(error)))?;
        let mut sockets = Sockets::find(mount, Targets::These(targets))?;
        let mut progress = Progress::of(sockets.len());
        let mut work = Work {
            desired: &desired,
            dry_run: self.dry_run,
            output: self.output,
            journal: Journal::of(&self.instance),
            tally: Tally::default(),
        };
        let done = sockets.each(
            |scope| drift::needed(&desired.scopes[scope]),
            |seen| {
                if asks_for_end(&mut signals)? {
                    return Err(ApplyError::Stopped);
                }
                progress.step();
                work.bring_in_line(seen)
            },
        );
        drop(progress);
        let tally = work.tally;
        unless_closed(tell(&tally, self.output))?;
        done.map(|()| tally)
    }
}

fn asks_for_end(signals: &mut Signals) -> io::Result<bool> {
    while let Some(received) = signals.next()? {
        if received.asks_for_end() {
            return Ok(true);
        }
    }
    Ok(false)
}

struct Work<'a> {
    desired: &'a Desired,
    dry_run: bool,
    output: Format,
    journal: Journal,
    tally: Tally,
}

/// Setting one option may give another a value (IP_TOS, SO_PRIORITY): then there is something left to do.
const ROUNDS: usize = 2;

impl Work<'_> {
    fn bring_in_line(&mut self, seen: Seen<'_>) -> Result<(), ApplyError> {
        let Seen { mut live, scope, fresh, socket } = seen;
        let (Some(mut fresh), Some(socket)) = (fresh, socket) else {
            self.tally.closed += u64::from(matches!(live.values, Told::Refused(_)));
            return Ok(());
        };
        self.tally.sockets += 1;
        let scope = &self.desired.scopes[scope];
        let only_says = self.dry_run || scope.mode == Mode::DryRun;
        let before = self.tally.set;
        let mut refused = BTreeSet::new();
        for round in 0..ROUNDS {
            let findings = drift::find(self.desired, scope, &live, &mut fresh);
            let untold = findings.iter().filter(|finding| matches!(finding, Finding::Untold { .. })).count();
            self.tally.untold += if round == 0 { untold as u64 } else { 0 };
            let drifts: Vec<&Finding> = findings
                .iter()
                .filter(|finding| is_to_be_set(finding) && !refused.contains(&option_of(finding)))
                .collect();
            if drifts.is_empty() {
                break;
            }
            for finding in drifts {
                if only_says {
                    self.say(&live, finding, Kind::WouldApply)?;
                } else if !self.set(&live, finding, socket)? {
                    refused.insert(option_of(finding));
                }
            }
            if only_says {
                break;
            }
            live.values = Told::Values(socket::values(socket, &drift::needed(scope)));
        }
        self.tally.changed += u64::from(self.tally.set > before);
        Ok(())
    }

    /// Gives whether the kernel took it.
    fn set(&mut self, live: &Live, finding: &Finding, socket: &OwnedFd) -> Result<bool, ApplyError> {
        let Finding::Drift { option, now, .. } = finding else { return Ok(false) };
        let wanted = value_to_set(finding);
        let place = Place { cookie: live.entry.cookie, option: option.key() };
        self.journal.note(place, now, &wanted)?;
        match socket::set(socket, option.key(), &wanted) {
            Ok(()) => {
                let after = socket::value(socket, option.key()).unwrap_or(wanted);
                self.journal.note_after(place, &after)?;
                self.tally.set += 1;
                self.say(live, finding, Kind::Applied { before: *now, after })?;
                Ok(true)
            }
            Err(error) => {
                self.journal.note_after(place, now)?;
                self.tally.failed += 1;
                self.say(live, finding, Kind::Outcome { errno: error.raw_os_error().unwrap_or_default() })?;
                Ok(false)
            }
        }
    }

    fn say(&self, live: &Live, finding: &Finding, kind: Kind) -> io::Result<()> {
        let Some(event) = verify::event(self.desired, live, finding) else { return Ok(()) };
        let event = crate::events::Event { kind, wanted: value_to_set(finding), ..event };
        unless_closed(match self.output {
            Format::Text => writeln!(io::stdout(), "{event}"),
            Format::Json => writeln!(io::stdout(), "{}", event.to_json()),
        })
    }
}

fn is_to_be_set(finding: &Finding) -> bool {
    matches!(finding, Finding::Drift { .. })
}

fn option_of(finding: &Finding) -> abi::setting::OptionKey {
    match finding {
        Finding::Drift { option, .. } | Finding::Untold { option, .. } => option.key(),
    }
}

/// What a socket is to be given; of a limit, the bound that it is beyond.
fn value_to_set(finding: &Finding) -> Value {
    let Finding::Drift { option, wanted, limit, now, .. } = finding else { return Value::UNKNOWN };
    let Some(limit) = limit else { return *wanted };
    let shown = i64::from(word_in(&as_given(option, now).words));
    Value::number(option.value.abi_kind(), shown.clamp(limit.min, limit.max))
}

/// What to set for an option to show a value: the kernel doubles buffers.
fn as_given(option: &SocketOption, shown: &Value) -> Value {
    let is_doubled = option.settable().is_some_and(|settable| settable.read_back == read_back::DOUBLED);
    if is_doubled { Value::int(word_in(&shown.words) / 2) } else { *shown }
}

/// By which option one is put back: the kernel tunes buffers beyond what SO_SNDBUF may set, and SO_SNDBUFFORCE may set all.
fn unbounded(option: &'static SocketOption) -> abi::setting::OptionKey {
    let is_it = |other: &&SocketOption| other.name.strip_suffix("FORCE") == Some(option.name);
    options::OPTIONS.iter().find(is_it).unwrap_or(option).key()
}

fn tell(tally: &Tally, output: Format) -> io::Result<()> {
    let Tally { sockets, changed, set, failed, untold, closed } = tally;
    let mut out = io::stdout().lock();
    match output {
        Format::Text => {
            writeln!(out, "sockets: {sockets}, changed: {changed}, in {set} options")?;
            for (count, what) in [
                (failed, "values were refused by the kernel"),
                (untold, "options cannot be told to agree or not"),
                (closed, "sockets could not be looked into"),
            ] {
                if *count > 0 {
                    writeln!(out, "{count} {what}")?;
                }
            }
            Ok(())
        }
        Format::Json => writeln!(
            out,
            "{}",
            json!({
                "schema": SCHEMA, "time": format!("{:.6}", jiff::Timestamp::now()), "event": "summary", "sockets": sockets,
                "changed": changed, "set": set, "failed": failed, "untold": untold, "refused": closed,
            })
        ),
    }
}

/// Puts back what sockets had before policies were applied to them, where nobody has changed it since. Gives whether all of it
/// could be; what could not is left to be put back.
pub(super) fn restore(instance: &str) -> Result<bool, ApplyError> {
    instance::check_name(instance).map_err(RunError::from)?;
    let journal = Journal::of(instance);
    let changes = journal.changes()?;
    let survey = Survey::make(|_| true)?;
    let (mut restored, mut others, mut failed) = (0, 0, BTreeMap::new());
    for found in &survey.sockets {
        let of_it = changes.iter().filter(|(place, _)| place.cookie == found.entry.cookie);
        let of_it: Vec<(&Place, &Change)> = of_it.collect();
        if of_it.is_empty() {
            continue;
        }
        let socket = match found.take() {
            Ok(Some((_, socket))) => socket,
            // It is closed.
            Ok(None) => continue,
            Err(_) => {
                failed.extend(of_it.into_iter().map(|(place, change)| (*place, *change)));
                continue;
            }
        };
        for (place, change) in of_it {
            let Some(option) = options::by_key(place.option) else { continue };
            let now = socket::value(&socket, place.option);
            if change.after == change.before {
                // It was refused.
            } else if now == Some(change.before) {
                // What was put back before has brought it back too.
                restored += 1;
            } else if now != Some(change.after) {
                others += 1;
            } else if socket::set(&socket, unbounded(option), &as_given(option, &change.before)).is_ok() {
                restored += 1;
            } else {
                failed.insert(*place, *change);
            }
        }
    }
    journal.keep(&failed)?;
    let failed = failed.len();
    let mut out = io::stdout().lock();
    unless_closed(writeln!(out, "put back: {restored} options; changed by others since: {others}; refused: {failed}"))?;
    Ok(failed == 0)
}

/// How far it is, on a terminal.
struct Progress {
    total: usize,
    done: usize,
    is_shown: bool,
}

impl Progress {
    /// So many sockets take long enough to be waited for.
    const MANY: usize = 500;
    const STEP: usize = 100;

    fn of(total: usize) -> Self {
        Self { total, done: 0, is_shown: total >= Self::MANY && io::stderr().is_terminal() }
    }

    fn step(&mut self) {
        self.done += 1;
        if self.is_shown && self.done.is_multiple_of(Self::STEP) {
            // Nobody looks.
            let _ = write!(io::stderr(), "\r{} of {} sockets\x1b[K", self.done, self.total);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
