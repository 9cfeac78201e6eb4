//! What was answered is there after any crash; what was not may be, as a whole.
#![allow(clippy::disallowed_methods, reason = "tokio::test makes the runtime of a test")]

use crate::support::{
    CLUSTER, VOLUME, change, checkpoint, create_pool, create_volume, name, nodes, register_of, set, state_after,
};
use raft_meta::{
    Command, Consensus, FormatError, LOG_FILE, MetaError, MetaState, Options, RegisterClient, SNAPSHOT_FILE,
    SingleReplica, inspect,
};
use std::sync::Arc;
use xsan_env::file::{FaultAt, MemoryDirectory, OsDirectory};
use xsan_env::os::OsRuntime;
use xsan_env::{Directory, Env};
use xsan_types::{ChangeToken, ErrorKind, Generation, RegisterChange, RegisterError, VolumeId};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn env() -> Env {
    OsRuntime::current()
}

fn genesis() -> MetaState {
    MetaState::new(CLUSTER, false)
}

async fn open(directory: &MemoryDirectory, options: Options) -> Result<SingleReplica, FormatError> {
    SingleReplica::open_or_create(&env(), Arc::new(directory.clone()), options, genesis).await
}

/// A life with every kind of write; the log limit is so small that snapshots happen on the way.
fn life() -> Vec<Command> {
    let mut commands = nodes(6);
    commands.extend([create_pool("p", "4+2"), create_volume("vm1"), create_volume("vm2")]);
    commands.extend([
        change(0, 0, 1, RegisterChange::Take),
        change(1, 1, 2, RegisterChange::Commit { set: set(1, 1), checkpoint: None }),
        create_volume("vm1"),
        change(1, 2, 3, RegisterChange::Checkpoint(checkpoint(1, 5, 4))),
        change(0, 0, 4, RegisterChange::Take),
        change(1, 3, 5, RegisterChange::Set(Some(set(1, 2)))),
        Command::RenameVolume { volume: VolumeId(2), name: name("db") },
        change(2, 4, 6, RegisterChange::Commit { set: set(2, 1), checkpoint: Some(checkpoint(1, 5, 4)) }),
    ]);
    commands
}

const SMALL_LOG: Options = Options { log_bytes_max: 400 };

/// Runs the life one by one. Answers: the state as the answers tell it, and the first command that got none.
async fn live(replica: &SingleReplica) -> (MetaState, Option<Command>) {
    let (mut told, mut unknown) = (genesis(), None);
    for command in life() {
        match replica.propose(command.clone()).await {
            Err(MetaError::NoAnswer) => unknown = unknown.or(Some(command)),
            answer => assert_eq!(answer, told.apply(&command), "{command:?}"),
        }
        assert_eq!(*replica.view(), told, "what is shown is what was answered");
    }
    (told, unknown)
}

/// How the world ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Process,
    Power(u64),
}

impl End {
    fn happen(self, directory: &MemoryDirectory) {
        match self {
            Self::Process => directory.crash_process(),
            Self::Power(seed) => directory.power_off(seed),
        }
    }
}

#[tokio::test]
async fn a_life_without_faults_survives_with_snapshots_on_the_way() {
    for end in [End::Process, End::Power(1), End::Power(2)] {
        let directory = MemoryDirectory::new();
        let replica = open(&directory, SMALL_LOG).await.unwrap();
        let (told, unknown) = live(&replica).await;
        assert_eq!(unknown, None);
        let snapshot = directory.read(SNAPSHOT_FILE).await.unwrap().unwrap();
        assert!(inspect::inspect_snapshot(&snapshot).last_index.unwrap() > 5, "snapshots were written");
        end.happen(&directory);
        let reopened = open(&directory, SMALL_LOG).await.unwrap();
        assert_eq!(*reopened.view(), told);
        assert_eq!(*reopened.subscribe().borrow(), life().len() as u64);
    }
}

