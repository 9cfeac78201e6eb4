//! The NBD gateway: connections, negotiation, requests. It knows volumes only as [`export::Export`].
//!
//! Reading order: [`export`] (what is served), [`server`] (who serves), [`sessions`] (who is connected, P12),
//! [`admission`] (how much is under way), [`nbd`] (the protocol), [`tls`]. [`memory_export`] and [`client`] are the two
//! ends for tests and measurements. docs/protocol/nbd.md tells what of the specification is built.
#![forbid(unsafe_code)]

pub mod admission;
pub mod client;
pub mod export;
pub mod memory_export;
pub mod nbd;
pub mod server;
pub mod sessions;
pub mod tls;

pub use export::{Export, ExportError, ExportInfo, Exports, OpenError, ReadPiece, StatusExtent, Transport};
pub use nbd::handshake::TlsMode;
pub use server::{Limits, Server};
pub use sessions::{ClientInfo, ClientStats, Peer};
pub use tls::{Tls, TlsError, server_config};
