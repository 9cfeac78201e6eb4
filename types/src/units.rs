//! Blocks, sectors and human sizes.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a block: the unit of the index and of every checksum.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of a guest sector: the smallest request the engine takes (merged into blocks inside the engine).
pub const SECTOR_BYTES: u64 = 512;

/// Index of a 4 KiB block in a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lba(pub u64);

/// A number of 4 KiB blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockCount(pub u64);

impl BlockCount {
    /// The same length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0 * BLOCK_BYTES
    }

    /// Blocks that hold `bytes`, rounded up.
    #[must_use]
    pub fn holding(bytes: u64) -> Self {
        Self(bytes.div_ceil(BLOCK_BYTES))
    }
}

impl Lba {
    /// Byte offset of the block in its volume.
    #[must_use]
    pub fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

/// `count` blocks from `start`; `end()` is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub start: Lba,
    /// Length in blocks.
    pub count: u64,
}

impl BlockRange {
    /// The range `start..end`; empty when `end <= start`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        Self { start: Lba(start), count: end.saturating_sub(start) }
    }

    /// One past the last block.
    #[must_use]
    pub fn end(&self) -> Lba {
        Lba(self.start.0 + self.count)
    }

    /// Whether `lba` lies inside.
    #[must_use]
    pub fn contains(&self, lba: Lba) -> bool {
        lba >= self.start && lba < self.end()
    }
}

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Prints a byte count with at most one decimal: `1.5 GiB`, `512 B`.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    let (unit, scale) = UNITS.into_iter().find(|&(_, scale)| bytes >= scale).unwrap_or(("B", 1));
    let tenths = (u128::from(bytes) * 10 / u128::from(scale)) as u64;
    if tenths.is_multiple_of(10) {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// Reads a size as users write it: `1TiB`, `100 GiB`, `512M`, `4096`. `K`, `M`, `G`, `T` and `KB`… count as binary
/// units: a volume is never smaller than asked. Decimals are taken (`1.5GiB`).
///
/// # Errors
/// A sentence that says what was expected.
pub fn parse_bytes(text: &str) -> Result<u64, ParseBytesError> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        "p" | "pb" | "pib" => 1 << 50,
        _ => return Err(ParseBytesError::Unit),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if fraction.len() > 9 || (whole.is_empty() && fraction.is_empty()) {
        return Err(ParseBytesError::Number);
    }
    let number =
        |part: &str| if part.is_empty() { Ok(0) } else { part.parse::<u64>().map_err(|_| ParseBytesError::Number) };
    let base = number(whole)?.checked_mul(scale).ok_or(ParseBytesError::Range)?;
    let part = u128::from(number(fraction)?) * u128::from(scale) / 10u128.pow(fraction.len() as u32);
    base.checked_add(part as u64).ok_or(ParseBytesError::Range)
}

/// Why a size was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseBytesError {
    /// Not a number.
    #[error("not a size; write a number and a unit, for example 100GiB")]
    Number,
    /// Unknown unit.
    #[error("unknown unit; use KiB, MiB, GiB, TiB or PiB")]
    Unit,
    /// Does not fit 64 bits.
    #[error("the size does not fit 64 bits")]
    Range,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_users_write_them() {
        assert_eq!(parse_bytes("1TiB"), Ok(1 << 40));
        assert_eq!(parse_bytes(" 1.5 G "), Ok(3 << 29));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("10x"), Err(ParseBytesError::Unit));
        assert_eq!(parse_bytes("GiB"), Err(ParseBytesError::Number));
        assert_eq!(parse_bytes("1.2.3G"), Err(ParseBytesError::Number));
        assert_eq!(parse_bytes("99999999999T"), Err(ParseBytesError::Range));
    }

    #[test]
    fn sizes_are_printed_short() {
        assert_eq!(format_bytes(0), "0 B");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(1 << 40), "1 TiB");
    }
}
