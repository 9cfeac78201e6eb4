//! Every byte of a segment has one place, and every place at most one byte.

use proptest::prelude::*;
use xsan_erasure::{Error, LENGTH_MAX, Piece, SHARD_ALIGN, Stripe, UNIT_BYTES};
use xsan_types::{Scheme, ShardIndex};

fn any_scheme() -> impl Strategy<Value = Scheme> {
    prop_oneof![
        4 => (1u8..=63).prop_flat_map(|k| (Just(k), 1..=64 - k)).prop_map(|(k, m)| Scheme::rs(k, m).unwrap()),
        1 => (1u8..=64).prop_map(|n| Scheme::replica(n).unwrap()),
    ]
}

/// Small units, so that short segments have many rows; lengths around multiples of everything.
fn any_stripe() -> impl Strategy<Value = Stripe> {
    let unit = prop_oneof![Just(4096u32), Just(8192), Just(12288), Just(UNIT_BYTES)];
    let slack = prop_oneof![Just(0i64), -2i64..=2, -5000i64..=5000];
    (any_scheme(), unit, 0i64..200, prop_oneof![Just(4096i64), Just(65536), Just(1)], slack).prop_map(
        |(scheme, unit, count, step, slack)| {
            let length = u64::try_from((count * step + slack).max(0)).unwrap();
            Stripe::with_unit(scheme, unit, length).unwrap()
        },
    )
}

