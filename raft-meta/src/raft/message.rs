//! What replicas say to each other. Bytes: docs/format/meta.md, "Messages".
//!
//! A message is never parsed by the library's own decoder, and nothing in one is believed before it was checked against bounds.
//! Integrity on the way is the transport's: it checks its frames and knows who is at the other end.

use crate::raft::bytes::{Put, Reader};
use crate::raft::entry::{ENTRY_BYTES_MAX, LogEntry, NUMBER_MAX, Payload, ReplicaId, put_entry, read_entries};
use xsan_types::ClusterId;

/// Newest version of messages.
pub const MESSAGE_VERSION: u16 = 1;
/// Bytes of entries after which a message takes no more; one entry may be larger.
pub const ENTRIES_BYTES_MAX: usize = 512 << 10;
/// Bytes of a snapshot in one message.
pub const CHUNK_BYTES_MAX: usize = 512 << 10;
/// Largest message.
pub const MESSAGE_BYTES_MAX: usize = ENTRIES_BYTES_MAX + ENTRY_BYTES_MAX + 1024;
/// Largest snapshot that is taken from another replica.
pub const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Largest context of a vote or heartbeat; ours have 16 bytes.
const CONTEXT_BYTES_MAX: usize = 64;

/// What a message of the agreement is about; the names are the library's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Proposals on their way to the leader.
    Propose,
    /// Entries for a follower.
    Append,
    /// Its answer.
    AppendResponse,
    /// A candidate asks for a vote.
    RequestVote,
    /// The answer.
    RequestVoteResponse,
    /// The leader is alive.
    Heartbeat,
    /// The answer.
    HeartbeatResponse,
    /// The leader hands over.
    TimeoutNow,
    /// What index must be applied before reading?
    ReadIndex,
    /// The answer.
    ReadIndexResponse,
    /// Would you vote for me?
    RequestPreVote,
    /// The answer.
    RequestPreVoteResponse,
}

/// Kinds by their number in messages.
const KINDS: [Kind; 12] = [
    Kind::Propose,
    Kind::Append,
    Kind::AppendResponse,
    Kind::RequestVote,
    Kind::RequestVoteResponse,
    Kind::Heartbeat,
    Kind::HeartbeatResponse,
    Kind::TimeoutNow,
    Kind::ReadIndex,
    Kind::ReadIndexResponse,
    Kind::RequestPreVote,
    Kind::RequestPreVoteResponse,
];
/// Numbers of the snapshot's messages follow those of [`KINDS`] with a gap.
const CHUNK: u8 = 32;
const CHUNK_ACK: u8 = 33;

/// A message of the agreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// What it is about.
    pub kind: Kind,
    /// The sender's term; 0 in `Propose` and `ReadIndex` only.
    pub term: u64,
    /// Term of the entry at `index`.
    pub log_term: u64,
    /// Of the log; what it means depends on the kind.
    pub index: u64,
    /// Everything up to here is agreed.
    pub commit: u64,
    /// Term of that entry.
    pub commit_term: u64,
    /// Whether it is a refusal.
    pub reject: bool,
    /// In a refusal: where to try next.
    pub reject_hint: u64,
    /// Comes back in the answer.
    pub context: Vec<u8>,
    /// Entries.
    pub entries: Vec<LogEntry>,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Something of the agreement.
    Agreement(Agreement),
    /// A piece of a snapshot.
    Chunk {
        /// The leader's term.
        term: u64,
        /// The last entry in the snapshot.
        index: u64,
        /// Bytes of the whole snapshot.
        total: u64,
        /// Where the piece starts.
        offset: u64,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// So much of a snapshot is here.
    ChunkAck {
        /// The last entry in the snapshot.
        index: u64,
        /// Bytes from the start.
        received: u64,
    },
}

/// A message with its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The cluster of both.
    pub cluster: ClusterId,
    /// Who says it.
    pub from: ReplicaId,
    /// To whom.
    pub to: ReplicaId,
    /// What.
    pub body: Body,
}

/// Why a message was not taken. Nothing of it had an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Of a newer release.
    #[error("message version {found}; this release knows up to {MESSAGE_VERSION}: upgrade this node")]
    Version {
        /// Found.
        found: u16,
    },
    /// Cut short, too long, or with a value out of bounds.
    #[error("the message is malformed")]
    Malformed,
    /// Of another cluster.
    #[error("the message is of cluster {0}")]
    Cluster(ClusterId),
    /// For a replica that is not this one: a former one of this node.
    #[error("the message is for replica {0}")]
    Recipient(ReplicaId),
    /// Says it is from another replica than the one at the other end.
    #[error("the message claims to be from replica {0}, which is not its sender")]
    Sender(ReplicaId),
}

/// The bytes of a message.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.put_u16(MESSAGE_VERSION);
    bytes.put(&message.cluster.0.to_le_bytes());
    bytes.put_u64(message.from.0);
    bytes.put_u64(message.to.0);
    match &message.body {
        Body::Agreement(agreement) => put_agreement(&mut bytes, agreement),
        Body::Chunk { term, index, total, offset, bytes: piece } => {
            bytes.put_u8(CHUNK);
            for number in [term, index, total, offset] {
                bytes.put_u64(*number);
            }
            bytes.put_len(piece.len());
            bytes.put(piece);
        }
        Body::ChunkAck { index, received } => {
            bytes.put_u8(CHUNK_ACK);
            bytes.put_u64(*index);
            bytes.put_u64(*received);
        }
    }
    bytes
}

