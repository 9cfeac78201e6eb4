//! Bytes of index pages and roots; the table stands in docs/format/index.md.
//!
//! A page is a header, a table of columns and the columns, each a frame of reference: `base + row[width]`. The columns of
//! a page are as wide as its values need, up to eight bytes, so nothing can wrap. Look-ups search the raw columns.

use super::entry::{LBA_MAX, POSITIONS_MAX, PageError};
use xsan_types::name::SEGMENT_NAME_BYTES;
use xsan_types::{Crc32c, Generation, SegmentName, Sequence, Version, VolumeId, crc32c};

/// First bytes of a page.
pub const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"XIPG");
/// First bytes of a root.
pub const ROOT_MAGIC: u32 = u32::from_le_bytes(*b"XIRT");
/// The version written, of pages and roots.
pub const INDEX_VERSION: u16 = 1;
/// Pages start at multiples of this; offsets are counted in it.
pub const PAGE_ALIGN: u64 = 4096;
/// Largest page of a tree: one aligned read on one device.
pub const TREE_PAGE_BYTES_MAX: usize = 4096;
/// Largest page of the live list.
pub const LIVE_PAGE_BYTES_MAX: usize = 16 << 10;
/// Levels of a tree are below this: 2^48 blocks at the smallest fan-out need fewer.
pub const LEVELS_MAX: u8 = 32;
/// Most trees of a root: the base and eight runs.
pub const TREES_MAX: usize = 9;

/// Columns of a leaf: block, blocks zeroed (0: one block of data), segment, position, CRC, version.
pub const LEAF_COLUMNS: usize = 7;
/// Columns of an inner page: first block, segment, offset, bytes, CRC, data blocks below.
pub const INNER_COLUMNS: usize = 6;
/// Columns of the live list.
pub const LIVE_COLUMNS: usize = 13;

/// Row of a leaf: lba, zeroes, number, position, crc, generation, sequence.
pub type LeafRow = [u64; LEAF_COLUMNS];
/// Row of an inner page: first, number, offset / 4096, bytes, crc, blocks.
pub type InnerRow = [u64; INNER_COLUMNS];
/// Row of the live list: number, generation, pool, group, bytes, footer offset, footer CRC, live blocks, holes (bit per
/// position), oldest data version (generation, sequence), newest zero version (generation, sequence).
pub type LiveRow = [u64; LIVE_COLUMNS];

/// Column of a leaf.
pub const LBA: usize = 0;
/// Column of a leaf: 0 for data, else the number of zeroed blocks.
pub const ZEROES: usize = 1;
/// Column of a leaf.
pub const NUMBER: usize = 2;
/// Column of a leaf.
pub const POSITION: usize = 3;
/// Column of a leaf.
pub const CRC: usize = 4;
/// Column of a leaf.
pub const GENERATION: usize = 5;
/// Column of a leaf.
pub const SEQUENCE: usize = 6;

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 4;
const KIND_AT: usize = VERSION_AT + 2;
const LEVEL_AT: usize = KIND_AT + 1;
const VOLUME_AT: usize = LEVEL_AT + 1;
const NUMBER_AT: usize = VOLUME_AT + 8;
const OFFSET_AT: usize = NUMBER_AT + 8;
const ROWS_AT: usize = OFFSET_AT + 4;
const COLUMNS_AT: usize = ROWS_AT + 4;
const COMPRESSION_AT: usize = COLUMNS_AT + 2;
const ENCRYPTION_AT: usize = COMPRESSION_AT + 1;
const FLAGS_AT: usize = ENCRYPTION_AT + 1;
const BYTES_AT: usize = FLAGS_AT + 4;
const CRC_AT: usize = BYTES_AT + 4;
/// Bytes of a page header.
pub const HEADER_BYTES: usize = CRC_AT + 4;
/// Bytes of a line of the column table: base, width.
pub const COLUMN_BYTES: usize = 9;

