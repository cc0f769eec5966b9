#!/bin/sh
# Builds the Debian package from what cargo built, and has lintian judge it. The result stands in target/deb.
#
# debhelper and not cargo-deb: the maintainer scripts for systemd, sysusers and configuration files are Debian's own,
# and nothing has to be compiled to build a package.
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
out=target/deb
tree=$out/sailover-$version
rm -rf "$out"
mkdir -p "$tree/usr/bin" "$tree/usr/share/doc/sailover" "$tree/usr/share/sailover" "$tree/etc/sailover/conf.d"

cp target/release/sailover "$tree/usr/bin/"
cargo run --quiet --locked --profile fast --example manual -- "$tree"
cp packaging/sailover.yaml "$tree/etc/sailover/"
cp packaging/prometheus-rules.yaml packaging/grafana-dashboard.json "$tree/usr/share/sailover/"
cp -r packaging/debian "$tree/debian"
cp -r README.md docs configs "$tree/"

(cd "$tree" && dpkg-buildpackage --build=binary --unsigned-source --unsigned-changes --no-check-builddeps) > "$out/build.log" 2>&1 || {
    tail -40 "$out/build.log" >&2
    exit 1
}
lintian --allow-root --fail-on error,warning "$out"/*.changes
echo "$out/$(basename "$out"/*.deb)"
