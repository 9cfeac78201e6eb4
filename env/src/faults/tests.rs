//! Power loss takes what no flush covered and nothing else; disks hang and fill up when they are told to.

use super::*;
use crate::buf::{Buf, BufMut};
use crate::disk::Disk;
use crate::file::{Directory, OsDirectory};
use crate::memory::MemoryDisk;
use crate::os::OsRuntime;
use crate::runtime::Env;
use crate::testing::TempDir;
use std::time::Duration;

const SECTOR: usize = 512;

struct Host {
    dir: TempDir,
    disk: MemoryDisk,
    env: Env,
}

impl Host {
    fn new(name: &str) -> Self {
        Self { dir: TempDir::new(name), disk: MemoryDisk::new(1 << 20, SECTOR as u32), env: OsRuntime::current() }
    }

    fn tell(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).expect("a file");
    }

    /// What a process sees that starts now.
    async fn start(&self) -> Arc<dyn Disk> {
        let faults = Faults::of(self.dir.path()).expect("a directory");
        HeldDisk::open(&self.env, &faults, self.disk.open(), Path::new("/disk")).await.expect("opened")
    }

    async fn start_after_power_loss(&self, boot: u64) -> Arc<dyn Disk> {
        self.tell("boot", &format!("{boot:x}"));
        self.start().await
    }
}

async fn write(disk: &Arc<dyn Disk>, sector: usize, value: u8, sectors: usize) -> io::Result<()> {
    disk.write((sector * SECTOR) as u64, Buf::copied(&vec![value; sectors * SECTOR])).await
}

/// The value of each of the first sectors.
async fn values(disk: &Arc<dyn Disk>, sectors: usize) -> Vec<u8> {
    let bytes = disk.read(0, BufMut::heap(sectors * SECTOR)).await.expect("a read");
    let sectors = bytes.chunks(SECTOR);
    sectors.map(|sector| if sector.iter().all(|byte| *byte == sector[0]) { sector[0] } else { 255 }).collect()
}

#[tokio::test]
async fn power_loss_takes_what_was_not_flushed_and_a_killed_process_loses_nothing() {
    let host = Host::new("power");
    host.tell("keep", "nothing");
    let disk = host.start_after_power_loss(1).await;
    write(&disk, 0, 1, 4).await.expect("written");
    disk.flush().await.expect("flushed");
    write(&disk, 1, 2, 1).await.expect("written");
    write(&disk, 1, 3, 2).await.expect("written");
    let disk = host.start().await;
    assert_eq!(values(&disk, 5).await, [1, 3, 3, 1, 0], "the process alone was killed");
    write(&disk, 3, 4, 2).await.expect("written");
    let disk = host.start_after_power_loss(2).await;
    assert_eq!(values(&disk, 5).await, [1, 1, 1, 1, 0], "what both processes had not flushed is gone");
    write(&disk, 0, 5, 1).await.expect("written");
    disk.flush().await.expect("flushed");
    let disk = host.start_after_power_loss(3).await;
    assert_eq!(values(&disk, 2).await, [5, 1]);
    host.tell("keep", "all");
    write(&disk, 0, 6, 1).await.expect("written");
    assert_eq!(values(&host.start_after_power_loss(4).await, 2).await, [6, 1]);
    // Nothing is noted any more: it would be taken back by the next loss.
    host.tell("keep", "nothing");
    assert_eq!(values(&host.start_after_power_loss(5).await, 2).await, [6, 1]);
}

#[tokio::test]
async fn any_sectors_of_unflushed_writes_may_stay_each_as_one_of_them_left_it() {
    let host = Host::new("subset");
    let mut seen = std::collections::BTreeSet::new();
    for boot in 1..60 {
        let disk = host.start_after_power_loss(boot * 2).await;
        write(&disk, 0, 1, 8).await.expect("written");
        disk.flush().await.expect("flushed");
        write(&disk, 0, 2, 8).await.expect("written");
        write(&disk, 2, 3, 4).await.expect("written");
        let disk = host.start_after_power_loss(boot * 2 + 1).await;
        let values = values(&disk, 8).await;
        assert!(values[..2].iter().chain(&values[6..]).all(|value| matches!(value, 1 | 2)), "{values:?}");
        assert!(values[2..6].iter().all(|value| matches!(value, 1..=3)), "{values:?}");
        seen.insert(values);
    }
    assert!(seen.len() > 20, "{seen:?}");
    assert!(seen.contains(&vec![1; 8]), "all is lost sometimes");
}

