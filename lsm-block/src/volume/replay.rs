//! Reads the records of an open replica back (P10, step 4): each record from the first member that has it whole; the log
//! ends where none has.

use super::VolumeConfig;
use crate::error::VolumeError;
use crate::segment::{RecordError, RecordHeader};
use crate::store::StoreError;
use xsan_env::Buf;
use xsan_types::{BLOCK_BYTES, DeviceId, ErrorKind, SegmentName, SetId, crc32c};

/// Bytes read ahead from a member.
const WINDOW_BYTES: u64 = 2 << 20;

/// A closed member's replica.
pub(super) struct Source {
    pub device: DeviceId,
    pub set: SetId,
    /// Bytes that may hold records.
    pub length: u64,
    /// Bytes that surely hold records.
    pub complete: u64,
}

/// A verified record.
pub(super) struct Replayed {
    pub header: RecordHeader,
    /// Its inline blocks; empty for rows.
    pub data: Buf,
}

/// Walks the records of one segment.
pub(super) struct Scan<'a> {
    config: &'a VolumeConfig,
    segment: SegmentName,
    sources: Vec<(Source, Window)>,
    offset: u64,
}

/// What was last read of a source.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Buf,
}

impl<'a> Scan<'a> {
    pub(super) fn new(config: &'a VolumeConfig, segment: SegmentName, sources: Vec<Source>) -> Self {
        let sources = sources.into_iter().map(|source| (source, Window::default())).collect();
        Self { config, segment, sources, offset: 0 }
    }

    /// The next record; `None` at the end of the log.
    pub(super) async fn next(&mut self) -> Result<Option<Replayed>, VolumeError> {
        let mut away = None;
        for source in 0..self.sources.len() {
            match self.record_from(source).await {
                Ok(Some(record)) => {
                    self.offset += record.header.record_bytes();
                    return Ok(Some(record));
                }
                Ok(None) => {}
                Err(error) => away = Some(error),
            }
        }
        // The log ends only where every source was asked: one that does not answer now may hold the next record.
        if let Some(error) = away {
            return Err(error);
        }
        // Nor does it end before what a member knows that it has written: that is damage.
        let complete = self.sources.iter().map(|(source, _)| source.complete).max();
        if complete.is_some_and(|complete| self.offset < complete) {
            return Err(VolumeError::ReplicaDamaged { segment: self.segment, offset: self.offset });
        }
        Ok(None)
    }

    /// The record at the current offset, if this source has it whole.
    async fn record_from(&mut self, source: usize) -> Result<Option<Replayed>, VolumeError> {
        let Some(first) = self.bytes(source, self.offset, 512).await? else { return Ok(None) };
        let Some(header_bytes) = RecordHeader::peek_header_bytes(&first) else { return Ok(None) };
        let Some(header) = self.bytes(source, self.offset, header_bytes as u64).await? else { return Ok(None) };
        let header = match RecordHeader::parse(&header, self.segment, self.offset) {
            Ok(header) => header,
            Err(RecordError::Absent) => return Ok(None),
            Err(error @ RecordError::Version(_)) => {
                tracing::error!(segment = %self.segment, %error, "refusing to recover over a newer format");
                return Err(VolumeError::Store(StoreError::Internal));
            }
        };
        let start = self.offset + u64::from(header.header_bytes);
        let length = u64::from(header.inline_blocks()) * BLOCK_BYTES;
        if length == 0 {
            return Ok(Some(Replayed { header, data: Buf::new() }));
        }
        let Some(data) = self.bytes(source, start, length).await? else { return Ok(None) };
        let whole = data.chunks(BLOCK_BYTES as usize).zip(&header.crcs).all(|(block, &crc)| crc32c(block) == crc);
        Ok(whole.then_some(Replayed { header, data }))
    }

    /// Bytes of a source; `None` if it does not have them.
    async fn bytes(&mut self, source: usize, offset: u64, length: u64) -> Result<Option<Buf>, VolumeError> {
        let (at, window) = &mut self.sources[source];
        let inside = offset >= window.start && offset + length <= window.start + window.bytes.len() as u64;
        if !inside {
            if offset + length > at.length {
                return Ok(None);
            }
            let ahead = WINDOW_BYTES.max(length).min(at.length - offset);
            let read = |bytes: u64| {
                let (volume, segment) = (self.segment.volume, self.segment);
                self.config.store.read_replica(at.device, volume, at.set, segment, offset, bytes as u32)
            };
            let mut answer = read(ahead).await;
            if answer.as_ref().is_err_and(|error| error.kind() != ErrorKind::Unavailable) && ahead > length {
                // A bad sector further on must not hide what is wanted now. (Nodes read whole sectors, of 4 KiB at most.)
                answer = read(length.next_multiple_of(BLOCK_BYTES).min(ahead)).await;
            }
            match answer {
                Ok(bytes) => *window = Window { start: offset, bytes },
                Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NotFound) => {
                    return Err(VolumeError::ReplicaGone { device: at.device, segment: self.segment });
                }
                Err(error) => {
                    // Damaged there: another member may have it.
                    tracing::warn!(segment = %self.segment, device = %at.device, offset, %error, "a replica cannot be read");
                    return Ok(None);
                }
            }
        }
        let (_, window) = &self.sources[source];
        let from = (offset - window.start) as usize;
        Ok((from + length as usize <= window.bytes.len()).then(|| window.bytes.slice(from..from + length as usize)))
    }
}
