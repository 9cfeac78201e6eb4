//! The index of a volume: which block lies where (RFC 0002, docs/format/index.md).
//!
//! Two tiers. The *delta* holds everything acknowledged since the registered checkpoint, in memory, bounded by
//! checkpoints. The *checkpoint* lies in sealed index segments: copy-on-write trees of pages under one root, read on
//! demand through a cache that all volumes share. The newest version of a block wins wherever it is found (P1).
//!
//! What the owner promises, and the index relies on:
//! - At [`Index::freeze`] everything with a version up to the newest applied one has been applied. So a later change with
//!   such a version is a copy of known bytes (re-sealed, cleaned); it counts only while that version is still current.
//! - Segments of frozen changes are sealed ([`Index::segment_sealed`]) before [`Index::build_checkpoint`].
//! - A segment below the border holds nothing that was first applied after the freeze. (Checked; replay would miss it.)
//!
//! Reading order: [`entry`], [`delta`], [`segments`], [`mod@format`], [`pages`], [`lookup`], [`overlay`], [`build`],
//! [`checkpoint`].

mod build;
mod cache;
mod checkpoint;
mod delta;
mod entry;
mod format;
mod hash;
mod lookup;
mod overlay;
mod pages;
mod segments;
mod writer;

pub use cache::PageCache;
pub use entry::{
    Change, Found, IndexError, LBA_MAX, POSITIONS_MAX, PageError, Place, SegmentKind, SegmentRecord, StatusRun,
};

use crate::store::{Check, SegmentRead, SegmentStore};
use checkpoint::{Built, Policy};
use delta::{Delta, REGION_BLOCKS};
use format::{LiveRow, Location, PAGE_ALIGN, PageKind, Root};
use futures::{StreamExt, TryStreamExt};
use lookup::{InDelta, Runs, Sweep};
use pages::{Held, Pages, Roots};
use segments::Segments;
use std::sync::{Arc, Mutex, MutexGuard};
use xsan_types::{BlockRange, CheckpointRef, SealedSegment, SegmentName, ShardIndex, VolumeId};

/// Pages of the live list read at once when a checkpoint is opened.
const LIVE_PAGES_AHEAD: usize = 16;
/// Pieces of an allocation map worked out under one lock.
const STATUS_PIECES: usize = 64;

/// The index of one volume. Shared by reference; every lock inside is short.
pub struct Index {
    volume: VolumeId,
    store: Arc<dyn SegmentStore>,
    cache: Arc<PageCache>,
    policy: Policy,
    state: Mutex<State>,
}

struct State {
    /// Changes since the last freeze.
    active: Delta,
    /// Changes that the checkpoint being made takes in. Unchanged while a build holds it too.
    frozen: Option<Arc<Delta>>,
    /// The installed checkpoint.
    roots: Arc<Roots>,
    segments: Segments,
    built: Option<Built>,
    /// Names of index segments that no installed root lists yet.
    drawn: Vec<SegmentName>,
    dead: Vec<SegmentName>,
}

impl State {
    fn new(segments: Segments, roots: Roots) -> Self {
        Self {
            active: Delta::new(roots.horizon()),
            frozen: None,
            roots: Arc::new(roots),
            segments,
            built: None,
            drawn: Vec::new(),
            dead: Vec::new(),
        }
    }

    fn apply(&mut self, change: &Change) {
        let version = match *change {
            Change::Data { version, .. } | Change::Zero { version, .. } => version,
        };
        if version <= self.active.horizon {
            // Known below: a zeroed range has had its effect, data may have moved.
            // Not while a build reads the frozen delta, nor after: it would be lost with it.
            if self.built.is_none()
                && let Some(frozen) = self.frozen.as_mut().and_then(Arc::get_mut)
            {
                return frozen.apply(change);
            }
            if matches!(change, Change::Zero { .. }) {
                return;
            }
        }
        self.active.apply(change);
    }
}

/// What one step of an allocation map found without I/O.
enum Piece {
    Known { start: u64, end: u64, hole: bool },
    InTrees { start: u64, end: u64 },
}

impl Index {
    /// The index of a volume that never had a checkpoint: all holes.
    #[must_use]
    pub fn new(volume: VolumeId, store: Arc<dyn SegmentStore>, cache: Arc<PageCache>) -> Self {
        let state = State::new(Segments::new(volume), Roots::new(None, Root::default()));
        Self { volume, store, cache, policy: Policy::default(), state: Mutex::new(state) }
    }

