//! Large writes (P9): rows go straight to k + m devices, a small record goes through the journal, and a take-over looks for the rows.
//!
//! One block, one owner and one taker, f = 1. The journal set is on n0 and n3; the rows of a write go to n0, n1 and n2 (k = 2, m = 1), or,
//! written again elsewhere, to n1, n2 and n3. Devices of rows know of no generation: a row may arrive after the take-over. An owner that
//! crashes is one that does nothing any more, which is one of the ways it can go on.

use crate::bits::Bits;
use crate::check::{Model, Steps};
use crate::rules::{Ruled, Rules, read_words, rules};

rules! {
    /// Rules of large writes.
    RowRule {
        AllRows = "all-rows", "P9: acknowledged when all k + m rows are there, not k of them";
        RecordToo = "record-too", "P4, P9: and the record is on every member";
        ConfirmAfterRows = "confirm-after-rows", "P9: and every member has answered to something sent after the rows were there";
        FlushRows = "flush-rows", "P9: FLUSH flushes the rows too";
        RowIncarnations = "row-incarnations", "P9: a flush of rows names the process that stored them";
        WaitForUnits = "wait-for-units", "P9: a taker waits for rows that it cannot reach";
        AbsentIsSkipped = "absent-is-skipped", "P9: a record without its row is left out, the log does not end there";
        SameVersion = "same-version", "P9: what is written again elsewhere keeps its version";
    }
}

const NODES: u8 = 4;
const K: u32 = 2;
const RECORDS_MAX: usize = 4;
/// Nodes of the journal set.
const MEMBERS: [u8; 2] = [0, 3];

/// Where a record's blocks are.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Blocks {
    #[default]
    InRecord,
    /// In rows on these nodes.
    InRows(Bits),
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Record {
    /// The guest's write.
    write: u8,
    /// What orders it.
    version: u8,
    blocks: Blocks,
    /// Nodes that hold its row, and that keep it without power.
    stored: Bits,
    durable: Bits,
    /// Nodes that answered for its row, and for a flush of it.
    answered: Bits,
    flushed: Bits,
    /// Members that answered to something sent after all rows were there.
    confirmed: Bits,
    /// It was written again elsewhere; what was sent may still arrive, but nobody waits for it.
    is_given_up: bool,
    /// More failed than the scheme tolerates since it was sent.
    is_at_risk: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Node {
    is_down: bool,
    is_lost: bool,
    /// A process has ended here: not what stored the rows, not a live member.
    has_restarted: bool,
    /// It lost power: a member here has what it flushed.
    lost_power: bool,
    /// The taker closed the member here.
    is_closed: bool,
    /// Records of the member here.
    stored: Bits,
    durable: Bits,
    answered: Bits,
    flushed: Bits,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Taker {
    #[default]
    Away,
    Closing,
    /// Looks for the rows of these records.
    Looking {
        found: Bits,
    },
    /// Serves with this write.
    Serving {
        write: u8,
    },
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Budget {
    large: u8,
    small: u8,
    rewrites: u8,
    flushes: u8,
    crashes: u8,
    power_losses: u8,
    nodes_lost: u8,
    blackouts: u8,
}

/// Everything; sets of records or nodes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct State {
    records: [Record; RECORDS_MAX],
    record_count: u8,
    nodes: [Node; NODES as usize],
    owner_is_gone: bool,
    acknowledged: Bits,
    flushing: Bits,
    taker: Taker,
    /// Nodes that told the taker which rows they hold, and for which records.
    asked: Bits,
    seen: [Bits; RECORDS_MAX],
    /// The newest write that was acknowledged, or flushed; 0 is none.
    told: u8,
    told_flushed: u8,
    failed: Bits,
    left: Budget,
    is_broken: bool,
}

/// The model with its bounds.
pub struct Rows {
    rules: Rules<RowRule>,
    budget: Budget,
}

impl Ruled for Rows {
    type Rule = RowRule;
    const NAME: &'static str = "rows";
    const WORDS: &'static str = "\
large and small writes, again (rows and record written elsewhere after a failure), flush, pc crashes of nodes' processes,
power losses of single nodes, lost nodes, blackout";
    const NEEDED: &'static [(RowRule, &'static str)] = &[
        (RowRule::AllRows, "large=1 lost=1"),
        (RowRule::RecordToo, "large=1"),
        (RowRule::ConfirmAfterRows, "large=1"),
        (RowRule::FlushRows, "large=1 flush=1 blackout=1"),
        (RowRule::RowIncarnations, "large=1 flush=1 power=1 lost=1"),
        (RowRule::WaitForUnits, "large=1 pc=2"),
        (RowRule::AbsentIsSkipped, "large=1 small=1"),
        (RowRule::SameVersion, "large=1 small=1 again=1"),
    ];

    fn build(words: &[&str], rules: Rules<RowRule>) -> Result<Self, String> {
        let mut budget = Budget::default();
        read_words(words, |name, number| {
            let place = match name {
                "large" => &mut budget.large,
                "small" => &mut budget.small,
                "again" => &mut budget.rewrites,
                "flush" => &mut budget.flushes,
                "pc" => &mut budget.crashes,
                "power" => &mut budget.power_losses,
                "lost" => &mut budget.nodes_lost,
                "blackout" => &mut budget.blackouts,
                _ => return None,
            };
            *place = number;
            Some(())
        })?;
        Ok(Self { rules, budget })
    }
}

