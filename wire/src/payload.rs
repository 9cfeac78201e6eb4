//! The bulk bytes of a frame: buffers that go from the caller to the socket, and from the socket to the device, as they are.

use xsan_env::{Buf, BufMut, BufPool};
use xsan_types::Crc32c;

/// Pieces that a payload is received in when its frame allows it: the largest class of the pool, so that a shard needs no
/// memory outside of it.
pub const PIECE_BYTES: usize = 1 << 20;

/// Bytes beside a message's fixed part, in order.
#[derive(Clone, Debug, Default)]
pub enum Payload {
    /// No bytes.
    #[default]
    None,
    /// In one piece.
    One(Buf),
    /// In several.
    Pieces(Vec<Buf>),
}

impl Payload {
    /// All pieces in order.
    #[must_use]
    pub fn pieces(&self) -> &[Buf] {
        match self {
            Self::None => &[],
            Self::One(buf) => std::slice::from_ref(buf),
            Self::Pieces(pieces) => pieces,
        }
    }

    /// Bytes in all pieces.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }

    /// The bytes in one piece: copied together only if they are not (which no sender of this crate does).
    #[must_use]
    pub fn into_one(self, pool: &BufPool) -> Buf {
        match self {
            Self::None => Buf::new(),
            Self::One(buf) => buf,
            Self::Pieces(mut pieces) if pieces.len() <= 1 => pieces.pop().unwrap_or_default(),
            Self::Pieces(pieces) => {
                let mut whole = pool.get(pieces.iter().map(|piece| piece.len()).sum());
                let mut at = 0;
                for piece in pieces {
                    whole[at..at + piece.len()].copy_from_slice(&piece);
                    at += piece.len();
                }
                whole.freeze()
            }
        }
    }

    /// The bytes in pieces.
    #[must_use]
    pub fn into_pieces(self) -> Vec<Buf> {
        match self {
            Self::None => Vec::new(),
            Self::One(buf) => vec![buf],
            Self::Pieces(pieces) => pieces,
        }
    }

    /// CRC-32C over all pieces; 0 for no bytes.
    #[must_use]
    pub fn crc(&self) -> Crc32c {
        crc_of(self.pieces().iter().map(|piece| &**piece))
    }
}

impl From<Buf> for Payload {
    fn from(buf: Buf) -> Self {
        if buf.is_empty() { Self::None } else { Self::One(buf) }
    }
}

impl From<Vec<Buf>> for Payload {
    fn from(pieces: Vec<Buf>) -> Self {
        if pieces.is_empty() { Self::None } else { Self::Pieces(pieces) }
    }
}

/// CRC-32C over several runs of bytes.
pub(crate) fn crc_of<'a>(runs: impl Iterator<Item = &'a [u8]>) -> Crc32c {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for run in runs {
        digest.update(run);
    }
    // A CRC of 32 bits in a u64.
    Crc32c(u32::try_from(digest.finalize()).unwrap_or(u32::MAX))
}

/// A payload on its way in: memory from the pool, filled front to back. Later pieces are taken only when their bytes come.
pub(crate) struct Incoming {
    pool: BufPool,
    done: Vec<Buf>,
    current: BufMut,
    /// Filled part of the current piece.
    at: usize,
    left: usize,
}

impl Incoming {
    /// Room for `bytes`, aligned to 4096; in pieces if `in_pieces`.
    pub(crate) fn new(pool: &BufPool, bytes: usize, in_pieces: bool) -> Self {
        let first = if in_pieces { bytes.min(PIECE_BYTES) } else { bytes };
        Self { pool: pool.clone(), done: Vec::new(), current: pool.get(first), at: 0, left: bytes }
    }

    /// Bytes that have not come yet.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Where the next bytes go; empty when all are there.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.current[self.at..]
    }

    /// `count` bytes were put into [`Incoming::room`].
    pub(crate) fn filled(&mut self, count: usize) {
        self.at += count;
        self.left = self.left.saturating_sub(count);
        if self.at == self.current.len() && self.left > 0 {
            let next = self.pool.get(self.left.min(PIECE_BYTES));
            self.done.push(std::mem::replace(&mut self.current, next).freeze());
            self.at = 0;
        }
    }

    /// Takes from `bytes` what still fits; answers how many.
    pub(crate) fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() && self.left > 0 {
            let room = self.room();
            let count = room.len().min(bytes.len() - taken);
            room[..count].copy_from_slice(&bytes[taken..taken + count]);
            self.filled(count);
            taken += count;
        }
        taken
    }

    /// All bytes, when none is left to come.
    pub(crate) fn finish(mut self) -> Payload {
        if self.done.is_empty() {
            return Payload::One(self.current.freeze());
        }
        self.done.push(self.current.freeze());
        Payload::Pieces(self.done)
    }
}
