//! `sockpolicy attach` and `sockpolicy detach`: policies in force without an agent.

use std::{path::PathBuf, process::ExitCode};

use super::{
    FAILURE,
    apply::{ApplyError, restore},
    check,
    output::{Format, TrustArgs, UnsupportedArgs},
    print_error,
    run::{DEFAULT_INSTANCE, RunError},
};
use crate::{
    coverage::{OtherInstance, with_others},
    escape::Escape,
    events::Filter,
    host::{cgroup::Mount, containers::Known, process},
    instance::{self, Files, Instance, InstanceError, Other},
    journal::{self, Journal},
    kernel::{self, BackendChoice, KernelError, Pins},
    policy::Policy,
    reconcile::ReconcileError,
    session::{self, OnBlocked, Session, SessionError, Setup},
    skipped::{self, SkippedList},
    sources::{Sources, Texts},
    targets::ResolvedTargets,
};

/// Enforce policies on the cgroups that exist now, without an agent
///
/// The policies stay until `detach`. They do not follow cgroups that are created later: a service restart makes a new cgroup, so use `run --persist` for services. Conflicts are counted, not reported; `status` shows the counts. Policies of an instance with this name are replaced without an interruption.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy attach web.toml --cgroup system.slice/nginx.service")]
pub(super) struct Attach {
    /// Policy files, and directories whose *.toml files are policies
    #[arg(required = true, value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Cgroup to use instead of the targets of the policies: a path below the cgroup2 mount, or an absolute path. Can be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Change nothing; count what enforcement would do
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    unsupported: UnsupportedArgs,
    /// Name of the instance, for `status` and `detach`
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INSTANCE)]
    instance: String,
}

impl Attach {
    pub(super) fn run(self) -> ExitCode {
        let texts = Sources::new(&self.files, self.trust.or_refuse()).read();
        let Some(policies) = check::shown(texts.policies()) else { return FAILURE.into() };
        match self.attach(&texts, &policies) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn attach(&self, texts: &Texts, policies: &[Policy]) -> Result<(), RunError> {
        process::raise_descriptor_limit();
        let mount = Mount::find()?;
        if !self.cgroup.is_empty() {
            check::warn_of_replaced_targets(policies, "--cgroup");
        }
        let others = instance::others(&self.instance);
        let freed: Vec<OtherInstance> = others.iter().map(Other::freed).collect();
        let ResolvedTargets { stacks, targets, skipped: mut skipped_objects, .. } =
            ResolvedTargets::find(&mount, &self.cgroup, policies)?.beside(&mount, policies, &freed);
        let desired = session::prepare(&with_others(policies, &freed), &stacks, self.dry_run, false)?;
        kernel::check_privileges().map_err(SessionError::from)?;
        let instance = Instance::acquire(&self.instance, true)?;
        instance.check_others(&kernel::names(&targets))?;
        let files = Files::new(texts, self.dry_run, &stacks, &others);
        let setup = Setup {
            desired,
            mount,
            targets,
            containers: Known::default(),
            backend: BackendChoice::None,
            on_unsupported: self.unsupported.choice(),
            on_blocked: OnBlocked::Refuse,
            filter: Filter::default(),
            instance: Some((instance, files)),
        };
        let mut session = Session::start(setup)?;
        skipped_objects.extend_from_slice(session.skipped());
        let mut list = SkippedList::default();
        list.replace(&skipped_objects, skipped::now());
        skipped::warn_of(session.skipped());
        session.note_skipped(&list);
        for unsupported in session.unsupported() {
            log::warn!("unsupported: {unsupported}");
        }
        session.finish()?;
        Ok(())
    }
}

/// Remove persistent policies
///
/// Removes the programs, links and maps of an instance. Sockets keep the values that they have.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sockpolicy detach\n  sockpolicy detach --instance default --restore\n  sockpolicy detach --all"
)]
pub(super) struct Detach {
    /// The instance, as `status` names it
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INSTANCE)]
    instance: String,
    /// Remove the policies of all instances
    #[arg(long, conflicts_with = "instance")]
    all: bool,
    /// Restore the values that `apply` replaced, if nobody changed them since
    #[arg(long)]
    restore: bool,
}

#[derive(Debug, thiserror::Error)]
enum DetachError {
    #[error(
        "instance `{name}` of sockpolicy runs, as process {pid}\n  help: end that one (kill {pid}), and then, if it was to persist, \
         detach what it leaves"
    )]
    Running { name: String, pid: String },
    #[error("{0}")]
    Instance(#[source] InstanceError),
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("{0}")]
    Restore(#[from] Box<ApplyError>),
    #[error(
        "no instance `{}` has policies in force without an agent{}{}",
        name.escaped(), list(.others), restore_help(*.has_journal, .name)
    )]
    None { name: String, others: Vec<String>, has_journal: bool },
}

impl From<InstanceError> for DetachError {
    fn from(error: InstanceError) -> Self {
        match error {
            InstanceError::Running { name, pid } => Self::Running { name, pid },
            other => Self::Instance(other),
        }
    }
}

fn restore_help(has_journal: bool, instance: &str) -> String {
    if !has_journal {
        return String::new();
    }
    format!("\n  help: put back what `apply` has changed: sockpolicy apply --restore --instance {}", instance.escaped())
}

fn list(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("\n  help: these have: {}", crate::escape::join(names, ", ")) }
}

impl Detach {
    pub(super) fn run(self) -> ExitCode {
        let names = match self.names() {
            Ok(names) => names,
            Err(error) => {
                print_error(&error);
                return FAILURE.into();
            }
        };
        // Each instance is tried.
        let mut is_complete = true;
        for name in names {
            is_complete &= self.detach(&name).unwrap_or_else(|error| {
                print_error(&error);
                false
            });
        }
        if is_complete { ExitCode::SUCCESS } else { FAILURE.into() }
    }

    /// Returns the instances to detach.
    fn names(&self) -> Result<Vec<String>, DetachError> {
        if !self.all {
            return Ok(vec![self.instance.clone()]);
        }
        kernel::check_privileges()?;
        Ok(Pins::instances()?)
    }

    /// Removes the policies of one instance. Returns whether everything was restored that was to be restored.
    fn detach(&self, name: &str) -> Result<bool, DetachError> {
        let name = &name.to_owned();
        kernel::check_privileges()?;
        let mut instance = Instance::acquire(name, true)?;
        let others = Pins::instances()?;
        if !others.contains(name) {
            // In another mount namespace, with the record of what is in force there.
            if instance.record().is_some_and(|record| record.persists) {
                Pins::of(name)?;
            }
            instance.discard_record();
            let has_journal = journal::instances().contains(name);
            return Err(DetachError::None { name: name.clone(), others, has_journal });
        }
        let pins = Pins::of(name)?;
        // From here on the record is wrong, whether the rest succeeds or not.
        instance.discard_record();
        pins.disable()?;
        pins.remove()?;
        // Restored last, because the policies would set the options again.
        if self.restore {
            return Ok(restore(name, Format::Text).map_err(Box::new)?);
        }
        Journal::of(name).remove().map_err(|error| Box::new(ApplyError::from(ReconcileError::from(error))))?;
        Ok(true)
    }
}
