//! One volume: the owner's state machine (P1-P10) and the handle its clients use.
//!
//! A [`Volume`] is a handle on [`Shared`] state. Guest changes go through a queue to the one task that owns the log
//! ([`writer`]); reads run in the caller's task over the index and the store ([`read`]). Take-over and recovery happen
//! before the writer starts ([`recover`]).

mod batch;
mod checkpoint;
mod journal;
mod read;
mod reconcile;
mod recover;
mod replay;
mod rows;
mod seal;
mod set_change;
mod shared;
mod writer;

use crate::error::VolumeError;
use crate::index::{Index, PageCache, StatusRun};
use crate::store::{Registers, SegmentStore};
use shared::{Request, Shared};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufPool, Env};
use xsan_types::{BLOCK_BYTES, BlockRange, SECTOR_BYTES, VolumeId};

pub use shared::{Health, Piece, VolumeCounters, VolumeStatus};

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AckPolicy {
    /// On all journal members; a FLUSH makes it stable there.
    #[default]
    Replicated,
    /// On stable media of all journal members.
    Persisted,
}

/// Bounds of a volume; the defaults need no tuning.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Logical bytes of a sealed segment.
    pub segment_bytes: u64,
    /// Appends in flight before the next batch waits (and grows).
    pub batches_in_flight: usize,
    /// Segments being sealed before writes wait.
    pub seals_in_flight: usize,
    /// How long I/O waits for nodes to return.
    pub io_timeout: Duration,
    /// P8's T: how long a member's confirmation lets reads be answered.
    pub read_window: Duration,
    /// An idle volume seals its open segment after this time, to give its memory back (H18).
    pub idle_seal_after: Duration,
    /// Checkpoint after this much memory of unregistered index entries…
    pub delta_bytes_max: usize,
    /// …or after this many bytes written.
    pub checkpoint_bytes: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            segment_bytes: crate::segment::SEGMENT_BYTES,
            batches_in_flight: 3,
            seals_in_flight: 2,
            io_timeout: Duration::from_secs(60),
            read_window: Duration::from_millis(500),
            idle_seal_after: Duration::from_secs(10),
            delta_bytes_max: 32 << 20,
            checkpoint_bytes: 4 << 30,
        }
    }
}

/// What a volume is opened with.
#[derive(Clone)]
pub struct VolumeConfig {
    /// The volume.
    pub id: VolumeId,
    /// The world.
    pub env: Env,
    /// I/O memory.
    pub buffers: BufPool,
    /// Members and segments.
    pub store: Arc<dyn SegmentStore>,
    /// The registers.
    pub registers: Arc<dyn Registers>,
    /// Index pages of all volumes of this gateway.
    pub cache: Arc<PageCache>,
    /// When writes are acknowledged.
    pub ack: AckPolicy,
    /// Bounds.
    pub tuning: Tuning,
}

/// A served volume. Operations start at the call, in the order of the calls; dropping a returned future does not undo it.
pub struct Volume {
    shared: Arc<Shared>,
}

type Outcome<T> = BoxFuture<'static, Result<T, VolumeError>>;

impl Volume {
    /// Takes the volume over (P10) and serves it: a new generation, recovery from whatever the last owner left, a
    /// checkpoint and a new journal set in one commit.
    ///
    /// # Errors
    /// `NotFound` in the register, a newer taker, or too few nodes for `io_timeout`.
    pub async fn open(config: VolumeConfig) -> Result<Arc<Self>, VolumeError> {
        let recovered = recover::take_over(&config).await?;
        let shared = Shared::new(config, &recovered);
        let owner = writer::Writer::new(Arc::clone(&shared), recovered);
        shared.env.spawn("volume-writer", owner.run());
        Ok(Arc::new(Self { shared }))
    }

