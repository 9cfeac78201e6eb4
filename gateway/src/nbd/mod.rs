//! The NBD protocol: layouts ([`proto`]), option haggling ([`handshake`]), requests ([`request`]), replies ([`reply`]),
//! the operations under way ([`inflight`]) and the two phases of a connection ([`connection`], [`transmission`]).
//!
//! Everything but the last two is a function of bytes and state, so that tests and the fuzzer reach all of it without a
//! socket. What of the specification is built is told in docs/protocol/nbd.md.

pub mod connection;
pub mod handshake;
pub mod inflight;
pub mod proto;
pub mod reply;
pub mod request;
pub mod transmission;
