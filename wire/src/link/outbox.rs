//! Requests of a link: those that wait for their turn, and those that wait for their answer. Pure; the link's lock is
//! around it.

use crate::config::Limits;
use crate::error::CallError;
use crate::frame::{HEADER_BYTES, Header, Output, fits, put_head_with};
use crate::message::NodeAnswer;
use crate::node::NodeError;
use crate::payload::Payload;
use std::collections::VecDeque;
use tokio::sync::oneshot;
use xsan_env::Moment;
use xsan_types::Crc32c;

/// Memory for laid-out heads that is kept while nothing is queued.
const KEPT_BYTES: usize = 256 << 10;

/// Who waits for an answer. Dropped, it means that there will be none.
pub(crate) enum Waiting {
    Node { operation: u16, sender: oneshot::Sender<Result<NodeAnswer, NodeError>> },
    Service(oneshot::Sender<Result<Vec<u8>, CallError>>),
}

/// What the outbox must know of a call.
pub(crate) struct Request {
    /// `None`: a one-way message.
    pub(crate) waiting: Option<Waiting>,
    pub(crate) deadline: Moment,
    pub(crate) answer_bytes: u32,
}

/// A frame that waits for its turn. Its head lies in `Outbox::heads`.
struct Queued {
    /// `None`: a one-way message.
    slot: Option<u32>,
    head: usize,
    payload: Payload,
    cost: u64,
}

/// A request from its call to its answer.
#[derive(Default)]
struct Slot {
    /// Who waits; `None` after the deadline: the answer is taken and thrown away.
    waiting: Option<Waiting>,
    deadline: Moment,
    cost: u64,
    used: bool,
    sent: bool,
}

/// How much may be unanswered: told by the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) requests: u32,
    pub(crate) bytes: u64,
}

/// What [`Outbox::take`] moved.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    pub(crate) any: bool,
    /// A message that nobody will answer was among it.
    pub(crate) one_way: bool,
}

/// Bounded by [`Limits`]: what waits for its turn; by [`Window`]: what waits for its answer.
pub(crate) struct Outbox {
    queue: VecDeque<Queued>,
    queued_bytes: u64,
    heads: Vec<u8>,
    heads_taken: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    sent: u32,
    sent_bytes: u64,
    /// Not later than the earliest deadline.
    earliest: Option<Moment>,
    requests_max: usize,
    bytes_max: u64,
}

