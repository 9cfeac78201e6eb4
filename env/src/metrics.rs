//! Counters, gauges and histograms: named once in a [`Registry`], then a relaxed atomic each.
//!
//! A handle is cheap to clone and to keep in a struct; take it at start-up, not per request (the registry has a lock).
//! Names follow Prometheus: `xsan_<crate>_<what>_<unit>[_total]`; labels are part of the name as in the text format:
//! `xsan_node_device_write_bytes_total{device="d1"}`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buckets of a histogram: bucket `i` counts values of at most 2^i - 1, the last one everything.
pub const BUCKETS: usize = 48;

/// A number that only grows.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// A counter outside any registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The sum so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    /// A gauge outside any registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `amount` (which may be negative).
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Buckets {
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

/// A distribution in powers of two: sizes in bytes, times in microseconds.
#[derive(Clone, Debug)]
pub struct Histogram(Arc<Buckets>);

impl Default for Histogram {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Self(Arc::new(Buckets { counts, sum: AtomicU64::new(0) }))
    }
}

impl Histogram {
    /// A histogram outside any registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts one value.
    pub fn record(&self, value: u64) {
        let bucket = ((u64::BITS - value.leading_zeros()) as usize).min(BUCKETS - 1);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// What was counted so far (not one instant: counts that come meanwhile may be in or not).
    #[must_use]
    pub fn snapshot(&self) -> Distribution {
        Distribution {
            counts: self.0.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: self.0.sum.load(Ordering::Relaxed),
        }
    }
}

/// Content of a histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// Values per bucket: bucket `i` holds those from 2^(i-1) to 2^i - 1 (bucket 0 the zeroes).
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: u64,
}

impl Distribution {
    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Mean of the values; 0 without any.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count()).unwrap_or(0)
    }

    /// An upper bound of the value below which `percent` of the values lie: the end of its bucket.
    #[must_use]
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = self.count() * percent.min(100) / 100;
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += count;
            if count > 0 && seen >= wanted {
                return bucket_end(bucket);
            }
        }
        0
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        let counts = self.counts.iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect();
        Self { counts, sum: self.sum.saturating_sub(earlier.sum) }
    }
}

/// Largest value of a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket >= BUCKETS - 1 { u64::MAX } else { (1 << bucket) - 1 }
}

/// A value in a [`Sample`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// Of a counter.
    Counter(u64),
    /// Of a gauge.
    Gauge(i64),
    /// Of a histogram.
    Histogram(Distribution),
}

impl Value {
    /// Prometheus' word for the kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Counter(_) => "counter",
            Self::Gauge(_) => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// One metric at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Full name, labels included.
    pub name: String,
    /// What it means, in a sentence.
    pub help: &'static str,
    /// Its value; the kind is in the variant.
    pub value: Value,
}

enum Metric {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

struct Entry {
    help: &'static str,
    metric: Metric,
}

/// All metrics of a process (or of one simulated node); clones share them.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<BTreeMap<String, Entry>>>);

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find<T: Clone + Default>(
        &self,
        name: String,
        help: &'static str,
        wrap: impl FnOnce(T) -> Metric,
        unwrap: impl FnOnce(&Metric) -> Option<T>,
    ) -> T {
        let mut entries = self.entries();
        if let Some(entry) = entries.get(&name) {
            return unwrap(&entry.metric).unwrap_or_else(|| panic!("metric {name} exists with another kind"));
        }
        let made = T::default();
        entries.insert(name, Entry { help, metric: wrap(made.clone()) });
        made
    }

    /// The counter of this name, made at the first call.
    ///
    /// # Panics
    /// When the name is that of another kind of metric.
    pub fn counter(&self, name: impl Into<String>, help: &'static str) -> Counter {
        self.find(name.into(), help, Metric::Counter, |metric| match metric {
            Metric::Counter(found) => Some(found.clone()),
            _ => None,
        })
    }

    /// The gauge of this name, made at the first call.
    ///
    /// # Panics
    /// When the name is that of another kind of metric.
    pub fn gauge(&self, name: impl Into<String>, help: &'static str) -> Gauge {
        self.find(name.into(), help, Metric::Gauge, |metric| match metric {
            Metric::Gauge(found) => Some(found.clone()),
            _ => None,
        })
    }

    /// The histogram of this name, made at the first call.
    ///
    /// # Panics
    /// When the name is that of another kind of metric.
    pub fn histogram(&self, name: impl Into<String>, help: &'static str) -> Histogram {
        self.find(name.into(), help, Metric::Histogram, |metric| match metric {
            Metric::Histogram(found) => Some(found.clone()),
            _ => None,
        })
    }

    /// Forgets all metrics whose name contains `part` (a label of something that is gone). Handles stay usable.
    pub fn remove(&self, part: &str) {
        self.entries().retain(|name, _| !name.contains(part));
    }

    /// All metrics, sorted by name.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Sample> {
        let sample = |(name, entry): (&String, &Entry)| {
            let value = match &entry.metric {
                Metric::Counter(counter) => Value::Counter(counter.get()),
                Metric::Gauge(gauge) => Value::Gauge(gauge.get()),
                Metric::Histogram(histogram) => Value::Histogram(histogram.snapshot()),
            };
            Sample { name: name.clone(), help: entry.help, value }
        };
        self.entries().iter().map(sample).collect()
    }

    /// All metrics in the Prometheus text format.
    #[must_use]
    pub fn prometheus(&self) -> String {
        render(&self.snapshot())
    }
}

