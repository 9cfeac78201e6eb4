//! Which byte of a sealed segment lies where in its shards.
//!
//! The segment is cut in stripe rows of k units; shard i holds unit i of every row, one behind the other. The last row,
//! if the segment does not fill it, has a smaller unit, so that a short segment is spread over all data shards and wastes
//! less than 4 KiB per shard:
//!
//! ```text
//! segment   | row 0: u0 u1 .. uk-1 | row 1: u0 u1 .. uk-1 | last row, smaller: u0 u1 .. uk-1 + zeros |
//! shard i   | row 0: ui            | row 1: ui            | last row: ui |
//! ```
//!
//! Behind the segment's end the shards hold zeros. Parity shards have the same length and rows as data shards. Every copy
//! of a `replica(n)` is the segment itself, padded to 4 KiB: one row of one unit.

use crate::Error;
use std::ops::Range;
use xsan_types::{Scheme, ShardIndex};

/// Default unit: consecutive bytes of a segment in one shard. 64 KiB keeps a small read on one device and lets a 256 KiB
/// sequential read of 4+2 use four.
pub const UNIT_BYTES: u32 = 64 << 10;

/// Units, and so shards, are multiples of this: device blocks and direct I/O.
pub const SHARD_ALIGN: u64 = 4096;

/// Longest segment, far above every sensible one; keeps all sums of offsets inside 64 bits.
pub const LENGTH_MAX: u64 = 1 << 48;

/// The geometry of one sealed segment. A pure function of scheme, unit and length, so only these are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    scheme: Scheme,
    unit: u32,
    length: u64,
}

/// One row of a stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// From 0.
    pub number: u64,
    /// Where the row begins in the segment; its bytes are the next k * `unit` (the last row's may pass the end).
    pub segment_offset: u64,
    /// Where the row begins in every shard; its bytes are the next `unit`.
    pub shard_offset: u64,
    /// Bytes of the row in each shard, a multiple of [`SHARD_ALIGN`].
    pub unit: u64,
}

impl Row {
    /// The row's bytes in every shard.
    #[must_use]
    pub fn shard_range(&self) -> Range<u64> {
        self.shard_offset..self.shard_offset + self.unit
    }
}

/// Consecutive bytes of a segment that are consecutive bytes of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// A data shard; for `replica(n)` always 0, and any other copy has the same bytes in the same place.
    pub shard: ShardIndex,
    /// First byte in the shard.
    pub shard_offset: u64,
    /// Number of bytes, at least 1.
    pub bytes: u64,
}

impl Stripe {
    /// The geometry of a segment of `length` bytes with the default unit, [`UNIT_BYTES`].
    ///
    /// # Errors
    /// [`Error::LengthTooLarge`].
    pub fn new(scheme: Scheme, length: u64) -> Result<Self, Error> {
        Self::with_unit(scheme, UNIT_BYTES, length)
    }

    /// The geometry with a unit of `unit` bytes (`replica(n)` does not use it).
    ///
    /// # Errors
    /// [`Error::UnitInvalid`], [`Error::LengthTooLarge`]: no such stripe was ever written.
    pub fn with_unit(scheme: Scheme, unit: u32, length: u64) -> Result<Self, Error> {
        if unit == 0 || !u64::from(unit).is_multiple_of(SHARD_ALIGN) {
            return Err(Error::UnitInvalid { unit });
        }
        if length > LENGTH_MAX {
            return Err(Error::LengthTooLarge { length });
        }
        Ok(Self { scheme, unit, length })
    }

    /// The scheme.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Data shards.
    #[must_use]
    pub fn k(&self) -> usize {
        self.scheme.k()
    }

    /// Parity shards, or further copies.
    #[must_use]
    pub fn m(&self) -> usize {
        self.scheme.tolerates()
    }

