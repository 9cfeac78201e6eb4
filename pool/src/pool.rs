//! The pool itself: what it holds, and the trait it implements.

use crate::config::PoolConfig;
use crate::error::PoolError;
use crate::load::{self, HedgeBudget, Load};
use crate::stats::{PoolStats, Stats};
use crate::view::{PoolView, View};
use crate::{holes, members, plan, read, rows, seal, task};
use lsm_block::store::{Holes, NewMember, RowWriter, SegmentRead, SegmentStore, StoreError, StoreResult};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use xsan_env::{Buf, BufPool, Env};
use xsan_erasure::{Codec, Stripe};
use xsan_types::{
    ClosedMember, DeviceId, Epoch, FlushRequest, Generation, MemberRef, PgId, RegisterView, SEGMENT_BYTES_MAX, Scheme,
    SealedSegment, SegmentName, SetId, ShardId, VolumeId,
};

/// Unit of the memory budget of seals.
const BUDGET_UNIT: u64 = 64 << 10;
/// Repairs in place that may wait or run at once; more are left to the next read that meets the damage.
const REPAIRS_MAX: usize = 32;

/// Segments over devices; see the crate's documentation. Cheap to clone, clones are the same pool.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// What the parts of a pool share.
pub(crate) struct Shared {
    pub(crate) env: Env,
    pub(crate) config: PoolConfig,
    pub(crate) codec: Codec,
    pub(crate) bufs: BufPool,
    pub(crate) stats: Stats,
    /// The resolved map, and the one it was made of (to see what a new one changes).
    view: RwLock<Arc<View>>,
    map: Mutex<Map>,
    changes: watch::Sender<u64>,
    /// Nanoseconds after which a read is late.
    late_after: AtomicU64,
    pub(crate) hedges: HedgeBudget,
    /// In units of [`BUDGET_UNIT`]; fair.
    encode_budget: Semaphore,
    pub(crate) repairs: Arc<Semaphore>,
}

struct Map {
    given: Arc<PoolView>,
    /// Of every device ever seen.
    loads: BTreeMap<DeviceId, Arc<Load>>,
}

impl Pool {
    /// A pool under its first map. Memory for I/O comes from `bufs`.
    ///
    /// # Errors
    /// The map does not fit the scheme.
    pub fn new(env: Env, config: PoolConfig, map: Arc<PoolView>, bufs: BufPool) -> Result<Self, PoolError> {
        let mut loads = BTreeMap::new();
        let view = View::resolve(config.id, config.scheme.width(), &map, &mut loads)?;
        let permits = (config.encode_bytes_max / BUDGET_UNIT).clamp(1, u64::from(u32::MAX)) as usize;
        let late_after = u64::try_from(config.hedge_floor.as_nanos()).unwrap_or(u64::MAX);
        Ok(Self {
            shared: Arc::new(Shared {
                codec: Codec::new(config.scheme),
                stats: Stats::new(&config.registry, &config.name),
                view: RwLock::new(Arc::new(view)),
                map: Mutex::new(Map { given: map, loads }),
                changes: watch::Sender::new(0),
                late_after: AtomicU64::new(late_after),
                hedges: HedgeBudget::new(),
                encode_budget: Semaphore::new(permits.min(Semaphore::MAX_PERMITS)),
                repairs: Arc::new(Semaphore::new(REPAIRS_MAX)),
                env,
                config,
                bufs,
            }),
        })
    }

    /// Goes on under another map; calls that have started may finish under the one before. A map of an older epoch than
    /// the one in use is ignored.
    ///
    /// # Errors
    /// The map does not fit the scheme; the pool keeps the one it has.
    pub fn set_view(&self, map: Arc<PoolView>) -> Result<(), PoolError> {
        let shared = &self.shared;
        let mut current = shared.map.lock().unwrap_or_else(PoisonError::into_inner);
        if map.epoch < current.given.epoch {
            return Ok(());
        }
        let view = View::resolve(shared.config.id, shared.config.scheme.width(), &map, &mut current.loads)?;
        let is_change = map.differs(&current.given);
        current.given = map;
        *shared.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
        if is_change {
            shared.changes.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// The epoch of the map in use.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.view().epoch
    }

    /// The pool's redundancy.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.shared.config.scheme
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shared.stats.snapshot()
    }
}

impl Shared {
    /// The map in use.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.config.scheme
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The geometry of a segment. Lengths come from registers and footers that were verified, so a wrong one is refused as
    /// a broken rule.
    pub(crate) fn stripe(&self, segment_bytes: u64) -> Result<Stripe, StoreError> {
        if segment_bytes > SEGMENT_BYTES_MAX {
            return Err(StoreError::Internal);
        }
        Stripe::new(self.scheme(), segment_bytes).map_err(|_| StoreError::Internal)
    }

    /// When a read counts as late.
    pub(crate) fn late_after(&self) -> Duration {
        Duration::from_nanos(self.late_after.load(Ordering::Relaxed))
    }

