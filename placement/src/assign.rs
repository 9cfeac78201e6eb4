//! Fills the table: keep what may stay, fill what is empty, then let joined devices take their share from the overloaded.

use crate::error::PlacementError;
use crate::hash::{self, combine, exponential};
use crate::table::{PG_COUNT_MAX, PgTable, Shape, WIDTH_MAX};
use crate::targets::{Layout, Slot};
use crate::topology::Topology;
use xsan_types::PgId;

/// A position that no device holds.
const HOLE: u32 = u32::MAX;

/// With a previous table, a device takes positions from others only if it lacks more than this part of its fair share:
/// data is not moved to even out what hashing left.
const LACK_TOLERATED: f64 = 0.05;

/// Positions a device may lack once it has taken its share: it cannot hold half of one.
const LACK_IGNORED: f64 = 0.5;

/// A number of groups that spreads well: about 100 positions per device, a power of two, 32..=65536.
#[must_use]
pub fn suggested_pg_count(device_count: usize, width: usize) -> u32 {
    let wanted = device_count.saturating_mul(100) / width.max(1);
    u32::try_from(wanted.clamp(32, 1 << 16)).unwrap_or(1 << 16).next_power_of_two()
}

/// The table of `shape` for `topology`.
///
/// Without `previous`, a fresh one. With it, positions stay where they are; only these change: positions whose device is
/// gone, out or no longer in a domain of its own; and positions that a device which lacks its share takes from devices that
/// hold more than theirs. `previous` may have fewer groups (the pool grows) and another failure domain.
///
/// Deterministic, and independent of the order in which the devices were listed. Time: about
/// `pg_count * domains` hashes when fresh.
///
/// # Errors
/// `TooFewDomains` if fewer than `width` failure domains take data; `Width`, `PgCount`; `PreviousShape`.
pub fn assign(topology: &Topology, shape: Shape, previous: Option<&PgTable>) -> Result<PgTable, PlacementError> {
    assign_with_holes(topology, shape, shape.width, previous)
}

/// As [`assign`], but only `least` failure domains are needed: with fewer domains than positions, some stay holes. For a
/// cluster that lost nodes for good and has no spare ones; `least` is the scheme's k.
///
/// # Errors
/// As [`assign`].
pub fn assign_with_holes(
    topology: &Topology,
    shape: Shape,
    least: usize,
    previous: Option<&PgTable>,
) -> Result<PgTable, PlacementError> {
    if shape.width == 0 || shape.width > WIDTH_MAX {
        return Err(PlacementError::Width { width: shape.width });
    }
    if shape.pg_count == 0 || shape.pg_count > PG_COUNT_MAX {
        return Err(PlacementError::PgCount { count: shape.pg_count });
    }
    if let Some(table) = previous {
        let before = table.shape();
        if (before.pool, before.width) != (shape.pool, shape.width) || before.pg_count > shape.pg_count {
            return Err(PlacementError::PreviousShape);
        }
    }
    let layout = Layout::new(topology, shape);
    if layout.domains.len() < least {
        let (found, domain) = (layout.domains.len(), shape.failure_domain);
        return Err(PlacementError::TooFewDomains { domain, found, needed: least });
    }
    let mut plan = Plan::new(layout, shape);
    if let Some(table) = previous {
        plan.keep(table);
    }
    let joined: Vec<bool> = plan.layout.slots.iter().map(|slot| slot.load == 0).collect();
    let vacated = plan.cells.contains(&HOLE);
    plan.fill();
    plan.even_out(Donors::Filled, |_, slot| slot.excess() < -LACK_IGNORED);
    plan.give_excess();
    // One kind of movement at a time, so that each is minimal: a loss moves only what was lost, a join only what the joined
    // devices take. Without either, what lacks for another reason (a weight grew) is evened out.
    if joined.contains(&true) {
        plan.even_out(Donors::All, |at, slot| joined[at] && lacks(slot, LACK_TOLERATED));
    } else if !vacated {
        plan.even_out(Donors::All, |_, slot| lacks(slot, LACK_TOLERATED));
    }
    Ok(plan.into_table())
}

/// Whether a device lacks at least a position and more than the part `tolerated` of its fair share.
fn lacks(slot: &Slot, tolerated: f64) -> bool {
    -slot.excess() > 1.0_f64.max(tolerated * slot.target)
}

/// From where an underloaded device may take positions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Donors {
    /// Only what was filled just now: no data lies there yet.
    Filled,
    /// Any position: this moves data.
    All,
}

/// The table while it is made: slot numbers, `width` per group.
struct Plan {
    layout: Layout,
    shape: Shape,
    cells: Vec<u32>,
    /// Per cell whether it was taken over from the previous table.
    kept: Vec<bool>,
    pg_hashes: Vec<u64>,
    /// Per domain the last group (plus one) that was seen to use it: a set that is emptied by counting on.
    used_by: Vec<u32>,
}

impl Plan {
    fn new(layout: Layout, shape: Shape) -> Self {
        let pg_hashes = (0..shape.pg_count).map(|index| hash::of_pg(PgId { pool: shape.pool, index })).collect();
        let cells = vec![HOLE; shape.pg_count as usize * shape.width];
        let kept = vec![false; cells.len()];
        let used_by = vec![0; layout.domains.len()];
        Self { layout, shape, cells, kept, pg_hashes, used_by }
    }

