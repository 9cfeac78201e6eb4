//! A disk in memory that fails the way disks fail. Owner: tests, the simulator and the `memory` backend.
//!
//! Fault model: any request may fail or never be answered; a write may be lost, torn at a sector or go elsewhere; bits
//! rot; a sector may become unreadable until it is written again; the whole device may die. A crash of the process keeps
//! every completed write and any part of those in flight. Power loss keeps of everything that no flush covered any
//! subset of sectors ([`Keep`]). After a failed flush the writes it should have covered are gone for good as far as
//! power loss is concerned, although they can still be read: what kernels do.
//!
//! Memory: 4 KiB per page ever written (sparse), and until the next flush the old pages and the written buffers.

mod faults;
mod pages;

pub use faults::{Counters, Fault, Keep, Operation};

use crate::buf::{Buf, BufMut};
use crate::disk::{Disk, Geometry, IoFuture, ready};
use crate::error::EnvError;
use crate::runtime::Env;
use faults::Plans;
use pages::Media;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// One step of a small mixing function (SplitMix64): seeds for fault plans, not for secrets.
#[must_use]
pub fn mix(seed: u64) -> u64 {
    let mut x = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A disk in memory. Clones share it, also over crashes: the owner of a clone is the one who can pull the plug.
///
/// The clones themselves never die; a node under test gets [`MemoryDisk::open`], whose handle is dead after a crash.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    geometry: Geometry,
    latency: Option<Latency>,
    state: Mutex<State>,
}

struct Latency {
    env: Env,
    nanos: Range<u64>,
}

struct State {
    media: Media,
    plans: Plans,
    counters: Counters,
    poisoned: bool,
    /// Number of crashes so far; what was opened or started before the last one is dead.
    crashes: u64,
    /// Those of them in which it lost power.
    power_losses: u64,
    in_flight: BTreeMap<u64, Request>,
    next_request: u64,
}

/// A started request that has not completed: delayed or stalled.
struct Request {
    action: Action,
    fault: Option<Fault>,
}

enum Action {
    Read {
        offset: u64,
        into: BufMut,
        done: oneshot::Sender<io::Result<BufMut>>,
    },
    Write {
        offset: u64,
        data: Vec<Buf>,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Covers the changes below `covers`.
    Flush {
        covers: u64,
        done: oneshot::Sender<io::Result<()>>,
    },
    Discard {
        offset: u64,
        bytes: u64,
        done: oneshot::Sender<io::Result<()>>,
    },
}

impl MemoryDisk {
    /// A disk of `bytes` zeroes with sectors of 512 or 4096 bytes; every request completes at once.
    ///
    /// # Panics
    /// When `bytes` is not a multiple of `sector`, or `sector` is neither 512 nor 4096.
    #[must_use]
    pub fn new(bytes: u64, sector: u32) -> Self {
        Self::build("memory", bytes, sector, None)
    }

    /// A disk whose requests complete after a random part of `delay`, drawn from `env`: so they overtake each other.
    ///
    /// # Panics
    /// As [`MemoryDisk::new`].
    #[must_use]
    pub fn with_latency(name: &str, bytes: u64, sector: u32, env: &Env, delay: Range<Duration>) -> Self {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let latency = Latency { env: env.clone(), nanos: nanos(delay.start)..nanos(delay.end) };
        Self::build(name, bytes, sector, Some(latency))
    }