impl Record {
    fn row_nodes(&self) -> Bits {
        match self.blocks {
            Blocks::InRecord => Bits::NONE,
            Blocks::InRows(nodes) => nodes,
        }
    }
}

impl State {
    fn record(&self, id: u8) -> &Record {
        &self.records[usize::from(id)]
    }

    fn node(&self, node: u8) -> &Node {
        &self.nodes[usize::from(node)]
    }

    fn ids(&self) -> impl Iterator<Item = u8> + use<> {
        0..self.record_count
    }

    /// Whether the member takes anything: the process that it was made in, not closed.
    fn accepts(&self, node: u8) -> bool {
        let Node { is_down, has_restarted, is_closed, .. } = *self.node(node);
        !is_down && !has_restarted && !is_closed
    }

    fn add(&mut self, record: Record) -> Option<u8> {
        let id = self.record_count;
        *self.records.get_mut(usize::from(id))? = record;
        self.record_count += 1;
        Some(id)
    }

    /// A guest may rely on this write from now on.
    fn tell(&mut self, write: u8) {
        self.told = self.told.max(write);
        self.judge();
    }

    /// A serving taker must have everything that guests may rely on: it will never look for rows again.
    fn judge(&mut self) {
        if let Taker::Serving { write } = self.taker {
            self.is_broken |= write < self.told;
        }
    }
}

impl Rows {
    fn hold(&self, rule: RowRule) -> bool {
        self.rules.hold(rule)
    }

    fn owner_steps(&self, state: &State, steps: &mut Steps<State>) {
        let writes = state.ids().map(|id| state.record(id).write).max().unwrap_or(0);
        let new = Record { write: writes + 1, version: writes + 1, ..Record::default() };
        if state.left.small > 0 {
            let mut next = *state;
            next.left.small -= 1;
            if let Some(id) = next.add(new) {
                steps.add(next, || format!("the owner sends the small write w{}, record {id}", new.write));
            }
        }
        if state.left.large > 0 {
            let mut next = *state;
            next.left.large -= 1;
            if let Some(id) = next.add(Record { blocks: Blocks::InRows([0, 1, 2].into_iter().collect()), ..new }) {
                steps.add(next, || format!("the owner sends the rows and the record {id} of w{}", new.write));
            }
        }
        for id in state.ids() {
            self.write_again(state, id, steps);
            self.acknowledge(state, id, steps);
        }
        self.flush(state, steps);
    }

