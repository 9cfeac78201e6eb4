//! The transmission phase: one task per connection takes requests, runs them and sends replies.
//!
//! No task, no channel and no queue per request: the futures of the export are polled in this task ([`InFlight`]), what
//! completes in one poll leaves in one vectored write, what arrives in one read is decoded together. Each round does
//! replies first, then one read of the socket, so that neither starves the other. Bounds: requests and bytes per
//! connection ([`crate::Limits`]) and the gateway's budget ([`crate::admission`]); when one is reached the socket is not
//! read until replies have left.

use super::inflight::InFlight;
use super::proto::{Errno, UnverifiedRequest};
use super::reply::{self, Echo, Output, SLICES_MAX};
use super::request::{Command, Input, PayloadPlan, Refusal, Rules, payload_plan, validate, validate_status_payload};
use crate::admission::Account;
use crate::export::{Export, ExportError, ReadPiece, StatusExtent};
use crate::server::{Limits, Shared};
use crate::sessions::{ClientStats, Order, Session};
use std::future::Future;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, Env};

/// Extents asked of an export for one reply: 1 MiB of descriptors at most. Clients ask again behind them.
const EXTENTS_PER_REPLY: usize = 1 << 16;
/// Most bytes a CACHE request reads ahead; the rest of its range is left to the reads themselves.
const CACHE_MAX: u64 = 4 << 20;

/// Charged for a request without payload: more than its reply has.
const REPLY_BYTES: u64 = 128;

/// How a transmission came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Everything is answered: the client said goodbye or the server stops.
    Done,
    /// The peer is gone or stuck.
    Lost,
    /// The peer does not speak the protocol.
    Malformed,
    /// The server wants it closed.
    Cut,
}

type OpResult<T> = Result<T, ExportError>;

