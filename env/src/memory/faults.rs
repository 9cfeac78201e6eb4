//! What can be asked to go wrong, and the plan that remembers it.

use super::mix;

/// Kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `read`.
    Read,
    /// `write` and `write_vectored`.
    Write,
    /// `flush`.
    Flush,
    /// `discard`.
    Discard,
    /// Any of them: for "fail the N-th I/O" loops.
    Any,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Fails with this errno, without effect. A flush poisons the disk.
    Error(i32),
    /// Takes effect and fails with this errno. A flush poisons the disk.
    ErrorAfter(i32),
    /// The first `kept` bytes (rounded down to sectors) are written, then the write fails.
    Torn {
        /// Bytes that reach the medium.
        kept: u64,
        /// What the caller is told.
        errno: i32,
    },
    /// Reported done, but nothing happened: a lost write, or a flush that lies.
    Lost,
    /// Goes to (or comes from) this offset and is reported done.
    Misdirect(u64),
    /// Not answered until [`super::MemoryDisk::release_stalled`]; then it runs.
    Stall,
}

/// What survives power loss of the writes that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All, those in flight included.
    All,
    /// Nothing.
    Nothing,
    /// Any subset of their sectors, chosen by this seed.
    Seed(u64),
}

impl Keep {
    fn random(&mut self) -> Option<u64> {
        match self {
            Self::Seed(seed) => {
                *seed = mix(*seed);
                Some(*seed)
            }
            _ => None,
        }
    }

    /// How the sectors of one write fare: a function that says of each in turn whether it stays.
    pub(crate) fn sectors(&mut self) -> impl FnMut() -> bool {
        // One write in four stays whole, one in four is lost, the others are torn at any sectors.
        let (mut seed, fixed) = match (self.random(), *self) {
            (Some(seed), _) => (seed, [Some(true), Some(false), None, None][(seed % 4) as usize]),
            (None, keep) => (0, Some(keep == Self::All)),
        };
        move || {
            fixed.unwrap_or_else(|| {
                seed = mix(seed);
                seed & (1 << 40) != 0
            })
        }
    }
}

/// Requests and bytes since the disk was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads started.
    pub reads: u64,
    /// Writes started, vectored ones included.
    pub writes: u64,
    /// Flushes started.
    pub flushes: u64,
    /// Discards started.
    pub discards: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Bytes handed over by writes.
    pub written_bytes: u64,
}

impl Counters {
    pub(super) fn of(&self, operation: Operation) -> u64 {
        match operation {
            Operation::Read => self.reads,
            Operation::Write => self.writes,
            Operation::Flush => self.flushes,
            Operation::Discard => self.discards,
            Operation::Any => self.reads + self.writes + self.flushes + self.discards,
        }
    }

    pub(super) fn count(&mut self, operation: Operation, bytes: u64) {
        match operation {
            Operation::Read => {
                self.reads += 1;
                self.read_bytes += bytes;
            }
            Operation::Write => {
                self.writes += 1;
                self.written_bytes += bytes;
            }
            Operation::Flush => self.flushes += 1,
            Operation::Discard => self.discards += 1,
            Operation::Any => unreachable!("a request has one kind"),
        }
    }
}

/// Planned faults; each fires once.
pub(super) struct Plans {
    plans: Vec<(Operation, u64, Fault)>,
    pub(super) dead: Option<i32>,
    seed: u64,
}

impl Plans {
    pub(super) fn new(seed: u64) -> Self {
        Self { plans: Vec::new(), dead: None, seed }
    }

    pub(super) fn add(&mut self, operation: Operation, nth: u64, fault: Fault) {
        self.plans.push((operation, nth, fault));
    }

    pub(super) fn clear(&mut self) {
        self.plans.clear();
        self.dead = None;
    }

    pub(super) fn random(&mut self) -> u64 {
        self.seed = mix(self.seed);
        self.seed
    }

    /// The fault of the request that `counters` counted last.
    pub(super) fn take(&mut self, operation: Operation, counters: &Counters) -> Option<Fault> {
        if let Some(errno) = self.dead {
            return Some(Fault::Error(errno));
        }
        let hit = self.plans.iter().position(|&(planned, nth, _)| {
            (planned == operation || planned == Operation::Any) && counters.of(planned) == nth
        })?;
        Some(self.plans.swap_remove(hit).2)
    }
}
