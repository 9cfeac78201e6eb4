//! What the wire costs: appends to a node that answers at once, called directly, over TCP, and over TCP with TLS.
//!
//! ```text
//! cargo run --release -p xsan-benches --bin wire [-- SECONDS [FILTER]]
//! ```
//!
//! - Client and server are two processes with one thread each, on the loopback interface of one machine.
//! - CPU is user and system time of each process (`/proc/PID/stat`) divided by calls; "direct" is a call in one process.
//! - Three rounds, ways interleaved; the median counts. FILTER keeps the rows that contain it, for
//!   example `4 KiB qd32` or `TLS`.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a benchmark measures the real clock")]

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::future::ready;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufPool, Env, Listener, OsRuntime, Stream};
use xsan_types::{
    ClosedMember, ClusterId, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, NodeId, PgId, PoolId,
    RegisterView, SealedSegment, SegmentName, SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};
use xsan_wire::{Ca, Connect, Endpoint, NodeKey, Peer, RemoteNode, Server, Services, Tls};

const CLUSTER: ClusterId = ClusterId(1);
const SEGMENT: SegmentName =
    SegmentName { volume: VolumeId(1), generation: Generation(1), number: 1, pg: PgId { pool: PoolId(1), index: 0 } };
const CLIENT: NodeId = NodeId(1);
const SERVER: NodeId = NodeId(2);
const WAYS: [&str; 3] = ["direct", "TCP", "TCP + TLS"];
const ROUNDS: usize = 3;
/// Ticks of `/proc/PID/stat` in a second, on every Linux we meet.
const TICKS: f64 = 100.0;

/// Takes appends and nothing else.
struct Sink;

fn no<T: Send + 'static>() -> NodeResult<T> {
    Box::pin(ready(Err(NodeError::Invalid)))
}

impl NodeApi for Sink {
    fn append(&self, _: MemberRef, _: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        let length = offset + data.len() as u64;
        Box::pin(ready(Ok(length)))
    }
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        no()
    }
    fn create_member(&self, _: CreateMember) -> NodeResult<CreatedMember> {
        no()
    }
    fn flush(&self, _: FlushRequest) -> NodeResult<()> {
        no()
    }
    fn confirm(&self, _: MemberRef) -> NodeResult<()> {
        no()
    }
    fn close(&self, _: DeviceId, _: VolumeId, _: Generation) -> NodeResult<Vec<ClosedMember>> {
        no()
    }
    fn read_replica(&self, _: DeviceId, _: VolumeId, _: SetId, _: SegmentName, _: u64, _: u32) -> NodeResult<Buf> {
        no()
    }
    fn sealed(&self, _: MemberRef, _: SealedSegment) -> NodeResult<()> {
        no()
    }
    fn trim_manifest(&self, _: MemberRef, _: u64, _: Vec<u64>) -> NodeResult<()> {
        no()
    }
    fn registered(&self, _: RegisterView) -> NodeResult<()> {
        no()
    }
    fn put_shard(&self, _: PutShard) -> NodeResult<()> {
        no()
    }
    fn hold_shard(&self, _: HoldShard) -> NodeResult<()> {
        no()
    }
    fn read_shard(&self, _: DeviceId, _: ShardId, _: u64, _: u32) -> NodeResult<Buf> {
        no()
    }
    fn repair_shard(&self, _: DeviceId, _: ShardId, _: u64, _: Buf) -> NodeResult<()> {
        no()
    }
    fn shard_info(&self, _: DeviceId, _: ShardId) -> NodeResult<ShardInfo> {
        no()
    }
    fn verify_shard(&self, _: DeviceId, _: ShardId) -> NodeResult<()> {
        no()
    }
    fn delete_segments(&self, _: Vec<SegmentName>) -> NodeResult<()> {
        no()
    }
    fn list_shards(&self, _: DeviceId, _: VolumeId, _: Option<ShardId>, _: u32) -> NodeResult<Vec<ShardInfo>> {
        no()
    }
    fn append_shard(&self, _: DeviceId, _: Incarnation, _: ShardId, _: u64, _: Vec<Buf>) -> NodeResult<u64> {
        no()
    }
    fn finish_shard(&self, _: DeviceId, _: Incarnation, _: ShardId, _: u64, _: [u8; 32]) -> NodeResult<()> {
        no()
    }
}

/// PEM texts that make a node's TLS.
struct Papers {
    ca: String,
    certificate: String,
    key: String,
}

impl Papers {
    fn issue(ca: &Ca, node: NodeId) -> Self {
        let key = NodeKey::new().expect("a key");
        let certificate = ca.issue(node, key.public()).expect("a certificate");
        Self { ca: ca.certificate_pem().to_owned(), certificate, key: key.pem() }
    }

    fn tls(&self, env: &Env) -> Arc<Tls> {
        Tls::new(env, CLUSTER, &self.ca, &self.certificate, &self.key).expect("usable")
    }
}

fn endpoint(env: &Env, node: NodeId, papers: Option<&Papers>) -> Endpoint {
    let endpoint = Endpoint::new(env, BufPool::new(0, 16 << 20), CLUSTER, node);
    match papers {
        Some(papers) => endpoint.with_tls(papers.tls(env)),
        None => endpoint,
    }
}