    /// A unit failed, or is only silent: row and record go elsewhere.
    fn write_again(&self, state: &State, id: u8, steps: &mut Steps<State>) {
        let record = *state.record(id);
        let is_large = record.blocks != Blocks::InRecord;
        if is_large && !record.is_given_up && state.left.rewrites > 0 && !state.acknowledged.has(id) {
            let newest = state.ids().map(|id| state.record(id).version).max().unwrap_or(0);
            let version = if self.hold(RowRule::SameVersion) { record.version } else { newest + 1 };
            let again = Record {
                write: record.write,
                version,
                blocks: Blocks::InRows([1, 2, 3].into_iter().collect()),
                ..Record::default()
            };
            let mut next = *state;
            next.left.rewrites -= 1;
            next.records[usize::from(id)].is_given_up = true;
            next.records[usize::from(id)].confirmed = Bits::NONE;
            if let Some(new) = next.add(again) {
                steps.add(next, || format!("the owner writes w{} again on other nodes, record {new}", record.write));
            }
        }
    }

    fn acknowledge(&self, state: &State, id: u8, steps: &mut Steps<State>) {
        let record = state.record(id);
        // Contiguous lengths: the records before it are there too. Their rows need not be.
        let log = Bits::below(id + 1);
        let has_records = MEMBERS.iter().all(|node| state.node(*node).answered.covers(log));
        let rows = self.has_rows(record);
        let is_confirmed = record.confirmed.count() == 2 || record.blocks == Blocks::InRecord;
        let may = (has_records || !self.hold(RowRule::RecordToo))
            && rows
            && (is_confirmed || !self.hold(RowRule::ConfirmAfterRows));
        if may && !record.is_given_up && !state.acknowledged.has(id) {
            let mut next = *state;
            next.acknowledged.add(id);
            if !record.is_at_risk {
                next.tell(record.write);
            }
            steps.add(next, || format!("the owner acknowledges w{}", record.write));
        }
    }

    fn has_rows(&self, record: &Record) -> bool {
        match self.hold(RowRule::AllRows) {
            true => record.answered.covers(record.row_nodes()),
            false => record.answered.count() >= K.min(record.row_nodes().count()),
        }
    }

    fn flush(&self, state: &State, steps: &mut Steps<State>) {
        if state.flushing.is_empty() {
            if state.left.flushes > 0 && !state.acknowledged.is_empty() {
                let mut next = *state;
                next.left.flushes -= 1;
                next.flushing = state.acknowledged;
                steps.add(next, || "the owner sends FLUSH".to_owned());
            }
            return;
        }
        let has_flushed = |id: u8| {
            let rows = state.record(id).flushed.covers(state.record(id).row_nodes()) || !self.hold(RowRule::FlushRows);
            rows && MEMBERS.iter().all(|node| state.node(*node).flushed.has(id))
        };
        if state.flushing.iter().all(has_flushed) {
            let mut next = State { flushing: Bits::NONE, ..*state };
            for id in state.flushing.iter() {
                let write = state.record(id).write;
                next.told_flushed = next.told_flushed.max(write);
                next.tell(write);
            }
            steps.add(next, || "the owner completes FLUSH".to_owned());
        }
    }

