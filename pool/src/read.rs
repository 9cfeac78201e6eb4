//! Reads. The common one lies inside one unit: one shard read of exactly its blocks, a checksum, and the device's own
//! buffer is the answer. Everything else (several units, late, away, damaged) is built around that.

use crate::degraded::{self, Column, Own};
use crate::load::{InFlight, Late, Load};
use crate::pool::Shared;
use crate::repair;
use crate::view::View;
use futures::future::{Either, join_all, select};
use lsm_block::store::{Check, SegmentRead, StoreError, StoreResult};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use xsan_env::{Buf, Moment};
use xsan_erasure::{Piece, Stripe};
use xsan_types::{BLOCK_BYTES, Crc32c, SegmentName, ShardId, ShardIndex, crc32c};
use xsan_wire::node::{NodeError, NodeResult};

/// Rounds that a late read waits for its turn to ask the others.
const HEDGE_ROUNDS_MAX: usize = 16;

/// Bytes of a block.
pub(crate) const BLOCK: usize = BLOCK_BYTES as usize;

/// What all parts of one read share.
pub(crate) struct Reading {
    pub(crate) shared: Arc<Shared>,
    pub(crate) view: Arc<View>,
    pub(crate) segment: SegmentName,
    /// First byte in the segment, for errors.
    pub(crate) offset: u64,
}

/// How the bytes of one unit prove themselves.
pub(crate) enum UnitCheck {
    /// One checksum per block.
    Blocks(Vec<Crc32c>),
    /// One checksum over the first `bytes` bytes.
    Whole { crc: Crc32c, bytes: usize },
    /// The checksum goes over several units: whoever puts them together checks.
    Later,
}

impl UnitCheck {
    /// Number of checksums.
    pub(crate) fn items(&self) -> usize {
        match self {
            Self::Blocks(crcs) => crcs.len(),
            Self::Whole { .. } => 1,
            Self::Later => 0,
        }
    }

    /// The bytes of the unit that a checksum covers.
    pub(crate) fn range(&self, item: usize) -> Range<usize> {
        match self {
            Self::Blocks(_) => item * BLOCK..(item + 1) * BLOCK,
            Self::Whole { bytes, .. } => 0..*bytes,
            Self::Later => 0..0,
        }
    }

    /// Whether `bytes`, those of [`UnitCheck::range`], are right.
    pub(crate) fn item_holds(&self, item: usize, bytes: &[u8]) -> bool {
        match self {
            Self::Blocks(crcs) => crcs.get(item) == Some(&crc32c(bytes)),
            Self::Whole { crc, .. } => *crc == crc32c(bytes),
            Self::Later => true,
        }
    }

    /// The checksums that do not hold for the bytes of a whole unit.
    pub(crate) fn wrong_items(&self, unit: &[u8]) -> Vec<usize> {
        let is_wrong = |&item: &usize| !unit.get(self.range(item)).is_some_and(|bytes| self.item_holds(item, bytes));
        (0..self.items()).filter(is_wrong).collect()
    }

    /// Whole blocks of the unit that the checksum proves.
    pub(crate) fn proven(&self, item: usize) -> Range<usize> {
        let range = self.range(item);
        range.start..range.end / BLOCK * BLOCK
    }

    fn holds(&self, unit: &[u8]) -> bool {
        (0..self.items()).all(|item| unit.get(self.range(item)).is_some_and(|bytes| self.item_holds(item, bytes)))
    }
}

/// A range of one shard, as much of it as one read wants.
pub(crate) struct Unit {
    /// Position in the group; for `replica(n)` the copy that is asked first.
    pub(crate) index: usize,
    /// First byte in the shard, a multiple of 4096.
    pub(crate) offset: u64,
    /// Bytes, a multiple of 4096.
    pub(crate) bytes: usize,
    pub(crate) check: UnitCheck,
}

/// A started read of one shard.
pub(crate) struct ShardRead {
    answer: NodeResult<Buf>,
    bytes: usize,
    started: Option<Moment>,
    load: Arc<Load>,
    _inflight: InFlight,
}

impl ShardRead {
    /// Asks the device of a position, and if it has nothing, the one where the position was before it moved.
    pub(crate) fn start(reading: &Reading, index: usize, offset: u64, bytes: usize) -> Option<Self> {
        let (link, before) = reading.view.readable(reading.segment.pg, index)?;
        let shared = &reading.shared;
        shared.stats.shard_reads.inc();
        shared.stats.shard_read_bytes.add(bytes as u64);
        let started = link.load.is_sampled().then(|| shared.env.now());
        let shard = ShardId { segment: reading.segment, index: ShardIndex(index as u8) };
        // A read has at most a segment's 64 MiB.
        let mut answer = link.node.read_shard(link.device, shard, offset, bytes as u32);
        if let Some(before) = before.map(Arc::clone) {
            answer = Box::pin(async move {
                match answer.await {
                    Err(NodeError::NotFound | NodeError::StaleEpoch { .. }) => {
                        before.node.read_shard(before.device, shard, offset, bytes as u32).await
                    }
                    answer => answer,
                }
            });
        }
        Some(Self { answer, bytes, started, load: Arc::clone(&link.load), _inflight: InFlight::new(&link.load) })
    }

