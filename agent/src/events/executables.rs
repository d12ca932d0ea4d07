//! The paths of the executables that make calls. The kernel side sends each path before the first event of its process.

use abi::event::{EXES_SENT_MAX, Executable, ExecutableFile};

use crate::recent::Recent;

/// The paths of executables. The least recently used are forgotten.
#[derive(Debug)]
pub struct Executables(Recent<Executable, ExePath>);

impl Default for Executables {
    fn default() -> Self {
        Self(Recent::new(GENERATION))
    }
}

/// A path from the root of the mount namespace; `None` if it is longer than the kernel side sends.
type ExePath = Option<String>;

/// Executables per generation of the cache: twice as many as the kernel side remembers.
const GENERATION: usize = 2 * EXES_SENT_MAX as usize;

impl Executables {
    /// Adds a path that the kernel side sent.
    pub fn learn(&mut self, file: &ExecutableFile) {
        self.0.insert(file.executable, path(file));
    }

    /// Returns the path of an executable; `None` if no path was sent, or if the path was forgotten.
    pub fn path_of(&mut self, executable: &Executable) -> Option<ExePath> {
        self.0.get(executable)
    }
}

/// Returns the path. The names in the record are in the order in which the kernel walks up from the file.
fn path(file: &ExecutableFile) -> ExePath {
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
    use std::mem;

    use super::*;

    fn executable(pid: u32) -> Executable {
        Executable { start_ns: 1, pid, exec_id: 3 }
    }

    fn file(executable: Executable, names: &[u8]) -> ExecutableFile {
        // SAFETY: numbers, for which zero is valid.
        let mut file: ExecutableFile = unsafe { mem::zeroed() };
        file.executable = executable;
        file.len = names.len() as u64;
        file.names[..names.len()].copy_from_slice(names);
        file
    }

    #[test]
    fn path_is_joined_from_the_last_name_to_the_first() {
        for (names, expected) in
            [(&b"redis-server\0bin\0usr\0"[..], Some("/usr/bin/redis-server")), (b"init\0", Some("/init")), (b"", None)]
        {
            assert_eq!(path(&file(executable(1), names)).as_deref(), expected);
        }
    }

    #[test]
    fn least_recently_used_are_forgotten_first() {
        let mut executables = Executables::default();
        for pid in 1..=EXES_SENT_MAX * 4 {
            executables.learn(&file(executable(pid), b"a\0"));
            // The first one makes a call from time to time.
            if pid % EXES_SENT_MAX == 0 {
                assert!(executables.path_of(&executable(1)).is_some(), "after {pid}");
            }
        }
        assert!(executables.path_of(&executable(EXES_SENT_MAX * 3)).is_some());
        for pid in EXES_SENT_MAX * 4..EXES_SENT_MAX * 9 {
            executables.learn(&file(executable(pid), b"a\0"));
        }
        assert_eq!(executables.path_of(&executable(EXES_SENT_MAX)), None);
        assert!(executables.0.len() <= 2 * GENERATION);
    }
}
