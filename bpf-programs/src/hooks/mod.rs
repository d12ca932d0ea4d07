//! One file for each kind of attach point.

mod address;
mod audit;
mod birth;
mod calls;
mod live;
mod post_create;
mod turns;
