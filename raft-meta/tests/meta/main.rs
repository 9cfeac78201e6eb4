//! Promises of the metadata: registers, state machine, durability, stored formats.

mod durability;
mod golden;
mod hosts;
mod registers;
mod state;
mod support;
