#!/usr/bin/env python3
"""Writes grafana-dashboard.json beside this file: a board is long and repeats itself, so its source is short."""
import json
import os

POOL = 'instance=~"$instance",pool=~"$pool"'
EDGE = 'instance=~"$instance"'


def panel(title, unit, targets, width=12, kind="timeseries", **options):
    return {"title": title, "kind": kind, "unit": unit, "targets": targets, "width": width, **options}


PANELS = [
    panel("Backends not up", "short", [(f'sum(sailover_backend_state{{{POOL},state!="up"}}) or vector(0)', "not up")], 4, "stat"),
    panel("Clients without a backend", "cps", [(f'sum(rate(sailover_pool_refused_total{{{POOL},reason="unreachable"}}[$__rate_interval]))', "refused")], 4, "stat"),
    panel("Connections", "short", [(f"sum(sailover_connections{{{EDGE}}})", "now")], 4, "stat"),
    panel("Last reload refused at", "short", [(f"count(sailover_config_last_reload_successful{{{EDGE}}} == 0) or vector(0)", "edges")], 4, "stat"),
    panel("Different files live", "short", [(f"count(count by (hash) (sailover_config_info{{{EDGE}}}))", "files")], 4, "stat"),
    panel("Certificates end in", "s", [("min(sailover_certificate_expiry_timestamp_seconds) - time()", "the first")], 4, "stat"),
    panel("Share of each cell", "percentunit", [(f"avg by (pool, cell) (sailover_cell_share_ratio{{{POOL}}})", "{{pool}} / {{cell}}")], 12, stack=True),
    panel("State of each backend: 3 up, 2 returning, 1 suspect, 0 down or unknown", "short", [
        (f'max by (pool, cell, backend) (3 * sailover_backend_state{{{POOL},state="up"}} + on (instance, pool, cell, backend) 2 * sailover_backend_state{{{POOL},state="returning"}}'
         f' + on (instance, pool, cell, backend) sailover_backend_state{{{POOL},state="suspect"}})', "{{cell}} {{backend}}")], 12),
    panel("New connections, by end", "cps", [(f"sum by (end) (rate(sailover_connections_total{{{EDGE}}}[$__rate_interval])) > 0", "{{end}}")]),
    panel("Attempts, by cell and result", "cps", [(f"sum by (cell, result) (rate(sailover_attempts_total{{{POOL}}}[$__rate_interval])) > 0", "{{cell}} {{result}}")]),
    panel("Handshakes, 50 % and 99 %", "s", [
        (f"histogram_quantile(0.5, sum by (le, cell) (rate(sailover_handshake_seconds_bucket{{{POOL}}}[$__rate_interval])))", "{{cell}} 50 %"),
        (f"histogram_quantile(0.99, sum by (le, cell) (rate(sailover_handshake_seconds_bucket{{{POOL}}}[$__rate_interval])))", "{{cell}} 99 %")]),
    panel("First byte, 50 % and 99 %", "s", [
        (f"histogram_quantile(0.5, sum by (le, cell) (rate(sailover_first_byte_seconds_bucket{{{POOL}}}[$__rate_interval])))", "{{cell}} 50 %"),
        (f"histogram_quantile(0.99, sum by (le, cell) (rate(sailover_first_byte_seconds_bucket{{{POOL}}}[$__rate_interval])))", "{{cell}} 99 %")]),
    panel("Races: begun, won, without budget", "cps", [
        (f"sum(rate(sailover_races_total{{{POOL}}}[$__rate_interval]))", "begun"),
        (f'sum(rate(sailover_races_total{{{POOL},won="true"}}[$__rate_interval]))', "won by the later"),
        (f"sum(rate(sailover_budget_refused_total{{{POOL}}}[$__rate_interval]))", "no budget")]),
    panel("Transitions", "short", [(f"sum by (cell, backend, to) (increase(sailover_transitions_total{{{POOL}}}[$__rate_interval])) > 0", "{{cell}} {{backend}} -> {{to}}")]),
    panel("Bytes", "Bps", [(f"sum by (direction) (rate(sailover_bytes_total{{{EDGE}}}[$__rate_interval]))", "{{direction}}")]),
    panel("Workers busy", "percentunit", [(f"sailover_worker_busy_ratio{{{EDGE}}}", "{{instance}} {{worker}}")]),
    panel("Late: timers of workers, probes (99 %)", "s", [
        (f"histogram_quantile(0.99, sum by (le) (rate(sailover_worker_lag_seconds_bucket{{{EDGE}}}[$__rate_interval])))", "workers"),
        (f"histogram_quantile(0.99, sum by (le) (rate(sailover_probe_late_seconds_bucket{{{EDGE}}}[$__rate_interval])))", "probes")]),
    panel("Troubles of the edges themselves", "cps", [
        (f"sum by (errno) (rate(sailover_local_errors_total{{{EDGE}}}[$__rate_interval])) > 0", "{{errno}}"),
        (f"sum by (reason) (rate(sailover_accept_paused_total{{{EDGE}}}[$__rate_interval])) > 0", "paused: {{reason}}"),
        (f"sum(rate(sailover_log_dropped_total{{{EDGE}}}[$__rate_interval])) > 0", "log lines dropped")]),
]


def variable(name, label):
    query = f"label_values(sailover_cell_share_ratio, {label})"
    return {"name": name, "type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"}, "query": query,
            "definition": query, "includeAll": True, "multi": True, "allValue": ".*", "refresh": 2, "sort": 1,
            "current": {"text": "All", "value": "$__all"}}


def board():
    panels, x, y = [], 0, 0
    for number, p in enumerate(PANELS, 1):
        height = 4 if p["kind"] == "stat" else 8
        if x + p["width"] > 24:
            x, y = 0, y + (4 if panels[-1]["type"] == "stat" else 8)
        custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if p.get("stack") else {}
        panels.append({
            "id": number, "title": p["title"], "type": p["kind"], "gridPos": {"x": x, "y": y, "w": p["width"], "h": height},
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "fieldConfig": {"defaults": {"unit": p["unit"], "custom": custom, "min": 0} if p["kind"] != "stat" else {"unit": p["unit"]}, "overrides": []},
            "targets": [{"refId": chr(65 + i), "expr": expr, "legendFormat": legend} for i, (expr, legend) in enumerate(p["targets"])]})
        x += p["width"]
    return {"title": "sailover", "uid": "sailover", "schemaVersion": 38, "version": 1, "editable": True, "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"}, "tags": ["sailover"], "timezone": "", "panels": panels,
            "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, variable("instance", "instance"), variable("pool", "pool")]}}


if __name__ == "__main__":
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "grafana-dashboard.json"), "w") as f:
        json.dump(board(), f, indent=1)
        f.write("\n")
