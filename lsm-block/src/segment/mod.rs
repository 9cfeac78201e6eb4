//! Bytes of a volume's log: journal records of open segments and footers of sealed ones. Specified in
//! `docs/format/segment.md`.

pub mod codec;
pub mod footer;
pub mod record;

pub use footer::{Footer, FooterEntry, FooterError};
pub use record::{Entry, EntryKind, RecordBuilder, RecordError, RecordHeader, RowsRef};

/// Logical bytes a sealed segment aims at, footer included: 16 MiB.
pub const SEGMENT_BYTES: u64 = 16 << 20;
