//! The live list: every sealed segment that the index may refer to, and when one may go.
//!
//! `live` counts entries of the trees of the last checkpoint, so newer changes never let a segment go that a restart would
//! still need. A segment with zero records stays while any other segment holds data older than them: else a rebuild from
//! segments alone would bring that data back (R4, H15). "Older" is told by versions, not by segment numbers: several
//! segments are open at once, and copies keep their version.

use super::entry::{Change, SegmentKind, SegmentRecord};
use super::format::{IndexSegment, LiveRow};
use std::collections::{BTreeMap, BTreeSet};
use xsan_types::{
    Crc32c, Generation, PgId, PoolId, SealedSegment, SegmentName, Sequence, ShardIndex, Version, VolumeId,
};

/// A data segment of the live list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub number: u64,
    generation: Generation,
    pg: PgId,
    bytes: u64,
    footer_offset: u64,
    footer_crc: Crc32c,
    /// Entries of the installed trees that lie in it.
    pub live: u64,
    /// Oldest version of its data; `None` without data.
    oldest: Option<Version>,
    /// The installed root holds this very line.
    pub stored: bool,
    /// Entered after the last freeze: the next checkpoint knows nothing about it.
    fresh: bool,
}

/// What changes tell about a segment.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    oldest: Option<Version>,
    zeroed: Option<Version>,
}

/// Every listed segment, and facts about open ones.
pub(super) struct Segments {
    volume: VolumeId,
    /// Data segments by number.
    lines: Vec<Line>,
    pub index: BTreeMap<u64, IndexSegment>,
    holes: BTreeMap<u64, u64>,
    /// Newest zero record of a listed data segment.
    zeroed: BTreeMap<u64, Version>,
    /// Segments that changes point to and that are not listed yet.
    open: BTreeMap<u64, Facts>,
}

/// The live list as a checkpoint will write it.
pub(super) struct NextList {
    pub lines: Vec<Line>,
    /// Rows as written, beside `lines`.
    pub rows: Vec<LiveRow>,
    pub dropped: Vec<SegmentName>,
}

fn mask_of(holes: &[ShardIndex]) -> u64 {
    holes.iter().filter(|hole| hole.0 < 64).fold(0, |mask, hole| mask | 1 << hole.0)
}

fn holes_of(mask: u64) -> Vec<ShardIndex> {
    (0..64).filter(|bit| mask >> bit & 1 == 1).map(ShardIndex).collect()
}

