#!/usr/bin/env bash
# As root on Debian, install bubblewrap if it is missing; says what happened and never fails. Tests of programs that are
# executed in a sandbox are skipped where it is not.
set -u

found() {
    said="$(bwrap --unshare-all --ro-bind / / true 2>&1)" && said="works" || said="makes no sandbox here: $said"
    echo "bubblewrap: $(bwrap --version), $1, $said"
    exit 0
}

command -v bwrap >/dev/null && found "was here"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "bubblewrap: not installed: that takes root and apt-get here; tests of the sandbox are skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
# what apt knows may be old, or nothing
timeout 60 apt-get install -y -qq --no-install-recommends bubblewrap >"$log" 2>&1 ||
    { timeout 120 apt-get update -qq && timeout 120 apt-get install -y -qq --no-install-recommends bubblewrap; } >"$log" 2>&1
command -v bwrap >/dev/null && rm -f "$log" && found "installed now"
echo "bubblewrap: could not be installed ($(tail -n 1 "$log")); tests of the sandbox are skipped" >&2
rm -f "$log"
exit 0
