//! CRC-32C (Castagnoli), the checksum of blocks, headers and frames.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A CRC-32C value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Crc32c(pub u32);

impl fmt::Display for Crc32c {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// CRC-32C of `bytes` (iSCSI polynomial, reflected, initial and final xor all ones): `"123456789"` gives `e3069283`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> Crc32c {
    Crc32c(crc_fast::crc32_iscsi(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_polynomial_holds() {
        assert_eq!(crc32c(b"123456789"), Crc32c(0xe306_9283));
        assert_eq!(crc32c(&[0; 32]), Crc32c(0x8a91_36aa)); // RFC 3720, B.4
    }
}
