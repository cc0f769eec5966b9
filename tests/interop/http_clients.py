#!/usr/bin/env python3
"""HTTP with clients and servers that others wrote: curl, h2load, a WebSocket library, gRPC's C core, HAProxy, nginx."""
import asyncio
import re
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import websockets

from rig import BINARY, Rig, backend, eventually, free_port


def http_backend(client):
    """HTTP/1.1 by hand: says who it was told the client is."""
    rest = b""
    while True:
        while b"\r\n\r\n" not in rest:
            part = client.recv(65536)
            if not part:
                return
            rest += part
        head, rest = rest.split(b"\r\n\r\n", 1)
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        need = int(length.group(1)) if length else 0
        while len(rest) < need:
            rest += client.recv(65536)
        rest = rest[need:]
        who = re.search(rb"(?i)\r\nx-forwarded-for: ([^\r]*)", head)
        body = b"client " + (who.group(1) if who else b"-")
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Echo(grpc.GenericRpcHandler):
    """Bytes in, bytes out, in the four shapes that a call can have."""

    def service(self, call):
        def unary(request, context):
            context.set_trailing_metadata((("x-sum", str(len(request))),))
            if request == b"slow":
                time.sleep(5)
            if request == b"sick":
                context.abort(grpc.StatusCode.UNAVAILABLE, "sick")
            return request

        def many(request, context):
            for i in range(int(request)):
                yield str(i).encode()

        def gather(requests, context):
            return b"".join(requests)

        def both(requests, context):
            yield from requests

        handlers = {
            "/e.Echo/Unary": grpc.unary_unary_rpc_method_handler(unary),
            "/e.Echo/Many": grpc.unary_stream_rpc_method_handler(many),
            "/e.Echo/Gather": grpc.stream_unary_rpc_method_handler(gather),
            "/e.Echo/Both": grpc.stream_stream_rpc_method_handler(both),
        }
        return handlers.get(call.method)


def check_grpc(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        unary = channel.unary_unary("/e.Echo/Unary")
        answer, call = unary.with_call(b"x" * 100_000, timeout=10)
        assert answer == b"x" * 100_000
        assert dict(call.trailing_metadata())["x-sum"] == "100000"
        assert [int(x) for x in channel.unary_stream("/e.Echo/Many")(b"500", timeout=10)] == list(range(500))
        assert channel.stream_unary("/e.Echo/Gather")(iter([b"a", b"b", b"c"]), timeout=10) == b"abc"
        both = channel.stream_stream("/e.Echo/Both")(iter([str(i).encode() for i in range(100)]), timeout=10)
        assert [int(x) for x in both] == list(range(100))
        for request, wanted in ((b"slow", grpc.StatusCode.DEADLINE_EXCEEDED), (b"sick", grpc.StatusCode.UNAVAILABLE)):
            try:
                unary(request, timeout=0.5)
                raise AssertionError(f"{request} was answered")
            except grpc.RpcError as error:
                assert error.code() == wanted, (request, error.code())
        call = channel.unary_stream("/e.Echo/Many")(b"100000000", timeout=30)
        next(call)
        call.cancel()
        assert unary(b"still there", timeout=10) == b"still there"


async def websocket_server(port, ready, stop):
    async def echo(socket, *_):
        async for message in socket:
            await socket.send(message)

    async with websockets.serve(echo, "127.0.0.1", port, max_size=None):
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.05)


async def check_websocket(port):
    async with websockets.connect(f"ws://127.0.0.1:{port}/ws", max_size=None) as socket:
        for message in ("hello", b"\0" * 300_000, "x" * 70_000):
            await socket.send(message)
            assert await socket.recv() == message
        await (await socket.ping())


