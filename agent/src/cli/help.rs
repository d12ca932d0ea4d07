//! The help lines of errors: what to type next. Libraries do not know the command line.

use std::error::Error;

use crate::{
    container::Running, escape::Escape, reconcile::ReconcileError, session::SessionError, targets::TargetError,
};

/// Returns the help line of an error as the end of a message, or nothing.
pub(super) fn line(error: &(dyn Error + 'static)) -> String {
    of(error).map_or_else(String::new, |help| format!("\n  help: {help}"))
}

/// Returns the help line of an error or of its first cause that has one.
pub(super) fn of(error: &(dyn Error + 'static)) -> Option<String> {
    let mut error = Some(error);
    while let Some(this) = error {
        let help = this
            .downcast_ref()
            .map(of_target)
            .or_else(|| this.downcast_ref().map(of_reconcile))
            .or_else(|| this.downcast_ref().map(of_session));
        if let Some(Some(help)) = help {
            return Some(help);
        }
        error = this.source();
    }
    None
}

fn of_target(error: &TargetError) -> Option<String> {
    match error {
        TargetError::None { .. } => Some("name a cgroup: --cgroup PATH".to_owned()),
        TargetError::NoMatch { mount, .. } => {
            Some(format!("cgroups are the directories below {}: find {} -type d", mount.escaped(), mount.escaped()))
        }
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
        assert_eq!(of(&std::io::Error::other("x")), None);
    }
}