    /// Takes one device's new percentile into account.
    pub(crate) fn refresh_late_after(&self) {
        let view = self.view();
        let late = load::late_after(view.links().iter().map(|link| link.load.p99_us()), self.config.hedge_floor);
        self.late_after.store(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Waits until `bytes` of encoding memory are free; one job that is larger than all of it runs alone.
    pub(crate) async fn encode_memory(&self, bytes: u64) -> tokio::sync::SemaphorePermit<'_> {
        let most = (self.config.encode_bytes_max / BUDGET_UNIT).max(1);
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT).min(most)).unwrap_or(u32::MAX);
        self.encode_budget.acquire_many(units).await.expect("the budget is never closed")
    }

    /// Members of a full set.
    fn members_wanted(&self) -> usize {
        self.scheme().tolerates() + 1
    }

    /// Members below which there is no set.
    fn members_least(&self) -> usize {
        if self.config.single_member || self.scheme().tolerates() == 0 { 1 } else { 2 }
    }
}

impl SegmentStore for Pool {
    fn data_shards(&self) -> usize {
        self.shared.scheme().k()
    }

    fn rows_possible(&self) -> bool {
        let scheme = self.shared.scheme();
        scheme.k() > 1 && self.shared.view().best_up == scheme.width()
    }

    fn plan_set(&self, volume: VolumeId, avoid: &[DeviceId]) -> Result<Vec<DeviceId>, StoreError> {
        let shared = &self.shared;
        plan::plan_set(&shared.view(), volume, avoid, shared.members_wanted(), shared.members_least())
    }

    fn set_size(&self) -> usize {
        self.shared.members_wanted().min(self.shared.view().domains).max(1)
    }

    fn choose_pg(&self, volume: VolumeId, number: u64, members: &[DeviceId]) -> PgId {
        let shared = &self.shared;
        let members = if shared.scheme().is_replica() { members } else { &[] };
        plan::choose_pg(&shared.view(), shared.config.id, volume, number, members)
    }

    fn create_member(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        manifest: Vec<SealedSegment>,
    ) -> StoreResult<NewMember> {
        members::create_member(&self.shared.view(), device, volume, set, manifest)
    }

    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> StoreResult<u64> {
        members::append(&self.shared.view(), member, segment, offset, data)
    }

    fn flush(&self, request: FlushRequest) -> StoreResult<()> {
        members::flush(&self.shared.view(), request)
    }

    fn confirm(&self, member: MemberRef) -> StoreResult<()> {
        members::confirm(&self.shared.view(), member)
    }

    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> StoreResult<Vec<ClosedMember>> {
        members::close(&self.shared.view(), device, volume, generation)
    }

    fn read_replica(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> StoreResult<Buf> {
        members::read_replica(&self.shared.view(), device, (volume, set), segment, offset, length)
    }

    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> StoreResult<()> {
        members::sealed(&self.shared.view(), member, segment)
    }

    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> StoreResult<()> {
        members::trim_manifest(&self.shared.view(), member, border, undecided)
    }

    fn registered(&self, view: RegisterView) -> StoreResult<()> {
        members::registered(&self.shared.view(), view)
    }

    fn seal(&self, segment: SegmentName, body: Vec<Buf>) -> StoreResult<Holes> {
        task::run_beside(&self.shared.env, "seal", seal::seal(Arc::clone(&self.shared), segment, body))
    }

    fn read(&self, read: SegmentRead) -> StoreResult<Buf> {
        read::read(&self.shared, read)
    }

    fn delete(&self, segments: Vec<SegmentName>) -> StoreResult<()> {
        members::delete(&self.shared.view(), &segments)
    }

    fn is_leaving(&self, device: DeviceId) -> bool {
        self.shared.view().link(device).is_none_or(|link| link.leaving)
    }

    fn map_epoch(&self) -> Epoch {
        self.shared.view().epoch
    }

    fn positions_before(&self, pg: PgId) -> Vec<Option<DeviceId>> {
        let view = self.shared.view();
        let device = |index| view.position_before(pg, index).map(|link| link.device);
        (0..self.shared.scheme().width()).map(device).collect()
    }

    fn positions(&self, pg: PgId) -> Vec<Option<DeviceId>> {
        let view = self.shared.view();
        (0..self.shared.scheme().width()).map(|index| view.position(pg, index).map(|link| link.device)).collect()
    }

    fn devices(&self) -> Vec<DeviceId> {
        self.shared.view().links().iter().filter(|link| link.up).map(|link| link.device).collect()
    }

    fn list(&self, device: DeviceId, volume: VolumeId, after: Option<ShardId>) -> StoreResult<Vec<ShardId>> {
        members::list(&self.shared.view(), device, volume, after)
    }

    fn fill_holes(&self, segment: SegmentName, segment_bytes: u64, holes: Holes) -> StoreResult<Holes> {
        let work = holes::fill(Arc::clone(&self.shared), segment, segment_bytes, holes);
        task::run_beside(&self.shared.env, "fill holes", work)
    }

    fn open_rows(&self, segment: SegmentName) -> StoreResult<Arc<dyn RowWriter>> {
        rows::open(&self.shared, segment)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes()
    }
}
