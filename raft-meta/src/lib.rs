//! Cluster metadata: nodes, devices, pools, placement groups and the volume registers (P2).
//!
//! Control only: nothing here is on the path of a guest I/O, and guests go on when it is down. The core is pure:
//! [`MetaState::apply`] is a deterministic function of state and [`Command`], without clock, randomness or I/O. Around it
//! stands [`Consensus`], which orders commands and makes them durable: [`RaftGroup`] (one voter or several), and
//! [`SingleReplica`] (one log, one process; what clusters of `xsan dev` were made with). Reading order: [`state`], [`command`],
//! [`apply`], [`hosts`], [`addresses`], [`register`], [`consensus`], [`single`], [`mod@format`], [`inspect`], [`mod@raft`], [`detector`].
//!
//! Bytes: docs/format/meta.md.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod apply;
pub mod command;
pub mod consensus;
pub mod detector;
pub mod error;
pub mod format;
pub mod hosts;
pub mod inspect;
pub mod name;
pub mod raft;
pub mod register;
pub mod single;
pub mod state;

pub use addresses::{AddressCommand, AddressRecord, ServiceAddress};
pub use command::{Command, Outcome};
pub use consensus::{Consensus, RegisterClient};
pub use detector::{Beat, Detector, Observed, Reason, Verdict};
pub use error::{FormatError, MetaError};
pub use hosts::{Authority, Candidacy, HostRecord, Hosts, Served, ShownToken, TokenRecord};
pub use name::{Name, NameError};
pub use raft::{GroupOptions, RaftGroup, RaftTransport, ReplicaId};
pub use register::VolumeRegister;
pub use single::{LOG_FILE, Options, SNAPSHOT_FILE, SingleReplica};
pub use state::{AckPolicy, DeviceRecord, MetaState, Node, NodeState, Pool, VOLUME_BYTES_MAX, Volume};
