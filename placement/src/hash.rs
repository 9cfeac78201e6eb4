//! Hashes that decide placement. They are stored nowhere, but a change of them would make every later rebalance prefer
//! other groups: the golden values below keep them as they are.

use crate::topology::DomainKey;
use xsan_types::PgId;

/// Spreads the bits of `value` (the finaliser of splitmix64, Stafford's variant 13).
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// One hash out of two: multiply wide, fold, mix.
pub(crate) fn combine(a: u64, b: u64) -> u64 {
    let wide = u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from(b | 1);
    mix((wide as u64) ^ ((wide >> 64) as u64) ^ b)
}

/// Hash of a group.
pub(crate) fn of_pg(pg: PgId) -> u64 {
    mix(mix(u64::from(pg.pool.0) + 1) ^ u64::from(pg.index))
}

/// Hash of 128 bits of identity.
pub(crate) fn of_identity(id: u128) -> u64 {
    combine(mix(id as u64), (id >> 64) as u64)
}

/// Hash of a name.
fn of_name(seed: u64, name: &str) -> u64 {
    let tail = mix(seed ^ (name.len() as u64));
    name.as_bytes().chunks(8).fold(tail, |state, chunk| {
        let mut word = [0; 8];
        for (slot, byte) in word.iter_mut().zip(chunk) {
            *slot = *byte;
        }
        mix(state ^ u64::from_le_bytes(word)).wrapping_add(state.rotate_left(23))
    })
}

/// Hash of a failure domain.
pub(crate) fn of_domain(key: &DomainKey<'_>) -> u64 {
    match *key {
        DomainKey::Device(id) => of_identity(id.0),
        DomainKey::Node(id) => mix(0x6e6f_6465 ^ (u64::from(id.0) << 32)),
        DomainKey::Host(name) => of_name(1, name),
        DomainKey::Rack(zone, name) => of_name(of_name(2, zone), name),
        DomainKey::Zone(name) => of_name(3, name),
    }
}

/// An exponentially distributed number (mean 1) out of a hash: -ln(u). Divided by a weight, the smallest of several wins
/// with probability proportional to its weight.
///
/// Written with basic IEEE operations only, because `f64::ln` may differ in its last bit between C libraries and every
/// replica of the metadata must compute the same table.
pub(crate) fn exponential(hash: u64) -> f64 {
    // 52 bits plus a half: exact, inside (0, 1).
    let uniform = ((hash >> 12) as f64 + 0.5) * (1.0 / 4_503_599_627_370_496.0);
    let bits = uniform.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 atanh((m-1)/(m+1)); |s| <= 0.1716, so the first term left out is below 3e-13.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let q = s * s;
    let series =
        1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q / 13.0)))));
    -(f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * s * series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_types::{DeviceId, NodeId, PoolId};

    #[test]
    fn the_hashes_stay_as_they_are() {
        let found = [
            of_pg(PgId { pool: PoolId(1), index: 7 }),
            of_domain(&DomainKey::Device(DeviceId(0x0123_4567_89ab_cdef << 64 | 42))),
            of_domain(&DomainKey::Node(NodeId(3))),
            of_domain(&DomainKey::Host("storage-17.example")),
            of_domain(&DomainKey::Rack("z1", "r9")),
            exponential(0x1234_5678_9abc_def0).to_bits(),
        ];
        assert_eq!(found, GOLDEN, "{found:#x?}");
    }

    const GOLDEN: [u64; 6] = [
        0xf2db_4719_07f7_e261,
        0x81dc_e928_47bf_2390,
        0x31dd_ac4c_7e8e_9add,
        0xf559_9dcf_5c85_d766,
        0x701c_7173_10b7_9e92,
        0x4005_25e9_73a0_5652,
    ];

    #[test]
    fn the_logarithm_is_the_logarithm() {
        let mut state = 1u64;
        for _ in 0..100_000 {
            state = mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
            let exact = -(((state >> 12) as f64 + 0.5) / 4_503_599_627_370_496.0).ln();
            assert!((exponential(state) - exact).abs() <= 1e-11 * exact.max(1.0), "{state:x}");
        }
        assert!(exponential(u64::MAX) > 0.0 && exponential(0) < 40.0);
    }
}