    fn build(name: &str, bytes: u64, sector: u32, latency: Option<Latency>) -> Self {
        assert!(matches!(sector, 512 | 4096) && bytes.is_multiple_of(u64::from(sector)), "{bytes} in {sector}");
        let geometry = Geometry { bytes, sector };
        let state = State {
            media: Media::new(sector),
            plans: Plans::new(mix(bytes)),
            counters: Counters::default(),
            poisoned: false,
            crashes: 0,
            power_losses: 0,
            in_flight: BTreeMap::new(),
            next_request: 0,
        };
        Self { shared: Arc::new(Shared { name: name.to_owned(), geometry, latency, state: Mutex::new(state) }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle for one process: dead after the next crash. It starts unpoisoned only after one.
    #[must_use]
    pub fn open(&self) -> Arc<dyn Disk> {
        let crashes = self.state().crashes;
        Arc::new(Opened { disk: self.clone(), crashes })
    }

    /// The process dies. Completed writes stay; of a write in flight any sectors do.
    pub fn crash_process(&self) {
        self.crash(None);
    }

    /// The host, or the disk alone, loses power; what of the unflushed writes stays is up to `keep`.
    pub fn power_off(&self, keep: Keep) {
        self.crash(Some(keep));
    }

    fn crash(&self, power: Option<Keep>) {
        let mut state = self.state();
        let in_flight = std::mem::take(&mut state.in_flight);
        let mut keep = match power {
            Some(keep) => {
                state.media.power_off(keep);
                keep
            }
            None => Keep::Seed(state.plans.random()),
        };
        for request in in_flight.values() {
            if let Action::Write { offset, data, .. } = &request.action {
                state.media.keep_some(*offset, data, &mut keep, power.is_some());
            }
        }
        state.crashes += 1;
        state.power_losses += u64::from(power.is_some());
        state.poisoned = false;
        drop(state);
        // Here the senders go: whoever still waits learns that its world ended.
        drop(in_flight);
    }

    /// Makes the `nth` request of this kind from now on (1 = the next) go wrong.
    pub fn fault_nth(&self, operation: Operation, nth: u64, fault: Fault) {
        let mut state = self.state();
        let counters = state.counters;
        state.plans.add(operation, counters.of(operation) + nth, fault);
    }

    /// Makes the `nth` request of this kind from now on fail with `errno` (EIO, ENOSPC), without effect.
    pub fn fail_nth(&self, operation: Operation, nth: u64, errno: i32) {
        self.fault_nth(operation, nth, Fault::Error(errno));
    }

    /// Every request fails with `errno` from now on; `None` revives the device.
    pub fn set_dead(&self, errno: Option<i32>) {
        self.state().plans.dead = errno;
    }

    /// Reads that touch these bytes fail with EIO until each of their sectors has been written again.
    pub fn damage(&self, range: Range<u64>) {
        self.state().media.damage(range);
    }

    /// Turns one bit round, silently: `bit` 0-7 of the byte at `offset`.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        self.state().media.flip(offset, bit);
    }

    /// Takes all planned faults back (not: damaged sectors, poison) and lets stalled requests complete.
    pub fn heal(&self) {
        {
            let mut state = self.state();
            state.plans.clear();
        }
        self.release_stalled();
    }

    /// Lets stalled requests complete.
    pub fn release_stalled(&self) {
        let stalled: Vec<u64> = {
            let state = self.state();
            let is_stalled = |request: &Request| matches!(request.fault, Some(Fault::Stall));
            state.in_flight.iter().filter(|(_, request)| is_stalled(request)).map(|(&id, _)| id).collect()
        };
        for id in stalled {
            self.shared.complete(id, true);
        }
    }

    /// Requests that were started and have not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state().in_flight.len()
    }

    /// What was asked of the disk since it was made (also what failed).
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.state().counters
    }

    /// Reads past all faults and counters.
    #[must_use]
    pub fn peek(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.state().media.current().read(offset, &mut out);
        out
    }

    /// Overwrites stable bytes past all faults and counters.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        self.state().media.poke(offset, bytes);
    }

    /// Bytes of memory behind the pages written so far.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.state().media.current().resident_bytes()
    }

    fn start<T: Send + 'static>(
        &self,
        action: impl FnOnce(&mut State, oneshot::Sender<io::Result<T>>) -> Action,
        bytes: u64,
    ) -> IoFuture<T> {
        let (done, answer) = oneshot::channel();
        let (id, stalled) = {
            let mut state = self.state();
            let action = action(&mut state, done);
            let operation = action.operation();
            state.counters.count(operation, bytes);
            let counters = state.counters;
            let fault = state.plans.take(operation, &counters);
            let id = state.next_request;
            state.next_request += 1;
            let stalled = matches!(fault, Some(Fault::Stall));
            state.in_flight.insert(id, Request { action, fault });
            (id, stalled)
        };
        match &self.shared.latency {
            _ if stalled => {}
            None => self.shared.complete(id, false),
            Some(latency) => latency.complete_later(Arc::clone(&self.shared), id),
        }
        let what = Arc::clone(&self.shared);
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| Err(EnvError::Crashed { what: what.name.clone() }.into_io()))
        })
    }
}

