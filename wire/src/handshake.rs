//! Who talks to whom, and in which version. Pure: messages and the rules by which they are judged.
//!
//! The client says hello, the server welcomes or refuses. These three messages must be understood by every release for
//! ever, so they only grow at their end, and what a reader does not know there it skips. Bytes: docs/protocol/wire.md.

use crate::codec::{Field, Malformed, Reader, WireVersion, Writer};
use xsan_types::{ClusterId, NodeId};

/// What a connection is for. Each class has its own connection, so that none waits behind another's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Guests wait for it: appends, flushes, confirmations, reads.
    Guest = 1,
    /// Nobody waits: sealed shards, repair, rebuild, scrub, lists.
    Bulk = 2,
    /// Small and urgent: consensus and membership. A queue of guest data must not look like a dead node.
    Control = 3,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Guest, Self::Bulk, Self::Control];

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|class| *class as u8 == number)
    }
}

/// First message of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest wire version the client speaks, by number: it may speak versions unknown here.
    pub versions: (u16, u16),
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Who it is.
    pub node: NodeId,
    /// Number of its process, drawn at its start: tells a restarted node from two that claim the same id.
    pub instance: u64,
    /// Whom it wants.
    pub target: NodeId,
    /// What for.
    pub class: Class,
    /// Number of the client's link, drawn once for all connections that follow each other on it: a newer connection
    /// replaces the older one, so that nothing of the older one begins after it.
    pub link: u64,
}

/// Answer of a server that agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Number of the version that holds from now on: the newest that both speak.
    pub version: u16,
    /// Who the server is.
    pub node: NodeId,
    /// Number of its process.
    pub instance: u64,
    /// Requests that may be unanswered at a time.
    pub requests_max: u32,
    /// Bytes that they may have together, their answers' included. A single larger request may go alone.
    pub bytes_max: u64,
}

/// Why a server does not agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No version that both speak.
    #[error(
        "the peer speaks wire versions {0} to {1}, this node speaks {oldest} to {newest}: update the older release",
        oldest = WireVersion::OLDEST.number(),
        newest = WireVersion::NEWEST.number()
    )]
    Version(u16, u16),
    /// Two clusters.
    #[error("the peer belongs to another cluster: check the address, or remove this node's data and join again")]
    Cluster,
    /// Somebody else lives at that address.
    #[error("node {0} lives at that address, not the one wanted: the membership's address is out of date")]
    Target(u32),
    /// The certificate was given to another node.
    #[error("the certificate belongs to node {0}, not to the node that this one says it is: was its data copied?")]
    Certificate(u32),
    /// The server does not count this node among the members.
    #[error("the peer does not know this node as a member: it was removed, or has not joined yet")]
    NotAdmitted,
    /// As many connections as there may be.
    #[error("the peer has no room for another connection: try later")]
    Busy,
    /// It is shutting down.
    #[error("the peer is shutting down: try later")]
    Stopping,
    /// The hello made no sense.
    #[error("the peer did not understand the handshake: check that both run releases of this project")]
    Malformed,
    /// A reason of a newer release.
    #[error("the peer refused for a reason (number {0}) that this release does not know")]
    Other(u16),
}

impl Refusal {
    fn numbers(self) -> (u16, u32, u32) {
        match self {
            Self::Version(oldest, newest) => (1, oldest.into(), newest.into()),
            Self::Cluster => (2, 0, 0),
            Self::Target(node) => (3, node, 0),
            Self::Certificate(node) => (4, node, 0),
            Self::NotAdmitted => (5, 0, 0),
            Self::Busy => (6, 0, 0),
            Self::Stopping => (7, 0, 0),
            Self::Malformed => (8, 0, 0),
            Self::Other(number) => (number, 0, 0),
        }
    }

    fn from_numbers(number: u16, first: u32, second: u32) -> Self {
        let version = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        match number {
            1 => Self::Version(version(first), version(second)),
            2 => Self::Cluster,
            3 => Self::Target(first),
            4 => Self::Certificate(first),
            5 => Self::NotAdmitted,
            6 => Self::Busy,
            7 => Self::Stopping,
            8 => Self::Malformed,
            other => Self::Other(other),
        }
    }

    /// A version refusal that names what this build speaks.
    #[must_use]
    pub fn version() -> Self {
        Self::Version(WireVersion::OLDEST.number(), WireVersion::NEWEST.number())
    }

    /// Its bytes.
    pub fn put(self, out: &mut Vec<u8>) {
        let (number, first, second) = self.numbers();
        let mut out = Writer::new(out, WireVersion::V1);
        out.put(&number);
        out.put(&first);
        out.put(&second);
    }

    /// Reads one; what follows is skipped.
    ///
    /// # Errors
    /// [`Malformed`]: too short.
    pub fn get(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes, WireVersion::V1);
        Ok(Self::from_numbers(input.get()?, input.get()?, input.get()?))
    }
}

