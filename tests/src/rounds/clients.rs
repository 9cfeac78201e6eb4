//! Clients of one volume that use the same few blocks and write down what they see.

use crate::linearizable::{Recorder, Writing, ZEROES};
use crate::random::Random;
use crate::{Guest, Hosts, within};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use xsan_gateway::nbd::proto::{command, command_flag};

/// Blocks that all clients use; few, so that they meet.
const BLOCKS: u64 = 12;
/// From one of them to the next: in different segments and rows after some time.
const APART: u64 = 5 << 20;
const BLOCK: u64 = 4096;
/// What is written for no other reason than to fill segments lies behind the blocks.
const FILL_FROM: u64 = 64 << 20;
const FILL_BYTES: u64 = 64 << 20;
const CLIENTS: u64 = 4;
/// A request that takes longer ends its connection; nothing is known of it then. Half of the clients soon look for the volume
/// elsewhere, the others stay with the node they have, whatever became of it.
const PATIENCE: [Duration; 2] = [Duration::from_millis(1200), Duration::from_secs(8)];
/// Flushes among a thousand requests.
const FLUSHES: u64 = 40;

/// What the clients of a round share.
#[derive(Clone)]
pub(super) struct Clients {
    dirs: Vec<PathBuf>,
    volume: String,
    pub(super) recorder: Recorder,
    values: Arc<AtomicU64>,
    /// Flushes and forced writes among a thousand requests, each.
    flushes: u64,
    stop: Arc<AtomicBool>,
    /// Milliseconds since the round began at which somebody was answered last, and the longest pause.
    answered: Arc<AtomicU64>,
    stalled: Arc<AtomicU64>,
    began: Instant,
}

impl Clients {
    /// Of a new volume, at all nodes.
    pub(super) fn new(hosts: &Hosts, volume: &str) -> Self {
        Self {
            dirs: (1..=hosts.count()).map(|node| hosts.dir(node)).collect(),
            volume: volume.to_owned(),
            recorder: Recorder::new(),
            values: Arc::default(),
            flushes: FLUSHES,
            stop: Arc::default(),
            answered: Arc::default(),
            stalled: Arc::default(),
            began: Instant::now(),
        }
    }

    /// The same, with so many flushes among a thousand requests.
    pub(super) fn flushing(self, flushes: u64) -> Self {
        Self { flushes, ..self }
    }

    /// Others, who know of the volume what these blocks hold, and go on with other values.
    pub(super) fn after(&self, found: &BTreeMap<u64, u64>) -> Self {
        let recorder = Recorder::new();
        for (&block, &value) in found {
            recorder.finish_write(recorder.start_write(0, block, value));
        }
        let clean =
            Self { recorder, stop: Arc::default(), answered: Arc::default(), stalled: Arc::default(), ..self.clone() };
        Self { began: Instant::now(), ..clean }
    }

    /// Starts them.
    pub(super) fn start(&self, random: &mut Random) -> Vec<JoinHandle<()>> {
        (1..=CLIENTS).map(|client| tokio::spawn(self.clone().run(client, random.fork()))).collect()
    }

    /// Ends them.
    pub(super) async fn end(&self, running: Vec<JoinHandle<()>>) {
        self.stop.store(true, Ordering::Relaxed);
        for client in running {
            within(super::HEALED_SECONDS, "a client ends", client).await.expect("no panic of a client");
        }
    }

    /// The longest time without an answer to any of them.
    pub(super) fn longest_stall(&self) -> Duration {
        Duration::from_millis(self.stalled.load(Ordering::Relaxed))
    }

    fn answered(&self) {
        let now = self.began.elapsed().as_millis() as u64;
        let before = self.answered.swap(now, Ordering::Relaxed);
        self.stalled.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
    }

