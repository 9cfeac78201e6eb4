# What the scripts share: words on the screen, packages, Rust. Sourced, never run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
  BOLD=$'\e[1m' DIM=$'\e[2m' GREEN=$'\e[32m' RED=$'\e[31m' CYAN=$'\e[36m' PLAIN=$'\e[0m'
else
  BOLD='' DIM='' GREEN='' RED='' CYAN='' PLAIN=''
fi

# A heading; the steps of a run are told apart by it.
step() { printf '\n%s▸ %s%s\n' "$BOLD$CYAN" "$*" "$PLAIN"; }
say() { printf '  %s\n' "$*"; }
good() { printf '  %s✓%s %s\n' "$GREEN" "$PLAIN" "$*"; }
note() { printf '  %s%s%s\n' "$DIM" "$*" "$PLAIN"; }
die() {
  printf '\n%s✗ %s%s\n' "$RED$BOLD" "$1" "$PLAIN" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

# Microseconds since some point; for differences only. (A locale may print a comma.)
now_us() { printf '%s' "${EPOCHREALTIME/[.,]/}"; }
# since START_US: seconds with two digits.
since() { awk -v us=$(($(now_us) - $1)) 'BEGIN { printf "%.2f s", us / 1e6 }'; }
# rate BYTES START_US: megabytes per second.
rate() { awk -v bytes="$1" -v us=$(($(now_us) - $2)) 'BEGIN { printf "%.0f MB/s", bytes / us }'; }
mib() { awk -v bytes="$1" 'BEGIN { printf "%.0f MiB", bytes / 1048576 }'; }

# ensure_packages COMMAND:PACKAGE...: installs through apt the packages of those commands that are missing. A command may
# also be a file (/path:package) or a Python module (python3:module:package).
ensure_packages() {
  local entry have package missing=()
  for entry in "$@"; do
    package=${entry##*:} have=${entry%:*}
    case $have in
      python3:*) /usr/bin/python3 -c "import ${have#python3:}" 2>/dev/null || missing+=("$package") ;;
      /*) [[ -e $have ]] || missing+=("$package") ;;
      *) command -v "$have" >/dev/null || missing+=("$package") ;;
    esac
  done
  ((${#missing[@]} > 0)) || return 0
  command -v apt-get >/dev/null || die "missing: ${missing[*]}" "This script installs packages on Debian and Ubuntu only; please install these by hand."
  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "missing: ${missing[*]}" "Neither root nor sudo here. As root: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]} (apt-get${as_root:+, through sudo})"
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  "${apt[@]}" update </dev/null >/dev/null || note "apt-get update failed; trying with the lists that are there"
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null ||
    die "apt-get could not install ${missing[*]}"
}

# ensure_rust -- [COMPONENT...]: an installed cargo that is new enough, else a toolchain of its own through rustup. Toolchains that
# are there already are never updated: other work on this machine may depend on their version.
ensure_rust() {
  local wanted found component
  shift
  wanted=$(sed -n 's/^rust-version *= *"\([^"]*\)".*/\1/p' "$ROOT/Cargo.toml" | head -n 1)
  [[ $wanted =~ ^[0-9]+(\.[0-9]+)+$ ]] || die "Cargo.toml names no rust-version"
  PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
  found=$(cargo --version 2>/dev/null | awk '{ print $2 }') || true
  if [[ -z $found || $(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1) != "$wanted" ]]; then
    say "cargo ${found:-is missing}${found:+ is too old}: adding Rust $wanted through rustup, for this user only"
    if ! command -v rustup >/dev/null; then
      ensure_packages curl:curl /etc/ssl/certs/ca-certificates.crt:ca-certificates
      curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
        sh -s -- -y -q --profile minimal --default-toolchain none --no-modify-path || die "rustup could not be installed"
    fi
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    hash -r
    rustup toolchain install "$wanted" --profile minimal --no-self-update || die "Rust $wanted could not be installed"
    export RUSTUP_TOOLCHAIN=$wanted
  fi
  for component in "$@"; do
    "cargo-${component/rustfmt/fmt}" --version >/dev/null 2>&1 || rustup component add "$component" ||
      die "cargo has no $component" "Install it beside the cargo in use ($(command -v cargo))."
  done
}

# free_mib FOLDER: room for a user on the file system that holds FOLDER.
free_mib() { df --output=avail -BM "$1" | tail -n 1 | tr -dc 0-9; }

# build_xsan: sets XSAN to the release binary; XSAN_BIN names one that is built already.
build_xsan() {
  if [[ -n ${XSAN_BIN:-} ]]; then
    [[ -x $XSAN_BIN ]] || die "XSAN_BIN=$XSAN_BIN is not a program"
    XSAN=$(realpath "$XSAN_BIN")
    return
  fi
  (cd "$ROOT" && cargo build --release --bin xsan) || die "the build failed"
  XSAN=${CARGO_TARGET_DIR:-$ROOT/target}/release/xsan
  [[ $XSAN == /* ]] || XSAN=$ROOT/$XSAN
}
