//! Bytes of the metadata log and snapshot, and of commands. The byte tables stand in docs/format/meta.md.
//!
//! Parsing goes in order of trust: magic, version, checksum, lengths against bounds, then meaning. Nothing here panics on
//! bytes; nothing allocates more than the input is long.

use crate::addresses::AddressRecord;
use crate::command::Command;
use crate::error::FormatError;
use crate::hosts::Hosts;
use crate::single::{LOG_FILE, SNAPSHOT_FILE};
use crate::state::MetaState;
use std::collections::{BTreeMap, BTreeSet};
use xsan_types::{ClusterId, Crc32c, DeviceId, PoolId, VolumeId, crc32c};

/// Newest version of the envelope around a command.
pub const COMMAND_VERSION: u16 = 1;
/// Newest version of the log file.
pub const LOG_VERSION: u16 = 1;
/// Newest version of the snapshot file.
pub const SNAPSHOT_VERSION: u16 = 4;
/// Largest encoded command.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// Largest payload of a frame; a writer closes a batch long before.
pub const FRAME_PAYLOAD_MAX: usize = 8 << 20;

const LOG_MAGIC: [u8; 8] = *b"XSANMLOG";
const SNAPSHOT_MAGIC: [u8; 8] = *b"XSANMSNP";
const FRAME_MARKER: [u8; 4] = *b"XMLG";

// Both files begin alike.
const VERSION_AT: usize = 8;
const CRC_AT: usize = VERSION_AT + 4;
const CLUSTER_AT: usize = CRC_AT + 4;
/// Bytes before the first frame of a log.
pub const LOG_HEADER_BYTES: usize = CLUSTER_AT + 16;
const SNAPSHOT_INDEX_AT: usize = LOG_HEADER_BYTES;
const SNAPSHOT_LENGTH_AT: usize = SNAPSHOT_INDEX_AT + 8;
/// Bytes before the state of a snapshot.
pub const SNAPSHOT_HEADER_BYTES: usize = SNAPSHOT_LENGTH_AT + 8;

// A frame.
const FRAME_LENGTH_AT: usize = 4;
const FRAME_INDEX_AT: usize = FRAME_LENGTH_AT + 4;
const FRAME_COUNT_AT: usize = FRAME_INDEX_AT + 8;
const FRAME_CRC_AT: usize = FRAME_COUNT_AT + 4;
/// Bytes before the entries of a frame.
pub const FRAME_HEADER_BYTES: usize = FRAME_CRC_AT + 4;
const ENTRY_HEADER_BYTES: usize = 4;

const _: () = assert!(LOG_HEADER_BYTES == 32 && SNAPSHOT_HEADER_BYTES == 48 && FRAME_HEADER_BYTES == 24);
const _: () = assert!(COMMAND_BYTES_MAX + ENTRY_HEADER_BYTES <= FRAME_PAYLOAD_MAX);

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_le_bytes)
}

/// CRC of `bytes` with the four bytes at `crc_at` taken as zeroes.
pub(crate) fn crc_without(bytes: &[u8], crc_at: usize) -> Crc32c {
    let mut copy = bytes.to_vec();
    if let Some(field) = copy.get_mut(crc_at..crc_at + 4) {
        field.fill(0);
    }
    crc32c(&copy)
}

/// Writes the CRC of `bytes` into its field, which is zero so far.
pub(crate) fn seal(bytes: &mut [u8], crc_at: usize) {
    let crc = crc32c(bytes);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.0.to_le_bytes());
}

/// A command in its envelope.
#[must_use]
pub fn encode_command(command: &Command) -> Vec<u8> {
    postcard::to_extend(command, COMMAND_VERSION.to_le_bytes().to_vec()).expect("every command can be encoded")
}

/// Checksum of a command's content: tells a repeat from another command under the same token.
#[must_use]
pub fn command_digest(command: &Command) -> Crc32c {
    crc32c(&encode_command(command))
}

/// Reads an envelope. `offset` is its place in the log, for the error.
///
/// # Errors
/// `Version` of a newer release; `Content`.
pub fn decode_command(envelope: &[u8], offset: u64) -> Result<Command, FormatError> {
    let content = FormatError::Content { file: LOG_FILE, offset };
    let Some((version, payload)) = u16_at(envelope, 0).zip(envelope.get(2..)) else { return Err(content) };
    match version {
        1 => match postcard::take_from_bytes(payload) {
            Ok((command, [])) => Ok(command),
            _ => Err(content),
        },
        found => Err(FormatError::Version { file: "command", found, newest: COMMAND_VERSION }),
    }
}

/// The first 32 bytes of both files, CRC field empty.
fn file_header(magic: [u8; 8], version: u16, cluster: ClusterId) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SNAPSHOT_HEADER_BYTES);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&[0; 2 + 4]);
    bytes.extend_from_slice(&cluster.0.to_le_bytes());
    bytes
}

