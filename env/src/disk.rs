//! Disks: what the node reads and writes. Backends: `uring`, `threads` (pwrite), `memory` (with faults).

use crate::buf::{Buf, BufMut};
use crate::error::EnvError;
use std::future::Future;
use std::io;
use std::pin::Pin;

/// A started I/O. The operation runs whether or not it is polled; dropping it does not cancel it (the driver keeps the
/// buffers until the kernel is done).
pub type IoFuture<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

/// Size and alignment of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk, a multiple of `sector`.
    pub bytes: u64,
    /// Logical sector: offsets and lengths of every request are multiples of it (512 or 4096).
    pub sector: u32,
}

/// A file or block device under direct I/O.
///
/// Offsets and lengths are multiples of the sector; buffers are aligned to it. Requests may complete in any order. A
/// completed write survives a crash of the process; it survives power loss only after a flush that *began* after it
/// completed has returned. After a failed flush the disk is poisoned: every later write and flush fails (a retry of a failed
/// flush may lie).
pub trait Disk: Send + Sync + 'static {
    /// Size and alignment.
    fn geometry(&self) -> Geometry;
    /// Which attachment of the medium to its host this is, among those since the host's boot. Under another number than before its
    /// own cache may have been lost, as by a power loss of the host: it was unplugged. 0 where that is not told.
    fn attachment(&self) -> u64;
    /// Fills `into` (its whole length) from `offset`.
    fn read(&self, offset: u64, into: BufMut) -> IoFuture<BufMut>;
    /// Writes all of `data` at `offset`.
    fn write(&self, offset: u64, data: Buf) -> IoFuture<()>;
    /// Writes the concatenation of `data` at `offset` (each piece sector-aligned in memory and length).
    fn write_vectored(&self, offset: u64, data: Vec<Buf>) -> IoFuture<()>;
    /// Makes everything that completed before the call stable.
    fn flush(&self) -> IoFuture<()>;
    /// Tells the disk that the range is unused; its content is undefined afterwards. Best effort.
    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<()>;
}

impl Geometry {
    /// Whether a request lies inside the disk and on sector boundaries, with buffers direct I/O takes. Requests of no
    /// bytes are refused as well: they are a mistake of the caller.
    pub(crate) fn check<'a>(
        &self,
        operation: &'static str,
        offset: u64,
        bytes: u64,
        mut pieces: impl Iterator<Item = &'a [u8]>,
    ) -> io::Result<()> {
        let sector = self.sector as usize;
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        let whole = offset.is_multiple_of(u64::from(self.sector)) && bytes.is_multiple_of(u64::from(self.sector));
        let aligned =
            pieces.all(|piece| (piece.as_ptr() as usize).is_multiple_of(sector) && piece.len().is_multiple_of(sector));
        if bytes > 0 && inside && whole && aligned {
            return Ok(());
        }
        let (disk_bytes, sector) = (self.bytes, self.sector);
        Err(EnvError::Refused { operation, offset, bytes, disk_bytes, sector }.into_io())
    }
}

/// An I/O that is over already.
pub(crate) fn ready<T: Send + 'static>(result: io::Result<T>) -> IoFuture<T> {
    Box::pin(std::future::ready(result))
}
