//! What the wire promises, between a client and a server in one process.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "tests make their own runtime and read their own files"
)]

mod calls;
mod golden;
mod join;
mod losses;
mod real;
mod services;
mod strangers;
mod support;
