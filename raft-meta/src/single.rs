//! One replica: a durable log and a snapshot in one directory, no agreement with anybody.
//!
//! One task owns log and state. It takes what waits, writes it as one frame, flushes, applies, shows the new state and only then
//! answers: what was answered survives power loss, and a crash can lose only commands nobody heard of.

use crate::command::{Command, Outcome};
use crate::consensus::Consensus;
use crate::error::{FormatError, MetaError};
use crate::format;
use crate::state::MetaState;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use xsan_env::runtime::BoxFuture;
use xsan_env::{AppendFile, Directory, Env};

/// Name of the log in its directory.
pub const LOG_FILE: &str = "meta.log";
/// Name of the snapshot in its directory.
pub const SNAPSHOT_FILE: &str = "meta.snapshot";

/// Requests that wait for the task; further callers wait for a place.
const QUEUE_REQUESTS_MAX: usize = 256;
/// A batch is closed when its envelopes reach this size.
const BATCH_BYTES_MAX: usize = 4 << 20;
const _: () =
    assert!(BATCH_BYTES_MAX + format::COMMAND_BYTES_MAX + 4 * QUEUE_REQUESTS_MAX <= format::FRAME_PAYLOAD_MAX);

/// Settings of a replica.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A snapshot is written and the log cut when the log has this many bytes.
    pub log_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        // Some ten thousand commands: replayed in well under a second.
        Self { log_bytes_max: 4 << 20 }
    }
}

/// A single replica; clones share it. Ends when the last clone is gone or [`SingleReplica::close`] was called.
#[derive(Clone)]
pub struct SingleReplica {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
}

/// What readers see without asking the task.
struct Shared {
    view: Mutex<Arc<MetaState>>,
    applied: watch::Sender<u64>,
}

enum Request {
    Propose { command: Box<Command>, envelope: Vec<u8>, answer: oneshot::Sender<Result<Outcome, MetaError>> },
    Snapshot { answer: oneshot::Sender<Result<u64, MetaError>> },
    Close { answer: oneshot::Sender<()> },
}

impl SingleReplica {
    /// Makes the files of a new cluster and opens them.
    ///
    /// # Errors
    /// `Exists` if there is a snapshot; `Io`.
    pub async fn create(
        env: &Env,
        directory: Arc<dyn Directory>,
        options: Options,
        genesis: MetaState,
    ) -> Result<Self, FormatError> {
        if directory.read(SNAPSHOT_FILE).await?.is_some() {
            return Err(FormatError::Exists);
        }
        // The snapshot comes last: a log without one is a creation that was cut short, and is made anew.
        directory.replace_atomic(LOG_FILE, format::encode_log_header(genesis.cluster)).await?;
        directory.replace_atomic(SNAPSHOT_FILE, format::encode_snapshot(&genesis, 0)).await?;
        Self::open(env, directory, options).await
    }

    /// Opens what is there: snapshot, then log. A torn tail (nobody was answered) is cut off.
    ///
    /// # Errors
    /// `Absent` if there is no snapshot (a new cluster); everything else needs a person: nothing was changed.
    pub async fn open(env: &Env, directory: Arc<dyn Directory>, options: Options) -> Result<Self, FormatError> {
        let writer = Writer::open(directory, options).await?;
        let shared = Arc::clone(&writer.shared);
        let (requests, queue) = mpsc::channel(QUEUE_REQUESTS_MAX);
        env.spawn("meta log", writer.run(queue));
        Ok(Self { requests, shared })
    }

    /// Opens what is there, or makes it from `genesis`.
    ///
    /// # Errors
    /// As [`SingleReplica::open`], without `Absent`.
    pub async fn open_or_create(
        env: &Env,
        directory: Arc<dyn Directory>,
        options: Options,
        genesis: impl FnOnce() -> MetaState,
    ) -> Result<Self, FormatError> {
        match Self::open(env, Arc::clone(&directory), options).await {
            Err(FormatError::Absent) => Self::create(env, directory, options, genesis()).await,
            other => other,
        }
    }

    /// Ends the task after what waits is answered; later requests get `Closed`.
    pub async fn close(&self) {
        let (answer, done) = oneshot::channel();
        if self.requests.send(Request::Close { answer }).await.is_ok() {
            // An error says that the task ended before: closed all the same.
            done.await.ok();
        }
    }

    fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, MetaError>>) -> Request,
    ) -> BoxFuture<'static, Result<T, MetaError>> {
        let (answer, answered) = oneshot::channel();
        let (requests, request) = (self.requests.clone(), request(answer));
        Box::pin(async move {
            if requests.send(request).await.is_err() {
                return Err(MetaError::Closed);
            }
            // The task ended with the request in its queue, or in the middle of it: nobody knows.
            answered.await.unwrap_or(Err(MetaError::NoAnswer))
        })
    }
}

impl Consensus for SingleReplica {
    fn propose(&self, command: Command) -> BoxFuture<'static, Result<Outcome, MetaError>> {
        let envelope = format::encode_command(&command);
        if envelope.len() > format::COMMAND_BYTES_MAX {
            let bytes = envelope.len();
            return Box::pin(std::future::ready(Err(MetaError::TooLarge { bytes })));
        }
        self.ask(|answer| Request::Propose { command: Box::new(command), envelope, answer })
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
        // Everything is shown before it is answered.
        Box::pin(std::future::ready(Ok(*self.shared.applied.borrow())))
    }

    fn view(&self) -> Arc<MetaState> {
        Arc::clone(&self.shared.view.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.applied.subscribe()
    }

    fn snapshot(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
        self.ask(|answer| Request::Snapshot { answer })
    }
}

/// The task's state.
struct Writer {
    directory: Arc<dyn Directory>,
    /// `None` once a flush failed: what the file holds is not known then, and a repeated flush may lie.
    log: Option<Box<dyn AppendFile>>,
    state: Arc<MetaState>,
    /// Number of the last applied command.
    index: u64,
    shared: Arc<Shared>,
    options: Options,
    /// Size of the log at which the next snapshot is due.
    snapshot_at_bytes: u64,
}

type Proposal = (Box<Command>, oneshot::Sender<Result<Outcome, MetaError>>);

impl Writer {
    async fn open(directory: Arc<dyn Directory>, options: Options) -> Result<Self, FormatError> {
        let snapshot = directory.read(SNAPSHOT_FILE).await?.ok_or(FormatError::Absent)?;
        let (mut state, mut index) = format::decode_snapshot(&snapshot)?;
        let bytes = directory.read(LOG_FILE).await?.ok_or(FormatError::LogMissing)?;
        let log = format::decode_log(&bytes)?;
        if log.cluster != state.cluster {
            return Err(FormatError::Cluster { log: log.cluster, snapshot: state.cluster });
        }
        let mut replayed = 0u64;
        for frame in &log.frames {
            if frame.first_index > index + 1 {
                return Err(FormatError::Gap { found: frame.first_index, expected: index + 1 });
            }
            for (number, (offset, envelope)) in (frame.first_index..).zip(&frame.envelopes) {
                // Commands up to the snapshot's are left over from before the log could be cut.
                if number > index {
                    let command = format::decode_command(envelope, *offset as u64)?;
                    // Refusals are logged too, and are refused again.
                    state.apply(&command).ok();
                    index = number;
                    replayed += 1;
                }
            }
        }
        tracing::info!(index, replayed, cluster = %state.cluster, "opened the metadata log");
        let file = directory.append(LOG_FILE).await?;
        let torn_bytes = file.bytes().saturating_sub(log.good_bytes as u64);
        let state = Arc::new(state);
        let (applied, _) = watch::channel(index);
        let shared = Arc::new(Shared { view: Mutex::new(Arc::clone(&state)), applied });
        let snapshot_at_bytes = options.log_bytes_max;
        let mut writer = Self { directory, log: Some(file), state, index, shared, options, snapshot_at_bytes };
        if replayed > 0 || torn_bytes > 0 {
            writer.settle(log.good_bytes as u64, torn_bytes).await?;
        }
        Ok(writer)
    }

