//! A real storage node, over TCP and TLS.

use crate::support::*;
use std::sync::Arc;
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufPool, Env, Listener, MemoryDisk, Stream};
use xsan_node::{DeviceHandle, DeviceIdentity, MemoryIndex, Node, NodeConfig};
use xsan_types::{DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, MemberState, VolumeId};
use xsan_wire::node::{CreateMember, NodeApi, NodeError, PutShard};
use xsan_wire::{Ca, Connect, Peer, RemoteNode, Server, Services};

const DEVICE: DeviceId = DeviceId(7);

async fn node(env: &Env) -> Arc<Node> {
    let disk = MemoryDisk::new(64 << 20, 512);
    let identity = DeviceIdentity { cluster: CLUSTER, node: SERVER, device: DEVICE };
    Node::format(env, &disk.open(), identity).await.expect("a fresh disk");
    let handle = DeviceHandle { disk: disk.open(), index: Box::new(MemoryIndex::default()) };
    let config = NodeConfig::new(CLUSTER, SERVER, BufPool::new(0, 4 << 20));
    Node::open(env, config, vec![handle]).await.expect("the device opens")
}

#[test]
fn a_real_node_keeps_its_promises_over_tcp_and_tls() {
    run(|env| async move {
        let ca = Ca::new(CLUSTER).expect("a CA");
        let node = node(&env).await;
        let api: Arc<dyn NodeApi> = Arc::<Node>::clone(&node);
        let server =
            Server::new(&endpoint(&env, SERVER).with_tls(tls(&env, &ca, SERVER)), Services::new().with_node(api));
        let listener = Listener::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("a port");
        let address = listener.tcp_address().expect("TCP");
        let serving = server.clone();
        let served = env.spawn("serve", async move { serving.serve(listener).await });
        let connect: Arc<dyn Connect> =
            Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> { Box::pin(Stream::connect_tcp(address)) });
        let client = endpoint(&env, CLIENT).with_tls(tls(&env, &ca, CLIENT));
        let remote = RemoteNode::new(Peer::new(&client, SERVER, &connect));
        let at = member_promises(&remote).await;
        shard_promises(&remote, at.incarnation).await;
        close_promises(&remote, at).await;
        assert_eq!(remote.devices().await.expect("answered")[0].incarnation, at.incarnation);
        server.stop(PATIENCE).await;
        served.join().await;
        assert_eq!(remote.devices().await, Err(NodeError::Unavailable));
        node.close().await;
    });
}

async fn member_promises(remote: &RemoteNode) -> MemberRef {
    let volume = VolumeId(1);
    let create = CreateMember { device: DEVICE, volume, set: set(), manifest: vec![sealed(90)] };
    let made = remote.create_member(create).await.expect("made");
    let at = MemberRef { device: DEVICE, volume, set: set(), incarnation: made.incarnation };
    assert_eq!(remote.append(at, segment(1), 0, pattern(4096)).await, Ok(4096));
    assert_eq!(remote.append(at, segment(1), 4096, pattern(65_536)).await, Ok(69_632));
    assert_eq!(remote.append(at, segment(1), 100, pattern(512)).await, Err(NodeError::Invalid));
    let flush = FlushRequest {
        device: DEVICE,
        incarnation: made.incarnation,
        member: Some(at),
        replicas: vec![(segment(1), 69_632)],
        shards: vec![],
    };
    assert_eq!(remote.flush(flush).await, Ok(()));
    assert_eq!(remote.confirm(at).await, Ok(()));
    let stale = MemberRef { incarnation: Incarnation(1), ..at };
    assert_eq!(remote.confirm(stale).await, Err(NodeError::NotLive { current: made.incarnation }));
    let read = remote.read_replica(DEVICE, volume, set(), segment(1), 4096, 65_536).await.expect("read");
    assert_eq!(*read, *pattern(65_536));
    at
}

async fn close_promises(remote: &RemoteNode, at: MemberRef) {
    let closed = remote.close(DEVICE, at.volume, Generation(9)).await.expect("closed");
    assert_eq!((closed[0].state, closed[0].manifest.as_slice()), (MemberState::Live, &[sealed(90)][..]));
    assert_eq!(closed[0].replicas[0].complete, 69_632);
    assert_eq!(remote.append(at, segment(1), 69_632, pattern(512)).await, Err(NodeError::Closed));
}

async fn shard_promises(remote: &RemoteNode, incarnation: Incarnation) {
    // Larger than one piece of the receiver's memory.
    let data = pattern((2 << 20) + 8192);
    let hash = *blake3::hash(&data).as_bytes();
    let pieces = vec![data.slice(..1 << 20), data.slice(1 << 20..)];
    let put = PutShard { device: DEVICE, shard: shard(4), epoch: Epoch(1), hash, data: pieces };
    assert_eq!(remote.put_shard(put).await, Ok(()));
    let read = remote.read_shard(DEVICE, shard(4), 1 << 20, (1 << 20) + 8192).await.expect("read");
    assert_eq!(*read, data[1 << 20..]);
    assert_eq!(remote.verify_shard(DEVICE, shard(4)).await, Ok(()));
    let info = remote.shard_info(DEVICE, shard(4)).await.expect("known");
    assert_eq!((info.bytes, info.hash, info.open), (data.len() as u64, hash, false));
    assert_eq!(remote.read_shard(DEVICE, shard(5), 0, 4096).await.err(), Some(NodeError::NotFound));
    let open = vec![pattern(65_536)];
    assert_eq!(remote.append_shard(DEVICE, incarnation, shard(6), 0, open).await, Ok(65_536));
    let hash = *blake3::hash(&pattern(65_536)).as_bytes();
    assert_eq!(remote.finish_shard(DEVICE, incarnation, shard(6), 65_536, hash).await, Ok(()));
    let listed = remote.list_shards(DEVICE, VolumeId(1), None, 10).await.expect("listed");
    assert_eq!(listed.iter().map(|info| info.shard).collect::<Vec<_>>(), [shard(4), shard(6)]);
    assert_eq!(remote.delete_segments(vec![segment(4), segment(6)]).await, Ok(()));
    assert_eq!(remote.list_shards(DEVICE, VolumeId(1), None, 10).await, Ok(vec![]));
}
