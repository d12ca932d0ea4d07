//! All processes, at one moment: which of them have the name of a watcher, and which are the children of those.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
};

/// The name of the processes that podman and CRI-O start, one for each container.
pub(super) const CONMON: &str = "conmon";
/// The beginning of the names of containerd's shims: the kernel keeps no more.
pub(super) const SHIM: &str = "containerd-shim";

/// What kind of watcher a process says that it is. Proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Conmon,
    Shim,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: u32,
    /// In clock ticks since boot. With its number, it distinguishes a process from all others.
    pub(super) start: u64,
    pub(super) kind: Option<Kind>,
}

/// What `/proc/PID/stat` says of each.
#[derive(Debug, Default)]
pub(super) struct Processes {
    all: HashMap<u32, Process>,
    /// Of those that say that they are watchers.
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

    /// Returns the processes that say that they are watchers, in the order of their numbers.
    pub(super) fn watchers(&self) -> Vec<(u32, Kind)> {
        let mut found: Vec<_> = self.all.iter().filter_map(|(pid, process)| Some((*pid, process.kind?))).collect();
        found.sort_unstable_by_key(|(pid, _)| *pid);
        found
    }

    /// Returns the child of a watcher that the watcher knows by this number, which is another one here if the watcher is in a
    /// PID namespace of its own.
    pub(super) fn child(&self, watcher: u32, number: u32) -> Option<u32> {
        let depth = numbers(watcher)?.len();
        if depth == 1 {
            return self.get(number).filter(|process| process.parent == watcher).map(|_| number);
        }
        let mut children = self.children.get(&watcher)?.iter().copied();
        children.find(|child| numbers(*child).is_some_and(|numbers| numbers.get(depth - 1) == Some(&number)))
    }

    /// Whether a process is still the one that was read.
    pub(super) fn is_current(&self, pid: u32) -> bool {
        let now = stat(pid);
        now.is_some() && now.as_ref() == self.get(pid)
    }
}

/// Returns the numbers of a process, in each PID namespace from ours inwards.
fn numbers(pid: u32) -> Option<Vec<u32>> {
    Some(super::identity::Status::read(pid)?.numbers)
}

fn stat(pid: u32) -> Option<Process> {
    // There may be thousands. The fields that count are at the beginning.
    let mut stat = [0; 512];
    let len = File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut stat).ok()?;
    parse_stat(stat.get(..len)?)
}

/// Parses proc_pid_stat(5): the name is in parentheses and may contain anything. `None` for a process that has ended.
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
    fn process_may_have_any_name() {
        let stat = "812 (a) (b) ) S 7 812 812 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 4242 5 6\n";
        assert_eq!(parse_stat(stat.as_bytes()), Some(Process { parent: 7, start: 4242, kind: None }));
        let conmon = stat.replace("a) (b) ", "conmon");
        assert_eq!(parse_stat(conmon.as_bytes()).and_then(|process| process.kind), Some(Kind::Conmon));
        assert_eq!(parse_stat(stat.replace(" S ", " Z ").as_bytes()), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn this_process_is_its_parents_child() {
        let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let processes = Processes::read().unwrap();
        assert_eq!(processes.get(own).map(|process| process.parent), Some(parent));
        assert_eq!(processes.child(parent, own), Some(own));
        assert_eq!(processes.child(own, own), None);
        assert!(processes.is_current(own));
    }
}
