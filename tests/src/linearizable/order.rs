//! Whether the operations of one block have an order: exact, in O(n log n), whatever overlaps and whatever is unknown.
//!
//! Values other than zeroes are written once, so it is known which write a read saw. A write with its reads is a [`Cluster`];
//! its *zone* lies between the first end and the last start among them (Gibbons and Korach, "Testing shared memories", 1997).
//! If the first end is earlier, the block must hold the value throughout the zone, and there only need it do so: the zone is
//! *held*. If not, all operations of the cluster have the whole zone in common, and any one point of it is enough for them.
//! So an order exists if no two held zones overlap, and each of the other zones has a point outside of the held ones.
//!
//! Zeroes are written by many, so a read of them has no one write to belong to. Reads and writes of zeroes are on their own
//! each, and want a point as well: a write, any; a read, one where the block holds zeroes. [`Sweep`] goes through the time
//! between the held zones and puts everything off as long as it can:
//! - Zeroes stay until a value's cluster, whose zone ends, needs its point; it takes all clusters with it that are open by then.
//! - A value stays until a read of zeroes ends, having seen none. That uses up a write of zeroes: of those open the one that ends
//!   first, since the others can do whatever it could.
//! - A write of zeroes that ends unused must come now, and costs nothing: clusters that are open get their points just before it.
//!
//! Nothing is lost by waiting: a block that changes earlier serves nobody whom it does not serve by staying and changing then.

use super::{Kind, Operation, ZEROES};
use std::collections::{BTreeMap, BTreeSet};

/// Why there is no order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wrong<'a> {
    /// Nobody wrote what this read returned.
    Nowhere(&'a Operation),
    /// The read ended before the only write of its value began.
    Future { read: &'a Operation, write: &'a Operation },
    /// Each would have to come before the other; `around` holds a value, `inside` may be an operation on zeroes.
    Between { around: Cluster<'a>, inside: Cluster<'a> },
    /// This read of zeroes has no write of zeroes left to see.
    NoZeroes(&'a Operation),
}

/// Operations that must follow each other without another value in between; what counts is who bounds them in time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster<'a> {
    /// The operation that ends first.
    pub(super) first: &'a Operation,
    /// The operation that starts last.
    pub(super) last: &'a Operation,
}

impl<'a> Cluster<'a> {
    fn of(operation: &'a Operation) -> Self {
        Self { first: operation, last: operation }
    }

    fn add(&mut self, operation: &'a Operation) {
        if operation.latest() < self.first.latest() {
            self.first = operation;
        }
        if operation.start > self.last.start {
            self.last = operation;
        }
    }

    fn is_held(&self) -> bool {
        self.first.precedes(self.last)
    }
}

/// The values written and read, with their operations.
fn clusters(operations: &[Operation]) -> Result<Vec<Cluster<'_>>, Wrong<'_>> {
    let mut clusters = BTreeMap::new();
    let valued = |kind| operations.iter().filter(move |operation| operation.is(kind) && operation.value != ZEROES);
    for write in valued(Kind::Write) {
        if let Some((_, twin)) = clusters.insert(write.value, (Cluster::of(write), write)) {
            panic!("a write needs a value of its own, a repeated one too: {write:?} and {twin:?}");
        }
    }
    for read in valued(Kind::Read) {
        let (cluster, write) = clusters.get_mut(&read.value).ok_or(Wrong::Nowhere(read))?;
        if read.precedes(write) {
            return Err(Wrong::Future { read, write });
        }
        cluster.add(read);
    }
    Ok(clusters.into_values().map(|(cluster, _)| cluster).collect())
}

/// When the block must hold one value: from the first operation's end to the last one's start, in order of time.
struct Held<'a>(Vec<Cluster<'a>>);

impl<'a> Held<'a> {
    fn new(clusters: &[Cluster<'a>]) -> Result<Self, Wrong<'a>> {
        let mut held: Vec<Cluster<'a>> = clusters.iter().filter(|cluster| cluster.is_held()).copied().collect();
        held.sort_unstable_by_key(|cluster| cluster.first.latest());
        match held.windows(2).find(|pair| pair[1].first.latest() < pair[0].last.start) {
            Some(pair) => Err(Wrong::Between { around: pair[0], inside: pair[1] }),
            None => Ok(Self(held)),
        }
    }

    /// The zone that has this moment inside; its ends are not, for what happens at the same time may have any order.
    fn around(&self, moment: u64) -> Option<&Cluster<'a>> {
        let next = self.0.get(self.0.partition_point(|cluster| cluster.last.start <= moment))?;
        (next.first.latest() < moment).then_some(next)
    }

    /// When the cluster can have its point, if held zones at either end of that time are cut off.
    fn window(&self, wants: Wants, cluster: Cluster<'a>) -> Result<Window<'a>, Wrong<'a>> {
        let (opens, closes) = (cluster.last.start, cluster.first.latest());
        let after = self.around(opens);
        let opens = after.map_or(opens, |around| around.last.start);
        let closes = self.around(closes).map_or(closes, |around| around.first.latest());
        match after {
            Some(around) if closes < opens => Err(Wrong::Between { around: *around, inside: cluster }),
            _ => Ok(Window { wants, opens, closes, operation: cluster.first }),
        }
    }
}

/// What a window is for. The order of those that close at the same time does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wants {
    WriteZeroes,
    ReadZeroes,
    Value,
}

