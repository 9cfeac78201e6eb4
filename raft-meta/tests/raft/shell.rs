//! The shell on one node: making, opening, migrating, full and failing disks, wiped nodes, timers.
#![allow(clippy::disallowed_methods, reason = "tokio::test makes the runtime of a test")]

use crate::executor::Executor;
use raft_meta::raft::format::{
    HardState, LogHeader, RAFT_LOG_FILE, RAFT_SNAPSHOT_FILE, decode_raft_log, encode_log, encode_raft_snapshot,
};
use raft_meta::raft::{LogEntry, Machine, Payload, Role};
use raft_meta::{
    Command, Consensus, FormatError, GroupOptions, LOG_FILE, MetaError, MetaState, Options, Outcome, RaftGroup,
    RaftTransport, ReplicaId, SNAPSHOT_FILE, SingleReplica,
};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::file::{FaultAt, MemoryDirectory};
use xsan_env::{Directory, Env};
use xsan_types::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(0xc1);
const NODE: NodeId = NodeId(1);
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Nobody is at the other end.
struct Nowhere;

impl RaftTransport for Nowhere {
    fn send(&self, _: ReplicaId, _: Vec<u8>) {}
}

/// Runs `test` in a world of its own, on virtual time.
fn in_a_world<F: Future<Output = ()> + Send + 'static>(test: impl FnOnce(Env) -> F) -> Executor {
    let executor = Executor::new(1);
    let main = test(executor.env(1));
    executor.run(main, || Ok(())).unwrap();
    executor.kill_all();
    executor
}

fn genesis() -> MetaState {
    MetaState::new(CLUSTER, false)
}

async fn create(env: &Env, disk: &MemoryDirectory) -> Result<RaftGroup, FormatError> {
    let options = GroupOptions { log_bytes_max: 600, ..GroupOptions::default() };
    RaftGroup::create(env, Arc::new(disk.clone()), Arc::new(Nowhere), options, NODE, genesis()).await
}

async fn open(env: &Env, disk: &MemoryDirectory) -> Result<RaftGroup, FormatError> {
    let options = GroupOptions { log_bytes_max: 600, ..GroupOptions::default() };
    RaftGroup::open(env, Arc::new(disk.clone()), Arc::new(Nowhere), options).await
}

fn add_node(number: u32) -> Command {
    let name = |letter: char| format!("{letter}{number}").parse().unwrap();
    Command::AddNode { name: name('n'), host: name('h'), rack: None, zone: None }
}

#[test]
fn a_lone_voter_serves_at_once_keeps_everything_and_sets_no_timer() {
    let executor = in_a_world(|env| async move {
        let disk = MemoryDirectory::new();
        let group = create(&env, &disk).await.unwrap();
        for number in 1..=40 {
            assert_eq!(group.propose(add_node(number)).await, Ok(Outcome::Node(NodeId(number))));
        }
        assert_eq!(group.propose(add_node(7)).await, Err(MetaError::NameTaken));
        let index = group.read_barrier().await.unwrap();
        assert_eq!(index, *group.subscribe().borrow());
        let state = group.view();
        for seed in 0..20 {
            disk.power_off(seed);
            let again = open(&env, &disk).await.unwrap();
            assert_eq!(again.view(), state, "what was answered is shown as soon as it is open");
            again.close().await;
        }
        assert_eq!(group.replica(), open(&env, &disk).await.unwrap().replica());
    });
    // A timer would have moved the clock, which starts at 1000 ms.
    assert!(executor.millis() < 1050, "{}", executor.millis());
}

