//! Journal members on one device (P3-P6, P10).

use crate::counters::count;
use crate::device::{Device, Running};
use crate::finish::{Finish, spawned};
use crate::format::LogRecord;
use crate::state::{Member, map_range};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{
    ClosedMember, FlushRequest, Generation, MemberRef, MemberState, OpenReplica, RegisterView, SEGMENT_BYTES_MAX,
    SealedSegment, SegmentName, SetId, VolumeId,
};
use xsan_wire::node::{CreateMember, CreatedMember, NodeError, NodeResult};

/// Replicas and open shards grow by at least this.
const GROWTH_BYTES: u64 = 1 << 20;
/// An open replica is at most this long: records of a segment with headers and rows.
const REPLICA_BYTES_MAX: u64 = 2 * SEGMENT_BYTES_MAX;

type Calls<T> = Result<T, NodeError>;

impl Device {
    pub(crate) fn create_member(self: &Arc<Self>, request: CreateMember) -> NodeResult<CreatedMember> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            let made = CreatedMember { incarnation: device.incarnation, sector: device.sector };
            let key = (request.volume, request.set);
            let mut known = false;
            {
                let inner = device.lock();
                if inner.closed_below.get(&request.volume).is_some_and(|&below| request.set.generation < below) {
                    return Err(NodeError::Closed);
                }
                match inner.state.members.get(&key) {
                    Some(member)
                        if member.incarnation == device.incarnation
                            && !member.closed
                            && member.manifest == request.manifest
                            && member.replicas.is_empty() =>
                    {
                        known = true;
                    }
                    // A name of a set is used once (P1): what is there belongs to another process.
                    Some(_) => return Err(NodeError::Closed),
                    None => {}
                }
            }
            if known {
                // The call that made it may still be waiting for its flush.
                device.flush().await?;
                return Ok(made);
            }
            let record = LogRecord::MemberCreated {
                volume: request.volume,
                set: request.set,
                boot: device.boot,
                incarnation: device.incarnation,
                manifest: request.manifest,
            };
            let _ = device.commit(vec![record]).await?;
            device.flush().await?;
            Ok(made)
        })
    }

    /// The member, if it is live and not closed.
    fn live<'a>(&self, inner: &'a mut crate::device::Inner, at: &MemberRef) -> Calls<&'a mut Member> {
        if at.incarnation != self.incarnation {
            return Err(NodeError::NotLive { current: self.incarnation });
        }
        let member = inner.state.members.get_mut(&(at.volume, at.set)).ok_or(NodeError::NotFound)?;
        if member.closed || member.incarnation != self.incarnation {
            return Err(NodeError::Closed);
        }
        Ok(member)
    }

    pub(crate) fn append(
        self: &Arc<Self>,
        at: MemberRef,
        segment: SegmentName,
        offset: u64,
        data: Buf,
    ) -> NodeResult<u64> {
        count(&self.counters.appends, 1);
        count(&self.counters.append_bytes, data.len() as u64);
        match self.start_append(&at, segment, offset, data) {
            Ok(append) => append,
            Err(error) => Box::pin(async move { Err(error) }),
        }
    }

    /// Everything up to the start of the device write happens in the caller's turn, so that appends stay in order.
    fn start_append(
        self: &Arc<Self>,
        at: &MemberRef,
        segment: SegmentName,
        offset: u64,
        data: Buf,
    ) -> Calls<NodeResult<u64>> {
        self.check_writable()?;
        let bytes = data.len() as u64;
        let end = offset.checked_add(bytes).filter(|&end| end <= REPLICA_BYTES_MAX).ok_or(NodeError::Invalid)?;
        let sector = u64::from(self.sector);
        if bytes == 0 || !offset.is_multiple_of(sector) || !bytes.is_multiple_of(sector) {
            return Err(NodeError::Invalid);
        }
        let (ranges, has_grown) = {
            let mut inner = self.lock();
            let member = self.live(&mut inner, at)?;
            let (reserved, contiguous) =
                member.replicas.get(&segment).map_or((0, 0), |replica| (replica.reserved(), replica.contiguous));
            if end <= contiguous {
                // A repeat of what is there.
                return Ok(Box::pin(async move { Ok(contiguous) }));
            }
            if offset > reserved {
                return Err(NodeError::Invalid);
            }
            let grown = if end > reserved {
                Self::take_journal_space(&mut inner, (end - reserved).max(GROWTH_BYTES))?
            } else {
                Vec::new()
            };
            let member = self.live(&mut inner, at)?;
            let replica = member.replicas.entry(segment).or_default();
            replica.grow(grown.clone());
            let ranges = map_range(&replica.extents, offset, bytes).ok_or(NodeError::Invalid)?;
            member.in_flight += 1;
            let has_grown = !grown.is_empty();
            if has_grown {
                let (volume, set) = (at.volume, at.set);
                Self::log_next(&mut inner, LogRecord::ReplicaGrew { volume, set, segment, extents: grown });
            }
            (ranges, has_grown)
        };
        let write = self.start_write(&ranges, vec![data]);
        // The reservation must be in the log before the bytes in it count.
        let logged = has_grown.then(|| self.commit_unlogged());
        let device = Arc::clone(self);
        let running = Running::new(self);
        let (volume, set) = (at.volume, at.set);
        Ok(Finish::boxed(&self.env, async move {
            let _running = running;
            let written = write.await;
            let logged = match logged {
                Some(logged) => logged.await,
                None => Ok(()),
            };
            let mut inner = device.lock();
            let member = inner.state.members.get_mut(&(volume, set));
            let outcome = match member {
                None => Err(NodeError::Closed),
                Some(member) => {
                    member.in_flight -= 1;
                    match (written, logged, member.replicas.get_mut(&segment)) {
                        (Ok(()), Ok(()), Some(replica)) => {
                            replica.complete(offset, end);
                            Ok(replica.contiguous)
                        }
                        (Ok(()), Ok(()), None) => Err(NodeError::NotFound),
                        (Err(error), _, _) | (_, Err(error), _) => Err(error),
                    }
                }
            };
            drop(inner);
            device.progress.notify_waiters();
            outcome
        }))
    }

    pub(crate) fn flush_request(self: &Arc<Self>, request: FlushRequest) -> NodeResult<()> {
        count(&self.counters.flush_requests, 1);
        let device = Arc::clone(self);
        spawned(&self.env, async move {
            loop {
                let progress = device.progress.notified();
                let mut progress = std::pin::pin!(progress);
                progress.as_mut().enable();
                if device.is_complete(&request)? {
                    break;
                }
                progress.await;
            }
            device.flush().await?;
            // Closed meanwhile: the flush happened, but a newer owner decides now.
            device.is_complete(&request).map(|_| ())
        })
    }

    /// Whether everything a flush names is complete on the device.
    fn is_complete(&self, request: &FlushRequest) -> Calls<bool> {
        self.check_writable()?;
        if request.incarnation != self.incarnation {
            return Err(NodeError::NotLive { current: self.incarnation });
        }
        let mut inner = self.lock();
        if let Some(at) = &request.member {
            let member = self.live(&mut inner, at)?;
            for (segment, length) in &request.replicas {
                match member.replicas.get(segment) {
                    Some(replica) if replica.contiguous < *length => return Ok(false),
                    Some(_) => {}
                    // Sealed in between: its seal flushed it.
                    None if member.manifest.iter().any(|line| line.name == *segment) => {}
                    None => return Err(NodeError::NotFound),
                }
            }
        }
        for (shard, length) in &request.shards {
            if let Some(open) = inner.state.open_shards.get(shard)
                && open.incarnation == self.incarnation
                && open.space.contiguous.saturating_sub(crate::format::SHARD_HEADER_BYTES as u64) < *length
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(crate) fn confirm(&self, at: &MemberRef) -> Calls<()> {
        self.check_alive()?;
        let mut inner = self.lock();
        self.live(&mut inner, at).map(|_| ())
    }

    /// P10, step 2.
    pub(crate) fn close_members(
        self: &Arc<Self>,
        volume: VolumeId,
        generation: Generation,
    ) -> NodeResult<Vec<ClosedMember>> {
        let device = Arc::clone(self);
        Box::pin(async move {
            device.check_alive()?;
            {
                let mut inner = device.lock();
                let below = inner.closed_below.entry(volume).or_insert(generation);
                if *below > generation {
                    return Err(NodeError::Closed);
                }
                *below = generation;
                for ((of, set), member) in &mut inner.state.members {
                    if *of == volume && set.generation < generation {
                        member.closed = true;
                    }
                }
            }
            // What is in flight ends before the answer: nothing is answered ok after it (C7).
            loop {
                let progress = device.progress.notified();
                let mut progress = std::pin::pin!(progress);
                progress.as_mut().enable();
                let busy =
                    device.lock().state.members.iter().any(|((of, set), member)| {
                        *of == volume && set.generation < generation && member.in_flight > 0
                    });
                if !busy {
                    break;
                }
                progress.await;
            }
            device.check_alive()?;
            let inner = device.lock();
            let mut closed: Vec<ClosedMember> = inner
                .state
                .members
                .iter()
                .filter(|((of, set), _)| *of == volume && set.generation < generation)
                .map(|(&(_, set), member)| ClosedMember {
                    set,
                    state: device.member_state(member),
                    manifest: member.manifest.clone(),
                    replicas: member
                        .replicas
                        .iter()
                        .map(|(&segment, replica)| {
                            let is_own = member.incarnation == device.incarnation;
                            let complete = if is_own { replica.contiguous } else { 0 };
                            OpenReplica { segment, length: replica.reserved(), complete }
                        })
                        .collect(),
                })
                .collect();
            closed.sort_by_key(|member| std::cmp::Reverse(member.set));
            Ok(closed)
        })
    }

    fn member_state(&self, member: &Member) -> MemberState {
        if member.incarnation == self.incarnation {
            MemberState::Live
        } else if member.boot == self.boot {
            MemberState::Whole
        } else {
            MemberState::Flushed
        }
    }

    pub(crate) fn read_replica(
        self: &Arc<Self>,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> NodeResult<Buf> {
        let device = Arc::clone(self);
        Box::pin(async move {
            let ranges = {
                let inner = device.lock();
                let member = inner.state.members.get(&(volume, set)).ok_or(NodeError::NotFound)?;
                let replica = member.replicas.get(&segment).ok_or(NodeError::NotFound)?;
                map_range(&replica.extents, offset, length.into()).ok_or(NodeError::Invalid)?
            };
            let sector = u64::from(device.sector);
            if ranges.iter().any(|range| !range.offset.is_multiple_of(sector) || !range.bytes.is_multiple_of(sector)) {
                return Err(NodeError::Invalid);
            }
            device.read_ranges(&ranges).await
        })
    }

    /// P6: the manifest line is durable before the replica's space is free.
    pub(crate) fn sealed(self: &Arc<Self>, at: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            {
                // In flight, as an append is: a close answers with the line or with the replica, never with one that is about
                // to go.
                let mut inner = device.lock();
                device.live(&mut inner, &at)?.in_flight += 1;
            }
            let entered = device.enter_line(&at, segment).await;
            if let Some(member) = device.lock().state.members.get_mut(&(at.volume, at.set)) {
                member.in_flight -= 1;
            }
            device.progress.notify_waiters();
            entered?;
            let mut inner = device.lock();
            device.live(&mut inner, &at).map(|_| ())
        })
    }

    async fn enter_line(self: &Arc<Self>, at: &MemberRef, segment: SealedSegment) -> Calls<()> {
        let known = {
            let inner = self.lock();
            let member = inner.state.members.get(&(at.volume, at.set)).ok_or(NodeError::NotFound)?;
            member.manifest.iter().any(|line| line.name == segment.name)
        };
        if known {
            return self.flush().await;
        }
        let record = LogRecord::Sealed { volume: at.volume, set: at.set, segment };
        let committed = self.commit(vec![record]).await?;
        self.flush().await?;
        self.give_back(&committed.freed);
        Ok(())
    }

    pub(crate) fn trim_manifest(self: &Arc<Self>, at: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            {
                let mut inner = device.lock();
                device.live(&mut inner, &at)?;
            }
            let record = LogRecord::ManifestTrimmed { volume: at.volume, set: at.set, border, undecided };
            device.commit(vec![record]).await.map(|_| ())
        })
    }

    /// Frees what the register no longer counts (P2, P5).
    pub(crate) fn registered(self: &Arc<Self>, view: RegisterView) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            if view.deleted {
                return device.free_volume(view.volume).await;
            }
            let records: Vec<LogRecord> = {
                let mut inner = device.lock();
                let old_set = |set: &SetId| match view.set {
                    Some(registered) => *set < registered,
                    None => set.generation < view.generation,
                };
                let old_shard = |generation: Generation| match view.set {
                    Some(registered) => generation < registered.generation,
                    None => generation < view.generation,
                };
                // Closed first: no append may begin in space that is about to be free.
                let below = inner.closed_below.entry(view.volume).or_insert(view.generation);
                *below = view.generation.max(*below);
                for ((of, set), member) in &mut inner.state.members {
                    member.closed |= *of == view.volume && old_set(set);
                }
                let members = inner.state.members.iter();
                let members = members.filter(|((of, set), member)| {
                    // Its last writes still run: freed at the next occasion.
                    *of == view.volume && old_set(set) && member.in_flight == 0
                });
                let mut records: Vec<LogRecord> =
                    members.map(|(&(volume, set), _)| LogRecord::MemberFreed { volume, set }).collect();
                for (&shard, open) in &mut inner.state.open_shards {
                    let is_old = shard.segment.volume == view.volume && old_shard(shard.segment.generation);
                    if is_old && open.in_flight == 0 {
                        // Nothing is appended to it and nobody finishes it until the record is written.
                        open.finishing = true;
                        records.push(LogRecord::OpenShardFreed { shard });
                    }
                }
                records
            };
            if records.is_empty() {
                return Ok(());
            }
            let committed = device.commit(records).await?;
            device.flush().await?;
            device.give_back(&committed.freed);
            Ok(())
        })
    }
}
