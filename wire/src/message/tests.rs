use super::*;
use crate::codec::{Field, Reader, WireVersion, Writer};
use crate::node::{CreateMember, CreatedMember, DeviceStatus, NodeError, PutShard, ShardInfo};
use crate::payload::Payload;
use proptest::prelude::*;
use xsan_env::{Buf, BufPool};
use xsan_types::{
    ClosedMember, Crc32c, DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, MemberState, OpenReplica,
    PgId, PoolId, RegisterView, SealedSegment, SegmentName, SetId, ShardId, ShardIndex, VolumeId,
};

/// Values by a dice: every field gets all of its bits.
struct Dice(u64);

impl Dice {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn small(&mut self) -> u32 {
        (self.word() >> 32) as u32
    }
    fn list<T>(&mut self, one: impl Fn(&mut Self) -> T) -> Vec<T> {
        (0..self.word() % 5).map(|_| one(self)).collect()
    }
    fn maybe<T>(&mut self, one: impl Fn(&mut Self) -> T) -> Option<T> {
        (!self.word().is_multiple_of(3)).then(|| one(self))
    }
    fn device(&mut self) -> DeviceId {
        DeviceId(u128::from(self.word()) << 64 | u128::from(self.word()))
    }
    fn set(&mut self) -> SetId {
        SetId { generation: Generation(self.word()), number: self.word() }
    }
    fn segment(&mut self) -> SegmentName {
        let pg = PgId { pool: PoolId(self.small()), index: self.small() };
        SegmentName { volume: VolumeId(self.word()), generation: Generation(self.word()), number: self.word(), pg }
    }
    fn shard(&mut self) -> ShardId {
        ShardId { segment: self.segment(), index: ShardIndex(self.small() as u8) }
    }
    fn member(&mut self) -> MemberRef {
        MemberRef {
            device: self.device(),
            volume: VolumeId(self.word()),
            set: self.set(),
            incarnation: Incarnation(self.word()),
        }
    }
    fn sealed(&mut self) -> SealedSegment {
        SealedSegment {
            name: self.segment(),
            bytes: self.word(),
            footer_offset: self.word(),
            footer_crc: Crc32c(self.small()),
            holes: self.word(),
        }
    }
    fn hash(&mut self) -> [u8; 32] {
        std::array::from_fn(|_| self.word() as u8)
    }
    fn buf(&mut self) -> Buf {
        let bytes: Vec<u8> = (0..1 + self.word() % 9000).map(|at| (at % 13) as u8).collect();
        Buf::copied(&bytes)
    }
    fn info(&mut self) -> ShardInfo {
        let open = self.word().is_multiple_of(2);
        ShardInfo { shard: self.shard(), bytes: self.word(), hash: self.hash(), open }
    }
    fn closed(&mut self) -> ClosedMember {
        let state = [MemberState::Flushed, MemberState::Whole, MemberState::Live][(self.word() % 3) as usize];
        let replica =
            |dice: &mut Self| OpenReplica { segment: dice.segment(), length: dice.word(), complete: dice.word() };
        ClosedMember { set: self.set(), state, manifest: self.list(Self::sealed), replicas: self.list(replica) }
    }
    fn status(&mut self) -> DeviceStatus {
        DeviceStatus {
            device: self.device(),
            incarnation: Incarnation(self.word()),
            capacity: self.word(),
            used: self.word(),
            sector: self.small(),
            shards: self.word(),
            members: self.word(),
            failed: self.word().is_multiple_of(2),
        }
    }

