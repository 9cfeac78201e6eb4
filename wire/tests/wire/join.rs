//! Joining: only with a token of the cluster, only what the service says, and nothing else through that door.

use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Stream};
use xsan_types::NodeId;
use xsan_wire::join::{JOIN_BYTES_MAX, JoinError, JoinService, JoinToken, join};
use xsan_wire::node::{NodeApi, NodeError};
use xsan_wire::{Ca, Endpoint, Limits, Peer, RemoteNode, Server, Services};

const PATIENCE: Duration = Duration::from_secs(10);

/// Answers with what it was asked, backwards, and counts.
#[derive(Default)]
struct Desk(AtomicUsize);

impl JoinService for Desk {
    fn join(&self, mut request: Vec<u8>, _from: String) -> BoxFuture<'static, Vec<u8>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        request.reverse();
        Box::pin(async move { request })
    }
}

struct Door {
    ca: Ca,
    desk: Arc<Desk>,
    server: Server,
    node: Arc<Recorder>,
}

fn door(env: &Env, with_desk: bool) -> Door {
    door_of(&endpoint(env, SERVER), env, with_desk)
}

fn door_of(endpoint: &Endpoint, env: &Env, with_desk: bool) -> Door {
    let ca = Ca::new(CLUSTER).expect("a CA");
    let (desk, node) = (Arc::new(Desk::default()), Arc::new(Recorder::default()));
    let mut services = Services::new().with_node(Arc::<Recorder>::clone(&node) as Arc<dyn NodeApi>);
    if with_desk {
        services = services.with_join(Arc::<Desk>::clone(&desk) as Arc<dyn JoinService>);
    }
    let server = Server::new(&endpoint.clone().with_tls(tls(env, &ca, SERVER)), services);
    Door { ca, desk, server, node }
}

impl Door {
    fn token(&self) -> JoinToken {
        JoinToken::new(CLUSTER, self.ca.certificate_pem(), 1).expect("a token")
    }

    fn stream(&self) -> Stream {
        let (near, far) = Stream::memory_pair(64 << 10);
        self.server.accept(far);
        near
    }

    fn asked(&self) -> usize {
        self.desk.0.load(Ordering::Relaxed)
    }

    /// A member still gets in through the same port.
    async fn still_serves(&self, env: &Env) {
        let client = endpoint(env, CLIENT).with_tls(tls(env, &self.ca, CLIENT));
        let direct = Direct::new(&self.server);
        let remote = RemoteNode::new(Peer::new(&client, SERVER, &direct.connector()));
        assert_eq!(remote.confirm(member()).await, Ok(()), "the server goes on");
    }
}

#[test]
fn a_host_with_a_token_asks_once_and_is_answered() {
    run(|env| async move {
        let door = door(&env, true);
        for request in [&b"let me in"[..], b"", &[7; JOIN_BYTES_MAX]] {
            let answer = join(&env, door.stream(), &door.token(), request, PATIENCE).await.expect("an answer");
            assert!(answer.iter().rev().eq(request));
        }
        assert_eq!(door.asked(), 3);
        door.still_serves(&env).await;
    });
}

#[test]
fn a_server_of_another_cluster_never_sees_the_secret() {
    run(|env| async move {
        let door = door(&env, true);
        // The same cluster id under another CA, and the right CA under another id: neither is the token's cluster.
        let other_ca = Ca::new(CLUSTER).expect("a CA");
        let forged = JoinToken::new(CLUSTER, other_ca.certificate_pem(), 1).expect("a token");
        let elsewhere = JoinToken::new(xsan_types::ClusterId(9), door.ca.certificate_pem(), 1).expect("a token");
        for token in [forged, elsewhere] {
            let error = join(&env, door.stream(), &token, b"secret", PATIENCE).await.expect_err("refused");
            assert!(matches!(error, JoinError::Stranger(_)), "{error}");
            assert!(error.to_string().contains("not of the cluster that the token is for"), "{error}");
        }
        assert_eq!(door.asked(), 0, "nothing was sent");
        door.still_serves(&env).await;
    });
}

#[test]
fn without_a_desk_nobody_is_let_in() {
    run(|env| async move {
        let door = door(&env, false);
        let error = join(&env, door.stream(), &door.token(), b"let me in", PATIENCE).await.expect_err("no answer");
        assert!(matches!(error, JoinError::Ended(_)), "{error}");
        door.still_serves(&env).await;
    });
}

#[test]
fn a_request_that_is_too_long_reaches_nobody() {
    run(|env| async move {
        let door = door(&env, true);
        let long = vec![1; JOIN_BYTES_MAX + 1];
        assert!(join(&env, door.stream(), &door.token(), &long, PATIENCE).await.is_err());
        assert_eq!(door.asked(), 0);
        door.still_serves(&env).await;
    });
}

#[test]
fn through_the_door_for_joiners_a_stranger_reaches_no_node() {
    run(|env| async move {
        let door = door(&env, true);
        // A host without a certificate of the cluster: its own CA signed it.
        let own_ca = Ca::new(CLUSTER).expect("a CA");
        let stranger = endpoint(&env, NodeId(3)).with_tls(tls(&env, &own_ca, NodeId(3)));
        let direct = Direct::new(&door.server);
        let remote = RemoteNode::new(Peer::new(&stranger, SERVER, &direct.connector()));
        assert_eq!(remote.confirm(member()).await, Err(NodeError::Unavailable));
        assert_eq!(door.node.asked(), 0);
        // And a joiner that speaks frames instead of asking is only a request that makes no sense.
        let hello = [0x58; 64];
        assert!(join(&env, door.stream(), &door.token(), &hello, PATIENCE).await.is_ok());
        assert_eq!(door.node.asked(), 0);
        door.still_serves(&env).await;
    });
}

#[test]
fn a_joiner_that_says_nothing_is_hung_up_on() {
    run(|env| async move {
        let hasty = Limits { connect_for: Duration::from_millis(20), ..patient() };
        let door = door_of(&endpoint(&env, SERVER).with_limits(hasty), &env, true);
        let silent = door.stream();
        env.timeout(Duration::from_secs(60), async {
            let mut byte = [0; 1];
            // The end of the stream: the time of strangers is over.
            let read = silent.read(&mut byte).await;
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        })
        .await
        .expect("hung up in time");
    });
}
