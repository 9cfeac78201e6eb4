//! The codec against published vectors, against `reed-solomon-erasure`, and every kernel against the scalar one.

use proptest::prelude::*;
use proptest::sample::{Index, subsequence};
use reed_solomon_erasure::galois_8::ReedSolomon;
use xsan_erasure::{Codec, Error, Kernel, ShardRole, Stripe};
use xsan_types::{ErrorKind, Scheme, ShardIndex};

fn rs(k: usize, m: usize) -> Scheme {
    Scheme::rs(u8::try_from(k).unwrap(), u8::try_from(m).unwrap()).unwrap()
}

fn codec(scheme: Scheme, kernel: Kernel) -> Codec {
    Codec::with_kernel(scheme, kernel).unwrap()
}

/// Bytes that depend on everything and repeat nowhere soon.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn noise_shards(seed: u64, count: usize, len: usize) -> Vec<Vec<u8>> {
    (0..count).map(|shard| noise(seed + shard as u64 * 1000, len)).collect()
}

/// Data followed by the parity `codec` computes for it.
fn encoded(codec: &Codec, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let data_views: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    // Not zeros: whatever was in the buffers must not shine through.
    let mut parity = vec![vec![0xA5; data[0].len()]; codec.scheme().tolerates()];
    let mut views: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
    codec.encode(&data_views, &mut views).unwrap();
    [data.to_vec(), parity].concat()
}

/// The shards `wanted`, computed from the shards `present` of `shards`.
fn reconstructed(codec: &Codec, shards: &[Vec<u8>], present: &[usize], wanted: &[usize]) -> Vec<Vec<u8>> {
    let index = |&shard: &usize| ShardIndex(u8::try_from(shard).unwrap());
    let sources: Vec<_> = present.iter().map(|shard| (index(shard), shards[*shard].as_slice())).collect();
    let mut found = vec![vec![0x5A; shards[0].len()]; wanted.len()];
    let mut targets: Vec<_> = wanted.iter().map(index).zip(found.iter_mut().map(Vec::as_mut_slice)).collect();
    codec.reconstruct(&sources, &mut targets).unwrap();
    found
}

#[test]
fn the_published_vector_of_5_5_holds_on_every_kernel() {
    let data = [[0, 1], [4, 5], [2, 3], [6, 7], [8, 9]].map(Vec::from);
    let parity = [[12, 13], [10, 11], [14, 15], [90, 91], [94, 95]].map(Vec::from);
    for kernel in Kernel::available() {
        assert_eq!(encoded(&codec(rs(5, 5), kernel), &data)[5..], parity, "{kernel}");
    }
}

#[test]
fn every_scheme_gives_the_parity_of_reed_solomon_erasure() {
    let kernel = Kernel::available().next().unwrap();
    for k in 1..64 {
        for m in 1..=64 - k {
            let mut shards = noise_shards((k * 64 + m) as u64, k + m, 67);
            let ours = encoded(&codec(rs(k, m), kernel), &shards[..k]);
            ReedSolomon::new(k, m).unwrap().encode(&mut shards).unwrap();
            assert_eq!(ours, shards, "{k}+{m}");
        }
    }
}

#[test]
fn every_scheme_survives_the_loss_of_its_first_its_last_and_scattered_shards() {
    for kernel in Kernel::available() {
        // All corners, and a walk through the inside; the scalar kernel proves the same matrices once.
        let schemes = (1..64).flat_map(|k| (1..=64 - k).map(move |m| (k, m)));
        let chosen = schemes.filter(|&(k, m)| k == 1 || m == 1 || k + m == 64 || (k * 7 + m * 3) % 29 == 0);
        for (k, m) in chosen {
            let codec = codec(rs(k, m), kernel);
            let shards = encoded(&codec, &noise_shards((k + m) as u64, k, 97));
            let width = k + m;
            let scattered: Vec<usize> = (0..m).map(|i| i * width / m).collect();
            for lost in [(0..m).collect(), (k..width).collect(), scattered] {
                let lost: Vec<usize> = lost;
                let present: Vec<usize> = (0..width).filter(|shard| !lost.contains(shard)).collect();
                let expected: Vec<_> = lost.iter().map(|&shard| shards[shard].clone()).collect();
                assert!(reconstructed(&codec, &shards, &present, &lost) == expected, "{kernel} {k}+{m} {lost:?}");
            }
        }
    }
}

