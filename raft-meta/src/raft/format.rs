//! Bytes of a replica's log and snapshot. The byte tables stand in docs/format/meta.md.
//!
//! Parsing goes in order of trust: magic, version, checksum, lengths against bounds, then meaning. Nothing here panics on
//! bytes; nothing allocates more than the input is long.

use crate::error::FormatError;
use crate::format::{crc_without, decode_state, seal};
use crate::raft::bytes::{Put, Reader};
use crate::raft::entry::{ENTRY_BYTES_MAX, LogEntry, NUMBER_MAX, ReplicaId, put_entry, read_entries};
use crate::raft::machine::{Configuration, Machine, Member, Session};
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_types::{ClusterId, NodeId};

/// Name of the log in its directory.
pub const RAFT_LOG_FILE: &str = "raft.log";
/// Name of the snapshot in its directory.
pub const RAFT_SNAPSHOT_FILE: &str = "raft.snapshot";
/// Newest version of the log file.
pub const RAFT_LOG_VERSION: u16 = 1;
/// Newest version of the snapshot file.
pub const RAFT_SNAPSHOT_VERSION: u16 = 4;
/// A frame is closed when its entries reach this size.
pub const FRAME_ENTRIES_BYTES: usize = 4 << 20;
/// Largest payload of a frame.
pub const FRAME_PAYLOAD_MAX: usize = FRAME_ENTRIES_BYTES + ENTRY_BYTES_MAX + FRAME_STATE_BYTES;
/// Most members.
pub const MEMBERS_MAX: usize = 1024;

const LOG_MAGIC: [u8; 8] = *b"XSANRLOG";
const SNAPSHOT_MAGIC: [u8; 8] = *b"XSANRSNP";
const FRAME_MARKER: [u8; 4] = *b"XRLG";

// Both files begin alike.
const VERSION_AT: usize = 8;
const CRC_AT: usize = VERSION_AT + 4;
const CLUSTER_AT: usize = CRC_AT + 4;
const COMMON_BYTES: usize = CLUSTER_AT + 16;
/// Bytes before the first frame of a log.
pub const RAFT_LOG_HEADER_BYTES: usize = COMMON_BYTES + 8 + 8 + 8 + 8;

// A frame.
const FRAME_LENGTH_AT: usize = 4;
const FRAME_NUMBER_AT: usize = FRAME_LENGTH_AT + 4;
const FRAME_CRC_AT: usize = FRAME_NUMBER_AT + 8;
/// Bytes before the payload of a frame.
pub const RAFT_FRAME_HEADER_BYTES: usize = FRAME_CRC_AT + 4;
/// Term, vote, commit and the count of entries.
const FRAME_STATE_BYTES: usize = 8 + 8 + 8 + 4;

const _: () = assert!(RAFT_LOG_HEADER_BYTES == 64 && RAFT_FRAME_HEADER_BYTES == 20);

/// Who a log belongs to and where it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// The cluster.
    pub cluster: ClusterId,
    /// The replica.
    pub replica: ReplicaId,
    /// How often it was started; proposals carry it.
    pub start: u64,
    /// The entry before the first one here, which a snapshot has.
    pub base_index: u64,
    /// Its term.
    pub base_term: u64,
}

/// What a replica must never forget beside its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The newest term it knows.
    pub term: u64,
    /// Who got its vote in that term; 0: nobody.
    pub vote: u64,
    /// Everything up to here was agreed, as far as it knew.
    pub commit: u64,
}

fn file_header(magic: [u8; 8], version: u16, cluster: ClusterId) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RAFT_LOG_HEADER_BYTES);
    bytes.put(&magic);
    bytes.put_u16(version);
    bytes.put(&[0; 2 + 4]);
    bytes.put(&cluster.0.to_le_bytes());
    bytes
}

/// Checks magic and version, in this order, so that a newer file is called newer and not damaged.
fn check_header(bytes: &[u8], file: &'static str, magic: [u8; 8], newest: u16) -> Result<ClusterId, FormatError> {
    let mut reader = Reader::new(bytes);
    if reader.take(8) != Some(&magic) {
        return Err(FormatError::Magic { file });
    }
    let damaged = FormatError::Damaged { file, offset: 0 };
    let Some(found) = reader.u16() else { return Err(damaged) };
    if found == 0 || found > newest {
        return Err(FormatError::Version { file, found, newest });
    }
    reader.take(2 + 4).and_then(|_| reader.u128()).map(ClusterId).ok_or(damaged)
}

