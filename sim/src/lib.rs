//! The whole cluster in one thread from one seed, with crashes.
//!
//! Real nodes, pool, metadata and volume engine over a simulated clock, simulated disks and simulated links; a workload that
//! checks every answer against a model of what R7 allows; a planner that crashes processes and hosts within the budget
//! of the pool's scheme. The same seed gives the same run, proved by the hash of its trace.
//!
//! Fault model now: a process ends at any await (of a gateway, a node, the metadata); a host loses power (unflushed sectors stay
//! or not, each for itself; unsynced files keep a prefix) or its disk; all hosts lose power at once; a disk stalls, fails a request, rots,
//! lies about a request or puts it elsewhere; clocks run fast and slow; a call to a node is delayed, reordered, lost, done
//! without an answer, or done after it was given up; a second gateway takes the volume over while the first still runs; messages
//! between the replicas of the metadata are lost, doubled, and cut off one way. README.md
//! says what is missing.
//!
//! Reading order: [`executor`], [`disk`], [`link`], [`meta`], [`world`], [`model`], [`workload`], [`budget`], [`planner`], [`run`].
#![forbid(unsafe_code)]

pub mod budget;
pub mod disk;
pub mod executor;
pub mod link;
pub mod meta;
pub mod model;
pub mod planner;
pub mod run;
pub mod workload;
pub mod world;

pub use executor::{Dice, Executor, Limits, Owner, Stuck};
pub use model::{Broken, Model};
pub use run::{Failure, Options, Report, simulate};
