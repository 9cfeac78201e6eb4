//! Memory for direct I/O: aligned, reference-counted, split without copying.
//!
//! A [`BufMut`] is the only handle on its bytes; [`BufMut::freeze`] turns it into a [`Buf`] that can be cloned and sliced
//! freely (like `bytes::Bytes`, but aligned to 4096 at its start). The same `Buf` goes to several devices at once without
//! a copy. Memory comes from a [`BufPool`]: an arena that the io_uring driver may register with the kernel, and above it
//! page-aligned heap memory that is kept for reuse up to a bound.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Bound, Deref, DerefMut, RangeBounds};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, Weak};

/// Alignment of every allocation.
pub const ALIGN: usize = 4096;

/// Bytes per allocation class, smallest first. Larger requests come straight from the heap.
pub const CLASSES: [usize; 4] = [4096, 64 << 10, 256 << 10, 1 << 20];

struct Region {
    start: NonNull<u8>,
    len: usize,
    /// Where the memory goes back to; `None` for heap memory outside every class.
    home: Weak<Shared>,
    in_arena: bool,
}

// SAFETY: a region is plain memory; who may touch which bytes is decided by `Buf` and `BufMut` (disjoint or read-only).
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            home.put_back(self.start, self.len, self.in_arena);
        } else if !self.in_arena {
            free(self.start, self.len);
        }
        // Arena memory always finds its pool alive: `Owner` holds it.
    }
}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len, ALIGN).expect("buffer size fits a layout")
}

fn allocate(len: usize) -> NonNull<u8> {
    // SAFETY: `len` is not zero (checked by the callers) and the layout is valid.
    let start = unsafe { alloc_zeroed(layout(len)) };
    NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout(len)))
}

fn free(start: NonNull<u8>, len: usize) {
    // SAFETY: `start` came from `allocate(len)` and nobody holds it any more.
    unsafe { dealloc(start.as_ptr(), layout(len)) }
}

struct FreeList {
    arena: Vec<NonNull<u8>>,
    heap: Vec<NonNull<u8>>,
}

struct Shared {
    arena: NonNull<u8>,
    arena_bytes: usize,
    free: [Mutex<FreeList>; CLASSES.len()],
    heap_keep: usize,
}

// SAFETY: the pointers are only handed out one owner at a time, under the mutexes.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn put_back(&self, start: NonNull<u8>, len: usize, in_arena: bool) {
        let class = CLASSES.iter().position(|&bytes| bytes == len).expect("pooled regions have a class size");
        let mut list = self.free[class].lock().expect("pool lock");
        if in_arena {
            list.arena.push(start);
        } else if (list.heap.len() + 1) * len <= self.heap_keep {
            list.heap.push(start);
        } else {
            drop(list);
            free(start, len);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for (list, len) in self.free.iter().zip(CLASSES) {
            for start in list.lock().expect("pool lock").heap.drain(..) {
                free(start, len);
            }
        }
        // Every buffer of the arena holds the pool (`Owner`), so none is left here.
        if self.arena_bytes > 0 {
            free(self.arena, self.arena_bytes);
        }
    }
}

/// Source of I/O memory; cheap to clone. The arena lives until the last handle *and* the last buffer from it are gone.
#[derive(Clone)]
pub struct BufPool(Arc<Shared>);

impl BufPool {
    /// A pool whose arena (registered with io_uring when the memlock limit allows) has about `arena_bytes`; 0 means heap
    /// only. At most `heap_keep` bytes of heap memory per class are kept for reuse.
    #[must_use]
    pub fn new(arena_bytes: usize, heap_keep: usize) -> Self {
        // Shares of the arena per class: reads and small records, footers and units, shard pieces, segment chunks.
        const SHARES: [usize; CLASSES.len()] = [1, 1, 2, 4];
        let eighth = arena_bytes / 8 / CLASSES[CLASSES.len() - 1] * CLASSES[CLASSES.len() - 1];
        let arena_bytes = eighth * 8;
        let arena = if arena_bytes > 0 { allocate(arena_bytes) } else { NonNull::dangling() };
        let mut offset = 0;
        let free = std::array::from_fn(|class| {
            let count = eighth * SHARES[class] / CLASSES[class];
            let arena = (0..count)
                .map(|i| {
                    // SAFETY: inside the arena: the shares add up to eight eighths.
                    unsafe { arena.add(offset + i * CLASSES[class]) }
                })
                .collect();
            offset += count * CLASSES[class];
            Mutex::new(FreeList { arena, heap: Vec::new() })
        });
        Self(Arc::new(Shared { arena, arena_bytes, free, heap_keep }))
    }

    /// Start and length of the arena, for registration with the kernel; `None` when there is none.
    #[must_use]
    pub fn arena(&self) -> Option<(NonNull<u8>, usize)> {
        (self.0.arena_bytes > 0).then_some((self.0.arena, self.0.arena_bytes))
    }

    /// A buffer of exactly `len` bytes with undefined (but initialised) content, aligned to 4096. Its memory is that of
    /// the smallest class that fits.
    #[must_use]
    pub fn get(&self, len: usize) -> BufMut {
        let Some(class) = CLASSES.iter().position(|&bytes| len <= bytes) else { return BufMut::heap(len) };
        let bytes = CLASSES[class];
        let (found, in_arena) = {
            let mut list = self.0.free[class].lock().expect("pool lock");
            match list.arena.pop() {
                Some(start) => (Some(start), true),
                None => (list.heap.pop(), false),
            }
        };
        let start = found.unwrap_or_else(|| allocate(bytes));
        let keep = in_arena.then(|| Arc::clone(&self.0));
        let region = Region { start, len: bytes, home: Arc::downgrade(&self.0), in_arena };
        BufMut { region: Arc::new(Owner { region, _arena: keep }), offset: 0, len }
    }