    fn group(&self, pg: u32) -> &[u32] {
        &self.cells[pg as usize * self.shape.width..][..self.shape.width]
    }

    fn kept_of(&self, pg: u32) -> &[bool] {
        &self.kept[pg as usize * self.shape.width..][..self.shape.width]
    }

    fn set(&mut self, pg: u32, position: usize, slot: u32) {
        let cell = &mut self.cells[pg as usize * self.shape.width + position];
        if *cell != HOLE {
            self.layout.unload(*cell);
        }
        *cell = slot;
        self.layout.load(slot);
    }

    /// Marks the domains that a group uses.
    fn mark(&mut self, pg: u32) {
        for position in 0..self.shape.width {
            let slot = self.group(pg)[position];
            if slot != HOLE {
                self.used_by[self.layout.slots[slot as usize].domain as usize] = pg + 1;
            }
        }
    }

    /// Takes over every position whose device takes data and is alone in its failure domain.
    fn keep(&mut self, previous: &PgTable) {
        for (pg, devices) in (0..).zip(&previous.positions) {
            for (position, device) in devices.iter().enumerate().take(self.shape.width) {
                let Some(slot) = device.and_then(|id| self.layout.find(id)) else { continue };
                let used = &mut self.used_by[self.layout.slots[slot as usize].domain as usize];
                if *used != pg + 1 {
                    *used = pg + 1;
                    self.kept[pg as usize * self.shape.width + position] = true;
                    self.set(pg, position, slot);
                }
            }
        }
        self.used_by.fill(0);
    }

    /// Fills holes, group by group.
    fn fill(&mut self) {
        let mut picked = Vec::with_capacity(self.shape.width);
        for pg in 0..self.shape.pg_count {
            let holes = self.group(pg).iter().filter(|slot| **slot == HOLE).count();
            if holes == 0 {
                continue;
            }
            self.mark(pg);
            self.pick_domains(pg, holes, &mut picked);
            let hash = self.pg_hashes[pg as usize];
            let mut slots: Vec<u32> = picked.iter().map(|(_, domain)| self.pick_slot(hash, *domain)).collect();
            // Highest score first would put heavy devices on the low positions, and those serve all reads.
            slots.sort_by_key(|slot| combine(!hash, self.layout.slots[*slot as usize].hash));
            let mut slots = slots.into_iter();
            for position in 0..self.shape.width {
                if self.group(pg)[position] == HOLE
                    && let Some(slot) = slots.next()
                {
                    self.set(pg, position, slot);
                }
            }
        }
    }

    /// The `count` best domains that the group does not use: those with room by weighted score; when they do not suffice,
    /// those that are least beyond their share. Fewer only if there are no more.
    fn pick_domains(&self, pg: u32, count: usize, picked: &mut Vec<(f64, u32)>) {
        picked.clear();
        let hash = self.pg_hashes[pg as usize];
        let mut offer = |score: f64, domain: u32, count: usize| {
            if picked.len() == count && picked.last().is_some_and(|(worst, _)| *worst <= score) {
                return;
            }
            let at = picked.partition_point(|(other, _)| *other <= score);
            picked.insert(at, (score, domain));
            picked.truncate(count);
        };
        let free = || (0u32..).zip(&self.layout.domains).filter(|(at, _)| self.used_by[*at as usize] != pg + 1);
        for (at, domain) in free().filter(|(_, domain)| domain.has_room()) {
            offer(exponential(combine(hash, domain.hash)) / domain.weight, at, count);
        }
        if picked.len() == count {
            return;
        }
        // Near the end of a fresh table few domains have room: go on with those that are nearest to their share.
        let mut rest: Vec<(f64, u32)> = free()
            .filter(|(_, domain)| !domain.has_room())
            .map(|(at, domain)| (f64::from(domain.load) - domain.target, at))
            .collect();
        rest.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let missing = count - picked.len();
        picked.extend(rest.into_iter().take(missing));
    }

    /// The device of a domain for a group: by weighted score among those with room, else the one least beyond its share.
    fn pick_slot(&self, hash: u64, domain: u32) -> u32 {
        let score = |slot: &Slot| match slot.has_room() {
            true => (0, exponential(combine(hash, slot.hash)) / slot.weight),
            false => (1, slot.excess()),
        };
        self.layout
            .slots_of(domain)
            .map(|(at, slot)| (score(slot), at))
            .min_by(|(a, x), (b, y)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(x.cmp(y)))
            .map(|(_, at)| at)
            .expect("a domain has at least one device")
    }

