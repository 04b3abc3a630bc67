#!/bin/sh
# What takes too long for every day. First, once: the limits in full size, one after the other (thousands of streams, their
# return when the server has died, a table of ten million rows, power cuts as root), a million changes through one
# predicate in every language, and 12,000 modules through the load path. Then the random tests for long, each from a new
# seed again and again, with servers that are stopped and killed all the time: the oracle of live queries, schema changes,
# indexes, acknowledged writes, versions of plugins. `make torture` calls this.
#
#   MINUTES=60 sh tests/torture.sh          so long for the random ones (default: 30); they run side by side
#   MINUTES=60 sh tests/torture.sh oracle   only those with "oracle" in their names
#   STREAMS=5000 sh tests/torture.sh many_streams     one limit, in another size
#   CHANGES=100000 MODULES=2000 sh tests/torture.sh   fewer of those that run once
#
# At its end stands what failed, and the seed: `SEED=… sh tests/run.sh oracle` repeats that run. The random runs are not
# begun where a limit does not hold.

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

# Sizes: idle streams over HTTP/1.1 and over HTTP/2, streams that come back at once, subscribers of one query, rows of a
# table, power cuts.
STREAMS=${STREAMS:-15000} H2_STREAMS=${H2_STREAMS:-50000} STORM=${STORM:-10000} CROWD=${CROWD:-3000}
ROWS=${ROWS:-10000000} POWER_CUTS=${POWER_CUTS:-20}
# A stream is an open file on either side, and the server leaves a tenth and 200 of what it may have to others.
files=$(ulimit -Hn)
if [ "$files" != unlimited ]; then
    most=$((files / 10 * 9 - 500))
    if [ "$most" -lt "$STREAMS" ] || [ "$most" -lt "$STORM" ]; then
        say "no more than $most streams: there may be no more than $files open files (ulimit -Hn)"
    fi
    [ "$most" -ge "$STREAMS" ] || STREAMS=$most
    [ "$most" -ge "$STORM" ] || STORM=$most
    ulimit -n "$files"
fi
export STREAMS H2_STREAMS STORM CROWD ROWS POWER_CUTS

kept=$(mktemp -d)
trap 'rm -rf "$kept"' EXIT

# Runs tests of the kind $1 to their end, all of them, and lists what failed: its message is far above by then.
run() {
    kind=$1
    shift
    # A pipe's status is that of its last part.
    { cargo test --locked --no-fail-fast "$@" 2>&1 || : >"$kept/failed"; } | tee "$kept/printed"
    [ -e "$kept/failed" ] || return 0
    say "what failed"
    sed -n '/^failures:$/,/^test result/p' "$kept/printed"
    grep -E 'SEED=[0-9]+ failed|panicked at|^error' "$kept/printed" || true
    die "$kind"
}

if [ $# -eq 0 ]; then
    say "limits in full size"
    run "a limit does not hold" -p tests --test e2e -- --nocapture --test-threads=1 \
        many_streams:: overload:: large:: power_cut::
    set -- oracle:: random_schema_changes an_index_shows_what kill_nine_loses_nothing_and \
        versions_change_while one_predicate_gives_one_stream_over modules_of_any_kind
fi

say "torture for $MINUTES minutes (SEED=$SEED)"
run "a random run failed" --workspace -- --nocapture "$@"
say "nothing was found"
