//! Index pages in memory, for all volumes of a gateway.

/// Bounded cache of index pages.
#[derive(Debug)]
pub struct PageCache {
    bytes_max: usize,
}

impl Default for PageCache {
    fn default() -> Self {
        Self::new(64 << 20)
    }
}

impl PageCache {
    /// A cache of at most `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max }
    }

    /// The bound.
    #[must_use]
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }
}
