#!/bin/sh
# Builds one plugin crate for WebAssembly and puts NAME.wasm into the current folder.
#
#   sh plugins/build.sh path/to/crate
#
# Does the set-up it needs (a Rust toolchain that compiles for WebAssembly), as tests/run.sh does.

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ROOT/tests/setup.sh"

[ $# -eq 1 ] && [ -f "$1/Cargo.toml" ] || die "usage: sh plugins/build.sh path/to/crate (a folder with a Cargo.toml)"
setup
(cd "$1" && cargo_wasm) || die "the plugin did not build; what the compiler said is above"
name=$(sed -n 's/^name *= *"\(.*\)"/\1/p' "$1/Cargo.toml" | head -n 1 | tr - _)
cp "$CARGO_TARGET_DIR/wasm/wasm32-unknown-unknown/release/$name.wasm" . || die "the crate made no $name.wasm; it needs crate-type = [\"cdylib\"]"
say "$(wc -c <"$name.wasm" | tr -d ' ') bytes in $name.wasm"
