//! Large writes (P9): row segments, their failures, and what a flush must name of them.

use super::batch::ROWS_BLOCKS_MAX;
use super::journal::{RowSegment, Stage};
use super::shared::OpenSegment;
use super::writer::{Event, Writer};
use crate::index::Change;
use crate::segment::footer::footer_bytes;
use crate::store::{RowWriter, StoreError};
use std::sync::Arc;
use xsan_types::{FlushRequest, SegmentName, UNIT_BYTES};

impl Writer {
    fn row_bytes(&self) -> u64 {
        self.shared.store.data_shards() as u64 * UNIT_BYTES
    }

    /// Rows that fit a segment together with the largest footer they can have.
    fn rows_max(&self) -> u64 {
        let row_blocks = (self.row_bytes() / xsan_types::BLOCK_BYTES) as usize;
        let mut rows = self.shared.tuning.segment_bytes / self.row_bytes();
        while rows > 1 {
            let blocks = rows as usize * row_blocks;
            // One entry a unit at worst: smaller writes do not go by rows, except for the pieces that rows cut.
            let footer = footer_bytes(blocks / 8, blocks) as u64;
            if rows * self.row_bytes() + footer <= self.shared.tuning.segment_bytes {
                break;
            }
            rows -= 1;
        }
        rows
    }

    /// Rows the open row segment still takes.
    pub(super) fn rows_room(&self) -> u64 {
        let open = self.rows.and_then(|number| self.row_segments.get(&number));
        open.map_or(0, |rows| self.rows_max().saturating_sub(rows.rows))
    }

    /// Whether rows can be written now; asks for a row segment when there is none, and for the next one before the open one is full.
    pub(super) fn rows_ready(&mut self) -> bool {
        if !self.shared.store.rows_possible() {
            return false;
        }
        if self.rows_room() == 0 {
            self.next_rows();
        }
        // What crosses the end of the open segment goes on in the next one, and not through the journal.
        let crossing = self.rows_room() * self.row_bytes() / xsan_types::BLOCK_BYTES <= ROWS_BLOCKS_MAX as u64;
        let wanted = self.rows.is_none() || (crossing && self.rows_ahead.is_none());
        if wanted && !self.rows_opening {
            self.open_rows();
        }
        self.rows.is_some()
    }

    /// Freezes the open row segment; the one opened ahead takes its place.
    pub(super) fn next_rows(&mut self) {
        self.freeze_rows();
        self.rows = self.rows_ahead.take();
        if let Some(number) = self.rows {
            self.publish_rows(number);
        }
    }

    fn open_rows(&mut self) {
        self.rows_opening = true;
        let name = self.new_name();
        let open = self.shared.store.open_rows(name);
        self.events.push(Box::pin(async move { Event::RowsOpened { name, result: open.await } }));
    }

    pub(super) fn rows_opened(&mut self, name: SegmentName, result: Result<Arc<dyn RowWriter>, StoreError>) {
        self.rows_opening = false;
        // Without rows large writes go through the journal: nothing to report.
        let Ok(writer) = result else { return };
        if name.number < self.cut {
            // A checkpoint cut the log meanwhile and does not know this name: a taker would not look at it.
            return;
        }
        let segment = RowSegment {
            name,
            writer,
            rows: 0,
            entries: Vec::new(),
            crcs: Vec::new(),
            acknowledged: Vec::new(),
            dirty: false,
            pending: 0,
            frozen: false,
            failed: false,
            stage: Stage::Open,
        };
        self.row_segments.insert(name.number, segment);
        if self.rows.is_some() {
            self.rows_ahead = Some(name.number);
        } else {
            self.rows = Some(name.number);
            self.publish_rows(name.number);
        }
    }

    /// Readers learn how far the rows reach.
    pub(super) fn publish_rows(&self, number: u64) {
        let Some(rows) = self.row_segments.get(&number) else { return };
        let open = OpenSegment::Rows { name: rows.name, segment_bytes: rows.rows * self.row_bytes() };
        self.shared.open.lock().expect("open lock").insert(number, open);
    }

    /// Freezes the open row segment and forgets the one opened ahead: later rows get a name that is given from now on.
    pub(super) fn rotate_rows(&mut self) {
        self.freeze_rows();
        if let Some(number) = self.rows_ahead.take() {
            self.forget_unused(number);
        }
    }

