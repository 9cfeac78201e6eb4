//! The gateway with its own client over streams in memory and unix sockets: one promise per test.
#![allow(missing_docs, reason = "test code")]

mod handshake;
mod hostile;
mod limits;
mod sessions;
mod support;
mod tls;
mod transmission;