/// Samples in the Prometheus text format (version 0.0.4).
#[must_use]
pub fn render(samples: &[Sample]) -> String {
    let mut out = String::new();
    let mut families: Vec<(&str, &str, &Sample)> = samples.iter().map(split).collect();
    // A family's lines must stand together; `a{...}` and `a_b` sort differently with and without labels.
    families.sort_by_key(|&(family, labels, _)| (family, labels));
    let mut last = "";
    for (family, labels, sample) in families {
        if family != last {
            let help = sample.help.replace('\\', "\\\\").replace('\n', "\\n");
            // Writing to a string cannot fail.
            let _ = writeln!(out, "# HELP {family} {help}\n# TYPE {family} {}", sample.value.kind());
            last = family;
        }
        write_sample(&mut out, family, labels, &sample.value);
    }
    out
}

fn split(sample: &Sample) -> (&str, &str, &Sample) {
    match sample.name.split_once('{') {
        Some((family, labels)) => (family, labels.trim_end_matches('}'), sample),
        None => (&sample.name, "", sample),
    }
}

fn write_sample(out: &mut String, family: &str, labels: &str, value: &Value) {
    let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let _ = match value {
        Value::Counter(value) => writeln!(out, "{family}{braced} {value}"),
        Value::Gauge(value) => writeln!(out, "{family}{braced} {value}"),
        Value::Histogram(distribution) => {
            let comma = if labels.is_empty() { "" } else { "," };
            let last = distribution.counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
            let mut seen = 0;
            for (bucket, count) in distribution.counts.iter().enumerate().take(last.min(BUCKETS - 1)) {
                seen += count;
                let _ = writeln!(out, "{family}_bucket{{{labels}{comma}le=\"{}\"}} {seen}", bucket_end(bucket));
            }
            let count = distribution.count();
            let _ = writeln!(out, "{family}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
            writeln!(out, "{family}_sum{braced} {}\n{family}_count{braced} {count}", distribution.sum)
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_of_one_name_share_their_value_and_a_snapshot_shows_all() {
        let registry = Registry::new();
        let counter = registry.counter("xsan_a_total", "counts");
        registry.clone().counter("xsan_a_total", "counts").add(2);
        counter.inc();
        registry.gauge("xsan_b", "goes up and down").add(-4);
        registry.histogram("xsan_c_bytes", "sizes").record(4096);
        let values: Vec<_> = registry.snapshot().into_iter().map(|sample| (sample.name, sample.value)).collect();
        assert_eq!(values[0], ("xsan_a_total".into(), Value::Counter(3)));
        assert_eq!(values[1], ("xsan_b".into(), Value::Gauge(-4)));
        assert!(matches!(&values[2].1, Value::Histogram(sizes) if sizes.count() == 1 && sizes.sum == 4096));
        registry.remove("xsan_a");
        assert_eq!(registry.snapshot().len(), 2);
    }

    #[test]
    fn percentiles_bound_the_values_and_differences_show_a_span() {
        let histogram = Histogram::new();
        (0..90).for_each(|_| histogram.record(100));
        let before = histogram.snapshot();
        (0..10).for_each(|_| histogram.record(5000));
        histogram.record(0);
        histogram.record(u64::MAX >> 8);
        let all = histogram.snapshot();
        assert_eq!((all.percentile(50), all.percentile(95)), (127, 8191));
        assert_eq!(all.percentile(100), u64::MAX);
        assert_eq!((before.mean(), before.percentile(99)), (100, 127));
        assert_eq!(all.since(&before).count(), 12);
        assert_eq!(Distribution::default().percentile(50), 0);
    }

    #[test]
    fn the_prometheus_text_groups_families_and_cumulates_buckets() {
        let registry = Registry::new();
        registry.counter("xsan_x_total{device=\"d1\"}", "first").add(1);
        registry.counter("xsan_x_total{device=\"d2\"}", "first").add(2);
        registry.counter("xsan_x_total_more", "second");
        let histogram = registry.histogram("xsan_h{device=\"d1\"}", "third");
        histogram.record(1);
        histogram.record(3);
        assert_eq!(
            registry.prometheus(),
            "# HELP xsan_h third\n# TYPE xsan_h histogram\n\
             xsan_h_bucket{device=\"d1\",le=\"0\"} 0\nxsan_h_bucket{device=\"d1\",le=\"1\"} 1\n\
             xsan_h_bucket{device=\"d1\",le=\"3\"} 2\nxsan_h_bucket{device=\"d1\",le=\"+Inf\"} 2\n\
             xsan_h_sum{device=\"d1\"} 4\nxsan_h_count{device=\"d1\"} 2\n\
             # HELP xsan_x_total first\n# TYPE xsan_x_total counter\n\
             xsan_x_total{device=\"d1\"} 1\nxsan_x_total{device=\"d2\"} 2\n\
             # HELP xsan_x_total_more second\n# TYPE xsan_x_total_more counter\nxsan_x_total_more 0\n"
        );
    }
}
