#!/bin/sh
# Runs the NEON kernel under qemu-user on an x86-64 Debian machine and compares it with the scalar one.
#
# Debian's own rustc, because its standard library is packaged for aarch64 as well. Needs root for the packages:
#   dpkg --add-architecture arm64 && apt-get update
#   apt-get install rustc-web libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
# The test suite itself does not run there: under qemu-user 7.2 a program that starts a thread hangs.
set -eu
cd "$(dirname "$0")/.."
export RUSTC=/usr/bin/rustc CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/neon}"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
exec cargo run -p xsan-erasure --example kernels --target aarch64-unknown-linux-gnu
