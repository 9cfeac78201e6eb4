//! Parity from data, and lost shards from any k others.

use crate::gf256::{Program, SHARDS_MAX, Usable};
use crate::matrix::Matrix;
use crate::{Error, Kernel, ShardRole, Stripe};
use std::sync::{Arc, Mutex, PoisonError};
use xsan_types::{Scheme, ShardIndex};

/// Reconstruction plans a codec remembers. A cluster sees a handful of loss patterns at a time; a forgotten one costs a
/// matrix inversion (microseconds at 4+2, about a millisecond at 32+32). At most 2 MiB at the widest schemes.
pub const PLANS_MAX: usize = 64;

/// Encoder and decoder of one [`Scheme`]. Shared freely between threads.
///
/// Shards of one call all have the same length, any length. The codec works byte by byte: encoding two halves gives the
/// two halves of the parity, so callers may cut shards wherever they like.
#[derive(Debug)]
pub struct Codec {
    scheme: Scheme,
    kernel: Usable,
    /// (k + m) x k; the first k rows are the identity.
    generator: Matrix,
    /// The last m rows of the generator. Unused when k = 1: all coefficients are then 1 and parity is a copy.
    encoder: Program,
    /// Most recently used first, at most [`PLANS_MAX`]. Held for a look-up or an insertion, never while computing.
    plans: Mutex<Vec<Plan>>,
}

/// Coefficients of one loss pattern.
#[derive(Clone, Debug)]
struct Plan {
    sources: ShardSet,
    /// In the caller's order, which is the order of the program's outputs.
    wanted: Vec<ShardIndex>,
    program: Arc<Program>,
}

impl Codec {
    /// The codec of `scheme` on the kernel of this process, [`Kernel::chosen`].
    ///
    /// # Panics
    /// When the environment variable [`KERNEL_VARIABLE`](crate::KERNEL_VARIABLE) asks for a kernel that cannot be had.
    /// A daemon calls [`Kernel::chosen`] at its start and refuses there.
    #[must_use]
    pub fn new(scheme: Scheme) -> Self {
        match Kernel::chosen().and_then(|kernel| Self::with_kernel(scheme, kernel)) {
            Ok(codec) => codec,
            Err(error) => panic!("{error}"),
        }
    }

    /// The codec of `scheme` on a kernel of the caller's choice.
    ///
    /// # Errors
    /// [`Error::KernelUnsupported`]: this processor cannot run it.
    pub fn with_kernel(scheme: Scheme, kernel: Kernel) -> Result<Self, Error> {
        let kernel = Usable::check(kernel)?;
        let generator = Matrix::generator(scheme.k(), scheme.tolerates());
        let encoder = Program::compile(kernel, &generator.select(scheme.k()..scheme.width()));
        Ok(Self { scheme, kernel, generator, encoder, plans: Mutex::new(Vec::new()) })
    }

