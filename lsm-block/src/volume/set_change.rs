//! P5: a member failed, or a domain came back. The owner makes the next set, copies manifest and all unsealed bytes to it,
//! flushed, and registers it; nothing is acknowledged, flushed, confirmed or entered meanwhile.

use super::journal::Stage;
use super::shared::{Health, Member, ServingSet, count};
use super::writer::{Event, Writer};
use crate::error::VolumeError;
use crate::store::StoreError;
use futures::StreamExt;
use futures::future::try_join_all;
use std::collections::VecDeque;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, Moment};
use xsan_types::{
    DeviceId, FlushRequest, MemberRef, RegisterChange, RegisterError, RegisterView, SealedSegment, SegmentName, SetId,
};

/// How long to wait for nodes to come back before the next try, if no change is reported.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Before the second attempt to grow a set.
pub(super) const GROW_PAUSE: Duration = Duration::from_secs(1);
const GROW_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Longest that an attempt to grow may hold up a set that serves.
const GROW_MAX: Duration = Duration::from_secs(2);

/// Records of a segment by offset.
type Records = Vec<(u64, Buf)>;

/// What a new member must hold.
struct Cargo {
    manifest: Vec<SealedSegment>,
    /// Unsealed segments and their records, in order.
    replicas: Vec<(SegmentName, u64, Records)>,
}

impl Writer {
    /// Replaces the serving set. Returns when a new one serves, or when the volume has stopped.
    pub(super) async fn change_set(&mut self) {
        let mut avoid: Vec<DeviceId> = Vec::new();
        let mut since: Option<Moment> = None;
        while !self.shared.health.borrow().is_final() {
            let mut changes = self.shared.store.changes();
            self.settle_register().await;
            if self.superseded().await {
                return;
            }
            let failed = self.failed_members.iter().map(|&member| self.set.members[member].at.device);
            let mut avoided: Vec<DeviceId> = failed.collect();
            avoided.append(&mut avoid);
            let next = if self.failed_members.is_empty() {
                let env = self.shared.env.clone();
                let silent = SetFailure::Plan(StoreError::Internal);
                env.timeout(GROW_MAX, self.next_set(&avoided)).await.unwrap_or(Err(silent))
            } else {
                self.next_set(&avoided).await
            };
            match next {
                Ok(set) => match self.register_set(&set).await {
                    Ok(()) => return self.serve_set(set).await,
                    Err(error) if self.fenced(&error) => return,
                    Err(error) => tracing::error!(volume = %self.shared.id, %error, "the set was not registered"),
                },
                // Only growth was wanted: the serving set is fine.
                Err(_) if self.failed_members.is_empty() => {
                    self.grow = false;
                    return self.grow_later();
                }
                Err(SetFailure::Device(device, error)) => {
                    tracing::warn!(volume = %self.shared.id, %device, %error, "new journal member failed");
                    self.full |= error == StoreError::NoSpace;
                    avoid = avoided;
                    avoid.push(device);
                    if avoid.len() < 64 {
                        continue;
                    }
                    avoid.clear();
                }
                // A restarted node can carry the next set, under its new incarnation: do not avoid it for ever.
                Err(SetFailure::Plan(_)) if !avoided.is_empty() && self.plan_without_avoiding().await => return,
                Err(SetFailure::Plan(error)) => {
                    let began = *since.get_or_insert_with(|| self.shared.env.now());
                    self.shared.set_health(Health::Waiting { since: began, reason: error.to_string() });
                }
            }
            self.shared.env.timeout(RETRY_AFTER, changes.changed()).await;
            self.time_out_requests();
        }
    }

    /// The last resort of a small pool: the failed device itself may be back.
    async fn plan_without_avoiding(&mut self) -> bool {
        let Ok(set) = self.next_set(&[]).await else { return false };
        match self.register_set(&set).await {
            Ok(()) => {
                self.serve_set(set).await;
                true
            }
            Err(error) => self.fenced(&error),
        }
    }

    /// Grows a set that was made while domains were down, or leaves devices that are being emptied.
    pub(super) fn grow_set(&mut self) {
        self.grow = self.failed_members.is_empty() && self.can_grow();
    }

