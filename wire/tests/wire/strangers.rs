//! Whoever does not belong here gets a clear refusal, and the server goes on.

use crate::support::*;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use xsan_env::{BufPool, Env, Stream};
use xsan_types::{ClusterId, NodeId};
use xsan_wire::frame::{Bounds, Header, Input, Kind, META_BYTES_MAX, Output};
use xsan_wire::handshake::{Hello, Welcome};
use xsan_wire::node::{NodeApi, NodeError};
use xsan_wire::payload::Payload;
use xsan_wire::{Ca, Class, Endpoint, LinkState, Peer, Refusal, RemoteNode, Server, Services};

/// Why a client cannot talk to the server, in words; and proof that the server still talks to a sound one.
async fn refusal(client: &Endpoint, far: &Pair) -> String {
    refusal_of(client, SERVER, far).await
}

async fn refusal_of(client: &Endpoint, wanted: NodeId, far: &Pair) -> String {
    let remote = RemoteNode::new(Peer::new(client, wanted, &far.direct.connector()));
    assert_eq!(remote.confirm(member()).await, Err(NodeError::Unavailable));
    let LinkState::Down { error, .. } = remote.peer().state(Class::Guest) else { panic!("it is refused") };
    still_serves(far).await;
    let cause = std::error::Error::source(&*error).map(|cause| format!(" ({cause})")).unwrap_or_default();
    format!("{error}{cause}")
}

