//! The progress bar of long operations, and their interruption.

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_MARK,
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process,
    script::{Family, Fd, Kind},
    terminal::Terminal,
    wait,
};

use crate::{stderr, stdout};

/// The number of sockets from which a progress bar is shown.
const MANY: usize = 500;

fn many(probe: &mut Probe) -> Vec<Fd> {
    (0..MANY).map(|_| probe.open(Family::Inet, Kind::Udp)).collect()
}

fn marks(probe: &mut Probe, sockets: &[Fd]) -> Vec<i32> {
    sockets.iter().map(|socket| probe.int(*socket, SO_MARK)).collect()
}

/// Returns the final contents of a screen, without erased text.
fn left(screen: &str) -> Vec<&str> {
    const ERASE_LINE: &str = "\u{1b}[2K";
    screen.lines().map(|line| line.rsplit(ERASE_LINE).next().unwrap_or_default().trim_end_matches('\r')).collect()
}

/// Returns whether a text contains the progress bar.
fn has_bar(text: &str) -> bool {
    text.lines().any(|line| line.contains(&format!(" of {MANY} sockets")) && line.contains('['))
}

#[test]
fn progress_bar_is_shown_only_on_a_terminal_and_only_during_the_work() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 7));
    let path = policy.path().to_str().unwrap();
    let mut probe = Probe::start(&target);
    let mut sockets = many(&mut probe);
    let last_one = sockets.pop().unwrap();
    probe.close(last_one);
    let mut few = Terminal::start(agent::command(&["verify", path]));
    few.wait();
    few.wait_for("checked 499 sockets");
    assert!(!few.screen().contains(" of 499 sockets"), "{}", few.screen());
    sockets.push(probe.open(Family::Inet, Kind::Udp));
    for command in [&["verify", path][..], &["ls", path], &["apply", "--instance", &instance.name, path]] {
        assert_eq!(stderr(&agent::output(command)), "", "{command:?}");
        if command[0] == "apply" {
            instance.run("apply", &["--restore"]);
        }
        let mut terminal = Terminal::start(agent::command(command));
        terminal.wait();
        let last = match command[0] {
            "ls" => format!("fd {}", sockets[MANY - 1]),
            "verify" => format!("checked {MANY} sockets"),
            _ => "changed ".to_owned(),
        };
        terminal.wait_for(&last);
        let screen = terminal.screen();
        assert!(has_bar(&screen), "{screen}");
        let left = left(&screen);
        assert!(left.len() > MANY && !left.iter().any(|line| has_bar(line)), "{command:?}: {left:#?}");
    }
    assert_eq!(marks(&mut probe, &sockets), [7; MANY]);
}

#[test]
fn interrupted_apply_leaves_each_socket_unchanged_or_set_and_can_be_undone() {
    const DONE: u32 = 300;
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 7));
    let mut probe = Probe::start(&target);
    let sockets = many(&mut probe);
    probe.set(sockets[0], SO_MARK, 3).unwrap();
    let mut apply = agent::command(&["apply", "--instance", &instance.name]);
    apply.arg(policy.path());
    process::stop_at(&mut apply, "socket-taken", DONE);
    let mut terminal = Terminal::start(apply);
    process::wait_for_stop(terminal.pid(), "socket-taken");
    // Ctrl-C, which the agent receives when it resumes.
    terminal.press(b"\x03");
    let is_sent = || process::has_pending(terminal.pid(), Signal::SIGINT);
    assert!(wait::until(wait::TIMEOUT, is_sent), "the terminal sends no SIGINT");
    terminal.signal(Signal::SIGCONT);
    let status = terminal.wait();
    let help = "run the command again, or restore the old values:";
    terminal.wait_for(help);
    let left = left(&terminal.screen()).join("\n");
    assert!(left.contains("changed 300 options on 300 of 300 sockets\n"), "{left}");
    assert!(left.contains("\nerror: stopped by a signal: some sockets are not changed\n"), "{left}");
    assert_eq!((status.code(), has_bar(&left)), (Some(2), false), "{left}");
    // In the order of descriptors.
    let (done, others) = sockets.split_at(DONE as usize);
    assert_eq!(marks(&mut probe, done), [7; DONE as usize]);
    assert_eq!(marks(&mut probe, others), [0; MANY - DONE as usize]);
    let output = instance.run("apply", &["--restore"]);
    assert!(stdout(&output).contains("restored: 300 options; changed by others since: 0; refused: 0\n"), "{output:?}");
    let before: Vec<i32> = (0..MANY).map(|number| if number == 0 { 3 } else { 0 }).collect();
    assert_eq!(marks(&mut probe, &sockets), before);
}
