//! Targets that are containers: real containers, each in its own network namespace.

use std::net::SocketAddr;

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    container::{BareRuntime, Container, Docker, Podman, runtime},
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT, TCP_SYNCNT, TCP_USER_TIMEOUT},
    policy::PolicyFile,
    script::{Family, Kind},
    wait,
};

use crate::{stderr, stdout};

/// The address of the server.
const SERVER: ([u8; 4], u16) = ([192, 0, 2, 1], 8080);

/// Returns the cgroups to which `plan` would attach programs for this target.
pub(crate) fn planned(target: &str) -> Vec<String> {
    let policy = PolicyFile::new(format!("[target]\n{target}\n[[rule]]\nset = {{ SO_MARK = 1 }}\n"));
    let output = agent::output(&["plan", "--output", "json", policy.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let steps = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
    let attached = steps.iter().filter(|step| step["step"] == "attach");
    let mut cgroups: Vec<_> = attached.map(|step| step["cgroup"].as_str().unwrap().to_owned()).collect();
    cgroups.sort();
    cgroups.dedup();
    cgroups
}

fn sorted<const N: usize>(containers: [&Container; N]) -> Vec<String> {
    let mut cgroups: Vec<_> = containers.iter().map(|container| container.cgroup.clone()).collect();
    cgroups.sort();
    cgroups
}

#[test]
fn server_and_client_have_the_policies_of_their_containers() {
    let podman = Podman::new();
    let (mut server, mut client) = (podman.run("web-1", Podman::IMAGE), podman.run("client", Podman::IMAGE));
    server.connect(&client);
    let web = PolicyFile::named(
        "web.toml",
        format!(
            "[target]\ncontainer = {{ name = \"{}\" }}\n\
             [[rule]]\nset = {{ SO_MARK = 32, TCP_KEEPCNT = 5 }}\nlimit = {{ TCP_USER_TIMEOUT = {{ max = \"30s\" }} }}\n",
            podman.name("web-*")
        ),
    );
    let of_client = format!(
        "[target]\ncontainer = {{ name = \"{}\", runtime = \"podman\" }}\n\
         [[rule]]\nset = {{ SO_MARK = 64, TCP_SYNCNT = 3 }}\ndeny = [\"SO_PRIORITY\"]\n",
        podman.name("client")
    );
    let of_client = web.add("client.toml", of_client);
    let run = Run::start_with(&web, &[of_client.to_str().unwrap()]);

    let listener = server.probe.open(Family::Inet, Kind::Tcp);
    server.probe.bind(listener, SERVER.into());
    server.probe.listen(listener);
    let outbound = client.probe.open(Family::Inet, Kind::Tcp);
    client.probe.connect(outbound, SERVER.into());
    let inbound = server.probe.accept(listener);
    for socket in [listener, inbound] {
        assert_eq!((server.probe.int(socket, SO_MARK), server.probe.int(socket, TCP_KEEPCNT)), (32, 5));
    }
    assert_eq!((client.probe.int(outbound, SO_MARK), client.probe.int(outbound, TCP_SYNCNT)), (64, 3));
    assert_ne!(client.probe.int(outbound, TCP_KEEPCNT), 5);

    server.probe.set(inbound, TCP_KEEPCNT, 9).unwrap();
    server.probe.set(inbound, TCP_USER_TIMEOUT, 60_000).unwrap();
    assert_eq!((server.probe.int(inbound, TCP_KEEPCNT), server.probe.int(inbound, TCP_USER_TIMEOUT)), (5, 30_000));
    client.probe.set(outbound, SO_PRIORITY, 1).unwrap_err();
    let report = run.finish();

    for (option, verdict, container) in [
        ("TCP_KEEPCNT", "rewritten", &server),
        ("TCP_USER_TIMEOUT", "clamped", &server),
        ("SO_PRIORITY", "denied", &client),
    ] {
        let event = report.conflict(option);
        assert_eq!(event.verdict.as_deref(), Some(verdict));
        assert_eq!(event.container, Some(container.named()));
        assert_eq!(event.cgroup.as_ref(), Some(&container.cgroup));
        assert_eq!((event.pid, event.exe.as_deref()), (Some(container.pid), Some("/bin/sockprobe")));
    }
    let socket = report.conflict("TCP_KEEPCNT").socket.clone().unwrap();
    assert_eq!(socket.local, Some(SocketAddr::from(SERVER).to_string()));
    assert!(socket.remote.unwrap().starts_with("192.0.2.2:"));
    let mut targets = report.summary.targets.clone();
    targets.sort();
    assert_eq!(targets, sorted([&server, &client]));
    report.assert_nothing_lost();

    // `explain` shows what was enforced.
    let explain = |container: &Container| {
        let [web, of_client] = [web.path(), &of_client].map(|path| path.to_str().unwrap());
        stdout(&agent::output(&["explain", web, of_client, "--cgroup", &container.cgroup]))
    };
    assert!(
        explain(&server).contains("TCP_KEEPCNT") && !explain(&server).contains("TCP_SYNCNT"),
        "{}",
        explain(&server)
    );
    assert!(
        explain(&client).contains("TCP_SYNCNT") && !explain(&client).contains("TCP_KEEPCNT"),
        "{}",
        explain(&client)
    );

    // The audit of the server shows none of the client's calls.
    let calls = web
        .add("calls.toml", format!("audit.calls = \"all\"\ntarget.container = {{ id = \"{}\" }}\n", &server.id[..12]));
    let audit = Run::audit(&[calls]);
    server.probe.set(inbound, TCP_SYNCNT, 4).unwrap();
    client.probe.set(outbound, TCP_SYNCNT, 4).unwrap();
    let seen = audit.finish().events;
    let seen: Vec<_> = seen.iter().map(|event| (event.option.as_str(), event.container.clone().unwrap())).collect();
    assert_eq!(seen, [("TCP_SYNCNT", server.named())]);
}

#[test]
fn containers_are_selected_by_name_image_id_and_runtime() {
    let podman = Podman::new();
    let other = "quay.io/sockpolicy/probe:2";
    podman.tag(Podman::IMAGE, other);
    let (one, two) = (podman.run("one", Podman::IMAGE), podman.run("two", other));
    let name = podman.name("*");
    assert_eq!(planned(&format!("container = {{ name = \"{name}\" }}")), sorted([&one, &two]));
    let by_image = |image: &str| format!("container = {{ name = \"{name}\", image = \"{image}\" }}");
    assert_eq!(planned(&by_image("quay.io/*:2")), sorted([&two]));
    assert_eq!(planned(&by_image(Podman::IMAGE)), sorted([&one]));
    assert_eq!(planned(&format!("container = {{ id = \"{}\" }}", &two.id[..12])), sorted([&two]));
    let alternatives = format!("container = [{{ id = \"{}\" }}, {{ name = \"{}\" }}]", one.id, two.name);
    assert_eq!(planned(&alternatives), sorted([&one, &two]));

    podman.rename(&one, "three");
    assert_eq!(planned(&format!("container = {{ name = \"{}\" }}", podman.name("three"))), sorted([&one]));

    // A cgroup next to a selector that matches no container.
    let home = podman.home().name();
    let target = format!("cgroup = \"{home}\"\ncontainer = {{ name = \"{}\" }}", one.name);
    assert_eq!(planned(&target), [home]);
    let policy = PolicyFile::new(format!(
        "target.container = {{ name = \"{}\", runtime = \"docker\" }}\n[[rule]]\nset = {{ SO_MARK = 1 }}\n",
        two.name
    ));
    let output = agent::output(&["plan", policy.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    let printed = stderr(&output);
    let wanted = format!("container = {{ name = \"{}\", runtime = \"docker\" }}", two.name);
    let warning = format!("warning: `run` would wait for a target: no cgroup and no container matches {wanted}\n");
    assert!(printed.starts_with(&warning), "{printed}");
    assert!(printed.contains(&format!("podman:{} ({other}) in {}", two.name, two.cgroup)), "{printed}");
}

/// Makes a conflicting call in a container under a policy, and checks the report.
fn assert_held(target: &str, container: &mut Container) {
    let policy = PolicyFile::new(format!("[target]\n{target}\n[[rule]]\nset = {{ TCP_KEEPCNT = 5 }}\n"));
    let run = Run::start_with(&policy, &[]);
    let socket = container.probe.open(Family::Inet, Kind::Tcp);
    container.probe.set(socket, TCP_KEEPCNT, 9).unwrap();
    assert_eq!(container.probe.int(socket, TCP_KEEPCNT), 5);
    let report = run.finish();
    let event = report.conflict("TCP_KEEPCNT");
    assert_eq!((&event.container, event.pid), (&Some(container.named()), Some(container.pid)));
    assert_eq!(report.summary.targets, [container.cgroup.as_str()]);
}

#[test]
fn containers_of_docker_and_containerd_are_found() {
    let docker = Docker::new();
    let mut of_docker = docker.run("web");
    let name = docker.name("*");
    let image = "docker.io/library/sockpolicy-probe:*";
    assert_held(&format!("container = {{ name = \"{name}\", image = \"{image}\" }}"), &mut of_docker);
    let mut of_containerd = docker.run_by_containerd("other");
    assert_held(&format!("container = {{ name = \"{name}\", runtime = \"containerd\" }}"), &mut of_containerd);
    assert_eq!(planned(&format!("container = {{ name = \"{name}\" }}")), sorted([&of_docker, &of_containerd]));
}

#[test]
fn container_that_starts_later_gets_its_policy() {
    let podman = Podman::new();
    let policy = PolicyFile::new(format!(
        "target.container = {{ name = \"{}\" }}\n[[rule]]\nset = {{ SO_MARK = 32 }}\n",
        podman.name("later")
    ));
    let run = Run::start_with(&policy, &[]);
    let (mut other, mut later) = (podman.run("other", Podman::IMAGE), podman.run("later", Podman::IMAGE));
    assert!(wait::until(wait::TIMEOUT, || later.probe.value_on_new_socket(SO_MARK) == 32));
    assert_eq!(other.probe.value_on_new_socket(SO_MARK), 0);
    assert!(wait::until(wait::TIMEOUT, || run.lines().contains(&later.cgroup)), "{}", run.lines());
    assert!(!run.lines().contains(&other.cgroup), "{}", run.lines());
}

#[test]
fn container_of_an_engine_in_other_mount_and_pid_namespaces_is_found() {
    let podman = Podman::new();
    let mut container = podman.run_in_other_namespaces("web");
    assert_held(
        &format!("container = {{ name = \"{}\", image = \"*/sockpolicy-probe:1\" }}", container.name),
        &mut container,
    );
}

/// Also in a cgroup whose name is not that of the container.
#[test]
fn container_without_a_monitor_is_found_by_its_id() {
    let alone = BareRuntime::new();
    let mut container = alone.run("web");
    let target = format!("container = {{ name = \"{}\", runtime = \"{}\" }}", container.name, runtime());
    assert_held(&target, &mut container);
}
