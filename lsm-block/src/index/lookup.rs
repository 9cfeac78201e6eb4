//! Look-ups: the delta first, then the trees, newest first.
//!
//! Both run as a sweep over a stack of ranges that are still to be answered, from trees that are still to be asked. A
//! page that is not in memory stops the sweep; it goes on where it was when the page is there.

use super::delta::Delta;
use super::entry::{Found, IndexError, Place, StatusRun};
use super::format::{CRC, NUMBER, POSITION, Page, ZEROES};
use super::pages::{Held, Missing, Pages, Roots};
use std::sync::Arc;
use xsan_types::{BlockRange, Crc32c, Version};

/// What the deltas say about a range of blocks.
#[derive(Default)]
pub(super) struct InDelta {
    /// Ranges that only the trees can answer, in order, as `start..end` in blocks.
    pub open: Vec<(u64, u64)>,
    /// Copies of data that the trees know: valid if the tree still has this version (see [`answer`]).
    pub copies: Vec<(u64, Version, Place)>,
}

impl InDelta {
    fn leave_open(&mut self, lba: u64, end: u64) {
        match self.open.last_mut() {
            Some(last) if last.1 == lba => last.1 = end,
            _ => self.open.push((lba, end)),
        }
    }
}

/// The newest of what both deltas know of a block; of equal versions the one from the newer delta.
fn newest(lba: u64, deltas: [Option<&Delta>; 2], zeroes: &mut [ZeroCursor; 2]) -> Option<(Version, Option<Place>)> {
    let mut best: Option<(Version, Option<Place>)> = None;
    for (delta, cursor) in deltas.into_iter().zip(zeroes) {
        let Some(delta) = delta else { continue };
        let data = delta.get(lba).map(|(version, place)| (version, Some(place)));
        let zero = cursor.at(delta, lba).map(|version| (version, None));
        for one in [data, zero].into_iter().flatten() {
            if best.is_none_or(|best| one.0 > best.0) {
                best = Some(one);
            }
        }
    }
    best
}

/// Walks over the zeroed ranges of a delta together with the blocks.
#[derive(Default)]
struct ZeroCursor {
    /// No range begins before this block…
    free_until: u64,
    /// …or this one covers everything before its end.
    covered_until: u64,
    version: Version,
}

impl ZeroCursor {
    fn at(&mut self, delta: &Delta, lba: u64) -> Option<Version> {
        if lba >= self.covered_until && lba >= self.free_until {
            match delta.zero_from(lba) {
                Some((start, zero)) if start == lba => (self.covered_until, self.version) = (zero.end, zero.version),
                Some((start, _)) => self.free_until = start,
                None => self.free_until = u64::MAX,
            }
        }
        (lba < self.covered_until).then_some(self.version)
    }
}

/// Answers `range` from the deltas (newer first) as far as they can; `out` gets one answer per block, holes where the
/// trees must be asked.
///
/// An entry that is not newer than `horizon` is a copy of what the trees had when they were built (a re-sealed segment, a
/// cleaned block): it counts only if the trees still have that very version. If they have another, or none, the block was
/// overwritten or zeroed since, and the copy is stale (C9).
pub(super) fn answer(
    range: BlockRange,
    deltas: [Option<&Delta>; 2],
    horizon: Version,
    out: &mut Vec<Found>,
    rest: &mut InDelta,
) {
    out.clear();
    out.resize(range.count as usize, Found::Hole);
    let deltas = deltas.map(|delta| delta.filter(|delta| !delta.is_empty()));
    let (start, end) = (range.start.0, range.start.0 + range.count);
    if deltas.iter().all(Option::is_none) {
        rest.leave_open(start, end);
        return;
    }
    let mut zeroes = [ZeroCursor::default(), ZeroCursor::default()];
    for (lba, out) in (start..end).zip(out.iter_mut()) {
        match newest(lba, deltas, &mut zeroes) {
            None => rest.leave_open(lba, lba + 1),
            Some((version, Some(place))) if version <= horizon => {
                rest.leave_open(lba, lba + 1);
                rest.copies.push((lba, version, place));
            }
            Some((version, Some(place))) => *out = Found::Data { place, version },
            Some((_, None)) => {}
        }
    }
}

/// Replaces what the trees said by newer places of the same versions.
pub(super) fn settle_copies(start: u64, copies: &[(u64, Version, Place)], out: &mut [Found]) {
    for &(lba, copied, to) in copies {
        if let Found::Data { place, version } = &mut out[(lba - start) as usize]
            && *version == copied
        {
            *place = to;
        }
    }
}

fn place(page: &Page, row: usize) -> Place {
    Place {
        number: page.value(NUMBER, row),
        position: page.value(POSITION, row) as u32,
        crc: Crc32c(page.value(CRC, row) as u32),
    }
}

/// A sweep over ranges of blocks through the trees of a root.
pub(super) struct Sweep<'a> {
    pages: &'a Pages,
    roots: &'a Roots,
    /// (tree, start, end), the next one on top.
    stack: Vec<(usize, u64, u64)>,
}

/// A stretch of blocks that one tree answers.
struct Stretch {
    start: u64,
    end: u64,
    page: Arc<Page>,
    /// Rows of data, one block each from `start`; `None`: zeroes.
    row: Option<usize>,
}

