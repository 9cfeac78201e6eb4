//! Frames: what a connection carries. Bytes: docs/protocol/wire.md.
//!
//! A frame is a header of 40 bytes, a fixed part (the message) and a payload (bulk bytes). [`Input`] finds frames in a byte
//! stream, [`Output`] lays them out for vectored writes. Both are pure: no I/O, no clock.

mod input;
mod output;

pub use input::Input;
pub use output::Output;
pub(crate) use output::fits;

use crate::payload::{Payload, crc_of};
use xsan_types::{Crc32c, SEGMENT_BYTES_MAX};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"XSWF";
/// Layout of the header. Not the wire version: that one is about messages and is agreed on in the handshake.
pub const LAYOUT: u8 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 40;
/// Longest fixed part of a message: a manifest of 130,000 segments, twenty times what a volume has between two checkpoints.
pub const META_BYTES_MAX: u32 = 8 << 20;
/// Longest payload: a whole shard.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
const _: () = assert!(PAYLOAD_BYTES_MAX as u64 == SEGMENT_BYTES_MAX, "a whole shard fits a frame");

/// The receiver may keep the payload in pieces of [`crate::payload::PIECE_BYTES`].
pub const FLAG_PIECES: u8 = 1;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Client: who I am, whom I want. The first frame.
    Hello = 1,
    /// Server: agreed.
    Welcome = 2,
    /// Server: not agreed, with the reason. Nothing follows.
    Refusal = 3,
    /// Client: do this and answer under the same id.
    Request = 4,
    /// Server: the answer.
    Answer = 5,
    /// Client: take note; no answer.
    OneWay = 6,
    /// Client: are you there?
    Ping = 7,
    /// Server: yes.
    Pong = 8,
    /// Server: it ends. What was begun is still answered, nothing new is taken.
    Goodbye = 9,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Refusal,
            4 => Self::Request,
            5 => Self::Answer,
            6 => Self::OneWay,
            7 => Self::Ping,
            8 => Self::Pong,
            9 => Self::Goodbye,
            _ => return None,
        })
    }
}

/// Why a stream is given up. After any of these the place of the next frame is unknown or cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Another protocol.
    #[error("not a frame of this protocol (it begins with {0:02x?}); check address and port")]
    Magic([u8; 4]),
    /// A TLS record where a frame should be.
    #[error("the peer speaks TLS, this side does not; give both sides certificates, or neither")]
    Tls,
    /// A header of another layout.
    #[error("frame layout {0} is not known here (this side knows 1); one of the two releases is too old")]
    Layout(u8),
    /// A kind, flag or reserved field with a value that is not known.
    #[error("a frame header says something that its layout does not know")]
    Header,
    /// Longer than allowed at this point.
    #[error("a frame of {meta} + {payload} bytes is longer than allowed here")]
    TooLarge {
        /// Bytes of the fixed part.
        meta: u32,
        /// Bytes of the payload.
        payload: u32,
    },
    /// Header or fixed part fail their checksum.
    #[error("damaged frame: header or message fail their checksum")]
    HeadDamaged,
    /// The payload fails its checksum.
    #[error("damaged frame: the payload fails its checksum")]
    PayloadDamaged,
    /// A kind of frame that has no business here.
    #[error("a frame of an unexpected kind")]
    Unexpected,
}

/// What is allowed at this point of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Longest fixed part, bytes.
    pub meta_max: u32,
    /// Longest payload, bytes.
    pub payload_max: u32,
}

impl Bounds {
    /// Before anybody is known: a stranger can make us keep 4 KiB.
    pub const HANDSHAKE: Self = Self { meta_max: 4096, payload_max: 0 };
    /// Between peers.
    pub const PEERS: Self = Self { meta_max: META_BYTES_MAX, payload_max: PAYLOAD_BYTES_MAX };
}

/// A frame's header without lengths and checksums, which follow from what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What for.
    pub kind: Kind,
    /// Which service, in requests, answers and one-way messages; else 0.
    pub service: u8,
    /// [`FLAG_PIECES`] or 0.
    pub flags: u8,
    /// Requests and one-way messages: which operation of the service. Answers: the status.
    pub code: u16,
    /// Requests: milliseconds until nobody waits for the answer any more.
    pub deadline_ms: u32,
    /// Requests and their answers; else 0.
    pub id: u64,
}

impl Header {
    /// A header of that kind, all else 0.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        Self { kind, service: 0, flags: 0, code: 0, deadline_ms: 0, id: 0 }
    }
}

