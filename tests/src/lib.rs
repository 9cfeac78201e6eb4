//! What the integration tests share: a cluster that is a real process, data that knows what it must be, waiting on conditions.
//!
//! [`hosts`] is a cluster of processes, [`network`] what is between them, [`machine`] what is below them, [`guest_disk`] what QEMU sees
//! through it; [`mod@rounds`] lets all of that fail at random under clients; [`cluster`] owns a process, its directory and its command
//! line; [`ledger`] remembers every write and judges what a read
//! returns; [`load`] drives many NBD connections at random; [`linearizable`] judges what several clients saw that used the
//! same blocks at the same time.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests drive the real program on the real machine, with its clock, files and sockets"
)]

pub mod cluster;
pub mod damage;
pub mod guest_disk;
pub mod hosts;
pub mod ledger;
pub mod linearizable;
pub mod load;
pub mod machine;
pub mod network;
pub mod random;
pub mod rounds;
pub mod wait;

pub use cluster::{Cluster, Guest, Outcome};
pub use guest_disk::GuestDisk;
pub use hosts::Hosts;
pub use ledger::Ledger;
pub use machine::Machine;
pub use network::Network;
pub use random::Random;
pub use wait::{eventually, within};

/// Rounds of the tests that repeat themselves: `usual`, unless the environment asks for more (`XSAN_TEST_ROUNDS`).
#[must_use]
pub fn rounds(usual: u64) -> u64 {
    std::env::var("XSAN_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}
