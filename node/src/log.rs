//! The device log: frames in one half of the log region, a fresh snapshot in the other when it is full.

use crate::error::NodeOpenError;
use crate::format::{Frame, LogRecord, SUPERBLOCK_OFFSETS, Superblock, Unreadable};
use std::io;
use std::sync::Arc;
use xsan_env::{BufPool, Disk};

/// Bytes of one frame of a snapshot at most, about.
const SNAPSHOT_RECORDS: usize = 256;

/// Writes frames; owned behind an async mutex, one writer at a time.
pub(crate) struct Log {
    disk: Arc<dyn Disk>,
    buffers: BufPool,
    pub(crate) superblock: Superblock,
    /// Next byte in the half.
    position: u64,
    /// Next frame.
    sequence: u64,
}

/// What a log held.
pub(crate) struct Replay {
    pub(crate) log: Log,
    pub(crate) records: Vec<LogRecord>,
}

impl Log {
    /// Reads the active half back.
    pub(crate) async fn open(
        disk: Arc<dyn Disk>,
        buffers: BufPool,
        superblock: Superblock,
    ) -> Result<Replay, NodeOpenError> {
        let bytes = superblock.log_half_bytes;
        let half = superblock.half_offset(superblock.active_half);
        let io = |source| NodeOpenError::Io { device: superblock.device, source };
        let image = disk.read(half, buffers.get(bytes as usize)).await.map_err(io)?;
        let mut records = Vec::new();
        let (mut position, mut sequence) = (0usize, 0u64);
        while position < image.len() {
            match Frame::decode(&image[position..], superblock.device, superblock.log_epoch, superblock.sector) {
                Ok((frame, length)) if frame.sequence == sequence => {
                    records.extend(frame.records);
                    position += length;
                    sequence += 1;
                }
                Err(Unreadable::Version(version)) => {
                    return Err(NodeOpenError::Version { device: superblock.device, version });
                }
                _ => break,
            }
        }
        // A later frame that says this one was flushed: not a torn tail but damage.
        let sector = superblock.sector as usize;
        for at in (position..image.len()).step_by(sector) {
            let frame = Frame::decode(&image[at..], superblock.device, superblock.log_epoch, superblock.sector);
            if let Ok((frame, _)) = frame
                && frame.flushed > sequence
            {
                return Err(NodeOpenError::LogDamaged { device: superblock.device, offset: half + position as u64 });
            }
        }
        let log = Self { disk, buffers, superblock, position: position as u64, sequence };
        Ok(Replay { log, records })
    }

    /// A log of a new device, not written yet.
    pub(crate) fn fresh(disk: Arc<dyn Disk>, buffers: BufPool, superblock: Superblock) -> Self {
        Self { disk, buffers, superblock, position: 0, sequence: 0 }
    }

    /// Grows with every half begun.
    pub(crate) fn epoch(&self) -> u64 {
        self.superblock.log_epoch
    }

    /// Frames written so far.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Writes records as one frame. `false`: the half is full, the caller flips first.
    pub(crate) async fn append(&mut self, records: Vec<LogRecord>, flushed: u64) -> io::Result<bool> {
        let sb = &self.superblock;
        let bytes = Frame { sequence: self.sequence, flushed, records }.encode(sb.device, sb.log_epoch, sb.sector);
        if self.position + bytes.len() as u64 > sb.log_half_bytes {
            return Ok(false);
        }
        let offset = sb.half_offset(sb.active_half) + self.position;
        self.disk.write(offset, self.buffers.copy_of(&bytes)).await?;
        self.position += bytes.len() as u64;
        self.sequence += 1;
        Ok(true)
    }

    /// Goes over to the other half: snapshot, flush, superblocks, flush. A crash in between leaves the old half valid.
    pub(crate) async fn flip(&mut self, snapshot: &[LogRecord]) -> io::Result<()> {
        let mut next = self.superblock;
        next.active_half ^= 1;
        next.log_epoch += 1;
        let mut fresh = Self::fresh(Arc::clone(&self.disk), self.buffers.clone(), next);
        for records in snapshot.chunks(SNAPSHOT_RECORDS) {
            if !fresh.append(records.to_vec(), 0).await? {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "the device log is too small for the state"));
            }
        }
        self.disk.flush().await?;
        write_superblocks(&self.disk, &self.buffers, &next).await?;
        *self = fresh;
        Ok(())
    }
}

/// Writes both copies, each flushed before the next: one is whole at any moment.
pub(crate) async fn write_superblocks(disk: &Arc<dyn Disk>, buffers: &BufPool, block: &Superblock) -> io::Result<()> {
    for offset in SUPERBLOCK_OFFSETS {
        disk.write(offset, buffers.copy_of(&block.encode())).await?;
        disk.flush().await?;
    }
    Ok(())
}

/// The newest readable superblock.
pub(crate) async fn read_superblock(
    disk: &Arc<dyn Disk>,
    buffers: &BufPool,
) -> io::Result<Result<Superblock, Unreadable>> {
    let bytes = disk.geometry().bytes;
    let mut best: Result<Superblock, Unreadable> = Err(Unreadable::Absent);
    for offset in SUPERBLOCK_OFFSETS {
        if offset + 4096 > bytes {
            continue;
        }
        let image = match disk.read(offset, buffers.get(4096)).await {
            Ok(image) => image,
            Err(error) if best.is_err() && offset == SUPERBLOCK_OFFSETS[1] => return Err(error),
            Err(_) => continue,
        };
        match Superblock::decode(&image) {
            Ok(block) if !block.is_sound(bytes) => best = best.or(Err(Unreadable::Damaged)),
            Ok(block) => match &best {
                Ok(known) if known.log_epoch >= block.log_epoch => {}
                _ => best = Ok(block),
            },
            Err(why) => {
                if best == Err(Unreadable::Absent) {
                    best = Err(why);
                }
            }
        }
    }
    Ok(best)
}
