//! The client's side of a connection at work. Owner: the link's task.

use super::outbox::{Waiting, Window};
use super::{Shared, State};
use crate::codec::{Reader, WireVersion};
use crate::error::{CallError, ConnectError};
use crate::frame::{Frame, FrameError, Header, Input, Kind, Output};
use crate::handshake::Welcome;
use crate::message::{NodeAnswer, get_error};
use crate::node::NodeError;
use crate::payload::Payload;
use crate::service::Status;
use crate::timer::Timer;
use crate::transport::Transport;
use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Duration;
use xsan_env::{BufPool, Moment};

/// Reads before writes get their turn again.
const READS_MAX: usize = 64;
/// How long the goodbye of a closed link may take.
const GOODBYE_FOR: Duration = Duration::from_secs(1);

/// Serves the link until the connection ends. `None`: in order.
pub(super) async fn run(
    shared: &Shared,
    transport: Transport,
    input: Input,
    welcome: &Welcome,
) -> Option<ConnectError> {
    let mut connection = Connection {
        shared,
        transport,
        input,
        output: Output::default(),
        unflushed: false,
        version: WireVersion::from_number(welcome.version).unwrap_or(WireVersion::OLDEST),
        window: Window { requests: welcome.requests_max.max(1), bytes: welcome.bytes_max },
        leaving: false,
        silence: None,
        unproved: false,
        idle: true,
        timer: Timer::new(&shared.endpoint.env),
    };
    let end = poll_fn(|context| connection.poll_run(context)).await;
    if matches!(end, Ok(())) {
        let goodbye = poll_fn(|context| connection.transport.poll_shutdown(context));
        // A server that does not take it is gone anyway.
        let _: Option<std::io::Result<()>> = shared.endpoint.env.timeout(GOODBYE_FOR, goodbye).await;
    }
    end.err()
}

/// Watches for signs of life while something is unanswered.
struct Silence {
    /// When to look again.
    look_at: Moment,
    heard: bool,
    asked: bool,
}

struct Connection<'a> {
    shared: &'a Shared,
    transport: Transport,
    input: Input,
    output: Output,
    /// Bytes may stand in TLS.
    unflushed: bool,
    version: WireVersion,
    window: Window,
    /// The server said goodbye: nothing new is sent here.
    leaving: bool,
    /// `None` when nothing was unanswered for a while: an idle connection costs nothing.
    silence: Option<Silence>,
    /// One-way messages were sent since the last sign of life was looked for: nobody else would notice that they go
    /// nowhere.
    unproved: bool,
    /// There was nothing to listen for at the last look.
    idle: bool,
    timer: Timer,
}

