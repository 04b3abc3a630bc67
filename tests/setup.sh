# What both commands (`tests/run.sh` and `examples/run.sh`) need before they build: sourced by them, never run by itself.
#
#   setup             a C++ compiler, libclang, curl and a Rust toolchain, also for WebAssembly; installs what is missing
#   build_programs    the server and the other programs, in the one profile
#   build_plugins     every plugin of plugins/, to $PLUGINS
#
# Sets $ROOT, $CARGO_TARGET_DIR, $TIDEGATE (the server's binary) and $PLUGINS (a folder of .wasm and .wat).
# POSIX sh. When everything is there nothing is installed, nothing asks for root and the network is not touched.

ROOT=${ROOT:-$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}
export CARGO_TARGET_DIR
TIDEGATE=$CARGO_TARGET_DIR/debug/tidegate
PLUGINS=$CARGO_TARGET_DIR/plugins

RUST_MINOR=95 # of 1.95, the workspace's rust-version
SETUP_LOG=$CARGO_TARGET_DIR/setup.log # what the installers say, shown when they fail

say() { printf '%s\n' "== $*"; }

die() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# ---- packages of the system ----

# libclang is a library that RocksDB's build opens at run time: look where its loader (clang-sys) looks.
have_libclang() {
    for place in "${LIBCLANG_PATH:-}" /usr/lib/llvm-*/lib /usr/lib/*-linux-gnu /usr/lib64 /usr/lib /usr/local/lib; do
        for file in "$place"/libclang.so* "$place"/libclang-*.so*; do
            # libclang-cpp, which comes with other packages, is another library of a name that fits.
            case $file in */libclang-cpp*) continue ;; esac
            [ -e "$file" ] && return 0
        done
    done
    return 1
}

missing_packages() {
    have c++ && have cc || printf ' g++'
    have_libclang || printf ' libclang-dev'
    have make || printf ' make'
    have curl || printf ' curl'
    # Without the roots of trust neither curl nor cargo can reach anything.
    [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -d /etc/pki ] || printf ' ca-certificates'
}

# `sudo` only where it can ask (a terminal) or need not.
root_by() {
    if [ "$(id -u)" = 0 ]; then
        echo none
    elif have sudo && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        echo sudo
    else
        echo nobody
    fi
}

as_root() {
    case $(root_by) in
        none) DEBIAN_FRONTEND=noninteractive "$@" ;;
        sudo) sudo DEBIAN_FRONTEND=noninteractive "$@" ;;
        *) return 1 ;;
    esac
}

# Installs the packages named, or prints the one line that would and ends.
install_packages() {
    have apt-get || die "needed and not there:$*; install them (Debian's names) and start again"
    if [ "$(root_by)" = nobody ]; then
        printf '%s\n' "needed once, as root:  apt-get update && apt-get install -y$*" >&2
        exit 1
    fi
    say "installing:$*"
    # A list that is out of date names packages that are gone. --no-remove: nothing of the user's is taken away.
    # The names are split into words on purpose.
    # shellcheck disable=SC2048,SC2086
    if ! {
        as_root apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 update &&
            as_root apt-get -q -y --no-remove --no-install-recommends -o Acquire::Retries=3 \
                -o DPkg::Lock::Timeout=300 install $*
    } >"$SETUP_LOG" 2>&1; then
        tail -n 20 "$SETUP_LOG" >&2
        die "installing$* failed; the whole output is in $SETUP_LOG"
    fi
}

# ---- Rust ----

# The M of the 1.M that `$1 --version` says; nothing where there is no such program.
minor_of() { "$1" --version 2>/dev/null | sed -n 's/^[a-z]* 1\.\([0-9]*\)\..*/\1/p'; }

is_minor() { [ "$(minor_of "$1")" = "$2" ]; }

# Whether `$1` is new enough.
recent() {
    minor=$(minor_of "$1")
    [ -n "$minor" ] && [ "$minor" -ge "$RUST_MINOR" ]
}

find_cargo() {
    for dir in "${CARGO_HOME:-$HOME/.cargo}/bin" /usr/bin; do
        recent cargo && return 0
        # rustup's folder is on the PATH of new shells only.
        [ -x "$dir/cargo" ] && recent "$dir/cargo" && PATH=$dir:$PATH && export PATH
    done
    recent cargo && return 0
    # An older toolchain may be the user's choice elsewhere: ask for the newer one here, change no default.
    have rustup || return 1
    RUSTUP_TOOLCHAIN=stable && export RUSTUP_TOOLCHAIN
    recent cargo && return 0
    unset RUSTUP_TOOLCHAIN
    return 1
}