#[test]
fn what_a_single_replica_left_goes_on_as_a_group_and_not_as_both() {
    in_a_world(|env| async move {
        let files: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
        let single = SingleReplica::create(&env, Arc::clone(&files), Options::default(), genesis()).await.unwrap();
        for number in 1..=9 {
            single.propose(add_node(number)).await.unwrap();
        }
        let state = single.view();
        single.close().await;
        let options = GroupOptions::default();
        let migrate = || RaftGroup::open_or_migrate(&env, Arc::clone(&files), Arc::new(Nowhere), options, NODE);
        let group = migrate().await.unwrap();
        assert_eq!(group.view(), state);
        assert!(*group.subscribe().borrow() >= 9, "numbers go on");
        group.propose(add_node(10)).await.unwrap();
        let (state, replica) = (group.view(), group.replica());
        group.close().await;
        for old in [LOG_FILE, SNAPSHOT_FILE] {
            assert_eq!(files.read(old).await.unwrap(), None, "an older release would go on with {old}");
        }
        let group = migrate().await.unwrap();
        assert_eq!((group.view(), group.replica()), (state, replica));
    });
}

#[test]
fn a_migration_cut_short_at_any_operation_is_done_by_the_next_one() {
    for nth in 1..12 {
        for at in [FaultAt::Before, FaultAt::After] {
            in_a_world(move |env| async move {
                let disk = MemoryDirectory::new();
                let files: Arc<dyn Directory> = Arc::new(disk.clone());
                let single =
                    SingleReplica::create(&env, Arc::clone(&files), Options::default(), genesis()).await.unwrap();
                single.propose(add_node(1)).await.unwrap();
                let state = single.view();
                single.close().await;
                let options = GroupOptions::default();
                let migrate = || RaftGroup::open_or_migrate(&env, Arc::clone(&files), Arc::new(Nowhere), options, NODE);
                disk.fail_nth(nth, at, EIO);
                drop(migrate().await);
                disk.power_off(nth);
                disk.heal();
                assert_eq!(migrate().await.unwrap().view(), state, "operation {nth}, {at:?}");
            });
        }
    }
}

/// The N-th operation fails, for every N, and then the power: what was answered is there, what was not may be.
#[test]
fn no_failing_operation_loses_what_was_answered() {
    for errno in [EIO, ENOSPC] {
        for nth in 1..60 {
            for at in [FaultAt::Before, FaultAt::After] {
                in_a_world(move |env| async move {
                    let disk = MemoryDirectory::new();
                    let Ok(group) = create(&env, &disk).await else { return };
                    disk.fail_nth(nth, at, errno);
                    let mut told = Vec::new();
                    for number in 1..=20 {
                        match group.propose(add_node(number)).await {
                            Ok(Outcome::Node(id)) => told.push((number, id)),
                            // On a full disk the next second may be better.
                            Err(MetaError::NoAnswer) => env.sleep(Duration::from_millis(1500)).await,
                            other => panic!("{other:?}"),
                        }
                    }
                    // The first operation is an append; a flush that fails stops the replica, whatever the reason.
                    let full = errno == ENOSPC && at == FaultAt::Before && nth == 1;
                    assert!(!full || told.len() > 15, "a full disk is waited for: {} of 20, {nth}", told.len());
                    disk.heal();
                    disk.power_off(nth);
                    let again = open(&env, &disk).await.unwrap();
                    let view = again.view();
                    for (number, id) in told {
                        let found = view.node_named(&format!("n{number}")).map(|node| node.id);
                        assert_eq!(found, Some(id), "operation {nth}, {at:?}, {errno}");
                    }
                });
            }
        }
    }
}

#[test]
fn a_directory_that_lost_one_of_its_files_is_refused_and_not_made_anew() {
    in_a_world(|env| async move {
        let disk = MemoryDirectory::new();
        let group = create(&env, &disk).await.unwrap();
        group.propose(add_node(1)).await.unwrap();
        group.close().await;
        assert!(matches!(create(&env, &disk).await, Err(FormatError::Exists)));
        let snapshot = disk.read(RAFT_SNAPSHOT_FILE).await.unwrap().unwrap();
        disk.remove(RAFT_SNAPSHOT_FILE).await.unwrap();
        assert!(matches!(open(&env, &disk).await, Err(FormatError::SnapshotMissing { .. })));
        assert!(matches!(create(&env, &disk).await, Err(FormatError::SnapshotMissing { .. })));
        disk.replace_atomic(RAFT_SNAPSHOT_FILE, snapshot).await.unwrap();
        disk.remove(RAFT_LOG_FILE).await.unwrap();
        assert!(matches!(open(&env, &disk).await, Err(FormatError::LogMissing)));
        let empty = MemoryDirectory::new();
        assert!(matches!(open(&env, &empty).await, Err(FormatError::Absent)));
    });
}

