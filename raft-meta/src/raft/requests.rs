//! Requests that wait: proposals until their entry is applied here, reads until the view is new enough. Time is counted in ticks.

use crate::raft::entry::Origin;
use std::collections::BTreeMap;

/// The caller's name for a request; comes back with the answer.
pub type Ticket = u64;

/// Who leads, in which term: what was sent to another one has to be sent again.
pub(crate) type Lead = (u64, u64);

pub(crate) struct Proposal {
    pub(crate) ticket: Ticket,
    pub(crate) envelope: Vec<u8>,
    /// To whom it went last, and how many ticks ago.
    pub(crate) sent: Option<(Lead, u32)>,
    pub(crate) ticks_left: u32,
}

/// Proposals in order of their sequence. One that an entry with a newer sequence overtook can never be applied any more (see
/// `Machine::apply`), so it may get a new number without being applied twice.
#[derive(Default)]
pub(crate) struct Proposals {
    pub(crate) waiting: BTreeMap<u64, Proposal>,
    last: u64,
}

impl Proposals {
    pub(crate) fn add(&mut self, ticket: Ticket, envelope: Vec<u8>, ticks: u32) -> u64 {
        self.last += 1;
        self.waiting.insert(self.last, Proposal { ticket, envelope, sent: None, ticks_left: ticks });
        self.last
    }

    /// The entry with this sequence was applied: its ticket, if somebody still waits. Everything older gets a new number.
    pub(crate) fn applied(&mut self, sequence: u64) -> Option<Ticket> {
        let newer = self.waiting.split_off(&(sequence + 1));
        let mut overtaken = std::mem::replace(&mut self.waiting, newer);
        let done = overtaken.remove(&sequence);
        for (_, mut proposal) in overtaken {
            self.last += 1;
            proposal.sent = None;
            self.waiting.insert(self.last, proposal);
        }
        done.map(|proposal| proposal.ticket)
    }

    /// A snapshot has jumped over these: whether they were applied is not known.
    pub(crate) fn jumped(&mut self, sequence: u64) -> Vec<Ticket> {
        let newer = self.waiting.split_off(&(sequence + 1));
        std::mem::replace(&mut self.waiting, newer).into_values().map(|proposal| proposal.ticket).collect()
    }

    /// Tickets of those whose time is up.
    pub(crate) fn tick(&mut self) -> Vec<Ticket> {
        let mut late = Vec::new();
        self.waiting.retain(|_, proposal| {
            proposal.ticks_left = proposal.ticks_left.saturating_sub(1);
            if let Some((_, ago)) = &mut proposal.sent {
                *ago = ago.saturating_add(1);
            }
            if proposal.ticks_left == 0 {
                late.push(proposal.ticket);
            }
            proposal.ticks_left > 0
        });
        late
    }

    /// Everybody waiting, who is told that nobody knows.
    pub(crate) fn give_up(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.waiting).into_values().map(|proposal| proposal.ticket).collect()
    }
}

struct Waiter {
    ticket: Ticket,
    ticks_left: u32,
}

struct Asked {
    waiters: Vec<Waiter>,
    ago: u32,
}

/// Questions that may be under way at once; the rest waits and shares the next one.
const ASKED_MAX: usize = 16;

/// Reads. All that wait when a question is sent share it; a lost one is asked anew under another number, so that an
/// old answer never counts for a younger read.
#[derive(Default)]
pub(crate) struct Reads {
    waiting: Vec<Waiter>,
    asked: BTreeMap<u64, Asked>,
    /// By the index that has to be applied.
    confirmed: BTreeMap<u64, Vec<Waiter>>,
    last: u64,
}

impl Reads {
    pub(crate) fn add(&mut self, ticket: Ticket, ticks: u32) {
        self.waiting.push(Waiter { ticket, ticks_left: ticks });
    }

    /// The number of a question to send now, if there is one.
    pub(crate) fn ask(&mut self) -> Option<u64> {
        if self.waiting.is_empty() || self.asked.len() >= ASKED_MAX {
            return None;
        }
        self.last += 1;
        self.asked.insert(self.last, Asked { waiters: std::mem::take(&mut self.waiting), ago: 0 });
        Some(self.last)
    }

    /// The answer to a question: everything up to `index` has to be applied.
    pub(crate) fn confirm(&mut self, question: u64, index: u64) {
        if let Some(asked) = self.asked.remove(&question) {
            self.confirmed.entry(index).or_default().extend(asked.waiters);
        }
    }

    /// Tickets whose index is applied.
    pub(crate) fn applied(&mut self, index: u64) -> Vec<Ticket> {
        let later = self.confirmed.split_off(&(index + 1));
        let done = std::mem::replace(&mut self.confirmed, later);
        done.into_values().flatten().map(|waiter| waiter.ticket).collect()
    }

    /// Questions sent to somebody who does not lead any more are asked again.
    pub(crate) fn ask_again(&mut self, older_than: u32) {
        let again: Vec<u64> =
            self.asked.iter().filter(|(_, asked)| asked.ago >= older_than).map(|(&question, _)| question).collect();
        for asked in again.iter().filter_map(|question| self.asked.remove(question)) {
            self.waiting.extend(asked.waiters);
        }
    }

    /// Tickets of those whose time is up.
    pub(crate) fn tick(&mut self) -> Vec<Ticket> {
        let mut late = Vec::new();
        let mut count = |waiters: &mut Vec<Waiter>| {
            waiters.retain_mut(|waiter| {
                waiter.ticks_left = waiter.ticks_left.saturating_sub(1);
                if waiter.ticks_left == 0 {
                    late.push(waiter.ticket);
                }
                waiter.ticks_left > 0
            });
        };
        count(&mut self.waiting);
        for asked in self.asked.values_mut() {
            count(&mut asked.waiters);
            asked.ago = asked.ago.saturating_add(1);
        }
        self.confirmed.values_mut().for_each(count);
        late
    }

    /// Everybody waiting.
    pub(crate) fn give_up(&mut self) -> Vec<Ticket> {
        let asked = std::mem::take(&mut self.asked).into_values().flat_map(|asked| asked.waiters);
        let confirmed = std::mem::take(&mut self.confirmed).into_values().flatten();
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().chain(asked).chain(confirmed).map(|waiter| waiter.ticket).collect()
    }
}

/// The context of a read question: nobody else ever uses the same one, in no life.
pub(crate) fn question(origin: Origin) -> Vec<u8> {
    origin.encode()
}
