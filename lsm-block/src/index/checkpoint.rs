//! Checkpoints: which trees to write, the live list and the root (P7).
//!
//! A checkpoint costs what changed. The frozen delta is laid over the base while that rewrites little; else it becomes a
//! run above it, merged with runs of its own size, and all runs go into the base when they are a quarter of it. Garbage in
//! index segments is bounded: beyond a third of the live pages the emptiest segments are cleared in the same pass.

use super::build::Merger;
use super::delta::Delta;
use super::entry::{Found, IndexError, LBA_MAX};
use super::format::{
    IndexSegment, LIVE_PAGE_BYTES_MAX, LivePage, PageKind, Root, Size, TREE_PAGE_BYTES_MAX, TREES_MAX, Tree,
};
use super::overlay::{DeltaCursor, Overlay, TreeCursor};
use super::pages::{Held, Pages, Roots};
use super::segments::{NextList, Segments};
use super::writer::{SEGMENT_BYTES, Writer};
use super::{Index, lookup};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use xsan_types::{BlockRange, CheckpointRef, Lba, SegmentName};

/// When a checkpoint does what; tests make it small.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Merging into the base may always rewrite so much…
    pub rewrite_bytes_free: u64,
    /// …or so many times the size of the delta.
    pub rewrite_factor: u64,
    /// Runs go into the base when they are this part of it.
    pub runs_divisor: u64,
    /// Garbage that does not matter.
    pub garbage_bytes_free: u64,
    /// Index segments that do not matter, however empty.
    pub segments_free: u64,
    /// Largest page of a tree.
    pub page_bytes_max: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            rewrite_bytes_free: 8 << 20,
            rewrite_factor: 4,
            runs_divisor: 4,
            garbage_bytes_free: 4 << 20,
            segments_free: 32,
            page_bytes_max: TREE_PAGE_BYTES_MAX,
        }
    }
}

/// About the bytes of an entry in a tree.
const ENTRY_BYTES: u64 = 16;

/// A built checkpoint that waits for the register.
pub(super) struct Built {
    pub roots: Arc<Roots>,
    pub list: NextList,
    /// Replaced index segments.
    pub dead: Vec<SegmentName>,
}

/// What to do with the trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Runs, newest first, that are merged with the delta.
    runs: usize,
    /// Whether all of it goes into the base.
    into_base: bool,
}

fn plan(policy: &Policy, delta: &Delta, trees: &[Tree], clearing: bool) -> Plan {
    let Some((base, runs)) = trees.split_last() else { return Plan { runs: 0, into_base: false } };
    let all = Plan { runs: runs.len(), into_base: true };
    let entries = (delta.len() + delta.zero_count()) as u64;
    let runs_bytes: u64 = runs.iter().map(|run| run.page_bytes).sum();
    let run_entries: u64 = runs.iter().map(|run| run.entries).sum();
    let leaves = base.page_bytes / TREE_PAGE_BYTES_MAX as u64 + 1;
    // A zeroed range may touch any number of leaves; most touch few.
    let touched = (delta.regions() * 2 + delta.zero_count() as u64 * 4 + run_entries).min(leaves);
    // Each touched leaf is read and written.
    let rewrite = touched * 2 * TREE_PAGE_BYTES_MAX as u64;
    let delta_bytes = entries * ENTRY_BYTES;
    if clearing
        || rewrite <= policy.rewrite_bytes_free
        || rewrite <= policy.rewrite_factor * (delta_bytes + runs_bytes)
        || (delta_bytes + runs_bytes) >= base.page_bytes / policy.runs_divisor
    {
        return all;
    }
    let mut merged = delta_bytes;
    let mut count = 0;
    while count < runs.len() && (runs[count].page_bytes <= 2 * merged || runs.len() - count + 2 > TREES_MAX) {
        merged += runs[count].page_bytes;
        count += 1;
    }
    Plan { runs: count, into_base: false }
}

