//! The pure core of a replica: ticks, messages and requests go in; messages, things to write and answers come out. No I/O, no
//! clock, no task: the same calls in the same order do the same. RFC 0004 tells the order of everything here.
//!
//! The owner calls [`Core::poll`] until it answers `None`; each [`Write`] it answers is made durable before
//! [`Core::written`] is called, and nothing else is called in between. Messages wait in the outbox until they may be sent.

use crate::command::Outcome;
use crate::error::{FormatError, MetaError};
use crate::raft::entry::{LogEntry, Payload, ReplicaId, Role, Step};
use crate::raft::format::{HardState, encode_raft_snapshot};
use crate::raft::library::{MemoryLog, change_context, from_message, logger, to_conf_change, to_entry, to_message};
use crate::raft::machine::{Configuration, Machine, Member};
use crate::raft::message::{Agreement, Body, ENTRIES_BYTES_MAX, Kind, Message, MessageError, encode};
use crate::raft::requests::{Lead, Proposals, Reads, Ticket};
use crate::raft::transfer::{Incoming, Outgoing};
use crate::raft::voters;
use raft::eraftpb::{Message as RaftMessage, MessageType};
use raft::{Config, RawNode, Ready, StateRole};
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_env::memory::mix;
use xsan_types::ClusterId;

/// Proposals that wait for their outcome here; further ones wait with their callers.
const PROPOSALS_MAX: usize = 1024;

/// Times, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    /// Between heartbeats of the leader.
    pub heartbeat: u32,
    /// Silence after which a follower looks for another leader; it adds up to as much again at random.
    pub election: u32,
    /// After which a request without outcome is answered `NoAnswer`.
    pub answer: u32,
    /// After which what a follower asked its leader is asked again.
    pub resend: u32,
    /// Silence after which a snapshot's transfer is given up.
    pub transfer: u32,
}

/// What comes out for a caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Of a proposal.
    Proposed(Ticket, Result<Outcome, MetaError>),
    /// Of a read: the index of the last entry in the view.
    Read(Ticket, Result<u64, MetaError>),
}

/// What has to be durable before the replica goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Entries (the first replaces whatever stands at its index and behind it), and the state beside them.
    Append {
        /// With them or before them, never after.
        state: HardState,
        /// Perhaps none.
        entries: Vec<LogEntry>,
    },
    /// A leader's snapshot; then a log that starts behind it.
    Install {
        /// The snapshot file's content.
        snapshot: Arc<[u8]>,
        /// The entry it stands at, and its term.
        base: (u64, u64),
        /// The state.
        state: HardState,
        /// Entries behind the base.
        entries: Vec<LogEntry>,
    },
}

/// Why a replica stops for good. It must not go on: what it would say could be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The disk of this replica has lost entries that it had confirmed.
    #[error(
        "the leader knows entry {confirmed} to be here, but the log ends at {last}: the disk lost what was flushed; \
         remove this replica and let the node join again"
    )]
    LogLost {
        /// What the leader knows.
        confirmed: u64,
        /// What is here.
        last: u64,
    },
    /// Two replicas have agreed on different entries.
    #[error(
        "entry {index} was agreed on, and the leader has another one; remove this replica and let the node join again"
    )]
    Conflict {
        /// Where.
        index: u64,
    },
    /// An entry that cannot be applied: of a newer release.
    #[error("entry {index} cannot be applied: {source}; upgrade this node")]
    Entry {
        /// Where.
        index: u64,
        /// Why.
        source: FormatError,
    },
    /// The log cannot be written any more.
    #[error("the log cannot be written: {0}; this replica stops until its process is started again")]
    Log(#[source] std::io::Error),
}

/// Why members were not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// Only the leader changes members.
    #[error("this replica does not lead; ask {}", leader.map_or("again when there is a leader".to_owned(), |id| id.to_string()))]
    NotLeader {
        /// Who does, if known.
        leader: Option<ReplicaId>,
    },
    /// Another change is under way; try again.
    #[error("another change of members is under way")]
    Busy,
    /// The leader cannot remove or demote itself: transfer the lead first.
    #[error("the leader cannot leave; transfer the lead first")]
    Leader,
    /// No such member, or not in a role that allows it; no voter would be left.
    #[error("replica {0} cannot do that in its role")]
    Role(ReplicaId),
}

