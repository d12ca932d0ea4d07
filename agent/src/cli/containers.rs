//! The containers of this host, for commands whose policies are about any.

use crate::{
    host::containers::{Listing, Running, running},
    policy::Policy,
};

/// Those there are; none where no policy asks for one.
pub(super) fn wanted_by(policies: &[Policy]) -> Vec<Running> {
    if policies.iter().all(|policy| policy.target.containers.is_empty()) {
        return Vec::new();
    }
    match running() {
        Ok(Listing { running, hidden: 0 }) => running,
        Ok(Listing { running, hidden }) => {
            log::warn!("{hidden} processes watch over containers that only root can look into");
            running
        }
        Err(error) => {
            log::warn!("cannot tell which containers there are: {error}");
            Vec::new()
        }
    }
}

/// For people to find their own among.
pub(super) fn list(containers: &[Running]) -> String {
    if containers.is_empty() {
        return " none that can be seen".to_owned();
    }
    let line = |Running { container, cgroup }: &Running| {
        let image = container.image.as_ref().map_or_else(String::new, |image| format!(" ({image})"));
        format!("\n    {container}{image} in /{}", cgroup.display())
    };
    containers.iter().map(line).collect()
}
