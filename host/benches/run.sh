#!/bin/sh
# Builds what the benches start, and runs them. `make bench` calls this.
#
#   sh host/benches/run.sh             all of them
#   sh host/benches/run.sh plugins     only those named

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
. "$ROOT/tests/setup.sh"
cd "$ROOT"

# Extism's side of the `plugins` bench: a program and its guest, in a workspace of their own since Extism brings a
# wasmtime of its own. Without it (no network for its crates, say) the bench leaves its column empty.
build_extism() {
    made=$CARGO_TARGET_DIR/extism
    [ -x "$made/debug/extism-bench" ] || say "building Extism to compare with; the first time takes minutes (wasmtime)"
    if ! (
        cd "$ROOT/host/benches/extism" && cargo_wasm --locked -p extism-guest &&
            CARGO_TARGET_DIR=$made cargo build -q --locked &&
            cp "$CARGO_TARGET_DIR/wasm/wasm32-unknown-unknown/release/extism_guest.wasm" "$made/debug/"
    ); then
        say "Extism did not build; what the compiler said is above"
        rm -f "$made/debug/extism-bench" # an older one would be measured in its place
    fi
}

[ $# -gt 0 ] || set -- sql live plugins ancestor
setup
for bench in "$@"; do
    if [ "$bench" = plugins ]; then
        build_programs
        build_plugins
        build_extism
    fi
    # By the profile that the server is built with: nothing heavy is compiled a second time.
    cargo bench --locked --workspace --profile dev --bench "$bench"
done
