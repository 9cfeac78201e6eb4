//! Writes a history down while clients make it.

use super::{History, Kind, Operation};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// The history of clients that run at the same time. Clones write into the same one.
#[derive(Clone, Debug)]
pub struct Recorder {
    origin: Instant,
    history: Arc<Mutex<History>>,
}

/// A write under way: unless it is finished, nobody knows whether it takes effect.
#[derive(Debug)]
pub struct Writing(usize);

/// A flush under way: unless it is finished, it says nothing.
#[derive(Debug)]
pub struct Flushing(u64);

/// A read under way: unless it is finished, it says nothing.
#[derive(Debug)]
pub struct Reading {
    client: u64,
    block: u64,
    start: u64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder {
    /// Of a fresh volume.
    #[must_use]
    pub fn new() -> Self {
        Self { origin: Instant::now(), history: Arc::default() }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn history_mut(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("history")
    }

    /// A write is about to be sent.
    #[must_use]
    pub fn start_write(&self, client: u64, block: u64, value: u64) -> Writing {
        let mut history = self.history_mut();
        // After the wait for the lock: the shorter an operation, the more it tells.
        history.write(client, block, value, self.now(), None);
        Writing(history.operations.len() - 1)
    }

    /// The write is acknowledged. One that failed is dropped instead.
    pub fn finish_write(&self, writing: Writing) {
        let end = self.now();
        self.history_mut().operations[writing.0].end = Some(end);
    }

    /// As [`Recorder::finish_write`], of a write that was to be on stable media by then (FUA).
    pub fn finish_forced_write(&self, writing: Writing) {
        let end = self.now();
        let mut history = self.history_mut();
        history.operations[writing.0].end = Some(end);
        history.force(writing.0);
    }

    /// A flush is about to be sent.
    #[must_use]
    pub fn start_flush(&self) -> Flushing {
        Flushing(self.now())
    }

    /// The flush is answered.
    pub fn finish_flush(&self, flushing: Flushing) {
        self.history_mut().flush(flushing.0);
    }

    /// A read is about to be sent.
    #[must_use]
    pub fn start_read(&self, client: u64, block: u64) -> Reading {
        Reading { client, block, start: self.now() }
    }

    /// The read returned a value. One that failed is dropped instead.
    pub fn finish_read(&self, reading: Reading, value: u64) {
        let Reading { client, block, start } = reading;
        let end = Some(self.now());
        self.history_mut().enter(Operation { client, block, kind: Kind::Read, value, start, end });
    }

    /// What happened so far; what is under way counts as not answered.
    #[must_use]
    pub fn history(&self) -> History {
        self.history_mut().clone()
    }
}
