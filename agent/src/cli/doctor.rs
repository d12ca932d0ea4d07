//! `sockpolicy doctor`: shows what this kernel supports. [`crate::trial`] probes the options.

use std::{
    fs,
    io::{self, Write},
    process::ExitCode,
};

use comfy_table::{Table, presets};
use serde_json::json;

use super::{
    FAILURE,
    descriptor::stdout,
    ignore_broken_pipe,
    output::{Format, describe_audit},
    print_error,
};
use crate::{
    compile::Hook,
    escape::{self, Escape},
    host::{
        btf::{BtfError, Types},
        cgroup::{CgroupError, Mount},
        privileges, process,
    },
    kernel::{
        self, Answer, AttachMode, AuditConfig, Backend, BackendChoice, ForeignProgram, ITERATOR_SINCE, KernelError,
        Object, ProbeResult, Probed, ProgramSize,
    },
    options::{OPTIONS, SocketOption},
    schema,
    session::SessionError,
    transient_cgroup::{TransientCgroup, TransientCgroupError},
    trial::{self, Sample, TrialError},
    wrap,
};

/// Show what this kernel supports: hooks, audit backends, options
///
/// Probes everything with sockets and programs of its own, in a cgroup and a network namespace that it creates and removes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy doctor")]
pub(super) struct Doctor {
    /// Output format
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, thiserror::Error)]
enum DoctorError {
    #[error("{0}")]
    Kernel(#[from] KernelError),
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    #[error("{0}")]
    TransientCgroup(#[from] TransientCgroupError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("{0}")]
    Trial(#[from] TrialError),
    #[error("cannot write the result: {0}")]
    Write(#[source] io::Error),
}

/// The results of all probes.
struct Findings {
    /// The release of the kernel; `None` if it is unknown.
    kernel: Option<String>,
    /// The mount point of cgroup2.
    cgroup2: String,
    btf: Result<(), BtfError>,
    hooks: Vec<(Hook, Answer)>,
    /// The iterators over existing sockets, by name.
    iterators: Vec<(&'static str, Answer)>,
    backends: Vec<(Backend, ProbeResult)>,
    options: Vec<(&'static SocketOption, Answer)>,
    /// The programs of sockpolicy that the kernel has loaded for the probes.
    programs: Vec<ProgramSize>,
    /// The programs that were attached to cgroups before; `Err` gives the reason why they are unknown.
    foreign_programs: Result<Vec<ForeignProgram>, String>,
}

impl Doctor {
    pub(super) fn run(self) -> ExitCode {
        match probe().and_then(|findings| self.write(&findings)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }

    fn write(&self, findings: &Findings) -> Result<(), DoctorError> {
        let mut out = stdout(self.output);
        let written = match self.output {
            Format::Text => findings.write_text(&mut out),
            Format::Json => findings.write_json(&mut out),
        };
        ignore_broken_pipe(written).map_err(DoctorError::Write)
    }
}

fn probe() -> Result<Findings, DoctorError> {
    process::raise_descriptor_limit();
    kernel::check_privileges()?;
    let mount = Mount::find()?;
    let transient = TransientCgroup::make(&mount, "-doctor")?;
    let Probed { answers: hooks, mut programs } = kernel::hooks(&transient.cgroup)?;
    transient.remove()?;
    let Probed { answers: iterators, programs: of_iterators } = kernel::iterator()?;
    let Probed { answers: backends, programs: of_audit } = kernel::audit_backends()?;
    programs.extend(of_iterators.into_iter().chain(of_audit));
    let options = try_options(&mount).or_else(unknown_options)?;
    let foreign_programs = kernel::foreign_programs(&mount).map_err(|error| error.to_string());
    Ok(Findings {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|release| release.trim().to_owned()),
        cgroup2: escape::plain(&mount.path),
        btf: Types::of_kernel().map(drop),
        hooks,
        iterators,
        backends,
        options,
        programs,
        foreign_programs,
    })
}

/// Probes all options at once, on sockets of this process. Probing one at a time would be slow. An option affects the probe of
/// another one only if it resets the other one.
fn try_options(mount: &Mount) -> Result<Vec<(&'static SocketOption, Answer)>, DoctorError> {
    let settable: Vec<_> = OPTIONS.iter().filter(|option| option.settable().is_some()).collect();
    let desired = trial::desired(&settable).map_err(TrialError::from)?;
    let (mut object, _) = Object::load(&Hook::ALL, AuditConfig::of(&desired), BackendChoice::None, &[], None, &[])?;
    let has = |hook: &Hook| !object.refused().iter().any(|(refused, _)| refused == hook);
    let hooks: Vec<_> = Hook::ALL.into_iter().filter(has).collect();
    Ok(trial::try_options(&mut object, desired, None, &hooks, mount, Sample::start(mount)?)?)
}

/// Returns the answers if a foreign program prevents the probe: all options are unknown then.
fn unknown_options(error: DoctorError) -> Result<Vec<(&'static SocketOption, Answer)>, DoctorError> {
    let DoctorError::Trial(TrialError::Kernel(KernelError::Foreign(conflict))) = error else { return Err(error) };
    log::warn!("cannot probe the options in this cgroup: {conflict}");
    let settable = OPTIONS.iter().filter(|option| option.settable().is_some());
    Ok(settable.map(|option| (option, Answer::Unknown("a foreign program prevents the probe".to_owned()))).collect())
}

impl Findings {
    fn write_text(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { kernel, cgroup2, btf, hooks, iterators, backends, options, foreign_programs, programs: _ } = self;
        writeln!(
            out,
            "kernel {}, cgroup2 at {}, {}",
            kernel.as_deref().unwrap_or("unknown").escaped(),
            cgroup2.escaped(),
            match btf {
                Ok(()) => "BTF",
                Err(error) if error.is_absent() => "no BTF",
                Err(_) => "BTF unknown",
            }
        )?;
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["", "works", "reason", "since"]);
        for (hook, answer) in hooks {
            table.add_row(row(hook.name(), answer, hook.since()));
        }
        for (name, answer) in iterators {
            table.add_row(row(name, answer, ITERATOR_SINCE));
        }
        for (backend, found) in backends {
            table.add_row(row(&format!("audit by {backend}"), &backend_answer(found), ""));
        }
        for (option, answer) in options {
            let since = option.settable().map_or("", |settable| settable.since);
            table.add_row(row(&format!("set {}", option.name), answer, since));
        }
        writeln!(out, "\n{}\n", wrap::table(table))?;
        match backends.iter().find_map(|(_, found)| found.as_ref().ok()) {
            Some(audit) => writeln!(out, "default audit: {}", describe_audit(*audit))?,
            None => writeln!(out, "no audit: events show only conflicts, without the results of the calls")?,
        }
        if let Err(reason) = btf {
            writeln!(out, "events do not describe the socket of a call: {reason}")?;
        }
        writeln!(
            out,
            "setsockopt calls of 32-bit programs: no cgroup hook runs for them; fentry and kprobe report them, and \
             nothing changes them"
        )?;
        match foreign_programs {
            Ok(programs) => programs.iter().try_for_each(|program| {
                writeln!(out, "attached before, at {}: {program}{}", program.hook, effect(program))
            }),
            Err(error) => writeln!(out, "programs that were attached before: unknown: {error}"),
        }
    }

    fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { kernel, cgroup2, btf, hooks, iterators, backends, options, programs, foreign_programs } = self;
        let of_hooks = hooks.iter().map(|(hook, answer)| (hook.name(), answer));
        let of_iterators = iterators.iter().map(|(name, answer)| (*name, answer));
        let missing = privileges::missing_capabilities();
        let answer = schema::line(
            "doctor",
            json!({
                "kernel": kernel,
                "cgroup2": cgroup2,
                "btf": match btf {
                    Ok(()) => Some(true),
                    Err(error) => error.is_absent().then_some(false),
                },
                "missing_capabilities": missing,
                "hook_support": of_hooks.chain(of_iterators).map(|(name, answer)| line(name, answer)).collect::<Vec<_>>(),
                "backend_support": backends.iter().map(|(backend, found)| backend_line(*backend, found)).collect::<Vec<_>>(),
                "option_support": options.iter().map(|(option, answer)| line(option.name, answer)).collect::<Vec<_>>(),
                "programs": programs.iter().map(program_line).collect::<Vec<_>>(),
                "attached_programs": foreign_programs.as_ref().ok().map(|all| all.iter().map(ForeignProgram::to_json).collect::<Vec<_>>()),
            }),
        );
        writeln!(out, "{answer}")
    }
}

/// Returns what the flags of a foreign program prevent.
fn effect(program: &ForeignProgram) -> &'static str {
    match program.mode {
        AttachMode::Multi => "",
        AttachMode::Override => ", with BPF_F_ALLOW_OVERRIDE: prevents policies at this hook on this cgroup and below",
        AttachMode::Exclusive => ", without flags: prevents policies at this hook on this cgroup and below",
    }
}

/// Returns an answer as one word, and its reason.
fn words(answer: &Answer) -> (&'static str, &str) {
    match answer {
        Answer::Yes => ("yes", ""),
        Answer::No(reason) => ("no", reason),
        Answer::Unknown(reason) => ("unknown", reason),
    }
}

fn backend_answer(found: &ProbeResult) -> Answer {
    match found {
        Ok(_) => Answer::Yes,
        Err(reason) => Answer::No(reason.clone()),
    }
}

fn backend_line(backend: Backend, found: &ProbeResult) -> serde_json::Value {
    let mut line = line(backend.name(), &backend_answer(found));
    if let Ok(audit) = found {
        line["points"] = audit.points().collect();
        line["not_covered"] = audit.not_covered().into();
    }
    line
}

fn row(name: &str, answer: &Answer, since: &str) -> [String; 4] {
    let (word, reason) = words(answer);
    // On a kernel that has the feature, its first kernel does not matter.
    let since = if *answer == Answer::Yes { "" } else { since };
    [name, word, reason, since].map(str::to_owned)
}

fn program_line(program: &ProgramSize) -> serde_json::Value {
    json!({ "name": program.name, "verified_instructions": program.verified })
}

fn line(name: &str, answer: &Answer) -> serde_json::Value {
    let (word, reason) = words(answer);
    json!({ "name": name, "works": word, "reason": (!reason.is_empty()).then_some(reason) })
}