fn check_file_header(bytes: &[u8], file: &'static str, magic: [u8; 8], newest: u16) -> Result<ClusterId, FormatError> {
    if array_at::<8>(bytes, 0) != Some(magic) {
        return Err(FormatError::Magic { file });
    }
    let damaged = || FormatError::Damaged { file, offset: 0 };
    let found = u16_at(bytes, VERSION_AT).ok_or_else(damaged)?;
    if found == 0 || found > newest {
        return Err(FormatError::Version { file, found, newest });
    }
    array_at(bytes, CLUSTER_AT).map(|id| ClusterId(u128::from_le_bytes(id))).ok_or_else(damaged)
}

/// An empty log: its header.
#[must_use]
pub fn encode_log_header(cluster: ClusterId) -> Vec<u8> {
    let mut bytes = file_header(LOG_MAGIC, LOG_VERSION, cluster);
    seal(&mut bytes, CRC_AT);
    bytes
}

/// Reads the header of a log.
///
/// # Errors
/// `Magic`, `Version`, `Damaged` (it is written in one piece with the file: a crash cannot tear it).
pub fn decode_log_header(bytes: &[u8]) -> Result<ClusterId, FormatError> {
    let cluster = check_file_header(bytes, LOG_FILE, LOG_MAGIC, LOG_VERSION)?;
    let header = bytes.get(..LOG_HEADER_BYTES).unwrap_or_default();
    if u32_at(header, CRC_AT) != Some(crc_without(header, CRC_AT).0) {
        return Err(FormatError::Damaged { file: LOG_FILE, offset: 0 });
    }
    Ok(cluster)
}

/// A batch of commands, numbered from `first_index`, as one unit of the log: written and flushed as a whole.
///
/// # Panics
/// If the batch is larger than a frame may be: the writer closes it before.
#[must_use]
pub fn encode_frame(first_index: u64, envelopes: &[Vec<u8>]) -> Vec<u8> {
    let payload: usize = envelopes.iter().map(|envelope| ENTRY_HEADER_BYTES + envelope.len()).sum();
    assert!(payload <= FRAME_PAYLOAD_MAX, "a batch of {payload} bytes");
    let u32_of = |number: usize| u32::try_from(number).expect("bounded by FRAME_PAYLOAD_MAX").to_le_bytes();
    let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + payload);
    bytes.extend_from_slice(&FRAME_MARKER);
    bytes.extend_from_slice(&u32_of(payload));
    bytes.extend_from_slice(&first_index.to_le_bytes());
    bytes.extend_from_slice(&u32_of(envelopes.len()));
    bytes.extend_from_slice(&[0; 4]);
    for envelope in envelopes {
        bytes.extend_from_slice(&u32_of(envelope.len()));
        bytes.extend_from_slice(envelope);
    }
    seal(&mut bytes, FRAME_CRC_AT);
    bytes
}

/// A frame whose checksum holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Where it starts in the file.
    pub offset: usize,
    /// Bytes of it, header included.
    pub bytes: usize,
    /// Number of its first command.
    pub first_index: u64,
    /// Its envelopes with their offsets in the file.
    pub envelopes: Vec<(usize, &'a [u8])>,
}

impl Frame<'_> {
    /// Number of the command after its last.
    #[must_use]
    pub fn next_index(&self) -> u64 {
        self.first_index.saturating_add(self.envelopes.len() as u64)
    }
}

/// The frame at `offset`, if a whole and verified one stands there.
#[must_use]
pub fn frame_at(log: &[u8], offset: usize) -> Option<Frame<'_>> {
    let rest = log.get(offset..)?;
    if array_at::<4>(rest, 0)? != FRAME_MARKER {
        return None;
    }
    let payload = usize::try_from(u32_at(rest, FRAME_LENGTH_AT)?).ok()?;
    if payload > FRAME_PAYLOAD_MAX {
        return None;
    }
    let bytes = rest.get(..FRAME_HEADER_BYTES + payload)?;
    if u32_at(bytes, FRAME_CRC_AT)? != crc_without(bytes, FRAME_CRC_AT).0 {
        return None;
    }
    let mut envelopes = Vec::new();
    let mut at = FRAME_HEADER_BYTES;
    while at < bytes.len() {
        let length = usize::try_from(u32_at(bytes, at)?).ok()?;
        at += ENTRY_HEADER_BYTES;
        envelopes.push((offset + at, bytes.get(at..at.checked_add(length)?)?));
        at += length;
    }
    let first_index = u64_at(bytes, FRAME_INDEX_AT)?;
    let counted = u32_at(bytes, FRAME_COUNT_AT)? as usize == envelopes.len();
    counted.then_some(Frame { offset, bytes: bytes.len(), first_index, envelopes })
}

