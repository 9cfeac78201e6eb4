//! Segments written by whole stripe rows straight to k + m extents (P9).
//!
//! Owner: one [`Rows`] per segment. Calls queue jobs in their order; one task at a time works the queue: parity, appends to
//! all positions, then, while the devices write, the hashes. The task ends when there is nothing to do and is started again
//! by the next call, so an idle segment costs no task. What one position refuses fails the segment as a whole: its owner
//! writes the rows again elsewhere.
//!
//! Bounds: what callers wait for, plus at most [`HASH_BYTES_MAX`] of written rows whose hash is not up to date.

use crate::encode::{Body, encode_row};
use crate::pool::Shared;
use crate::task::Pacer;
use crate::view::Link;
use futures::future::{FutureExt, join_all};
use futures::stream::{FuturesUnordered, StreamExt};
use lsm_block::store::{RowWriter, StoreError, StoreResult};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, oneshot, watch};
use xsan_env::{Buf, BufMut};
use xsan_erasure::{Row, Stripe};
use xsan_types::{
    BLOCK_BYTES, DeviceId, FlushRequest, Incarnation, SEGMENT_BYTES_MAX, SegmentName, ShardId, ShardIndex, UNIT_BYTES,
};
use xsan_wire::node::{NodeError, NodeResult};

/// Rows written but not hashed, beyond which hashing goes before writing more.
const HASH_BYTES_MAX: usize = 16 << 20;

type Done = oneshot::Sender<Result<(), StoreError>>;

/// Where one shard goes.
struct Position {
    link: Arc<Link>,
    incarnation: Incarnation,
}

/// A segment that is written by rows.
pub(crate) struct Rows(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    segment: SegmentName,
    positions: Vec<Position>,
    state: Mutex<State>,
    wake: Notify,
}

struct State {
    queue: VecDeque<Job>,
    /// Rows taken so far.
    rows: u64,
    /// Bytes of every shard that all positions have, without a gap, and whose callers know.
    complete: u64,
    failed: Option<StoreError>,
    finish: FinishState,
    /// The work at rest; taken while the task runs.
    work: Option<Box<Work>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FinishState {
    Open,
    Asked,
    Finished,
}

enum Job {
    Append { rows: u64, data: Vec<Buf>, done: Done },
    Finish { footer: Buf, done: Done },
}

/// What the task carries along.
struct Work {
    rows: u64,
    running: FuturesUnordered<futures::future::BoxFuture<'static, (usize, Result<u64, NodeError>)>>,
    /// Per position.
    contiguous: Vec<u64>,
    hashers: Vec<blake3::Hasher>,
    /// In order for every shard.
    to_hash: VecDeque<(usize, Buf)>,
    to_hash_bytes: usize,
    waiting: VecDeque<Waiting>,
    finish: Option<(u64, Done)>,
}

/// An append that is not complete.
struct Waiting {
    shard_bytes: u64,
    segment_bytes: u64,
    done: Done,
}

/// Opens a segment: asks the nodes for the incarnations that must not change until it is finished.
pub(crate) fn open(shared: &Arc<Shared>, segment: SegmentName) -> StoreResult<Arc<dyn RowWriter>> {
    let shared = Arc::clone(shared);
    let width = shared.scheme().width();
    let view = shared.view();
    let links: Vec<Arc<Link>> = (0..width).filter_map(|index| view.up_position(segment.pg, index).cloned()).collect();
    if links.len() < width || shared.scheme().k() == 1 {
        return Box::pin(std::future::ready(Err(StoreError::TooFew { found: links.len(), needed: width })));
    }
    Box::pin(async move {
        let statuses = join_all(links.iter().map(|link| link.node.devices())).await;
        let mut positions = Vec::with_capacity(width);
        for (link, statuses) in links.into_iter().zip(statuses) {
            let device = link.device;
            let status = statuses.ok().and_then(|all| all.into_iter().find(|status| status.device == device));
            let status = status.filter(|status| !status.failed).ok_or(StoreError::Unavailable { device })?;
            positions.push(Position { link, incarnation: status.incarnation });
        }
        let state = State {
            queue: VecDeque::new(),
            rows: 0,
            complete: 0,
            failed: None,
            finish: FinishState::Open,
            work: Some(Box::new(Work::new(width))),
        };
        let inner = Inner { shared, segment, positions, state: Mutex::new(state), wake: Notify::new() };
        Ok(Arc::new(Rows(Arc::new(inner))) as Arc<dyn RowWriter>)
    })
}

impl Work {
    fn new(width: usize) -> Self {
        Self {
            rows: 0,
            running: FuturesUnordered::new(),
            contiguous: vec![0; width],
            hashers: (0..width).map(|_| blake3::Hasher::new()).collect(),
            to_hash: VecDeque::new(),
            to_hash_bytes: 0,
            waiting: VecDeque::new(),
            finish: None,
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.to_hash.is_empty() && self.waiting.is_empty() && self.finish.is_none()
    }
}

impl RowWriter for Rows {
    fn append(&self, first_row: u64, data: Vec<Buf>) -> StoreResult<()> {
        let inner = &self.0;
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        let rows = bytes / inner.row_bytes();
        let is_aligned = data.iter().all(|piece| piece.is_aligned(BLOCK_BYTES as usize));
        let (done, answer) = oneshot::channel();
        let mut state = inner.state();
        let fits = (state.rows + rows).saturating_mul(inner.row_bytes()) <= SEGMENT_BYTES_MAX;
        if let Some(error) = &state.failed {
            return refuse(error.clone());
        }
        if rows == 0
            || !bytes.is_multiple_of(inner.row_bytes())
            || !is_aligned
            || !fits
            || first_row != state.rows
            || state.finish != FinishState::Open
        {
            return refuse(StoreError::Internal);
        }
        state.rows += rows;
        inner.start(state, Job::Append { rows, data, done });
        wait_for(answer)
    }

