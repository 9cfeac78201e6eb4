//! Builds the trees of a checkpoint: lays the overlay over the base by copy-on-write, or writes it as a new run.
//!
//! Copy-on-write goes down only where something changes. What changes on a page is carried along its neighbours: touched
//! pages that lie side by side are packed anew, an untouched one is read only if what came before it is too small to stand
//! alone. So a sparse change rewrites the pages on its path, and a dense one leaves dense pages.

use super::entry::IndexError;
use super::format::{
    Child, INNER_COLUMNS, InnerRow, LBA, LEAF_COLUMNS, LeafRow, NUMBER, Page, PageKind, PageRef, Size, Tree, ZEROES,
};
use super::overlay::Overlay;
use super::pages::{Pages, Roots};
use super::writer::Writer;
use futures::future::try_join_all;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use xsan_env::runtime::BoxFuture;
use xsan_env::yield_now;

/// Leaves read at once when side by side ones are touched.
const LEAVES_AHEAD: usize = 8;
/// Items between two chances for other tasks.
const ITEMS_PER_TURN: u32 = 2048;

/// Changes of the live counts.
#[derive(Default)]
pub(super) struct Counts {
    changes: BTreeMap<u64, i64>,
    last: Option<(u64, i64)>,
}

impl Counts {
    fn add(&mut self, number: u64, by: i64) {
        // Neighbours mostly lie in the same segment.
        match &mut self.last {
            Some((last, sum)) if *last == number => *sum += by,
            last => {
                if let Some((before, sum)) = last.replace((number, by)) {
                    *self.changes.entry(before).or_default() += sum;
                }
            }
        }
    }

    /// An entry of a tree refers to the segment.
    pub fn enter(&mut self, number: u64) {
        self.add(number, 1);
    }

    /// An entry of a tree is gone.
    pub fn leave(&mut self, number: u64) {
        self.add(number, -1);
    }

    pub fn finish(mut self) -> BTreeMap<u64, i64> {
        if let Some((number, sum)) = self.last.take() {
            *self.changes.entry(number).or_default() += sum;
        }
        self.changes
    }
}

/// Rows on their way into pages: at most two pages of them.
struct Packer<const N: usize> {
    rows: Vec<[u64; N]>,
    /// The first so many rows fill a page.
    cut: usize,
    /// Of the rows behind the cut.
    size: Size<N>,
    /// A page that these rows replace was in the cache.
    hot: bool,
    page_bytes_max: usize,
}

impl<const N: usize> Packer<N> {
    fn new(page_bytes_max: usize) -> Self {
        Self { rows: Vec::new(), cut: 0, size: Size::default(), hot: false, page_bytes_max }
    }

    /// A page filled from a stream leaves room for columns that grow when its entries are overwritten.
    fn fill_bytes(&self) -> usize {
        self.page_bytes_max / 16 * 15
    }

    /// Takes a row; gives back a full page when the rows reach two.
    fn push(&mut self, row: [u64; N]) -> Option<Vec<[u64; N]>> {
        let mut grown = self.size;
        grown.add(&row);
        let mut full = None;
        if grown.bytes() > self.fill_bytes() {
            if self.cut > 0 {
                full = Some(self.rows.drain(..self.cut).collect());
            }
            self.cut = self.rows.len();
            grown = Size::default();
            grown.add(&row);
        }
        self.size = grown;
        self.rows.push(row);
        full
    }

    /// Whether what is waiting is too little for a page of its own.
    fn is_small(&self) -> bool {
        !self.rows.is_empty() && self.cut == 0 && self.size.bytes() < self.page_bytes_max / 4
    }