/// The server process: prints its port, serves until its parent closes its input.
fn serve() {
    let var = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let papers = var("XSAN_BENCH_CA").map(|ca| Papers {
        ca,
        certificate: var("XSAN_BENCH_CERTIFICATE").expect("given with the CA"),
        key: var("XSAN_BENCH_KEY").expect("given with the CA"),
    });
    let runtime = xsan_env::os::build_runtime(1).expect("a thread");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let server = Server::new(&endpoint(&env, SERVER, papers.as_ref()), Services::new().with_node(Arc::new(Sink)));
        let listener = Listener::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("a port");
        println!("{}", listener.tcp_address().expect("TCP"));
        let waiting = env.spawn("serve", async move { server.serve(listener).await });
        env.blocking(|| std::io::stdin().read_line(&mut String::new())).await.expect("input");
        waiting.abort();
    });
}

struct Remote {
    process: Child,
    address: SocketAddr,
}

fn start(papers: Option<&Papers>) -> Remote {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
    if let Some(papers) = papers {
        command.env("XSAN_BENCH_CA", &papers.ca);
        command.env("XSAN_BENCH_CERTIFICATE", &papers.certificate);
        command.env("XSAN_BENCH_KEY", &papers.key);
    }
    let mut process = command.spawn().expect("started");
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().expect("piped")).read_line(&mut line).expect("its address");
    Remote { address: line.trim().parse().expect("an address"), process }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(mut input) = self.process.stdin.take() {
            input.write_all(b"\n").expect("it listens");
        }
        self.process.wait().expect("it ends");
    }
}

/// CPU seconds of a process.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    (fields[11].parse::<f64>().expect("user") + fields[12].parse::<f64>().expect("system")) / TICKS
}

/// Calls a second, microseconds of CPU per call of this process and of the other.
type Sample = (f64, f64, f64);

async fn measure(node: &dyn NodeApi, bytes: usize, depth: usize, length: Duration, other: Option<u32>) -> Sample {
    let member =
        MemberRef { device: DeviceId(1), volume: VolumeId(1), set: SetId::default(), incarnation: Incarnation(1) };
    let data = BufPool::new(0, 0).get_zeroed(bytes).freeze();
    let call = || node.append(member, SEGMENT, 0, data.clone());
    call().await.expect("answered");
    let (own_before, other_before) = (cpu(std::process::id()), other.map_or(0.0, cpu));
    let begun = Instant::now();
    let mut running: FuturesUnordered<_> = (0..depth).map(|_| call()).collect();
    let mut calls = 0u64;
    while begun.elapsed() < length {
        for _ in 0..64 {
            running.next().await.expect("some run").expect("answered");
            running.push(call());
            calls += 1;
        }
        xsan_env::yield_now().await;
    }
    while let Some(answer) = running.next().await {
        answer.expect("answered");
        calls += 1;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let per_call = |before: f64, after: f64| (after - before) * 1e6 / calls as f64;
    let own = per_call(own_before, cpu(std::process::id()));
    (calls as f64 / seconds, own, other.map_or(0.0, |pid| per_call(other_before, cpu(pid))))
}

async fn measure_remote(
    env: &Env,
    papers: Option<&(Papers, Papers)>,
    bytes: usize,
    depth: usize,
    length: Duration,
) -> Sample {
    let remote = start(papers.map(|(_, server)| server));
    let address = remote.address;
    let connect: Arc<dyn Connect> =
        Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> { Box::pin(Stream::connect_tcp(address)) });
    let peer = Peer::new(&endpoint(env, CLIENT, papers.map(|(client, _)| client)), SERVER, &connect);
    let node = RemoteNode::new(peer);
    measure(&node, bytes, depth, length, Some(remote.process.id())).await
}

fn median(mut samples: Vec<Sample>) -> Sample {
    samples.sort_by(|one, other| one.0.total_cmp(&other.0));
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

async fn compare(env: &Env, length: Duration, filter: &str) {
    let ca = Ca::new(CLUSTER).expect("a CA");
    let papers = (Papers::issue(&ca, CLIENT), Papers::issue(&ca, SERVER));
    println!("| append | way | calls/s | CPU us client | CPU us server | CPU us both | of plain TCP |");
    println!("|---|---|--:|--:|--:|--:|--:|");
    for (bytes, depth) in [(4 << 10, 1), (4 << 10, 32), (64 << 10, 32)] {
        let name = format!("{} KiB qd{depth}", bytes >> 10);
        let mut samples: [Vec<Sample>; 3] = Default::default();
        for _ in 0..ROUNDS {
            for (way, samples) in WAYS.iter().zip(&mut samples) {
                if format!("{name} {way}").contains(filter) {
                    samples.push(match *way {
                        "direct" => measure(&Sink, bytes, depth, length, None).await,
                        "TCP" => measure_remote(env, None, bytes, depth, length).await,
                        _ => measure_remote(env, Some(&papers), bytes, depth, length).await,
                    });
                }
            }
        }
        let samples = samples.map(median);
        for (way, (rate, client, server)) in WAYS.iter().zip(samples) {
            if rate == 0.0 {
                continue;
            }
            let both = client + server;
            let ratio = both / (samples[1].1 + samples[1].2);
            println!("| {name} | {way} | {rate:.0} | {client:.2} | {server:.2} | {both:.2} | {ratio:.2}x |");
        }
    }
}

fn main() {
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("serve") {
        return serve();
    }
    let filter = std::env::args().nth(2).unwrap_or_default();
    let seconds = argument.map_or(3, |text| text.parse().expect("seconds"));
    let runtime = xsan_env::os::build_runtime(1).expect("a thread");
    let env = runtime.block_on(async { OsRuntime::current() });
    // The caller is a task of the runtime's one thread, as it is in a gateway.
    let (done, outcome) = std::sync::mpsc::channel();
    let task_env = env.clone();
    drop(env.spawn("bench", async move {
        compare(&task_env, Duration::from_secs(seconds), &filter).await;
        done.send(()).expect("waited for");
    }));
    outcome.recv().expect("it ends");
}
