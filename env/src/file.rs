//! Small files for metadata: replaced atomically or appended to. Everything large goes to a [`crate::Disk`].
//!
//! Two implementations with one meaning: [`OsDirectory`] (through the world's blocking pool) and [`MemoryDirectory`]
//! (with crashes and failing operations).

mod memory;
mod os;

pub use memory::{FaultAt, MemoryDirectory};
pub use os::{OsDirectory, free_bytes};

use crate::error::EnvError;
use crate::runtime::BoxFuture;
use std::io;

/// Longest file name, in bytes.
pub const NAME_BYTES_MAX: usize = 200;

/// A flat directory of small files.
///
/// Names are not empty, do not start with a dot, hold no `/` or NUL and at most [`NAME_BYTES_MAX`] bytes. What returned
/// `Ok` from `replace_atomic`, `remove` and (as far as the file's existence goes) `append` survives power loss. What
/// returned an error may or may not have happened, as a whole.
pub trait Directory: Send + Sync + 'static {
    /// The whole content; `None` when there is no such file.
    fn read(&self, name: &str) -> BoxFuture<'static, io::Result<Option<Vec<u8>>>>;
    /// Puts `bytes` in place of the file's content (or makes it), durably: after a crash at any moment the file holds
    /// either the old or the new content.
    fn replace_atomic(&self, name: &str, bytes: Vec<u8>) -> BoxFuture<'static, io::Result<()>>;
    /// Opens a file for appending, made (durably, empty) when it does not exist. At most one handle at a time per file.
    fn append(&self, name: &str) -> BoxFuture<'static, io::Result<Box<dyn AppendFile>>>;
    /// Removes a file durably; fine when there is none.
    fn remove(&self, name: &str) -> BoxFuture<'static, io::Result<()>>;
    /// All names, sorted.
    fn list(&self) -> BoxFuture<'static, io::Result<Vec<String>>>;
}

/// A file that grows at its end.
///
/// A failed `append` leaves the file as it was (cut back) or poisons the handle. A failed `sync` poisons it for good: later calls
/// fail (a repeated fsync may lie). A call whose future was dropped before its end poisons it, too: nobody knows how
/// far it got.
pub trait AppendFile: Send + 'static {
    /// Adds `bytes` at the end; survives a crash of the process when answered, power loss after the next `sync`.
    fn append(&mut self, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>>;
    /// Makes everything appended or truncated so far stable.
    fn sync(&mut self) -> BoxFuture<'_, io::Result<()>>;
    /// Cuts the file to `bytes` (not more than its length); stable after the next `sync`.
    fn truncate(&mut self, bytes: u64) -> BoxFuture<'_, io::Result<()>>;
    /// Length, as far as answered calls made it.
    fn bytes(&self) -> u64;
}

fn check_name(name: &str) -> io::Result<()> {
    let bad = name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) || name.len() > NAME_BYTES_MAX;
    if bad { Err(EnvError::Name(name.to_owned()).into_io()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
