//! A [`SegmentStore`] in memory, for the tests of the volume engine: the rules of P3-P7 and P9 to the letter, every
//! failure at hand, no disk and no network.
//!
//! One device is one node and one failure domain. Misuse that a real pool could not see (a segment sealed before it was
//! acknowledged, a name used twice, a replica rewritten) panics, so that a bug of the engine shows where it happens.
//! Without an [`Env`] each call takes effect at once and in order; with one it takes effect after a random delay and is
//! answered after another, so calls overtake each other.

mod devices;
mod registers;
mod rows;

pub use registers::{MemoryRegisters, RegisterFault};

use crate::store::{Check, Holes, NewMember, RowWriter, SegmentRead, SegmentStore, StoreError, StoreResult};
use devices::{Device, Random, State};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use xsan_env::{Buf, Env};
use xsan_types::{
    BLOCK_BYTES, ClosedMember, DeviceId, Epoch, FlushRequest, Generation, MemberRef, PgId, PoolId, RegisterView,
    SEGMENT_BYTES_MAX, Scheme, SealedSegment, SegmentName, SetId, ShardId, ShardIndex, VolumeId, crc32c,
};

/// What a [`MemoryStore`] is made of.
#[derive(Clone)]
pub struct MemoryConfig {
    /// Redundancy; needs as many devices as it has positions.
    pub scheme: Scheme,
    /// Devices, numbered from 1.
    pub devices: u32,
    /// Logical sector of every device.
    pub sector: u32,
    /// Seed of what a power loss leaves behind.
    pub seed: u64,
    /// With a world: calls take random time up to `delay_max`, twice.
    pub env: Option<Env>,
    /// See `env`.
    pub delay_max: Duration,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            scheme: Scheme::rs(4, 2).expect("4+2 is a scheme"),
            devices: 6,
            sector: 512,
            seed: 1,
            env: None,
            delay_max: Duration::from_millis(2),
        }
    }
}

/// What happens to the call it is set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has no effect and fails.
    Refuse,
    /// It takes effect; the caller is told that nobody answers.
    LoseAnswer,
    /// It neither takes effect nor is answered until [`MemoryStore::release`].
    Stall,
}

/// The store; cheap to clone, all clones are the same store.
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

struct Inner {
    config: MemoryConfig,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    faults: Mutex<Faults>,
}

#[derive(Default)]
struct Faults {
    calls: u64,
    planned: BTreeMap<u64, Fault>,
    stalled: Vec<oneshot::Sender<()>>,
}

/// What a call does to the state, and the device it is for.
type Effect<T> = Box<dyn FnOnce(&mut State) -> Result<T, StoreError> + Send>;

impl MemoryStore {
    /// A store of empty devices, all up.
    ///
    /// # Panics
    /// When there are fewer devices than positions.
    #[must_use]
    pub fn new(config: MemoryConfig) -> Self {
        assert!(config.devices as usize >= config.scheme.width(), "one device per position");
        assert!(u64::from(config.sector) <= BLOCK_BYTES && config.sector.is_power_of_two(), "a sector size");
        let devices = (1..=config.devices).map(|n| (DeviceId(n.into()), Device::new(n.into()))).collect();
        let state = State {
            scheme: config.scheme,
            sector: config.sector.into(),
            order: (1..=config.devices).map(|n| DeviceId(n.into())).collect(),
            devices,
            segments: BTreeMap::new(),
            sealed_names: BTreeMap::new(),
            rows: BTreeMap::new(),
            registers: None,
            incarnations: u64::from(config.devices),
            random: Random(config.seed),
            leaving: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            before: BTreeMap::new(),
            epoch: 1,
            fills: 0,
        };
        Self(Arc::new(Inner {
            config,
            state: Mutex::new(state),
            changes: watch::Sender::new(0),
            faults: Mutex::default(),
        }))
    }

    /// From now on trims of manifests and deletes are checked against the registered checkpoints (P7).
    pub fn check_against(&self, registers: &MemoryRegisters) {
        self.state().registers = Some(registers.clone());
    }

