//! How far a search of a volume goes: what a cluster looks like, and how often each thing may happen in one story.

use crate::rules::read_words;

/// What may still happen. Each counts down.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    /// Writes of guests, each of one block.
    pub writes: u8,
    /// Take-overs.
    pub takes: u8,
    /// Owners that crash, serving or taking.
    pub owner_crashes: u8,
    /// Processes of nodes that crash; their devices keep what they completed.
    pub process_crashes: u8,
    /// Nodes that lose power, one at a time.
    pub power_losses: u8,
    /// Nodes that never come back.
    pub nodes_lost: u8,
    /// Devices that are empty from then on.
    pub disks_lost: u8,
    /// Everything loses power at once.
    pub blackouts: u8,
    /// A record on one member becomes unreadable.
    pub rot: u8,
    /// Changes of the journal set (P5).
    pub set_changes: u8,
    /// Segments that are frozen and sealed (P6).
    pub seals: u8,
    /// FLUSH requests of guests.
    pub flushes: u8,
    /// Checkpoints of a serving owner (P7).
    pub checkpoints: u8,
    /// Records that the cleaner copies.
    pub cleanings: u8,
    /// Clean hand-overs.
    pub hand_overs: u8,
}

/// A cluster and a story's length.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Failures that the scheme tolerates: 1 or 2. Sets have f + 1 members, segments 2 + f shards, on 3 + f nodes.
    pub f: u8,
    /// Blocks that guests write.
    pub blocks: u8,
    /// How often things may happen.
    pub budget: Budget,
    /// Whether guests read.
    pub reads: bool,
    /// Whether confirmations count for a time T (P8); otherwise every read asks.
    pub window: bool,
    /// Whether a node takes time for an append or a `sealed`, so that a close may come between.
    pub in_flight: bool,
    /// Whether an answer of the register may come late.
    pub slow_register: bool,
    /// Whether sets are made smaller for nodes that are only down, not lost (P3).
    pub shrink: bool,
    /// Whether nodes free what they think is garbage, by what they once learned of the register (P5).
    pub garbage: bool,
}

/// Shards that give a segment back.
pub const K: u8 = 2;

impl Bounds {
    /// A cluster in which nothing happens.
    pub fn new(f: u8) -> Self {
        Self {
            f,
            blocks: 1,
            budget: Budget::default(),
            reads: false,
            window: false,
            in_flight: false,
            slow_register: false,
            shrink: false,
            garbage: false,
        }
    }

    /// Members of a set.
    pub fn members(&self) -> u8 {
        self.f + 1
    }

    /// Positions of a segment's shards: position i is on node i.
    pub fn positions(&self) -> u8 {
        K + self.f
    }

    /// Nodes: one more than there are positions.
    pub fn nodes(&self) -> u8 {
        self.positions() + 1
    }

    /// Reads words such as `f=2 w=2 take=1 reads`; `WORDS` says what they mean.
    ///
    /// # Errors
    /// The word that is not known, or whose number is none.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        let mut bounds = Self::new(1);
        read_words(words, |name, number| bounds.put(name, number))?;
        Ok(bounds)
    }

    fn put(&mut self, name: &str, number: u8) -> Option<()> {
        let budget = &mut self.budget;
        let place = match name {
            "f" => &mut self.f,
            "blocks" => &mut self.blocks,
            "w" => &mut budget.writes,
            "take" => &mut budget.takes,
            "oc" => &mut budget.owner_crashes,
            "pc" => &mut budget.process_crashes,
            "power" => &mut budget.power_losses,
            "lost" => &mut budget.nodes_lost,
            "disk" => &mut budget.disks_lost,
            "blackout" => &mut budget.blackouts,
            "rot" => &mut budget.rot,
            "sc" => &mut budget.set_changes,
            "seal" => &mut budget.seals,
            "flush" => &mut budget.flushes,
            "ck" => &mut budget.checkpoints,
            "clean" => &mut budget.cleanings,
            "over" => &mut budget.hand_overs,
            flag => {
                *self.flag(flag)? = number != 0;
                return Some(());
            }
        };
        *place = number;
        let is_possible = (1..=2).contains(&self.f) && (1..=2).contains(&self.blocks);
        is_possible.then_some(())
    }

    fn flag(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "reads" => &mut self.reads,
            "window" => &mut self.window,
            "inflight" => &mut self.in_flight,
            "slow" => &mut self.slow_register,
            "shrink" => &mut self.shrink,
            "garbage" => &mut self.garbage,
            _ => return None,
        })
    }
}

/// What the words of [`Bounds::parse`] mean.
pub const WORDS: &str = "\
f failures that the scheme tolerates (1 or 2), w guest writes, blocks they go to (1 or 2), take take-overs, oc owner crashes, pc crashes of nodes' processes, power losses
of single nodes, lost nodes, disk back empty, blackout (power loss of everything), rot of a record on one member, sc set changes,
seal, flush, ck checkpoints, clean (copies by the cleaner), over (hand-overs); flags: reads, window (confirmations count for T),
inflight (appends and `sealed` take time on a node), slow (answers of the register come late), garbage (nodes free old sets),
shrink (sets are made smaller for nodes that are down, not only for lost ones)";