    fn can_grow(&self) -> bool {
        let store = &self.shared.store;
        let members = self.set.members.len();
        // A device that is being emptied is left as soon as there are others for all members.
        let is_leaving = self.set.members.iter().any(|member| store.is_leaving(member.at.device));
        (members < store.set_size() || is_leaving)
            && store
                .plan_set(self.shared.id, &[])
                .is_ok_and(|planned| planned.len() > members || (is_leaving && planned.len() == members))
    }

    /// Tries again after a while, longer each time: a try holds up acknowledgements, and one that fails leaves members behind until the
    /// next set is registered. After a few tries, or without enough nodes in the map, only a change of the map gives hope.
    fn grow_later(&mut self) {
        if self.grow_timer || self.grow_pause > GROW_PAUSE_MAX || !self.can_grow() {
            return;
        }
        self.grow_timer = true;
        let sleep = self.shared.env.sleep(self.grow_pause);
        self.grow_pause *= 2;
        self.events.push(Box::pin(async move {
            sleep.await;
            Event::GrowAgain
        }));
    }

    /// Makes the members of the next set and copies everything to them, flushed.
    async fn next_set(&mut self, avoid: &[DeviceId]) -> Result<ServingSet, SetFailure> {
        let devices = self.shared.store.plan_set(self.shared.id, avoid).map_err(SetFailure::Plan)?;
        // A number is used once, whatever becomes of the attempt: members of a failed one keep what they were given.
        self.set_number += 1;
        let id = SetId { generation: self.set.id.generation, number: self.set_number };
        let cargo = Arc::new(self.cargo());
        let members = try_join_all(devices.into_iter().map(|device| self.fill_member(device, id, Arc::clone(&cargo))));
        Ok(ServingSet { id, members: members.await? })
    }

    fn cargo(&self) -> Cargo {
        let listed = |stage: &Stage| match stage {
            Stage::Manifest { sealed, .. } => Some(*sealed),
            _ => None,
        };
        let mut manifest = self.manifest.clone();
        manifest.extend(self.segments.values().filter_map(|segment| listed(&segment.stage)));
        manifest.extend(self.row_segments.values().filter_map(|rows| listed(&rows.stage)));
        let replicas = self
            .segments
            .values()
            .filter(|segment| segment.needs_members() && segment.end > 0)
            .map(|segment| {
                let records = segment.records.iter().map(|record| (record.offset, record.bytes.clone())).collect();
                (segment.name, segment.end, records)
            })
            .collect();
        Cargo { manifest, replicas }
    }