/// What a replica is told of itself and the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// This replica.
    pub replica: ReplicaId,
    /// The newest term it knows.
    pub term: u64,
    /// Who leads, if known.
    pub leader: Option<ReplicaId>,
    /// The last entry applied here.
    pub applied: u64,
    /// Hash over all entries applied: equal on all replicas at the same index.
    pub digest: u64,
    /// Who votes.
    pub configuration: Configuration,
    /// Where members run.
    pub members: BTreeMap<ReplicaId, Member>,
    /// Whether it has stopped for good; the log says why.
    pub faulty: bool,
}

/// The core of a replica.
pub struct Core {
    pub(super) cluster: ClusterId,
    pub(super) replica: ReplicaId,
    pub(super) start: u64,
    pub(super) ticks: Ticks,
    pub(super) dice: u64,
    pub(super) node: RawNode<MemoryLog>,
    pub(super) machine: Machine,
    pub(super) proposals: Proposals,
    pub(super) reads: Reads,
    /// Whom requests were sent to.
    pub(super) lead: Lead,
    /// The newest proposals of others that this leader put into its log in this term: start and sequence.
    pub(super) proposed: BTreeMap<ReplicaId, (u64, u64)>,
    /// What the owner is writing, and the messages that wait for it.
    pub(super) writing: Option<(Ready, Vec<RaftMessage>)>,
    pub(super) outbox: Vec<(ReplicaId, Vec<u8>)>,
    pub(super) answers: Vec<Answer>,
    pub(super) fault: Option<Fault>,
    /// The snapshot on disk, for followers that need it.
    pub(super) snapshot: Arc<[u8]>,
    pub(super) outgoing: BTreeMap<ReplicaId, Outgoing>,
    pub(super) incoming: Option<Incoming>,
    /// A snapshot the library has taken and the owner has not written, and who sent it.
    pub(super) installing: Option<(Machine, Arc<[u8]>, ReplicaId)>,
    pub(super) automatic_voters: bool,
}

/// What a replica finds on its disk.
pub struct Stored {
    /// The replica.
    pub replica: ReplicaId,
    /// How often it was started, this time included.
    pub start: u64,
    /// From the snapshot.
    pub machine: Machine,
    /// The entry before the log's first, and its term; not beyond the snapshot.
    pub base: (u64, u64),
    /// From the log.
    pub state: HardState,
    /// From the log.
    pub entries: Vec<LogEntry>,
}

impl Core {
    /// A replica as it was found. A single voter leads at once.
    #[must_use]
    pub fn new(stored: Stored, ticks: Ticks, seed: u64, automatic_voters: bool) -> Self {
        let Stored { replica, start, machine, base, mut state, entries } = stored;
        // The snapshot is of agreed entries only.
        state.commit = state.commit.max(machine.index).min(base.0 + entries.len() as u64);
        let log = MemoryLog {
            base_index: base.0,
            base_term: base.1,
            entries: entries.iter().map(to_entry).collect(),
            hard_state: state,
            snapshot: (machine.index, machine.term, machine.configuration.clone()),
            wanted: std::cell::Cell::new(false),
        };
        let config = Config {
            id: replica.0,
            election_tick: ticks.election as usize,
            heartbeat_tick: ticks.heartbeat as usize,
            applied: machine.index,
            max_size_per_msg: ENTRIES_BYTES_MAX as u64,
            max_inflight_msgs: 64,
            check_quorum: true,
            pre_vote: true,
            // More is refused, and sent again by who proposed it.
            max_uncommitted_size: 16 << 20,
            max_committed_size_per_ready: 4 << 20,
            ..Config::default()
        };
        let node = RawNode::new(&config, log, &logger(replica)).expect("settings and state are sound");
        let mut core = Self {
            cluster: machine.state.cluster,
            replica,
            start,
            ticks,
            dice: mix(seed),
            node,
            snapshot: encode_raft_snapshot(&machine).into(),
            machine,
            proposals: Proposals::default(),
            reads: Reads::default(),
            lead: (0, 0),
            proposed: BTreeMap::new(),
            writing: None,
            outbox: Vec::new(),
            answers: Vec::new(),
            fault: None,
            outgoing: BTreeMap::new(),
            incoming: None,
            installing: None,
            automatic_voters,
        };
        core.draw_timeout();
        let configuration = &core.machine.configuration;
        if configuration.voters == [replica] && !configuration.is_joint() {
            // Nobody else could object: no reason to wait for an election timeout.
            core.node.campaign().ok();
        }
        core
    }

