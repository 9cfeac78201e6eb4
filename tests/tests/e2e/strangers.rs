//! What does not belong here is refused clearly, and changes nothing: copies of nodes, foreign devices and nodes, garbage on every port.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use xsan_tests::cluster::{Outcome, outcome, program};
use xsan_tests::{Hosts, Random, eventually, within};

fn setting(dir: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(dir.join("xsan.toml")).expect("settings");
    let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} = \"")));
    value.unwrap_or_else(|| panic!("{name} in {text}")).trim_end_matches('"').to_owned()
}

fn set(dir: &Path, name: &str, value: &str) {
    let path = dir.join("xsan.toml");
    let text = std::fs::read_to_string(&path).expect("settings");
    let line = format!("{name} = \"{}\"", setting(dir, name));
    std::fs::write(path, text.replace(&line, &format!("{name} = \"{value}\""))).expect("settings");
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").to_string()
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").args(["-r", "--sparse=always"]).arg(from).arg(to).status().expect("cp");
    // Sockets and what was removed meanwhile are not copied.
    assert!(copied.success() || to.join("identity.json").exists(), "{copied}");
    for file in ["pid", "lock", "nbd.sock", "admin.sock"] {
        // Not all are there.
        let _ = std::fs::remove_file(to.join(file));
    }
}

/// Runs a daemon that is expected to end by itself.
fn run(dir: &Path) -> Outcome {
    outcome(
        Command::new("timeout").arg("60").arg(program()).args(["node", "run", "--config"]).arg(dir.join("xsan.toml")),
    )
}

fn beside(hosts: &Hosts, name: &str) -> PathBuf {
    hosts.dir(1).with_file_name(name)
}

