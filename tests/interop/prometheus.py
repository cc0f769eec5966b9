#!/usr/bin/env python3
"""sailover's metrics as a real Prometheus sees them: scraped without an error, every rule and every query of the board
evaluated, an alert that fires. Run by `make interop`."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.path.join(ROOT, "target/release/sailover")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def backend():
    """A server that answers every connection with a word; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            client, _ = listener.accept()
            try:
                client.sendall(b"hello\n")
            except OSError:
                pass  # A probe closes by a reset.
            client.close()
    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def eventually(what, within, check):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            found = check()
            if found:
                return found
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"interop: not within {within} s: {what}")


def main():
    directory = tempfile.mkdtemp(prefix="sailover-interop-")
    children = []
    try:
        front, admin, web, dead = free_port(), free_port(), free_port(), free_port()
        with open(f"{directory}/sailover.yaml", "w") as f:
            f.write(f"pools: {{ shop: {{ cells: {{ a: [ 127.0.0.1:{backend()} ], b: [ 127.0.0.1:{dead} ] }} }} }}\n"
                    f"listeners: [ {{ name: front, bind: 127.0.0.1:{front}, tcp: shop }} ]\n"
                    f"admin: {{ socket: {directory}/admin.sock, http: 127.0.0.1:{admin} }}\n")
        with open(f"{directory}/prometheus.yml", "w") as f:
            f.write("global: { scrape_interval: 1s, evaluation_interval: 1s }\n"
                    f"rule_files: [ {ROOT}/packaging/prometheus-rules.yaml ]\n"
                    f"scrape_configs: [ {{ job_name: sailover, static_configs: [ {{ targets: [ '127.0.0.1:{admin}' ] }} ] }} ]\n")
        log = open(f"{directory}/log", "wb")
        children.append(subprocess.Popen([BINARY, "run", "--config", f"{directory}/sailover.yaml"], stdout=log, stderr=log))
        children.append(subprocess.Popen(
            ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address=127.0.0.1:{web}"], stdout=log, stderr=log))

        def api(path, **query):
            url = f"http://127.0.0.1:{web}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]

        def query(expr):
            return api("query", query=expr)["result"]

        eventually("Prometheus scrapes", 30, lambda: query('up{job="sailover"} == 1'))
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", front), 5) as client:
                assert client.recv(16) == b"hello\n"
        eventually("the connections are counted", 10, lambda: query("sum(sailover_connections_total) >= 30"))
        eventually("the dead cell's alert fires", 40,
                   lambda: query('ALERTS{alertname="SailoverCellDown",alertstate="firing",cell="b"}'))

        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=5) as answer:
            text = answer.read()
        families = set(re.findall(rb"^# TYPE (\S+)", text, re.M))
        known = {name.encode() for name in api("metadata")}
        missing = {name for name in families if name not in known and name + b"_bucket" not in known}
        assert len(families) > 25 and not missing, f"Prometheus does not know {missing}"
        judged = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
        sys.stdout.write(judged.stdout.decode() + judged.stderr.decode())
        assert judged.returncode == 0, "promtool check metrics"

        target = api("targets")["activeTargets"][0]
        assert target["health"] == "up" and not target["lastError"], target
        bad = [rule for group in api("rules")["groups"] for rule in group["rules"] if rule["health"] != "ok"]
        assert not bad, bad
        with open(f"{ROOT}/packaging/grafana-dashboard.json") as f:
            board = json.load(f)
        queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
        for expr in queries:
            expr = expr.replace("$instance", ".*").replace("$pool", ".*").replace("$__rate_interval", "5s")
            query(expr)
        named = set(re.findall(r"sailover_[a-z_]+", " ".join(queries)))
        with open(f"{ROOT}/packaging/prometheus-rules.yaml") as f:
            named |= set(re.findall(r"sailover_[a-z_]+", f.read()))
        unknown = {name for name in named if re.sub(r"_(bucket|sum|count)$", "", name).encode() not in families}
        assert not unknown, f"rules or board ask for what sailover does not tell: {unknown}"
        print(f"interop: Prometheus knows {len(families)} families, {len(queries)} queries of the board and all rules evaluate, "
              "the alert of the dead cell fires")
    except BaseException:
        with open(f"{directory}/log", errors="replace") as f:
            sys.stderr.write("".join(f.readlines()[-30:]))
        raise
    finally:
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
