//! State that a volume's writer and its readers share. Every lock is held for a few instructions, never across an await.

use super::recover::Recovered;
use super::{AckPolicy, Tuning, VolumeConfig};
use crate::error::VolumeError;
use crate::index::Index;
use crate::store::{Registers, SegmentStore};
use futures::task::AtomicWaker;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{oneshot, watch};
use xsan_env::{Buf, BufPool, Env, Moment};
use xsan_types::{BLOCK_BYTES, Epoch, Generation, JournalSet, MemberRef, SegmentName, SetId, SetMember, VolumeId};

pub(super) type Done = oneshot::Sender<Result<(), VolumeError>>;

/// A change on its way to the writer.
pub(super) enum Request {
    Write { offset: u64, data: Buf, fua: bool, done: Done },
    Zero { offset: u64, length: u64, fua: bool, done: Done },
    Flush { done: Done },
    Resize { size: u64, done: Done },
    Checkpoint { done: Done },
    Close { done: Done },
}

impl Request {
    pub(super) fn into_done(self) -> Done {
        match self {
            Self::Write { done, .. }
            | Self::Zero { done, .. }
            | Self::Flush { done }
            | Self::Resize { done, .. }
            | Self::Checkpoint { done }
            | Self::Close { done } => done,
        }
    }
}

/// Whether a volume serves, and if not why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Requests are served.
    Serving,
    /// Requests wait, since the moment, for too few reachable devices.
    Waiting {
        /// Since when.
        since: Moment,
        /// For what, in words.
        reason: String,
    },
    /// A newer owner exists. Final.
    Fenced(Generation),
    /// Closed. Final.
    Closed,
}

impl Health {
    /// Whether it stays so for ever.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Fenced(_) | Self::Closed)
    }
}

/// A piece of a read's answer.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Bytes.
    Data(Buf),
    /// So many bytes of zeroes that are not stored.
    Hole(u64),
}

/// A journal member of the serving set.
pub(super) struct Member {
    pub at: MemberRef,
    pub sector: u32,
    /// When the last confirmed message was *sent* (P8), in nanoseconds.
    pub confirmed: AtomicU64,
}

/// The serving journal set.
pub(super) struct ServingSet {
    pub id: SetId,
    pub members: Vec<Member>,
}

impl ServingSet {
    pub(super) fn registered(&self) -> JournalSet {
        JournalSet {
            id: self.id,
            members: self
                .members
                .iter()
                .map(|member| SetMember { device: member.at.device, incarnation: member.at.incarnation })
                .collect(),
        }
    }

    pub(super) fn confirm(&self, member: usize, sent: Moment) {
        self.members[member].confirmed.fetch_max(sent.0, Ordering::Relaxed);
    }

    /// Whether every member answered, live, something that was sent at `moment` or later.
    pub(super) fn confirmed_since(&self, moment: Moment) -> bool {
        self.members.iter().all(|member| member.confirmed.load(Ordering::Relaxed) >= moment.0)
    }

    /// Whether every member confirmed within `window` before `now`.
    pub(super) fn confirmed_within(&self, now: Moment, window: std::time::Duration) -> bool {
        self.members.iter().all(|member| now.since(Moment(member.confirmed.load(Ordering::Relaxed))) <= window)
    }
}

/// One record of an open segment in memory.
#[derive(Clone)]
pub(super) struct RecordMemory {
    /// Offset in the segment.
    pub offset: u64,
    /// Dense ordinal of its first block.
    pub first_block: u32,
    /// The whole record, header first.
    pub bytes: Buf,
    pub header_bytes: u32,
}

/// Where readers find the blocks of a segment that is not sealed yet.
pub(super) enum OpenSegment {
    /// In memory, by record.
    Journal { records: Vec<RecordMemory> },
    /// On the devices, in rows (P9).
    Rows { name: SegmentName, segment_bytes: u64 },
}

