//! The programs that the kernel runs for each socket and for each file, loaded when they are wanted.

use std::{panic::resume_unwind, thread};

use crate::{
    host::{process, survey::Holder},
    kernel::{KernelError, Walk},
};

/// With fewer files open on this host it takes less time to look at each of those of processes than to load the programs.
const WORTH_LOADING: u64 = 8 * 1024;

/// The programs, as soon as they are wanted.
#[derive(Default)]
pub(super) enum Walker {
    #[default]
    Idle,
    /// Loaded beside whatever else is to be done, to tell who has sockets too.
    Coming(thread::JoinHandle<Result<Walk, KernelError>>),
    There(Box<Walk>),
}

impl Walker {
    /// Begins to load them, where there are so many files that they will be wanted.
    pub(super) fn begin() -> Self {
        let is_worth_it = process::open_files().is_some_and(|files| files >= WORTH_LOADING);
        if is_worth_it { Self::Coming(thread::spawn(|| Walk::load(true))) } else { Self::Idle }
    }

    /// Who has which sockets, if they were begun with.
    pub(super) fn holders(&mut self) -> Option<Vec<(u32, Holder)>> {
        if matches!(self, Self::Idle) {
            return None;
        }
        let told = self.get().and_then(Walk::holders);
        told.unwrap_or_else(|error| {
            log::info!("{error}: who has sockets is looked up in /proc");
            None
        })
    }

    /// # Errors
    ///
    /// Where they cannot be loaded.
    pub(super) fn get(&mut self) -> Result<&mut Walk, KernelError> {
        let walk = match std::mem::take(self) {
            Self::Idle => Box::new(Walk::load(false)?),
            Self::Coming(loading) => Box::new(loading.join().unwrap_or_else(|panic| resume_unwind(panic))?),
            Self::There(walk) => walk,
        };
        *self = Self::There(walk);
        match self {
            Self::There(walk) => Ok(walk),
            Self::Idle | Self::Coming(_) => Err(KernelError::Incomplete { what: "what was just loaded" }),
        }
    }
}