    /// Makes what was read stable before anybody sees it. The last frames may be in the page cache only: written by a process
    /// that died before its flush, or whose flush failed (then a second flush proves nothing). A new snapshot does not depend
    /// on them.
    async fn settle(&mut self, good_bytes: u64, torn_bytes: u64) -> io::Result<()> {
        if torn_bytes > 0 {
            tracing::warn!(bytes = torn_bytes, "the metadata log has a torn tail, which nobody was told of");
        }
        let Err(error) = self.write_snapshot().await else { return Ok(()) };
        tracing::warn!(%error, "no snapshot of the metadata at start; going on with the log as it is");
        let Some(log) = &mut self.log else { return Err(error) };
        if log.bytes() > good_bytes {
            log.truncate(good_bytes).await?;
        }
        log.sync().await
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut waiting = Vec::new();
        while queue.recv_many(&mut waiting, QUEUE_REQUESTS_MAX).await > 0 {
            let mut requests = waiting.drain(..).peekable();
            while let Some(request) = requests.next() {
                match request {
                    Request::Propose { command, envelope, answer } => {
                        let mut bytes = envelope.len();
                        let mut batch: Vec<Proposal> = vec![(command, answer)];
                        let mut envelopes = vec![envelope];
                        while bytes < BATCH_BYTES_MAX
                            && let Some(Request::Propose { command, envelope, answer }) =
                                requests.next_if(|next| matches!(next, Request::Propose { .. }))
                        {
                            bytes += envelope.len();
                            batch.push((command, answer));
                            envelopes.push(envelope);
                        }
                        self.commit(batch, &envelopes).await;
                    }
                    Request::Snapshot { answer } => {
                        let result = self.write_snapshot().await;
                        // A caller that is gone needs no answer; so everywhere below.
                        answer.send(result.map(|()| self.index).map_err(|_| MetaError::NoAnswer)).ok();
                    }
                    Request::Close { answer } => {
                        // Dropping the queue fails what waits in it; nothing of that was written.
                        queue.close();
                        drop(self);
                        answer.send(()).ok();
                        return;
                    }
                }
            }
        }
    }

    /// Writes, flushes, applies, shows, answers: in this order.
    async fn commit(&mut self, batch: Vec<Proposal>, envelopes: &[Vec<u8>]) {
        if let Err(error) = self.write(envelopes).await {
            tracing::error!(%error, commands = batch.len(), "the metadata log failed");
            for (_, answer) in batch {
                answer.send(Err(MetaError::NoAnswer)).ok();
            }
            return;
        }
        let state = Arc::make_mut(&mut self.state);
        let outcomes: Vec<_> = batch.into_iter().map(|(command, answer)| (state.apply(&command), answer)).collect();
        self.index += outcomes.len() as u64;
        self.show();
        for (outcome, answer) in outcomes {
            answer.send(outcome).ok();
        }
        if self.log.as_ref().is_some_and(|log| log.bytes() >= self.snapshot_at_bytes)
            && let Err(error) = self.write_snapshot().await
        {
            tracing::warn!(%error, "no snapshot of the metadata; the log goes on growing");
        }
    }

    async fn write(&mut self, envelopes: &[Vec<u8>]) -> io::Result<()> {
        let Some(log) = &mut self.log else { return Err(io::ErrorKind::BrokenPipe.into()) };
        // A failed append is cut back by the file (or poisons it): the next one may succeed, say after ENOSPC.
        log.append(format::encode_frame(self.index + 1, envelopes)).await?;
        if let Err(error) = log.sync().await {
            self.log = None;
            return Err(error);
        }
        Ok(())
    }

    fn show(&self) {
        *self.shared.view.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&self.state);
        self.shared.applied.send_replace(self.index);
    }

    /// Snapshot first, then an empty log: a crash in between leaves commands in the log that the snapshot has; they are
    /// skipped by their numbers.
    async fn write_snapshot(&mut self) -> io::Result<()> {
        let Some(log) = &self.log else { return Err(io::ErrorKind::BrokenPipe.into()) };
        // If this fails, try again only after as much log again.
        self.snapshot_at_bytes = log.bytes() + self.options.log_bytes_max;
        let snapshot = format::encode_snapshot(&self.state, self.index);
        self.directory.replace_atomic(SNAPSHOT_FILE, snapshot).await?;
        // The handle on the old file must not take another command: the file may be gone.
        self.log = None;
        let header = format::encode_log_header(self.state.cluster);
        let replaced = self.directory.replace_atomic(LOG_FILE, header).await;
        // Old or new content, both are right; but it must be open.
        let log = self.directory.append(LOG_FILE).await?;
        if replaced.is_ok() {
            self.snapshot_at_bytes = self.options.log_bytes_max;
        }
        self.log = Some(log);
        replaced
    }
}
