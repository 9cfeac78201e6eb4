use super::*;
use crate::os::OsRuntime;
use std::collections::BTreeSet;

const SECTOR: usize = 512;

fn sector_of(byte: u8, count: usize) -> Buf {
    Buf::copied(&vec![byte; SECTOR * count])
}

fn disk() -> MemoryDisk {
    MemoryDisk::new(1 << 20, 512)
}

#[tokio::test]
async fn a_process_crash_keeps_every_completed_write() {
    let disk = disk();
    let node = disk.open();
    node.write(4096, sector_of(1, 9)).await.expect("fine");
    disk.crash_process();
    assert!(node.write(0, sector_of(2, 1)).await.is_err(), "the old handle is dead");
    assert_eq!(disk.peek(4096, 9 * SECTOR), vec![1; 9 * SECTOR]);
    assert!(disk.open().flush().await.is_ok());
}

#[tokio::test]
async fn power_loss_keeps_what_was_flushed_and_any_sectors_of_the_rest() {
    let mut patterns = BTreeSet::new();
    for seed in 0..200 {
        let disk = disk();
        disk.write(0, sector_of(1, 4)).await.expect("fine");
        disk.flush().await.expect("fine");
        disk.write(0, sector_of(2, 4)).await.expect("fine");
        disk.write(SECTOR as u64, sector_of(3, 1)).await.expect("fine");
        disk.write(1 << 19, sector_of(4, 1)).await.expect("fine");
        disk.power_off(Keep::Seed(seed));
        let left: Vec<u8> = (0..4).map(|i| disk.peek(i * SECTOR as u64, SECTOR)[0]).collect();
        assert!(left.iter().all(|byte| matches!(byte, 1..=3)), "{left:?}");
        assert!(matches!(disk.peek(1 << 19, 1)[0], 0 | 4));
        patterns.insert(left);
    }
    assert!(patterns.contains(&vec![1, 1, 1, 1]) && patterns.contains(&vec![2, 3, 2, 2]), "{patterns:?}");
    assert!(patterns.contains(&vec![2, 2, 2, 2]) && patterns.len() > 10, "torn and overtaken: {patterns:?}");
}

#[tokio::test]
async fn keep_all_and_keep_nothing_mean_that() {
    for (keep, expected) in [(Keep::All, 2), (Keep::Nothing, 1)] {
        let disk = disk();
        disk.write(0, sector_of(1, 1)).await.expect("fine");
        disk.flush().await.expect("fine");
        disk.write(0, sector_of(2, 1)).await.expect("fine");
        disk.power_off(keep);
        assert_eq!(disk.peek(0, 1)[0], expected);
        disk.power_off(Keep::Nothing);
        assert_eq!(disk.peek(0, 1)[0], expected, "what survived is stable");
    }
}

#[tokio::test]
async fn a_flush_covers_only_what_completed_before_it_began() {
    let disk = disk();
    disk.write(0, sector_of(1, 1)).await.expect("fine");
    disk.fault_nth(Operation::Flush, 1, Fault::Stall);
    let flush = disk.flush();
    disk.write(SECTOR as u64, sector_of(2, 1)).await.expect("fine");
    disk.release_stalled();
    flush.await.expect("fine");
    disk.power_off(Keep::Nothing);
    assert_eq!((disk.peek(0, 1)[0], disk.peek(SECTOR as u64, 1)[0]), (1, 0));
}

#[tokio::test]
async fn a_failed_flush_poisons_and_its_writes_are_lost_for_good() {
    let disk = disk();
    disk.write(0, sector_of(1, 1)).await.expect("fine");
    disk.fail_nth(Operation::Flush, 1, libc::EIO);
    let error = disk.flush().await.expect_err("planned");
    assert_eq!(crate::error::errno(&error), Some(libc::EIO));
    assert!(disk.flush().await.is_err() && disk.write(0, sector_of(2, 1)).await.is_err(), "poisoned");
    assert_eq!(disk.peek(0, 1)[0], 1, "it can still be read");
    disk.crash_process();
    disk.write(4096, sector_of(3, 1)).await.expect("a new process starts anew");
    disk.flush().await.expect("fine");
    disk.power_off(Keep::All);
    assert_eq!((disk.peek(0, 1)[0], disk.peek(4096, 1)[0]), (0, 3));
}

