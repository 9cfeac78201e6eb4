//! One suite for every [`Disk`], and what only disks of the operating system promise.

use super::*;
use crate::error::errno;
use crate::memory::{MemoryDisk, mix};
use crate::os::OsRuntime;
use crate::testing::TempDir;
use futures::future::join_all;
use std::path::{Path, PathBuf};

const BYTES: u64 = 64 << 20;

/// A disk under test, and what keeps it alive.
struct Subject {
    name: String,
    disk: Arc<dyn Disk>,
    pool: BufPool,
    _temp: Option<TempDir>,
}

fn parents() -> Vec<PathBuf> {
    let memory = Path::new("/dev/shm");
    let mut parents = vec![std::env::temp_dir()];
    parents.extend(memory.is_dir().then(|| memory.to_owned()));
    parents
}

/// Every kind of disk: memory, and both backends on a real file system and in /dev/shm, with and without an arena.
async fn subjects() -> Vec<Subject> {
    let env = OsRuntime::current();
    let pool = BufPool::new(16 << 20, 1 << 20);
    let memory = MemoryDisk::new(BYTES, 512);
    let mut subjects = vec![Subject { name: "memory".into(), disk: memory.open(), pool: pool.clone(), _temp: None }];
    for backend in [Backend::Uring, Backend::Threads] {
        for (parent, pool) in parents().into_iter().zip([pool.clone(), BufPool::new(0, 0)]) {
            let driver = IoDriver::start(&env, &pool, backend).expect("the machine has it");
            let temp = TempDir::within(&parent, "disk");
            let options = DiskOptions::create(temp.path().join("disk"), BYTES);
            let disk = driver.open_disk(options).await.expect("made");
            let name = format!("{} in {}", driver.backend(), parent.display());
            subjects.push(Subject { name, disk, pool, _temp: Some(temp) });
        }
    }
    subjects
}

fn pattern(pool: &BufPool, seed: u64, bytes: usize) -> Buf {
    let mut buf = pool.get(bytes);
    let mut word = seed;
    for chunk in buf.as_chunks_mut::<8>().0 {
        word = mix(word);
        *chunk = word.to_le_bytes();
    }
    buf.freeze()
}

#[tokio::test]
async fn what_was_written_is_read_also_in_pieces_and_holes_are_zero() {
    for Subject { name, disk, pool, .. } in subjects().await {
        assert_eq!(disk.geometry().bytes, BYTES, "{name}");
        let sector = disk.geometry().sector as usize;
        for (i, bytes) in [sector, 4096, 12288, 1 << 20, 3 << 20].into_iter().enumerate() {
            let offset = (i as u64) * (8 << 20);
            let data = pattern(&pool, i as u64, bytes);
            disk.write(offset, data.clone()).await.expect(&name);
            let back = disk.read(offset, pool.get(bytes)).await.expect(&name);
            assert!(back[..] == data[..], "{name}: {bytes} bytes");
            let part = disk.read(offset + (bytes - sector) as u64, pool.get(sector)).await.expect(&name);
            assert!(part[..] == data[bytes - sector..], "{name}");
        }
        let hole = disk.read(BYTES - (1 << 20), pool.get(1 << 20)).await.expect(&name);
        assert!(hole.iter().all(|&byte| byte == 0), "{name}");
        disk.flush().await.expect(&name);
    }
}

#[tokio::test]
async fn a_vectored_write_is_the_concatenation_of_its_pieces() {
    for Subject { name, disk, pool, .. } in subjects().await {
        let sector = disk.geometry().sector as usize;
        // More than the kernel takes at once, from memory of the pool and of the heap, with a slice among them.
        let mut pieces: Vec<Buf> = (0..1500).map(|i| pattern(&pool, i, sector)).collect();
        pieces.insert(700, BufMut::heap(4096).freeze());
        pieces.push(pattern(&pool, 9, 65536).slice(4096..8192));
        let expected: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        disk.write_vectored(4096, pieces).await.expect(&name);
        let back = disk.read(4096, pool.get(expected.len())).await.expect(&name);
        assert!(back[..] == expected[..], "{name}");
        disk.write_vectored(0, vec![pattern(&pool, 77, 4096)]).await.expect(&name);
        let few: Vec<Buf> = (0..3).map(|i| pattern(&pool, i, 4096)).collect();
        disk.write_vectored(4 << 20, few.clone()).await.expect(&name);
        let back = disk.read(4 << 20, pool.get(3 * 4096)).await.expect(&name);
        assert!(few.iter().enumerate().all(|(i, piece)| back[i * 4096..(i + 1) * 4096] == piece[..]), "{name}");
    }
}