    /// The scheme it was made for.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The kernel it runs on.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel.kernel()
    }

    /// Computes all parity: `data` is shards 0..k, `parity` becomes shards k..k+m. For `replica(n)` k is 1 and parity is
    /// the other n - 1 copies.
    ///
    /// # Errors
    /// [`Error::ShardCount`], [`Error::UnequalLengths`]; then nothing was written.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) -> Result<(), Error> {
        expect_count(ShardRole::Data, self.scheme.k(), data.len())?;
        expect_count(ShardRole::Parity, self.scheme.tolerates(), parity.len())?;
        let length = data[0].len();
        expect_lengths(ShardRole::Data, length, data.iter().map(|shard| shard.len()))?;
        expect_lengths(ShardRole::Parity, length, parity.iter().map(|shard| shard.len()))?;
        if let [only] = data {
            parity.iter_mut().for_each(|copy| copy.copy_from_slice(only));
        } else {
            self.encoder.run(length, data.iter().copied(), parity.iter_mut().map(|shard| &mut **shard));
        }
        Ok(())
    }

    /// Computes the parity shards of a whole segment straight from its buffer, row by row. `segment` has the stripe's
    /// length, or its padded length with zeros behind the end (then not one byte is copied; otherwise the last row is,
    /// to pad it).
    ///
    /// # Errors
    /// [`Error::ShardCount`] if the stripe or `parity` is not of this codec's scheme; [`Error::UnequalLengths`] if the
    /// segment or a parity shard does not have the stripe's length. Nothing was written.
    pub fn encode_segment(&self, stripe: &Stripe, segment: &[u8], parity: &mut [&mut [u8]]) -> Result<(), Error> {
        let k = self.scheme.k();
        expect_count(ShardRole::Data, k, stripe.k())?;
        expect_count(ShardRole::Parity, self.scheme.tolerates(), stripe.m())?;
        expect_count(ShardRole::Parity, self.scheme.tolerates(), parity.len())?;
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        if segment.len() != size(stripe.padded_bytes()) {
            expect_lengths(ShardRole::Data, size(stripe.length()), [segment.len()].into_iter())?;
        }
        let shard_bytes = size(stripe.shard_bytes());
        expect_lengths(ShardRole::Parity, shard_bytes, parity.iter().map(|shard| shard.len()))?;
        for row in stripe.rows() {
            let (start, unit) = (size(row.segment_offset), size(row.unit));
            let padded: Vec<u8>;
            let bytes = match segment.get(start..start + k * unit) {
                Some(bytes) => bytes,
                None => {
                    let mut tail = segment[start..].to_vec();
                    tail.resize(k * unit, 0);
                    padded = tail;
                    &padded
                }
            };
            let mut units: [&[u8]; SHARDS_MAX] = [&[]; SHARDS_MAX];
            units.iter_mut().zip(bytes.chunks_exact(unit)).for_each(|(slot, bytes)| *slot = bytes);
            let at = size(row.shard_offset);
            let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(|shard| &mut shard[at..at + unit]).collect();
            self.encode(&units[..k], &mut outputs)?;
        }
        Ok(())
    }

    /// Computes the shards of `wanted`, data or parity, from any k of `present`; only those, in one pass. With more than k
    /// present the lowest indices are read, so data shards come before parity. The coefficients of recent loss patterns
    /// are remembered ([`PLANS_MAX`]).
    ///
    /// # Errors
    /// [`Error::IndexOutOfRange`], [`Error::DuplicateIndex`] (also for a shard that is both present and wanted),
    /// [`Error::TooFewShards`], [`Error::UnequalLengths`]; then nothing was written.
    pub fn reconstruct(
        &self,
        present: &[(ShardIndex, &[u8])],
        wanted: &mut [(ShardIndex, &mut [u8])],
    ) -> Result<(), Error> {
        let (k, width) = (self.scheme.k(), self.scheme.width());
        let mut named = ShardSet::default();
        let mut positions = [0u8; SHARDS_MAX];
        for (position, &(index, _)) in (0..).zip(present) {
            named.insert(index, width)?;
            positions[usize::from(index.0)] = position;
        }
        let sources = named.lowest(k).ok_or(Error::TooFewShards { needed: k, found: present.len() })?;
        for (index, _) in &*wanted {
            named.insert(*index, width)?;
        }
        let length = present[0].1.len();
        expect_lengths(ShardRole::Present, length, present.iter().map(|(_, shard)| shard.len()))?;
        expect_lengths(ShardRole::Wanted, length, wanted.iter().map(|(_, shard)| shard.len()))?;
        if wanted.is_empty() {
            return Ok(());
        }
        if k == 1 {
            wanted.iter_mut().for_each(|(_, copy)| copy.copy_from_slice(present[0].1));
            return Ok(());
        }
        let program = self.plan(sources, wanted);
        let mut inputs: [&[u8]; SHARDS_MAX] = [&[]; SHARDS_MAX];
        for (slot, index) in inputs.iter_mut().zip(sources.iter()) {
            *slot = present[usize::from(positions[index])].1;
        }
        program.run(length, inputs[..k].iter().copied(), wanted.iter_mut().map(|(_, shard)| &mut **shard));
        Ok(())
    }

    /// The program that computes `wanted` from `sources`, remembered or new.
    fn plan(&self, sources: ShardSet, wanted: &[(ShardIndex, &mut [u8])]) -> Arc<Program> {
        let matches =
            |plan: &Plan| plan.sources == sources && plan.wanted.iter().eq(wanted.iter().map(|(index, _)| index));
        // A panic while the lock is held leaves the list valid: entries are inserted and moved whole.
        let lock = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut plans = lock();
            if let Some(at) = plans.iter().position(matches) {
                plans[..=at].rotate_right(1);
                return Arc::clone(&plans[0].program);
            }
        }
        let wanted: Vec<ShardIndex> = wanted.iter().map(|&(index, _)| index).collect();
        let program = Arc::new(self.solve(sources, &wanted));
        let mut plans = lock();
        // Another thread may have been here for the same pattern meanwhile; a second entry is only a wasted place.
        plans.truncate(PLANS_MAX - 1);
        plans.insert(0, Plan { sources, wanted, program: Arc::clone(&program) });
        program
    }

    /// `sources = G_s * data`, so `wanted = G_w * data = G_w * G_s^-1 * sources`.
    fn solve(&self, sources: ShardSet, wanted: &[ShardIndex]) -> Program {
        let data =
            self.generator.select(sources.iter()).inverted().expect("any k rows of the generator are independent");
        let wanted = self.generator.select(wanted.iter().map(|index| usize::from(index.0)));
        Program::compile(self.kernel, &wanted.times(&data))
    }
}

