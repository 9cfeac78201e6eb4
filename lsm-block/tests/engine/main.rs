//! The volume engine against a plain array of sectors: random writes, zeroes, trims, flushes, reads, checkpoints, while
//! nodes stop and start, calls fail or lose their answers, the engine crashes, all processes crash, all power goes.
//!
//! What may be read back is R7's table: after crashes of processes everything acknowledged, after power loss everywhere
//! everything flushed; each sector whole, never older than that.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a test makes its own runtime")]

mod rig;

use futures::future::join_all;
use lsm_block::memory_store::{Fault, MemoryConfig};
use lsm_block::store::{Registers, SegmentStore};
use lsm_block::{AckPolicy, Health, Piece, Tuning, Volume, VolumeError};
use rig::{Rig, SIZE, VOLUME};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use xsan_env::Buf;
use xsan_env::os::OsRuntime;
use xsan_types::{BLOCK_BYTES, ChangeToken, DeviceId, Generation, RegisterChange, Scheme, ShardIndex};

fn run_seed(seed: u64, steps: u64, scheme: Scheme, delays: bool, ack: AckPolicy) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let mut rig = Rig::new(&env, seed, scheme, delays, ack);
        let store = rig.store.clone();
        let releasing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(8)).await;
                store.release();
            }
        });
        let mut volume = rig.open().await;
        for step in 0..steps {
            volume = rig.step(volume, step, seed).await;
        }
        rig.start_all();
        rig.check(&volume, false, &format!("seed {seed}, end")).await;
        volume.close().await.expect("a clean hand-over");
        releasing.abort();
    });
}

#[test]
fn a_volume_that_has_stopped_answers_every_request_with_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::replica(3).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        volume.write(0, Buf::copied(&[1; 4096]), false).await.expect("a write");
        volume.close().await.expect("a clean hand-over");
        for _ in 0..2 {
            let late = join_all([
                volume.write(0, Buf::copied(&[2; 4096]), false),
                volume.flush(),
                volume.zero(0, 4096, false),
                volume.resize(SIZE * 2),
                volume.close(),
            ]);
            let answers = tokio::time::timeout(Duration::from_secs(10), late).await.expect("answers");
            assert!(answers.iter().all(Result::is_err), "{answers:?}");
        }
        assert!(volume.read(0, 4096).await.is_err());
    });
}

/// What it waits for may be what its successor has closed; and who wants the volume at its node would wait with it.
#[test]
fn a_take_over_that_waits_ends_when_another_one_has_begun() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::replica(3).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        volume.write(0, Buf::copied(&[1; 4096]), false).await.expect("a write");
        volume.abandon();
        drop(volume);
        rig.store.devices().into_iter().for_each(|device| rig.store.stop(device));
        let before = rig.registers.get(VOLUME).expect("a register").generation;
        let mut taker = Box::pin(Volume::open(rig.config(Rig::tuning())));
        while rig.registers.get(VOLUME).expect("a register").generation == before {
            assert!(futures::poll!(&mut taker).is_pending());
            xsan_env::yield_now().await;
        }
        let take = rig.registers.change(VOLUME, Generation(0), 0, ChangeToken(7), RegisterChange::Take);
        let newer = take.await.expect("taken by another").generation;
        let ended =
            tokio::time::timeout(Rig::tuning().io_timeout / 2, taker).await.expect("it ends before it gives up");
        assert!(matches!(ended, Err(VolumeError::Fenced(by)) if by == newer));
    });
}

