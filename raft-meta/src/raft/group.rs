//! The shell around a replica's core: one task that owns core and files, fed by queues and a clock.
//!
//! Whatever waits is taken together, so that one flush serves all of it. Nothing runs when nothing happens: a group of one
//! voter sets no timer, a larger one ticks as often as its heartbeat needs.

use crate::command::{Command, Outcome};
use crate::consensus::Consensus;
use crate::error::{FormatError, MetaError};
use crate::format::{COMMAND_BYTES_MAX, encode_command};
use crate::raft::core::{Answer, Core, Fault, MembershipError, Status, Ticks, Write};
use crate::raft::entry::{ReplicaId, Role, Step};
use crate::raft::files::{self, Files};
use crate::raft::format::encode_raft_snapshot;
use crate::raft::machine::Machine;
use crate::raft::message::decode;
use crate::raft::requests::Ticket;
use crate::state::MetaState;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use xsan_env::runtime::BoxFuture;
use xsan_env::{Directory, Env};
use xsan_types::{ClusterId, NodeId};

/// Requests that wait for the task; further callers wait for a place.
const QUEUE_REQUESTS_MAX: usize = 256;
/// Messages that wait for the task; further ones are dropped, as the network may do: what they said is said again.
const QUEUE_MESSAGES_MAX: usize = 1024;
/// Messages taken before what they ask for is done.
const BATCH_MESSAGES_MAX: usize = 64;
/// Until the next try when the file system is full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Brings messages to other replicas: one way, lossy, without waiting. What cannot be sent now is dropped.
pub trait RaftTransport: Send + Sync + 'static {
    /// Sends `message` (at most [`crate::raft::message::MESSAGE_BYTES_MAX`] bytes); at the other end it goes into
    /// [`RaftGroup::deliver`], with the sender the connection belongs to.
    fn send(&self, to: ReplicaId, message: Vec<u8>);
}

/// Settings of a replica. All replicas of a group should have the same.
#[derive(Clone, Copy, Debug)]
pub struct GroupOptions {
    /// A snapshot is written and the log cut when the log has grown by this many bytes.
    pub log_bytes_max: u64,
    /// Length of a tick.
    pub tick: Duration,
    /// Times in ticks.
    pub ticks: Ticks,
    /// The leader makes learners voters and voters learners by itself ([`crate::raft::voters`]).
    pub automatic_voters: bool,
}

impl Default for GroupOptions {
    fn default() -> Self {
        // Heartbeats every 100 ms; a silent leader is replaced after 0.8 to 1.6 s; callers wait 10 s for an outcome.
        let ticks = Ticks { heartbeat: 1, election: 8, answer: 100, resend: 3, transfer: 30 };
        Self { log_bytes_max: 4 << 20, tick: Duration::from_millis(100), ticks, automatic_voters: true }
    }
}

/// A replica of the group; clones share it. Ends when [`RaftGroup::close`] was called or the last clone is gone.
#[derive(Clone)]
pub struct RaftGroup {
    replica: ReplicaId,
    requests: mpsc::Sender<Request>,
    messages: mpsc::Sender<(ReplicaId, Vec<u8>)>,
    shared: Arc<Shared>,
}

/// What readers see without asking the task.
struct Shared {
    view: Mutex<Arc<MetaState>>,
    applied: watch::Sender<u64>,
    status: watch::Sender<Status>,
}

type ProposalAnswer = oneshot::Sender<Result<Outcome, MetaError>>;
type IndexAnswer = oneshot::Sender<Result<u64, MetaError>>;
type MembersAnswer = oneshot::Sender<Result<(), MembershipError>>;

enum Request {
    Propose { envelope: Vec<u8>, answer: ProposalAnswer },
    Read { answer: IndexAnswer },
    Snapshot { answer: IndexAnswer },
    Members { steps: Vec<Step>, answer: MembersAnswer },
    Transfer { to: ReplicaId, answer: MembersAnswer },
    Close { answer: oneshot::Sender<()> },
}