    fn freeze_rows(&mut self) {
        let Some(number) = self.rows.take() else { return };
        if !self.forget_unused(number) {
            self.row_segments.get_mut(&number).expect("the open row segment").frozen = true;
        }
    }

    /// Forgets a row segment to which nothing was ever written: its name is simply never used.
    fn forget_unused(&mut self, number: u64) -> bool {
        let unused = self.row_segments.get(&number).is_some_and(|rows| rows.rows == 0);
        if unused {
            self.row_segments.remove(&number);
            self.shared.open.lock().expect("open lock").remove(&number);
        }
        unused
    }

    pub(super) fn rows_written(&mut self, batch: u64, result: Result<(), StoreError>) {
        let Some(index) = self.in_flight.iter().position(|waiting| waiting.id == batch) else { return };
        match result {
            Ok(()) => {
                if let Some(rows) = &mut self.in_flight[index].rows {
                    rows.written = Some(self.shared.env.now());
                }
                // Opened ahead, so that the next large write finds rows ready.
                if self.rows.is_some() && self.rows_room() == 0 {
                    self.rows_ready();
                }
            }
            Err(error) => {
                tracing::warn!(volume = %self.shared.id, %error, "a row write failed");
                if let Some(rows) = &self.in_flight[index].rows {
                    let number = rows.number;
                    self.fail_row_segment(number);
                }
            }
        }
    }

    pub(super) fn rows_acknowledged(&mut self, number: u64, changes: &[Change]) {
        if let Some(rows) = self.row_segments.get_mut(&number) {
            rows.pending -= 1;
            rows.dirty = true;
            rows.acknowledged.extend_from_slice(changes);
        }
    }

    /// A device of a row segment did not flush. What the round marked clean is not stable: a flush waits until it is sealed
    /// elsewhere.
    pub(super) fn row_flush_failed(&mut self) {
        for rows in self.row_segments.values_mut().filter(|rows| !matches!(rows.stage, Stage::Manifest { .. })) {
            rows.dirty = true;
            // A seal that runs ends well, flushed, or evacuates.
            rows.failed |= matches!(rows.stage, Stage::Sealing);
        }
        self.fail_rows();
    }

    /// Gives up every row segment that is still being written: a device of one of them failed.
    fn fail_rows(&mut self) {
        if let Some(number) = self.rows_ahead.take() {
            self.forget_unused(number);
        }
        let open: Vec<u64> =
            self.row_segments.iter().filter(|(_, rows)| matches!(rows.stage, Stage::Open)).map(|(&n, _)| n).collect();
        for number in open {
            self.fail_row_segment(number);
        }
    }

    /// A row segment takes no more: what is acknowledged in it is sealed elsewhere, what is not goes to the journal.
    fn fail_row_segment(&mut self, number: u64) {
        let Some(rows) = self.row_segments.get_mut(&number) else { return };
        if rows.failed || !matches!(rows.stage, Stage::Open) {
            return;
        }
        rows.failed = true;
        rows.frozen = true;
        rows.pending = 0;
        if self.rows == Some(number) {
            self.rows = None;
        }
        while let Some(index) =
            self.in_flight.iter().position(|batch| batch.rows.as_ref().is_some_and(|rows| rows.number == number))
        {
            self.rejournal(index);
        }
    }

    /// Device flushes that make acknowledged rows stable, one per device. Marks them clean: a later acknowledgement makes
    /// them dirty again.
    pub(super) fn row_flush_requests(&mut self) -> Vec<FlushRequest> {
        let mut requests: Vec<FlushRequest> = Vec::new();
        for rows in self.row_segments.values_mut() {
            if !rows.dirty || rows.failed || matches!(rows.stage, Stage::Manifest { .. }) {
                continue;
            }
            rows.dirty = false;
            for request in rows.writer.flush_requests() {
                let same = |other: &&mut FlushRequest| {
                    (other.device, other.incarnation) == (request.device, request.incarnation)
                };
                match requests.iter_mut().find(same) {
                    Some(other) => other.shards.extend(request.shards),
                    None => requests.push(request),
                }
            }
        }
        requests
    }
}
