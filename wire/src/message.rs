//! Requests to a storage node and its answers as bytes. Bytes: docs/protocol/wire.md.

mod answer;
mod request;

pub use answer::{NodeAnswer, get_error, put_error};
pub use request::{NodeRequest, operation};

#[cfg(test)]
mod tests;
