//! A storage node in memory with one device. Calls take effect when made and are answered at once, unless told otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;
use xsan_env::{Buf, BufMut};
use xsan_types::{
    ClosedMember, DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment,
    SegmentName, SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};

/// One shard.
#[derive(Clone, Default)]
pub struct Shard {
    pub bytes: Vec<u8>,
    pub hash: [u8; 32],
    pub open: bool,
    /// Written ranges of an open shard that lie behind a gap.
    behind_gap: BTreeMap<u64, Vec<u8>>,
}

/// What calls wait for before they are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stall {
    pub reads: bool,
    pub puts: bool,
    pub appends: bool,
}

#[derive(Default)]
pub struct State {
    pub incarnation: Incarnation,
    pub epoch: Epoch,
    pub is_down: bool,
    pub is_full: bool,
    /// Knows a map in which what it has not got is another device's.
    pub is_left: bool,
    /// Fails the call with this number (counted over all calls from now) with the error.
    pub fail_call: Option<(u64, NodeError)>,
    pub calls: u64,
    pub shards: BTreeMap<ShardId, Shard>,
    /// Shards whose block (by number) cannot be read until it is written.
    pub unreadable: BTreeSet<(ShardId, u64)>,
    pub reads: u64,
    pub repairs: u64,
    pub puts_running: BTreeSet<ShardId>,
    pub deleted: Vec<SegmentName>,
    pub registered: Vec<RegisterView>,
    pub flushed: Vec<FlushRequest>,
}

pub struct FakeNode {
    pub device: DeviceId,
    state: Arc<Mutex<State>>,
    pub stall: watch::Sender<Stall>,
}

impl FakeNode {
    pub fn new(device: DeviceId) -> Arc<Self> {
        let state = State { incarnation: Incarnation(1), ..State::default() };
        Arc::new(Self { device, state: Arc::new(Mutex::new(state)), stall: watch::Sender::default() })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A new process on the device: open shards take no more.
    pub fn restart(&self) {
        let mut state = self.state();
        state.incarnation = state.incarnation.next();
    }

    /// Does `work` now, answers when `is_stalled` says no.
    fn call<T: Send + 'static>(
        &self,
        is_stalled: fn(&Stall) -> bool,
        work: impl FnOnce(&mut State) -> Result<T, NodeError>,
    ) -> NodeResult<T> {
        let mut state = self.state();
        state.calls += 1;
        let calls = state.calls;
        let result = match state.fail_call.clone() {
            _ if state.is_down => Err(NodeError::Unavailable),
            Some((at, error)) if at == calls => Err(error),
            _ => work(&mut state),
        };
        let mut stall = self.stall.subscribe();
        Box::pin(async move {
            stall.wait_for(|stall| !is_stalled(stall)).await.map_err(|_| NodeError::Unavailable)?;
            result
        })
    }
}

fn joined(pieces: &[Buf]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
    pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
    bytes
}

impl State {
    fn absent(&self) -> NodeError {
        if self.is_left { NodeError::StaleEpoch { current: self.epoch } } else { NodeError::NotFound }
    }

    fn live(&self, incarnation: Incarnation) -> Result<(), NodeError> {
        if incarnation == self.incarnation { Ok(()) } else { Err(NodeError::NotLive { current: self.incarnation }) }
    }

    fn read(&mut self, shard: ShardId, offset: u64, length: u32) -> Result<Buf, NodeError> {
        self.reads += 1;
        let found = self.shards.get(&shard).ok_or(self.absent())?;
        let range = offset as usize..offset as usize + length as usize;
        let bytes = found.bytes.get(range).ok_or(NodeError::Invalid)?;
        let blocks = offset / 4096..(offset + u64::from(length)) / 4096;
        if blocks.clone().any(|block| self.unreadable.contains(&(shard, block))) {
            return Err(NodeError::Corrupt);
        }
        let mut buf = BufMut::heap(bytes.len());
        buf.copy_from_slice(bytes);
        Ok(buf.freeze())
    }

    fn append(&mut self, shard: ShardId, offset: u64, data: &[Buf]) -> Result<u64, NodeError> {
        let entry = self.shards.entry(shard).or_insert_with(|| Shard { open: true, ..Shard::default() });
        if !entry.open || !data.iter().all(|piece| piece.is_aligned(4096)) {
            return Err(NodeError::Invalid);
        }
        entry.behind_gap.insert(offset, joined(data));
        while let Some(bytes) = entry.behind_gap.remove(&(entry.bytes.len() as u64)) {
            entry.bytes.extend(bytes);
        }
        Ok(entry.bytes.len() as u64)
    }
}