impl Connection<'_> {
    fn poll_run(&mut self, context: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        // Before looking: a call in between is not missed.
        self.shared.task.register(context.waker());
        loop {
            let mut progress = false;
            let unanswered = {
                let mut state = self.shared.state();
                if state.closed {
                    return Poll::Ready(Ok(()));
                }
                if !self.leaving {
                    let moved = state.outbox.take(self.window, &mut self.output);
                    progress |= moved.any;
                    self.unproved |= moved.one_way;
                }
                state.outbox.unanswered()
            };
            if self.leaving && unanswered == 0 {
                return Poll::Ready(Ok(()));
            }
            match self.transport.poll_send(context, &mut self.output, &mut self.unflushed) {
                Poll::Pending => {}
                Poll::Ready(Ok(sent)) => progress |= sent,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(ConnectError::Io(error))),
            }
            progress |= self.receive(context)?;
            if !progress && !self.look(context)? {
                return Poll::Pending;
            }
        }
    }

    /// Reads what is there. `true`: there was any.
    fn receive(&mut self, context: &mut Context<'_>) -> Result<bool, ConnectError> {
        for reads in 0..READS_MAX {
            match self.transport.poll_receive(context, &mut self.input) {
                Poll::Pending => return Ok(reads > 0),
                Poll::Ready(Ok(0)) => return Err(ConnectError::Ended),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(ConnectError::Io(error)),
            }
            if let Some(silence) = &mut self.silence {
                silence.heard = true;
            }
            while let Some(frame) = self.input.next_frame()? {
                match frame.header.kind {
                    Kind::Answer => answer(self.shared, frame, self.version)?,
                    Kind::Pong => {}
                    Kind::Goodbye => self.leaving = true,
                    _ => return Err(FrameError::Unexpected.into()),
                }
            }
        }
        Ok(true)
    }

    /// Looks at deadlines and silence. `true`: something changed.
    fn look(&mut self, context: &mut Context<'_>) -> Result<bool, ConnectError> {
        let env = &self.shared.endpoint.env;
        let (unanswered, earliest) = {
            let state = self.shared.state();
            (state.outbox.unanswered(), state.outbox.earliest())
        };
        let half = self.shared.endpoint.limits.silence_for(self.shared.class) / 2;
        let listens = unanswered > 0 || self.unproved || !self.output.is_empty();
        match &mut self.silence {
            // What was asked a moment ago has a whole period yet. The timer is not touched: it is one for many requests.
            Some(silence) if self.idle && listens => (silence.heard, silence.asked) = (true, false),
            None if listens => {
                self.silence = Some(Silence { look_at: env.now().after(half), heard: false, asked: false });
            }
            _ => {}
        }
        self.idle = !listens;
        let look_at = self.silence.as_ref().map(|silence| silence.look_at);
        let due = match (look_at, earliest) {
            (Some(look_at), Some(earliest)) => Some(look_at.min(earliest)),
            (some, None) | (None, some) => some,
        };
        if !self.timer.poll(context, due) {
            return Ok(false);
        }
        let now = env.now();
        let expired = self.shared.state().outbox.expire(now);
        if !expired.is_empty() {
            tracing::debug!(node = %self.shared.target, calls = expired.len(), "deadlines passed");
        }
        drop(expired);
        if self.idle {
            // Nothing to listen for: the next request begins anew.
            self.silence = None;
        } else if let Some(silence) = self.silence.as_mut().filter(|silence| silence.look_at <= now) {
            if !silence.heard && silence.asked {
                return Err(ConnectError::Silent);
            }
            self.unproved &= !silence.heard;
            silence.asked = !silence.heard;
            silence.heard = false;
            silence.look_at = now.after(half);
            if silence.asked {
                self.output.push(&Header::of(Kind::Ping), Payload::None, |_| {});
            }
        }
        Ok(true)
    }
}

/// Hands an answer to who waits.
fn answer(shared: &Shared, frame: Frame<'_>, version: WireVersion) -> Result<(), ConnectError> {
    let waiting = {
        let mut state: std::sync::MutexGuard<'_, State> = shared.state();
        state.failures = 0;
        state.outbox.answered(frame.header.id).map_err(|()| FrameError::Unexpected)?
    };
    let status = Status::from_number(frame.header.code).ok_or(FrameError::Header)?;
    match waiting {
        // Too late: its caller was told otherwise, and nothing must follow from it any more.
        None => {}
        Some(Waiting::Node { operation, sender }) => {
            let outcome = node_outcome(status, operation, frame, version, &shared.endpoint.pool)?;
            // The caller may have gone.
            drop(sender.send(outcome));
        }
        Some(Waiting::Service(sender)) => {
            let outcome = match status {
                Status::Done => Ok(frame.meta.to_vec()),
                Status::NotOffered => Err(CallError::NotOffered),
                Status::Malformed => Err(CallError::Malformed),
                Status::TooLarge => Err(CallError::TooLarge),
                Status::Unavailable | Status::Failed => Err(CallError::Unavailable),
            };
            drop(sender.send(outcome));
        }
    }
    Ok(())
}

fn node_outcome(
    status: Status,
    operation: u16,
    frame: Frame<'_>,
    version: WireVersion,
    pool: &BufPool,
) -> Result<Result<NodeAnswer, NodeError>, ConnectError> {
    let input = Reader::new(frame.meta, version);
    Ok(match status {
        Status::Done => Ok(NodeAnswer::get(operation, input, frame.payload, pool)?),
        Status::Failed => Err(get_error(input)?),
        Status::NotOffered | Status::Unavailable => Err(NodeError::Unavailable),
        Status::Malformed | Status::TooLarge => Err(NodeError::Invalid),
    })
}
