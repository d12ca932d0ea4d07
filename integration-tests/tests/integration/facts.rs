//! What is known of a socket, when it is known, and what happens when it changes.

mod any_address;
mod before_known;
mod devices;
mod no_memory;
mod peers;
mod self_connect;
mod unsupported;
