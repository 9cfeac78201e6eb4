//! What the benches share. How to run them: benches/README.md.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a measurement reads the real clock and the real disk"
)]