    fn flush_requests(&self) -> Vec<FlushRequest> {
        let inner = &self.0;
        let (complete, finish) = {
            let state = inner.state();
            (state.complete, state.finish)
        };
        if complete == 0 || finish == FinishState::Finished {
            return Vec::new();
        }
        let request = |(index, position): (usize, &Position)| FlushRequest {
            device: position.link.device,
            incarnation: position.incarnation,
            member: None,
            replicas: Vec::new(),
            shards: vec![(inner.shard(index), complete)],
        };
        inner.positions.iter().enumerate().map(request).collect()
    }

    fn finish(&self, footer: Buf) -> StoreResult<()> {
        let inner = &self.0;
        let (done, answer) = oneshot::channel();
        let mut state = inner.state();
        if let Some(error) = &state.failed {
            return refuse(error.clone());
        }
        let bytes = state.rows * inner.row_bytes() + footer.len() as u64;
        if state.finish != FinishState::Open || bytes == 0 || bytes > SEGMENT_BYTES_MAX {
            return refuse(StoreError::Internal);
        }
        state.finish = FinishState::Asked;
        inner.start(state, Job::Finish { footer, done });
        wait_for(answer)
    }
}

fn refuse(error: StoreError) -> StoreResult<()> {
    Box::pin(std::future::ready(Err(error)))
}

fn wait_for(answer: oneshot::Receiver<Result<(), StoreError>>) -> StoreResult<()> {
    // The task answers everything it takes unless it panics or the runtime goes down.
    Box::pin(answer.map(|answer| answer.unwrap_or(Err(StoreError::Internal))))
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn row_bytes(&self) -> u64 {
        UNIT_BYTES * self.shared.scheme().k() as u64
    }

    fn shard(&self, index: usize) -> ShardId {
        ShardId { segment: self.segment, index: ShardIndex(index as u8) }
    }

    fn device(&self, index: usize) -> DeviceId {
        self.positions.get(index).map(|position| position.link.device).unwrap_or_default()
    }

    /// Queues a job, and starts the task if none runs.
    fn start(self: &Arc<Self>, mut state: MutexGuard<'_, State>, job: Job) {
        state.queue.push_back(job);
        let work = state.work.take();
        drop(state);
        match work {
            Some(work) => {
                self.shared.env.spawn("rows", run(Arc::clone(self), work));
            }
            None => self.wake.notify_one(),
        }
    }
}

/// What a node's refusal means: the segment has to be written elsewhere, whatever it was. Never "closed": that word stops
/// an owner, and only its journal members may say it.
fn row_error(device: DeviceId, error: &NodeError) -> StoreError {
    match error {
        NodeError::NoSpace => StoreError::NoSpace,
        NodeError::Invalid => StoreError::Internal,
        _ => StoreError::Unavailable { device },
    }
}

/// Works until there is nothing to do, or the segment has failed.
async fn run(inner: Arc<Inner>, mut work: Box<Work>) {
    let mut changes = inner.shared.changes();
    let mut pacer = Pacer::default();
    loop {
        match step(&inner, &mut work, &mut changes, &mut pacer).await {
            Ok(()) => {}
            Err(error) => return fail(&inner, *work, &error),
        }
        if work.is_idle() {
            let mut state = inner.state();
            if state.queue.is_empty() {
                state.work = Some(work);
                return;
            }
        }
    }
}

/// The most urgent thing: new rows, then answers, then hashes, then waiting.
async fn step(
    inner: &Arc<Inner>,
    work: &mut Work,
    changes: &mut watch::Receiver<u64>,
    pacer: &mut Pacer,
) -> Result<(), StoreError> {
    if work.to_hash_bytes < HASH_BYTES_MAX {
        let job = inner.state().queue.pop_front();
        if let Some(job) = job {
            return start_job(inner, work, job, pacer).await;
        }
    }
    if !work.running.is_empty()
        && let Some(Some((index, answer))) = work.running.next().now_or_never()
    {
        return take_answer(inner, work, index, answer);
    }
    if let Some((index, piece)) = work.to_hash.pop_front() {
        work.to_hash_bytes -= piece.len();
        if let Some(hasher) = work.hashers.get_mut(index) {
            hasher.update(&piece);
        }
        pacer.spend(piece.len()).await;
        return Ok(());
    }
    if work.running.is_empty() {
        return settle(inner, work, changes).await;
    }
    tokio::select! {
        biased;
        Some((index, answer)) = work.running.next() => take_answer(inner, work, index, answer),
        changed = changes.changed() => {
            if changed.is_err() {
                return Err(StoreError::Internal);
            }
            all_up(inner)
        }
        () = inner.wake.notified() => Ok(()),
    }
}

/// Whether every device is still believed to answer; one that is not may never do.
fn all_up(inner: &Inner) -> Result<(), StoreError> {
    let view = inner.shared.view();
    let is_down = |position: &&Position| !view.link(position.link.device).is_some_and(|link| link.up);
    match inner.positions.iter().find(is_down) {
        Some(position) => Err(StoreError::Unavailable { device: position.link.device }),
        None => Ok(()),
    }
}

async fn start_job(inner: &Arc<Inner>, work: &mut Work, job: Job, pacer: &mut Pacer) -> Result<(), StoreError> {
    let first = work.rows;
    match job {
        Job::Append { rows, data, done } => {
            let segment_bytes = rows * inner.row_bytes();
            work.rows += rows;
            let shard_bytes = work.rows * UNIT_BYTES;
            // Before the work: if it fails, the caller is among those who are told.
            work.waiting.push_back(Waiting { shard_bytes, segment_bytes, done });
            write_rows(inner, work, first, (first + rows) * inner.row_bytes(), data, pacer).await
        }
        Job::Finish { footer, done } => {
            let end = first * inner.row_bytes() + footer.len() as u64;
            work.finish = Some((inner.shared.stripe(end)?.shard_bytes(), done));
            write_rows(inner, work, first, end, vec![footer], pacer).await
        }
    }
}

/// Encodes the rows of `data`, which is the segment from row `first` to byte `end`, and starts one append per position.
async fn write_rows(
    inner: &Arc<Inner>,
    work: &mut Work,
    first: u64,
    end: u64,
    data: Vec<Buf>,
    pacer: &mut Pacer,
) -> Result<(), StoreError> {
    let shared = &*inner.shared;
    let stripe = shared.stripe(end)?;
    let body = Body::new(data);
    let width = stripe.scheme().width();
    let mut shards: Vec<Vec<Buf>> = vec![Vec::new(); width];
    let rows: Vec<Row> = (first..stripe.row_count()).map_while(|number| stripe.row(number)).collect();
    for row in &rows {
        let units = encode_units(inner, &stripe, &body, row, first, pacer).await?;
        for (index, pieces) in units.into_iter().enumerate() {
            for piece in &pieces {
                work.to_hash_bytes += piece.len();
                work.to_hash.push_back((index, piece.clone()));
            }
            shards.get_mut(index).ok_or(StoreError::Internal)?.extend(pieces);
        }
    }
    let offset = first * UNIT_BYTES;
    for ((index, position), pieces) in inner.positions.iter().enumerate().zip(shards) {
        let bytes: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if bytes == 0 {
            continue;
        }
        shared.stats.shard_write_bytes.add(bytes);
        let link = &position.link;
        let answer: NodeResult<u64> =
            link.node.append_shard(link.device, position.incarnation, inner.shard(index), offset, pieces);
        work.running.push(Box::pin(answer.map(move |answer| (index, answer))));
    }
    Ok(())
}

/// The k + m units of a row; data units are the caller's memory wherever it is aligned.
async fn encode_units(
    inner: &Inner,
    stripe: &Stripe,
    body: &Body,
    row: &Row,
    first: u64,
    pacer: &mut Pacer,
) -> Result<Vec<Vec<Buf>>, StoreError> {
    let shared = &*inner.shared;
    let unit = row.unit as usize;
    let start = row.segment_offset - first * inner.row_bytes();
    let mut units = Vec::with_capacity(stripe.scheme().width());
    for shard in 0..stripe.k() as u64 {
        let (pieces, copied) = body.unit(&shared.bufs, start + shard * row.unit, unit);
        units.push(pieces);
        pacer.spend(copied).await;
    }
    let mut parity: Vec<BufMut> = (0..stripe.m()).map(|_| shared.bufs.get(unit)).collect();
    encode_row(&shared.codec, &units, &mut parity)?;
    units.extend(parity.into_iter().map(|shard| vec![shard.freeze()]));
    pacer.spend(stripe.k() * unit).await;
    Ok(units)
}

/// Notes how far a position has come and answers the appends that are complete now.
fn take_answer(inner: &Inner, work: &mut Work, index: usize, answer: Result<u64, NodeError>) -> Result<(), StoreError> {
    let length = answer.map_err(|error| row_error(inner.device(index), &error))?;
    let contiguous = work.contiguous.get_mut(index).ok_or(StoreError::Internal)?;
    *contiguous = length.max(*contiguous);
    let everywhere = work.contiguous.iter().copied().min().unwrap_or(0);
    while let Some(first) = work.waiting.front()
        && first.shard_bytes <= everywhere
        && let Some(first) = work.waiting.pop_front()
    {
        inner.state().complete = first.shard_bytes;
        inner.shared.stats.row_appends.inc();
        inner.shared.stats.row_bytes.add(first.segment_bytes);
        // A caller who does not wait any more does not want to know.
        let _ = first.done.send(Ok(()));
    }
    Ok(())
}

/// Nothing runs and everything is hashed: either all is complete and may be finished, or somebody has a gap.
async fn settle(inner: &Arc<Inner>, work: &mut Work, changes: &mut watch::Receiver<u64>) -> Result<(), StoreError> {
    let needed = match (&work.finish, work.waiting.front()) {
        (_, Some(waiting)) => waiting.shard_bytes,
        (Some((bytes, _)), None) => *bytes,
        (None, None) => return Ok(()),
    };
    if let Some(index) = work.contiguous.iter().position(|&length| length < needed) {
        return Err(StoreError::Unavailable { device: inner.device(index) });
    }
    let Some((bytes, _)) = &work.finish else { return Ok(()) };
    let bytes = *bytes;
    let calls: Vec<_> = inner
        .positions
        .iter()
        .zip(&work.hashers)
        .enumerate()
        .map(|(index, (position, hasher))| {
            let link = &position.link;
            let hash = hasher.finalize().into();
            let answer = link.node.finish_shard(link.device, position.incarnation, inner.shard(index), bytes, hash);
            answer.map(move |answer| (index, answer))
        })
        .collect();
    let mut all = join_all(calls);
    let answers = loop {
        tokio::select! {
            biased;
            answers = &mut all => break answers,
            changed = changes.changed() => {
                changed.map_err(|_| StoreError::Internal)?;
                all_up(inner)?;
            }
        }
    };
    for (index, answer) in answers {
        answer.map_err(|error| row_error(inner.device(index), &error))?;
    }
    inner.state().finish = FinishState::Finished;
    inner.shared.stats.rows_finished.inc();
    if let Some((_, done)) = work.finish.take() {
        // As above: whoever has gone does not want to know.
        let _ = done.send(Ok(()));
    }
    Ok(())
}

/// The segment has failed: everybody who waits, and everybody who comes, is told.
fn fail(inner: &Inner, work: Work, error: &StoreError) {
    tracing::warn!(segment = %inner.segment, %error, "a segment written by rows has failed");
    let queued = {
        let mut state = inner.state();
        state.failed = Some(error.clone());
        std::mem::take(&mut state.queue)
    };
    let queued = queued.into_iter().map(|job| match job {
        Job::Append { done, .. } | Job::Finish { done, .. } => done,
    });
    let waiting = work.waiting.into_iter().map(|waiting| waiting.done);
    let finish = work.finish.into_iter().map(|(_, done)| done);
    for done in waiting.chain(finish).chain(queued) {
        // A caller who has gone does not want to know.
        let _ = done.send(Err(error.clone()));
    }
}
