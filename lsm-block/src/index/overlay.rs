//! What a checkpoint lays over the base: the frozen delta and, when they are merged too, the runs, as one ordered stream in
//! which nothing overlaps. Where sources overlap the newer source wins; inside the delta the newer version wins.

use super::build::Counts;
use super::delta::Delta;
use super::entry::{IndexError, Place};
use super::format::{CRC, Child, GENERATION, LBA, LeafRow, NUMBER, POSITION, Page, PageRef, SEQUENCE, Tree, ZEROES};
use super::pages::{Pages, Roots};
use futures::future::try_join_all;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use xsan_types::{Generation, Sequence, Version};

/// Pages of a run read at once.
const READ_AHEAD: usize = 8;

/// An entry of a tree: one block of data, or zeroed blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub start: u64,
    pub end: u64,
    pub data: bool,
    /// Of a zeroed range: the segment of its record; position and CRC are 0.
    pub place: Place,
    pub version: Version,
}

impl Item {
    pub fn from_row(row: &LeafRow) -> Self {
        Self {
            start: row[LBA],
            end: row[LBA] + row[ZEROES].max(1),
            data: row[ZEROES] == 0,
            place: Place {
                number: row[NUMBER],
                position: row[POSITION] as u32,
                crc: xsan_types::Crc32c(row[CRC] as u32),
            },
            version: Version { generation: Generation(row[GENERATION]), sequence: Sequence(row[SEQUENCE]) },
        }
    }

    pub fn row(&self) -> LeafRow {
        let zeroes = if self.data { 0 } else { self.end - self.start };
        let place = &self.place;
        let version = &self.version;
        [
            self.start,
            zeroes,
            place.number,
            place.position.into(),
            place.crc.0.into(),
            version.generation.0,
            version.sequence.0,
        ]
    }
}

/// Walks over a frozen delta in order.
pub(super) struct DeltaCursor {
    delta: Arc<Delta>,
    blocks: std::iter::Peekable<std::vec::IntoIter<u64>>,
    /// Nothing before this block is left.
    from: u64,
}

impl DeltaCursor {
    /// `stale`: blocks whose entry does not count.
    pub fn new(delta: Arc<Delta>, stale: &BTreeSet<u64>) -> Self {
        let mut blocks = delta.sorted();
        if !stale.is_empty() {
            blocks.retain(|lba| !stale.contains(lba));
        }
        Self { delta, blocks: blocks.into_iter().peekable(), from: 0 }
    }

    fn next(&mut self) -> Option<Item> {
        let zero = self.delta.zero_from(self.from);
        while let Some(&lba) = self.blocks.peek() {
            let (version, place) = self.delta.get(lba).expect("a listed block has an entry");
            match zero {
                // Hidden by a newer zero record.
                Some((start, zero)) if start <= lba && lba < zero.end && zero.version > version => {
                    self.blocks.next();
                }
                Some((start, _)) if start < lba => break,
                _ => {
                    self.blocks.next();
                    self.from = lba + 1;
                    return Some(Item { start: lba, end: lba + 1, data: true, place, version });
                }
            }
        }
        let (start, zero) = zero?;
        // Up to the next block that is not hidden.
        let end = self.blocks.peek().map_or(zero.end, |&lba| zero.end.min(lba));
        self.from = end;
        let place = Place { number: zero.number, position: 0, crc: xsan_types::Crc32c(0) };
        Some(Item { start, end, data: false, place, version: zero.version })
    }
}

/// Walks over a tree in order, and names every page it has left behind.
pub(super) struct TreeCursor {
    pages: Pages,
    roots: Arc<Roots>,
    /// Inner pages from the root down, with the next row of each.
    path: Vec<(Arc<Page>, usize)>,
    leaves: VecDeque<Arc<Page>>,
    row: usize,
    start: Option<(PageRef, u8)>,
    pub visited: Vec<PageRef>,
}

impl TreeCursor {
    pub fn new(pages: Pages, roots: Arc<Roots>, tree: &Tree) -> Self {
        let start = Some((tree.page, tree.level));
        Self { pages, roots, path: Vec::new(), leaves: VecDeque::new(), row: 0, start, visited: Vec::new() }
    }