const _: () = assert!(HEADER_BYTES == 48);
const _: () = assert!(TREE_PAGE_BYTES_MAX as u64 == PAGE_ALIGN);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// Entries of a tree.
    Leaf = 1,
    /// Pointers to pages one level below.
    Inner = 2,
    /// Lines of the live list.
    Live = 3,
}

/// Where a page lies: its owner, segment and offset. Part of its header, so that a misdirected page is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// The volume.
    pub volume: VolumeId,
    /// Number of the index segment.
    pub number: u64,
    /// Offset in units of [`PAGE_ALIGN`].
    pub offset: u32,
}

/// A pointer to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef {
    /// Number of the index segment.
    pub number: u64,
    /// Offset in units of [`PAGE_ALIGN`].
    pub offset: u32,
    /// Length.
    pub bytes: u32,
    /// CRC-32C of the bytes as stored.
    pub crc: Crc32c,
}

impl PageRef {
    /// Bytes it takes in its segment.
    pub fn footprint(&self) -> u64 {
        u64::from(self.bytes).next_multiple_of(PAGE_ALIGN)
    }
}

/// A pointer to a page and what lies below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// First block of the first entry.
    pub first: u64,
    /// The page.
    pub page: PageRef,
    /// Data blocks in the leaves below.
    pub blocks: u64,
}

impl Child {
    /// As a row of an inner page.
    pub fn row(&self) -> InnerRow {
        let page = &self.page;
        [self.first, page.number, page.offset.into(), page.bytes.into(), page.crc.0.into(), self.blocks]
    }
}

/// Bytes of a page with so many rows of so many bytes.
fn page_bytes(columns: usize, rows: usize, row_bytes: usize) -> usize {
    HEADER_BYTES + columns * COLUMN_BYTES + rows * row_bytes
}

/// Bytes needed for values up to `span` above the base.
fn width_of(span: u64) -> usize {
    (64 - span.leading_zeros() as usize).div_ceil(8)
}

/// Length of a page as rows are added to it, without encoding.
#[derive(Clone, Copy, Debug)]
pub struct Size<const N: usize> {
    low: [u64; N],
    high: [u64; N],
    rows: usize,
}

impl<const N: usize> Default for Size<N> {
    fn default() -> Self {
        Self { low: [u64::MAX; N], high: [0; N], rows: 0 }
    }
}

impl<const N: usize> Size<N> {
    /// Of these rows.
    pub fn of(rows: &[[u64; N]]) -> Self {
        let mut size = Self::default();
        rows.iter().for_each(|row| size.add(row));
        size
    }

    /// One more row.
    pub fn add(&mut self, row: &[u64; N]) {
        for ((low, high), value) in self.low.iter_mut().zip(&mut self.high).zip(row) {
            *low = (*low).min(*value);
            *high = (*high).max(*value);
        }
        self.rows += 1;
    }

    /// Encoded length.
    pub fn bytes(&self) -> usize {
        if self.rows == 0 {
            return 0;
        }
        let row_bytes = self.low.iter().zip(&self.high).map(|(low, high)| width_of(high - low)).sum();
        page_bytes(N, self.rows, row_bytes)
    }
}

