//! Matrices over GF(2^8): the generator of the code and its inverses.
//!
//! Small (at most 64 x 64) and off the data path: built once per codec and once per loss pattern.

use crate::gf256::{inverse, multiply, power};

/// A dense matrix, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    columns: usize,
    cells: Vec<u8>,
}

impl Matrix {
    /// A `rows` x `columns` matrix of `cell(row, column)`.
    pub(crate) fn build(rows: usize, columns: usize, cell: impl Fn(usize, usize) -> u8) -> Self {
        assert!(columns > 0, "a matrix has columns");
        let cells = (0..rows * columns).map(|at| cell(at / columns, at % columns)).collect();
        Self { columns, cells }
    }

    pub(crate) fn identity(size: usize) -> Self {
        Self::build(size, size, |row, column| u8::from(row == column))
    }

    /// `V[r][c] = r^c`, with 0^0 = 1. Any `columns` of its rows are independent while the row numbers are distinct
    /// field elements, that is for at most 256 rows.
    pub(crate) fn vandermonde(rows: usize, columns: usize) -> Self {
        assert!(rows <= 256, "row numbers are field elements");
        Self::build(rows, columns, |row, column| power(row as u8, column))
    }

    /// The whole generator of the systematic code: k identity rows, then m parity rows. Any k rows are invertible.
    pub(crate) fn generator(k: usize, m: usize) -> Self {
        let vandermonde = Self::vandermonde(k + m, k);
        let top = vandermonde.select(0..k).inverted().expect("rows of a Vandermonde matrix are independent");
        vandermonde.times(&top)
    }

    pub(crate) fn rows(&self) -> usize {
        self.cells.len() / self.columns
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn row(&self, row: usize) -> &[u8] {
        &self.cells[row * self.columns..][..self.columns]
    }

    fn row_mut(&mut self, row: usize) -> &mut [u8] {
        &mut self.cells[row * self.columns..][..self.columns]
    }

    /// The matrix of the rows named, in that order.
    pub(crate) fn select(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        let cells = rows.into_iter().flat_map(|row| self.row(row)).copied().collect();
        Self { columns: self.columns, cells }
    }

    /// The product `self` x `right`.
    pub(crate) fn times(&self, right: &Self) -> Self {
        assert_eq!(self.columns, right.rows(), "shapes fit");
        Self::build(self.rows(), right.columns, |row, column| {
            let terms = self.row(row).iter().zip(0..).map(|(&cell, inner)| multiply(cell, right.row(inner)[column]));
            terms.fold(0, |sum, term| sum ^ term)
        })
    }

    /// The inverse by Gauss-Jordan elimination, or nothing if the matrix is singular.
    pub(crate) fn inverted(&self) -> Option<Self> {
        let size = self.columns;
        assert_eq!(self.rows(), size, "only square matrices have inverses");
        let mut left = self.clone();
        let mut right = Self::identity(size);
        for column in 0..size {
            let pivot = (column..size).find(|&row| left.row(row)[column] != 0)?;
            left.swap_rows(column, pivot);
            right.swap_rows(column, pivot);
            let scale = inverse(left.row(column)[column])?;
            left.scale_row(column, scale);
            right.scale_row(column, scale);
            for row in (0..size).filter(|&row| row != column) {
                let factor = left.row(row)[column];
                left.add_scaled_row(row, column, factor);
                right.add_scaled_row(row, column, factor);
            }
        }
        Some(right)
    }

    fn swap_rows(&mut self, a: usize, b: usize) {
        for column in 0..self.columns {
            self.cells.swap(a * self.columns + column, b * self.columns + column);
        }
    }

    fn scale_row(&mut self, row: usize, factor: u8) {
        for cell in self.row_mut(row) {
            *cell = multiply(*cell, factor);
        }
    }

    /// `row += factor * source`.
    fn add_scaled_row(&mut self, row: usize, source: usize, factor: u8) {
        if factor != 0 {
            for column in 0..self.columns {
                self.cells[row * self.columns + column] ^= multiply(factor, self.row(source)[column]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inverse_times_its_matrix_is_the_identity() {
        for size in [1, 2, 3, 7, 16, 63] {
            // The last rows of a taller matrix, so that not everything starts in triangular shape.
            let matrix = Matrix::vandermonde(size + 64, size).select(64..64 + size);
            let inverse = matrix.inverted().unwrap();
            assert_eq!(matrix.times(&inverse), Matrix::identity(size));
            assert_eq!(inverse.times(&matrix), Matrix::identity(size));
        }
    }

    #[test]
    fn a_singular_matrix_has_no_inverse() {
        let twice = Matrix::build(3, 3, |row, column| if row == 2 { 7 + column as u8 } else { 3 * column as u8 + 1 });
        assert_eq!(twice.inverted(), None);
        assert_eq!(Matrix::build(1, 1, |_, _| 0).inverted(), None);
    }

    #[test]
    fn the_generator_begins_with_the_identity() {
        for (k, m) in [(1, 1), (4, 2), (8, 3), (1, 63), (63, 1), (32, 32)] {
            let generator = Matrix::generator(k, m);
            assert_eq!((generator.rows(), generator.columns()), (k + m, k));
            assert_eq!(generator.select(0..k), Matrix::identity(k));
        }
    }

    #[test]
    fn parity_coefficients_of_4_2_are_the_published_ones() {
        // klauspost/reedsolomon, buildMatrix(4, 6): the last two rows.
        let generator = Matrix::generator(4, 2);
        assert_eq!(generator.row(4), [27, 28, 18, 20]);
        assert_eq!(generator.row(5), [28, 27, 20, 18]);
    }
}
