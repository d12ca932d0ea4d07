//! Real servers under load: Redis and nginx, each in a cgroup with its client.

use super::connections;
use crate::{
    conditions,
    error::Result,
    guard::Workspace,
    row::{Findings, Line, Unit, total},
    scene::{Arm, Comparison, Condition, Placement, Scene, check_installed},
    work::{RateFormat, Work},
};

const PART: &str = "servers";

const REDIS_PORT: u16 = 6390;
const NGINX_PORT: u16 = 8090;

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    for (server, scenes, arms) in [("redis", redis(), REDIS_ARMS), ("nginx", nginx(ground)?, NGINX_ARMS)] {
        let samples = Comparison { rounds: 5, millis: 0, turns: 1, scenes }.run(ground)?;
        let mut lines = Vec::new();
        for (arm, label) in arms {
            for (under, what) in [("policy", "policy of 10 options"), ("audited", "policy of 10 options with audit")] {
                // Requests per second, for which more is better: the ratio is inverted.
                let (without, with) = (format!("none-{server}/{arm}"), format!("{under}-{server}/{arm}"));
                let line = Line::new(
                    format!("requests a second, {label}, {what}"),
                    total(without),
                    "no tool",
                    total(with.clone()),
                );
                lines.push(line.plain(with).unit(Unit::Rate));
            }
        }
        findings.add(PART, &samples, &lines);
    }
    Ok(())
}

const REDIS_ARMS: [(&str, &str); 2] =
    [("kept", "redis-benchmark GET"), ("anew", "redis-benchmark GET, each on a new connection")];
const NGINX_ARMS: [(&str, &str); 2] = [("kept", "wrk on nginx"), ("anew", "wrk on nginx, each on a new connection")];

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn scenes(server: &str, needs: &[&'static str], setup: &Work, arms: &[Arm]) -> Vec<Scene> {
    let scene = |under: &str, condition: Condition| Scene {
        name: format!("{under}-{server}"),
        condition: Condition { needs: needs.to_vec(), ..condition },
        setup: vec![setup.clone()],
        arms: arms.to_vec(),
    };
    vec![
        scene("none", conditions::nothing()),
        scene("policy", conditions::policy(connections::TEN)),
        scene("audited", conditions::audited(connections::TEN)),
    ]
}

fn redis() -> Vec<Scene> {
    let server = format!("redis-server --port {REDIS_PORT} --bind 127.0.0.1 --save  --appendonly no --dir /run/bench");
    // An empty word turns saving off.
    let mut server = words(&server);
    if let Some(place) = server.iter().position(|word| word == "--save") {
        server.insert(place + 1, String::new());
    }
    let client = |name, requests: u32, more: &str| {
        let line = format!("redis-benchmark -p {REDIS_PORT} -t get -c 16 --csv -n {requests} {more}");
        Arm {
            name,
            placement: Placement::Inside,
            work: Work::Load { command: words(&line), format: RateFormat::SecondColumn },
        }
    };
    let arms = [client("kept", 30_000, ""), client("anew", 6_000, "-k 0")];
    let needs = ["redis-server", "redis-benchmark"];
    scenes("redis", &needs, &Work::Serve { command: server, port: REDIS_PORT }, &arms)
}

fn nginx(ground: &Workspace) -> Result<Vec<Scene>> {
    if check_installed(&["nginx", "wrk"]).is_err() {
        // The scenes report the missing program.
        return Ok(scenes("nginx", &["nginx", "wrk"], &Work::Run { command: Vec::new() }, &[]));
    }
    let dir = ground.scratch.display();
    let dirs: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {dir}/nginx-{kind};\n"))
        .concat();
    let configuration = format!(
        "daemon off;\nmaster_process off;\npid {dir}/nginx.pid;\nerror_log stderr crit;\nevents {{}}\n\
         http {{\naccess_log off;\nkeepalive_requests 1000000000;\n{dirs}\
         server {{ listen 127.0.0.1:{NGINX_PORT}; location / {{ return 200 hello; }} }}\n}}\n"
    );
    let configuration = ground.file("nginx.conf", &configuration)?;
    let server = words(&format!("nginx -e stderr -c {}", configuration.display()));
    let client = |name, header: Option<&str>| {
        let mut command = words(&format!("wrk -t 1 -c 16 -d 1 http://127.0.0.1:{NGINX_PORT}/"));
        command.extend(header.into_iter().flat_map(|header| ["-H".to_owned(), header.to_owned()]));
        Arm { name, placement: Placement::Inside, work: Work::Load { command, format: RateFormat::RequestsPerSecond } }
    };
    let arms = [client("kept", None), client("anew", Some("Connection: close"))];
    Ok(scenes("nginx", &["nginx", "wrk"], &Work::Serve { command: server, port: NGINX_PORT }, &arms))
}