#[tokio::test]
async fn a_flush_covers_what_was_complete_when_it_began_and_a_lying_one_nothing() {
    let host = Host::new("flush");
    host.tell("keep", "nothing");
    host.tell("lie", "");
    let disk = host.start_after_power_loss(1).await;
    write(&disk, 0, 1, 1).await.expect("written");
    disk.flush().await.expect("so it says");
    let disk = host.start_after_power_loss(2).await;
    assert_eq!(values(&disk, 1).await, [0]);
}

#[test]
fn a_write_that_was_under_way_when_a_flush_began_is_not_covered_by_it() {
    let dir = TempDir::new("notes");
    let faults_dir = dir.path().join("held");
    std::fs::create_dir_all(&faults_dir).expect("a directory");
    let path = faults_dir.join("d.undo");
    let (covered, open) = disk::tests_support::two_writes_one_complete_before_a_flush(&path);
    let left = disk::tests_support::noted_numbers(&path);
    assert_eq!(left, [open], "{covered} was complete");
}

#[tokio::test]
async fn requests_hang_while_the_disk_does_and_a_full_one_takes_no_new_bytes() {
    let host = Host::new("stall");
    let disk = host.start_after_power_loss(1).await;
    write(&disk, 0, 1, 1).await.expect("written");
    host.tell("stall", "");
    // The change is followed by another thread.
    let hung = async {
        loop {
            match host.env.timeout(Duration::from_millis(50), values(&disk, 1)).await {
                Some(_) => tokio::task::yield_now().await,
                None => return,
            }
        }
    };
    host.env.timeout(Duration::from_secs(10), hung).await.expect("requests hang");
    let waiting = tokio::spawn({
        let disk = Arc::clone(&disk);
        async move { values(&disk, 1).await }
    });
    std::fs::remove_file(host.dir.path().join("stall")).expect("removed");
    assert_eq!(waiting.await.expect("no panic"), [1]);

    host.tell("full", "");
    let refused = async {
        loop {
            if let Err(error) = write(&disk, 8, 2, 1).await {
                return error;
            }
            host.disk.open().discard(0, 1 << 20).await.expect("discarded");
        }
    };
    let refused = host.env.timeout(Duration::from_secs(10), refused).await.expect("refused");
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
}

#[tokio::test]
async fn appended_bytes_go_with_power_until_they_are_synced_and_cut_ones_come_back() {
    let (dir, faults_dir) = (TempDir::new("files"), TempDir::new("files-faults"));
    let env = OsRuntime::current();
    let path = dir.path().join("log");
    let tell = |name: &str, text: &str| std::fs::write(faults_dir.path().join(name), text).expect("a file");
    tell("keep", "nothing");
    let start = |boot: &str| {
        tell("boot", boot);
        let faults = Faults::of(faults_dir.path()).expect("a directory");
        take_back(&faults, dir.path()).expect("taken back");
        faults
    };
    let open = |faults: Arc<Faults>| {
        let (env, dir, path) = (env.clone(), dir.path().to_owned(), path.clone());
        async move {
            let directory = OsDirectory::open(&env, dir).await.expect("a directory");
            let file = directory.append("log").await.expect("a file");
            HeldFile::new(&faults, file, path).expect("held")
        }
    };
    let content = || String::from_utf8(std::fs::read(&path).expect("a file")).expect("text");
    use crate::file::AppendFile;

    let mut file = open(start("1")).await;
    file.append(b"flushed".to_vec()).await.expect("appended");
    file.sync().await.expect("synced");
    file.append(b"lost".to_vec()).await.expect("appended");
    drop(file);
    start("1");
    assert_eq!(content(), "flushedlost", "the process alone was killed");
    let mut file = open(start("2")).await;
    assert_eq!(content(), "flushed");
    file.append(b" more".to_vec()).await.expect("appended");
    file.truncate(3).await.expect("cut");
    file.append(b"xx".to_vec()).await.expect("appended");
    drop(file);
    assert_eq!(content(), "fluxx");
    start("3");
    assert_eq!(content(), "flushed");
    tell("keep", "any");
    let mut seen = std::collections::BTreeSet::new();
    for boot in 4..40 {
        let mut file = open(start(&format!("{boot:x}0"))).await;
        file.truncate(0).await.expect("cut");
        file.append(b"ab".to_vec()).await.expect("appended");
        file.sync().await.expect("synced");
        file.append(b"cd".to_vec()).await.expect("appended");
        file.truncate(1).await.expect("cut");
        drop(file);
        start(&format!("{boot:x}1"));
        seen.insert(content());
    }
    let all = ["a", "ab", "abc", "abcd"];
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), all);
}
