//! From frames to vectored writes.

use super::{Header, META_BYTES_MAX, PAYLOAD_BYTES_MAX, put_head};
use crate::payload::Payload;
use std::collections::VecDeque;
use std::io::IoSlice;
use xsan_env::Buf;

/// Memory for heads that is kept while nothing is queued.
const KEPT_BYTES: usize = 1 << 20;

/// Frames on their way to a socket, drained by vectored writes: heads lie together in one buffer, payloads stay where they
/// are. The owner bounds how much it pushes.
#[derive(Default)]
pub struct Output {
    heads: Vec<u8>,
    /// Sent part of `heads`.
    heads_sent: usize,
    queue: VecDeque<Part>,
    /// Sent part of the first in the queue.
    first_sent: usize,
    bytes: usize,
}

enum Part {
    /// So many bytes of `heads`.
    Heads(usize),
    Data(Buf),
}

impl Part {
    fn bytes(&self) -> usize {
        match self {
            Self::Heads(bytes) => *bytes,
            Self::Data(buf) => buf.len(),
        }
    }
}

impl Output {
    /// Whether everything is sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes not yet sent.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues a frame; `meta` writes its fixed part. `false`: it is longer than a frame may be, and nothing was queued.
    pub fn push(&mut self, header: &Header, payload: Payload, meta: impl FnOnce(&mut Vec<u8>)) -> bool {
        let start = self.heads.len();
        put_head(&mut self.heads, header, &payload, meta);
        let bytes = self.heads.len() - start;
        if !fits(bytes - super::HEADER_BYTES, payload.bytes()) {
            self.heads.truncate(start);
            return false;
        }
        self.queue_parts(bytes, payload);
        true
    }

    /// Queues a frame whose head is laid out already.
    pub(crate) fn push_laid_out(&mut self, head: &[u8], payload: Payload) {
        self.heads.extend_from_slice(head);
        self.queue_parts(head.len(), payload);
    }

    fn queue_parts(&mut self, head: usize, payload: Payload) {
        self.bytes += head + payload.bytes();
        match self.queue.back_mut() {
            // Small messages behind each other are one run of bytes.
            Some(Part::Heads(bytes)) => *bytes += head,
            _ => self.queue.push_back(Part::Heads(head)),
        }
        match payload {
            Payload::None => {}
            Payload::One(buf) => self.push_data(buf),
            Payload::Pieces(pieces) => pieces.into_iter().for_each(|piece| self.push_data(piece)),
        }
    }

    fn push_data(&mut self, buf: Buf) {
        if !buf.is_empty() {
            self.queue.push_back(Part::Data(buf));
        }
    }

    /// Fills `slices` with what comes next; answers how many it filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut heads_at = self.heads_sent;
        let mut sent = self.first_sent;
        let mut count = 0;
        for (part, slice) in self.queue.iter().zip(slices) {
            let rest = match part {
                Part::Heads(bytes) => {
                    let from = heads_at + sent;
                    heads_at += bytes;
                    &self.heads[from..heads_at]
                }
                Part::Data(buf) => &buf[sent..],
            };
            sent = 0;
            *slice = IoSlice::new(rest);
            count += 1;
        }
        count
    }

    /// `count` bytes were sent.
    pub fn advance(&mut self, count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
        self.first_sent += count;
        while let Some(first) = self.queue.front() {
            let bytes = first.bytes();
            if self.first_sent < bytes {
                break;
            }
            self.first_sent -= bytes;
            if let Some(Part::Heads(bytes)) = self.queue.pop_front() {
                self.heads_sent += bytes;
            }
        }
        if self.queue.is_empty() {
            self.heads.clear();
            self.heads_sent = 0;
            self.heads.shrink_to(KEPT_BYTES);
        } else if self.heads_sent > KEPT_BYTES {
            // Never empty under load: what is sent must go some time.
            self.heads.drain(..self.heads_sent);
            self.heads_sent = 0;
        }
    }
}

/// Whether a frame may be as long as that.
pub(crate) fn fits(meta: usize, payload: usize) -> bool {
    meta <= META_BYTES_MAX as usize && payload <= PAYLOAD_BYTES_MAX as usize
}
