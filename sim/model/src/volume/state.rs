//! What there is at one moment: the register, owners, nodes, journal sets, segments, records, and what guests were told.
//!
//! Messages are not kept one by one. What was once sent may arrive late, in any order, or never, so it is enough to know *that* it
//! was sent (`sent`, `sealed_sent`, `trim`, `deleting`); whoever gets it decides by the state it is in at that time. An answer is
//! given together with the change it tells of, and stays: its receiver acts on it at any later time, or never.

use super::bounds::Budget;
use crate::bits::Bits;
use std::hash::{Hash, Hasher};

/// Most members of a journal set: f + 1 for f = 2.
pub const MEMBERS_MAX: usize = 3;
/// Most nodes: k + f positions and a spare one, for f = 2.
pub const NODES_MAX: usize = 5;
/// Most journal sets of a story.
pub const SETS_MAX: usize = 6;
/// Most segments of a story.
pub const SEGMENTS_MAX: usize = 9;
/// Most records of a story and the zeroes that every block begins with.
pub const RECORDS_MAX: usize = 8;
/// Most blocks of the volume.
pub const BLOCKS_MAX: usize = 2;
/// Most values of the register in a story in which nodes free garbage.
pub const NEWS_MAX: usize = 8;
/// Processes that may own the volume.
pub const OWNERS: usize = 2;

/// The record that stands for a block that was never written.
pub const ZEROES: u8 = 0;

/// One block written to the log, by the guest or by the cleaner.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Record {
    /// Which block.
    pub block: u8,
    /// Of the owner that appended it.
    pub generation: u8,
    /// The record of the guest's write: itself, unless it is a copy (P1).
    pub version: u8,
    /// The newest write that a guest knew of when it sent this one.
    pub known: u8,
    /// A newer owner had committed when the guest sent it.
    pub is_late: bool,
    /// More than f nodes failed since it was sent: unless it is flushed nobody may rely on it (R7).
    pub is_at_risk: bool,
}

/// A segment of the log.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// In its name.
    pub generation: u8,
    /// Its records, all of them of this owner or found by its recovery.
    pub records: Bits,
    /// It never grows again and its shards were sent.
    pub is_frozen: bool,
    /// Positions that answered for their shard.
    pub answered: Bits,
    /// Somebody sent `delete` for it.
    pub deleting: bool,
}

/// What a member says about itself (P3). Whether it is live, its node's incarnation tells.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// It has all that it acknowledged.
    #[default]
    Whole,
    /// It lost power: it has all that it flushed.
    Flushed,
    /// The set is not on its device.
    Unknown,
}

/// A place in a journal set.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Member {
    /// Where it is.
    pub node: u8,
    /// The node's process when the set was made; a later one takes nothing more.
    pub incarnation: u8,
    /// What is left of it.
    pub condition: Condition,
    /// Records on the device or in its cache.
    pub stored: Bits,
    /// Of these, what survives power loss.
    pub durable: Bits,
    /// Segments named in its manifest; durable.
    pub manifest: Bits,
    /// Records it answered for.
    pub answered: Bits,
    /// Records it answered a flush for.
    pub flushed: Bits,
    /// Segments it answered `sealed` for.
    pub sealed: Bits,
}

/// A journal set.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Set {
    /// Of the owner that made it.
    pub generation: u8,
    /// How many members it has.
    pub size: u8,
    /// The members; those from `size` on mean nothing.
    pub members: [Member; MEMBERS_MAX],
    /// Records sent to its members.
    pub sent: Bits,
    /// Of these, what was copied from the set before: flushed before it is answered (P5).
    pub copies: Bits,
    /// Segments whose `sealed` (or manifest line, if copied) was sent.
    pub sealed_sent: Bits,
    /// Segments that a checkpoint decided: their manifest lines may go.
    pub trim: Bits,
}

/// What a node works on.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum InFlight {
    /// Nothing.
    #[default]
    Nothing,
    /// It admitted this append; the device writes.
    Append { set: u8, record: u8 },
    /// It admitted this `sealed`; the manifest line is being written.
    Sealed { set: u8, segment: u8 },
}

impl InFlight {
    /// The journal set that it is for.
    pub fn set(self) -> Option<u8> {
        match self {
            Self::Nothing => None,
            Self::Append { set, .. } | Self::Sealed { set, .. } => Some(set),
        }
    }
}

