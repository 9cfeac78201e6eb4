use super::*;
use crate::testing::TempDir;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A connected pair of each kind.
async fn pairs(temp: &TempDir) -> Vec<(Stream, Stream)> {
    let tcp = Listener::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let (connected, accepted) = tokio::join!(Stream::connect_tcp(tcp.tcp_address().expect("tcp")), tcp.accept());
    let mut pairs = vec![(connected.expect("tcp"), accepted.expect("tcp"))];
    let path = temp.path().join("s");
    let unix = Listener::unix(&path, &UnixOptions::default()).await.expect("bound");
    let (connected, accepted) = tokio::join!(Stream::connect_unix(&path), unix.accept());
    pairs.push((connected.expect("unix"), accepted.expect("unix")));
    let (memory, dialer) = Listener::memory(5000);
    let (connected, accepted) = tokio::join!(dialer.connect(), memory.accept());
    pairs.push((connected.expect("memory"), accepted.expect("memory")));
    pairs
}

#[tokio::test]
async fn every_kind_of_stream_carries_bytes_in_order_with_back_pressure() {
    let temp = TempDir::new("net");
    for (one, other) in pairs(&temp).await {
        let sent: Vec<u8> = (0..20_000_000u32).map(|i| (i % 251) as u8).collect();
        let (head, tail) = sent.split_at(12_345);
        let mut received = vec![0; sent.len()];
        let write = async {
            let mut pieces = [IoSlice::new(&[]), IoSlice::new(head), IoSlice::new(&[]), IoSlice::new(tail)];
            one.write_all_vectored(&mut pieces).await.expect("written");
            one.finish_writing();
        };
        let read = async {
            other.read_exact(&mut received).await.expect("read");
            assert_eq!(other.read(&mut [0; 10]).await.expect("the end"), 0);
        };
        tokio::join!(write, read);
        assert!(received == sent, "{one:?}");
        other.write_all(b"bye").await.expect("the other direction is open");
        let mut bye = [0; 3];
        one.read_exact(&mut bye).await.expect("read");
        assert_eq!(&bye, b"bye");
    }
}

#[tokio::test]
async fn try_calls_say_would_block_and_readiness_follows() {
    let temp = TempDir::new("net");
    for (one, other) in pairs(&temp).await {
        let error = one.try_read(&mut [0; 1]).expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut written = 0;
        loop {
            match other.try_write(&[7; 4096]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        one.readable().await.expect("filled");
        let mut left = written;
        let mut piece = vec![0; 1 << 16];
        while left > 0 {
            left -= one.read(&mut piece).await.expect("read");
        }
        other.writable().await.expect("room again");
        other.write_all(&[1]).await.expect("written");
    }
}

#[tokio::test]
async fn a_cut_ends_the_read_that_waits_on_it_and_the_peer_notices() {
    let temp = TempDir::new("net");
    for (one, other) in pairs(&temp).await {
        let one = Arc::new(one);
        let waiting = tokio::spawn({
            let one = Arc::clone(&one);
            async move { one.read(&mut [0; 8]).await }
        });
        tokio::task::yield_now().await;
        one.cut();
        assert!(matches!(waiting.await.expect("ended"), Ok(0) | Err(_)));
        assert!(matches!(other.read(&mut [0; 8]).await, Ok(0) | Err(_)));
        assert!(one.write_all(&[0; 8]).await.is_err());
    }
}

#[tokio::test]
async fn streams_work_as_async_read_and_write() {
    let temp = TempDir::new("net");
    for (mut one, mut other) in pairs(&temp).await {
        assert!(!one.peer().is_empty());
        let bytes = vec![3; 100_000];
        let (sent, received) = tokio::join!(
            async {
                one.write_all(&bytes).await?;
                AsyncWriteExt::shutdown(&mut one).await
            },
            async {
                let mut got = Vec::new();
                other.read_to_end(&mut got).await.map(|_| got)
            }
        );
        sent.expect("sent");
        assert_eq!(received.expect("received"), bytes);
    }
}

#[tokio::test]
async fn a_unix_socket_has_its_mode_and_goes_with_its_listener() {
    let temp = TempDir::new("net");
    let path = temp.path().join("socket");
    let gid = std::os::unix::fs::MetadataExt::gid(&std::fs::metadata(temp.path()).expect("exists"));
    let options = UnixOptions { mode: 0o660, group: Some(gid.to_string()) };
    let listener = Listener::unix(&path, &options).await.expect("bound");
    assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o660);
    let second = Listener::unix(&path, &options).await.err().expect("in use");
    assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
    assert!(second.to_string().contains("socket"), "{second}");
    drop(listener);
    assert!(!path.exists());
    let unknown = UnixOptions { group: Some("no-such-group-here".into()), ..UnixOptions::default() };
    assert_eq!(Listener::unix(&path, &unknown).await.err().expect("unknown").kind(), io::ErrorKind::NotFound);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_another_file_is_not() {
    let temp = TempDir::new("net");
    let path = temp.path().join("socket");
    // A listener whose process died: the file stays, nobody listens.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists());
    let listener = Listener::unix(&path, &UnixOptions::default()).await.expect("the stale file is gone");
    assert!(Stream::connect_unix(&path).await.is_ok());
    // Somebody else's socket of the same name is not removed.
    std::fs::remove_file(&path).expect("removed");
    let other = std::os::unix::net::UnixListener::bind(&path).expect("bound");
    drop(listener);
    assert!(path.exists());
    drop(other);
    let file = temp.path().join("file");
    std::fs::write(&file, b"precious").expect("written");
    let refused = Listener::unix(&file, &UnixOptions::default()).await.err().expect("refused");
    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    assert!(file.exists());
}