    /// The rows that are left: no page, one, or two of about equal size.
    fn flush(&mut self) -> Vec<Vec<[u64; N]>> {
        let rows = std::mem::take(&mut self.rows);
        let cut = std::mem::take(&mut self.cut);
        self.size = Size::default();
        if rows.is_empty() {
            return Vec::new();
        }
        if cut == 0 || Size::of(&rows).bytes() <= self.page_bytes_max {
            return vec![rows];
        }
        let middle = rows.len() / 2;
        let fits = |at: usize| {
            let (head, tail) = rows.split_at(at);
            Size::of(head).bytes() <= self.page_bytes_max && Size::of(tail).bytes() <= self.page_bytes_max
        };
        // Each part up to the cut, and behind it, fits by construction.
        let (head, tail) = rows.split_at(if fits(middle) { middle } else { cut });
        vec![head.to_vec(), tail.to_vec()]
    }
}

/// What a merge has done so far.
pub(super) struct Merger<'a, 'b> {
    pub pages: &'a Pages,
    pub roots: &'a Roots,
    pub writer: &'a mut Writer<'b>,
    pub overlay: Overlay,
    pub counts: Counts,
    /// Bytes of pages that are not part of the new trees, by segment.
    pub freed: BTreeMap<u64, u64>,
    /// Index segments whose pages all move.
    pub victims: BTreeSet<u64>,
    page_bytes_max: usize,
    turn: u32,
    written_bytes: u64,
    freed_bytes: u64,
    /// No entry written ends behind this block.
    end: u64,
}

/// A tree as it grows from the bottom.
struct Grown {
    root: Option<(Child, u8)>,
    end: u64,
    entries: u64,
}

impl<'a, 'b> Merger<'a, 'b> {
    pub fn new(
        pages: &'a Pages,
        roots: &'a Roots,
        writer: &'a mut Writer<'b>,
        overlay: Overlay,
        victims: BTreeSet<u64>,
        page_bytes_max: usize,
    ) -> Self {
        let (counts, freed) = Default::default();
        Self {
            pages,
            roots,
            writer,
            overlay,
            counts,
            freed,
            victims,
            page_bytes_max,
            turn: 0,
            written_bytes: 0,
            freed_bytes: 0,
            end: 0,
        }
    }

    /// Counts and freed bytes at the end, pages of consumed runs included.
    pub fn finish(mut self) -> (BTreeMap<u64, i64>, BTreeMap<u64, u64>) {
        let overlay = std::mem::take(&mut self.overlay);
        for page in overlay.visited() {
            self.free(&page);
        }
        (self.counts.finish(), self.freed)
    }

    /// The page is no part of the new trees.
    pub fn free(&mut self, page: &PageRef) {
        *self.freed.entry(page.number).or_default() += page.footprint();
        self.freed_bytes += page.footprint();
    }

    async fn breathe(&mut self) {
        self.turn += 1;
        if self.turn.is_multiple_of(ITEMS_PER_TURN) {
            yield_now().await;
        }
    }

    fn is_victim(&self, page: &PageRef) -> bool {
        self.victims.contains(&page.number)
    }

    async fn leaf(&mut self, rows: &[LeafRow], hot: bool) -> Result<Child, IndexError> {
        let page = self.writer.page(PageKind::Leaf, 0, rows, hot).await?;
        self.written_bytes += page.footprint();
        let blocks = rows.iter().filter(|row| row[ZEROES] == 0).count() as u64;
        self.end = rows.last().map_or(self.end, |row| self.end.max(row[LBA] + row[ZEROES].max(1)));
        Ok(Child { first: rows[0][LBA], page, blocks })
    }

    async fn inner(&mut self, level: u8, rows: &[InnerRow], hot: bool) -> Result<Child, IndexError> {
        let page = self.writer.page(PageKind::Inner, level, rows, hot).await?;
        self.written_bytes += page.footprint();
        Ok(Child { first: rows[0][0], page, blocks: rows.iter().map(|row| row[5]).sum() })
    }

