//! The policies of the soak test, and the values that sockets must have under them.

/// The rules of each policy except the changing one. [`crate::checks`] compares sockets with them.
pub(crate) const RULES: &str = "[[rule]]\n\
     set = { TCP_NODELAY = true, SO_KEEPALIVE = true, TCP_KEEPIDLE = \"60s\", TCP_KEEPCNT = 4, SO_MARK = 0x20 }\n\
     limit = { SO_SNDBUF = { max = \"32KiB\" }, IP_TTL = { max = 9 } }\n\
     deny = [\"TCP_QUICKACK\"]\n";

/// A rule that depends on the peer of a socket, and a rule for an option that another option also changes.
pub(crate) const PEERS: &str = "[[rule]]\nmatch = { remote = \"127.1.0.0/16\" }\nset = { SO_MARK = 5 }\n\
     [[rule]]\nset = { SO_PRIORITY = 3 }\n";

/// `SO_MARK`, `TCP_KEEPCNT` and `TCP_KEEPIDLE` under the two alternating policies.
pub(crate) const VERSIONS: [[i32; 3]; 2] = [[1, 11, 101], [2, 12, 102]];

/// An invalid policy.
pub(crate) const INVALID: &str = "[[rule]]\nset = { SO_MRAK = 1 }\n";

/// Returns a policy of this name for cgroups that match a glob.
pub(crate) fn policy(name: &str, glob: &str, rules: &str) -> String {
    format!("name = {name:?}\n[target]\ncgroup = {glob:?}\n{rules}")
}

/// Returns the rule of one of the two alternating policies.
pub(crate) fn version(number: usize) -> String {
    let [mark, count, idle] = VERSIONS[number % 2];
    format!("[[rule]]\nset = {{ SO_MARK = {mark}, TCP_KEEPCNT = {count}, TCP_KEEPIDLE = \"{idle}s\" }}\n")
}
