//! Promises of the replicated log: lives of whole groups from seeds, stored formats, messages, the choice of voters, the shell.

mod disk;
mod executor;
mod formats;
mod hostile;
mod life;
mod lives;
mod order;
mod shell;
mod verdicts;
mod voters;
mod world;
