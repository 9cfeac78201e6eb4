//! Writes pages into index segments and seals those as they fill.

use super::cache::PageCache;
use super::entry::IndexError;
use super::format::{IndexSegment, Location, PAGE_ALIGN, Page, PageKind, PageRef, encode};
use crate::store::{Holes, SegmentStore, StoreResult};
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_env::{Buf, BufMut};
use xsan_types::{SegmentName, crc32c};

/// Largest index segment.
pub(super) const SEGMENT_BYTES: u64 = 16 << 20;
/// Memory of an open index segment grows in pieces of this.
const PIECE_BYTES: usize = 256 << 10;

struct Open {
    name: SegmentName,
    full: Vec<Buf>,
    piece: BufMut,
    used: usize,
}

impl Open {
    fn bytes(&self) -> u64 {
        (self.full.len() * PIECE_BYTES + self.used) as u64
    }
}

/// The index segments of one checkpoint.
pub(super) struct Writer<'a> {
    store: &'a Arc<dyn SegmentStore>,
    cache: &'a PageCache,
    names: &'a mut (dyn FnMut() -> SegmentName + Send),
    open: Option<Open>,
    /// Sealed at this moment; one at a time, while the next one fills.
    sealing: Option<(u64, StoreResult<Holes>)>,
    pub segments: BTreeMap<u64, IndexSegment>,
}

impl<'a> Writer<'a> {
    pub fn new(
        store: &'a Arc<dyn SegmentStore>,
        cache: &'a PageCache,
        names: &'a mut (dyn FnMut() -> SegmentName + Send),
    ) -> Self {
        Self { store, cache, names, open: None, sealing: None, segments: BTreeMap::new() }
    }

    /// Where the next `length` bytes will lie.
    pub async fn place(&mut self, length: usize) -> Result<Location, IndexError> {
        let length = (length as u64).next_multiple_of(PAGE_ALIGN);
        if self.open.as_ref().is_some_and(|open| open.bytes() + length > SEGMENT_BYTES) {
            self.seal().await?;
        }
        if self.open.is_none() {
            let name = (self.names)();
            let piece = BufMut::heap(PIECE_BYTES);
            self.open = Some(Open { name, full: Vec::new(), piece, used: 0 });
        }
        let open = self.open.as_ref().expect("just opened");
        let offset = (open.bytes() / PAGE_ALIGN) as u32;
        Ok(Location { volume: open.name.volume, number: open.name.number, offset })
    }

    /// Appends bytes at the place that was announced last.
    pub fn append(&mut self, bytes: &[u8]) -> PageRef {
        let open = self.open.as_mut().expect("a place was announced");
        let at = open.bytes();
        let (mut rest, mut padded) = (bytes, bytes.len().next_multiple_of(PAGE_ALIGN as usize));
        while padded > 0 {
            let room = (PIECE_BYTES - open.used).min(padded);
            let data = room.min(rest.len());
            open.piece[open.used..open.used + data].copy_from_slice(&rest[..data]);
            rest = &rest[data..];
            open.used += room;
            padded -= room;
            if open.used == PIECE_BYTES {
                let piece = std::mem::replace(&mut open.piece, BufMut::heap(PIECE_BYTES));
                open.full.push(piece.freeze());
                open.used = 0;
            }
        }
        let segment = self.segments.entry(open.name.number).or_insert(IndexSegment {
            name: open.name,
            bytes: 0,
            live: 0,
            holes: 0,
        });
        segment.bytes = open.bytes();
        segment.live = segment.bytes;
        PageRef {
            number: open.name.number,
            offset: (at / PAGE_ALIGN) as u32,
            bytes: bytes.len() as u32,
            crc: crc32c(bytes),
        }
    }

    /// Writes a page. It enters the cache: what was just changed is looked up soon; `hot` if it replaces a page held there.
    pub async fn page<const N: usize>(
        &mut self,
        kind: PageKind,
        level: u8,
        rows: &[[u64; N]],
        hot: bool,
    ) -> Result<PageRef, IndexError> {
        let at = self.place(super::format::Size::of(rows).bytes()).await?;
        let bytes = encode(kind, level, at, rows);
        let page = self.append(&bytes);
        assert_eq!((page.number, page.offset), (at.number, at.offset), "a page lies where it says");
        let parsed = Page::parse(bytes.into_boxed_slice(), kind, level, at).expect("a page reads as it was written");
        if parsed.is_tree() {
            self.cache.insert(at, Arc::new(parsed), hot);
        }
        Ok(page)
    }

    async fn seal(&mut self) -> Result<(), IndexError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        self.sealed().await?;
        let mut body = open.full;
        if open.used > 0 {
            let mut piece = open.piece;
            piece.truncate(open.used);
            body.push(piece.freeze());
        }
        self.sealing = Some((open.name.number, self.store.seal(open.name, body)));
        Ok(())
    }

    async fn sealed(&mut self) -> Result<(), IndexError> {
        if let Some((number, sealing)) = self.sealing.take() {
            let holes = sealing.await?;
            let segment = self.segments.get_mut(&number).expect("a sealed segment has pages");
            segment.holes = holes.0.iter().filter(|hole| hole.0 < 64).fold(0, |mask, hole| mask | 1 << hole.0);
        }
        Ok(())
    }

    /// The open segment as it will be when it ends at `end`.
    pub fn announce(&self, end: u64) -> IndexSegment {
        let open = self.open.as_ref().expect("a place was announced");
        IndexSegment { name: open.name, bytes: end, live: end, holes: 0 }
    }

    /// Waits until everything but the open segment is sealed, so that the root can tell all holes but its own.
    pub async fn settle(&mut self) -> Result<(), IndexError> {
        self.sealed().await
    }

    /// Seals the rest.
    pub async fn finish(mut self) -> Result<BTreeMap<u64, IndexSegment>, IndexError> {
        self.seal().await?;
        self.sealed().await?;
        Ok(self.segments)
    }
}
