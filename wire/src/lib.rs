//! What nodes say to each other, and how it travels.
//!
//! Inside one process the calls of [`node::NodeApi`] are direct. Between processes a [`RemoteNode`] turns them into frames over TCP and
//! TLS, and a [`Server`] turns them back. Consensus and membership use the same connections: they register a
//! [`Service`] with the server and ask through [`Peer`]. Layout: docs/protocol/wire.md; why it is so:
//! docs/rfcs/0003-wire.md.
//!
//! Reading order: [`node`], [`codec`], [`message`], [`frame`], [`handshake`], [`identity`], [`service`], [`peer`],
//! [`server`].
#![forbid(unsafe_code)]

pub mod codec;
pub mod config;
pub mod error;
pub mod frame;
pub mod handshake;
pub mod identity;
pub mod join;
mod link;
pub mod message;
pub mod node;
pub mod payload;
pub mod peer;
pub mod remote;
pub mod server;
pub mod service;
mod timer;
mod transport;

pub use config::{Endpoint, Limits};
pub use error::{CallError, ConnectError};
pub use handshake::{Class, Refusal};
pub use identity::{Ca, IdentityError, NodeKey, Tls};
pub use link::LinkState;
pub use node::{CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, PutShard, ShardInfo};
pub use peer::Peer;
pub use remote::RemoteNode;
pub use server::Server;
pub use service::{PeerInfo, Service, ServiceError, ServiceId, Services};
pub use transport::Connect;