    fn fill_member(
        &self,
        device: DeviceId,
        id: SetId,
        cargo: Arc<Cargo>,
    ) -> impl Future<Output = Result<Member, SetFailure>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        let sector_max = self.sector;
        async move {
            let failed = |error| SetFailure::Device(device, error);
            let made =
                shared.store.create_member(device, shared.id, id, cargo.manifest.clone()).await.map_err(failed)?;
            if made.sector > sector_max && !cargo.replicas.is_empty() {
                // Its sector is larger than the offsets of what is to be copied.
                return Err(failed(StoreError::Internal));
            }
            let at = MemberRef { device, volume: shared.id, set: id, incarnation: made.incarnation };
            let sent = shared.env.now();
            for (name, end, records) in &cargo.replicas {
                let appends =
                    records.iter().map(|(offset, bytes)| shared.store.append(at, *name, *offset, bytes.clone()));
                let lengths = try_join_all(appends).await.map_err(failed)?;
                if lengths.into_iter().max() != Some(*end) {
                    return Err(failed(StoreError::Internal));
                }
            }
            let flush = FlushRequest {
                device,
                incarnation: made.incarnation,
                member: Some(at),
                replicas: cargo.replicas.iter().map(|(name, end, _)| (*name, *end)).collect(),
                shards: Vec::new(),
            };
            shared.store.flush(flush).await.map_err(failed)?;
            Ok(Member { at, sector: made.sector, confirmed: AtomicU64::new(sent.0) })
        }
    }

    async fn register_set(&mut self, set: &ServingSet) -> Result<(), RegisterError> {
        // Once the register may know the new set, the members of the old one confirm nothing any more (P5).
        self.shared.pause_reads(true);
        let change = RegisterChange::Set(Some(set.registered()));
        match self.register_change(change).await {
            Ok(register) => {
                self.register = register;
                Ok(())
            }
            // Answered, and refused: the old set stays.
            Err(error) => {
                self.shared.pause_reads(false);
                Err(error)
            }
        }
    }

    /// The new set is registered: it alone counts from here on.
    async fn serve_set(&mut self, set: ServingSet) {
        count(&self.shared.counters.set_changes, 1);
        tracing::info!(volume = %self.shared.id, set = %set.id, members = set.members.len(), "journal set changed");
        self.failed_members.clear();
        self.grow = false;
        let set = Arc::new(set);
        self.set = Arc::clone(&set);
        if set.members.len() >= self.shared.store.set_size() {
            self.grow_pause = GROW_PAUSE;
        }
        self.grow_later();
        self.shared.take_suspects();
        let mut complete = Vec::new();
        for (&number, segment) in &mut self.segments {
            segment.contiguous = vec![segment.end; set.members.len()];
            segment.flushed = segment.end;
            if matches!(segment.stage, Stage::Manifest { .. }) {
                complete.push(number);
            }
        }
        complete.extend(
            self.row_segments.iter().filter(|(_, r)| matches!(r.stage, Stage::Manifest { .. })).map(|(&n, _)| n),
        );
        // The copied manifests hold these names already.
        for number in complete {
            self.sealed(number);
        }
        self.shared.set.send_replace(Arc::clone(&set));
        self.shared.pause_reads(false);
        self.stalled = false;
        self.shared.set_health(Health::Serving);
        let view = RegisterView {
            volume: self.shared.id,
            generation: self.register.generation,
            set: Some(set.id),
            deleted: false,
        };
        let told = self.shared.store.registered(view);
        self.events.push(Box::pin(async move {
            // Best effort: a node that missed it frees its old members at the next one.
            let _ = told.await;
            Event::Nothing
        }));
    }

    /// A register write that runs already ends first: its answer carries the version the next one names.
    async fn settle_register(&mut self) {
        let mut postponed = Vec::new();
        while self.checkpoint.is_registering() && !self.shared.health.borrow().is_final() {
            match self.events.next().await {
                Some(Event::CheckpointRegistered(result)) => self.checkpoint_registered(result),
                Some(event) => postponed.push(event),
                None => break,
            }
        }
        self.events.extend(postponed.into_iter().map(|event| -> BoxFuture<'static, Event> { Box::pin(ready(event)) }));
    }

    /// Whether the register says that a newer owner exists.
    async fn superseded(&mut self) -> bool {
        match self.shared.registers.read(self.shared.id).await {
            Ok(register) if register.generation > self.register.generation => {
                self.shared.stop(Health::Fenced(register.generation));
                true
            }
            Err(RegisterError::NotFound) => {
                self.shared.stop(Health::Closed);
                true
            }
            _ => false,
        }
    }

    /// During a stall: requests that have waited for `io_timeout` get their error; new ones begin to wait.
    pub(super) fn time_out_requests(&mut self) {
        let now = self.shared.env.now();
        let mut taken = VecDeque::new();
        self.shared.take_requests(&mut taken);
        self.backlog.extend(taken.into_iter().map(super::batch::Queued::from));
        let limit = self.shared.tuning.io_timeout;
        let full = self.full;
        let mut kept = VecDeque::new();
        for mut queued in self.backlog.drain(..) {
            let since = *queued.since.get_or_insert(now);
            if full {
                let _ = queued.request.into_done().send(Err(VolumeError::NoSpace));
            } else if now.since(since) >= limit {
                let _ = queued.request.into_done().send(Err(VolumeError::TimedOut));
            } else {
                kept.push_back(queued);
            }
        }
        self.backlog = kept;
        let began = match &*self.shared.health.borrow() {
            Health::Waiting { since, .. } => *since,
            _ => now,
        };
        if full || now.since(began) >= limit {
            // Their batches stay in order and may still be written: a failed write may or may not have happened.
            let error = if full { VolumeError::NoSpace } else { VolumeError::TimedOut };
            let waiting = self.in_flight.iter_mut().flat_map(|batch| batch.requests.drain(..)).map(|(done, _)| done);
            let mut waiting: Vec<_> = waiting.collect();
            waiting.append(&mut self.flush_waiters);
            for done in waiting {
                let _ = done.send(Err(error.clone()));
            }
        }
    }
}

enum SetFailure {
    Plan(StoreError),
    Device(DeviceId, StoreError),
}
