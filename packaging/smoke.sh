#!/bin/sh
# The life of the package under a real systemd: a minimal Debian, booted in a container without a network of its own.
#
#   packaging/smoke.sh PACKAGE.deb       as root; prints one line for each step and stops at the first that fails
set -eu
cd "$(dirname "$0")/.."
package=$1
work=target/smoke
tree=$work/tree-$$
nspawn=""

if [ "$(id -u)" != 0 ]; then
    echo "smoke: booting a container needs root" >&2
    exit 1
fi

# ---- the machine ----

finish() {
    code=$?
    [ "$code" = 0 ] || { echo "smoke: FAILED" >&2; [ -z "$nspawn" ] || inside journalctl --no-pager -n 60 -u sailover >&2 || true; }
    if [ -n "$nspawn" ]; then
        inside systemctl poweroff >/dev/null 2>&1 || true
        for _ in $(seq 600); do
            kill -0 "$nspawn" 2>/dev/null || break
            sleep 0.1
        done
        kill "$nspawn" 2>/dev/null || true
        wait "$nspawn" 2>/dev/null || true
    fi
    rm -rf "$tree"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# A command in the container.
inside() {
    nsenter -t "$leader" -m -u -i -n -p -- /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"
}

# A shell script in the container.
run() {
    inside bash -ec "$1"
}

step() {
    echo "smoke: $*"
}

fail() {
    echo "smoke: $*" >&2
    exit 1
}

# Waits for a script to succeed in the container, at most so many seconds.
eventually() {
    within=$1
    shift
    for _ in $(seq $((within * 10))); do
        run "$1" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    fail "not within $within s: $1"
}

mkdir -p "$work"
if [ ! -e "$work/base.done" ]; then
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    # The mirror that this machine itself uses.
    site=$(apt-get indextargets --format '$(CODENAME) $(SITE)' 'Created-By: Packages' | sed -n "s/^$codename //p" | head -1)
    rm -rf "$work/base"
    step "a minimal Debian $codename"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,logrotate "$codename" "$work/base" "$site" > "$work/debootstrap.log" 2>&1 || {
        tail -5 "$work/debootstrap.log" >&2
        exit 1
    }
    : > "$work/base/etc/machine-id"
    touch "$work/base.done"
fi
cp -a "$work/base" "$tree"
cp "$package" "$tree/root/sailover.deb"

# Without a systemd of its own this machine mounts no unified hierarchy.
[ -d /run/systemd/system ] || export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=0
systemd-nspawn --quiet -D "$tree" --boot --private-network --register=no --keep-unit --machine="smoke-$$" > "$work/boot.log" 2>&1 < /dev/null &
nspawn=$!
leader=""
for _ in $(seq 300); do
    leader=$(pgrep -P "$nspawn" -x systemd | head -1) && [ -n "$leader" ] && inside systemctl is-system-running 2>/dev/null | grep -Eq 'running|degraded' && break
    sleep 0.1
done
[ -n "$leader" ] || { tr -d '\000' < "$work/boot.log" | tail -5 >&2; fail "the container does not boot"; }
step "booted: $(inside systemctl --version | head -1)"

# Two cells that say their names, and one that repeats what it hears.
run 'cd /
for cell in 8081:here 8082:there; do
    systemd-run --quiet systemd-socket-activate --accept --inetd --listen "127.0.0.1:${cell%:*}" /bin/echo "${cell#*:}"
done
systemd-run --quiet systemd-socket-activate --accept --inetd --listen 127.0.0.1:8083 /bin/cat'
ask='timeout 5 bash -c "exec 3<>/dev/tcp/127.0.0.1/8080 && cat <&3"'
serves() {
    run "$ask" | grep -Eq '^(here|there)$' || fail "it does not serve: $*"
}
main_pid() {
    inside systemctl show --value -p MainPID sailover
}
generation() {
    run 'sailover status --json' | sed -n 's/^  "generation": \([0-9]*\),/\1/p'
}

# ---- install, enable, start, serve ----

run 'dpkg -i /root/sailover.deb' > "$work/install.log" 2>&1 || { cat "$work/install.log" >&2; fail "it does not install"; }
run 'sailover check /etc/sailover/sailover.yaml' | grep -q ': ok' || fail "the sample is not good"
run '! systemctl is-active --quiet sailover && ! systemctl is-enabled --quiet sailover' || fail "it was started before anybody said where to"
run 'systemctl enable --now sailover 2>/dev/null && systemctl is-active --quiet sailover'
serves "after its start"
run 'id sailover && test "$(stat -c %U:%G:%a /run/sailover/admin.sock)" = sailover:sailover:660' >/dev/null || fail "user or socket"
step "installed, enabled, started, serving"

exposure=$(inside systemd-analyze security --no-pager sailover.service | sed -n 's/.*exposure level for sailover.service: \([0-9.]*\).*/\1/p')
[ -n "$exposure" ] && awk "BEGIN { exit !($exposure < 2.5) }" || fail "systemd-analyze security: $exposure"
step "systemd-analyze security: $exposure"

for wanted in Type=notify WatchdogUSec=30s Restart=always RestartUSec=100ms StartLimitIntervalUSec=0 LimitNOFILE=1048576 TimeoutStopUSec=45s; do
    inside systemctl show -p "${wanted%=*}" sailover | grep -qx "$wanted" || fail "unit: $wanted, but $(inside systemctl show -p "${wanted%=*}" sailover)"
done
inside systemctl show -p RestartPreventExitStatus sailover | grep -q '64 78' || fail "unit: RestartPreventExitStatus"
step "the unit says what it should"

# ---- check as root, with the eyes of the service ----

run 'chmod 600 /etc/sailover/sailover.yaml; chown root:root /etc/sailover/sailover.yaml'
run 'sailover check /etc/sailover/sailover.yaml' > "$work/check.log" 2>&1 && fail "check passes a file that the service cannot read"
grep -q 'user sailover' "$work/check.log" || { cat "$work/check.log" >&2; fail "check does not name the user"; }
run 'chmod 640 /etc/sailover/sailover.yaml; chown root:sailover /etc/sailover/sailover.yaml; sailover check /etc/sailover/sailover.yaml' >/dev/null
step "check, by root, judges with the eyes of the service's user"

# ---- reload ----

pid=$(main_pid)
run 'sed -i "s/there: \[ 127.0.0.1:8082 \]/there: [ 127.0.0.1:8082, 127.0.0.1:8084 ]/" /etc/sailover/sailover.yaml; systemctl reload sailover'
[ "$(generation)" = 2 ] || fail "generation $(generation) after a good reload"
run 'cp /etc/sailover/sailover.yaml /root/good.yaml; sed -i "s/tcp: example/tcp: exampel/" /etc/sailover/sailover.yaml'
run 'systemctl reload sailover' >/dev/null 2>&1 && fail "a bad file is reloaded"
inside journalctl --no-pager -u sailover | grep -q 'there is no pool .*exampel.*did you mean .*example' || fail "the journal does not say why"
[ "$(main_pid)" = "$pid" ] && [ "$(generation)" = 2 ] || fail "a bad file changed something"
serves "after a bad file"
run 'cp /root/good.yaml /etc/sailover/sailover.yaml; systemctl reload sailover'
step "reload: a good file is taken, a bad one refused with its reason in the journal"

# ---- kill -9 ----

for _ in $(seq 10); do
    run 'systemctl kill --kill-who=main --signal=KILL sailover' || true
    sleep 0.9
done
eventually 5 'systemctl is-active --quiet sailover'
serves "after ten kills"
[ "$(inside systemctl show --value -p NRestarts sailover)" -ge 10 ] || fail "it was not killed ten times"
step "killed ten times in ten seconds, serving"

run 'sailover drain here --reason "smoke test" >/dev/null'
run 'systemctl kill --kill-who=main --signal=KILL sailover'
eventually 5 'sailover status | grep -q "drained here, by root.*smoke test"'
run "for i in 1 2 3 4 5 6; do $ask; done" | grep -qx here && fail "a drain does not survive kill -9"
run 'sailover undrain here >/dev/null'
step "a drain survives kill -9"

# ---- watchdog ----

run 'mkdir -p /run/systemd/system/sailover.service.d
printf "[Service]\nWatchdogSec=2s\nTimeoutAbortSec=1s\n" > /run/systemd/system/sailover.service.d/smoke.conf
systemctl daemon-reload; systemctl restart sailover'
pid=$(main_pid)
run "kill -STOP $pid"
eventually 15 "test \$(systemctl show --value -p MainPID sailover) != $pid && systemctl is-active --quiet sailover"
inside journalctl --no-pager -u sailover | grep -qi 'watchdog timeout' || fail "it was not the watchdog"
serves "after the watchdog"
run 'rm -r /run/systemd/system/sailover.service.d; systemctl daemon-reload; systemctl restart sailover'
step "a process that stands still is replaced by the watchdog"

# ---- log files ----

run 'printf "log: { access: /var/log/sailover/access.log }\n" >> /etc/sailover/sailover.yaml; systemctl reload sailover'
serves "with a log file"
eventually 5 'test -s /var/log/sailover/access.log'
run 'logrotate --force /etc/logrotate.d/sailover'
eventually 5 "$ask; test -s /var/log/sailover/access.log && test -s /var/log/sailover/access.log.1"
step "logrotate turns the access log over"

# ---- drain on stop ----

run 'sed -i "s/here:  \[ 127.0.0.1:8081 \]/here:  [ 127.0.0.1:8083 ]/; s/there: \[.*/there: [ 127.0.0.2:8083 ]/" /etc/sailover/sailover.yaml
sailover reload --force >/dev/null'
run 'exec 3<>/dev/tcp/127.0.0.1/8080; echo before >&3; read -r line <&3; test "$line" = before
( systemctl stop sailover; echo stopped > /root/stopped ) 3>&- &
for i in $(seq 100); do sleep 0.1; bash -c "exec 4<>/dev/tcp/127.0.0.1/8080" 2>/dev/null || break; done
test ! -e /root/stopped; echo after >&3; read -r line <&3; test "$line" = after
exec 3>&-; for i in $(seq 50); do test -e /root/stopped && break; sleep 0.1; done; test -e /root/stopped' \
    || fail "a stop does not wait for its sessions"
[ "$(inside systemctl show --value -p Result sailover)" = success ] || fail "the stop did not succeed"
step "a stop closes the door, lets its session finish, and ends"

# ---- upgrade, purge ----

run 'cp /root/good.yaml /etc/sailover/sailover.yaml; systemctl start sailover'
# The unit of an older version: systemd has to be told of the one that takes its place.
run 'echo "# as it was before" >> "$(systemctl show --value -p FragmentPath sailover)"; systemctl daemon-reload'
pid=$(main_pid)
run 'dpkg -i --force-confold /root/sailover.deb' > "$work/upgrade.log" 2>&1
grep -q 'a restart is due' "$work/upgrade.log" || { cat "$work/upgrade.log" >&2; fail "an upgrade does not say that a restart is due"; }
[ "$(main_pid)" = "$pid" ] || fail "an upgrade restarted the service"
[ "$(inside systemctl show --value -p NeedDaemonReload sailover)" = no ] || fail "systemd still has the unit of before"
serves "after an upgrade"
step "an upgrade leaves the process alone and says that a restart is due"

run 'dpkg --purge sailover' > "$work/purge.log" 2>&1 || { cat "$work/purge.log" >&2; fail "it cannot be purged"; }
left=$(run 'find / -xdev \( -path /proc -o -path /sys -o -path /root -o -path /var/log/journal \) -prune -o -iname "*sailover*" -print; getent passwd sailover; getent group sailover; systemctl list-units --all --no-legend "sailover*"; ls -d /proc/[0-9]*/exe | xargs -n 1 readlink | grep sailover' || true)
[ -z "$left" ] || fail "left after the purge: $left"
step "purged, nothing left"
