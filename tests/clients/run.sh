#!/bin/sh
# Live queries as seen by clients that nobody here wrote: npm's `eventsource`, Python's `httpx-sse` and Chromium's own
# EventSource (driven by Playwright), each straight to the server and through nginx. `make clients` calls this; it is no
# part of tests/run.sh, as it installs programs that nothing else here needs.
#
#   sh tests/clients/run.sh                        everything
#   sh tests/clients/run.sh --only eventsource     one of the clients (conduct.py knows more)
#   TIDEGATE_BIN=…/tidegate sh tests/clients/run.sh   a server that is built already; else it is built first
#   CHROMIUM=no sh tests/clients/run.sh            without the browser and the 300 MB that it takes
#
# Packages of npm and PyPI go to the target folder. What cannot be had is said by name, and left out.

set -eu
ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
. "$ROOT/tests/setup.sh"
HERE=$ROOT/tests/clients
MADE=$CARGO_TARGET_DIR/clients
mkdir -p "$MADE"

if [ -n "${TIDEGATE_BIN:-}" ]; then
    TIDEGATE=$TIDEGATE_BIN
else
    setup
    build_programs
fi
[ -x "$TIDEGATE" ] || die "there is no program at $TIDEGATE; leave TIDEGATE_BIN out to have it built"

# The major version of Node, 0 without one.
node_major() { node --version 2>/dev/null | sed -n 's/^v\([0-9]*\)\..*/\1/p' | grep . || echo 0; }

packages=
# npm's `eventsource` 3 wants Node 18, which is what Debian 12 has.
if ! have npm || [ "$(node_major)" -lt 18 ]; then packages=" nodejs npm"; fi
# Debian's python3 comes without the module that fills a venv.
if ! have python3 || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then packages="$packages python3 python3-venv"; fi
[ -z "$packages" ] || install_packages "$packages"

say "clients from npm and PyPI"
# Playwright's browser is asked for below; the package alone brings none.
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$MADE" eventsource@3 playwright-core@1 \
    >"$MADE/npm.log" 2>&1 || die "npm could not install eventsource and playwright-core; what it said is in $MADE/npm.log"
[ -x "$MADE/venv/bin/python" ] || python3 -m venv "$MADE/venv"
"$MADE/venv/bin/python" -c 'import httpx, httpx_sse' 2>/dev/null ||
    "$MADE/venv/bin/pip" install --quiet --disable-pip-version-check 'httpx<1' 'httpx-sse<1' >"$MADE/pip.log" 2>&1 ||
    die "pip could not install httpx-sse; what it said is in $MADE/pip.log"

# Debian has it where ordinary users do not look.
find_nginx() { PATH=$PATH:/usr/sbin command -v nginx; }
# Installing may start nginx as a service; ours is an ordinary process on a port of its own beside it.
find_nginx >/dev/null || (install_packages " nginx-light") || true

# Debian's name, the others' name, or the one that Playwright brings where its own server is reached.
find_chromium() {
    for program in chromium chromium-browser google-chrome; do
        have "$program" && command -v "$program" && return 0
    done
    for program in "$MADE"/browsers/chromium-*/chrome-linux*/chrome; do
        [ -x "$program" ] && echo "$program" && return 0
    done
    return 1
}
bring_chromium() {
    (install_packages " chromium") && find_chromium >/dev/null && return 0
    PLAYWRIGHT_BROWSERS_PATH=$MADE/browsers timeout 300 node "$MADE/node_modules/playwright-core/cli.js" install chromium \
        >"$MADE/chromium.log" 2>&1 && find_chromium >/dev/null
}

set -- --server "$TIDEGATE" --modules "$MADE/node_modules" --python "$MADE/venv/bin/python" "$@"
if nginx=$(find_nginx); then
    set -- "$@" --nginx "$nginx"
else
    say "SKIPPED: everything through nginx; it is not here and could not be installed (Debian: nginx-light)"
fi
if [ "${CHROMIUM:-}" = no ]; then
    say "SKIPPED: chromium, as asked for"
elif [ "$(node_major)" -lt 20 ]; then
    say "SKIPPED: chromium; Playwright wants Node 20 or newer, and this is $(node --version)"
elif find_chromium >/dev/null || bring_chromium; then
    set -- "$@" --chromium "$(find_chromium)"
else
    say "SKIPPED: chromium; neither Debian's package nor Playwright's own browser could be installed ($MADE/chromium.log)"
fi

say "checks"
python3 "$HERE/conduct.py" "$@" || die "a check failed; the lines above say which"
say "all is well"
