//! Reads: index, then open segments' memory or the store, then the confirmation that the set is still this owner's (P8).

use super::shared::{OpenSegment, Piece, ServingSet, Shared, count};
use crate::error::VolumeError;
use crate::index::{Found, Place};
use crate::store::{Check, SegmentRead, StoreResult};
use futures::future::{join_all, try_join_all};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::Buf;
use xsan_types::{BLOCK_BYTES, BlockRange, Crc32c, Lba, SegmentName, Version};

/// Blocks of one store read at most.
const READ_BLOCKS_MAX: usize = 1024;
/// How long to wait for nodes to come back before a read is tried again, if no change is reported.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A run of blocks of a read, before the bytes are there.
enum Run {
    Hole(u64),
    Memory(Buf),
    Stored { segment: SegmentName, segment_bytes: u64, position: u32, crcs: Vec<Crc32c> },
}

pub(super) async fn read(shared: Arc<Shared>, offset: u64, length: u64) -> Result<Vec<Piece>, VolumeError> {
    count(&shared.counters.reads, 1);
    count(&shared.counters.read_bytes, length);
    if length == 0 {
        return Ok(Vec::new());
    }
    let first = offset / BLOCK_BYTES;
    let range = BlockRange::between(first, (offset + length).div_ceil(BLOCK_BYTES));
    let (_, pieces) = read_range(&shared, range).await?;
    confirm(&shared).await?;
    Ok(trim(pieces, offset - first * BLOCK_BYTES, length))
}

/// The content of one block and its version (`None`: a hole, returned as zeroes).
pub(super) async fn read_block(shared: &Arc<Shared>, lba: Lba) -> Result<(Option<Version>, Buf), VolumeError> {
    let (found, pieces) = read_range(shared, BlockRange { start: lba, count: 1 }).await?;
    match (found.first(), pieces.into_iter().next()) {
        (Some(Found::Data { version, .. }), Some(Piece::Data(data))) => Ok((Some(*version), data)),
        _ => Ok((None, shared.buffers.get_zeroed(BLOCK_BYTES as usize).freeze())),
    }
}

