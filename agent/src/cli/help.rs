//! The help lines of errors: what to type next. Libraries do not know the command line.

use std::{error::Error, io};

use super::{exec::ExecError, options::NoOption};
use crate::{
    container::Running,
    escape::Escape,
    host::{cgroup::CgroupError, private::PrivateError},
    kernel::{KernelError, os_error},
    reconcile::ReconcileError,
    session::SessionError,
    targets::TargetError,
    transient_cgroup::TransientCgroupError,
};

/// Returns the help line of an error as the end of a message, or nothing. An error whose text has a help line gets no other.
pub(super) fn line(error: &(dyn Error + 'static)) -> String {
    if error.to_string().contains("\n  help: ") {
        return String::new();
    }
    of(error).map_or_else(String::new, |help| format!("\n  help: {help}"))
}

/// Returns the help line of an error or of its first cause that has one.
pub(super) fn of(error: &(dyn Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(this) = cause {
        if let Some(help) = of_this(this) {
            return Some(help);
        }
        cause = this.source();
    }
    match os_error(error)? {
        libc::EMFILE => Some(MORE_FILES.to_owned()),
        _ => None,
    }
}

/// Returns the help line of an error, without looking at its causes.
fn of_this(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref() {
        of_target(error)
    } else if let Some(error) = error.downcast_ref() {
        of_reconcile(error)
    } else if let Some(error) = error.downcast_ref() {
        of_session(error)
    } else if let Some(error) = error.downcast_ref() {
        of_exec(error)
    } else if let Some(error) = error.downcast_ref() {
        of_cgroup(error)
    } else if let Some(error) = error.downcast_ref() {
        of_transient_cgroup(error)
    } else if let Some(error) = error.downcast_ref() {
        of_kernel(error)
    } else if let Some(error) = error.downcast_ref() {
        of_private(error)
    } else if error.is::<NoOption>() {
        Some("`sockpolicy options` lists all".to_owned())
    } else {
        None
    }
}

const MORE_FILES: &str = "raise the limit of open files: ulimit -n 4096 (in a unit: LimitNOFILE=4096)";

fn of_target(error: &TargetError) -> Option<String> {
    match error {
        TargetError::None { .. } => Some("name a cgroup: --cgroup PATH".to_owned()),
        TargetError::NoMatch { mount, .. } => Some(list_cgroups(&mount.escaped())),
        TargetError::NoMatchAmong { containers, mount, .. } => Some(format!(
            "cgroups are the directories below {}; running containers:{}",
            mount.escaped(),
            list(containers)
        )),
        TargetError::Cgroup(_) | TargetError::Glob(_) | TargetError::Skipped { .. } => None,
    }
}

fn of_reconcile(error: &ReconcileError) -> Option<String> {
    let is_stopped = matches!(error, ReconcileError::Stopped);
    is_stopped.then(|| "run the command again, or restore the old values: sockpolicy apply --restore".to_owned())
}

fn of_session(error: &SessionError) -> Option<String> {
    match error {
        SessionError::Unsupported(_) => {
            Some("remove these settings, or give --allow-unsupported to enforce the rest".to_owned())
        }
        SessionError::Compile(_) | SessionError::Kernel(_) | SessionError::Instance(_) => None,
    }
}

fn of_exec(error: &ExecError) -> Option<String> {
    let ExecError::Spawn { source, .. } = error else { return None };
    match source.kind() {
        io::ErrorKind::NotFound => Some("check the name, and that its folder is in PATH".to_owned()),
        io::ErrorKind::PermissionDenied => Some("is it a program, and may it be executed?".to_owned()),
        _ => None,
    }
}

fn of_cgroup(error: &CgroupError) -> Option<String> {
    match error {
        CgroupError::NotMounted { place } | CgroupError::Hidden { place, network: None } => Some(mount_cgroup2(place)),
        CgroupError::Hidden { place, network: Some(network) } => Some(format!(
            "enter only the network namespace: nsenter --net={} sockpolicy ..., or {}",
            network.escaped(),
            mount_cgroup2(place)
        )),
        CgroupError::Proc { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Some("mount it and repeat the command: mount -t proc proc /proc".to_owned())
        }
        CgroupError::Missing { mount, .. } => Some(list_cgroups(&mount.escaped())),
        CgroupError::NotAFolder { folder, .. } => Some(format!("use {}", folder.escaped())),
        CgroupError::NotCgroup2 { mount, .. } => Some(format!("use a directory below {}", mount.escaped())),
        CgroupError::TooDeep { .. } => Some("use one of its parents as the target".to_owned()),
        CgroupError::Outside { mount } => {
            Some(format!("mount the whole hierarchy: mount -t cgroup2 none {}", mount.escaped()))
        }
        CgroupError::Proc { .. } | CgroupError::Open { .. } => None,
    }
}

fn mount_cgroup2(place: &str) -> String {
    format!("mount it and repeat the command: mkdir -p {place} && mount -t cgroup2 none {place}")
}

fn list_cgroups(mount: &dyn std::fmt::Display) -> String {
    format!("cgroups are the directories below {mount}: find {mount} -type d")
}

fn of_transient_cgroup(error: &TransientCgroupError) -> Option<String> {
    match error {
        TransientCgroupError::Make { .. } => Some("run as root, with a writable cgroup2 mount".to_owned()),
        TransientCgroupError::Threaded { .. } => Some("start sockpolicy in a cgroup that is not threaded".to_owned()),
        TransientCgroupError::Remove { path, .. } => {
            Some(format!("wait until its processes have ended, then: rmdir {}", path.escaped()))
        }
        TransientCgroupError::Cgroup(_) | TransientCgroupError::Guard { .. } => None,
    }
}

fn of_kernel(error: &KernelError) -> Option<String> {
    let help = match error {
        KernelError::Privileges { .. } => "run sockpolicy as root, or give it these capabilities".to_owned(),
        KernelError::DescriptorLimit { .. } => MORE_FILES.to_owned(),
        // Capabilities have been checked before.
        KernelError::Object(_) | KernelError::Map { .. } if os_error(error) == Some(libc::EPERM) => {
            "this process has the capabilities for bpf(2). A seccomp filter can refuse the call, as in containers (grep \
             Seccomp /proc/self/status). Kernels before 5.11 count locked memory: give it CAP_SYS_RESOURCE, or raise the \
             limit (ulimit -l unlimited; LimitMEMLOCK=infinity in a unit)"
                .to_owned()
        }
        KernelError::Object(_) | KernelError::Map { .. } if os_error(error) == Some(libc::ENOSYS) => {
            "run a kernel with CONFIG_BPF_SYSCALL, without a seccomp filter that refuses bpf(2)".to_owned()
        }
        KernelError::MapRights { .. } => "run sockpolicy as root, or give it CAP_SYS_ADMIN".to_owned(),
        KernelError::Incomplete { .. } => {
            "this is a bug of sockpolicy: report it with the output of `sockpolicy --version`".to_owned()
        }
        KernelError::Load { hook, .. } => format!(
            "`sockpolicy doctor` shows what this kernel supports; {hook} is known to work from {} on",
            hook.since()
        ),
        KernelError::NoBpffs { .. } => "mount -t bpf -o mode=0700 bpf /sys/fs/bpf".to_owned(),
        KernelError::Backend { .. } => "leave out --audit-backend to use the best backend that this kernel supports; \
                                        `sockpolicy doctor` lists them"
            .to_owned(),
        KernelError::NoBackend { .. } => {
            "if tracefs is missing, mount -t tracefs tracefs /sys/kernel/tracing; or give \
                                          --audit-backend none to report conflicts without the results of calls"
                .to_owned()
        }
        _ => return None,
    };
    Some(help)
}

fn of_private(error: &PrivateError) -> Option<String> {
    let PrivateError::Io { path, source } = error else { return None };
    let is_missing = path.as_os_str() == RUN && source.kind() == io::ErrorKind::NotFound;
    let is_read_only = path.starts_with(RUN) && source.kind() == io::ErrorKind::ReadOnlyFilesystem;
    (is_missing || is_read_only).then(|| {
        format!(
            "sockpolicy keeps its records there: mkdir -p {RUN} && mount -t tmpfs -o mode=0755 tmpfs {RUN}, or make it \
             writable"
        )
    })
}

/// The directory below which instances have their records.
const RUN: &str = "/run";

fn list(containers: &[Running]) -> String {
    if containers.is_empty() {
        return " none that this process may inspect".to_owned();
    }
    let line = |Running { container, cgroup, .. }: &Running| {
        let image = container.image.as_ref().map_or_else(String::new, |image| format!(" ({})", image.escaped()));
        format!("\n    {container}{image} in /{}", cgroup.escaped())
    };
    containers.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::DaemonError;

    #[test]
    fn cause_of_an_error_has_the_help() {
        let error = DaemonError::Target(TargetError::None { policy: "web".to_owned() });
        assert_eq!(of(&error).as_deref(), Some("name a cgroup: --cgroup PATH"));
        assert_eq!(of(&io::Error::other("x")), None);
    }

    #[test]
    fn errors_that_pass_on_another_error_have_its_help() {
        let missing = || CgroupError::Missing {
            path: "/x".into(),
            mount: "/sys/fs/cgroup".into(),
            source: io::ErrorKind::NotFound.into(),
        };
        let help = Some("cgroups are the directories below /sys/fs/cgroup: find /sys/fs/cgroup -type d".to_owned());
        let errors: [Box<dyn Error>; 3] = [
            Box::new(DaemonError::Target(TargetError::Cgroup(missing()))),
            Box::new(ExecError::TransientCgroup(TransientCgroupError::Cgroup(missing()))),
            Box::new(missing()),
        ];
        for error in errors {
            assert_eq!(of(&*error), help, "{error}");
        }
        let privileges = || KernelError::Privileges { missing: "CAP_BPF".to_owned() };
        let session = SessionError::Instance(crate::instance::InstanceError::Kernel(privileges()));
        assert!(of(&session).is_some() && of(&session) == of(&privileges()));
    }

    #[test]
    fn limit_of_open_files_is_named_whatever_fails() {
        let error = KernelError::View { map: "sp_events", source: io::Error::from_raw_os_error(libc::EMFILE) };
        assert!(of(&error).is_some_and(|help| help.contains("ulimit -n")));
    }
}
