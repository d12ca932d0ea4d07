//! `connections`: connects to itself as often as possible until standard input ends, and reads the options of each
//! socket. Then it prints `outbound|accepted VALUE… COUNT` for each combination of values. The options are those of
//! [`OPTIONS_READ`].

use std::{
    collections::BTreeMap,
    io::{self, Read},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::{get_int, print_line};

/// Options that are set at hooks of all kinds.
const OPTIONS_READ: [(i32, i32); 6] = [
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_TCP, libc::TCP_KEEPIDLE),
    (libc::SOL_TCP, libc::TCP_KEEPCNT),
    (libc::SOL_TCP, libc::TCP_SYNCNT),
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
];

/// The number of connections to one listener.
const PER_LISTENER: usize = 20;

pub(crate) fn connections() -> io::Result<()> {
    let is_over = Arc::new(AtomicBool::new(false));
    let is_over_in_reader = Arc::clone(&is_over);
    thread::spawn(move || {
        let _ = io::stdin().read(&mut [0]);
        is_over_in_reader.store(true, Ordering::Relaxed);
    });
    let mut seen = BTreeMap::new();
    // The first listener is older than every policy change; the others are new.
    let first = TcpListener::bind("127.0.0.1:0")?;
    print_line("ready")?;
    while !is_over.load(Ordering::Relaxed) {
        let fresh = TcpListener::bind("127.0.0.1:0")?;
        for listener in [&first, &fresh] {
            for _ in 0..PER_LISTENER {
                let outbound = TcpStream::connect(listener.local_addr()?)?;
                let (accepted, _) = listener.accept()?;
                *seen.entry(("outbound", values(&outbound)?)).or_insert(0) += 1;
                *seen.entry(("accepted", values(&accepted)?)).or_insert(0) += 1;
            }
        }
    }
    for ((which, values), count) in seen {
        let values: Vec<_> = values.iter().map(ToString::to_string).collect();
        print_line(&format!("{which} {} {count}", values.join(" ")))?;
    }
    Ok(())
}

fn values(socket: &TcpStream) -> io::Result<Vec<i32>> {
    let value = |(level, name): &(i32, i32)| {
        let mut value = 0;
        get_int(socket.as_raw_fd(), *level, *name, &mut value).map(|()| value)
    };
    OPTIONS_READ.iter().map(value).collect()
}