fn crc_holds(bytes: &[u8], crc_at: usize) -> bool {
    bytes.get(crc_at..crc_at + 4) == Some(&crc_without(bytes, crc_at).0.to_le_bytes()[..])
}

/// A log with the entries it starts with: the content of a new file.
#[must_use]
pub fn encode_log(header: &LogHeader, state: &HardState, entries: &[LogEntry]) -> Vec<u8> {
    let mut bytes = file_header(LOG_MAGIC, RAFT_LOG_VERSION, header.cluster);
    for number in [header.replica.0, header.start, header.base_index, header.base_term] {
        bytes.put_u64(number);
    }
    seal(&mut bytes, CRC_AT);
    bytes.extend(encode_frames(1, state, entries).concat());
    bytes
}

/// Frames of `state` and `entries`, numbered from `number`; at least one. Each must be flushed before the next is appended.
#[must_use]
pub fn encode_frames(number: u64, state: &HardState, entries: &[LogEntry]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut rest = entries;
    loop {
        let mut body = Vec::new();
        let mut count = 0;
        while let Some(entry) = rest.get(count).filter(|_| body.len() < FRAME_ENTRIES_BYTES) {
            put_entry(&mut body, entry);
            count += 1;
        }
        rest = rest.get(count..).unwrap_or_default();
        let mut bytes = Vec::with_capacity(RAFT_FRAME_HEADER_BYTES + FRAME_STATE_BYTES + body.len());
        bytes.put(&FRAME_MARKER);
        bytes.put_len(FRAME_STATE_BYTES + body.len());
        bytes.put_u64(number + frames.len() as u64);
        bytes.put_u32(0);
        for field in [state.term, state.vote, state.commit] {
            bytes.put_u64(field);
        }
        bytes.put_len(count);
        bytes.put(&body);
        seal(&mut bytes, FRAME_CRC_AT);
        frames.push(bytes);
        if rest.is_empty() {
            return frames;
        }
    }
}

/// A frame whose checksum holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftFrame {
    /// Where it starts in the file.
    pub offset: usize,
    /// Bytes of it, header included.
    pub bytes: usize,
    /// Its number in the file, from 1.
    pub number: u64,
    /// The replica's state with it.
    pub state: HardState,
    /// Entries; the first one replaces whatever stood at its index and behind it.
    pub entries: Vec<LogEntry>,
}

/// The frame at `offset`: `None` if no whole and verified one stands there.
///
/// # Errors
/// `Content`: the checksum holds and the content cannot be read.
pub fn raft_frame_at(log: &[u8], offset: usize) -> Result<Option<RaftFrame>, FormatError> {
    let Some(bytes) = verified_frame(log, offset) else { return Ok(None) };
    read_frame(bytes, offset).map(Some).ok_or(FormatError::Content { file: RAFT_LOG_FILE, offset: offset as u64 })
}

fn verified_frame(log: &[u8], offset: usize) -> Option<&[u8]> {
    let rest = log.get(offset..)?;
    let mut reader = Reader::new(rest);
    if reader.take(4)? != FRAME_MARKER {
        return None;
    }
    let payload = usize::try_from(reader.u32()?).ok().filter(|payload| *payload <= FRAME_PAYLOAD_MAX)?;
    let bytes = rest.get(..RAFT_FRAME_HEADER_BYTES + payload)?;
    crc_holds(bytes, FRAME_CRC_AT).then_some(bytes)
}

fn read_frame(bytes: &[u8], offset: usize) -> Option<RaftFrame> {
    let mut reader = Reader::new(bytes);
    reader.take(FRAME_NUMBER_AT)?;
    let number = reader.u64()?;
    reader.u32()?;
    let state = HardState { term: reader.u64()?, vote: reader.u64()?, commit: reader.u64()? };
    if state.term > NUMBER_MAX || state.commit > NUMBER_MAX {
        return None;
    }
    let entries = read_entries(&mut reader)?;
    reader.end(RaftFrame { offset, bytes: bytes.len(), number, state, entries })
}