    /// The unit of full rows, in bytes, as given.
    #[must_use]
    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// Bytes of the segment, as given.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of every shard: the rows' units. 0 for an empty segment.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.full_rows() * self.full_unit() + self.last_unit()
    }

    /// Bytes of all data shards together; from [`Stripe::length`] to here they are zeros.
    #[must_use]
    pub fn padded_bytes(&self) -> u64 {
        self.shard_bytes() * self.k() as u64
    }

    /// Number of rows.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        self.full_rows() + u64::from(self.last_unit() > 0)
    }

    /// The row with a number below [`Stripe::row_count`].
    #[must_use]
    pub fn row(&self, number: u64) -> Option<Row> {
        let unit = if number < self.full_rows() { self.full_unit() } else { self.last_unit() };
        (number < self.row_count()).then(|| Row {
            number,
            segment_offset: number * self.row_bytes(),
            shard_offset: number * self.full_unit(),
            unit,
        })
    }

    /// All rows in order.
    pub fn rows(&self) -> impl Iterator<Item = Row> + use<> {
        let stripe = *self;
        (0..self.row_count()).map_while(move |number| stripe.row(number))
    }

    /// The row a byte of a shard lies in; nothing outside the shard.
    #[must_use]
    pub fn row_of(&self, shard_offset: u64) -> Option<Row> {
        if shard_offset < self.shard_bytes() { self.row(shard_offset / self.full_unit()) } else { None }
    }

    /// Where `bytes` bytes of the segment from `offset` are, in order; each piece lies within one unit.
    ///
    /// # Errors
    /// [`Error::RangeOutside`] unless the range lies inside the segment (an empty one may sit at its end).
    pub fn map(&self, offset: u64, bytes: u64) -> Result<Pieces, Error> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.length => Ok(Pieces { stripe: *self, at: offset, end }),
            _ => Err(Error::RangeOutside { offset, bytes, length: self.length }),
        }
    }

    /// The byte of the segment at `shard_offset` of shard `index`: the inverse of [`Stripe::map`]. Nothing for padding,
    /// for parity, and outside the shard. Every copy of a `replica(n)` has all bytes.
    #[must_use]
    pub fn segment_offset(&self, index: ShardIndex, shard_offset: u64) -> Option<u64> {
        let row = self.row_of(shard_offset)?;
        let index = usize::from(index.0);
        let unit = match self.scheme.is_replica() {
            true if index < self.scheme.width() => 0,
            false if index < self.k() => index as u64,
            _ => return None,
        };
        let offset = row.segment_offset + unit * row.unit + (shard_offset - row.shard_offset);
        (offset < self.length).then_some(offset)
    }

    /// Unit of full rows. A replica is not cut: its unit is longer than every segment.
    fn full_unit(&self) -> u64 {
        if self.scheme.is_replica() { 2 * LENGTH_MAX } else { self.unit.into() }
    }

    /// Segment bytes of a full row.
    fn row_bytes(&self) -> u64 {
        self.full_unit() * self.k() as u64
    }

    fn full_rows(&self) -> u64 {
        self.length / self.row_bytes()
    }

    /// Unit of the last, partial row; 0 when the segment is whole rows.
    fn last_unit(&self) -> u64 {
        (self.length % self.row_bytes()).div_ceil(self.k() as u64).next_multiple_of(SHARD_ALIGN)
    }

    /// The piece at `at`, as long as its unit goes on, and not past `end`.
    fn piece(&self, at: u64, end: u64) -> Option<Piece> {
        let row = self.row(at / self.row_bytes())?;
        let inside = at - row.segment_offset;
        let (unit, skip) = (inside / row.unit, inside % row.unit);
        let shard = u8::try_from(unit).ok().map(ShardIndex)?;
        Some(Piece { shard, shard_offset: row.shard_offset + skip, bytes: (row.unit - skip).min(end - at) })
    }
}

/// The pieces of a byte range; see [`Stripe::map`].
#[derive(Clone, Debug)]
pub struct Pieces {
    stripe: Stripe,
    at: u64,
    end: u64,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let piece = self.stripe.piece(self.at, self.end);
        debug_assert!(piece.is_some(), "every byte of the segment has a place");
        self.at += piece?.bytes;
        piece
    }
}
