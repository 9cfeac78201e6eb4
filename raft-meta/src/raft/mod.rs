//! The replicated log of the metadata: Raft, by the `raft` library in our own driver (RFC 0004).
//!
//! [`Core`] is pure: ticks, messages and requests in; messages, writes and answers out. [`RaftGroup`] is the shell around it:
//! one task that owns the core and its files, and makes of it a [`crate::Consensus`]. The library is known to
//! `library`, `core` and `drive` alone. Reading order: [`entry`], [`machine`], [`message`], [`mod@format`], [`core`], `drive`,
//! `files`, [`group`], [`voters`], [`inspect`].

mod bytes;
pub mod core;
mod drive;
pub mod entry;
mod files;
pub mod format;
pub mod group;
pub mod inspect;
mod library;
pub mod machine;
pub mod message;
mod requests;
mod transfer;
pub mod voters;

pub use self::core::{Answer, Core, Fault, MembershipError, Status, Stored, Ticks, Write};
pub use entry::{LogEntry, Origin, Payload, ReplicaId, Role, Step};
pub use group::{GroupOptions, RaftGroup, RaftTransport};
pub use machine::{Configuration, Machine, Member};
pub use message::{Message, MessageError};
pub use requests::Ticket;
