//! The order of things in a replica: what is sent before and what after a write, when entries are applied, and snapshots from
//! and for others. Every line's place matters; RFC 0004 argues it.

use crate::error::MetaError;
use crate::raft::core::{Answer, Core, Fault, Write};
use crate::raft::entry::{LogEntry, Origin, Payload, ReplicaId};
use crate::raft::format::{HardState, LogHeader, decode_raft_snapshot};
use crate::raft::library::{from_conf_state, from_entry, to_conf_change, to_snapshot};
use crate::raft::machine::{Applied, Machine};
use crate::raft::message::{Agreement, Body, ENTRIES_BYTES_MAX, Kind};
use crate::raft::requests::question;
use crate::raft::transfer::{Outgoing, Quiet, Received, receive};
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, Message as RaftMessage, MessageType};
use raft::{Ready, SnapshotStatus};
use std::sync::Arc;

/// Entries behind a snapshot that stay in the log for followers that are a little late, at most.
const KEPT_ENTRIES_MAX: u64 = 1024;

impl Core {
    /// What has to be written next; `None`: nothing is left to do. Messages and answers may come with either.
    #[must_use]
    pub fn poll(&mut self) -> Option<Write> {
        assert!(self.writing.is_none(), "the owner writes one thing at a time");
        loop {
            self.settle();
            self.draw_timeout();
            if self.fault.is_some() || !self.node.has_ready() {
                return None;
            }
            let mut ready = self.node.ready();
            for read in ready.take_read_states() {
                let asked = Origin::decode(&read.request_ctx).filter(|origin| origin.start == self.start);
                if let Some(origin) = asked.filter(|origin| origin.replica == self.replica) {
                    self.reads.confirm(origin.sequence, read.index);
                }
            }
            // A leader sends while it writes; everybody else only says what is durable. So does a leader whose term is not:
            // after a crash it could win the same term again, with other entries (a single voter with learners).
            let (now, mut later) = (ready.take_messages(), ready.take_persisted_messages());
            if self.term_is_new(&ready) {
                later.splice(0..0, now);
            } else {
                self.send_raft(now);
            }
            // Agreed entries are on disk already, here and elsewhere. Changes of the members must wait: they may make a leader
            // step down, which the library does not expect before the write is done.
            let changes = |entry: &Entry| entry.get_entry_type() != EntryType::EntryNormal;
            if !ready.committed_entries().iter().any(changes) {
                let entries = ready.take_committed_entries();
                self.apply(entries);
            }
            if self.fault.is_some() {
                return None;
            }
            let write = self.write_of(&ready);
            self.writing = Some((ready, later));
            match write {
                Some(write) => return Some(write),
                None => self.written(),
            }
        }
    }

    fn term_is_new(&self, ready: &Ready) -> bool {
        let stored = self.node.store().hard_state;
        ready.hs().is_some_and(|state| (state.term, state.vote) != (stored.term, stored.vote))
    }

    /// A commit index alone is not written: it comes again. But it is written with every entry: a replica that knows of a
    /// membership change must know, after a crash too, that the one before was agreed on.
    fn write_of(&self, ready: &Ready) -> Option<Write> {
        let state = self.hard_state();
        let entries: Vec<LogEntry> = ready.entries().iter().map(from_entry).collect();
        if !ready.snapshot().is_empty() {
            let base = (ready.snapshot().get_metadata().index, ready.snapshot().get_metadata().term);
            let (machine, snapshot, _) = self.installing.as_ref().expect("a snapshot is taken with its bytes");
            assert_eq!(machine.index, base.0, "the snapshot that was taken");
            return Some(Write::Install { snapshot: Arc::clone(snapshot), base, state, entries });
        }
        (!entries.is_empty() || self.term_is_new(ready)).then_some(Write::Append { state, entries })
    }

    fn hard_state(&self) -> HardState {
        let state = self.node.raft.hard_state();
        HardState { term: state.term, vote: state.vote, commit: state.commit }
    }

