//! The records of the programs, decoded.

use abi::{
    event::{Call, flags},
    index,
};
use nix::time::{ClockId, clock_gettime};

use super::{Generation, Session};
use crate::{
    events::{Event, HostContext, decode},
    host::process,
    kernel::Record,
};

/// Maximum number of events that one call drains, which takes some milliseconds.
const BATCH_MAX: usize = 1024;

impl Session {
    /// Passes pending events to `handle`. Returns whether there may be more: a call handles a limited number, so that the
    /// caller can do other work in between.
    pub fn drain(&mut self, mut handle: impl FnMut(&Event)) -> bool {
        for _ in 0..BATCH_MAX {
            let event = match self.object.next_record() {
                None => {
                    self.was_drained = true;
                    return false;
                }
                Some(Record::File(file)) => {
                    self.executables.learn(&file);
                    continue;
                }
                Some(Record::Event(raw)) => {
                    let context = self.host_context(&raw);
                    self.generation_of(&raw.call).and_then(|generation| {
                        decode(&raw, &generation.desired, context).ok().map(|event| (generation.number, event))
                    })
                }
                Some(Record::Unknown) => None,
            };
            match event {
                Some((generation, event)) if self.filter.admits(&event) => {
                    self.report.fold(generation, &event);
                    handle(&event);
                }
                Some(_) => {}
                None => self.unknown_records += 1,
            }
        }
        true
    }

    /// Returns the generation that an event's setting belongs to, by the number of the setting; the current generation if no
    /// setting decided the call; `None` if the record of the generation is gone.
    fn generation_of(&self, call: &Call) -> Option<&Generation> {
        if call.flags & flags::DECIDED == 0 {
            return Some(&self.current);
        }
        let is_generation_of_call =
            |generation: &&Generation| index::slot_of(generation.number) == index::slot(call.setting);
        let later_first =
            [&self.current].into_iter().chain(self.draining.iter().rev()).chain(self.retired.iter().rev());
        later_first.into_iter().find(is_generation_of_call)
    }

    fn exe(&mut self, raw: &abi::event::Event) -> Result<String, &'static str> {
        if raw.executable.pid == 0 {
            // The kernel did not report the executable, so the current one is read.
            return process::executable(raw.pid).ok_or("the process had exited when the event was read");
        }
        match self.executables.path_of(&raw.executable) {
            Some(path) => path.ok_or("its path is unknown or too long"),
            None => {
                self.object.request_exe_path(&raw.executable);
                Err("the record of its path was lost")
            }
        }
    }

    fn host_context(&mut self, raw: &abi::event::Event) -> HostContext {
        let cgroup = self.names.name(raw.cgroup).map(|name| name.to_string());
        HostContext {
            // If the kernel did not report the executable, this is the current one.
            exe: self.exe(raw),
            container: cgroup.as_deref().and_then(|cgroup| self.containers.of_cgroup(cgroup)),
            cgroup,
            socket_cgroup: self.names.name(raw.call.socket_cgroup).map(|name| name.to_string()),
            monotonic_epoch_ns: monotonic_epoch_ns(),
            btf_error: self.object.btf_error().map(str::to_owned),
        }
    }
}

/// Returns the offset in nanoseconds between the kernel's time stamps and the time of day. It changes when the clock is set or
/// the machine is suspended.
fn monotonic_epoch_ns() -> i128 {
    let now = |clock| {
        clock_gettime(clock).map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC)
}
