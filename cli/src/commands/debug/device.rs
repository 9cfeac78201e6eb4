//! Superblocks and log of a device.

use super::image::Image;
use super::output::line;
use serde::Serialize;
use xsan_node::format::{Extent, Frame, LogRecord, SUPERBLOCK_OFFSETS, Superblock};

/// Longest half of a log that is read.
const LOG_HALF_MAX: u64 = 1 << 30;

#[derive(Serialize)]
pub(super) struct Copy {
    pub(super) offset: u64,
    pub(super) superblock: Option<Superblock>,
    pub(super) fault: Option<String>,
}

#[derive(Serialize)]
pub(super) struct FoundFrame {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) sequence: u64,
    pub(super) flushed: u64,
    pub(super) records: Vec<LogRecord>,
}

#[derive(Serialize)]
pub(super) struct DeviceReport {
    pub(super) copies: Vec<Copy>,
    pub(super) frames: Vec<FoundFrame>,
    pub(super) log_end: Option<u64>,
    pub(super) log_ends_because: String,
}

pub(super) fn device_report(image: &Image) -> DeviceReport {
    let copies = SUPERBLOCK_OFFSETS.map(|offset| match image.copy(offset) {
        Ok(block) => Copy { offset, superblock: Some(block), fault: None },
        Err(fault) => Copy { offset, superblock: None, fault: Some(fault) },
    });
    let log = image.superblock().map(|block| read_log(image, &block));
    let (frames, log_end, log_ends_because) = match log {
        None => (Vec::new(), None, "no superblock can be read".to_owned()),
        Some((frames, end, why)) => (frames, Some(end), why),
    };
    DeviceReport { copies: copies.into(), frames, log_end, log_ends_because }
}

/// The frames of the active half, where they end, and why there.
pub(super) fn read_log(image: &Image, block: &Superblock) -> (Vec<FoundFrame>, u64, String) {
    let start = block.half_offset(block.active_half);
    let bytes = match image.read(start, block.log_half_bytes.min(LOG_HALF_MAX)) {
        Ok(bytes) => bytes,
        Err(error) => return (Vec::new(), start, format!("cannot be read: {error}")),
    };
    let decode = |at: usize| {
        let rest = bytes.get(at..).unwrap_or_default();
        Frame::decode(rest, block.device, block.log_epoch, block.sector)
    };
    let (mut frames, mut at) = (Vec::new(), 0usize);
    let why = loop {
        if at >= bytes.len() {
            break "the half is full".to_owned();
        }
        match decode(at) {
            Ok((frame, length)) if frame.sequence == frames.len() as u64 => {
                let Frame { sequence, flushed, records } = frame;
                frames.push(FoundFrame { offset: start + at as u64, bytes: length as u64, sequence, flushed, records });
                at += length;
            }
            Ok((frame, _)) => break format!("frame {} lies where {} belongs", frame.sequence, frames.len()),
            Err(error) => break format!("frame {}: {error}", frames.len()),
        }
    };
    let later = (at..bytes.len()).step_by(block.sector as usize).filter_map(|at| decode(at).ok());
    let why = match later.map(|(frame, _)| frame).find(|frame| frame.flushed > frames.len() as u64) {
        Some(frame) => format!("DAMAGE, {why}, but frame {} says that it was flushed", frame.sequence),
        None => why,
    };
    (frames, start + at as u64, why)
}

impl DeviceReport {
    pub(super) fn print(&self) {
        for copy in &self.copies {
            match (&copy.superblock, &copy.fault) {
                (Some(block), _) => line!(
                    "superblock @{}: device {} of node {} in cluster {}, {} bytes, sector {}, log half {} of {} bytes, epoch {}",
                    copy.offset,
                    block.device,
                    block.node,
                    block.cluster,
                    block.bytes,
                    block.sector,
                    block.active_half,
                    block.log_half_bytes,
                    block.log_epoch
                ),
                (None, fault) => line!("superblock @{}: {}", copy.offset, fault.as_deref().unwrap_or("unreadable")),
            }
        }
        for frame in &self.frames {
            line!("frame {} @{}, {} bytes, flushed {}", frame.sequence, frame.offset, frame.bytes, frame.flushed);
            for record in &frame.records {
                line!("  {}", describe(record));
            }
        }
        match self.log_end {
            Some(end) => line!("the log ends @{end}: {}", self.log_ends_because),
            None => line!("no log: {}", self.log_ends_because),
        }
    }
}

/// A record in one line.
fn describe(record: &LogRecord) -> String {
    let places = |extents: &[Extent]| {
        let places = extents.iter().map(|extent| format!("@{}+{}", extent.offset, extent.bytes));
        places.collect::<Vec<_>>().join(" ")
    };
    match record {
        LogRecord::MemberCreated { volume, set, manifest, .. } => {
            format!("member of {volume} set {set} created, {} names in its manifest", manifest.len())
        }
        LogRecord::ReplicaGrew { volume, set, segment, extents } => {
            format!("replica of {segment} ({volume} set {set}) grew: {}", places(extents))
        }
        LogRecord::Sealed { volume, set, segment } => {
            format!("{} sealed, {} bytes ({volume} set {set})", segment.name, segment.bytes)
        }
        LogRecord::ManifestTrimmed { volume, set, border, undecided } => {
            format!("manifest of {volume} set {set} trimmed below {border}, but for {undecided:?}")
        }
        LogRecord::MemberFreed { volume, set } => format!("member of {volume} set {set} freed"),
        LogRecord::ShardPut { shard, entry } => {
            format!("shard {shard} put, {} bytes: {}", entry.bytes, places(&entry.extents))
        }
        LogRecord::SegmentsFreed { segments } => {
            let names: Vec<String> = segments.iter().map(ToString::to_string).collect();
            format!("segments freed: {}", names.join(" "))
        }
        LogRecord::ShardsFreed { shards } => {
            let names: Vec<String> = shards.iter().map(ToString::to_string).collect();
            format!("shards freed: {}", names.join(" "))
        }
        LogRecord::VolumeFreed { volume } => format!("{volume} freed"),
        LogRecord::OpenShardGrew { shard, extents, .. } => format!("open shard {shard} grew: {}", places(extents)),
        LogRecord::OpenShardFreed { shard } => format!("open shard {shard} freed"),
    }
}
