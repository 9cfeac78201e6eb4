//! Who is connected: the table of connections, and the rule that an export without multi-conn has one client (P12).
//!
//! A connection is in the table from its first byte until its last request is finished or dropped. [`Guard::enter`] puts
//! it on an export: connections it may not share with are ordered to stop and waited for, so that no write of an old
//! connection lands after a new one was told it may go. Owner: the server; each connection's task owns its [`Guard`].

use crate::export::Transport;
use futures::task::AtomicWaker;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use tokio::sync::Notify;
use xsan_env::Moment;

/// Where a client comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Kind of socket.
    pub transport: Transport,
    /// Address in words, for people.
    pub address: String,
}

/// What the server wants of a connection; grows, never shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Order {
    /// Serve.
    Run = 0,
    /// Finish what has begun, refuse the rest, close.
    Drain = 1,
    /// Close at once, then finish what has begun.
    Cut = 2,
    /// Close at once and drop what has begun.
    Kill = 3,
}

/// Counters of one connection since it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Requests answered.
    pub requests: u64,
    /// Bytes of reads answered with success.
    pub read_bytes: u64,
    /// Bytes of writes answered with success.
    pub written_bytes: u64,
}

/// A connected client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientInfo {
    /// Number of the connection in this process.
    pub id: u64,
    /// The export it uses ([`crate::Export::key`]).
    pub key: String,
    /// Where it comes from.
    pub peer: Peer,
    /// Over TLS.
    pub encrypted: bool,
    /// When it connected.
    pub since: Moment,
    /// Counters.
    pub stats: ClientStats,
}

pub(crate) struct Session {
    id: u64,
    peer: Peer,
    since: Moment,
    order: AtomicU8,
    task: AtomicWaker,
    encrypted: AtomicBool,
    requests: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Session {
    /// What the server wants now; the context is woken when that changes.
    pub(crate) fn order(&self, context: &Context<'_>) -> Order {
        self.task.register(context.waker());
        self.order_now()
    }

    pub(crate) fn order_now(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            0 => Order::Run,
            1 => Order::Drain,
            2 => Order::Cut,
            _ => Order::Kill,
        }
    }

    fn give(&self, order: Order) {
        self.order.fetch_max(order as u8, Ordering::AcqRel);
        self.task.wake();
    }

    pub(crate) fn set_encrypted(&self) {
        self.encrypted.store(true, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, more: ClientStats) {
        if more.requests > 0 {
            self.requests.fetch_add(more.requests, Ordering::Relaxed);
            self.read_bytes.fetch_add(more.read_bytes, Ordering::Relaxed);
            self.written_bytes.fetch_add(more.written_bytes, Ordering::Relaxed);
        }
    }

    fn stats(&self) -> ClientStats {
        ClientStats {
            requests: self.requests.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
        }
    }
}

/// A connection's place on an export (by its key). `arrival` numbers entries, newest highest.
struct Place {
    key: String,
    multi_conn: bool,
    arrival: u64,
}

struct Entry {
    session: Arc<Session>,
    place: Option<Place>,
}

#[derive(Default)]
struct Table {
    next: u64,
    open: BTreeMap<u64, Entry>,
    stopping: bool,
}

/// The table; cheap to clone.
#[derive(Clone)]
pub(crate) struct Sessions {
    table: Arc<Mutex<Table>>,
    /// Told whenever a connection leaves the table or the server begins to stop.
    left: Arc<Notify>,
    connections_max: usize,
}

/// Why a connection may not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turned {
    /// Too many connections.
    Full,
    /// The server is stopping.
    Stopping,
    /// A newer connection took its place while it waited.
    Replaced,
}