fn expect_count(role: ShardRole, expected: usize, found: usize) -> Result<(), Error> {
    if expected == found { Ok(()) } else { Err(Error::ShardCount { role, expected, found }) }
}

fn expect_lengths(role: ShardRole, expected: usize, lengths: impl Iterator<Item = usize>) -> Result<(), Error> {
    for (position, found) in lengths.enumerate() {
        if found != expected {
            return Err(Error::UnequalLengths { role, position, expected, found });
        }
    }
    Ok(())
}

/// Shard indices as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ShardSet(u64);

const _: () = assert!(SHARDS_MAX <= u64::BITS as usize);

impl ShardSet {
    /// Adds a shard of a scheme with `width` shards that is not there yet.
    fn insert(&mut self, index: ShardIndex, width: usize) -> Result<(), Error> {
        if usize::from(index.0) >= width {
            return Err(Error::IndexOutOfRange { index, width });
        }
        let bit = 1 << index.0;
        if self.0 & bit != 0 {
            return Err(Error::DuplicateIndex { index });
        }
        self.0 |= bit;
        Ok(())
    }

    /// The `count` lowest shards, if there are so many.
    fn lowest(self, count: usize) -> Option<Self> {
        let mut rest = self.0;
        for _ in 0..count {
            if rest == 0 {
                return None;
            }
            rest &= rest - 1;
        }
        Some(Self(self.0 ^ rest))
    }

    /// Ascending.
    fn iter(self) -> impl Iterator<Item = usize> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let index = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
            rest &= rest - 1;
            Some(index)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(codec: &Codec) -> Vec<(u64, Vec<u8>)> {
        let plans = codec.plans.lock().unwrap();
        plans.iter().map(|plan| (plan.sources.0, plan.wanted.iter().map(|index| index.0).collect())).collect()
    }

    #[test]
    fn the_memory_of_loss_patterns_is_bounded_and_keeps_the_recent_ones() {
        let codec = Codec::new(Scheme::rs(10, 4).unwrap());
        let shards = vec![vec![7u8; 8]; 14];
        let lose = |a: u8, b: u8| {
            let present: Vec<_> =
                (0..14).filter(|&i| i != a && i != b).map(|i| (ShardIndex(i), &*shards[usize::from(i)])).collect();
            let (mut first, mut second) = ([0; 8], [0; 8]);
            let mut wanted = [(ShardIndex(a), &mut first[..]), (ShardIndex(b), &mut second[..])];
            codec.reconstruct(&present, &mut wanted).unwrap();
        };
        for a in 0..14 {
            for b in (0..14).filter(|&b| b != a) {
                lose(a, b);
                assert!(plans(&codec).len() <= PLANS_MAX);
                assert_eq!(plans(&codec)[0].1, [a, b]);
            }
        }
        assert_eq!(plans(&codec).len(), PLANS_MAX);
        let before = plans(&codec);
        lose(before[9].1[0], before[9].1[1]);
        let mut expected = before.clone();
        expected[..=9].rotate_right(1);
        assert_eq!(plans(&codec), expected, "a hit moves to the front and forgets nothing");
    }

    #[test]
    fn the_lowest_shards_of_a_set_are_taken() {
        let set = ShardSet(1 << 63 | 0b1011_0100);
        assert_eq!(set.lowest(0), Some(ShardSet(0)));
        assert_eq!(set.lowest(3).unwrap().iter().collect::<Vec<_>>(), [2, 4, 5]);
        assert_eq!(set.lowest(5), Some(set));
        assert_eq!(set.lowest(6), None);
    }
}
