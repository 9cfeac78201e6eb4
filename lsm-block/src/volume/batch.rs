//! From guest requests to records: peels waiting requests into block-aligned parts, merges partial blocks, and lays the
//! parts out in the open segment (and, for large writes, in rows).

use super::journal::{Batch, RowsPart, Segment};
use super::shared::{Done, RecordMemory, Request, count};
use super::writer::{Event, Writer};
use crate::index::{Change, Found, Place};
use crate::segment::footer::footer_bytes;
use crate::segment::record::header_bytes;
use crate::segment::{Entry, EntryKind, FooterEntry, RecordBuilder, RowsRef};
use std::sync::Arc;
use xsan_env::{Buf, BufMut, Moment};
use xsan_types::{BLOCK_BYTES, BlockRange, Crc32c, Lba, SegmentName, Sequence, UNIT_BYTES, Version, crc32c};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Inline blocks of one record: with its header it fits a 1 MiB chunk.
const INLINE_BLOCKS_MAX: usize = 240;
/// Blocks of one rows record.
pub(super) const ROWS_BLOCKS_MAX: usize = 2048;
/// A write of fewer blocks than a unit never goes by rows.
const LARGE_BLOCKS: usize = (UNIT_BYTES / BLOCK_BYTES) as usize;
/// Entries of one record.
const ENTRIES_MAX: usize = 1024;
/// Memory of an open segment grows in chunks of this size.
const CHUNK_BYTES: usize = 1 << 20;

/// A request in the writer's hands.
pub(super) struct Queued {
    pub request: Request,
    /// The old content of its first, partial block, fetched from the store.
    pub base: Option<Base>,
    /// Since when it waits for nodes; set at the first look during a stall.
    pub since: Option<Moment>,
    /// The tail that a shrink discards: not held against the new size.
    pub beyond_end: bool,
}

impl From<Request> for Queued {
    fn from(request: Request) -> Self {
        Self { request, base: None, since: None, beyond_end: false }
    }
}

/// What a partial block held: `version` is `None` for a hole.
pub(super) struct Base {
    pub lba: Lba,
    pub version: Option<Version>,
    pub data: Buf,
}

/// Block-aligned content.
enum Content {
    Blocks(Buf),
    Zeroes,
}

/// A block-aligned part of a request.
struct Part {
    lba: Lba,
    count: u64,
    content: Content,
    sequence: Sequence,
}

impl Part {
    fn contains(&self, lba: Lba) -> bool {
        BlockRange { start: self.lba, count: self.count }.contains(lba)
    }

    /// The first `count` blocks of data, and the others; a side without any is `None`.
    fn split(self, count: usize) -> (Option<Self>, Option<Self>) {
        let Content::Blocks(data) = &self.content else { unreachable!("only data is split") };
        let count = count.min(self.count as usize);
        let piece = |from: usize, to: usize| {
            let content = Content::Blocks(data.slice(from * BLOCK..to * BLOCK));
            let (lba, count) = (Lba(self.lba.0 + from as u64), (to - from) as u64);
            (from < to).then_some(Self { lba, count, content, sequence: self.sequence })
        };
        (piece(0, count), piece(count, self.count as usize))
    }

    /// Pieces of data of at most `blocks` blocks.
    fn cut(self, blocks: usize) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let (piece, later) = rest.take()?.split(blocks);
            rest = later;
            piece
        })
    }

    fn entry(&self) -> Entry {
        let kind = match self.content {
            Content::Blocks(_) => EntryKind::Data,
            Content::Zeroes => EntryKind::Zero,
        };
        // Callers cut zeroes at u32::MAX blocks.
        Entry { kind, lba: self.lba, count: self.count as u32, sequence: self.sequence }
    }
}

/// Parts of one batch.
#[derive(Default)]
struct Parts {
    inline: Vec<Part>,
    inline_blocks: usize,
    large: Vec<Part>,
    large_blocks: usize,
    requests: Vec<(Done, bool)>,
}

impl Parts {
    fn full(&self) -> bool {
        self.inline_blocks >= INLINE_BLOCKS_MAX
            || self.large_blocks >= ROWS_BLOCKS_MAX
            || self.inline.len() + self.large.len() >= ENTRIES_MAX
    }

    fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.large.is_empty()
    }
}

/// The old content of a partial block.
enum Old {
    Known(Option<Buf>),
    /// In the store, or behind index pages that are not in memory.
    Away,
}

impl Writer {
    /// Builds and sends one batch of what waits; `false` if nothing could be built.
    pub(super) fn build_batch(&mut self) -> bool {
        let mut parts = Parts::default();
        while !parts.full() {
            let Some(queued) = self.backlog.pop_front() else { break };
            if !self.peel(queued, &mut parts) {
                break;
            }
        }
        if parts.is_empty() {
            debug_assert!(parts.requests.is_empty());
            return false;
        }
        self.send(parts);
        true
    }

    /// Takes parts of one request; `false` when the batch must end before the rest of it.
    fn peel(&mut self, queued: Queued, parts: &mut Parts) -> bool {
        let Queued { request, base, since, beyond_end } = queued;
        match request {
            Request::Write { offset, data, fua, done } => self.peel_write(offset, data, fua, done, base, parts),
            Request::Zero { offset, length, fua, done } => {
                if !beyond_end && offset.saturating_add(length) > self.writable_end() {
                    let _ = done.send(Err(crate::error::VolumeError::Invalid));
                    return true;
                }
                self.peel_zero(offset, length, fua, done, base, parts)
            }
            Request::Flush { done } => {
                count(&self.shared.counters.flushes, 1);
                self.flush_waiters.push(done);
                true
            }
            request if parts.is_empty() => {
                self.control(request);
                true
            }
            request => {
                self.backlog.push_front(Queued { request, base, since, beyond_end });
                false
            }
        }
    }

    fn peel_write(
        &mut self,
        mut offset: u64,
        mut data: Buf,
        fua: bool,
        done: Done,
        mut base: Option<Base>,
        parts: &mut Parts,
    ) -> bool {
        if offset.saturating_add(data.len() as u64) > self.writable_end() {
            let _ = done.send(Err(crate::error::VolumeError::Invalid));
            return true;
        }
        while !data.is_empty() {
            let lba = Lba(offset / BLOCK_BYTES);
            let within = (offset % BLOCK_BYTES) as usize;
            if within != 0 || data.len() < BLOCK {
                let length = data.len().min(BLOCK - within);
                match self.old_content(lba, base.take(), parts) {
                    Old::Known(old) => {
                        let merged = self.merge(old, within, Some(&data[..length]), length);
                        self.push_part(parts, lba, 1, Content::Blocks(merged));
                        offset += length as u64;
                        data = data.slice(length..);
                    }
                    Old::Away => {
                        self.fetch_base(lba, Request::Write { offset, data, fua, done });
                        return true;
                    }
                }
            } else {
                if parts.full() {
                    self.backlog.push_front(Request::Write { offset, data, fua, done }.into());
                    return false;
                }
                let blocks = self.room(parts, &data).min(data.len() / BLOCK);
                let part = data.slice(..blocks * BLOCK);
                data = data.slice(blocks * BLOCK..);
                offset += part.len() as u64;
                count(&self.shared.counters.write_bytes, part.len() as u64);
                self.push_part(parts, lba, blocks as u64, Content::Blocks(part));
            }
        }
        count(&self.shared.counters.writes, 1);
        parts.requests.push((done, fua));
        true
    }

    fn peel_zero(
        &mut self,
        mut offset: u64,
        mut length: u64,
        fua: bool,
        done: Done,
        mut base: Option<Base>,
        parts: &mut Parts,
    ) -> bool {
        while length > 0 {
            let lba = Lba(offset / BLOCK_BYTES);
            let within = offset % BLOCK_BYTES;
            if within != 0 || length < BLOCK_BYTES {
                let piece = length.min(BLOCK_BYTES - within);
                match self.old_content(lba, base.take(), parts) {
                    // A hole stays a hole.
                    Old::Known(None) => {}
                    Old::Known(old) => {
                        let merged = self.merge(old, within as usize, None, piece as usize);
                        self.push_part(parts, lba, 1, Content::Blocks(merged));
                    }
                    Old::Away => {
                        self.fetch_base(lba, Request::Zero { offset, length, fua, done });
                        return true;
                    }
                }
                offset += piece;
                length -= piece;
            } else {
                let blocks = (length / BLOCK_BYTES).min(u64::from(u32::MAX));
                self.push_part(parts, lba, blocks, Content::Zeroes);
                offset += blocks * BLOCK_BYTES;
                length -= blocks * BLOCK_BYTES;
            }
        }
        count(&self.shared.counters.zeroes, 1);
        if !parts.is_empty() {
            parts.requests.push((done, fua));
        } else if let Some(last) = self.in_flight.back_mut() {
            // Nothing (more) changes: complete with what is on its way, which may be the rest of this request.
            last.requests.push((done, fua));
        } else {
            if fua {
                self.flush_waiters.push(done)
            } else {
                let _ = done.send(Ok(()));
            }
        }
        true
    }

