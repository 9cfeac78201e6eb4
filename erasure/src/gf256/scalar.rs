//! The kernel for any processor, and the one the others are compared with.

use super::multiply;
use std::ops::Range;

/// `PRODUCTS[a][b]` = a * b.
static PRODUCTS: [[u8; 256]; 256] = {
    let mut table = [[0; 256]; 256];
    let mut a = 0;
    while a < 256 {
        let mut b = 0;
        while b < 256 {
            table[a][b] = multiply(a as u8, b as u8);
            b += 1;
        }
        a += 1;
    }
    table
};

/// Computes `span` of the targets; `coefficients` holds, for each source, one byte per target.
///
/// # Safety
/// The pointers are good for `0..span.end`; no target overlaps another pointer.
pub(super) unsafe fn run(coefficients: &[u8], sources: &[*const u8], targets: &[*mut u8], span: Range<usize>) {
    for (row, &target) in targets.iter().enumerate() {
        // SAFETY: the caller promises bytes up to `span.end`, and that nothing else refers to the target.
        let target = unsafe { std::slice::from_raw_parts_mut(target.add(span.start), span.len()) };
        target.fill(0);
        for (input, &source) in sources.iter().enumerate() {
            // SAFETY: the caller promises bytes up to `span.end`, which no target overlaps.
            let source = unsafe { std::slice::from_raw_parts(source.add(span.start), span.len()) };
            let products = &PRODUCTS[usize::from(coefficients[input * targets.len() + row])];
            for (sum, &byte) in target.iter_mut().zip(source) {
                *sum ^= products[usize::from(byte)];
            }
        }
    }
}