    /// All devices, in order.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceId> {
        self.state().order.clone()
    }

    /// Whether the device answers.
    #[must_use]
    pub fn is_up(&self, device: DeviceId) -> bool {
        self.state().device(device).up
    }

    /// The storage process ends: calls in flight are lost, completed writes stay.
    pub fn stop(&self, device: DeviceId) {
        self.change(|state| state.device_mut(device).up = false);
    }

    /// The storage process starts: a new incarnation, all members are closed. A running one is restarted.
    pub fn start(&self, device: DeviceId) {
        self.change(|state| {
            state.incarnations += 1;
            let incarnation = state.incarnations;
            state.device_mut(device).start(incarnation);
        });
    }

    /// The host of the device loses power: of what was not flushed, each append stays, tears or goes. It stays down.
    pub fn power_loss(&self, device: DeviceId) {
        self.change(|state| state.power_loss(device));
    }

    /// All hosts lose power.
    pub fn power_loss_everywhere(&self) {
        for device in self.devices() {
            self.power_loss(device);
        }
    }

    /// The device is gone with everything on it. [`MemoryStore::start`] brings an empty one back under the same identity.
    pub fn lose(&self, device: DeviceId) {
        self.change(|state| state.lose(device));
    }

    /// From `offset` on nothing of a replica on this device can be read any more: bad sectors.
    pub fn set_unreadable(&self, device: DeviceId, offset: u64) {
        self.change(|state| state.unreadable.insert(device, offset));
    }

    /// Whether a device is being emptied: it carries no new members.
    pub fn set_leaving(&self, device: DeviceId, leaving: bool) {
        self.change(|state| if leaving { state.leaving.insert(device) } else { state.leaving.remove(&device) });
    }

    /// A position of all groups moves: its shards are still at the device that comes so many places after its own. `None`: the move is
    /// done, and they are at their places.
    pub fn move_position(&self, index: ShardIndex, behind: Option<usize>) {
        self.change(|state| {
            for group in 0..state.groups() {
                let at =
                    behind.map(|behind| state.order[(group as usize + index.0 as usize + behind) % state.order.len()]);
                match at {
                    Some(device) => state.before.insert((group, index.0), device),
                    None => state.before.remove(&(group, index.0)),
                };
            }
        });
    }

    /// A position of all groups has lost its shards, wherever they were.
    pub fn lose_position(&self, index: ShardIndex) {
        self.change(|state| {
            for sealed in state.segments.values_mut() {
                sealed.shards.remove(&index);
            }
        });
    }

    /// How often holes were to be filled.
    #[must_use]
    pub fn fills(&self) -> u64 {
        self.state().fills
    }

    /// Flips a bit of every copy of a sealed segment.
    ///
    /// # Panics
    /// When there is no such segment or byte.
    pub fn damage(&self, segment: SegmentName, offset: u64) {
        let mut state = self.state();
        let sealed = state.segments.get_mut(&segment).expect("damage of a segment that exists");
        let mut body = sealed.body.to_vec();
        body[offset as usize] ^= 1;
        sealed.body = Buf::copied(&body);
    }

    /// Names of all segments of a volume with at least one shard somewhere.
    #[must_use]
    pub fn segments(&self, volume: VolumeId) -> Vec<SegmentName> {
        self.state().segments.keys().copied().filter(|name| name.volume == volume).collect()
    }

    /// The bytes of a sealed segment, whoever is down.
    #[must_use]
    pub fn body(&self, segment: SegmentName) -> Option<Buf> {
        self.state().segments.get(&segment).map(|sealed| sealed.body.clone())
    }

    /// Members of a volume: device, set, and the names of the open replicas.
    #[must_use]
    pub fn members(&self, volume: VolumeId) -> Vec<(DeviceId, SetId, Vec<SegmentName>)> {
        let state = self.state();
        let mut found = Vec::new();
        for (&id, device) in &state.devices {
            for (&(owner, set), member) in &device.members {
                if owner == volume {
                    found.push((id, set, member.replicas.keys().copied().collect()));
                }
            }
        }
        found
    }

    /// Calls made so far: the number the next planned fault counts from.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.0.faults.lock().expect("faults lock").calls
    }

    /// Plans a fault for the call that is `after` calls away: 0 is the next one.
    pub fn plan(&self, after: u64, fault: Fault) {
        let mut faults = self.0.faults.lock().expect("faults lock");
        let at = faults.calls + after;
        faults.planned.insert(at, fault);
    }

    /// Faults that have not happened yet.
    #[must_use]
    pub fn planned_faults(&self) -> usize {
        self.0.faults.lock().expect("faults lock").planned.len()
    }

    /// Forgets the faults that have not happened.
    pub fn clear_plans(&self) {
        self.0.faults.lock().expect("faults lock").planned.clear();
    }

    /// Lets all stalled calls go on.
    pub fn release(&self) {
        for stalled in std::mem::take(&mut self.0.faults.lock().expect("faults lock").stalled) {
            // The caller may have dropped its future; then nobody waits.
            let _ = stalled.send(());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("state lock")
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) {
        {
            let mut state = self.state();
            change(&mut state);
            state.epoch += 1;
        }
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Runs a call: counted, perhaps failed, perhaps delayed.
    fn call<T: Send + 'static>(&self, device: Option<DeviceId>, effect: Effect<T>) -> StoreResult<T> {
        let fault = {
            let mut faults = self.0.faults.lock().expect("faults lock");
            faults.calls += 1;
            let at = faults.calls - 1;
            faults.planned.remove(&at)
        };
        let no_answer = match device {
            Some(device) => StoreError::Unavailable { device },
            None => StoreError::TooFew { found: 0, needed: self.0.config.scheme.k() },
        };
        let guarded: Effect<T> = Box::new(move |state| match device {
            Some(device) if !state.device(device).up => Err(StoreError::Unavailable { device }),
            _ => effect(state),
        });
        let effect: Effect<T> = match fault {
            None | Some(Fault::Stall) => guarded,
            Some(Fault::Refuse) => Box::new(move |_| Err(no_answer)),
            Some(Fault::LoseAnswer) => Box::new(move |state| guarded(state).and(Err(no_answer))),
        };
        if fault == Some(Fault::Stall) {
            let (release, released) = oneshot::channel();
            self.0.faults.lock().expect("faults lock").stalled.push(release);
            let store = self.clone();
            return Box::pin(async move {
                // An error means that the store is gone; the effect then harms nobody.
                drop(released.await);
                effect(&mut store.state())
            });
        }
        let Some(env) = self.0.config.env.clone() else {
            let result = effect(&mut self.state());
            return Box::pin(async move { result });
        };
        self.delayed(env, device, effect)
    }

    /// Runs the effect in a task of its own, so that dropping the caller's future does not undo it.
    fn delayed<T: Send + 'static>(&self, env: Env, device: Option<DeviceId>, effect: Effect<T>) -> StoreResult<T> {
        let incarnation = device.map(|device| self.state().device(device).incarnation);
        let span = u64::try_from(self.0.config.delay_max.as_nanos()).unwrap_or(u64::MAX).max(1);
        let store = self.clone();
        let (answer, answered) = oneshot::channel();
        let world = env.clone();
        env.spawn("memory-store", async move {
            world.sleep(Duration::from_nanos(world.random() % span)).await;
            let result = {
                let mut state = store.state();
                match device {
                    // The process that took the call is gone, and the call with it.
                    Some(device) if Some(state.device(device).incarnation) != incarnation => {
                        Err(StoreError::Unavailable { device })
                    }
                    _ => effect(&mut state),
                }
            };
            world.sleep(Duration::from_nanos(world.random() % span)).await;
            let restarted = device.is_some_and(|device| {
                let state = store.state();
                !state.device(device).up || Some(state.device(device).incarnation) != incarnation
            });
            let result = match device {
                Some(device) if restarted => result.and(Err(StoreError::Unavailable { device })),
                _ => result,
            };
            // The caller may have dropped its future.
            drop(answer.send(result));
        });
        Box::pin(async move { answered.await.unwrap_or(Err(StoreError::Internal)) })
    }
}