impl RaftGroup {
    /// Makes the first replica of a new cluster on `node`, its only voter, and opens it.
    ///
    /// # Errors
    /// `Exists` if there is metadata; `Io`.
    pub async fn create(
        env: &Env,
        directory: Arc<dyn Directory>,
        transport: Arc<dyn RaftTransport>,
        options: GroupOptions,
        node: NodeId,
        genesis: MetaState,
    ) -> Result<Self, FormatError> {
        files::create_first(&directory, draw_replica(env), node, genesis).await?;
        Self::open(env, directory, transport, options).await
    }

    /// Makes a replica that is to join `cluster`, under an id never used before, and opens it. It knows nothing until the
    /// leader has made it a learner ([`RaftGroup::add_learner`] with [`RaftGroup::replica`]).
    ///
    /// # Errors
    /// `Exists` if there is metadata; `Io`.
    pub async fn join(
        env: &Env,
        directory: Arc<dyn Directory>,
        transport: Arc<dyn RaftTransport>,
        options: GroupOptions,
        cluster: ClusterId,
    ) -> Result<Self, FormatError> {
        files::create_joining(&directory, draw_replica(env), cluster).await?;
        Self::open(env, directory, transport, options).await
    }

    /// Opens what is there. A single voter is up to date when this returns.
    ///
    /// # Errors
    /// `Absent` if there is nothing (create or join); everything else needs a person.
    pub async fn open(
        env: &Env,
        directory: Arc<dyn Directory>,
        transport: Arc<dyn RaftTransport>,
        options: GroupOptions,
    ) -> Result<Self, FormatError> {
        let (files, stored) = files::open(directory).await?;
        let core = Core::new(stored, options.ticks, env.random(), options.automatic_voters);
        let (requests, request_queue) = mpsc::channel(QUEUE_REQUESTS_MAX);
        let (messages, message_queue) = mpsc::channel(QUEUE_MESSAGES_MAX);
        let status = core.status();
        let replica = status.replica;
        tracing::info!(%replica, index = status.applied, term = status.term, "opened a replica of the metadata");
        let shared = Arc::new(Shared {
            view: Mutex::new(Arc::clone(&core.machine().state)),
            applied: watch::Sender::new(status.applied),
            status: watch::Sender::new(status),
        });
        let mut shell = Shell {
            env: env.clone(),
            core,
            snapshot_at_bytes: files.bytes() + options.log_bytes_max,
            files,
            transport,
            shared: Arc::clone(&shared),
            options,
            requests: request_queue,
            messages: message_queue,
            waiting: BTreeMap::new(),
            next_ticket: 0,
            snapshot_answers: Vec::new(),
            storing: None,
            closing: None,
        };
        shell.drive().await;
        env.spawn("meta raft", shell.run());
        Ok(Self { replica, requests, messages, shared })
    }

    /// Opens what is there; what a [`crate::SingleReplica`] left becomes a group of one voter on `node`, for good.
    ///
    /// # Errors
    /// As [`RaftGroup::open`].
    pub async fn open_or_migrate(
        env: &Env,
        directory: Arc<dyn Directory>,
        transport: Arc<dyn RaftTransport>,
        options: GroupOptions,
        node: NodeId,
    ) -> Result<Self, FormatError> {
        files::migrate_single(&directory, draw_replica(env), node).await?;
        Self::open(env, directory, transport, options).await
    }

    /// This replica.
    #[must_use]
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// A message from `from`, as the connection it came on tells. Never waits: dropped when too many wait.
    pub fn deliver(&self, from: ReplicaId, message: Vec<u8>) {
        // Full or closed: lost, as messages may be.
        self.messages.try_send((from, message)).ok();
    }

    /// Who leads, who votes, how far this replica is; follows every change.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Makes a replica on `node` a member that gets everything and does not vote yet.
    ///
    /// # Errors
    /// See [`MembershipError`]. `Ok`: it was proposed; done when [`Status::members`] says so.
    pub async fn add_learner(&self, replica: ReplicaId, node: NodeId) -> Result<(), MembershipError> {
        self.change_members(vec![Step { replica, node, role: Role::Learner }]).await
    }