impl OpenSegment {
    /// The memory of a block, if it is held there.
    pub(super) fn block(&self, position: u32) -> Option<Buf> {
        let Self::Journal { records } = self else { return None };
        let record = &records[records.partition_point(|record| record.first_block <= position).checked_sub(1)?];
        let start = record.header_bytes as usize + (position - record.first_block) as usize * BLOCK_BYTES as usize;
        (start + BLOCK_BYTES as usize <= record.bytes.len())
            .then(|| record.bytes.slice(start..start + BLOCK_BYTES as usize))
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a volume did since it was opened.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $(pub $name: AtomicU64,)* }

        /// What a volume did since it was opened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct VolumeCounters { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(super) fn snapshot(&self) -> VolumeCounters {
                VolumeCounters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Guest reads.
    reads,
    /// Guest bytes read.
    read_bytes,
    /// Guest writes.
    writes,
    /// Guest bytes written.
    write_bytes,
    /// Guest flushes.
    flushes,
    /// Guest trims and zeroes.
    zeroes,
    /// Batches appended.
    batches,
    /// Journal bytes appended, headers included, per member.
    journal_bytes,
    /// Bytes written by rows (P9), before parity.
    row_bytes,
    /// Blocks read for sub-block writes.
    merge_reads,
    /// Flush rounds.
    flush_rounds,
    /// Segments sealed.
    seals,
    /// Checkpoints registered.
    checkpoints,
    /// Journal set changes.
    set_changes,
    /// Segments freed.
    freed_segments,
}

/// A volume's state for people.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// The volume.
    pub id: VolumeId,
    /// Whether it serves.
    pub health: Health,
    /// Its ownership.
    pub generation: Generation,
    /// Bytes.
    pub size: u64,
    /// Devices of the journal set.
    pub members: Vec<MemberRef>,
    /// Members a set has when all is well.
    pub members_wanted: usize,
    /// Segments in the live list.
    pub segments: usize,
    /// Of them sealed with missing positions.
    pub segments_with_holes: usize,
    /// Nodes have changed, and what they hold has not been compared with what they should hold since: positions may be missing that
    /// are not counted.
    pub unchecked: bool,
    /// Version of the newest map under which every position of every listed segment was looked for; those that were not found
    /// are counted.
    pub checked_epoch: Epoch,
    /// Segments open or being sealed.
    pub open_segments: usize,
    /// Memory of the index delta.
    pub delta_bytes: usize,
    /// What it did.
    pub counters: VolumeCounters,
}

/// Requests on their way to the writer.
#[derive(Default)]
struct Queue {
    requests: VecDeque<Request>,
    /// Nobody takes them any more.
    closed: bool,
}

pub(super) struct Shared {
    pub id: VolumeId,
    pub env: Env,
    pub buffers: BufPool,
    pub store: Arc<dyn SegmentStore>,
    pub registers: Arc<dyn Registers>,
    pub index: Arc<Index>,
    pub ack: AckPolicy,
    pub tuning: Tuning,
    pub generation: Generation,
    pub counters: Counters,
    pub health: watch::Sender<Health>,
    /// Replaced as a whole at a set change; readers wait on it for a new set.
    pub set: watch::Sender<Arc<ServingSet>>,
    pub open: Mutex<BTreeMap<u64, OpenSegment>>,
    /// Held by running reads; a name is deleted only when every read that may know it has dropped its token (R5).
    read_token: Mutex<Arc<()>>,
    size: AtomicU64,
    queue: Mutex<Queue>,
    /// No read may be confirmed: the register may know another set than the one that serves.
    reads_paused: AtomicBool,
    waker: AtomicWaker,
    /// Set by a reader that found a member silent or closed; the writer looks at it.
    suspects: Mutex<Vec<MemberRef>>,
    /// See [`VolumeStatus::unchecked`].
    pub unchecked: AtomicBool,
    /// See [`VolumeStatus::checked_epoch`].
    pub checked_epoch: AtomicU64,
}

