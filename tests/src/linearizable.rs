//! Tells whether what several clients saw of a volume's blocks is what one disk could have shown them.
//!
//! Every block stands for itself (NBD promises nothing across blocks), holds zeroes at first and then the value of the last
//! write. A [`History`] holds what the clients did, with times of one monotonic clock; [`check`] asks for an order of each
//! block's operations in which one that ended before another began comes first, and every read returns the last value written.
//! A write without an acknowledgement (it failed, or its connection broke) may take effect at any time after its start, or
//! never. Nodes killed and volumes taken over in between change nothing of this.
//!
//! Every write of a block must have a value of its own, a repeated one too; only zeroes ([`ZEROES`]) are written any number of
//! times. That is what makes the answer both exact and quick: see `order.rs`.

mod order;
mod recorder;
mod survival;
#[cfg(test)]
mod tests;
mod witness;

pub use recorder::{Flushing, Reading, Recorder, Writing};
pub use survival::{Loss, Survival, survived};
pub use witness::Violation;

use std::collections::{BTreeMap, BTreeSet};

/// The value of a block that was never written, and of one that was trimmed or zeroed.
pub const ZEROES: u64 = 0;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Makes the block hold its value: a write, and with [`ZEROES`] a trim or a write of zeroes.
    Write,
    /// Returned its value.
    Read,
}

/// One client's access to one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Who asked for it; told in violations only.
    pub client: u64,
    /// The block.
    pub block: u64,
    /// What it does.
    pub kind: Kind,
    /// The value written or returned.
    pub value: u64,
    /// When it began, in ns.
    pub start: u64,
    /// When it ended, in ns; `None`: a write that was not acknowledged.
    pub end: Option<u64>,
}

impl Operation {
    /// When it has taken effect at the latest.
    fn latest(&self) -> u64 {
        self.end.unwrap_or(u64::MAX)
    }

    /// It ended before the other began.
    fn precedes(&self, other: &Self) -> bool {
        self.latest() < other.start
    }

    fn is(&self, kind: Kind) -> bool {
        self.kind == kind
    }
}

/// What the clients did, in any order.
#[derive(Clone, Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    /// When the last flush was sent that was answered, in ns.
    flushed: Option<u64>,
    /// Writes that were on stable media when they were acknowledged, by their place among the operations.
    forced: BTreeSet<usize>,
}

impl History {
    /// Of a fresh volume: all blocks are zero, and nothing was done.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters a write, of [`ZEROES`] if it was a trim or a write of zeroes; `end`: `None` if it was not acknowledged.
    ///
    /// # Panics
    /// It ends before it starts.
    pub fn write(&mut self, client: u64, block: u64, value: u64, start: u64, end: Option<u64>) {
        self.enter(Operation { client, block, kind: Kind::Write, value, start, end });
    }

    /// Enters a read that returned `value`; one without an answer says nothing and is left out. Bytes that no single write
    /// made (a torn block) are entered as a value that nobody writes.
    ///
    /// # Panics
    /// It ends before it starts.
    pub fn read(&mut self, client: u64, block: u64, value: u64, start: u64, end: u64) {
        self.enter(Operation { client, block, kind: Kind::Read, value, start, end: Some(end) });
    }

    /// All that was entered.
    #[must_use]
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    fn enter(&mut self, operation: Operation) {
        assert!(operation.start <= operation.latest(), "ends before it starts: {operation:?}");
        self.operations.push(operation);
    }
}

/// What a history without violation consists of, so that a test can ask whether it saw anything worth checking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks written or read.
    pub blocks: usize,
    /// Reads.
    pub reads: usize,
    /// Writes of any kind, acknowledged or not.
    pub writes: usize,
    /// Those of zeroes.
    pub zeroes: usize,
    /// Those that were not acknowledged.
    pub unknown: usize,
    /// Those that were not acknowledged, not of zeroes, and returned by a read nevertheless.
    pub appeared: usize,
}

impl Report {
    fn add(&mut self, operations: &[Operation]) {
        let writes = || operations.iter().filter(|operation| operation.is(Kind::Write));
        let unknown = || writes().filter(|write| write.end.is_none());
        let reads = operations.iter().filter(|operation| operation.is(Kind::Read));
        let returned: BTreeSet<u64> = reads.map(|read| read.value).filter(|value| *value != ZEROES).collect();
        self.blocks += 1;
        self.reads += operations.len() - writes().count();
        self.writes += writes().count();
        self.zeroes += writes().filter(|write| write.value == ZEROES).count();
        self.unknown += unknown().count();
        self.appeared += unknown().filter(|write| returned.contains(&write.value)).count();
    }
}

/// Looks for an order of each block's operations that explains all reads.
///
/// # Errors
/// There is none for at least one block: the few operations of the first such block that contradict each other.
///
/// # Panics
/// Two writes of a block have the same value, which is not [`ZEROES`].
pub fn check(history: &History) -> Result<Report, Violation> {
    let mut blocks: BTreeMap<u64, Vec<Operation>> = BTreeMap::new();
    for operation in &history.operations {
        blocks.entry(operation.block).or_default().push(*operation);
    }
    let mut wrong = blocks.values().filter_map(|operations| Some((operations, order::judge(operations).err()?)));
    if let Some((operations, why)) = wrong.next() {
        return Err(Violation::new(operations, &why, wrong.count(), history));
    }
    let mut report = Report::default();
    for operations in blocks.values() {
        report.add(operations);
    }
    Ok(report)
}