/// A row may be under way for as long as it likes: its writer must not count it once a taker may have looked for it in vain.
#[test]
fn an_old_owner_acknowledges_nothing_that_its_successor_did_not_find() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let mut overtaken = 0;
        for (held_up, taken_over) in (0..4).flat_map(|of_old| (0..24).map(move |of_new| (of_old, of_new))) {
            let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
            let old = rig.open().await;
            old.write(0, Buf::copied(&vec![1; 256 << 10]), false).await.expect("a large write");
            old.write(0, Buf::copied(&vec![1; 256 << 10]), false).await.expect("a large write");
            rig.store.plan(held_up, Fault::Stall);
            let mut write = Box::pin(old.write(0, Buf::copied(&vec![2; 256 << 10]), false));
            if env.timeout(Duration::from_millis(2), &mut write).await.is_some() {
                continue;
            }
            // The take-over stops at every one of its calls in turn; there the row arrives.
            rig.store.plan(taken_over, Fault::Stall);
            let mut opening = Box::pin(rig.open());
            let opened = env.timeout(Duration::from_millis(30), &mut opening).await;
            rig.store.clear_plans();
            rig.store.release();
            let answer = env.timeout(Duration::from_millis(50), &mut write).await;
            let new = match opened {
                Some(new) => new,
                None => env.timeout(Duration::from_secs(10), opening).await.expect("the volume opens"),
            };
            let pieces = new.read(0, 4096).await.expect("a read");
            let has_new = matches!(&pieces[0], Piece::Data(data) if data[0] == 2);
            assert!(has_new || !matches!(answer, Some(Ok(()))), "{held_up}, {taken_over}: acknowledged and lost");
            overtaken += u32::from(!has_new);
        }
        assert!(overtaken > 10, "only {overtaken} writes were overtaken");
    });
}

#[test]
fn a_large_write_that_crosses_the_end_of_a_row_segment_goes_on_in_the_next_one() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        let large = |stamp: u8| Buf::copied(&vec![stamp; 512 << 10]);
        let has_rows = async {
            while volume.status().counters.row_bytes == 0 {
                volume.write(0, large(1), false).await.expect("a write");
            }
        };
        assert!(env.timeout(Duration::from_secs(10), has_rows).await.is_some(), "rows are opened");
        let before = volume.status().counters;
        // Two rows each into segments of three.
        for stamp in 2..12 {
            volume.write(u64::from(stamp) << 19, large(stamp), false).await.expect("a write");
        }
        let after = volume.status().counters;
        assert_eq!(after.row_bytes - before.row_bytes, 10 << 19);
        let journal = after.journal_bytes - before.journal_bytes;
        assert!(journal < 64 << 10, "{journal} bytes of large writes went through the journal");
        for stamp in 2..12 {
            let pieces = volume.read(u64::from(stamp) << 19, 512 << 10).await.expect("a read");
            let right = |piece: &Piece| matches!(piece, Piece::Data(data) if data.iter().all(|&byte| byte == stamp));
            assert!(pieces.iter().all(right), "write {stamp}");
        }
    });
}

#[test]
fn memory_of_changes_is_bounded_while_no_checkpoint_can_be_registered() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let most = 4 << 10;
        let volume = rig.open_tuned(Tuning { delta_bytes_max: most, ..Rig::tuning() }).await;
        rig.registers.set_down(true);
        // Every other block, so that no two changes are one.
        let mut writing = Box::pin(async {
            for block in (0..SIZE / BLOCK_BYTES).step_by(2) {
                volume.write(block * BLOCK_BYTES, Buf::copied(&[1; BLOCK_BYTES as usize]), false).await?;
            }
            Ok::<(), lsm_block::VolumeError>(())
        });
        let told = async {
            while !matches!(volume.status().health, Health::Waiting { reason, .. } if reason.contains("checkpoint")) {
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            biased;
            ended = &mut writing => panic!("the writes do not wait: {ended:?}, {:?}", volume.status()),
            waits = env.timeout(Duration::from_secs(15), told) => assert!(waits.is_some(), "{:?}", volume.status()),
        }
        assert!(volume.status().delta_bytes < most * 8, "{:?}", volume.status());
        rig.registers.set_down(false);
        let ended = env.timeout(Duration::from_secs(15), writing).await;
        assert!(matches!(ended, Some(Ok(()))), "{ended:?}, {:?}", volume.status());
    });
}