/// One storage node with one device.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Node {
    /// Its process runs.
    pub is_up: bool,
    /// It never comes back.
    pub is_lost: bool,
    /// New at every start.
    pub incarnation: u8,
    /// It takes nothing from sets of older generations. In memory only.
    pub closed: u8,
    /// Segments of which it holds its shard.
    pub shards: Bits,
    /// Of these, what power loss takes (never, by P6).
    pub unflushed_shards: Bits,
    /// What it works on.
    pub in_flight: InFlight,
}

/// Where a block's content is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// The record.
    pub record: u8,
    /// The segment that it is read from.
    pub segment: u8,
}

/// The index, made durable.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Checkpoint {
    /// Content of each block.
    pub index: [Place; BLOCKS_MAX],
    /// Segments it lists as live.
    pub listed: Bits,
    /// It decides every name of an older generation...
    pub border: u8,
    /// ...and these.
    pub decided: Bits,
}

/// The volume's record in the metadata (P2).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Register {
    /// Grows with every take-over.
    pub generation: u8,
    /// Recovery goes by it; none after a clean hand-over.
    pub set: Option<u8>,
    /// The one that counts.
    pub checkpoint: Checkpoint,
}

/// What a node learns of the register.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct News {
    /// The generation.
    pub generation: u8,
    /// The set, if there was one.
    pub set: Option<u8>,
}

/// A conditional write of the register.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Change {
    /// None.
    #[default]
    Nothing,
    /// Set n + 1 in place of set n.
    Set(u8),
    /// A new checkpoint.
    Checkpoint(Checkpoint),
    /// A taker's checkpoint and its empty set, together.
    Commit(Checkpoint, u8),
    /// A clean hand-over: no set.
    HandOver,
    /// The second half of a commit that was torn in two: only without rule `commit-together`.
    HalfCommit(Checkpoint, u8),
}

/// What became of a conditional write.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is on its way, or its answer is.
    #[default]
    Open,
    /// It took effect.
    Applied,
    /// A newer generation was there.
    Refused,
}

/// A conditional write on its way. It outlives the owner that sent it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Request {
    /// Of the owner that sent it.
    pub generation: u8,
    /// What it changes.
    pub change: Change,
    /// What the metadata made of it; the owner may not know yet.
    pub outcome: Outcome,
}

/// How far an owner is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// It owns nothing.
    #[default]
    Away,
    /// It took the volume and closes the members.
    Closing,
    /// It writes what it found into a segment of its own.
    Resealing,
    /// It has everything that its commit needs, or waits for the answer to it.
    Committing,
    /// Its commit was applied; older confirmations run out (P8).
    Waiting,
    /// It serves.
    Serving,
}

/// What a member answered to a close.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CloseAnswer {
    /// What it said of itself.
    pub condition: Condition,
    /// Its manifest.
    pub manifest: Bits,
}

/// A read that runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Read {
    /// Of which block.
    pub block: u8,
    /// What the look-up found.
    pub found: Place,
    /// The newest content that a guest knew of when the read began.
    pub known: u8,
    /// Members that confirmed since.
    pub confirmed: Bits,
}

/// A process that owns the volume, or thinks so.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Owner {
    /// How far it is.
    pub phase: Phase,
    /// Of its take.
    pub generation: u8,
    /// Its journal set; a taker's: the one that it found registered.
    pub set: Option<u8>,
    /// The set it changes to.
    pub next_set: Option<u8>,
    /// Its open segment.
    pub open: u8,
    /// Its segments that are not sealed.
    pub unsealed: Bits,
    /// Segments that it knows to be valid.
    pub sealed: Bits,
    /// Records that it acknowledged.
    pub acknowledged: Bits,
    /// Content of each block.
    pub index: [Place; BLOCKS_MAX],
    /// The newest checkpoint that it knows to be registered.
    pub checkpoint: Checkpoint,
    /// Records that the running FLUSH covers.
    pub flushing: Bits,
    /// The running read.
    pub read: Option<Read>,
    /// Members that confirmed within T; those of `next_set` come after those of `set`.
    pub fresh: Bits,
    /// A record that the cleaner picked to copy.
    pub cleaning: u8,
    /// Members of the set that answered its close.
    pub closed: Bits,
    /// The set and the place of the member that answered first: confirmations from before must run out (P8).
    pub first_closed: Option<(u8, u8)>,
    /// What they answered.
    pub answers: [CloseAnswer; MEMBERS_MAX],
    /// Segment of what it found open.
    pub reseal: Option<u8>,
}

