//! Reconciles live sockets on a thread, while `run` enforces policies. The thread holds no link and no map that enforces a policy,
//! and the loop of `run` never waits for it.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{LazyIter, ReconcileError, Reconciler, Selection, Sockets, Tally};
use crate::{compile::Desired, events::Event, host::cgroup::Mount, journal::Journal, kernel, skipped::Skip};

/// Messages that can wait for the loop. With more, the thread waits.
const WAITING_MAX: usize = 256;

/// The sockets to reconcile, and the policies to reconcile them with.
pub struct Task {
    pub mount: Mount,
    pub desired: Desired,
    pub selection: Selection,
    pub dry_run: bool,
    /// Whether to keep values that the application chose and that a rule allows.
    pub keeps_allowed: bool,
    pub journal: Journal,
}

/// A message of the thread to the loop.
pub enum Message {
    Event(Box<Event>),
    Done(Box<Done>),
}

/// The result of a reconciliation.
pub struct Done {
    pub tally: Tally,
    /// Sockets that did not answer in time.
    pub skipped: Vec<Skip>,
    pub error: Option<ReconcileError>,
}

/// The thread, as the loop sees it.
pub struct ReconcileThread {
    messages: Receiver<Message>,
    wake: UnixStream,
    stop: Arc<AtomicBool>,
}

impl ReconcileThread {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no socket pair or no thread for it.
    pub fn start(task: Task) -> io::Result<Self> {
        Self::spawn(move |sender, stop| reconcile(task, sender, stop))
    }

    fn spawn(work: impl FnOnce(&Sender, &AtomicBool) + Send + 'static) -> io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let (messages_in, messages) = sync_channel(WAITING_MAX);
        let sender = Sender { messages: messages_in, waker: Arc::new(waker) };
        let stop = Arc::new(AtomicBool::new(false));
        let should_stop = Arc::clone(&stop);
        thread::Builder::new().name("apply".to_owned()).spawn(move || work(&sender, &should_stop))?;
        Ok(Self { messages, wake, stop })
    }

    /// Returns the next message, if there is one. Does not wait.
    pub fn take(&mut self) -> Option<Message> {
        if let Ok(message) = self.messages.try_recv() {
            return Some(message);
        }
        // A message that is sent after this wakes the loop again.
        let mut room = [0; WAITING_MAX];
        while self.wake.read(&mut room).is_ok_and(|len| len == room.len()) {}
        self.messages.try_recv().ok()
    }

    /// Stops the thread after its current socket. Passes its messages on until it ends, or until `time` has passed.
    pub fn stop(&mut self, time: Duration, mut take: impl FnMut(Message)) {
        self.stop.store(true, Ordering::Relaxed);
        let until = Instant::now() + time;
        while let Ok(message) = self.messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
            take(message);
        }
    }
}

/// Readable when a message waits.
impl AsFd for ReconcileThread {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[derive(Clone)]
struct Sender {
    messages: SyncSender<Message>,
    waker: Arc<UnixStream>,
}

impl Sender {
    /// Sends a message. Drops it if the loop has ended.
    fn send(&self, message: Message) {
        if self.messages.send(message).is_ok() {
            // A full socket buffer means that the loop is awake already.
            let _ = (&*self.waker).write(&[0]);
        }
    }
}

fn reconcile(task: Task, sender: &Sender, stop: &AtomicBool) {
    let Task { mount, desired, selection, dry_run, keeps_allowed, journal } = task;
    let mut report = |event: &Event| {
        sender.send(Message::Event(Box::new(event.clone())));
        Ok(())
    };
    let mut iter = LazyIter::begin();
    let mut reconciler = Reconciler::new(&desired, dry_run, journal, Some(&mut report)).keeping_allowed(keeps_allowed);
    let found = Sockets::find(mount, selection, || iter.fd_refs(), kernel::inspector()).map_err(ReconcileError::from);
    let mut unread = 0;
    let (skipped, error) = match found {
        Ok(mut sockets) => {
            let pause = |_| if stop.load(Ordering::Relaxed) { Err(ReconcileError::Stopped) } else { Ok(()) };
            let reconciled = reconciler.run(&mut sockets, &mut iter, pause);
            unread = sockets.unread();
            (sockets.skipped(), reconciled.err())
        }
        Err(error) => (Vec::new(), Some(error)),
    };
    let tally = Tally { unanswered: skipped.len() as u64, unread_processes: unread as u64, ..reconciler.tally() };
    sender.send(Message::Done(Box::new(Done { tally, skipped, error })));
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn done(sockets: u64) -> Message {
        let tally = Tally { sockets, ..Tally::default() };
        Message::Done(Box::new(Done { tally, skipped: Vec::new(), error: None }))
    }

    fn is_readable(thread: &ReconcileThread, time: PollTimeout) -> bool {
        poll(&mut [PollFd::new(thread.as_fd(), PollFlags::POLLIN)], time).unwrap() > 0
    }

    #[test]
    fn descriptor_is_readable_until_all_messages_are_taken() {
        let mut thread =
            ReconcileThread::spawn(|sender, _| (0..3).for_each(|number| sender.send(done(number)))).unwrap();
        let mut taken = Vec::new();
        while taken.len() < 3 {
            assert!(is_readable(&thread, PollTimeout::from(10_000_u16)));
            while let Some(Message::Done(message)) = thread.take() {
                taken.push(message.tally.sockets);
            }
        }
        assert_eq!(taken, [0, 1, 2]);
        // The thread has ended: what remains readable is that, and there is no message.
        assert!(thread.take().is_none());
    }

    #[test]
    fn stop_passes_on_what_the_thread_still_sends() {
        let mut thread = ReconcileThread::spawn(|sender, stop| {
            while !stop.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            sender.send(done(7));
        })
        .unwrap();
        let mut taken = Vec::new();
        thread.stop(Duration::from_secs(10), |message| {
            if let Message::Done(message) = message {
                taken.push(message.tally.sockets);
            }
        });
        assert_eq!(taken, [7]);
    }
}
