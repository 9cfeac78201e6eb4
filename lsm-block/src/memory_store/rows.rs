//! Segments written by rows (P9), in memory.

use super::MemoryStore;
use super::devices::State;
use crate::store::{RowWriter, SegmentRead, StoreError, StoreResult};
use std::collections::BTreeMap;
use std::sync::Mutex;
use xsan_env::Buf;
use xsan_types::{DeviceId, FlushRequest, Incarnation, SegmentName, ShardId, UNIT_BYTES};

/// One position: rows it has from 0 on, and how many of them are flushed. `None`: lost.
struct Position {
    device: DeviceId,
    incarnation: Incarnation,
    rows: u64,
    flushed: u64,
    lost: bool,
}

/// An open row segment.
pub(super) struct RowSegment {
    positions: Vec<Position>,
    /// Rows whose append has taken effect, by first row.
    parts: BTreeMap<u64, Buf>,
}

impl RowSegment {
    pub(super) fn flush(&mut self, device: DeviceId) {
        for position in self.positions.iter_mut().filter(|position| position.device == device) {
            position.flushed = position.rows;
        }
    }

    pub(super) fn power_loss(&mut self, device: DeviceId) {
        for position in self.positions.iter_mut().filter(|position| position.device == device) {
            position.rows = position.flushed;
        }
    }

    pub(super) fn lose(&mut self, device: DeviceId) {
        for position in self.positions.iter_mut().filter(|position| position.device == device) {
            position.lost = true;
        }
    }

    /// Rows from 0 on that have taken effect.
    fn contiguous(&self, row_bytes: u64) -> u64 {
        let mut reached = 0;
        for (&first, data) in &self.parts {
            if first != reached {
                break;
            }
            reached += data.len() as u64 / row_bytes;
        }
        reached
    }
}

impl State {
    pub(super) fn row_bytes(&self) -> u64 {
        self.scheme.k() as u64 * UNIT_BYTES
    }

    pub(super) fn open_rows(&mut self, segment: SegmentName) -> Result<(), StoreError> {
        assert!(self.scheme.k() > 1, "rows need at least two data shards");
        assert!(!self.sealed_names.contains_key(&segment), "{segment} is used twice");
        let found = self.positions_up(segment.pg.index);
        let needed = self.scheme.width();
        if found < needed {
            return Err(StoreError::TooFew { found, needed });
        }
        let positions = self.positions(segment.pg.index).into_iter();
        let positions = positions
            .map(|device| Position {
                device,
                incarnation: self.device(device).incarnation,
                rows: 0,
                flushed: 0,
                lost: false,
            })
            .collect();
        let before = self.rows.insert(segment, RowSegment { positions, parts: BTreeMap::new() });
        assert!(before.is_none(), "{segment} is opened twice");
        Ok(())
    }

    /// The first position that cannot take a write any more.
    fn failed_position(&self, segment: SegmentName) -> Result<Option<StoreError>, StoreError> {
        let rows = self.rows.get(&segment).ok_or(StoreError::NotFound)?;
        let failed = rows.positions.iter().find(|position| {
            let device = self.device(position.device);
            position.lost || !device.up || device.incarnation != position.incarnation
        });
        Ok(failed.map(|position| {
            let device = position.device;
            if self.device(device).up { StoreError::Closed { device } } else { StoreError::Unavailable { device } }
        }))
    }