    /// Writes the overlay as a tree of its own. With `zeroes` zeroed ranges are kept: they hide what lies below.
    pub async fn write_run(&mut self, zeroes: bool) -> Result<Option<Tree>, IndexError> {
        let mut leaves = Packer::new(self.page_bytes_max);
        let mut levels: Vec<Packer<INNER_COLUMNS>> = Vec::new();
        let mut entries = 0;
        while let Some(item) = self.overlay.peek(u64::MAX).await? {
            self.overlay.pass(item.end, &mut self.counts);
            self.breathe().await;
            if item.data {
                self.counts.enter(item.place.number);
            } else if !zeroes {
                continue;
            }
            entries += 1;
            if let Some(full) = leaves.push(item.row()) {
                let leaf = self.leaf(&full, false).await?;
                self.push_up(&mut levels, 0, leaf).await?;
            }
        }
        for rows in leaves.flush() {
            let leaf = self.leaf(&rows, false).await?;
            self.push_up(&mut levels, 0, leaf).await?;
        }
        let root = self.finish_levels(levels).await?;
        let end = self.end;
        Ok(self.tree(Grown { root, end, entries }, 0))
    }

    /// Enters a page into the level above its own.
    async fn push_up(
        &mut self,
        levels: &mut Vec<Packer<INNER_COLUMNS>>,
        level: usize,
        child: Child,
    ) -> Result<(), IndexError> {
        let (mut level, mut child) = (level, child);
        loop {
            if levels.len() == level {
                levels.push(Packer::new(self.page_bytes_max));
            }
            let Some(full) = levels[level].push(child.row()) else { return Ok(()) };
            child = self.inner(level as u8 + 1, &full, false).await?;
            level += 1;
        }
    }

    async fn finish_levels(
        &mut self,
        mut levels: Vec<Packer<INNER_COLUMNS>>,
    ) -> Result<Option<(Child, u8)>, IndexError> {
        let mut level = 0;
        while level < levels.len() {
            let top = level + 1 == levels.len();
            let mut pages = levels[level].flush();
            if top && pages.len() == 1 && pages[0].len() == 1 {
                return Ok(Some((child_of(&pages.remove(0)[0]), level as u8)));
            }
            for rows in pages {
                let child = self.inner(level as u8 + 1, &rows, false).await?;
                self.push_up(&mut levels, level + 1, child).await?;
            }
            level += 1;
        }
        Ok(None)
    }

    fn tree(&self, grown: Grown, page_bytes_before: u64) -> Option<Tree> {
        let Grown { root, end, entries } = grown;
        root.map(|(child, level)| Tree {
            page: child.page,
            level,
            first: child.first,
            end,
            entries,
            blocks: child.blocks,
            page_bytes: page_bytes_before + self.written_bytes - self.freed_bytes,
        })
    }

    /// Lays the overlay over `base`: the result has data only.
    pub async fn merge_base(&mut self, base: &Tree) -> Result<Option<Tree>, IndexError> {
        let root = Child { first: base.first, page: base.page, blocks: base.blocks };
        let (mut children, mut level) = if base.level == 0 {
            let mut packer = Packer::new(self.page_bytes_max);
            let page = self.pages.tree_page(&self.roots.segments, &base.page, 0).await?;
            let mut rows = Vec::new();
            let mut out = Vec::new();
            if !self.merge_leaf(&page, u64::MAX, &mut rows, &mut packer, &mut out).await? && !self.is_victim(&base.page)
            {
                return Ok(Some(*base));
            }
            packer.hot = self.is_hot(&base.page);
            self.pack_leaf_rows(&rows, &mut packer, &mut out).await?;
            self.flush_leaves(&mut packer, &mut out).await?;
            (out, 0)
        } else {
            let (children, changed) = self.merge_inner(root, base.level, u64::MAX).await?;
            if !changed && !self.is_victim(&base.page) {
                return Ok(Some(*base));
            }
            (children, base.level - 1)
        };
        self.free(&base.page);
        while children.len() > 1 {
            level += 1;
            let mut packer = Packer::new(self.page_bytes_max);
            packer.hot = self.is_hot(&base.page);
            let mut above = Vec::new();
            self.pack_children(children, level, &mut packer, &mut above).await?;
            self.flush_inner(level, &mut packer, &mut above).await?;
            children = above;
        }
        let root = children.pop().map(|child| (child, level));
        let entries = root.map_or(0, |(child, _)| child.blocks);
        let end = self.end.max(base.end);
        Ok(self.tree(Grown { root, end, entries }, base.page_bytes))
    }

