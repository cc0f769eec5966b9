#!/bin/sh
# Licences, sources and duplicate versions by cargo-deny; built once into target/tools when there is none.
set -eu
cd "$(dirname "$0")/.."
if command -v cargo-deny >/dev/null 2>&1; then
    deny=cargo-deny
else
    deny="$PWD/target/tools/bin/cargo-deny"
    # It runs for a second: what takes minutes is making it fast.
    [ -x "$deny" ] || CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root target/tools cargo-deny
fi
"$deny" check licenses bans sources