#[tokio::test]
async fn whatever_write_fails_what_was_answered_is_there_after_reopening() {
    let directory = MemoryDirectory::new();
    live(&open(&directory, SMALL_LOG).await.unwrap()).await;
    let operations = directory.operations();
    assert!(operations > 60, "{operations} writes to fail");
    let ends = [End::Process, End::Power(3), End::Power(4), End::Power(5)];
    let mut unanswered = 0;
    for nth in 1..=operations {
        for (at, errno, end) in [(FaultAt::Before, EIO), (FaultAt::After, EIO), (FaultAt::Before, ENOSPC)]
            .into_iter()
            .flat_map(|(at, errno)| ends.map(|end| (at, errno, end)))
        {
            let what = format!("operation {nth} {at:?} errno {errno}, then {end:?}");
            let directory = MemoryDirectory::new();
            directory.fail_nth(nth, at, errno);
            let (told, unknown) = match open(&directory, SMALL_LOG).await {
                Ok(replica) => live(&replica).await,
                Err(_) => (genesis(), None),
            };
            end.happen(&directory);
            directory.heal();
            let reopened = open(&directory, SMALL_LOG).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut perhaps = told.clone();
            if let Some(command) = &unknown {
                unanswered += 1;
                // Refused or not is no matter here: it happened as a whole, if it did.
                perhaps.apply(command).ok();
            }
            let found = reopened.view();
            assert!(*found == told || *found == perhaps, "{what}: {unknown:?}");
            found.check().unwrap();
            // Repeated until answered, it has happened once.
            if let Some(command @ Command::ChangeRegister { .. }) = unknown {
                let first = perhaps.clone().apply(&command);
                assert_eq!(reopened.propose(command).await, first, "{what}");
                assert_eq!(*reopened.view(), perhaps, "{what}");
            }
        }
    }
    assert!(unanswered > 50, "{unanswered} commands were left without an answer");
}

#[tokio::test]
async fn a_crash_while_the_crash_is_cleared_up_loses_nothing_either() {
    // A torn tail and a full log to replay; then every write of the reopening fails once, and the power goes again.
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    let (told, _) = live(&replica).await;
    drop(replica);
    let whole = directory.read(LOG_FILE).await.unwrap().unwrap();
    let snapshot = directory.read(SNAPSHOT_FILE).await.unwrap().unwrap();
    let mut torn = whole.clone();
    torn.extend_from_slice(&whole[100..170]);
    for nth in 1..=4 {
        for at in [FaultAt::Before, FaultAt::After] {
            for seed in 0..4 {
                let directory = MemoryDirectory::new();
                directory.replace_atomic(SNAPSHOT_FILE, snapshot.clone()).await.unwrap();
                directory.replace_atomic(LOG_FILE, torn.clone()).await.unwrap();
                directory.fail_nth(nth, at, EIO);
                if let Ok(replica) = open(&directory, SMALL_LOG).await {
                    assert_eq!(*replica.view(), told);
                }
                directory.power_off(seed);
                directory.heal();
                let reopened = open(&directory, SMALL_LOG).await.unwrap();
                assert_eq!(*reopened.view(), told, "{nth} {at:?} {seed}");
                reopened.propose(create_volume("later")).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_log_cut_anywhere_opens_with_what_is_whole() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    live(&replica).await;
    replica.close().await;
    let log = directory.read(LOG_FILE).await.unwrap().unwrap();
    let snapshot = directory.read(SNAPSHOT_FILE).await.unwrap().unwrap();
    let report = inspect::inspect_log(&log);
    assert_eq!(report.items.len(), life().len());
    for cut in (32..log.len()).step_by(7) {
        let whole: Vec<Command> = inspect::inspect_log(&log[..cut])
            .items
            .into_iter()
            .filter_map(|item| match item {
                inspect::LogItem::Command { command, .. } => Some(command),
                _ => None,
            })
            .collect();
        assert_eq!(whole, life()[..whole.len()]);
        let directory = MemoryDirectory::new();
        directory.replace_atomic(SNAPSHOT_FILE, snapshot.clone()).await.unwrap();
        directory.replace_atomic(LOG_FILE, log[..cut].to_vec()).await.unwrap();
        let reopened = open(&directory, Options::default()).await.unwrap();
        let mut told = genesis();
        for command in &whole {
            told.apply(command).ok();
        }
        assert_eq!(*reopened.view(), told, "cut at {cut}");
    }
}

#[tokio::test]
async fn a_flipped_bit_is_a_clear_error_and_never_another_state() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    let (told, _) = live(&replica).await;
    replica.close().await;
    let log = directory.read(LOG_FILE).await.unwrap().unwrap();
    let snapshot = directory.read(SNAPSHOT_FILE).await.unwrap().unwrap();
    let last_frame = inspect::inspect_log(&log)
        .items
        .iter()
        .filter_map(|item| match item {
            inspect::LogItem::Command { offset, .. } => Some(usize::try_from(*offset).unwrap() - 28),
            _ => None,
        })
        .max()
        .unwrap();
    for at in 0..log.len() {
        let mut damaged = log.clone();
        damaged[at] ^= 1 << (at % 8);
        let directory = MemoryDirectory::new();
        directory.replace_atomic(SNAPSHOT_FILE, snapshot.clone()).await.unwrap();
        directory.replace_atomic(LOG_FILE, damaged.clone()).await.unwrap();
        match open(&directory, Options::default()).await {
            // Damage in the last frame cannot be told from a torn write of it.
            Ok(replica) => {
                assert!(at >= last_frame, "byte {at} was not noticed");
                assert_ne!(*replica.view(), told);
            }
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "byte {at}: {error}");
                let untouched = directory.read(LOG_FILE).await.unwrap().unwrap();
                assert_eq!(untouched, damaged, "what is damaged is left as it is");
                // The reader for people still shows the rest.
                assert!(at < 32 || inspect::inspect_log(&damaged).items.len() >= life().len());
            }
        }
    }
    for at in 0..snapshot.len() {
        let mut damaged = snapshot.clone();
        damaged[at] ^= 1 << (at % 8);
        let directory = MemoryDirectory::new();
        directory.replace_atomic(SNAPSHOT_FILE, damaged).await.unwrap();
        directory.replace_atomic(LOG_FILE, log.clone()).await.unwrap();
        let error = open(&directory, Options::default()).await.err().expect("a damaged snapshot is refused");
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "byte {at}: {error}");
    }
}

