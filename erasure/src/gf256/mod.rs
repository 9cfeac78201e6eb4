//! Arithmetic in GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1 (`0x11D`), one byte at a time and many at a time.
//!
//! The one operation on the data path is a [`Program`]: `outputs[r] = sum over c of coefficient[r][c] * inputs[c]`, byte
//! by byte. Encoding and every reconstruction are programs with different coefficients. A program is compiled for a
//! [`Kernel`]; the loop over bytes, inputs and outputs is written once (`lanes`), a kernel supplies a register type:
//!
//! | kernel | multiplication | bytes per register |
//! |---|---|---|
//! | `gfni512` | `vgf2p8affineqb` with the 8x8 bit matrix of the coefficient (the instruction's own multiply is modulo `0x11B`) | 64 |
//! | `gfni256` | the same, VEX encoded | 32 |
//! | `avx2`, `ssse3`, `neon` | two 16-entry table look-ups, one per half byte | 32, 16, 16 |
//! | `scalar` | one 256-entry table look-up | 1 |
#![allow(unsafe_code)] // Vector loads and stores through raw pointers; every block states why it is sound.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod kernel;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes;
mod program;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use kernel::Usable;
pub use kernel::{KERNEL_VARIABLE, Kernel};
pub(crate) use program::Program;

/// Most inputs or outputs of a program: the widest scheme has 64 shards.
pub(crate) const SHARDS_MAX: usize = xsan_types::scheme::SHARDS_MAX as usize;

/// The reduction polynomial without its leading term.
const POLYNOMIAL: u8 = 0x1D;

/// `EXP[i]` = 2^i; twice the period, so that sums of two logarithms need no reduction.
const EXP: [u8; 510] = {
    let mut table = [0; 510];
    let mut value = 1u8;
    let mut at = 0;
    while at < 255 {
        table[at] = value;
        table[at + 255] = value;
        value = (value << 1) ^ if value & 0x80 != 0 { POLYNOMIAL } else { 0 };
        at += 1;
    }
    table
};

/// `LOG[x]` with 2 to that power is x; `LOG[0]` is not meaningful.
const LOG: [u8; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 255 {
        table[EXP[at] as usize] = at as u8;
        at += 1;
    }
    table
};

/// `a * b`.
pub(crate) const fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 { 0 } else { EXP[LOG[a as usize] as usize + LOG[b as usize] as usize] }
}

/// `1 / a`, or nothing for 0.
pub(crate) const fn inverse(a: u8) -> Option<u8> {
    if a == 0 { None } else { Some(EXP[255 - LOG[a as usize] as usize]) }
}

/// `a^n`, with 0^0 = 1.
pub(crate) const fn power(a: u8, n: usize) -> u8 {
    if n == 0 {
        1
    } else if a == 0 {
        0
    } else {
        EXP[(LOG[a as usize] as usize * n) % 255]
    }
}

/// A coefficient for the half-byte kernels: products with 0x00..=0x0F, then with 0x00, 0x10, ..., 0xF0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub(crate) struct Nibbles([u8; 32]);

impl Nibbles {
    const fn of(coefficient: u8) -> Self {
        let mut table = [0; 32];
        let mut at = 0;
        while at < 16 {
            table[at as usize] = multiply(coefficient, at);
            table[16 + at as usize] = multiply(coefficient, at << 4);
            at += 1;
        }
        Self(table)
    }
}

/// A coefficient for the GFNI kernels: the 8x8 bit matrix of "multiply by it", in the layout of `gf2p8affineqb`
/// (Intel SDM, GF2P8AFFINEQB): bit i of the result is the parity of (byte 7-i of the matrix AND the operand).
const fn affine(coefficient: u8) -> u64 {
    let mut matrix = 0u64;
    let mut column = 0;
    while column < 8 {
        let product = multiply(coefficient, 1 << column);
        let mut bit = 0;
        while bit < 8 {
            if product >> bit & 1 != 0 {
                matrix |= 1 << (8 * (7 - bit) + column);
            }
            bit += 1;
        }
        column += 1;
    }
    matrix
}

static NIBBLES: [Nibbles; 256] = {
    let mut table = [Nibbles([0; 32]); 256];
    let mut at = 0;
    while at < 256 {
        table[at] = Nibbles::of(at as u8);
        at += 1;
    }
    table
};

static AFFINES: [u64; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        table[at] = affine(at as u8);
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication by the school method, independent of every table.
    fn slow_multiply(a: u8, b: u8) -> u8 {
        let mut product = 0u16;
        for bit in 0..8 {
            if b >> bit & 1 != 0 {
                product ^= u16::from(a) << bit;
            }
        }
        for bit in (8..15).rev() {
            if product >> bit & 1 != 0 {
                product ^= 0x11D << (bit - 8);
            }
        }
        product as u8
    }

    /// What `gf2p8affineqb` does to one byte, from the pseudocode of the manual.
    fn affine_byte(matrix: u64, operand: u8) -> u8 {
        (0..8).fold(0, |result, bit| {
            let row = matrix.to_le_bytes()[7 - bit];
            result | ((row & operand).count_ones() as u8 & 1) << bit
        })
    }

    #[test]
    fn every_product_equals_long_multiplication_in_every_form_of_a_coefficient() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let expected = slow_multiply(a, b);
                assert_eq!(multiply(a, b), expected);
                let Nibbles(table) = NIBBLES[usize::from(a)];
                assert_eq!(table[usize::from(b & 15)] ^ table[16 + usize::from(b >> 4)], expected);
                assert_eq!(affine_byte(AFFINES[usize::from(a)], b), expected);
            }
        }
    }

    #[test]
    fn every_element_but_zero_has_an_inverse() {
        assert_eq!(inverse(0), None);
        for a in 1..=255u8 {
            assert_eq!(slow_multiply(a, inverse(a).unwrap()), 1);
        }
    }

    #[test]
    fn powers_are_repeated_products() {
        for a in 0..=255u8 {
            let mut expected = 1;
            for n in 0..300 {
                assert_eq!(power(a, n), expected, "{a}^{n}");
                expected = slow_multiply(expected, a);
            }
        }
    }
}