    /// Proposes a change of members; several voters at once go through a joint configuration.
    ///
    /// # Errors
    /// As [`RaftGroup::add_learner`].
    pub async fn change_members(&self, steps: Vec<Step>) -> Result<(), MembershipError> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Members { steps, answer }).await.ok();
        answered.await.unwrap_or(Err(MembershipError::NotLeader { leader: None }))
    }

    /// Asks the leader, this replica, to hand the lead to a voter. `Ok`: it has begun; [`RaftGroup::status`] shows the end.
    ///
    /// # Errors
    /// `NotLeader`, `Role`.
    pub async fn transfer_lead(&self, to: ReplicaId) -> Result<(), MembershipError> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Transfer { to, answer }).await.ok();
        answered.await.unwrap_or(Err(MembershipError::NotLeader { leader: None }))
    }

    /// Ends the task; what waits gets `NoAnswer`, later requests `Closed`.
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

/// Never 0, which means nobody.
fn draw_replica(env: &Env) -> ReplicaId {
    ReplicaId(env.random().max(1))
}

impl Consensus for RaftGroup {
    fn propose(&self, command: Command) -> BoxFuture<'static, Result<Outcome, MetaError>> {
        let envelope = encode_command(&command);
        if envelope.len() > COMMAND_BYTES_MAX {
            let bytes = envelope.len();
            return Box::pin(std::future::ready(Err(MetaError::TooLarge { bytes })));
        }
        self.ask(|answer| Request::Propose { envelope, answer })
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
        self.ask(|answer| Request::Read { answer })
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

enum Waiter {
    Proposal(ProposalAnswer),
    Read(IndexAnswer),
}

type Stored = (Machine, Arc<[u8]>, io::Result<()>);

/// The task's state.
struct Shell {
    env: Env,
    core: Core,
    files: Files,
    transport: Arc<dyn RaftTransport>,
    shared: Arc<Shared>,
    options: GroupOptions,
    requests: mpsc::Receiver<Request>,
    messages: mpsc::Receiver<(ReplicaId, Vec<u8>)>,
    /// Callers by ticket. Bounded by what the core takes.
    waiting: BTreeMap<Ticket, Waiter>,
    next_ticket: Ticket,
    snapshot_answers: Vec<IndexAnswer>,
    /// A snapshot being written beside the log; never two, and never while another one is installed.
    storing: Option<oneshot::Receiver<Stored>>,
    /// Size of the log at which the next snapshot is due.
    snapshot_at_bytes: u64,
    closing: Option<oneshot::Sender<()>>,
}

enum Event {
    Tick,
    Stored(Option<Stored>),
    Message(Option<(ReplicaId, Vec<u8>)>),
    Request(Option<Request>),
}

impl Shell {
    async fn run(mut self) {
        let mut timer: Option<BoxFuture<'static, ()>> = None;
        let mut ended = false;
        while !ended && self.closing.is_none() {
            if !self.core.needs_ticks() {
                timer = None;
            } else if timer.is_none() {
                timer = Some(self.env.sleep(self.options.tick));
            }
            match self.next(&mut timer).await {
                Event::Tick => {
                    timer = None;
                    self.core.tick();
                }
                Event::Stored(stored) => self.stored(stored).await,
                Event::Message(message) => self.take_messages(message),
                Event::Request(None) => ended = true,
                Event::Request(request) => self.take_requests(request),
            }
            self.drive().await;
        }
        self.end().await;
    }

    /// The clock goes first: messages without end must not stop it.
    async fn next(&mut self, timer: &mut Option<BoxFuture<'static, ()>>) -> Event {
        tokio::select! {
            biased;
            () = ready_or_never(timer.as_mut()) => Event::Tick,
            stored = ready_or_never(self.storing.as_mut()) => Event::Stored(stored.ok()),
            message = self.messages.recv() => Event::Message(message),
            request = self.requests.recv(), if !self.core.is_full() => Event::Request(request),
        }
    }

