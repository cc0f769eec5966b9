#!/usr/bin/env python3
"""CPU per request and per byte of sailover, nginx stream and HAProxy, doing the same work side by side.

Every contender runs with two workers, an access log with a line for each connection, keepalive towards backends,
time-outs, and (where it has them) active checks every second. The rounds are interleaved; the figure of a round is the
CPU time of the contender's own processes divided by the requests or bytes that the client counted, or its private
memory divided by the connections that idle.
"""
import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import report

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
A, B = 18081, 18082
PORTS = {"sailover": 18000, "nginx": 18001, "haproxy": 18002}

BACKEND = """
worker_processes 1; daemon off; pid {d}/be.pid; error_log /dev/null;
events {{ worker_connections 8192; }}
http {{ access_log off; keepalive_requests 100000000; sendfile on; tcp_nopush on;
  server {{ listen 127.0.0.1:{A} backlog=4096; listen 127.0.0.1:{B} backlog=4096;
    location / {{ return 200 "hello"; }} location /big {{ alias {d}/big; }} }} }}
"""
# Every setting that a maintainer would look for: workers as many as cores, reuseport (nginx's own advice for high
# connection rates), nodelay (default), keepalive, the default 1 s-class timeouts of the other contenders.
NGINX = """
worker_processes 2; daemon off; pid {d}/ng.pid; error_log {d}/ng.err; worker_rlimit_nofile 20000;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 9000; multi_accept off; }}
stream {{
  log_format lines '$time_iso8601 $remote_addr:$remote_port $upstream_addr $status $bytes_sent $bytes_received $session_time $upstream_connect_time';
  access_log {d}/ng.log lines buffer=64k flush=1s;
  upstream shop {{ zone shop 64k; least_conn; server 127.0.0.1:{A} max_fails=1 fail_timeout=10s; server 127.0.0.1:{B} max_fails=1 fail_timeout=10s; }}
  server {{ listen 127.0.0.1:{port} reuseport backlog=4096 so_keepalive=60s:10s:3; proxy_pass shop; proxy_connect_timeout 3s; proxy_timeout 1h; proxy_socket_keepalive on; proxy_buffer_size 64k; }}
}}
"""
# nbthread as many as cores; splice-auto is what HAProxy's manual recommends for bulk; checks as sailover's.
HAPROXY = """
global
  nbthread 2
  maxconn 7000
  log 127.0.0.1:{log} len 1024 format raw local0

defaults
  mode tcp
  log global
  option tcplog
  timeout connect 3s
  timeout client 1h
  timeout server 1h
  option clitcpka
  option srvtcpka
  option splice-auto
  option redispatch 1
  retries 3
  balance random(2)
frontend f
  bind 127.0.0.1:{port} backlog 4096
  default_backend shop
backend shop
  server a 127.0.0.1:{A} check inter 1s fall 2 rise 2
  server b 127.0.0.1:{B} check inter 1s fall 2 rise 2
"""
SAILOVER = """
workers: 2
pools: {{ shop: {{ cells: {{ a: [ 127.0.0.1:{A} ], b: [ 127.0.0.1:{B} ] }} }} }}
listeners: [ {{ bind: 127.0.0.1:{port}, tcp: shop }} ]
log: {{ level: warn, access: {d}/so.log }}
admin: {{ socket: {d}/admin.sock }}
shutdown: {{ announce: 0s, drain: 0s }}
"""


def tree(pid):
    pids = [pid]
    for p in pids:
        try:
            for t in os.listdir(f"/proc/{p}/task"):
                with open(f"/proc/{p}/task/{t}/children") as f:
                    pids += [int(c) for c in f.read().split()]
        except OSError:
            pass
    return pids


def cpu(pid):
    """Seconds on a processor of all threads of all processes, by the scheduler's own count in nanoseconds."""
    total = 0
    for p in tree(pid):
        try:
            for t in os.listdir(f"/proc/{p}/task"):
                with open(f"/proc/{p}/task/{t}/schedstat") as f:
                    total += int(f.read().split()[0])
        except OSError:
            pass
    return total / 1e9


