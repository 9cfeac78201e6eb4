//! Which devices carry a journal set, and which placement group a segment gets. Pure functions of the map.

use crate::view::{Link, View};
use lsm_block::store::StoreError;
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_types::{DeviceId, PgId, PoolId, VolumeId};

/// Groups looked at for one that lies on the members' devices.
const GROUPS_COMPARED: usize = 1024;

/// Spreads the bits of `value` (the finaliser of splitmix64).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Hash of a volume and a number.
pub(crate) fn hash(a: u64, b: u64) -> u64 {
    mix(mix(a).rotate_left(32) ^ b)
}

/// Weighted rendezvous: the smallest score wins with a probability in proportion to the weight.
fn score(volume: VolumeId, link: &Link, most_free: u64) -> f64 {
    let bits = hash(volume.0, hash(link.device.0 as u64, (link.device.0 >> 64) as u64));
    let uniform = ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    // Free space counts only once a device has less than half of what the emptiest one has: members are small and move on.
    let share = if most_free == 0 { 1.0 } else { link.free as f64 * 2.0 / most_free as f64 };
    -uniform.ln() / share.clamp(0.001, 1.0)
}

/// Devices for a journal set of `wanted` members, at least `least`: up, in different domains, none of `avoid`, best first.
pub(crate) fn plan_set(
    view: &View,
    volume: VolumeId,
    avoid: &[DeviceId],
    wanted: usize,
    least: usize,
) -> Result<Vec<DeviceId>, StoreError> {
    let is_usable = |link: &&Arc<Link>| link.up && !link.leaving && !avoid.contains(&link.device);
    let usable = || view.links().iter().filter(is_usable);
    let most_free = usable().map(|link| link.free).max().unwrap_or(0);
    let mut domains: BTreeMap<&str, (f64, &Arc<Link>)> = BTreeMap::new();
    for link in usable() {
        let score = score(volume, link, most_free);
        let best = domains.entry(&*link.domain).or_insert((score, link));
        if score < best.0 {
            *best = (score, link);
        }
    }
    let found = domains.len();
    if found < least {
        return Err(StoreError::TooFew { found, needed: least });
    }
    let mut ranked: Vec<(f64, &Arc<Link>)> = domains.into_values().collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(ranked.into_iter().take(wanted).map(|(_, link)| link.device).collect())
}

/// A group for a segment: among those with the most positions up, spread by hash. `members`, if any, are devices whose
/// groups are preferred, so that a replica can become a shard where it lies (P6).
pub(crate) fn choose_pg(view: &View, pool: PoolId, volume: VolumeId, number: u64, members: &[DeviceId]) -> PgId {
    let at = |step: usize, start: u64| {
        let index = (start.wrapping_add(step as u64) % view.best.len().max(1) as u64) as usize;
        view.best.get(index).copied().unwrap_or(0)
    };
    let start = hash(volume.0, number);
    let mut chosen = at(0, start);
    if !members.is_empty() {
        let compared = view.best.len().min(GROUPS_COMPARED);
        let mut most = view.overlap(chosen, members);
        for step in 1..compared {
            if most >= members.len() {
                break;
            }
            let group = at(step, start);
            let overlap = view.overlap(group, members);
            if overlap > most {
                (most, chosen) = (overlap, group);
            }
        }
    }
    PgId { pool, index: chosen }
}
