#!/usr/bin/env python3
"""Own memory of sailover, nginx stream and HAProxy for each of 4,000 idle connections, side by side.

The connections carry one small exchange each and then stay. The figure is the growth of private memory of all
processes of a contender, after a first round of connections has brought tables and pools to their size.
"""
import os, socket, sys, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.argv = [sys.argv[0]]
import run

COUNT = 4000


def private(pid):
    total = 0
    for p in run.tree(pid):
        with open(f"/proc/{p}/smaps_rollup") as f:
            total += sum(int(line.split()[1]) for line in f if line.startswith("Private"))
    return total * 1024


def open_idle(port):
    sockets = []
    for _ in range(COUNT):
        s = socket.create_connection(("127.0.0.1", port))
        s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        sockets.append(s)
    for s in sockets:
        s.recv(4096)
    return sockets


def main():
    bench = run.Bench(run.parse([]))
    try:
        bench.start()
        for name, process in bench.started.items():
            for s in open_idle(run.PORTS[name]):
                s.close()
            time.sleep(2)
            figures = []
            for _ in range(3):
                before = private(process.pid)
                sockets = open_idle(run.PORTS[name])
                time.sleep(1)
                held = private(process.pid)
                for s in sockets:
                    s.close()
                time.sleep(2)
                figures.append((held, before))
            first = figures[0]
            print(f"{name:9} {COUNT} idle connections: in all {first[0] >> 10} KB, "
                  f"{first[0] / COUNT:.0f} bytes each with everything, rounds {[f[0] >> 10 for f in figures]} KB", flush=True)
    finally:
        if bench.started:
            bench.stop()


main()
