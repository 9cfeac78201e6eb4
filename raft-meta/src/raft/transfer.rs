//! Snapshots on their way, piece by piece: one piece is under way, an answer brings the next, silence brings it again, and too
//! much silence ends the transfer (the agreement starts another when the follower is heard of). Pure; time is counted in ticks.

use crate::raft::entry::ReplicaId;
use crate::raft::message::{Body, CHUNK_BYTES_MAX};
use std::sync::Arc;

/// Ticks after which a piece without answer is sent again.
const RESEND_TICKS: u32 = 3;

/// A snapshot being sent.
pub(crate) struct Outgoing {
    pub(crate) index: u64,
    bytes: Arc<[u8]>,
    /// What the receiver has, as far as it said.
    offset: usize,
    quiet_ticks: u32,
}

/// What silence leads to.
pub(crate) enum Quiet {
    Wait,
    Resend,
    GiveUp,
}

impl Outgoing {
    pub(crate) fn new(index: u64, bytes: Arc<[u8]>) -> Self {
        Self { index, bytes, offset: 0, quiet_ticks: 0 }
    }

    /// The piece to send now.
    pub(crate) fn piece(&self, term: u64) -> Body {
        let end = self.bytes.len().min(self.offset + CHUNK_BYTES_MAX);
        let bytes = self.bytes.get(self.offset..end).unwrap_or_default().to_vec();
        Body::Chunk { term, index: self.index, total: self.bytes.len() as u64, offset: self.offset as u64, bytes }
    }

    /// The receiver has so much: whether that is news.
    pub(crate) fn received(&mut self, received: u64) -> bool {
        let Ok(received) = usize::try_from(received) else { return false };
        // Only progress counts: an answer that comes twice must not make two pieces.
        let news = received > self.offset && received <= self.bytes.len();
        if news {
            self.offset = received;
            self.quiet_ticks = 0;
        }
        news
    }

    pub(crate) fn is_done(&self) -> bool {
        self.offset == self.bytes.len()
    }

    pub(crate) fn tick(&mut self, give_up_ticks: u32) -> Quiet {
        self.quiet_ticks += 1;
        if self.quiet_ticks >= give_up_ticks {
            Quiet::GiveUp
        } else if self.quiet_ticks.is_multiple_of(RESEND_TICKS) {
            Quiet::Resend
        } else {
            Quiet::Wait
        }
    }
}

/// A snapshot being received. Memory grows with what has come, not with what was announced.
pub(crate) struct Incoming {
    pub(crate) from: ReplicaId,
    pub(crate) index: u64,
    total: u64,
    bytes: Vec<u8>,
}

/// What a piece led to.
pub(crate) enum Received {
    /// It belongs to nothing.
    Stray,
    /// So much is here.
    Partly(u64),
    /// All of it.
    Whole(Vec<u8>),
}

/// Takes a piece. A new snapshot, or one from another sender, replaces what was under way.
pub(crate) fn receive(
    incoming: &mut Option<Incoming>,
    (from, index, total): (ReplicaId, u64, u64),
    offset: u64,
    piece: &[u8],
) -> Received {
    let same = |known: &Incoming| (known.from, known.index, known.total) == (from, index, total);
    if !incoming.as_ref().is_some_and(same) {
        if offset != 0 {
            return Received::Stray;
        }
        *incoming = Some(Incoming { from, index, total, bytes: Vec::new() });
    }
    let Some(known) = incoming else { return Received::Stray };
    if known.bytes.len() as u64 == offset {
        known.bytes.extend_from_slice(piece);
    }
    if (known.bytes.len() as u64) < total {
        return Received::Partly(known.bytes.len() as u64);
    }
    incoming.take().map_or(Received::Stray, |known| Received::Whole(known.bytes))
}