fn volume_size(hosts: &Hosts) -> u64 {
    hosts.ok(1, &["volume", "stat", "vm1"])["size"].as_u64().expect("a size")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_node_that_runs_ends_with_an_error_and_the_original_goes_on() {
    let hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "64MiB"]);
    let mut guest = hosts.connect(3, "vm1").await.expect("served");
    guest.write(0, &[7; 4096], 0).await.expect("a write");
    let clone = beside(&hosts, "clone");
    copy(&hosts.dir(3), &clone);
    // Another port, as on another host; once with the address of the original still in its settings, once with its own.
    let elsewhere = free_address();
    set(&clone, "listen", &elsewhere);
    for address in [setting(&hosts.dir(3), "address"), elsewhere] {
        set(&clone, "address", &address);
        let refused = run(&clone);
        assert!(refused.code != 0 && refused.code != 124, "{refused:?}");
        let told = format!("{}{}", refused.stderr, refused.stdout);
        for words in ["n3 runs already", &setting(&hosts.dir(3), "address"), "copy of its files", "node join"] {
            assert!(told.contains(words), "{words}: {told}");
        }
    }
    guest.write(4096, &[8; 4096], 0).await.expect("the original serves");
    assert!(guest.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 7));
    hosts.wait_until_whole(1, 30);
    assert_eq!(hosts.state(1, 3), "up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_of_another_cluster_or_node_is_refused_and_not_touched() {
    let mut hosts = Hosts::started(3);
    let mut foreign = Hosts::started(1);
    foreign.stop();
    let stray = beside(&hosts, "stray.img");
    let config = |device: &Path| format!("devices = [\"{}\"]\n", device.display());
    let settings = hosts.dir(3).join("xsan.toml");
    let before = std::fs::read_to_string(&settings).expect("settings");
    hosts.kill(3);
    let cases = [
        (foreign.dir(1), "belongs to another cluster", "device of another cluster"),
        (hosts.dir(2), "belongs to another node", "not blank"),
    ];
    for (from, why, taken) in cases {
        copy(&from.join("device.img"), &stray);
        let head = std::fs::read(&stray).expect("the device")[..1 << 20].to_vec();
        std::fs::write(&settings, format!("{}{before}", config(&stray))).expect("settings");
        let refused = run(&hosts.dir(3));
        let told = format!("{}{}", refused.stderr, refused.stdout);
        assert!(refused.code != 0 && refused.code != 124, "{refused:?}");
        assert!(told.contains(why) && told.contains("stray.img"), "{told}");
        assert!(std::fs::read(&stray).expect("the device")[..1 << 20] == head, "it was not touched");
        // Nor is it taken as a new one.
        std::fs::write(&settings, &before).expect("settings");
        let stray = stray.to_string_lossy();
        let refused = hosts.run(1, &["device", "add", &stray]);
        assert!(refused.code != 0 && refused.stderr.contains(taken), "{refused:?}");
    }
    hosts.restart(3);
    hosts.wait_until_whole(1, 60);
    hosts.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_gets_nothing_here() {
    let hosts = Hosts::started(3);
    let mut foreign = Hosts::started(3);
    foreign.stop();
    // The foreign nodes look for each other where these nodes live.
    for node in 2..=3 {
        let (own, theirs) = (setting(&hosts.dir(node), "address"), setting(&foreign.dir(node), "address"));
        let path = foreign.dir(1).join("identity.json");
        let text = std::fs::read_to_string(&path).expect("identity");
        std::fs::write(&path, text.replace(&theirs, &own)).expect("identity");
    }
    foreign.restart(1);
    eventually(20, "the foreign node says that it is alone", || {
        let health = foreign.run(1, &["health"]);
        if health.stdout.contains("METADATA_SILENT") { Ok(()) } else { Err(format!("{health:?}")) }
    });
    hosts.wait_until_whole(1, 30);
    assert_eq!(hosts.ok(1, &["node", "list"]).as_array().map(Vec::len), Some(3));
    foreign.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_has_expired_or_was_made_up_lets_nobody_in() {
    let hosts = Hosts::started(1);
    let peer = setting(&hosts.dir(1), "address");
    let expired = hosts.ok(1, &["cluster", "token", "--minutes", "0"])["token"].as_str().expect("a token").to_owned();
    let dir = beside(&hosts, "new");
    let path = dir.to_string_lossy();
    for (token, why) in [(expired.as_str(), "has expired"), ("xsan1-00", "token"), ("let me in", "token")] {
        let how = ["--listen", "127.0.0.1:0", "--address", "127.0.0.1:1", "--device-size", "1GiB", "--no-start"];
        let refused = hosts.run(1, &[&["node", "join", token, "--peer", &peer, "--dir", &path][..], &how].concat());
        assert!(refused.code != 0 && refused.stderr.contains(why), "{token}: {refused:?}");
    }
    assert_eq!(hosts.ok(1, &["node", "list"]).as_array().map(Vec::len), Some(1));
    assert!(!dir.join("device.img").exists(), "nothing was made on the host either");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_every_port_is_hung_up_on_and_nothing_else() {
    let mut random = Random::of_test();
    let hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "64MiB"]);
    let mut guest = hosts.connect(1, "vm1").await.expect("served");
    guest.write(0, &[7; 4096], 0).await.expect("a write");
    let before = volume_size(&hosts);
    let address = setting(&hosts.dir(1), "address");
    for round in 0..20 {
        let length = usize::try_from(random.between(1, 100_000)).expect("small");
        let mut bytes: Vec<u8> = (0..length).map(|_| u8::try_from(random.below(256)).expect("a byte")).collect();
        match round % 4 {
            // The beginnings of what is spoken there: a TLS handshake, HTTP, an NBD client's flags.
            0 => bytes.splice(..0, [22, 3, 1, 2, 0, 1]).for_each(drop),
            1 => bytes
                .splice(..0, *b"DELETE /v1/volumes/vm1 HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n")
                .for_each(drop),
            2 => bytes.splice(..0, [0, 0, 0, 3, b'I', b'H', b'A', b'V', b'E', b'O', b'P', b'T', 0xff]).for_each(drop),
            _ => {}
        }
        let node = TcpStream::connect(&address).await.expect("the nodes' port");
        within(60, "the nodes' port hangs up", spew(node, &bytes)).await;
        for socket in ["nbd.sock", "admin.sock"] {
            let stream = UnixStream::connect(hosts.dir(1).join(socket)).await.expect("a socket");
            within(60, socket, spew(stream, &bytes)).await;
        }
    }
    guest.write(4096, &[8; 4096], 0).await.expect("it serves");
    assert!(guest.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 7));
    assert_eq!(volume_size(&hosts), before);
    hosts.wait_until_whole(1, 30);
    assert_eq!(hosts.ok(1, &["node", "list"]).as_array().map(Vec::len), Some(3));
}

/// Sends bytes and waits until the other end hangs up.
async fn spew(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, bytes: &[u8]) {
    // It may hang up before it has heard all of it.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(45), stream.read_to_end(&mut answer)).await;
}