/// Where the next verified frame starts, at or after `from`: how a reader goes on behind damage.
#[must_use]
pub fn next_frame_at(log: &[u8], from: usize) -> Option<usize> {
    let mut markers = log.get(from..)?.windows(FRAME_MARKER.len()).enumerate();
    markers.find_map(|(at, window)| {
        (window == FRAME_MARKER && verified_frame(log, from + at).is_some()).then_some(from + at)
    })
}

/// A log as read: its entries after all replacements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftLog {
    /// Whose it is.
    pub header: LogHeader,
    /// The newest state.
    pub state: HardState,
    /// Entries behind the base, without gaps.
    pub entries: Vec<LogEntry>,
    /// Number of frames.
    pub frames: u64,
    /// Where the torn tail starts, or the length of the file.
    pub good_bytes: usize,
}

/// Reads the header of a log.
///
/// # Errors
/// `Magic`, `Version`, `Damaged` (it is written in one piece with the file: a crash cannot tear it).
pub fn decode_raft_log_header(bytes: &[u8]) -> Result<LogHeader, FormatError> {
    let cluster = check_header(bytes, RAFT_LOG_FILE, LOG_MAGIC, RAFT_LOG_VERSION)?;
    let damaged = FormatError::Damaged { file: RAFT_LOG_FILE, offset: 0 };
    let Some(header) = bytes.get(..RAFT_LOG_HEADER_BYTES).filter(|header| crc_holds(header, CRC_AT)) else {
        return Err(damaged);
    };
    let mut reader = Reader::new(header.get(COMMON_BYTES..).unwrap_or_default());
    // The id is 64 random bits; the others are numbers.
    let replica = reader.u64().filter(|id| *id != 0).map(ReplicaId);
    let mut number = || reader.u64().filter(|number| *number <= NUMBER_MAX);
    match (replica, number(), number(), number()) {
        (Some(replica), Some(start), Some(base_index), Some(base_term)) => {
            Ok(LogHeader { cluster, replica, start, base_index, base_term })
        }
        _ => Err(FormatError::Content { file: RAFT_LOG_FILE, offset: COMMON_BYTES as u64 }),
    }
}

/// Reads a log.
///
/// A frame is appended only after the one before it was flushed. So what cannot be verified is a torn tail (nobody was told
/// of it) only if no verified frame follows; else it is damage.
///
/// # Errors
/// Those of the header; `Damaged` in the middle; `Content`; `Gap`.
pub fn decode_raft_log(log: &[u8]) -> Result<RaftLog, FormatError> {
    let header = decode_raft_log_header(log)?;
    let (mut state, mut entries, mut frames) = (HardState::default(), Vec::<LogEntry>::new(), 0);
    let mut at = RAFT_LOG_HEADER_BYTES;
    while at < log.len() {
        let Some(frame) = raft_frame_at(log, at)? else {
            if next_frame_at(log, at).is_some() {
                return Err(FormatError::Damaged { file: RAFT_LOG_FILE, offset: at as u64 });
            }
            break;
        };
        if frame.number != frames + 1 {
            return Err(FormatError::Gap { found: frame.number, expected: frames + 1 });
        }
        frames = frame.number;
        state = frame.state;
        at += frame.bytes;
        for entry in frame.entries {
            let expected = header.base_index + entries.len() as u64 + 1;
            if entry.index <= header.base_index || entry.index > expected {
                return Err(FormatError::Gap { found: entry.index, expected });
            }
            entries.truncate(usize::try_from(entry.index - header.base_index - 1).unwrap_or(usize::MAX));
            let before = entries.last().map_or(header.base_term, |last| last.term);
            if entry.term < before {
                return Err(FormatError::Content { file: RAFT_LOG_FILE, offset: frame.offset as u64 });
            }
            entries.push(entry);
        }
    }
    Ok(RaftLog { header, state, entries, frames, good_bytes: at })
}

fn put_replicas(bytes: &mut Vec<u8>, replicas: &[ReplicaId]) {
    bytes.put_len(replicas.len());
    for replica in replicas {
        bytes.put_u64(replica.0);
    }
}