impl Field for Class {
    const BYTES_MIN: usize = 1;
    fn put(&self, out: &mut Writer<'_>) {
        out.put(&(*self as u8));
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Self::from_number(input.get()?).ok_or_else(|| input.malformed("unknown class of connection"))
    }
}

impl Hello {
    /// Its bytes.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut out = Writer::new(out, WireVersion::V1);
        out.put(&self.versions);
        out.put(&self.cluster);
        out.put(&self.node);
        out.put(&self.instance);
        out.put(&self.target);
        out.put(&self.class);
        out.put(&self.link);
    }

    /// Reads one; what follows is skipped.
    ///
    /// # Errors
    /// [`Malformed`]: too short, or an unknown class.
    pub fn get(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes, WireVersion::V1);
        Ok(Self {
            versions: input.get()?,
            cluster: input.get()?,
            node: input.get()?,
            instance: input.get()?,
            target: input.get()?,
            class: input.get()?,
            link: input.get()?,
        })
    }

    /// Judges a hello as the node `node` of `cluster`. `certified`: the node that the client's certificate names, if
    /// there is one.
    ///
    /// # Errors
    /// [`Refusal`]: what to answer. The cluster comes first: a stranger learns nothing else.
    pub fn judge(&self, cluster: ClusterId, node: NodeId, certified: Option<NodeId>) -> Result<WireVersion, Refusal> {
        if self.cluster != cluster {
            return Err(Refusal::Cluster);
        }
        if let Some(certified) = certified.filter(|certified| *certified != self.node) {
            return Err(Refusal::Certificate(certified.0));
        }
        if self.target != node {
            return Err(Refusal::Target(node.0));
        }
        common_version(self.versions).ok_or_else(Refusal::version)
    }
}

/// The newest version that a peer with versions from the one to the other speaks as well.
fn common_version((oldest, newest): (u16, u16)) -> Option<WireVersion> {
    let version = newest.min(WireVersion::NEWEST.number());
    (version >= oldest && version >= WireVersion::OLDEST.number()).then(|| WireVersion::from_number(version))?
}

impl Welcome {
    /// Its bytes.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut out = Writer::new(out, WireVersion::V1);
        out.put(&self.version);
        out.put(&self.node);
        out.put(&self.instance);
        out.put(&self.requests_max);
        out.put(&self.bytes_max);
    }

    /// Reads one; what follows is skipped.
    ///
    /// # Errors
    /// [`Malformed`]: too short.
    pub fn get(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes, WireVersion::V1);
        Ok(Self {
            version: input.get()?,
            node: input.get()?,
            instance: input.get()?,
            requests_max: input.get()?,
            bytes_max: input.get()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: ClusterId = ClusterId(7);

    fn hello() -> Hello {
        Hello {
            versions: (1, 1),
            cluster: CLUSTER,
            node: NodeId(2),
            instance: 99,
            target: NodeId(5),
            class: Class::Bulk,
            link: 44,
        }
    }

    #[test]
    fn the_newest_common_version_is_chosen_and_a_peer_outside_the_range_refused() {
        let judge = |versions| Hello { versions, ..hello() }.judge(CLUSTER, NodeId(5), None);
        assert_eq!(judge((1, 1)), Ok(WireVersion::V1));
        assert_eq!(judge((0, 1)), Ok(WireVersion::V1));
        assert_eq!(judge((1, 9)), Ok(WireVersion::V1));
        for outside in [(0, 0), (2, 9), (9, 2), (u16::MAX, u16::MAX)] {
            assert_eq!(judge(outside), Err(Refusal::Version(1, 1)), "{outside:?}");
        }
    }

    #[test]
    fn each_contradiction_is_refused_by_name() {
        assert_eq!(hello().judge(ClusterId(8), NodeId(5), None), Err(Refusal::Cluster));
        assert_eq!(hello().judge(CLUSTER, NodeId(6), None), Err(Refusal::Target(6)));
        assert_eq!(hello().judge(CLUSTER, NodeId(5), Some(NodeId(3))), Err(Refusal::Certificate(3)));
        assert_eq!(hello().judge(CLUSTER, NodeId(5), Some(NodeId(2))), Ok(WireVersion::V1));
    }

    #[test]
    fn messages_of_a_newer_release_are_understood_as_far_as_they_are_known() {
        let mut bytes = Vec::new();
        hello().put(&mut bytes);
        bytes.extend_from_slice(b"something new");
        assert_eq!(Hello::get(&bytes), Ok(hello()));
        assert!(Hello::get(&bytes[..20]).is_err());
        let mut bytes = Vec::new();
        Refusal::Other(77).put(&mut bytes);
        assert_eq!(Refusal::get(&bytes), Ok(Refusal::Other(77)));
    }
}