impl SegmentStore for MemoryStore {
    fn data_shards(&self) -> usize {
        self.0.config.scheme.k()
    }

    fn rows_possible(&self) -> bool {
        let state = self.state();
        state.scheme.k() > 1 && (0..state.groups()).any(|index| state.positions_up(index) == state.scheme.width())
    }

    fn plan_set(&self, volume: VolumeId, avoid: &[DeviceId]) -> Result<Vec<DeviceId>, StoreError> {
        let state = self.state();
        let wanted = state.scheme.tolerates() + 1;
        let needed = wanted.min(2);
        let count = state.order.len();
        let chosen: Vec<_> = (0..count)
            .map(|i| state.order[(volume.0 as usize + i) % count])
            .filter(|device| state.device(*device).up && !state.leaving.contains(device) && !avoid.contains(device))
            .take(wanted)
            .collect();
        if chosen.len() < needed { Err(StoreError::TooFew { found: chosen.len(), needed }) } else { Ok(chosen) }
    }

    fn set_size(&self) -> usize {
        self.0.config.scheme.tolerates() + 1
    }

    fn choose_pg(&self, volume: VolumeId, number: u64, members: &[DeviceId]) -> PgId {
        let state = self.state();
        let groups = state.groups();
        let start = (volume.0.wrapping_mul(31).wrapping_add(number) % u64::from(groups)) as u32;
        let preferred = (0..groups).map(|i| (start + i) % groups).find(|&index| {
            let devices = state.positions(index);
            state.scheme.is_replica() && members.iter().all(|member| devices.contains(member))
        });
        PgId { pool: PoolId(1), index: preferred.unwrap_or(start) }
    }

