//! Erasure coding beside its peers: our kernels, `reed-solomon-erasure` and ISA-L, on the same buffers in one run.
//!
//! ```text
//! cargo run --release -p xsan-benches --features simd-accel --bin erasure [-- FILTER]
//! ```
//!
//! - GB/s of *data*: k shards per stripe, for encoding and for rebuilding two lost data shards alike, one thread.
//! - *hot*: one stripe over and over. *cold*: a walk through [`COLD_BYTES`] of stripes, far more than the last cache.
//! - The contenders take short turns, [`ROUNDS`] times; the best turn counts, and time is CPU time of the thread, so a
//!   busy neighbour disturbs little and all of them alike.
//! - All outputs are compared before anything is timed.
//! - Without the feature `simd-accel` (it needs a C compiler) `reed-solomon-erasure` is pure Rust and slow; ISA-L is
//!   loaded at run time if the library is there (`XSAN_ISAL=/path/libisal.so` for another build of it).
//! - FILTER keeps the rows that contain it, for example `4+2`, `cold` or `rebuild`.
#![allow(unsafe_code, reason = "calls into ISA-L and the clock of the thread")]

use isal::Isal;
use reed_solomon_erasure::galois_8::ReedSolomon;
use std::hint::black_box;
use std::time::Duration;
use xsan_erasure::{Codec, Kernel};
use xsan_types::{Scheme, ShardIndex};

/// Most shards of a stripe here.
const WIDTH_MAX: usize = 11;
/// Lost data shards of a rebuild: 0 and 1.
const LOST: usize = 2;
const COLD_BYTES: usize = 256 << 20;
const ROUNDS: usize = 30;
const TURN: Duration = Duration::from_millis(5);
const PAGE: usize = 4096;

#[derive(Clone, Copy, PartialEq)]
enum Task {
    Encode,
    Rebuild,
}

/// One row of the result.
#[derive(Clone, Copy)]
struct Case {
    task: Task,
    k: usize,
    m: usize,
    shard_bytes: usize,
    cold: bool,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for task in [Task::Encode, Task::Rebuild] {
            for (k, m) in [(4, 2), (8, 3)] {
                for shard_bytes in [4 << 10, 64 << 10, 1 << 20] {
                    all.extend([false, true].map(|cold| Self { task, k, m, shard_bytes, cold }));
                }
            }
        }
        all
    }

    fn name(self) -> String {
        let task = if self.task == Task::Encode { "encode" } else { "rebuild 2" };
        let set = if self.cold { "cold" } else { "hot" };
        format!("{task} | {}+{} | {} KiB | {set}", self.k, self.m, self.shard_bytes >> 10)
    }

    fn stripe_bytes(self) -> usize {
        (self.k + self.m) * self.shard_bytes
    }

    fn scheme(self) -> Scheme {
        Scheme::rs(self.k as u8, self.m as u8).expect("a valid scheme")
    }
}

/// Shards of one stripe, one behind the other; computes the case's task in place.
type Contender<'a> = Box<dyn FnMut(&mut [u8]) + 'a>;

fn ours<'a>(case: Case, kernel: Kernel) -> Contender<'a> {
    let codec = Codec::with_kernel(case.scheme(), kernel).expect("an available kernel");
    let Case { k, m, shard_bytes, .. } = case;
    match case.task {
        Task::Encode => Box::new(move |stripe| {
            let (data, parity) = stripe.split_at_mut(k * shard_bytes);
            let data = views(data, shard_bytes);
            let mut parity = views_mut(parity, shard_bytes);
            codec.encode(&data[..k], &mut parity[..m]).expect("shards of one length");
        }),
        Task::Rebuild => Box::new(move |stripe| {
            let (lost, rest) = stripe.split_at_mut(LOST * shard_bytes);
            let mut shards = rest.chunks_exact(shard_bytes).zip(LOST as u8..);
            let present: [(ShardIndex, &[u8]); WIDTH_MAX] = std::array::from_fn(|_| {
                shards.next().map_or((ShardIndex(0), &[][..]), |(shard, index)| (ShardIndex(index), shard))
            });
            let (first, second) = lost.split_at_mut(shard_bytes);
            let mut wanted = [(ShardIndex(0), first), (ShardIndex(1), second)];
            codec.reconstruct(&present[..k + m - LOST], &mut wanted).expect("enough shards");
        }),
    }
}

fn reed_solomon_erasure<'a>(case: Case) -> Contender<'a> {
    let Case { k, m, shard_bytes, .. } = case;
    let codec = ReedSolomon::new(k, m).expect("a valid scheme");
    match case.task {
        Task::Encode => Box::new(move |stripe| {
            let (data, parity) = stripe.split_at_mut(k * shard_bytes);
            let data = views(data, shard_bytes);
            let mut parity = views_mut(parity, shard_bytes);
            codec.encode_sep(&data[..k], &mut parity[..m]).expect("shards of one length");
        }),
        Task::Rebuild => Box::new(move |stripe| {
            let mut index = 0;
            let mut shards = views_mut(stripe, shard_bytes).map(|shard| {
                index += 1;
                (shard, index > LOST)
            });
            codec.reconstruct_data(&mut shards[..k + m]).expect("enough shards");
        }),
    }
}

