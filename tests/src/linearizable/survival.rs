//! What a block may hold after all hosts lost power at once: R7, and the last line of its table.
//!
//! Every write that a completed flush covers has survived: it ended before the flush was sent, or it was forced (FUA) and
//! acknowledged. Of the others any may be lost. So a block holds the value of a write that no surviving one has replaced for
//! certain: none of those began after it had ended. (A write that is lost may have been read before; that is no violation.)

use super::{History, Kind, Operation, ZEROES};
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

/// What became of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survival {
    /// Blocks whose last acknowledged write is there, or one that was under way with it or after it.
    pub newest: usize,
    /// Those that hold an older value, as they may.
    pub older: usize,
    /// Those in which a flush had made a write safe.
    pub safe: usize,
}

/// A block that holds what it must not.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The block.
    pub block: u64,
    /// What it holds.
    pub found: u64,
    /// A write that was safe and that replaced it; `None`: nobody ever wrote that value.
    pub safe: Option<Operation>,
    /// When the last flush that covers `safe` was sent, in ns; `None`: the write was forced.
    pub flush: Option<u64>,
}

impl std::error::Error for Loss {}

impl Display for Loss {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { block, found, .. } = self;
        match (&self.safe, self.flush) {
            (None, _) => write!(f, "block {block} holds {found:#x}, which nobody wrote"),
            (Some(safe), None) => write!(f, "block {block} holds {found}, older than a forced write: {safe}"),
            (Some(safe), Some(flush)) => {
                let seconds = flush as f64 / 1e9;
                write!(f, "block {block} holds {found}, older than what was flushed from {seconds:.6} s on: {safe}")
            }
        }
    }
}

impl History {
    /// A flush that was sent at `start` was answered.
    pub fn flush(&mut self, start: u64) {
        self.flushed = self.flushed.max(Some(start));
    }

    /// The `index`-th operation is a write that was forced, and is acknowledged.
    pub(super) fn force(&mut self, index: usize) {
        self.forced.insert(index);
    }

    fn is_safe(&self, index: usize, write: &Operation) -> bool {
        let is_flushed = write.end.is_some_and(|end| self.flushed.is_some_and(|flush| end < flush));
        is_flushed || self.forced.contains(&index)
    }
}

/// Judges what blocks hold that were used as `history` says, until all hosts lost power.
///
/// # Errors
/// The first block that holds what it must not.
pub fn survived(history: &History, found: &BTreeMap<u64, u64>) -> Result<Survival, Loss> {
    let mut survival = Survival::default();
    for (&block, &found) in found {
        let writes = history.operations.iter().enumerate();
        let writes: Vec<_> = writes.filter(|(_, one)| one.block == block && one.is(Kind::Write)).collect();
        let safe = || writes.iter().filter(|(index, write)| history.is_safe(*index, write));
        // Before all others, the zeroes of a new volume.
        let first = Operation { client: 0, block, kind: Kind::Write, value: ZEROES, start: 0, end: Some(0) };
        let origins = || writes.iter().map(|(_, write)| *write).chain([&first]).filter(|write| write.value == found);
        let replaced_by = |write: &Operation| safe().rfind(|(_, newer)| write.precedes(newer));
        if origins().all(|write| replaced_by(write).is_some()) {
            let by = origins().find_map(replaced_by);
            let is_forced = by.is_some_and(|(index, _)| history.forced.contains(index));
            let flush = history.flushed.filter(|_| !is_forced);
            return Err(Loss { block, found, safe: by.map(|(_, write)| **write), flush });
        }
        let acknowledged = || writes.iter().filter(|(_, write)| write.end.is_some());
        let is_newest = origins().any(|write| !acknowledged().any(|(_, newer)| write.precedes(newer)));
        survival.newest += usize::from(is_newest);
        survival.older += usize::from(!is_newest);
        survival.safe += usize::from(safe().next().is_some());
    }
    Ok(survival)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(history: &History, found: u64) -> Result<Survival, Loss> {
        survived(history, &BTreeMap::from([(7, found)]))
    }

    fn history() -> History {
        let mut history = History::new();
        history.write(1, 7, 10, 10, Some(20));
        history.write(1, 7, 11, 30, Some(40));
        history.write(2, 7, 12, 35, None);
        history.write(1, 7, 13, 50, Some(60));
        history
    }

    #[test]
    fn without_a_flush_any_whole_value_may_be_left() {
        for value in [0, 10, 11, 12, 13] {
            judge(&history(), value).expect("allowed");
        }
        assert_eq!(judge(&history(), 10).expect("allowed"), Survival { newest: 0, older: 1, safe: 0 });
        assert_eq!(judge(&history(), 13).expect("allowed"), Survival { newest: 1, older: 0, safe: 0 });
        let torn = judge(&history(), u64::MAX).expect_err("nobody wrote it");
        assert!(torn.safe.is_none());
    }

    #[test]
    fn what_a_flush_covers_is_left_or_something_that_did_not_end_before_it() {
        let mut history = history();
        history.flush(45);
        // 12 was under way beside 11 and may have come after it.
        for value in [11, 12, 13] {
            judge(&history, value).expect("allowed");
        }
        for value in [0, 10] {
            let loss = judge(&history, value).expect_err("replaced by what was flushed");
            assert_eq!((loss.safe.map(|write| write.value), loss.flush), (Some(11), Some(45)));
        }
        // Sent before the write was answered: it does not cover it.
        let mut early = self::history();
        early.flush(40);
        judge(&early, 10).expect("allowed");
        judge(&early, 0).expect_err("10 was answered before");
    }

    #[test]
    fn an_acknowledged_forced_write_is_left() {
        let mut history = history();
        history.force(3);
        judge(&history, 13).expect("allowed");
        judge(&history, 12).expect("under way until the end");
        let loss = judge(&history, 11).expect_err("replaced");
        assert_eq!((loss.safe.map(|write| write.value), loss.flush), (Some(13), None));
    }

    #[test]
    fn zeroes_are_a_value_like_any_other_once_they_are_written() {
        let mut history = history();
        history.flush(70);
        judge(&history, 0).expect_err("replaced by 13");
        history.write(3, 7, ZEROES, 80, Some(90));
        assert_eq!(judge(&history, 0).expect("allowed").newest, 1);
        judge(&history, 13).expect("the trim was not flushed");
        history.flush(95);
        judge(&history, 13).expect_err("the trim was flushed");
    }
}
