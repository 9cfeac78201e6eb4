//! How busy and how quick each device is, as this pool sees it. Decides when a read is late and, among copies, who is asked.
//!
//! Bound: 128 counters per device. Updated by one read in [`SAMPLE_EVERY`] and by every late one.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// One read in so many is timed: two clock readings are a third of what a read costs the pool.
pub(crate) const SAMPLE_EVERY: u32 = 8;
/// After so many samples the percentile is computed and old samples lose half their weight.
const SAMPLES_PER_TURN: u32 = 256;
/// Quarter octaves of microseconds up to 2^30 us.
const BUCKETS: usize = 128;
/// A read is hedged after this time even if all devices are slower.
const LATE_MAX: Duration = Duration::from_millis(500);

/// Load and latency of one device; lives as long as the pool, over all maps.
pub(crate) struct Load {
    inflight: AtomicU32,
    late: AtomicU32,
    turns: AtomicU32,
    samples: AtomicU32,
    buckets: [AtomicU32; BUCKETS],
    p99_us: AtomicU64,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            inflight: AtomicU32::new(0),
            late: AtomicU32::new(0),
            turns: AtomicU32::new(0),
            samples: AtomicU32::new(0),
            buckets: std::array::from_fn(|_| AtomicU32::new(0)),
            p99_us: AtomicU64::new(0),
        }
    }
}

fn bucket_of(us: u64) -> usize {
    if us < 4 {
        return us as usize;
    }
    let octave = us.ilog2() as usize;
    let quarter = (us >> (octave - 2)) as usize & 3;
    ((octave - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// Largest value of a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let (octave, quarter) = (bucket / 4 + 1, bucket % 4);
    ((4 + quarter as u64 + 1) << (octave - 2)) - 1
}

impl Load {
    /// Reads that have not been answered.
    pub(crate) fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// Whether some read is late right now.
    pub(crate) fn is_late(&self) -> bool {
        self.late.load(Ordering::Relaxed) > 0
    }

    /// Whether the next read is one of those that are timed.
    pub(crate) fn is_sampled(&self) -> bool {
        self.turns.fetch_add(1, Ordering::Relaxed).is_multiple_of(SAMPLE_EVERY)
    }

    /// Counts one time; true when the percentile was computed anew.
    pub(crate) fn record(&self, took: Duration) -> bool {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
        if self.samples.fetch_add(1, Ordering::Relaxed) + 1 < SAMPLES_PER_TURN {
            return false;
        }
        self.samples.store(0, Ordering::Relaxed);
        self.turn();
        true
    }

    /// Computes the percentile and halves the counters. Racing records may be lost: a few samples among hundreds.
    fn turn(&self) {
        let counts: [u32; BUCKETS] = std::array::from_fn(|i| self.buckets[i].load(Ordering::Relaxed));
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let mut above = total / 100;
        for bucket in (0..BUCKETS).rev() {
            let count = u64::from(counts[bucket]);
            if count > above {
                self.p99_us.store(bucket_end(bucket).max(1), Ordering::Relaxed);
                break;
            }
            above -= count;
        }
        for (bucket, count) in self.buckets.iter().zip(counts) {
            bucket.store(count / 2, Ordering::Relaxed);
        }
    }

    /// The time within which 99 of 100 reads are answered; 0 before enough were timed.
    pub(crate) fn p99_us(&self) -> u64 {
        self.p99_us.load(Ordering::Relaxed)
    }
}

/// When a read counts as late: the median of the devices' 99th percentiles (a stalled device must not move it), at least
/// `floor`.
pub(crate) fn late_after(loads: impl Iterator<Item = u64>, floor: Duration) -> Duration {
    let mut known: Vec<u64> = loads.filter(|&us| us > 0).collect();
    known.sort_unstable();
    match known.len() {
        0 => floor,
        count => Duration::from_micros(known[(count - 1) / 2]).clamp(floor, floor.max(LATE_MAX)),
    }
}

/// Reads that pay for one hedge.
const HEDGE_PRICE: i64 = 4;
/// Most that is saved up: a burst of 64 hedges.
const HEDGE_SAVED_MAX: i64 = 64 * HEDGE_PRICE;

/// Keeps hedges to a quarter of the reads: a stalled device among many is covered, and devices that are all overloaded are
/// not given more work.
pub(crate) struct HedgeBudget(AtomicI64);

impl HedgeBudget {
    pub(crate) fn new() -> Self {
        Self(AtomicI64::new(HEDGE_SAVED_MAX))
    }

    /// Counts a read.
    pub(crate) fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < HEDGE_SAVED_MAX {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes the price of a hedge, if it is there.
    pub(crate) fn spend(&self) -> bool {
        let mut saved = self.0.load(Ordering::Relaxed);
        while saved >= HEDGE_PRICE {
            let left = saved - HEDGE_PRICE;
            match self.0.compare_exchange_weak(saved, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => saved = now,
            }
        }
        false
    }
}

/// Counts a read as in flight while it lives.
pub(crate) struct InFlight(Arc<Load>);

impl InFlight {
    pub(crate) fn new(load: &Arc<Load>) -> Self {
        load.inflight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(load))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Marks a device as late while it lives.
pub(crate) struct Late(Arc<Load>);

impl Late {
    pub(crate) fn new(load: &Arc<Load>) -> Self {
        load.late.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(load))
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.0.late.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_end_where_the_next_begins() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(bucket_end(bucket)), bucket);
            assert_eq!(bucket_of(bucket_end(bucket) + 1), bucket + 1);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_percentile_follows_the_device_and_forgets() {
        let load = Load::default();
        let feed = |us: u64, count: u32| (0..count).for_each(|_| _ = load.record(Duration::from_micros(us)));
        feed(100, 2 * SAMPLES_PER_TURN);
        assert!((100..128).contains(&load.p99_us()), "{}", load.p99_us());
        feed(10_000, SAMPLES_PER_TURN);
        assert!((10_000..12_500).contains(&load.p99_us()), "{}", load.p99_us());
        feed(100, 12 * SAMPLES_PER_TURN);
        assert!((100..128).contains(&load.p99_us()), "old samples fade");
    }

    #[test]
    fn hedges_are_a_quarter_of_the_reads_at_most() {
        let budget = HedgeBudget::new();
        let burst = (0..1000).filter(|_| budget.spend()).count();
        assert_eq!(burst, 64);
        let spent = (0..4000).filter(|_| {
            budget.earn();
            budget.spend()
        });
        assert_eq!(spent.count(), 1000);
    }

    #[test]
    fn one_stalled_device_does_not_make_the_others_patient() {
        let floor = Duration::from_millis(5);
        assert_eq!(late_after([0, 0].into_iter(), floor), floor);
        assert_eq!(late_after([300, 400, 9_000_000].into_iter(), floor), floor);
        assert_eq!(late_after([20_000, 30_000, 9_000_000].into_iter(), floor), Duration::from_millis(30));
        assert_eq!(late_after([9_000_000].into_iter(), floor), LATE_MAX);
    }
}