    /// The state after the last entry applied.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Why it has stopped.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// What it knows of itself and the others.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            replica: self.replica,
            term: self.node.raft.term,
            // Whoever has stopped follows nobody.
            leader: self.leader().filter(|_| self.fault.is_none()),
            applied: self.machine.index,
            digest: self.machine.digest,
            configuration: self.machine.configuration.clone(),
            members: self.machine.members.clone(),
            faulty: self.fault.is_some(),
        }
    }

    /// What of the status changes from one entry to the next: term, leader, last entry applied, whether it has stopped.
    #[must_use]
    pub fn glance(&self) -> (u64, Option<ReplicaId>, u64, bool) {
        (self.node.raft.term, self.leader(), self.machine.index, self.fault.is_some())
    }

    pub(super) fn leader(&self) -> Option<ReplicaId> {
        Some(ReplicaId(self.node.raft.leader_id)).filter(|leader| leader.0 != 0)
    }

    /// Whether this replica leads, as far as it knows.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// The only voter and the only member: nobody to talk to.
    fn is_alone(&self) -> bool {
        let configuration = &self.machine.configuration;
        configuration.voters == [self.replica] && configuration.learners.is_empty() && !configuration.is_joint()
    }

    /// Whether time matters: a replica that is alone and leads needs no ticks.
    #[must_use]
    pub fn needs_ticks(&self) -> bool {
        !(self.is_alone() && self.is_leader())
    }

    /// Messages that may be sent now.
    pub fn take_outbox(&mut self) -> Vec<(ReplicaId, Vec<u8>)> {
        std::mem::take(&mut self.outbox)
    }

    /// Answers since the last time.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Time passes by one tick.
    pub fn tick(&mut self) {
        if self.fault.is_some() {
            return;
        }
        self.node.tick();
        self.draw_timeout();
        let late = self.proposals.tick();
        self.answers.extend(late.into_iter().map(|ticket| Answer::Proposed(ticket, Err(MetaError::NoAnswer))));
        let late = self.reads.tick();
        self.answers.extend(late.into_iter().map(|ticket| Answer::Read(ticket, Err(MetaError::NoAnswer))));
        self.reads.ask_again(self.ticks.resend);
        self.tick_transfers();
        if self.automatic_voters && self.is_leader() {
            self.improve_voters();
        }
    }

    /// The library draws election timeouts from the thread's random numbers; this replaces each one from the seed. A timeout
    /// is only drawn when the clock of the election is set to zero, so afterwards is early enough.
    pub(super) fn draw_timeout(&mut self) {
        let raft = &mut self.node.raft;
        if raft.election_elapsed == 0 {
            self.dice = mix(self.dice);
            let least = raft.election_timeout();
            let more = usize::try_from(self.dice % least as u64).expect("less than a timeout");
            raft.set_randomized_election_timeout(least + more);
        }
    }

    /// Proposes a command in its envelope. Its answer comes under `ticket`.
    pub fn propose(&mut self, ticket: Ticket, envelope: Vec<u8>) {
        if self.fault.is_some() {
            self.answers.push(Answer::Proposed(ticket, Err(MetaError::NoAnswer)));
        } else {
            self.proposals.add(ticket, envelope, self.ticks.answer);
        }
    }

    /// Asks for a view that is at least as new as this moment. Its answer comes under `ticket`.
    pub fn read(&mut self, ticket: Ticket) {
        if self.fault.is_some() {
            self.answers.push(Answer::Read(ticket, Err(MetaError::NoAnswer)));
        } else {
            self.reads.add(ticket, self.ticks.answer);
        }
    }

    /// All who wait are told that nobody knows; what was proposed may take effect all the same.
    pub fn give_up(&mut self) {
        let proposals = self.proposals.give_up();
        self.answers.extend(proposals.into_iter().map(|ticket| Answer::Proposed(ticket, Err(MetaError::NoAnswer))));
        let reads = self.reads.give_up();
        self.answers.extend(reads.into_iter().map(|ticket| Answer::Read(ticket, Err(MetaError::NoAnswer))));
    }

    /// Whether so much waits that callers should wait outside.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.proposals.waiting.len() >= PROPOSALS_MAX
    }

    /// Stops for good.
    pub fn fail(&mut self, fault: Fault) {
        tracing::error!(replica = %self.replica, %fault, "a replica of the metadata has stopped");
        self.fault.get_or_insert(fault);
        self.writing = None;
        self.outbox.clear();
        self.give_up();
    }

    /// Changes members; the leader only. Done when [`Status::configuration`] says so; a change may get lost with the leader.
    ///
    /// # Errors
    /// See [`MembershipError`]; nothing was proposed.
    pub fn change_members(&mut self, steps: &[Step]) -> Result<(), MembershipError> {
        self.check_leads()?;
        let configuration = &self.machine.configuration;
        if self.node.raft.has_pending_conf() || configuration.is_joint() {
            return Err(MembershipError::Busy);
        }
        let me = self.replica;
        if steps.iter().any(|step| step.replica == me && step.role != Role::Voter) {
            return Err(MembershipError::Leader);
        }
        if let Some(step) = steps.iter().find(|step| step.replica.0 == 0) {
            return Err(MembershipError::Role(step.replica));
        }
        let known = |step: &&Step| self.machine.members.contains_key(&step.replica);
        if let Some(step) = steps.iter().find(|step| step.role != Role::Learner && !known(step)) {
            return Err(MembershipError::Role(step.replica));
        }
        let context = change_context(steps);
        self.node.propose_conf_change(context, to_conf_change(steps)).map_err(|_| MembershipError::Busy)
    }

    /// Hands the lead to a voter, which takes it when it has everything. The leader only.
    ///
    /// # Errors
    /// `NotLeader`, `Role` (not a voter).
    pub fn transfer_lead(&mut self, to: ReplicaId) -> Result<(), MembershipError> {
        self.check_leads()?;
        if !self.machine.configuration.voters.contains(&to) {
            return Err(MembershipError::Role(to));
        }
        self.node.transfer_leader(to.0);
        Ok(())
    }

    fn check_leads(&self) -> Result<(), MembershipError> {
        if self.is_leader() && self.fault.is_none() {
            return Ok(());
        }
        Err(MembershipError::NotLeader { leader: self.leader().filter(|leader| *leader != self.replica) })
    }

    /// The next step towards the right voters, if one is due: see [`voters::next_step`].
    fn improve_voters(&mut self) {
        if self.node.raft.has_pending_conf() || self.machine.configuration.is_joint() {
            return;
        }
        // A learner is promoted when it has all but the newest entries: else the new majority would wait for it.
        let last = self.node.raft.raft_log.committed;
        let progress = self.node.raft.prs();
        let is_current = |replica: ReplicaId| {
            progress.get(replica.0).is_some_and(|peer| peer.matched + 64 >= last && peer.matched > 0)
        };
        let input = voters::Input::new(&self.machine, self.replica, &is_current);
        match voters::next_step(&input) {
            Some(voters::Next::Change(steps)) => {
                tracing::info!(replica = %self.replica, ?steps, "changing the voters of the metadata");
                self.change_members(&steps).ok();
            }
            Some(voters::Next::Transfer(to)) => {
                self.transfer_lead(to).ok();
            }
            None => {}
        }
    }

    /// A message, as bytes were decoded. `from` is who the transport says is at the other end.
    ///
    /// # Errors
    /// It was not for this replica, and had no effect.
    pub fn deliver(&mut self, from: ReplicaId, message: Message) -> Result<(), MessageError> {
        if message.cluster != self.cluster {
            return Err(MessageError::Cluster(message.cluster));
        }
        if message.to != self.replica {
            return Err(MessageError::Recipient(message.to));
        }
        if message.from != from {
            return Err(MessageError::Sender(message.from));
        }
        if self.fault.is_some() {
            return Ok(());
        }
        match message.body {
            Body::Agreement(agreement) => self.deliver_agreement(from, agreement),
            Body::Chunk { term, index, total, offset, bytes } => {
                self.deliver_chunk(from, term, (index, total), offset, &bytes);
            }
            Body::ChunkAck { index, received } => self.deliver_chunk_ack(from, index, received),
        }
        self.draw_timeout();
        Ok(())
    }

    fn deliver_agreement(&mut self, from: ReplicaId, agreement: Agreement) {
        match agreement.kind {
            Kind::Propose => return self.deliver_proposals(from, agreement.entries),
            // Never handed on: two followers that each think the other leads would play ball.
            Kind::ReadIndex if !self.is_leader() => return,
            _ => {}
        }
        match self.check(&agreement) {
            Check::Sound => {
                // What the library refuses is a message that came too late.
                self.node.step(to_message(from, self.replica, agreement)).ok();
            }
            Check::Impossible => {
                tracing::error!(replica = %self.replica, %from, kind = ?agreement.kind, "an impossible message");
            }
            Check::Fault(fault) => self.fail(fault),
        }
    }

    /// Proposals of a follower, in order of their sequence. Only a leader takes them; else they come again.
    fn deliver_proposals(&mut self, from: ReplicaId, entries: Vec<LogEntry>) {
        // A replica that was removed would be skipped when its entries are applied.
        if !self.is_leader() || !self.machine.members.contains_key(&from) {
            return;
        }
        for entry in entries {
            let Payload::Command { origin, envelope } = entry.payload else { continue };
            let newest = self.proposed.get(&from).copied();
            if newest >= Some((origin.start, origin.sequence)) {
                // In the log of this term already, or overtaken there: it would be skipped as well.
                continue;
            }
            // What cannot be applied must not get into the log: it would stop every replica.
            let readable = crate::format::decode_command(&envelope, 0).is_ok();
            if origin.replica != from || !readable {
                tracing::error!(replica = %self.replica, %from, "a proposal that cannot be read, or of somebody else");
                continue;
            }
            if self.node.propose(origin.encode(), envelope).is_err() {
                // Later ones must not overtake it.
                return;
            }
            self.proposed.insert(from, (origin.start, origin.sequence));
        }
    }

    /// What the library would stop the process for. A replica whose disk kept what it flushed never fails this.
    fn check(&self, agreement: &Agreement) -> Check {
        let raft = &self.node.raft;
        let (log, last) = (&raft.raft_log, raft.raft_log.last_index());
        if agreement.term < raft.term {
            return Check::Sound;
        }
        match agreement.kind {
            // Of what this replica said it has; it cannot shrink while the same one leads.
            Kind::Heartbeat if agreement.commit > last => {
                Check::Fault(Fault::LogLost { confirmed: agreement.commit, last })
            }
            Kind::Append if agreement.index < log.committed => Check::Sound,
            Kind::Append if log.match_term(agreement.index, agreement.log_term) => Check::Sound,
            // Every leader has what was agreed on before it.
            Kind::Append if agreement.index == log.committed => {
                Check::Fault(Fault::Conflict { index: agreement.index })
            }
            // What is agreed on ends in a term that every later leader's log reaches.
            Kind::Append if agreement.log_term < log.term(log.committed).unwrap_or(0) => Check::Impossible,
            Kind::AppendResponse if self.is_leader() && agreement.term == raft.term => {
                if !agreement.reject && agreement.index > last { Check::Impossible } else { Check::Sound }
            }
            _ => Check::Sound,
        }
    }

    pub(super) fn send(&mut self, to: ReplicaId, body: Body) {
        if to.0 == 0 || to == self.replica {
            return;
        }
        self.outbox.push((to, encode(&Message { cluster: self.cluster, from: self.replica, to, body })));
    }

    pub(super) fn send_raft(&mut self, messages: Vec<RaftMessage>) {
        for message in messages {
            let to = ReplicaId(message.to);
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.start_transfer(to, message.get_snapshot().get_metadata().index);
            } else if let Some(agreement) = from_message(&message) {
                self.send(to, Body::Agreement(agreement));
            }
        }
    }
}

enum Check {
    Sound,
    /// Nothing a replica ever sends.
    Impossible,
    Fault(Fault),
}
