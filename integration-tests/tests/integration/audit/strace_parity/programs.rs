//! Real programs: a server, a client, a little work. Their calls differ from run to run, but strace and the agent see
//! the same run.

use std::{collections::BTreeMap, process::Command};

use sockpolicy_integration_tests::policy::PolicyFile;

use super::{By, compare, lost, succeed};
use crate::audit::backends;

/// The start of each script. It runs in new network and mount namespaces, so every port is free.
///
/// The script ends its server on every exit, since strace waits for the last process.
const START: &str = r#"
set -e
cd "$0"
ip link set lo up
trap 'kill "$server" 2>/dev/null || :' EXIT
# Starts a server, and waits until it listens on port 7000.
serve() {
  "$@" &
  server=$!
  until grep -qs ':1B58 [0-9A-F]*:0000 0A' /proc/net/tcp /proc/net/tcp6; do
    kill -0 "$server"
    sleep 0.02
  done
}
"#;

/// Runs a script under every backend, in a directory that `prepare` sets up, and compares. Each of the named tasks
/// must have made at least the given number of calls.
#[track_caller]
fn compare_script(prepare: &str, script: &str, expected: &[(&str, usize)]) {
    let place = PolicyFile::named("nothing", "");
    let dir = place.dir().display().to_string();
    let mut preparation = Command::new("sh");
    preparation.args(["-ec", prepare]).current_dir(&dir);
    succeed(preparation, "preparation");
    let script = format!("{START}{script}");
    for backend in backends() {
        let report = compare(By::Audit, backend, &["unshare", "--net", "--mount", "sh", "-c", &script, &dir]);
        assert_eq!(lost(&report), []);
        let mut calls = BTreeMap::<&str, usize>::new();
        for event in &report.events {
            *calls.entry(event.comm.as_deref().unwrap()).or_default() += 1;
        }
        for (comm, least) in expected {
            assert!(calls.get(comm) >= Some(least), "fewer than {least} calls by {comm} on {backend}: {calls:?}");
        }
    }
}

#[test]
fn every_call_of_redis_is_reported_as_by_strace() {
    let script = "
serve redis-server --port 7000 --bind 127.0.0.1 --save '' --appendonly no
redis-benchmark -q -p 7000 -c 5 -n 100 -t set,get
redis-cli -p 7000 ping
";
    compare_script("", script, &[("redis-server", 20), ("redis-benchmark", 1), ("redis-cli", 3)]);
}

#[test]
fn every_call_of_nginx_and_curl_is_reported_as_by_strace() {
    // Without these paths, nginx would use the directories of its package.
    let prepare = "
cat >nginx.conf <<END
daemon off;
user root;
pid nginx.pid;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path temporary;
  proxy_temp_path temporary;
  fastcgi_temp_path temporary;
  uwsgi_temp_path temporary;
  scgi_temp_path temporary;
  server {
    listen 127.0.0.1:7000 so_keepalive=30s:10s:3 sndbuf=64k deferred;
    return 200 hello;
  }
}
END
";
    let script = r#"
serve nginx -e stderr -p "$PWD" -c nginx.conf
curl -sS http://127.0.0.1:7000/ http://127.0.0.1:7000/
curl -sS --no-keepalive http://127.0.0.1:7000/
"#;
    compare_script(prepare, script, &[("nginx", 5), ("curl", 5)]);
}

#[test]
fn every_call_of_python_is_reported_as_by_strace() {
    let script = r#"
serve /usr/bin/python3 -m http.server 7000 --bind 127.0.0.1
/usr/bin/python3 -c 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:7000/nothing").read()'
"#;
    compare_script("", script, &[("python3", 3)]);
}

#[test]
fn every_call_of_postgres_and_psql_is_reported_as_by_strace() {
    // The server refuses to run as root. The last of several installed versions is used.
    let start = "
for bin in /usr/lib/postgresql/*/bin; do :; done
as_nobody='setpriv --reuid nobody --regid nogroup --clear-groups'
";
    let prepare = r#"
mkdir data
chown nobody data
$as_nobody "$bin/initdb" -D data -U postgres -A trust --no-sync --no-locale -E UTF8
"#;
    let script = r#"
serve $as_nobody "$bin/postgres" -D data -F -h 127.0.0.1 -p 7000 -k "$PWD/data"
until "$bin/pg_isready" -q -h 127.0.0.1 -p 7000; do
  kill -0 "$server"
  sleep 0.02
done
for host in 127.0.0.1 "$PWD/data"; do
  "$bin/psql" -h "$host" -p 7000 -U postgres -c 'select 1' postgres
done
"#;
    let (prepare, script) = (format!("{start}{prepare}"), format!("{start}{script}"));
    compare_script(&prepare, &script, &[("postgres", 5), ("psql", 4)]);
}

#[test]
fn every_call_of_node_is_reported_as_by_strace() {
    let script = r#"
node -e '
const http = require("http");
const server = http.createServer((request, response) => response.end("hello"));
server.listen(7000, "127.0.0.1", () => {
  const agent = new http.Agent({ keepAlive: true });
  const request = http.get({ host: "127.0.0.1", port: 7000, agent }, (response) => {
    response.resume();
    response.on("end", () => { agent.destroy(); server.close(); });
  });
  request.setNoDelay(true);
  request.setSocketKeepAlive(true, 30000);
});
'
"#;
    compare_script("", script, &[("node", 8)]);
}

#[test]
fn every_call_of_java_is_reported_as_by_strace() {
    let source = PolicyFile::named("Sockets.java", include_str!("Sockets.java"));
    let prepare = format!("javac -d . {}", source.path().display());
    // Java starts slowest, especially on an emulated processor.
    let script = "java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp . Sockets";
    compare_script(&prepare, script, &[("java", 20)]);
}

#[test]
fn every_call_of_iperf3_is_reported_as_by_strace() {
    let script = "
serve iperf3 -s -1 -B 127.0.0.1 -p 7000
iperf3 -c 127.0.0.1 -p 7000 -n 100K -N -w 64K -C reno -M 1000
";
    compare_script("", script, &[("iperf3", 20)]);
}

#[test]
fn every_call_of_ssh_is_reported_as_by_strace() {
    let prepare = "
ssh-keygen -q -t ed25519 -N '' -f host
ssh-keygen -q -t ed25519 -N '' -f user
sed 's/^root:[^:]*/root:*/' /etc/shadow >shadow
";
    // Without PAM, sshd rejects users with a locked password. Its unprivileged part needs /run/sshd.
    let script = r#"
mount --bind shadow /etc/shadow
mount -t tmpfs run /run
mkdir /run/sshd
serve /usr/sbin/sshd -D -e -f /dev/null -h "$PWD/host" -p 7000 -o ListenAddress=127.0.0.1 -o PidFile=none \
  -o StrictModes=no -o AuthorizedKeysFile="$PWD/user.pub"
ssh -F none -i user -p 7000 -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
  root@127.0.0.1 true
"#;
    compare_script(prepare, script, &[("sshd", 5), ("ssh", 5)]);
}
