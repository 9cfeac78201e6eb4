//! The pool's promises, kept on nodes in memory that fail as told.

mod cluster;
mod damage;
mod fake;
mod holes;
mod late;
mod members;
mod read;
mod rows;
mod seal;