    fn create_member(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        manifest: Vec<SealedSegment>,
    ) -> StoreResult<NewMember> {
        self.call(Some(device), Box::new(move |state| state.create_member(device, volume, set, manifest)))
    }

    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> StoreResult<u64> {
        self.call(Some(member.device), Box::new(move |state| state.append(member, segment, offset, data)))
    }

    fn flush(&self, request: FlushRequest) -> StoreResult<()> {
        self.call(Some(request.device), Box::new(move |state| state.flush(&request)))
    }

    fn confirm(&self, member: MemberRef) -> StoreResult<()> {
        self.call(Some(member.device), Box::new(move |state| state.live(member).map(|_| ())))
    }

    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> StoreResult<Vec<ClosedMember>> {
        self.call(Some(device), Box::new(move |state| state.close(device, volume, generation)))
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
        self.call(
            Some(device),
            Box::new(move |state| {
                let member = state.device(device).members.get(&(volume, set)).ok_or(StoreError::NotFound)?;
                let replica = member.replicas.get(&segment).ok_or(StoreError::NotFound)?;
                let end = offset + u64::from(length);
                let unreadable = state.unreadable.get(&device).is_some_and(|&from| end > from);
                // As nodes do: whole sectors, and none that the disk cannot give.
                if unreadable || !offset.is_multiple_of(state.sector) || !end.is_multiple_of(state.sector) {
                    return Err(StoreError::Internal);
                }
                Ok(replica.read(offset, length))
            }),
        )
    }

    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> StoreResult<()> {
        self.call(Some(member.device), Box::new(move |state| state.sealed(member, segment)))
    }

    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> StoreResult<()> {
        self.call(
            Some(member.device),
            Box::new(move |state| {
                state.check_decided(member.volume, border.saturating_sub(1));
                let manifest = &mut state.live(member)?.manifest;
                manifest.retain(|line| line.name.number >= border || undecided.contains(&line.name.number));
                Ok(())
            }),
        )
    }

    fn registered(&self, view: RegisterView) -> StoreResult<()> {
        self.call(
            None,
            Box::new(move |state| {
                state.registered(view);
                Ok(())
            }),
        )
    }

