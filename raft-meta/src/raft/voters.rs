//! Who should vote: 1, 3 or 5 replicas, no two on one host, spread over racks and zones. Pure: the leader asks for the next step
//! whenever nothing is under way, and arrives after finitely many (each step brings the voters nearer to the same goal).
//!
//! A node that is only away keeps its vote: it comes back, and moving votes at every restart would be worse than one vote
//! missing for a while. One that is being emptied, was removed, or has joined again under a new replica loses it: to its
//! successor, in one change, once that has caught up. Until then its vote stands, though perhaps nobody casts it: fewer voters
//! would outlive fewer losses at the very time when one was just lost. Only the number of hosts that are to stay says how many
//! vote, not how many of them are well.

use crate::raft::entry::{ReplicaId, Role, Step};
use crate::raft::machine::Machine;
use crate::state::{MetaState, Node, NodeState};
use std::collections::BTreeSet;
use xsan_types::NodeId;

/// Most voters: they outlive two losses at once.
pub const VOTERS_MAX: usize = 5;

/// What a replica's node makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// May vote.
    Good,
    /// May go on voting, and is not chosen anew: its node is away, or it has not caught up.
    Away,
    /// Must not vote: its node is being emptied.
    Leaving,
    /// Is no member any more: its node is removed, or has a younger replica.
    Gone,
}

/// A member as the choice sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Zone, rack and host, outermost first: what fails together.
    pub domain: [String; 3],
    /// What its node makes of it.
    pub standing: Standing,
    /// Whether it votes now.
    pub votes: bool,
}

/// Everything the choice depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Who asks.
    pub leader: ReplicaId,
    /// All members.
    pub members: Vec<Candidate>,
    /// Hosts of nodes that join and whose replica is no member yet: it comes next.
    pub awaited: BTreeSet<[String; 3]>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Change members.
    Change(Vec<Step>),
    /// Hand the lead over, so that the leader can be changed.
    Transfer(ReplicaId),
}

impl Input {
    /// The members as `machine` knows them; `is_current` says who has nearly all entries.
    #[must_use]
    pub fn new(machine: &Machine, leader: ReplicaId, is_current: &dyn Fn(ReplicaId) -> bool) -> Self {
        let youngest = |node: NodeId| machine.members.values().filter(|m| m.node == node).map(|m| m.since).max();
        let members = machine.members.iter().map(|(&replica, member)| {
            let node = machine.state.nodes.get(&member.node);
            let votes = machine.configuration.voters.contains(&replica);
            let standing = match node.map(|node| node.state) {
                // A replica may be there before its node is made known (the first one is).
                None => Standing::Good,
                Some(NodeState::Removed) => Standing::Gone,
                _ if youngest(member.node) != Some(member.since) => Standing::Gone,
                Some(NodeState::Draining) => Standing::Leaving,
                Some(NodeState::Down | NodeState::Suspect) => Standing::Away,
                Some(NodeState::Joining | NodeState::Up) => Standing::Good,
            };
            let standing = if is_current(replica) { standing } else { standing.max(Standing::Away) };
            let domain = domain(&machine.state, member.node, node);
            Candidate { replica, node: member.node, domain, standing, votes }
        });
        let has_replica = |node: &Node| machine.members.values().any(|member| member.node == node.id);
        let joining =
            machine.state.nodes.values().filter(|node| node.state == NodeState::Joining && !has_replica(node));
        let awaited = joining.map(|node| domain(&machine.state, node.id, Some(node))).collect();
        Self { leader, members: members.collect(), awaited }
    }
}

fn domain(state: &MetaState, id: NodeId, node: Option<&Node>) -> [String; 3] {
    let Some(node) = node else { return [String::new(), String::new(), id.to_string()] };
    let text = |name: &Option<crate::name::Name>| name.as_ref().map_or_else(String::new, ToString::to_string);
    // In a cluster on one host nodes are all there is to tell apart.
    let host = if state.single_host { id.to_string() } else { node.host.to_string() };
    [text(&node.zone), text(&node.rack), host]
}

