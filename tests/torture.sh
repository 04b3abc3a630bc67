#!/bin/sh
# The random tests for long, each from a new seed again and again, with servers that are stopped and killed all the time:
# the oracle of live queries, schema changes, indexes, acknowledged writes, versions of plugins. And, once: a million
# changes through one predicate in every language, and 12,000 modules through the load path. `make torture` calls this.
#
#   MINUTES=60 sh tests/torture.sh          so long (default: 30); the tests run side by side
#   MINUTES=60 sh tests/torture.sh oracle   only those with "oracle" in their names
#   CHANGES=100000 MODULES=2000 sh tests/torture.sh   fewer of those that run once
#
# It ends at the first failure and says the seed: `SEED=… sh tests/run.sh oracle` repeats that run.

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ROOT/tests/setup.sh"
cd "$ROOT"

setup
build_programs
build_plugins
TIDEGATE_BIN=$TIDEGATE TIDEGATE_PLUGINS=$PLUGINS
export TIDEGATE_BIN TIDEGATE_PLUGINS

MINUTES=${MINUTES:-30} SEED=${SEED:-random}
export MINUTES SEED
[ $# -gt 0 ] || set -- oracle:: random_schema_changes an_index_shows_what kill_nine_loses_nothing_and \
    versions_change_while one_predicate_gives_one_stream_over modules_of_any_kind

say "torture for $MINUTES minutes (SEED=$SEED)"
cargo test --locked --workspace -- --nocapture "$@" || die "a random run failed; its seed stands above (SEED=…)"
say "nothing was found"
