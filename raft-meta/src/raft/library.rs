//! The border to the `raft` library: its types against ours, its view of the log, its log lines.
//!
//! Its protobuf types are used as plain structs; their encoding is never read from disk or network. The one place where the
//! library itself encodes and parses is a membership change on the replica that proposes it: bytes it has just written.

use crate::raft::entry::{LogEntry, Origin, Payload, ReplicaId, Role, Step, decode_steps, encode_steps};
use crate::raft::format::HardState;
use crate::raft::machine::Configuration;
use crate::raft::message::{Agreement, Kind};
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
    HardState as RaftHardState, Message, MessageType, Snapshot,
};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::Cell;

/// The log as the library sees it: everything behind the base, in memory. What is in here is on disk.
pub(crate) struct MemoryLog {
    pub(crate) base_index: u64,
    pub(crate) base_term: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) hard_state: HardState,
    /// Last entry of the snapshot on disk, its term and configuration.
    pub(crate) snapshot: (u64, u64, Configuration),
    /// A follower needs a newer one.
    pub(crate) wanted: Cell<bool>,
}

impl MemoryLog {
    pub(crate) fn last(&self) -> u64 {
        self.base_index + self.entries.len() as u64
    }

    fn at(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.base_index + 1)?).ok()
    }

    pub(crate) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base_index {
            return Some(self.base_term);
        }
        self.entries.get(self.at(index)?).map(|entry| entry.term)
    }

    /// Puts entries at their places; whatever stood there and behind is gone.
    pub(crate) fn put(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first().map(|entry| entry.index) else { return };
        let at = self.at(first).expect("entries go behind the base");
        assert!(at <= self.entries.len(), "no gap in the log: {first} after {}", self.last());
        self.entries.truncate(at);
        self.entries.extend(entries);
    }

    /// Forgets entries up to `index`, which the snapshot has.
    pub(crate) fn cut(&mut self, index: u64) {
        let Some(term) = self.term_at(index) else { return };
        let count = usize::try_from(index - self.base_index).unwrap_or(usize::MAX);
        self.entries.drain(..count.min(self.entries.len()));
        (self.base_index, self.base_term) = (index, term);
    }

    /// Starts anew behind a snapshot.
    pub(crate) fn restart(&mut self, index: u64, term: u64) {
        self.entries.clear();
        (self.base_index, self.base_term) = (index, term);
    }

    /// The entries from `first` on, in our words.
    pub(crate) fn tail(&self, first: u64) -> Vec<LogEntry> {
        let at = self.at(first.max(self.base_index + 1)).unwrap_or(0);
        self.entries.get(at..).unwrap_or_default().iter().map(from_entry).collect()
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let HardState { term, vote, commit } = self.hard_state;
        let mut hard_state = RaftHardState::default();
        (hard_state.term, hard_state.vote, hard_state.commit) = (term, vote, commit);
        Ok(RaftState { hard_state, conf_state: to_conf_state(&self.snapshot.2) })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let (Some(from), Some(to)) = (self.at(low), self.at(high)) else {
            return Err(StorageError::Compacted.into());
        };
        let mut entries = self.entries.get(from..to).ok_or(StorageError::Unavailable)?.to_vec();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let missing = if index < self.base_index { StorageError::Compacted } else { StorageError::Unavailable };
        self.term_at(index).ok_or_else(|| missing.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base_index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// The head of the snapshot; its bytes travel on their own. One that does not know the follower as a member would be
    /// refused by it.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let (index, term, configuration) = &self.snapshot;
        if *index == 0 || *index < request_index || !configuration.contains(ReplicaId(to)) {
            self.wanted.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(to_snapshot(*index, *term, configuration))
    }
}

pub(crate) fn to_snapshot(index: u64, term: u64, configuration: &Configuration) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(to_conf_state(configuration));
    snapshot
}

fn to_conf_state(configuration: &Configuration) -> ConfState {
    let ids = |list: &[ReplicaId]| list.iter().map(|replica| replica.0).collect();
    ConfState {
        voters: ids(&configuration.voters),
        learners: ids(&configuration.learners),
        voters_outgoing: ids(&configuration.outgoing),
        learners_next: ids(&configuration.learners_next),
        ..ConfState::default()
    }
}

/// Sorted: the library keeps sets.
pub(crate) fn from_conf_state(state: &ConfState) -> Configuration {
    let ids = |list: &[u64]| {
        let mut ids: Vec<ReplicaId> = list.iter().map(|id| ReplicaId(*id)).collect();
        ids.sort_unstable();
        ids
    };
    Configuration {
        voters: ids(&state.voters),
        learners: ids(&state.learners),
        outgoing: ids(&state.voters_outgoing),
        learners_next: ids(&state.learners_next),
    }
}

pub(crate) fn to_conf_change(steps: &[Step]) -> ConfChangeV2 {
    let single = |step: &Step| {
        let mut single = ConfChangeSingle { node_id: step.replica.0, ..ConfChangeSingle::default() };
        single.set_change_type(match step.role {
            Role::Voter => ConfChangeType::AddNode,
            Role::Learner => ConfChangeType::AddLearnerNode,
            Role::Removed => ConfChangeType::RemoveNode,
        });
        single
    };
    let mut change = ConfChangeV2::default();
    // Alone: in one step. Several: joint, and left by our own proposal; the library's own leaving forgets itself when
    // the leader changes at the wrong moment.
    if steps.len() > 1 {
        change.set_transition(ConfChangeTransition::Explicit);
    }
    change.set_changes(steps.iter().map(single).collect::<Vec<_>>().into());
    change
}

/// The context that a proposed change carries; what replicas read.
pub(crate) fn change_context(steps: &[Step]) -> Vec<u8> {
    encode_steps(steps)
}