impl Shared {
    pub(super) fn new(config: VolumeConfig, recovered: &Recovered) -> Arc<Self> {
        Arc::new(Self {
            id: config.id,
            env: config.env,
            buffers: config.buffers,
            store: config.store,
            registers: config.registers,
            index: Arc::clone(&recovered.index),
            ack: config.ack,
            tuning: config.tuning,
            generation: recovered.register.generation,
            counters: Counters::default(),
            health: watch::Sender::new(Health::Serving),
            set: watch::Sender::new(Arc::clone(&recovered.set)),
            open: Mutex::new(BTreeMap::new()),
            read_token: Mutex::new(Arc::new(())),
            size: AtomicU64::new(recovered.register.size),
            queue: Mutex::new(Queue::default()),
            reads_paused: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            suspects: Mutex::new(Vec::new()),
            unchecked: AtomicBool::new(false),
            checked_epoch: AtomicU64::new(0),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(super) fn submit(&self, request: Request) {
        let mut queue = self.queue.lock().expect("queue lock");
        if queue.closed {
            drop(queue);
            let _ = request.into_done().send(Err(self.final_error()));
            return;
        }
        queue.requests.push_back(request);
        drop(queue);
        self.waker.wake();
    }

    /// The writer has ended: later requests are refused. Answers those that still wait.
    pub(super) fn close_queue(&self) -> VecDeque<Request> {
        let mut queue = self.queue.lock().expect("queue lock");
        queue.closed = true;
        std::mem::take(&mut queue.requests)
    }

    pub(super) fn pause_reads(&self, paused: bool) {
        self.reads_paused.store(paused, Ordering::SeqCst);
    }

    pub(super) fn reads_are_paused(&self) -> bool {
        self.reads_paused.load(Ordering::SeqCst)
    }

    /// Moves all waiting requests behind `backlog`.
    pub(super) fn take_requests(&self, backlog: &mut VecDeque<Request>) {
        backlog.append(&mut self.queue.lock().expect("queue lock").requests);
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.queue.lock().expect("queue lock").requests.is_empty()
    }

    pub(super) fn register_waker(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    pub(super) fn suspect(&self, member: MemberRef) {
        self.suspects.lock().expect("suspects lock").push(member);
        self.waker.wake();
    }

    pub(super) fn take_suspects(&self) -> Vec<MemberRef> {
        std::mem::take(&mut self.suspects.lock().expect("suspects lock"))
    }

    pub(super) fn has_suspects(&self) -> bool {
        !self.suspects.lock().expect("suspects lock").is_empty()
    }

    pub(super) fn read_token(&self) -> Arc<()> {
        Arc::clone(&self.read_token.lock().expect("token lock"))
    }

    /// Later reads hold another token; the old one tells, by its count, when the earlier reads are gone.
    pub(super) fn renew_read_token(&self) -> Arc<()> {
        std::mem::replace(&mut self.read_token.lock().expect("token lock"), Arc::new(()))
    }

    /// Enters a final state, or a state that may pass.
    pub(super) fn set_health(&self, health: Health) {
        self.health.send_if_modified(|now| {
            let changed = !now.is_final() && *now != health;
            if changed {
                *now = health;
            }
            changed
        });
    }

    pub(super) fn stop(&self, health: Health) {
        self.set_health(health);
        self.waker.wake();
    }

    pub(super) fn final_error(&self) -> VolumeError {
        match &*self.health.borrow() {
            Health::Fenced(generation) => VolumeError::Fenced(*generation),
            _ => VolumeError::Closed,
        }
    }

    pub(super) fn status(&self) -> VolumeStatus {
        let set = Arc::clone(&self.set.borrow());
        // Before the holes: what a look found is noted before it is noted that it looked.
        let checked_epoch = Epoch(self.checked_epoch.load(Ordering::Acquire));
        let unchecked = self.unchecked.load(Ordering::Acquire);
        VolumeStatus {
            id: self.id,
            health: self.health.borrow().clone(),
            generation: self.generation,
            size: self.size(),
            members: set.members.iter().map(|member| member.at).collect(),
            members_wanted: self.store.set_size(),
            segments: self.index.segment_count(),
            segments_with_holes: self.index.hole_count(),
            unchecked,
            checked_epoch,
            open_segments: self.open.lock().expect("open lock").len(),
            delta_bytes: self.index.delta_bytes(),
            counters: self.counters.snapshot(),
        }
    }
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
