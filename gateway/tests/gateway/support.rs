//! A server on exports in memory, and exports that can be held up or made to fail.

use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use xsan_env::net::Stream;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufPool, Env, OsRuntime};
use xsan_gateway::client::{Client, ClientError, Connect, Negotiation};
use xsan_gateway::memory_export::{MemoryExport, MemoryExports};
use xsan_gateway::nbd::proto::Style;
use xsan_gateway::{Export, ExportError, ExportInfo, Limits, Peer, ReadPiece, Server, StatusExtent, Tls, Transport};

pub const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
pub const SIZE: u64 = 16 << 20;
pub const NAME: &str = "vm1";
/// Flags of a modern client.
pub const MODERN: u32 = 3;

/// An export that a test can hold up (operations start, and do not complete) or make fail.
pub struct Held {
    pub inner: MemoryExport,
    pub multi_conn: bool,
    held: watch::Sender<bool>,
    failure: Mutex<Option<ExportError>>,
    pub started: watch::Sender<usize>,
}

impl Held {
    pub fn new(inner: MemoryExport, multi_conn: bool) -> Arc<Self> {
        Arc::new(Self {
            inner,
            multi_conn,
            held: watch::Sender::new(false),
            failure: Mutex::new(None),
            started: watch::Sender::new(0),
        })
    }

    pub fn hold(&self) {
        self.held.send_replace(true);
    }

    pub fn release(&self) {
        self.held.send_replace(false);
    }

    pub fn fail_with(&self, error: Option<ExportError>) {
        *self.failure.lock().expect("test lock") = error;
    }

    /// Waits until so many operations have been started.
    pub async fn wait_started(&self, count: usize) {
        self.started.subscribe().wait_for(|started| *started >= count).await.expect("the export lives");
    }

    /// Runs `work` at the call, gives its result when not held any more.
    fn gate<T: Send + 'static>(
        &self,
        work: impl FnOnce(&MemoryExport) -> BoxFuture<'static, Result<T, ExportError>>,
    ) -> BoxFuture<'static, Result<T, ExportError>> {
        self.started.send_modify(|started| *started += 1);
        let failure = *self.failure.lock().expect("test lock");
        let work = work(&self.inner);
        let mut held = self.held.subscribe();
        Box::pin(async move {
            held.wait_for(|held| !held).await.expect("the export lives");
            match failure {
                Some(error) => Err(error),
                None => work.await,
            }
        })
    }
}

impl Export for Held {
    fn key(&self) -> String {
        self.inner.key()
    }
    fn info(&self) -> ExportInfo {
        ExportInfo { multi_conn: self.multi_conn, ..self.inner.info() }
    }
    fn read(&self, offset: u64, length: u32) -> BoxFuture<'static, Result<Vec<ReadPiece>, ExportError>> {
        self.gate(|inner| inner.read(offset, length))
    }
    fn write(&self, offset: u64, data: Buf, fua: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.gate(|inner| inner.write(offset, data, fua))
    }
    fn flush(&self) -> BoxFuture<'static, Result<(), ExportError>> {
        self.gate(|inner| inner.flush())
    }
    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.gate(|inner| inner.trim(offset, length, fua))
    }
    fn zero(&self, offset: u64, length: u64, fua: bool, no_hole: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.gate(|inner| inner.zero(offset, length, fua, no_hole))
    }
    fn status(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'static, Result<Vec<StatusExtent>, ExportError>> {
        self.gate(|inner| inner.status(offset, length, extents_max))
    }
}

/// A server with one export: `NAME`, and that is its key too, also when a test renames it.
pub struct World {
    pub env: Env,
    pub server: Server,
    pub export: Arc<Held>,
}

pub fn pool() -> BufPool {
    BufPool::new(0, 4 << 20)
}

impl World {
    pub fn new() -> Self {
        Self::with(true, Limits::default(), |_| {})
    }

    pub fn single() -> Self {
        Self::with(false, Limits::default(), |_| {})
    }

    pub fn with(multi_conn: bool, limits: Limits, change: impl FnOnce(&mut ExportInfo)) -> Self {
        let env = OsRuntime::current();
        let mut info = MemoryExport::new(NAME, SIZE, multi_conn, pool()).info();
        info.description = "a test volume".into();
        change(&mut info);
        let export = Held::new(MemoryExport::with_info(info, pool()), multi_conn);
        Self::serving(env, export, [], limits)
    }

    /// A server with more exports than the one that is looked at.
    pub fn beside(multi_conn: bool, others: impl IntoIterator<Item = Arc<dyn Export>>) -> Self {
        let export = Held::new(MemoryExport::new(NAME, SIZE, multi_conn, pool()), multi_conn);
        Self::serving(OsRuntime::current(), export, others, Limits::default())
    }

    fn serving(env: Env, export: Arc<Held>, others: impl IntoIterator<Item = Arc<dyn Export>>, limits: Limits) -> Self {
        let exports = MemoryExports::new([Arc::clone(&export) as Arc<dyn Export>].into_iter().chain(others));
        let server = Server::new(env.clone(), pool(), Arc::new(exports), limits);
        Self { env, server, export }
    }

    /// A raw connection without TLS.
    pub fn dial(&self) -> Stream {
        self.dial_tls(Tls::off())
    }

    pub fn dial_tls(&self, tls: Tls) -> Stream {
        let (ours, theirs) = Stream::memory_pair(256 << 10);
        let server = self.server.clone();
        let peer = Peer { transport: Transport::Unix, address: "test".into() };
        drop(self.env.spawn("test server", async move { server.serve(theirs, peer, &tls).await }));
        ours
    }

    pub async fn haggle(&self) -> Negotiation<Stream> {
        Negotiation::start(self.dial(), MODERN).await.expect("a greeting")
    }

    pub async fn connect(&self, style: Style) -> Client<Stream> {
        self.connect_to(NAME, style).await
    }

    pub async fn connect_to(&self, name: &str, style: Style) -> Client<Stream> {
        Client::connect(self.dial(), &Connect::in_style(name, style)).await.expect("a connection")
    }
}

/// Whether the server has closed the connection, perhaps after some bytes.
pub async fn is_closed(stream: &Stream) -> bool {
    let mut waste = [0; 4096];
    loop {
        match stream.read(&mut waste).await {
            Ok(0) | Err(_) => return true,
            Ok(_) => {}
        }
    }
}

/// The kind of reply an option was refused with.
pub fn refused(error: &ClientError) -> Option<u32> {
    match error {
        ClientError::Refused { kind, .. } => Some(*kind),
        _ => None,
    }
}

/// Deterministic bytes.
pub fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).expect("small") ^ seed).collect()
}
