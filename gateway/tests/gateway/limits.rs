//! What one client can take from the others: bounds of time, bytes and numbers.

use crate::support::{NAME, World, is_closed};
use futures::FutureExt;
use std::time::Duration;
use xsan_gateway::Limits;
use xsan_gateway::client::{Client, Connect, Request};
use xsan_gateway::nbd::proto::{Style, command};

fn world(limits: Limits) -> World {
    World::with(true, limits, |info| info.size = 1 << 30)
}

fn read(offset: u64, length: u64) -> Request<'static> {
    Request { command: command::READ, offset, length, ..Request::default() }
}

#[tokio::test]
async fn a_client_that_does_not_haggle_is_closed_in_time() {
    let world = world(Limits { handshake_for: Duration::from_millis(30), ..Limits::default() });
    let silent = world.dial();
    let mut half = world.haggle().await;
    half.stream().write_all(b"IHAVE").await.expect("sent");
    assert!(is_closed(&silent).await);
    assert!(is_closed(half.stream()).await);
    assert_eq!(world.server.connections(), 0);
}

#[tokio::test]
async fn a_served_client_may_be_idle_longer_than_a_handshake() {
    let limits = Limits { handshake_for: Duration::from_millis(50), ..Limits::default() };
    let world = world(limits);
    let mut client = world.connect(Style::Extended).await;
    let silent = world.dial();
    assert!(is_closed(&silent).await, "the time of a handshake has passed");
    assert!(client.read(0, 512).await.is_ok());
}

#[tokio::test]
async fn endless_haggling_is_closed() {
    let world = world(Limits { options_max: 10, ..Limits::default() });
    let mut negotiation = world.haggle().await;
    for _ in 0..10 {
        negotiation.list().await.expect("a list");
    }
    assert!(is_closed(negotiation.stream()).await);
}

#[tokio::test]
async fn connections_above_the_limit_are_closed_at_once() {
    let world = world(Limits { connections_max: 2, ..Limits::default() });
    let (_one, two) = (world.haggle().await, world.haggle().await);
    assert!(is_closed(&world.dial()).await);
    drop(two);
    // The place is free again as soon as the server has seen the end.
    while world.server.connections() > 1 {
        xsan_env::yield_now().await;
    }
    assert!(Client::connect(world.dial(), &Connect::to(NAME)).await.is_ok());
}

#[tokio::test]
async fn requests_above_the_limit_wait_unread() {
    let world = world(Limits { requests_max: 4, ..Limits::default() });
    let mut client = world.connect(Style::Simple).await;
    world.export.hold();
    let mut cookies = Vec::new();
    for i in 0..16 {
        cookies.push(client.send(read(i * 512, 512)).await.expect("sent"));
    }
    world.export.wait_started(4).await;
    for _ in 0..100 {
        xsan_env::yield_now().await;
    }
    assert_eq!(*world.export.started.borrow(), 4);
    world.export.release();
    for cookie in cookies {
        assert_eq!(client.wait(cookie).await.expect("answered").error, None);
    }
}

#[tokio::test]
async fn the_budget_of_the_gateway_stops_connections_and_lets_them_go_on() {
    let limits = Limits { gateway_bytes_max: 4 << 20, connection_bytes_max: 64 << 20, ..Limits::default() };
    let world = world(limits);
    let mut one = world.connect(Style::Extended).await;
    let mut other = world.connect(Style::Simple).await;
    world.export.hold();
    let mut cookies = Vec::new();
    for i in 0..16 {
        cookies.push((one.send(read(i << 20, 1 << 20)).await.expect("sent"), true));
        cookies.push((other.send(read(i << 20, 1 << 20)).await.expect("sent"), false));
    }
    world.export.wait_started(3).await;
    for _ in 0..100 {
        xsan_env::yield_now().await;
    }
    assert!(*world.export.started.borrow() <= 4, "no more than the budget is under way");
    assert!(world.server.bytes_under_way() <= 4 << 20);
    world.export.release();
    let (mine, others): (Vec<_>, Vec<_>) = cookies.into_iter().partition(|(_, mine)| *mine);
    let wait = async |client: &mut Client<_>, cookies: Vec<(u64, bool)>| {
        for (cookie, _) in cookies {
            assert_eq!(client.wait(cookie).await.expect("answered").data.len(), 1 << 20);
        }
    };
    tokio::join!(wait(&mut one, mine), wait(&mut other, others));
    drop((one, other));
    world.server.disconnect(NAME).await;
    assert_eq!(world.server.bytes_under_way(), 0, "everything came back");
}

#[tokio::test]
async fn a_request_larger_than_the_budget_is_still_served() {
    let limits = Limits { gateway_bytes_max: 1 << 20, connection_bytes_max: 1 << 20, ..Limits::default() };
    let mut client = world(limits).connect(Style::Extended).await;
    let data = vec![5; 8 << 20];
    client.write(0, &data, 0).await.expect("written");
    assert!(client.read(0, 8 << 20).await.expect("read") == data);
}

#[tokio::test]
async fn a_client_that_never_reads_cannot_starve_the_others() {
    let limits = Limits { gateway_bytes_max: 2 << 20, stall_for: Duration::from_millis(50), ..Limits::default() };
    let world = world(limits);
    let mut deaf = world.connect(Style::Simple).await;
    for i in 0..8 {
        deaf.send(read(i << 20, 1 << 20)).await.expect("sent");
    }
    world.export.wait_started(1).await;
    let mut client = world.connect(Style::Simple).await;
    assert_eq!(client.read(0, 1 << 20).await.expect("served in the end").len(), 1 << 20);
}

#[tokio::test]
async fn a_client_that_sends_half_a_payload_cannot_starve_the_others() {
    let limits = Limits { gateway_bytes_max: 2 << 20, stall_for: Duration::from_millis(50), ..Limits::default() };
    let world = world(limits);
    let mut slow = world.connect(Style::Simple).await;
    slow.send(Request { command: command::WRITE, length: 2 << 20, ..Request::default() }).await.expect("sent");
    let mut client = world.connect(Style::Simple).await;
    assert_eq!(client.read(0, 1 << 20).await.expect("served in the end").len(), 1 << 20);
    assert!(is_closed(slow.stream()).await);
}

#[tokio::test]
async fn a_stopped_client_keeps_its_connection_while_nobody_needs_its_bytes() {
    let limits = Limits { stall_for: Duration::from_millis(10), ..Limits::default() };
    let world = world(limits);
    let mut stopped = world.connect(Style::Simple).await;
    let cookie = stopped.send(read(0, 1 << 20)).await.expect("sent");
    world.export.wait_started(1).await;
    world.env.sleep(Duration::from_millis(60)).await;
    let mut client = world.connect(Style::Simple).await;
    assert!(client.read(0, 512).await.is_ok());
    assert_eq!(stopped.wait(cookie).await.expect("still there").data.len(), 1 << 20);
}

#[tokio::test]
async fn nothing_is_taken_from_a_client_that_only_connects() {
    let world = World::new();
    let client = world.connect(Style::Extended).await;
    assert_eq!(world.server.bytes_under_way(), 0);
    assert!(world.server.disconnect("other").now_or_never().is_some());
    drop(client);
}
