use super::*;
use crate::store::Registers;
use futures::FutureExt;
use xsan_types::{ChangeToken, CheckpointRef, Crc32c, MemberState, RegisterChange, RegisterError, Sequence};

const VOLUME: VolumeId = VolumeId(7);

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("without a world every call is ready at once")
}

fn name(number: u64) -> SegmentName {
    SegmentName { volume: VOLUME, generation: Generation(1), number, pg: PgId { pool: PoolId(1), index: 0 } }
}

fn member(store: &MemoryStore, device: u32) -> MemberRef {
    let device = DeviceId(device.into());
    let set = SetId { generation: Generation(1), number: 1 };
    let made = now(store.create_member(device, VOLUME, set, Vec::new())).unwrap();
    MemberRef { device, volume: VOLUME, set, incarnation: made.incarnation }
}

fn block(byte: u8) -> Buf {
    Buf::copied(&[byte; 4096])
}

#[test]
fn an_append_answers_the_contiguous_length() {
    let store = MemoryStore::new(MemoryConfig::default());
    let at = member(&store, 1);
    assert_eq!(now(store.append(at, name(1), 4096, block(2))), Ok(0));
    assert_eq!(now(store.append(at, name(1), 0, block(1))), Ok(8192));
}

#[test]
fn a_restart_closes_members_and_keeps_what_they_completed() {
    let store = MemoryStore::new(MemoryConfig::default());
    let at = member(&store, 1);
    now(store.append(at, name(1), 0, block(1))).unwrap();
    store.stop(at.device);
    assert_eq!(now(store.confirm(at)), Err(StoreError::Unavailable { device: at.device }));
    store.start(at.device);
    assert_eq!(now(store.append(at, name(1), 4096, block(1))), Err(StoreError::Closed { device: at.device }));
    let closed = now(store.close(at.device, VOLUME, Generation(2))).unwrap();
    assert_eq!(closed[0].state, MemberState::Whole);
    let replica = now(store.read_replica(at.device, VOLUME, at.set, name(1), 0, 4096)).unwrap();
    assert_eq!(&*replica, &[1; 4096]);
    assert_eq!(closed[0].replicas[0].length, 1 << 20, "the reserved length is told, not the written one");
}

#[test]
fn a_power_loss_keeps_what_was_flushed() {
    for seed in 0..20 {
        let store = MemoryStore::new(MemoryConfig { seed, ..MemoryConfig::default() });
        let at = member(&store, 1);
        now(store.append(at, name(1), 0, block(1))).unwrap();
        let request = FlushRequest {
            device: at.device,
            incarnation: at.incarnation,
            member: Some(at),
            replicas: vec![(name(1), 4096)],
            shards: Vec::new(),
        };
        now(store.flush(request)).unwrap();
        now(store.append(at, name(1), 4096, block(2))).unwrap();
        store.power_loss(at.device);
        store.start(at.device);
        let closed = now(store.close(at.device, VOLUME, Generation(2))).unwrap();
        assert_eq!(closed[0].state, MemberState::Flushed);
        let replica = now(store.read_replica(at.device, VOLUME, at.set, name(1), 0, 4096)).unwrap();
        assert_eq!(&*replica, &[1; 4096]);
    }
}

#[test]
fn closing_refuses_older_generations_and_their_appends() {
    let store = MemoryStore::new(MemoryConfig::default());
    let at = member(&store, 1);
    now(store.close(at.device, VOLUME, Generation(3))).unwrap();
    let closed = StoreError::Closed { device: at.device };
    assert_eq!(now(store.append(at, name(1), 0, block(1))), Err(closed.clone()));
    assert_eq!(now(store.close(at.device, VOLUME, Generation(2))), Err(closed));
}

#[test]
fn a_segment_is_read_from_any_k_devices_and_holes_are_filled() {
    let store = MemoryStore::new(MemoryConfig::default());
    store.stop(DeviceId(6));
    let holes = now(store.seal(name(1), vec![block(1), block(2)])).unwrap();
    assert_eq!(holes, Holes(vec![ShardIndex(5)]));
    let read = |crc| SegmentRead { segment: name(1), segment_bytes: 8192, offset: 4096, length: 4096, check: crc };
    let good = || read(Check::Blocks(vec![crc32c(&[2; 4096])]));
    store.stop(DeviceId(1));
    assert_eq!(&*now(store.read(good())).unwrap(), &[2; 4096]);
    assert!(matches!(now(store.read(read(Check::Whole(Crc32c(1))))), Err(StoreError::Corrupt { .. })));
    store.stop(DeviceId(2));
    assert_eq!(now(store.read(good())).unwrap_err(), StoreError::TooFew { found: 3, needed: 4 });
    store.start(DeviceId(6));
    assert_eq!(now(store.read(good())).unwrap_err(), StoreError::TooFew { found: 3, needed: 4 });
    store.start(DeviceId(1));
    assert_eq!(now(store.fill_holes(name(1), 8192, holes)), Ok(Holes::default()));
    store.lose(DeviceId(1));
    assert_eq!(&*now(store.read(good())).unwrap(), &[2; 4096]);
    now(store.delete(vec![name(1)])).unwrap();
    assert_eq!(now(store.read(good())).unwrap_err(), StoreError::NotFound);
}

