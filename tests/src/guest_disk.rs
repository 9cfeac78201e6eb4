//! A guest's disk as QEMU sees it: over NBD on a network, with `reconnect-delay`, one synchronous request after the other.

use crate::network::Network;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PROMPT: &str = "qemu-io> ";
/// The longest that any request may take: beyond it a guest is dead.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks that are written in turn.
const BLOCKS: u64 = 64;

/// `qemu-io` on a host of the network.
pub struct GuestDisk {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// The pattern that each block has.
    written: BTreeMap<u64, u8>,
    number: u64,
}

impl GuestDisk {
    /// Opens an export at an address.
    ///
    /// # Panics
    /// It cannot be opened.
    #[must_use]
    pub fn open(network: &Network, host: usize, address: &str, export: &str) -> Self {
        let options = format!(
            "driver=nbd,server.type=inet,server.host={address},server.port=10809,export={export},reconnect-delay=60"
        );
        let mut command = network.on(host, Path::new("qemu-io"));
        command.args(["--image-opts", &options]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("qemu-io");
        let (input, mut pipe) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (sender, output) = sync_channel(64);
        // Ends with the pipe.
        drop(std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        }));
        let mut disk = Self { child, input, output, written: BTreeMap::new(), number: 0 };
        disk.answer("the disk is opened");
        disk
    }

    fn answer(&mut self, what: &str) -> String {
        let (mut text, until) = (String::new(), Instant::now() + PATIENCE);
        while !text.ends_with(PROMPT) {
            match self.output.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("{what}: {error}: {text}"),
            }
        }
        text
    }

    fn command(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").expect("qemu-io reads");
        self.answer(command)
    }

    /// Writes the next block; how long it took.
    ///
    /// # Panics
    /// It failed.
    pub fn write(&mut self) -> Duration {
        self.number += 1;
        let (block, pattern) = (self.number % BLOCKS, u8::try_from(self.number % 251 + 1).expect("a byte"));
        let began = Instant::now();
        let text = self.command(&format!("write -P {pattern} {} 4096", block * 4096));
        assert!(text.contains("wrote 4096/4096"), "a guest's write failed: {text}");
        self.written.insert(block, pattern);
        began.elapsed()
    }

    /// Everything that was written is there.
    ///
    /// # Panics
    /// It is not.
    pub fn check(&mut self) {
        for (block, pattern) in self.written.clone() {
            let text = self.command(&format!("read -P {pattern} {} 4096", block * 4096));
            let is_right = text.contains("read 4096/4096") && !text.contains("verification failed");
            assert!(is_right, "block {block} has lost a write: {text}");
        }
    }

    /// Writes on and on, in the background.
    #[must_use]
    pub fn keep_writing(mut self) -> Writing {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut longest, mut count) = (Duration::ZERO, 0);
            while !stopped.load(Ordering::Relaxed) {
                longest = longest.max(self.write());
                count += 1;
            }
            (self, longest, count)
        });
        Writing { stop, thread }
    }
}

impl Drop for GuestDisk {
    fn drop(&mut self) {
        // `ip netns exec` has become qemu-io.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that writes.
pub struct Writing {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(GuestDisk, Duration, u64)>,
}

impl Writing {
    /// Ends after the write that is under way; the disk, the longest that a write took, and how many there were.
    ///
    /// # Panics
    /// A write failed.
    #[must_use]
    pub fn stop(self) -> (GuestDisk, Duration, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no write fails")
    }
}