/// Index segments whose pages should move, so that garbage and the number of segments stay bounded.
fn victims(policy: &Policy, segments: &BTreeMap<u64, IndexSegment>) -> BTreeSet<u64> {
    let live: u64 = segments.values().map(|one| one.live).sum();
    let garbage: u64 = segments.values().map(|one| one.bytes.saturating_sub(one.live)).sum();
    let count = segments.len() as u64;
    let wasteful = garbage > live / 3 + policy.garbage_bytes_free;
    let scattered = count > policy.segments_free + 2 * (live / SEGMENT_BYTES);
    if !wasteful && !scattered {
        return BTreeSet::new();
    }
    let mut order: Vec<_> = segments.values().filter(|one| one.live > 0).collect();
    order.sort_by_key(|one| (one.live * 1024 / one.bytes.max(1), one.name.number));
    if scattered && !wasteful {
        order.sort_by_key(|one| (one.live, one.name.number));
    }
    let mut left = garbage;
    let mut chosen = BTreeSet::new();
    for one in order {
        let enough = left <= live / 8 && (!scattered || count - chosen.len() as u64 <= policy.segments_free / 2);
        if enough || one.live > SEGMENT_BYTES / 2 && !wasteful {
            break;
        }
        left = left.saturating_sub(one.bytes - one.live);
        chosen.insert(one.name.number);
    }
    chosen
}

/// Takes freed bytes off the segments they lay in.
fn settle_freed(segments: &mut BTreeMap<u64, IndexSegment>, freed: &BTreeMap<u64, u64>) -> Result<(), IndexError> {
    for (&number, &bytes) in freed {
        let segment = segments.get_mut(&number).ok_or(IndexError::Unlisted { number })?;
        segment.live = segment.live.checked_sub(bytes).ok_or(IndexError::Unlisted { number })?;
    }
    Ok(())
}

/// Trees of the new root, changed counts of data segments, and freed page bytes.
struct NewTrees {
    trees: Vec<Tree>,
    counts: BTreeMap<u64, i64>,
    freed: BTreeMap<u64, u64>,
}

impl Index {
    pub(super) async fn build(
        &self,
        border: u64,
        names: &mut (dyn FnMut() -> SegmentName + Send),
    ) -> Result<(Built, CheckpointRef), IndexError> {
        let (frozen, roots) = self.start_build(border)?;
        let victims = victims(&self.policy, &roots.segments);
        let pages = self.pages();
        let mut recorded = || {
            let name = names();
            // Until a root lists it, it is an orphan that somebody must delete.
            self.state().drawn.push(name);
            name
        };
        let mut writer = Writer::new(&pages.store, &pages.cache, &mut recorded);
        let new = self.build_trees(&pages, &roots, frozen.clone(), victims.clone(), &mut writer).await?;
        let list = self.next_list(border, &new.counts, new.trees.is_empty() && !roots.root.trees.is_empty())?;
        let mut freed = new.freed;
        let live = write_live_list(&roots, &list, &victims, &mut writer, &mut freed).await?;
        if let Some(at) = &roots.at {
            *freed.entry(at.segment.number).or_default() += u64::from(at.root_bytes).next_multiple_of(4096);
        }
        let mut old = self.state().segments.index.clone();
        settle_freed(&mut old, &freed)?;
        let (kept, dead): (Vec<_>, Vec<_>) =
            old.into_values().partition(|one| one.live > 0 || one.name.number >= border);
        let horizon = frozen.newest.max(roots.horizon());
        let root = Root { border, horizon, segments: kept, trees: new.trees, live };
        let (root, at) = write_root(root, writer).await?;
        self.check_border(border)?;
        let dead = dead.into_iter().map(|one| one.name).collect();
        Ok((Built { roots: Arc::new(Roots::new(Some(at), root)), list, dead }, at))
    }

    /// What is merged, and onto what.
    fn start_build(&self, border: u64) -> Result<(Arc<Delta>, Arc<Roots>), IndexError> {
        self.check_border(border)?;
        let state = self.state();
        let roots = Arc::clone(&state.roots);
        let frozen = state.frozen.clone().unwrap_or_else(|| Arc::new(Delta::new(roots.horizon())));
        Ok((frozen, roots))
    }

    /// Replay starts at the border: nothing below it may be newer than the checkpoint.
    fn check_border(&self, border: u64) -> Result<(), IndexError> {
        match self.state().active.number_min {
            Some(number) if number < border => Err(IndexError::Border { number, border }),
            _ => Ok(()),
        }
    }

