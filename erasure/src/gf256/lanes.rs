//! The loop of every vector kernel.

use super::program::GROUP_ROWS;
use std::ops::Range;

/// A vector register of byte lanes and what a kernel does with it.
///
/// All functions are `inline(always)`: they only become instructions of the kernel's feature set inside a caller that
/// enables it.
pub(super) trait Lanes: Copy {
    /// Bytes of a register; at most 64.
    const BYTES: usize;
    /// Whether sources are taken in pairs: worth the registers only where three terms are added in one instruction.
    const PAIRS: bool;
    /// A coefficient in memory.
    type Table;
    /// A coefficient in registers.
    type Factor: Copy;
    /// Input bytes made ready for multiplication.
    type Operand: Copy;

    /// # Safety
    /// The processor has the kernel's features.
    unsafe fn zero() -> Self;
    /// # Safety
    /// The processor has the kernel's features.
    unsafe fn factor(table: &Self::Table) -> Self::Factor;
    /// # Safety
    /// The processor has the kernel's features; `BYTES` bytes are readable at `at`, aligned or not.
    unsafe fn operand(at: *const u8) -> Self::Operand;
    /// `self + a * b + c * d`, lane by lane.
    /// # Safety
    /// The processor has the kernel's features.
    unsafe fn add_products(self, a: Self::Operand, b: Self::Factor, c: Self::Operand, d: Self::Factor) -> Self;
    /// `self + a * b`, lane by lane.
    /// # Safety
    /// The processor has the kernel's features.
    unsafe fn add_product(self, a: Self::Operand, b: Self::Factor) -> Self;
    /// # Safety
    /// The processor has the kernel's features; `BYTES` bytes are writable at `at`, aligned or not.
    unsafe fn store(self, at: *mut u8);
}

/// Computes `span` of one to four targets; `tables` holds, for each source, one coefficient per target. `WIDE` registers
/// per row and step when the group has one or two rows, `NARROW` when it has more: as many as the register file holds.
///
/// # Safety
/// The processor has the kernel's features; the pointers are good for `0..span.end`, which is at least `L::BYTES`; no
/// target overlaps another pointer; `tables` has sources x targets elements.
#[inline(always)]
pub(super) unsafe fn sweep<L: Lanes, const WIDE: usize, const NARROW: usize>(
    tables: &[L::Table],
    sources: &[*const u8],
    targets: &[*mut u8],
    span: Range<usize>,
) {
    assert!(tables.len() == sources.len() * targets.len() && span.end >= L::BYTES, "as compiled");
    // SAFETY: the caller's promise, and R is the number of targets.
    unsafe {
        match targets.len() {
            1 => sweep_rows::<L, 1, WIDE>(tables, sources, targets, span),
            2 => sweep_rows::<L, 2, WIDE>(tables, sources, targets, span),
            3 => sweep_rows::<L, 3, NARROW>(tables, sources, targets, span),
            GROUP_ROWS => sweep_rows::<L, GROUP_ROWS, NARROW>(tables, sources, targets, span),
            rows => unreachable!("a group of {rows} rows"),
        }
    }
}

/// # Safety
/// As [`sweep`], with R targets.
#[inline(always)]
unsafe fn sweep_rows<L: Lanes, const R: usize, const U: usize>(
    tables: &[L::Table],
    sources: &[*const u8],
    targets: &[*mut u8],
    span: Range<usize>,
) {
    let targets: [*mut u8; R] = std::array::from_fn(|row| targets[row]);
    let mut at = span.start;
    // SAFETY: the caller's promise; each step ends at or before `span.end`. The last one, if the span is no whole number
    // of registers, reaches back and computes some bytes again: targets depend on sources only, so they stay the same.
    unsafe {
        while span.end - at >= U * L::BYTES {
            step::<L, R, U>(tables, sources, &targets, at);
            at += U * L::BYTES;
        }
        while span.end - at >= L::BYTES {
            step::<L, R, 1>(tables, sources, &targets, at);
            at += L::BYTES;
        }
        if at < span.end {
            step::<L, R, 1>(tables, sources, &targets, span.end - L::BYTES);
        }
    }
}

/// Computes U registers of R targets at byte `at`.
///
/// # Safety
/// As [`sweep`], with R targets; `at` + U registers lies inside the shards.
#[inline(always)]
unsafe fn step<L: Lanes, const R: usize, const U: usize>(
    tables: &[L::Table],
    sources: &[*const u8],
    targets: &[*mut u8; R],
    at: usize,
) {
    // SAFETY: the caller's promise covers every load and store; `table` and `source` advance together and stop at the
    // last source, and there are R tables for each.
    unsafe {
        let mut sums = [[L::zero(); U]; R];
        let mut table = tables.as_ptr();
        let mut source = sources.as_ptr();
        let end = source.add(sources.len());
        while L::PAIRS && source.add(1) < end {
            let (first, second) = ((*source).add(at), (*source.add(1)).add(at));
            let a: [L::Operand; U] = std::array::from_fn(|u| L::operand(first.add(u * L::BYTES)));
            let b: [L::Operand; U] = std::array::from_fn(|u| L::operand(second.add(u * L::BYTES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let (f, g) = (L::factor(&*table.add(row)), L::factor(&*table.add(R + row)));
                for (u, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add_products(a[u], f, b[u], g);
                }
            }
            table = table.add(2 * R);
            source = source.add(2);
        }
        while source < end {
            let a: [L::Operand; U] = std::array::from_fn(|u| L::operand((*source).add(at + u * L::BYTES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let f = L::factor(&*table.add(row));
                for (u, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add_product(a[u], f);
                }
            }
            table = table.add(R);
            source = source.add(1);
        }
        for (sums, &target) in sums.iter().zip(targets) {
            for (u, sum) in sums.iter().enumerate() {
                sum.store(target.add(at + u * L::BYTES));
            }
        }
    }
}