def private(pid):
    total = 0
    for p in tree(pid):
        with open(f"/proc/{p}/smaps_rollup") as f:
            total += sum(int(line.split()[1]) for line in f if line.startswith("Private"))
    return total * 1024


def wait_port(port):
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.02)
    sys.exit(f"nothing listens on {port}")


def median_interval(ratios):
    """Median and a 95 % interval of it by the sign test (order statistics)."""
    r = sorted(ratios)
    n = len(r)
    low = {5: 0, 6: 0, 7: 0, 8: 0, 9: 1, 10: 1, 11: 1, 12: 2, 13: 2, 14: 2, 15: 3}.get(n, 0)
    return statistics.median(r), r[low], r[n - 1 - low]


class Bench:
    def __init__(self, args):
        self.args = args
        self.d = tempfile.mkdtemp(prefix="sailover-bench-")
        os.chmod(self.d, 0o755)
        self.started = {}
        # HAProxy writes its lines to a syslog server. This one reads none: what is beyond the socket's buffer is dropped
        # by the kernel, and no reader takes time from the machine while a contender is measured.
        self.syslog = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.syslog.bind(("127.0.0.1", 0))

    def spawn(self, argv, user=None):
        kwargs = {}
        if user:
            import pwd
            u = pwd.getpwnam(user)
            kwargs = dict(user=u.pw_uid, group=u.pw_gid, extra_groups=[])
        out = open(os.path.join(self.d, "out-" + os.path.basename(argv[0])), "ab")
        return subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, **kwargs)

    def write(self, name, text, **values):
        path = os.path.join(self.d, name)
        with open(path, "w") as f:
            f.write(text.format(d=self.d, A=A, B=B, log=self.syslog.getsockname()[1], **values))
        os.chmod(path, 0o644)
        return path

    def start(self, unprivileged=False):
        user = "nobody" if unprivileged else None
        if user:
            # What the first start left behind belongs to root.
            for name in os.listdir(self.d):
                os.unlink(os.path.join(self.d, name))
            os.chmod(self.d, 0o777)
        with open(os.path.join(self.d, "big"), "wb") as f:
            f.truncate(100 * 1000 * 1000)
        self.backend = self.spawn(["nginx", "-e", "/dev/null", "-c", self.write("be.conf", BACKEND)])
        wait_port(A)
        binary = os.path.join(self.d, "sailover")
        shutil.copy(self.args.binary, binary)
        self.started = {
            "sailover": self.spawn([binary, "run", "--config", self.write("so.yaml", SAILOVER, port=PORTS["sailover"])], user),
            "nginx": self.spawn(["nginx", "-e", "/dev/null", "-c", self.write("ng.conf", NGINX, port=PORTS["nginx"])], user),
            "haproxy": self.spawn(["haproxy", "-db", "-f", self.write("ha.cfg", HAPROXY, port=PORTS["haproxy"])], user),
        }
        for name in self.started:
            wait_port(PORTS[name])
        time.sleep(1.0)

    def stop(self):
        for p in list(self.started.values()) + [self.backend]:
            p.send_signal(signal.SIGTERM)
        for p in list(self.started.values()) + [self.backend]:
            try:
                p.wait(5)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        self.started = {}

    def wrk(self, port, connections, close, seconds):
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{port}/"]
        if close:
            argv += ["-H", "Connection: close"]
        out = subprocess.run(argv, capture_output=True, text=True).stdout
        if "Socket errors" in out or "Non-2xx" in out:
            sys.exit(f"port {port} failed requests, so its figure would say nothing:\n{out}")
        return int(re.search(r"(\d+) requests in", out).group(1))

    def bulk(self, port, parallel):
        """Downloads of 100 MB each, `parallel` at once, bounded in bytes."""
        each = 100_000_000 if parallel <= 8 else max(2_000_000, 3_000_000_000 // parallel)
        import selectors
        sel = selectors.DefaultSelector()
        left = 0
        for _ in range(parallel):
            s = socket.create_connection(("127.0.0.1", port))
            s.sendall(f"GET /big HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{each - 1}\r\nConnection: close\r\n\r\n".encode())
            s.setblocking(False)
            sel.register(s, selectors.EVENT_READ)
            left += 1
        total = 0
        buffer = bytearray(1 << 20)
        while left:
            for key, _ in sel.select(10):
                try:
                    n = key.fileobj.recv_into(buffer)
                except BlockingIOError:
                    continue
                total += n
                if n == 0:
                    sel.unregister(key.fileobj)
                    key.fileobj.close()
                    left -= 1
        if total < parallel * each:
            sys.exit(f"port {port} sent {total} bytes instead of at least {parallel * each}")
        return total

    def round(self, kind, name, size):
        before = cpu(self.started[name].pid)
        if kind == "bulk":
            # One download is over too soon to be measured alone.
            work = sum(self.bulk(PORTS[name], size) for _ in range(10 if size == 1 else 1)) / 1e9
        else:
            work = self.wrk(PORTS[name], size, kind == "close", self.args.seconds)
        return (cpu(self.started[name].pid) - before) / work

    def idle(self, name, count):
        """Private memory of all its processes for each of `count` connections that carried one small exchange."""
        sockets = []
        for _ in range(count):
            s = socket.create_connection(("127.0.0.1", PORTS[name]))
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            sockets.append(s)
        for s in sockets:
            s.recv(4096)
        time.sleep(0.5)
        held = private(self.started[name].pid)
        for s in sockets:
            s.close()
        time.sleep(1)
        return held / count

    def compare(self, kind, size):
        figures = {name: [] for name in self.started}
        for i in range(self.args.rounds):
            names = list(self.started)
            names = names[i % len(names):] + names[:i % len(names)]
            for name in names:
                figures[name].append(self.idle(name, size) if kind == "idle" else self.round(kind, name, size))
        return figures


def parse(argv):
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--seconds", type=int, default=3)
    p.add_argument("--binary", default=os.path.join(ROOT, "target/release/sailover"))
    p.add_argument("--only", default="")
    p.add_argument("--out", default="")
    return p.parse_args(argv)


def main():
    args = parse(None)
    results = {}
    works = [("keepalive", 64), ("keepalive", 512), ("close", 64), ("idle", 4000), ("bulk", 1), ("bulk", 64), ("bulk", 600)]
    works = [w for w in works if not args.only or args.only in f"{w[0]}-{w[1]}"]
    bench = Bench(args)
    try:
        for unprivileged in (False, True):
            todo = [w for w in works if (w[0] == "bulk") == unprivileged]
            if not todo:
                continue
            bench.start(unprivileged)
            for kind, size in todo:
                figures = bench.compare(kind, size)
                unit, scale = {"bulk": ("ms CPU per GB", 1e3), "idle": ("bytes each", 1)}.get(kind, ("us CPU per request", 1e6))
                better = min(("nginx", "haproxy"), key=lambda n: statistics.median(figures[n]))
                ratio = median_interval([s / o for s, o in zip(figures["sailover"], figures[better])])
                results[f"{kind}-{size}"] = {
                    "unit": unit, "rounds": {n: [round(v * scale, 3) for v in vs] for n, vs in figures.items()},
                    "median": {n: round(statistics.median(vs) * scale, 2) for n, vs in figures.items()},
                    "better_peer": better, "ratio": [round(x, 3) for x in ratio]}
                r = results[f"{kind}-{size}"]
                print(f"{kind}-{size:<6} {unit:20}", "  ".join(f"{n} {v:8.2f}" for n, v in r["median"].items()),
                      f"  ratio to {better} {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]", flush=True)
            bench.stop()
    finally:
        if bench.started:
            bench.stop()
        shutil.rmtree(bench.d, ignore_errors=True)
    if args.out:
        report.write(args.out, args.binary, results, args.rounds)
        print(f"written: {args.out}/README.md, results.json, chart.svg")


if __name__ == "__main__":
    main()