/// Found by simulated clusters (seed 0x6b04679a): a second checkpoint began on top of the one whose register write had met a newer
/// owner.
#[test]
fn a_checkpoint_that_meets_a_newer_owner_is_the_last_one() {
    // The writer is a task of its own: its panic ends nothing but itself.
    let panics = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&panics);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let here = panic.location().is_some_and(|at| at.file().starts_with("lsm-block/src"));
        seen.fetch_or(here, Ordering::Relaxed);
        hook(panic);
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open_tuned(Tuning { delta_bytes_max: 4 << 10, ..Rig::tuning() }).await;
        rig.registers.set_down(true);
        let mut block = 0;
        // Every other block, so that no two changes are one.
        let mut writing = Box::pin(async {
            loop {
                let data = Buf::copied(&[1; BLOCK_BYTES as usize]);
                if let Err(error) = volume.write(block * BLOCK_BYTES, data, false).await {
                    return error;
                }
                block = (block + 2) % (SIZE / BLOCK_BYTES);
            }
        });
        let told = async {
            while !matches!(volume.status().health, Health::Waiting { reason, .. } if reason.contains("checkpoint")) {
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            biased;
            ended = &mut writing => panic!("the writes do not wait: {ended:?}, {:?}", volume.status()),
            waits = env.timeout(Duration::from_secs(15), told) => assert!(waits.is_some(), "{:?}", volume.status()),
        }
        rig.registers.set_down(false);
        let register = rig.registers.read(VOLUME).await.expect("a register");
        let token = ChangeToken(env.random_u128());
        let taken = rig.registers.change(VOLUME, register.generation, register.version, token, RegisterChange::Take);
        let newer = taken.await.expect("the volume is taken").generation;

        let ended = env.timeout(Duration::from_secs(15), writing).await;
        assert!(matches!(ended, Some(VolumeError::Fenced(current)) if current == newer), "{ended:?}");
        assert!(!panics.load(Ordering::Relaxed), "the writer panicked");
    });
}

/// Found by simulated clusters (seed 0x1ad274a37): only reads of whole sectors are answered.
#[test]
fn bad_sectors_behind_the_end_of_the_log_do_not_hide_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let config =
            MemoryConfig { scheme: Scheme::rs(4, 2).unwrap(), devices: 6, sector: 4096, ..MemoryConfig::default() };
        let rig = Rig::on(&env, config, AckPolicy::Replicated);
        let volume = rig.open_tuned(Tuning { idle_seal_after: Duration::from_secs(3600), ..Rig::tuning() }).await;
        for block in 0..4 {
            let data = Buf::copied(&[block as u8 + 1; BLOCK_BYTES as usize]);
            volume.write(block * BLOCK_BYTES, data, false).await.expect("a write");
        }
        volume.abandon();
        rig.store.devices().into_iter().for_each(|device| rig.store.set_unreadable(device, 256 << 10));
        let volume = env.timeout(Duration::from_secs(30), rig.open()).await.expect("the volume opens");
        let image = rig.read_all(&volume).await;
        for block in 0..4_usize {
            let at = block * BLOCK_BYTES as usize;
            assert!(image[at..at + BLOCK_BYTES as usize].iter().all(|&byte| usize::from(byte) == block + 1));
        }
    });
}

/// Found by processes on one machine: a host was wiped and came back, all seemed whole, and two later losses were one too many
/// for the rows that were open when the first one happened.
#[test]
fn a_wiped_device_is_made_good_in_what_is_open_though_no_guest_asks_for_anything() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open_tuned(Tuning { idle_seal_after: Duration::from_secs(3600), ..Rig::tuning() }).await;
        let large = Buf::copied(&vec![7; 512 << 10]);
        let has_rows = async {
            while volume.status().counters.row_bytes == 0 {
                volume.write(0, large.clone(), false).await.expect("a write");
            }
        };
        assert!(env.timeout(Duration::from_secs(10), has_rows).await.is_some(), "rows are opened");
        volume.write(1 << 20, Buf::copied(&[8; BLOCK_BYTES as usize]), false).await.expect("a write");
        volume.flush().await.expect("a flush");

        let devices = rig.store.devices();
        for &lost in &devices[..2] {
            rig.store.lose(lost);
            rig.store.start(lost);
        }
        let whole = async {
            loop {
                let status = volume.status();
                let is_full = status.members.len() == status.members_wanted
                    && !status.members.iter().any(|member| {
                        // A device that was wiped is a member only of a set that was made since.
                        devices[..2].contains(&member.device) && status.counters.set_changes == 0
                    });
                if is_full && status.counters.seals > 0 && status.segments_with_holes == 0 {
                    return;
                }
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(env.timeout(Duration::from_secs(20), whole).await.is_some(), "{:?}", volume.status());
        // Two more, as the scheme allows.
        devices[2..4].iter().for_each(|&device| rig.store.stop(device));
        for (offset, length, byte) in [(0, 512 << 10, 7), (1 << 20, BLOCK_BYTES, 8)] {
            let read = env.timeout(Duration::from_secs(20), volume.read(offset, length)).await;
            let pieces = read.expect("in time").expect("a read");
            let right = |piece: &Piece| matches!(piece, Piece::Data(data) if data.iter().all(|&found| found == byte));
            assert!(pieces.iter().all(right), "at {offset}");
        }
    });
}

