//! What the entries of the log make of a cluster: the metadata, who is a member, and whose proposals were applied. Pure, the
//! same on every replica after the same entry.

use crate::command::{Command, Outcome};
use crate::error::{FormatError, MetaError};
use crate::format;
use crate::raft::entry::{LogEntry, Origin, Payload, ReplicaId, Role, Step, put_entry};
use crate::state::MetaState;
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_env::memory::mix;
use xsan_types::{NodeId, crc32c};

/// A replica that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The node it runs on.
    pub node: NodeId,
    /// Index of the entry that made it a member: of two on one node the younger one is alive.
    pub since: u64,
}

/// Who votes and who listens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Voters.
    pub voters: Vec<ReplicaId>,
    /// Learners.
    pub learners: Vec<ReplicaId>,
    /// The voters before, while both majorities are needed (joint); else empty.
    pub outgoing: Vec<ReplicaId>,
    /// Voters before that become learners when the joint time ends.
    pub learners_next: Vec<ReplicaId>,
}

impl Configuration {
    /// Whether two majorities are needed now.
    #[must_use]
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether `replica` is in it, in whatever role.
    #[must_use]
    pub fn contains(&self, replica: ReplicaId) -> bool {
        [&self.voters, &self.learners, &self.outgoing, &self.learners_next].iter().any(|list| list.contains(&replica))
    }

    /// Whether the library would take it: it stops the process for one that it does not like.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let once = |list: &[ReplicaId]| {
            list.iter().enumerate().all(|(at, id)| id.0 != 0 && !list.get(at + 1..).unwrap_or_default().contains(id))
        };
        let lists = [&self.voters, &self.learners, &self.outgoing, &self.learners_next];
        lists.iter().all(|list| once(list))
            && (!self.voters.is_empty() || lists.iter().all(|list| list.is_empty()))
            && !self.learners.iter().any(|id| self.voters.contains(id) || self.outgoing.contains(id))
            && self.learners_next.iter().all(|id| self.outgoing.contains(id) && !self.voters.contains(id))
    }
}

/// The newest proposal of a replica that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// The replica's start.
    pub start: u64,
    /// Its proposal.
    pub sequence: u64,
}

/// Everything that follows from the log up to `index`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The last entry applied; 0: nothing is known yet (a replica that has just joined).
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Hash over all entries ever applied: equal on all replicas at the same index, or one of them is broken.
    pub digest: u64,
    /// Who votes.
    pub configuration: Configuration,
    /// All members, in whatever role.
    pub members: BTreeMap<ReplicaId, Member>,
    /// Newest proposals, of members only.
    pub sessions: BTreeMap<ReplicaId, Session>,
    /// The metadata.
    pub state: Arc<MetaState>,
}

/// What an entry did.
#[derive(Clone, Debug, PartialEq)]
pub enum Applied {
    /// Nothing that anybody waits for.
    Nothing,
    /// A command, now or never again.
    Command(Origin, Result<Outcome, MetaError>),
    /// A repeat, or a proposal that a newer one of the same origin has overtaken: it is not applied, now or later.
    Skipped(Origin),
    /// The members change; the caller puts the configuration that follows into [`Machine::configure`].
    Change(Vec<Step>),
    /// The joint time ends.
    Leave,
}

impl Machine {
    /// Before anything is known.
    #[must_use]
    pub fn new(state: MetaState) -> Self {
        Self {
            index: 0,
            term: 0,
            digest: 0,
            configuration: Configuration::default(),
            members: BTreeMap::new(),
            sessions: BTreeMap::new(),
            state: Arc::new(state),
        }
    }

    /// Applies the entry after the last one.
    ///
    /// # Errors
    /// A command of a newer release: this replica cannot go on, and must not skip it. Nothing has changed.
    pub fn apply(&mut self, entry: &LogEntry) -> Result<Applied, FormatError> {
        assert_eq!(entry.index, self.index + 1, "entries are applied in order, once");
        let applied = match &entry.payload {
            Payload::Empty => Applied::Nothing,
            Payload::Leave => Applied::Leave,
            Payload::Change(steps) => Applied::Change(steps.clone()),
            Payload::Command { origin, envelope } => {
                let command = format::decode_command(envelope, entry.index)?;
                if self.is_new(*origin) {
                    self.sessions.insert(origin.replica, Session { start: origin.start, sequence: origin.sequence });
                    Applied::Command(*origin, self.apply_command(&command, entry.term))
                } else {
                    Applied::Skipped(*origin)
                }
            }
        };
        let mut bytes = Vec::new();
        put_entry(&mut bytes, entry);
        self.digest = mix(self.digest ^ (u64::from(crc32c(&bytes).0) << 32 | bytes.len() as u64));
        (self.index, self.term) = (entry.index, entry.term);
        Ok(applied)
    }

    /// What a leader saw counts in its own term only: a leader of an earlier one that was frozen, or cut off, took its own silence
    /// for that of all others, and its proposal is handed on to its successor.
    fn apply_command(&mut self, command: &Command, term: u64) -> Result<Outcome, MetaError> {
        if let Command::ReportNode { term: seen_in, .. } = command
            && *seen_in != term
        {
            return Err(MetaError::Outdated);
        }
        Arc::make_mut(&mut self.state).apply(command)
    }

    /// Only members propose, and each proposal counts once: proposals are sent again until they are answered, and the
    /// network may repeat them whenever it likes.
    fn is_new(&self, origin: Origin) -> bool {
        let newest = self.sessions.get(&origin.replica).map(|session| (session.start, session.sequence));
        self.members.contains_key(&origin.replica) && newest < Some((origin.start, origin.sequence))
    }

    /// The configuration after a change, and who the members are then.
    pub fn configure(&mut self, configuration: Configuration, steps: &[Step]) {
        for step in steps.iter().filter(|step| step.role != Role::Removed) {
            self.members.entry(step.replica).or_insert(Member { node: step.node, since: self.index });
        }
        self.members.retain(|replica, _| configuration.contains(*replica));
        self.sessions.retain(|replica, _| configuration.contains(*replica));
        self.configuration = configuration;
    }
}