    fn append_rows(&mut self, segment: SegmentName, first_row: u64, data: Buf) -> Result<(), StoreError> {
        let row_bytes = self.row_bytes();
        let failed = self.failed_position(segment)?;
        let live: Vec<bool> = {
            let rows = &self.rows[&segment];
            let live = rows.positions.iter().map(|position| {
                let device = self.device(position.device);
                !position.lost && device.up && device.incarnation == position.incarnation
            });
            live.collect()
        };
        let rows = self.rows.get_mut(&segment).ok_or(StoreError::NotFound)?;
        rows.parts.insert(first_row, data);
        let reached = rows.contiguous(row_bytes);
        for (position, live) in rows.positions.iter_mut().zip(live) {
            if live {
                position.rows = reached;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    pub(super) fn read_rows(&self, read: &SegmentRead) -> Result<Buf, StoreError> {
        let row_bytes = self.row_bytes();
        assert!(read.segment_bytes.is_multiple_of(row_bytes), "open rows are read as whole rows");
        let rows = &self.rows[&read.segment];
        let end = read.offset + u64::from(read.length);
        assert!(end <= read.segment_bytes, "a read beyond the rows of {}", read.segment);
        let last = end.div_ceil(row_bytes);
        let needed = self.scheme.k();
        let holding = |up_only: bool| {
            let positions = rows.positions.iter();
            let positions =
                positions.filter(|at| !at.lost && at.rows >= last && (!up_only || self.device(at.device).up));
            positions.count()
        };
        if holding(false) < needed {
            // These rows cannot be decoded from k units, whoever returns: as good as never written.
            return Err(StoreError::NotFound);
        }
        let found = holding(true);
        if found < needed {
            return Err(StoreError::TooFew { found, needed });
        }
        let mut body = Vec::new();
        for part in rows.parts.values() {
            body.extend_from_slice(part);
        }
        Ok(Buf::copied(&body[read.offset as usize..end as usize]))
    }

    /// P4: a flush names only what is complete. A shard that was finished in between counts as flushed.
    pub(super) fn check_open_shard(&self, device: DeviceId, shard: ShardId, length: u64) {
        let Some(rows) = self.rows.get(&shard.segment) else {
            let known = self.sealed_names.contains_key(&shard.segment);
            assert!(known, "flush of {shard}, which was never written");
            return;
        };
        let position = &rows.positions[usize::from(shard.index.0)];
        assert_eq!(position.device, device, "{shard} lies elsewhere");
        let have = position.rows * UNIT_BYTES;
        assert!(have >= length, "flush of {length} bytes of {shard}, of which {have} are complete");
    }

    fn finish_rows(&mut self, segment: SegmentName, rows_written: u64, footer: &Buf) -> Result<(), StoreError> {
        if self.sealed_names.contains_key(&segment) {
            return Ok(());
        }
        if let Some(error) = self.failed_position(segment)? {
            return Err(error);
        }
        let row_bytes = self.row_bytes();
        let rows = self.rows.remove(&segment).ok_or(StoreError::NotFound)?;
        assert_eq!(rows.contiguous(row_bytes), rows_written, "{segment} is finished before its rows are complete");
        let mut body = Vec::new();
        for part in rows.parts.values() {
            body.extend_from_slice(part);
        }
        body.extend_from_slice(footer);
        self.enter(segment, Buf::copied(&body));
        let all: Vec<_> = super::shard_indexes(self.scheme.width()).collect();
        let holes = self.fill(segment, &all)?;
        assert!(holes.0.is_empty(), "all positions were up");
        Ok(())
    }
}

/// The writer of one row segment.
pub(super) struct MemoryRows {
    store: MemoryStore,
    segment: SegmentName,
    /// The next row to be named by a call.
    next: Mutex<u64>,
}

impl MemoryRows {
    pub(super) fn new(store: MemoryStore, segment: SegmentName) -> Self {
        Self { store, segment, next: Mutex::new(0) }
    }
}

impl RowWriter for MemoryRows {
    fn append(&self, first_row: u64, data: Vec<Buf>) -> StoreResult<()> {
        let row_bytes = self.store.state().row_bytes();
        let data = super::concat(&data);
        assert!(!data.is_empty() && (data.len() as u64).is_multiple_of(row_bytes), "whole rows");
        {
            let mut next = self.next.lock().expect("rows lock");
            assert_eq!(first_row, *next, "rows come in order");
            *next += data.len() as u64 / row_bytes;
        }
        let segment = self.segment;
        self.store.call(None, Box::new(move |state| state.append_rows(segment, first_row, data)))
    }

    fn flush_requests(&self) -> Vec<FlushRequest> {
        let state = self.store.state();
        let Some(rows) = state.rows.get(&self.segment) else { return Vec::new() };
        let requests = rows.positions.iter().zip(super::shard_indexes(rows.positions.len()));
        requests
            .map(|(position, index)| FlushRequest {
                device: position.device,
                incarnation: position.incarnation,
                member: None,
                replicas: Vec::new(),
                shards: vec![(ShardId { segment: self.segment, index }, position.rows * UNIT_BYTES)],
            })
            .collect()
    }

    fn finish(&self, footer: Buf) -> StoreResult<()> {
        let rows = *self.next.lock().expect("rows lock");
        let segment = self.segment;
        self.store.call(None, Box::new(move |state| state.finish_rows(segment, rows, &footer)))
    }
}
