//! Kernels for x86-64.

use super::Nibbles;
use super::lanes::{Lanes, sweep};
use std::arch::x86_64::*;
use std::ops::Range;

/// AVX-512 register, GFNI products, three-way XOR.
#[derive(Clone, Copy)]
struct Gfni512(__m512i);

impl Lanes for Gfni512 {
    const BYTES: usize = 64;
    const PAIRS: bool = true;
    type Table = u64;
    type Factor = __m512i;
    type Operand = __m512i;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm512_setzero_si512() })
    }
    #[inline(always)]
    unsafe fn factor(table: &u64) -> __m512i {
        // SAFETY: the caller promises the feature.
        unsafe { _mm512_set1_epi64(table.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn operand(at: *const u8) -> __m512i {
        // SAFETY: the caller promises the feature and 64 readable bytes; the load is unaligned.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn add_products(self, a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> Self {
        // SAFETY: the caller promises the feature. 0x96 is the truth table of a three-way XOR.
        unsafe {
            let first = _mm512_gf2p8affine_epi64_epi8::<0>(a, b);
            let second = _mm512_gf2p8affine_epi64_epi8::<0>(c, d);
            Self(_mm512_ternarylogic_epi64::<0x96>(self.0, first, second))
        }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: __m512i, b: __m512i) -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm512_xor_si512(self.0, _mm512_gf2p8affine_epi64_epi8::<0>(a, b)) })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut u8) {
        // SAFETY: the caller promises the feature and 64 writable bytes; the store is unaligned.
        unsafe { _mm512_storeu_si512(at.cast(), self.0) }
    }
}

/// AVX2 register, GFNI products.
#[derive(Clone, Copy)]
struct Gfni256(__m256i);

impl Lanes for Gfni256 {
    const BYTES: usize = 32;
    const PAIRS: bool = false;
    type Table = u64;
    type Factor = __m256i;
    type Operand = __m256i;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm256_setzero_si256() })
    }
    #[inline(always)]
    unsafe fn factor(table: &u64) -> __m256i {
        // SAFETY: the caller promises the feature.
        unsafe { _mm256_set1_epi64x(table.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn operand(at: *const u8) -> __m256i {
        // SAFETY: the caller promises the feature and 32 readable bytes; the load is unaligned.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    unsafe fn add_products(self, a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> Self {
        // SAFETY: the caller promises the feature.
        unsafe { self.add_product(a, b).add_product(c, d) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: __m256i, b: __m256i) -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm256_xor_si256(self.0, _mm256_gf2p8affine_epi64_epi8::<0>(a, b)) })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut u8) {
        // SAFETY: the caller promises the feature and 32 writable bytes; the store is unaligned.
        unsafe { _mm256_storeu_si256(at.cast(), self.0) }
    }
}

/// AVX2 register, half-byte look-ups.
#[derive(Clone, Copy)]
struct Avx2(__m256i);

impl Lanes for Avx2 {
    const BYTES: usize = 32;
    const PAIRS: bool = false;
    type Table = Nibbles;
    /// Products with the low half, products with the high half.
    type Factor = (__m256i, __m256i);
    /// Low halves, high halves.
    type Operand = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm256_setzero_si256() })
    }
    #[inline(always)]
    unsafe fn factor(table: &Nibbles) -> Self::Factor {
        let at: *const __m128i = table.0.as_ptr().cast();
        // SAFETY: the caller promises the feature; the table has 32 bytes and is aligned to 32.
        unsafe {
            let (low, high) = (_mm_load_si128(at), _mm_load_si128(at.add(1)));
            (_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high))
        }
    }
    #[inline(always)]
    unsafe fn operand(at: *const u8) -> Self::Operand {
        // SAFETY: the caller promises the feature and 32 readable bytes; the load is unaligned.
        unsafe {
            let bytes = _mm256_loadu_si256(at.cast());
            let mask = _mm256_set1_epi8(0x0F);
            (_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask))
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
        unsafe {
            let low = _mm256_shuffle_epi8(b.0, a.0);
            let high = _mm256_shuffle_epi8(b.1, a.1);
            Self(_mm256_xor_si256(_mm256_xor_si256(self.0, low), high))
        }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut u8) {
        // SAFETY: the caller promises the feature and 32 writable bytes; the store is unaligned.
        unsafe { _mm256_storeu_si256(at.cast(), self.0) }
    }
}

/// SSE register, half-byte look-ups.
#[derive(Clone, Copy)]
struct Ssse3(__m128i);

impl Lanes for Ssse3 {
    const BYTES: usize = 16;
    const PAIRS: bool = false;
    type Table = Nibbles;
    /// Products with the low half, products with the high half.
    type Factor = (__m128i, __m128i);
    /// Low halves, high halves.
    type Operand = (__m128i, __m128i);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller promises the feature.
        Self(unsafe { _mm_setzero_si128() })
    }
    #[inline(always)]
    unsafe fn factor(table: &Nibbles) -> Self::Factor {
        let at: *const __m128i = table.0.as_ptr().cast();
        // SAFETY: the caller promises the feature; the table has 32 bytes and is aligned to 32.
        unsafe { (_mm_load_si128(at), _mm_load_si128(at.add(1))) }
    }
    #[inline(always)]
    unsafe fn operand(at: *const u8) -> Self::Operand {
        // SAFETY: the caller promises the feature and 16 readable bytes; the load is unaligned.
        unsafe {
            let bytes = _mm_loadu_si128(at.cast());
            let mask = _mm_set1_epi8(0x0F);
            (_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask))
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
        unsafe {
            let low = _mm_shuffle_epi8(b.0, a.0);
            let high = _mm_shuffle_epi8(b.1, a.1);
            Self(_mm_xor_si128(_mm_xor_si128(self.0, low), high))
        }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut u8) {
        // SAFETY: the caller promises the feature and 16 writable bytes; the store is unaligned.
        unsafe { _mm_storeu_si128(at.cast(), self.0) }
    }
}

macro_rules! kernel {
    ($name:ident, $lanes:ty, $wide:literal, $narrow:literal, $table:ty, $features:literal) => {
        /// # Safety
        /// As [`sweep`]; the processor has the features named here.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(tables: &[$table], sources: &[*const u8], targets: &[*mut u8], span: Range<usize>) {
            // SAFETY: the caller's promise.
            unsafe { sweep::<$lanes, $wide, $narrow>(tables, sources, targets, span) }
        }
    };
}

kernel!(run_gfni512, Gfni512, 4, 2, u64, "gfni,avx512f,avx512bw");
kernel!(run_gfni256, Gfni256, 4, 2, u64, "gfni,avx2");
kernel!(run_avx2, Avx2, 2, 2, Nibbles, "avx2");
kernel!(run_ssse3, Ssse3, 2, 2, Nibbles, "ssse3");
