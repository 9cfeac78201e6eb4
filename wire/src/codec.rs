//! Bytes of messages: little-endian fixed fields and counted lists, written and read without any derive.
//!
//! Why not a serialisation crate: what goes over the wire is then decided by Rust declarations in other crates, where a new
//! field silently changes the bytes. Here a change of the layout is a change of these files, and the golden bytes
//! fail. A list's count is checked against the bytes that are there *before* memory is taken for it.

use xsan_types::{
    ClosedMember, ClusterId, Crc32c, DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, MemberState,
    NodeId, OpenReplica, PgId, PoolId, RegisterView, SealedSegment, SegmentName, SetId, ShardId, ShardIndex, VolumeId,
};

/// Versions of what the messages say; each variant's text says what changed. Chosen once per connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WireVersion {
    /// The first: all calls of `NodeApi`, opaque services.
    V1 = 1,
}

impl WireVersion {
    /// The oldest version this build speaks.
    pub const OLDEST: Self = Self::V1;
    /// The newest.
    pub const NEWEST: Self = Self::V1;

    /// The version of that number, if this build speaks it.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        (number == 1).then_some(Self::V1)
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// A message is not what its kind says. The bytes passed their checksum, so the sender made them so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {what} at byte {at}")]
pub struct Malformed {
    /// What is wrong.
    pub what: &'static str,
    /// Where, counted from the start of the message's fixed part.
    pub at: usize,
}

/// Takes fields off a message's bytes. Never panics, whatever they are.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    version: WireVersion,
}

impl<'a> Reader<'a> {
    /// Reads `bytes` as written by a peer that speaks `version`.
    #[must_use]
    pub fn new(bytes: &'a [u8], version: WireVersion) -> Self {
        Self { bytes, at: 0, version }
    }

    /// The version of the connection: a field that came later is read only from this version on.
    #[must_use]
    pub fn version(&self) -> WireVersion {
        self.version
    }

    /// Bytes not yet taken.
    #[must_use]
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// An error at the present place.
    #[must_use]
    pub fn malformed(&self, what: &'static str) -> Malformed {
        Malformed { what, at: self.at }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`Malformed`]: the message ends before.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| self.malformed("the message ends too early"))?;
        self.at += count;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`Malformed`]: the message ends before.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let malformed = self.malformed("the message ends too early");
        self.take(N)?.try_into().map_err(|_| malformed)
    }

    /// The next field.
    ///
    /// # Errors
    /// [`Malformed`]: it is not there, or has a value that it cannot have.
    pub fn get<T: Field>(&mut self) -> Result<T, Malformed> {
        T::get(self)
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`Malformed`]: there are bytes that nobody asked for. Within one version no message has any.
    pub fn finish(self) -> Result<(), Malformed> {
        if self.left() == 0 { Ok(()) } else { Err(self.malformed("bytes after the end")) }
    }
}

/// Appends fields to a message's bytes.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
    version: WireVersion,
}

impl<'a> Writer<'a> {
    /// Writes behind what is in `out`, for a peer that speaks `version`.
    pub fn new(out: &'a mut Vec<u8>, version: WireVersion) -> Self {
        Self { out, version }
    }

    /// The version of the connection: a field that came later is written only from this version on.
    #[must_use]
    pub fn version(&self) -> WireVersion {
        self.version
    }

    /// Appends raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Appends a field.
    pub fn put<T: Field>(&mut self, field: &T) {
        field.put(self);
    }

    /// Appends a list: a u32 count, then the items.
    pub fn list<T: Field>(&mut self, items: &[T]) {
        // A list of 2^32 items does not fit a message; the frame's bound refuses it before it is sent.
        self.put(&u32::try_from(items.len()).unwrap_or(u32::MAX));
        for item in items {
            self.put(item);
        }
    }
}

/// Something with a fixed place in a message.
pub trait Field: Sized {
    /// Bytes that its shortest value takes: bounds what a list may claim to hold.
    const BYTES_MIN: usize;

    /// Appends it.
    fn put(&self, out: &mut Writer<'_>);

    /// Takes it.
    ///
    /// # Errors
    /// [`Malformed`]: not there, or a value that it cannot have.
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed>;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Field for $type {
            const BYTES_MIN: usize = size_of::<$type>();
            fn put(&self, out: &mut Writer<'_>) {
                out.bytes(&self.to_le_bytes());
            }
            fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
                Ok(Self::from_le_bytes(input.array()?))
            }
        }
    )*};
}
integers!(u8, u16, u32, u64, u128);