/// An operation of the export.
pub(crate) enum Work {
    Read(BoxFuture<'static, OpResult<Vec<ReadPiece>>>),
    Change(BoxFuture<'static, OpResult<()>>),
    Status(BoxFuture<'static, OpResult<Vec<StatusExtent>>>),
}

/// Its result.
pub(crate) enum Outcome {
    Read(OpResult<Vec<ReadPiece>>),
    Change(OpResult<()>),
    Status(OpResult<Vec<StatusExtent>>),
}

impl Future for Work {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        match self.get_mut() {
            Work::Read(future) => future.as_mut().poll(context).map(Outcome::Read),
            Work::Change(future) => future.as_mut().poll(context).map(Outcome::Change),
            Work::Status(future) => future.as_mut().poll(context).map(Outcome::Status),
        }
    }
}

/// What the reply needs to know of its request.
pub(crate) struct Note {
    echo: Echo,
    command: Command,
    charge: u64,
}

/// A request whose payload is on its way.
struct Current {
    echo: Echo,
    command: Command,
    charge: u64,
    payload: u32,
}

/// Why no further request was taken.
enum Stop {
    /// More bytes are needed.
    Hungry,
    /// A limit is reached; something wakes the task when that changes.
    Full,
}

/// One connection in its transmission phase.
pub(crate) struct Transmission<'a, S> {
    io: &'a mut S,
    env: Env,
    export: Arc<dyn Export>,
    session: Arc<Session>,
    rules: Rules,
    limits: Limits,
    account: Account,
    input: Input,
    current: Option<Current>,
    ops: InFlight<Note, Work>,
    output: Output,
    unflushed: bool,
    /// Bytes charged for operations that are not answered yet.
    charged: u64,
    /// The client said goodbye or its side of the stream ended: answer what is there, then close.
    closing: bool,
    draining: bool,
    /// The volume is served elsewhere: nothing more is answered.
    moved_away: bool,
    /// Counts transfers either way, to see a peer that is stuck.
    moved: u64,
    stall: Option<(u64, BoxFuture<'static, ()>)>,
    /// Requests taken off the stream.
    begun: u64,
    /// Not yet added to the session's counters.
    uncounted: ClientStats,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin + Send> Transmission<'a, S> {
    pub(crate) fn new(
        io: &'a mut S,
        shared: &Shared,
        export: Arc<dyn Export>,
        session: Arc<Session>,
        rules: Rules,
    ) -> Self {
        Self {
            io,
            env: shared.env.clone(),
            export,
            session,
            rules,
            limits: shared.limits,
            account: shared.admission.account(),
            input: Input::new(rules.style, shared.pool.clone()),
            current: None,
            ops: InFlight::default(),
            output: Output::default(),
            unflushed: false,
            charged: 0,
            closing: false,
            draining: false,
            moved_away: false,
            moved: 0,
            stall: None,
            begun: 0,
            uncounted: ClientStats::default(),
        }
    }

    /// Serves until the end. What was begun may still be under way then: see [`Transmission::into_unfinished`].
    pub(crate) fn poll_run(&mut self, context: &mut Context<'_>) -> Poll<End> {
        let mut order = self.session.order(context);
        loop {
            match order {
                Order::Run => {}
                Order::Drain => self.draining = true,
                Order::Cut | Order::Kill => return Poll::Ready(End::Cut),
            }
            let mut progress = self.collect(context);
            if self.moved_away {
                return Poll::Ready(End::Cut);
            }
            // Before anybody can have read the replies.
            self.session.count(std::mem::take(&mut self.uncounted));
            match self.send(context) {
                Ok(sent) => progress |= sent,
                Err(end) => return Poll::Ready(end),
            }
            if !self.closing {
                match self.receive(context) {
                    Ok(received) => progress |= received,
                    Err(end) => return Poll::Ready(end),
                }
            }
            if !progress {
                break;
            }
            order = self.session.order_now();
        }
        if self.moved_away {
            return Poll::Ready(End::Cut);
        }
        let answered = self.ops.is_empty() && self.output.is_empty() && !self.unflushed;
        if answered && (self.closing || self.draining) {
            return Poll::Ready(End::Done);
        }
        self.account.settle(self.used());
        self.poll_stall(context)
    }

    /// The operations still under way.
    pub(crate) fn into_unfinished(self) -> InFlight<Note, Work> {
        self.ops
    }

    /// Bytes this connection must hold of the budget.
    fn used(&self) -> u64 {
        self.charged + self.output.len() as u64
    }

    /// Answers what has completed.
    fn collect(&mut self, context: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready((note, outcome)) = self.ops.poll_next(context) {
            self.answer(note, outcome);
            progress = true;
        }
        progress
    }

    /// Sends what is queued, as far as the socket takes it.
    fn send(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let mut progress = false;
        while !self.output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = self.output.slices(&mut slices);
            match Pin::new(&mut *self.io).poll_write_vectored(context, &slices[..count]) {
                Poll::Pending => return Ok(progress),
                Poll::Ready(Ok(sent)) if sent > 0 => {
                    self.output.advance(sent);
                    self.moved += 1;
                    self.unflushed = true;
                    progress = true;
                }
                Poll::Ready(_) => return Err(End::Lost),
            }
        }
        if self.unflushed {
            match Pin::new(&mut *self.io).poll_flush(context) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(_)) => return Err(End::Lost),
            }
        }
        Ok(progress)
    }

    /// Starts the requests that are there, reads the socket once, starts what came. `true`: there was any.
    fn receive(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let begun = self.begun;
        let stop = self.take_requests(context)?;
        let progress = self.begun != begun || self.closing;
        if self.closing || matches!(stop, Stop::Full) {
            return Ok(progress);
        }
        let mut room = ReadBuf::new(self.input.room());
        match Pin::new(&mut *self.io).poll_read(context, &mut room) {
            Poll::Pending => return Ok(progress),
            Poll::Ready(Err(_)) => return Err(End::Lost),
            Poll::Ready(Ok(())) => {}
        }
        let count = room.filled().len();
        if count == 0 {
            self.closing = true;
            self.export.client_left();
            return Ok(true);
        }
        self.moved += 1;
        self.input.filled(count);
        self.take_requests(context)?;
        Ok(true)
    }

    fn take_requests(&mut self, context: &mut Context<'_>) -> Result<Stop, End> {
        while !self.closing {
            if self.input.wasting() {
                return Ok(Stop::Hungry);
            }
            if let Some(current) = &self.current {
                let Some(payload) = self.input.payload(current.payload) else { return Ok(Stop::Hungry) };
                if let Some(current) = self.current.take() {
                    self.launch(current, payload);
                }
                continue;
            }
            let Some(request) = self.input.header().map_err(|_| End::Malformed)? else { return Ok(Stop::Hungry) };
            if let Some(stop) = self.begin(context, &request)? {
                return Ok(stop);
            }
        }
        Ok(Stop::Hungry)
    }

    /// Admits a request and starts on its payload; `Some`: it must wait.
    fn begin(&mut self, context: &mut Context<'_>, request: &UnverifiedRequest) -> Result<Option<Stop>, End> {
        let verdict = validate(request, &self.rules);
        if verdict == Ok(Command::Disconnect) {
            self.closing = true;
            return Ok(None);
        }
        let verdict = if self.draining { Err(STOPPING) } else { verdict };
        let echo = Echo { cookie: request.cookie, offset: request.offset };
        let plan = payload_plan(request, verdict.is_ok(), &self.rules);
        let payload = match plan {
            PayloadPlan::Keep(bytes) => bytes,
            PayloadPlan::Swallow(_) => 0,
            PayloadPlan::Close => return Err(End::Malformed),
        };
        let charge = verdict.map_or(0, |command| charge(&command));
        if !self.admit(context, charge) {
            return Ok(Some(Stop::Full));
        }
        if !self.input.begin(plan) {
            return Ok(Some(Stop::Hungry));
        }
        self.begun += 1;
        match verdict {
            Ok(command) => {
                self.charged += charge;
                self.current = Some(Current { echo, command, charge, payload });
            }
            Err(refusal) => self.refuse(echo, refusal),
        }
        Ok(None)
    }

    /// Whether limits and budget allow one more request of `charge` bytes now.
    fn admit(&mut self, context: &mut Context<'_>, charge: u64) -> bool {
        let used = self.used();
        // Alone, any request goes. Also one that moves no data pays a little, so that the replies waiting in `output` are
        // always covered by the budget.
        if used > 0 && used + charge > self.limits.connection_bytes_max {
            return false;
        }
        self.ops.len() < self.limits.requests_max
            && self.account.poll_charge(context, used, charge.max(REPLY_BYTES)).is_ready()
    }

    /// Calls the export. The first poll is done here: what is ready at once costs no place in the set.
    fn launch(&mut self, current: Current, payload: Buf) {
        let Current { echo, mut command, charge, .. } = current;
        if let Command::StatusChoice { offset, one } = command {
            match validate_status_payload(&payload, offset, one, &self.rules) {
                Ok(status) => command = status,
                Err(refusal) => {
                    self.charged -= charge;
                    self.refuse(echo, refusal);
                    return;
                }
            }
        }
        let export = &self.export;
        let work = match command {
            // A read of nothing is answered in the style of reads, but no export needs to know such a thing.
            Command::Read { length: 0, .. } => {
                reply::read(&mut self.output, self.rules.style, echo, 0, true, Vec::new());
                self.uncounted.requests += 1;
                return;
            }
            Command::Read { offset, length, .. } => Work::Read(export.read(offset, length)),
            Command::Cache { offset, length } => {
                let length = u32::try_from(length.min(CACHE_MAX)).unwrap_or(0);
                Work::Read(export.read(offset, length))
            }
            Command::Write { offset, fua, .. } => Work::Change(export.write(offset, payload, fua)),
            Command::Flush => Work::Change(export.flush()),
            Command::Trim { offset, length, fua } => Work::Change(export.trim(offset, length, fua)),
            Command::Zero { offset, length, fua, no_hole } => Work::Change(export.zero(offset, length, fua, no_hole)),
            Command::Status { offset, length, one } => {
                let extents = if one { 1 } else { EXTENTS_PER_REPLY };
                Work::Status(export.status(offset, length, extents))
            }
            Command::Nothing | Command::StatusChoice { .. } | Command::Disconnect => {
                self.charged -= charge;
                reply::done(&mut self.output, self.rules.style, echo);
                self.uncounted.requests += 1;
                return;
            }
        };
        if let Some((note, outcome)) = self.ops.start(Note { echo, command, charge }, work) {
            self.answer(note, outcome);
        }
    }

    fn answer(&mut self, note: Note, outcome: Outcome) {
        let Note { echo, command, charge } = note;
        self.charged -= charge;
        let (output, style) = (&mut self.output, self.rules.style);
        let result = match (outcome, command) {
            (Outcome::Read(Ok(pieces)), Command::Read { length, fragment, .. }) => {
                if reply::pieces_fit(&pieces, length) {
                    reply::read(output, style, echo, length, fragment, pieces);
                    self.uncounted.requests += 1;
                    self.uncounted.read_bytes += u64::from(length);
                    return;
                }
                tracing::error!(offset = echo.offset, length, "export answered a read with other bytes than asked");
                Err(ExportError::Io)
            }
            (Outcome::Status(Ok(extents)), Command::Status { length, one, .. }) => {
                if reply::status(output, style, echo, length, one, &extents) {
                    self.uncounted.requests += 1;
                    return;
                }
                tracing::error!(offset = echo.offset, length, "export answered a status request with nothing");
                Err(ExportError::Io)
            }
            (Outcome::Read(result), _) => result.map(drop),
            (Outcome::Status(result), _) => result.map(drop),
            (Outcome::Change(result), _) => result,
        };
        match result {
            Ok(()) => {
                reply::done(output, style, echo);
                self.uncounted.requests += 1;
                if let Command::Write { length, .. } = command {
                    self.uncounted.written_bytes += u64::from(length);
                }
            }
            Err(ExportError::Moved) => self.moved_away = true,
            Err(error) => self.refuse(echo, Refusal { errno: error.into(), reason: reason(error) }),
        }
    }

    fn refuse(&mut self, echo: Echo, refusal: Refusal) {
        tracing::debug!(offset = echo.offset, errno = refusal.errno as u32, reason = refusal.reason, "request refused");
        reply::error(&mut self.output, self.rules.style, echo, refusal);
        self.uncounted.requests += 1;
    }

    /// Gives up a peer that neither reads its replies nor sends the rest of a payload while others wait for the bytes
    /// it holds. A peer that only disturbs itself (a stopped guest) is left alone.
    fn poll_stall(&mut self, context: &mut Context<'_>) -> Poll<End> {
        if self.output.is_empty() && self.current.is_none() {
            return Poll::Pending;
        }
        loop {
            let moved = self.moved;
            let (seen, timer) = self.stall.get_or_insert_with(|| (moved, self.env.sleep(self.limits.stall_for)));
            ready!(timer.as_mut().poll(context));
            let stuck = *seen == moved;
            self.stall = None;
            if stuck && self.account.is_contended() {
                tracing::info!("client neither sends nor receives while others wait: closed");
                return Poll::Ready(End::Lost);
            }
        }
    }
}

const STOPPING: Refusal = Refusal { errno: Errno::Shutdown, reason: "the server is stopping" };

/// Bytes of the budget a command needs from its admission to its reply's departure.
fn charge(command: &Command) -> u64 {
    match command {
        Command::Read { length, .. } | Command::Write { length, .. } => u64::from(*length),
        Command::Cache { length, .. } => (*length).min(CACHE_MAX),
        // 16 bytes of descriptor and 24 of the export's answer each, at the usual few extents.
        Command::Status { .. } | Command::StatusChoice { .. } => 64 << 10,
        _ => 0,
    }
}

fn reason(error: ExportError) -> &'static str {
    match error {
        ExportError::Invalid => "invalid request",
        ExportError::NoSpace => "no space left",
        ExportError::NotSupported => "not supported",
        ExportError::ReadOnly => "the export is read-only",
        ExportError::Io => "input/output error",
        ExportError::Shutdown => "the volume is closing",
        ExportError::Moved => "the volume has moved",
    }
}