/// The next verified frame at or after `from`: how a reader goes on behind damage.
#[must_use]
pub fn next_frame(log: &[u8], from: usize) -> Option<Frame<'_>> {
    let markers = log.get(from..)?.windows(FRAME_MARKER.len()).enumerate();
    markers.filter(|(_, window)| *window == FRAME_MARKER).find_map(|(at, _)| frame_at(log, from + at))
}

/// A log as opened: whole frames, then perhaps a torn tail.
#[derive(Debug)]
pub struct Log<'a> {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its frames in order.
    pub frames: Vec<Frame<'a>>,
    /// Where the torn tail starts, or the length of the file.
    pub good_bytes: usize,
}

/// Reads a log.
///
/// A frame is appended only after the one before it was flushed. So what cannot be verified is a torn tail (never
/// acknowledged) only if no verified frame follows; else it is damage.
///
/// # Errors
/// Those of the header; `Damaged` in the middle; `Gap`.
pub fn decode_log(log: &[u8]) -> Result<Log<'_>, FormatError> {
    let cluster = decode_log_header(log)?;
    let mut frames: Vec<Frame<'_>> = Vec::new();
    let mut at = LOG_HEADER_BYTES;
    while at < log.len() {
        let Some(frame) = frame_at(log, at) else {
            if next_frame(log, at).is_some() {
                return Err(FormatError::Damaged { file: LOG_FILE, offset: at as u64 });
            }
            break;
        };
        if let Some(expected) = frames.last().map(Frame::next_index)
            && frame.first_index != expected
        {
            return Err(FormatError::Gap { found: frame.first_index, expected });
        }
        at += frame.bytes;
        frames.push(frame);
    }
    Ok(Log { cluster, frames, good_bytes: at })
}

/// The state after command `last_index`.
#[must_use]
pub fn encode_snapshot(state: &MetaState, last_index: u64) -> Vec<u8> {
    let mut bytes = file_header(SNAPSHOT_MAGIC, SNAPSHOT_VERSION, state.cluster);
    bytes.extend_from_slice(&last_index.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    let mut bytes = postcard::to_extend(state, bytes).expect("every state can be encoded");
    let payload = (bytes.len() - SNAPSHOT_HEADER_BYTES) as u64;
    bytes[SNAPSHOT_LENGTH_AT..SNAPSHOT_HEADER_BYTES].copy_from_slice(&payload.to_le_bytes());
    seal(&mut bytes, CRC_AT);
    bytes
}

/// The state in a snapshot of version `version`, which it fills to the end. Both kinds of snapshot count versions alike.
///
/// Version 1 ends before the hosts, version 2 before what moves have emptied, version 3 before addresses and lost devices: nothing was
/// known of any.
pub(crate) fn decode_state(payload: &[u8], version: u16) -> Option<MetaState> {
    let mut whole = std::borrow::Cow::Borrowed(payload);
    if version < 2 {
        whole = postcard::to_extend(&Hosts::default(), whole.into_owned()).ok()?.into();
    }
    if version < 3 {
        let moves: (BTreeMap<PoolId, BTreeSet<DeviceId>>, BTreeSet<DeviceId>) = Default::default();
        whole = postcard::to_extend(&moves, whole.into_owned()).ok()?.into();
    }
    if version < 4 {
        let rest: (BTreeMap<VolumeId, AddressRecord>, BTreeSet<DeviceId>) = Default::default();
        whole = postcard::to_extend(&rest, whole.into_owned()).ok()?.into();
    }
    let (state, rest): (MetaState, &[u8]) = postcard::take_from_bytes(&whole).ok()?;
    rest.is_empty().then_some(state)
}

/// Reads a snapshot: the state and the number of the last command in it.
///
/// # Errors
/// `Magic`, `Version`, `Damaged` (it is replaced atomically: a crash cannot tear it), `Content`, `Rule`.
pub fn decode_snapshot(bytes: &[u8]) -> Result<(MetaState, u64), FormatError> {
    let file = SNAPSHOT_FILE;
    let cluster = check_file_header(bytes, file, SNAPSHOT_MAGIC, SNAPSHOT_VERSION)?;
    if u32_at(bytes, CRC_AT) != Some(crc_without(bytes, CRC_AT).0) {
        return Err(FormatError::Damaged { file, offset: 0 });
    }
    let content = || FormatError::Content { file, offset: SNAPSHOT_HEADER_BYTES as u64 };
    let index = u64_at(bytes, SNAPSHOT_INDEX_AT).ok_or_else(content)?;
    let payload = bytes.get(SNAPSHOT_HEADER_BYTES..).ok_or_else(content)?;
    if u64_at(bytes, SNAPSHOT_LENGTH_AT) != Some(payload.len() as u64) {
        return Err(content());
    }
    let version = u16_at(bytes, VERSION_AT).ok_or_else(content)?;
    let state = decode_state(payload, version).filter(|state| state.cluster == cluster).ok_or_else(content)?;
    state.check()?;
    Ok((state, index))
}
