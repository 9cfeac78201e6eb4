//! While positions move: written at the new place, read there and then at the old one (P11, RFC 0006).

use crate::cluster::{Cluster, Dice, device, schemes, segment};
use lsm_block::store::{Holes, SegmentStore, StoreError};
use xsan_types::{DeviceId, PgId, PoolId, Scheme, SegmentName, ShardId, ShardIndex, VolumeId};

fn shard(name: SegmentName, index: usize) -> ShardId {
    ShardId { segment: name, index: ShardIndex(index as u8) }
}

impl Cluster {
    /// With as many spare nodes as the scheme is wide: positions of group 0 are on the first nodes, and move to those.
    fn to_move(scheme: Scheme) -> Self {
        Self::new(scheme, scheme.width())
    }

    fn begin_move(&mut self) {
        self.update(|view| {
            view.before = view.table.clone();
            let width = view.table[0].len();
            view.table[0] = (width..2 * width).map(|number| Some(device(number))).collect();
        });
    }

    fn has(&self, number: usize, name: SegmentName, index: usize) -> bool {
        self.nodes[number].state().shards.contains_key(&shard(name, index))
    }

    /// The shard of a position goes to its new place, and is nowhere else any more.
    fn carry(&self, name: SegmentName, index: usize, width: usize) {
        let carried = self.nodes[index].state().shards.remove(&shard(name, index)).expect("at its old place");
        self.nodes[width + index].state().shards.insert(shard(name, index), carried);
    }
}

#[tokio::test]
async fn reads_find_each_shard_wherever_it_is_while_it_moves() {
    let mut dice = Dice(1);
    for scheme in schemes() {
        for is_left in [false, true] {
            let (mut cluster, width) = (Cluster::to_move(scheme), scheme.width());
            let body = dice.bytes(1_500_000);
            assert_eq!(cluster.seal(segment(1), &body).await, Ok(Holes::default()));
            cluster.begin_move();
            cluster.nodes.iter().for_each(|node| node.state().is_left = is_left);
            for index in dice.choose(width, width) {
                cluster.check_reads(segment(1), &body, &mut dice, 3, "on the way").await;
                cluster.carry(segment(1), index, width);
            }
            cluster.check_reads(segment(1), &body, &mut dice, 3, "all carried").await;
            cluster.update(|view| view.before.clear());
            cluster.check_reads(segment(1), &body, &mut dice, 3, "moved").await;
            assert_eq!(cluster.pool.stats().corrupt_reads, 0);
        }
    }
}

#[tokio::test]
async fn a_new_place_that_is_away_does_not_hide_what_is_at_the_old_one() {
    for scheme in schemes() {
        let (mut cluster, width) = (Cluster::to_move(scheme), scheme.width());
        let body = Dice(2).bytes(1_000_000);
        cluster.seal(segment(1), &body).await.unwrap();
        cluster.begin_move();
        cluster.take_down(&(width..2 * width).collect::<Vec<_>>());
        cluster.check_reads(segment(1), &body, &mut Dice(3), 5, "all new places are away").await;
    }
}

#[tokio::test]
async fn what_is_lost_is_decoded_from_old_and_new_places() {
    let mut dice = Dice(4);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        for _ in 0..4 {
            let (mut cluster, width) = (Cluster::to_move(scheme), scheme.width());
            let body = dice.bytes(1_000_000);
            cluster.seal(segment(1), &body).await.unwrap();
            cluster.begin_move();
            let carried = dice.choose(width / 2, width);
            carried.iter().for_each(|&index| cluster.carry(segment(1), index, width));
            // The one device that has it: the new place of what was carried, else the old one.
            let place = |index| if carried.contains(&index) { width + index } else { index };
            let lost: Vec<usize> = dice.choose(scheme.tolerates(), width).into_iter().map(place).collect();
            cluster.take_down(&lost);
            let why = format!("{scheme}: carried {carried:?}, lost {lost:?}");
            cluster.check_reads(segment(1), &body, &mut dice, 3, &why).await;
        }
    }
}

