//! The NBD gateway: connections, negotiation, requests. It knows volumes only as [`export::Export`].
#![forbid(unsafe_code)]

pub mod export;

pub use export::{Export, ExportError, ExportInfo, Exports, OpenError, ReadPiece, StatusExtent, Transport};
