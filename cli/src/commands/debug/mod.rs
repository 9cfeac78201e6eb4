//! `xsan debug`: reads devices and metadata for people. Opens files for reading only, shows what can be read and says what
//! cannot; bytes: docs/format/device.md, docs/format/segment.md, docs/format/meta.md.
//!
//! Bounds: one half of a device log, or the list of a device's shards, in memory; shards and replicas are read in windows.

mod device;
mod image;
mod index;
mod meta;
mod segment;
mod shard;

use super::{Failure, Output, output};
use clap::{Args, Subcommand};
use image::Image;
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use xsan_env::os::OsRuntime;
use xsan_types::VolumeId;

#[derive(Debug, Subcommand)]
pub(super) enum DebugCommand {
    /// Superblocks and log of a device.
    ///
    /// Example: xsan debug device DIR/n1/device.img (DIR is that of `xsan dev`). A running cluster may be looked at: what it
    /// writes meanwhile may show as a torn end of the log.
    Device {
        /// A device, or its image file.
        path: PathBuf,
    },
    /// Shards found on a device by their headers; deleted ones may be among them.
    Shard(ShardArgs),
    /// Where the shards of segments are, and the records of open replicas.
    Segment(SegmentArgs),
    /// The shard index of a device: which shards it has, and where.
    ///
    /// Looks at a copy that it makes among the temporary files. Example: xsan debug index DIR/n1/index.
    Index(IndexArgs),
    /// Log and snapshot of the metadata.
    Meta {
        /// The directory `meta` of a node, or of a cluster in one process.
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct ShardArgs {
    /// A device, or its image file.
    path: PathBuf,
    /// Only this volume's (its id).
    #[arg(long, value_name = "ID")]
    volume: Option<u64>,
    /// Read every shard and compare its BLAKE3 hash.
    #[arg(long)]
    verify: bool,
}

#[derive(Debug, Args)]
pub(super) struct IndexArgs {
    /// The directory of the index.
    dir: PathBuf,
    /// Only this volume's (its id).
    #[arg(long, value_name = "ID")]
    volume: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct SegmentArgs {
    /// Devices, or their image files.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only this volume's (its id).
    #[arg(long, value_name = "ID")]
    volume: Option<u64>,
    /// Only segments with this number.
    #[arg(long)]
    number: Option<u64>,
}

/// Does one of the commands.
pub(super) async fn run(command: DebugCommand, output: Output) -> Result<(), Failure> {
    match command {
        DebugCommand::Device { path } => {
            let report = device::device_report(&Image::open(&path)?);
            print(output, &report, || report.print());
        }
        DebugCommand::Shard(args) => {
            let image = Image::open(&args.path)?;
            let superblock = image.superblock_or_refuse()?;
            let shards = shard::scan(&image, &superblock, args.volume.map(VolumeId), args.verify);
            print(output, &shards, || shards.iter().for_each(shard::FoundShard::print));
        }
        DebugCommand::Segment(args) => {
            let report = segment::segment_report(&args)?;
            print(output, &report, || report.iter().for_each(segment::SegmentReport::print));
        }
        DebugCommand::Index(args) => {
            let env = OsRuntime::current();
            let report = index::index_report(&env, &args.dir, args.volume.map(VolumeId)).await?;
            print(output, &report, || report.print());
        }
        DebugCommand::Meta { dir } => meta::meta(&dir, output)?,
    }
    Ok(())
}

fn print(output: Output, value: &impl Serialize, text: impl FnOnce()) {
    match output {
        Output::Json => output::json(value),
        Output::Text => text(),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::Usage(format!("cannot read {}: {error}", path.display()), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use super::{device::device_report, shard::scan};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use xsan_node::format::{
        Extent, Frame, LogRecord, SHARD_HEADER_BYTES, SUPERBLOCK_OFFSETS, ShardEntry, Superblock, UNIT,
    };
    use xsan_types::{ClusterId, DeviceId, Generation, NodeId, PgId, SegmentName, ShardId, ShardIndex};

    const BYTES: u64 = 64 << 20;

    fn block() -> Superblock {
        Superblock {
            cluster: ClusterId(1),
            node: NodeId(2),
            device: DeviceId(3),
            bytes: BYTES,
            sector: 512,
            log_half_bytes: 1 << 20,
            active_half: 0,
            log_epoch: 1,
        }
    }

    /// A device with two frames, the first of which says a shard is put, and that shard.
    fn device(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("xsan-debug-{name}-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(BYTES).unwrap();
        for offset in SUPERBLOCK_OFFSETS {
            file.write_all_at(&block().encode(), offset).unwrap();
        }
        let at = block().area_offset();
        let segment = SegmentName { volume: VolumeId(7), generation: Generation(1), number: 9, pg: PgId::default() };
        let shard = ShardId { segment, index: ShardIndex(4) };
        let body = vec![5; 8192];
        let extents = vec![Extent { offset: at, bytes: UNIT }];
        let entry = ShardEntry { bytes: 8192, hash: *blake3::hash(&body).as_bytes(), extents, allocation: 1 };
        file.write_all_at(&entry.header(DeviceId(3), shard), at).unwrap();
        file.write_all_at(&body, at + SHARD_HEADER_BYTES as u64).unwrap();
        let mut log = block().half_offset(0);
        for (sequence, records) in [(0, vec![LogRecord::ShardPut { shard, entry }]), (1, Vec::new())] {
            let bytes = Frame { sequence, flushed: sequence, records }.encode(DeviceId(3), 1, 512);
            file.write_all_at(&bytes, log).unwrap();
            log += bytes.len() as u64;
        }
        path
    }

    fn open(path: &Path) -> Image {
        Image::open(path).unwrap_or_else(|_| panic!("cannot open"))
    }

    fn spoil(path: &Path, offset: u64) {
        File::options().write(true).open(path).unwrap().write_all_at(&[0xff; 64], offset).unwrap();
    }

    #[test]
    fn a_device_is_shown_as_far_as_it_can_be_read() {
        let path = device("device");
        assert_eq!(device_report(&open(&path)).frames.len(), 2);
        spoil(&path, SUPERBLOCK_OFFSETS[0]);
        let report = device_report(&open(&path));
        assert!(report.copies[0].fault.is_some() && report.frames.len() == 2);
        spoil(&path, block().half_offset(0));
        let report = device_report(&open(&path));
        assert!(report.frames.is_empty() && report.log_ends_because.starts_with("DAMAGE"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn shards_are_found_by_their_headers_and_damage_is_told() {
        let path = device("shard");
        let look = || scan(&open(&path), &block(), Some(VolumeId(7)), true);
        assert_eq!(look().iter().map(|shard| shard.whole).collect::<Vec<_>>(), [Some(true)]);
        assert!(scan(&open(&path), &block(), Some(VolumeId(8)), false).is_empty());
        spoil(&path, block().area_offset() + 5000);
        assert_eq!(look().iter().map(|shard| shard.whole).collect::<Vec<_>>(), [Some(false)]);
        std::fs::remove_file(path).unwrap();
    }
}
