//! The pool's promises, kept on nodes in memory that fail as told.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests make their own runtime")]

mod cluster;
mod damage;
mod fake;
mod holes;
mod late;
mod members;
mod moves;
mod read;
mod real;
mod rows;
mod seal;
