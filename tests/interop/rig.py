"""What the interop tests share: free ports, toy backends, children that end with the test."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.path.join(ROOT, "target/release/sailover")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def backend(answer):
    """A server that calls `answer` with each connection; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def one(client):
        try:
            answer(client)
        except OSError:
            pass  # A probe closes by a reset.
        client.close()

    def serve():
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()
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
        time.sleep(0.05)
    sys.exit(f"interop: not within {within} s: {what}")


class Rig:
    """A directory and the programs that run in it."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="sailover-interop-")
        self.children = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            for name in sorted(os.listdir(self.directory)):
                if name.endswith(".log"):
                    with open(f"{self.directory}/{name}", errors="replace") as f:
                        sys.stderr.write(f"--- {name}\n" + "".join(f.readlines()[-20:]))
        for child in self.children:
            child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, name, text):
        path = f"{self.directory}/{name}"
        with open(path, "w") as f:
            f.write(text)
        return path

    def run(self, name, *argv):
        log = open(f"{self.directory}/{name}.log", "wb")
        child = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.children.append(child)
        return child

    def log(self, name):
        with open(f"{self.directory}/{name}.log", errors="replace") as f:
            return f.read()
