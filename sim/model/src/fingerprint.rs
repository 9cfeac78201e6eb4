//! A 64-bit number for a state. The search remembers these alone, which is what lets it hold tens of millions of states.

use std::hash::{BuildHasherDefault, Hash, Hasher};

/// What stands for a state in the set of those seen. Two states with the same one are taken for the same: among 30
/// million states the chance that there is one such pair is about 1 in 40,000.
pub type Fingerprint = u64;

/// The fingerprint of a state; the same in every run.
pub fn fingerprint<S: Hash>(state: &S) -> Fingerprint {
    let mut hasher = Mixer::default();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Collects bytes and mixes eight at a time: states are hundreds of bytes, and hashing them is most of the work.
#[derive(Default)]
struct Mixer {
    mixed: u64,
    pending: u64,
    pending_bits: u32,
}

impl Mixer {
    fn push(&mut self, value: u64, bits: u32) {
        if self.pending_bits + bits > u64::BITS {
            self.mix();
        }
        self.pending = self.pending.checked_shl(bits).unwrap_or(0) | value;
        self.pending_bits += bits;
    }

    /// Multiplication carries low bits upwards, the shift brings high ones down; both can be undone, so nothing is lost.
    fn mix(&mut self) {
        let sum =
            (self.mixed ^ self.pending ^ (u64::from(self.pending_bits) << 57)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.mixed = (sum ^ (sum >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        self.mixed ^= self.mixed >> 29;
        self.pending = 0;
        self.pending_bits = 0;
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        let mut last = Self { mixed: self.mixed, pending: self.pending, pending_bits: self.pending_bits };
        last.mix();
        last.mixed
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.push(u64::from(*byte), 8);
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.push(u64::from(value), 8);
    }

    fn write_u16(&mut self, value: u16) {
        self.push(u64::from(value), 16);
    }

    fn write_u32(&mut self, value: u32) {
        self.push(u64::from(value), 32);
    }

    fn write_u64(&mut self, value: u64) {
        self.push(value, 64);
    }

    fn write_usize(&mut self, value: usize) {
        // Lengths: none here is greater.
        self.push(value as u64 & 0xffff, 16);
    }

    /// Discriminants of enums: none here has more than 256 variants.
    fn write_isize(&mut self, value: isize) {
        self.push(value.unsigned_abs() as u64 & 0xff, 8);
    }
}

/// A fingerprint is mixed already: tables take it as it is.
#[derive(Default)]
pub struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// From the fingerprint of a state to that of the state it was reached from.
pub type Parents = hashbrown::HashMap<Fingerprint, Fingerprint, BuildHasherDefault<AsItIs>>;

#[cfg(test)]
mod tests {
    use super::fingerprint;

    #[test]
    fn small_changes_and_moved_bytes_make_other_fingerprints() {
        let mut seen = std::collections::BTreeSet::new();
        for a in 0..64u8 {
            for b in 0..64u8 {
                for c in 0..16u16 {
                    assert!(seen.insert(fingerprint(&(a, b, c, [0u8; 20], 0u64))));
                }
            }
        }
    }
}
