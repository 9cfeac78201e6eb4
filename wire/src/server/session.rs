//! The server's side of a connection at work. Owner: the connection's task.
//!
//! Requests begin in the order in which they came; they end in any. Nothing that was begun is dropped: when the connection
//! is lost, the task goes on until the last call has ended.

use super::dispatch::{self, Outcome, Running};
use super::{Entry, Order, Shared};
use crate::error::ConnectError;
use crate::frame::{FrameError, Header, Input, Kind, Output};
use crate::payload::Payload;
use crate::service::{PeerInfo, Status};
use crate::timer::Timer;
use crate::transport::Transport;
use futures::stream::{FuturesUnordered, Stream as _, StreamExt};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use xsan_env::Moment;

/// Reads before answers get their turn again.
const READS_MAX: usize = 64;
/// How long the end of the stream may take to be sent.
const SHUTDOWN_FOR: Duration = Duration::from_secs(1);

/// A request under way.
struct Job {
    id: u64,
    service: u8,
    /// Bytes it holds until its answer is queued.
    bytes: u64,
    running: Running,
}

struct Finished {
    id: u64,
    service: u8,
    bytes: u64,
    outcome: Outcome,
}

impl Future for Job {
    type Output = Finished;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Finished> {
        let Self { id, service, bytes, .. } = *self;
        Pin::new(&mut self.running).poll(context).map(|outcome| Finished { id, service, bytes, outcome })
    }
}

struct Session<'a> {
    shared: &'a Shared,
    entry: &'a Entry,
    peer: PeerInfo,
    transport: Transport,
    input: Input,
    output: Output,
    unflushed: bool,
    jobs: FuturesUnordered<Job>,
    job_bytes: u64,
    /// The client will send no more.
    ended: bool,
    said_goodbye: bool,
    /// Counts sends that moved something.
    sends: u64,
    /// `sends` at the last look, and when to look again: a client that takes nothing is given up.
    stalled: Option<(u64, Moment)>,
    timer: Timer,
}

/// Serves a peer until the connection has ended and nothing it began is under way.
pub(super) async fn run(
    shared: &Arc<Shared>,
    entry: &Entry,
    transport: Transport,
    input: Input,
    peer: PeerInfo,
) -> Result<(), ConnectError> {
    let mut session = Session {
        shared,
        entry,
        peer,
        transport,
        input,
        output: Output::default(),
        unflushed: false,
        jobs: FuturesUnordered::new(),
        job_bytes: 0,
        ended: false,
        said_goodbye: false,
        sends: 0,
        stalled: None,
        timer: Timer::new(&shared.endpoint.env),
    };
    let end = poll_fn(|context| session.poll_run(context)).await;
    shared.is_quiet(entry);
    let Session { mut jobs, mut transport, .. } = session;
    if end.is_ok() {
        let shutdown = poll_fn(|context| transport.poll_shutdown(context));
        // A client that does not take it is gone anyway.
        let _: Option<std::io::Result<()>> = shared.endpoint.env.timeout(SHUTDOWN_FOR, shutdown).await;
    }
    drop(transport);
    while jobs.next().await.is_some() {}
    end
}

