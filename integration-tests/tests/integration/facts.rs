//! Facts about a socket: when they become known, and what happens when they change.

mod any_address;
mod before_known;
mod devices;
mod no_memory;
mod peers;
mod self_connect;
mod unsupported;
