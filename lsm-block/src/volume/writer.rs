//! The task that owns a volume's log. One loop: an event or waiting requests come in, state changes, and [`Writer::advance`]
//! restores the invariants (acknowledge in order, seal what can be sealed, flush for who waits, checkpoint when due).

use super::AckPolicy;
use super::batch::{Base, Queued};
use super::checkpoint::{CHECKPOINT_PAUSE, CheckpointStage};
use super::journal::{Batch, RowSegment, Segment, Stage};
use super::reconcile::Reconcile;
use super::recover::Recovered;
use super::set_change::GROW_PAUSE;
use super::shared::{Done, Health, OpenSegment, RecordMemory, Request, ServingSet, Shared, count};
use crate::error::VolumeError;
use crate::store::{Holes, RowWriter, StoreError};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufMut, Moment};
use xsan_types::{
    BLOCK_BYTES, CheckpointRef, FlushRequest, Register, RegisterError, SealedSegment, SegmentName, Sequence, SetId,
    ShardId, ShardIndex,
};

/// How often is looked whether what waits still moves.
const STALL_CHECK_AFTER: Duration = Duration::from_secs(2);

/// What the writer waits for besides requests.
pub(super) enum Event {
    /// A member answered an append.
    Appended { set: SetId, member: usize, number: u64, result: Result<u64, StoreError>, sent: Moment },
    /// All positions answered the rows of a batch.
    RowsWritten { batch: u64, result: Result<(), StoreError> },
    /// A row segment was opened.
    RowsOpened { name: SegmentName, result: Result<Arc<dyn RowWriter>, StoreError> },
    /// The shards of a segment are written (or of the one that stands for it).
    ShardsWritten { number: u64, sealed: SealedSegment, holes: Holes, changes: Vec<crate::index::Change> },
    /// A member entered a sealed name in its manifest.
    Entered { set: SetId, member: usize, number: u64, result: Result<(), StoreError> },
    /// A flush round ended.
    Flushed { set: SetId, result: Result<(), FlushFailure> },
    /// The old content of a partial block arrived.
    Fetched { request: Request, base: Result<Base, VolumeError> },
    /// An index build ended.
    CheckpointBuilt(Result<CheckpointRef, VolumeError>),
    /// The register answered a checkpoint.
    CheckpointRegistered(Result<Register, RegisterError>),
    /// Nobody wrote for a while.
    Idle { written: u64 },
    /// Old reads may be gone.
    Bury,
    /// Nodes came or went.
    NodesChanged,
    /// Holes of a segment were looked after.
    HolesFilled { number: u64, asked: Vec<ShardIndex>, holes: Option<Holes> },
    /// Some segments still miss positions.
    HolesAgain,
    /// The tail of a shrunk volume is discarded (or nothing was to discard): the size can be registered.
    SizeReady { size: u64, done: Done },
    /// Every member was asked whether it is live.
    Confirmed { set: SetId, sent: Moment, results: Vec<Result<(), StoreError>> },
    /// Time to ask devices what they hold.
    Reconcile,
    /// What a device holds.
    Names(Result<Vec<ShardId>, StoreError>),
    /// Time to see whether the set can have more members.
    GrowAgain,
    /// Time to see whether what waits still moves.
    StallCheck,
    /// Done, nothing to do.
    Nothing,
}

/// What failed in a flush round.
pub(super) struct FlushFailure {
    /// The journal member that failed, if it was one.
    pub member: Option<(usize, StoreError)>,
    /// A row segment's device failed.
    pub rows: bool,
}

/// A flush round in progress.
pub(super) struct FlushRound {
    pub waiters: Vec<Done>,
    /// Acknowledged lengths when the round began.
    pub lengths: Vec<(u64, u64)>,
    /// Segments whose names were on their way into the manifests: until every member has answered, neither its replica nor its
    /// manifest need outlive a loss of power.
    pub entering: Vec<u64>,
    /// The members have flushed.
    pub flushed: bool,
}

