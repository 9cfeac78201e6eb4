//! The whole cluster in one thread from one seed. Nothing here yet: the seams it needs (time, randomness, tasks, disks with
//! faults) are in `xsan-env`.
#![forbid(unsafe_code)]