    fn take_messages(&mut self, first: Option<(ReplicaId, Vec<u8>)>) {
        let mut batch: Vec<_> = first.into_iter().collect();
        while batch.len() < BATCH_MESSAGES_MAX
            && let Ok(message) = self.messages.try_recv()
        {
            batch.push(message);
        }
        for (from, bytes) in batch {
            let taken = decode(&bytes).and_then(|message| self.core.deliver(from, message));
            if let Err(error) = taken {
                tracing::warn!(%from, %error, "dropped a message");
            }
        }
    }

    fn take_requests(&mut self, first: Option<Request>) {
        let mut next = first;
        while let Some(request) = next {
            self.take_request(request);
            next = if self.core.is_full() || self.closing.is_some() { None } else { self.requests.try_recv().ok() };
        }
    }

    fn take_request(&mut self, request: Request) {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        match request {
            Request::Propose { envelope, answer } => {
                self.waiting.insert(ticket, Waiter::Proposal(answer));
                self.core.propose(ticket, envelope);
            }
            Request::Read { answer } => {
                self.waiting.insert(ticket, Waiter::Read(answer));
                self.core.read(ticket);
            }
            Request::Snapshot { answer } => self.snapshot_answers.push(answer),
            // A caller that is gone needs no answer; so everywhere below.
            Request::Members { steps, answer } => drop(answer.send(self.core.change_members(&steps))),
            Request::Transfer { to, answer } => drop(answer.send(self.core.transfer_lead(to))),
            Request::Close { answer } => self.closing = Some(answer),
        }
    }

    /// Does what follows from what was taken, until nothing is left.
    async fn drive(&mut self) {
        loop {
            let write = self.core.poll();
            self.give_out();
            let Some(write) = write else { break };
            if !self.persist(&write).await {
                break;
            }
            self.core.written();
            self.give_out();
        }
        self.start_snapshot();
    }

    /// Shows the new state, answers, sends: in this order.
    fn give_out(&mut self) {
        let machine = self.core.machine();
        if *self.shared.applied.borrow() != machine.index {
            *self.shared.view.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&machine.state);
            self.shared.applied.send_replace(machine.index);
        }
        // Who the members are changes with the index only.
        let changed = {
            let shown = self.shared.status.borrow();
            (shown.term, shown.leader, shown.applied, shown.faulty) != self.core.glance()
        };
        if changed {
            self.shared.status.send_replace(self.core.status());
        }
        for answer in self.core.take_answers() {
            match answer {
                Answer::Proposed(ticket, outcome) => {
                    if let Some(Waiter::Proposal(answer)) = self.waiting.remove(&ticket) {
                        answer.send(outcome).ok();
                    }
                }
                Answer::Read(ticket, index) => {
                    if let Some(Waiter::Read(answer)) = self.waiting.remove(&ticket) {
                        answer.send(index).ok();
                    }
                }
            }
        }
        for (to, message) in self.core.take_outbox() {
            self.transport.send(to, message);
        }
    }

    /// Makes a write durable, however long the file system is full; `false`: the replica has stopped.
    async fn persist(&mut self, write: &Write) -> bool {
        if matches!(write, Write::Install { .. }) {
            // A snapshot of our own that is still being written must not end up over the newer one.
            if let Some(storing) = self.storing.take() {
                storing.await.ok();
            }
            self.refuse_snapshots();
        }
        loop {
            let result = match write {
                Write::Append { state, entries } => self.files.append(state, entries).await,
                Write::Install { snapshot, base, state, entries } => {
                    let result = self.files.install(Arc::clone(snapshot), *base, state, entries).await;
                    self.snapshot_at_bytes = self.files.bytes() + self.options.log_bytes_max;
                    result
                }
            };
            match result {
                Ok(()) => return true,
                Err(error) => {
                    if !self.survive(error).await {
                        return false;
                    }
                }
            }
        }
    }