impl Sessions {
    pub(crate) fn new(connections_max: usize) -> Self {
        Self { table: Arc::default(), left: Arc::default(), connections_max }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a new connection into the table.
    pub(crate) fn admit(&self, peer: Peer, now: Moment) -> Result<Guard, Turned> {
        let mut table = self.lock();
        if table.stopping {
            return Err(Turned::Stopping);
        }
        if table.open.len() >= self.connections_max {
            return Err(Turned::Full);
        }
        table.next += 1;
        let session = Arc::new(Session {
            id: table.next,
            peer,
            since: now,
            order: AtomicU8::new(Order::Run as u8),
            task: AtomicWaker::new(),
            encrypted: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
        });
        table.open.insert(session.id, Entry { session: Arc::clone(&session), place: None });
        Ok(Guard { sessions: self.clone(), session })
    }

    /// The clients of the export with that key, oldest first.
    pub(crate) fn clients(&self, key: &str) -> Vec<ClientInfo> {
        let table = self.lock();
        let on_export = |entry: &&Entry| entry.place.as_ref().is_some_and(|place| place.key == key);
        table.open.values().filter(on_export).map(|entry| client_info(&entry.session, key)).collect()
    }

    /// Connections, in the handshake or on an export.
    pub(crate) fn count(&self) -> usize {
        self.lock().open.len()
    }

    /// Cuts every connection on the export with that key and waits until their requests are finished or dropped.
    pub(crate) async fn disconnect(&self, key: &str) {
        let there = |place: &Place| place.key == key;
        // Only those that are there now: a client that comes back meanwhile is the caller's to refuse.
        let border = self.lock().next;
        self.cut_and_wait(|_, place| there(place) && place.arrival <= border, || false).await;
    }

    /// As [`Sessions::disconnect`], of those that came this way.
    pub(crate) async fn disconnect_from(&self, key: &str, transport: Transport) {
        let border = self.lock().next;
        let there = |session: &Session, place: &Place| {
            session.peer.transport == transport && place.key == key && place.arrival <= border
        };
        self.cut_and_wait(there, || false).await;
    }

    /// Orders everybody; from [`Order::Drain`] on nobody is let in any more.
    pub(crate) fn order_all(&self, order: Order) {
        let mut table = self.lock();
        table.stopping = true;
        for entry in table.open.values() {
            entry.session.give(order);
        }
        drop(table);
        self.left.notify_waiters();
    }

    /// Waits until [`Sessions::order_all`] was called.
    pub(crate) async fn stopping(&self) {
        self.wait(|table| table.stopping).await;
    }

    /// Waits until the table is empty.
    pub(crate) async fn emptied(&self) {
        self.wait(|table| table.open.is_empty()).await;
    }

    /// Waits until `done` holds; it is looked at whenever a connection leaves.
    async fn wait(&self, mut done: impl FnMut(&mut Table) -> bool) {
        loop {
            let left = self.left.notified();
            let mut left = std::pin::pin!(left);
            // Listening before looking: a leave in between is not missed.
            left.as_mut().enable();
            if done(&mut self.lock()) {
                return;
            }
            left.await;
        }
    }

    async fn cut_and_wait(&self, matches: impl Fn(&Session, &Place) -> bool, give_up: impl Fn() -> bool) {
        self.wait(|table| {
            let mut found = false;
            let is_meant = |entry: &&Entry| entry.place.as_ref().is_some_and(|place| matches(&entry.session, place));
            for entry in table.open.values().filter(is_meant) {
                entry.session.give(Order::Cut);
                found = true;
            }
            !found || give_up()
        })
        .await;
    }
}

fn client_info(session: &Session, key: &str) -> ClientInfo {
    ClientInfo {
        id: session.id,
        key: key.to_owned(),
        peer: session.peer.clone(),
        encrypted: session.encrypted.load(Ordering::Relaxed),
        since: session.since,
        stats: session.stats(),
    }
}

/// A connection's entry in the table; leaves it when dropped.
pub(crate) struct Guard {
    sessions: Sessions,
    session: Arc<Session>,
}

impl Guard {
    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.session.peer
    }