    /// One request of every kind.
    fn requests(&mut self) -> Vec<NodeRequest> {
        use NodeRequest as Ask;
        vec![
            Ask::Devices,
            Ask::CreateMember(CreateMember {
                device: self.device(),
                volume: VolumeId(self.word()),
                set: self.set(),
                manifest: self.list(Self::sealed),
            }),
            Ask::Append { member: self.member(), segment: self.segment(), offset: self.word(), data: self.buf() },
            Ask::Flush(FlushRequest {
                device: self.device(),
                incarnation: Incarnation(self.word()),
                member: self.maybe(Self::member),
                replicas: self.list(|dice| (dice.segment(), dice.word())),
                shards: self.list(|dice| (dice.shard(), dice.word())),
            }),
            Ask::Confirm(self.member()),
            Ask::Close { device: self.device(), volume: VolumeId(self.word()), generation: Generation(self.word()) },
            Ask::ReadReplica {
                device: self.device(),
                volume: VolumeId(self.word()),
                set: self.set(),
                segment: self.segment(),
                offset: self.word(),
                length: self.small(),
            },
            Ask::Sealed { member: self.member(), segment: self.sealed() },
            Ask::TrimManifest { member: self.member(), border: self.word(), undecided: self.list(Self::word) },
            Ask::Registered(RegisterView {
                volume: VolumeId(self.word()),
                generation: Generation(self.word()),
                set: self.maybe(Self::set),
                deleted: self.word().is_multiple_of(2),
            }),
            Ask::PutShard(PutShard {
                device: self.device(),
                shard: self.shard(),
                epoch: Epoch(self.word()),
                hash: self.hash(),
                data: vec![self.buf(), self.buf()],
            }),
            Ask::ReadShard { device: self.device(), shard: self.shard(), offset: self.word(), length: self.small() },
            Ask::RepairShard { device: self.device(), shard: self.shard(), offset: self.word(), data: self.buf() },
            Ask::ShardInfo { device: self.device(), shard: self.shard() },
            Ask::VerifyShard { device: self.device(), shard: self.shard() },
            Ask::DeleteSegments(self.list(Self::segment)),
            Ask::ListShards {
                device: self.device(),
                volume: VolumeId(self.word()),
                after: self.maybe(Self::shard),
                limit: self.small(),
            },
            Ask::AppendShard {
                device: self.device(),
                incarnation: Incarnation(self.word()),
                shard: self.shard(),
                offset: self.word(),
                data: vec![self.buf()],
            },
            Ask::FinishShard {
                device: self.device(),
                incarnation: Incarnation(self.word()),
                shard: self.shard(),
                bytes: self.word(),
                hash: self.hash(),
            },
        ]
    }

    /// An answer of every kind, with the operation it answers.
    fn answers(&mut self) -> Vec<(u16, NodeAnswer)> {
        vec![
            (operation::FLUSH, NodeAnswer::Done),
            (operation::DEVICES, NodeAnswer::Devices(self.list(Self::status))),
            (
                operation::CREATE_MEMBER,
                NodeAnswer::Created(CreatedMember { incarnation: Incarnation(self.word()), sector: self.small() }),
            ),
            (operation::APPEND, NodeAnswer::Length(self.word())),
            (operation::APPEND_SHARD, NodeAnswer::Length(self.word())),
            (operation::CLOSE, NodeAnswer::Closed(self.list(Self::closed))),
            (operation::READ_REPLICA, NodeAnswer::Bytes(self.buf())),
            (operation::READ_SHARD, NodeAnswer::Bytes(self.buf())),
            (operation::SHARD_INFO, NodeAnswer::Shard(self.info())),
            (operation::LIST_SHARDS, NodeAnswer::Shards(self.list(Self::info))),
        ]
    }
}

fn errors(number: u64) -> Vec<NodeError> {
    vec![
        NodeError::Unavailable,
        NodeError::Closed,
        NodeError::NotLive { current: Incarnation(number) },
        NodeError::NotFound,
        NodeError::NoSpace,
        NodeError::StaleEpoch { current: Epoch(number) },
        NodeError::Corrupt,
        NodeError::DeviceFailed,
        NodeError::Invalid,
    ]
}

fn bytes_of(put: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut Writer::new(&mut bytes, WireVersion::V1));
    bytes
}

