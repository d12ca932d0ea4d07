//! Arguments of unusual length, and unmapped addresses. A policy changes only calls that it covers; all other calls
//! keep their errno.

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    options::{IP_TOS, SO_KEEPALIVE, SO_MARK, SO_RCVBUF, SocketOption, TCP_CONGESTION, TCP_KEEPCNT, TCP_NODELAY},
    policy::PolicyFile,
    require,
    script::{Argument, Family, Kind, Step},
};

/// More than the kernel passes to programs.
const LONG: usize = 8192;

const POLICY: &str = "[[rule]]\n\
    set = { TCP_NODELAY = true, SO_MARK = { value = 32, on_conflict = \"allow\" }, IP_TOS = \"AF21\", \
            TCP_CONGESTION = \"reno\" }\n\
    limit = { TCP_KEEPCNT = { max = 10 }, SO_RCVBUF = { max = \"64KiB\", on_conflict = \"ignore\" } }\n\
    deny = [\"SO_KEEPALIVE\"]\n";

#[test]
fn long_arguments_are_judged_by_their_first_bytes() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(POLICY);
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let fd = pair.client;
    let buffer = probe.int(fd, SO_RCVBUF);
    for len in [4096, 4097, LONG] {
        assert_eq!(probe.set(fd, TCP_NODELAY, Argument::padded(0, len)), Ok(()), "{len}");
        assert_eq!(probe.int(fd, TCP_NODELAY), 1, "{len}: rewritten");
        assert_eq!(probe.set(fd, TCP_NODELAY, Argument::padded(1, len)), Ok(()), "{len}: agrees");
        assert_eq!(probe.int(fd, TCP_NODELAY), 1, "{len}: agrees");
        assert_eq!(probe.set(fd, TCP_KEEPCNT, Argument::padded(99, len)), Ok(()), "{len}");
        assert_eq!(probe.int(fd, TCP_KEEPCNT), 10, "{len}: clamped");
        assert_eq!(probe.set(fd, TCP_KEEPCNT, Argument::padded(8, len)), Ok(()), "{len}: within the limit");
        assert_eq!(probe.int(fd, TCP_KEEPCNT), 8, "{len}: within the limit");
        assert_eq!(probe.set(fd, SO_RCVBUF, Argument::padded(1 << 20, len)), Ok(()), "{len}");
        assert_eq!(probe.int(fd, SO_RCVBUF), buffer, "{len}: ignored");
        assert_eq!(probe.set(fd, SO_KEEPALIVE, Argument::padded(1, len)), Err(Errno::EPERM), "{len}: denied");
        let mark = 1000 + i32::try_from(len).unwrap();
        assert_eq!(probe.set(fd, SO_MARK, Argument::padded(mark, len)), Ok(()), "{len}: allowed");
        assert_eq!(probe.int(fd, SO_MARK), mark, "{len}: allowed");
        let mut name = b"cubic".to_vec();
        name.resize(len, 0);
        assert_eq!(probe.set(fd, TCP_CONGESTION, name), Ok(()), "{len}");
        assert_eq!(probe.text(fd, TCP_CONGESTION), "reno", "{len}: rewritten");
    }
    let report = exec.finish();
    for (option, verdict) in [
        ("TCP_NODELAY", "rewritten"),
        ("TCP_KEEPCNT", "clamped"),
        ("SO_RCVBUF", "ignored"),
        ("SO_KEEPALIVE", "denied"),
        ("SO_MARK", "allowed"),
        ("TCP_CONGESTION", "rewritten"),
    ] {
        assert_eq!(report.setting(option).calls.verdicts().get(verdict), Some(&3), "{option}");
    }
    report.assert_nothing_lost();
}

#[test]
fn long_arguments_of_other_options_are_unchanged() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n");
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(pair.client, TCP_KEEPCNT, Argument::padded(7, LONG)), Ok(()));
    assert_eq!(exec.probe.int(pair.client, TCP_KEEPCNT), 7);
    let value = exec.probe.get(pair.client, TCP_KEEPCNT, LONG as u32);
    assert_eq!(value, Ok(7i32.to_ne_bytes().to_vec()), "a read with a long buffer is not affected");
    let value = exec.probe.get(pair.client, TCP_NODELAY, LONG as u32);
    assert_eq!(value, Ok(1i32.to_ne_bytes().to_vec()), "nor is a read of a covered option");
    drop(exec.finish());
}

