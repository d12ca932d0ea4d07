//! One file for each kind of attach point.

mod audit;
mod iter;
mod post_create;
mod sock_addr;
mod sock_create;
mod sock_ops;
mod sockopt;
