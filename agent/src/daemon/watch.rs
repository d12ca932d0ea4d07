//! Waits for signals and events, and passes events on to an [`Observer`], for each command that keeps policies in force.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{Observer, Signals};
use crate::{
    policy::model::Calls,
    session::{Session, SessionError},
};

/// The interval of looks at the counts of losses, in milliseconds. A loss has no event.
const LOSS_INTERVAL_MS: u16 = 1000;
/// The interval of looks at the ring buffer when every call is reported, in milliseconds. The programs do not wake the agent for
/// each call.
const CALL_INTERVAL_MS: u16 = 50;

/// Why reporting ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("cannot wait for signals and events: {0}")]
    Wait(#[source] io::Error),
}

/// Waits for a signal, an event, the end of one of `ends`, or the time to look for losses.
///
/// # Errors
///
/// Fails if poll(2) fails.
pub fn wait(signals: &Signals, session: &Session, ends: &[BorrowedFd<'_>]) -> Result<(), WatchError> {
    let mut polled = sources(signals, session);
    polled.extend(ends.iter().map(|end| PollFd::new(*end, PollFlags::POLLIN)));
    wait_for(&mut polled, interval_ms(session))
}

/// Returns the sources of signals and events.
pub(super) fn sources<'a>(signals: &'a Signals, session: &'a Session) -> Vec<PollFd<'a>> {
    vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(session.as_fd(), PollFlags::POLLIN)]
}

/// Returns the interval of looks at what wakes nobody, in milliseconds.
pub(super) fn interval_ms(session: &Session) -> u16 {
    match session.desired().audit.calls {
        Calls::Conflicts => LOSS_INTERVAL_MS,
        Calls::Governed | Calls::All => CALL_INTERVAL_MS,
    }
}

/// Waits until a source is readable, or for so many milliseconds.
pub(super) fn wait_for(polled: &mut [PollFd<'_>], timeout_ms: u16) -> Result<(), WatchError> {
    match poll(polled, PollTimeout::from(timeout_ms)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(WatchError::Wait(error.into())),
    }
}

/// Passes on the events and losses that are there. Returns whether there may be more.
///
/// # Errors
///
/// Fails if the counts of losses cannot be read.
pub fn pass_on(session: &mut Session, observer: &impl Observer) -> Result<bool, WatchError> {
    let more = session.drain(|event| observer.event(event));
    for loss in session.new_losses()? {
        observer.loss(&loss);
    }
    Ok(more)
}

/// Passes events on until a signal ends this process, the observer has no reader any more, or all of `ends` have ended.
///
/// # Errors
///
/// See [`wait`] and [`pass_on`].
pub fn watch(
    session: &mut Session,
    signals: &mut Signals,
    observer: &impl Observer,
    ends: &[BorrowedFd<'_>],
) -> Result<(), WatchError> {
    loop {
        let left = ends.iter().copied().filter(|end| !has_ended(*end)).collect::<Vec<_>>();
        if left.is_empty() && !ends.is_empty() {
            return Ok(());
        }
        wait(signals, session, &left)?;
        let mut is_over = false;
        while let Some(received) = signals.receive().map_err(WatchError::Wait)? {
            is_over |= received.asks_for_end();
        }
        pass_on(session, observer)?;
        if is_over || observer.is_closed() {
            return Ok(());
        }
    }
}

/// Detaches the policies, unless they persist, and passes on the remaining events.
///
/// # Errors
///
/// Fails if the policies cannot be detached.
pub fn end(session: &mut Session, observer: &impl Observer) -> Result<(), WatchError> {
    session.end()?;
    loop {
        let more = pass_on(session, observer)?;
        // Policies that persist cause more events without end.
        if !more || session.persistent_name().is_some() {
            return Ok(());
        }
    }
}

fn has_ended(process: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(process, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
