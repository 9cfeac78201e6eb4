//! Composes a cluster and speaks with its user. The binary `xsan` is [`run`]; [`cluster`] is a library that tests and tools
//! use as well.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the composition root: it makes the runtime, directories and lock files"
)]

pub mod admin;
pub mod cluster;
pub mod commands;
pub mod error;

pub use error::ClusterError;

/// Parses the command line and does it.
#[must_use]
pub fn run() -> std::process::ExitCode {
    commands::run()
}
