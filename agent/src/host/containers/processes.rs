//! All processes, at one moment: who is whose child.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
};

/// What `/proc/PID/stat` says of each.
#[derive(Debug, Default)]
pub(super) struct Processes(HashMap<u32, Process>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: u32,
    /// At most 15 bytes.
    pub(super) comm: String,
    /// In clock ticks since boot.
    pub(super) start: u64,
}

impl Processes {
    pub(super) fn read() -> io::Result<Self> {
        let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // Who is gone by now is nobody's.
        let processes = pids.filter_map(|pid: u32| {
            // There may be thousands. All that is wanted stands at the beginning.
            let mut stat = [0; 512];
            let len = File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut stat).ok()?;
            Some((pid, parse_stat(&String::from_utf8_lossy(stat.get(..len)?))?))
        });
        Ok(Self(processes.collect()))
    }

    pub(super) fn get(&self, pid: u32) -> Option<&Process> {
        self.0.get(&pid)
    }

    /// The processes of this name, in the order of their numbers.
    pub(super) fn called(&self, comm: &str) -> Vec<u32> {
        let mut found: Vec<u32> =
            self.0.iter().filter(|(_, process)| process.comm == comm).map(|(pid, _)| *pid).collect();
        found.sort_unstable();
        found
    }

    /// The process that `watcher` knows by this number, which is another one here where it is in a PID namespace of its own.
    /// `None` unless it is the child of one that `is_parent`.
    pub(super) fn child(&self, watcher: u32, number: u32, is_parent: impl Fn(u32) -> bool) -> Option<u32> {
        let depth = numbers(watcher)?.len();
        if depth == 1 {
            return self.get(number).filter(|process| is_parent(process.parent)).map(|_| number);
        }
        let mut children = self.0.iter().filter(|(_, process)| is_parent(process.parent)).map(|(pid, _)| *pid);
        children.find(|child| numbers(*child).is_some_and(|numbers| numbers.get(depth - 1) == Some(&number)))
    }
}

/// The numbers of a process, in each PID namespace from ours inwards.
fn numbers(pid: u32) -> Option<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    Some(numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect())
}

/// Of proc_pid_stat(5): the name is in parentheses and may contain anything. `None` for what has ended and is only waited for.
fn parse_stat(stat: &str) -> Option<Process> {
    let (before, after) = stat.rsplit_once(") ")?;
    let (_, comm) = before.split_once(" (")?;
    let mut fields = after.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some(Process { parent, comm: comm.to_owned(), start })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_may_have_any_name() {
        let stat = "812 (a) (b) ) S 7 812 812 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 4242 5 6\n";
        assert_eq!(parse_stat(stat), Some(Process { parent: 7, comm: "a) (b) ".to_owned(), start: 4242 }));
        assert_eq!(parse_stat(&stat.replace(" S ", " Z ")), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn this_process_is_its_parents_child() {
        let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let processes = Processes::read().unwrap();
        assert_eq!(processes.get(own).map(|process| process.parent), Some(parent));
        assert_eq!(processes.child(parent, own, |process| process == parent), Some(own));
        assert_eq!(processes.child(parent, own, |process| process == own), None);
    }
}