    fn push_part(&mut self, parts: &mut Parts, lba: Lba, count: u64, content: Content) {
        self.sequence = self.sequence.next();
        let part = Part { lba, count, content, sequence: self.sequence };
        let large = match &part.content {
            Content::Blocks(data) => count as usize >= LARGE_BLOCKS && data.is_aligned(BLOCK) && self.rows_ready(),
            Content::Zeroes => false,
        };
        if large {
            parts.large_blocks += count as usize;
            parts.large.push(part);
        } else {
            if matches!(part.content, Content::Blocks(_)) {
                parts.inline_blocks += count as usize;
            }
            parts.inline.push(part);
        }
    }

    /// Blocks of `data` that this batch still takes (at least one).
    fn room(&mut self, parts: &Parts, data: &Buf) -> usize {
        if data.len() / BLOCK >= LARGE_BLOCKS && data.is_aligned(BLOCK) && self.rows_ready() {
            ROWS_BLOCKS_MAX - parts.large_blocks
        } else {
            INLINE_BLOCKS_MAX - parts.inline_blocks
        }
    }

    /// The newest content of a block: in this batch, in flight, or in the index (H11).
    fn old_content(&self, lba: Lba, base: Option<Base>, parts: &Parts) -> Old {
        let newest =
            parts.inline.iter().chain(&parts.large).filter(|part| part.contains(lba)).max_by_key(|p| p.sequence);
        if let Some(part) = newest {
            return Old::Known(match &part.content {
                Content::Zeroes => None,
                Content::Blocks(data) => {
                    let at = (lba.0 - part.lba.0) as usize * BLOCK;
                    Some(data.slice(at..at + BLOCK))
                }
            });
        }
        if let Some(old) = self.in_flight_content(lba) {
            return old;
        }
        let mut found = Vec::with_capacity(1);
        if !self.shared.index.try_lookup(BlockRange { start: lba, count: 1 }, &mut found) {
            return Old::Away;
        }
        match (found.first(), base) {
            (Some(Found::Data { place, version }), base) => match self.memory_of(place) {
                Some(data) => Old::Known(Some(data)),
                None => match base {
                    Some(base) if base.lba == lba && base.version == Some(*version) => Old::Known(Some(base.data)),
                    _ => Old::Away,
                },
            },
            _ => Old::Known(None),
        }
    }

    /// Content written by a batch that is not acknowledged yet; the newest batch wins.
    fn in_flight_content(&self, lba: Lba) -> Option<Old> {
        for batch in self.in_flight.iter().rev() {
            let newest = batch
                .changes
                .iter()
                .filter(|change| match change {
                    Change::Data { lba: at, .. } => *at == lba,
                    Change::Zero { range, .. } => range.contains(lba),
                })
                .max_by_key(|change| match change {
                    Change::Data { version, .. } | Change::Zero { version, .. } => *version,
                });
            match newest {
                None => {}
                Some(Change::Zero { .. }) => return Some(Old::Known(None)),
                Some(Change::Data { place, .. }) => {
                    let rows = batch.rows.as_ref().filter(|rows| rows.number == place.number);
                    let data = rows.and_then(|rows| rows.block(place.position)).or_else(|| self.memory_of(place));
                    return Some(Old::Known(Some(data.expect("bytes in flight are in memory"))));
                }
            }
        }
        None
    }

    fn memory_of(&self, place: &Place) -> Option<Buf> {
        self.shared.open.lock().expect("open lock").get(&place.number)?.block(place.position)
    }