    /// The last [`Write`] is durable.
    pub fn written(&mut self) {
        let Some((mut ready, later)) = self.writing.take() else { return };
        let state = self.hard_state();
        let agreed = ready.take_committed_entries();
        let installed = if ready.snapshot().is_empty() { None } else { self.installing.take() };
        let log = self.node.mut_store();
        if let Some((machine, ..)) = &installed {
            log.restart(machine.index, machine.term);
            log.snapshot = (machine.index, machine.term, machine.configuration.clone());
        }
        log.put(ready.take_entries());
        log.hard_state = state;
        let mut light = self.node.advance_append(ready);
        if let Some((machine, bytes, from)) = installed {
            self.installed(machine, bytes, from);
        }
        self.send_raft(later);
        self.send_raft(light.take_messages());
        self.apply(agreed);
        self.apply(light.take_committed_entries());
        self.draw_timeout();
    }

    fn apply(&mut self, entries: Vec<Entry>) {
        if self.fault.is_some() {
            return;
        }
        for entry in entries.iter().map(from_entry) {
            match self.machine.apply(&entry) {
                Ok(applied) => self.after(applied),
                Err(source) => return self.fail(Fault::Entry { index: entry.index, source }),
            }
        }
        self.node.advance_apply_to(self.machine.index);
        self.answer_reads();
        let configuration = &self.machine.configuration;
        let votes = configuration.voters.contains(&self.replica) || configuration.outgoing.contains(&self.replica);
        if self.is_leader() && !votes {
            // Removed by a change that an earlier leader proposed. The library would go on, and stop at its next entry.
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, 0);
        }
    }

    fn after(&mut self, applied: Applied) {
        match applied {
            Applied::Nothing => {}
            Applied::Command(origin, outcome) => {
                if let Some(ticket) = self.own(origin).and_then(|sequence| self.proposals.applied(sequence)) {
                    self.answers.push(Answer::Proposed(ticket, outcome));
                }
            }
            // Ours are still waiting under another number, or were answered.
            Applied::Skipped(_) => {}
            Applied::Change(steps) => match self.node.apply_conf_change(&to_conf_change(&steps)) {
                Ok(state) => self.configure(&state, &steps),
                // The same on every replica: the entry does nothing.
                Err(error) => {
                    tracing::warn!(replica = %self.replica, %error, ?steps, "a change of members was refused")
                }
            },
            Applied::Leave => match self.node.apply_conf_change(&ConfChangeV2::default()) {
                Ok(state) => self.configure(&state, &[]),
                Err(error) => tracing::debug!(replica = %self.replica, %error, "the joint time was over already"),
            },
        }
    }

    fn configure(&mut self, state: &ConfState, steps: &[crate::raft::entry::Step]) {
        let configuration = from_conf_state(state);
        tracing::info!(replica = %self.replica, ?configuration, index = self.machine.index, "members changed");
        self.machine.configure(configuration, steps);
        let configuration = &self.machine.configuration;
        self.outgoing.retain(|replica, _| configuration.contains(*replica));
    }

    fn own(&self, origin: Origin) -> Option<u64> {
        (origin.replica == self.replica && origin.start == self.start).then_some(origin.sequence)
    }

    fn answer_reads(&mut self) {
        let index = self.machine.index;
        let done = self.reads.applied(index);
        self.answers.extend(done.into_iter().map(|ticket| Answer::Read(ticket, Ok(index))));
    }

    /// What follows from everything so far, before the library is asked what to do.
    fn settle(&mut self) {
        if self.fault.is_some() {
            return;
        }
        let lead = (self.node.raft.term, self.node.raft.leader_id);
        if lead != self.lead {
            self.lead = lead;
            self.reads.ask_again(0);
            self.proposed.clear();
            if !self.is_leader() {
                self.outgoing.clear();
            }
        }
        self.send_proposals();
        self.send_reads();
        if self.is_leader() && self.machine.configuration.is_joint() && !self.node.raft.has_pending_conf() {
            // Refused (too much waits): the next call tries again.
            self.node.propose_conf_change(Vec::new(), ConfChangeV2::default()).ok();
        }
    }

    /// In order of their sequence; one that was overtaken gets a new number when that shows.
    fn send_proposals(&mut self) {
        let Some(leader) = self.leader() else { return };
        let (leads, lead, resend) = (self.is_leader(), self.lead, self.ticks.resend);
        let is_due =
            |sent: Option<((u64, u64), u32)>| sent.is_none_or(|(to, ago)| to != lead || (!leads && ago >= resend));
        let (mut entries, mut bytes, mut messages) = (Vec::new(), 0, Vec::new());
        for (&sequence, proposal) in &mut self.proposals.waiting {
            if !is_due(proposal.sent) {
                continue;
            }
            let origin = Origin { replica: self.replica, start: self.start, sequence };
            let envelope = proposal.envelope.clone();
            if leads {
                // Refused (the lead is handed over, or too much waits): the rest must not overtake it.
                if self.node.propose(origin.encode(), envelope).is_err() {
                    break;
                }
            } else {
                bytes += envelope.len();
                entries.push(LogEntry { index: 0, term: 0, payload: Payload::Command { origin, envelope } });
                if bytes >= ENTRIES_BYTES_MAX {
                    messages.push(std::mem::take(&mut entries));
                    bytes = 0;
                }
            }
            proposal.sent = Some((lead, 0));
        }
        messages.push(entries);
        for entries in messages.into_iter().filter(|entries| !entries.is_empty()) {
            self.send(leader, Body::Agreement(Agreement { entries, ..Agreement::new(Kind::Propose) }));
        }
    }

    fn send_reads(&mut self) {
        // A leader that has not yet agreed on anything in its term would drop the question.
        let ready = if self.is_leader() { self.node.raft.commit_to_current_term() } else { self.leader().is_some() };
        if !ready {
            return;
        }
        if let Some(sequence) = self.reads.ask() {
            self.node.read_index(question(Origin { replica: self.replica, start: self.start, sequence }));
        }
    }

    // Snapshots for others.

    pub(super) fn start_transfer(&mut self, to: ReplicaId, index: u64) {
        if self.node.store().snapshot.0 != index {
            return self.node.report_snapshot(to.0, SnapshotStatus::Failure);
        }
        if self.outgoing.get(&to).is_none_or(|outgoing| outgoing.index != index) {
            let outgoing = Outgoing::new(index, Arc::clone(&self.snapshot));
            let piece = outgoing.piece(self.node.raft.term);
            self.outgoing.insert(to, outgoing);
            self.send(to, piece);
        }
    }

    pub(super) fn deliver_chunk_ack(&mut self, from: ReplicaId, index: u64, received: u64) {
        let term = self.node.raft.term;
        let Some(outgoing) = self.outgoing.get_mut(&from).filter(|outgoing| outgoing.index == index) else { return };
        if !outgoing.received(received) {
            return;
        }
        if outgoing.is_done() {
            self.outgoing.remove(&from);
            self.node.report_snapshot(from.0, SnapshotStatus::Finish);
        } else {
            let piece = outgoing.piece(term);
            self.send(from, piece);
        }
    }

    pub(super) fn tick_transfers(&mut self) {
        let (term, limit) = (self.node.raft.term, self.ticks.transfer);
        let (mut pieces, mut ended) = (Vec::new(), Vec::new());
        for (&to, outgoing) in &mut self.outgoing {
            match outgoing.tick(limit) {
                Quiet::Wait => {}
                Quiet::Resend => pieces.push((to, outgoing.piece(term))),
                Quiet::GiveUp => ended.push(to),
            }
        }
        for (to, piece) in pieces {
            self.send(to, piece);
        }
        for to in ended {
            self.outgoing.remove(&to);
            self.node.report_snapshot(to.0, SnapshotStatus::Failure);
        }
    }

    // Snapshots from a leader.

    pub(super) fn deliver_chunk(
        &mut self,
        from: ReplicaId,
        term: u64,
        (index, total): (u64, u64),
        offset: u64,
        piece: &[u8],
    ) {
        if term < self.node.raft.term {
            return;
        }
        if index <= self.machine.index {
            return self.send(from, Body::ChunkAck { index, received: total });
        }
        match receive(&mut self.incoming, (from, index, total), offset, piece) {
            Received::Stray => {}
            Received::Partly(received) => self.send(from, Body::ChunkAck { index, received }),
            Received::Whole(bytes) => self.take_snapshot(from, term, index, bytes),
        }
    }

    /// Gives a whole snapshot to the library; it is answered when it is installed.
    fn take_snapshot(&mut self, from: ReplicaId, term: u64, index: u64, bytes: Vec<u8>) {
        let total = bytes.len() as u64;
        let machine = match decode_raft_snapshot(&bytes) {
            Ok(machine) if machine.index == index && machine.term <= term && machine.state.cluster == self.cluster => {
                machine
            }
            Ok(_) => return tracing::error!(%from, index, "a snapshot that is not what was announced"),
            Err(error) => return tracing::error!(%from, index, %error, "a snapshot that cannot be read"),
        };
        let mut message = RaftMessage::default();
        message.set_msg_type(MessageType::MsgSnapshot);
        (message.from, message.to, message.term) = (from.0, self.replica.0, term);
        message.set_snapshot(to_snapshot(machine.index, machine.term, &machine.configuration));
        self.node.step(message).ok();
        if self.node.snap().is_some_and(|snapshot| snapshot.get_metadata().index == index) {
            self.installing = Some((machine, bytes.into(), from));
        } else {
            // Not needed any more.
            self.send(from, Body::ChunkAck { index, received: total });
        }
    }

    fn installed(&mut self, machine: Machine, bytes: Arc<[u8]>, from: ReplicaId) {
        tracing::info!(replica = %self.replica, index = machine.index, "took a snapshot of the metadata from the leader");
        let own = machine.sessions.get(&self.replica).filter(|session| session.start == self.start);
        if let Some(session) = own {
            let jumped = self.proposals.jumped(session.sequence);
            self.answers.extend(jumped.into_iter().map(|ticket| Answer::Proposed(ticket, Err(MetaError::NoAnswer))));
        }
        let (index, received) = (machine.index, bytes.len() as u64);
        (self.machine, self.snapshot) = (machine, bytes);
        self.node.advance_apply_to(index);
        self.answer_reads();
        self.send(from, Body::ChunkAck { index, received });
    }

    // Own snapshots.

    /// Whether a follower waits for a newer snapshot than the one on disk.
    #[must_use]
    pub fn wants_snapshot(&self) -> bool {
        self.node.store().wanted.get() && self.machine.index > self.node.store().snapshot.0
    }

    /// A snapshot of this state, encoded, is on disk; nothing newer was installed in between.
    pub fn snapshot_stored(&mut self, machine: &Machine, bytes: Arc<[u8]>) {
        let log = self.node.mut_store();
        assert!(machine.index >= log.snapshot.0, "snapshots are written one after the other");
        log.snapshot = (machine.index, machine.term, machine.configuration.clone());
        log.wanted.set(false);
        self.snapshot = bytes;
    }

    /// A log that starts as late as the snapshot on disk allows, but keeps at most `keep_bytes` for late followers: its header,
    /// state and entries. It replaces the old one; then [`Core::log_cut`] is called.
    #[must_use]
    pub fn shorter_log(&self, keep_bytes: usize) -> (LogHeader, HardState, Vec<LogEntry>) {
        let log = self.node.store();
        let mut base = log.snapshot.0;
        let mut bytes = 0;
        while base > log.base_index && log.snapshot.0 - base < KEPT_ENTRIES_MAX {
            let entry = usize::try_from(base - log.base_index - 1).ok().and_then(|at| log.entries.get(at));
            bytes += entry.map_or(0, |entry| entry.data.len() + entry.context.len() + 32);
            if bytes > keep_bytes {
                break;
            }
            base -= 1;
        }
        let base_term = log.term_at(base).unwrap_or(log.snapshot.1);
        let header =
            LogHeader { cluster: self.cluster, replica: self.replica, start: self.start, base_index: base, base_term };
        let state = HardState { commit: self.hard_state().commit.min(log.last()), ..log.hard_state };
        (header, state, log.tail(base + 1))
    }

    /// The log on disk starts behind `base_index` now.
    pub fn log_cut(&mut self, base_index: u64) {
        self.node.mut_store().cut(base_index);
    }
}