pub(crate) fn to_entry(entry: &LogEntry) -> Entry {
    let mut result = Entry::default();
    (result.index, result.term) = (entry.index, entry.term);
    match &entry.payload {
        Payload::Empty => {}
        Payload::Command { origin, envelope } => {
            result.context = origin.encode().into();
            result.data = envelope.clone().into();
        }
        Payload::Change(steps) => {
            result.set_entry_type(EntryType::EntryConfChangeV2);
            result.context = encode_steps(steps).into();
        }
        Payload::Leave => result.set_entry_type(EntryType::EntryConfChangeV2),
    }
    result
}

/// All entries in memory were made by `to_entry` or proposed here.
pub(crate) fn from_entry(entry: &Entry) -> LogEntry {
    let payload = match (entry.get_entry_type(), entry.context.as_ref()) {
        (EntryType::EntryConfChangeV2, []) => Payload::Leave,
        (EntryType::EntryConfChangeV2, steps) => decode_steps(steps).map_or(Payload::Empty, Payload::Change),
        (_, context) => match Origin::decode(context) {
            Some(origin) => Payload::Command { origin, envelope: entry.data.to_vec() },
            None => Payload::Empty,
        },
    };
    LogEntry { index: entry.index, term: entry.term, payload }
}

fn kind_of(kind: MessageType) -> Option<Kind> {
    Some(match kind {
        MessageType::MsgPropose => Kind::Propose,
        MessageType::MsgAppend => Kind::Append,
        MessageType::MsgAppendResponse => Kind::AppendResponse,
        MessageType::MsgRequestVote => Kind::RequestVote,
        MessageType::MsgRequestVoteResponse => Kind::RequestVoteResponse,
        MessageType::MsgHeartbeat => Kind::Heartbeat,
        MessageType::MsgHeartbeatResponse => Kind::HeartbeatResponse,
        MessageType::MsgTimeoutNow => Kind::TimeoutNow,
        MessageType::MsgReadIndex => Kind::ReadIndex,
        MessageType::MsgReadIndexResp => Kind::ReadIndexResponse,
        MessageType::MsgRequestPreVote => Kind::RequestPreVote,
        MessageType::MsgRequestPreVoteResponse => Kind::RequestPreVoteResponse,
        _ => return None,
    })
}

fn type_of(kind: Kind) -> MessageType {
    match kind {
        Kind::Propose => MessageType::MsgPropose,
        Kind::Append => MessageType::MsgAppend,
        Kind::AppendResponse => MessageType::MsgAppendResponse,
        Kind::RequestVote => MessageType::MsgRequestVote,
        Kind::RequestVoteResponse => MessageType::MsgRequestVoteResponse,
        Kind::Heartbeat => MessageType::MsgHeartbeat,
        Kind::HeartbeatResponse => MessageType::MsgHeartbeatResponse,
        Kind::TimeoutNow => MessageType::MsgTimeoutNow,
        Kind::ReadIndex => MessageType::MsgReadIndex,
        Kind::ReadIndexResponse => MessageType::MsgReadIndexResp,
        Kind::RequestPreVote => MessageType::MsgRequestPreVote,
        Kind::RequestPreVoteResponse => MessageType::MsgRequestPreVoteResponse,
    }
}

/// What goes over the wire; `None` for what does not (snapshots have their own way).
pub(crate) fn from_message(message: &Message) -> Option<Agreement> {
    let kind = kind_of(message.get_msg_type())?;
    let read = matches!(kind, Kind::ReadIndex | Kind::ReadIndexResponse);
    let (context, entries) = match message.entries.first() {
        // A read's context travels as the data of an entry.
        Some(entry) if read => (entry.data.to_vec(), Vec::new()),
        _ => (message.context.to_vec(), message.entries.iter().map(from_entry).collect()),
    };
    Some(Agreement {
        kind,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        commit: message.commit,
        commit_term: message.commit_term,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context,
        entries,
    })
}

pub(crate) fn to_message(from: ReplicaId, to: ReplicaId, agreement: Agreement) -> Message {
    let mut message = Message::default();
    message.set_msg_type(type_of(agreement.kind));
    (message.from, message.to) = (from.0, to.0);
    (message.term, message.log_term, message.index) = (agreement.term, agreement.log_term, agreement.index);
    (message.commit, message.commit_term) = (agreement.commit, agreement.commit_term);
    (message.reject, message.reject_hint) = (agreement.reject, agreement.reject_hint);
    let entries = if matches!(agreement.kind, Kind::ReadIndex | Kind::ReadIndexResponse) {
        vec![Entry { data: agreement.context.into(), ..Entry::default() }]
    } else {
        message.context = agreement.context.into();
        agreement.entries.iter().map(to_entry).collect()
    };
    message.set_entries(entries.into());
    message
}

/// Hands the library's log lines to `tracing`. Its "info" is about every election step: debug here.
pub(crate) fn logger(replica: ReplicaId) -> slog::Logger {
    slog::Logger::root(ToTracing(replica), slog::o!())
}

struct ToTracing(ReplicaId);

impl slog::Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        let replica = self.0;
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!(%replica, "{}", record.msg()),
            slog::Level::Warning | slog::Level::Info => tracing::debug!(%replica, "{}", record.msg()),
            slog::Level::Debug | slog::Level::Trace => tracing::trace!(%replica, "{}", record.msg()),
        }
        Ok(())
    }

    fn is_enabled(&self, level: slog::Level) -> bool {
        match level {
            slog::Level::Critical | slog::Level::Error => tracing::enabled!(tracing::Level::ERROR),
            slog::Level::Warning | slog::Level::Info => tracing::enabled!(tracing::Level::DEBUG),
            slog::Level::Debug | slog::Level::Trace => tracing::enabled!(tracing::Level::TRACE),
        }
    }
}
