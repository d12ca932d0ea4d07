//! Reads what the programs write: the records of the ring buffer, and counters.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use abi::{
    Counters, Losses,
    event::{Event, Executable, ExecutableFile, Tally, TallyKey},
};

use super::{
    super::{KernelError, maps, misses::misses, tables::Tables},
    Object,
};

/// A record of the ring buffer.
pub enum Record {
    Event(Box<Event>),
    /// The path of an executable. It comes before the first event of that executable.
    File(Box<ExecutableFile>),
    /// A record whose length is that of neither kind.
    Unknown,
}

const EVENT_LEN: usize = size_of::<Event>();
const FILE_LEN: usize = size_of::<ExecutableFile>();

impl Record {
    /// Reads the bytes of a record. The length of a record identifies its kind.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        // SAFETY: the length is that of the type, and every bit pattern is valid for both types. Records are aligned to 8
        // bytes, but unaligned reads do not depend on that.
        unsafe {
            match bytes.len() {
                EVENT_LEN => Self::Event(Box::new(bytes.as_ptr().cast::<Event>().read_unaligned())),
                FILE_LEN => Self::File(Box::new(bytes.as_ptr().cast::<ExecutableFile>().read_unaligned())),
                _ => Self::Unknown,
            }
        }
    }
}

impl Object {
    /// Returns the next record; `None` if the ring buffer is empty.
    pub fn next_record(&mut self) -> Option<Record> {
        self.ring.next().map(|record| Record::read(&record))
    }

    /// Returns the counters of each setting of the policies in force, in the order of [`crate::compile::Desired::settings`].
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        self.tables.as_ref().map_or(Ok(Vec::new()), Tables::counters)
    }

    /// Returns what was lost since this agent started.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.losses.get()
    }

    /// Returns the number of events that found the ring buffer full since the buffer was made, also under earlier agents.
    #[must_use]
    pub fn ring_full(&self) -> u64 {
        self.losses.all().ring_full
    }

    /// Returns how often the kernel skipped a program of the audit because another one was running on that CPU.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.audit.map_or(0, |audit| misses(&self.ebpf, audit.programs()))
    }

    /// Returns the number of calls that would be reported, but whose exit has not been seen.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn open_calls(&self) -> Result<u64, KernelError> {
        maps::open_calls(&self.ebpf, self.config.calls)
    }

    /// Drops the records of calls whose threads have exited, so that their exits were not seen. Returns how many of these calls
    /// would have been reported.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn drop_dead_calls(&mut self) -> Result<u64, KernelError> {
        maps::drop_dead_calls(&mut self.ebpf, self.config.calls)
    }

    /// Makes the programs send the path of an executable again before its next event.
    pub fn request_exe_path(&mut self, executable: &Executable) {
        maps::request_exe_path(&mut self.ebpf, executable);
    }

    /// Returns the calls that the audit saw, by option.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn tallies(&self) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
        maps::tallies(&self.ebpf)
    }
}

/// The descriptor is readable when there are records.
impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl AsRawFd for Object {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