#[test]
fn every_loss_pattern_of_common_schemes_is_rebuilt() {
    for (k, m) in [(4, 2), (2, 2), (2, 1), (3, 3), (6, 3), (5, 5)] {
        let codec = Codec::new(rs(k, m));
        let shards = encoded(&codec, &noise_shards(9, k, 130));
        for pattern in 0u32..1 << (k + m) {
            let (present, lost): (Vec<usize>, Vec<usize>) = (0..k + m).partition(|shard| pattern >> shard & 1 != 0);
            if present.len() >= k {
                let expected: Vec<_> = lost.iter().map(|&shard| shards[shard].clone()).collect();
                assert_eq!(reconstructed(&codec, &shards, &present, &lost), expected, "{k}+{m} {lost:?}");
            }
        }
    }
}

#[test]
fn every_kernel_equals_scalar_at_every_length_and_alignment() {
    // Up to four rows are one pass, more are several; with one row the vector kernels use their longest steps.
    for (k, m) in [(2, 1), (3, 1), (4, 2), (8, 3), (5, 4), (7, 5), (3, 9)] {
        let reference = codec(rs(k, m), Kernel::Scalar);
        for kernel in Kernel::available().filter(|&kernel| kernel != Kernel::Scalar) {
            let tested = codec(rs(k, m), kernel);
            for length in (0..=300).chain([511, 513, 1000, 4095, 4096, 4097]) {
                let buffers = noise_shards(length as u64, k, length + 64);
                // Every shard at another alignment.
                let data: Vec<&[u8]> = (0..k).map(|i| &buffers[i][(i * 13 + length) % 64..][..length]).collect();
                let mut expected = vec![vec![1; length]; m];
                let mut outputs: Vec<&mut [u8]> = expected.iter_mut().map(Vec::as_mut_slice).collect();
                reference.encode(&data, &mut outputs).unwrap();
                let mut guarded = vec![vec![0xEE; length + 128]; m];
                let at = |i: usize| 1 + (i * 29 + length) % 64;
                let mut outputs: Vec<&mut [u8]> =
                    guarded.iter_mut().enumerate().map(|(i, buffer)| &mut buffer[at(i)..][..length]).collect();
                tested.encode(&data, &mut outputs).unwrap();
                for (i, (buffer, expected)) in guarded.iter().zip(&expected).enumerate() {
                    let (before, rest) = buffer.split_at(at(i));
                    let (found, after) = rest.split_at(length);
                    assert!(found == expected, "{kernel} {k}+{m}, {length} bytes, parity {i}");
                    assert!(before.iter().chain(after).all(|&byte| byte == 0xEE), "{kernel} wrote outside");
                }
            }
        }
    }
}