fetch_to() { curl --proto '=https' --tlsv1.2 -fsS --connect-timeout 10 --max-time 60 "$2" -o "$1"; }

# No network here may take for ever: behind a proxy that swallows packets the fallback has to get its turn.
rustup_toolchain() {
    have curl || return 1
    say "installing a Rust toolchain with rustup"
    if have rustup; then
        timeout 300 rustup -q toolchain install stable --profile minimal -c rustfmt -c clippy >"$SETUP_LOG" 2>&1
    else
        script=$CARGO_TARGET_DIR/rustup.sh
        # The same script at two places: some networks know only the second, from which the toolchain comes as well.
        {
            fetch_to "$script" https://sh.rustup.rs ||
                fetch_to "$script" https://static.rust-lang.org/rustup/rustup-init.sh
        } 2>"$SETUP_LOG" &&
            timeout 600 sh "$script" -y -q --profile minimal -c rustfmt -c clippy >>"$SETUP_LOG" 2>&1
    fi
    find_cargo && return 0
    say "rustup did not come through; taking Debian's own packages"
    return 1
}

# Format and lints are asked for by the tests only.
setup_lints() {
    packages=
    cargo fmt --version >/dev/null 2>&1 || packages=" rustfmt-web"
    cargo clippy --version >/dev/null 2>&1 || packages="$packages rust-web-clippy"
    [ -n "$packages" ] || return 0
    have rustup && timeout 120 rustup -q component add rustfmt clippy >"$SETUP_LOG" 2>&1 && return 0
    install_packages "$packages"
}

# ---- WebAssembly ----
#
# Two ways. `rustup`: the ready-made standard library for the target. `debian`: Debian's compiler, which carries the
# sources of its standard library, and its linker; that library is then built with the plugins, once.

wasm_linker() {
    for linker in wasm-ld-22 wasm-ld-21 wasm-ld-20 wasm-ld-19 wasm-ld; do
        have "$linker" && echo "$linker" && return 0
    done
    return 1
}

find_wasm() {
    if have rustup && [ -d "$(rustc --print target-libdir --target wasm32-unknown-unknown 2>/dev/null)" ]; then
        WASM_BY=rustup
    elif recent /usr/bin/cargo && recent /usr/bin/rustc && wasm_linker >/dev/null &&
        [ -e "$(/usr/bin/rustc --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock" ]; then
        WASM_BY=debian
    else
        return 1
    fi
}

rustup_wasm() {
    have rustup || return 1
    say "adding the WebAssembly target with rustup"
    timeout 120 rustup -q target add wasm32-unknown-unknown >"$SETUP_LOG" 2>&1 && find_wasm && return 0
    say "rustup did not come through; taking Debian's own packages"
    return 1
}

# ---- the whole ----

setup() {
    mkdir -p "$CARGO_TARGET_DIR" || die "cannot make the folder $CARGO_TARGET_DIR"
    packages=$(missing_packages)
    if [ -n "$packages" ] && [ "$(root_by)" != nobody ]; then
        install_packages "$packages"
        packages=
    fi
    find_cargo || rustup_toolchain || packages="$packages rustc-web cargo-web"
    if ! find_wasm && ! rustup_wasm; then
        case $packages in *cargo-web*) ;; *) packages="$packages rustc-web cargo-web" ;; esac
        packages="$packages rust-web-src lld-22"
    fi
    [ -z "$packages" ] || install_packages "$packages"
    find_cargo || die "no cargo of 1.$RUST_MINOR or newer; install one (https://rustup.rs) and start again"
    find_wasm || die "no Rust for WebAssembly: 'rustup target add wasm32-unknown-unknown' would bring it"
    have_libclang || die "no libclang; install it (Debian: libclang-dev) and start again"
}

# The whole workspace in one go, never `-p host` alone: cargo settles the features of shared dependencies for what it
# builds together, so that a build of one package and a test run of all would each compile DataFusion for themselves.
build_programs() {
    [ -x "$TIDEGATE" ] || say "building the server; the first time takes long (RocksDB, DataFusion), later ones seconds"
    (cd "$ROOT" && cargo build --locked) || die "the build failed; what the compiler said is above"
}