async fn still_serves(far: &Pair) {
    assert_eq!(far.remote.confirm(member()).await, Ok(()), "the server goes on");
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{text}` does not say `{word}`");
    }
}

#[test]
fn a_node_of_another_cluster_is_refused() {
    run(|env| async move {
        let far = pair(&env);
        let other = Endpoint::new(&env, BufPool::new(0, 0), ClusterId(0xdead), CLIENT).with_limits(patient());
        assert_says(&refusal(&other, &far).await, &["refused", "another cluster"]);
    });
}

#[test]
fn a_node_that_wants_somebody_else_is_refused() {
    run(|env| async move {
        let far = pair(&env);
        let said = refusal_of(&endpoint(&env, CLIENT), NodeId(6), &far).await;
        assert_says(&said, &["node 5 lives at that address"]);
    });
}

#[test]
fn a_removed_node_is_refused() {
    run(|env| async move {
        let node = Arc::new(Recorder::default());
        let api: Arc<dyn NodeApi> = Arc::<Recorder>::clone(&node);
        let services = Services::new().with_node(api).with_admission(Arc::new(|node| node == CLIENT));
        let server = Server::new(&endpoint(&env, SERVER), services);
        let direct = Direct::new(&server);
        let peer = Peer::new(&endpoint(&env, CLIENT), SERVER, &direct.connector());
        let far = Pair { node, server, direct, remote: RemoteNode::new(Arc::clone(&peer)), peer };
        assert_says(&refusal(&endpoint(&env, NodeId(9)), &far).await, &["does not know this node as a member"]);
    });
}

#[test]
fn a_node_that_is_removed_during_its_handshake_is_served_nothing() {
    run(|env| async move {
        // It is still a member when it says who it is, and the removal finds no connection of it to cut.
        let asked = AtomicUsize::new(0);
        let admission = move |node| node != CLIENT || asked.fetch_add(1, Ordering::Relaxed) == 0;
        let node = Arc::new(Recorder::default());
        let api: Arc<dyn NodeApi> = Arc::<Recorder>::clone(&node);
        let services = Services::new().with_node(api).with_admission(Arc::new(admission));
        let server = Server::new(&endpoint(&env, SERVER), services);
        let direct = Direct::new(&server);
        let remote = RemoteNode::new(Peer::new(&endpoint(&env, CLIENT), SERVER, &direct.connector()));
        assert!(remote.confirm(member()).await.is_err());
        assert_eq!(node.asked(), 0);
        let other = RemoteNode::new(Peer::new(&endpoint(&env, NodeId(3)), SERVER, &direct.connector()));
        assert_eq!(other.confirm(member()).await, Ok(()), "the server goes on");
    });
}

#[test]
fn one_connection_too_many_is_refused() {
    run(|env| async move {
        let few = xsan_wire::Limits { connections_max: 1, ..patient() };
        let far = pair_of(&endpoint(&env, CLIENT), &endpoint(&env, SERVER).with_limits(few));
        still_serves(&far).await;
        assert_says(&refusal(&endpoint(&env, NodeId(3)), &far).await, &["no room for another connection"]);
    });
}

/// A pair with certificates, and what belongs to it.
fn secure(env: &Env, ca: &Ca) -> Pair {
    pair_of(
        &endpoint(env, CLIENT).with_tls(tls(env, ca, CLIENT)),
        &endpoint(env, SERVER).with_tls(tls(env, ca, SERVER)),
    )
}

#[test]
fn a_certificate_of_another_ca_is_refused_even_for_the_same_cluster_id() {
    run(|env| async move {
        let (ca, foreign) = (Ca::new(CLUSTER).expect("a CA"), Ca::new(CLUSTER).expect("a CA"));
        let far = secure(&env, &ca);
        // The client does not trust the server.
        let client = endpoint(&env, CLIENT).with_tls(tls(&env, &foreign, CLIENT));
        assert_says(&refusal(&client, &far).await, &["TLS handshake failed", "same cluster"]);
        // The server does not trust the client: it has the right CA's certificate to verify with, and a foreign one to show.
        let key = xsan_wire::NodeKey::new().expect("a key");
        let certificate = foreign.issue(CLIENT, key.public()).expect("issued");
        let mixed = xsan_wire::Tls::new(&env, CLUSTER, ca.certificate_pem(), &certificate, &key.pem());
        let client = endpoint(&env, CLIENT).with_tls(mixed.expect("usable"));
        let said = refusal(&client, &far).await;
        assert!(said.contains("broke") || said.contains("closed") || said.contains("TLS"), "{said}");
        assert_eq!(far.node.asked(), 2, "only the sound client's calls have arrived");
    });
}

#[test]
fn a_node_with_anothers_certificate_is_refused() {
    run(|env| async move {
        let ca = Ca::new(CLUSTER).expect("a CA");
        let far = secure(&env, &ca);
        let cloned = endpoint(&env, NodeId(3)).with_tls(tls(&env, &ca, CLIENT));
        assert_says(&refusal(&cloned, &far).await, &["certificate belongs to node 2", "was its data copied?"]);
    });
}

#[test]
fn a_server_with_anothers_certificate_is_not_talked_to() {
    run(|env| async move {
        let ca = Ca::new(CLUSTER).expect("a CA");
        let far = secure(&env, &ca);
        let client = endpoint(&env, CLIENT).with_tls(tls(&env, &ca, CLIENT));
        assert_says(&refusal_of(&client, NodeId(6), &far).await, &["TLS handshake failed", "not valid for name"]);
    });
}

#[test]
fn with_and_without_tls_do_not_understand_each_other_and_say_so() {
    run(|env| async move {
        let ca = Ca::new(CLUSTER).expect("a CA");
        let said = refusal(&endpoint(&env, CLIENT), &secure(&env, &ca)).await;
        assert_says(&said, &["the peer speaks TLS, this side does not"]);
        let client = endpoint(&env, CLIENT).with_tls(tls(&env, &ca, CLIENT));
        assert_says(&refusal(&client, &pair(&env)).await, &["TLS handshake failed"]);
    });
}

/// Sends bytes as a stranger and reads until the server hangs up.
async fn stranger(env: &Env, far: &Pair, bytes: &[u8]) -> Vec<u8> {
    let (ours, theirs) = Stream::memory_pair(1 << 16);
    far.server.accept(theirs);
    ours.write_all(bytes).await.expect("the server listens");
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    let reading = async {
        while let Ok(count @ 1..) = ours.read(&mut part).await {
            answer.extend_from_slice(&part[..count]);
        }
    };
    env.timeout(PATIENCE, reading).await.expect("the server hangs up");
    still_serves(far).await;
    answer
}

fn frame(header: &Header, meta: &[u8]) -> Vec<u8> {
    let mut output = Output::default();
    assert!(output.push(header, Payload::None, |out| out.extend_from_slice(meta)));
    let mut slices = [IoSlice::new(&[])];
    assert_eq!(output.slices(&mut slices), 1);
    slices[0].to_vec()
}

fn refusal_in(bytes: &[u8]) -> Refusal {
    let mut input = Input::new(BufPool::new(0, 0), Bounds::HANDSHAKE, false);
    input.room()[..bytes.len()].copy_from_slice(bytes);
    input.filled(bytes.len());
    let frame = input.next_frame().expect("a frame").expect("all of it");
    assert_eq!(frame.header.kind, Kind::Refusal);
    Refusal::get(frame.meta).expect("readable")
}

fn hello(versions: (u16, u16)) -> Vec<u8> {
    let hello =
        Hello { versions, cluster: CLUSTER, node: CLIENT, instance: 1, target: SERVER, class: Class::Guest, link: 8 };
    let mut meta = Vec::new();
    hello.put(&mut meta);
    frame(&Header::of(Kind::Hello), &meta)
}

#[test]
fn an_old_protocol_version_is_refused_with_what_is_spoken_here() {
    run(|env| async move {
        let far = pair(&env);
        for outside in [(0, 0), (2, 9)] {
            assert_eq!(refusal_in(&stranger(&env, &far, &hello(outside)).await), Refusal::Version(1, 1));
        }
        // A frame of another layout cannot even be read: it is told the same.
        let mut other_layout = hello((1, 1));
        other_layout[4] = 2;
        assert_eq!(refusal_in(&stranger(&env, &far, &other_layout).await), Refusal::Version(1, 1));
    });
}

#[test]
fn garbage_on_the_port_is_hung_up_on() {
    run(|env| async move {
        let far = pair(&env);
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[0xff; 5000], &[0x16, 3, 1, 0, 200, 1]] {
            assert_eq!(stranger(&env, &far, garbage).await, b"");
        }
        // A sound beginning, then nothing sensible.
        let mut damaged = hello((1, 1));
        damaged[50] ^= 1;
        assert_eq!(stranger(&env, &far, &damaged).await, b"");
        assert_eq!(refusal_in(&stranger(&env, &far, &frame(&Header::of(Kind::Ping), &[])).await), Refusal::Malformed);
        let empty = frame(&Header::of(Kind::Hello), &[]);
        assert_eq!(refusal_in(&stranger(&env, &far, &empty).await), Refusal::Malformed);
        assert_eq!(far.server.peers().len(), 1, "only the sound client is connected");
    });
}

#[test]
fn a_stranger_who_says_nothing_is_not_waited_for() {
    run(|env| async move {
        let hasty = xsan_wire::Limits { connect_for: std::time::Duration::from_millis(60), ..patient() };
        let far = pair_of(&endpoint(&env, CLIENT), &endpoint(&env, SERVER).with_limits(hasty));
        assert_eq!(stranger(&env, &far, b"XSW").await, b"");
    });
}

#[test]
fn an_oversize_frame_ends_the_connection_before_or_after_the_handshake() {
    run(|env| async move {
        let far = pair(&env);
        // A hello of 5 KiB: more than a stranger may send.
        let long = frame(&Header::of(Kind::Hello), &[0; 5000]);
        assert_eq!(stranger(&env, &far, &long).await, b"");
        // A peer whose frame claims more than there may be.
        let mut bytes = hello((1, 1));
        let mut request = frame(&Header { service: 1, code: 1, ..Header::of(Kind::Request) }, &[]);
        request[24..28].copy_from_slice(&(META_BYTES_MAX + 1).to_le_bytes());
        bytes.extend(request);
        let answer = stranger(&env, &far, &bytes).await;
        let mut input = Input::new(BufPool::new(0, 0), Bounds::HANDSHAKE, false);
        input.room()[..answer.len()].copy_from_slice(&answer);
        input.filled(answer.len());
        let welcome = input.next_frame().expect("sound").expect("all of it");
        assert_eq!(Welcome::get(welcome.meta).expect("readable").node, SERVER, "welcomed, then hung up on");
    });
}

#[test]
fn a_request_that_makes_no_sense_is_answered_and_the_connection_goes_on() {
    run(|env| async move {
        let far = pair(&env);
        let mut bytes = hello((1, 1));
        for (service, code, meta) in [(1, 3, &b"short"[..]), (1, 999, b""), (77, 1, b"")] {
            bytes.extend(frame(&Header { service, code, id: 5, ..Header::of(Kind::Request) }, meta));
        }
        let (ours, theirs) = Stream::memory_pair(1 << 16);
        far.server.accept(theirs);
        ours.write_all(&bytes).await.expect("written");
        let mut input = Input::new(BufPool::new(0, 0), Bounds::PEERS, false);
        let mut statuses = Vec::new();
        while statuses.len() < 4 {
            let count = ours.read(input.room()).await.expect("still there");
            assert!(count > 0, "the connection goes on");
            input.filled(count);
            while let Some(frame) = input.next_frame().expect("sound") {
                statuses.push((frame.header.kind, frame.header.code));
            }
        }
        // Malformed, no such operation, no such service.
        let answers = [(Kind::Welcome, 0), (Kind::Answer, 3), (Kind::Answer, 2), (Kind::Answer, 2)];
        assert_eq!(statuses, answers);
        still_serves(&far).await;
    });
}

#[test]
fn a_request_behind_the_goodbye_is_refused_and_what_was_begun_is_answered() {
    run(|env| async move {
        let far = pair(&env);
        far.node.held.send_replace(true);
        let (ours, theirs) = Stream::memory_pair(1 << 16);
        far.server.accept(theirs);
        let devices = |id| frame(&Header { service: 1, code: 1, id, ..Header::of(Kind::Request) }, &[]);
        ours.write_all(&[hello((1, 1)), devices(5)].concat()).await.expect("written");
        far.node.begun(1).await;
        let server = far.server.clone();
        let stop = env.spawn("stop", async move { server.stop(PATIENCE).await });
        let mut input = Input::new(BufPool::new(0, 0), Bounds::PEERS, false);
        let mut seen = Vec::new();
        loop {
            let count = ours.read(input.room()).await.expect("still there");
            if count == 0 {
                break;
            }
            input.filled(count);
            while let Some(frame) = input.next_frame().expect("sound") {
                let Header { kind, code, id, .. } = frame.header;
                seen.push((kind, code, id));
                match (kind, id) {
                    (Kind::Goodbye, _) => ours.write_all(&devices(6)).await.expect("written"),
                    (Kind::Answer, 6) => drop(far.node.held.send_replace(false)),
                    _ => {}
                }
            }
        }
        stop.join().await;
        let expected = [(Kind::Welcome, 0, 0), (Kind::Goodbye, 0, 0), (Kind::Answer, 4, 6), (Kind::Answer, 0, 5)];
        assert_eq!((seen.as_slice(), far.node.asked()), (&expected[..], 1));
    });
}

#[test]
fn a_server_without_a_node_says_that_it_does_not_answer() {
    run(|env| async move {
        let server = Server::new(&endpoint(&env, SERVER), Services::new());
        let direct = Direct::new(&server);
        let remote = RemoteNode::new(Peer::new(&endpoint(&env, CLIENT), SERVER, &direct.connector()));
        assert_eq!(remote.confirm(member()).await, Err(NodeError::Unavailable));
    });
}
