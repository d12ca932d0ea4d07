//! A device that the policy sets, and that the kernel or the application removes from the socket.

use std::{net::SocketAddr, process::Command};

use sockpolicy_integration_tests::{
    agent::Exec,
    options::SO_BINDTODEVICE,
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

/// Creates two devices with link-local addresses in the probe's network namespace. Returns the index and the address
/// of the second one.
fn make_devices(pid: u32) -> (u32, String) {
    let inside = |arguments: &[&str]| {
        let output = Command::new("nsenter").args(["-t", &pid.to_string(), "-n"]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for (name, address) in [("blue", "fe80::b1/64"), ("red", "fe80::ed/64")] {
        inside(&["ip", "link", "add", name, "type", "veth", "peer", "name", &format!("{name}-peer")]);
        inside(&["ip", "link", "set", name, "addrgenmode", "none"]);
        inside(&["ip", "link", "set", name, "up"]);
        inside(&["ip", "link", "set", &format!("{name}-peer"), "up"]);
        inside(&["ip", "addr", "add", address, "dev", name, "nodad"]);
    }
    let index = inside(&["cat", "/proc/net/if_inet6"]);
    let line = index.lines().find(|line| line.ends_with(" red")).unwrap_or_else(|| panic!("no address: {index}"));
    let number = line.split_whitespace().nth(1).unwrap();
    (u32::from_str_radix(number, 16).unwrap(), "fe80::ed".to_owned())
}

fn at(address: &str, port: u16, device: u32) -> SocketAddr {
    std::net::SocketAddrV6::new(address.parse().unwrap(), port, 0, device).into()
}

#[test]
fn device_of_a_link_local_address_does_not_count_as_set_by_the_policy() {
    require!("cgroup/bind4");
    for nobody in [false, true] {
        let policy = PolicyFile::new("[[rule]]\nset = { SO_BINDTODEVICE = \"blue\" }\n");
        let mut exec = Exec::start(&policy);
        let (red, address) = make_devices(exec.probe.pid);
        let probe = &mut exec.probe;
        if nobody {
            probe.drop_privileges();
        }
        let listener = probe.open(Family::Inet6, Kind::Tcp);
        probe.bind(listener, at(&address, 0, red));
        probe.listen(listener);
        let sender = probe.open(Family::Inet6, Kind::Udp);
        probe.bind(sender, at(&address, 0, red));
        probe.connect(sender, at("fe80::1", 9, 0));
        let devices = [listener, sender].map(|fd| probe.text(fd, SO_BINDTODEVICE));
        let report = exec.finish();
        let counted = &report.setting("SO_BINDTODEVICE").sockets;
        // Changing the device of a bound socket needs CAP_NET_RAW, and programs act with the rights of the caller.
        if nobody {
            assert_eq!(devices, ["red", "red"]);
            assert_eq!((counted.set, counted.failed), (0, 2));
        } else {
            assert_eq!(devices[0], "blue");
        }
    }
}

/// connect(2) with AF_UNSPEC removes the device from a datagram socket, whatever the caller's rights.
#[test]
fn device_removed_by_disconnect_is_set_again() {
    require!("cgroup/sendmsg4");
    for option in ["SO_BINDTODEVICE = \"lo\"", "SO_BINDTOIFINDEX = 1"] {
        let policy = PolicyFile::new(format!("[[rule]]\nset = {{ {option} }}\n"));
        let mut exec = Exec::start(&policy);
        let probe = &mut exec.probe;
        probe.drop_privileges();
        for (family, to) in [(Family::Inet, "127.0.0.1:9"), (Family::Inet6, "[::1]:9")] {
            let to: SocketAddr = to.parse().unwrap();
            let fd = probe.open(family, Kind::Udp);
            probe.connect(fd, to);
            for again in ["connect", "send", "bind"] {
                assert_eq!(probe.text(fd, SO_BINDTODEVICE), "lo", "{family:?} {option}");
                probe.disconnect(fd);
                assert_eq!(probe.text(fd, SO_BINDTODEVICE), "", "the kernel removed the device");
                match again {
                    "connect" => probe.connect(fd, to),
                    "send" => probe.send(fd, Some(to)),
                    _ => drop(probe.bind(fd, family.loopback())),
                }
                assert_eq!(probe.text(fd, SO_BINDTODEVICE), "lo", "{family:?} {option} after {again}");
            }
        }
        let report = exec.finish();
        let name = option.split(' ').next().unwrap();
        assert_eq!((report.setting(name).sockets.set, report.setting(name).sockets.failed), (2, 0), "{option}");
    }
}