impl Segments {
    pub fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            lines: Vec::new(),
            index: BTreeMap::new(),
            holes: BTreeMap::new(),
            zeroed: BTreeMap::new(),
            open: BTreeMap::new(),
        }
    }

    /// From the pages of a root, whose rows are in order and checked.
    pub fn load(volume: VolumeId, index: Vec<IndexSegment>, rows: impl Iterator<Item = LiveRow>) -> Self {
        let mut segments = Self::new(volume);
        for row in rows {
            let [number, generation, pool, group, bytes, footer_offset, crc, live, holes, rest @ ..] = row;
            let [oldest, zeroed] = [[rest[0], rest[1]], [rest[2], rest[3]]].map(|[generation, sequence]| Version {
                generation: Generation(generation),
                sequence: Sequence(sequence),
            });
            if holes != 0 {
                segments.holes.insert(number, holes);
            }
            if zeroed != Version::default() {
                segments.zeroed.insert(number, zeroed);
            }
            segments.lines.push(Line {
                number,
                generation: Generation(generation),
                pg: PgId { pool: PoolId(pool as u32), index: group as u32 },
                bytes,
                footer_offset,
                footer_crc: Crc32c(crc as u32),
                live,
                oldest: (oldest != NO_DATA).then_some(oldest),
                stored: true,
                fresh: false,
            });
        }
        segments.holes.extend(index.iter().filter(|one| one.holes != 0).map(|one| (one.name.number, one.holes)));
        segments.index = index.into_iter().map(|one| (one.name.number, one)).collect();
        segments
    }

    fn row(&self, line: &Line) -> LiveRow {
        let oldest = line.oldest.unwrap_or(NO_DATA);
        let zeroed = self.zeroed.get(&line.number).copied().unwrap_or_default();
        [
            line.number,
            line.generation.0,
            line.pg.pool.0.into(),
            line.pg.index.into(),
            line.bytes,
            line.footer_offset,
            line.footer_crc.0.into(),
            line.live,
            self.holes.get(&line.number).copied().unwrap_or(0),
            oldest.generation.0,
            oldest.sequence.0,
            zeroed.generation.0,
            zeroed.sequence.0,
        ]
    }

    fn name(&self, line: &Line) -> SegmentName {
        SegmentName { volume: self.volume, generation: line.generation, number: line.number, pg: line.pg }
    }

    fn position(&self, number: u64) -> Result<usize, usize> {
        // New segments have the largest numbers.
        match self.lines.last() {
            Some(last) if last.number < number => Err(self.lines.len()),
            _ => self.lines.binary_search_by_key(&number, |line| line.number),
        }
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub fn len(&self) -> usize {
        self.lines.len() + self.index.len()
    }

    pub fn memory(&self) -> usize {
        self.lines.capacity() * size_of::<Line>() + self.index.len() * 96 + self.zeroed.len() * 32
    }

    /// Takes note of what the changes say about the segments they lie in.
    pub fn note(&mut self, changes: &[Change]) {
        for group in changes.chunk_by(|a, b| a.number() == b.number()) {
            let mut facts = Facts::default();
            for change in group {
                match *change {
                    Change::Data { version, .. } => facts.oldest = min(facts.oldest, Some(version)),
                    Change::Zero { version, .. } => facts.zeroed = facts.zeroed.max(Some(version)),
                }
            }
            if let Some(change) = group.first() {
                self.note_facts(change.number(), facts);
            }
        }
    }

    fn note_facts(&mut self, number: u64, facts: Facts) {
        let Ok(at) = self.position(number) else {
            let known = self.open.entry(number).or_default();
            known.oldest = min(known.oldest, facts.oldest);
            known.zeroed = known.zeroed.max(facts.zeroed);
            return;
        };
        let line = &mut self.lines[at];
        let oldest = min(line.oldest, facts.oldest);
        line.stored &= oldest == line.oldest;
        line.oldest = oldest;
        if let Some(version) = facts.zeroed
            && self.zeroed.get(&number).is_none_or(|known| *known < version)
        {
            line.stored = false;
            self.zeroed.insert(number, version);
        }
    }

    /// A data segment is sealed. What is listed already stays as it is.
    pub fn sealed(&mut self, sealed: &SealedSegment, holes: &[ShardIndex]) {
        let name = sealed.name;
        let Err(at) = self.position(name.number) else { return };
        let facts = self.open.remove(&name.number).unwrap_or_default();
        let line = Line {
            number: name.number,
            generation: name.generation,
            pg: name.pg,
            bytes: sealed.bytes,
            footer_offset: sealed.footer_offset,
            footer_crc: sealed.footer_crc,
            live: 0,
            oldest: facts.oldest,
            stored: false,
            fresh: true,
        };
        self.lines.insert(at, line);
        if let Some(version) = facts.zeroed {
            self.zeroed.insert(name.number, version);
        }
        if !holes.is_empty() {
            self.holes.insert(name.number, mask_of(holes));
        }
    }

    /// A freeze: what is listed now is known to the checkpoint that follows.
    pub fn freeze(&mut self) {
        self.lines.iter_mut().for_each(|line| line.fresh = false);
    }

    pub fn set_holes(&mut self, number: u64, holes: &[ShardIndex]) {
        let mask = mask_of(holes);
        if let Some(segment) = self.index.get_mut(&number) {
            segment.holes = mask;
        } else if let Ok(at) = self.position(number) {
            self.lines[at].stored = false;
        } else {
            return;
        }
        if mask == 0 {
            self.holes.remove(&number)
        } else {
            self.holes.insert(number, mask)
        };
    }

    pub fn get(&self, number: u64) -> Option<SegmentRecord> {
        let missing = self.holes.get(&number).copied().unwrap_or(0);
        let holes = holes_of(missing);
        if let Some(one) = self.index.get(&number) {
            let sealed = SealedSegment {
                name: one.name,
                bytes: one.bytes,
                footer_offset: one.bytes,
                footer_crc: Crc32c(0),
                holes: missing,
            };
            return Some(SegmentRecord { sealed, live: one.live, holes, kind: SegmentKind::Index });
        }
        let line = &self.lines[self.position(number).ok()?];
        let sealed = SealedSegment {
            name: self.name(line),
            bytes: line.bytes,
            footer_offset: line.footer_offset,
            footer_crc: line.footer_crc,
            holes: missing,
        };
        Some(SegmentRecord { sealed, live: line.live, holes, kind: SegmentKind::Data })
    }

    /// The first segment behind number `after` that misses positions.
    pub fn next_with_holes(&self, after: u64) -> Option<SegmentRecord> {
        self.holes.range(after + 1..).find_map(|(&number, _)| self.get(number))
    }

    pub fn hole_count(&self) -> usize {
        self.holes.len()
    }

    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.lines.iter().map(|line| line.number).chain(self.index.keys().copied())
    }

    /// The list under changed counts. `Err`: a counted segment that is not listed.
    pub fn next(&self, border: u64, counts: &BTreeMap<u64, i64>) -> Result<NextList, u64> {
        let mut lines = self.lines.clone();
        for (&number, &change) in counts {
            let at = self.position(number).map_err(|_| number)?;
            let line = &mut lines[at];
            line.live = line.live.checked_add_signed(change).ok_or(number)?;
            line.stored &= change == 0;
        }
        let kept = self.kept(border, &lines);
        let (lines, dropped): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| kept.contains(&line.number));
        let rows = lines.iter().map(|line| self.row(line)).collect();
        let dropped = dropped.iter().map(|line| self.name(line)).collect();
        Ok(NextList { lines, rows, dropped })
    }

    /// Numbers that stay: undecided, unknown to the checkpoint, live, or with zero records that are still needed.
    fn kept(&self, border: u64, lines: &[Line]) -> BTreeSet<u64> {
        let stays = |line: &&Line| line.live > 0 || line.fresh || line.number >= border;
        let mut kept: BTreeSet<u64> = lines.iter().filter(stays).map(|line| line.number).collect();
        // Oldest data of the kept segments: the smallest, and the smallest of another segment than its own.
        let open = self.open.range(border..);
        let open = open.filter_map(|(&number, facts)| facts.oldest.map(|oldest| (oldest, number)));
        let mut oldest = TwoOldest::default();
        lines
            .iter()
            .filter(stays)
            .filter_map(|line| line.oldest.map(|oldest| (oldest, line.number)))
            .chain(open)
            .for_each(|one| oldest.add(one));
        // A segment that is kept for its zeroes brings its own dead data into the account.
        let mut waiting: Vec<_> = lines
            .iter()
            .filter(|line| !stays(line))
            .filter_map(|line| self.zeroed.get(&line.number).map(|&zeroed| (zeroed, line)))
            .collect();
        loop {
            let before = waiting.len();
            waiting.retain(|(zeroed, line)| {
                let needed = oldest.of_others(line.number).is_some_and(|oldest| oldest < *zeroed);
                if needed {
                    kept.insert(line.number);
                    line.oldest.into_iter().for_each(|version| oldest.add((version, line.number)));
                }
                !needed
            });
            if waiting.len() == before {
                return kept;
            }
        }
    }

    /// The checkpoint with this list counts now.
    pub fn install(&mut self, border: u64, next: &NextList, index: BTreeMap<u64, IndexSegment>) {
        for name in &next.dropped {
            self.holes.remove(&name.number);
            self.zeroed.remove(&name.number);
        }
        let dropped: BTreeSet<u64> = next.dropped.iter().map(|name| name.number).collect();
        self.lines.retain(|line| !dropped.contains(&line.number));
        let mut built = next.lines.iter().zip(&next.rows).peekable();
        for at in 0..self.lines.len() {
            let number = self.lines[at].number;
            while built.next_if(|(line, _)| line.number < number).is_some() {}
            if let Some((line, row)) = built.next_if(|(line, _)| line.number == number) {
                self.lines[at].live = line.live;
                // Holes or facts may have changed while the checkpoint was built.
                self.lines[at].stored = self.row(&self.lines[at]) == *row;
            }
        }
        let before = std::mem::replace(&mut self.index, index);
        for (number, segment) in &mut self.index {
            // The present holes, not those at the time of the build.
            if let Some(known) = before.get(number) {
                segment.holes = known.holes;
            }
            if segment.holes != 0 {
                self.holes.insert(*number, segment.holes);
            }
        }
        for number in before.keys().filter(|number| !self.index.contains_key(number)) {
            self.holes.remove(number);
        }
        // Decided and not listed: nothing will ever be sealed under these numbers.
        self.open.retain(|&number, _| number >= border);
    }
}

/// On disk: the oldest version of a segment without data.
const NO_DATA: Version = Version { generation: Generation(u64::MAX), sequence: Sequence(u64::MAX) };

fn min(a: Option<Version>, b: Option<Version>) -> Option<Version> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The oldest data, and the oldest in another segment than that.
#[derive(Default)]
struct TwoOldest {
    first: Option<(Version, u64)>,
    second: Option<(Version, u64)>,
}

impl TwoOldest {
    fn add(&mut self, one: (Version, u64)) {
        match self.first {
            Some(first) if first.1 == one.1 => self.first = Some(first.min(one)),
            Some(first) if one < first => (self.first, self.second) = (Some(one), Some(first)),
            Some(_) => self.second = Some(self.second.map_or(one, |second| second.min(one))),
            None => self.first = Some(one),
        }
    }

    fn of_others(&self, number: u64) -> Option<Version> {
        let found = match self.first {
            Some(first) if first.1 == number => self.second,
            first => first,
        };
        found.map(|(version, _)| version)
    }
}
