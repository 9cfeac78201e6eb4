//! Tells people what is wrong with a history: the few operations that contradict each other.

use super::order::{Wrong, judge, unseen};
use super::{History, Kind, Operation, ZEROES};
use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::mem::discriminant;
use std::ops::Range;

/// The operations without those of the range that may be left out: if the rest has no order, then all had none.
type Without = fn(&[Operation], Range<usize>) -> Vec<Operation>;

/// What no disk can have shown.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The block.
    pub block: u64,
    /// What is wrong with it, for people.
    pub what: String,
    /// Operations of the block that cannot all be true, by start: as few as show it.
    pub operations: Vec<Operation>,
    /// Blocks beside this one that are wrong.
    pub others: usize,
}

impl std::error::Error for Violation {}

impl Violation {
    /// Of operations on one block that have no order.
    pub(super) fn new(operations: &[Operation], wrong: &Wrong<'_>, others: usize, history: &History) -> Self {
        let operations = contradiction(operations, wrong);
        let wrong = judge(&operations).expect_err("what is left is wrong in the same way");
        let what = explain(wrong, &operations, history);
        Self { block: operations[0].block, what, operations, others }
    }
}

impl Display for Violation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "block {}: {}. What contradicts itself:", self.block, self.what)?;
        for operation in &self.operations {
            write!(f, "\n  {operation}")?;
        }
        match self.others {
            0 => Ok(()),
            1 => write!(f, "\n1 other block is wrong as well"),
            others => write!(f, "\n{others} other blocks are wrong as well"),
        }
    }
}

impl Display for Operation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let did = if self.is(Kind::Write) { "wrote" } else { "read" };
        write!(f, "client {} {did} {} ", self.client, named(self.value))?;
        match self.end {
            Some(end) => write!(f, "[{}..{} s]", seconds(self.start), seconds(end)),
            None => write!(f, "[{} s.., not acknowledged]", seconds(self.start)),
        }
    }
}

fn named(value: u64) -> String {
    if value == ZEROES { "zeroes".to_owned() } else { value.to_string() }
}

fn seconds(nanos: u64) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

fn explain(wrong: Wrong<'_>, operations: &[Operation], history: &History) -> String {
    match wrong {
        Wrong::Nowhere(read) => {
            let elsewhere =
                history.operations().iter().find(|other| other.is(Kind::Write) && other.value == read.value);
            let hint = elsewhere.map(|write| format!("; block {} got it: {write}", write.block)).unwrap_or_default();
            format!("{read}, which nobody wrote to it{hint}")
        }
        Wrong::Future { read, write } => {
            format!("{read} before client {} began to write it at {} s", write.client, seconds(write.start))
        }
        Wrong::Between { around, inside } => {
            format!(
                "{}: a stale read, or the loss of {}, which had replaced it",
                around.last,
                named(inside.first.value)
            )
        }
        Wrong::NoZeroes(read) if operations.iter().any(writes_zeroes) => {
            format!("{read}: too few writes of zeroes for that, as all others are replaced by then")
        }
        Wrong::NoZeroes(read) => {
            let replaced = operations.iter().rfind(|other| other.value != ZEROES && other.precedes(read));
            let after = replaced.map(|other| format!(" after {other}")).unwrap_or_default();
            format!("{read}, though nobody wrote zeroes{after}")
        }
    }
}

/// The operations that are wrong, without those that nobody needs to see it.
fn contradiction(operations: &[Operation], wrong: &Wrong<'_>) -> Vec<Operation> {
    let mut left = match *wrong {
        Wrong::Nowhere(read) => vec![*read],
        Wrong::Future { read, write } => vec![*read, *write],
        Wrong::Between { around, inside } => {
            let bounds = [around.first, around.last, inside.first, inside.last];
            let values = [around, inside].map(|cluster| cluster.first.value);
            let writes =
                |other: &Operation| !writes_zeroes(other) && other.is(Kind::Write) && values.contains(&other.value);
            operations.iter().filter(|other| bounds.contains(other) || writes(other)).copied().collect()
        }
        Wrong::NoZeroes(_) => operations.to_vec(),
    };
    left.sort_by_key(|operation| (operation.start, operation.latest()));
    // Writes of zeroes come last: what makes one irrelevant must not be left out afterwards, or people would miss it.
    let left = thin(left, wrong, without_values);
    thin(left, wrong, without_zeroes)
}

/// Leaves out parts with `without`, as long as the same is wrong: halves first, then ever smaller ones.
fn thin(mut left: Vec<Operation>, wrong: &Wrong<'_>, without: Without) -> Vec<Operation> {
    let same = |fewer: &[Operation]| judge(fewer).is_err_and(|other| discriminant(&other) == discriminant(wrong));
    let mut step = left.len();
    loop {
        step = step.div_ceil(2);
        let before = left.len();
        let mut at = 0;
        while at < left.len() {
            let fewer = without(&left, at..at + step);
            if fewer.len() < left.len() && same(&fewer) {
                left = fewer;
            } else {
                at += step;
            }
        }
        if step == 1 && left.len() == before {
            return left;
        }
    }
}

/// Those outside of the range, and the writes whose value they read: without these they would say something else.
fn without_values(operations: &[Operation], range: Range<usize>) -> Vec<Operation> {
    let is_outside = |index: &usize| !range.contains(index);
    let outside = operations.iter().enumerate().filter(|(index, _)| is_outside(index));
    let reads = outside.filter(|(_, operation)| operation.is(Kind::Read));
    let seen: BTreeSet<u64> = reads.map(|(_, read)| read.value).chain([ZEROES]).collect();
    let is_seen = |operation: &Operation| operation.is(Kind::Write) && seen.contains(&operation.value);
    let kept = operations.iter().enumerate().filter(|(index, operation)| is_outside(index) || is_seen(operation));
    kept.map(|(_, operation)| *operation).collect()
}

/// Those outside of the range, and all but writes of zeroes that no read can have seen, as the others show.
fn without_zeroes(operations: &[Operation], range: Range<usize>) -> Vec<Operation> {
    let others: Vec<Operation> = operations.iter().filter(|operation| !writes_zeroes(operation)).copied().collect();
    let is_unseen = |operation: &Operation| writes_zeroes(operation) && unseen(operation, &others);
    let kept = operations.iter().enumerate();
    let kept = kept.filter(|(index, operation)| !range.contains(index) || !is_unseen(operation));
    kept.map(|(_, operation)| *operation).collect()
}

fn writes_zeroes(operation: &Operation) -> bool {
    operation.is(Kind::Write) && operation.value == ZEROES
}
