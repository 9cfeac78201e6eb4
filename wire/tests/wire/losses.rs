//! What is lost says so, and what comes after works.

use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use xsan_env::Env;
use xsan_types::DeviceId;
use xsan_wire::node::{NodeApi, NodeError};
use xsan_wire::{Class, Endpoint, Limits, LinkState, Peer, RemoteNode, Server, Services};

const SHORT: Duration = Duration::from_millis(60);

/// A client that reaches a recorder through pipes.
fn piped(env: &Env, client: &Endpoint) -> (Arc<Recorder>, Arc<Pipes>, RemoteNode) {
    let node = Arc::new(Recorder::default());
    let api: Arc<dyn NodeApi> = Arc::<Recorder>::clone(&node);
    let server = Server::new(&endpoint(env, SERVER), Services::new().with_node(api));
    let pipes = Arc::new(Pipes::default());
    let peer = Peer::new(client, SERVER, &pipes.connector(env, &server));
    (node, pipes, RemoteNode::new(peer))
}

#[test]
fn a_connection_lost_in_the_middle_is_unavailable_and_the_next_call_works() {
    run(|env| async move {
        let (node, pipes, remote) = piped(&env, &endpoint(&env, CLIENT));
        node.held.send_replace(true);
        let calls: Vec<_> = (0..5).map(|_| remote.append(member(), segment(1), 0, pattern(4096))).collect();
        node.begun(5).await;
        pipes.set(0, Flow::Cut);
        for call in calls {
            assert_eq!(call.await, Err(NodeError::Unavailable));
        }
        node.held.send_replace(false);
        // What was begun was not given up with the connection.
        node.ended(5).await;
        assert_eq!(remote.append(member(), segment(1), 0, pattern(4096)).await, Ok(4096));
        assert_eq!(pipes.made(), 2);
    });
}

#[test]
fn a_deadline_that_passes_is_unavailable_and_the_late_answer_is_ignored() {
    run(|env| async move {
        let hasty = Limits { guest_for: SHORT, ..patient() };
        let (node, pipes, remote) = piped(&env, &endpoint(&env, CLIENT).with_limits(hasty));
        node.held.send_replace(true);
        let asked_at = env.now();
        assert_eq!(remote.append(member(), segment(1), 0, pattern(512)).await, Err(NodeError::Unavailable));
        assert!(env.now().since(asked_at) >= SHORT);
        // The late answer and the new ones come over the same connection.
        node.held.send_replace(false);
        node.ended(1).await;
        let mut answered = 0;
        while answered < 10 {
            match remote.append(member(), segment(1), answered * 4096, pattern(4096)).await {
                Ok(length) => {
                    assert_eq!(length, answered * 4096 + 4096, "each call has its own answer");
                    answered += 1;
                }
                // A loaded machine may be slower than this deadline.
                Err(error) => assert_eq!(error, NodeError::Unavailable),
            }
        }
        assert_eq!(pipes.made(), 1);
    });
}