#[tokio::test]
async fn unaligned_empty_and_outside_requests_are_refused_without_effect() {
    for Subject { name, disk, pool, .. } in subjects().await {
        let sector = u64::from(disk.geometry().sector);
        let good = pattern(&pool, 1, 8192);
        let unaligned_memory = good.slice(8..8 + 4096);
        let refused = [
            disk.write(1, good.clone()).await,
            disk.write(sector / 2, good.clone()).await,
            disk.write(0, good.slice(..100)).await,
            disk.write(0, unaligned_memory.clone()).await,
            disk.write_vectored(0, vec![good.clone(), unaligned_memory]).await,
            disk.write_vectored(0, Vec::new()).await,
            disk.write(0, Buf::new()).await,
            disk.write(BYTES, good.clone()).await,
            disk.write(BYTES - 4096, good.clone()).await,
            disk.write(u64::MAX / 4096 * 4096, good.clone()).await,
            disk.discard(1, 4096).await,
            disk.discard(BYTES, 4096).await,
            disk.read(1, pool.get(4096)).await.map(drop),
            disk.read(0, pool.get(100)).await.map(drop),
            disk.read(0, pool.get(0)).await.map(drop),
            disk.read(BYTES - 4096, pool.get(8192)).await.map(drop),
        ];
        for (i, result) in refused.into_iter().enumerate() {
            let error = result.expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}, request {i}: {error}");
        }
        let back = disk.read(BYTES - 8192, pool.get(8192)).await.expect(&name);
        assert!(back.iter().all(|&byte| byte == 0), "{name}");
    }
}