    async fn next(&mut self) -> Result<Option<Item>, IndexError> {
        loop {
            if let Some(leaf) = self.leaves.front() {
                if self.row < leaf.rows() {
                    self.row += 1;
                    return Ok(Some(Item::from_row(&leaf.leaf_row(self.row - 1))));
                }
                self.leaves.pop_front();
                self.row = 0;
                continue;
            }
            if !self.more_leaves().await? {
                return Ok(None);
            }
        }
    }

    async fn more_leaves(&mut self) -> Result<bool, IndexError> {
        if let Some((page, level)) = self.start.take() {
            return self.enter(&[page], level).await.map(|()| true);
        }
        while let Some((page, row)) = self.path.last_mut() {
            if *row == page.rows() {
                self.path.pop();
                continue;
            }
            let level = page.level() - 1;
            let count = if level == 0 { READ_AHEAD.min(page.rows() - *row) } else { 1 };
            let children: Vec<Child> = (*row..*row + count).map(|row| page.child(row)).collect();
            *row += count;
            let children: Vec<_> = children.iter().map(|child| child.page).collect();
            self.enter(&children, level).await?;
            return Ok(true);
        }
        Ok(false)
    }

    async fn enter(&mut self, pages: &[PageRef], level: u8) -> Result<(), IndexError> {
        let reads = pages.iter().map(|page| self.pages.tree_page(&self.roots.segments, page, level));
        let read = try_join_all(reads).await?;
        self.visited.extend_from_slice(pages);
        match level {
            0 => self.leaves.extend(read),
            _ => self.path.extend(read.into_iter().map(|page| (page, 0))),
        }
        Ok(())
    }
}

enum Source {
    Delta(DeltaCursor),
    Tree(TreeCursor),
}

struct Head {
    source: Source,
    item: Option<Item>,
    ended: bool,
}

/// The merged stream.
#[derive(Default)]
pub(super) struct Overlay {
    /// Newest first.
    heads: Vec<Head>,
    next: Option<Item>,
}

impl Overlay {
    pub fn new(delta: DeltaCursor, runs: Vec<TreeCursor>) -> Self {
        let sources = std::iter::once(Source::Delta(delta)).chain(runs.into_iter().map(Source::Tree));
        let heads = sources.map(|source| Head { source, item: None, ended: false }).collect();
        Self { heads, next: None }
    }

    /// The next item that starts before `limit`, cut off there.
    pub async fn peek(&mut self, limit: u64) -> Result<Option<Item>, IndexError> {
        if self.next.is_none() {
            self.load().await?;
            self.next = self.merge();
        }
        let item = self.next.filter(|item| item.start < limit);
        Ok(item.map(|item| Item { end: item.end.min(limit), ..item }))
    }

    /// Leaves everything before `end` behind. Data of a run that leaves its tree here is taken off the counts, whether it
    /// moves to another tree or is hidden by something newer.
    pub fn pass(&mut self, end: u64, counts: &mut Counts) {
        self.next = None;
        for head in &mut self.heads {
            let Some(item) = &mut head.item else { continue };
            if item.start >= end {
                continue;
            }
            if item.end > end {
                item.start = end;
                continue;
            }
            if item.data && matches!(head.source, Source::Tree(_)) {
                counts.leave(item.place.number);
            }
            head.item = None;
        }
    }

    async fn load(&mut self) -> Result<(), IndexError> {
        for head in &mut self.heads {
            if head.item.is_none() && !head.ended {
                head.item = match &mut head.source {
                    Source::Delta(cursor) => cursor.next(),
                    Source::Tree(cursor) => cursor.next().await?,
                };
                head.ended = head.item.is_none();
            }
        }
        Ok(())
    }

    /// The first piece of what the heads show: from the newest source that begins first, up to where a newer one begins.
    fn merge(&self) -> Option<Item> {
        let start = self.heads.iter().filter_map(|head| head.item).map(|item| item.start).min()?;
        let mut end = u64::MAX;
        for head in &self.heads {
            match head.item {
                Some(item) if item.start == start => return Some(Item { end: item.end.min(end), ..item }),
                Some(item) => end = end.min(item.start),
                None => {}
            }
        }
        None
    }

    /// Pages of runs that were read; all of them, once the stream has ended.
    pub fn visited(self) -> Vec<PageRef> {
        let cursors = self.heads.into_iter().filter_map(|head| match head.source {
            Source::Tree(cursor) => Some(cursor.visited),
            Source::Delta(_) => None,
        });
        cursors.flatten().collect()
    }
}