impl Latency {
    fn complete_later(&self, shared: Arc<Shared>, id: u64) {
        let span = (self.nanos.end - self.nanos.start.min(self.nanos.end)).max(1);
        let sleep = self.env.sleep(Duration::from_nanos(self.nanos.start + self.env.random() % span));
        drop(self.env.spawn("memory-disk", async move {
            sleep.await;
            shared.complete(id, false);
        }));
    }
}

impl Action {
    fn operation(&self) -> Operation {
        match self {
            Self::Read { .. } => Operation::Read,
            Self::Write { .. } => Operation::Write,
            Self::Flush { .. } => Operation::Flush,
            Self::Discard { .. } => Operation::Discard,
        }
    }
}

impl Shared {
    /// Ends a request, if a crash has not done so already.
    fn complete(&self, id: u64, released: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Request { action, mut fault }) = state.in_flight.remove(&id) else { return };
        if released {
            fault = None;
        }
        // Answers are sent after the lock is gone: a receiver may run at once.
        match action {
            Action::Read { offset, mut into, done } => {
                let result = self.finish_read(&mut state, offset, &mut into, fault).map(|()| into);
                drop(state);
                answer(done, result);
            }
            Action::Write { offset, data, done } => {
                let result = self.finish_write(&mut state, offset, data, fault);
                drop(state);
                answer(done, result);
            }
            Action::Flush { covers, done } => {
                let result = self.finish_flush(&mut state, covers, fault);
                drop(state);
                answer(done, result);
            }
            Action::Discard { offset, bytes, done } => {
                let result = match fault {
                    Some(Fault::Error(errno)) => Err(self.error("discard", offset, bytes, errno)),
                    _ => {
                        // A device is free to do nothing; it does so every second time.
                        if state.plans.random().is_multiple_of(2) {
                            state.media.discard(offset, bytes);
                        }
                        Ok(())
                    }
                };
                drop(state);
                answer(done, result);
            }
        }
    }

    fn finish_read(&self, state: &mut State, offset: u64, into: &mut [u8], fault: Option<Fault>) -> io::Result<()> {
        let bytes = into.len() as u64;
        let from = match fault {
            Some(Fault::Error(errno) | Fault::ErrorAfter(errno)) => {
                return Err(self.error("read", offset, bytes, errno));
            }
            Some(Fault::Misdirect(other)) => other.min(self.geometry.bytes - bytes),
            _ => offset,
        };
        if state.media.is_damaged(from..from + bytes) {
            return Err(self.error("read", offset, bytes, libc::EIO));
        }
        state.media.current().read(from, into);
        Ok(())
    }

    fn finish_write(&self, state: &mut State, offset: u64, data: Vec<Buf>, fault: Option<Fault>) -> io::Result<()> {
        let bytes = total(&data);
        let poisoned = state.poisoned;
        match fault {
            Some(Fault::Error(errno)) => return Err(self.error("write", offset, bytes, errno)),
            Some(Fault::Lost) => return Ok(()),
            Some(Fault::Torn { kept, errno }) => {
                let kept = kept.min(bytes) / u64::from(self.geometry.sector) * u64::from(self.geometry.sector);
                state.media.write(offset, first(data, kept));
                return Err(self.error("write", offset, bytes, errno));
            }
            Some(Fault::ErrorAfter(errno)) => {
                state.media.write(offset, data);
                return Err(self.error("write", offset, bytes, errno));
            }
            Some(Fault::Misdirect(other)) => {
                let other = other.min(self.geometry.bytes - bytes);
                state.media.write(other / u64::from(self.geometry.sector) * u64::from(self.geometry.sector), data);
                return Ok(());
            }
            Some(Fault::Stall) | None => {}
        }
        if poisoned {
            return Err(EnvError::Poisoned { what: self.name.clone() }.into_io());
        }
        state.media.write(offset, data);
        Ok(())
    }

    fn finish_flush(&self, state: &mut State, covers: u64, fault: Option<Fault>) -> io::Result<()> {
        if state.poisoned {
            return Err(EnvError::Poisoned { what: self.name.clone() }.into_io());
        }
        match fault {
            Some(Fault::Error(errno) | Fault::Torn { errno, .. }) => {
                state.poisoned = true;
                state.media.doom(covers);
                Err(self.error("flush", 0, 0, errno))
            }
            Some(Fault::ErrorAfter(errno)) => {
                state.poisoned = true;
                state.media.flush(covers);
                Err(self.error("flush", 0, 0, errno))
            }
            // A device that lies about a flush.
            Some(Fault::Lost) => Ok(()),
            _ => {
                state.media.flush(covers);
                Ok(())
            }
        }
    }

    fn error(&self, operation: &'static str, offset: u64, bytes: u64, errno: i32) -> io::Error {
        let source = io::Error::from_raw_os_error(errno);
        EnvError::Disk { operation, disk: self.name.clone(), offset, bytes, source }.into_io()
    }
}