    fn node_steps(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        let place = usize::from(node);
        let is_member = MEMBERS.contains(&node) && state.accepts(node);
        for id in state.ids() {
            let record = state.record(id);
            let is_row = record.row_nodes().has(node);
            let Node { is_down, has_restarted, answered, flushed, .. } = *state.node(node);
            // An owner that is gone may still have sent it.
            if is_row && !is_down && !has_restarted && !record.answered.has(node) {
                let mut next = *state;
                let row = &mut next.records[usize::from(id)];
                row.stored.add(node);
                row.answered.add(node);
                steps.add(next, || format!("n{node} stores its row of record {id}, answers"));
            }
            // In the order of the log: what gaps do is looked at in the model of a volume.
            if is_member && !answered.has(id) && answered.covers(Bits::below(id)) {
                let mut next = *state;
                next.nodes[place].stored.add(id);
                next.nodes[place].answered.add(id);
                steps.add(next, || format!("n{node} stores record {id}, answers"));
            }
            let is_waited_for = !record.is_given_up && !state.acknowledged.has(id);
            let has_rows = is_member && record.blocks != Blocks::InRecord && self.has_rows(record);
            if has_rows && is_waited_for && !record.confirmed.has(node) {
                let mut next = *state;
                next.records[usize::from(id)].confirmed.add(node);
                steps
                    .add(next, || format!("n{node} answers to what was sent after the rows of record {id} were there"));
            }
            if !state.flushing.has(id) {
                continue;
            }
            if is_member && answered.has(id) && !flushed.has(id) {
                let mut next = *state;
                next.nodes[place].durable |= state.node(node).stored;
                next.nodes[place].flushed |= answered;
                steps.add(next, || format!("n{node} flushes its member, answers"));
            }
            let knows_row = !has_restarted || !self.hold(RowRule::RowIncarnations);
            if is_row && !is_down && knows_row && !record.flushed.has(node) {
                let mut next = *state;
                let row = &mut next.records[usize::from(id)];
                row.durable |= row.stored & Bits::one(node);
                row.flushed.add(node);
                steps.add(next, || format!("n{node} flushes its row of record {id}, answers"));
            }
        }
    }

    fn taker_steps(&self, state: &State, steps: &mut Steps<State>) {
        match state.taker {
            Taker::Away => {
                let next = State { taker: Taker::Closing, ..*state };
                steps.add(next, || "a taker takes the volume".to_owned());
            }
            Taker::Closing => {
                for node in MEMBERS {
                    if !state.node(node).is_down && !state.node(node).is_closed {
                        let mut next = *state;
                        next.nodes[usize::from(node)].is_closed = true;
                        steps.add(next, || format!("n{node} closes its member"));
                    }
                }
                self.read_members(state, steps);
            }
            Taker::Looking { found } => {
                for node in 0..NODES {
                    if !state.node(node).is_down && !state.asked.has(node) {
                        let mut next = *state;
                        next.asked.add(node);
                        for id in found.iter().filter(|id| state.record(*id).stored.has(node)) {
                            next.seen[usize::from(id)].add(node);
                        }
                        steps.add(next, || format!("n{node} tells the taker which rows it holds"));
                    }
                }
                self.commit(state, found, steps);
            }
            Taker::Serving { .. } => {}
        }
    }

    /// P10.3: one whole member, or all that are left.
    fn read_members(&self, state: &State, steps: &mut Steps<State>) {
        let answers = |node: &u8| state.node(*node).is_closed && !state.node(*node).is_down;
        let log = |stored: Bits| state.ids().take_while(|id| stored.has(*id)).collect::<Bits>();
        let mut read = |found: Bits, from: &str| {
            let next = State { taker: Taker::Looking { found }, ..*state };
            steps.add(next, || format!("the taker reads {from}: records {found}"));
        };
        let mut has_whole = false;
        for node in MEMBERS.iter().filter(|node| answers(node) && !state.node(**node).lost_power) {
            has_whole = true;
            read(log(state.node(*node).stored), &format!("n{node}"));
        }
        let heard_all = MEMBERS.iter().all(|node| answers(node) || state.node(*node).is_lost);
        let left = MEMBERS.iter().filter(|node| answers(node));
        if !has_whole && heard_all && left.clone().count() > 0 {
            read(log(left.fold(Bits::NONE, |all, node| all | state.node(*node).stored)), "what is left");
        }
    }

