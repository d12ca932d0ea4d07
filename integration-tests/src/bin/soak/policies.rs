//! The policies that are in force during the soak test, and the values that sockets must have under them.

/// What each policy says, except the one that changes. [`crate::checks`] compares sockets with it.
pub(crate) const RULES: &str = "[[rule]]\n\
     set = { TCP_NODELAY = true, SO_KEEPALIVE = true, TCP_KEEPIDLE = \"60s\", TCP_KEEPCNT = 4, SO_MARK = 0x20 }\n\
     limit = { SO_SNDBUF = { max = \"32KiB\" }, IP_TTL = { max = 9 } }\n\
     deny = [\"TCP_QUICKACK\"]\n";

/// A rule about the peer of a socket, and one about an option that another option changes too.
pub(crate) const PEERS: &str = "[[rule]]\nmatch = { remote = \"127.1.0.0/16\" }\nset = { SO_MARK = 5 }\n\
     [[rule]]\nset = { SO_PRIORITY = 3 }\n";

/// `SO_MARK`, `TCP_KEEPCNT` and `TCP_KEEPIDLE` under the two policies that replace each other.
pub(crate) const VERSIONS: [[i32; 3]; 2] = [[1, 11, 101], [2, 12, 102]];

/// A text that is no policy.
pub(crate) const INVALID: &str = "[[rule]]\nset = { SO_MRAK = 1 }\n";

/// A policy of this name for cgroups that match a glob.
pub(crate) fn policy(name: &str, glob: &str, rules: &str) -> String {
    format!("name = {name:?}\n[target]\ncgroup = {glob:?}\n{rules}")
}

/// The rule of one of the two policies that replace each other.
pub(crate) fn version(number: usize) -> String {
    let [mark, count, idle] = VERSIONS[number % 2];
    format!("[[rule]]\nset = {{ SO_MARK = {mark}, TCP_KEEPCNT = {count}, TCP_KEEPIDLE = \"{idle}s\" }}\n")
}