    fn is_hot(&self, page: &PageRef) -> bool {
        self.pages.cache.contains(&self.pages.location(page))
    }

    /// The new children of an inner page that covers everything before `end`, and whether they differ from the old ones.
    fn merge_inner<'c>(
        &'c mut self,
        node: Child,
        level: u8,
        end: u64,
    ) -> BoxFuture<'c, Result<(Vec<Child>, bool), IndexError>>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            let page = self.pages.tree_page(&self.roots.segments, &node.page, level).await?;
            let mut out = Vec::with_capacity(page.rows());
            let changed = if level == 1 {
                self.merge_above_leaves(&page, end, &mut out).await?
            } else {
                self.merge_above_inner(&page, level, end, &mut out).await?
            };
            Ok((out, changed))
        })
    }

    async fn merge_above_leaves(
        &mut self,
        page: &Arc<Page>,
        end: u64,
        out: &mut Vec<Child>,
    ) -> Result<bool, IndexError> {
        let mut packer = Packer::new(self.page_bytes_max);
        let mut rows = Vec::new();
        let mut any = false;
        let mut ahead = ReadAhead::default();
        for row in 0..page.rows() {
            let child = page.child(row);
            let child_end = if row + 1 < page.rows() { page.value(0, row + 1) } else { end };
            let moves = self.is_victim(&child.page);
            let touched = moves || self.overlay.peek(child_end).await?.is_some();
            if !touched && !packer.is_small() {
                self.flush_leaves(&mut packer, out).await?;
                out.push(child);
                continue;
            }
            let leaf = ahead.leaf(self.pages, self.roots, page, row).await?;
            rows.clear();
            let changed = self.merge_leaf(&leaf, child_end, &mut rows, &mut packer, out).await?;
            if !changed && !moves && !packer.is_small() {
                // Looked at in vain: nothing of it was touched.
                self.flush_leaves(&mut packer, out).await?;
                out.push(child);
                continue;
            }
            any = true;
            packer.hot |= self.is_hot(&child.page);
            self.free(&child.page);
            self.pack_leaf_rows(&rows, &mut packer, out).await?;
        }
        self.flush_leaves(&mut packer, out).await?;
        Ok(any)
    }

    async fn merge_above_inner(
        &mut self,
        page: &Arc<Page>,
        level: u8,
        end: u64,
        out: &mut Vec<Child>,
    ) -> Result<bool, IndexError> {
        let mut packer = Packer::new(self.page_bytes_max);
        let mut any = false;
        for row in 0..page.rows() {
            let child = page.child(row);
            let child_end = if row + 1 < page.rows() { page.value(0, row + 1) } else { end };
            // Any page below may lie in a segment that is cleared.
            let touched = !self.victims.is_empty() || self.overlay.peek(child_end).await?.is_some();
            if !touched && !packer.is_small() {
                self.flush_inner(level - 1, &mut packer, out).await?;
                out.push(child);
                continue;
            }
            let (children, changed) = self.merge_inner(child, level - 1, child_end).await?;
            if !changed && !self.is_victim(&child.page) && !packer.is_small() {
                self.flush_inner(level - 1, &mut packer, out).await?;
                out.push(child);
                continue;
            }
            any = true;
            packer.hot |= self.is_hot(&child.page);
            self.free(&child.page);
            self.pack_children(children, level - 1, &mut packer, out).await?;
        }
        self.flush_inner(level - 1, &mut packer, out).await?;
        Ok(any)
    }

    /// The rows of a leaf under the overlay before `end`; whether they differ. Rows that would be too many for memory (a
    /// great many new blocks in the range of one leaf) go on into the packer.
    async fn merge_leaf(
        &mut self,
        page: &Arc<Page>,
        end: u64,
        rows: &mut Vec<LeafRow>,
        packer: &mut Packer<LEAF_COLUMNS>,
        out: &mut Vec<Child>,
    ) -> Result<bool, IndexError> {
        let mut next = 0;
        let mut changed = false;
        while let Some(item) = self.overlay.peek(end).await? {
            self.overlay.pass(item.end, &mut self.counts);
            self.breathe().await;
            while next < page.rows() && page.value(LBA, next) < item.start {
                rows.push(page.leaf_row(next));
                next += 1;
            }
            let (mut same, mut stale) = (false, false);
            while next < page.rows() && page.value(LBA, next) < item.end {
                let row = page.leaf_row(next);
                if page.version(next) > item.version {
                    // Cannot be (the overlay is newer than the base), but the newest version wins wherever it is found.
                    rows.push(row);
                    stale = item.data;
                } else {
                    self.counts.leave(row[NUMBER]);
                    same = row == item.row();
                    changed |= !same;
                }
                next += 1;
            }
            if item.data && !stale {
                changed |= !same;
                rows.push(item.row());
                self.counts.enter(item.place.number);
            }
            if rows.len() >= 4096 {
                changed = true;
                self.pack_leaf_rows(rows, packer, out).await?;
                rows.clear();
            }
        }
        rows.extend((next..page.rows()).map(|row| page.leaf_row(row)));
        Ok(changed)
    }

    async fn pack_leaf_rows(
        &mut self,
        rows: &[LeafRow],
        packer: &mut Packer<LEAF_COLUMNS>,
        out: &mut Vec<Child>,
    ) -> Result<(), IndexError> {
        for row in rows {
            if let Some(full) = packer.push(*row) {
                out.push(self.leaf(&full, packer.hot).await?);
            }
        }
        Ok(())
    }

    async fn pack_children(
        &mut self,
        children: Vec<Child>,
        level: u8,
        packer: &mut Packer<INNER_COLUMNS>,
        out: &mut Vec<Child>,
    ) -> Result<(), IndexError> {
        for child in children {
            if let Some(full) = packer.push(child.row()) {
                out.push(self.inner(level, &full, packer.hot).await?);
            }
        }
        Ok(())
    }

    async fn flush_leaves(
        &mut self,
        packer: &mut Packer<LEAF_COLUMNS>,
        out: &mut Vec<Child>,
    ) -> Result<(), IndexError> {
        for rows in packer.flush() {
            out.push(self.leaf(&rows, packer.hot).await?);
        }
        packer.hot = false;
        Ok(())
    }

    async fn flush_inner(
        &mut self,
        level: u8,
        packer: &mut Packer<INNER_COLUMNS>,
        out: &mut Vec<Child>,
    ) -> Result<(), IndexError> {
        for rows in packer.flush() {
            out.push(self.inner(level, &rows, packer.hot).await?);
        }
        packer.hot = false;
        Ok(())
    }
}