/// Encodes a page; `rows` is not empty.
pub fn encode<const N: usize>(kind: PageKind, level: u8, at: Location, rows: &[[u64; N]]) -> Vec<u8> {
    assert!(!rows.is_empty(), "a page has rows");
    let size = Size::of(rows);
    let length = size.bytes();
    let mut out = vec![0; HEADER_BYTES];
    out.reserve_exact(length - HEADER_BYTES);
    put(&mut out, MAGIC_AT, &PAGE_MAGIC.to_le_bytes());
    put(&mut out, VERSION_AT, &INDEX_VERSION.to_le_bytes());
    put(&mut out, KIND_AT, &[kind as u8]);
    put(&mut out, LEVEL_AT, &[level]);
    put(&mut out, VOLUME_AT, &at.volume.0.to_le_bytes());
    put(&mut out, NUMBER_AT, &at.number.to_le_bytes());
    put(&mut out, OFFSET_AT, &at.offset.to_le_bytes());
    put(&mut out, ROWS_AT, &(rows.len() as u32).to_le_bytes());
    put(&mut out, COLUMNS_AT, &(N as u16).to_le_bytes());
    put(&mut out, BYTES_AT, &(length as u32).to_le_bytes());
    let widths: [usize; N] = std::array::from_fn(|column| width_of(size.high[column] - size.low[column]));
    for (low, width) in size.low.iter().zip(widths) {
        out.extend_from_slice(&low.to_le_bytes());
        out.push(width as u8);
    }
    for (column, width) in widths.into_iter().enumerate() {
        for row in rows {
            out.extend_from_slice(&(row[column] - size.low[column]).to_le_bytes()[..width]);
        }
    }
    assert_eq!(out.len(), length, "a page is as long as planned");
    let crc = crc32c(&out);
    put(&mut out, CRC_AT, &crc.0.to_le_bytes());
    out
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// CRC-32C of `bytes` with the four bytes at `at` taken as zero.
fn crc_without(bytes: &[u8], at: usize) -> Option<Crc32c> {
    let mut copy = bytes.to_vec();
    copy.get_mut(at..at + 4)?.fill(0);
    Some(crc32c(&copy))
}

#[derive(Clone, Copy, Debug, Default)]
struct Column {
    base: u64,
    at: u32,
    width: u8,
}

/// A verified page: raw bytes and where its columns are.
#[derive(Debug)]
pub struct Page {
    bytes: Box<[u8]>,
    rows: u32,
    level: u8,
    columns: [Column; LIVE_COLUMNS],
}

impl Page {
    /// Verifies a page, in order of trust: length, magic, checksum, version, features, place, columns, content.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn parse(bytes: Box<[u8]>, kind: PageKind, level: u8, at: Location) -> Result<Self, PageError> {
        let page = Self::structure(bytes, kind, level, at)?;
        let sound = match kind {
            PageKind::Leaf => page.leaf_is_sound(),
            PageKind::Inner => page.inner_is_sound(),
            PageKind::Live => page.live_is_sound(),
        };
        if sound { Ok(page) } else { Err(PageError::Content) }
    }

    fn structure(bytes: Box<[u8]>, kind: PageKind, level: u8, at: Location) -> Result<Self, PageError> {
        let u32_of = |at| u32_at(&bytes, at).ok_or(PageError::Length);
        if bytes.len() < HEADER_BYTES || u32_of(BYTES_AT)? as usize != bytes.len() {
            return Err(PageError::Length);
        }
        if u32_of(MAGIC_AT)? != PAGE_MAGIC {
            return Err(PageError::Magic);
        }
        if crc_without(&bytes, CRC_AT) != Some(Crc32c(u32_of(CRC_AT)?)) {
            return Err(PageError::Checksum);
        }
        match u16_at(&bytes, VERSION_AT) {
            Some(INDEX_VERSION) => {}
            found => return Err(PageError::Version(found.unwrap_or(0))),
        }
        if bytes[COMPRESSION_AT] != 0 || bytes[ENCRYPTION_AT] != 0 || u32_of(FLAGS_AT)? != 0 {
            return Err(PageError::Feature);
        }
        let place = (u64_at(&bytes, VOLUME_AT), u64_at(&bytes, NUMBER_AT), u32_of(OFFSET_AT)?);
        if place != (Some(at.volume.0), Some(at.number), at.offset)
            || bytes[KIND_AT] != kind as u8
            || bytes[LEVEL_AT] != level
        {
            return Err(PageError::Misplaced);
        }
        let rows = u32_of(ROWS_AT)?;
        let count = match kind {
            PageKind::Leaf => LEAF_COLUMNS,
            PageKind::Inner => INNER_COLUMNS,
            PageKind::Live => LIVE_COLUMNS,
        };
        if u16_at(&bytes, COLUMNS_AT).map(usize::from) != Some(count) || rows == 0 {
            return Err(PageError::Content);
        }
        let mut columns = [Column::default(); LIVE_COLUMNS];
        let mut end = HEADER_BYTES + count * COLUMN_BYTES;
        for (index, column) in columns.iter_mut().take(count).enumerate() {
            let line = HEADER_BYTES + index * COLUMN_BYTES;
            let base = u64_at(&bytes, line).ok_or(PageError::Length)?;
            let width = *bytes.get(line + 8).ok_or(PageError::Length)?;
            if width > 8 {
                return Err(PageError::Content);
            }
            *column = Column { base, at: end as u32, width };
            end += rows as usize * usize::from(width);
            if end > bytes.len() {
                return Err(PageError::Length);
            }
        }
        if end == bytes.len() { Ok(Self { bytes, rows, level, columns }) } else { Err(PageError::Length) }
    }

    fn leaf_is_sound(&self) -> bool {
        let mut reached = 0;
        (0..self.rows()).all(|row| {
            let [lba, zeroes, _, position, crc, _, _] = self.leaf_row(row);
            let end = lba.checked_add(zeroes.max(1));
            let sound = lba >= reached
                && end.is_some_and(|end| end <= LBA_MAX)
                && position < u64::from(POSITIONS_MAX)
                && crc <= u64::from(u32::MAX);
            reached = end.unwrap_or(u64::MAX);
            sound
        })
    }

    fn inner_is_sound(&self) -> bool {
        let mut before = None;
        (0..self.rows()).all(|row| {
            let [first, _, offset, bytes, crc, blocks] = self.inner_row(row);
            let sound = before < Some(first)
                && first < LBA_MAX
                && blocks <= LBA_MAX
                && offset <= u64::from(u32::MAX)
                && bytes <= TREE_PAGE_BYTES_MAX as u64
                && bytes >= HEADER_BYTES as u64
                && crc <= u64::from(u32::MAX);
            before = Some(first);
            sound
        })
    }

    fn live_is_sound(&self) -> bool {
        let mut before = None;
        (0..self.rows()).all(|row| {
            let [number, _, pool, group, bytes, footer, crc, ..] = self.live_row(row);
            let sound = before < Some(number)
                && [pool, group, crc].into_iter().all(|value| value <= u64::from(u32::MAX))
                && footer <= bytes;
            before = Some(number);
            sound
        })
    }

    /// Rows; at least one.
    pub fn rows(&self) -> usize {
        self.rows as usize
    }

    /// 0 for leaves.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Whether it is a page of a tree.
    pub fn is_tree(&self) -> bool {
        self.bytes[KIND_AT] != PageKind::Live as u8
    }

    /// Memory it takes.
    pub fn memory(&self) -> usize {
        self.bytes.len() + size_of::<Self>()
    }

    /// A value. Columns and rows are inside the page: `parse` has checked their lengths.
    #[inline]
    pub fn value(&self, column: usize, row: usize) -> u64 {
        let Column { base, at, width } = self.columns[column];
        let width = usize::from(width);
        let at = at as usize + row * width;
        let raw = match self.bytes.get(at..at + 8) {
            Some(eight) => {
                let eight: [u8; 8] = eight.try_into().expect("eight bytes");
                // A shift by 64 is not one: width 0 means that all values are the base.
                if width == 0 { 0 } else { u64::from_le_bytes(eight) & (u64::MAX >> (64 - 8 * width)) }
            }
            None => {
                let mut eight = [0; 8];
                eight[..width].copy_from_slice(&self.bytes[at..at + width]);
                u64::from_le_bytes(eight)
            }
        };
        base.wrapping_add(raw)
    }

    fn row<const N: usize>(&self, row: usize) -> [u64; N] {
        std::array::from_fn(|column| self.value(column, row))
    }

    /// A row of a leaf.
    pub fn leaf_row(&self, row: usize) -> LeafRow {
        self.row(row)
    }

    /// A row of an inner page.
    pub fn inner_row(&self, row: usize) -> InnerRow {
        self.row(row)
    }

    /// A row of the live list.
    pub fn live_row(&self, row: usize) -> LiveRow {
        self.row(row)
    }

    /// A pointer of an inner page.
    pub fn child(&self, row: usize) -> Child {
        let [first, number, offset, bytes, crc, blocks] = self.inner_row(row);
        let page = PageRef { number, offset: offset as u32, bytes: bytes as u32, crc: Crc32c(crc as u32) };
        Child { first, page, blocks }
    }

    /// Version of a leaf's entry.
    pub fn version(&self, row: usize) -> Version {
        Version { generation: Generation(self.value(GENERATION, row)), sequence: Sequence(self.value(SEQUENCE, row)) }
    }

    /// The last row whose first column is at most `key`.
    pub fn last_at_most(&self, key: u64) -> Option<usize> {
        let (mut low, mut high) = (0, self.rows());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.value(0, middle) <= key { low = middle + 1 } else { high = middle }
        }
        low.checked_sub(1)
    }
}

