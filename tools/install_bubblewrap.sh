#!/usr/bin/env bash
# As root on Debian, install bubblewrap if it is missing; says what happened and never fails. Tests of programs that are
# executed in a sandbox are skipped where it is not.
set -u

found() {
    said="$(bwrap --unshare-all --ro-bind / / true 2>&1)" && said="works" || said="makes no sandbox here: $said"
    echo "bubblewrap: $(bwrap --version), $1, $said"
    exit 0
}

# a network that does not answer must not hold the rest up
apt() {
    DEBIAN_FRONTEND=noninteractive timeout 60 apt-get -qq -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10 \
        -o Acquire::Retries=0 -o DPkg::Lock::Timeout=30 "$@"
}

command -v bwrap >/dev/null && found "was here"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "bubblewrap: not installed: that takes root and apt-get; tests of the sandbox are skipped" >&2
    exit 0
fi
log="$(mktemp)"
# what apt knows may be old, or nothing
{ apt install -y --no-install-recommends bubblewrap || { apt update && apt install -y --no-install-recommends bubblewrap; }; } \
    >"$log" 2>&1
command -v bwrap >/dev/null && rm -f "$log" && found "installed now"
echo "bubblewrap: could not be installed ($(tail -n 1 "$log")); tests of the sandbox are skipped" >&2
rm -f "$log"
exit 0