impl NodeApi for FakeNode {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        let device = self.device;
        self.call(
            |_| false,
            |state| {
                Ok(vec![DeviceStatus {
                    device,
                    incarnation: state.incarnation,
                    capacity: 1 << 40,
                    used: 0,
                    sector: 4096,
                    shards: state.shards.len() as u64,
                    members: 0,
                    failed: false,
                }])
            },
        )
    }

    fn create_member(&self, _: CreateMember) -> NodeResult<CreatedMember> {
        self.call(|_| false, |state| Ok(CreatedMember { incarnation: state.incarnation, sector: 4096 }))
    }

    fn append(&self, member: MemberRef, _: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        self.call(
            |stall| stall.appends,
            |state| {
                state.live(member.incarnation)?;
                Ok(offset + data.len() as u64)
            },
        )
    }

    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| {
                state.live(request.incarnation)?;
                state.flushed.push(request);
                Ok(())
            },
        )
    }

    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        self.call(|_| false, |state| state.live(member.incarnation))
    }

    fn close(&self, _: DeviceId, _: VolumeId, _: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.call(|_| false, |_| Ok(Vec::new()))
    }

    fn read_replica(&self, _: DeviceId, _: VolumeId, _: SetId, _: SegmentName, _: u64, _: u32) -> NodeResult<Buf> {
        self.call(|_| false, |_| Err(NodeError::NotFound))
    }

    fn sealed(&self, member: MemberRef, _: SealedSegment) -> NodeResult<()> {
        self.call(|_| false, |state| state.live(member.incarnation))
    }

    fn trim_manifest(&self, member: MemberRef, _: u64, _: Vec<u64>) -> NodeResult<()> {
        self.call(|_| false, |state| state.live(member.incarnation))
    }

    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| {
                state.registered.push(view);
                Ok(())
            },
        )
    }

    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        assert_eq!(request.device, self.device);
        assert!(request.data.iter().all(|piece| piece.is_aligned(4096)), "devices take whole aligned blocks");
        let shard = request.shard;
        let answer = self.call(
            |stall| stall.puts,
            |state| {
                if request.epoch < state.epoch {
                    return Err(NodeError::StaleEpoch { current: state.epoch });
                }
                if state.is_full {
                    return Err(NodeError::NoSpace);
                }
                let bytes = joined(&request.data);
                assert_eq!(request.hash, *blake3::hash(&bytes).as_bytes(), "the hash is that of the bytes");
                state.shards.insert(shard, Shard { bytes, hash: request.hash, ..Shard::default() });
                state.puts_running.insert(shard);
                Ok(())
            },
        );
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            let result = answer.await;
            state.lock().unwrap().puts_running.remove(&shard);
            result
        })
    }

    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        assert_eq!(device, self.device);
        assert!(offset.is_multiple_of(4096) && length.is_multiple_of(4096) && length > 0);
        self.call(|stall| stall.reads, |state| state.read(shard, offset, length))
    }

    fn repair_shard(&self, _: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        assert!(data.is_aligned(4096) && offset.is_multiple_of(4096));
        self.call(
            |_| false,
            |state| {
                let found = state.shards.get_mut(&shard).filter(|found| !found.open).ok_or(NodeError::NotFound)?;
                found.bytes[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
                let blocks = offset / 4096..(offset + data.len() as u64) / 4096;
                state.repairs += blocks.end - blocks.start;
                state.unreadable.retain(|&(of, block)| of != shard || !blocks.contains(&block));
                Ok(())
            },
        )
    }

    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| match state.shards.get(&request.shard) {
                Some(found) if found.hash == request.hash => Ok(()),
                _ => Err(NodeError::NotFound),
            },
        )
    }
    fn shard_info(&self, _: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.call(
            |_| false,
            |state| {
                let found = state.shards.get(&shard).ok_or(state.absent())?;
                Ok(ShardInfo { shard, bytes: found.bytes.len() as u64, hash: found.hash, open: found.open })
            },
        )
    }

    fn verify_shard(&self, _: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| {
                let found = state.shards.get(&shard).ok_or(NodeError::NotFound)?;
                if *blake3::hash(&found.bytes).as_bytes() == found.hash { Ok(()) } else { Err(NodeError::Corrupt) }
            },
        )
    }

    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| {
                state.shards.retain(|shard, _| !segments.contains(&shard.segment));
                state.deleted.extend(segments);
                Ok(())
            },
        )
    }

    fn list_shards(&self, _: DeviceId, _: VolumeId, _: Option<ShardId>, _: u32) -> NodeResult<Vec<ShardInfo>> {
        self.call(|_| false, |_| Ok(Vec::new()))
    }

    fn append_shard(
        &self,
        _: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.call(
            |stall| stall.appends,
            |state| {
                state.live(incarnation)?;
                if state.is_full { Err(NodeError::NoSpace) } else { state.append(shard, offset, &data) }
            },
        )
    }

    fn finish_shard(
        &self,
        _: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.call(
            |_| false,
            |state| {
                state.live(incarnation)?;
                let found = state.shards.get_mut(&shard).ok_or(NodeError::NotFound)?;
                assert_eq!(found.bytes.len() as u64, bytes, "finished at its length");
                assert_eq!(*blake3::hash(&found.bytes).as_bytes(), hash, "the hash is that of the bytes");
                (found.open, found.hash) = (false, hash);
                Ok(())
            },
        )
    }
}