/// Found by a simulated cluster: after one failed attempt a set with fewer members was never made larger again.
#[test]
fn a_set_with_fewer_members_grows_though_an_attempt_fails() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let devices = rig.store.devices();
        devices[..4].iter().for_each(|&device| rig.store.stop(device));
        let volume = rig.open().await;
        assert_eq!(volume.status().members.len(), 2, "as many as are up");
        rig.store.plan(0, Fault::Refuse);
        // The one change that is reported.
        rig.store.start(devices[0]);
        let grown = async {
            while volume.status().members.len() < volume.status().members_wanted {
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(env.timeout(Duration::from_secs(20), grown).await.is_some(), "{:?}", volume.status());
        assert_eq!(rig.store.planned_faults(), 0, "the first attempt failed");
    });
}

/// Runs a test with a volume that has sealed segments.
fn with_segments(test: impl AsyncFnOnce(&Rig, &Volume)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        volume.write(0, Buf::copied(&vec![7; 2 << 20]), false).await.expect("a write");
        rig.until_whole(&volume).await;
        assert!(volume.status().segments > 0);
        test(&rig, &volume).await;
    });
}

/// Found by simulated clusters (seed 0x1a73169c2): it stayed so until a node went or came back.
#[test]
fn a_checkpoint_that_was_sealed_with_positions_missing_is_made_whole_without_further_news() {
    with_segments(async |rig, volume| {
        let members: Vec<DeviceId> = volume.status().members.iter().map(|member| member.device).collect();
        let device = rig.store.devices().into_iter().find(|device| !members.contains(device)).expect("six devices");
        rig.store.stop(device);
        volume.write(0, Buf::copied(&[9; BLOCK_BYTES as usize]), false).await.expect("a write");
        rig.registers.set_down(true);
        let asked = rig.registers.changes();
        let checkpoint = volume.checkpoint();
        rig.until(volume, |_| rig.registers.changes() > asked).await;
        // Everything of the checkpoint is sealed. The news of the node finds nothing missing in the list as it is.
        rig.store.start(device);
        rig.until(volume, |status| status.segments_with_holes == 0).await;
        let filled = rig.store.fills();
        rig.registers.set_down(false);
        checkpoint.await.expect("a checkpoint");
        rig.until(volume, |status| status.segments_with_holes == 0 && rig.store.fills() > filled).await;
    });
}

#[test]
fn a_shard_that_waits_at_its_old_place_is_not_missing_and_one_that_is_nowhere_is() {
    with_segments(async |rig, volume| {
        rig.store.move_position(ShardIndex(1), Some(3));
        let moving = rig.store.map_epoch();
        rig.until(volume, |status| status.checked_epoch >= moving).await;
        assert_eq!((volume.status().segments_with_holes, rig.store.fills()), (0, 0), "it is going to be carried");
        rig.store.lose_position(ShardIndex(1));
        let lost = rig.store.map_epoch();
        rig.until(volume, |status| status.checked_epoch >= lost && status.segments_with_holes == 0).await;
        assert!(rig.store.fills() > 0, "it is nowhere: rebuilt from others");
    });
}

#[test]
fn a_map_counts_as_checked_only_when_every_place_was_asked() {
    with_segments(async |rig, volume| {
        let silent = rig.store.devices()[2];
        rig.store.stop(silent);
        let stopped = rig.store.map_epoch();
        rig.until(volume, |status| status.unchecked).await;
        rig.until(volume, |status| !status.unchecked).await;
        let checked = volume.status().checked_epoch;
        assert!(checked < stopped, "{checked} is not before {stopped}, and nobody knows what {silent} holds");
        rig.store.start(silent);
        let started = rig.store.map_epoch();
        rig.until(volume, |status| status.checked_epoch >= started).await;
    });
}