/// A listed index segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexSegment {
    /// Its name.
    pub name: SegmentName,
    /// Its length.
    pub bytes: u64,
    /// Bytes of live pages in it, padding included.
    pub live: u64,
    /// Positions not written yet, one bit each.
    pub holes: u64,
}

/// A tree of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its root page.
    pub page: PageRef,
    /// Level of the root page; 0: the tree is one leaf.
    pub level: u8,
    /// First block of its first entry.
    pub first: u64,
    /// No entry ends behind this block.
    pub end: u64,
    /// Entries.
    pub entries: u64,
    /// Data blocks among them.
    pub blocks: u64,
    /// Bytes of its pages, padding included.
    pub page_bytes: u64,
}

/// A page of the live list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LivePage {
    /// Where.
    pub page: PageRef,
    /// Lines on it.
    pub rows: u32,
    /// Number of the first segment on it.
    pub first: u64,
}

/// The root of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// Names with a smaller number are decided.
    pub border: u64,
    /// Every change up to this version is in the trees.
    pub horizon: Version,
    /// All index segments, by number.
    pub segments: Vec<IndexSegment>,
    /// Newest first; the last is the base, which has no zero entries.
    pub trees: Vec<Tree>,
    /// The live list of data segments, by number.
    pub live: Vec<LivePage>,
}