fn answer<T>(done: oneshot::Sender<io::Result<T>>, result: io::Result<T>) {
    // Nobody waits when the future was dropped; the operation ran all the same.
    let _ = done.send(result);
}

fn total(data: &[Buf]) -> u64 {
    data.iter().map(|piece| piece.len() as u64).sum()
}

/// The first `bytes` of `data`.
fn first(data: Vec<Buf>, bytes: u64) -> Vec<Buf> {
    let mut left = usize::try_from(bytes).expect("in memory");
    let mut out = Vec::new();
    for piece in data {
        let take = piece.len().min(left);
        left -= take;
        if take > 0 {
            out.push(piece.slice(..take));
        }
    }
    out
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    fn attachment(&self) -> u64 {
        self.state().power_losses
    }

    fn read(&self, offset: u64, into: BufMut) -> IoFuture<BufMut> {
        let bytes = into.len() as u64;
        if let Err(error) = self.shared.geometry.check("read", offset, bytes, std::iter::once(&*into)) {
            return ready(Err(error));
        }
        self.start(|_, done| Action::Read { offset, into, done }, bytes)
    }

    fn write(&self, offset: u64, data: Buf) -> IoFuture<()> {
        self.write_vectored(offset, vec![data])
    }

    fn write_vectored(&self, offset: u64, data: Vec<Buf>) -> IoFuture<()> {
        let bytes = total(&data);
        if let Err(error) = self.shared.geometry.check("write", offset, bytes, data.iter().map(|piece| &**piece)) {
            return ready(Err(error));
        }
        self.start(|_, done| Action::Write { offset, data, done }, bytes)
    }

    fn flush(&self) -> IoFuture<()> {
        self.start(|state, done| Action::Flush { covers: state.media.next_change(), done }, 0)
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<()> {
        if let Err(error) = self.shared.geometry.check("discard", offset, bytes, std::iter::empty()) {
            return ready(Err(error));
        }
        self.start(|_, done| Action::Discard { offset, bytes, done }, 0)
    }
}

/// One process' handle.
struct Opened {
    disk: MemoryDisk,
    crashes: u64,
}

impl Opened {
    fn alive(&self) -> io::Result<&MemoryDisk> {
        if self.disk.state().crashes == self.crashes {
            return Ok(&self.disk);
        }
        Err(EnvError::Crashed { what: self.disk.shared.name.clone() }.into_io())
    }
}

impl Disk for Opened {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn attachment(&self) -> u64 {
        self.disk.attachment()
    }

    fn read(&self, offset: u64, into: BufMut) -> IoFuture<BufMut> {
        self.alive().map_or_else(|error| ready(Err(error)), |disk| disk.read(offset, into))
    }

    fn write(&self, offset: u64, data: Buf) -> IoFuture<()> {
        self.alive().map_or_else(|error| ready(Err(error)), |disk| disk.write(offset, data))
    }

    fn write_vectored(&self, offset: u64, data: Vec<Buf>) -> IoFuture<()> {
        self.alive().map_or_else(|error| ready(Err(error)), |disk| disk.write_vectored(offset, data))
    }

    fn flush(&self) -> IoFuture<()> {
        self.alive().map_or_else(|error| ready(Err(error)), Disk::flush)
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<()> {
        self.alive().map_or_else(|error| ready(Err(error)), |disk| disk.discard(offset, bytes))
    }
}

#[cfg(test)]
mod tests;