    fn seal(&self, segment: SegmentName, body: Vec<Buf>) -> StoreResult<Holes> {
        let (last, rest) = body.split_last().map_or((0, &[][..]), |(last, rest)| (last.len(), rest));
        assert!(last > 0, "a segment has bytes");
        assert!(rest.iter().all(|piece| piece.len().is_multiple_of(BLOCK_BYTES as usize)), "whole blocks but the last");
        let body = concat(&body);
        assert!(body.len() as u64 <= SEGMENT_BYTES_MAX, "{segment} is too large");
        self.call(None, Box::new(move |state| state.seal(segment, body)))
    }

    fn read(&self, read: SegmentRead) -> StoreResult<Buf> {
        assert!(read.offset.is_multiple_of(BLOCK_BYTES), "reads start at a block");
        assert!(read.length > 0, "reads have a length");
        self.call(
            None,
            Box::new(move |state| {
                let data = state.read(&read)?;
                let good = match &read.check {
                    Check::Whole(crc) => crc32c(&data) == *crc,
                    Check::Blocks(crcs) => {
                        assert_eq!(crcs.len() * BLOCK_BYTES as usize, data.len(), "one checksum per block");
                        data.chunks(BLOCK_BYTES as usize).zip(crcs).all(|(block, crc)| crc32c(block) == *crc)
                    }
                };
                let damaged = StoreError::Corrupt { segment: read.segment, offset: read.offset };
                if good { Ok(data) } else { Err(damaged) }
            }),
        )
    }

    fn delete(&self, segments: Vec<SegmentName>) -> StoreResult<()> {
        self.call(
            None,
            Box::new(move |state| {
                for name in segments {
                    state.check_decided(name.volume, name.number);
                    state.delete(name);
                }
                Ok(())
            }),
        )
    }

    fn positions(&self, pg: PgId) -> Vec<Option<DeviceId>> {
        self.state().positions(pg.index).into_iter().map(Some).collect()
    }

    fn devices(&self) -> Vec<DeviceId> {
        let state = self.state();
        state.order.iter().copied().filter(|device| state.device(*device).up).collect()
    }

    fn positions_before(&self, pg: PgId) -> Vec<Option<DeviceId>> {
        let state = self.state();
        (0..state.scheme.width()).map(|index| state.before.get(&(pg.index, index as u8)).copied()).collect()
    }

    fn is_leaving(&self, device: DeviceId) -> bool {
        self.state().leaving.contains(&device)
    }

    fn map_epoch(&self) -> Epoch {
        Epoch(self.state().epoch)
    }

    fn list(&self, device: DeviceId, volume: VolumeId, after: Option<ShardId>) -> StoreResult<Vec<ShardId>> {
        self.call(Some(device), Box::new(move |state| Ok(state.list(device, volume, after))))
    }

    fn fill_holes(&self, segment: SegmentName, segment_bytes: u64, holes: Holes) -> StoreResult<Holes> {
        self.call(None, Box::new(move |state| state.fill_holes(segment, segment_bytes, &holes)))
    }

    fn open_rows(&self, segment: SegmentName) -> StoreResult<Arc<dyn RowWriter>> {
        let store = self.clone();
        self.call(
            None,
            Box::new(move |state| {
                state.open_rows(segment)?;
                Ok(Arc::new(rows::MemoryRows::new(store, segment)) as Arc<dyn RowWriter>)
            }),
        )
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }
}

/// All positions of a scheme as shard indexes.
fn shard_indexes(width: usize) -> impl Iterator<Item = ShardIndex> {
    (0..width).map(|index| ShardIndex(u8::try_from(index).expect("at most 64 positions")))
}

fn concat(pieces: &[Buf]) -> Buf {
    let mut out = xsan_env::BufMut::heap(pieces.iter().map(|piece| piece.len()).sum());
    let mut at = 0;
    for piece in pieces {
        out[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    out.freeze()
}

#[cfg(test)]
mod tests;
