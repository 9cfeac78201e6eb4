//! A coefficient matrix compiled for a kernel, and its run over shards.

use super::{AFFINES, Kernel, NIBBLES, Nibbles, SHARDS_MAX, Usable, scalar};
use crate::matrix::Matrix;
use std::ops::Range;

/// Output rows computed in one pass over the inputs: two registers for each of four rows, plus operands and tables, is
/// what 16 vector registers hold.
pub(super) const GROUP_ROWS: usize = 4;

/// Shortest span a vector kernel is given; at least one register of the widest kernel.
const SPAN_MIN: usize = 64;

/// Input bytes, over all shards, walked before the next group of rows reads them again: a quarter of a small L2 cache.
const BLOCK_BYTES: usize = 128 << 10;

/// The coefficients in the form the kernel loads: for each group of rows, for each input, one per row of the group.
#[derive(Debug)]
enum Tables {
    Bytes(Vec<u8>),
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
    Nibbles(Vec<Nibbles>),
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Affine(Vec<u64>),
}

/// `outputs[r] = sum over c of matrix[r][c] * inputs[c]`, ready to run. At most 32 KiB: half-byte tables of 32 x 32.
#[derive(Debug)]
pub(crate) struct Program {
    kernel: Usable,
    inputs: usize,
    outputs: usize,
    tables: Tables,
}

impl Program {
    /// Compiles `matrix` (rows = outputs, columns = inputs) for `kernel`.
    pub(crate) fn compile(kernel: Usable, matrix: &Matrix) -> Self {
        let (outputs, inputs) = (matrix.rows(), matrix.columns());
        assert!((1..=SHARDS_MAX).contains(&inputs) && outputs <= SHARDS_MAX, "a scheme has at most 64 shards");
        let ordered: Vec<u8> = groups(outputs)
            .flat_map(|rows| (0..inputs).flat_map(move |c| rows.clone().map(move |r| (r, c))))
            .map(|(r, c)| matrix.row(r)[c])
            .collect();
        let tables = match kernel.kernel() {
            Kernel::Gfni512 | Kernel::Gfni256 => {
                Tables::Affine(ordered.iter().map(|&coefficient| AFFINES[usize::from(coefficient)]).collect())
            }
            Kernel::Avx2 | Kernel::Ssse3 | Kernel::Neon => {
                Tables::Nibbles(ordered.iter().map(|&coefficient| NIBBLES[usize::from(coefficient)]).collect())
            }
            Kernel::Scalar => Tables::Bytes(ordered),
        };
        Self { kernel, inputs, outputs, tables }
    }

