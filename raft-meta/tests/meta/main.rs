//! Promises of the metadata: registers, state machine, durability, stored formats, who is up.

mod detector;
mod durability;
mod golden;
mod hosts;
mod registers;
mod state;
mod support;
