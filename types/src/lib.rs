//! The words every other crate speaks: identifiers, units, redundancy schemes and error kinds.
//!
//! Pure data: no I/O, no clock, no allocation beyond what parsing needs. Reading order: [`id`], [`name`], [`scheme`],
//! [`units`], [`checksum`], [`error`].
#![forbid(unsafe_code)]

pub mod checksum;
pub mod error;
pub mod id;
pub mod member;
pub mod name;
pub mod register;
pub mod scheme;
pub mod units;

pub use checksum::{Crc32c, crc32c};
pub use error::ErrorKind;
pub use id::{
    ClusterId, DeviceId, Epoch, Generation, Incarnation, NodeId, PgId, PoolId, Sequence, SetId, ShardIndex, Version,
    VolumeId,
};
pub use member::{
    ClosedMember, FlushRequest, MemberRef, MemberState, OpenReplica, RegisterView, SEGMENT_BYTES_MAX, SealedSegment,
    ShardId, UNIT_BYTES,
};
pub use name::SegmentName;
pub use register::{
    ChangeToken, CheckpointRef, JournalSet, Register, RegisterChange, RegisterError, SetMember, VolumeState,
};
pub use scheme::{Scheme, SchemeError};
pub use units::{BLOCK_BYTES, BlockCount, BlockRange, Lba, SECTOR_BYTES, format_bytes, parse_bytes};
