//! What stands in the log of the agreement, in our own words and bytes; the library's types stay in `library`.

use crate::format::COMMAND_BYTES_MAX;
use crate::raft::bytes::{Put, Reader};
use serde::{Deserialize, Serialize};
use std::fmt;
use xsan_types::NodeId;

/// Largest term or index that is believed: far below where arithmetic would wrap, far above what a cluster ever reaches.
pub const NUMBER_MAX: u64 = 1 << 62;
/// Most steps of one membership change.
pub const STEPS_MAX: usize = 64;

/// Identity of a replica in the agreement: drawn at random when its directory is made, and never used by another. A replica
/// whose disk was lost comes back under a new one, because under the old one it might vote twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReplicaId(pub u64);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Who proposed a command, and which of its proposals this is: a number that only grows, over restarts too. The same
/// origin twice in the log is a repeat and is not applied again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The proposing replica.
    pub replica: ReplicaId,
    /// How often it had been started.
    pub start: u64,
    /// Number of the proposal in that life.
    pub sequence: u64,
}

/// What becomes of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It votes.
    Voter,
    /// It gets everything and does not vote.
    Learner,
    /// It is no longer a member.
    Removed,
}

/// One replica's part of a membership change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which.
    pub replica: ReplicaId,
    /// The node it runs on.
    pub node: NodeId,
    /// What becomes of it.
    pub role: Role,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: a new leader's first entry, or a change that was refused.
    Empty,
    /// A command in its envelope (docs/format/meta.md).
    Command {
        /// Whose.
        origin: Origin,
        /// The envelope.
        envelope: Vec<u8>,
    },
    /// A membership change; several voters at once go through a joint configuration.
    Change(Vec<Step>),
    /// Ends a joint configuration.
    Leave,
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its place, from 1 without gaps.
    pub index: u64,
    /// The term of the leader that made it.
    pub term: u64,
    /// What it says.
    pub payload: Payload,
}

const ORIGIN_BYTES: usize = 24;
const STEP_BYTES: usize = 8 + 4 + 1;
/// Bytes of an entry before its body; see `put_entry`.
const ENTRY_HEADER_BYTES: usize = 8 + 8 + 1 + 4;
/// Largest entry as written.
pub const ENTRY_BYTES_MAX: usize = ENTRY_HEADER_BYTES + ORIGIN_BYTES + COMMAND_BYTES_MAX;
const _: () = assert!(4 + STEPS_MAX * STEP_BYTES <= COMMAND_BYTES_MAX);

impl Origin {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ORIGIN_BYTES);
        bytes.put_u64(self.replica.0);
        bytes.put_u64(self.start);
        bytes.put_u64(self.sequence);
        bytes
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self { replica: ReplicaId(reader.u64()?), start: reader.u64()?, sequence: reader.u64()? })
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let origin = Self::read(&mut reader)?;
        reader.end(origin)
    }
}

pub(crate) fn encode_steps(steps: &[Step]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + steps.len() * STEP_BYTES);
    bytes.put_len(steps.len());
    for step in steps {
        bytes.put_u64(step.replica.0);
        bytes.put_u32(step.node.0);
        bytes.put_u8(match step.role {
            Role::Voter => 0,
            Role::Learner => 1,
            Role::Removed => 2,
        });
    }
    bytes
}

pub(crate) fn decode_steps(bytes: &[u8]) -> Option<Vec<Step>> {
    let mut reader = Reader::new(bytes);
    let count = reader.count(STEP_BYTES).filter(|count| (1..=STEPS_MAX).contains(count))?;
    let mut steps = Vec::with_capacity(count);
    for _ in 0..count {
        let (replica, node) = (ReplicaId(reader.u64()?), NodeId(reader.u32()?));
        let role = match reader.u8()? {
            0 => Role::Voter,
            1 => Role::Learner,
            2 => Role::Removed,
            _ => return None,
        };
        if replica.0 == 0 || steps.iter().any(|step: &Step| step.replica == replica) {
            return None;
        }
        steps.push(Step { replica, node, role });
    }
    reader.end(steps)
}

/// Appends an entry: index u64, term u64, kind u8, length u32, body.
pub(crate) fn put_entry(bytes: &mut Vec<u8>, entry: &LogEntry) {
    bytes.put_u64(entry.index);
    bytes.put_u64(entry.term);
    match &entry.payload {
        Payload::Empty => {
            bytes.put_u8(0);
            bytes.put_len(0);
        }
        Payload::Command { origin, envelope } => {
            bytes.put_u8(1);
            bytes.put_len(ORIGIN_BYTES + envelope.len());
            bytes.put(&origin.encode());
            bytes.put(envelope);
        }
        Payload::Change(steps) => {
            let body = encode_steps(steps);
            bytes.put_u8(2);
            bytes.put_len(body.len());
            bytes.put(&body);
        }
        Payload::Leave => {
            bytes.put_u8(3);
            bytes.put_len(0);
        }
    }
}

/// Takes an entry from the front.
pub(crate) fn read_entry(reader: &mut Reader<'_>) -> Option<LogEntry> {
    let (index, term, kind) = (reader.u64()?, reader.u64()?, reader.u8()?);
    if index > NUMBER_MAX || term > NUMBER_MAX {
        return None;
    }
    let body = reader.sized()?;
    if body.len() > ORIGIN_BYTES + COMMAND_BYTES_MAX {
        return None;
    }
    let payload = match (kind, body) {
        (0, []) => Payload::Empty,
        (1, body) => {
            let mut body = Reader::new(body);
            let origin = Origin::read(&mut body)?;
            Payload::Command { origin, envelope: body.rest().to_vec() }
        }
        (2, body) => Payload::Change(decode_steps(body)?),
        (3, []) => Payload::Leave,
        _ => return None,
    };
    Some(LogEntry { index, term, payload })
}

/// Takes a counted list of entries.
pub(crate) fn read_entries(reader: &mut Reader<'_>) -> Option<Vec<LogEntry>> {
    let count = reader.count(ENTRY_HEADER_BYTES)?;
    (0..count).map(|_| read_entry(reader)).collect()
}