#[test]
fn a_journal_set_leaves_a_device_that_is_emptied_while_guests_write() {
    with_segments(async |rig, volume| {
        let left = volume.status().members[0].device;
        let (block, changes) = (BLOCK_BYTES as usize, volume.status().counters.set_changes);
        let is_left = std::cell::Cell::new(false);
        let write = async {
            let mut round = 0u8;
            while !is_left.get() || round < 50 {
                round = round.wrapping_add(1).max(1);
                let offset = u64::from(round) * BLOCK_BYTES;
                volume.write(offset, Buf::copied(&vec![round; block]), false).await.expect("no guest notices");
                if round == 20 {
                    rig.store.set_leaving(left, true);
                }
                tokio::task::yield_now().await;
            }
        };
        let leave = async {
            rig.until(volume, |status| status.members.iter().all(|member| member.device != left)).await;
            is_left.set(true);
        };
        futures::join!(write, leave);
        let status = volume.status();
        assert_eq!((status.members.len(), status.members_wanted), (3, 3), "with as many members as before");
        assert_eq!(status.counters.set_changes, changes + 1, "and once");
        // Nobody needs the device any more.
        rig.store.lose(left);
        volume.flush().await.expect("a flush");
        let pieces = volume.read(BLOCK_BYTES * 20, BLOCK_BYTES).await.expect("a read");
        assert!(pieces.iter().all(|piece| matches!(piece, Piece::Data(data) if data.iter().all(|&byte| byte == 20))));
    });
}

fn seeds(from: u64, scheme: Scheme, delays: bool, ack: AckPolicy) {
    let count = std::env::var("XSAN_TEST_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(6);
    let steps = if delays { 60 } else { 120 };
    for seed in from..from + count {
        run_seed(seed, steps, scheme, delays, ack);
    }
}

#[test]
fn an_erasure_coded_volume_equals_its_surviving_writes() {
    seeds(1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
}

#[test]
fn a_replicated_volume_equals_its_surviving_writes() {
    seeds(1000, Scheme::replica(3).unwrap(), false, AckPolicy::Replicated);
}

#[test]
fn answers_that_overtake_each_other_change_nothing() {
    seeds(2000, Scheme::rs(4, 2).unwrap(), true, AckPolicy::Replicated);
}

#[test]
fn persisted_writes_survive_power_loss() {
    seeds(3000, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Persisted);
}

/// A name that is on its way into the manifests is stable nowhere yet: not in them, and its replicas were not flushed for it.
#[test]
fn a_flush_covers_what_is_being_entered_in_the_manifests() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let (mut flushed, mut waited) = (0, 0);
        for (after, seed) in (6..20).flat_map(|after| (1..13).map(move |seed| (after, seed))) {
            let rig = Rig::new(&env, seed, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
            let volume = rig.open_tuned(Tuning { idle_seal_after: Duration::from_millis(1), ..Rig::tuning() }).await;
            // All members of a set are held up at the same step, whichever it is. Nothing else is written: a flush for something
            // else would cover everything on the devices.
            for member in 0..3 {
                rig.store.plan(after + member, Fault::Stall);
            }
            let mut acknowledged = Vec::new();
            for block in 0..3 {
                let write = volume.write(block * 4096, Buf::copied(&vec![1 + block as u8; 4096]), false);
                if !matches!(env.timeout(Duration::from_millis(5), write).await, Some(Ok(()))) {
                    break;
                }
                acknowledged.push(block);
            }
            // The idle volume seals.
            env.sleep(Duration::from_millis(20)).await;
            let is_flushed = matches!(env.timeout(Duration::from_millis(10), volume.flush()).await, Some(Ok(())));
            rig.store.power_loss_everywhere();
            rig.store.clear_plans();
            rig.store.release();
            for device in rig.store.devices() {
                rig.store.start(device);
            }
            drop(volume);
            if !is_flushed {
                waited += 1;
                continue;
            }
            flushed += 1;
            let again = env.timeout(Duration::from_secs(10), rig.open()).await.expect("the volume opens");
            for block in acknowledged {
                let pieces = again.read(block * 4096, 4096).await.expect("a read");
                let is_there = matches!(&pieces[0], Piece::Data(data) if data[0] == 1 + block as u8);
                assert!(is_there, "held up at call {after}: block {block} was flushed and is lost");
            }
        }
        assert!(flushed > 20 && waited > 20, "{flushed} flushed, {waited} waited");
    });
}
