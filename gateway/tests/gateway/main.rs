//! The gateway with its own client over streams in memory and unix sockets: one promise per test.
#![allow(missing_docs, reason = "test code")]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests make their own runtime")]

mod handshake;
mod hostile;
mod limits;
mod sessions;
mod support;
mod tls;
mod transmission;