proptest! {
    #[test]
    fn the_map_of_a_segment_covers_each_byte_exactly_once(stripe in any_stripe()) {
        let mut at = 0;
        let mut taken: Vec<(u8, u64, u64)> = Vec::new();
        for piece in stripe.map(0, stripe.length()).unwrap() {
            prop_assert!(piece.bytes > 0);
            prop_assert!(usize::from(piece.shard.0) < stripe.k());
            let end = piece.shard_offset + piece.bytes;
            prop_assert!(end <= stripe.shard_bytes());
            // Within one unit.
            let row = stripe.row_of(piece.shard_offset).unwrap();
            prop_assert!(row.shard_range().contains(&(end - 1)));
            // The inverse agrees at both ends, and so in between.
            prop_assert_eq!(stripe.segment_offset(piece.shard, piece.shard_offset), Some(at));
            at += piece.bytes;
            prop_assert_eq!(stripe.segment_offset(piece.shard, end - 1), Some(at - 1));
            taken.push((piece.shard.0, piece.shard_offset, end));
        }
        prop_assert_eq!(at, stripe.length());
        taken.sort_unstable();
        prop_assert!(taken.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1), "pieces overlap");
    }

    #[test]
    fn the_map_of_a_range_is_that_part_of_the_whole_map(
        stripe in any_stripe(),
        a in any::<prop::sample::Index>(),
        b in any::<prop::sample::Index>(),
    ) {
        let size = usize::try_from(stripe.length()).unwrap() + 1;
        let (start, end) = (a.index(size).min(b.index(size)) as u64, a.index(size).max(b.index(size)) as u64);
        let mut expected = Vec::new();
        let mut at = 0;
        for piece in stripe.map(0, stripe.length()).unwrap() {
            let (from, to) = (start.max(at), end.min(at + piece.bytes));
            if from < to {
                expected.push(Piece { shard_offset: piece.shard_offset + from - at, bytes: to - from, ..piece });
            }
            at += piece.bytes;
        }
        prop_assert_eq!(stripe.map(start, end - start).unwrap().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn rows_tile_the_shards_and_the_padded_segment(stripe in any_stripe()) {
        let (mut shard_at, mut segment_at) = (0, 0);
        for (number, row) in (0..).zip(stripe.rows()) {
            prop_assert_eq!((row.number, row.shard_offset, row.segment_offset), (number, shard_at, segment_at));
            prop_assert!(row.unit > 0 && row.unit.is_multiple_of(SHARD_ALIGN));
            for inside in [row.shard_offset, row.shard_offset + row.unit / 2, row.shard_range().end - 1] {
                prop_assert_eq!(stripe.row_of(inside), Some(row));
            }
            shard_at += row.unit;
            segment_at += row.unit * stripe.k() as u64;
        }
        prop_assert_eq!(shard_at, stripe.shard_bytes());
        prop_assert_eq!(segment_at, stripe.padded_bytes());
        prop_assert_eq!(stripe.rows().count() as u64, stripe.row_count());
        prop_assert_eq!(stripe.row(stripe.row_count()), None);
        prop_assert_eq!(stripe.row_of(stripe.shard_bytes()), None);
        // Never more than a block per data shard is wasted.
        prop_assert!(stripe.padded_bytes() >= stripe.length());
        prop_assert!(stripe.padded_bytes() - stripe.length() < SHARD_ALIGN * stripe.k() as u64);
    }

    #[test]
    fn the_inverse_finds_nothing_in_padding_in_parity_and_outside(
        stripe in any_stripe(),
        shard in any::<u8>(),
        offset in any::<prop::sample::Index>(),
    ) {
        let at = offset.index(usize::try_from(stripe.shard_bytes()).unwrap() + 10_000) as u64;
        match stripe.segment_offset(ShardIndex(shard), at) {
            Some(byte) => {
                prop_assert!(byte < stripe.length() && at < stripe.shard_bytes());
                let piece = stripe.map(byte, 1).unwrap().next().unwrap();
                prop_assert_eq!(piece.shard_offset, at);
                if stripe.scheme().is_replica() {
                    prop_assert!(usize::from(shard) < stripe.scheme().width());
                } else {
                    prop_assert_eq!(piece.shard, ShardIndex(shard));
                }
            }
            None if usize::from(shard) < stripe.k() && at < stripe.shard_bytes() => {
                // Padding: the byte would lie behind the end.
                let row = stripe.row_of(at).unwrap();
                let byte = row.segment_offset + u64::from(shard) * row.unit + at - row.shard_offset;
                prop_assert!(byte >= stripe.length());
            }
            None => {}
        }
    }

    #[test]
    fn no_numbers_make_the_geometry_overflow(
        scheme in any_scheme(),
        unit in any::<u32>(),
        length in prop_oneof![any::<u64>(), LENGTH_MAX - 3..=LENGTH_MAX + 1],
        offset in any::<u64>(),
        bytes in any::<u64>(),
        shard in any::<u8>(),
    ) {
        for unit in [unit, unit & !4095, u32::MAX - 4095] {
            if let Ok(stripe) = Stripe::with_unit(scheme, unit, length) {
                prop_assert!(stripe.padded_bytes() >= length);
                let _ = (stripe.map(offset, bytes), stripe.row_of(offset), stripe.row(offset));
                let _ = stripe.segment_offset(ShardIndex(shard), offset);
                if length > 0 {
                    let last = stripe.map(length - 1, 1).unwrap().next().unwrap();
                    prop_assert_eq!(stripe.segment_offset(last.shard, last.shard_offset), Some(length - 1));
                }
            }
        }
    }
}

#[test]
fn the_layout_of_a_short_and_of_a_long_segment_is_the_documented_one() {
    let scheme = Scheme::rs(4, 2).unwrap();
    // 16 MiB: 64 full rows.
    let full = Stripe::new(scheme, 16 << 20).unwrap();
    assert_eq!((full.shard_bytes(), full.row_count(), full.padded_bytes()), (4 << 20, 64, 16 << 20));
    // One row and 20,000 bytes: a second row with a unit of 8 KiB (ceil(20000 / 4) = 5000, rounded up).
    let short = Stripe::new(scheme, (256 << 10) + 20_000).unwrap();
    assert_eq!((short.shard_bytes(), short.row_count()), ((64 << 10) + 8192, 2));
    let pieces: Vec<_> =
        short.map(250 << 10, 20_000).unwrap().map(|piece| (piece.shard.0, piece.shard_offset, piece.bytes)).collect();
    assert_eq!(pieces, [(3, 58 << 10, 6144), (0, 64 << 10, 8192), (1, 64 << 10, 20_000 - 6144 - 8192)]);
    // A replica is one piece however long.
    let copy = Stripe::new(Scheme::replica(3).unwrap(), 1 << 30).unwrap();
    let pieces: Vec<_> = copy.map(0, 1 << 30).unwrap().collect();
    assert_eq!(pieces, [Piece { shard: ShardIndex(0), shard_offset: 0, bytes: 1 << 30 }]);
    assert_eq!(copy.segment_offset(ShardIndex(2), 77), Some(77));
    assert_eq!(copy.segment_offset(ShardIndex(3), 77), None);
}

#[test]
fn impossible_stripes_and_ranges_are_refused() {
    let scheme = Scheme::rs(4, 2).unwrap();
    for unit in [0, 1, 4095, 4097, u32::MAX] {
        assert_eq!(Stripe::with_unit(scheme, unit, 1), Err(Error::UnitInvalid { unit }));
    }
    assert!(Stripe::new(scheme, LENGTH_MAX).is_ok());
    assert_eq!(Stripe::new(scheme, LENGTH_MAX + 1), Err(Error::LengthTooLarge { length: LENGTH_MAX + 1 }));
    let stripe = Stripe::new(scheme, 10_000).unwrap();
    for (offset, bytes) in [(0, 10_001), (10_001, 0), (9_999, 2), (u64::MAX, 1), (1, u64::MAX)] {
        let refused = stripe.map(offset, bytes).map(|_| ());
        assert_eq!(refused, Err(Error::RangeOutside { offset, bytes, length: 10_000 }));
    }
    assert_eq!(stripe.map(10_000, 0).unwrap().count(), 0);
    let empty = Stripe::new(scheme, 0).unwrap();
    assert_eq!((empty.shard_bytes(), empty.row_count(), empty.map(0, 0).unwrap().count()), (0, 0, 0));
}