#[tokio::test]
async fn a_write_whose_future_is_dropped_still_happens() {
    for Subject { name, disk, pool, .. } in subjects().await {
        for i in 0..64 {
            drop(disk.write(i * 8192, pattern(&pool, i, 4096)));
            drop(disk.read(i * 8192, pool.get(4096)));
            let gather = vec![pattern(&pool, i + 100, 4096)];
            drop(disk.write_vectored(i * 8192 + 4096, gather));
        }
        // Memory of dropped requests must not come back while the kernel works on it: overwrite what the pool gives.
        let mut noise: Vec<BufMut> = (0..256).map(|_| pool.get(4096)).collect();
        noise.iter_mut().for_each(|buf| buf.fill(0xEE));
        for i in 0..64 {
            for (at, seed) in [(i * 8192, i), (i * 8192 + 4096, i + 100)] {
                let expected = pattern(&pool, seed, 4096);
                let mut tries = 0;
                while disk.read(at, pool.get(4096)).await.expect(&name)[..] != expected[..] {
                    tries += 1;
                    assert!(tries < 10_000, "{name}: the write at {at} is lost or wrong");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_fit_into_the_kernel_all_complete() {
    for Subject { name, disk, pool, .. } in subjects().await {
        let tasks: Vec<_> = (0..8)
            .map(|task: u64| {
                let (disk, pool) = (Arc::clone(&disk), pool.clone());
                tokio::spawn(async move {
                    let all =
                        (0..400).map(|i| disk.write((task * 400 + i) * 4096, pattern(&pool, task * 400 + i, 4096)));
                    join_all(all).await.into_iter().collect::<io::Result<Vec<()>>>()
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("ran").expect(&name);
        }
        disk.flush().await.expect(&name);
        let reads = join_all((0..3200).map(|i| disk.read(i * 4096, pool.get(4096)))).await;
        for (i, back) in reads.into_iter().enumerate() {
            assert!(back.expect(&name)[..] == pattern(&pool, i as u64, 4096)[..], "{name}: block {i}");
        }
    }
}

#[tokio::test]
async fn a_discard_leaves_its_neighbours_alone() {
    for Subject { name, disk, pool, .. } in subjects().await {
        let data = pattern(&pool, 5, 3 << 20);
        disk.write(0, data.clone()).await.expect(&name);
        disk.discard(1 << 20, 1 << 20).await.expect(&name);
        let back = disk.read(0, pool.get(3 << 20)).await.expect(&name);
        assert!(back[..1 << 20] == data[..1 << 20] && back[2 << 20..] == data[2 << 20..], "{name}");
        disk.write(1 << 20, data.slice(..4096)).await.expect(&name);
        let back = disk.read(1 << 20, pool.get(4096)).await.expect(&name);
        assert!(back[..] == data[..4096], "{name}");
    }
}

#[tokio::test]
async fn a_disk_keeps_its_bytes_and_belongs_to_one_handle_at_a_time() {
    let env = OsRuntime::current();
    let pool = BufPool::new(16 << 20, 1 << 20);
    for parent in parents() {
        let temp = TempDir::within(&parent, "disk");
        let path = temp.path().join("disk");
        // Written by one backend, read by the other.
        for (round, backend) in [Backend::Uring, Backend::Threads, Backend::Uring].into_iter().enumerate() {
            let driver = IoDriver::start(&env, &pool, backend).expect("the machine has it");
            let missing = driver.open_disk(DiskOptions::existing(temp.path().join("none"))).await.err();
            assert_eq!(missing.expect("refused").kind(), io::ErrorKind::NotFound);
            let disk = driver.open_disk(DiskOptions::create(&path, BYTES)).await.expect("opened");
            for i in 0..8 {
                let back = disk.read(i * 4096, pool.get(4096)).await.expect("read");
                let expected = if round == 0 { Buf::copied(&[0; 4096]) } else { pattern(&pool, i, 4096) };
                assert!(back[..] == expected[..], "round {round}");
                disk.write(i * 4096, pattern(&pool, i, 4096)).await.expect("written");
            }
            disk.flush().await.expect("flushed");
            if round == 0 {
                let error = driver.open_disk(DiskOptions::existing(&path)).await.err().expect("in use");
                assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
                assert!(error.to_string().contains("disk"), "{error}");
            }
            // Dropped with requests on their way: the next open waits for them.
            drop(disk.write(BYTES - (1 << 20), pattern(&pool, 9, 1 << 20)));
            drop(disk);
            let again = driver.open_disk(DiskOptions::existing(&path)).await.expect("free again");
            let back = again.read(BYTES - (1 << 20), pool.get(1 << 20)).await.expect("read");
            assert!(back[..] == pattern(&pool, 9, 1 << 20)[..]);
        }
    }
}

#[tokio::test]
async fn more_disks_than_registered_slots_work_and_slots_are_used_again() {
    let env = OsRuntime::current();
    let pool = BufPool::new(16 << 20, 1 << 20);
    let driver = IoDriver::start(&env, &pool, Backend::Uring).expect("the machine has it");
    let temp = TempDir::new("disk");
    for _ in 0..2 {
        let mut disks = Vec::new();
        for i in 0..300 {
            let options = DiskOptions::create(temp.path().join(format!("disk-{i}")), 1 << 20);
            disks.push(driver.open_disk(options).await.expect("opened"));
        }
        let writes = disks.iter().enumerate().map(|(i, disk)| disk.write(4096, pattern(&pool, i as u64, 4096)));
        assert!(join_all(writes).await.into_iter().all(|result| result.is_ok()));
        for (i, disk) in disks.iter().enumerate() {
            let back = disk.read(4096, pool.get(4096)).await.expect("read");
            assert!(back[..] == pattern(&pool, i as u64, 4096)[..], "disk {i}");
        }
    }
}

#[test]
fn a_runtime_that_ends_with_requests_in_flight_takes_nothing_with_it() {
    let temp = TempDir::new("disk");
    let pool = BufPool::new(16 << 20, 1 << 20);
    for backend in [Backend::Uring, Backend::Threads] {
        let runtime = crate::os::build_runtime(2).expect("threads");
        let path = temp.path().join(format!("{backend:?}"));
        let disk = runtime.block_on(async {
            let driver = IoDriver::start(&OsRuntime::current(), &pool, backend).expect("the machine has it");
            driver.open_disk(DiskOptions::create(&path, BYTES)).await.expect("opened")
        });
        let started: Vec<_> = (0..200).map(|i| disk.write(i * 65536, pattern(&pool, i, 65536))).collect();
        drop(runtime);
        drop(started);
        // The driver of the ring is gone with its runtime; a thread pool is not.
        let other = crate::os::build_runtime(1).expect("threads");
        let late = other.block_on(disk.write(0, pattern(&pool, 1, 4096)));
        assert_eq!(late.is_err(), backend == Backend::Uring);
    }
}

async fn some_file() -> (TempDir, Arc<DiskFile>, BufPool) {
    let temp = TempDir::new("disk");
    let options = DiskOptions::create(temp.path().join("disk"), BYTES);
    let file = DiskFile::open(&OsRuntime::current(), options).await.expect("made");
    (temp, Arc::new(file), BufPool::new(0, 1 << 20))
}

#[tokio::test]
async fn a_failed_flush_poisons_the_disk_for_writes_and_flushes_only() {
    let (_temp, file, pool) = some_file().await;
    let engine = Engine::Threads(Threads::start().expect("threads"));
    let disk = OsDisk { file: Arc::clone(&file), engine };
    let (failing, concurrent) = (Request::new(&file, 0, 0, Body::Flush), Request::new(&file, 0, 0, Body::Flush));
    // SAFETY: no engine has these requests.
    unsafe {
        assert!(failing.advance(-libc::EIO) == Next::Over);
        failing.finish();
        assert!(concurrent.advance(0) == Next::Over);
        concurrent.finish();
    }
    let error = DoneFuture(failing).await.expect_err("the kernel said so");
    assert_eq!(errno(&error), Some(libc::EIO));
    assert!(error.to_string().contains("flush") && error.to_string().contains("disk"), "{error}");
    assert!(DoneFuture(concurrent).await.is_err(), "it may have lost what the other one lost");
    assert!(disk.flush().await.is_err());
    assert!(disk.write(0, pattern(&pool, 1, 4096)).await.is_err());
    assert!(disk.read(0, pool.get(4096)).await.is_ok());
}

#[tokio::test]
async fn short_and_interrupted_transfers_go_on_where_they_stopped() {
    let (_temp, file, pool) = some_file().await;
    let pieces = vec![pattern(&pool, 1, 4096), pattern(&pool, 2, 8192)];
    let starts: Vec<_> = pieces.iter().map(|piece| piece.as_ptr()).collect();
    let request = Request::new(&file, 4096, 12288, Body::Gather(pieces));
    let look = || {
        // SAFETY: no engine has the request.
        let Step::Gather { iovecs, count, offset } = (unsafe { request.step() }) else { panic!("a gather") };
        // SAFETY: valid until the next advance.
        let first = unsafe { *iovecs };
        (count, offset, first.iov_base.cast_const().cast::<u8>(), first.iov_len)
    };
    assert_eq!(look(), (2, 4096, starts[0], 4096));
    // SAFETY: no engine has the request.
    unsafe {
        assert!(request.advance(-libc::EINTR) == Next::Again);
        assert!(request.advance(-libc::EAGAIN) == Next::Again);
        assert!(request.advance(4096 + 512) == Next::Again);
    }
    assert_eq!(look(), (1, 4096 + 4608, starts[1].wrapping_add(512), 8192 - 512));
    // SAFETY: as above.
    unsafe {
        assert!(request.advance(8192 - 512) == Next::Over);
        request.finish();
    }
    DoneFuture(request).await.expect("complete");

    for (answer, kind) in [(0, io::ErrorKind::UnexpectedEof), (100, io::ErrorKind::UnexpectedEof)] {
        let request = Request::new(&file, 0, 4096, Body::Read(pool.get(4096)));
        // SAFETY: as above.
        unsafe {
            assert!(request.advance(answer) == Next::Over);
            request.finish();
        }
        assert_eq!(ReadFuture(request).await.expect_err("short").kind(), kind);
    }
    let request = Request::new(&file, 8192, 4096, Body::Write(pattern(&pool, 1, 4096)));
    // SAFETY: as above.
    unsafe {
        assert!(request.advance(-libc::ENOSPC) == Next::Over);
        request.finish();
    }
    let error = DoneFuture(request).await.expect_err("full");
    assert_eq!((error.kind(), errno(&error)), (io::ErrorKind::StorageFull, Some(libc::ENOSPC)));
    assert!(error.to_string().contains("8192"), "{error}");
}

#[test]
fn the_environment_decides_only_where_nobody_else_did() {
    let cases = [
        (None, Some(Backend::Auto)),
        (Some(""), Some(Backend::Auto)),
        (Some("uring"), Some(Backend::Uring)),
        (Some("threads"), Some(Backend::Threads)),
        (Some("tape"), None),
    ];
    for (variable, expected) in cases {
        assert_eq!(forced(Backend::Auto, variable).ok(), expected);
        assert_eq!(forced(Backend::Threads, variable).ok(), Some(Backend::Threads));
    }
}