    /// `old` with `length` bytes at `within` replaced.
    fn merge(&self, old: Option<Buf>, within: usize, new: Option<&[u8]>, length: usize) -> Buf {
        let mut block = self.shared.buffers.get(BLOCK);
        match old {
            Some(old) => block.copy_from_slice(&old),
            None => block.fill(0),
        }
        match new {
            Some(new) => {
                count(&self.shared.counters.write_bytes, length as u64);
                block[within..within + length].copy_from_slice(new);
            }
            None => block[within..within + length].fill(0),
        }
        block.freeze()
    }

    fn fetch_base(&mut self, lba: Lba, request: Request) {
        count(&self.shared.counters.merge_reads, 1);
        let shared = Arc::clone(&self.shared);
        self.parked += 1;
        self.events.push(Box::pin(async move {
            let base = super::read::read_block(&shared, lba).await;
            Event::Fetched { request, base: base.map(|(version, data)| Base { lba, version, data }) }
        }));
    }

    /// Lays the parts out as records and sends them; the last one carries the requests.
    fn send(&mut self, mut parts: Parts) {
        let mut requests = std::mem::take(&mut parts.requests);
        while let Some(rows) = self.take_rows(&mut parts) {
            let requests = if parts.is_empty() { std::mem::take(&mut requests) } else { Vec::new() };
            self.send_rows(rows, requests);
            if self.rows_room() == 0 {
                self.next_rows();
            }
        }
        // What fills no row. Inline records are small: cut it. (A batch limit bounds the whole.)
        parts.inline.extend(parts.large.into_iter().flat_map(|part| part.cut(INLINE_BLOCKS_MAX)));
        if !parts.inline.is_empty() {
            self.send_inline(&parts.inline, requests);
        }
    }

    /// Moves as many whole rows out of the large parts as the open row segment takes. `None` if that is not even one.
    fn take_rows(&mut self, parts: &mut Parts) -> Option<Vec<Part>> {
        let row_blocks = self.shared.store.data_shards() * LARGE_BLOCKS;
        let rows = (parts.large_blocks / row_blocks).min(self.rows_room() as usize);
        if rows == 0 {
            return None;
        }
        let mut wanted = rows * row_blocks;
        parts.large_blocks -= wanted;
        let mut taken = Vec::new();
        for part in std::mem::take(&mut parts.large) {
            let (head, tail) = part.split(wanted);
            wanted -= head.as_ref().map_or(0, |part| part.count as usize);
            taken.extend(head);
            parts.large.extend(tail);
        }
        Some(taken)
    }

    fn send_rows(&mut self, parts: Vec<Part>, requests: Vec<(Done, bool)>) {
        let number = self.rows.expect("rows were ready");
        let rows = self.row_segments.get_mut(&number).expect("the open row segment");
        let (name, writer) = (rows.name, Arc::clone(&rows.writer));
        let first_block = rows.crcs.len() as u32;
        let first_row = rows.rows;
        let generation = self.shared.generation;
        let (entries, crcs, changes) = describe(&parts, generation, name.number, first_block);
        rows.entries.extend(footer_entries(&entries, generation));
        rows.crcs.extend_from_slice(&crcs);
        rows.pending += 1;
        let row_blocks = self.shared.store.data_shards() * LARGE_BLOCKS;
        rows.rows += (crcs.len() / row_blocks) as u64;
        self.publish_rows(number);
        let pieces: Vec<Buf> = parts
            .into_iter()
            .map(|part| match part.content {
                Content::Blocks(data) => data,
                Content::Zeroes => unreachable!("rows are data"),
            })
            .collect();
        count(&self.shared.counters.row_bytes, crcs.len() as u64 * BLOCK_BYTES);
        self.written_bytes += crcs.len() as u64 * BLOCK_BYTES;
        let append = writer.append(first_row, pieces.clone());
        let id = self.next_batch;
        self.events.push(Box::pin(async move { Event::RowsWritten { batch: id, result: append.await } }));
        let reference = RowsRef { number: name.number, pg: name.pg, first_block };
        let part = RowsPart { number: name.number, first_block, pieces, written: None };
        self.append_record(&entries, &crcs, Some(reference), &[], changes, requests, Some(part));
    }

