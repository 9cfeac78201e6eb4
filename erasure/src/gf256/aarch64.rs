//! Kernel for AArch64.

use super::Nibbles;
use super::lanes::{Lanes, sweep};
use std::arch::aarch64::*;
use std::ops::Range;

/// Advanced SIMD register, half-byte look-ups.
#[derive(Clone, Copy)]
struct Neon(uint8x16_t);

impl Lanes for Neon {
    const BYTES: usize = 16;
    const PAIRS: bool = false;
    type Table = Nibbles;
    /// Products with the low half, products with the high half.
    type Factor = (uint8x16_t, uint8x16_t);
    /// Low halves, high halves.
    type Operand = (uint8x16_t, uint8x16_t);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { vdupq_n_u8(0) })
    }
    #[inline(always)]
    unsafe fn factor(table: &Nibbles) -> Self::Factor {
        let at = table.0.as_ptr();
        // SAFETY: the caller promises the feature; the table has 32 bytes.
        unsafe { (vld1q_u8(at), vld1q_u8(at.add(16))) }
    }
    #[inline(always)]
    unsafe fn operand(at: *const u8) -> Self::Operand {
        // SAFETY: the caller promises the feature and 16 readable bytes; the load needs no alignment.
        unsafe {
            let bytes = vld1q_u8(at);
            (vandq_u8(bytes, vdupq_n_u8(0x0F)), vshrq_n_u8::<4>(bytes))
        }
    }
    #[inline(always)]
    unsafe fn add_products(self, a: Self::Operand, b: Self::Factor, c: Self::Operand, d: Self::Factor) -> Self {
        // SAFETY: the caller promises the feature.
        unsafe { self.add_product(a, b).add_product(c, d) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self::Operand, b: Self::Factor) -> Self {
        // SAFETY: the caller promises the feature.
        unsafe { Self(veorq_u8(veorq_u8(self.0, vqtbl1q_u8(b.0, a.0)), vqtbl1q_u8(b.1, a.1))) }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut u8) {
        // SAFETY: the caller promises the feature and 16 writable bytes; the store needs no alignment.
        unsafe { vst1q_u8(at, self.0) }
    }
}

/// # Safety
/// As [`sweep`]; the processor has Advanced SIMD.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run_neon(tables: &[Nibbles], sources: &[*const u8], targets: &[*mut u8], span: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { sweep::<Neon, 4, 2>(tables, sources, targets, span) }
}