/// A promise that was broken.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// R7, R3.
    OldValue,
    /// R1.
    AcknowledgedLost,
    /// R7.
    WrongOrder,
    /// R3.
    TwoOwners,
    /// R5.
    ReadLostSegment,
}

/// What guests may rely on for a block.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Told {
    /// The newest version that was acknowledged or read.
    pub newest: u8,
    /// The newest version that a completed FLUSH covers.
    pub flushed: u8,
}

/// All there is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Zeroes, then guest writes and copies in the order of their appends.
    pub records: [Record; RECORDS_MAX],
    /// How many of them there are.
    pub record_count: u8,
    /// In the order of their creation.
    pub segments: [Segment; SEGMENTS_MAX],
    /// How many of them there are.
    pub segment_count: u8,
    /// In the order of their creation.
    pub sets: [Set; SETS_MAX],
    /// How many of them there are.
    pub set_count: u8,
    /// Those that the cluster has not are down.
    pub nodes: [Node; NODES_MAX],
    /// The processes that may own the volume.
    pub owners: [Owner; OWNERS],
    /// The volume's record in the metadata.
    pub register: Register,
    /// What the register said of generation and set, now and before: a node may have learned any of it (only if nodes free
    /// garbage).
    pub news: [Option<News>; NEWS_MAX],
    /// Conditional writes on their way, one of each process.
    pub requests: [Request; OWNERS],
    /// What guests may rely on, by block.
    pub told: [Told; BLOCKS_MAX],
    /// Nodes that lost power, disk, bits or everything.
    pub failed: Bits,
    /// What may still happen.
    pub left: Budget,
    /// A promise that a step broke.
    pub broken: Option<Broken>,
}

/// Places beyond `size` are not looked at: hashing is most of a search's work.
impl Hash for Set {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let Self { generation, size, members, sent, copies, sealed_sent, trim } = self;
        (generation, size, sent, copies, sealed_sent, trim).hash(hasher);
        members.iter().take(usize::from(*size)).for_each(|member| member.hash(hasher));
    }
}

/// Places that no record, segment or set has yet are not looked at.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let Self { record_count, segment_count, set_count, nodes, owners, register, requests, told, .. } = self;
        (record_count, segment_count, set_count).hash(hasher);
        self.records.iter().take(usize::from(*record_count)).for_each(|record| record.hash(hasher));
        self.segments.iter().take(usize::from(*segment_count)).for_each(|segment| segment.hash(hasher));
        self.sets.iter().take(usize::from(*set_count)).for_each(|set| set.hash(hasher));
        (nodes, owners, register, requests, told, self.news).hash(hasher);
        (self.failed, self.left, self.broken).hash(hasher);
    }
}

impl Set {
    /// Its members with their places.
    pub fn members(&self) -> impl Iterator<Item = (usize, &Member)> {
        self.members.iter().take(usize::from(self.size)).enumerate()
    }

    /// Places of its members.
    pub fn places(&self) -> Bits {
        Bits::below(self.size)
    }

    /// Whether a member is on this node.
    pub fn is_on(&self, node: u8) -> bool {
        self.members().any(|(_, member)| member.node == node)
    }
}

impl Checkpoint {
    /// Whether it says what becomes of the segment.
    pub fn decides(&self, name: u8, segment: &Segment) -> bool {
        segment.generation < self.border || self.decided.has(name)
    }
}

impl State {
    /// Order of versions: (generation, sequence) of the guest's write (P1).
    pub fn rank(&self, record: u8) -> (u8, u8) {
        let version = self.records[usize::from(record)].version;
        (self.records[usize::from(version)].generation, version)
    }

    /// The segments that exist.
    pub fn names(&self) -> impl Iterator<Item = u8> + use<> {
        0..self.segment_count
    }

    /// A segment.
    pub fn segment(&self, name: u8) -> &Segment {
        &self.segments[usize::from(name)]
    }

    /// A set.
    pub fn set(&self, set: u8) -> &Set {
        &self.sets[usize::from(set)]
    }

    /// A node.
    pub fn node(&self, node: u8) -> &Node {
        &self.nodes[usize::from(node)]
    }

    /// The segment that a record was appended to first.
    pub fn segment_of(&self, record: u8) -> u8 {
        self.names().find(|name| self.segment(*name).records.has(record)).unwrap_or(0)
    }