#[test]
fn a_deadline_also_passes_while_the_connection_is_being_made() {
    run(|env| async move {
        let hasty = endpoint(&env, CLIENT).with_limits(Limits { guest_for: SHORT, ..patient() });
        let never: Arc<dyn xsan_wire::Connect> =
            Arc::new(|| -> xsan_env::runtime::BoxFuture<'static, _> { Box::pin(std::future::pending()) });
        let remote = RemoteNode::new(Peer::new(&hasty, SERVER, &never));
        assert_eq!(remote.confirm(member()).await, Err(NodeError::Unavailable));
        assert!(matches!(remote.peer().state(Class::Guest), LinkState::Connecting));
    });
}

#[test]
fn a_request_given_up_with_its_connection_never_begins_after_a_newer_one() {
    run(|env| async move {
        let alert = endpoint(&env, CLIENT).with_limits(Limits { silence_for: 3 * SHORT, ..patient() });
        let (node, pipes, remote) = piped(&env, &alert);
        assert_eq!(remote.confirm(member()).await, Ok(()));
        pipes.set(0, Flow::Stalled);
        assert_eq!(remote.append(member(), segment(1), 0, pattern(4096)).await, Err(NodeError::Unavailable));
        assert_eq!(remote.append(member(), segment(1), 4096, pattern(4096)).await, Ok(8192));
        // Now the old one arrives.
        pipes.set(0, Flow::Open);
        for _ in 0..1000 {
            xsan_env::yield_now().await;
        }
        assert_eq!((node.asked(), pipes.made()), (2, 2), "the old connection begins nothing more");
    });
}

#[test]
fn a_silent_connection_is_given_up_and_a_slow_node_is_not() {
    run(|env| async move {
        let alert = endpoint(&env, CLIENT).with_limits(Limits { silence_for: 4 * SHORT, ..patient() });
        let (node, pipes, remote) = piped(&env, &alert);
        // Slow: the node answers late, but its process says that it is there.
        node.held.send_replace(true);
        let slow = remote.append(member(), segment(1), 0, pattern(4096));
        node.begun(1).await;
        env.sleep(12 * SHORT).await;
        assert!(matches!(remote.peer().state(Class::Guest), LinkState::Up));
        node.held.send_replace(false);
        assert_eq!(slow.await, Ok(4096));
        // Silent: nothing comes at all.
        pipes.set(0, Flow::Stalled);
        let asked_at = env.now();
        assert_eq!(remote.append(member(), segment(1), 0, pattern(4096)).await, Err(NodeError::Unavailable));
        assert!(env.now().since(asked_at) < PATIENCE, "long before the deadline");
        assert_eq!(remote.append(member(), segment(1), 4096, pattern(4096)).await, Ok(8192));
        assert_eq!(pipes.made(), 2);
    });
}

#[test]
fn a_stalled_bulk_connection_does_not_delay_guests() {
    run(|env| async move {
        let (node, pipes, remote) = piped(&env, &endpoint(&env, CLIENT));
        assert_eq!(remote.confirm(member()).await, Ok(()));
        assert_eq!(remote.verify_shard(DeviceId(1), shard(1)).await, Ok(()));
        assert_eq!(pipes.made(), 2, "the second one is the bulk connection");
        pipes.set(1, Flow::Stalled);
        // More than all buffers on the way take.
        let repairs: Vec<_> = (0..8).map(|_| remote.repair_shard(DeviceId(1), shard(1), 0, pattern(1 << 20))).collect();
        for offset in 0..100 {
            let appended = remote.append(member(), segment(1), offset * 4096, pattern(4096)).await;
            assert_eq!(appended, Ok(offset * 4096 + 4096));
        }
        assert_eq!(node.asked(), 102, "no repair has arrived");
        pipes.set(1, Flow::Open);
        for repair in repairs {
            assert_eq!(repair.await, Ok(()));
        }
    });
}

#[test]
fn a_dead_address_fails_calls_at_once_and_is_tried_again_after_a_pause() {
    run(|env| async move {
        let far = pair(&env);
        let (direct, door) = (Arc::clone(&far.direct), tokio::sync::watch::Sender::new(false));
        let inner = direct.connector();
        let tries = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let connect: Arc<dyn xsan_wire::Connect> = {
            let (door, tries) = (door.clone(), Arc::clone(&tries));
            Arc::new(move || -> xsan_env::runtime::BoxFuture<'static, std::io::Result<xsan_env::Stream>> {
                tries.fetch_add(1, Ordering::Relaxed);
                if *door.borrow() {
                    return inner.connect();
                }
                Box::pin(async { Err(std::io::ErrorKind::ConnectionRefused.into()) })
            })
        };
        let pause = Duration::from_millis(200);
        let limits = Limits { backoff_min: pause, backoff_max: pause, ..patient() };
        let remote = RemoteNode::new(Peer::new(&endpoint(&env, CLIENT).with_limits(limits), SERVER, &connect));
        // The first failure is followed by one more try; then there is a pause in which nothing is tried.
        for _ in 0..50 {
            assert_eq!(remote.confirm(member()).await, Err(NodeError::Unavailable));
        }
        assert!(tries.load(Ordering::Relaxed) <= 4, "{} tries", tries.load(Ordering::Relaxed));
        let LinkState::Down { error, .. } = remote.peer().state(Class::Guest) else { panic!("it is down") };
        assert_eq!(error.to_string(), "cannot connect");
        door.send_replace(true);
        while remote.confirm(member()).await.is_err() {
            env.sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn a_stopping_server_answers_what_it_began_and_begins_nothing_new() {
    run(|env| async move {
        let far = pair(&env);
        far.node.held.send_replace(true);
        let begun = far.remote.append(member(), segment(1), 0, pattern(4096));
        far.node.begun(1).await;
        let (server, node) = (far.server.clone(), Arc::clone(&far.node));
        let stop = env.spawn("stop", async move { server.stop(PATIENCE).await });
        // Until the goodbye has arrived a call may still get through as a request: it is refused, never begun.
        for _ in 0..20 {
            xsan_env::yield_now().await;
        }
        let late = far.remote.append(member(), segment(1), 4096, pattern(4096));
        for _ in 0..20 {
            xsan_env::yield_now().await;
        }
        node.held.send_replace(false);
        assert_eq!(begun.await, Ok(4096), "what was begun is answered");
        stop.join().await;
        assert_eq!(late.await, Err(NodeError::Unavailable));
        assert_eq!((far.node.asked(), far.server.connections()), (1, 0));
    });
}

#[test]
fn a_restarted_server_is_found_by_the_next_call() {
    run(|env| async move {
        let far = pair(&env);
        assert_eq!(far.remote.confirm(member()).await, Ok(()));
        far.server.stop(PATIENCE).await;
        let api: Arc<dyn NodeApi> = Arc::<Recorder>::clone(&far.node);
        *lock(&far.direct.server) = Server::new(&endpoint(&env, SERVER), Services::new().with_node(api));
        assert_eq!(far.remote.confirm(member()).await, Ok(()));
    });
}

#[test]
fn a_cut_node_is_gone_and_comes_back_by_itself() {
    run(|env| async move {
        let far = pair(&env);
        far.node.held.send_replace(true);
        let call = far.remote.append(member(), segment(1), 0, pattern(4096));
        far.node.begun(1).await;
        far.server.cut(CLIENT);
        assert_eq!(call.await, Err(NodeError::Unavailable));
        far.node.held.send_replace(false);
        // The connection was cut, the call was not.
        far.node.ended(1).await;
        assert_eq!(far.remote.append(member(), segment(1), 0, pattern(4096)).await, Ok(4096));
    });
}

#[test]
fn dropping_a_peer_fails_what_it_waits_for_and_leaves_no_connection() {
    run(|env| async move {
        let Pair { node, server, direct, peer, remote } = pair(&env);
        node.held.send_replace(true);
        let call = remote.append(member(), segment(1), 0, pattern(4096));
        node.begun(1).await;
        drop((remote, peer));
        assert_eq!(call.await, Err(NodeError::Unavailable));
        node.held.send_replace(false);
        while server.connections() > 0 {
            xsan_env::yield_now().await;
        }
        drop(direct);
    });
}

#[test]
fn calls_from_many_threads_over_connections_that_are_cut_all_end_and_none_gets_anothers_answer() {
    let runtime = xsan_env::os::build_runtime(4).expect("threads");
    runtime.block_on(async {
        let env = xsan_env::OsRuntime::current();
        let ca = xsan_wire::Ca::new(CLUSTER).expect("a CA");
        let hasty = Limits { backoff_min: Duration::from_millis(1), ..patient() };
        let far = pair_of(
            &endpoint(&env, CLIENT).with_limits(hasty).with_tls(tls(&env, &ca, CLIENT)),
            &endpoint(&env, SERVER).with_tls(tls(&env, &ca, SERVER)),
        );
        let callers: Vec<_> = (1..=8u64)
            .map(|caller| {
                let remote = far.remote.clone();
                env.spawn("caller", async move {
                    let mut done = 0;
                    while done < 100 {
                        let bytes = usize::try_from((caller * 4096 * (done % 7 + 1)) % 100_000 + 512).expect("small");
                        let offset = caller << 32 | done << 16;
                        let both = tokio::join!(
                            remote.append(member(), segment(caller), offset, pattern(bytes)),
                            remote.read_shard(DeviceId(1), shard(caller), 0, u32::try_from(bytes).expect("small")),
                        );
                        match both {
                            (Ok(length), Ok(read)) => {
                                assert_eq!((length, read.len()), (offset + bytes as u64, bytes));
                                done += 1;
                            }
                            (appended, read) => {
                                let known = [appended.err(), read.err()].into_iter().flatten();
                                known.for_each(|error| assert_eq!(error, NodeError::Unavailable));
                                xsan_env::yield_now().await;
                            }
                        }
                    }
                })
            })
            .collect();
        for _ in 0..50 {
            env.sleep(Duration::from_millis(5)).await;
            far.server.cut(CLIENT);
        }
        let all = async {
            for caller in callers {
                caller.join().await;
            }
        };
        env.timeout(4 * PATIENCE, all).await.expect("all callers end");
        let asked = far.node.asked();
        assert!(asked >= 8 * 100 * 2, "{asked}");
        far.server.stop(PATIENCE).await;
        assert_eq!(*far.node.ended.borrow(), asked, "what was begun was carried to its end");
    });
}