/// A header as it came: lengths are within bounds, nothing else is proved before the checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UnverifiedHeader {
    header: Header,
    meta_bytes: u32,
    payload_bytes: u32,
    payload_crc: Crc32c,
    head_crc: Crc32c,
}

const CRC_AT: usize = 36;

/// Appends header and fixed part; `meta` writes the latter.
pub(crate) fn put_head(out: &mut Vec<u8>, header: &Header, payload: &Payload, meta: impl FnOnce(&mut Vec<u8>)) {
    put_head_with(out, header, payload.bytes(), payload.crc(), meta);
}

/// The same for a payload whose length and checksum are known.
pub(crate) fn put_head_with(
    out: &mut Vec<u8>,
    header: &Header,
    payload_bytes: usize,
    payload_crc: Crc32c,
    meta: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    meta(out);
    let head = &mut out[start..];
    // Beyond these bounds the frame is not sent: see `fits`.
    let meta_bytes = u32::try_from(head.len() - HEADER_BYTES).unwrap_or(u32::MAX);
    let payload_bytes = u32::try_from(payload_bytes).unwrap_or(u32::MAX);
    head[0..4].copy_from_slice(&MAGIC);
    head[4] = LAYOUT;
    head[5] = header.kind as u8;
    head[6] = header.service;
    head[7] = header.flags;
    head[8..10].copy_from_slice(&header.code.to_le_bytes());
    head[12..16].copy_from_slice(&header.deadline_ms.to_le_bytes());
    head[16..24].copy_from_slice(&header.id.to_le_bytes());
    head[24..28].copy_from_slice(&meta_bytes.to_le_bytes());
    head[28..32].copy_from_slice(&payload_bytes.to_le_bytes());
    head[32..36].copy_from_slice(&payload_crc.0.to_le_bytes());
    let crc = head_crc(&head[..CRC_AT], &head[HEADER_BYTES..]);
    head[CRC_AT..HEADER_BYTES].copy_from_slice(&crc.0.to_le_bytes());
}

fn head_crc(header: &[u8], meta: &[u8]) -> Crc32c {
    crc_of([header, meta].into_iter())
}

fn word(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl UnverifiedHeader {
    /// In the order of trust: magic, layout, lengths; the checksum is compared when the fixed part is there.
    fn parse(bytes: &[u8; HEADER_BYTES], bounds: Bounds) -> Result<Self, FrameError> {
        let (meta_bytes, payload_bytes) = (word(bytes, 24), word(bytes, 28));
        if meta_bytes > bounds.meta_max || payload_bytes > bounds.payload_max {
            return Err(FrameError::TooLarge { meta: meta_bytes, payload: payload_bytes });
        }
        let Some(kind) = Kind::from_number(bytes[5]) else { return Err(FrameError::Header) };
        if bytes[7] & !FLAG_PIECES != 0 || bytes[10..12] != [0, 0] {
            return Err(FrameError::Header);
        }
        let id = u64::from(word(bytes, 16)) | u64::from(word(bytes, 20)) << 32;
        let code = u16::from_le_bytes([bytes[8], bytes[9]]);
        let header = Header { kind, service: bytes[6], flags: bytes[7], code, deadline_ms: word(bytes, 12), id };
        let (payload_crc, head_crc) = (Crc32c(word(bytes, 32)), Crc32c(word(bytes, CRC_AT)));
        Ok(Self { header, meta_bytes, payload_bytes, payload_crc, head_crc })
    }
}

/// Looks at the first bytes of a frame as far as they are there: strangers are told apart before a whole header came.
fn check_beginning(bytes: &[u8]) -> Result<(), FrameError> {
    let count = bytes.len().min(MAGIC.len());
    if bytes[..count] != MAGIC[..count] {
        // A TLS record: handshake or alert, version 3.x.
        if matches!(bytes, [0x14..=0x17, 0x03, ..]) {
            return Err(FrameError::Tls);
        }
        let mut found = [0; 4];
        found[..count].copy_from_slice(&bytes[..count]);
        return Err(FrameError::Magic(found));
    }
    match bytes.get(4) {
        Some(&layout) if layout != LAYOUT => Err(FrameError::Layout(layout)),
        _ => Ok(()),
    }
}

/// A frame that passed its checksums.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Its fixed part.
    pub meta: &'a [u8],
    /// Its bulk bytes, in aligned memory.
    pub payload: Payload,
}

#[cfg(test)]
mod tests;