impl<'a> Sweep<'a> {
    pub fn new(pages: &'a Pages, roots: &'a Roots, ranges: &[(u64, u64)]) -> Self {
        Self { pages, roots, stack: ranges.iter().rev().map(|&(start, end)| (0, start, end)).collect() }
    }

    /// The next stretch that some tree knows, in order of blocks; everything between stretches is a hole.
    fn next(&mut self, held: &Held) -> Result<Result<Option<Stretch>, Missing>, IndexError> {
        while let Some((index, start, end)) = self.stack.pop() {
            let Some(tree) = self.roots.root.trees.get(index) else { continue };
            if end <= tree.first || start >= tree.end {
                self.stack.push((index + 1, start, end));
                continue;
            }
            let (page, leaf_end) = match self.pages.leaf(tree, start, held)? {
                Ok(found) => found,
                Err(missing) => {
                    self.stack.push((index, start, end));
                    return Ok(Err(missing));
                }
            };
            let leaf_end = leaf_end.min(end);
            if leaf_end < end {
                self.stack.push((index, leaf_end, end));
            }
            match first_in(&page, start, leaf_end) {
                None => self.stack.push((index + 1, start, leaf_end)),
                Some(stretch) => {
                    if stretch.end < leaf_end {
                        self.stack.push((index, stretch.end, leaf_end));
                    }
                    if start < stretch.start {
                        // What lies before it belongs to the trees below and comes first.
                        self.stack.push((index, stretch.start, stretch.end));
                        self.stack.push((index + 1, start, stretch.start));
                        continue;
                    }
                    return Ok(Ok(Some(stretch)));
                }
            }
        }
        Ok(Ok(None))
    }

    /// Fills `out`, whose first block is `start`. `Err`: a page is missing; call again when it is there.
    pub fn fill(&mut self, start: u64, out: &mut [Found], held: &Held) -> Result<Result<(), Missing>, IndexError> {
        loop {
            let stretch = match self.next(held)? {
                Ok(Some(stretch)) => stretch,
                Ok(None) => return Ok(Ok(())),
                Err(missing) => return Ok(Err(missing)),
            };
            let Some(first) = stretch.row else { continue };
            for (row, lba) in (first..).zip(stretch.start..stretch.end) {
                let (page, at) = (&stretch.page, (lba - start) as usize);
                out[at] = Found::Data { place: place(page, row), version: page.version(row) };
            }
        }
    }

    /// Where the ranges not answered yet end.
    pub fn end(&self) -> u64 {
        self.stack.last().map_or(0, |&(_, _, end)| end)
    }

    /// Adds the stretches to a map of runs.
    pub fn runs(&mut self, runs: &mut Runs, held: &Held) -> Result<Result<(), Missing>, IndexError> {
        while !runs.is_full() {
            match self.next(held)? {
                Ok(Some(stretch)) => runs.add(stretch.start, stretch.end, stretch.row.is_none()),
                Ok(None) => return Ok(Ok(())),
                Err(missing) => return Ok(Err(missing)),
            }
        }
        Ok(Ok(()))
    }
}

/// The first entries of a leaf inside `start..end`: blocks of data without a gap, or one zeroed range.
fn first_in(page: &Arc<Page>, start: u64, end: u64) -> Option<Stretch> {
    let mut row = page.last_at_most(start).unwrap_or(0);
    loop {
        if row >= page.rows() {
            return None;
        }
        let (lba, zeroes) = (page.value(0, row), page.value(ZEROES, row));
        let entry_end = lba + zeroes.max(1);
        if lba >= end {
            return None;
        }
        if entry_end <= start {
            row += 1;
            continue;
        }
        if zeroes > 0 {
            let (start, end) = (lba.max(start), entry_end.min(end));
            return Some(Stretch { start, end, page: Arc::clone(page), row: None });
        }
        let mut last = row + 1;
        while last < page.rows() && lba + (last - row) as u64 != end {
            let contiguous = page.value(0, last) == lba + (last - row) as u64 && page.value(ZEROES, last) == 0;
            if !contiguous {
                break;
            }
            last += 1;
        }
        let end = lba + (last - row) as u64;
        return Some(Stretch { start: lba, end, page: Arc::clone(page), row: Some(row) });
    }
}

/// Runs of an allocation map, built in order of blocks.
pub(super) struct Runs {
    runs: Vec<StatusRun>,
    reached: u64,
    runs_max: usize,
}

impl Runs {
    pub fn new(start: u64, runs_max: usize) -> Self {
        Self { runs: Vec::new(), reached: start, runs_max }
    }

    /// One run more than asked for: then the last wanted one is complete.
    pub fn is_full(&self) -> bool {
        self.runs.len() > self.runs_max
    }

    /// `start..end` is alike; what lies between the last call's end and `start` is a hole.
    pub fn add(&mut self, start: u64, end: u64, hole: bool) {
        if start > self.reached {
            self.push(start - self.reached, true);
        }
        self.push(end - start, hole);
        self.reached = end;
    }

    fn push(&mut self, blocks: u64, hole: bool) {
        match self.runs.last_mut() {
            Some(last) if last.hole == hole => last.blocks += blocks,
            _ => self.runs.push(StatusRun { blocks, hole }),
        }
    }

    pub fn finish(mut self, end: u64) -> Vec<StatusRun> {
        if !self.is_full() && self.reached < end {
            self.push(end - self.reached, true);
        }
        self.runs.truncate(self.runs_max);
        self.runs
    }
}
