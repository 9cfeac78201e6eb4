//! What the cluster tells its user.

use lsm_block::{StoreError, VolumeError};
use raft_meta::{FormatError, MetaError, NameError};
use std::io;
use std::path::PathBuf;
use xsan_pool::PoolError;
use xsan_types::{ErrorKind, NodeId, RegisterError};

/// Why a command was not done. The text says what is wrong; [`ClusterError::next_step`] what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// No such volume.
    #[error("there is no volume {0:?}")]
    NoVolume(String),
    /// No such pool.
    #[error("there is no pool {0:?}")]
    NoPool(String),
    /// No such node.
    #[error("there is no node {0:?}")]
    NoNode(String),
    /// No such device.
    #[error("there is no device {0:?}")]
    NoDevice(String),
    /// The volume has clients.
    #[error("volume {name:?} is in use by {clients} client(s)")]
    InUse {
        /// Which.
        name: String,
        /// How many.
        clients: usize,
    },
    /// Another node serves the volume, for clients of its own.
    #[error("volume {name:?} is served by {node}")]
    ServedElsewhere {
        /// Which.
        name: String,
        /// Where.
        node: String,
    },
    /// A volume could not be handed over in time: its next owner recovers it.
    #[error("volume {0:?} could not be handed over in time")]
    HandOver(String),
    /// A node does not answer.
    #[error("{0} does not answer")]
    NoAnswer(NodeId),
    /// Another process is this node.
    #[error("node {node} runs already, at {address}: this directory is a copy of its files")]
    Cloned {
        /// Its name.
        node: String,
        /// Where the other one answers.
        address: String,
    },
    /// The directory is that of no member.
    #[error("{0} is no node of a cluster yet")]
    NoMember(PathBuf),
    /// The directory is that of a member.
    #[error("{0} is a node of a cluster already")]
    Member(PathBuf),
    /// A disk that should become a device holds something.
    #[error("{0} is not blank: it holds data, a file system or another device of a cluster")]
    Used(PathBuf),
    /// A disk that is a device already, of somebody else.
    #[error("{path} belongs to {owner}; nothing on it was changed")]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
    /// A host could not join.
    #[error("cannot join: {0}")]
    Join(String),
    /// The process is shutting down.
    #[error("the cluster is shutting down")]
    Closing,
    /// What was to be done for a client is of no use to it any more.
    #[error("the client has left")]
    Left,
    /// Another process runs on the directory.
    #[error("another process runs the cluster in {0}")]
    Busy(PathBuf),
    /// The directory holds a cluster of another size.
    #[error("the cluster in {dir} has {found} nodes, {asked} were asked for")]
    NodeCount {
        /// Where.
        dir: PathBuf,
        /// There.
        found: usize,
        /// Asked for.
        asked: usize,
    },
    /// A request that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A node's disk cannot be opened.
    #[error("node {node}: {reason}")]
    Node {
        /// Which.
        node: String,
        /// Why.
        reason: String,
    },
    /// A name that is not allowed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Metadata refused.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// Stored metadata cannot be opened.
    #[error("the metadata cannot be opened: {0}")]
    Format(#[from] FormatError),
    /// A volume's engine.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A volume's register.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The store below a volume.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The operating system.
    #[error("{what}: {source}")]
    Io {
        /// Doing what.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

impl ClusterError {
    /// Wraps an answer of the operating system.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoVolume(_) | Self::NoPool(_) | Self::NoNode(_) | Self::NoDevice(_) => ErrorKind::NotFound,
            Self::InUse { .. } | Self::NodeCount { .. } | Self::Invalid(_) | Self::Name(_) => ErrorKind::Invalid,
            Self::ServedElsewhere { .. } | Self::NoAnswer(_) | Self::HandOver(_) => ErrorKind::Unavailable,
            Self::NoMember(_) => ErrorKind::NotFound,
            Self::Cloned { .. } | Self::Foreign { .. } | Self::Member(_) | Self::Used(_) => ErrorKind::Exists,
            Self::Join(_) => ErrorKind::Invalid,
            Self::Closing | Self::Left => ErrorKind::Closed,
            Self::Busy(_) => ErrorKind::Unavailable,
            Self::Node { .. } => ErrorKind::Unavailable,
            Self::Meta(error) => error.kind(),
            Self::Format(error) => error.kind(),
            Self::Volume(error) => error.kind(),
            Self::Register(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Pool(error) => error.kind(),
            Self::Io { source, .. } => xsan_env::error::kind(source),
        }
    }

    /// What to do about it, for people.
    #[must_use]
    pub fn next_step(&self) -> Option<String> {
        Some(match self {
            Self::NoVolume(_) => "see `xsan volume list`".into(),
            Self::NoPool(_) => "see `xsan pool list`".into(),
            Self::NoNode(_) => "see `xsan node list`".into(),
            Self::NoDevice(_) => "see `xsan device list`".into(),
            Self::InUse { name, .. } => {
                format!("disconnect its clients, or cut them off with `xsan volume delete {name} --force`")
            }
            Self::ServedElsewhere { name, .. } => format!("connect there, or move it: `xsan volume attach {name}`"),
            Self::NoAnswer(_) => "see `xsan status`".into(),
            Self::NoMember(_) => "make a cluster with `xsan cluster init`, or join one with `xsan node join`".into(),
            Self::Used(path) => {
                format!(
                    "if nothing on it is needed, wipe its start: `dd if=/dev/zero of={} bs=1M count=8`",
                    path.display()
                )
            }
            Self::Cloned { .. } => {
                "end this copy for good; to move a node to another host, stop it there first; for one more node: a directory of its own and `xsan node join`".into()
            }
            Self::Foreign { .. } => {
                "take it out of `devices` in xsan.toml, or put it back into the host it came from".into()
            }
            Self::Member(_) => "start it with `xsan node run`, or name another directory".into(),
            Self::Busy(dir) => {
                format!("stop the other process, or talk to it: `xsan --admin {}`", dir.join("admin.sock").display())
            }
            Self::NodeCount { found, .. } => format!("leave `--nodes` out, or pass `--nodes {found}`"),
            Self::Meta(MetaError::DeviceInUse(_)) => {
                "empty it first: `xsan node drain NAME` or `xsan device remove DEVICE`".into()
            }
            Self::Meta(MetaError::NameTaken) => "choose another name".into(),
            Self::Meta(MetaError::PoolInUse(_)) => "delete its volumes first: `xsan volume list`".into(),
            Self::Meta(MetaError::Placement(_)) => {
                "use a scheme with fewer shards, or add nodes: each shard needs its own failure domain".into()
            }
            _ => match self.kind() {
                ErrorKind::Unavailable => "see `xsan status` for what is down, and try again".into(),
                ErrorKind::NoSpace => "delete volumes or add space; see `xsan status`".into(),
                _ => return None,
            },
        })
    }
}