# Compiles for WebAssembly whatever the arguments name to cargo, in the current folder. Own target folder: the two ways
# must not undo each other's or the server's work.
cargo_wasm() {
    (
        CARGO_TARGET_DIR=$CARGO_TARGET_DIR/wasm && unset CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS
        if [ "$WASM_BY" = rustup ]; then
            RUSTFLAGS= cargo build -q --release --target wasm32-unknown-unknown "$@"
        else
            RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Clinker=$(wasm_linker)" /usr/bin/cargo build -q \
                --release -Z build-std=std,panic_abort --target wasm32-unknown-unknown "$@"
        fi
    )
}

build_plugins() {
    names=
    for manifest in "$ROOT"/plugins/*/Cargo.toml; do
        # One with a workspace of its own is somebody's own plugin (plugins/build.sh).
        grep -q '^\[workspace\]' "$manifest" || names="$names -p $(basename "$(dirname "$manifest")")"
    done
    # $names is a list of words.
    # shellcheck disable=SC2086
    (cd "$ROOT" && cargo_wasm --locked $names) || die "the plugins did not build; what the compiler said is above"
    mkdir -p "$PLUGINS"
    for manifest in "$ROOT"/plugins/*/Cargo.toml; do
        name=$(basename "$(dirname "$manifest")" | tr - _)
        grep -q '^\[workspace\]' "$manifest" && continue
        place "$CARGO_TARGET_DIR/wasm/wasm32-unknown-unknown/release/$name.wasm"
    done
    for text in "$ROOT"/plugins/*/*.wat; do
        if [ -e "$text" ]; then place "$text"; fi
    done
    build_other_samples
}

# Samples in other languages, where their compilers are. Nothing is installed for them unless the caller names them:
# SAMPLES="c assemblyscript" (50 MB of Debian packages; npm and 100 MB of node_modules in the target folder).
build_other_samples() {
    case " ${SAMPLES:-} " in *" c "*) find_clang || install_clang ;; esac
    case " ${SAMPLES:-} " in *" assemblyscript "*) find_asc || install_asc ;; esac
    made=$CARGO_TARGET_DIR/samples
    mkdir -p "$made"
    if find_clang; then
        exports=
        for name in tg_abi tg_window tg_configure tg_release tg_filter; do exports="$exports -Wl,--export=$name"; done
        # $exports is a list of words.
        # shellcheck disable=SC2086
        "$CLANG" --target=wasm32 -O2 -nostdlib -fuse-ld="$(command -v "$WASM_LD")" -Wl,--no-entry -Wl,--strip-all \
            $exports "$ROOT/plugins/long_haul_c/long_haul_c.c" -o "$made/long_haul_c.wasm" ||
            die "the sample in C did not build; what the compiler said is above"
        attach long_haul_c
    fi
    if find_asc; then
        "$ASC" "$ROOT/plugins/long_haul_as/long_haul_as.ts" -O3 --runtime stub --use abort= \
            -o "$made/long_haul_as.wasm" || die "the sample in AssemblyScript did not build; what asc said is above"
        attach long_haul_as
    fi
}

attach() {
    "$TIDEGATE" plugin attach "$made/$1.wasm" --manifest "$ROOT/plugins/$1/manifest.jsonl" >"$made/attach.log" 2>&1 ||
        die "the manifest of $1: $(cat "$made/attach.log")"
    place "$made/$1.wasm"
}

# A clang and the linker of the same LLVM.
find_clang() {
    for version in -22 -21 -20 -19 ""; do
        CLANG=clang$version WASM_LD=wasm-ld$version
        have "$CLANG" && have "$WASM_LD" && return 0
    done
    return 1
}

install_clang() {
    install_packages " clang-19 lld-19"
    find_clang || die "no clang with wasm-ld after installing them"
}

find_asc() {
    for ASC in asc "$CARGO_TARGET_DIR/asc/node_modules/.bin/asc"; do
        have "$ASC" && return 0
    done
    return 1
}

install_asc() {
    have npm || die "the sample in AssemblyScript needs npm (Debian: npm), or leave assemblyscript out of SAMPLES"
    say "installing the AssemblyScript compiler"
    npm install --silent --no-audit --no-fund --prefix "$CARGO_TARGET_DIR/asc" assemblyscript@0.28 >"$SETUP_LOG" 2>&1 ||
        die "npm could not install assemblyscript; what it said is in $SETUP_LOG"
}

# Copied only when different, so that the file's time says when the plugin changed.
place() {
    cmp -s "$1" "$PLUGINS/$(basename "$1")" || cp "$1" "$PLUGINS/" || die "cannot copy $1 to $PLUGINS"
}
