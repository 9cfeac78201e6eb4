//! Bytes whose own device is away, late or wrong, out of any k other shards.
//!
//! The same range of any k shards gives the same range of every shard. Sources are not verified one by one (their
//! checksums belong to other blocks): the result is, and if it is wrong, other sets of k are tried until it is right
//! (R6). Bounds: sources of one range at a time, [`SETS_MAX`] sets.

use crate::read::{BLOCK, Reading, ShardRead, Unit, UnitCheck};
use crate::repair;
use futures::stream::{FuturesUnordered, StreamExt};
use lsm_block::store::{SegmentRead, StoreError};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;
use xsan_env::{Buf, BufMut, yield_now};
use xsan_erasure::Stripe;
use xsan_types::{Crc32c, ShardIndex, crc32c};
use xsan_wire::node::NodeError;

/// Sets of k sources tried before a range counts as lost: all of them up to rs(8,4), and then enough for any one bad source.
const SETS_MAX: usize = 1024;

/// How long shards beyond the first k are waited for, when those gave something wrong.
const EXTRA_WAIT: Duration = Duration::from_secs(1);

/// What is known of the unit's own shard.
pub(crate) enum Own {
    /// Its device gave these bytes; some are wrong.
    Wrong(Buf),
    /// Its device cannot read them.
    Unreadable,
    /// Its device does not have the shard.
    Missing,
    /// Its device does not answer, or there is none.
    Away,
    /// Its device has not answered yet; somebody else is waiting for it.
    Pending,
}

/// Bytes of a shard that are in memory already, verified.
pub(crate) struct Column {
    pub(crate) index: usize,
    pub(crate) offset: u64,
    pub(crate) buf: Buf,
}

/// Why sources are not there.
#[derive(Default)]
struct Lost {
    /// Does not answer, no device, or the device does not have it: may come back.
    away: usize,
    /// Of them: the device answered that it does not have it.
    missing: usize,
    /// The device cannot read them.
    unreadable: Vec<usize>,
}

/// The same range of several shards.
struct Sources<'a> {
    reading: &'a Reading,
    offset: u64,
    bytes: usize,
    found: Vec<(usize, Buf)>,
    candidates: VecDeque<usize>,
    lost: Lost,
}

impl<'a> Sources<'a> {
    /// All shards but `except` may be asked; what `have` holds of them is not asked for again.
    fn new(reading: &'a Reading, except: Option<usize>, offset: u64, bytes: usize, have: &[Column]) -> Self {
        let mut sources =
            Self { reading, offset, bytes, found: Vec::new(), candidates: VecDeque::new(), lost: Lost::default() };
        let mut candidates: Vec<(bool, u32, usize)> = Vec::new();
        for index in (0..reading.shared.scheme().width()).filter(|&index| Some(index) != except) {
            let covers = |column: &&Column| {
                let end = column.offset + column.buf.len() as u64;
                column.index == index && column.offset <= offset && offset + bytes as u64 <= end
            };
            if let Some(column) = have.iter().find(covers) {
                let from = (offset - column.offset) as usize;
                sources.found.push((index, column.buf.slice(from..from + bytes)));
            } else if let Some((link, _)) = reading.view.readable(reading.segment.pg, index) {
                // Data shards before parity; among copies the least busy one.
                let busy = if reading.shared.scheme().is_replica() { link.load.inflight() } else { 0 };
                candidates.push((link.load.is_late(), busy, index));
            } else {
                sources.lost.away += 1;
            }
        }
        candidates.sort_unstable();
        sources.candidates = candidates.into_iter().map(|(_, _, index)| index).collect();
        sources
    }

    fn start(&self, index: usize) -> Option<ShardRead> {
        ShardRead::start(self.reading, index, self.offset, self.bytes)
    }