/// The next step; `None`: the voters are as they should be, or nothing can be done about it now.
#[must_use]
pub fn next_step(input: &Input) -> Option<Next> {
    let wanted = wanted_voters(input);
    if wanted.is_empty() {
        return None;
    }
    let step = |member: &Candidate, role| Step { replica: member.replica, node: member.node, role };
    // A leader that is to go hands over first: changing the others before would leave two voters, and need both. It does so also
    // while its vote waits for a successor.
    let goes = |member: &Candidate| member.replica == input.leader && member.standing >= Standing::Leaving;
    let leader_goes = !wanted.contains(&input.leader) || input.members.iter().any(goes);
    let heirs = input.members.iter().filter(|member| wanted.contains(&member.replica) && member.votes);
    let heir = heirs.filter(|member| member.standing == Standing::Good).min_by_key(|member| member.node);
    if let Some(heir) = heir.filter(|_| leader_goes) {
        return Some(Next::Transfer(heir.replica));
    }
    let mut steps = Vec::new();
    for member in &input.members {
        let is_wanted = wanted.contains(&member.replica);
        match (is_wanted, member.votes) {
            (true, false) => steps.push(step(member, Role::Voter)),
            (false, true) if member.replica == input.leader => {}
            (false, true) if member.standing == Standing::Gone => steps.push(step(member, Role::Removed)),
            (false, true) => steps.push(step(member, Role::Learner)),
            (false, false) if member.standing == Standing::Gone => steps.push(step(member, Role::Removed)),
            _ => {}
        }
    }
    steps.truncate(crate::raft::entry::STEPS_MAX);
    (!steps.is_empty()).then_some(Next::Change(steps))
}

/// Who should vote.
fn wanted_voters(input: &Input) -> BTreeSet<ReplicaId> {
    let may =
        |member: &&Candidate| member.standing == Standing::Good || (member.standing == Standing::Away && member.votes);
    let mut pool: Vec<&Candidate> = input.members.iter().filter(may).collect();
    // Voters keep their place before others take it, the leader first.
    pool.sort_by_key(|member| (!member.votes, member.replica != input.leader, member.standing, member.node));
    let count = wanted_count(input, &pool);
    let mut chosen: Vec<&Candidate> = Vec::new();
    while chosen.len() < count {
        // The first of those that share least with the chosen ones: no host ever, then as few racks and zones as can be.
        let free = pool.iter().filter(|member| chosen.iter().all(|other| other.domain != member.domain));
        let Some(best) = free.min_by_key(|member| shared(member, &chosen)) else { break };
        chosen.push(best);
    }
    // Those that are to go keep the places that nobody can take yet, the living ones first.
    let is_chosen = |member: &&Candidate| chosen.iter().any(|other| other.replica == member.replica);
    let mut rest: Vec<&Candidate> = input.members.iter().filter(|member| member.votes && !is_chosen(member)).collect();
    rest.sort_by_key(|member| {
        let shares_host = chosen.iter().any(|other| other.domain == member.domain);
        (shares_host, member.standing, member.replica != input.leader, member.node)
    });
    let places = count.saturating_sub(chosen.len());
    chosen.iter().chain(rest.iter().take(places)).map(|member| member.replica).collect()
}

/// How many should vote, of whom `pool` may be chosen: what suits the hosts that stay, if so many may be chosen now; else as many
/// as can be, an odd number, but no fewer than do.
fn wanted_count(input: &Input, pool: &[&Candidate]) -> usize {
    let staying = input.members.iter().filter(|member| member.standing < Standing::Leaving);
    let staying: BTreeSet<&[String; 3]> = staying.map(|member| &member.domain).chain(&input.awaited).collect();
    let suits = match staying.len() {
        0 => return 0,
        1 | 2 => 1,
        3 | 4 => 3,
        _ => VOTERS_MAX,
    };
    let ready: BTreeSet<&[String; 3]> = pool.iter().map(|member| &member.domain).collect();
    // Two voters need both and four need three: each is worse than one fewer.
    let odd = ready.len().saturating_sub(1) | 1;
    let present = input.members.iter().filter(|member| member.votes).count();
    suits.min(odd.max(present))
}

/// How often the zone, then the rack, is taken already.
fn shared(member: &Candidate, chosen: &[&Candidate]) -> (usize, usize) {
    let alike = |levels: usize| chosen.iter().filter(|other| other.domain[..levels] == member.domain[..levels]).count();
    (alike(1), alike(2))
}