/// Looks blocks up and fetches them; waits for nodes to return, up to `io_timeout`.
async fn read_range(shared: &Arc<Shared>, range: BlockRange) -> Result<(Vec<Found>, Vec<Piece>), VolumeError> {
    let deadline = shared.env.now().after(shared.tuning.io_timeout);
    let mut found = Vec::with_capacity(range.count as usize);
    loop {
        let mut changes = shared.store.changes();
        // Names found under this token are not deleted while it is held (R5).
        let token = shared.read_token();
        let result = async {
            found.clear();
            if !shared.index.try_lookup(range, &mut found) {
                found.clear();
                shared.index.lookup(range, &mut found).await?;
            }
            match plan(shared, &found) {
                Some(runs) => fetch(shared, runs).await.map(Some),
                None => Ok(None),
            }
        }
        .await;
        drop(token);
        match result {
            Ok(Some(pieces)) => return Ok((found, pieces)),
            // A segment moved from open to sealed between two look-ups.
            Ok(None) => xsan_env::yield_now().await,
            Err(error) if waits(&error) => {
                if shared.env.now() >= deadline {
                    return Err(VolumeError::TimedOut);
                }
                if shared.health.borrow().is_final() {
                    return Err(shared.final_error());
                }
                shared.env.timeout(RETRY_AFTER, changes.changed()).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether an error may pass when nodes return.
fn waits(error: &VolumeError) -> bool {
    error.kind() == xsan_types::ErrorKind::Unavailable
}

/// Groups blocks into runs; `None` if a segment is neither open nor listed (it moved: look again).
fn plan(shared: &Shared, found: &[Found]) -> Option<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    let open = shared.open.lock().expect("open lock");
    for block in found {
        let place = match block {
            Found::Hole => {
                match runs.last_mut() {
                    Some(Run::Hole(blocks)) => *blocks += 1,
                    _ => runs.push(Run::Hole(1)),
                }
                continue;
            }
            Found::Data { place, .. } => place,
        };
        if extend(&mut runs, place) {
            continue;
        }
        let run = match open.get(&place.number) {
            Some(segment @ OpenSegment::Journal { .. }) => Run::Memory(segment.block(place.position)?),
            Some(OpenSegment::Rows { name, segment_bytes }) => stored(*name, *segment_bytes, place),
            None => {
                let sealed = shared.index.segment(place.number)?.sealed;
                stored(sealed.name, sealed.bytes, place)
            }
        };
        runs.push(run);
    }
    Some(runs)
}

fn stored(segment: SegmentName, segment_bytes: u64, place: &Place) -> Run {
    Run::Stored { segment, segment_bytes, position: place.position, crcs: vec![place.crc] }
}

/// Adds a block to the last run if it continues it.
fn extend(runs: &mut [Run], place: &Place) -> bool {
    match runs.last_mut() {
        Some(Run::Stored { segment, position, crcs, .. })
            if segment.number == place.number
                && position.checked_add(crcs.len() as u32) == Some(place.position)
                && crcs.len() < READ_BLOCKS_MAX =>
        {
            crcs.push(place.crc);
            true
        }
        _ => false,
    }
}

async fn fetch(shared: &Arc<Shared>, runs: Vec<Run>) -> Result<Vec<Piece>, VolumeError> {
    let start = |run: Run| -> Result<Piece, StoreResult<Buf>> {
        match run {
            Run::Hole(blocks) => Ok(Piece::Hole(blocks * BLOCK_BYTES)),
            Run::Memory(bytes) => Ok(Piece::Data(bytes)),
            Run::Stored { segment, segment_bytes, position, crcs } => Err(shared.store.read(SegmentRead {
                segment,
                segment_bytes,
                offset: u64::from(position) * BLOCK_BYTES,
                length: crcs.len() as u32 * BLOCK_BYTES as u32,
                check: Check::Blocks(crcs),
            })),
        }
    };
    let mut started: Vec<Result<Piece, StoreResult<Buf>>> = runs.into_iter().map(start).collect();
    if let [Err(_)] = started.as_slice() {
        // One block from one device: the common case, without the machinery of a join.
        let Some(Err(read)) = started.pop() else { unreachable!("just matched") };
        return Ok(vec![Piece::Data(read.await?)]);
    }
    try_join_all(started.into_iter().map(|piece| async move {
        match piece {
            Ok(piece) => Ok(piece),
            Err(read) => Ok::<_, VolumeError>(Piece::Data(read.await?)),
        }
    }))
    .await
}

/// Cuts whole blocks down to the bytes asked for.
fn trim(pieces: Vec<Piece>, mut skip: u64, mut length: u64) -> Vec<Piece> {
    let mut out = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let bytes = match &piece {
            Piece::Data(data) => data.len() as u64,
            Piece::Hole(bytes) => *bytes,
        };
        let start = skip.min(bytes);
        skip -= start;
        let take = (bytes - start).min(length);
        length -= take;
        if take > 0 {
            out.push(match piece {
                Piece::Data(data) => Piece::Data(data.slice(start as usize..(start + take) as usize)),
                Piece::Hole(_) => Piece::Hole(take),
            });
        }
    }
    out
}

/// Waits until every member of the serving set has confirmed within the window (P8). A member that refuses or is silent
/// starts a set change; the read goes on under the next set.
pub(super) async fn confirm(shared: &Arc<Shared>) -> Result<(), VolumeError> {
    let deadline = shared.env.now().after(shared.tuning.io_timeout);
    let mut sets = shared.set.subscribe();
    loop {
        if shared.health.borrow().is_final() {
            return Err(shared.final_error());
        }
        let set = Arc::clone(&sets.borrow_and_update());
        let now = shared.env.now();
        let paused = shared.reads_are_paused();
        if !paused && set.confirmed_within(now, shared.tuning.read_window) {
            return Ok(());
        }
        if now >= deadline {
            return Err(VolumeError::TimedOut);
        }
        // (Looked at again behind the answers.)
        if paused || !ask_members(shared, &set, now).await {
            shared.env.timeout(RETRY_AFTER, sets.changed()).await;
        }
    }
}

async fn ask_members(shared: &Arc<Shared>, set: &ServingSet, sent: xsan_env::Moment) -> bool {
    let asked = set.members.iter().map(|member| shared.store.confirm(member.at));
    let answers = join_all(asked).await;
    let mut all = true;
    for (i, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(()) => set.confirm(i, sent),
            Err(_) => {
                all = false;
                shared.suspect(set.members[i].at);
            }
        }
    }
    all
}
