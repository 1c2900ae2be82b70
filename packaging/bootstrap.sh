#!/bin/bash
# Brings a machine to where `make` can do the rest: Debian packages, an installer for Python packages, and the
# locked virtual environment in .venv. Does only what is missing; may be interrupted at any time; says nothing
# and needs neither root nor network when there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."

LOCK=packaging/requirements.lock
INSTALLER=packaging/bootstrap-requirements.txt
BOOT=build/bootstrap
STAMP=.venv/.complete

say() { echo "setup: $*"; }
fail() { echo "error: $1${2:+ ($2)}" >&2; exit 2; }

wanted_packages() { sed 's/#.*//' packaging/debian-packages.txt | tr -s ' \t\n' '\n' | sed '/^$/d'; }

missing_packages() {
    local name
    for name in $(wanted_packages); do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null || true)" = installed ] || echo "$name"
    done
}

# What the environment was made from: a change in any of it makes it again.
fingerprint() { cat "$LOCK" "$INSTALLER" pyproject.toml | sha256sum | cut -d' ' -f1; }

environment_is_complete() {
    [ "$(cat "$STAMP" 2>/dev/null || true)" = "$(fingerprint)" ] && .venv/bin/python -c '' 2>/dev/null
}

install_packages() {
    local missing=("$@")
    [ "$(id -u)" = 0 ] || fail "packages are missing and can be installed by root only: ${missing[*]}" "run it as root"
    say "installing ${missing[*]}"
    local log=build/bootstrap-apt.log
    mkdir -p build
    export DEBIAN_FRONTEND=noninteractive
    { timeout 600 apt-get -q -o DPkg::Lock::Timeout=120 update &&
        timeout 1800 apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=120 install "${missing[@]}"; } \
        >"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "the Debian packages could not be installed" \
        "check the network and the machine's apt sources; the whole log is in $log"; }
}

# python3.11 is what the lock was made for; any later one serves too.
find_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13 /usr/bin/python3; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or later with venv was found" "use Debian 12 or later"
}

# The machine's settings for pip (its mirror, its certificates) are the installer's too.
use_pip_settings() {
    local index
    index=${PIP_INDEX_URL:-$("$BOOT/bin/pip" config get global.index-url 2>/dev/null || true)}
    if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX=$index; fi
    if [ -z "${SSL_CERT_FILE:-}" ] && [ -f /etc/ssl/certs/ca-certificates.crt ]; then
        export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
    fi
}

make_installer() {
    local python=$1 made
    made=$(sha256sum "$INSTALLER" | cut -d' ' -f1)
    if [ "$(cat "$BOOT/.complete" 2>/dev/null || true)" = "$made" ] && "$BOOT/bin/uv" --version >/dev/null 2>&1; then
        return
    fi
    say "fetching the installer for Python packages"
    rm -rf "$BOOT"
    "$python" -m venv "$BOOT"
    timeout 600 "$BOOT/bin/pip" install -q --disable-pip-version-check --require-hashes -r "$INSTALLER" ||
        fail "the installer could not be fetched" "check the network, then run it again"
    echo "$made" >"$BOOT/.complete"
}

make_environment() {
    local python=$1 uv=$BOOT/bin/uv
    make_installer "$python"
    use_pip_settings
    say "making the virtual environment"
    export UV_CACHE_DIR=$PWD/build/downloads/uv VIRTUAL_ENV=$PWD/.venv
    rm -f "$STAMP"
    .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { rm -rf .venv && "$uv" venv -q --python "$python" .venv; }
    timeout 1200 "$uv" pip sync -q --compile-bytecode --require-hashes "$LOCK" ||
        fail "the Python packages could not be fetched" "check the network, then run it again"
    timeout 300 "$uv" pip install -q --no-deps --no-build-isolation -e . ||
        fail "the project could not be installed into .venv" "see above"
    fingerprint >"$STAMP"
}

command -v dpkg-query >/dev/null || fail "this is no Debian machine" "use Debian 12"
mapfile -t missing < <(missing_packages)
[ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
if ! environment_is_complete; then
    mkdir -p build
    [ -w build ] && [ -w . ] || fail "this folder cannot be written to" "run it as root, or as the owner of the clone"
    exec 9>build/.bootstrap-lock
    flock -w 900 9 || fail "another setup runs in this folder" "wait for it to end"
    environment_is_complete || make_environment "$(find_python)"
    say "done"
fi
