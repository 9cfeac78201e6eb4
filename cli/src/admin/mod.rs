//! The admin API: HTTP + JSON on a unix socket, versioned under `/v1` (docs/protocol/admin.md). The command line uses it and
//! nothing else.

pub mod api;
pub mod client;
pub mod server;
pub mod status;