fn isa_l<'a>(case: Case, isal: &'a Isal) -> Contender<'a> {
    let Case { task, k, m, shard_bytes, .. } = case;
    // Our coefficients, in its kernel: a rebuild is its encode with the rows of the inverse, tables made once.
    let (rows, sources) = match task {
        Task::Encode => (m, 0..k),
        Task::Rebuild => (LOST, LOST..LOST + k),
    };
    let mut coefficients = vec![0; rows * k];
    for column in 0..k {
        // A stripe of one-byte shards whose source `column` is 1 and whose other sources are 0.
        let mut unit = vec![0; k + m];
        unit[sources.start + column] = 1;
        ours(Case { shard_bytes: 1, ..case }, Kernel::Scalar)(&mut unit);
        for row in 0..rows {
            let target = if task == Task::Encode { k + row } else { row };
            coefficients[row * k + column] = unit[target];
        }
    }
    let tables = isal.tables(k, rows, &coefficients);
    Box::new(move |stripe| {
        let base = stripe.as_mut_ptr();
        // SAFETY: every offset lies inside the stripe.
        let at = |shard: usize| unsafe { base.add(shard * shard_bytes) };
        let mut data: [*mut u8; WIDTH_MAX] = [std::ptr::null_mut(); WIDTH_MAX];
        let mut outputs = data;
        sources.clone().zip(&mut data).for_each(|(shard, slot)| *slot = at(shard));
        (0..rows)
            .zip(&mut outputs)
            .for_each(|(row, slot)| *slot = at(if task == Task::Encode { k + row } else { row }));
        // SAFETY: k sources and `rows` outputs of `shard_bytes` bytes each, disjoint; the tables are for k and `rows`.
        unsafe { isal.encode(shard_bytes, k, rows, &tables, &mut data, &mut outputs) };
    })
}

fn views(bytes: &[u8], shard_bytes: usize) -> [&[u8]; WIDTH_MAX] {
    let mut shards = bytes.chunks_exact(shard_bytes);
    std::array::from_fn(|_| shards.next().unwrap_or_default())
}

fn views_mut(bytes: &mut [u8], shard_bytes: usize) -> [&mut [u8]; WIDTH_MAX] {
    let mut shards = bytes.chunks_exact_mut(shard_bytes);
    std::array::from_fn(|_| shards.next().unwrap_or_default())
}

/// Bytes to measure on, and where the first page begins in them: shards lie as in a segment buffer.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
}

impl Memory {
    fn new() -> Self {
        let mut state = 1u64;
        let mut bytes = vec![0; COLD_BYTES + PAGE];
        for word in bytes.as_chunks_mut().0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *word = (state ^ state >> 29).to_le_bytes();
        }
        let start = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, start }
    }

    fn stripes(&mut self, case: Case) -> &mut [u8] {
        let count = if case.cold { COLD_BYTES / case.stripe_bytes() } else { 1 };
        &mut self.bytes[self.start..][..count * case.stripe_bytes()]
    }
}

/// GB/s of data of each contender: the best of its turns.
fn measure(case: Case, contenders: &mut [Contender], memory: &mut [u8]) -> Vec<f64> {
    let stripes = memory.len() / case.stripe_bytes();
    let mut next = 0;
    let mut turn = |contender: &mut Contender, memory: &mut [u8]| {
        // Few enough calls that a turn ends in time, many enough that reading the clock costs nothing.
        let batch = (256usize << 10).div_ceil(case.stripe_bytes());
        let start = cpu_time();
        let mut calls = 0;
        loop {
            for _ in 0..batch {
                let at = next * case.stripe_bytes();
                contender(black_box(&mut memory[at..at + case.stripe_bytes()]));
                next = (next + 1) % stripes;
            }
            calls += batch;
            let elapsed = cpu_time() - start;
            if elapsed >= TURN {
                return (calls * case.k * case.shard_bytes) as f64 / elapsed.as_secs_f64() / 1e9;
            }
        }
    };
    let mut best = vec![0.0f64; contenders.len()];
    for _ in 0..ROUNDS {
        for (contender, best) in contenders.iter_mut().zip(&mut best) {
            *best = best.max(turn(contender, memory));
        }
    }
    best
}

