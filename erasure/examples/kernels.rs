//! Compares every kernel of this processor with the scalar one, over schemes, lengths and alignments: for a processor, real or
//! emulated, on which the test suite does not run (`scripts/neon.sh`). Ends with status 1 at the first difference.

use std::process::ExitCode;
use xsan_erasure::{Codec, Kernel};
use xsan_types::{Scheme, ShardIndex};

const SCHEMES: [(u8, u8); 6] = [(1, 1), (2, 1), (2, 2), (4, 2), (8, 3), (10, 6)];
const LENGTHS: [usize; 8] = [1, 15, 64, 127, 512, 4096, 4099, 65_536];

/// Bytes that depend on everything and repeat nowhere soon, behind `lead` bytes that spoil the alignment.
fn noise(seed: u64, lead: usize, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..lead + len).map(|_| next()).collect()
}

/// Parity shards, and the shards that were rebuilt wrong.
type Shards = (Vec<Vec<u8>>, Vec<Vec<u8>>);

/// Parity by `codec`, then every shard rebuilt from the last k ones.
fn shards(codec: &Codec, data: &[&[u8]]) -> Result<Shards, xsan_erasure::Error> {
    let (k, m, len) = (data.len(), codec.scheme().tolerates(), data[0].len());
    let mut parity = vec![vec![0xA5; len]; m];
    codec.encode(data, &mut parity.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
    let all: Vec<&[u8]> = data.iter().copied().chain(parity.iter().map(Vec::as_slice)).collect();
    let index = |at: usize| ShardIndex(u8::try_from(at).expect("at most 64 shards"));
    let present: Vec<(ShardIndex, &[u8])> = (m..k + m).map(|at| (index(at), all[at])).collect();
    let mut rebuilt = vec![vec![0x5A; len]; m];
    let mut wanted: Vec<(ShardIndex, &mut [u8])> =
        rebuilt.iter_mut().enumerate().map(|(at, shard)| (index(at), shard.as_mut_slice())).collect();
    codec.reconstruct(&present, &mut wanted)?;
    let rebuilt_right = rebuilt.iter().zip(&all).all(|(rebuilt, shard)| rebuilt == shard);
    Ok((parity, if rebuilt_right { Vec::new() } else { rebuilt }))
}

fn compare(kernel: Kernel) -> Result<usize, String> {
    let mut cases = 0;
    for (k, m) in SCHEMES {
        let scheme = Scheme::rs(k, m).map_err(|error| error.to_string())?;
        for (number, len) in LENGTHS.into_iter().enumerate() {
            for lead in [0, 1, 7] {
                let data: Vec<Vec<u8>> = (0..k).map(|at| noise(u64::from(at) + 1, lead, len)).collect();
                let data: Vec<&[u8]> = data.iter().map(|shard| &shard[lead..]).collect();
                let of = |kernel| Codec::with_kernel(scheme, kernel).and_then(|codec| shards(&codec, &data));
                let (ours, scalar) = (of(kernel), of(Kernel::Scalar));
                let agree = matches!((&ours, &scalar), (Ok(ours), Ok(scalar)) if ours == scalar && ours.1.is_empty());
                if !agree {
                    return Err(format!(
                        "{k}+{m}, {len} bytes (length {number}), {lead} off: {kernel:?} differs from scalar"
                    ));
                }
                cases += 1;
            }
        }
    }
    Ok(cases)
}

fn main() -> ExitCode {
    for kernel in Kernel::available() {
        match compare(kernel) {
            Ok(cases) => println!("{kernel:?}: {cases} cases equal the scalar kernel and are rebuilt"),
            Err(difference) => {
                eprintln!("{difference}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