    async fn build_trees(
        &self,
        pages: &Pages,
        roots: &Arc<Roots>,
        frozen: Arc<Delta>,
        victims: BTreeSet<u64>,
        writer: &mut Writer<'_>,
    ) -> Result<NewTrees, IndexError> {
        let trees = &roots.root.trees;
        let erased = !trees.is_empty() && trees.iter().all(|tree| frozen.zeroes_cover(tree.first, tree.end));
        let stale = if erased { BTreeSet::new() } else { self.stale_copies(pages, roots, &frozen).await? };
        let plan = plan(&self.policy, &frozen, trees, !victims.is_empty());
        let page_bytes_max = self.policy.page_bytes_max;
        let cursor = DeltaCursor::new(frozen, &stale);
        if erased || trees.is_empty() {
            // Nothing below is left: no page of it need be read.
            let mut merger =
                Merger::new(pages, roots, writer, Overlay::new(cursor, Vec::new()), BTreeSet::new(), page_bytes_max);
            let tree = merger.write_run(false).await?;
            let freed = if erased { self.all_tree_bytes(roots) } else { BTreeMap::new() };
            let mut counts = merger.counts.finish();
            if erased {
                self.erase_counts(&mut counts);
            }
            return Ok(NewTrees { trees: tree.into_iter().collect(), counts, freed });
        }
        let runs = &trees[..plan.runs];
        let cursors = runs.iter().map(|tree| TreeCursor::new(pages.clone(), Arc::clone(roots), tree)).collect();
        let mut merger = Merger::new(pages, roots, writer, Overlay::new(cursor, cursors), victims, page_bytes_max);
        let (tree, below) = if plan.into_base {
            (merger.merge_base(&trees[trees.len() - 1]).await?, &trees[trees.len()..])
        } else {
            (merger.write_run(true).await?, &trees[plan.runs..])
        };
        let (counts, freed) = merger.finish();
        Ok(NewTrees { trees: tree.into_iter().chain(below.iter().copied()).collect(), counts, freed })
    }

    /// Copies in the delta whose block has changed since: not the version that the trees have.
    async fn stale_copies(
        &self,
        pages: &Pages,
        roots: &Arc<Roots>,
        frozen: &Arc<Delta>,
    ) -> Result<BTreeSet<u64>, IndexError> {
        let mut stale = BTreeSet::new();
        if frozen.oldest_data.is_none_or(|oldest| oldest > roots.horizon()) {
            return Ok(stale);
        }
        for lba in frozen.sorted() {
            let Some((copied, _)) = frozen.get(lba).filter(|(version, _)| *version <= roots.horizon()) else {
                continue;
            };
            let mut found = [Found::Hole];
            let range = BlockRange { start: Lba(lba), count: 1 };
            lookup_trees(pages, roots, &[(lba, lba + 1)], range, &mut found).await?;
            if !matches!(found[0], Found::Data { version, .. } if version == copied) {
                stale.insert(lba);
            }
        }
        Ok(stale)
    }

    /// Bytes of tree pages by segment: all live bytes but those of the root and the live list.
    fn all_tree_bytes(&self, roots: &Roots) -> BTreeMap<u64, u64> {
        let mut freed: BTreeMap<u64, u64> = roots.segments.iter().map(|(&number, one)| (number, one.live)).collect();
        let root = roots.at.iter().map(|at| (at.segment.number, u64::from(at.root_bytes).next_multiple_of(4096)));
        let live = roots.root.live.iter().map(|live| (live.page.number, live.page.footprint()));
        for (number, bytes) in root.chain(live) {
            if let Some(sum) = freed.get_mut(&number) {
                *sum = sum.saturating_sub(bytes);
            }
        }
        freed
    }

    /// All trees went: every count starts from nothing.
    fn erase_counts(&self, counts: &mut BTreeMap<u64, i64>) {
        for (number, live) in self.state().segments.live_counts() {
            *counts.entry(number).or_default() -= i64::try_from(live).unwrap_or(i64::MAX);
        }
    }

    fn next_list(&self, border: u64, counts: &BTreeMap<u64, i64>, empty: bool) -> Result<NextList, IndexError> {
        let list = self.state().segments.next(border, counts).map_err(|number| IndexError::Unlisted { number })?;
        assert!(!empty || list.lines.iter().all(|line| line.live == 0), "no tree, so nothing is live");
        Ok(list)
    }
}

/// Answers blocks from the trees alone.
pub(super) async fn lookup_trees(
    pages: &Pages,
    roots: &Arc<Roots>,
    open: &[(u64, u64)],
    range: BlockRange,
    out: &mut [Found],
) -> Result<(), IndexError> {
    let mut held = Held::new();
    let mut sweep = lookup::Sweep::new(pages, roots, open);
    while let Err(missing) = sweep.fill(range.start.0, out, &held)? {
        pages.fetch(roots, missing, sweep.end().min(LBA_MAX), &mut held).await?;
    }
    Ok(())
}

