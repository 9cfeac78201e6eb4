//! Pages by pointer: from the cache, else from the store; and the search inside one tree.

use super::cache::PageCache;
use super::entry::{IndexError, PageError};
use super::format::{Child, IndexSegment, Location, Page, PageKind, PageRef, Root, Tree};
use crate::store::{Check, SegmentRead, SegmentStore};
use futures::future::try_join_all;
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_types::{CheckpointRef, Version, VolumeId};

/// Leaves read at once when a range needs several.
const READ_AHEAD: usize = 16;

/// A registered root in memory: its trees, and the segments their pages lie in.
pub(super) struct Roots {
    pub at: Option<CheckpointRef>,
    pub root: Root,
    pub segments: BTreeMap<u64, IndexSegment>,
}

impl Roots {
    pub fn new(at: Option<CheckpointRef>, root: Root) -> Self {
        let segments = root.segments.iter().map(|one| (one.name.number, *one)).collect();
        Self { at, root, segments }
    }

    pub fn horizon(&self) -> Version {
        self.root.horizon
    }
}

/// A page that is not in memory, and the pointers behind it on its parent.
pub(super) struct Missing {
    child: Child,
    level: u8,
    siblings: Option<(Arc<Page>, usize)>,
}

/// Reads pages of one volume.
#[derive(Clone)]
pub(super) struct Pages {
    pub volume: VolumeId,
    pub store: Arc<dyn SegmentStore>,
    pub cache: Arc<PageCache>,
}

/// Pages a reader holds on to, so that it gets on even when the cache drops them at once.
pub(super) type Held = Vec<(Location, Arc<Page>)>;

impl Pages {
    pub fn location(&self, page: &PageRef) -> Location {
        Location { volume: self.volume, number: page.number, offset: page.offset }
    }

    /// A page from memory.
    pub fn cached(&self, page: &PageRef, held: &Held) -> Option<Arc<Page>> {
        let at = self.location(page);
        self.cache.get(&at).or_else(|| held.iter().find(|(key, _)| *key == at).map(|(_, page)| Arc::clone(page)))
    }

    /// A page from the store, verified.
    pub async fn read(
        &self,
        segments: &BTreeMap<u64, IndexSegment>,
        page: &PageRef,
        kind: PageKind,
        level: u8,
    ) -> Result<Arc<Page>, IndexError> {
        let segment = segments.get(&page.number).ok_or(IndexError::Unlisted { number: page.number })?;
        let offset = u64::from(page.offset) * super::format::PAGE_ALIGN;
        let wrong = |error| IndexError::Page { number: page.number, offset, error };
        if offset.checked_add(page.bytes.into()).is_none_or(|end| end > segment.bytes) {
            return Err(wrong(PageError::Length));
        }
        let read = SegmentRead {
            segment: segment.name,
            segment_bytes: segment.bytes,
            offset,
            length: page.bytes,
            check: Check::Whole(page.crc),
        };
        // Copied out: the store's buffers are for I/O, and a small page must not hold a large one.
        let bytes = self.store.read(read).await?.to_vec().into_boxed_slice();
        let page = Page::parse(bytes, kind, level, self.location(page)).map_err(wrong)?;
        Ok(Arc::new(page))
    }

    /// A page of a tree, by way of the cache; what is read does not enter it.
    pub async fn tree_page(
        &self,
        segments: &BTreeMap<u64, IndexSegment>,
        page: &PageRef,
        level: u8,
    ) -> Result<Arc<Page>, IndexError> {
        if let Some(found) = self.cached(page, &Vec::new()) {
            return checked(found, page, level);
        }
        let kind = if level == 0 { PageKind::Leaf } else { PageKind::Inner };
        self.read(segments, page, kind, level).await
    }

    /// Reads what a search misses, and the leaves behind it that lie before `end`.
    pub async fn fetch(&self, roots: &Roots, missing: Missing, end: u64, held: &mut Held) -> Result<(), IndexError> {
        let mut wanted = vec![missing.child];
        if let (0, Some((parent, row))) = (missing.level, &missing.siblings) {
            let behind = (row + 1..parent.rows()).map(|row| parent.child(row)).take_while(|child| child.first < end);
            let absent = behind.filter(|child| !self.cache.contains(&self.location(&child.page)));
            wanted.extend(absent.take(READ_AHEAD - 1));
        }
        let kind = if missing.level == 0 { PageKind::Leaf } else { PageKind::Inner };
        let reads = wanted.iter().map(|child| self.read(&roots.segments, &child.page, kind, missing.level));
        let pages = try_join_all(reads).await?;
        if held.len() > 4 * READ_AHEAD {
            held.clear();
        }
        for (child, page) in wanted.iter().zip(pages) {
            let at = self.location(&child.page);
            self.cache.insert(at, Arc::clone(&page), false);
            held.push((at, page));
        }
        Ok(())
    }

    /// The leaf of `tree` that would hold `lba`, and the first block behind what it covers.
    pub fn leaf(&self, tree: &Tree, lba: u64, held: &Held) -> Result<Result<(Arc<Page>, u64), Missing>, IndexError> {
        let mut child = Child { first: tree.first, page: tree.page, blocks: tree.blocks };
        let mut level = tree.level;
        let mut end = u64::MAX;
        let mut siblings = None;
        loop {
            let Some(page) = self.cached(&child.page, held) else {
                return Ok(Err(Missing { child, level, siblings }));
            };
            let page = checked(page, &child.page, level)?;
            if level == 0 {
                return Ok(Ok((page, end)));
            }
            let row = page.last_at_most(lba).unwrap_or(0);
            if row + 1 < page.rows() {
                end = page.value(0, row + 1);
            }
            child = page.child(row);
            siblings = Some((page, row));
            level -= 1;
        }
    }
}

/// A page from the cache was verified for its place, but a damaged pointer may expect another level there.
fn checked(found: Arc<Page>, page: &PageRef, level: u8) -> Result<Arc<Page>, IndexError> {
    if found.level() == level && found.is_tree() {
        return Ok(found);
    }
    let offset = u64::from(page.offset) * super::format::PAGE_ALIGN;
    Err(IndexError::Page { number: page.number, offset, error: PageError::Misplaced })
}
