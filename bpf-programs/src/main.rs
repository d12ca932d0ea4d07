//! The kernel side of sockpolicy.
//!
//! One object with a program for each hook. A program reads what its hook knows of the socket
//! ([`ctx`]), asks [`abi`] what the policy says, and does it ([`apply`], [`hooks::calls`]).
//!
//! Invariants: a program never makes a connection fail; whatever goes wrong leaves the socket as
//! the application had it and is counted; with zeroed maps every program does nothing.

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
mod storage;

/// Never runs: the verifier refuses a program in which a panic can be reached, for it cannot show
/// that this loop ends.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
