//! From a segment's bytes to its shards: units cut out, parity computed, hashes fed, a slice of work at a time.

use crate::pool::Shared;
use crate::task::Pacer;
use lsm_block::store::StoreError;
use xsan_env::{Buf, BufMut, BufPool};
use xsan_erasure::{Codec, SHARD_ALIGN, Stripe};

/// Alignment of what devices take.
const ALIGN: usize = SHARD_ALIGN as usize;
/// A unit in more pieces than this is copied together: so many small entries in a device's request cost more than a copy.
const PIECES_MAX: usize = 8;
/// Replicas are cut in steps of this, for copying and hashing.
const STEP_BYTES: u64 = 256 << 10;

/// A shard ready to be written.
#[derive(Clone)]
pub(crate) struct Encoded {
    /// BLAKE3 of all bytes.
    pub(crate) hash: [u8; 32],
    /// The bytes: pieces aligned to 4096 in memory and length.
    pub(crate) data: Vec<Buf>,
}

/// The bytes of a segment, in pieces.
pub(crate) struct Body {
    pieces: Vec<Buf>,
    /// Where each piece begins.
    starts: Vec<u64>,
    length: u64,
}

impl Body {
    /// The concatenation of `pieces`.
    pub(crate) fn new(pieces: Vec<Buf>) -> Self {
        let mut length = 0;
        let starts = pieces
            .iter()
            .map(|piece| {
                let start = length;
                length += piece.len() as u64;
                start
            })
            .collect();
        Self { pieces, starts, length }
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// The pieces of `bytes` bytes from `offset`, without copying; fewer bytes where the segment ends.
    fn slices(&self, offset: u64, bytes: u64) -> Vec<Buf> {
        let end = (offset + bytes).min(self.length);
        // The last piece that begins at or before the offset; empty pieces are passed over below.
        let first = self.starts.partition_point(|&start| start <= offset).saturating_sub(1);
        let mut found = Vec::new();
        for (piece, &start) in self.pieces.iter().zip(&self.starts).skip(first) {
            if start >= end {
                break;
            }
            let from = offset.max(start) - start;
            let to = (end - start).min(piece.len() as u64);
            if from < to {
                found.push(piece.slice(from as usize..to as usize));
            }
        }
        found
    }

    /// `bytes` bytes from `offset` in the form devices take, zeroes behind the segment's end. The caller's memory where it
    /// is aligned, a copy where it is not; the second value is how much was copied or cleared.
    pub(crate) fn unit(&self, bufs: &BufPool, offset: u64, bytes: usize) -> (Vec<Buf>, usize) {
        let slices = self.slices(offset, bytes as u64);
        let found: usize = slices.iter().map(|piece| piece.len()).sum();
        if found == bytes && slices.len() <= PIECES_MAX && slices.iter().all(|piece| piece.is_aligned(ALIGN)) {
            return (slices, 0);
        }
        let mut copy = bufs.get(bytes);
        let mut at = 0;
        for piece in &slices {
            copy[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        copy[at..].fill(0);
        (vec![copy.freeze()], bytes)
    }
}

/// Computes parity of one row. `data` are the k units, each in pieces; `parity` the m results. All have the same length.
pub(crate) fn encode_row(codec: &Codec, data: &[Vec<Buf>], parity: &mut [BufMut]) -> Result<(), StoreError> {
    let unit = parity.first().map_or(0, |shard| shard.len());
    // (piece, byte inside it) per shard. Usually every unit is one piece and the loop runs once.
    let mut cursors = vec![(0usize, 0usize); data.len()];
    let mut inputs: Vec<&[u8]> = Vec::with_capacity(data.len());
    let mut at = 0;
    while at < unit {
        inputs.clear();
        let mut step = unit - at;
        for (pieces, &(piece, inside)) in data.iter().zip(&cursors) {
            let rest = pieces.get(piece).and_then(|bytes| bytes.get(inside..)).ok_or(StoreError::Internal)?;
            step = step.min(rest.len());
            inputs.push(rest);
        }
        inputs.iter_mut().for_each(|bytes| *bytes = &bytes[..step]);
        let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(|shard| &mut shard[at..at + step]).collect();
        codec.encode(&inputs, &mut outputs).map_err(|_| StoreError::Internal)?;
        for (pieces, cursor) in data.iter().zip(&mut cursors) {
            cursor.1 += step;
            if pieces.get(cursor.0).is_some_and(|bytes| cursor.1 == bytes.len()) {
                *cursor = (cursor.0 + 1, 0);
            }
        }
        at += step;
    }
    Ok(())
}

/// Computes all shards of a segment; k + m of them, or one for a `replica(n)`, whose copies are all the same.
pub(crate) async fn encode(shared: &Shared, stripe: &Stripe, body: &Body) -> Result<Vec<Encoded>, StoreError> {
    if stripe.scheme().is_replica() {
        encode_replica(shared, stripe, body).await
    } else {
        encode_rs(shared, stripe, body).await
    }
}

async fn encode_replica(shared: &Shared, stripe: &Stripe, body: &Body) -> Result<Vec<Encoded>, StoreError> {
    let (mut pacer, mut hasher, mut data) = (Pacer::default(), blake3::Hasher::new(), Vec::new());
    let mut offset = 0;
    while offset < stripe.shard_bytes() {
        let bytes = STEP_BYTES.min(stripe.shard_bytes() - offset);
        let (pieces, copied) = body.unit(&shared.bufs, offset, bytes as usize);
        pieces.iter().for_each(|piece| _ = hasher.update(piece));
        data.extend(pieces);
        offset += bytes;
        pacer.spend(bytes as usize + copied).await;
    }
    Ok(vec![Encoded { hash: hasher.finalize().into(), data }])
}

async fn encode_rs(shared: &Shared, stripe: &Stripe, body: &Body) -> Result<Vec<Encoded>, StoreError> {
    let (k, width) = (stripe.k(), stripe.scheme().width());
    let mut pacer = Pacer::default();
    let mut shards: Vec<(blake3::Hasher, Vec<Buf>)> = (0..width).map(|_| (blake3::Hasher::new(), Vec::new())).collect();
    for row in stripe.rows() {
        let unit = row.unit as usize;
        let mut units: Vec<Vec<Buf>> = Vec::with_capacity(width);
        for shard in 0..k as u64 {
            let (pieces, copied) = body.unit(&shared.bufs, row.segment_offset + shard * row.unit, unit);
            units.push(pieces);
            pacer.spend(copied).await;
        }
        let mut parity: Vec<BufMut> = (k..width).map(|_| shared.bufs.get(unit)).collect();
        encode_row(&shared.codec, &units, &mut parity)?;
        units.extend(parity.into_iter().map(|shard| vec![shard.freeze()]));
        pacer.spend(k * unit).await;
        for ((hasher, data), pieces) in shards.iter_mut().zip(units) {
            pieces.iter().for_each(|piece| _ = hasher.update(piece));
            data.extend(pieces);
            pacer.spend(unit).await;
        }
    }
    Ok(shards.into_iter().map(|(hasher, data)| Encoded { hash: hasher.finalize().into(), data }).collect())
}

/// The shard of a position out of what [`encode`] gave.
pub(crate) fn shard_of(shards: &[Encoded], index: usize) -> Option<&Encoded> {
    if shards.len() == 1 { shards.first() } else { shards.get(index) }
}