    /// Connects wherever the volume is served, uses it until the connection breaks, and begins again.
    async fn run(self, client: u64, mut random: Random) {
        while !self.stop.load(Ordering::Relaxed) {
            let dir = &self.dirs[random.below(self.dirs.len() as u64) as usize];
            match tokio::time::timeout(patience(client), crate::cluster::connect(dir, &self.volume)).await {
                Ok(Ok(mut guest)) => while self.one(client, &mut guest, &mut random).await.is_some() {},
                // tidy-allow(sleep): the pause between two attempts of a client
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// One request; `None`: the connection is of no use any more, or the round is over.
    async fn one(&self, client: u64, guest: &mut Guest, random: &mut Random) -> Option<()> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let block = random.below(BLOCKS);
        let (flush, forced) = (self.flushes, 2 * self.flushes);
        let done = match random.below(1000) {
            dice if dice < flush => self.flush(client, guest).await,
            dice if dice < forced => self.write(client, guest, block, command_flag::FUA).await,
            dice if dice < 450 => self.read(client, guest, block).await,
            dice if dice < 890 => self.write(client, guest, block, 0).await,
            dice if dice < 940 => self.zero(client, guest, block).await,
            _ => fill(client, guest, random).await,
        };
        self.answered();
        done.then_some(())
    }

    async fn read(&self, client: u64, guest: &mut Guest, block: u64) -> bool {
        let reading = self.recorder.start_read(client, block);
        match tokio::time::timeout(patience(client), guest.read(block * APART, BLOCK)).await {
            Ok(Ok(bytes)) => {
                self.recorder.finish_read(reading, value_of(&bytes));
                true
            }
            _ => false,
        }
    }

    async fn flush(&self, client: u64, guest: &mut Guest) -> bool {
        let flushing = self.recorder.start_flush();
        let done = matches!(tokio::time::timeout(patience(client), guest.flush()).await, Ok(Ok(())));
        if done {
            self.recorder.finish_flush(flushing);
        }
        done
    }

    async fn write(&self, client: u64, guest: &mut Guest, block: u64, flags: u16) -> bool {
        let value = 1 + self.values.fetch_add(1, Ordering::Relaxed);
        let bytes = value.to_le_bytes().repeat(BLOCK as usize / 8);
        let writing = self.recorder.start_write(client, block, value);
        let done = tokio::time::timeout(patience(client), guest.write(block * APART, &bytes, flags)).await;
        self.ended(writing, matches!(done, Ok(Ok(()))), flags == command_flag::FUA)
    }

    async fn zero(&self, client: u64, guest: &mut Guest, block: u64) -> bool {
        let writing = self.recorder.start_write(client, block, ZEROES);
        let done = tokio::time::timeout(patience(client), guest.command(command::TRIM, block * APART, BLOCK, 0)).await;
        self.ended(writing, matches!(done, Ok(Ok(()))), false)
    }

    fn ended(&self, writing: Writing, done: bool, forced: bool) -> bool {
        match (done, forced) {
            (true, true) => self.recorder.finish_forced_write(writing),
            (true, false) => self.recorder.finish_write(writing),
            (false, _) => {}
        }
        done
    }

    /// Reads every block at a node of a healed cluster, as one more client.
    pub(super) async fn read_all(&self, hosts: &Hosts, node: usize) {
        hosts.ok(node, &["volume", "attach", &self.volume]);
        let mut guest = self.guest(hosts, node).await;
        for block in 0..BLOCKS {
            let done = self.read(CLIENTS + 1, &mut guest, block).await;
            assert!(done, "a healed cluster answers a read of block {block}");
        }
    }

    /// What every block holds, told to nobody.
    pub(super) async fn look(&self, hosts: &Hosts, node: usize) -> BTreeMap<u64, u64> {
        let mut guest = self.guest(hosts, node).await;
        let mut found = BTreeMap::new();
        for block in 0..BLOCKS {
            let read = within(super::HEALED_SECONDS, "a read is answered", guest.read(block * APART, BLOCK)).await;
            found.insert(block, value_of(&read.expect("a healed cluster answers a read")));
        }
        found
    }

    async fn guest(&self, hosts: &Hosts, node: usize) -> Guest {
        let connected = async {
            loop {
                match hosts.connect(node, &self.volume).await {
                    Ok(guest) => return guest,
                    Err(_) => super::pause(50).await,
                }
            }
        };
        within(super::HEALED_SECONDS, "the volume is served", connected).await
    }
}

fn patience(client: u64) -> Duration {
    PATIENCE[client as usize % PATIENCE.len()]
}

/// Nobody looks at it again: it fills segments, so that some are sealed, by rows or not.
async fn fill(client: u64, guest: &mut Guest, random: &mut Random) -> bool {
    let bytes = random.between(1, 512) * BLOCK;
    let offset = FILL_FROM + random.below((FILL_BYTES - bytes) / BLOCK) * BLOCK;
    let payload = vec![0x5a; bytes as usize];
    matches!(tokio::time::timeout(patience(client), guest.write(offset, &payload, 0)).await, Ok(Ok(())))
}

/// The number that a block repeats; one that nobody writes if it does not.
fn value_of(bytes: &[u8]) -> u64 {
    let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let first = words.next().unwrap_or(u64::MAX);
    if words.all(|word| word == first) { first } else { u64::MAX }
}