macro_rules! newtypes {
    ($($type:ident($inner:ty)),*) => {$(
        impl Field for $type {
            const BYTES_MIN: usize = <$inner as Field>::BYTES_MIN;
            fn put(&self, out: &mut Writer<'_>) {
                out.put(&self.0);
            }
            fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
                Ok(Self(input.get()?))
            }
        }
    )*};
}
newtypes!(
    VolumeId(u64),
    Generation(u64),
    Epoch(u64),
    Incarnation(u64),
    PoolId(u32),
    NodeId(u32),
    DeviceId(u128),
    ClusterId(u128),
    Crc32c(u32),
    ShardIndex(u8)
);

/// Structures whose fields follow each other in the order given. The order *is* the layout: see docs/protocol/wire.md.
macro_rules! structures {
    ($($type:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        impl $crate::codec::Field for $type {
            const BYTES_MIN: usize = 0 $(+ <$kind as $crate::codec::Field>::BYTES_MIN)*;
            fn put(&self, out: &mut $crate::codec::Writer<'_>) {
                $(out.put::<$kind>(&self.$field);)*
            }
            fn get(
                input: &mut $crate::codec::Reader<'_>,
            ) -> Result<Self, $crate::codec::Malformed> {
                // Evaluated in the order written here, which is the order of the bytes.
                $(let $field: $kind = input.get()?;)*
                Ok(Self { $($field),* })
            }
        }
    )*};
}
pub(crate) use structures;

structures! {
    PgId { pool: PoolId, index: u32 }
    SetId { generation: Generation, number: u64 }
    SegmentName { volume: VolumeId, generation: Generation, number: u64, pg: PgId }
    ShardId { segment: SegmentName, index: ShardIndex }
    MemberRef { device: DeviceId, volume: VolumeId, set: SetId, incarnation: Incarnation }
    SealedSegment { name: SegmentName, bytes: u64, footer_offset: u64, footer_crc: Crc32c, holes: u64 }
    OpenReplica { segment: SegmentName, length: u64, complete: u64 }
    ClosedMember { set: SetId, state: MemberState, manifest: Vec<SealedSegment>, replicas: Vec<OpenReplica> }
    FlushRequest {
        device: DeviceId,
        incarnation: Incarnation,
        member: Option<MemberRef>,
        replicas: Vec<(SegmentName, u64)>,
        shards: Vec<(ShardId, u64)>,
    }
    RegisterView { volume: VolumeId, generation: Generation, set: Option<SetId>, deleted: bool }
}

impl Field for bool {
    const BYTES_MIN: usize = 1;
    fn put(&self, out: &mut Writer<'_>) {
        out.put(&u8::from(*self));
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match input.get::<u8>()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(input.malformed("neither yes nor no")),
        }
    }
}

impl Field for MemberState {
    const BYTES_MIN: usize = 1;
    fn put(&self, out: &mut Writer<'_>) {
        let number: u8 = match self {
            Self::Flushed => 1,
            Self::Whole => 2,
            Self::Live => 3,
        };
        out.put(&number);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match input.get::<u8>()? {
            1 => Ok(Self::Flushed),
            2 => Ok(Self::Whole),
            3 => Ok(Self::Live),
            _ => Err(input.malformed("unknown state of a member")),
        }
    }
}

impl<const N: usize> Field for [u8; N] {
    const BYTES_MIN: usize = N;
    fn put(&self, out: &mut Writer<'_>) {
        out.bytes(self);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        input.array()
    }
}

impl<A: Field, B: Field> Field for (A, B) {
    const BYTES_MIN: usize = A::BYTES_MIN + B::BYTES_MIN;
    fn put(&self, out: &mut Writer<'_>) {
        out.put(&self.0);
        out.put(&self.1);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let first = input.get()?;
        Ok((first, input.get()?))
    }
}

impl<T: Field> Field for Option<T> {
    const BYTES_MIN: usize = 1;
    fn put(&self, out: &mut Writer<'_>) {
        out.put(&self.is_some());
        if let Some(inner) = self {
            out.put(inner);
        }
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        if input.get()? { Ok(Some(input.get()?)) } else { Ok(None) }
    }
}

impl<T: Field> Field for Vec<T> {
    const BYTES_MIN: usize = 4;
    fn put(&self, out: &mut Writer<'_>) {
        out.list(self);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        const { assert!(T::BYTES_MIN > 0, "a count of nothings would bound nothing") };
        let count: u32 = input.get()?;
        let count = usize::try_from(count).map_err(|_| input.malformed("a list too long for this host"))?;
        // Before any memory is taken: as many as the bytes that are left can hold at most.
        if count > input.left() / T::BYTES_MIN {
            return Err(input.malformed("a list longer than its message"));
        }
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(input.get()?);
        }
        Ok(items)
    }
}
