//! Where the shards of segments are, and the records of open replicas.

use super::device::{FoundFrame, read_log};
use super::image::Image;
use super::output::line;
use super::shard::scan;
use super::{Failure, SegmentArgs};
use lsm_block::segment::record::HEADER_BYTES_MAX;
use lsm_block::segment::{RecordError, RecordHeader};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use xsan_node::format::{Extent, LogRecord};
use xsan_types::{BLOCK_BYTES, SegmentName, SetId, VolumeId, crc32c};

#[derive(Serialize)]
pub(super) struct SegmentReport {
    segment: SegmentName,
    shards: Vec<ShardPlace>,
    replicas: Vec<Replica>,
}

#[derive(Serialize)]
pub(super) struct ShardPlace {
    path: PathBuf,
    index: u8,
    bytes: u64,
    offset: u64,
}

#[derive(Serialize)]
pub(super) struct Replica {
    path: PathBuf,
    set: SetId,
    records: Vec<FoundRecord>,
    end: u64,
    ends_because: String,
}

#[derive(Serialize)]
pub(super) struct FoundRecord {
    offset: u64,
    bytes: u64,
    entries: usize,
    blocks: usize,
    /// Segment whose rows hold the blocks.
    rows: Option<u64>,
    writes: Vec<String>,
    damaged_blocks: usize,
}

pub(super) fn segment_report(args: &SegmentArgs) -> Result<Vec<SegmentReport>, Failure> {
    let wanted = |name: &SegmentName| {
        args.volume.is_none_or(|volume| name.volume.0 == volume) && args.number.is_none_or(|n| name.number == n)
    };
    let mut found: BTreeMap<SegmentName, SegmentReport> = BTreeMap::new();
    for path in &args.paths {
        let image = Image::open(path)?;
        let block = image.superblock_or_refuse()?;
        let empty = |segment| SegmentReport { segment, shards: Vec::new(), replicas: Vec::new() };
        for shard in scan(&image, &block, args.volume.map(VolumeId), false) {
            let name = shard.shard.segment;
            if wanted(&name) {
                let offset = shard.extents.first().map_or(0, |extent| extent.offset);
                let place = ShardPlace { path: path.clone(), index: shard.shard.index.0, bytes: shard.bytes, offset };
                found.entry(name).or_insert_with(|| empty(name)).shards.push(place);
            }
        }
        for ((_, set, name), extents) in open_replicas(&read_log(&image, &block).0) {
            if wanted(&name) {
                let replica = read_replica(&image, set, name, &extents);
                found.entry(name).or_insert_with(|| empty(name)).replicas.push(replica);
            }
        }
    }
    Ok(found.into_values().collect())
}

/// Replicas that the log leaves allocated.
pub(super) fn open_replicas(frames: &[FoundFrame]) -> BTreeMap<(VolumeId, SetId, SegmentName), Vec<Extent>> {
    let mut open: BTreeMap<(VolumeId, SetId, SegmentName), Vec<Extent>> = BTreeMap::new();
    for record in frames.iter().flat_map(|frame| &frame.records) {
        match record {
            LogRecord::ReplicaGrew { volume, set, segment, extents } => {
                let known = open.entry((*volume, *set, *segment)).or_default();
                // A record may repeat what the snapshot before it says.
                known.extend(extents.iter().filter(|extent| !known.contains(extent)).copied().collect::<Vec<_>>());
            }
            LogRecord::Sealed { volume, set, segment } => drop(open.remove(&(*volume, *set, segment.name))),
            LogRecord::MemberFreed { volume, set } => open.retain(|key, _| (key.0, key.1) != (*volume, *set)),
            LogRecord::VolumeFreed { volume } => open.retain(|key, _| key.0 != *volume),
            _ => {}
        }
    }
    open
}

pub(super) fn read_replica(image: &Image, set: SetId, name: SegmentName, extents: &[Extent]) -> Replica {
    let (mut records, mut end) = (Vec::new(), 0);
    let ends_because = loop {
        let header = match image.read_over(extents, end, HEADER_BYTES_MAX as u64) {
            Ok(bytes) if bytes.is_empty() => break "the extents are full".to_owned(),
            Ok(bytes) => RecordHeader::parse(&bytes, name, end),
            Err(error) => break format!("cannot be read: {error}"),
        };
        let header = match header {
            Ok(header) => header,
            Err(error @ (RecordError::Absent | RecordError::Version(_))) => break error.to_string(),
            Err(error) => break error.to_string(),
        };
        let record = show_record(image, extents, end, &header);
        let damaged = record.damaged_blocks;
        end += record.bytes;
        records.push(record);
        if damaged > 0 {
            break format!("{damaged} block(s) of the last record do not match their CRC");
        }
    };
    Replica { path: image.path.clone(), set, records, end, ends_because }
}

pub(super) fn show_record(image: &Image, extents: &[Extent], offset: u64, header: &RecordHeader) -> FoundRecord {
    let inline = u64::from(header.inline_blocks()) * BLOCK_BYTES;
    let data = image.read_over(extents, offset + u64::from(header.header_bytes), inline).unwrap_or_default();
    let blocks = data.chunks(BLOCK_BYTES as usize);
    let good = blocks.zip(&header.crcs).filter(|(block, crc)| crc32c(block) == **crc).count();
    let write = |entry: &lsm_block::segment::Entry| {
        format!("{:?} {}+{} sequence {}", entry.kind, entry.lba.0, entry.count, entry.sequence.0)
    };
    FoundRecord {
        offset,
        bytes: header.record_bytes(),
        entries: header.entries.len(),
        blocks: header.crcs.len(),
        rows: header.rows.map(|rows| rows.number),
        writes: header.entries.iter().map(write).collect(),
        damaged_blocks: (header.inline_blocks() as usize).saturating_sub(good),
    }
}

impl SegmentReport {
    pub(super) fn print(&self) {
        line!("segment {}", self.segment);
        for shard in &self.shards {
            line!("  shard {} on {} @{}, {} bytes", shard.index, shard.path.display(), shard.offset, shard.bytes);
        }
        for replica in &self.replicas {
            line!("  open replica of set {} on {}", replica.set, replica.path.display());
            for record in &replica.records {
                let rows = record.rows.map_or_else(String::new, |number| format!(" in rows of segment {number}"));
                line!("    record @{}, {} bytes, {} blocks{rows}", record.offset, record.bytes, record.blocks);
                for write in &record.writes {
                    line!("      {write}");
                }
            }
            line!("    ends @{}: {}", replica.end, replica.ends_because);
        }
    }
}