    /// Runs over whole shards of `length` bytes each; the outputs are overwritten.
    ///
    /// # Panics
    /// When the number of shards or a length is not what the program was compiled for: callers have checked.
    pub(crate) fn run<'a>(
        &self,
        length: usize,
        inputs: impl ExactSizeIterator<Item = &'a [u8]>,
        outputs: impl ExactSizeIterator<Item = &'a mut [u8]>,
    ) {
        assert!(inputs.len() == self.inputs && outputs.len() == self.outputs, "shards as compiled");
        let mut sources = [std::ptr::null(); SHARDS_MAX];
        let mut targets = [std::ptr::null_mut(); SHARDS_MAX];
        let (sources, targets) = (&mut sources[..self.inputs], &mut targets[..self.outputs]);
        for (slot, shard) in sources.iter_mut().zip(inputs) {
            assert_eq!(shard.len(), length, "shards have one length");
            *slot = shard.as_ptr();
        }
        for (slot, shard) in targets.iter_mut().zip(outputs) {
            assert_eq!(shard.len(), length, "shards have one length");
            *slot = shard.as_mut_ptr();
        }
        // SAFETY: every pointer was just taken from a slice of `length` bytes that outlives the call; the outputs come
        // from exclusive slices, so they overlap neither each other nor an input.
        unsafe { self.run_on(length, sources, targets) }
    }

    /// # Safety
    /// `sources` and `targets` point to `length` bytes each, readable and writable; no target overlaps another pointer.
    unsafe fn run_on(&self, length: usize, sources: &[*const u8], targets: &[*mut u8]) {
        if length < SPAN_MIN {
            // SAFETY: the caller's promise.
            return unsafe { self.run_short(length, sources, targets) };
        }
        let block =
            if targets.len() <= GROUP_ROWS { length } else { (BLOCK_BYTES / sources.len()).next_multiple_of(4096) };
        let mut start = 0;
        while start < length {
            let end = length.min(start.saturating_add(block));
            // SAFETY: the caller's promise; the span lies inside the shards, and `end` >= SPAN_MIN.
            unsafe { self.run_span(sources, targets, start..end) };
            start = end;
        }
    }

    /// Shards shorter than a register: through copies of one register's length.
    ///
    /// # Safety
    /// As [`Program::run_on`], `length` <= `SPAN_MIN`.
    #[cold]
    #[inline(never)]
    unsafe fn run_short(&self, length: usize, sources: &[*const u8], targets: &[*mut u8]) {
        let mut padded = [[0u8; SPAN_MIN]; SHARDS_MAX];
        let mut results = [[0u8; SPAN_MIN]; SHARDS_MAX];
        let mut padded_sources = [std::ptr::null(); SHARDS_MAX];
        let mut result_targets = [std::ptr::null_mut(); SHARDS_MAX];
        for ((copy, slot), &source) in padded.iter_mut().zip(&mut padded_sources).zip(sources) {
            // SAFETY: the caller promises `length` readable bytes; the copy has SPAN_MIN >= `length`.
            unsafe { source.copy_to_nonoverlapping(copy.as_mut_ptr(), length) };
            *slot = copy.as_ptr();
        }
        for (slot, result) in result_targets.iter_mut().zip(&mut results) {
            *slot = result.as_mut_ptr();
        }
        // SAFETY: every pointer is to SPAN_MIN bytes of an array of its own.
        unsafe {
            self.run_span(&padded_sources[..sources.len()], &result_targets[..targets.len()], 0..SPAN_MIN);
        }
        for (&target, &result) in targets.iter().zip(&result_targets) {
            // SAFETY: the caller promises `length` writable bytes; the result has SPAN_MIN >= `length`.
            unsafe { target.copy_from_nonoverlapping(result, length) };
        }
    }

    /// # Safety
    /// The pointers are good for `0..span.end`, no target overlaps another pointer, `span.end` >= `SPAN_MIN`.
    unsafe fn run_span(&self, sources: &[*const u8], targets: &[*mut u8], span: Range<usize>) {
        for rows in groups(self.outputs) {
            let part = rows.start * self.inputs..rows.end * self.inputs;
            let targets = &targets[rows];
            // SAFETY: the caller's promise on the pointers; `Usable` proves that the processor has the kernel's
            // features; the tables of the part are inputs x rows.
            unsafe {
                match (&self.tables, self.kernel.kernel()) {
                    (Tables::Bytes(tables), _) => scalar::run(&tables[part], sources, targets, span.clone()),
                    #[cfg(target_arch = "x86_64")]
                    (Tables::Affine(tables), Kernel::Gfni512) => {
                        super::x86::run_gfni512(&tables[part], sources, targets, span.clone());
                    }
                    #[cfg(target_arch = "x86_64")]
                    (Tables::Affine(tables), _) => {
                        super::x86::run_gfni256(&tables[part], sources, targets, span.clone());
                    }
                    #[cfg(target_arch = "x86_64")]
                    (Tables::Nibbles(tables), Kernel::Avx2) => {
                        super::x86::run_avx2(&tables[part], sources, targets, span.clone());
                    }
                    #[cfg(target_arch = "x86_64")]
                    (Tables::Nibbles(tables), _) => {
                        super::x86::run_ssse3(&tables[part], sources, targets, span.clone());
                    }
                    #[cfg(target_arch = "aarch64")]
                    (Tables::Nibbles(tables), _) => {
                        super::aarch64::run_neon(&tables[part], sources, targets, span.clone());
                    }
                    #[allow(unreachable_patterns)] // Which forms exist depends on the architecture.
                    (tables, kernel) => unreachable!("{kernel} has no use for {tables:?}"),
                }
            }
        }
    }
}

/// The output rows in groups of at most [`GROUP_ROWS`], as even as can be: five rows are 3 + 2, not 4 + 1.
fn groups(outputs: usize) -> impl Iterator<Item = Range<usize>> {
    let count = outputs.div_ceil(GROUP_ROWS);
    (0..count).map(move |group| group * outputs / count..(group + 1) * outputs / count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gf256::multiply;

    #[test]
    fn groups_cover_every_row_once_and_stay_small() {
        for outputs in 0..=SHARDS_MAX {
            let rows: Vec<usize> = groups(outputs).flatten().collect();
            assert_eq!(rows, (0..outputs).collect::<Vec<_>>());
            assert!(groups(outputs).all(|group| (1..=GROUP_ROWS).contains(&group.len())));
        }
    }

    #[test]
    fn every_coefficient_multiplies_every_byte_alike_on_every_kernel() {
        for rows in 1..=GROUP_ROWS {
            // 64 columns of one to four coefficients; over the shifts every coefficient meets every row.
            for shift in 0..=255u8 {
                let matrix = Matrix::build(rows, 64, |row, column| (4 * column + row) as u8 ^ shift);
                // One source at a time, every byte value in it: no wrong product can hide behind another.
                let column = usize::from(shift) % 64;
                let bytes: Vec<u8> = (0..=255u8).map(|byte| byte.wrapping_mul(shift | 1)).collect();
                let silence = vec![0u8; 256];
                for kernel in Kernel::available() {
                    let program = Program::compile(Usable::check(kernel).unwrap(), &matrix);
                    let sources = (0..64usize).map(|c| if c == column { &bytes[..] } else { &silence[..] });
                    let mut sums = vec![vec![0xA5u8; 256]; rows];
                    program.run(256, sources, sums.iter_mut().map(Vec::as_mut_slice));
                    for (row, sums) in sums.iter().enumerate() {
                        let coefficient = matrix.row(row)[column];
                        let expected = bytes.iter().map(|&byte| multiply(coefficient, byte));
                        assert!(sums.iter().copied().eq(expected), "{kernel}: {coefficient:#04x}, row {row} of {rows}");
                    }
                }
            }
        }
    }
}