    /// Reads until `wanted` shards are there or nobody is left to ask. Whoever is late is waited for only as long as the
    /// others are not enough; with k there, no longer than [`EXTRA_WAIT`].
    async fn gather(&mut self, wanted: usize) {
        let shared = &*self.reading.shared;
        let k = shared.scheme().k();
        let mut running = FuturesUnordered::new();
        let mut asked: Vec<usize> = Vec::new();
        let mut is_patient = true;
        loop {
            while (self.found.len() + running.len() < wanted || !is_patient)
                && let Some(index) = self.candidates.pop_front()
            {
                if let Some(mut read) = self.start(index) {
                    asked.push(index);
                    running.push(async move { (index, read.wait(shared).await) });
                }
            }
            if self.found.len() >= wanted {
                // Whoever has not answered yet may be asked again, should these turn out wrong.
                self.candidates.extend(asked);
                return;
            }
            let limit = match (self.candidates.is_empty(), self.found.len() >= k) {
                (false, _) => Some(shared.late_after()),
                (true, true) => Some(EXTRA_WAIT),
                // Nobody else can be asked: whatever they say decides.
                (true, false) => None,
            };
            let next = match limit {
                Some(limit) => shared.env.timeout(limit, running.next()).await,
                None => Some(running.next().await),
            };
            if let Some(Some((answered, _))) = &next {
                asked.retain(|index| index != answered);
            }
            match next {
                None if self.candidates.is_empty() => {
                    self.lost.away += running.len();
                    return;
                }
                None => is_patient = false,
                Some(None) => return,
                Some(Some((index, Ok(buf)))) => self.found.push((index, buf)),
                Some(Some((index, Err(NodeError::Corrupt)))) => self.lost.unreadable.push(index),
                Some(Some((_, Err(error)))) => {
                    self.lost.away += 1;
                    self.lost.missing += usize::from(error == NodeError::NotFound);
                }
            }
        }
    }

    /// Computes `into`, the bytes `range` of shard `index`, from the sources of `set` (bits over `found`).
    fn compute(&self, set: u64, index: usize, range: Range<usize>, into: &mut [u8]) -> Result<(), StoreError> {
        let mut present: Vec<(ShardIndex, &[u8])> = Vec::new();
        for (at, (source, buf)) in self.found.iter().enumerate() {
            if set >> at & 1 == 1 {
                present.push((ShardIndex(*source as u8), buf.get(range.clone()).ok_or(StoreError::Internal)?));
            }
        }
        let codec = &self.reading.shared.codec;
        codec.reconstruct(&present, &mut [(ShardIndex(index as u8), into)]).map_err(|_| StoreError::Internal)
    }

    /// The error for a range that could not be had.
    fn error(&self, own: &Own) -> StoreError {
        let needed = self.reading.shared.scheme().k();
        let own_away = usize::from(matches!(own, Own::Away | Own::Missing | Own::Pending));
        let own_missing = usize::from(matches!(own, Own::Missing));
        let missing = self.lost.missing + own_missing;
        if self.lost.away + own_away > missing {
            // Those who did not answer may bring what is right.
            return StoreError::TooFew { found: self.found.len().min(needed - 1), needed };
        }
        // Everybody has answered: nobody who comes back can change what follows. A row that was never written
        // everywhere, and so never acknowledged, looks like either of the two.
        if missing > 0 && self.found.len() + self.lost.unreadable.len() < needed {
            return StoreError::NotFound;
        }
        self.reading.shared.stats.corrupt_reads.inc();
        let found: Vec<usize> = self.found.iter().map(|(index, _)| *index).collect();
        tracing::error!(
            segment = %self.reading.segment, offset = self.reading.offset, ?found, unreadable = ?self.lost.unreadable,
            "no shards give the right bytes"
        );
        StoreError::Corrupt { segment: self.reading.segment, offset: self.reading.offset }
    }
}

/// The lowest `k` of the sources.
fn first_set(k: usize) -> u64 {
    if k >= 64 { u64::MAX } else { (1 << k) - 1 }
}

/// The next larger number with as many bits (Gosper); nothing when it has no more than `count` places.
fn next_set(set: u64, count: usize) -> Option<u64> {
    let lowest = set & set.wrapping_neg();
    let ripple = set.checked_add(lowest)?;
    let next = ripple | (((set ^ ripple) >> 2) / lowest);
    (count >= 64 || next >> count == 0).then_some(next)
}

/// The bytes of a unit, verified, from other shards. What was wrong and can be reached is repaired behind the answer.
pub(crate) async fn rebuild(reading: &Reading, unit: &Unit, own: Own, have: &[Column]) -> Result<Buf, StoreError> {
    let k = reading.shared.scheme().k();
    let (items, range) = wanted(unit, &own);
    let offset = unit.offset + range.start as u64;
    let mut sources = Sources::new(reading, Some(unit.index), offset, range.len(), have);
    sources.gather(k).await;
    if sources.found.len() < k {
        return Err(sources.error(&own));
    }
    let mut result = reading.shared.bufs.get(range.len());
    let set = first_set(k);
    sources.compute(set, unit.index, 0..range.len(), &mut result)?;
    let (mut solved, open): (Vec<Solved>, Vec<Solved>) = items
        .iter()
        .map(|&item| Solved { item, set })
        .partition(|solved| item_holds(unit, &range, solved.item, &result));
    if !open.is_empty() {
        let open = open.into_iter().map(|open| open.item).collect();
        try_sets(&mut sources, unit, &own, &range, open, &mut result, &mut solved).await?;
    }
    repair_sources(&sources, unit, &range, &solved)?;
    Ok(merge(reading, unit, own, range, &items, result.freeze()))
}

