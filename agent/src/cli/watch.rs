//! Waiting for what happens, and telling of it, for whatever command keeps a policy in force.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    output::{IncompleteReport, Writer},
    signals::Signals,
};
use crate::{
    policy::model::Calls,
    session::{Session, SessionError},
};

/// How long a loss that comes without an event may go untold, in milliseconds.
const LOSS_INTERVAL_MS: u16 = 1000;
/// The same for calls, for which the programs wake nobody unless they come very fast.
const CALL_INTERVAL_MS: u16 = 50;

/// Why reporting came to an end.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot watch for signals and events: {0}")]
    Watch(#[source] io::Error),
    #[error(transparent)]
    Report(#[from] IncompleteReport),
}

/// Waits until there is a signal or an event, one of `ends` has ended, or it is time to look for losses.
pub(super) fn wait(signals: &Signals, session: &Session, ends: &[BorrowedFd<'_>]) -> Result<(), WatchError> {
    let mut polled = sources(signals, session);
    polled.extend(ends.iter().map(|end| PollFd::new(*end, PollFlags::POLLIN)));
    wait_for(&mut polled, interval(session))
}

/// What to wait on for signals and events.
pub(super) fn sources<'a>(signals: &'a Signals, session: &'a Session) -> Vec<PollFd<'a>> {
    vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(session.as_fd(), PollFlags::POLLIN)]
}

/// How often to look at what does not tell of itself, in milliseconds.
pub(super) fn interval(session: &Session) -> u16 {
    match session.desired().audit.calls {
        Calls::Conflicts => LOSS_INTERVAL_MS,
        Calls::Governed | Calls::All => CALL_INTERVAL_MS,
    }
}

/// Waits until there is something to read, or so many milliseconds have passed.
pub(super) fn wait_for(polled: &mut [PollFd<'_>], patience: u16) -> Result<(), WatchError> {
    match poll(polled, PollTimeout::from(patience)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(WatchError::Watch(error.into())),
    }
}

/// Writes what there is to tell. Gives whether there may be more.
pub(super) fn tell(session: &mut Session, writer: &Writer) -> Result<bool, WatchError> {
    let more = session.drain(|event| writer.event(event));
    for loss in session.new_losses()? {
        writer.loss(&loss);
    }
    Ok(more)
}

/// Tells of events until a signal asks for the end, the reader is gone, or all of `ends`, if there are any, have ended.
pub(super) fn watch(
    session: &mut Session,
    signals: &mut Signals,
    writer: &Writer,
    ends: &[BorrowedFd<'_>],
) -> Result<(), WatchError> {
    loop {
        let left = ends.iter().copied().filter(|end| !has_ended(*end)).collect::<Vec<_>>();
        if left.is_empty() && !ends.is_empty() {
            return Ok(());
        }
        wait(signals, session, &left)?;
        let mut is_over = false;
        while let Some(received) = signals.next().map_err(WatchError::Watch)? {
            is_over |= received.asks_for_end();
        }
        tell(session, writer)?;
        if is_over || writer.is_closed() {
            return Ok(());
        }
    }
}

/// Takes the policies out of force, unless they are to stay, and tells of what is left.
pub(super) fn end(session: &mut Session, writer: &Writer) -> Result<(), WatchError> {
    session.end()?;
    loop {
        let more = tell(session, writer)?;
        // Of what stays in force there is always more.
        if !more || session.persistent_name().is_some() {
            return Ok(());
        }
    }
}

fn has_ended(process: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(process, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