#[test]
fn long_shards_in_many_passes_equal_scalar() {
    // More than four rows are computed block by block; lengths around the block's end.
    for (k, m) in [(4, 6), (20, 12)] {
        for length in [32 << 10, (32 << 10) + 1, (64 << 10) - 1, 100_003] {
            let data = noise_shards(5, k, length);
            let expected = encoded(&codec(rs(k, m), Kernel::Scalar), &data);
            for kernel in Kernel::available() {
                assert!(encoded(&codec(rs(k, m), kernel), &data) == expected, "{kernel} {k}+{m} {length}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn encoding_and_any_loss_agree_with_reed_solomon_erasure(
        k in 1usize..=63,
        m_seed in any::<Index>(),
        length in prop_oneof![1usize..200, 200usize..3000],
        seed in any::<u32>(),
        order in subsequence((0..64usize).collect::<Vec<_>>(), 64).prop_shuffle(),
        lost_seed in any::<Index>(),
    ) {
        let m = 1 + m_seed.index(64 - k);
        let mut shards = noise_shards(seed.into(), k + m, length);
        let oracle = ReedSolomon::new(k, m).unwrap();
        oracle.encode(&mut shards).unwrap();

        let order: Vec<usize> = order.into_iter().filter(|&shard| shard < k + m).collect();
        let (lost, present) = order.split_at(lost_seed.index(m + 1));
        let mut damaged: Vec<Option<Vec<u8>>> =
            shards.iter().enumerate().map(|(i, shard)| (!lost.contains(&i)).then(|| shard.clone())).collect();
        oracle.reconstruct(&mut damaged).unwrap();

        for kernel in Kernel::available() {
            let codec = codec(rs(k, m), kernel);
            prop_assert_eq!(&encoded(&codec, &shards[..k]), &shards);
            let rebuilt = reconstructed(&codec, &shards, present, lost);
            for (&shard, rebuilt) in lost.iter().zip(&rebuilt) {
                prop_assert_eq!(rebuilt, &shards[shard]);
                prop_assert_eq!(Some(rebuilt), damaged[shard].as_ref());
            }
            // Again, now from the remembered plan.
            prop_assert_eq!(reconstructed(&codec, &shards, present, lost), rebuilt);
        }
    }
}

#[test]
fn replicas_are_copies() {
    for n in [1, 2, 3, 64] {
        let codec = Codec::new(Scheme::replica(n).unwrap());
        let data = noise(3, 1000);
        let shards = encoded(&codec, std::slice::from_ref(&data));
        assert_eq!(shards, vec![data; n.into()]);
        let last = usize::from(n) - 1;
        if last > 0 {
            assert_eq!(reconstructed(&codec, &shards, &[last], &[0]), shards[..1]);
        }
    }
}

#[test]
fn a_whole_segment_is_encoded_row_by_row_padded_or_not() {
    for scheme in [rs(4, 2), rs(3, 2), rs(1, 1), Scheme::replica(3).unwrap()] {
        let codec = Codec::new(scheme);
        let row = scheme.k() * 8192;
        for length in [0, 1, 4096, row - 1, row, row + 1, 2 * row + 5000, 3 * row - 4096] {
            let stripe = Stripe::with_unit(scheme, 8192, length as u64).unwrap();
            let segment = noise(length as u64, length);
            let mut padded = segment.clone();
            padded.resize(usize::try_from(stripe.padded_bytes()).unwrap(), 0);
            // The data shards by the definition of the geometry, byte by byte.
            let shard_bytes = usize::try_from(stripe.shard_bytes()).unwrap();
            let mut data = vec![vec![0; shard_bytes]; scheme.k()];
            for piece in stripe.map(0, length as u64).unwrap() {
                for at in piece.shard_offset..piece.shard_offset + piece.bytes {
                    let source = stripe.segment_offset(piece.shard, at).unwrap();
                    data[usize::from(piece.shard.0)][at as usize] = segment[source as usize];
                }
            }
            let expected = &encoded(&codec, &data)[scheme.k()..];
            for buffer in [&segment, &padded] {
                let mut parity = vec![vec![0xC3; shard_bytes]; scheme.tolerates()];
                let mut views: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
                codec.encode_segment(&stripe, buffer, &mut views).unwrap();
                assert!(parity == expected, "{scheme} {length}");
            }
        }
    }
}

#[test]
fn a_segment_of_the_wrong_size_is_refused() {
    let codec = Codec::new(rs(2, 1));
    let stripe = Stripe::new(rs(2, 1), 10_000).unwrap();
    let mut parity = vec![0; 8192];
    let role = ShardRole::Data;
    for found in [0, 9_999, 10_001, 16_383, 16_385] {
        let refused = codec.encode_segment(&stripe, &vec![0; found], &mut [&mut parity]);
        assert_eq!(refused, Err(Error::UnequalLengths { role, position: 0, expected: 10_000, found }));
    }
    let refused = codec.encode_segment(&stripe, &[0; 10_000], &mut [&mut parity[1..]]);
    assert!(matches!(refused, Err(Error::UnequalLengths { role: ShardRole::Parity, expected: 8192, .. })));
    let other = Stripe::new(rs(3, 1), 10_000).unwrap();
    let refused = codec.encode_segment(&other, &[0; 10_000], &mut [&mut parity]);
    assert_eq!(refused, Err(Error::ShardCount { role, expected: 2, found: 3 }));
}

#[test]
fn wrong_calls_to_encode_are_refused_and_write_nothing() {
    let codec = Codec::new(rs(2, 2));
    let (a, b, short) = ([1; 8], [2; 8], [3; 7]);
    let (mut p, mut q, mut long) = ([9; 8], [9; 8], [9; 9]);
    let count = |role, found| Err(Error::ShardCount { role, expected: 2, found });
    let length = |role, position, found| Err(Error::UnequalLengths { role, position, expected: 8, found });

    assert_eq!(codec.encode(&[], &mut [&mut p, &mut q]), count(ShardRole::Data, 0));
    assert_eq!(codec.encode(&[&a, &b, &a], &mut [&mut p, &mut q]), count(ShardRole::Data, 3));
    assert_eq!(codec.encode(&[&a, &b], &mut [&mut p]), count(ShardRole::Parity, 1));
    assert_eq!(codec.encode(&[&a, &short], &mut [&mut p, &mut q]), length(ShardRole::Data, 1, 7));
    assert_eq!(codec.encode(&[&a, &b], &mut [&mut p, &mut long]), length(ShardRole::Parity, 1, 9));
    assert_eq!((p, q, long), ([9; 8], [9; 8], [9; 9]));
}

#[test]
fn wrong_calls_to_reconstruct_are_refused_and_write_nothing() {
    let codec = Codec::new(rs(2, 2));
    let (a, b, short) = ([1; 8], [2; 8], [3; 7]);
    let mut out = [9; 8];
    let i = ShardIndex;
    let mut call = |present: &[(ShardIndex, &[u8])], wanted: u8| {
        codec.reconstruct(present, &mut [(ShardIndex(wanted), &mut out[..])]).unwrap_err()
    };
    assert_eq!(call(&[], 0), Error::TooFewShards { needed: 2, found: 0 });
    let few = call(&[(i(1), &a)], 0);
    assert_eq!((few, few.kind()), (Error::TooFewShards { needed: 2, found: 1 }, ErrorKind::Unavailable));
    assert_eq!(call(&[(i(1), &a), (i(1), &b)], 0), Error::DuplicateIndex { index: i(1) });
    assert_eq!(call(&[(i(1), &a), (i(2), &b)], 2), Error::DuplicateIndex { index: i(2) });
    assert_eq!(call(&[(i(1), &a), (i(4), &b)], 0), Error::IndexOutOfRange { index: i(4), width: 4 });
    assert_eq!(call(&[(i(1), &a), (i(255), &b)], 0), Error::IndexOutOfRange { index: i(255), width: 4 });
    let outside = call(&[(i(1), &a), (i(2), &b)], 64);
    assert_eq!((outside, outside.kind()), (Error::IndexOutOfRange { index: i(64), width: 4 }, ErrorKind::Invalid));
    let role = ShardRole::Present;
    let unequal = call(&[(i(1), &a), (i(2), &short)], 0);
    assert_eq!(unequal, Error::UnequalLengths { role, position: 1, expected: 8, found: 7 });
    let role = ShardRole::Wanted;
    assert_eq!(
        call(&[(i(1), &short), (i(2), &short)], 0),
        Error::UnequalLengths { role, position: 0, expected: 7, found: 8 }
    );
    assert_eq!(out, [9; 8]);
    let (mut p, mut q) = ([9; 8], [9; 8]);
    let twice = codec.reconstruct(&[(i(1), &a), (i(2), &b)], &mut [(i(0), &mut p), (i(0), &mut q)]);
    assert_eq!(twice, Err(Error::DuplicateIndex { index: i(0) }));
    assert_eq!(codec.reconstruct(&[(i(1), &a), (i(2), &b)], &mut []), Ok(()));
}

#[test]
fn a_kernel_the_processor_lacks_is_refused() {
    for kernel in Kernel::ALL {
        match Codec::with_kernel(rs(4, 2), kernel) {
            Ok(codec) => assert!(kernel.is_available() && codec.kernel() == kernel),
            Err(error) => {
                assert!(!kernel.is_available());
                assert_eq!(error, Error::KernelUnsupported { kernel });
                assert_eq!(error.to_string(), format!("the erasure kernel {kernel} cannot run on this processor"));
            }
        }
    }
}