/// A checksum of the unit and the set of sources that fulfilled it.
struct Solved {
    item: usize,
    set: u64,
}

/// The checksums to fulfil, and the bytes of the unit that takes: only what is wrong when the rest is there.
fn wanted(unit: &Unit, own: &Own) -> (Vec<usize>, Range<usize>) {
    let all: Vec<usize> = (0..unit.check.items()).collect();
    let (Own::Wrong(bytes), UnitCheck::Blocks(_)) = (own, &unit.check) else { return (all, 0..unit.bytes) };
    let wrong = unit.check.wrong_items(bytes);
    match (wrong.first(), wrong.last()) {
        (Some(&first), Some(&last)) => (wrong, first * BLOCK..(last + 1) * BLOCK),
        _ => (all, 0..unit.bytes),
    }
}

/// Whether a checksum of the unit holds in `result`, which are its bytes `range`.
fn item_holds(unit: &Unit, range: &Range<usize>, item: usize, result: &[u8]) -> bool {
    let covered = unit.check.range(item);
    let inside = covered.start - range.start..covered.end - range.start;
    result.get(inside).is_some_and(|bytes| unit.check.item_holds(item, bytes))
}

/// The first `k` sources gave something wrong: asks everybody else and tries every set of k, checksum by checksum.
async fn try_sets(
    sources: &mut Sources<'_>,
    unit: &Unit,
    own: &Own,
    range: &Range<usize>,
    mut open: Vec<usize>,
    result: &mut BufMut,
    solved: &mut Vec<Solved>,
) -> Result<(), StoreError> {
    sources.gather(usize::MAX).await;
    let mut set = first_set(sources.reading.shared.scheme().k());
    for _ in 0..SETS_MAX {
        let Some(next) = next_set(set, sources.found.len()) else { break };
        set = next;
        let mut still_open = Vec::new();
        for item in open {
            let covered = unit.check.range(item);
            // Checksums need not end on a block, shards do.
            let inside = covered.start - range.start..(covered.end - range.start).next_multiple_of(BLOCK);
            sources.compute(set, unit.index, inside.clone(), &mut result[inside])?;
            if item_holds(unit, range, item, result) {
                solved.push(Solved { item, set });
            } else {
                still_open.push(item);
            }
        }
        open = still_open;
        if open.is_empty() {
            return Ok(());
        }
        yield_now().await;
    }
    Err(sources.error(own))
}

/// Compares every other source with what a set that proved itself says, and repairs those that differ or were unreadable.
/// Only what a checksum proves is ever written.
fn repair_sources(
    sources: &Sources<'_>,
    unit: &Unit,
    range: &Range<usize>,
    solved: &[Solved],
) -> Result<(), StoreError> {
    for &Solved { item, set } in solved {
        let proven = unit.check.proven(item);
        let inside = proven.start - range.start..proven.end - range.start;
        let offset = sources.offset + inside.start as u64;
        let unused = sources.found.iter().enumerate().filter(|(at, _)| set >> at & 1 == 0);
        let unused = unused.map(|(_, (index, buf))| (*index, buf.get(inside.clone())));
        let unreadable = sources.lost.unreadable.iter().map(|&index| (index, None));
        for (index, found) in unused.chain(unreadable) {
            let mut right = sources.reading.shared.bufs.get(inside.len());
            sources.compute(set, index, inside.clone(), &mut right)?;
            repair::differences(sources.reading, index, offset, found, &right.freeze());
        }
    }
    Ok(())
}

/// The whole unit: what was right of the own bytes, and `result`, which is `range`, for the rest. The own shard is repaired.
fn merge(reading: &Reading, unit: &Unit, own: Own, range: Range<usize>, items: &[usize], result: Buf) -> Buf {
    match own {
        Own::Wrong(bytes) => {
            let mut merged = reading.shared.bufs.get(unit.bytes);
            merged.copy_from_slice(&bytes);
            // Between two wrong blocks `result` was not checked, and the own bytes are right.
            for &item in items {
                let covered = unit.check.range(item);
                merged[covered.clone()]
                    .copy_from_slice(&result[covered.start - range.start..covered.end - range.start]);
            }
            let merged = merged.freeze();
            repair::differences(reading, unit.index, unit.offset, Some(&bytes), &merged);
            merged
        }
        Own::Unreadable => {
            for item in 0..unit.check.items() {
                let proven = unit.check.proven(item);
                let offset = unit.offset + proven.start as u64;
                repair::differences(reading, unit.index, offset, None, &result.slice(proven));
            }
            result
        }
        _ => result,
    }
}