#[test]
fn a_wiped_node_comes_back_under_another_id() {
    in_a_world(|env| async move {
        let join = |disk: MemoryDirectory| {
            RaftGroup::join(&env, Arc::new(disk), Arc::new(Nowhere), GroupOptions::default(), CLUSTER)
        };
        let first = join(MemoryDirectory::new()).await.unwrap();
        let wiped = join(MemoryDirectory::new()).await.unwrap();
        assert_ne!(first.replica(), wiped.replica());
    });
}

#[test]
fn nobody_waits_for_ever() {
    in_a_world(|env| async move {
        let options = GroupOptions::default();
        let join = RaftGroup::join(&env, Arc::new(MemoryDirectory::new()), Arc::new(Nowhere), options, CLUSTER);
        let alone = join.await.unwrap();
        assert_eq!(alone.propose(add_node(1)).await, Err(MetaError::NoAnswer));
        assert_eq!(alone.read_barrier().await, Err(MetaError::NoAnswer));
        assert!(alone.add_learner(ReplicaId(9), NODE).await.is_err());
        alone.close().await;
        assert_eq!(alone.propose(add_node(1)).await, Err(MetaError::Closed));
    });
}

#[test]
fn the_leader_refuses_to_leave_and_to_promote_strangers() {
    in_a_world(|env| async move {
        let group = create(&env, &MemoryDirectory::new()).await.unwrap();
        let step = |replica, role| vec![raft_meta::raft::Step { replica, node: NODE, role }];
        assert!(group.change_members(step(group.replica(), Role::Removed)).await.is_err());
        assert!(group.change_members(step(ReplicaId(9), Role::Voter)).await.is_err());
        group.add_learner(ReplicaId(9), NodeId(2)).await.unwrap();
        env.sleep(Duration::from_millis(10)).await;
        assert_eq!(group.status().borrow().configuration.learners, [ReplicaId(9)]);
        // It never answers: the group serves on, with a timer now.
        group.propose(add_node(1)).await.unwrap();
        group.snapshot().await.unwrap();
    });
}

/// The process ended after a leader's snapshot was in place and before the log was: the log ends before it, or goes on from
/// something else.
#[test]
fn a_log_that_does_not_fit_an_installed_snapshot_goes_on_behind_it() {
    let nothing = |index| LogEntry { index, term: 2, payload: Payload::Empty };
    for length in [0, 4, 30] {
        in_a_world(move |env| async move {
            let mut machine = Machine::new(genesis());
            (machine.index, machine.term) = (10, 5);
            machine.configuration.voters = vec![ReplicaId(1), ReplicaId(2), ReplicaId(3)];
            let header = LogHeader { cluster: CLUSTER, replica: ReplicaId(1), start: 1, base_index: 1, base_term: 1 };
            let entries: Vec<LogEntry> = (2..2 + length).map(nothing).collect();
            let state = HardState { term: 7, vote: 3, commit: 1 };
            let disk = MemoryDirectory::new();
            disk.replace_atomic(RAFT_LOG_FILE, encode_log(&header, &state, &entries)).await.unwrap();
            disk.replace_atomic(RAFT_SNAPSHOT_FILE, encode_raft_snapshot(&machine)).await.unwrap();
            let group = open(&env, &disk).await.unwrap();
            assert_eq!(group.status().borrow().applied, 10);
            group.close().await;
            let log = decode_raft_log(&disk.read(RAFT_LOG_FILE).await.unwrap().unwrap()).unwrap();
            assert_eq!((log.header.base_index, log.header.base_term, log.entries.len()), (10, 5, 0));
            assert_eq!((log.state.term, log.state.vote), (7, 3), "a vote is not forgotten");
        });
    }
}