    /// After a failed write: a full file system is waited for, with all callers told that nobody knows; anything else stops
    /// the replica, because what the disk holds is not known any more. Answers whether to try again.
    async fn survive(&mut self, error: io::Error) -> bool {
        if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.core.fail(Fault::Log(error));
            self.give_out();
            return false;
        }
        tracing::error!(%error, "no room for the metadata log; waiting for some");
        self.core.give_up();
        self.give_out();
        let mut wait = self.env.sleep(RETRY_AFTER);
        loop {
            let request = tokio::select! {
                biased;
                () = &mut wait => return self.closing.is_none(),
                request = self.requests.recv(), if self.closing.is_none() => request,
                // Lost, as messages may be: this replica cannot say anything.
                _ = self.messages.recv() => continue,
            };
            match request {
                Some(Request::Propose { answer, .. }) => drop(answer.send(Err(MetaError::NoAnswer))),
                Some(Request::Read { answer } | Request::Snapshot { answer }) => {
                    drop(answer.send(Err(MetaError::NoAnswer)));
                }
                Some(Request::Members { answer, .. } | Request::Transfer { answer, .. }) => {
                    drop(answer.send(Err(MembershipError::Busy)));
                }
                Some(Request::Close { answer }) => {
                    self.closing = Some(answer);
                    return false;
                }
                None => {
                    self.closing = Some(oneshot::channel().0);
                    return false;
                }
            }
        }
    }

    /// Begins a snapshot when one is due; it is encoded and written beside everything else.
    fn start_snapshot(&mut self) {
        let asked = !self.snapshot_answers.is_empty() || self.core.wants_snapshot();
        let due = self.files.bytes() >= self.snapshot_at_bytes;
        if self.storing.is_some() || !(asked || due) || self.core.fault().is_some() {
            if self.core.fault().is_some() {
                self.refuse_snapshots();
            }
            return;
        }
        // If this fails, try again only after as much log again.
        self.snapshot_at_bytes = self.files.bytes() + self.options.log_bytes_max;
        let machine = self.core.machine().clone();
        let (done, storing) = oneshot::channel();
        self.storing = Some(storing);
        let (env, directory) = (self.env.clone(), Arc::clone(self.files.directory()));
        self.env.spawn("meta snapshot", async move {
            let (machine, bytes) = env
                .blocking(move || {
                    let bytes: Arc<[u8]> = encode_raft_snapshot(&machine).into();
                    (machine, bytes)
                })
                .await;
            let result = files::store_snapshot(directory, Arc::clone(&bytes)).await;
            // The replica is gone: so is who waits.
            done.send((machine, bytes, result)).ok();
        });
    }

    /// A snapshot was written, or not: cuts the log.
    async fn stored(&mut self, stored: Option<Stored>) {
        self.storing = None;
        let Some((machine, bytes, Ok(()))) = stored else {
            if let Some((_, _, Err(error))) = stored {
                tracing::warn!(%error, "no snapshot of the metadata; the log goes on growing");
            }
            return self.refuse_snapshots();
        };
        self.core.snapshot_stored(&machine, bytes);
        loop {
            let keep = usize::try_from(self.options.log_bytes_max / 4).unwrap_or(usize::MAX);
            let (header, state, entries) = self.core.shorter_log(keep);
            match self.files.replace(&header, &state, &entries).await {
                Ok(()) => {
                    self.core.log_cut(header.base_index);
                    self.snapshot_at_bytes = self.files.bytes() + self.options.log_bytes_max;
                    for answer in self.snapshot_answers.drain(..) {
                        answer.send(Ok(machine.index)).ok();
                    }
                    return;
                }
                // Which of the two logs is there is not known, and whether it stays: nothing may be appended to either.
                Err(error) => {
                    if !self.survive(error).await {
                        return self.refuse_snapshots();
                    }
                }
            }
        }
    }

    fn refuse_snapshots(&mut self) {
        for answer in self.snapshot_answers.drain(..) {
            answer.send(Err(MetaError::NoAnswer)).ok();
        }
    }

    async fn end(mut self) {
        self.core.give_up();
        self.give_out();
        if let Some(storing) = self.storing.take() {
            // Whoever opens the directory next must not meet a snapshot still on its way.
            storing.await.ok();
        }
        let closing = self.closing.take();
        drop(self);
        if let Some(closing) = closing {
            closing.send(()).ok();
        }
    }
}

/// The future's output; for ever pending without one.
async fn ready_or_never<F: Future + Unpin>(future: Option<&mut F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
