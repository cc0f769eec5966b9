#!/bin/sh
# Installs the Debian packages that a target needs, or says which are missing.
set -eu
# Other builds of the tools are as good as Debian's.
[ "$1" = build ] && command -v cmake >/dev/null && command -v cc >/dev/null && exit 0
case "$1" in
    build) wanted="cmake gcc libc6-dev" ;;
    test) wanted="iproute2 nftables util-linux" ;;
    deb) wanted="debhelper dpkg-dev lintian" ;;
    smoke) wanted="debootstrap systemd-container procps util-linux" ;;
    interop) wanted="prometheus haproxy nginx libnginx-mod-stream python3 python3-grpcio python3-websockets curl nghttp2-client" ;;
    bench) wanted="haproxy nginx libnginx-mod-stream wrk python3" ;;
    peers) wanted="haproxy nginx libnginx-mod-stream python3 python3-venv" ;;
    fuzz) wanted="cmake g++" ;;
    *) echo "no such set of packages: $1" >&2; exit 64 ;;
esac
missing=""
for package in $wanted; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "missing packages:$missing (as root they are installed by themselves)" >&2
    # Tests that need them skip themselves; a bench cannot.
    [ "$1" = test ] && exit 0
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# A package that brings a service must not start it here.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d.sailover
chmod +x /usr/sbin/policy-rc.d.sailover
[ -e /usr/sbin/policy-rc.d ] || ln -s policy-rc.d.sailover /usr/sbin/policy-rc.d
trap 'rm -f /usr/sbin/policy-rc.d.sailover
[ "$(readlink /usr/sbin/policy-rc.d)" != policy-rc.d.sailover ] || rm -f /usr/sbin/policy-rc.d' EXIT
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing
