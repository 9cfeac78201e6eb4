//! A cluster as its user meets it: the program, its directory, its command line and its NBD socket.

use crate::wait::eventually;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use xsan_gateway::client::{Client, ClientError, Connect};

/// A connection to a volume.
pub type Guest = Client<UnixStream>;

/// Clusters that run at the same time in one test process.
const AT_ONCE: u64 = 2;
/// Free bytes that a test asks for before it starts.
const FREE_BYTES: u64 = 8 << 30;
/// A start takes no longer, whatever happened before.
pub const READY_SECONDS: u64 = 10;

static RUNNING: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Bounds how many clusters run at the same time.
struct Turn;

impl Turn {
    fn take() -> Self {
        let (running, freed) = &RUNNING;
        let mut running = running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while *running >= AT_ONCE {
            running = freed.wait(running).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        *running += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (running, freed) = &RUNNING;
        *running.lock().unwrap_or_else(std::sync::PoisonError::into_inner) -= 1;
        freed.notify_one();
    }
}

/// What a command answered.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its exit code; -1 after a signal.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Outcome {
    /// Its JSON document.
    ///
    /// # Panics
    /// It printed something else.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }
}

/// The program under test: `XSAN_BIN`, or the release build of this workspace.
///
/// # Panics
/// There is none.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("XSAN_BIN") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "XSAN_BIN={} is no program", path.display());
        return path;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let path = target.join("release/xsan");
    assert!(
        path.is_file(),
        "the end-to-end tests drive the real program: build it with `cargo build --release --bin xsan`, or name it with XSAN_BIN"
    );
    path
}

/// The program with a rule of the protocol broken: `XSAN_CANARY_BIN`, or the debug build of this workspace.
///
/// # Panics
/// There is none.
#[must_use]
pub fn broken_program() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let path = std::env::var_os("XSAN_CANARY_BIN").map_or_else(|| target.join("debug/xsan-canary"), PathBuf::from);
    let how =
        "build it with `cargo build -p xsan-cli --features canary --bin xsan-canary`, or name it with XSAN_CANARY_BIN";
    assert!(path.is_file(), "{} is no program: {how}", path.display());
    path
}

/// A cluster in a directory of its own, which goes with it.
pub struct Cluster {
    root: PathBuf,
    options: Vec<String>,
    /// A rule that its processes break.
    broken: Option<&'static str>,
    child: Option<Child>,
    _turn: Arc<Turn>,
}

impl Cluster {
    /// Six nodes of 2 GiB, started.
    #[must_use]
    pub fn started() -> Self {
        let mut cluster = Self::new(&["--device-size", "2GiB"]);
        cluster.start();
        cluster
    }

    /// A directory for `xsan dev` with these options; nothing runs yet.
    ///
    /// # Panics
    /// There is too little room.
    #[must_use]
    pub fn new(options: &[&str]) -> Self {
        let turn = Arc::new(Turn::take());
        let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let free = free_bytes(&base);
        assert!(
            free >= FREE_BYTES,
            "{} has {} MiB free, the test wants {FREE_BYTES} bytes",
            base.display(),
            free >> 20
        );
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = base.join(format!("xsan-e2e-{}-{number}", std::process::id()));
        // What a test that was killed left behind under the same process id.
        drop(std::fs::remove_dir_all(&root));
        std::fs::create_dir(&root).expect("a directory for the test");
        Self {
            root,
            options: options.iter().map(ToString::to_string).collect(),
            broken: None,
            child: None,
            _turn: turn,
        }
    }