/// Some point from `opens` to `closes` is wanted.
#[derive(Debug)]
struct Window<'a> {
    wants: Wants,
    opens: u64,
    closes: u64,
    operation: &'a Operation,
}

/// At the same time, windows open first, then close, then a value is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Opens(usize),
    Closes(Wants, usize),
    Held,
}

/// The state of the block, as time goes by. Moments are numbers of events.
struct Sweep {
    zeroes: bool,
    last_zeroes: usize,
    last_value: usize,
    /// Writes of zeroes that are open and not used, with the time they close.
    unused: BTreeSet<(u64, usize)>,
    /// When each window opened.
    opened: Vec<usize>,
}

impl Sweep {
    fn run<'a>(windows: &[Window<'a>], held: &Held<'_>) -> Result<(), Wrong<'a>> {
        let mut sweep = Self {
            zeroes: true,
            last_zeroes: 0,
            last_value: 0,
            unused: BTreeSet::new(),
            opened: vec![0; windows.len()],
        };
        // Number 0 is the time before all windows.
        for (now, event) in (1..).zip(events(windows, held)) {
            sweep.stay(now);
            match event {
                Event::Opens(index) => sweep.open(now, index, &windows[index]),
                Event::Closes(_, index) => sweep.close(now, index, &windows[index])?,
                Event::Held => sweep.put_value(now),
            }
        }
        Ok(())
    }

    fn stay(&mut self, now: usize) {
        *(if self.zeroes { &mut self.last_zeroes } else { &mut self.last_value }) = now;
    }

    fn put_value(&mut self, now: usize) {
        self.zeroes = false;
        self.last_value = now;
    }

    fn put_zeroes(&mut self, now: usize) {
        self.zeroes = true;
        self.last_zeroes = now;
    }

    fn open(&mut self, now: usize, index: usize, window: &Window<'_>) {
        self.opened[index] = now;
        if window.wants == Wants::WriteZeroes {
            self.unused.insert((window.closes, index));
        }
    }

    fn close<'a>(&mut self, now: usize, index: usize, window: &Window<'a>) -> Result<(), Wrong<'a>> {
        let opened = self.opened[index];
        match window.wants {
            Wants::WriteZeroes if self.unused.remove(&(window.closes, index)) => {
                self.put_value(now);
                self.put_zeroes(now);
            }
            Wants::ReadZeroes if self.last_zeroes < opened => {
                self.unused.pop_first().ok_or(Wrong::NoZeroes(window.operation))?;
                self.put_zeroes(now);
            }
            Wants::Value if self.last_value < opened => self.put_value(now),
            Wants::WriteZeroes | Wants::ReadZeroes | Wants::Value => {}
        }
        Ok(())
    }
}

/// All that happens, in order. What never closes (a write that was not acknowledged, and that no read saw) need not happen.
fn events(windows: &[Window<'_>], held: &Held<'_>) -> impl Iterator<Item = Event> {
    let opens = windows.iter().enumerate().map(|(index, window)| (window.opens, Event::Opens(index)));
    let closing = windows.iter().enumerate().filter(|(_, window)| window.closes != u64::MAX);
    let closes = closing.map(|(index, window)| (window.closes, Event::Closes(window.wants, index)));
    let holds = held.0.iter().map(|cluster| (cluster.first.latest(), Event::Held));
    let mut events: Vec<(u64, Event)> = opens.chain(closes).chain(holds).collect();
    events.sort_unstable();
    events.into_iter().map(|(_, event)| event)
}

/// Whether the operations, all of the same block, have an order.
pub(super) fn judge(operations: &[Operation]) -> Result<(), Wrong<'_>> {
    let clusters = clusters(operations)?;
    let held = Held::new(&clusters)?;
    let mut windows = Vec::with_capacity(operations.len());
    for cluster in clusters.iter().filter(|cluster| !cluster.is_held()) {
        windows.push(held.window(Wants::Value, *cluster)?);
    }
    for operation in operations.iter().filter(|operation| operation.value == ZEROES) {
        let wants = if operation.is(Kind::Write) { Wants::WriteZeroes } else { Wants::ReadZeroes };
        windows.push(held.window(wants, Cluster::of(operation))?);
    }
    Sweep::run(&windows, &held)
}

/// Of these operations, whether a write of zeroes is never what a read returned: in between, a value was there.
pub(super) fn unseen(write: &Operation, operations: &[Operation]) -> bool {
    let Ok(clusters) = clusters(operations) else { return false };
    let later = clusters.iter().filter(|cluster| write.precedes(cluster.last));
    let replaced = later.map(|cluster| cluster.first.latest()).min().unwrap_or(u64::MAX);
    let mut reads = operations.iter().filter(|read| read.is(Kind::Read) && read.value == ZEROES);
    reads.all(|read| read.precedes(write) || replaced < read.start)
}
