//! The settings of policies that this kernel does not support.

use abi::setting::{Setting, form, on_conflict};

use super::{OnUnsupported, ProbedOptions, SessionError};
use crate::{
    compile::Desired,
    errno,
    host::tcp,
    kernel::{Answer, Object},
    policy::model::Errno,
    unsupported::{Unsupported, UnsupportedList},
};

/// Returns the settings that this kernel does not support. Removes unsupported hooks from `desired`.
pub(super) fn find_unsupported(object: &Object, desired: &mut Desired, probed: &ProbedOptions) -> UnsupportedList {
    let refused = object.refused();
    let at_hooks = refused
        .iter()
        .filter(|(hook, _)| !hook.is_optional())
        .filter_map(|(hook, reason)| Unsupported::of_hook(desired, *hook, reason.clone()));
    let mut unsupported: Vec<Unsupported> = at_hooks.collect();
    desired.keep_hooks(|hook| !refused.iter().any(|(other, _)| *other == hook));
    unsupported.extend(desired.set_options().into_iter().filter_map(|option| match probed.get(option.name)? {
        Answer::No(errno) => Some(Unsupported::of_option(desired, option, errno)),
        Answer::Yes | Answer::Unknown(_) => None,
    }));
    unsupported.extend(missing_congestion_controls(desired));
    if !object.helper_support().set_retval {
        unsupported.extend(impossible_errnos(desired));
    }
    unsupported.into_iter().collect()
}

/// Rejects policies that are enforced and have unsupported settings, if that is the choice.
pub(super) fn refuse(choice: OnUnsupported, unsupported: &UnsupportedList) -> Result<(), SessionError> {
    if choice == OnUnsupported::Refuse && unsupported.0.iter().any(|entry| entry.is_enforced) {
        return Err(SessionError::Unsupported(unsupported.clone()));
    }
    Ok(())
}

/// Returns the congestion controls of policies that this kernel does not have.
fn missing_congestion_controls(desired: &Desired) -> Vec<Unsupported> {
    let wanted = desired.congestion_controls();
    if wanted.is_empty() {
        return Vec::new();
    }
    match tcp::congestion_controls() {
        Ok(available) => {
            let missing = wanted.into_iter().filter(|name| !available.iter().any(|known| known == name));
            missing.map(|name| Unsupported::of_congestion_control(desired, name, &available)).collect()
        }
        Err(error) => {
            // A refusal on a socket will then be reported.
            log::warn!("cannot read which congestion controls this kernel has: {error}");
            Vec::new()
        }
    }
}

/// Returns the denied options whose errno this kernel cannot return.
fn impossible_errnos(desired: &Desired) -> Vec<Unsupported> {
    let denies = |setting: &Setting| setting.form == form::DENY || setting.on_conflict == on_conflict::DENY;
    let all = desired.settings.iter().zip(&desired.sources);
    all.filter(|(setting, _)| denies(setting) && setting.errno != Errno::EPERM.0)
        .map(|(setting, source)| Unsupported::of_errno(desired, source, &errno::name(setting.errno.into())))
        .collect()
}
