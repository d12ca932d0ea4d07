//! Reads all processes of this host, and finds those with the name of a watcher and their children.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
};

/// The command name of the watcher that podman and CRI-O start for each container.
pub(super) const CONMON: &str = "conmon";
/// The first 15 bytes of the names of containerd's shims. The kernel truncates command names to 15 bytes.
pub(super) const SHIM: &str = "containerd-shim";

/// The kind of watcher that a process is by its command name. A process can choose its command name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Conmon,
    Shim,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: u32,
    /// The start time in clock ticks since boot. The process id and the start time identify a process.
    pub(super) start: u64,
    pub(super) kind: Option<Kind>,
}

/// All processes, from `/proc/PID/stat`.
#[derive(Debug, Default)]
pub(super) struct Processes {
    all: HashMap<u32, Process>,
    /// The children of the processes with the name of a watcher.
    children: HashMap<u32, Vec<u32>>,
}

impl Processes {
    pub(super) fn read() -> io::Result<Self> {
        let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let all: HashMap<u32, Process> = pids.filter_map(|pid| Some((pid, stat(pid)?))).collect();
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for (pid, process) in &all {
            if all.get(&process.parent).is_some_and(|parent| parent.kind.is_some()) {
                children.entry(process.parent).or_default().push(*pid);
            }
        }
        Ok(Self { all, children })
    }

    pub(super) fn get(&self, pid: u32) -> Option<&Process> {
        self.all.get(&pid)
    }

    /// Returns the processes with the name of a watcher, sorted by process id.
    pub(super) fn watchers(&self) -> Vec<(u32, Kind)> {
        let mut watchers: Vec<_> = self.all.iter().filter_map(|(pid, process)| Some((*pid, process.kind?))).collect();
        watchers.sort_unstable_by_key(|(pid, _)| *pid);
        watchers
    }

    /// Returns the child of a watcher, from its process id in the watcher's PID namespace. The result is the id in the PID
    /// namespace of this process.
    pub(super) fn child(&self, watcher: u32, pid: u32) -> Option<u32> {
        let depth = pids(watcher)?.len();
        if depth == 1 {
            return self.get(pid).filter(|process| process.parent == watcher).map(|_| pid);
        }
        let mut children = self.children.get(&watcher)?.iter().copied();
        children.find(|child| pids(*child).is_some_and(|pids| pids.get(depth - 1) == Some(&pid)))
    }

    /// Returns whether a process id still belongs to the process that was read.
    pub(super) fn is_current(&self, pid: u32) -> bool {
        let current = stat(pid);
        current.is_some() && current.as_ref() == self.get(pid)
    }
}

/// Returns the ids of a process in each PID namespace, from the namespace of this process inwards.
fn pids(pid: u32) -> Option<Vec<u32>> {
    Some(super::identity::Status::read(pid)?.pids)
}

fn stat(pid: u32) -> Option<Process> {
    // There can be thousands of processes. The used fields are in the first 512 bytes.
    let mut stat = [0; 512];
    let len = File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut stat).ok()?;
    parse_stat(stat.get(..len)?)
}

/// Parses proc_pid_stat(5). The name is in parentheses and can contain any bytes. Returns `None` for a process that has ended.
pub(super) fn parse_stat(stat: &[u8]) -> Option<Process> {
    let stat = String::from_utf8_lossy(stat);
    let (before, after) = stat.rsplit_once(") ")?;
    let (_, comm) = before.split_once(" (")?;
    let mut fields = after.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    let kind = match comm {
        CONMON => Some(Kind::Conmon),
        SHIM => Some(Kind::Shim),
        _ => None,
    };
    Some(Process { parent, start, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_name_can_contain_any_characters() {
        let stat = "812 (a) (b) ) S 7 812 812 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 4242 5 6\n";
        assert_eq!(parse_stat(stat.as_bytes()), Some(Process { parent: 7, start: 4242, kind: None }));
        let conmon = stat.replace("a) (b) ", "conmon");
        assert_eq!(parse_stat(conmon.as_bytes()).and_then(|process| process.kind), Some(Kind::Conmon));
        assert_eq!(parse_stat(stat.replace(" S ", " Z ").as_bytes()), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn this_process_is_a_child_of_its_parent() {
        let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let processes = Processes::read().unwrap();
        assert_eq!(processes.get(own).map(|process| process.parent), Some(parent));
        assert_eq!(processes.child(parent, own), Some(own));
        assert_eq!(processes.child(own, own), None);
        assert!(processes.is_current(own));
    }
}