fn read_replicas(reader: &mut Reader<'_>) -> Option<Vec<ReplicaId>> {
    let count = reader.count(8).filter(|count| *count <= MEMBERS_MAX)?;
    (0..count).map(|_| reader.u64().map(ReplicaId)).collect()
}

/// What a replica knows after some entry.
#[must_use]
pub fn encode_raft_snapshot(machine: &Machine) -> Vec<u8> {
    let mut bytes = file_header(SNAPSHOT_MAGIC, RAFT_SNAPSHOT_VERSION, machine.state.cluster);
    for number in [machine.index, machine.term, machine.digest] {
        bytes.put_u64(number);
    }
    let configuration = &machine.configuration;
    for list in [&configuration.voters, &configuration.learners, &configuration.outgoing, &configuration.learners_next]
    {
        put_replicas(&mut bytes, list);
    }
    bytes.put_len(machine.members.len());
    for (replica, member) in &machine.members {
        bytes.put_u64(replica.0);
        bytes.put_u32(member.node.0);
        bytes.put_u64(member.since);
    }
    bytes.put_len(machine.sessions.len());
    for (replica, session) in &machine.sessions {
        for number in [replica.0, session.start, session.sequence] {
            bytes.put_u64(number);
        }
    }
    let mut bytes = postcard::to_extend(machine.state.as_ref(), bytes).expect("every state can be encoded");
    seal(&mut bytes, CRC_AT);
    bytes
}

/// Reads a snapshot, from a file or from another replica.
///
/// # Errors
/// `Magic`, `Version`, `Damaged` (it is replaced atomically: a crash cannot tear it), `Content`, `Rule`.
pub fn decode_raft_snapshot(bytes: &[u8]) -> Result<Machine, FormatError> {
    let file = RAFT_SNAPSHOT_FILE;
    let cluster = check_header(bytes, file, SNAPSHOT_MAGIC, RAFT_SNAPSHOT_VERSION)?;
    if !crc_holds(bytes, CRC_AT) {
        return Err(FormatError::Damaged { file, offset: 0 });
    }
    let content = FormatError::Content { file, offset: COMMON_BYTES as u64 };
    let version =
        bytes.get(VERSION_AT..VERSION_AT + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes);
    let Some(machine) = read_machine(Reader::new(bytes.get(COMMON_BYTES..).unwrap_or_default()), version) else {
        return Err(content);
    };
    if machine.state.cluster != cluster {
        return Err(content);
    }
    machine.state.check()?;
    Ok(machine)
}

fn read_machine(mut reader: Reader<'_>, version: u16) -> Option<Machine> {
    let (index, term, digest) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let configuration = Configuration {
        voters: read_replicas(&mut reader)?,
        learners: read_replicas(&mut reader)?,
        outgoing: read_replicas(&mut reader)?,
        learners_next: read_replicas(&mut reader)?,
    };
    let mut members = BTreeMap::new();
    for _ in 0..reader.count(20).filter(|count| *count <= MEMBERS_MAX)? {
        let replica = ReplicaId(reader.u64()?);
        let member = Member { node: NodeId(reader.u32()?), since: reader.u64()? };
        let known = configuration.contains(replica) && members.insert(replica, member).is_none();
        known.then_some(())?;
    }
    let mut sessions = BTreeMap::new();
    for _ in 0..reader.count(24).filter(|count| *count <= MEMBERS_MAX)? {
        let replica = ReplicaId(reader.u64()?);
        let session = Session { start: reader.u64()?, sequence: reader.u64()? };
        let known = members.contains_key(&replica) && sessions.insert(replica, session).is_none();
        known.then_some(())?;
    }
    let state = Arc::new(decode_state(reader.rest(), version)?);
    // A replica that has just joined knows nobody; every other one knows a voter, and the entry it stands at.
    let numbers = index <= NUMBER_MAX && term <= NUMBER_MAX && (index == 0) == (term == 0);
    let sound = numbers && configuration.is_sound() && (index == 0) == configuration.voters.is_empty();
    sound.then_some(Machine { index, term, digest, configuration, members, sessions, state })
}
