//! CPU and latency per disk request of the backends.
//!
//! `disk_bench PATH --backend uring --op write --bytes 4096 --depth 32 --fanout 1 --seconds 3 --workers 2 --size 1g`
//! Each of `depth` tasks starts `fanout` requests at random places of as many files (`PATH.0` …), waits for all, repeats.
//! `--prepare` writes the files whole first. CPU is that of the process (getrusage), kernel workers are not in it.
#![allow(unsafe_code, missing_docs, clippy::disallowed_methods, clippy::disallowed_types)]

use futures::future::join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use xsan_env::os_disk::{Backend, DiskOptions, IoDriver};
use xsan_env::{BufPool, Disk, OsRuntime, os};

fn cpu_us() -> (u64, u64) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: valid for writes.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let us = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    (us(usage.ru_utime) + us(usage.ru_stime), (usage.ru_nvcsw + usage.ru_nivcsw) as u64)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let get = |name: &str, default: &str| {
        args.iter().position(|a| a == name).map_or(default.to_owned(), |i| args[i + 1].clone())
    };
    let number = |name: &str, default: &str| xsan_types::parse_bytes(&get(name, default)).expect("a number");
    let backend = match get("--backend", "uring").as_str() {
        "threads" => Backend::Threads,
        _ => Backend::Uring,
    };
    let write = get("--op", "write") == "write";
    let (bytes, depth, fanout) = (number("--bytes", "4096") as usize, number("--depth", "32"), number("--fanout", "1"));
    let (seconds, workers, size) = (number("--seconds", "3"), number("--workers", "2"), number("--size", "1GiB"));
    let sequential = args.iter().any(|a| a == "--sequential");
    let runtime = os::build_runtime(workers as usize).expect("runtime");
    let prepare = args.iter().any(|a| a == "--prepare");
    let done = runtime.block_on(runtime.spawn(async move {
        let env = OsRuntime::current();
        let pool = BufPool::new(64 << 20, 64 << 20);
        let driver = IoDriver::start(&env, &pool, backend).expect("driver");
        let mut disks: Vec<Arc<dyn Disk>> = Vec::new();
        for i in 0..fanout {
            let disk = driver.open_disk(DiskOptions::create(format!("{}.{i}", args[1]), size)).await.expect("opened");
            if prepare {
                let mut at = 0;
                let mut big = pool.get(1 << 20);
                big.fill(7);
                let big = big.freeze();
                while at < size {
                    let batch = (0..16).map(|j| disk.write(at + (j << 20), big.clone()));
                    join_all(batch).await.into_iter().for_each(|r| r.expect("written"));
                    at += 16 << 20;
                }
                disk.flush().await.expect("flushed");
            }
            disks.push(disk);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let next = Arc::new(AtomicU64::new(0));
        let start = Instant::now();
        let before = cpu_us();
        let tasks: Vec<_> = (0..depth)
            .map(|task| {
                let (disks, stop, pool, next) = (disks.clone(), Arc::clone(&stop), pool.clone(), Arc::clone(&next));
                tokio::spawn(async move {
                    let mut seed = task + 1;
                    let mut latencies = Vec::new();
                    let data = pool.get_zeroed(bytes).freeze();
                    while !stop.load(Ordering::Relaxed) {
                        seed = xsan_env::memory::mix(seed);
                        let slots = size / bytes as u64;
                        let place =
                            if sequential { next.fetch_add(1, Ordering::Relaxed) % slots } else { seed % slots };
                        let offset = place * bytes as u64;
                        let began = Instant::now();
                        if write {
                            let mut all = join_all(disks.iter().map(|disk| disk.write(offset, data.clone()))).await;
                            all.drain(..).for_each(|r| r.expect("written"));
                        } else {
                            let all = join_all(disks.iter().map(|disk| disk.read(offset, pool.get(bytes)))).await;
                            all.into_iter().for_each(|r| drop(r.expect("read")));
                        }
                        latencies.push(began.elapsed().as_nanos() as u64 / 1000);
                    }
                    latencies
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        stop.store(true, Ordering::Relaxed);
        let mut latencies = Vec::new();
        for task in tasks {
            latencies.extend(task.await.expect("ran"));
        }
        let (after, elapsed) = (cpu_us(), start.elapsed());
        latencies.sort_unstable();
        (latencies, after.0 - before.0, after.1 - before.1, elapsed)
    }));
    let (latencies, cpu, switches, elapsed) = done.expect("ran");
    let rounds = latencies.len() as u64;
    let ios = rounds * fanout;
    println!(
        "{ios} I/Os, {:.0}/s, {:.2} us CPU per I/O, {:.2} switches per I/O, round p50 {} us p99 {} us",
        ios as f64 / elapsed.as_secs_f64(),
        cpu as f64 / ios as f64,
        switches as f64 / ios as f64,
        latencies[latencies.len() / 2],
        latencies[latencies.len() * 99 / 100],
    );
}