    fn commit(&self, state: &State, found: Bits, steps: &mut Steps<State>) {
        let mut present: Vec<Record> = Vec::new();
        for id in found.iter() {
            let record = *state.record(id);
            let is_there = record.blocks == Blocks::InRecord || state.seen[usize::from(id)].count() >= K;
            let silent = |node: u8| !state.asked.has(node) && !state.node(node).is_lost;
            let gives_up = |node: u8| !silent(node) || state.node(node).is_down && !self.hold(RowRule::WaitForUnits);
            if !is_there && !record.row_nodes().iter().all(gives_up) {
                return;
            }
            if is_there {
                present.push(record);
            } else if !self.hold(RowRule::AbsentIsSkipped) {
                break;
            }
        }
        let write = present.iter().max_by_key(|record| record.version).map_or(0, |record| record.write);
        let mut next = State { taker: Taker::Serving { write }, ..*state };
        next.judge();
        steps.add(next, || format!("the taker commits and serves with w{write}"));
    }

    fn failure_steps(&self, state: &State, steps: &mut Steps<State>) {
        for node in 0..NODES {
            let place = usize::from(node);
            if state.node(node).is_down {
                if !state.node(node).is_lost {
                    let mut next = *state;
                    next.nodes[place].is_down = false;
                    steps.add(next, || format!("n{node} starts again"));
                }
                continue;
            }
            if state.left.crashes > 0 {
                let mut next = *state;
                next.left.crashes -= 1;
                stop(&mut next, node, false);
                steps.add_failure(next, || format!("the process of n{node} crashes"));
            }
            if state.left.power_losses > 0 {
                let mut next = *state;
                next.left.power_losses -= 1;
                stop(&mut next, node, true);
                count_failure(&mut next, Bits::one(node));
                steps.add_failure(next, || format!("n{node} loses power and what was not flushed"));
            }
            if state.left.nodes_lost > 0 {
                let mut next = *state;
                next.left.nodes_lost -= 1;
                stop(&mut next, node, false);
                next.nodes[place].is_lost = true;
                count_failure(&mut next, Bits::one(node));
                steps.add_failure(next, || format!("n{node} is lost for ever"));
            }
        }
        if state.left.blackouts > 0 {
            let mut next = *state;
            next.left.blackouts -= 1;
            (0..NODES).for_each(|node| stop(&mut next, node, true));
            next.owner_is_gone = true;
            next.flushing = Bits::NONE;
            if !matches!(next.taker, Taker::Serving { .. }) {
                next.taker = Taker::Away;
                (next.asked, next.seen) = (Bits::NONE, Default::default());
            }
            count_failure(&mut next, Bits::below(NODES));
            steps.add_failure(next, || "everything loses power and what was not flushed".to_owned());
        }
    }
}

fn stop(state: &mut State, node: u8, loses_power: bool) {
    let stopped = &mut state.nodes[usize::from(node)];
    stopped.is_down = true;
    stopped.has_restarted = true;
    if loses_power {
        stopped.lost_power = true;
        stopped.stored = stopped.durable;
        for record in &mut state.records {
            record.stored -= Bits::one(node) - record.durable;
        }
    }
}

/// R7: with more than f = 1 failed nodes only what was flushed survives.
fn count_failure(state: &mut State, nodes: Bits) {
    state.failed |= nodes;
    if state.failed.count() > 1 {
        state.told = state.told_flushed;
        state.records.iter_mut().for_each(|record| record.is_at_risk = true);
    }
}

impl Model for Rows {
    type State = State;

    fn initial(&self) -> State {
        State { left: self.budget, ..State::default() }
    }

    fn successors(&self, state: &State, steps: &mut Steps<State>) {
        if !state.owner_is_gone {
            self.owner_steps(state, steps);
        }
        let is_over = matches!(state.taker, Taker::Serving { .. });
        if is_over && state.owner_is_gone {
            return;
        }
        (0..NODES).for_each(|node| self.node_steps(state, node, steps));
        self.taker_steps(state, steps);
        if !is_over {
            // Later failures take nothing from a taker that has re-sealed what it found.
            self.failure_steps(state, steps);
        }
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        state.is_broken.then_some("a taker serves without a write that was acknowledged or flushed (R1, R7)")
    }
}
