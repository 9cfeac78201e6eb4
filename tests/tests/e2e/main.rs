//! The promises of XSAN, kept by the real program: `xsan dev` as a process, its command line, its NBD socket.
//!
//! `XSAN_BIN` names the program (else the release build of this workspace is taken), `XSAN_CANARY_BIN` the one that breaks rules and
//! meets faults of the machine (else the debug build of `xsan-canary`), `XSAN_TEST_ROUNDS` scales what repeats
//! itself, `XSAN_TEST_SEED` repeats a run's random choices, `XSAN_TEST_KEEP` keeps the directory of a failed test.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests drive the real program on the real machine, with its clock, files and sockets"
)]

mod addresses;
mod commands;
mod crash;
mod damage;
mod devices;
mod hosts;
mod linear;
mod moves;
mod nodes;
mod power;
mod space;
mod standby;
mod strangers;
mod volumes;
