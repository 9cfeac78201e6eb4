//! What nodes say to each other. On one host the calls of [`node::NodeApi`] are direct; frames over TCP carry the same requests
//! between hosts later.
#![forbid(unsafe_code)]

pub mod node;

pub use node::{CreateMember, CreatedMember, DeviceStatus, NodeApi, NodeError, PutShard, ShardInfo};