/// A read over several units whose one checksum does not hold: some shard is wrong, and nothing says which. Reads the range
/// of all shards and tries sets of k until the checksum holds.
pub(crate) async fn untangle(
    reading: &Reading,
    stripe: &Stripe,
    units: &[Unit],
    read: &SegmentRead,
    crc: Crc32c,
) -> Result<Buf, StoreError> {
    let k = stripe.k();
    let from = units.iter().map(|unit| unit.offset).min().unwrap_or(0);
    let to = units.iter().map(|unit| unit.offset + unit.bytes as u64).max().unwrap_or(0);
    let bytes = (to - from) as usize;
    let mut sources = Sources::new(reading, None, from, bytes, &[]);
    sources.gather(usize::MAX).await;
    let own = Own::Unreadable; // All shards are among the sources.
    if sources.found.len() < k {
        return Err(sources.error(&own));
    }
    let mut set = first_set(k);
    for _ in 0..SETS_MAX {
        let columns = columns_of(&sources, set, bytes)?;
        let answer = assemble(reading, stripe, read, from, &columns)?;
        if crc32c(&answer) == crc {
            repair_pieces(&sources, set, stripe, read, &columns)?;
            return Ok(answer);
        }
        yield_now().await;
        let Some(next) = next_set(set, sources.found.len()) else { break };
        set = next;
    }
    Err(sources.error(&own))
}

/// Repairs the data shards that were not among the sources that proved themselves, as far as the read went.
fn repair_pieces(
    sources: &Sources<'_>,
    set: u64,
    stripe: &Stripe,
    read: &SegmentRead,
    columns: &[Buf],
) -> Result<(), StoreError> {
    for piece in stripe.map(read.offset, read.length.into()).map_err(|_| StoreError::Internal)? {
        let index = usize::from(piece.shard.0);
        let inside = (piece.shard_offset - sources.offset) as usize;
        let proven = inside..inside + piece.bytes as usize / BLOCK * BLOCK;
        let found = sources.found.iter().enumerate().find(|(_, (source, _))| *source == index);
        let found = match found {
            Some((at, _)) if set >> at & 1 == 1 => continue,
            Some((_, (_, buf))) => buf.get(proven.clone()),
            None => None,
        };
        let is_unreadable = sources.lost.unreadable.contains(&index);
        if let Some(column) = columns.get(index)
            && (found.is_some() || is_unreadable)
        {
            repair::differences(sources.reading, index, piece.shard_offset, found, &column.slice(proven));
        }
    }
    Ok(())
}

/// The range of every data shard, as one set of sources says.
fn columns_of(sources: &Sources<'_>, set: u64, bytes: usize) -> Result<Vec<Buf>, StoreError> {
    let shared = &sources.reading.shared;
    let column = |index: usize| {
        let is_source = |(at, (source, _)): &(usize, &(usize, Buf))| set >> at & 1 == 1 && *source == index;
        if let Some((_, (_, buf))) = sources.found.iter().enumerate().find(is_source) {
            return Ok(buf.clone());
        }
        let mut into = shared.bufs.get(bytes);
        sources.compute(set, index, 0..bytes, &mut into)?;
        Ok(into.freeze())
    };
    (0..shared.scheme().k()).map(column).collect()
}

/// The bytes of a read out of the data shards, which are given from `from` on.
fn assemble(
    reading: &Reading,
    stripe: &Stripe,
    read: &SegmentRead,
    from: u64,
    columns: &[Buf],
) -> Result<Buf, StoreError> {
    let mut answer = reading.shared.bufs.get(read.length as usize);
    let mut at = 0;
    for piece in stripe.map(read.offset, read.length.into()).map_err(|_| StoreError::Internal)? {
        let inside = (piece.shard_offset - from) as usize;
        let bytes = piece.bytes as usize;
        let column = columns.get(usize::from(piece.shard.0)).and_then(|column| column.get(inside..inside + bytes));
        answer[at..at + bytes].copy_from_slice(column.ok_or(StoreError::Internal)?);
        at += bytes;
    }
    Ok(answer.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_of_sources_comes_once() {
        for (count, k, expected) in [(6, 4, 15), (5, 5, 1), (3, 1, 3), (11, 8, 165), (64, 63, 64)] {
            let mut sets = vec![first_set(k)];
            while let Some(next) = next_set(sets[sets.len() - 1], count) {
                assert_eq!(next.count_ones() as usize, k);
                sets.push(next);
            }
            assert_eq!(sets.len(), expected, "{k} of {count}");
        }
    }
}
