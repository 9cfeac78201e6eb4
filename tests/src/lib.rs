//! What the integration tests share: a cluster of real processes, waiting on conditions, checking data.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests drive the real program on the real machine, with its clock, files and sockets"
)]
