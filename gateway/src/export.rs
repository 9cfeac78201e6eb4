//! What a gateway serves: the consumer's view of a volume.
//!
//! The gateway owns these traits; the composition root implements them over `lsm-block`. Operations take `self: &Self`,
//! start at the call (not at the first poll) in the order of the calls, and may complete in any order.

use std::sync::Arc;
use xsan_env::Buf;
use xsan_env::runtime::BoxFuture;

/// Errors a client can be told. Each maps to one NBD errno (docs/errors.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// EINVAL: the request breaks a rule (unaligned beyond what is allowed, outside the volume, unknown flag).
    #[error("invalid request")]
    Invalid,
    /// ENOSPC: no room left in the pool, or a write beyond the end of the volume.
    #[error("no space left")]
    NoSpace,
    /// ENOTSUP: a fast zero that would not be fast; nothing was changed.
    #[error("not supported")]
    NotSupported,
    /// EPERM: a write to a read-only export.
    #[error("read-only export")]
    ReadOnly,
    /// EIO: data could not be read or written within the time allowed, or no good copy of it is left.
    #[error("input/output error")]
    Io,
    /// ESHUTDOWN: the volume is closing.
    #[error("the volume is closing")]
    Shutdown,
    /// Another owner has the volume. The client is not answered: its connection ends, so that one that connects again
    /// sends the request again, to whoever serves the volume then.
    #[error("the volume has moved")]
    Moved,
}

/// Size, limits and capabilities of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Export name (the volume's name).
    pub name: String,
    /// Human description; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Smallest request granularity in bytes (512).
    pub block_min: u32,
    /// Best request granularity in bytes (4096).
    pub block_preferred: u32,
    /// Largest payload of a read or write in bytes (32 MiB).
    pub payload_max: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// A flush on one connection covers completed writes of all (P12).
    pub multi_conn: bool,
}

/// A piece of a read's answer; pieces follow each other without gaps from the request's offset.
#[derive(Clone, Debug)]
pub enum ReadPiece {
    /// Bytes.
    Data(Buf),
    /// So many zero bytes that are not stored.
    Hole(u64),
}

/// A run of the allocation map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes of the run.
    pub length: u64,
    /// Nothing is stored (and it reads as zeroes).
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// One connection's session on an export.
///
/// Offsets and lengths are bytes, already checked by the gateway to lie inside the size (as of [`Export::info`]) and to
/// be multiples of `block_min`. `fua`: the change is on stable media on every journal member when the future completes.
pub trait Export: Send + Sync + 'static {
    /// Identity of what is served, in this process: it stays the same under every name the export gets, and no other
    /// export ever has it. Clients are counted, cut and kept apart by it (P12); names are for finding and for people.
    fn key(&self) -> String;
    /// The client sends nothing more, and may be gone: what has not begun need not be.
    fn client_left(&self) {}
    /// Current description; cheap. The size grows on resize (clients learn it at their next connection).
    fn info(&self) -> ExportInfo;
    /// Reads `length` bytes.
    fn read(&self, offset: u64, length: u32) -> BoxFuture<'static, Result<Vec<ReadPiece>, ExportError>>;
    /// Writes `data`. Zero copy when its memory is aligned to 4096.
    fn write(&self, offset: u64, data: Buf, fua: bool) -> BoxFuture<'static, Result<(), ExportError>>;
    /// Completes when everything acknowledged before the call, over any connection, is on stable media.
    fn flush(&self) -> BoxFuture<'static, Result<(), ExportError>>;
    /// Discards; may round inward to whole blocks. Cheap for any length.
    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'static, Result<(), ExportError>>;
    /// Makes the range read as zeroes exactly. Cheap for any length. `no_hole`: the client wants space kept for it (a log allocates at
    /// write, so the wish is noted and nothing else).
    fn zero(&self, offset: u64, length: u64, fua: bool, no_hole: bool) -> BoxFuture<'static, Result<(), ExportError>>;
    /// Allocation map from `offset` for at most `length` bytes, at most `extents_max` runs (>= 1), in order, without gaps; may stop early.
    fn status(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'static, Result<Vec<StatusExtent>, ExportError>>;
}

/// How a client came in; decides multi-conn (P12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A unix socket: a dead client is noticed at once, multi-conn is on.
    Unix,
    /// TCP: multi-conn is opt-in.
    Tcp,
}

/// The exports a gateway offers.
pub trait Exports: Send + Sync + 'static {
    /// Names and descriptions, in order.
    fn list(&self) -> BoxFuture<'static, Vec<(String, String)>>;
    /// Looks an export up without serving it (NBD_OPT_INFO); `None` if there is none of that name.
    fn info(&self, name: &str, transport: Transport) -> BoxFuture<'static, Option<ExportInfo>>;
    /// Opens an export for serving: attaches the volume if it is not attached yet. Several opens share one volume.
    fn open(&self, name: &str, transport: Transport) -> BoxFuture<'static, Result<Arc<dyn Export>, OpenError>>;
}

/// Why an export was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No export of that name.
    #[error("no such export")]
    NotFound,
    /// It exists but cannot be served now, and why, for people.
    #[error("the export cannot be served now: {0}")]
    Unavailable(String),
}