    /// Like [`BufPool::get`], filled with zeroes.
    #[must_use]
    pub fn get_zeroed(&self, len: usize) -> BufMut {
        let mut buf = self.get(len);
        buf.fill(0);
        buf
    }

    /// A pooled copy of `bytes`.
    #[must_use]
    pub fn copy_of(&self, bytes: &[u8]) -> Buf {
        let mut buf = self.get(bytes.len());
        buf.copy_from_slice(bytes);
        buf.freeze()
    }
}

/// A region and, for arena memory, the pool that must outlive it. Field order matters: the region goes back first.
struct Owner {
    region: Region,
    _arena: Option<Arc<Shared>>,
}

/// Bytes with one owner; writable.
pub struct BufMut {
    region: Arc<Owner>,
    offset: usize,
    len: usize,
}

impl BufMut {
    /// Page-aligned zeroed heap memory outside every pool.
    #[must_use]
    pub fn heap(len: usize) -> Self {
        let bytes = len.max(1);
        let region = Region { start: allocate(bytes), len: bytes, home: Weak::new(), in_arena: false };
        Self { region: Arc::new(Owner { region, _arena: None }), offset: 0, len }
    }

    /// Cuts off the first `at` bytes; both parts stay writable and never overlap.
    ///
    /// # Panics
    /// When `at` is beyond the end.
    #[must_use]
    pub fn split_to(&mut self, at: usize) -> BufMut {
        assert!(at <= self.len, "split inside the buffer");
        let head = BufMut { region: Arc::clone(&self.region), offset: self.offset, len: at };
        self.offset += at;
        self.len -= at;
        head
    }

    /// Drops everything behind `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes the bytes read-only and shareable.
    #[must_use]
    pub fn freeze(self) -> Buf {
        Buf { region: Some(self.region), offset: self.offset, len: self.len }
    }
}

impl Deref for BufMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the region, is initialised, and no other handle covers it (`split_to` cuts).
        unsafe { std::slice::from_raw_parts(self.region.region.start.as_ptr().add(self.offset), self.len) }
    }
}

impl DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.region.region.start.as_ptr().add(self.offset), self.len) }
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} bytes)", self.len)
    }
}

/// Read-only bytes with any number of owners.
#[derive(Clone, Default)]
pub struct Buf {
    region: Option<Arc<Owner>>,
    offset: usize,
    len: usize,
}

impl Buf {
    /// No bytes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A heap copy; for tests and small control data.
    #[must_use]
    pub fn copied(bytes: &[u8]) -> Self {
        let mut buf = BufMut::heap(bytes.len());
        buf.copy_from_slice(bytes);
        buf.freeze()
    }

    /// A part of this buffer, sharing its memory.
    ///
    /// # Panics
    /// When the range is not inside.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Buf {
        let from = match range.start_bound() {
            Bound::Included(&at) => at,
            Bound::Excluded(&at) => at + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(&at) => at + 1,
            Bound::Excluded(&at) => at,
            Bound::Unbounded => self.len,
        };
        assert!(from <= to && to <= self.len, "slice {from}..{to} of {} bytes", self.len);
        Buf { region: self.region.clone(), offset: self.offset + from, len: to - from }
    }

    /// Whether start and length are multiples of `sector`: what direct I/O asks of a buffer.
    #[must_use]
    pub fn is_aligned(&self, sector: usize) -> bool {
        (self.as_ptr() as usize).is_multiple_of(sector) && self.len.is_multiple_of(sector)
    }

    /// Gives the bytes back as writable if this is the only handle on their region; else the buffer itself.
    ///
    /// # Errors
    /// The unchanged buffer, when others share the region.
    pub fn try_into_mut(mut self) -> Result<BufMut, Buf> {
        match self.region.take() {
            Some(region) if Arc::strong_count(&region) == 1 => {
                Ok(BufMut { region, offset: self.offset, len: self.len })
            }
            region => Err(Buf { region, ..self }),
        }
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.region {
            // SAFETY: the range lies in the region, is initialised, and only read-only handles cover it.
            Some(owner) => unsafe {
                std::slice::from_raw_parts(owner.region.start.as_ptr().add(self.offset), self.len)
            },
            None => &[],
        }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufPool::new(8 << 20, 1 << 20);
        let (start, bytes) = pool.arena().expect("an arena");
        let first = pool.get(100).freeze();
        assert!((first.as_ptr() as usize).is_multiple_of(ALIGN));
        assert!((first.as_ptr() as usize) - (start.as_ptr() as usize) < bytes);
        let address = first.as_ptr() as usize;
        drop(first);
        assert_eq!(pool.get(4096).as_ptr() as usize, address, "the same memory is used again");
    }

    #[test]
    fn an_empty_class_falls_back_to_the_heap_and_a_buffer_outlives_its_pool() {
        let pool = BufPool::new(8 << 20, 1 << 20);
        let held: Vec<_> = (0..10).map(|_| pool.get(1 << 20)).collect();
        assert!(held.iter().all(|buf| (buf.as_ptr() as usize).is_multiple_of(ALIGN)));
        let mut buf = pool.get(5000);
        drop(pool);
        buf.fill(7);
        assert!(buf.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn splits_and_slices_share_memory_without_overlap() {
        let mut rest = BufMut::heap(100);
        let mut head = rest.split_to(40);
        head.fill(1);
        rest.fill(2);
        let (head, rest) = (head.freeze(), rest.freeze());
        assert_eq!((head.len(), rest.len()), (40, 60));
        assert!(head.iter().all(|&byte| byte == 1) && rest.iter().all(|&byte| byte == 2));
        assert_eq!(head.slice(10..=12).len(), 3);
        assert!(head.clone().try_into_mut().is_err());
    }
}
