//! SIGKILL at any moment (R7: hosts keep running, so every acknowledged write is there, not only the flushed ones).

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_tests::load::{Shared, Writer, read_all_back};
use xsan_tests::{Cluster, Ledger, Random, rounds};

/// Bytes of the volume that are written again and again.
const VOLUME_BYTES: u64 = 64 << 20;
/// Bytes of one round: keeps the devices from filling up, since nothing moves live blocks out of old segments yet.
const ROUND_BYTES: u64 = 96 << 20;
/// Rounds on one volume, then it is deleted and a new one made.
const ROUNDS_PER_VOLUME: u64 = 8;
/// Writers at the same time.
const WRITERS: usize = 4;

/// Writers on their way.
struct Load(Vec<tokio::task::JoinHandle<(xsan_tests::load::Done, bool)>>);

fn start_load(cluster: &Cluster, volume: &str, ledger: &Shared, random: &mut Random) -> Load {
    let budget = Arc::new(AtomicU64::new(ROUND_BYTES));
    let writer = |_| {
        let writer = Writer {
            dir: cluster.dir(),
            volume: volume.to_owned(),
            ledger: Arc::clone(ledger),
            random: random.fork(),
            budget: Arc::clone(&budget),
        };
        tokio::spawn(async move {
            let (done, result) = writer.run().await;
            (done, result.is_err())
        })
    };
    Load((0..WRITERS).map(writer).collect())
}

impl Load {
    /// Waits for the end of all; returns writes and flushes done.
    async fn end(self) -> (u64, u64) {
        let mut sums = (0, 0);
        for writer in self.0 {
            let (done, _) = xsan_tests::within(60, "writers end with their process", writer).await.expect("no panic");
            sums = (sums.0 + done.writes, sums.1 + done.flushes);
        }
        sums
    }
}

/// Kills the process while it starts, and while it takes the volume over.
async fn kill_during_recovery(cluster: &mut Cluster, volume: &str, random: &mut Random) {
    for _ in 0..random.between(1, 3) {
        if random.chance(50) {
            cluster.spawn();
            tokio::time::sleep(Duration::from_millis(random.below(250))).await;
        } else {
            cluster.start();
            let dir = cluster.dir();
            let name = volume.to_owned();
            let taking = tokio::spawn(async move { xsan_tests::cluster::connect(&dir, &name).await.map(drop) });
            tokio::time::sleep(Duration::from_millis(random.below(100))).await;
            cluster.kill();
            let _ = xsan_tests::within(20, "a connection ends with its process", taking).await;
            continue;
        }
        cluster.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushed_writes_survive_sigkill() {
    let mut random = Random::of_test();
    let mut cluster = Cluster::started();
    let mut slowest = Duration::ZERO;
    let (mut writes, mut flushes) = (0, 0);
    let mut state: Option<(String, Shared)> = None;
    for round in 0..rounds(10) {
        if round.is_multiple_of(ROUNDS_PER_VOLUME) {
            if let Some((old, _)) = state.take() {
                cluster.ok(&["volume", "delete", &old, "--yes", "--force"]);
            }
            let name = format!("vm{round}");
            cluster.create_volume(&name, "64MiB");
            state = Some((name, Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)))));
        }
        let (volume, ledger) = state.clone().expect("a volume");
        let load = start_load(&cluster, &volume, &ledger, &mut random);
        tokio::time::sleep(Duration::from_millis(random.between(20, 700))).await;
        cluster.kill();
        let (more_writes, more_flushes) = load.end().await;
        (writes, flushes) = (writes + more_writes, flushes + more_flushes);
        if random.chance(40) {
            kill_during_recovery(&mut cluster, &volume, &mut random).await;
        }
        slowest = slowest.max(cluster.start());
        let mut guest = cluster.guest(&volume).await;
        read_all_back(&mut guest, &ledger, &format!("round {round}")).await;
    }
    println!("{writes} writes and {flushes} flushes acknowledged; slowest start {slowest:?}");
    assert!(writes > 100 && flushes > 5, "the load was none: {writes} writes, {flushes} flushes");
    cluster.wait_until_whole(30);
}

/// As above, with a node lost under load before the process goes: what was acknowledged with fewer journal members counts too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_sigkill_with_lost_nodes() {
    let mut random = Random::of_test();
    let mut cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)));
    for round in 0..rounds(10).div_ceil(3) {
        let load = start_load(&cluster, "vm1", &ledger, &mut random);
        tokio::time::sleep(Duration::from_millis(random.between(50, 300))).await;
        let first = random.between(1, 6);
        let second = (first + random.below(5)) % 6 + 1;
        let lost = [format!("n{first}"), format!("n{second}")];
        cluster.ok(&["node", "stop", &lost[0], "--crash"]);
        tokio::time::sleep(Duration::from_millis(random.between(0, 200))).await;
        cluster.ok(&["node", "stop", &lost[1]]);
        tokio::time::sleep(Duration::from_millis(random.between(0, 300))).await;
        cluster.kill();
        load.end().await;
        cluster.start();
        let mut guest = cluster.guest("vm1").await;
        read_all_back(&mut guest, &ledger, &format!("round {round} without {lost:?}")).await;
        for node in &lost {
            cluster.ok(&["node", "start", node]);
        }
        cluster.wait_until_whole(60);
        read_all_back(&mut guest, &ledger, &format!("round {round} with {lost:?} back")).await;
    }
}

/// A clean end hands volumes over; the next start finds everything, and so does one after a kill right behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_an_orderly_end() {
    let mut random = Random::of_test();
    let mut cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)));
    for round in 0..3 {
        xsan_tests::load::write_some(cluster.dir(), "vm1", &ledger, &mut random, 3, 24 << 20).await;
        cluster.stop();
        if round == 1 {
            kill_during_recovery(&mut cluster, "vm1", &mut random).await;
        }
        cluster.start();
        let mut guest = cluster.guest("vm1").await;
        read_all_back(&mut guest, &ledger, &format!("round {round}")).await;
    }
}
