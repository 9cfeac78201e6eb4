//! A guest that connects again (P12): its new connection must not be overtaken by what the old one still carries.
//!
//! One block of two sectors. The guest writes both sectors, then the first again, reads at any time, and sends again on a new
//! connection what was not answered on the old one. A request lies in the socket, then waits in the gateway (for its
//! turn, or for the rest of its block to be read), then is in the log without an answer, then acknowledged.

use crate::bits::Bits;
use crate::check::{Model, Steps};
use crate::rules::{Ruled, Rules, read_words, rules};

rules! {
    /// Rules of connections.
    ReconnectRule {
        CutOld = "cut-old", "P12: a new connection cuts the old one: nothing more is read from it";
        FinishOrDrop = "finish-or-drop", "P12: every request of the old connection is finished or dropped first";
        NegotiateLast = "negotiate-last", "P12: only then does negotiation complete";
        MergeOnPending = "merge-on-pending", "P12: a sub-block write merges on the newest pending version";
        ReadsAcknowledged = "reads-acknowledged", "P12: reads see acknowledged versions only";
    }
}

const CONNECTIONS_MAX: usize = 3;
/// The guest's requests: writes of a value to a sector, and two reads.
const WRITES: [(usize, u8); 3] = [(0, 1), (1, 1), (0, 2)];
const READS: [u8; 2] = [3, 4];
const REQUESTS: u8 = 5;
/// Writes that wait for their acknowledgement, at most.
const PENDING_MAX: usize = 4;

/// Values of the two sectors.
type Content = [u8; 2];

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Line {
    #[default]
    Unused,
    /// The guest has connected and waits.
    Negotiating,
    Open,
    Cut,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Connection {
    line: Line,
    /// Requests in the socket, and in the gateway.
    in_socket: Bits,
    waiting: Bits,
}

/// A write in the log that was not acknowledged yet.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Pending {
    request: u8,
    connection: u8,
    /// The whole block.
    content: Content,
}

/// Everything.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct State {
    connections: [Connection; CONNECTIONS_MAX],
    /// The one that the guest uses.
    current: usize,
    /// Requests sent on the current connection, and answered on any.
    sent: Bits,
    answered: Bits,
    /// What the guest knows of the sectors, now and when it sent each read.
    known: Content,
    known_at_read: [Content; READS.len()],
    acknowledged: Content,
    pending: [Option<Pending>; PENDING_MAX],
    crashes_left: u8,
    reconnects_left: u8,
    is_broken: bool,
}

/// The model with its bounds.
pub struct Reconnect {
    rules: Rules<ReconnectRule>,
    reconnects: u8,
    crashes: u8,
}

impl Ruled for Reconnect {
    type Rule = ReconnectRule;
    const NAME: &'static str = "reconnect";
    const WORDS: &'static str = "again (times the guest connects again, up to 2), crash of the gateway";
    const NEEDED: &'static [(ReconnectRule, &'static str)] = &[
        (ReconnectRule::CutOld, "again=1"),
        (ReconnectRule::FinishOrDrop, "again=1"),
        (ReconnectRule::NegotiateLast, "again=1"),
        (ReconnectRule::MergeOnPending, "again=0"),
        (ReconnectRule::ReadsAcknowledged, "again=1 crash=1"),
    ];

    fn build(words: &[&str], rules: Rules<ReconnectRule>) -> Result<Self, String> {
        let mut model = Self { rules, reconnects: 0, crashes: 0 };
        read_words(words, |name, number| {
            match name {
                "again" if usize::from(number) < CONNECTIONS_MAX => model.reconnects = number,
                "crash" => model.crashes = number,
                _ => return None,
            }
            Some(())
        })?;
        Ok(model)
    }
}

impl State {
    /// The block as the newest write in the log has it.
    fn newest(&self) -> Content {
        self.pending.iter().flatten().last().map_or(self.acknowledged, |pending| pending.content)
    }

    /// Whether anything that came on the connection has not ended.
    fn has_requests(&self, connection: usize) -> bool {
        let is_of = |pending: &Pending| usize::from(pending.connection) == connection;
        !self.connections[connection].waiting.is_empty() || self.pending.iter().flatten().any(is_of)
    }

    /// The guest hears an answer on the connection it uses.
    fn answer(&mut self, connection: usize, request: u8) {
        if connection != self.current || self.connections[connection].line != Line::Open {
            return;
        }
        self.answered.add(request);
        if let Some((sector, value)) = WRITES.get(usize::from(request)) {
            self.known[*sector] = self.known[*sector].max(*value);
        }
    }
}

impl Reconnect {
    fn hold(&self, rule: ReconnectRule) -> bool {
        self.rules.hold(rule)
    }

    fn guest_steps(&self, state: &State, steps: &mut Steps<State>) {
        let line = state.connections[state.current].line;
        for request in (Bits::below(REQUESTS) - state.sent - state.answered).iter() {
            // It writes a sector again when the first write was answered.
            let may = request != 2 || state.answered.has(0);
            if line == Line::Open && may {
                let mut next = *state;
                next.sent.add(request);
                next.connections[state.current].in_socket.add(request);
                if let Some(read) = READS.iter().position(|read| *read == request) {
                    next.known_at_read[read] = state.known;
                }
                steps.add(next, || format!("the guest sends {} on connection {}", called(request), state.current));
            }
        }
        if state.reconnects_left > 0 && line != Line::Negotiating {
            let mut next = *state;
            next.reconnects_left -= 1;
            next.current += 1;
            next.sent = Bits::NONE;
            next.connections[next.current].line = Line::Negotiating;
            steps.add(next, || format!("the guest gives the connection up and opens number {}", state.current + 1));
        }
    }