def main():
    with Rig() as rig:
        plain, ws, rpc = backend(http_backend), free_port(), free_port()
        listeners = {name: free_port() for name in ("web", "behind", "front", "nginx")}
        server = grpc.server(futures.ThreadPoolExecutor(8), (Echo(),))
        server.add_insecure_port(f"127.0.0.1:{rpc}")
        server.start()
        ready, stop = threading.Event(), threading.Event()
        threading.Thread(target=lambda: asyncio.run(websocket_server(ws, ready, stop)), daemon=True).start()
        ready.wait(10)
        rig.run("nginx", "nginx", "-e", f"{rig.directory}/nginx-error.log", "-c", rig.write("nginx.conf", f"""
            daemon off; pid {rig.directory}/nginx.pid; events {{ }}
            http {{ access_log off; server {{ listen 127.0.0.1:{listeners['nginx']} proxy_protocol;
              location / {{ return 200 "client $proxy_protocol_addr"; }} }} }}"""))
        rig.run("haproxy", "haproxy", "-db", "-f", rig.write("haproxy.cfg", f"""
            defaults
              mode http
              timeout connect 3s
              timeout client 10s
              timeout server 10s
            frontend f
              bind 127.0.0.1:{listeners['front']}
              default_backend b
            backend b
              server s 127.0.0.1:{listeners['behind']} send-proxy-v2\n"""))
        rig.run("sailover", BINARY, "run", "--config", rig.write("sailover.yaml", f"""
            pools:
              plain: {{ cells: {{ a: [ 127.0.0.1:{plain} ] }} }}
              ws: {{ cells: {{ a: [ 127.0.0.1:{ws} ] }}, probe: off }}
              rpc: {{ cells: {{ a: [ 127.0.0.1:{rpc} ] }}, http: {{ version: 2 }} }}
              nginx: {{ cells: {{ a: [ 127.0.0.1:{listeners['nginx']} ] }}, send_proxy: v2 }}
            listeners:
              - bind: 127.0.0.1:{listeners['web']}
                http:
                  h2c: true
                  routes: [ {{ path: /ws, pool: ws }}, {{ path: /e.Echo, pool: rpc }}, {{ path: /nginx, pool: nginx }}, {{ pool: plain }} ]
              - bind: 127.0.0.1:{listeners['behind']}
                proxy_protocol: {{ accept_from: [ 127.0.0.0/8 ] }}
                http: {{ routes: [ {{ pool: plain }} ] }}
            admin: {{ socket: {rig.directory}/admin.sock }}
            """))
        web = f"http://127.0.0.1:{listeners['web']}"

        def curl(*arguments):
            return subprocess.run(["curl", "-s", "-m", "10", *arguments], capture_output=True, text=True).stdout

        eventually("curl gets an answer", 10, lambda: curl(web + "/") == "client 127.0.0.1")
        for version in ("--http1.0", "--http1.1", "--http2", "--http2-prior-knowledge"):
            for upload in ((), ("-d", "x" * 5000), ("-T", "/etc/services"), ("-H", "Transfer-Encoding: chunked", "-d", "abc")):
                if version == "--http1.0" and len(upload) > 2:
                    continue  # It has no chunks.
                answer = curl(version, *upload, web + "/a")
                # The backend by hand reads no chunks; what is behind them it would take for a request.
                if "Transfer-Encoding: chunked" not in upload:
                    assert answer == "client 127.0.0.1", (version, upload[:1], answer)
        print("curl: 1.0, 1.1, 2 by upgrade and by prior knowledge")
        for arguments in (("--h1",), ()):
            out = subprocess.run(["h2load", "-n", "20000", "-c", "20", "-m", "10", *arguments, web + "/"], capture_output=True, text=True).stdout
            assert "20000 succeeded, 0 failed" in out, out
        print("h2load: 20,000 requests in either version, none failed")
        asyncio.run(check_websocket(listeners["web"]))
        print("websockets: text, 300 kB, ping")
        for _ in range(3):
            check_grpc(listeners["web"])
        print("grpcio: unary, three kinds of streams, trailers, deadline, status, cancel")
        eventually("nginx is told the client", 5, lambda: curl(web + "/nginx") == "client 127.0.0.1")
        eventually("HAProxy's client is told on", 5, lambda: curl(f"http://127.0.0.1:{listeners['front']}/") == "client 127.0.0.1")
        print("PROXY headers: from HAProxy, to nginx")
        stop.set()
        server.stop(None)


if __name__ == "__main__":
    sys.exit(main())