#[tokio::test]
async fn a_missing_log_or_one_of_another_cluster_is_refused() {
    let directory = MemoryDirectory::new();
    open(&directory, Options::default()).await.unwrap().close().await;
    let other = MemoryDirectory::new();
    let elsewhere = MetaState::new(xsan_types::ClusterId(9), true);
    let shared: Arc<dyn Directory> = Arc::new(other.clone());
    SingleReplica::create(&env(), Arc::clone(&shared), Options::default(), elsewhere.clone()).await.unwrap();
    let again = SingleReplica::create(&env(), shared, Options::default(), elsewhere).await;
    assert!(matches!(again, Err(FormatError::Exists)));
    let foreign = other.read(LOG_FILE).await.unwrap().unwrap();
    directory.replace_atomic(LOG_FILE, foreign).await.unwrap();
    assert!(matches!(open(&directory, Options::default()).await, Err(FormatError::Cluster { .. })));
    directory.remove(LOG_FILE).await.unwrap();
    let refused = open(&directory, Options::default()).await;
    assert!(matches!(refused, Err(FormatError::LogMissing)));
}

#[tokio::test]
async fn what_waits_is_flushed_together() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    let before = directory.operations();
    // All futures are polled before the task runs: the test runs on one thread.
    let commands = nodes(40);
    let count = commands.len() as u64;
    let mut answers: Vec<_> = commands.into_iter().map(|command| replica.propose(command)).collect();
    let all = std::future::poll_fn(|context| {
        answers.retain_mut(|answer| match answer.as_mut().poll(context) {
            std::task::Poll::Ready(outcome) => {
                outcome.unwrap();
                false
            }
            std::task::Poll::Pending => true,
        });
        if answers.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    });
    all.await;
    let writes = directory.operations() - before;
    assert!(writes <= 4, "{count} commands took {writes} writes");
    assert_eq!(replica.read_barrier().await, Ok(count));
    assert_eq!(replica.view().nodes.len(), 40);
}

