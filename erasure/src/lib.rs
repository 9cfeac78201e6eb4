//! Erasure coding of sealed segments: which byte lies in which shard, and the bytes of the shards.
//!
//! Pure computation: no I/O, no clock, no tasks. Two independent halves:
//!
//! - [`Stripe`] (geometry): how a segment's bytes are cut into `k` data shards. Numbers only.
//! - [`Codec`] (arithmetic): parity from data, and any lost shard from any `k` others. Bytes only.
//!
//! The code is the systematic Reed-Solomon code over GF(2^8) / `0x11D` of Backblaze, klauspost/reedsolomon and
//! `reed-solomon-erasure`, byte for byte: `V[r][c] = r^c`, multiplied by the inverse of its top square. One loop
//! ([`gf256`](crate::Kernel)) serves encoding and reconstruction on every processor; the vector unit it runs on is a
//! [`Kernel`], chosen once per process.
//!
//! Reading order: `error`, `geometry`, `codec`, `matrix`, `gf256`.
#![deny(unsafe_code)] // Lifted only inside `gf256`, whose vector kernels need raw loads and stores.

mod codec;
mod error;
mod geometry;
mod gf256;
mod matrix;

pub use codec::{Codec, PLANS_MAX};
pub use error::{Error, ShardRole};
pub use geometry::{LENGTH_MAX, Piece, Pieces, Row, SHARD_ALIGN, Stripe, UNIT_BYTES};
pub use gf256::{KERNEL_VARIABLE, Kernel};