#[test]
#[should_panic(expected = "sealed before it was acknowledged")]
fn sealing_a_replica_with_a_gap_is_a_bug() {
    let store = MemoryStore::new(MemoryConfig::default());
    let at = member(&store, 1);
    now(store.append(at, name(1), 4096, block(2))).unwrap();
    now(store.seal(name(1), vec![block(1), block(2)])).unwrap();
    let sealed =
        SealedSegment { name: name(1), bytes: 8192, footer_offset: 4096, footer_crc: crc32c(&[2; 4096]), holes: 0 };
    drop(now(store.sealed(at, sealed)));
}

#[test]
fn rows_are_complete_on_all_positions_or_fail() {
    let store = MemoryStore::new(MemoryConfig::default());
    assert!(store.rows_possible());
    let rows = now(store.open_rows(name(1))).unwrap();
    let row = || vec![Buf::copied(&vec![9; 4 * UNIT as usize])];
    now(rows.append(0, row())).unwrap();
    assert_eq!(rows.flush_requests().len(), 6);
    for request in rows.flush_requests() {
        now(store.flush(request)).unwrap();
    }
    store.stop(DeviceId(3));
    assert!(!store.rows_possible());
    assert_eq!(now(rows.append(1, row())), Err(StoreError::Unavailable { device: DeviceId(3) }));
    let read = SegmentRead {
        segment: name(1),
        segment_bytes: 4 * UNIT,
        offset: 0,
        length: 4096,
        check: Check::Whole(crc32c(&[9; 4096])),
    };
    assert!(now(store.read(read)).is_ok(), "k units are enough");
    assert_eq!(now(rows.finish(block(3))), Err(StoreError::Unavailable { device: DeviceId(3) }));
}
const UNIT: u64 = xsan_types::UNIT_BYTES;

#[test]
fn planned_faults_hit_the_call_they_are_planned_for() {
    let store = MemoryStore::new(MemoryConfig::default());
    let at = member(&store, 1);
    store.plan(0, Fault::Refuse);
    store.plan(1, Fault::LoseAnswer);
    store.plan(2, Fault::Stall);
    let away = StoreError::Unavailable { device: at.device };
    assert_eq!(now(store.append(at, name(1), 0, block(1))), Err(away.clone()));
    assert_eq!(now(store.append(at, name(1), 0, block(1))), Err(away));
    let mut stalled = store.append(at, name(1), 4096, block(1));
    assert!((&mut stalled).now_or_never().is_none());
    assert_eq!(now(store.append(at, name(1), 8192, block(1))), Ok(4096), "the lost answer had its effect");
    store.release();
    assert_eq!(now(stalled), Ok(12288));
}

#[test]
fn a_register_answers_a_repeated_change_as_the_first_time() {
    let registers = MemoryRegisters::new();
    registers.create(VOLUME, 1 << 20);
    let take = |token| registers.change(VOLUME, Generation(0), 0, ChangeToken(token), RegisterChange::Take);
    registers.plan(0, RegisterFault::LoseAnswer);
    registers.plan(1, RegisterFault::LoseRequest);
    assert_eq!(now(take(1)), Err(RegisterError::NoAnswer));
    assert_eq!(now(take(1)), Err(RegisterError::NoAnswer));
    assert_eq!(now(take(1)).unwrap().generation, Generation(1));
    assert_eq!(now(take(2)).unwrap().generation, Generation(2));
    let stale = registers.change(VOLUME, Generation(1), 2, ChangeToken(3), RegisterChange::Resize(4096));
    assert_eq!(now(stale), Err(RegisterError::NewerOwner { current: Generation(2), writer: Generation(1) }));
    let wrong = registers.change(VOLUME, Generation(2), 2, ChangeToken(4), RegisterChange::Resize(4096));
    assert_eq!(now(wrong), Err(RegisterError::Version { current: 3, writer: 2 }));
}

#[test]
#[should_panic(expected = "is not decided")]
fn deleting_an_undecided_name_is_a_bug() {
    let store = MemoryStore::new(MemoryConfig::default());
    let registers = MemoryRegisters::new();
    registers.create(VOLUME, 1 << 20);
    store.check_against(&registers);
    let generation = now(registers.change(VOLUME, Generation(0), 0, ChangeToken(1), RegisterChange::Take)).unwrap();
    let checkpoint = CheckpointRef {
        segment: name(2),
        segment_bytes: 4096,
        root_offset: 0,
        root_bytes: 4096,
        root_crc: Crc32c(0),
        border: 2,
    };
    let change = RegisterChange::Checkpoint(checkpoint);
    now(registers.change(VOLUME, generation.generation, generation.version, ChangeToken(2), change)).unwrap();
    let _ = Sequence(0);
    now(store.seal(name(1), vec![block(1)])).unwrap();
    now(store.seal(name(2), vec![block(1)])).unwrap();
    now(store.delete(vec![name(1)])).unwrap();
    now(store.delete(vec![name(2)])).unwrap();
}
