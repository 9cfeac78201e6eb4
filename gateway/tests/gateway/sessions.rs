//! P12 and the end of the server.

use crate::support::{NAME, SIZE, STYLES, World, is_closed, pool};
use futures::FutureExt;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::net::{Listener, Stream, UnixOptions};
use xsan_gateway::client::{Client, Connect, Negotiation, Request};
use xsan_gateway::memory_export::MemoryExport;
use xsan_gateway::nbd::proto::{Style, command, option, option_reply};
use xsan_gateway::{Export, Tls};

/// Long enough for any machine; conditions end the waits, not this.
const GRACE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_new_connection_cuts_the_old_one_and_waits_for_its_requests() {
    for style in STYLES {
        let world = World::single();
        let mut old = world.connect(style).await;
        world.export.hold();
        let request = old.write_request(0, &[1; 4096], 0);
        old.send(request).await.expect("sent");
        world.export.wait_started(1).await;
        let how = Connect::in_style(NAME, style);
        let mut connecting = Box::pin(Client::connect(world.dial(), &how));
        // The old one is closed at once; the new one is not let in while the write may still land.
        tokio::select! {
            biased;
            closed = is_closed(old.stream()) => assert!(closed),
            _ = &mut connecting => panic!("let in before the old request finished"),
        }
        assert!(connecting.as_mut().now_or_never().is_none());
        assert_eq!(world.server.clients(NAME).len(), 2, "the old one still counts");
        world.export.release();
        let mut new = connecting.await.expect("let in now");
        assert_eq!(new.read(0, 4096).await.expect("read"), [1; 4096]);
        assert_eq!(world.server.clients(NAME).len(), 1);
    }
}

#[tokio::test]
async fn an_idle_old_connection_is_replaced_also_by_export_name() {
    let world = World::single();
    let mut old = world.connect(Style::Simple).await;
    let negotiation = Negotiation::start(world.dial(), 3).await.expect("a greeting");
    let mut new = negotiation.export_name(NAME, false).await.expect("served");
    assert!(is_closed(old.stream()).await);
    assert!(new.read(0, 512).await.is_ok());
}

#[tokio::test]
async fn a_client_under_a_new_name_replaces_the_one_under_the_old_name() {
    for style in STYLES {
        let world = World::single();
        let mut old = world.connect(style).await;
        world.export.inner.rename("renamed");
        world.export.hold();
        let request = old.write_request(0, &[1; 4096], 0);
        old.send(request).await.expect("sent");
        world.export.wait_started(1).await;
        let how = Connect::in_style("renamed", style);
        let mut connecting = Box::pin(Client::connect(world.dial(), &how));
        tokio::select! {
            biased;
            closed = is_closed(old.stream()) => assert!(closed),
            _ = &mut connecting => panic!("let in while the write of the old client may land"),
        }
        world.export.release();
        let mut new = connecting.await.expect("let in now");
        assert_eq!(new.read(0, 4096).await.expect("read"), [1; 4096]);
        assert_eq!(world.server.clients(NAME).len(), 1);
    }
}

#[tokio::test]
async fn clients_of_all_names_are_counted_and_cut_by_the_key() {
    let world = World::new();
    let mut old = world.connect(Style::Extended).await;
    world.export.inner.rename("renamed");
    let mut new = world.connect_to("renamed", Style::Extended).await;
    assert!(old.read(0, 512).await.is_ok(), "a new name cuts nobody");
    assert_eq!(world.server.clients(&world.export.key()).len(), 2);
    assert!(world.server.clients("renamed").is_empty(), "a name is no key");
    world.server.disconnect(&world.export.key()).await;
    assert!(is_closed(old.stream()).await && is_closed(new.stream()).await);
    assert_eq!(world.server.connections(), 0);
}

#[tokio::test]
async fn another_export_that_got_the_name_has_its_own_clients() {
    let other = Arc::new(MemoryExport::new("other", SIZE, false, pool()));
    let world = World::beside(false, [Arc::clone(&other) as Arc<dyn Export>]);
    let mut old = world.connect(Style::Simple).await;
    world.export.inner.rename("renamed");
    other.rename(NAME);
    let mut new = world.connect(Style::Simple).await;
    assert!(old.read(0, 512).await.is_ok(), "nobody came for its export");
    let counted = |key: &str| world.server.clients(key).len();
    assert_eq!((counted(&world.export.key()), counted(&other.key())), (1, 1));
    world.server.disconnect(&other.key()).await;
    assert!(is_closed(new.stream()).await);
    assert!(old.read(0, 512).await.is_ok(), "it was not meant");
}

#[tokio::test]
async fn looking_at_an_export_cuts_nobody() {
    let world = World::single();
    let mut client = world.connect(Style::Extended).await;
    let mut looker = world.haggle().await;
    looker.list().await.expect("a list");
    looker.info(option::INFO, NAME).await.expect("info");
    assert!(client.read(0, 512).await.is_ok());
}