/// Writes the pages of the live list on which something changed; the others stay where they are.
async fn write_live_list(
    roots: &Roots,
    list: &NextList,
    victims: &BTreeSet<u64>,
    writer: &mut Writer<'_>,
    freed: &mut BTreeMap<u64, u64>,
) -> Result<Vec<LivePage>, IndexError> {
    let old = &roots.root.live;
    // A list of many small pages is packed anew.
    let rows_per_page = LIVE_PAGE_BYTES_MAX / 64;
    let scattered = old.len() > 4 + 2 * (list.rows.len() / rows_per_page);
    let mut pages = Vec::new();
    let mut waiting: Vec<super::format::LiveRow> = Vec::new();
    let mut size = Size::default();
    let mut next = 0;
    for at in 0..old.len().max(1) {
        let end = old.get(at + 1).map_or(u64::MAX, |page| page.first);
        let from = next;
        while next < list.lines.len() && list.lines[next].number < end {
            next += 1;
        }
        let lines = from..next;
        if let Some(page) = old.get(at) {
            let same = lines.len() == page.rows as usize && list.lines[lines.clone()].iter().all(|line| line.stored);
            if same && !scattered && !victims.contains(&page.page.number) {
                write_live_page(&mut waiting, &mut size, writer, &mut pages).await?;
                pages.push(*page);
                continue;
            }
            *freed.entry(page.page.number).or_default() += page.page.footprint();
        }
        for row in &list.rows[lines] {
            let mut grown = size;
            grown.add(row);
            if grown.bytes() > LIVE_PAGE_BYTES_MAX {
                write_live_page(&mut waiting, &mut size, writer, &mut pages).await?;
                grown = Size::default();
                grown.add(row);
            }
            waiting.push(*row);
            size = grown;
        }
    }
    write_live_page(&mut waiting, &mut size, writer, &mut pages).await?;
    Ok(pages)
}

async fn write_live_page(
    waiting: &mut Vec<super::format::LiveRow>,
    size: &mut Size<{ super::format::LIVE_COLUMNS }>,
    writer: &mut Writer<'_>,
    pages: &mut Vec<LivePage>,
) -> Result<(), IndexError> {
    if !waiting.is_empty() {
        let page = writer.page(PageKind::Live, 0, waiting, false).await?;
        pages.push(LivePage { page, rows: waiting.len() as u32, first: waiting[0][0] });
        waiting.clear();
        *size = Size::default();
    }
    Ok(())
}

/// Writes the root as the last page of the checkpoint and seals everything.
async fn write_root(mut root: Root, mut writer: Writer<'_>) -> Result<(Root, CheckpointRef), IndexError> {
    // The root lists the segment it lies in itself, which exists only once there is a place; a new one adds a line.
    let segments_max = root.segments.len() + writer.segments.len() + 1;
    let at = writer.place(Root::bytes(segments_max, root.trees.len(), root.live.len())).await?;
    writer.settle().await?;
    let known = writer.segments.contains_key(&at.number);
    let segments = root.segments.len() + writer.segments.len() + usize::from(!known);
    let bytes = Root::bytes(segments, root.trees.len(), root.live.len());
    let end = u64::from(at.offset) * 4096 + (bytes as u64).next_multiple_of(4096);
    let own = writer.announce(end);
    root.segments.extend(writer.segments.values().filter(|one| one.name.number != own.name.number));
    root.segments.push(own);
    root.segments.sort_by_key(|one| one.name.number);
    let encoded = root.encode(at);
    assert_eq!(encoded.len(), bytes, "a root is as long as planned");
    let page = writer.append(&encoded);
    let sealed = writer.finish().await?;
    for one in &mut root.segments {
        if let Some(sealed) = sealed.get(&one.name.number) {
            assert_eq!((one.bytes, one.live), (sealed.bytes, sealed.live), "segment {} is as planned", one.name);
            one.holes = sealed.holes;
        }
    }
    let checkpoint = CheckpointRef {
        segment: own.name,
        segment_bytes: own.bytes,
        root_offset: u64::from(page.offset) * 4096,
        root_bytes: page.bytes,
        root_crc: page.crc,
        border: root.border,
    };
    Ok((root, checkpoint))
}

impl Segments {
    /// Listed data segments and their counts.
    pub fn live_counts(&self) -> Vec<(u64, u64)> {
        self.lines().iter().filter(|line| line.live > 0).map(|line| (line.number, line.live)).collect()
    }
}