    fn send_inline(&mut self, parts: &[Part], mut requests: Vec<(Done, bool)>) {
        let mut rest = parts;
        while !rest.is_empty() {
            let mut blocks = 0;
            let fits = rest
                .iter()
                .take_while(|part| {
                    let more = if matches!(part.content, Content::Blocks(_)) { part.count as usize } else { 0 };
                    blocks += more;
                    blocks <= INLINE_BLOCKS_MAX || blocks == more
                })
                .take(ENTRIES_MAX)
                .count();
            let (now, later) = rest.split_at(fits);
            rest = later;
            let requests = if rest.is_empty() { std::mem::take(&mut requests) } else { Vec::new() };
            self.send_inline_record(now, requests);
        }
    }

    fn send_inline_record(&mut self, parts: &[Part], requests: Vec<(Done, bool)>) {
        let blocks: usize =
            parts.iter().filter(|p| matches!(p.content, Content::Blocks(_))).map(|p| p.count as usize).sum();
        self.ensure_open(parts.len(), blocks);
        let segment = self.current_segment();
        let (number, first_block) = (segment.name.number, segment.blocks);
        let (entries, crcs, changes) = describe(parts, self.shared.generation, number, first_block);
        let data: Vec<&Buf> = parts
            .iter()
            .filter_map(|part| match &part.content {
                Content::Blocks(data) => Some(data),
                Content::Zeroes => None,
            })
            .collect();
        self.written_bytes += crcs.len() as u64 * BLOCK_BYTES;
        self.append_record(&entries, &crcs, None, &data, changes, requests, None);
    }

    /// Writes one record into the open segment's memory and appends it to every member.
    #[allow(clippy::too_many_arguments)] // The parts of one record; a struct of them would be built and taken apart once.
    fn append_record(
        &mut self,
        entries: &[Entry],
        crcs: &[Crc32c],
        rows: Option<RowsRef>,
        data: &[&Buf],
        changes: Vec<Change>,
        requests: Vec<(Done, bool)>,
        rows_part: Option<RowsPart>,
    ) {
        if rows.is_some() {
            self.ensure_open(entries.len(), 0);
        }
        let header = header_bytes(entries.len(), crcs.len(), rows.is_some(), self.sector);
        let inline: usize = data.iter().map(|data| data.len()).sum();
        let mut memory = self.carve(header + inline);
        let segment = self.segments.get_mut(&self.current.expect("a segment is open")).expect("current segment");
        let builder = RecordBuilder { segment: segment.name, offset: segment.end, first_block: segment.blocks, rows };
        builder.encode(entries, crcs, &mut memory[..header]);
        let mut at = header;
        for data in data {
            memory[at..at + data.len()].copy_from_slice(data);
            at += data.len();
        }
        let bytes = memory.freeze();
        let offset = segment.end;
        let record =
            RecordMemory { offset, first_block: segment.blocks, bytes: bytes.clone(), header_bytes: header as u32 };
        segment.records.push(record.clone());
        segment.end += bytes.len() as u64;
        segment.pending += 1;
        if let Some(rows) = rows {
            if !segment.rows.contains(&rows.number) {
                segment.rows.push(rows.number);
            }
        } else {
            segment.blocks += crcs.len() as u32;
            segment.entries.extend(footer_entries(entries, self.shared.generation));
            segment.crcs.extend_from_slice(crcs);
        }
        let (name, end) = (segment.name, segment.end);
        self.publish_record(name.number, record);
        count(&self.shared.counters.batches, 1);
        count(&self.shared.counters.journal_bytes, bytes.len() as u64);
        let id = self.next_batch;
        self.next_batch += 1;
        self.in_flight.push_back(Batch { id, number: name.number, end, changes, requests, rows: rows_part });
        self.append_to_members(name, offset, &bytes);
    }

    fn append_to_members(&mut self, name: SegmentName, offset: u64, bytes: &Buf) {
        let sent = self.shared.env.now();
        let set = Arc::clone(&self.set);
        for (member, at) in set.members.iter().enumerate() {
            let append = self.shared.store.append(at.at, name, offset, bytes.clone());
            let id = set.id;
            self.events.push(Box::pin(async move {
                Event::Appended { set: id, member, number: name.number, result: append.await, sent }
            }));
        }
    }

