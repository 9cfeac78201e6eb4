//! What can go wrong between two nodes, before and beside the answers of a service.

use crate::codec::Malformed;
use crate::frame::FrameError;
use crate::handshake::Refusal;
use std::io;
use xsan_types::{ErrorKind, NodeId};

/// Why there is no connection to a peer, or no more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address cannot be reached.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// TLS was not agreed on: a foreign certificate, none, or no TLS at the other end.
    #[error("TLS handshake failed; is the peer of the same cluster, and does it use TLS?")]
    Tls(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// The other end closed the connection.
    #[error("the peer closed the connection")]
    Ended,
    /// Not done in time, or nothing heard for too long.
    #[error("the peer is silent")]
    Silent,
    /// Bytes that are no frames, or damaged ones.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message that is not what it says.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The peer refused.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The server that answered is not the node that was wanted.
    #[error("node {found} answered, {wanted} was wanted: the membership's address is out of date")]
    WrongNode {
        /// Who was wanted.
        wanted: NodeId,
        /// Who answered.
        found: NodeId,
    },
    /// The server chose a version that this side does not speak.
    #[error("the peer chose wire version {0}, which this release does not speak")]
    Version(u16),
}

impl ConnectError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused(Refusal::Busy | Refusal::Stopping) => ErrorKind::Unavailable,
            Self::Refused(_) | Self::WrongNode { .. } | Self::Version(_) => ErrorKind::Invalid,
            _ => ErrorKind::Unavailable,
        }
    }
}

/// Why a request to a service got no answer of that service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No connection, it was lost, or the deadline passed: nothing is known of the outcome. Ask again.
    #[error("the node does not answer")]
    Unavailable,
    /// More waits for this peer than may: nothing was sent. Ask later.
    #[error("too much waits for the node")]
    Full,
    /// Longer than a message may be: nothing was sent.
    #[error("the message is longer than a frame may be")]
    TooLarge,
    /// The peer does not run that service, or not that operation of it.
    #[error("the node does not offer this service or operation")]
    NotOffered,
    /// The peer could not read the message.
    #[error("the node did not understand the message")]
    Malformed,
}

impl CallError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable | Self::Full | Self::NotOffered => ErrorKind::Unavailable,
            Self::TooLarge | Self::Malformed => ErrorKind::Invalid,
        }
    }
}
