//! The kernel side of sockpolicy.
//!
//! One object with a program for each hook. A program reads what its hook knows of the socket ([`ctx`]), evaluates the policy
//! with [`abi`], and carries out the decision ([`apply`], [`hooks`]).
//!
//! Invariants:
//! - A value that the kernel refuses never makes a connection fail.
//! - After an error, the socket keeps the application's value, and the error is counted.
//! - With zeroed maps, every program does nothing.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod apply;
mod ctx;
mod emit;
mod facts;
mod hooks;
mod kernel;
mod maps;
mod record;
mod storage;

/// Never runs: the verifier rejects a program that can reach a panic, because it cannot prove that this loop ends.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
