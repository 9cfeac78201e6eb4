//! Consensus and membership over the same port.

use crate::support::*;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_wire::{
    CallError, Class, Limits, LinkState, Peer, PeerInfo, Server, Service, ServiceError, ServiceId, Services,
};

/// Answers with its bytes turned round, and keeps messages.
#[derive(Default)]
struct Mirror {
    messages: Mutex<Vec<(u16, Vec<u8>)>>,
    from: Mutex<Option<PeerInfo>>,
}

impl Service for Mirror {
    fn request(
        &self,
        from: &PeerInfo,
        operation: u16,
        body: &[u8],
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>> {
        *lock(&self.from) = Some(from.clone());
        assert!(deadline <= PATIENCE);
        let answer: Vec<u8> = body.iter().rev().copied().collect();
        Box::pin(async move {
            match operation {
                1 => Ok(answer),
                2 => Err(ServiceError::Malformed),
                3 => Err(ServiceError::Unavailable),
                4 => Ok(vec![0; (8 << 20) + 1]),
                _ => Err(ServiceError::NotOffered),
            }
        })
    }

    fn message(&self, _from: &PeerInfo, operation: u16, body: &[u8]) {
        lock(&self.messages).push((operation, body.to_vec()));
    }
}

#[test]
fn services_get_requests_and_messages_in_order_and_their_failures_are_told_apart() {
    run(|env| async move {
        let mirror = Arc::new(Mirror::default());
        let service: Arc<dyn Service> = Arc::<Mirror>::clone(&mirror);
        let server = Server::new(&endpoint(&env, SERVER), Services::new().with(ServiceId::META, service));
        let direct = Direct::new(&server);
        let peer = Peer::new(&endpoint(&env, CLIENT), SERVER, &direct.connector());
        let ask = |operation, body: &[u8]| peer.request(Class::Control, ServiceId::META, operation, body, PATIENCE);
        for number in 0..100u16 {
            let sent = peer.send(Class::Control, ServiceId::META, number, &number.to_le_bytes());
            assert_eq!(sent, Ok(()));
        }
        assert_eq!(ask(1, b"raft").await, Ok(b"tfar".to_vec()));
        let expected: Vec<_> = (0..100u16).map(|number| (number, number.to_le_bytes().to_vec())).collect();
        assert_eq!(*lock(&mirror.messages), expected, "sent before the request, arrived before it");
        assert_eq!(ask(1, &[]).await, Ok(Vec::new()));
        assert_eq!(ask(1, &[7; 1 << 20]).await, Ok(vec![7; 1 << 20]));
        assert_eq!(ask(2, b"").await, Err(CallError::Malformed));
        assert_eq!(ask(3, b"").await, Err(CallError::Unavailable));
        assert_eq!(ask(4, b"").await, Err(CallError::TooLarge));
        assert_eq!(ask(9, b"").await, Err(CallError::NotOffered));
        assert_eq!(ask(1, &vec![0; (8 << 20) + 1]).await, Err(CallError::TooLarge));
        let unknown = peer.request(Class::Control, ServiceId::MEMBERSHIP, 1, b"", PATIENCE);
        assert_eq!(unknown.await, Err(CallError::NotOffered));
        let from = lock(&mirror.from).clone().expect("asked");
        assert_eq!((from.node, from.class), (CLIENT, Class::Control));
        assert_eq!(server.peers(), [from]);
    });
}

#[test]
fn one_way_messages_into_a_silent_connection_are_noticed_and_bounded() {
    run(|env| async move {
        let mirror = Arc::new(Mirror::default());
        let service: Arc<dyn Service> = Arc::<Mirror>::clone(&mirror);
        let server = Server::new(&endpoint(&env, SERVER), Services::new().with(ServiceId::META, service));
        let pipes = Arc::new(Pipes::default());
        let limits = Limits { silence_for: Duration::from_millis(400), queue_requests_max: 100, ..patient() };
        let peer = Peer::new(&endpoint(&env, CLIENT).with_limits(limits), SERVER, &pipes.connector(&env, &server));
        let send = |body: &[u8]| peer.send(Class::Control, ServiceId::META, 7, body);
        assert_eq!(send(b"first"), Ok(()));
        while lock(&mirror.messages).is_empty() {
            xsan_env::yield_now().await;
        }
        // A healthy connection is kept, however long nothing but messages is sent.
        env.sleep(Duration::from_millis(900)).await;
        assert_eq!(send(b"second"), Ok(()));
        env.sleep(Duration::from_millis(900)).await;
        assert!(matches!(peer.state(Class::Control), LinkState::Up));
        pipes.set(0, Flow::Stalled);
        assert_eq!(send(b"lost"), Ok(()));
        while !matches!(peer.state(Class::Control), LinkState::Down { .. }) {
            env.sleep(Duration::from_millis(10)).await;
        }
        while send(b"third").is_err() || lock(&mirror.messages).len() < 3 {
            env.sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(lock(&mirror.messages)[2].1, b"third");
        // A socket that takes nothing: the queue fills, and says so.
        let limits = Limits { queue_requests_max: 100, ..patient() };
        let peer = Peer::new(&endpoint(&env, CLIENT).with_limits(limits), SERVER, &pipes.connector(&env, &server));
        let send = |body: &[u8]| peer.send(Class::Control, ServiceId::META, 7, body);
        assert_eq!(send(b"fourth"), Ok(()));
        while lock(&mirror.messages).len() < 4 {
            xsan_env::yield_now().await;
        }
        pipes.set(pipes.made() - 1, Flow::Stalled);
        let mut accepted = 0;
        while send(&[0; 1 << 20]).is_ok() {
            accepted += 1;
            xsan_env::yield_now().await;
        }
        assert!((100..200).contains(&accepted), "{accepted} MiB");
    });
}

#[test]
fn a_request_that_is_not_answered_ends_with_its_deadline() {
    struct Deaf;
    impl Service for Deaf {
        fn request(
            &self,
            _: &PeerInfo,
            _: u16,
            _: &[u8],
            _: Duration,
        ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>> {
            Box::pin(std::future::pending())
        }
        fn message(&self, _: &PeerInfo, _: u16, _: &[u8]) {}
    }
    run(|env| async move {
        let services = Services::new().with(ServiceId::MEMBERSHIP, Arc::new(Deaf));
        let direct = Direct::new(&Server::new(&endpoint(&env, SERVER), services));
        let peer: Arc<Peer> = Peer::new(&endpoint(&env, CLIENT), SERVER, &direct.connector());
        let short = Duration::from_millis(30);
        let asked = peer.request(Class::Control, ServiceId::MEMBERSHIP, 1, b"?", short);
        assert_eq!(asked.await, Err(CallError::Unavailable));
    });
}