#[tokio::test]
async fn holes_are_rebuilt_from_old_places_at_the_new_ones() {
    let mut dice = Dice(5);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        for is_left in [false, true] {
            let (mut cluster, width) = (Cluster::to_move(scheme), scheme.width());
            let body = dice.bytes(1_000_000);
            cluster.seal(segment(2), &body).await.unwrap();
            let gone = dice.choose(scheme.tolerates(), width);
            cluster.take_down(&gone);
            let holes = cluster.seal(segment(1), &body).await.unwrap();
            assert_eq!(holes.0.len(), gone.len());
            cluster.bring_up_all();
            cluster.begin_move();
            cluster.nodes.iter().for_each(|node| node.state().is_left = is_left);
            let carried = (0..width).find(|index| !gone.contains(index)).unwrap();
            cluster.carry(segment(1), carried, width);
            assert_eq!(cluster.pool.fill_holes(segment(1), body.len() as u64, holes).await, Ok(Holes::default()));
            for index in gone {
                let filled = cluster.shard(segment(1), index).expect("at the new place");
                let whole = cluster.nodes[index].state().shards[&shard(segment(2), index)].clone();
                assert!(filled.bytes == whole.bytes && !cluster.has(index, segment(1), index), "{scheme} {index}");
            }
        }
    }
}

#[tokio::test]
async fn seals_write_to_new_places_only() {
    for scheme in schemes() {
        let (mut cluster, width) = (Cluster::to_move(scheme), scheme.width());
        let body = Dice(6).bytes(1_000_000);
        cluster.begin_move();
        assert_eq!(cluster.seal(segment(1), &body).await, Ok(Holes::default()));
        for index in 0..width {
            assert!(cluster.has(width + index, segment(1), index) && !cluster.has(index, segment(1), index));
        }
        // Nobody writes to the old place because the new one is away.
        if scheme.tolerates() > 0 {
            cluster.take_down(&[width]);
            assert_eq!(cluster.seal(segment(2), &body).await, Ok(Holes(vec![ShardIndex(0)])));
            assert!(!cluster.has(0, segment(2), 0));
        }
    }
}

#[tokio::test]
async fn damage_at_an_old_place_is_repaired_there() {
    let mut cluster = Cluster::to_move(Scheme::rs(4, 2).unwrap());
    let body = Dice(7).bytes(1_000_000);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.damage(segment(1), 1, 5000);
    cluster.begin_move();
    let found = cluster.read_whole(segment(1), &body, 0, body.len()).await.expect("gone round");
    assert!(*found == *body);
    cluster.until(|cluster| cluster.pool.stats().repaired_blocks > 0).await;
    assert!(cluster.nodes[1].state().repairs > 0 && cluster.nodes[7].state().repairs == 0);
}

#[tokio::test]
async fn positions_that_do_not_move_have_no_place_before() {
    let mut cluster = Cluster::to_move(Scheme::rs(2, 1).unwrap());
    let pg = |index| PgId { pool: PoolId(1), index };
    assert_eq!(cluster.pool.positions_before(pg(0)), [None; 3]);
    cluster.begin_move();
    assert_eq!(cluster.pool.positions(pg(0)), [3, 4, 5].map(|number| Some(device(number))));
    assert_eq!(cluster.pool.positions_before(pg(0)), [0, 1, 2].map(|number| Some(device(number))));
    assert_eq!(cluster.pool.positions_before(pg(1)), [None; 3]);
    assert_eq!(cluster.pool.map_epoch(), cluster.view.epoch);
}

#[tokio::test]
async fn devices_that_are_emptied_carry_no_new_sets_and_do_not_count() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let leave = |cluster: &mut Cluster, numbers: &[usize]| {
        cluster.update(|view| numbers.iter().for_each(|&n| view.devices.get_mut(&device(n)).unwrap().leaving = true));
    };
    leave(&mut cluster, &[1, 4]);
    for volume in 0..500 {
        let set = cluster.pool.plan_set(VolumeId(volume), &[]).unwrap();
        assert!(set.len() == 3 && !set.contains(&device(1)) && !set.contains(&device(4)), "{set:?}");
    }
    assert!(cluster.pool.is_leaving(device(4)) && !cluster.pool.is_leaving(device(0)));
    assert!(cluster.pool.is_leaving(DeviceId(99)), "not of this pool");
    assert_eq!(cluster.pool.set_size(), 3);
    leave(&mut cluster, &[2, 3]);
    assert_eq!(cluster.pool.set_size(), 2, "what it may grow to without them");
    assert_eq!(cluster.pool.plan_set(VolumeId(1), &[]).map(|set| set.len()), Ok(2));
    leave(&mut cluster, &[5]);
    assert_eq!(cluster.pool.plan_set(VolumeId(1), &[]), Err(StoreError::TooFew { found: 1, needed: 2 }));
}