    pub(crate) fn poll_answer(&mut self, shared: &Shared, context: &mut Context<'_>) -> Poll<Result<Buf, NodeError>> {
        let answer = match self.answer.as_mut().poll(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(answer) => answer,
        };
        self.note_time(shared);
        Poll::Ready(match answer {
            // Fewer bytes than asked for are no bytes.
            Ok(buf) if buf.len() != self.bytes => Err(NodeError::Corrupt),
            answer => answer,
        })
    }

    /// The answer, however long it takes.
    pub(crate) async fn wait(&mut self, shared: &Shared) -> Result<Buf, NodeError> {
        poll_fn(|context| self.poll_answer(shared, context)).await
    }

    /// Counts the time up to now as this device's.
    fn note_time(&mut self, shared: &Shared) {
        if let Some(started) = self.started.take()
            && self.load.record(shared.env.now().since(started))
        {
            shared.refresh_late_after();
        }
    }
}

/// What came of asking the first device.
pub(crate) enum Attempt {
    /// Verified bytes.
    Good(Buf),
    /// Bytes that are not what was written.
    Wrong(Buf),
    /// The device refused.
    Failed(NodeError),
    /// There is no device, or it is not up.
    Away,
    /// Not answered in the time its peers need.
    Late(ShardRead),
}

