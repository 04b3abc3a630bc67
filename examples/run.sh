#!/bin/sh
# The first example: a day of New York departures as a live query through a filter and a transform of its own.
# Installs and builds what is missing, starts the server with its store in ./data, and runs examples/flights.
#
#   sh examples/run.sh                 watch the day go by, then keep serving until Ctrl-C
#   ONCE=1 sh examples/run.sh          unattended: as fast as it goes, check what arrived, exit
#
# PORT=8433 (0: any free one)  DATA=./data  SPEED=20 (minutes of that day per second)  MINUTES=15 (what counts as late)

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ROOT/tests/setup.sh"

PORT=${PORT:-8433}
DATA=${DATA:-$ROOT/data}
server=
story=

setup
build_programs
build_plugins

# Says who listens on the port already, if anybody does: the server itself could only say that somebody does.
busy_port() {
    inode=$(awk -v port="$(printf '%04X' "$PORT")" '
        $4 == "0A" && $2 ~ ("^(0100007F|00000000|0+):" port "$") { print $10; exit }
    ' /proc/net/tcp /proc/net/tcp6 2>/dev/null) || return 1
    [ -n "$inode" ] || return 1
    fd=$(find /proc/[0-9]*/fd -lname "socket:\[$inode\]" 2>/dev/null | head -n 1)
    pid=${fd#/proc/}
    pid=${pid%%/*}
    if [ -n "$pid" ]; then
        printf '%s' "$(cat "/proc/$pid/comm") (process $pid of user $(stat -c %U "/proc/$pid"))"
    else
        printf '%s' "a process of another user (root can see which: ss -ltnp 'sport = :$PORT')"
    fi
}

# Every way out comes by here. The server flushes and closes its store on TERM; the bound is for one that does not.
stop_server() {
    trap - EXIT INT TERM HUP
    [ -z "$story" ] || kill -TERM "$story" 2>/dev/null || true
    [ -n "$server" ] || return 0
    kill -TERM "$server" 2>/dev/null || return 0
    tries=0
    while kill -0 "$server" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -le 150 ] || { kill -KILL "$server" 2>/dev/null || true; }
        sleep 0.1
    done
    wait "$server" 2>/dev/null || true
}

if [ "$PORT" != 0 ] && holder=$(busy_port); then
    die "port $PORT is taken by $holder; stop it, ask its owner, or take another: PORT=$((PORT + 1)) sh examples/run.sh"
fi

mkdir -p "$DATA"
DATA=$(CDPATH= cd -- "$DATA" && pwd)
TOKEN_FILE=$DATA/admin-token
if [ -z "${TIDEGATE_ADMIN_TOKEN:-}" ]; then
    # Kept, so that the curl lines of the last run still work in this one.
    [ -s "$TOKEN_FILE" ] || (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$TOKEN_FILE")
    TIDEGATE_ADMIN_TOKEN=$(cat "$TOKEN_FILE")
else
    (umask 077 && printf '%s' "$TIDEGATE_ADMIN_TOKEN" >"$TOKEN_FILE")
fi
chmod 600 "$TOKEN_FILE"
export TIDEGATE_ADMIN_TOKEN

trap 'stop_server' EXIT
trap 'echo; say "stopping"; stop_server; exit 0' INT TERM HUP

"$TIDEGATE" serve --data-dir "$DATA" --bind "127.0.0.1:$PORT" >"$DATA/server.log" 2>&1 &
server=$!

# Ready means: bound (the log names the address, also for port 0) and recovered (/readyz).
url=
tries=0
until [ -n "$url" ] && curl -fsS --noproxy '*' -o /dev/null "$url/readyz" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        tail -n 20 "$DATA/server.log" >&2
        die "the server ended at once; what it said is above (the whole: $DATA/server.log)"
    fi
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ]; then
        tail -n 20 "$DATA/server.log" >&2
        die "the server was not ready after 60 seconds; what it said is above"
    fi
    sleep 0.2
    url=$(sed -n 's/^.*listening on \(http:[^ ]*\).*$/\1/p' "$DATA/server.log" | head -n 1)
done
say "the server is at $url, its store in $DATA, its log in $DATA/server.log"

# Waited for and not run in front: a shell hears a signal sent to it alone only when what runs in front has ended.
TIDEGATE_URL=$url TIDEGATE_TOKEN_FILE=$TOKEN_FILE TIDEGATE_PLUGINS=$PLUGINS "$CARGO_TARGET_DIR/debug/flights" &
story=$!
wait "$story"