    /// Where the cluster lies.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.root.join("c")
    }

    /// Where `admin.sock` and `nbd.sock` lie: with a process per node, those of the first one.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        if self.options.iter().any(|option| option == "--processes") { self.dir().join("n1") } else { self.dir() }
    }

    /// The device file of node `number`, from 1.
    #[must_use]
    pub fn device(&self, number: usize) -> PathBuf {
        self.dir().join(format!("n{number}/device.img"))
    }

    /// Starts the process and waits until it can serve.
    ///
    /// # Panics
    /// It ended instead, or took longer than [`READY_SECONDS`].
    pub fn start(&mut self) -> Duration {
        match self.try_start() {
            Ok(took) => took,
            Err(status) => panic!("xsan dev ended at its start with {status}; its log:\n{}", self.log()),
        }
    }

    /// As [`Cluster::start`]; how it ended, if it ended.
    ///
    /// # Errors
    /// How it ended.
    pub fn try_start(&mut self) -> Result<Duration, ExitStatus> {
        let began = Instant::now();
        self.spawn();
        let mut ended = None;
        eventually(READY_SECONDS, "the cluster is ready", || {
            ended = self.child.as_mut().and_then(|child| child.try_wait().expect("state of the process"));
            if ended.is_some() {
                return Ok(());
            }
            let outcome = self.run(&["status"]);
            if outcome.code == 0 { Ok(()) } else { Err(outcome.stderr) }
        });
        match ended {
            None => Ok(began.elapsed()),
            Some(status) => {
                self.child = None;
                Err(status)
            }
        }
    }

    /// Starts the process and does not wait.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = || OpenOptions::new().create(true).append(true).open(self.log_path()).expect("the log file");
        let child = self.command().stdin(Stdio::null()).stdout(log()).stderr(log()).spawn();
        self.child = Some(child.expect("the program starts"));
    }

    /// All its processes break this rule from the next start on.
    pub fn break_rule(&mut self, rule: &'static str) {
        self.broken = Some(rule);
    }

    /// The program that its processes run, without arguments.
    #[must_use]
    pub fn program_command(&self) -> Command {
        match self.broken {
            None => Command::new(program()),
            Some(rule) => {
                let mut command = Command::new(broken_program());
                command.env("XSAN_CANARY", rule);
                command
            }
        }
    }

    /// A `xsan dev` on the same directory with the same options.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = self.program_command();
        command.args(["dev", "--dir"]).arg(self.dir()).args(&self.options).env("NO_COLOR", "1");
        command
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("SIGKILL");
        child.wait().expect("the end of the process");
    }

    /// SIGTERM, and waits for the orderly end.
    ///
    /// # Panics
    /// It did not end within 30 s, or not well.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIGTERM");
        let mut ended = None;
        eventually(30, "xsan dev ends after SIGTERM", || {
            ended = child.try_wait().expect("state of the process");
            ended.map(drop).ok_or_else(|| "it runs".to_owned())
        });
        let ended = ended.expect("it ended");
        assert!(ended.success(), "SIGTERM ends it well, not with {ended}; its log:\n{}", self.log());
    }

    /// Whether it was started and neither stopped nor killed since.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Whether the process runs.
    pub fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// Runs a command of the command line against this cluster.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(program());
        command.arg("--admin").arg(self.home().join("admin.sock")).args(["--output", "json"]).args(arguments);
        outcome(&mut command)
    }

    /// As [`Cluster::run`]; the command must succeed, its JSON is returned.
    ///
    /// # Panics
    /// It failed.
    pub fn ok(&self, arguments: &[&str]) -> Value {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, 0, "xsan {arguments:?}: {outcome:?}");
        outcome.json()
    }

    /// `xsan status`.
    #[must_use]
    pub fn status(&self) -> Value {
        self.ok(&["status"])
    }

    /// Waits until the cluster's health is `ok`: nodes up, journal sets complete, no segment with missing positions.
    pub fn wait_until_whole(&self, seconds: u64) {
        eventually(seconds, "health ok", || {
            let status = self.status();
            if status["health"] == "ok" { Ok(()) } else { Err(status["reasons"].to_string()) }
        });
    }

    /// Sum of the bytes in use on all nodes.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        let status = self.status();
        let nodes = status["nodes"].as_array().expect("nodes");
        nodes.iter().map(|node| node["used"].as_u64().expect("used")).sum()
    }

    /// Makes a volume.
    pub fn create_volume(&self, name: &str, size: &str) {
        self.ok(&["volume", "create", name, "--size", size]);
    }

    /// Connects to a volume with extended headers and the allocation map.
    ///
    /// # Errors
    /// Those of the connection and of the handshake.
    pub async fn connect(&self, volume: &str) -> Result<Guest, ClientError> {
        connect(&self.dir(), volume).await
    }

    /// As [`Cluster::connect`], within [`READY_SECONDS`].
    ///
    /// # Panics
    /// It failed.
    pub async fn guest(&self, volume: &str) -> Guest {
        let connected = crate::within(READY_SECONDS, "the volume serves", self.connect(volume)).await;
        connected.unwrap_or_else(|error| panic!("volume {volume} serves: {error}; the log:\n{}", self.log()))
    }

    fn log_path(&self) -> PathBuf {
        self.root.join("log")
    }

    /// What the process printed in all its lives.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(self.log_path()) {
            let _ = file.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let log = self.log();
        if std::thread::panicking() {
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            println!("--- the last lines of the log");
            tail.iter().rev().for_each(|line| println!("{line}"));
            if std::env::var_os("XSAN_TEST_KEEP").is_some() {
                println!("--- kept: {}", self.root.display());
                return;
            }
        }
        let _ = std::fs::remove_dir_all(&self.root);
        let panicked = log.lines().find(|line| line.contains("panicked"));
        if let Some(line) = panicked
            && !std::thread::panicking()
        {
            panic!("the process panicked: {line}\n{log}");
        }
    }
}

/// Connects to a volume of the cluster in `dir`.
///
/// # Errors
/// Those of the connection and of the handshake.
pub async fn connect(dir: &Path, volume: &str) -> Result<Guest, ClientError> {
    let stream = UnixStream::connect(dir.join("nbd.sock")).await?;
    Client::connect(stream, &Connect::to(volume)).await
}

/// Runs a command to its end, without a terminal.
///
/// # Panics
/// The program cannot be started.
pub fn outcome(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().expect("the program runs");
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn free_bytes(dir: &Path) -> u64 {
    let text = outcome(Command::new("df").args(["--output=avail", "-B1"]).arg(dir)).stdout;
    text.lines().nth(1).and_then(|line| line.trim().parse().ok()).unwrap_or(u64::MAX)
}