/// Waits for the first device for as long as its peers would need.
async fn attempt(reading: &Reading, unit: &Unit, read: Option<ShardRead>) -> Attempt {
    let Some(mut read) = read else { return Attempt::Away };
    let shared = &*reading.shared;
    let answer = if read.load.is_late() {
        // Others wait for this device already: no use in waiting as well.
        poll_fn(|context| match read.poll_answer(shared, context) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    } else {
        shared.env.timeout(shared.late_after(), poll_fn(|context| read.poll_answer(shared, context))).await
    };
    match answer {
        Some(answer) => judge(unit, answer),
        None => Attempt::Late(read),
    }
}

fn judge(unit: &Unit, answer: Result<Buf, NodeError>) -> Attempt {
    match answer {
        Ok(buf) if unit.check.holds(&buf) => Attempt::Good(buf),
        Ok(buf) => Attempt::Wrong(buf),
        Err(error) => Attempt::Failed(error),
    }
}

/// Makes verified bytes out of whatever came of the first attempt.
async fn complete(reading: &Reading, unit: &Unit, attempt: Attempt, have: &[Column]) -> Result<Buf, StoreError> {
    match attempt {
        Attempt::Late(read) => hedge(reading, unit, read, have).await,
        attempt => settle(reading, unit, attempt, have).await,
    }
}

/// Makes verified bytes out of an attempt that is over.
async fn settle(reading: &Reading, unit: &Unit, attempt: Attempt, have: &[Column]) -> Result<Buf, StoreError> {
    let own = match attempt {
        Attempt::Good(buf) => return Ok(buf),
        Attempt::Wrong(buf) => Own::Wrong(buf),
        Attempt::Failed(NodeError::Corrupt) => Own::Unreadable,
        Attempt::Failed(NodeError::NotFound) => Own::Missing,
        Attempt::Failed(_) | Attempt::Away | Attempt::Late(_) => Own::Away,
    };
    degraded::rebuild(reading, unit, own, have).await
}

/// Asks the other devices as well and takes what verifies first.
async fn hedge(reading: &Reading, unit: &Unit, mut first: ShardRead, have: &[Column]) -> Result<Buf, StoreError> {
    let shared = &*reading.shared;
    let (started, load) = (first.started, Arc::clone(&first.load));
    let late = Late::new(&load);
    // Only so many reads may be hedged: when everything is slow, asking more often makes it slower.
    // But a device that stalls for good earns nothing more for those that wait for it.
    for _ in 0..HEDGE_ROUNDS_MAX {
        if shared.hedges.spend() {
            break;
        }
        if let Some(answer) = shared.env.timeout(shared.late_after(), first.wait(shared)).await {
            return settle(reading, unit, judge(unit, answer), have).await;
        }
    }
    shared.stats.hedges.inc();
    let rebuilt = pin!(degraded::rebuild(reading, unit, Own::Pending, have));
    let waiting = pin!(first.wait(shared));
    match select(waiting, rebuilt).await {
        Either::Left((answer, rebuilt)) => {
            drop(late);
            match judge(unit, answer) {
                Attempt::Good(buf) => Ok(buf),
                Attempt::Wrong(wrong) => {
                    let right = rebuilt.await?;
                    repair::differences(reading, unit.index, unit.offset, Some(&wrong), &right);
                    Ok(right)
                }
                _ => rebuilt.await,
            }
        }
        Either::Right((Ok(buf), _)) => {
            shared.stats.hedge_wins.inc();
            // The late one is not waited for any more: what it took so far is the least it would have taken.
            if let Some(started) = started {
                load.record(shared.env.now().since(started));
            }
            Ok(buf)
        }
        Either::Right((Err(error), waiting)) => match judge(unit, waiting.await) {
            Attempt::Good(buf) => Ok(buf),
            _ => Err(error),
        },
    }
}

/// A read of a segment; see `SegmentStore::read`. The devices are asked before this returns.
pub(crate) fn read(shared: &Arc<Shared>, read: SegmentRead) -> StoreResult<Buf> {
    shared.stats.reads.inc();
    shared.hedges.earn();
    let stripe = match validate(shared, &read) {
        Ok(stripe) => stripe,
        Err(error) => return Box::pin(std::future::ready(Err(error))),
    };
    let reading =
        Reading { shared: Arc::clone(shared), view: shared.view(), segment: read.segment, offset: read.offset };
    let bytes = (read.length as usize).next_multiple_of(BLOCK);
    // Shards are padded to whole blocks; the geometry ends with the segment.
    let mapped = (bytes as u64).min(read.segment_bytes - read.offset);
    let Ok(mut pieces) = stripe.map(read.offset, mapped) else {
        return Box::pin(std::future::ready(Err(StoreError::Internal)));
    };
    let Some(piece) = pieces.next() else { return Box::pin(std::future::ready(Ok(Buf::new()))) };
    if piece.bytes == mapped {
        read_one(reading, piece, bytes, read.length as usize, read.check)
    } else {
        read_many(reading, stripe, read)
    }
}

fn validate(shared: &Shared, read: &SegmentRead) -> Result<Stripe, StoreError> {
    let is_inside = read.offset.checked_add(read.length.into()).is_some_and(|end| end <= read.segment_bytes);
    let length = read.length as usize;
    let check_fits = match &read.check {
        Check::Blocks(crcs) => length.is_multiple_of(BLOCK) && crcs.len() == length / BLOCK,
        Check::Whole(_) => true,
    };
    if !is_inside || !read.offset.is_multiple_of(BLOCK_BYTES) || !check_fits {
        return Err(StoreError::Internal);
    }
    shared.stripe(read.segment_bytes)
}

/// The position to ask for a piece: that of its shard, or for copies the least busy device that is up.
fn position_of(reading: &Reading, piece: &Piece) -> usize {
    let scheme = reading.shared.scheme();
    if !scheme.is_replica() {
        return piece.shard.0.into();
    }
    let width = scheme.width();
    // A block stays with one copy while nobody is busy, so that a device's own cache sees it again.
    let start = crate::plan::hash(reading.segment.number, piece.shard_offset >> 16) as usize % width;
    let busy = |index: usize| {
        let (link, _) = reading.view.readable(reading.segment.pg, index)?;
        Some((link.load.is_late(), link.load.inflight()))
    };
    let around = (0..width).map(|step| (start + step) % width);
    around.filter_map(|index| Some((busy(index)?, index))).min_by_key(|&(busy, _)| busy).map_or(0, |(_, index)| index)
}

fn start(reading: &Reading, unit: &Unit) -> Option<ShardRead> {
    ShardRead::start(reading, unit.index, unit.offset, unit.bytes)
}

/// The common case: all bytes lie in one unit.
fn read_one(reading: Reading, piece: Piece, bytes: usize, length: usize, check: Check) -> StoreResult<Buf> {
    let check = match check {
        Check::Blocks(crcs) => UnitCheck::Blocks(crcs),
        Check::Whole(crc) => UnitCheck::Whole { crc, bytes: length },
    };
    let unit = Unit { index: position_of(&reading, &piece), offset: piece.shard_offset, bytes, check };
    let first = start(&reading, &unit);
    Box::pin(async move {
        let buf = match attempt(&reading, &unit, first).await {
            Attempt::Good(buf) => buf,
            other => {
                // Boxed: what hardly ever runs must not make every read's future large.
                let slow = Box::pin(async { complete(&reading, &unit, count_degraded(&reading, other), &[]).await });
                slow.await?
            }
        };
        reading.shared.stats.read_bytes.add(length as u64);
        Ok(if buf.len() == length { buf } else { buf.slice(..length) })
    })
}

/// Counts reads for which something was away or damaged; late is counted as hedged.
fn count_degraded(reading: &Reading, attempt: Attempt) -> Attempt {
    if !matches!(attempt, Attempt::Good(_) | Attempt::Late(_)) {
        reading.shared.stats.degraded_reads.inc();
    }
    attempt
}

/// A piece of the answer: where it lies in the answer, in which unit and where in that.
struct Place {
    answer: usize,
    unit: usize,
    inside: usize,
    bytes: usize,
}

/// Cuts a read into one range per shard: what a shard holds of consecutive rows is consecutive.
fn cut(reading: &Reading, stripe: &Stripe, read: &SegmentRead) -> Result<(Vec<Unit>, Vec<Place>), StoreError> {
    let bytes = u64::from(read.length).next_multiple_of(BLOCK_BYTES).min(read.segment_bytes - read.offset);
    let pieces = stripe.map(read.offset, bytes).map_err(|_| StoreError::Internal)?;
    let (mut units, mut places): (Vec<Unit>, Vec<Place>) = (Vec::new(), Vec::new());
    let mut answer = 0usize;
    for piece in pieces {
        let length = piece.bytes as usize;
        let padded = length.next_multiple_of(BLOCK);
        let index = position_of(reading, &piece);
        let unit = match units.iter().position(|unit| unit.index == index) {
            Some(at) => at,
            None => {
                let check = match read.check {
                    Check::Blocks(_) => UnitCheck::Blocks(Vec::new()),
                    Check::Whole(_) => UnitCheck::Later,
                };
                units.push(Unit { index, offset: piece.shard_offset, bytes: 0, check });
                units.len() - 1
            }
        };
        let entry = units.get_mut(unit).ok_or(StoreError::Internal)?;
        assert_eq!(entry.offset + entry.bytes as u64, piece.shard_offset, "rows follow each other in a shard");
        if let (UnitCheck::Blocks(crcs), Check::Blocks(all)) = (&mut entry.check, &read.check) {
            crcs.extend_from_slice(&all[answer / BLOCK..(answer + length) / BLOCK]);
        }
        places.push(Place { answer, unit, inside: entry.bytes, bytes: length });
        entry.bytes += padded;
        answer += length;
    }
    Ok((units, places))
}

/// A read of several units: all devices at once, then one buffer.
fn read_many(reading: Reading, stripe: Stripe, read: SegmentRead) -> StoreResult<Buf> {
    let (units, places) = match cut(&reading, &stripe, &read) {
        Ok(cut) => cut,
        Err(error) => return Box::pin(std::future::ready(Err(error))),
    };
    let first: Vec<Option<ShardRead>> = units.iter().map(|unit| start(&reading, unit)).collect();
    Box::pin(async move {
        let attempts = join_all(units.iter().zip(first).map(|(unit, first)| attempt(&reading, unit, first))).await;
        let bufs = Box::pin(complete_all(&reading, &units, attempts)).await?;
        let length = read.length as usize;
        let mut answer = reading.shared.bufs.get(places.iter().map(|place| place.bytes).sum());
        for place in &places {
            let bytes = bufs.get(place.unit).and_then(|buf| buf.get(place.inside..place.inside + place.bytes));
            let bytes = bytes.ok_or(StoreError::Internal)?;
            answer[place.answer..place.answer + place.bytes].copy_from_slice(bytes);
        }
        answer.truncate(length);
        let mut answer = answer.freeze();
        if let Check::Whole(crc) = read.check
            && crc32c(&answer) != crc
        {
            reading.shared.stats.degraded_reads.inc();
            answer = Box::pin(degraded::untangle(&reading, &stripe, &units, &read, crc)).await?;
        }
        reading.shared.stats.read_bytes.add(length as u64);
        Ok(answer)
    })
}

/// Verified bytes of every unit; those that are there already serve to rebuild those that are not.
async fn complete_all(reading: &Reading, units: &[Unit], attempts: Vec<Attempt>) -> Result<Vec<Buf>, StoreError> {
    let column = |(unit, attempt): (&Unit, &Attempt)| match attempt {
        Attempt::Good(buf) => Some(Column { index: unit.index, offset: unit.offset, buf: buf.clone() }),
        _ => None,
    };
    let have: Vec<Column> = units.iter().zip(&attempts).filter_map(column).collect();
    if attempts.iter().any(|attempt| !matches!(attempt, Attempt::Good(_) | Attempt::Late(_))) {
        reading.shared.stats.degraded_reads.inc();
    }
    let completed = units.iter().zip(attempts).map(|(unit, attempt)| complete(reading, unit, attempt, &have));
    join_all(completed).await.into_iter().collect()
}
