//! What the integration tests share: a cluster that is a real process, data that knows what it must be, waiting on conditions.
//!
//! [`hosts`] is a cluster of processes; [`cluster`] owns a process, its directory and its command line; [`ledger`] remembers every write and judges what a read
//! returns; [`load`] drives many NBD connections at random.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests drive the real program on the real machine, with its clock, files and sockets"
)]

pub mod cluster;
pub mod damage;
pub mod hosts;
pub mod ledger;
pub mod load;
pub mod random;
pub mod wait;

pub use cluster::{Cluster, Guest, Outcome};
pub use hosts::Hosts;
pub use ledger::Ledger;
pub use random::Random;
pub use wait::{eventually, within};

/// Rounds of the tests that repeat themselves: `usual`, unless the environment asks for more (`XSAN_TEST_ROUNDS`).
#[must_use]
pub fn rounds(usual: u64) -> u64 {
    std::env::var("XSAN_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}