    /// Writes the rows of a batch that failed again, inline, under their old versions (P9). What stands for the batch keeps
    /// its place in the order: versions must be acknowledged in order, or a checkpoint between them would take the older
    /// one, when it comes, for a copy of something it holds.
    pub(super) fn rejournal(&mut self, index: usize) {
        let batch = &mut self.in_flight[index];
        let Some(rows) = batch.rows.take() else { return };
        let old_number = batch.number;
        let changes = std::mem::take(&mut batch.changes);
        let requests = std::mem::take(&mut batch.requests);
        let id = batch.id;
        if let Some(segment) = self.segments.get_mut(&old_number) {
            segment.pending -= 1;
        }
        self.in_flight.remove(index);
        let parts: Vec<Part> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Data { lba, version, place } => Some(Part {
                    lba: *lba,
                    count: 1,
                    content: Content::Blocks(rows.block(place.position)?),
                    sequence: version.sequence,
                }),
                Change::Zero { .. } => None,
            })
            .collect();
        tracing::warn!(volume = %self.shared.id, batch = id, blocks = parts.len(), "rows failed, writing them to the journal");
        let others = self.in_flight.len();
        self.send_inline(&parts, requests);
        for (step, batch) in self.in_flight.split_off(others).into_iter().enumerate() {
            self.in_flight.insert(index + step, batch);
        }
        self.cut_again();
    }

    /// Makes sure a segment is open that has room for a record of so many entries and blocks.
    fn ensure_open(&mut self, entries: usize, blocks: usize) {
        if let Some(number) = self.current {
            let segment = &self.segments[&number];
            let dense = (segment.blocks as usize + blocks) * BLOCK;
            let footer = footer_bytes(segment.entries.len() + entries, segment.crcs.len() + blocks);
            // Records that only point to rows fill no block: bound the journal's own length too.
            let long = segment.end + (entries as u64 + 1) * 512 > 2 * self.shared.tuning.segment_bytes;
            if (dense + footer) as u64 > self.shared.tuning.segment_bytes || long {
                self.rotate();
            }
        }
        if self.current.is_none() {
            let name = self.new_name();
            let segment = Segment::new(name, self.set.members.len());
            self.segments.insert(name.number, segment);
            self.publish_segment(name.number);
            self.current = Some(name.number);
        }
    }

    fn current_segment(&self) -> &Segment {
        &self.segments[&self.current.expect("a segment is open")]
    }

    /// Memory for a record, from the current chunk.
    fn carve(&mut self, bytes: usize) -> BufMut {
        if self.chunk.as_ref().is_none_or(|chunk| chunk.len() < bytes) {
            self.chunk = Some(self.shared.buffers.get(CHUNK_BYTES.max(bytes)));
        }
        self.chunk.as_mut().expect("a chunk").split_to(bytes)
    }
}

/// Entries, block checksums and index changes of parts whose blocks lie dense from `first_block` of segment `number`.
fn describe(
    parts: &[Part],
    generation: xsan_types::Generation,
    number: u64,
    first_block: u32,
) -> (Vec<Entry>, Vec<Crc32c>, Vec<Change>) {
    let mut crcs = Vec::new();
    let mut changes = Vec::with_capacity(parts.len());
    for part in parts {
        let version = Version { generation, sequence: part.sequence };
        match &part.content {
            Content::Zeroes => {
                let range = BlockRange { start: part.lba, count: part.count };
                changes.push(Change::Zero { range, version, number });
            }
            Content::Blocks(data) => {
                for (i, block) in data.chunks(BLOCK).enumerate() {
                    let crc = crc32c(block);
                    let position = first_block + crcs.len() as u32;
                    crcs.push(crc);
                    let lba = Lba(part.lba.0 + i as u64);
                    changes.push(Change::Data { lba, version, place: Place { number, position, crc } });
                }
            }
        }
    }
    (parts.iter().map(Part::entry).collect(), crcs, changes)
}

fn footer_entries(entries: &[Entry], generation: xsan_types::Generation) -> impl Iterator<Item = FooterEntry> + '_ {
    entries.iter().map(move |entry| FooterEntry {
        kind: entry.kind,
        lba: entry.lba,
        count: u64::from(entry.count),
        version: Version { generation, sequence: entry.sequence },
    })
}
