//! Reconciles live sockets beside everything else that `run` does: on a thread that holds nothing that enforces policies, and never
//! touches a socket. Enforcement does not wait for it.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    apply::ApplyError,
    lazy_iter::LazyIter,
    reconcile::{Reconciler, Tally},
    sockets::{Sockets, Targets},
};
use crate::{
    compile::Desired,
    events::Event,
    host::{cgroup::Mount, inspect::Inspector},
    journal::Journal,
    skipped::Skip,
};

/// The sockets to reconcile, and the policies to reconcile them with.
pub(super) struct Task {
    pub(super) mount: Mount,
    pub(super) desired: Desired,
    pub(super) targets: Targets,
    pub(super) dry_run: bool,
    pub(super) journal: Journal,
}

/// What the thread has to say.
pub(super) enum Message {
    /// This process is about to look into sockets, once that is answered.
    Worker(u32, mpsc::Sender<()>),
    Event(Box<Event>),
    Done(Box<Done>),
}

/// What came of it.
pub(super) struct Done {
    pub(super) tally: Tally,
    pub(super) skipped: Vec<Skip>,
    pub(super) error: Option<ApplyError>,
}

/// Messages that wait to be taken. With more, the thread waits.
const WAITING_MAX: usize = 256;

/// The thread.
pub(super) struct ReconcileThread {
    messages: Receiver<Message>,
    wake: UnixStream,
    stop: Arc<AtomicBool>,
}

impl ReconcileThread {
    pub(super) fn begin(task: Task) -> io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let (sender, messages) = sync_channel(WAITING_MAX);
        let teller = Teller { sender, waker: Arc::new(waker) };
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        thread::Builder::new().name("apply".to_owned()).spawn(move || reconcile(task, &teller, &asked))?;
        Ok(Self { messages, wake, stop })
    }

    /// Gives what there is to take; does not wait.
    pub(super) fn next(&mut self) -> Option<Message> {
        let message = self.messages.try_recv().ok();
        if message.is_none() {
            // Whatever is told from now on wakes again.
            let mut room = [0; WAITING_MAX];
            while self.wake.read(&mut room).is_ok_and(|len| len == room.len()) {}
            return self.messages.try_recv().ok();
        }
        message
    }

    /// Has it stop after the socket that it is at, and hands over what it says until then, for at most so long.
    pub(super) fn stop(&mut self, time: Duration, mut take: impl FnMut(Message)) {
        self.stop.store(true, Ordering::Relaxed);
        let until = Instant::now() + time;
        while let Ok(message) = self.messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
            take(message);
        }
    }
}

/// Readable when there is something to take.
impl AsFd for ReconcileThread {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[derive(Clone)]
struct Teller {
    sender: SyncSender<Message>,
    waker: Arc<UnixStream>,
}

impl Teller {
    /// Nobody listens any more where `run` has gone on without it.
    fn tell(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // Where there is no room, it has been woken already.
            let _ = (&*self.waker).write(&[0]);
        }
    }
}

fn reconcile(task: Task, teller: &Teller, stop: &AtomicBool) {
    let Task { mount, desired, targets, dry_run, journal } = task;
    let announcer = teller.clone();
    let inspector = Inspector::announcing(move |worker| {
        let (answer, answered) = mpsc::channel();
        announcer.tell(Message::Worker(worker, answer));
        let _ = answered.recv();
    });
    let mut tell = |event: &Event| {
        teller.tell(Message::Event(Box::new(event.clone())));
        Ok(())
    };
    let mut walker = LazyIter::begin();
    let mut in_line = Reconciler::new(&desired, dry_run, journal, Some(&mut tell));
    let found = Sockets::find(mount, targets, || walker.holders(), inspector).map_err(ApplyError::from);
    let (skipped, error) = match found {
        Ok(mut sockets) => {
            let pause = |_| if stop.load(Ordering::Relaxed) { Err(ApplyError::Stopped) } else { Ok(()) };
            let brought = in_line.run(&mut sockets, &mut walker, pause);
            (sockets.skipped(), brought.err())
        }
        Err(error) => (Vec::new(), Some(error)),
    };
    let tally = Tally { unanswered: skipped.len() as u64, ..in_line.tally() };
    teller.tell(Message::Done(Box::new(Done { tally, skipped, error })));
}
