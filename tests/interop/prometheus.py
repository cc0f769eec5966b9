#!/usr/bin/env python3
"""sailover's metrics as a real Prometheus sees them: scraped without an error, every rule and every query of the board
evaluated, an alert that fires. Run by `make interop`."""
import json
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request

import rig


def hello(client):
    client.sendall(b"hello\n")


def main():
    with rig.Rig() as r:
        front, admin, web, dead = (rig.free_port() for _ in range(4))
        r.run("sailover", rig.BINARY, "run", "--config", r.write("sailover.yaml", (
            f"pools: {{ shop: {{ cells: {{ a: [ 127.0.0.1:{rig.backend(hello)} ], b: [ 127.0.0.1:{dead} ] }} }} }}\n"
            f"listeners: [ {{ name: front, bind: 127.0.0.1:{front}, tcp: shop }} ]\n"
            f"admin: {{ socket: {r.directory}/admin.sock, http: 127.0.0.1:{admin} }}\n")))
        r.run("prometheus", "prometheus", "--config.file=" + r.write("prometheus.yml", (
            "global: { scrape_interval: 1s, evaluation_interval: 1s }\n"
            f"rule_files: [ {rig.ROOT}/packaging/prometheus-rules.yaml ]\n"
            f"scrape_configs: [ {{ job_name: sailover, static_configs: [ {{ targets: [ '127.0.0.1:{admin}' ] }} ] }} ]\n")),
            f"--storage.tsdb.path={r.directory}/data", f"--web.listen-address=127.0.0.1:{web}")

        def api(path, **query):
            url = f"http://127.0.0.1:{web}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]

        def query(expr):
            return api("query", query=expr)["result"]

        rig.eventually("Prometheus scrapes", 30, lambda: query('up{job="sailover"} == 1'))
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", front), 5) as client:
                assert client.recv(16) == b"hello\n"
        rig.eventually("the connections are counted", 10, lambda: query("sum(sailover_connections_total) >= 30"))
        rig.eventually("the dead cell's alert fires", 40,
                       lambda: query('ALERTS{alertname="SailoverCellDown",alertstate="firing",cell="b"}'))

        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=5) as answer:
            text = answer.read()
        families = set(re.findall(rb"^# TYPE (\S+)", text, re.M))
        known = {name.encode() for name in api("metadata")}
        missing = {name for name in families if name not in known}
        assert len(families) > 25 and not missing, f"Prometheus does not know {missing}"
        judged = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
        sys.stdout.write(judged.stdout.decode() + judged.stderr.decode())
        assert judged.returncode == 0, "promtool check metrics"

        target = api("targets")["activeTargets"][0]
        assert target["health"] == "up" and not target["lastError"], target
        bad = [rule for group in api("rules")["groups"] for rule in group["rules"] if rule["health"] != "ok"]
        assert not bad, bad
        with open(f"{rig.ROOT}/packaging/grafana-dashboard.json") as f:
            board = json.load(f)
        queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
        for expr in queries:
            query(expr.replace("$instance", ".*").replace("$pool", ".*").replace("$__rate_interval", "5s"))
        named = set(re.findall(r"(?:sailover|process)_[a-z_]+", " ".join(queries)))
        with open(f"{rig.ROOT}/packaging/prometheus-rules.yaml") as f:
            named |= set(re.findall(r"sailover_[a-z_]+", f.read()))
        unknown = {name for name in named if re.sub(r"_(bucket|sum|count)$", "", name).encode() not in families}
        assert not unknown, f"rules or board ask for what sailover does not tell: {unknown}"
        print(f"interop: Prometheus knows {len(families)} families, {len(queries)} queries of the board and all rules evaluate, "
              "the alert of the dead cell fires")


if __name__ == "__main__":
    main()