fn reader(bytes: &[u8]) -> Reader<'_> {
    Reader::new(bytes, WireVersion::V1)
}

fn content(payload: &Payload) -> Vec<u8> {
    payload.pieces().iter().flat_map(|piece| piece.iter().copied()).collect()
}

proptest! {
    #[test]
    fn every_request_is_read_as_it_was_written(seed in 1u64..) {
        let pool = BufPool::new(0, 0);
        for mut request in Dice(seed).requests() {
            let said = format!("{request:?}");
            let operation = request.operation();
            let payload = request.take_payload();
            let bytes = bytes_of(|out| request.put(out));
            let read = NodeRequest::get(operation, reader(&bytes), payload.clone(), &pool);
            let mut read = read.expect("sound").expect("known");
            prop_assert_eq!(format!("{read:?}"), said);
            prop_assert_eq!(content(&read.take_payload()), content(&payload));
            // Every byte counts: nothing is skipped, nothing made up.
            for shorter in 0..bytes.len() {
                prop_assert!(NodeRequest::get(operation, reader(&bytes[..shorter]), payload.clone(), &pool).is_err());
            }
            let longer = [&bytes[..], &[0]].concat();
            prop_assert!(NodeRequest::get(operation, reader(&longer), payload.clone(), &pool).is_err());
        }
    }

    #[test]
    fn every_answer_and_error_is_read_as_it_was_written(seed in 1u64..) {
        let pool = BufPool::new(0, 0);
        for (operation, mut answer) in Dice(seed).answers() {
            let said = format!("{answer:?}");
            let payload = answer.take_payload();
            let bytes = bytes_of(|out| answer.put(out));
            let mut read = NodeAnswer::get(operation, reader(&bytes), payload.clone(), &pool).expect("sound");
            prop_assert_eq!(format!("{read:?}"), said);
            prop_assert_eq!(content(&read.take_payload()), content(&payload));
        }
        for error in errors(seed) {
            let bytes = bytes_of(|out| put_error(&error, out));
            prop_assert_eq!(get_error(reader(&bytes)), Ok(error));
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), payload in 0usize..10) {
        let pool = BufPool::new(0, 0);
        let payload = if payload == 0 { Payload::None } else { Payload::One(Buf::copied(&vec![0; payload])) };
        for operation in 0..32 {
            let _request = NodeRequest::get(operation, reader(&bytes), payload.clone(), &pool);
            let _answer = NodeAnswer::get(operation, reader(&bytes), payload.clone(), &pool);
        }
        let _error = get_error(reader(&bytes));
    }
}

#[test]
fn a_list_that_claims_more_than_its_message_holds_takes_no_memory() {
    // Counts up to the largest there is, in front of too few bytes: an allocation of what is claimed would abort.
    for count in [2u32, 1 << 20, u32::MAX] {
        let mut bytes = count.to_le_bytes().to_vec();
        bytes.extend([0; 60]);
        let list: Result<Vec<SealedSegment>, _> = reader(&bytes).get();
        assert_eq!(list.map_err(|error| error.what), Err("a list longer than its message"));
    }
    let mut one = 1u32.to_le_bytes().to_vec();
    one.extend(bytes_of(|out| out.put(&Dice(5).sealed())));
    assert_eq!(one.len(), 4 + SealedSegment::BYTES_MIN);
    assert_eq!(reader(&one).get::<Vec<SealedSegment>>(), Ok(vec![Dice(5).sealed()]));
}

#[test]
fn bulk_bytes_where_none_belong_are_refused() {
    let pool = BufPool::new(0, 0);
    let payload = Payload::One(Buf::copied(b"more"));
    assert!(NodeRequest::get(operation::DEVICES, reader(&[]), payload.clone(), &pool).is_err());
    assert!(NodeAnswer::get(operation::FLUSH, reader(&[]), payload, &pool).is_err());
    assert!(matches!(NodeRequest::get(99, reader(&[]), Payload::None, &pool), Ok(None)));
}
