//! Processes of sockpolicy that inspect sockets. Their calls are not those of an application, so the programs of all sockpolicy
//! processes on this host ignore them.
//!
//! Each object has a map `sp_exempt`. A process finds the maps of the others by their name. Opening a map by its id takes
//! CAP_SYS_ADMIN (`bpf_map_get_fd_by_id`, kernel/bpf/syscall.c); without it, the calls are reported like an application's. Two
//! processes that write at once can lose an entry, with the same effect.

use abi::{Exempt, Exemptions};
use aya::maps::{Array, Map, MapData, MapInfo, loaded_maps};

use super::{KernelError, maps::map_error};
use crate::host::{inspect::Inspector, process};

const NAME: &str = "sp_exempt";

/// An exemption of a process, until this value is dropped.
#[derive(Debug)]
struct Exemption(Exempt);

impl Exemption {
    /// Makes all programs of sockpolicy on this host ignore the calls of a process, or only its reads. Returns `None` if the programs cannot know the
    /// process, because this process is in a PID namespace of its own.
    fn of(process: u32, reads_only: bool) -> Option<Self> {
        if !process::is_initial_namespace() {
            return None;
        }
        let exempt = Exempt { process, reads_only: reads_only.into(), start: process::start(process)? };
        for_each_map(|exemptions| add(exemptions, exempt, |other| process::start(other.process) == Some(other.start)));
        Some(Self(exempt))
    }
}

/// Returns an inspector whose calls are not reported as those of an application.
#[must_use]
pub fn inspector() -> Inspector {
    Inspector::announcing(|worker| Box::new(Exemption::of(worker, false)))
}

/// Returns an inspector whose reads are not reported as those of an application. Policies in force decide what it sets.
#[must_use]
pub fn governed_inspector() -> Inspector {
    Inspector::announcing(|worker| Box::new(Exemption::of(worker, true)))
}

impl Drop for Exemption {
    fn drop(&mut self) {
        for_each_map(|exemptions| remove(exemptions, self.0));
    }
}

/// Adds an entry in place of one whose process has exited, or of the first.
fn add(exemptions: &mut Exemptions, exempt: Exempt, is_alive: impl Fn(&Exempt) -> bool) {
    let free = exemptions.entries.iter().position(|entry| entry.process == 0 || !is_alive(entry));
    exemptions.entries[free.unwrap_or_default()] = exempt;
    exemptions.is_used = 1;
}

fn remove(exemptions: &mut Exemptions, exempt: Exempt) {
    for entry in exemptions.entries.iter_mut().filter(|entry| **entry == exempt) {
        *entry = Exempt::default();
    }
    exemptions.is_used = exemptions.entries.iter().any(|entry| entry.process != 0).into();
}

/// Changes the exemptions of each map. Skips maps that cannot be opened.
fn for_each_map(change: impl Fn(&mut Exemptions)) {
    let maps = loaded_maps().filter_map(Result::ok).filter(|map| map.name_as_str() == Some(NAME));
    for map in maps {
        if let Err(error) = change_one(&map, &change) {
            log::debug!("calls of sockpolicy may be reported: {error}");
        }
    }
}

fn change_one(map: &MapInfo, change: impl Fn(&mut Exemptions)) -> Result<(), KernelError> {
    let data = MapData::from_id(map.id()).map_err(map_error(NAME))?;
    let mut map = Array::<_, Exemptions>::try_from(Map::Array(data)).map_err(map_error(NAME))?;
    let mut exemptions = map.get(&0, 0).map_err(map_error(NAME))?;
    change(&mut exemptions);
    map.set(0, exemptions, 0).map_err(map_error(NAME))
}

#[cfg(test)]
mod tests {
    use abi::EXEMPT_MAX;

    use super::*;

    fn process(process: u32) -> Exempt {
        Exempt { process, reads_only: 0, start: 7 }
    }

    #[test]
    fn entry_replaces_one_of_a_process_that_has_exited() {
        let mut exemptions = Exemptions::default();
        for number in 1..=EXEMPT_MAX as u32 {
            add(&mut exemptions, process(number), |_| true);
        }
        add(&mut exemptions, process(9), |other| other.process != 3);
        assert_eq!(exemptions.entries.map(|entry| entry.process), [1, 2, 9, 4]);
        for number in [1, 2, 9] {
            remove(&mut exemptions, process(number));
        }
        // An entry of a process with the same id that started at another time.
        remove(&mut exemptions, Exempt { start: 8, ..process(4) });
        assert_eq!((exemptions.is_used, exemptions.entries.map(|entry| entry.process)), (1, [0, 0, 0, 4]));
        remove(&mut exemptions, process(4));
        assert_eq!(exemptions, Exemptions::default());
    }
}
