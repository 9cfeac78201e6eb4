//! Group flush (P4): one device flush serves everybody whose bytes were complete before it *began* (H7).

use std::sync::Mutex;
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct Turns {
    started: u64,
    finished: u64,
    running: bool,
    failed: bool,
}

/// Decides who flushes and who waits.
#[derive(Debug, Default)]
pub(crate) struct FlushGate {
    turns: Mutex<Turns>,
    changed: Notify,
}

impl FlushGate {
    /// Completes after a flush that began after this call. `flush` is run by one caller at a time. Answers `false` if a
    /// flush failed: from then on every flush fails.
    pub(crate) async fn flush<F: Future<Output = bool>>(&self, flush: impl FnOnce() -> F) -> bool {
        let wanted = {
            let turns = self.turns.lock().expect("flush lock");
            // A flush that runs already began too early.
            turns.started + 1
        };
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            let lead = {
                let mut turns = self.turns.lock().expect("flush lock");
                if turns.failed {
                    return false;
                }
                if turns.finished >= wanted {
                    return true;
                }
                let lead = !turns.running;
                if lead {
                    turns.running = true;
                    turns.started += 1;
                }
                lead
            };
            if lead {
                let ok = flush().await;
                let mut turns = self.turns.lock().expect("flush lock");
                turns.running = false;
                turns.failed |= !ok;
                turns.finished = turns.started;
                drop(turns);
                self.changed.notify_waiters();
                return ok;
            }
            changed.await;
        }
    }
}