impl Session<'_> {
    fn poll_run(&mut self, context: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        self.entry.task.register(context.waker());
        loop {
            let order = if self.entry.is_cut() { Order::Cut } else { self.shared.order() };
            if order == Order::Cut {
                return Poll::Ready(Ok(()));
            }
            if order == Order::Drain && !std::mem::replace(&mut self.said_goodbye, true) {
                self.output.push(&Header::of(Kind::Goodbye), Payload::None, |_| {});
            }
            let mut progress = self.collect(context);
            match self.transport.poll_send(context, &mut self.output, &mut self.unflushed) {
                Poll::Pending => {}
                Poll::Ready(Ok(sent)) => {
                    self.sends += u64::from(sent);
                    progress |= sent;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(ConnectError::Io(error))),
            }
            if !self.ended && self.has_room() {
                progress |= self.receive(context)?;
            }
            if progress {
                continue;
            }
            let is_quiet = self.jobs.is_empty() && self.output.is_empty() && !self.unflushed;
            if is_quiet && (self.ended || self.said_goodbye) {
                return Poll::Ready(Ok(()));
            }
            return if self.is_stalled(context) { Poll::Ready(Err(ConnectError::Silent)) } else { Poll::Pending };
        }
    }

    /// Queues the answers of calls that have ended.
    fn collect(&mut self, context: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready(Some(finished)) = Pin::new(&mut self.jobs).poll_next(context) {
            let Finished { id, service, bytes, outcome } = finished;
            self.job_bytes -= bytes;
            dispatch::answer(&mut self.output, self.peer.version, service, id, outcome);
            progress = true;
        }
        progress
    }

    /// Whether another request may be read. Clients keep to half of this; one that does not is not read from, which
    /// bounds what it can make us hold.
    fn has_room(&self) -> bool {
        let limits = &self.shared.endpoint.limits;
        let bytes = self.job_bytes + self.output.bytes() as u64;
        self.jobs.len() < 2 * limits.requests_max as usize && bytes < 2 * limits.bytes_max
    }

    /// Reads what is there and begins what it asks. `true`: there was any.
    fn receive(&mut self, context: &mut Context<'_>) -> Result<bool, ConnectError> {
        // Also without reading: frames may have waited for room, and what begins now must be polled.
        let mut progress = false;
        for _ in 0..READS_MAX {
            progress |= self.take_frames()?;
            if !self.has_room() {
                return Ok(progress);
            }
            match self.transport.poll_receive(context, &mut self.input) {
                Poll::Pending => return Ok(progress),
                Poll::Ready(Ok(0)) if self.input.is_between_frames() => {
                    self.ended = true;
                    return Ok(true);
                }
                Poll::Ready(Ok(0)) => return Err(ConnectError::Ended),
                Poll::Ready(Ok(_)) => progress = true,
                Poll::Ready(Err(error)) => return Err(ConnectError::Io(error)),
            }
        }
        self.take_frames()?;
        Ok(true)
    }

    /// Begins what has come, as far as there is room. `true`: there was any.
    fn take_frames(&mut self) -> Result<bool, ConnectError> {
        let mut taken = false;
        while self.has_room()
            && let Some(frame) = self.input.next_frame()?
        {
            taken = true;
            let Header { kind, service, id, .. } = frame.header;
            match kind {
                Kind::Request => {
                    let bytes = frame.payload.bytes() as u64;
                    let begun = if self.said_goodbye {
                        Err(Status::Unavailable)
                    } else {
                        dispatch::begin(&self.shared.services, &self.peer, frame, &self.shared.endpoint.pool)
                    };
                    match begun {
                        Ok(running) => {
                            self.job_bytes += bytes;
                            self.jobs.push(Job { id, service, bytes, running });
                        }
                        Err(status) => {
                            let refused = Outcome::Refused(status);
                            dispatch::answer(&mut self.output, self.peer.version, service, id, refused);
                        }
                    }
                }
                Kind::OneWay => dispatch::message(&self.shared.services, &self.peer, &frame),
                Kind::Ping => {
                    self.output.push(&Header::of(Kind::Pong), Payload::None, |_| {});
                }
                _ => return Err(FrameError::Unexpected.into()),
            }
        }
        Ok(taken)
    }

    /// Gives up a client that takes nothing of what waits for it.
    fn is_stalled(&mut self, context: &mut Context<'_>) -> bool {
        let env = &self.shared.endpoint.env;
        let limit = self.shared.endpoint.limits.stall_for;
        if self.output.is_empty() && !self.unflushed {
            self.stalled = None;
        } else if self.stalled.is_none() {
            self.stalled = Some((self.sends, env.now().after(limit)));
        }
        loop {
            let due = self.stalled.as_ref().map(|(_, at)| *at);
            if !self.timer.poll(context, due) {
                return false;
            }
            if self.stalled.is_some_and(|(before, _)| self.sends == before) {
                return true;
            }
            self.stalled = Some((self.sends, env.now().after(limit)));
        }
    }
}
