#!/bin/sh
# Set-up, format, lints and every test. `make test` and .ci/run call this.
#
#   sh tests/run.sh            everything
#   sh tests/run.sh live       only the tests with "live" in their name (no format, no lints, no demo)
#   sh tests/run.sh smoke      a quick look at each part
#   SAMPLES="c assemblyscript" sh tests/run.sh   installs compilers for the samples in other languages, and tests those
#   SEED=… sh tests/run.sh oracle    repeats a random run whose seed a failure has printed
#   SEED=random sh tests/run.sh      random tests start from a new seed; without SEED they always start from the same

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ROOT/tests/setup.sh"
cd "$ROOT"

setup
if [ $# -eq 0 ]; then
    setup_lints
    say "format"
    cargo fmt --all --check || die "not formatted; 'cargo fmt --all' does it"
fi

build_programs
say "plugins"
build_plugins

# What the end-to-end tests start and upload.
TIDEGATE_BIN=$TIDEGATE TIDEGATE_PLUGINS=$PLUGINS
export TIDEGATE_BIN TIDEGATE_PLUGINS

if [ $# -eq 0 ]; then
    say "lints"
    # A newer compiler knows lints that this tree has not met: it shows them, they fail nothing.
    deny=
    is_minor cargo "$RUST_MINOR" && deny="-D warnings"
    # $deny is a list of words.
    # shellcheck disable=SC2086
    cargo clippy -q --locked --workspace --all-targets -- $deny
fi

# Fixed unless asked otherwise: what passed here passes on the next machine, and a failure comes again when looked at.
if [ "${SEED:-}" = random ]; then
    SEED=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
    export SEED
fi
PROPTEST_RNG_SEED=${SEED:-1}
export PROPTEST_RNG_SEED

say "tests (SEED=${SEED:-the fixed ones})"
cargo test --locked --workspace -- "$@"

if [ $# -eq 0 ]; then
    say "the example, unattended"
    store=$(mktemp -d)
    trap 'rm -rf "$store"' EXIT
    # It ends where a plugin fails, which one does that a busy machine forgets for ten times as long as this.
    TIDEGATE_PLUGINS__BATCH_MS=1000
    export TIDEGATE_PLUGINS__BATCH_MS
    ONCE=1 PORT=0 DATA=$store sh examples/run.sh
    # A second time on the same store: the replay has to repeat exactly.
    ONCE=1 PORT=0 DATA=$store sh examples/run.sh
    say "all is well"
fi
