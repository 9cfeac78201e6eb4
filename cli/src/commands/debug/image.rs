//! A device opened for reading only.

use super::{Failure, unreadable};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xsan_node::format::{Extent, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS, Superblock};

/// A device opened for reading.
pub(super) struct Image {
    pub(super) path: PathBuf,
    file: File,
    bytes: u64,
}

impl Image {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        use std::io::{Seek, SeekFrom};
        let failed = |error| unreadable(path, &error);
        let mut file = File::open(path).map_err(failed)?;
        // A block device has no length of its own in its metadata.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// `bytes` from `offset`; fewer at the end of the device.
    pub(super) fn read(&self, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let bytes = bytes.min(self.bytes.saturating_sub(offset));
        let mut out = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.file.read_exact_at(&mut out, offset)?;
        Ok(out)
    }

    pub(super) fn copy(&self, offset: u64) -> Result<Superblock, String> {
        let bytes = self.read(offset, SUPERBLOCK_BYTES as u64).map_err(|error| error.to_string())?;
        let block = Superblock::decode(&bytes).map_err(|error| error.to_string())?;
        if block.is_sound(self.bytes) { Ok(block) } else { Err(format!("numbers make no sense here: {block:?}")) }
    }

    /// The copy that counts.
    pub(super) fn superblock(&self) -> Option<Superblock> {
        let mut best: Option<Superblock> = None;
        for block in SUPERBLOCK_OFFSETS.into_iter().filter_map(|offset| self.copy(offset).ok()) {
            if best.is_none_or(|known| known.log_epoch < block.log_epoch) {
                best = Some(block);
            }
        }
        best
    }

    pub(super) fn superblock_or_refuse(&self) -> Result<Superblock, Failure> {
        self.superblock().ok_or_else(|| {
            let next = format!("see why: `xsan debug device {}`", self.path.display());
            Failure::Usage(format!("{} has no readable superblock", self.path.display()), Some(next))
        })
    }

    /// A range of bytes that lie over extents; fewer where they end.
    pub(super) fn read_over(&self, extents: &[Extent], offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let (mut skip, mut left, mut out) = (offset, bytes, Vec::new());
        for extent in extents {
            if skip >= extent.bytes {
                skip -= extent.bytes;
                continue;
            }
            let here = (extent.bytes - skip).min(left);
            let at = extent.offset.checked_add(skip).ok_or(io::ErrorKind::InvalidData)?;
            let read = self.read(at, here)?;
            let short = (read.len() as u64) < here;
            out.extend(read);
            left -= here;
            skip = 0;
            if left == 0 || short {
                break;
            }
        }
        Ok(out)
    }
}