    /// Records of these segments.
    pub fn records_in(&self, segments: Bits) -> Bits {
        segments.iter().fold(Bits::NONE, |all, name| all | self.segment(name).records)
    }

    /// Nodes that hold a shard of the segment; of nodes that are down too, unless only those that answer count.
    pub fn shards(&self, name: u8, answering_only: bool) -> u32 {
        let holds = |node: &&Node| node.shards.has(name) && !node.is_lost && (node.is_up || !answering_only);
        u32::try_from(self.nodes.iter().filter(holds).count()).unwrap_or(0)
    }

    /// Sets that need a word in everything the owner answers: its own, and the next while it changes (P5).
    pub fn sets_of(&self, owner: &Owner, with_next: bool) -> impl Iterator<Item = u8> + use<> {
        owner.set.into_iter().chain(owner.next_set.filter(|_| with_next))
    }

    /// Adds a segment of this generation; `None` if the story has no room for it.
    pub fn new_segment(&mut self, generation: u8) -> Option<u8> {
        let name = self.segment_count;
        *self.segments.get_mut(usize::from(name))? = Segment { generation, ..Segment::default() };
        self.segment_count += 1;
        Some(name)
    }

    /// Adds a record; `None` if the story has no room for it. A copy gives its `version`.
    pub fn new_record(&mut self, record: Record, is_copy: bool) -> Option<u8> {
        let id = self.record_count;
        let version = if is_copy { record.version } else { id };
        *self.records.get_mut(usize::from(id))? = Record { version, ..record };
        self.record_count += 1;
        Some(id)
    }

    /// Adds a set on these nodes; `None` if the story has no room for it.
    pub fn new_set(&mut self, generation: u8, nodes: Bits) -> Option<u8> {
        let id = self.set_count;
        let mut set = Set { generation, ..Set::default() };
        for node in nodes.iter() {
            let incarnation = self.node(node).incarnation;
            set.members[usize::from(set.size)] = Member { node, incarnation, ..Member::default() };
            set.size += 1;
        }
        *self.sets.get_mut(usize::from(id))? = set;
        self.set_count += 1;
        Some(id)
    }

    /// Whether anybody may still ask a member of the set: it is registered, or an owner goes by it, or a request may register it.
    pub fn is_needed(&self, set: u8) -> bool {
        let named_by = |owner: &Owner| owner.set == Some(set) || owner.next_set == Some(set);
        let asked_by = |request: &Request| match request.change {
            Change::Set(id) | Change::Commit(_, id) | Change::HalfCommit(_, id) => id == set,
            Change::Nothing | Change::Checkpoint(_) | Change::HandOver => false,
        };
        let is_registered = self.register.set == Some(set);
        is_registered || self.owners.iter().any(named_by) || self.requests.iter().any(asked_by)
    }

    /// Forgets what is in sets that nobody can ask for any more, and requests that can do nothing any more.
    pub fn forget(&mut self, register_is_conditional: bool) {
        for process in 0..OWNERS {
            let Request { generation, outcome, .. } = self.requests[process];
            let is_refused = generation != self.register.generation && register_is_conditional;
            if generation != self.owners[process].generation && (is_refused || outcome != Outcome::Open) {
                self.requests[process] = Request::default();
            }
        }
        for id in 0..self.set_count {
            if self.is_needed(id) {
                continue;
            }
            self.sets[usize::from(id)] = Set { generation: self.set(id).generation, ..Set::default() };
            for node in &mut self.nodes {
                if node.in_flight.set() == Some(id) {
                    node.in_flight = InFlight::Nothing;
                }
            }
        }
    }

    /// A guest completed a FLUSH of this content.
    pub fn tell_flushed(&mut self, block: u8, record: u8) {
        let version = self.records[usize::from(record)].version;
        let Told { newest, flushed } = self.told[usize::from(block)];
        if self.rank(version) > self.rank(flushed) {
            let newest = if self.rank(version) > self.rank(newest) { version } else { newest };
            self.told[usize::from(block)] = Told { newest, flushed: version };
        }
    }

    /// A guest was told this content: nothing older may be given from now on.
    pub fn tell(&mut self, block: u8, record: u8) {
        let version = self.records[usize::from(record)].version;
        let newest = self.told[usize::from(block)].newest;
        let is_at_risk = self.records[usize::from(version)].is_at_risk;
        if self.rank(version) > self.rank(newest) && !is_at_risk {
            self.told[usize::from(block)].newest = version;
        }
    }
}