impl Outbox {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            queue: VecDeque::new(),
            queued_bytes: 0,
            heads: Vec::new(),
            heads_taken: 0,
            slots: Vec::new(),
            free: Vec::new(),
            sent: 0,
            sent_bytes: 0,
            earliest: None,
            requests_max: limits.queue_requests_max,
            bytes_max: limits.queue_bytes_max,
        }
    }

    pub(crate) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Requests sent and not answered.
    pub(crate) fn unanswered(&self) -> u32 {
        self.sent
    }

    /// When [`Outbox::expire`] may have something to do.
    pub(crate) fn earliest(&self) -> Option<Moment> {
        self.earliest
    }

    /// Lays out a frame behind those that wait.
    pub(crate) fn push(
        &mut self,
        header: Header,
        payload: Payload,
        payload_crc: Crc32c,
        request: Request,
        meta: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), CallError> {
        let bytes = payload.bytes();
        if self.queue.len() >= self.requests_max || self.queued_bytes.saturating_add(bytes as u64) > self.bytes_max {
            return Err(CallError::Full);
        }
        let slot = match &request.waiting {
            Some(_) => Some(self.free.last().copied().unwrap_or(u32::try_from(self.slots.len()).unwrap_or(u32::MAX))),
            None => None,
        };
        let start = self.heads.len();
        let header = Header { id: slot.map_or(0, u64::from), ..header };
        put_head_with(&mut self.heads, &header, bytes, payload_crc, meta);
        let head = self.heads.len() - start;
        if !fits(head - HEADER_BYTES, bytes) {
            self.heads.truncate(start);
            return Err(CallError::TooLarge);
        }
        let cost = head as u64 + bytes as u64 + u64::from(request.answer_bytes);
        if let Some(index) = slot {
            self.take_slot(index, request, cost);
        }
        self.queued_bytes += cost;
        self.queue.push_back(Queued { slot, head, payload, cost });
        Ok(())
    }

    fn take_slot(&mut self, index: u32, request: Request, cost: u64) {
        let deadline = request.deadline;
        let slot = Slot { waiting: request.waiting, deadline, cost, used: true, sent: false };
        if self.free.pop().is_some() {
            self.slots[index as usize] = slot;
        } else {
            self.slots.push(slot);
        }
        self.earliest = Some(self.earliest.map_or(deadline, |earliest| earliest.min(deadline)));
    }

    /// Moves frames to `output` in order, as far as the window allows. A single request always goes when nothing else
    /// is on its way.
    pub(crate) fn take(&mut self, window: Window, output: &mut Output) -> Moved {
        let mut moved = Moved::default();
        // One-way messages are in no window: what a stuck socket does not take stays in the queue, which is bounded.
        while let Some(next) = self.queue.front()
            && (output.bytes() as u64) < window.bytes.max(1)
        {
            let is_first = self.sent == 0;
            let fits = self.sent < window.requests && self.sent_bytes + next.cost <= window.bytes;
            // One-way messages wait with the requests before them: their order is kept.
            if next.slot.is_some() && !is_first && !fits {
                break;
            }
            let Some(Queued { slot, head, payload, cost }) = self.queue.pop_front() else { break };
            self.queued_bytes -= cost;
            let from = self.heads_taken;
            self.heads_taken += head;
            match slot.map(|index| (index, &mut self.slots[index as usize])) {
                // Its caller gave up before it was sent.
                Some((index, slot)) if slot.waiting.is_none() => self.give_back(index),
                sending => {
                    if let Some((_, slot)) = sending {
                        slot.sent = true;
                        self.sent += 1;
                        self.sent_bytes += cost;
                    }
                    output.push_laid_out(&self.heads[from..from + head], payload);
                    moved.any = true;
                    moved.one_way |= slot.is_none();
                }
            }
        }
        self.tidy_heads();
        moved
    }

    fn tidy_heads(&mut self) {
        if self.queue.is_empty() {
            self.heads.clear();
            self.heads.shrink_to(KEPT_BYTES);
            self.heads_taken = 0;
        } else if self.heads_taken > KEPT_BYTES {
            self.heads.drain(..self.heads_taken);
            self.heads_taken = 0;
        }
    }

    fn give_back(&mut self, index: u32) {
        self.slots[index as usize] = Slot::default();
        self.free.push(index);
        if self.free.len() == self.slots.len() {
            self.earliest = None;
        }
    }

    /// The answer to `id` has come. `Err`: nothing of that id was asked. `Ok(None)`: nobody waits for it any more.
    pub(crate) fn answered(&mut self, id: u64) -> Result<Option<Waiting>, ()> {
        let index = u32::try_from(id).map_err(|_| ())?;
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.used && slot.sent).ok_or(())?;
        let waiting = slot.waiting.take();
        self.sent -= 1;
        self.sent_bytes -= slot.cost;
        self.give_back(index);
        Ok(waiting)
    }

    /// Takes out those whose deadline has passed. A request that was sent keeps its place in the window until its answer
    /// comes: the server still works on it.
    #[must_use]
    pub(crate) fn expire(&mut self, now: Moment) -> Vec<Waiting> {
        let mut expired = Vec::new();
        self.earliest = None;
        for slot in self.slots.iter_mut().filter(|slot| slot.waiting.is_some()) {
            if slot.deadline <= now {
                expired.extend(slot.waiting.take());
            } else {
                let earliest = self.earliest.map_or(slot.deadline, |earliest| earliest.min(slot.deadline));
                self.earliest = Some(earliest);
            }
        }
        expired
    }

    /// Forgets everything; the caller drops those who waited.
    #[must_use]
    pub(crate) fn fail_all(&mut self) -> Failed {
        self.queue.clear();
        self.queued_bytes = 0;
        self.tidy_heads();
        self.free.clear();
        (self.sent, self.sent_bytes, self.earliest) = (0, 0, None);
        Failed { _slots: std::mem::take(&mut self.slots) }
    }

    /// Forgets what was sent; what waits for its turn stays.
    #[must_use]
    pub(crate) fn fail_sent(&mut self) -> Failed {
        let mut failed = Vec::new();
        for index in 0..self.slots.len() {
            if self.slots[index].sent {
                failed.push(std::mem::take(&mut self.slots[index]));
                self.free.push(u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
        (self.sent, self.sent_bytes) = (0, 0);
        Failed { _slots: failed }
    }
}

/// Requests that get no answer; dropping them tells their callers.
pub(crate) struct Failed {
    _slots: Vec<Slot>,
}