    /// The gateway gives way to the newer connection.
    fn negotiate(&self, state: &State, steps: &mut Steps<State>) {
        for old in 0..state.current {
            if state.connections[old].line == Line::Open {
                let mut next = *state;
                next.connections[old].line = Line::Cut;
                if self.hold(ReconnectRule::CutOld) {
                    next.connections[old].in_socket = Bits::NONE;
                }
                steps.add(next, || format!("the gateway cuts connection {old}"));
            }
            for request in state.connections[old].waiting.iter() {
                if state.connections[old].line == Line::Cut {
                    let mut next = *state;
                    next.connections[old].waiting.remove(request);
                    steps.add(next, || format!("the gateway drops {} of connection {old}", called(request)));
                }
            }
        }
        let mut older = 0..state.current;
        let is_cut = |old: usize| state.connections[old].line == Line::Cut || !self.hold(ReconnectRule::NegotiateLast);
        let is_over = |old: usize| !state.has_requests(old) || !self.hold(ReconnectRule::FinishOrDrop);
        // Without `negotiate-last` the gateway looks for older connections afterwards.
        let may = older.all(|old| is_cut(old) && (is_over(old) || !self.hold(ReconnectRule::NegotiateLast)));
        if state.connections[state.current].line == Line::Negotiating && may {
            let mut next = *state;
            next.connections[state.current].line = Line::Open;
            steps.add(next, || format!("negotiation of connection {} completes", state.current));
        }
    }

    fn gateway_steps(&self, state: &State, steps: &mut Steps<State>) {
        for (connection, Connection { line, in_socket, waiting }) in state.connections.iter().enumerate() {
            let is_read = *line == Line::Open || *line == Line::Cut && !self.hold(ReconnectRule::CutOld);
            for request in in_socket.iter().filter(|_| is_read) {
                let mut next = *state;
                next.connections[connection].in_socket.remove(request);
                next.connections[connection].waiting.add(request);
                steps.add(next, || format!("the gateway takes {} from connection {connection}", called(request)));
            }
            for request in waiting.iter() {
                self.execute(state, connection, request, steps);
            }
        }
        if let Some(first) = state.pending[0] {
            let mut next = *state;
            next.pending.rotate_left(1);
            next.pending[PENDING_MAX - 1] = None;
            next.acknowledged = first.content;
            next.answer(usize::from(first.connection), first.request);
            steps.add(next, || format!("{} of connection {} is acknowledged", called(first.request), first.connection));
        }
    }

    fn execute(&self, state: &State, connection: usize, request: u8, steps: &mut Steps<State>) {
        let mut next = *state;
        next.connections[connection].waiting.remove(request);
        if let Some(read) = READS.iter().position(|read| *read == request) {
            let acknowledged = self.hold(ReconnectRule::ReadsAcknowledged);
            let content = if acknowledged { state.acknowledged } else { state.newest() };
            if connection == state.current && state.connections[connection].line == Line::Open {
                let known = state.known_at_read[read];
                next.is_broken |= content[0] < known[0] || content[1] < known[1];
                next.known = [content[0].max(state.known[0]), content[1].max(state.known[1])];
            }
            next.answer(connection, request);
            steps.add(next, || format!("the gateway answers a read of connection {connection} with {content:?}"));
        } else if let Some(place) = next.pending.iter_mut().find(|place| place.is_none()) {
            let (sector, value) = WRITES[usize::from(request)];
            let on_pending = self.hold(ReconnectRule::MergeOnPending);
            let mut content = if on_pending { state.newest() } else { state.acknowledged };
            content[sector] = value;
            let connection = u8::try_from(connection).unwrap_or(0);
            *place = Some(Pending { request, connection, content });
            steps
                .add(next, || format!("{} of connection {connection} goes into the log: {content:?}", called(request)));
        }
    }
}

fn called(request: u8) -> String {
    match WRITES.get(usize::from(request)) {
        Some((sector, value)) => format!("write {value} to sector {sector}"),
        None => "read".to_owned(),
    }
}

impl Model for Reconnect {
    type State = State;

    fn initial(&self) -> State {
        let mut state = State { crashes_left: self.crashes, reconnects_left: self.reconnects, ..State::default() };
        state.connections[0].line = Line::Open;
        state
    }

    fn successors(&self, state: &State, steps: &mut Steps<State>) {
        self.guest_steps(state, steps);
        self.negotiate(state, steps);
        self.gateway_steps(state, steps);
        if state.crashes_left > 0 {
            let mut next = State { pending: [None; PENDING_MAX], ..*state };
            next.crashes_left -= 1;
            for connection in &mut next.connections {
                let line = if connection.line == Line::Open { Line::Cut } else { connection.line };
                *connection = Connection { line, ..Connection::default() };
            }
            steps.add_failure(next, || "the gateway crashes; what was not acknowledged is gone".to_owned());
        }
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        state.is_broken.then_some("a read gave an older value than the guest knew of (R3, R7)")
    }
}