#[test]
fn type_of_service_of_one_byte_is_judged_and_rewritten() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(POLICY);
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Udp);
    assert_eq!(exec.probe.set(fd, IP_TOS, 0xb8u8), Ok(()));
    assert_eq!(exec.probe.int(fd, IP_TOS), 0x48);
    assert_eq!(exec.probe.set(fd, IP_TOS, 0x48u8), Ok(()));
    assert_eq!(exec.probe.get(fd, IP_TOS, 1), Ok(vec![0x48]), "a read of one byte agrees");
    let report = exec.finish();
    let calls = &report.setting("IP_TOS").calls;
    assert_eq!((calls.verdicts()["rewritten"], calls.agreed, calls.reads), (1, 1, 0));
    assert_eq!(report.conflict("IP_TOS").requested, 0xb8);
}

/// Applications read names into buffers of any size.
#[test]
fn name_read_into_a_short_buffer_is_no_conflict() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_CONGESTION = \"cubic\" }\n");
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.pair(Family::Inet, Kind::Tcp).client;
    for len in [4, 5, 6, 8, 15, 16, 64] {
        let mut name = b"cubic".to_vec();
        name.resize(16, 0);
        name.truncate(len as usize);
        assert_eq!(exec.probe.get(fd, TCP_CONGESTION, len), Ok(name), "{len}");
    }
    let report = exec.finish();
    assert_eq!(report.summary.conflicts, 0, "{:?}", report.events);
}

/// Invalid calls fail in the same way with and without a policy.
#[test]
fn invalid_calls_fail_with_the_kernels_errno() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(POLICY);
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.pair(Family::Inet, Kind::Tcp).client;
    for option in [TCP_NODELAY, SO_MARK, TCP_KEEPCNT, TCP_CONGESTION] {
        assert_eq!(probe.set(fd, option, Argument::bad_pointer(4)), Err(Errno::EFAULT), "{}", option.name);
        let nowhere = Step::Get { fd, level: option.level, name: option.number, len: 4, bad_pointer: true };
        assert_eq!(probe.perform(&nowhere).errno, Errno::EFAULT as i32, "{}", option.name);
    }
    for option in [TCP_NODELAY, SO_MARK, TCP_KEEPCNT] {
        for len in 0..4 {
            let short = Argument::from(vec![9; len]);
            assert_eq!(probe.set(fd, option, short), Err(Errno::EINVAL), "{} of {len} bytes", option.name);
        }
        assert_eq!(probe.set(fd, option, Argument { len: -1, ..Argument::from(0) }), Err(Errno::EINVAL));
    }
    assert_eq!(probe.set(99, TCP_NODELAY, 0), Err(Errno::EBADF));
    let unknown = SocketOption { name: "an unknown option", level: libc::SOL_TCP, number: 999 };
    assert_eq!(probe.set(fd, unknown, 0), Err(Errno::ENOPROTOOPT));
    assert_eq!(probe.int(fd, TCP_NODELAY), 1, "these calls did not change the socket");
    assert_eq!(probe.int(fd, SO_MARK), 32);
    let report = exec.finish();
    for option in ["TCP_NODELAY", "TCP_KEEPCNT", "SO_MARK"] {
        assert_eq!(report.setting(option).calls.verdicts().len(), 0, "{option}: calls without effect are no conflicts");
    }
}

/// A value that the kernel would reject is rewritten too.
#[test]
fn value_out_of_the_kernels_range_is_rewritten() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_KEEPCNT = 5 }\n");
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(exec.probe.set(fd, TCP_KEEPCNT, 4000), Ok(()));
    assert_eq!(exec.probe.int(fd, TCP_KEEPCNT), 5);
    let report = exec.finish();
    assert_eq!(report.verdicts("TCP_KEEPCNT"), ["rewritten"]);
}
