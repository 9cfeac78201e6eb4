//! Asks a disk for its first bytes now and then: one that does not answer is as bad as one that is gone.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use xsan_env::{BufPool, Disk, Env, Moment};

/// How often, and how much: the block that holds the superblock.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const PROBE_BYTES: usize = 4096;

/// A disk under watch.
pub struct DiskProbe {
    env: Env,
    buffers: BufPool,
    disk: Arc<dyn Disk>,
    /// When the request that is out was made.
    asked: Mutex<Option<Moment>>,
}

impl DiskProbe {
    /// Not asked yet.
    #[must_use]
    pub fn new(env: &Env, buffers: &BufPool, disk: &Arc<dyn Disk>) -> Self {
        Self { env: env.clone(), buffers: buffers.clone(), disk: Arc::clone(disk), asked: Mutex::new(None) }
    }

    /// Age of the request that is out; zero if none is.
    #[must_use]
    pub fn silent_for(&self) -> Duration {
        let asked = *self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.map_or(Duration::ZERO, |asked| self.env.now().since(asked))
    }

    fn note(&self, asked: Option<Moment>) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = asked;
    }
}

/// Asks until it is aborted. One request at a time: a disk that hangs is not buried in them.
pub async fn run(probe: Arc<DiskProbe>) {
    loop {
        probe.note(Some(probe.env.now()));
        // Which bytes come, and whether, is for reads of data to judge: here only silence counts.
        if let Err(error) = probe.disk.read(0, probe.buffers.get(PROBE_BYTES)).await {
            tracing::debug!(%error, "a disk does not give its first block");
        }
        probe.note(None);
        probe.env.sleep(PROBE_EVERY).await;
    }
}