    /// Opens a checkpoint: reads its root and live list; pages follow on demand.
    ///
    /// # Errors
    /// The root or the live list cannot be read or is damaged.
    pub async fn open(
        volume: VolumeId,
        store: Arc<dyn SegmentStore>,
        cache: Arc<PageCache>,
        root: CheckpointRef,
    ) -> Result<Self, IndexError> {
        let number = root.segment.number;
        let wrong = |error| IndexError::Page { number, offset: root.root_offset, error };
        if root.segment.volume != volume {
            return Err(wrong(PageError::Misplaced));
        }
        let read = SegmentRead {
            segment: root.segment,
            segment_bytes: root.segment_bytes,
            offset: root.root_offset,
            length: root.root_bytes,
            check: Check::Whole(root.root_crc),
        };
        let bytes = store.read(read).await?;
        let offset = u32::try_from(root.root_offset / PAGE_ALIGN).map_err(|_| wrong(PageError::Misplaced))?;
        let parsed = Root::parse(&bytes, Location { volume, number, offset }).map_err(wrong)?;
        if parsed.border != root.border {
            return Err(wrong(PageError::Misplaced));
        }
        let roots = Roots::new(Some(root), parsed);
        let pages = Pages { volume, store: Arc::clone(&store), cache: Arc::clone(&cache) };
        let rows = read_live_list(&pages, &roots).await?;
        let segments = Segments::load(volume, roots.root.segments.clone(), rows.into_iter());
        let state = Mutex::new(State::new(segments, roots));
        Ok(Self { volume, store, cache, policy: Policy::default(), state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("index lock")
    }

    fn pages(&self) -> Pages {
        Pages { volume: self.volume, store: Arc::clone(&self.store), cache: Arc::clone(&self.cache) }
    }

    /// Enters changes. The newest version of a block wins, whatever the order; of equal versions the later place.
    ///
    /// # Panics
    /// On blocks at or beyond [`LBA_MAX`] and positions at or beyond [`POSITIONS_MAX`]: the caller checks the volume's size.
    pub fn apply(&self, changes: &[Change]) {
        let mut state = self.state();
        state.segments.note(changes);
        for change in changes {
            state.apply(change);
        }
    }

    /// What the deltas know of a range, and the trees to ask for the rest.
    fn ask_deltas(&self, range: BlockRange, out: &mut Vec<Found>, rest: &mut InDelta) -> Arc<Roots> {
        let state = self.state();
        let deltas = [Some(&state.active), state.frozen.as_deref()];
        lookup::answer(range, deltas, state.roots.horizon(), out, rest);
        Arc::clone(&state.roots)
    }

    /// One [`Found`] per block of `range`, without I/O. `false`: a page is not in memory, or a page is damaged; `out` is
    /// unspecified then, and [`Index::lookup`] tells.
    pub fn try_lookup(&self, range: BlockRange, out: &mut Vec<Found>) -> bool {
        let mut rest = InDelta::default();
        let roots = self.ask_deltas(range, out, &mut rest);
        if rest.open.is_empty() {
            return true;
        }
        let pages = self.pages();
        let mut sweep = Sweep::new(&pages, &roots, &rest.open);
        let done = matches!(sweep.fill(range.start.0, out, &Held::new()), Ok(Ok(())));
        lookup::settle_copies(range.start.0, &rest.copies, out);
        done
    }

    /// One [`Found`] per block of `range`.
    ///
    /// # Errors
    /// A page cannot be read.
    pub async fn lookup(&self, range: BlockRange, out: &mut Vec<Found>) -> Result<(), IndexError> {
        loop {
            let mut rest = InDelta::default();
            let roots = self.ask_deltas(range, out, &mut rest);
            if rest.open.is_empty() {
                return Ok(());
            }
            match checkpoint::lookup_trees(&self.pages(), &roots, &rest.open, range, out).await {
                Ok(()) => {
                    lookup::settle_copies(range.start.0, &rest.copies, out);
                    return Ok(());
                }
                // A page of a replaced checkpoint was deleted under this look-up: the new one has the answer.
                Err(_) if !Arc::ptr_eq(&roots, &self.state().roots) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The allocation map from the start of `range`: at most `runs_max` runs, neighbours differ, nothing of `range` is left
    /// out before the last one ends.
    ///
    /// # Errors
    /// A page cannot be read.
    pub async fn status(&self, range: BlockRange, runs_max: usize) -> Result<Vec<StatusRun>, IndexError> {
        loop {
            let roots = Arc::clone(&self.state().roots);
            match self.status_once(range, runs_max).await {
                // See `lookup`.
                Err(_) if !Arc::ptr_eq(&roots, &self.state().roots) => {}
                result => return result,
            }
        }
    }

    async fn status_once(&self, range: BlockRange, runs_max: usize) -> Result<Vec<StatusRun>, IndexError> {
        let pages = self.pages();
        let mut runs = Runs::new(range.start.0, runs_max);
        let (mut at, end) = (range.start.0, range.end().0);
        while at < end && !runs.is_full() {
            let (pieces, reached, roots) = self.status_pieces(at, end);
            at = reached;
            for piece in pieces {
                match piece {
                    Piece::Known { start, end, hole } => runs.add(start, end, hole),
                    Piece::InTrees { start, end } => {
                        let mut held = Held::new();
                        let mut sweep = Sweep::new(&pages, &roots, &[(start, end)]);
                        while let Err(missing) = sweep.runs(&mut runs, &held)? {
                            pages.fetch(&roots, missing, sweep.end(), &mut held).await?;
                        }
                    }
                }
                if runs.is_full() {
                    break;
                }
            }
        }
        Ok(runs.finish(end))
    }

    /// A part of an allocation map from `at` on, where it ends, and the trees for the pieces that need them. Regions without
    /// data in the deltas are passed over at once.
    fn status_pieces(&self, at: u64, end: u64) -> (Vec<Piece>, u64, Arc<Roots>) {
        let state = self.state();
        let deltas = [Some(&state.active), state.frozen.as_deref()];
        let mut pieces = Vec::new();
        let mut found = Vec::new();
        let mut at = at;
        while at < end && pieces.len() < STATUS_PIECES {
            let next = deltas.iter().flatten().filter_map(|delta| delta.data_from(at)).min();
            let next = next.map_or(end, |next| next.min(end));
            if at < next {
                let zero = deltas.iter().flatten().filter_map(|delta| delta.zero_from(at)).min_by_key(|zero| zero.0);
                at = match zero {
                    Some((start, zero)) if start == at => {
                        let end = zero.end.min(next);
                        pieces.push(Piece::Known { start: at, end, hole: true });
                        end
                    }
                    zero => {
                        let end = zero.map_or(next, |(start, _)| start.min(next));
                        pieces.push(Piece::InTrees { start: at, end });
                        end
                    }
                };
                continue;
            }
            let stop = ((at / REGION_BLOCKS + 1) * REGION_BLOCKS).min(end);
            let mut rest = InDelta::default();
            let range = BlockRange::between(at, stop);
            lookup::answer(range, deltas, state.roots.horizon(), &mut found, &mut rest);
            pieces_of(range, &found, &rest, &mut pieces);
            at = stop;
        }
        (pieces, at, Arc::clone(&state.roots))
    }

    /// A data segment entered the live list. Idempotent: a listed one stays as it is.
    pub fn segment_sealed(&self, sealed: SealedSegment, holes: Vec<ShardIndex>) {
        self.state().segments.sealed(&sealed, &holes);
    }

    /// A line of the live list.
    #[must_use]
    pub fn segment(&self, number: u64) -> Option<SegmentRecord> {
        self.state().segments.get(number)
    }

    /// Replaces the holes of a listed segment.
    pub fn set_holes(&self, number: u64, holes: Vec<ShardIndex>) {
        self.state().segments.set_holes(number, &holes);
    }

    /// The first listed segment behind number `after` that misses positions.
    #[must_use]
    pub fn next_segment_with_holes(&self, after: u64) -> Option<SegmentRecord> {
        self.state().segments.next_with_holes(after)
    }

    /// How many listed segments miss positions.
    #[must_use]
    pub fn hole_count(&self) -> usize {
        self.state().segments.hole_count()
    }

    /// Listed segments.
    #[must_use]
    pub fn segment_count(&self) -> usize {
        self.state().segments.len()
    }

    /// The live list, in order of numbers, data segments first.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentRecord> {
        let state = self.state();
        state.segments.numbers().filter_map(|number| state.segments.get(number)).collect()
    }

    /// Memory of the delta, frozen changes included; 0 when there is none.
    #[must_use]
    pub fn delta_bytes(&self) -> usize {
        let state = self.state();
        state.active.memory() + state.frozen.as_ref().map_or(0, |frozen| frozen.memory())
    }

    /// Memory of this index without the shared cache: delta, live list, root.
    #[must_use]
    pub fn memory(&self) -> usize {
        let state = self.state();
        let roots = state.roots.root.live.len() * 40 + state.roots.segments.len() * 160;
        let delta = state.active.memory() + state.frozen.as_ref().map_or(0, |frozen| frozen.memory());
        size_of::<Self>() + delta + state.segments.memory() + roots
    }

    /// The installed checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> Option<CheckpointRef> {
        self.state().roots.at
    }

    /// The delta becomes the frozen delta, which the next checkpoint takes in; a new one takes over. Look-ups see both.
    ///
    /// # Panics
    /// When there is a frozen delta: install or abandon it first.
    pub fn freeze(&self) {
        let mut state = self.state();
        assert!(state.frozen.is_none(), "one checkpoint at a time");
        let horizon = state.active.newest.max(state.active.horizon);
        let frozen = std::mem::replace(&mut state.active, Delta::new(horizon));
        state.frozen = Some(Arc::new(frozen));
        state.segments.freeze();
    }

    /// Merges the frozen delta into a new checkpoint and seals it, under names from `names`. Look-ups do not change. May be
    /// repeated after an error, or abandoned.
    ///
    /// # Errors
    /// A page cannot be read, a segment cannot be sealed, or the caller broke its promises; nothing has changed then.
    pub async fn build_checkpoint(
        &self,
        border: u64,
        names: &mut (dyn FnMut() -> SegmentName + Send),
    ) -> Result<CheckpointRef, IndexError> {
        let (built, at) = self.build(border, names).await?;
        self.state().built = Some(built);
        Ok(at)
    }

    /// The register accepted the checkpoint: look-ups use it, and the frozen delta goes.
    ///
    /// # Panics
    /// When none is built.
    pub fn install(&self) {
        let mut state = self.state();
        let Built { roots, list, dead } = state.built.take().expect("a checkpoint is built before it is installed");
        let border = roots.root.border;
        state.segments.install(border, &list, roots.segments.clone());
        let mut gone = list.dropped;
        gone.extend(dead);
        // Names of builds that came to nothing can go once they are decided.
        let orphans: Vec<_> = state
            .drawn
            .extract_if(.., |name| roots.segments.contains_key(&name.number) || name.number < border)
            .collect();
        gone.extend(orphans.into_iter().filter(|name| !roots.segments.contains_key(&name.number)));
        state.dead.extend(gone);
        state.roots = roots;
        state.frozen = None;
    }

    /// The build failed, or the checkpoint will not be registered: the frozen delta goes back under the newer one.
    pub fn abandon(&self) {
        let mut state = self.state();
        state.built = None;
        if let Some(frozen) = state.frozen.take() {
            let frozen = Arc::into_inner(frozen).expect("no build runs while its checkpoint is abandoned");
            state.active.merge_beneath(frozen);
        }
    }

    /// Names that the installed checkpoint decides and does not list. The caller deletes them once no read needs them (R5).
    #[must_use]
    pub fn take_dead(&self) -> Vec<SegmentName> {
        std::mem::take(&mut self.state().dead)
    }
}

/// Turns answers for single blocks into pieces.
fn pieces_of(range: BlockRange, found: &[Found], rest: &InDelta, pieces: &mut Vec<Piece>) {
    let mut open = rest.open.iter().peekable();
    let mut at = range.start.0;
    let end = range.end().0;
    while at < end {
        if let Some(&(start, end)) = open.next_if(|&&(start, _)| start == at) {
            pieces.push(Piece::InTrees { start, end });
            at = end;
            continue;
        }
        let stop = open.peek().map_or(end, |&&(start, _)| start);
        for block in at..stop {
            let hole = found[(block - range.start.0) as usize] == Found::Hole;
            match pieces.last_mut() {
                Some(Piece::Known { end, hole: last, .. }) if *end == block && *last == hole => *end += 1,
                _ => pieces.push(Piece::Known { start: block, end: block + 1, hole }),
            }
        }
        at = stop;
    }
}

async fn read_live_list(pages: &Pages, roots: &Roots) -> Result<Vec<LiveRow>, IndexError> {
    let reads = roots.root.live.iter().map(|live| async move {
        let page = pages.read(&roots.segments, &live.page, PageKind::Live, 0).await?;
        let sound = page.rows() == live.rows as usize && page.live_row(0)[0] == live.first;
        let offset = u64::from(live.page.offset) * PAGE_ALIGN;
        let wrong = IndexError::Page { number: live.page.number, offset, error: PageError::Content };
        if sound { Ok((0..page.rows()).map(|row| page.live_row(row)).collect::<Vec<_>>()) } else { Err(wrong) }
    });
    // Collected first: a stream over borrowing closures would not be `Send`.
    let reads: Vec<_> = reads.collect();
    let lists: Vec<Vec<LiveRow>> = futures::stream::iter(reads).buffered(LIVE_PAGES_AHEAD).try_collect().await?;
    let rows = lists.concat();
    let sorted = rows.is_sorted_by(|a, b| a[0] < b[0]);
    let at = roots.at.expect("a live list belongs to a root");
    let wrong = IndexError::Page { number: at.segment.number, offset: at.root_offset, error: PageError::Content };
    if sorted { Ok(rows) } else { Err(wrong) }
}