/// CPU time of this thread so far.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on Linux, and the result goes to a place of its type.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(failed, 0, "the thread has a clock");
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// Every contender computes what the first one does.
fn compare(case: Case, contenders: &mut [Contender], names: &[String], stripe: &mut [u8]) {
    // A codeword, so that rebuilding changes nothing.
    ours(Case { task: Task::Encode, ..case }, Kernel::Scalar)(stripe);
    let expected = stripe.to_vec();
    for (contender, name) in contenders.iter_mut().zip(names) {
        match case.task {
            Task::Encode => stripe[case.k * case.shard_bytes..].fill(0),
            Task::Rebuild => stripe[..LOST * case.shard_bytes].fill(0),
        }
        contender(stripe);
        assert!(stripe == expected, "{name} computes something else at {}", case.name());
    }
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let isal = Isal::load();
    let accelerated = if cfg!(feature = "simd-accel") { "rs-erasure (simd-accel)" } else { "rs-erasure (pure Rust)" };
    let kernels: Vec<Kernel> = Kernel::available().collect();
    let mut names: Vec<String> = kernels.iter().map(ToString::to_string).collect();
    names.push(accelerated.into());
    names.extend(isal.as_ref().map(|_| "ISA-L".into()));
    if isal.is_none() {
        println!("ISA-L is not here (Debian: libisal2); its column is left out.\n");
    }
    println!("GB/s of data, one thread, best of {ROUNDS} turns of {} ms CPU.\n", TURN.as_millis());
    println!("| task | code | shard | set | {} | {} |", names.join(" | "), ratio_names(&names[kernels.len()..]));
    println!("|---|---|--:|---|{}", "--:|".repeat(2 * names.len() - kernels.len()));
    let mut memory = Memory::new();
    for case in Case::all().into_iter().filter(|case| case.name().contains(&filter)) {
        let mut contenders: Vec<Contender> = kernels.iter().map(|&kernel| ours(case, kernel)).collect();
        contenders.push(reed_solomon_erasure(case));
        contenders.extend(isal.as_ref().map(|isal| isa_l(case, isal)));
        let memory = memory.stripes(case);
        compare(case, &mut contenders, &names, &mut memory[..case.stripe_bytes()]);
        let rates = measure(case, &mut contenders, memory);
        let cells: Vec<String> = rates.iter().map(|rate| format!("{rate:.1}")).collect();
        let ratios: Vec<String> =
            rates[kernels.len()..].iter().map(|rate| format!("{:.2}x", rates[0] / rate)).collect();
        println!("| {} | {} | {} |", case.name(), cells.join(" | "), ratios.join(" | "));
    }
}

fn ratio_names(peers: &[String]) -> String {
    peers.iter().map(|peer| format!("ours / {peer}")).collect::<Vec<_>>().join(" | ")
}

/// ISA-L, loaded at run time so that nothing needs it to build.
mod isal {
    use std::ffi::{CStr, CString, c_int, c_uchar, c_void};

    type InitTables = unsafe extern "C" fn(c_int, c_int, *const c_uchar, *mut c_uchar);
    type EncodeData = unsafe extern "C" fn(c_int, c_int, c_int, *const c_uchar, *const *mut u8, *const *mut u8);

    /// `ec_init_tables` and `ec_encode_data`, the dispatching entry points: its best kernel for this processor.
    pub struct Isal {
        init_tables: InitTables,
        encode_data: EncodeData,
    }

    impl Isal {
        pub fn load() -> Option<Self> {
            let path = std::env::var("XSAN_ISAL").unwrap_or_else(|_| "libisal.so.2".into());
            let path = CString::new(path).ok()?;
            // SAFETY: the path is a C string; loading ISA-L runs no initialiser that could break anything here.
            let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
            let symbol = |name: &CStr| -> Option<*mut c_void> {
                // SAFETY: the library was loaded and is never closed.
                let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
                (!symbol.is_null()).then_some(symbol)
            };
            if library.is_null() {
                return None;
            }
            let (init_tables, encode_data) = (symbol(c"ec_init_tables")?, symbol(c"ec_encode_data")?);
            // SAFETY: the types are those of isa-l/erasure_code.h (`const` aside).
            unsafe {
                Some(Self {
                    init_tables: std::mem::transmute::<*mut c_void, InitTables>(init_tables),
                    encode_data: std::mem::transmute::<*mut c_void, EncodeData>(encode_data),
                })
            }
        }

        /// The tables of `rows` x k coefficients, row by row.
        pub fn tables(&self, k: usize, rows: usize, coefficients: &[u8]) -> Vec<u8> {
            assert_eq!(coefficients.len(), k * rows);
            let mut tables = vec![0; 32 * k * rows];
            // SAFETY: k x rows coefficients are read, 32 bytes for each are written (erasure_code.h).
            unsafe {
                (self.init_tables)(int(k), int(rows), coefficients.as_ptr(), tables.as_mut_ptr());
            }
            tables
        }

        /// # Safety
        /// k pointers to readable and `rows` pointers to writable shards of `bytes` bytes, not overlapping; the tables
        /// were made for k and `rows`.
        pub unsafe fn encode(
            &self,
            bytes: usize,
            k: usize,
            rows: usize,
            tables: &[u8],
            data: &mut [*mut u8],
            outputs: &mut [*mut u8],
        ) {
            assert!(tables.len() == 32 * k * rows && data.len() >= k && outputs.len() >= rows);
            // SAFETY: the caller's promise; the table has the size that ISA-L reads.
            unsafe {
                (self.encode_data)(int(bytes), int(k), int(rows), tables.as_ptr(), data.as_ptr(), outputs.as_ptr());
            }
        }
    }

    fn int(number: usize) -> c_int {
        c_int::try_from(number).expect("sizes here are small")
    }
}