const ROOT_COMPRESSION_AT: usize = 6;
const ROOT_ENCRYPTION_AT: usize = 7;
const ROOT_VOLUME_AT: usize = 8;
const ROOT_FLAGS_AT: usize = 16;
const ROOT_BORDER_AT: usize = 24;
const ROOT_HORIZON_AT: usize = 32;
const ROOT_NUMBER_AT: usize = 48;
const ROOT_OFFSET_AT: usize = 56;
const ROOT_BYTES_AT: usize = 60;
const ROOT_SEGMENTS_AT: usize = 64;
const ROOT_TREES_AT: usize = 68;
const ROOT_LIVE_AT: usize = 72;
/// Counts of tables this version does not write: undecided names, logs, pins.
const ROOT_FUTURE_AT: std::ops::Range<usize> = 76..124;
const ROOT_CRC_AT: usize = 124;
/// Bytes of a root's fixed part.
pub const ROOT_HEADER_BYTES: usize = 128;
/// Bytes of a line of the root's tables.
pub const ROOT_SEGMENT_BYTES: usize = 64;
/// See [`ROOT_SEGMENT_BYTES`].
pub const ROOT_TREE_BYTES: usize = 80;
/// See [`ROOT_SEGMENT_BYTES`].
pub const ROOT_LIVE_BYTES: usize = 32;

const _: () = assert!(ROOT_FUTURE_AT.end == ROOT_CRC_AT && ROOT_CRC_AT + 4 == ROOT_HEADER_BYTES);

fn put_page_ref(out: &mut Vec<u8>, page: &PageRef) {
    out.extend_from_slice(&page.number.to_le_bytes());
    out.extend_from_slice(&page.offset.to_le_bytes());
    out.extend_from_slice(&page.bytes.to_le_bytes());
    out.extend_from_slice(&page.crc.0.to_le_bytes());
}