#[tokio::test]
async fn watchers_see_the_state_grow_and_a_closed_replica_says_so() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    let mut watcher = replica.subscribe();
    assert_eq!(*watcher.borrow_and_update(), 0);
    for command in nodes(1) {
        replica.propose(command).await.unwrap();
    }
    watcher.changed().await.unwrap();
    assert_eq!(*watcher.borrow_and_update(), 3);
    assert_eq!(replica.snapshot().await, Ok(3));
    replica.close().await;
    replica.close().await;
    assert_eq!(replica.propose(create_volume("x")).await, Err(MetaError::Closed));
    assert_eq!(*open(&directory, Options::default()).await.unwrap().view(), state_after(&nodes(1)));
}

#[tokio::test]
async fn after_a_failed_flush_nothing_is_answered_until_a_restart() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    directory.fail_nth(2, FaultAt::Before, EIO);
    for _ in 0..3 {
        assert_eq!(replica.propose(nodes(1).remove(0)).await, Err(MetaError::NoAnswer));
    }
    assert_eq!(replica.snapshot().await, Err(MetaError::NoAnswer));
    assert!(replica.view().nodes.is_empty());
    directory.crash_process();
    let reopened = open(&directory, Options::default()).await.unwrap();
    let found = reopened.view().nodes.len();
    assert!(found <= 1);
    // What the restart found is stable now, whatever the failed flush left in the page cache.
    directory.power_off(0);
    assert_eq!(open(&directory, Options::default()).await.unwrap().view().nodes.len(), found);
}

#[tokio::test]
async fn registers_are_served_in_the_words_of_an_owner() {
    let directory = MemoryDirectory::new();
    let replica = open(&directory, Options::default()).await.unwrap();
    let registers = RegisterClient::new(Arc::new(replica.clone()));
    assert_eq!(registers.read(VOLUME).await, Err(RegisterError::NotFound));
    let mut commands = nodes(6);
    commands.extend([create_pool("p", "4+2"), create_volume("vm1")]);
    for command in commands {
        replica.propose(command).await.unwrap();
    }
    let take = || registers.change(VOLUME, Generation(0), 0, ChangeToken(5), RegisterChange::Take);
    let taken = take().await.unwrap();
    assert_eq!(taken.generation, Generation(1));
    assert_eq!(take().await, Ok(taken.clone()));
    assert_eq!(registers.read(VOLUME).await, Ok(taken));
    let stale = registers.change(VOLUME, Generation(0), 0, ChangeToken(6), RegisterChange::Resize(4096)).await;
    assert!(matches!(stale, Err(RegisterError::NewerOwner { .. })));
    replica.close().await;
    assert_eq!(take().await, Err(RegisterError::NoAnswer));
    // A repeat after the restart still gets the first answer.
    let replica = open(&directory, Options::default()).await.unwrap();
    let again = replica.propose(change(0, 0, 5, RegisterChange::Take)).await.unwrap();
    assert_eq!(register_of(again).version, 1);
}

#[tokio::test]
async fn a_life_on_real_files_is_there_after_a_restart() {
    let path = std::env::temp_dir().join(format!("xsan-meta-{}", std::process::id()));
    let directory: Arc<dyn Directory> = Arc::new(OsDirectory::open(&env(), &path).await.unwrap());
    let replica = SingleReplica::open_or_create(&env(), Arc::clone(&directory), SMALL_LOG, genesis).await.unwrap();
    let (told, unknown) = live(&replica).await;
    assert_eq!(unknown, None);
    replica.close().await;
    for _ in 0..2 {
        let reopened = SingleReplica::open(&env(), Arc::clone(&directory), SMALL_LOG).await.unwrap();
        assert_eq!(*reopened.view(), told);
        reopened.close().await;
    }
    assert_eq!(directory.list().await.unwrap(), [LOG_FILE, SNAPSHOT_FILE]);
    std::fs::remove_dir_all(&path).unwrap();
}
