//! Which files the programs are that make calls, as the kernel told of each before its first event.

use std::{collections::HashMap, mem};

use abi::event::{Program, ProgramFile, TOLD_MAX};

/// The paths of programs. Those that have made no call for longest are forgotten, but not before the kernel forgets that
/// it told of them, and tells again.
#[derive(Debug, Default)]
pub struct Programs {
    /// Those that made calls lately.
    young: HashMap<Program, Option<String>>,
    /// Those that made calls before.
    old: HashMap<Program, Option<String>>,
}

/// Programs of each age: twice as many as the kernel keeps in mind.
const GENERATION: usize = 2 * TOLD_MAX as usize;

impl Programs {
    /// Takes in what the kernel tells.
    pub fn learn(&mut self, file: &ProgramFile) {
        self.keep(file.program, path(file));
    }

    /// The path of a program's file, from the root that its processes have; `None` where it is too long or not known.
    pub fn path(&mut self, program: &Program) -> Option<String> {
        if let Some(path) = self.young.get(program) {
            return path.clone();
        }
        let path = self.old.remove(program)?;
        self.keep(*program, path.clone());
        path
    }

    fn keep(&mut self, program: Program, path: Option<String>) {
        if self.young.len() >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(program, path);
    }
}

/// The names are in the order in which the kernel comes upon them, from the file up.
fn path(file: &ProgramFile) -> Option<String> {
    let names = file.names.get(..usize::try_from(file.len).ok()?)?.strip_suffix(&[0])?;
    let path = names.rsplit(|byte| *byte == 0).fold(Vec::new(), |mut path, name| {
        path.push(b'/');
        path.extend_from_slice(name);
        path
    });
    Some(String::from_utf8_lossy(&path).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(pid: u32) -> Program {
        Program { start_ns: 1, pid, exec_id: 3 }
    }

    fn file(program: Program, names: &[u8]) -> ProgramFile {
        // SAFETY: numbers, for which zero is valid.
        let mut file: ProgramFile = unsafe { mem::zeroed() };
        file.program = program;
        file.len = names.len() as u64;
        file.names[..names.len()].copy_from_slice(names);
        file
    }

    #[test]
    fn path_is_put_together_from_the_last_name_to_the_first() {
        for (names, expected) in
            [(&b"redis-server\0bin\0usr\0"[..], Some("/usr/bin/redis-server")), (b"init\0", Some("/init")), (b"", None)]
        {
            assert_eq!(path(&file(program(1), names)).as_deref(), expected);
        }
    }

    #[test]
    fn longest_silent_are_forgotten_first_and_not_before_the_kernel_forgets_them() {
        let mut programs = Programs::default();
        for pid in 1..=TOLD_MAX * 4 {
            programs.learn(&file(program(pid), b"a\0"));
            // The first one makes a call from time to time.
            if pid % TOLD_MAX == 0 {
                assert!(programs.path(&program(1)).is_some(), "after {pid}");
            }
        }
        assert!(programs.path(&program(TOLD_MAX * 3)).is_some());
        for pid in TOLD_MAX * 4..TOLD_MAX * 9 {
            programs.learn(&file(program(pid), b"a\0"));
        }
        assert_eq!(programs.path(&program(TOLD_MAX)), None);
        assert!(programs.young.len() + programs.old.len() <= 2 * GENERATION);
    }
}