fn page_ref_at(bytes: &[u8], at: usize) -> Option<PageRef> {
    Some(PageRef {
        number: u64_at(bytes, at)?,
        offset: u32_at(bytes, at + 8)?,
        bytes: u32_at(bytes, at + 12)?,
        crc: Crc32c(u32_at(bytes, at + 16)?),
    })
}

impl Root {
    /// Encoded length.
    pub fn bytes(segments: usize, trees: usize, live: usize) -> usize {
        ROOT_HEADER_BYTES + segments * ROOT_SEGMENT_BYTES + trees * ROOT_TREE_BYTES + live * ROOT_LIVE_BYTES
    }

    /// Encodes it for `at`.
    pub fn encode(&self, at: Location) -> Vec<u8> {
        let length = Self::bytes(self.segments.len(), self.trees.len(), self.live.len());
        let mut out = vec![0; ROOT_HEADER_BYTES];
        put(&mut out, MAGIC_AT, &ROOT_MAGIC.to_le_bytes());
        put(&mut out, VERSION_AT, &INDEX_VERSION.to_le_bytes());
        put(&mut out, ROOT_VOLUME_AT, &at.volume.0.to_le_bytes());
        put(&mut out, ROOT_BORDER_AT, &self.border.to_le_bytes());
        put(&mut out, ROOT_HORIZON_AT, &self.horizon.generation.0.to_le_bytes());
        put(&mut out, ROOT_HORIZON_AT + 8, &self.horizon.sequence.0.to_le_bytes());
        put(&mut out, ROOT_NUMBER_AT, &at.number.to_le_bytes());
        put(&mut out, ROOT_OFFSET_AT, &at.offset.to_le_bytes());
        put(&mut out, ROOT_BYTES_AT, &(length as u32).to_le_bytes());
        put(&mut out, ROOT_SEGMENTS_AT, &(self.segments.len() as u32).to_le_bytes());
        put(&mut out, ROOT_TREES_AT, &(self.trees.len() as u32).to_le_bytes());
        put(&mut out, ROOT_LIVE_AT, &(self.live.len() as u32).to_le_bytes());
        for segment in &self.segments {
            out.extend_from_slice(&segment.name.to_bytes());
            for value in [segment.bytes, segment.live, segment.holes, 0] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        for tree in &self.trees {
            put_page_ref(&mut out, &tree.page);
            out.extend_from_slice(&u32::from(tree.level).to_le_bytes());
            for value in [tree.first, tree.end, tree.entries, tree.blocks, tree.page_bytes, 0, 0] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        for live in &self.live {
            put_page_ref(&mut out, &live.page);
            out.extend_from_slice(&live.rows.to_le_bytes());
            out.extend_from_slice(&live.first.to_le_bytes());
        }
        assert_eq!(out.len(), length, "a root is as long as planned");
        let crc = crc32c(&out);
        put(&mut out, ROOT_CRC_AT, &crc.0.to_le_bytes());
        out
    }

    /// Verifies and decodes it.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn parse(bytes: &[u8], at: Location) -> Result<Self, PageError> {
        let u32_of = |at| u32_at(bytes, at).ok_or(PageError::Length);
        let u64_of = |at| u64_at(bytes, at).ok_or(PageError::Length);
        if bytes.len() < ROOT_HEADER_BYTES || u32_of(ROOT_BYTES_AT)? as usize != bytes.len() {
            return Err(PageError::Length);
        }
        if u32_of(MAGIC_AT)? != ROOT_MAGIC {
            return Err(PageError::Magic);
        }
        if crc_without(bytes, ROOT_CRC_AT) != Some(Crc32c(u32_of(ROOT_CRC_AT)?)) {
            return Err(PageError::Checksum);
        }
        match u16_at(bytes, VERSION_AT) {
            Some(INDEX_VERSION) => {}
            found => return Err(PageError::Version(found.unwrap_or(0))),
        }
        let known = bytes[ROOT_COMPRESSION_AT] == 0 && bytes[ROOT_ENCRYPTION_AT] == 0 && u64_of(ROOT_FLAGS_AT)? == 0;
        if !known || bytes[ROOT_FUTURE_AT].iter().any(|&byte| byte != 0) {
            return Err(PageError::Feature);
        }
        let place = (u64_of(ROOT_VOLUME_AT)?, u64_of(ROOT_NUMBER_AT)?, u32_of(ROOT_OFFSET_AT)?);
        if place != (at.volume.0, at.number, at.offset) {
            return Err(PageError::Misplaced);
        }
        let [segments, trees, live] = [ROOT_SEGMENTS_AT, ROOT_TREES_AT, ROOT_LIVE_AT].map(|at| u32_at(bytes, at));
        let (Some(segments), Some(trees), Some(live)) = (segments, trees, live) else { return Err(PageError::Length) };
        let (segments, trees, live) = (segments as usize, trees as usize, live as usize);
        if segments.max(trees).max(live) > bytes.len() || Self::bytes(segments, trees, live) != bytes.len() {
            return Err(PageError::Length);
        }
        let horizon = Version {
            generation: Generation(u64_of(ROOT_HORIZON_AT)?),
            sequence: Sequence(u64_of(ROOT_HORIZON_AT + 8)?),
        };
        let mut root = Self { border: u64_of(ROOT_BORDER_AT)?, horizon, ..Self::default() };
        let mut at_byte = ROOT_HEADER_BYTES;
        for _ in 0..segments {
            root.segments.push(index_segment_at(bytes, at_byte).ok_or(PageError::Length)?);
            at_byte += ROOT_SEGMENT_BYTES;
        }
        for _ in 0..trees {
            root.trees.push(tree_at(bytes, at_byte).ok_or(PageError::Content)?);
            at_byte += ROOT_TREE_BYTES;
        }
        for _ in 0..live {
            root.live.push(live_page_at(bytes, at_byte).ok_or(PageError::Content)?);
            at_byte += ROOT_LIVE_BYTES;
        }
        if root.is_sound(at.volume) { Ok(root) } else { Err(PageError::Content) }
    }

    fn is_sound(&self, volume: VolumeId) -> bool {
        self.trees.len() <= TREES_MAX
            && self.segments.iter().all(|segment| segment.name.volume == volume)
            && self.segments.is_sorted_by(|a, b| a.name.number < b.name.number)
            && self.live.is_sorted_by(|a, b| a.first < b.first)
    }
}

fn index_segment_at(bytes: &[u8], at: usize) -> Option<IndexSegment> {
    let name: &[u8; SEGMENT_NAME_BYTES] = bytes.get(at..at + SEGMENT_NAME_BYTES)?.try_into().ok()?;
    let at = at + SEGMENT_NAME_BYTES;
    Some(IndexSegment {
        name: SegmentName::from_bytes(name),
        bytes: u64_at(bytes, at)?,
        live: u64_at(bytes, at + 8)?,
        holes: u64_at(bytes, at + 16)?,
    })
}

fn tree_at(bytes: &[u8], at: usize) -> Option<Tree> {
    let page = page_ref_at(bytes, at)?;
    let level = u8::try_from(u32_at(bytes, at + 20)?).ok()?;
    let value = |index: usize| u64_at(bytes, at + 24 + index * 8);
    let tree = Tree {
        page,
        level,
        first: value(0)?,
        end: value(1)?,
        entries: value(2)?,
        blocks: value(3)?,
        page_bytes: value(4)?,
    };
    let sound = level < LEVELS_MAX
        && tree.first < tree.end
        && tree.end <= LBA_MAX
        && (HEADER_BYTES..=TREE_PAGE_BYTES_MAX).contains(&(page.bytes as usize));
    sound.then_some(tree)
}

fn live_page_at(bytes: &[u8], at: usize) -> Option<LivePage> {
    let page = page_ref_at(bytes, at)?;
    let sound = (HEADER_BYTES..=LIVE_PAGE_BYTES_MAX).contains(&(page.bytes as usize));
    sound.then_some(LivePage { page, rows: u32_at(bytes, at + 20)?, first: u64_at(bytes, at + 24)? })
}
