//! Random load on a volume, entered in a ledger.

use crate::cluster::{Guest, connect};
use crate::ledger::{Ledger, SECTOR, Ticket, content};
use crate::random::Random;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use xsan_gateway::client::{ClientError, Request};
use xsan_gateway::nbd::proto::{command, command_flag};

/// The volume's ledger, shared by its writers.
pub type Shared = Arc<Mutex<Ledger>>;

/// Requests of a connection under way at the same time.
const DEPTH: usize = 8;
/// Largest write.
const WRITE_BYTES_MAX: u64 = 256 << 10;
/// Bytes of one read when all is read back.
const READ_BYTES: u64 = 1 << 20;

/// What one writer did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Writes, zeroes and trims acknowledged.
    pub writes: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Sectors-wide checks of what was read in between.
    pub reads: u64,
}

enum Pending {
    Write(Ticket),
    Flush(u64),
}

/// One connection that writes at random.
pub struct Writer {
    /// The cluster's directory.
    pub dir: PathBuf,
    /// The volume.
    pub volume: String,
    /// What is written is entered here.
    pub ledger: Shared,
    /// Its own.
    pub random: Random,
    /// Bytes all writers may still write; they end when it is used up.
    pub budget: Arc<AtomicU64>,
}

impl Writer {
    /// Writes, zeroes, trims, flushes and reads until the budget is used up (`Ok`) or the connection breaks.
    ///
    /// # Errors
    /// How the connection broke; what was acknowledged is in the ledger.
    ///
    /// # Panics
    /// A read returned what it must not, or a request failed.
    pub async fn run(mut self) -> (Done, Result<(), ClientError>) {
        let mut done = Done::default();
        let result = self.try_run(&mut done).await;
        (done, result)
    }

    async fn try_run(&mut self, done: &mut Done) -> Result<(), ClientError> {
        let mut guest = connect(&self.dir, &self.volume).await?;
        let mut pending = BTreeMap::new();
        while self.budget.load(Ordering::Relaxed) > 0 {
            if self.random.chance(2) {
                while !pending.is_empty() {
                    self.complete(&mut guest, &mut pending, done).await?;
                }
                self.read(&mut guest, done).await?;
            }
            self.send(&mut guest, &mut pending).await?;
            let wanted = self.random.below(DEPTH as u64) as usize;
            while pending.len() > wanted.max(1) {
                self.complete(&mut guest, &mut pending, done).await?;
            }
        }
        while !pending.is_empty() {
            self.complete(&mut guest, &mut pending, done).await?;
        }
        Ok(())
    }

    /// A place for a request: small ones most often, aligned to sectors or blocks.
    fn place(&mut self, align: u64) -> (u64, u64) {
        let bytes = self.ledger.lock().expect("ledger").bytes();
        let max = match self.random.below(10) {
            0..4 => 4096,
            4..7 => 16 << 10,
            7..9 => 64 << 10,
            _ => WRITE_BYTES_MAX,
        };
        let length = self.random.between(1, max / align) * align;
        let offset = self.random.below((bytes - length) / align + 1) * align;
        (offset, length)
    }

    async fn send(&mut self, guest: &mut Guest, pending: &mut BTreeMap<u64, Pending>) -> Result<(), ClientError> {
        let kind = self.random.below(100);
        if kind < 6 {
            let begun = self.ledger.lock().expect("ledger").flushing();
            let cookie = guest.send(Request { command: command::FLUSH, ..Request::default() }).await?;
            pending.insert(cookie, Pending::Flush(begun));
            return Ok(());
        }
        let zeroes = kind < 12;
        let trim = kind < 9;
        let align = if trim || self.random.chance(60) { 4096 } else { SECTOR };
        let (offset, length) = self.place(align);
        let used = self.budget.load(Ordering::Relaxed).min(length);
        self.budget.fetch_sub(used, Ordering::Relaxed);
        let ticket = self.ledger.lock().expect("ledger").begin(offset, length, zeroes);
        let cookie = if zeroes {
            let command = if trim { command::TRIM } else { command::WRITE_ZEROES };
            guest.send(Request { command, offset, length, ..Request::default() }).await?
        } else {
            let flags = if self.random.chance(5) { command_flag::FUA } else { 0 };
            let payload = content(offset, length, ticket.stamp);
            guest.send(guest.write_request(offset, &payload, flags)).await?
        };
        pending.insert(cookie, Pending::Write(ticket));
        Ok(())
    }

    async fn complete(
        &self,
        guest: &mut Guest,
        pending: &mut BTreeMap<u64, Pending>,
        done: &mut Done,
    ) -> Result<(), ClientError> {
        let (cookie, reply) = guest.wait_any().await?;
        if let Some((errno, message)) = reply.error {
            // A server that is told to end answers so; nothing was acknowledged.
            return Err(ClientError::Failed { errno, message });
        }
        let mut ledger = self.ledger.lock().expect("ledger");
        match pending.remove(&cookie).expect("an answer to a request") {
            Pending::Write(ticket) => {
                ledger.acknowledge(ticket);
                done.writes += 1;
            }
            Pending::Flush(begun) => {
                ledger.flushed(begun);
                done.flushes += 1;
            }
        }
        Ok(())
    }

    /// Reads somewhere and checks, if nobody wrote there before and after.
    async fn read(&mut self, guest: &mut Guest, done: &mut Done) -> Result<(), ClientError> {
        let (offset, length) = self.place(SECTOR);
        let before = self.ledger.lock().expect("ledger").version(offset, length);
        let bytes = guest.read(offset, length).await?;
        let mut ledger = self.ledger.lock().expect("ledger");
        if before.is_some() && before == ledger.version(offset, length) {
            if let Err(wrong) = ledger.check(offset, &bytes) {
                panic!("a read under load returned wrong bytes: {wrong:?}");
            }
            done.reads += 1;
        }
        Ok(())
    }
}

/// Reads the whole ledger's range and checks it.
///
/// # Panics
/// A sector is wrong, or a read failed.
pub async fn read_all_back(guest: &mut Guest, ledger: &Shared, when: &str) {
    let total = ledger.lock().expect("ledger").bytes();
    let mut offset = 0;
    while offset < total {
        let length = READ_BYTES.min(total - offset);
        let read = crate::within(60, "a read of 1 MiB", guest.read(offset, length)).await;
        let bytes = read.unwrap_or_else(|error| panic!("{when}: read at {offset} failed: {error}"));
        if let Err(wrong) = ledger.lock().expect("ledger").check(offset, &bytes) {
            panic!("{when}: {wrong:?}");
        }
        offset += length;
    }
}

/// Writes until `bytes` are written with so many connections; nothing may fail.
///
/// # Panics
/// Something failed.
pub async fn write_some(dir: PathBuf, volume: &str, ledger: &Shared, random: &mut Random, writers: usize, bytes: u64) {
    let budget = Arc::new(AtomicU64::new(bytes));
    let mut running = Vec::new();
    for _ in 0..writers {
        let writer = Writer {
            dir: dir.clone(),
            volume: volume.to_owned(),
            ledger: Arc::clone(ledger),
            random: random.fork(),
            budget: Arc::clone(&budget),
        };
        running.push(tokio::spawn(writer.run()));
    }
    for writer in running {
        let (_, result) = crate::within(120, "the writers", writer).await.expect("no panic of a writer");
        if let Err(error) = result {
            panic!("a request failed: {error}");
        }
    }
}