fn put_agreement(bytes: &mut Vec<u8>, agreement: &Agreement) {
    let number = KINDS.iter().position(|kind| *kind == agreement.kind).expect("every kind has a number");
    bytes.put_u8(u8::try_from(number).expect("few"));
    let Agreement { term, log_term, index, commit, commit_term, reject_hint, .. } = agreement;
    for field in [term, log_term, index, commit, commit_term, reject_hint] {
        bytes.put_u64(*field);
    }
    bytes.put_u8(u8::from(agreement.reject));
    bytes.put_len(agreement.context.len());
    bytes.put(&agreement.context);
    bytes.put_len(agreement.entries.len());
    for entry in &agreement.entries {
        put_entry(bytes, entry);
    }
}

/// Reads a message.
///
/// # Errors
/// `Version`, `Malformed`.
pub fn decode(bytes: &[u8]) -> Result<Message, MessageError> {
    let mut reader = Reader::new(bytes);
    let found = reader.u16().ok_or(MessageError::Malformed)?;
    if found > MESSAGE_VERSION {
        return Err(MessageError::Version { found });
    }
    if found == 0 || bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::Malformed);
    }
    read_message(reader).ok_or(MessageError::Malformed)
}

fn read_message(mut reader: Reader<'_>) -> Option<Message> {
    let cluster = ClusterId(reader.u128()?);
    let (from, to) = (ReplicaId(reader.u64()?), ReplicaId(reader.u64()?));
    let body = match reader.u8()? {
        CHUNK => {
            let (term, index) = (read_number(&mut reader)?, read_number(&mut reader)?);
            let (total, offset) = (reader.u64()?, reader.u64()?);
            let bytes = reader.sized()?;
            let fits = total <= SNAPSHOT_BYTES_MAX && offset.checked_add(bytes.len() as u64)? <= total;
            if !fits || bytes.is_empty() || bytes.len() > CHUNK_BYTES_MAX || term == 0 {
                return None;
            }
            Body::Chunk { term, index, total, offset, bytes: bytes.to_vec() }
        }
        CHUNK_ACK => Body::ChunkAck { index: read_number(&mut reader)?, received: read_number(&mut reader)? },
        number => Body::Agreement(read_agreement(*KINDS.get(usize::from(number))?, &mut reader)?),
    };
    if from.0 == 0 || to.0 == 0 || from == to {
        return None;
    }
    reader.end(Message { cluster, from, to, body })
}

fn read_number(reader: &mut Reader<'_>) -> Option<u64> {
    reader.u64().filter(|number| *number <= NUMBER_MAX)
}

fn read_agreement(kind: Kind, reader: &mut Reader<'_>) -> Option<Agreement> {
    let mut numbers = [0; 6];
    for number in &mut numbers {
        *number = read_number(reader)?;
    }
    let [term, log_term, index, commit, commit_term, reject_hint] = numbers;
    let reject = match reader.u8()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    let context = reader.sized()?;
    if context.len() > CONTEXT_BYTES_MAX {
        return None;
    }
    let entries = read_entries(reader)?;
    let context = context.to_vec();
    let agreement =
        Agreement { kind, term, log_term, index, commit, commit_term, reject, reject_hint, context, entries };
    agreement.is_sound().then_some(agreement)
}

impl Agreement {
    /// A message of this kind with nothing in it.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            term: 0,
            log_term: 0,
            index: 0,
            commit: 0,
            commit_term: 0,
            reject: false,
            reject_hint: 0,
            context: Vec::new(),
            entries: Vec::new(),
        }
    }

    /// What every sender keeps to, whatever state it is in. The library trusts these without looking.
    fn is_sound(&self) -> bool {
        // Term 0 is the library's mark of a message from inside of the same process.
        let local = matches!(self.kind, Kind::Propose | Kind::ReadIndex);
        let term = local == (self.term == 0);
        let content = match self.kind {
            // Only nothing has no term; to the library every place behind the log's end looks like that.
            Kind::Append => (self.index == 0) == (self.log_term == 0) && self.entries_follow(),
            Kind::Propose => {
                let command = |entry: &LogEntry| matches!(entry.payload, Payload::Command { .. });
                !self.entries.is_empty() && self.entries.iter().all(command)
            }
            Kind::ReadIndex | Kind::ReadIndexResponse => self.entries.is_empty() && !self.context.is_empty(),
            _ => self.entries.is_empty(),
        };
        term && content
    }

    /// The entries stand one after the other behind `index`, with terms that do not fall and are not beyond the sender's.
    fn entries_follow(&self) -> bool {
        let mut before = (self.index, self.log_term);
        self.entries.iter().all(|entry| {
            let follows = entry.index == before.0 + 1 && entry.term >= before.1 && entry.term <= self.term;
            before = (entry.index, entry.term);
            follows
        })
    }
}
