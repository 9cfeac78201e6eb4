//! Explicit-state models of the protocol in docs/protocol.md, small enough to look through every state.
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
mod fingerprint;
pub mod moves;
pub mod pins;
pub mod reconnect;
pub mod rows;
pub mod rules;
pub mod volume;