    /// Takes a place on the export with that key (P12). Every older connection there is cut and waited for, unless both
    /// it and this one are multi-conn: only then a flush on one covers the other.
    ///
    /// # Errors
    /// [`Turned`]: the server stops, or a newer connection came while this one waited. Close.
    pub(crate) async fn enter(&self, key: &str, multi_conn: bool) -> Result<(), Turned> {
        let arrival = {
            let mut table = self.sessions.lock();
            if table.stopping {
                return Err(Turned::Stopping);
            }
            table.next += 1;
            let arrival = table.next;
            if let Some(entry) = table.open.get_mut(&self.session.id) {
                entry.place = Some(Place { key: key.to_owned(), multi_conn, arrival });
            }
            arrival
        };
        let conflicts = |_: &Session, place: &Place| {
            place.key == key && place.arrival < arrival && !(multi_conn && place.multi_conn)
        };
        let replaced = || self.session.order_now() >= Order::Cut;
        let wait = self.sessions.cut_and_wait(conflicts, replaced);
        let mut wait = std::pin::pin!(wait);
        std::future::poll_fn(|context| {
            if self.session.order(context) >= Order::Cut {
                return std::task::Poll::Ready(());
            }
            wait.as_mut().poll(context)
        })
        .await;
        if replaced() { Err(Turned::Replaced) } else { Ok(()) }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.sessions.lock().open.remove(&self.session.id);
        self.sessions.left.notify_waiters();
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests make their own runtime")]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn peer() -> Peer {
        Peer { transport: Transport::Unix, address: "test".into() }
    }

    fn admit(sessions: &Sessions) -> Guard {
        sessions.admit(peer(), Moment(0)).expect("room")
    }

    #[tokio::test]
    async fn a_newcomer_waits_for_the_old_connection_to_leave() {
        let sessions = Sessions::new(8);
        let old = admit(&sessions);
        old.enter("vm1", false).await.expect("alone");
        let other = admit(&sessions);
        other.enter("vm2", false).await.expect("another export");
        let new = admit(&sessions);
        let mut enter = Box::pin(new.enter("vm1", false));
        assert!(enter.as_mut().now_or_never().is_none());
        assert_eq!((old.session.order_now(), other.session.order_now()), (Order::Cut, Order::Run));
        drop(old);
        enter.await.expect("free now");
        assert_eq!(sessions.clients("vm1").len(), 1);
        assert_eq!(sessions.count(), 2);
    }

    #[tokio::test]
    async fn multi_conn_shares_only_with_multi_conn() {
        let sessions = Sessions::new(8);
        let (first, second, third) = (admit(&sessions), admit(&sessions), admit(&sessions));
        first.enter("vm1", true).await.expect("alone");
        second.enter("vm1", true).await.expect("shared");
        assert_eq!(first.session.order_now(), Order::Run);
        let mut enter = Box::pin(third.enter("vm1", false));
        assert!(enter.as_mut().now_or_never().is_none());
        assert_eq!((first.session.order_now(), second.session.order_now()), (Order::Cut, Order::Cut));
        drop((first, second));
        enter.await.expect("free now");
    }

    #[tokio::test]
    async fn of_two_that_wait_the_newer_one_wins() {
        let sessions = Sessions::new(8);
        let (old, first, second) = (admit(&sessions), admit(&sessions), admit(&sessions));
        old.enter("vm1", false).await.expect("alone");
        let mut one = Box::pin(first.enter("vm1", false));
        assert!(one.as_mut().now_or_never().is_none());
        let mut two = Box::pin(second.enter("vm1", false));
        assert!(two.as_mut().now_or_never().is_none());
        assert_eq!(one.await, Err(Turned::Replaced));
        drop(first);
        assert!(two.as_mut().now_or_never().is_none(), "the oldest is still there");
        drop(old);
        assert_eq!(two.await, Ok(()));
    }

    #[tokio::test]
    async fn too_many_or_late_connections_are_turned_away() {
        let sessions = Sessions::new(1);
        let only = admit(&sessions);
        assert_eq!(sessions.admit(peer(), Moment(0)).err(), Some(Turned::Full));
        sessions.order_all(Order::Drain);
        assert_eq!(only.enter("vm1", false).await, Err(Turned::Stopping));
        drop(only);
        sessions.emptied().await;
        assert_eq!(sessions.admit(peer(), Moment(0)).err(), Some(Turned::Stopping));
    }
}