    /// Lets the chosen devices take positions from devices that hold more than their share; the one that lacks the largest
    /// part goes first.
    fn even_out(&mut self, donors: Donors, chosen: impl Fn(usize, &Slot) -> bool) {
        let mut receivers: Vec<u32> = (0u32..)
            .zip(&self.layout.slots)
            .filter(|(at, slot)| chosen(*at as usize, slot))
            .map(|(at, _)| at)
            .collect();
        let part = |at: &u32| {
            let slot = &self.layout.slots[*at as usize];
            slot.excess() / slot.target
        };
        receivers.sort_by(|a, b| part(a).total_cmp(&part(b)).then(a.cmp(b)));
        if receivers.is_empty() {
            return;
        }
        let groups: Vec<u32> =
            (0..self.shape.pg_count).filter(|pg| donors == Donors::All || self.kept_of(*pg).contains(&false)).collect();
        for receiver in receivers {
            self.take_share(receiver, donors, &groups);
        }
    }

    /// Lets one device take positions until it has its share: first in the groups where its score is highest.
    fn take_share(&mut self, receiver: u32, donors: Donors, candidates: &[u32]) {
        let own = self.layout.slots[receiver as usize].hash;
        // Groups in descending order of the score, fetched in portions: sorting all of them is rarely needed.
        let mut above = u64::MAX;
        let mut portion = (-self.layout.slots[receiver as usize].excess() * 4.0).max(64.0) as u64;
        while above > 0 {
            let part = (u128::from(portion) << 64) / candidates.len().max(1) as u128;
            let below = above.saturating_sub(u64::try_from(part).unwrap_or(u64::MAX));
            let mut groups: Vec<(u64, u32)> = candidates
                .iter()
                .map(|pg| (combine(self.pg_hashes[*pg as usize], own), *pg))
                .filter(|(score, _)| (*score < above || above == u64::MAX) && *score >= below)
                .collect();
            groups.sort_unstable_by(|a, b| b.cmp(a));
            for (_, pg) in groups {
                if self.layout.slots[receiver as usize].excess() >= -LACK_IGNORED {
                    return;
                }
                if let Some(position) = self.donor(pg, receiver, donors) {
                    self.set(pg, position, receiver);
                }
            }
            above = below;
            portion = portion.saturating_mul(4);
        }
    }

    /// The position of a group that `receiver` may take: held beyond the holder's share, nearer to fairness afterwards, and
    /// no two positions in one domain. The most overloaded holder gives.
    fn donor(&self, pg: u32, receiver: u32, donors: Donors) -> Option<usize> {
        let to = &self.layout.slots[receiver as usize];
        let kept = self.kept_of(pg);
        let holders = || {
            let held = self.group(pg).iter().enumerate().filter(|(_, slot)| **slot != HOLE);
            held.map(|(position, slot)| (position, &self.layout.slots[*slot as usize]))
        };
        let same_domain = holders().find(|(_, slot)| slot.domain == to.domain).map(|(position, _)| position);
        holders()
            .filter(|(position, _)| donors == Donors::All || !kept[*position])
            .filter(|(position, _)| same_domain.is_none_or(|only| only == *position))
            .filter(|(_, from)| from.excess() > 0.0 && from.excess() - to.excess() > 1.0)
            .max_by(|(a, x), (b, y)| x.excess().total_cmp(&y.excess()).then(b.cmp(a)))
            .map(|(position, _)| position)
    }

    /// Lets devices that hold more than a position too many hand positions filled just now to those that lack most: many small
    /// lacks, none large enough to be seen by [`Plan::even_out`], can add up to one large excess.
    fn give_excess(&mut self) {
        let over = |slot: &Slot| slot.excess() > 1.0;
        let mut givers: Vec<u32> =
            (0u32..).zip(&self.layout.slots).filter(|(_, slot)| over(slot)).map(|(at, _)| at).collect();
        givers.sort_by(|a, b| {
            let excess = |at: &u32| self.layout.slots[*at as usize].excess();
            excess(b).total_cmp(&excess(a)).then(a.cmp(b))
        });
        for giver in givers {
            for pg in 0..self.shape.pg_count {
                if !over(&self.layout.slots[giver as usize]) {
                    break;
                }
                let Some(position) = self.group(pg).iter().position(|slot| *slot == giver) else { continue };
                if self.kept_of(pg)[position] {
                    continue;
                }
                if let Some(receiver) = self.taker(pg, giver) {
                    self.set(pg, position, receiver);
                }
            }
        }
    }

    /// The device that lacks most among those that may take the position of `giver`, if that brings both nearer to fairness.
    fn taker(&mut self, pg: u32, giver: u32) -> Option<u32> {
        self.used_by.fill(0);
        self.mark(pg);
        let from = &self.layout.slots[giver as usize];
        (0u32..)
            .zip(&self.layout.slots)
            .filter(|(_, to)| to.domain == from.domain || self.used_by[to.domain as usize] != pg + 1)
            .filter(|(_, to)| from.excess() - to.excess() > 1.0)
            .min_by(|(_, a), (_, b)| a.excess().total_cmp(&b.excess()))
            .map(|(at, _)| at)
    }

    fn into_table(self) -> PgTable {
        let device = |slot: &u32| self.layout.slots.get(*slot as usize).map(|slot| slot.id);
        PgTable {
            pool: self.shape.pool,
            width: self.shape.width,
            failure_domain: self.shape.failure_domain,
            positions: self.cells.chunks(self.shape.width).map(|group| group.iter().map(device).collect()).collect(),
        }
    }
}
