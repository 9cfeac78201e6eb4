//! A fast hash without random state: equal seeds must give equal runs in the simulator. A guest that chooses its blocks to
//! collide slows down its own volume only.

use std::hash::{BuildHasher, Hasher};

const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0xd1b5_4a32_d192_ed03;

/// Mixes all bits of `value` into all bits of the result.
#[inline]
pub(super) fn mix(value: u64) -> u64 {
    let product = u128::from(value ^ SECOND) * u128::from(FIRST);
    let folded = (product as u64) ^ ((product >> 64) as u64);
    folded.wrapping_mul(SECOND)
}

/// Makes hashers that all start the same.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FixedState;

impl BuildHasher for FixedState {
    type Hasher = FixedHasher;
    fn build_hasher(&self) -> FixedHasher {
        FixedHasher(FIRST)
    }
}

/// See [`mix`].
pub(super) struct FixedHasher(u64);

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0.rotate_left(23) ^ value);
    }
}
