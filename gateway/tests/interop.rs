//! The gateway beside the tools people use: libnbd (nbdinfo, nbdcopy, nbdsh), QEMU (qemu-io, qemu-img) and fio.
//!
//! Each test starts a server of its own on a unix socket and skips, with a word, what is not installed.
#![allow(missing_docs, reason = "test code")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "runs other programs and looks at the files they make"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use xsan_env::net::{Listener, UnixOptions};
use xsan_env::{BufPool, OsRuntime};
use xsan_gateway::memory_export::{MemoryExport, MemoryExports};
use xsan_gateway::{Export, Limits, Server, Tls};

const SIZE: u64 = 256 << 20;

/// A server in this process, a directory for files, and the tools.
struct Bench {
    runtime: tokio::runtime::Runtime,
    server: Server,
    export: Arc<MemoryExport>,
    dir: PathBuf,
}

impl Bench {
    /// `None`, with a word, when a tool is missing.
    fn with_tools(tools: &[&str]) -> Option<Self> {
        for tool in tools {
            if which(tool).is_none() {
                eprintln!("skipped: {tool} is not installed");
                return None;
            }
        }
        Some(Self::new(SIZE))
    }

    fn new(size: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("xsan-interop-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let runtime = xsan_env::os::build_runtime(2).expect("threads");
        let pool = BufPool::new(0, 64 << 20);
        let export = Arc::new(MemoryExport::new("vm1", size, true, pool.clone()));
        let exports = MemoryExports::new([Arc::clone(&export) as Arc<dyn Export>]);
        let socket = dir.join("nbd.sock");
        let server = runtime.block_on(async {
            let server = Server::new(OsRuntime::current(), pool, Arc::new(exports), Limits::default());
            let listener = Listener::unix(socket, &UnixOptions::default()).await.expect("listening");
            drop(server.listen(listener, Tls::off()));
            server
        });
        Self { runtime, server, export, dir }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///vm1?socket={}", self.dir.join("nbd.sock").display())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Runs a script behind the given arguments.
    fn nbdsh(&self, args: &[&str], script: &str) -> String {
        succeed("nbdsh", &[args, &["-c", script]].concat())
    }

    fn qemu_io(&self, commands: &[&str]) -> Output {
        let uri = self.uri();
        let mut args = vec!["-f", "raw"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(&uri);
        run("qemu-io", &args)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.runtime.block_on(self.server.shutdown(Duration::from_secs(5)));
        std::fs::remove_dir_all(&self.dir).expect("removed");
    }
}

/// The system's own tools come first: other Python installations lack the nbd module.
fn which(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(PathBuf::from("/usr/bin")).chain(std::env::split_paths(&path));
    dirs.map(|dir| dir.join(tool)).find(|path| path.is_file())
}

fn run(tool: &str, args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let tool = which(tool).expect("looked for before");
    Command::new(tool).args(args).env("PATH", format!("/usr/bin:{path}")).output().expect("started")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn succeed(tool: &str, args: &[&str]) -> String {
    let output = run(tool, args);
    assert!(output.status.success(), "{tool} {args:?}: {}", text(&output));
    text(&output)
}

/// A file of the export's size with data here and there; returns its bytes.
fn image(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).expect("small")];
    for (i, chunk) in bytes.chunks_mut(1 << 20).enumerate().filter(|(i, _)| i % 5 < 2) {
        let end = chunk.len() - 4096 * (i % 7);
        let value = u8::try_from(i % 250 + 1).expect("a byte");
        chunk[4096 * (i % 50)..end].fill(value);
    }
    std::fs::write(path, &bytes).expect("written");
    bytes
}

fn name(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn nbdinfo_describes_the_export() {
    let Some(bench) = Bench::with_tools(&["nbdinfo"]) else { return };
    let info = succeed("nbdinfo", &[&bench.uri()]);
    for line in [
        "protocol: newstyle-fixed without TLS, using",
        "export-size: 268435456",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "{line} in {info}");
    }
    let list = succeed("nbdinfo", &["--list", &bench.uri().replace("/vm1", "/")]);
    assert!(list.contains("export=\"vm1\""), "{list}");
}

#[test]
fn nbdinfo_maps_what_was_written() {
    let Some(bench) = Bench::with_tools(&["nbdinfo", "qemu-io"]) else { return };
    assert!(bench.qemu_io(&["write -P 1 64k 64k", "write -P 2 1M 4k"]).status.success());
    let map = succeed("nbdinfo", &["--map", &bench.uri()]);
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let rest = (SIZE - (1 << 20) - 4096).to_string();
    let expected: [&[&str]; 5] = [
        &["0", "65536", "3", "hole,zero"],
        &["65536", "65536", "0", "data"],
        &["131072", "917504", "3", "hole,zero"],
        &["1048576", "4096", "0", "data"],
        &["1052672", &rest, "3", "hole,zero"],
    ];
    assert_eq!(rows, expected);
}

#[test]
fn nbdcopy_carries_an_image_in_and_out() {
    let Some(bench) = Bench::with_tools(&["nbdcopy"]) else { return };
    let (source, target) = (bench.file("in.img"), bench.file("out.img"));
    let bytes = image(&source);
    succeed("nbdcopy", &["--flush", name(&source), &bench.uri()]);
    succeed("nbdcopy", &[&bench.uri(), name(&target)]);
    assert!(std::fs::read(&target).expect("copied") == bytes);
    assert!(bench.export.counters.flushes.load(Ordering::Relaxed) > 0, "--flush reached the volume");
}

#[test]
fn nbdsh_finds_every_rule_kept() {
    let Some(bench) = Bench::with_tools(&["nbdsh"]) else { return };
    let script = r#"
import errno
def fails(number, call):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == number, (e.errnum, number)
    else:
        raise AssertionError("no error")
h.set_strict_mode(0)
size = h.get_size()
data = bytes(range(256)) * 256
h.pwrite(data, 4096)
assert h.pread(len(data), 4096) == data
h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
fails(errno.ENOSPC, lambda: h.pwrite(data, size - 512))
fails(errno.ENOSPC, lambda: h.zero(1024, size - 512))
fails(errno.EINVAL, lambda: h.pread(1024, size - 512))
fails(errno.EINVAL, lambda: h.trim(1024, size - 512))
fails(errno.EINVAL, lambda: h.pread(512, 100))
fails(errno.EINVAL, lambda: h.pwrite(b"x" * 100, 0))
fails(errno.ENOTSUP, lambda: h.zero(512, 512, nbd.CMD_FLAG_FAST_ZERO))
h.zero(8192, 8192, nbd.CMD_FLAG_FAST_ZERO)
h.zero(512, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(512, 4096) == bytearray(512)
assert h.pread(3584, 4608) == data[512:4096]
assert h.pread(8192, 8192) == bytearray(8192)
h.trim(0, 0)
h.trim(65536, 4096)
h.cache(65536, 0)
h.flush()
h.pread(0, 0)
seen = []
h.block_status(size, 0, lambda context, offset, entries, err: seen.append((context, entries)) or 0)
assert seen and seen[0][0] == "base:allocation", seen
parts = []
def part(data, offset, status, err):
    parts.append((offset, len(data), status))
    return 0
h.pwrite(data, 1 << 20)
h.pread_structured(1 << 20, (1 << 20) - 65536, part)
assert nbd.READ_HOLE in [p[2] for p in parts] and nbd.READ_DATA in [p[2] for p in parts], parts
parts.clear()
h.pread_structured(65536 * 2, (1 << 20) - 65536, part, nbd.CMD_FLAG_DF)
assert len(parts) == 1 and parts[0][1] == 131072, parts
h.shutdown()
print("all kept")
"#;
    assert!(bench.nbdsh(&["--base-allocation", "-u", &bench.uri()], script).contains("all kept"));
}

#[test]
fn nbdsh_serves_old_clients_too() {
    let Some(bench) = Bench::with_tools(&["nbdsh"]) else { return };
    let script = r#"
for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_MASK):
    for structured in (False, True):
        c = nbd.NBD()
        c.set_handshake_flags(flags)
        c.set_request_structured_replies(structured)
        if structured:
            c.add_meta_context("base:allocation")
        c.set_export_name("vm1")
        c.connect_unix(SOCKET)
        c.pwrite(b"y" * 4096, 0)
        assert c.pread(4096, 0) == b"y" * 4096
        c.shutdown()
c = nbd.NBD()
c.set_opt_mode(True)
c.connect_unix(SOCKET)
names = []
c.opt_list(lambda name, description: names.append(name) or 0)
assert names == ["vm1"], names
c.set_export_name("nope")
try:
    c.opt_info()
    raise AssertionError("no such export")
except nbd.Error:
    pass
c.set_export_name("vm1")
c.opt_info()
contexts = []
c.opt_list_meta_context(lambda name: contexts.append(name) or 0)
assert contexts == ["base:allocation"], contexts
c.opt_abort()
print("all served")
"#;
    let script = script.replace("SOCKET", &format!("{:?}", bench.file("nbd.sock").display().to_string()));
    assert!(bench.nbdsh(&[], &script).contains("all served"));
}

#[test]
fn qemu_io_writes_discards_zeroes_and_reads_with_all_its_flags() {
    let Some(bench) = Bench::with_tools(&["qemu-io"]) else { return };
    let output = bench.qemu_io(&[
        "write -P 7 0 1M",
        "write -f -P 8 1M 64k",
        "read -P 7 0 1M",
        "read -P 8 1M 64k",
        "write -z 4k 8k",
        "read -P 0 4k 8k",
        "write -z -u 16k 16k",
        "read -P 0 16k 16k",
        "write -z -u -f 32k 512",
        "read -P 0 32k 512",
        "read -P 7 33280 512",
        "discard 64k 128k",
        "read -P 0 64k 128k",
        "flush",
        "writev -P 9 2M 64k 128k 4k",
        "readv -P 9 2M 4k 128k 64k",
        "aio_write -P 5 3M 1M",
        "aio_write -z -u 4M 2M",
        "aio_flush",
        "read -P 5 3M 1M",
        "read -P 7 512k 512k",
    ]);
    let said = text(&output);
    assert!(output.status.success() && !said.contains("failed") && !said.contains("Pattern"), "{said}");
    assert!(bench.export.counters.fua.load(Ordering::Relaxed) >= 2, "FUA is sent as FUA");
}

#[test]
fn qemu_img_converts_compares_maps_and_measures() {
    let Some(bench) = Bench::with_tools(&["qemu-img"]) else { return };
    let (source, target) = (bench.file("in.img"), bench.file("out.qcow2"));
    image(&source);
    let (uri, source, target) = (&*bench.uri(), name(&source), name(&target));
    succeed("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, uri]);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, uri]);
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-m", "16", "-W", uri, target]);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", source, target]);
    let map = succeed("qemu-img", &["map", "-f", "raw", "--output=json", uri]);
    assert!(map.contains("\"data\": false") && map.contains("\"data\": true"), "{map}");
    succeed("qemu-img", &["bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "-s", "4k", uri]);
}

#[test]
fn qemu_in_extended_style_asks_for_the_map_of_more_than_4_gib_at_once() {
    let Some(_) = Bench::with_tools(&["qemu-img"]) else { return };
    let bench = Bench::new(1 << 44);
    let map = succeed("qemu-img", &["map", "-f", "raw", "--output=json", &bench.uri()]);
    assert_eq!(map.matches("start").count(), 1, "16 TiB are one hole: {map}");
    let output = bench.qemu_io(&["write -z -u -n 0 1T", "read -P 0 8T 64k", "write -P 3 1T 4k"]);
    assert!(output.status.success() && !text(&output).contains("failed"), "{}", text(&output));
}

#[test]
fn fio_verifies_what_it_wrote_at_random() {
    let Some(bench) = Bench::with_tools(&["fio"]) else { return };
    let uri = format!("--uri={}", bench.uri());
    let output = run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--bs_unaligned=0",
            "--iodepth=32",
            "--size=64M",
            "--verify=crc32c",
            "--do_verify=1",
            // Else it leaves a file in the source tree.
            "--verify_state_save=0",
            "--fsync=64",
        ],
    );
    assert!(output.status.success(), "{}", text(&output));
    assert!(bench.export.counters.flushes.load(Ordering::Relaxed) > 0);
}