#[tokio::test]
async fn multi_conn_clients_share_and_see_each_others_writes() {
    let world = World::new();
    let mut one = world.connect(Style::Extended).await;
    let mut other = world.connect(Style::Simple).await;
    one.write(0, &[3; 512], 0).await.expect("written");
    other.flush().await.expect("flushed");
    assert_eq!(other.read(0, 512).await.expect("read"), [3; 512]);
    assert!(one.read(0, 512).await.is_ok());
    assert_eq!(world.server.clients(NAME).len(), 2);
}

#[tokio::test]
async fn a_client_that_vanishes_frees_its_place_when_its_requests_are_done() {
    let world = World::single();
    let mut client = world.connect(Style::Structured).await;
    world.export.hold();
    let request = client.write_request(0, &[1; 512], 0);
    client.send(request).await.expect("sent");
    world.export.wait_started(1).await;
    drop(client);
    let mut gone = Box::pin(world.server.disconnect(NAME));
    assert!(gone.as_mut().now_or_never().is_none(), "its write is still under way");
    world.export.release();
    gone.await;
    assert_eq!(world.server.connections(), 0);
}

#[tokio::test]
async fn disconnect_cuts_every_client_of_the_export() {
    let world = World::new();
    let (mut one, mut other) = (world.connect(Style::Extended).await, world.connect(Style::Simple).await);
    world.server.disconnect(NAME).await;
    assert!(is_closed(one.stream()).await && is_closed(other.stream()).await);
    assert!(world.server.clients(NAME).is_empty());
    assert!(world.connect(Style::Simple).await.read(0, 512).await.is_ok(), "a later client is welcome");
}

#[tokio::test]
async fn shutdown_finishes_what_is_under_way_and_refuses_what_comes_late() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        world.export.hold();
        let request = client.write_request(0, &[1; 512], 0);
        let early = client.send(request).await.expect("sent");
        world.export.wait_started(1).await;
        let mut stopping = Box::pin(world.server.shutdown(GRACE));
        assert!(stopping.as_mut().now_or_never().is_none());
        let late = client.write_request(0, &[2; 100_000 / 512 * 512], 0);
        let late = client.send(late).await.expect("sent");
        let reply = client.wait(late).await.expect("answered");
        assert_eq!(reply.error.map(|(errno, _)| errno), Some(108), "ESHUTDOWN");
        world.export.release();
        assert_eq!(client.wait(early).await.expect("answered").error, None);
        stopping.await;
        assert!(is_closed(client.stream()).await);
        assert_eq!(world.server.connections(), 0);
        assert_eq!(*world.export.started.borrow(), 1, "the late one was not started");
    }
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let world = World::new();
    let mut client = world.connect(Style::Extended).await;
    world.export.hold();
    client.send(Request { command: command::FLUSH, ..Request::default() }).await.expect("sent");
    world.export.wait_started(1).await;
    world.server.shutdown(Duration::from_millis(20)).await;
    assert!(is_closed(client.stream()).await);
    assert_eq!(world.server.connections(), 0);
}

#[tokio::test]
async fn a_client_in_its_handshake_is_told_of_the_shutdown() {
    let world = World::new();
    let mut negotiation = world.haggle().await;
    negotiation.list().await.expect("a list");
    let mut stopping = Box::pin(world.server.shutdown(GRACE));
    assert!(stopping.as_mut().now_or_never().is_none());
    let (replies, ()) = tokio::join!(negotiation.option(option::LIST, &[]), stopping);
    assert_eq!(replies.expect("a reply")[0].kind, option_reply::ERR_SHUTDOWN);
    let turned_away = world.dial();
    assert!(is_closed(&turned_away).await);
}

#[tokio::test]
async fn a_unix_socket_serves_many_clients_and_goes_away_with_the_server() {
    let world = World::new();
    let path = std::env::temp_dir().join(format!("xsan-gateway-{}.sock", std::process::id()));
    let listener = Listener::unix(&path, &UnixOptions::default()).await.expect("listening");
    let accepting = world.server.listen(listener, Tls::off());
    let mut clients = Vec::new();
    for style in STYLES.into_iter().cycle().take(12) {
        let stream = Stream::connect_unix(&path).await.expect("connected");
        clients.push(Client::connect(stream, &Connect::in_style(NAME, style)).await.expect("served"));
    }
    for (client, value) in clients.iter_mut().zip(0u8..) {
        client.write(u64::from(value) * 512, &[value; 512], 0).await.expect("written");
    }
    for value in 0..12u8 {
        let read = clients[11 - usize::from(value)].read(u64::from(value) * 512, 512).await.expect("read");
        assert_eq!(read, [value; 512]);
    }
    assert!(world.server.clients(NAME)[0].peer.address.starts_with("unix:pid="));
    world.server.shutdown(GRACE).await;
    accepting.join().await;
    assert!(Stream::connect_unix(&path).await.is_err(), "nobody listens");
}
