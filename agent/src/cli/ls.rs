//! `sockpolicy ls`: the sockets that there are, whose they are, and what was chosen of their options.

use std::{io::Write, path::PathBuf, process::ExitCode};

use super::{
    FAILURE, check,
    descriptor::stdout,
    ignore_broken_pipe,
    live_sockets::LiveSocketsError,
    output::{Format, TrustArgs},
    print_error,
    progress::Progress,
};
use crate::{
    host::cgroup::Mount,
    kernel,
    live::{OptionRead, Table, Values, drift::Baseline},
    options::OPTIONS,
    plural::counted,
    policy::Policy,
    reconcile::{InspectedSocket, Selection, Sockets},
    skipped,
    targets::ResolvedTargets,
};

/// List sockets, their processes, and the options that differ from the default
///
/// The default is the value of a new socket of the same kind in the same network namespace. Values that the kernel changes by itself, such as buffer sizes that nobody set, are not listed. A socket belongs to the cgroup in which it was created; a socket that is neither bound nor connected counts as one of its process's cgroup.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy ls\n  sockpolicy ls --cgroup system.slice/nginx.service --all")]
pub(super) struct Ls {
    /// Policy files, and directories of them: list the sockets of their targets. Without files and --cgroup, list all sockets of the host
    #[arg(value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// List the sockets of this cgroup and of all cgroups below it: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Show every option that can be read
    #[arg(long)]
    all: bool,
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

impl Ls {
    pub(super) fn run(self) -> ExitCode {
        let Some(policies) = check::load(&self.files, self.trust.or_warn()) else { return FAILURE.into() };
        match self.list(&policies) {
            Ok(true) => ExitCode::SUCCESS,
            // What does not answer has been named.
            Ok(false) => FAILURE.into(),
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn list(&self, policies: &[Policy]) -> Result<bool, LiveSocketsError> {
        let mount = Mount::find()?;
        let targets = if policies.is_empty() {
            Selection::open(&mount, &self.cgroup)?
        } else {
            if !self.cgroup.is_empty() {
                check::warn_of_replaced_targets(policies, "--cgroup");
            }
            ResolvedTargets::find(&mount, &self.cgroup, policies)?.targets
        };
        let mut sockets = Sockets::find(mount, Selection::all_or(&targets), || None, kernel::inspector())?;
        let mut out = stdout(self.output);
        let mut table = Table::default();
        let progress = Progress::of(sockets.count());
        let written = sockets.each(
            |_| OPTIONS.iter().collect(),
            |mut seen| {
                progress.step(1);
                let options = self.options(&mut seen);
                match self.output {
                    Format::Text => table.add(&seen.live, &options),
                    Format::Json => progress.above(|| writeln!(out, "{}", seen.live.to_json(&options)))?,
                }
                Ok(())
            },
        );
        drop(progress);
        ignore_broken_pipe(written.and_then(|()| write!(out, "{table}")).and_then(|()| out.flush()))?;
        if sockets.unread() > 0 {
            let processes = counted(sockets.unread() as u64, "process");
            log::warn!("{processes} skipped: permission denied\n  help: run sockpolicy as root");
        }
        skipped::warn_of(&sockets.skipped());
        Ok(sockets.skipped().is_empty() && sockets.unread() == 0)
    }

    fn options(&self, InspectedSocket { live, fresh, .. }: &mut InspectedSocket<'_>) -> Values {
        match (&live.values, fresh) {
            (OptionRead::Values(values), _) if self.all => values.clone(),
            (_, fresh) => live.chosen(fresh.as_mut().and_then(|fresh| fresh.values())),
        }
    }
}
