use super::*;
use crate::os::OsRuntime;
use crate::testing::TempDir;
use std::sync::Arc;

async fn both() -> (TempDir, Vec<Arc<dyn Directory>>) {
    let temp = TempDir::new("files");
    let os = OsDirectory::open(&OsRuntime::current(), temp.path().join("a/b")).await.expect("made with its parents");
    (temp, vec![Arc::new(os), Arc::new(MemoryDirectory::new())])
}

#[tokio::test]
async fn what_was_replaced_appended_and_removed_is_read_back() {
    let (_temp, directories) = both().await;
    for directory in directories {
        assert_eq!(directory.read("x").await.expect("fine"), None);
        directory.replace_atomic("x", b"one".to_vec()).await.expect("fine");
        directory.replace_atomic("x", b"two!".to_vec()).await.expect("fine");
        assert_eq!(directory.read("x").await.expect("fine").as_deref(), Some(&b"two!"[..]));
        let mut log = directory.append("log").await.expect("made");
        log.append(b"abc".to_vec()).await.expect("fine");
        log.append(b"def".to_vec()).await.expect("fine");
        log.truncate(4).await.expect("fine");
        log.append(b"!".to_vec()).await.expect("fine");
        log.sync().await.expect("fine");
        assert_eq!(log.bytes(), 5);
        assert!(log.truncate(6).await.is_err());
        drop(log);
        assert_eq!(directory.append("log").await.expect("opened").bytes(), 5);
        assert_eq!(directory.read("log").await.expect("fine").as_deref(), Some(&b"abcd!"[..]));
        assert_eq!(directory.list().await.expect("fine"), ["log", "x"]);
        directory.remove("x").await.expect("fine");
        directory.remove("x").await.expect("fine, too");
        assert_eq!(directory.list().await.expect("fine"), ["log"]);
    }
}

#[tokio::test]
async fn bad_names_are_refused() {
    let (_temp, directories) = both().await;
    for directory in directories {
        for name in ["", ".", "..", ".hidden", "a/b", "a\0b", &"x".repeat(201)] {
            let error = directory.replace_atomic(name, Vec::new()).await.expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
            assert!(directory.read(name).await.is_err() && directory.append(name).await.is_err());
        }
    }
}

#[tokio::test]
async fn a_power_cut_keeps_what_was_synced_and_a_prefix_of_the_rest() {
    let mut lengths = Vec::new();
    for seed in 0..40 {
        let directory = MemoryDirectory::new();
        let mut log = directory.append("log").await.expect("made");
        log.append(b"abc".to_vec()).await.expect("fine");
        log.sync().await.expect("fine");
        log.append(b"defgh".to_vec()).await.expect("fine");
        directory.power_off(seed);
        assert!(log.append(b"x".to_vec()).await.is_err(), "the handle is dead");
        let left = directory.read("log").await.expect("fine").expect("exists");
        assert!(b"abcdefgh".starts_with(&left) && left.len() >= 3);
        lengths.push(left.len());
    }
    lengths.sort_unstable();
    lengths.dedup();
    assert!(lengths.len() >= 4, "the seed decides: {lengths:?}");
}

#[tokio::test]
async fn a_process_crash_keeps_answered_appends_and_kills_the_handle() {
    let directory = MemoryDirectory::new();
    let mut log = directory.append("log").await.expect("made");
    log.append(b"abc".to_vec()).await.expect("fine");
    directory.crash_process();
    assert!(log.sync().await.is_err());
    assert_eq!(directory.read("log").await.expect("fine").as_deref(), Some(&b"abc"[..]));
}

#[tokio::test]
async fn a_failed_append_leaves_the_file_as_it_was_and_a_failed_sync_poisons() {
    for at in [FaultAt::Before, FaultAt::After] {
        let directory = MemoryDirectory::new();
        let mut log = directory.append("log").await.expect("made");
        log.append(b"abc".to_vec()).await.expect("fine");
        directory.fail_nth(1, at, libc::ENOSPC);
        let error = log.append(b"def".to_vec()).await.expect_err("fails");
        assert_eq!(crate::error::errno(&error), Some(libc::ENOSPC));
        assert_eq!(crate::error::kind(&error), xsan_types::ErrorKind::NoSpace);
        assert_eq!(directory.read("log").await.expect("fine").as_deref(), Some(&b"abc"[..]));
        log.append(b"d".to_vec()).await.expect("works again");
        directory.fail_nth(1, at, libc::EIO);
        assert!(log.sync().await.is_err());
        assert!(log.sync().await.is_err() && log.append(Vec::new()).await.is_err(), "poisoned");
        directory.fail_nth(1, at, libc::EIO);
        assert!(directory.replace_atomic("x", b"new".to_vec()).await.is_err());
        assert_eq!(directory.read("x").await.expect("fine").is_some(), at == FaultAt::After);
    }
}