    /// Current size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.size()
    }

    /// State and counters, for people and metrics.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        self.shared.status()
    }

    /// Completes when the volume stops serving, and why.
    pub fn stopped(&self) -> BoxFuture<'static, Health> {
        let mut health = self.shared.health.subscribe();
        Box::pin(async move {
            loop {
                let now = health.borrow_and_update().clone();
                if now.is_final() || health.changed().await.is_err() {
                    return now;
                }
            }
        })
    }

    /// Reads; offset and length are multiples of 512 inside the volume.
    pub fn read(&self, offset: u64, length: u64) -> Outcome<Vec<Piece>> {
        if let Err(error) = self.check(offset, length) {
            return Box::pin(async move { Err(error) });
        }
        Box::pin(read::read(Arc::clone(&self.shared), offset, length))
    }

    /// Writes; offset and length are multiples of 512 inside the volume. Completes when acknowledged (and flushed, with
    /// `fua`).
    pub fn write(&self, offset: u64, data: Buf, fua: bool) -> Outcome<()> {
        if let Err(error) = self.check(offset, data.len() as u64) {
            return Box::pin(async move { Err(error) });
        }
        if data.is_empty() {
            return Box::pin(async { Ok(()) });
        }
        self.submit(|done| Request::Write { offset, data, fua, done })
    }

    /// Makes the range read as zeroes.
    pub fn zero(&self, offset: u64, length: u64, fua: bool) -> Outcome<()> {
        if let Err(error) = self.check(offset, length) {
            return Box::pin(async move { Err(error) });
        }
        if length == 0 {
            return Box::pin(async { Ok(()) });
        }
        self.submit(|done| Request::Zero { offset, length, fua, done })
    }

    /// Discards whole blocks inside the range.
    pub fn trim(&self, offset: u64, length: u64, fua: bool) -> Outcome<()> {
        let end = match self.check(offset, length) {
            // The last partial block of a volume does not exist: sizes are whole blocks.
            Ok(()) => (offset + length) / BLOCK_BYTES * BLOCK_BYTES,
            Err(error) => return Box::pin(async move { Err(error) }),
        };
        let start = offset.next_multiple_of(BLOCK_BYTES);
        if start >= end {
            return Box::pin(async { Ok(()) });
        }
        self.submit(|done| Request::Zero { offset: start, length: end - start, fua, done })
    }

    /// Completes when everything acknowledged before the call is on stable media.
    pub fn flush(&self) -> Outcome<()> {
        self.submit(|done| Request::Flush { done })
    }

    /// Allocation map in whole blocks, from the block of `offset`.
    pub fn allocation(&self, offset: u64, length: u64, runs_max: usize) -> Outcome<Vec<StatusRun>> {
        let range = BlockRange::between(offset / BLOCK_BYTES, (offset + length).div_ceil(BLOCK_BYTES));
        let shared = Arc::clone(&self.shared);
        let checked = self.check(offset, length);
        Box::pin(async move {
            checked?;
            let runs = shared.index.status(range, runs_max).await?;
            read::confirm(&shared).await?;
            Ok(runs)
        })
    }

    /// Changes the size (a positive multiple of 4096). A shrink discards the tail first, flushed, so that a later grow shows zeroes (P2).
    pub fn resize(&self, size: u64) -> Outcome<()> {
        if size == 0 || !size.is_multiple_of(BLOCK_BYTES) || size > 1 << 60 {
            return Box::pin(async { Err(VolumeError::Invalid) });
        }
        self.submit(|done| Request::Resize { size, done })
    }

    /// Writes a checkpoint now; for tests and operators.
    pub fn checkpoint(&self) -> Outcome<()> {
        self.submit(|done| Request::Checkpoint { done })
    }

    /// Clean hand-over: seals, checkpoints, gives the set up, stops (P10). The next open needs no recovery.
    pub fn close(&self) -> Outcome<()> {
        self.submit(|done| Request::Close { done })
    }

    /// Stops at once without sealing, as a crash would; for a volume that is being deleted, and for tests.
    pub fn abandon(&self) {
        self.shared.stop(Health::Closed);
    }

    fn submit(&self, request: impl FnOnce(oneshot::Sender<Result<(), VolumeError>>) -> Request) -> Outcome<()> {
        let (done, outcome) = oneshot::channel();
        self.shared.submit(request(done));
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { outcome.await.unwrap_or_else(|_| Err(shared.final_error())) })
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        let aligned = offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES);
        match offset.checked_add(length) {
            Some(end) if aligned && end <= self.shared.size() => Ok(()),
            _ => Err(VolumeError::Invalid),
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.shared.stop(Health::Closed);
    }
}

/// The index of a volume for tools; read-only.
impl Volume {
    /// The index.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.shared.index
    }
}