/// What the loop does next.
enum Step {
    Event(Event),
    Requests,
    Suspects,
    Stop,
}

/// Names that wait until older reads are gone (R5).
pub(super) struct Grave {
    pub token: Arc<()>,
    pub names: Vec<SegmentName>,
}

pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub set: Arc<ServingSet>,
    /// The last set number that was used, in vain or not.
    pub set_number: u64,
    pub register: Register,
    /// Largest sector of the set's devices.
    pub sector: u32,
    pub sequence: Sequence,
    pub next_number: Arc<AtomicU64>,
    pub next_batch: u64,
    pub backlog: VecDeque<Queued>,
    pub events: FuturesUnordered<BoxFuture<'static, Event>>,
    pub in_flight: VecDeque<Batch>,
    pub segments: BTreeMap<u64, Segment>,
    /// The segment that takes records.
    pub current: Option<u64>,
    pub chunk: Option<BufMut>,
    pub row_segments: BTreeMap<u64, RowSegment>,
    /// The row segment that takes rows.
    pub rows: Option<u64>,
    /// The row segment that takes them next, opened before the open one is full. Nothing was written to it.
    pub rows_ahead: Option<u64>,
    pub rows_opening: bool,
    pub manifest: Vec<SealedSegment>,
    pub flush_waiters: Vec<Done>,
    pub flush_round: Option<FlushRound>,
    pub checkpoint: CheckpointStage,
    /// So much changed while no checkpoint could be registered that nothing more is taken: memory is bounded.
    pub delta_full: bool,
    pub checkpoint_waiters: Vec<Done>,
    /// The last border: names below it belong to a checkpoint.
    pub cut: u64,
    /// After a failure the next checkpoint begins then, at the earliest.
    pub checkpoint_after: Moment,
    pub checkpoint_pause: Duration,
    pub graves: Vec<Grave>,
    pub burying: bool,
    /// Row segments that stand elsewhere now: deleted when a checkpoint has decided them.
    pub evacuated: Vec<SegmentName>,
    /// Requests that wait for the old content of a block.
    pub parked: usize,
    pub written_bytes: u64,
    pub written_at_checkpoint: u64,
    pub idle_timer: bool,
    pub stall_timer: bool,
    /// Nothing was completed for a while although somebody waits.
    pub stalled: bool,
    /// When something was completed last, or somebody began to wait.
    pub progress: Moment,
    pub closing: Option<Done>,
    /// Devices of members that failed in the current set.
    pub failed_members: Vec<usize>,
    /// A larger set is possible than the one that serves.
    pub grow: bool,
    pub grow_timer: bool,
    pub reconcile: Reconcile,
    /// The set whose members are being asked whether they are live.
    pub confirming: Option<SetId>,
    /// Before the next attempt to grow.
    pub grow_pause: Duration,
    /// The last thing that failed for want of room: new writes are refused until an append succeeds.
    pub full: bool,
    pub filling_holes: bool,
    /// Segments up to this number were looked at in this pass.
    pub holes_after: u64,
    /// Sizes that can be registered.
    pub sizes: VecDeque<(u64, Done)>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, recovered: Recovered) -> Self {
        Self {
            sector: recovered.set.members.iter().map(|member| member.sector).max().unwrap_or(512),
            set_number: recovered.set.id.number,
            set: recovered.set,
            register: recovered.register,
            sequence: Sequence(0),
            next_number: Arc::new(AtomicU64::new(recovered.next_number)),
            next_batch: 0,
            backlog: VecDeque::new(),
            events: FuturesUnordered::new(),
            in_flight: VecDeque::new(),
            segments: BTreeMap::new(),
            current: None,
            chunk: None,
            row_segments: BTreeMap::new(),
            rows: None,
            rows_ahead: None,
            rows_opening: false,
            manifest: Vec::new(),
            flush_waiters: Vec::new(),
            flush_round: None,
            checkpoint: CheckpointStage::Idle,
            delta_full: false,
            checkpoint_waiters: Vec::new(),
            cut: 0,
            checkpoint_after: Moment(0),
            checkpoint_pause: CHECKPOINT_PAUSE,
            graves: vec![Grave { token: Arc::new(()), names: recovered.dead }],
            burying: false,
            evacuated: Vec::new(),
            parked: 0,
            written_bytes: 0,
            written_at_checkpoint: 0,
            idle_timer: false,
            stall_timer: false,
            stalled: false,
            progress: Moment(0),
            closing: None,
            failed_members: Vec::new(),
            grow: false,
            grow_timer: false,
            reconcile: Reconcile::default(),
            confirming: None,
            grow_pause: GROW_PAUSE,
            full: false,
            filling_holes: false,
            holes_after: 0,
            sizes: VecDeque::new(),
            shared,
        }
    }

    /// Runs until the volume is closed or fenced.
    pub(super) async fn run(mut self) {
        self.watch_nodes();
        self.look_after_holes();
        self.bury();
        self.reconcile_later();
        // Nodes that came back while the volume was taken over are no change any more.
        self.events.push(Box::pin(std::future::ready(Event::GrowAgain)));
        loop {
            match self.step().await {
                Step::Stop => break,
                Step::Event(event) => self.handle(event),
                Step::Requests => {
                    let mut taken = VecDeque::new();
                    self.shared.take_requests(&mut taken);
                    self.backlog.extend(taken.into_iter().map(Queued::from));
                }
                Step::Suspects => self.look_at_suspects(),
            }
            self.advance().await;
        }
        self.fail_everything();
    }

    async fn step(&mut self) -> Step {
        let shared = Arc::clone(&self.shared);
        std::future::poll_fn(|context| {
            shared.register_waker(context.waker());
            if shared.health.borrow().is_final() {
                return Poll::Ready(Step::Stop);
            }
            if let Poll::Ready(Some(event)) = self.events.poll_next_unpin(context) {
                return Poll::Ready(Step::Event(event));
            }
            if shared.has_suspects() {
                return Poll::Ready(Step::Suspects);
            }
            if self.takes_requests() && (shared.has_requests() || !self.backlog.is_empty()) {
                return Poll::Ready(Step::Requests);
            }
            Poll::Pending
        })
        .await
    }

    /// Whether another batch may be built now; else requests wait and the next batch grows.
    fn takes_requests(&self) -> bool {
        let sealing = self.segments.values().filter(|segment| segment.frozen).count()
            + self.row_segments.values().filter(|rows| rows.frozen).count();
        self.in_flight.len() < self.shared.tuning.batches_in_flight
            && sealing < self.shared.tuning.seals_in_flight * 2
            && !self.delta_full
            && self.closing.is_none()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Appended { set, member, number, result, sent } => {
                self.appended(set, member, number, result, sent);
            }
            Event::RowsWritten { batch, result } => self.rows_written(batch, result),
            Event::RowsOpened { name, result } => self.rows_opened(name, result),
            Event::ShardsWritten { number, sealed, holes, changes } => {
                self.shards_written(number, sealed, holes, changes);
            }
            Event::Entered { set, member, number, result } => self.entered(set, member, number, result),
            Event::Flushed { set, result } => self.flushed(set, result),
            Event::Fetched { request, base } => self.fetched(request, base),
            Event::CheckpointBuilt(result) => self.checkpoint_built(result),
            Event::CheckpointRegistered(result) => self.checkpoint_registered(result),
            Event::Idle { written } => self.idle(written),
            Event::Bury => {
                self.burying = false;
                self.bury();
            }
            Event::NodesChanged => {
                self.watch_nodes();
                self.shared.unchecked.store(true, Ordering::Relaxed);
                self.look_after_holes();
                // What is open may have lost a part that nobody asks for while guests are quiet: members are asked, and rows are
                // sealed, which says what is missing and has it filled. The next losses then count from a whole volume.
                self.confirm_set();
                self.rotate_rows();
                self.grow_pause = GROW_PAUSE;
                self.grow_set();
                self.reconcile_later();
            }
            Event::HolesFilled { number, asked, holes } => self.holes_filled(number, &asked, holes),
            Event::HolesAgain => {
                self.filling_holes = false;
                self.look_after_holes();
            }
            Event::Confirmed { set, sent, results } => self.confirmed(set, sent, results),
            Event::Reconcile => self.begin_reconcile(),
            Event::Names(page) => self.names_told(page),
            Event::GrowAgain => {
                self.grow_timer = false;
                self.grow_set();
            }
            Event::SizeReady { size, done } => self.sizes.push_back((size, done)),
            Event::StallCheck => self.check_stall(),
            Event::Nothing => {}
        }
    }

    /// Restores the invariants after any change.
    pub(super) async fn advance(&mut self) {
        self.acknowledge();
        if !self.failed_members.is_empty() || self.grow {
            self.change_set().await;
            self.acknowledge();
        }
        while self.takes_requests() && !self.backlog.is_empty() {
            if !self.build_batch() {
                break;
            }
        }
        self.start_seals();
        self.end_flush_round();
        self.start_flush_round();
        self.advance_checkpoint();
        while !self.sizes.is_empty() && !self.checkpoint.is_registering() {
            let (size, done) = self.sizes.pop_front().expect("not empty");
            self.commit_size(size, done).await;
        }
        self.advance_close().await;
        self.start_idle_timer();
        self.start_stall_timer();
    }

    fn is_waiting(&self) -> bool {
        !self.backlog.is_empty()
            || !self.in_flight.is_empty()
            || !self.flush_waiters.is_empty()
            || self.flush_round.is_some()
            || self.shared.has_requests()
    }

    /// As long as somebody waits: whatever holds the log up (a set change does so itself), it is said, and bounded.
    fn start_stall_timer(&mut self) {
        if self.stall_timer || !self.is_waiting() {
            return;
        }
        self.stall_timer = true;
        if !self.stalled {
            self.progress = self.shared.env.now();
        }
        let sleep = self.shared.env.sleep(STALL_CHECK_AFTER);
        self.events.push(Box::pin(async move {
            sleep.await;
            Event::StallCheck
        }));
    }

    fn check_stall(&mut self) {
        self.stall_timer = false;
        if !self.is_waiting() {
            // Whoever waited has been answered.
            return self.moved();
        }
        if self.shared.env.now().since(self.progress) < STALL_CHECK_AFTER {
            return;
        }
        self.stalled = true;
        let sealing = self.segments.values().filter(|segment| segment.frozen).count()
            + self.row_segments.values().filter(|rows| rows.frozen).count();
        let mut reason = format!("no write or flush was completed; {sealing} segments wait for their seals");
        if self.delta_full {
            reason.push_str(", and changes fill memory until a checkpoint is registered");
        }
        self.shared.set_health(Health::Waiting { since: self.progress, reason });
        self.time_out_requests();
    }

    /// Something was acknowledged or flushed.
    fn moved(&mut self) {
        self.progress = self.shared.env.now();
        if std::mem::take(&mut self.stalled) {
            self.shared.set_health(Health::Serving);
        }
    }

    fn appended(&mut self, set: SetId, member: usize, number: u64, result: Result<u64, StoreError>, sent: Moment) {
        if set != self.set.id {
            return;
        }
        match result {
            Ok(contiguous) => {
                self.full = false;
                self.set.confirm(member, sent);
                if let Some(segment) = self.segments.get_mut(&number) {
                    let known = &mut segment.contiguous[member];
                    *known = (*known).max(contiguous);
                }
            }
            Err(error) => self.member_failed(member, &error),
        }
    }

    /// Notes a failed member; the set is changed (P5) before anything else is acknowledged.
    pub(super) fn member_failed(&mut self, member: usize, error: &StoreError) {
        if *error == StoreError::NoSpace {
            self.full = true;
        }
        if !self.failed_members.contains(&member) {
            tracing::warn!(volume = %self.shared.id, device = %self.set.members[member].at.device, %error, "journal member failed");
            self.failed_members.push(member);
        }
    }

    fn look_at_suspects(&mut self) {
        for suspect in self.shared.take_suspects() {
            if let Some(member) = self.set.members.iter().position(|member| member.at == suspect) {
                self.member_failed(member, &StoreError::Unavailable { device: suspect.device });
            }
        }
    }

    /// Acknowledges, in order, every batch that all members (and all rows) have.
    fn acknowledge(&mut self) {
        while let Some(front) = self.in_flight.front() {
            let segment = self.segments.get_mut(&front.number).expect("a batch's segment is unsealed");
            let have = segment.contiguous.iter().copied().min().unwrap_or(0);
            if have < front.end {
                break;
            }
            if let Some(rows) = &front.rows {
                let Some(written) = rows.written else { break };
                if !self.set.confirmed_since(written) {
                    self.confirm_set();
                    break;
                }
            }
            // (What was written again may lie behind the batches that follow it.)
            segment.acknowledged = segment.acknowledged.max(front.end);
            segment.pending -= 1;
            let batch = self.in_flight.pop_front().expect("just seen");
            self.moved();
            self.shared.index.apply(&batch.changes);
            if let Some(rows) = &batch.rows {
                self.rows_acknowledged(rows.number, &batch.changes);
            }
            for (done, fua) in batch.requests {
                if fua || self.shared.ack == AckPolicy::Persisted {
                    self.flush_waiters.push(done);
                } else {
                    let _ = done.send(Ok(()));
                }
            }
            self.acknowledged_up_to_cut();
        }
    }

    /// Asks every member whether it is live. The rows of a batch are written to devices that know nothing of the set: a taker that
    /// closed the members and found the record may have looked for its rows before they came, and counted it as absent. A member
    /// that is live after they came was closed later, and the taker looks later still (P9).
    fn confirm_set(&mut self) {
        if self.confirming == Some(self.set.id) {
            return;
        }
        self.confirming = Some(self.set.id);
        let (set, sent) = (self.set.id, self.shared.env.now());
        let calls: Vec<_> = self.set.members.iter().map(|member| self.shared.store.confirm(member.at)).collect();
        self.events.push(Box::pin(async move {
            let results = futures::future::join_all(calls).await;
            Event::Confirmed { set, sent, results }
        }));
    }

    fn confirmed(&mut self, set: SetId, sent: Moment, results: Vec<Result<(), StoreError>>) {
        if set != self.set.id {
            return;
        }
        self.confirming = None;
        for (member, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) => self.set.confirm(member, sent),
                Err(error) => self.member_failed(member, &error),
            }
        }
    }

    /// Starts a flush round if somebody waits and none runs. Only what was acknowledged before the round began counts.
    fn start_flush_round(&mut self) {
        if self.flush_waiters.is_empty() || self.flush_round.is_some() {
            return;
        }
        // Rows that failed are on their way into a sealed segment; until then a flush of them means nothing.
        if self.row_segments.values().any(|rows| rows.failed && rows.dirty) {
            return;
        }
        let waiters = std::mem::take(&mut self.flush_waiters);
        let lengths: Vec<(u64, u64)> = self
            .segments
            .iter()
            .filter(|(_, segment)| segment.needs_members() && segment.acknowledged > segment.flushed)
            .map(|(&number, segment)| (number, segment.acknowledged))
            .collect();
        let is_entering = |segment: &Segment| !segment.needs_members() && segment.acknowledged > segment.flushed;
        let entering = self.segments.iter().filter(|(_, segment)| is_entering(segment)).map(|(&n, _)| n).collect();
        let rows = self.row_flush_requests();
        let replicas: Vec<(SegmentName, u64)> =
            lengths.iter().map(|&(number, end)| (self.segments[&number].name, end)).collect();
        let flushed = lengths.is_empty() && rows.is_empty();
        self.flush_round = Some(FlushRound { waiters, lengths, entering, flushed });
        if flushed {
            return self.end_flush_round();
        }
        count(&self.shared.counters.flush_rounds, 1);
        let members = self.set.members.iter().map(|member| FlushRequest {
            device: member.at.device,
            incarnation: member.at.incarnation,
            member: Some(member.at),
            replicas: replicas.clone(),
            shards: Vec::new(),
        });
        let members: Vec<_> = members.map(|request| self.shared.store.flush(request)).collect();
        let rows: Vec<_> = rows.into_iter().map(|request| self.shared.store.flush(request)).collect();
        let set = self.set.id;
        self.events.push(Box::pin(async move {
            let (members, rows) = futures::join!(futures::future::join_all(members), futures::future::join_all(rows));
            let member = members.into_iter().enumerate().find_map(|(i, result)| Some((i, result.err()?)));
            let rows = rows.iter().any(Result::is_err);
            let failed = member.is_some() || rows;
            Event::Flushed { set, result: if failed { Err(FlushFailure { member, rows }) } else { Ok(()) } }
        }));
    }

    fn flushed(&mut self, set: SetId, result: Result<(), FlushFailure>) {
        let mut round = self.flush_round.take().expect("a round runs");
        match result {
            Ok(()) if set == self.set.id => {
                for &(number, end) in &round.lengths {
                    if let Some(segment) = self.segments.get_mut(&number) {
                        segment.flushed = segment.flushed.max(end);
                    }
                }
                round.flushed = true;
                self.flush_round = Some(round);
                self.end_flush_round();
            }
            Ok(()) => self.flush_waiters.extend(round.waiters),
            Err(failure) => {
                self.flush_waiters.extend(round.waiters);
                if failure.rows {
                    self.row_flush_failed();
                }
                if let (Some((member, error)), true) = (failure.member, set == self.set.id) {
                    self.member_failed(member, &error);
                }
            }
        }
    }

    /// Answers those who wait for a flush, once everything they wait for is stable.
    fn end_flush_round(&mut self) {
        let is_stable = |round: &FlushRound| {
            round.flushed && round.entering.iter().all(|number| !self.segments.contains_key(number))
        };
        if let Some(round) = self.flush_round.take_if(|round| is_stable(round)) {
            for done in round.waiters {
                let _ = done.send(Ok(()));
            }
            self.moved();
        }
    }

    fn fetched(&mut self, request: Request, base: Result<Base, VolumeError>) {
        self.parked -= 1;
        match base {
            Ok(base) => self.backlog.push_front(Queued { base: Some(base), ..Queued::from(request) }),
            Err(error) => {
                let _ = request.into_done().send(Err(error));
            }
        }
    }

    /// Requests that are no writes: handled between batches.
    pub(super) fn control(&mut self, request: Request) {
        match request {
            Request::Resize { size, done } => self.resize(size, done),
            Request::Checkpoint { done } => {
                self.checkpoint_waiters.push(done);
                self.begin_checkpoint();
            }
            Request::Close { done } => self.closing = Some(done),
            _ => unreachable!("writes are peeled"),
        }
    }

    /// First byte that may not be written.
    pub(super) fn writable_end(&self) -> u64 {
        self.shared.size()
    }

    pub(super) fn new_name(&self) -> SegmentName {
        new_name(&self.shared, &self.next_number, &self.set)
    }

    pub(super) fn publish_segment(&self, number: u64) {
        let segment = OpenSegment::Journal { records: Vec::new() };
        self.shared.open.lock().expect("open lock").insert(number, segment);
    }

    pub(super) fn publish_record(&self, number: u64, record: RecordMemory) {
        if let Some(OpenSegment::Journal { records }) = self.shared.open.lock().expect("open lock").get_mut(&number) {
            records.push(record);
        }
    }

    /// Freezes the open segment (and the open rows it points to); the next record opens a new one.
    pub(super) fn rotate(&mut self) {
        let Some(number) = self.current.take() else { return };
        self.chunk = None;
        let segment = self.segments.get_mut(&number).expect("current segment");
        segment.frozen = true;
        let rows = segment.rows.clone();
        if self.rows.is_some_and(|open| rows.contains(&open)) {
            self.next_rows();
        }
    }

    fn start_idle_timer(&mut self) {
        if self.idle_timer || (self.current.is_none() && self.rows.is_none()) {
            return;
        }
        self.idle_timer = true;
        let sleep = self.shared.env.sleep(self.shared.tuning.idle_seal_after);
        let written = self.next_batch;
        self.events.push(Box::pin(async move {
            sleep.await;
            Event::Idle { written }
        }));
    }

    fn idle(&mut self, written: u64) {
        self.idle_timer = false;
        if written == self.next_batch && self.in_flight.is_empty() {
            self.rotate_rows();
            self.rotate();
        }
    }

    fn watch_nodes(&mut self) {
        let mut changes = self.shared.store.changes();
        self.events.push(Box::pin(async move {
            match changes.changed().await {
                Ok(()) => Event::NodesChanged,
                Err(_) => Event::Nothing,
            }
        }));
    }

    fn resize(&mut self, size: u64, done: Done) {
        let old = self.shared.size();
        if size < old {
            // First nothing above the new end, then the tail is discarded and that is flushed, then the register (P2).
            self.shared.set_size(size);
            let (tail, discarded) = tokio::sync::oneshot::channel();
            let zero = Request::Zero { offset: size, length: old - size, fua: true, done: tail };
            self.discard_tail(zero);
            let event = self.register_size(size, done, Some((old, discarded)));
            self.events.push(event);
        } else {
            let event = self.register_size(size, done, None);
            self.events.push(event);
        }
    }

    /// Deletes what no running read can reach any more.
    pub(super) fn bury(&mut self) {
        // In order: a read that holds an older token may have looked up a name that a later checkpoint dropped.
        let mut is_held = false;
        self.graves.retain_mut(|grave| {
            is_held |= Arc::strong_count(&grave.token) > 1;
            if is_held {
                return true;
            }
            let names = std::mem::take(&mut grave.names);
            if !names.is_empty() {
                count(&self.shared.counters.freed_segments, names.len() as u64);
                let delete = self.shared.store.delete(names);
                self.events.push(Box::pin(async move {
                    // Late, repeated or lost is all the same (P7).
                    let _ = delete.await;
                    Event::Nothing
                }));
            }
            false
        });
        if !self.graves.is_empty() && !self.burying {
            self.burying = true;
            let sleep = self.shared.env.sleep(std::time::Duration::from_millis(100));
            self.events.push(Box::pin(async move {
                sleep.await;
                Event::Bury
            }));
        }
    }

    fn fail_everything(&mut self) {
        let requests = self.backlog.drain(..).map(|queued| queued.request.into_done());
        let in_flight = self.in_flight.drain(..).flat_map(|batch| batch.requests).map(|(done, _)| done);
        let round = self.flush_round.take().into_iter().flat_map(|round| round.waiters);
        let mut waiting: Vec<Done> = requests.chain(in_flight).chain(round).collect();
        waiting.append(&mut self.flush_waiters);
        waiting.append(&mut self.checkpoint_waiters);
        waiting.extend(self.closing.take());
        waiting.extend(self.sizes.drain(..).map(|(_, done)| done));
        let late = self.shared.close_queue();
        waiting.extend(late.into_iter().map(Request::into_done));
        for done in waiting {
            let _ = done.send(Err(self.shared.final_error()));
        }
    }

    /// Whether a newer owner was met; the loop stops at its next step.
    pub(super) fn fenced(&self, error: &RegisterError) -> bool {
        if let RegisterError::NewerOwner { current, .. } = error {
            tracing::warn!(volume = %self.shared.id, generation = %current, "a newer owner has the volume");
            self.shared.stop(Health::Fenced(*current));
            return true;
        }
        false
    }

    /// Shards of `number` are there: enter the name in the manifests (P6).
    fn shards_written(
        &mut self,
        number: u64,
        mut sealed: SealedSegment,
        holes: Holes,
        changes: Vec<crate::index::Change>,
    ) {
        count(&self.shared.counters.seals, 1);
        sealed.holes = holes.0.iter().fold(0, |bits, index| bits | 1 << index.0);
        let stage = Stage::Manifest { sealed, holes, changes, answered: 0 };
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.stage = stage;
        } else if let Some(rows) = self.row_segments.get_mut(&number) {
            rows.stage = stage;
        }
        self.send_sealed(number, sealed);
    }

    /// Asks every member of the current set to enter a name.
    pub(super) fn send_sealed(&mut self, number: u64, sealed: SealedSegment) {
        let set = Arc::clone(&self.set);
        for (member, at) in set.members.iter().enumerate() {
            let call = self.shared.store.sealed(at.at, sealed);
            let id = set.id;
            self.events.push(Box::pin(async move { Event::Entered { set: id, member, number, result: call.await } }));
        }
    }

    fn entered(&mut self, set: SetId, member: usize, number: u64, result: Result<(), StoreError>) {
        if set != self.set.id {
            return;
        }
        if let Err(error) = result {
            self.member_failed(member, &error);
            return;
        }
        let members = self.set.members.len();
        let stage = match (self.segments.get_mut(&number), self.row_segments.get_mut(&number)) {
            (Some(segment), _) => &mut segment.stage,
            (None, Some(rows)) => &mut rows.stage,
            (None, None) => return,
        };
        let Stage::Manifest { answered, .. } = stage else { return };
        *answered += 1;
        if *answered == members {
            self.sealed(number);
        }
    }

    /// The segment is sealed: readers find it in the store from now on.
    pub(super) fn sealed(&mut self, number: u64) {
        let stage = match self.segments.remove(&number) {
            Some(segment) => segment.stage,
            None => {
                let rows = self.row_segments.remove(&number).expect("a sealed segment was unsealed before");
                for segment in self.segments.values_mut() {
                    segment.rows.retain(|&pointed| pointed != number);
                }
                if rows.failed_over() {
                    self.evacuated.push(rows.name);
                }
                rows.stage
            }
        };
        let Stage::Manifest { sealed, holes, changes, .. } = stage else { unreachable!("sealed after its manifests") };
        let incomplete = !holes.0.is_empty();
        // First the live list, then the open table: a reader that misses it here finds it there.
        self.shared.index.segment_sealed(sealed, holes.0);
        self.shared.index.apply(&changes);
        self.shared.open.lock().expect("open lock").remove(&number);
        self.manifest.push(sealed);
        if incomplete {
            self.fill_next_hole();
        }
    }

    async fn advance_close(&mut self) {
        if self.closing.is_none()
            || !self.sizes.is_empty()
            || !self.in_flight.is_empty()
            || self.parked > 0
            || !self.backlog.is_empty()
        {
            if self.closing.is_some() {
                // What was queued before the close is still written.
                while !self.backlog.is_empty() && self.build_batch() {}
            }
            return;
        }
        self.rotate_rows();
        self.rotate();
        self.start_seals();
        if !self.segments.is_empty() || !self.row_segments.is_empty() || !self.checkpoint.is_idle() {
            return;
        }
        if !self.manifest.is_empty() {
            if self.checkpoint_may_begin() {
                self.begin_checkpoint();
                self.advance_checkpoint();
            }
            return;
        }
        self.hand_over().await;
    }

    /// Bytes that the index says were written; for checkpoints.
    pub(super) fn bytes_since_checkpoint(&self) -> u64 {
        self.written_bytes.saturating_sub(self.written_at_checkpoint)
    }
}

/// The next name of the volume's log.
pub(super) fn new_name(shared: &Shared, next_number: &AtomicU64, set: &ServingSet) -> SegmentName {
    let number = next_number.fetch_add(1, Ordering::Relaxed);
    let devices: Vec<_> = set.members.iter().map(|member| member.at.device).collect();
    SegmentName {
        volume: shared.id,
        generation: shared.generation,
        number,
        pg: shared.store.choose_pg(shared.id, number, &devices),
    }
}

const _: () = assert!(BLOCK_BYTES.is_power_of_two());
