//! Why a call was refused.

use crate::Kernel;
use std::fmt;
use xsan_types::{ErrorKind, ShardIndex};

/// Which list of shards a count or a length was wrong in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardRole {
    /// The shards read by an encode.
    Data,
    /// The shards written by an encode.
    Parity,
    /// The shards read by a reconstruction.
    Present,
    /// The shards written by a reconstruction.
    Wanted,
}

impl fmt::Display for ShardRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Parity => "parity",
            Self::Present => "present",
            Self::Wanted => "wanted",
        })
    }
}

/// A refused call. Nothing was written to any output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An encode needs exactly k data and m parity shards.
    #[error("{found} {role} shards given, the scheme has {expected}")]
    ShardCount {
        /// The list that was wrong.
        role: ShardRole,
        /// Shards of that role in the scheme.
        expected: usize,
        /// Shards given.
        found: usize,
    },
    /// All shards of a call have the same length.
    #[error("{role} shard number {position} has {found} bytes, the first one has {expected}")]
    UnequalLengths {
        /// The list that was wrong.
        role: ShardRole,
        /// Position in that list.
        position: usize,
        /// Length of the first shard of the call, in bytes.
        expected: usize,
        /// Length of this one, in bytes.
        found: usize,
    },
    /// Fewer than k shards are there; more must come back first.
    #[error("{found} shards present, {needed} needed")]
    TooFewShards {
        /// k.
        needed: usize,
        /// Shards given.
        found: usize,
    },
    /// A shard was named twice, or is both present and wanted.
    #[error("shard {index} is named twice")]
    DuplicateIndex {
        /// The shard.
        index: ShardIndex,
    },
    /// The scheme has no such shard.
    #[error("shard {index} does not exist, the scheme has {width} shards")]
    IndexOutOfRange {
        /// The shard.
        index: ShardIndex,
        /// Shards of the scheme.
        width: usize,
    },
    /// This processor (or this build) cannot run the kernel that was asked for.
    #[error("the erasure kernel {kernel} cannot run on this processor")]
    KernelUnsupported {
        /// The kernel asked for.
        kernel: Kernel,
    },
    /// The environment variable or the text names no kernel.
    #[error("no such erasure kernel; {} takes gfni512, gfni256, avx2, ssse3, neon or scalar", crate::KERNEL_VARIABLE)]
    KernelUnknown,
    /// A stripe unit must be a positive multiple of [`SHARD_ALIGN`](crate::SHARD_ALIGN).
    #[error("a stripe unit of {unit} bytes is not a positive multiple of {}", crate::SHARD_ALIGN)]
    UnitInvalid {
        /// The unit, in bytes.
        unit: u32,
    },
    /// No segment is longer than [`LENGTH_MAX`](crate::LENGTH_MAX).
    #[error("a segment of {length} bytes is longer than {} bytes", crate::LENGTH_MAX)]
    LengthTooLarge {
        /// The length, in bytes.
        length: u64,
    },
    /// A byte range that leaves the segment.
    #[error("bytes {offset}+{bytes} leave the segment of {length} bytes")]
    RangeOutside {
        /// First byte of the range.
        offset: u64,
        /// Length of the range.
        bytes: u64,
        /// Length of the segment.
        length: u64,
    },
}

impl Error {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooFewShards { .. } => ErrorKind::Unavailable,
            _ => ErrorKind::Invalid,
        }
    }
}