#[tokio::test]
async fn the_nth_request_fails_as_planned_and_no_other() {
    for operation in [Operation::Read, Operation::Write, Operation::Any] {
        let disk = disk();
        disk.fail_nth(operation, 2, libc::ENOSPC);
        let mut failed = Vec::new();
        for i in 0..4 {
            if disk.write(0, sector_of(i, 1)).await.is_err() {
                failed.push(("write", i));
            }
            if disk.read(0, BufMut::heap(SECTOR)).await.is_err() {
                failed.push(("read", i));
            }
        }
        let expected = match operation {
            Operation::Write => ("write", 1),
            Operation::Read => ("read", 1),
            _ => ("read", 0),
        };
        assert_eq!(failed, [expected]);
        assert_eq!(disk.counters().of(Operation::Any), 8);
    }
}

#[tokio::test]
async fn lost_torn_and_misdirected_writes_and_rot_do_what_they_say() {
    let disk = disk();
    disk.fault_nth(Operation::Write, 1, Fault::Lost);
    disk.fault_nth(Operation::Write, 2, Fault::Torn { kept: 1000, errno: libc::EIO });
    disk.fault_nth(Operation::Write, 3, Fault::Misdirect(8192));
    disk.write(0, sector_of(1, 1)).await.expect("claims so");
    assert!(disk.write(4096, sector_of(2, 2)).await.is_err());
    disk.write(512, sector_of(3, 1)).await.expect("claims so");
    assert_eq!(disk.peek(0, 1024), [0; 1024]);
    assert_eq!((disk.peek(4096 + 511, 2), disk.peek(8192, 1)), (vec![2, 0], vec![3]));
    disk.flip_bit(8192, 1);
    assert_eq!(disk.peek(8192, 1), [1]);
    disk.damage(8192..8193);
    assert!(disk.read(8192, BufMut::heap(SECTOR)).await.is_err());
    assert!(disk.read(8192 + 512, BufMut::heap(SECTOR)).await.is_ok());
    disk.write(8192, sector_of(9, 1)).await.expect("fine");
    assert_eq!(disk.read(8192, BufMut::heap(SECTOR)).await.expect("written again")[0], 9);
    disk.set_dead(Some(libc::EIO));
    assert!(disk.read(0, BufMut::heap(SECTOR)).await.is_err() && disk.flush().await.is_err());
}

#[tokio::test]
async fn a_stalled_request_waits_for_its_release_and_dies_in_a_crash() {
    let disk = disk();
    disk.fault_nth(Operation::Write, 1, Fault::Stall);
    disk.fault_nth(Operation::Write, 2, Fault::Stall);
    let mut first = disk.write(0, sector_of(1, 1));
    assert!(futures::poll!(&mut first).is_pending());
    assert_eq!(disk.peek(0, 1)[0], 0);
    disk.release_stalled();
    first.await.expect("released");
    assert_eq!(disk.peek(0, 1)[0], 1);
    let second = disk.write(0, sector_of(2, 1));
    disk.crash_process();
    assert!(second.await.is_err());
    assert_eq!(disk.in_flight(), 0);
}

#[tokio::test]
async fn with_latency_completions_overtake_each_other_and_dropped_futures_still_run() {
    let env = OsRuntime::current();
    let disk = MemoryDisk::with_latency("slow", 1 << 20, 512, &env, Duration::ZERO..Duration::from_millis(20));
    let mut order = Vec::new();
    {
        use futures::StreamExt;
        let mut running: futures::stream::FuturesUnordered<_> = (0..32u8)
            .map(|i| {
                let write = disk.write(u64::from(i) * 512, sector_of(i + 1, 1));
                async move { write.await.map(|()| i) }
            })
            .collect();
        while let Some(done) = running.next().await {
            order.push(done.expect("fine"));
        }
    }
    assert!(!order.is_sorted(), "{order:?}");
    drop(disk.write(0, sector_of(99, 1)));
    while disk.in_flight() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(disk.peek(0, 1)[0], 99);
}