/// Reads the leaves of one inner page; several at once while every next one is wanted.
#[derive(Default)]
struct ReadAhead {
    next: usize,
    streak: usize,
    leaves: VecDeque<Arc<Page>>,
}

impl ReadAhead {
    async fn leaf(&mut self, pages: &Pages, roots: &Roots, parent: &Page, row: usize) -> Result<Arc<Page>, IndexError> {
        if row != self.next {
            self.leaves.clear();
            self.streak = 0;
        }
        self.next = row + 1;
        self.streak += 1;
        if self.leaves.is_empty() {
            let count = if self.streak > 2 { LEAVES_AHEAD } else { 1 };
            let rows = row..parent.rows().min(row + count);
            let children: Vec<Child> = rows.map(|row| parent.child(row)).collect();
            let reads = children.iter().map(|child| pages.tree_page(&roots.segments, &child.page, 0));
            self.leaves.extend(try_join_all(reads).await?);
        }
        Ok(self.leaves.pop_front().expect("the wanted leaf was read"))
    }
}

fn child_of(row: &InnerRow) -> Child {
    let [first, number, offset, bytes, crc, blocks] = *row;
    let page = PageRef { number, offset: offset as u32, bytes: bytes as u32, crc: xsan_types::Crc32c(crc as u32) };
    Child { first, page, blocks }
}
