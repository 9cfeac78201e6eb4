//! Sealing (P6): from an open segment's memory to shards on every position, and the holes that are filled when a position
//! returns.

use super::journal::{Segment, Stage};
use super::shared::Shared;
use super::writer::{Event, Writer, new_name};
use crate::index::{Change, Place};
use crate::segment::{EntryKind, Footer, FooterEntry};
use crate::store::{Check, Holes, RowWriter, SegmentRead, StoreError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use xsan_env::Buf;
use xsan_types::{BLOCK_BYTES, Crc32c, SealedSegment, SegmentName, ShardIndex, crc32c};

/// How long to wait for nodes to come back before a seal is tried again, if no change is reported.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Pause between two looks at segments that miss positions.
const HOLES_RETRY_AFTER: Duration = Duration::from_secs(2);
/// Blocks read at once when rows are written elsewhere.
const EVACUATE_BLOCKS: usize = 256;

impl Writer {
    /// Starts the seal of everything that can be sealed.
    pub(super) fn start_seals(&mut self) {
        let ready: Vec<u64> = self.segments.iter().filter(|(_, s)| s.can_seal()).map(|(&n, _)| n).collect();
        for number in ready {
            let segment = self.segments.get_mut(&number).expect("just listed");
            if segment.end == 0 {
                self.segments.remove(&number);
                self.shared.open.lock().expect("open lock").remove(&number);
                continue;
            }
            segment.stage = Stage::Sealing;
            let (body, sealed) = sealed_body(&self.shared, segment);
            let shared = Arc::clone(&self.shared);
            self.spawn_seal(number, async move {
                match seal_until_done(&shared, sealed.name, &body).await {
                    Some(holes) => Event::ShardsWritten { number, sealed, holes, changes: Vec::new() },
                    None => Event::Nothing,
                }
            });
        }
        let ready: Vec<u64> = self.row_segments.iter().filter(|(_, s)| s.can_seal()).map(|(&n, _)| n).collect();
        for number in ready {
            self.seal_rows(number);
        }
    }

    fn seal_rows(&mut self, number: u64) {
        let rows = self.row_segments.get_mut(&number).expect("a row segment");
        rows.stage = Stage::Sealing;
        let footer = Footer {
            segment: rows.name,
            entries: std::mem::take(&mut rows.entries),
            crcs: std::mem::take(&mut rows.crcs),
        };
        let work = RowSeal {
            shared: Arc::clone(&self.shared),
            set: Arc::clone(&self.set),
            next_number: Arc::clone(&self.next_number),
            name: rows.name,
            rows_bytes: rows.rows * self.shared.store.data_shards() as u64 * xsan_types::UNIT_BYTES,
            writer: Arc::clone(&rows.writer),
            acknowledged: std::mem::take(&mut rows.acknowledged),
            footer,
        };
        let failed = rows.failed;
        self.spawn_seal(number, async move {
            match work.run(failed).await {
                Some((sealed, holes, changes)) => Event::ShardsWritten { number, sealed, holes, changes },
                None => Event::Nothing,
            }
        });
    }

    /// Seals run in their own tasks: they burn CPU.
    fn spawn_seal(&mut self, number: u64, work: impl Future<Output = Event> + Send + 'static) {
        let (done, event) = oneshot::channel();
        self.shared.env.spawn("volume-seal", async move {
            let _ = done.send(work.await);
        });
        self.events.push(Box::pin(async move {
            event.await.unwrap_or_else(|_| {
                tracing::error!(number, "a seal task ended without a result");
                Event::Nothing
            })
        }));
    }

    /// Fills holes, one segment after the other, from the first on.
    pub(super) fn look_after_holes(&mut self) {
        self.holes_after = 0;
        self.fill_next_hole();
    }

    pub(super) fn fill_next_hole(&mut self) {
        if self.filling_holes {
            return;
        }
        let Some(record) = self.shared.index.next_segment_with_holes(self.holes_after) else {
            if self.shared.index.hole_count() > 0 {
                // Nodes are still away, or something failed: another look later.
                self.filling_holes = true;
                let sleep = self.shared.env.sleep(HOLES_RETRY_AFTER);
                self.events.push(Box::pin(async move {
                    sleep.await;
                    Event::HolesAgain
                }));
            }
            return;
        };
        self.filling_holes = true;
        let (name, number) = (record.sealed.name, record.sealed.name.number);
        let fill = self.shared.store.fill_holes(name, record.sealed.bytes, Holes(record.holes.clone()));
        let asked = record.holes;
        self.events.push(Box::pin(async move { Event::HolesFilled { number, asked, holes: fill.await.ok() } }));
    }

    pub(super) fn holes_filled(&mut self, number: u64, asked: &[ShardIndex], holes: Option<Holes>) {
        self.filling_holes = false;
        self.holes_after = self.holes_after.max(number);
        if let (Some(holes), Some(record)) = (holes, self.shared.index.segment(number)) {
            tracing::debug!(volume = %self.shared.id, number, missing = holes.0.len(), "positions of a segment were filled");
            // Others may have been found missing meanwhile.
            let missing = record.holes.into_iter().filter(|hole| !asked.contains(hole) || holes.0.contains(hole));
            self.shared.index.set_holes(number, missing.collect());
        }
        self.fill_next_hole();
    }
}

/// Dense blocks, then the footer.
fn sealed_body(shared: &Shared, segment: &mut Segment) -> (Vec<Buf>, SealedSegment) {
    let mut body: Vec<Buf> = segment
        .records
        .iter()
        .filter(|record| record.bytes.len() > record.header_bytes as usize)
        .map(|record| record.bytes.slice(record.header_bytes as usize..))
        .collect();
    let footer = Footer {
        segment: segment.name,
        entries: std::mem::take(&mut segment.entries),
        crcs: std::mem::take(&mut segment.crcs),
    };
    let (tail, sealed) = encode_footer(shared, &footer);
    body.push(tail);
    (body, sealed)
}

/// The footer's bytes and the manifest line of a segment whose blocks it describes.
pub(super) fn encode_footer(shared: &Shared, footer: &Footer) -> (Buf, SealedSegment) {
    let bytes = footer.encode();
    let sealed = sealed_line(footer, &bytes);
    (shared.buffers.copy_of(&bytes), sealed)
}

/// The manifest line of a segment with this footer.
pub(super) fn sealed_line(footer: &Footer, bytes: &[u8]) -> SealedSegment {
    let footer_offset = footer.crcs.len() as u64 * BLOCK_BYTES;
    SealedSegment {
        name: footer.segment,
        bytes: footer_offset + bytes.len() as u64,
        footer_offset,
        footer_crc: crc32c(bytes),
        holes: 0,
    }
}

/// Writes a segment's shards; waits, for as long as it takes, while too few positions can be reached or there is no room:
/// its bytes are safe on the open replicas meanwhile.
/// `None`: the owner has stopped.
async fn seal_until_done(shared: &Shared, name: SegmentName, body: &[Buf]) -> Option<Holes> {
    loop {
        let mut changes = shared.store.changes();
        match shared.store.seal(name, body.to_vec()).await {
            Ok(holes) => return Some(holes),
            Err(_) if shared.health.borrow().is_final() => return None,
            Err(error) => {
                tracing::warn!(segment = %name, %error, "seal waits");
                shared.env.timeout(RETRY_AFTER, changes.changed()).await;
            }
        }
    }
}

/// The seal of a row segment.
struct RowSeal {
    shared: Arc<Shared>,
    set: Arc<super::shared::ServingSet>,
    next_number: Arc<std::sync::atomic::AtomicU64>,
    name: SegmentName,
    rows_bytes: u64,
    writer: Arc<dyn RowWriter>,
    acknowledged: Vec<Change>,
    footer: Footer,
}

impl RowSeal {
    /// `None`: the owner has stopped.
    async fn run(self, failed: bool) -> Option<(SealedSegment, Holes, Vec<Change>)> {
        if !failed {
            let (tail, sealed) = encode_footer(&self.shared, &self.footer);
            match self.writer.finish(tail).await {
                Ok(()) => return Some((sealed, Holes::default(), Vec::new())),
                Err(error) => tracing::warn!(segment = %self.name, %error, "finishing rows failed"),
            }
        }
        self.evacuate().await
    }

    /// Reads what is acknowledged back and seals it under a new name, versions kept. The old name is never listed; it is
    /// deleted when a registered checkpoint has decided it, not before: until the new name stands in the manifests, a
    /// taker needs the rows (P7).
    async fn evacuate(self) -> Option<(SealedSegment, Holes, Vec<Change>)> {
        let name = new_name(&self.shared, &self.next_number, &self.set);
        let mut footer = Footer { segment: name, entries: Vec::new(), crcs: Vec::new() };
        let mut body = Vec::new();
        let mut changes = Vec::new();
        let blocks: Vec<_> = self
            .acknowledged
            .iter()
            .filter_map(|change| match change {
                Change::Data { lba, version, place } => Some((*lba, *version, *place)),
                Change::Zero { .. } => None,
            })
            .collect();
        for chunk in blocks.chunk_by(|a, b| a.2.position + 1 == b.2.position).flat_map(|c| c.chunks(EVACUATE_BLOCKS)) {
            let crcs: Vec<Crc32c> = chunk.iter().map(|block| block.2.crc).collect();
            body.push(self.read_rows(chunk[0].2.position, crcs).await?);
            for (lba, version, place) in chunk {
                let position = footer.crcs.len() as u32;
                footer.crcs.push(place.crc);
                footer.entries.push(FooterEntry { kind: EntryKind::Data, lba: *lba, count: 1, version: *version });
                let place = Place { number: name.number, position, crc: place.crc };
                changes.push(Change::Data { lba: *lba, version: *version, place });
            }
        }
        let (tail, sealed) = encode_footer(&self.shared, &footer);
        body.push(tail);
        let holes = seal_until_done(&self.shared, name, &body).await?;
        Some((sealed, holes, changes))
    }

    async fn read_rows(&self, position: u32, crcs: Vec<Crc32c>) -> Option<Buf> {
        loop {
            let mut changes = self.shared.store.changes();
            let read = SegmentRead {
                segment: self.name,
                segment_bytes: self.rows_bytes,
                offset: u64::from(position) * BLOCK_BYTES,
                length: crcs.len() as u32 * BLOCK_BYTES as u32,
                check: Check::Blocks(crcs.clone()),
            };
            match self.shared.store.read(read).await {
                Ok(bytes) => return Some(bytes),
                Err(_) if self.shared.health.borrow().is_final() => return None,
                Err(error) => {
                    if let StoreError::Corrupt { .. } = error {
                        tracing::error!(segment = %self.name, %error, "rows are damaged");
                    }
                    self.shared.env.timeout(RETRY_AFTER, changes.changed()).await;
                }
            }
        }
    }
}
