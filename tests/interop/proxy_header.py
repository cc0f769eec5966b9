#!/usr/bin/env python3
"""PROXY headers, versions 1 and 2, against HAProxy and nginx on either side of sailover. Run by `make interop`."""
import re
import socket

import rig

CLIENT = "127.0.0.77"


def listens(port):
    def check():
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    rig.eventually(f"something listens on {port}", 10, check)


def ask(port, source_port=0):
    """One request from the client's own address: that address, and the answer."""
    with socket.create_connection(("127.0.0.1", port), 5, source_address=(CLIENT, source_port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := client.recv(65536):
            answer += part
        return "%s:%d" % client.getsockname(), answer


def hello(client):
    """A backend that wants a request line first, and nothing before it."""
    request = client.recv(65536)
    if not request:
        return  # Somebody who only looked whether there is anybody.
    assert request.startswith(b"GET / "), request
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


def sailover(r, name, port, backend, pool, listener):
    config = r.write(f"{name}.yaml", (
        f"pools: {{ p: {{ cells: {{ c: [ 127.0.0.1:{backend} ] }}, {pool} }} }}\n"
        f"listeners: [ {{ name: l, bind: 127.0.0.1:{port}, tcp: p, {listener} }} ]\n"
        f"admin: {{ socket: {r.directory}/{name}.sock }}\nlog: {{ access: stdout }}\n"))
    r.run(name, rig.BINARY, "run", "--config", config)


def before(r):
    """HAProxy and nginx tell sailover who the client is."""
    server = rig.backend(hello)
    inner = rig.free_port()
    sailover(r, "inner", inner, server, "connect: { race: off }",
             "proxy_protocol: { accept_from: [ 127.0.0.0/8 ] }")
    ports = {name: rig.free_port() for name in ("haproxy-v1", "haproxy-v2", "nginx-v1")}
    r.run("haproxy", "haproxy", "-db", "-f", r.write("haproxy.cfg", (
        "defaults\n mode tcp\n timeout connect 3s\n timeout client 10s\n timeout server 10s\n"
        f"listen v1\n bind 127.0.0.1:{ports['haproxy-v1']}\n server s 127.0.0.1:{inner} send-proxy\n"
        f"listen v2\n bind 127.0.0.1:{ports['haproxy-v2']}\n server s 127.0.0.1:{inner} send-proxy-v2\n")))
    r.run("nginx", "nginx", "-e", f"{r.directory}/nginx-error.log", "-c", r.write("nginx.conf", (
        f"daemon off; pid {r.directory}/nginx.pid;\n"
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nevents {}\n"
        f"stream {{ server {{ listen 127.0.0.1:{ports['nginx-v1']}; proxy_pass 127.0.0.1:{inner}; proxy_protocol on; }} }}\n")))
    for name, port in ports.items():
        listens(port)
        client, answer = ask(port)
        assert answer.endswith(b"\r\n\r\nhello"), (name, answer)
        rig.eventually(f"{name}: the log names {client}", 5, lambda: f'"client":"{client}"' in r.log("inner"))
        print(f"interop: {name} -> sailover: the client is {client}")


def behind(r):
    """sailover tells HAProxy and nginx who the client is."""
    def forwarded(client):
        request = client.recv(65536).decode()
        found = re.search(r"(?i)^x-forwarded-for: (.*)\r$", request, re.M)
        body = found.group(1) if found else "nobody"
        client.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    server = rig.backend(forwarded)
    haproxy, nginx = rig.free_port(), rig.free_port()
    r.run("haproxy-behind", "haproxy", "-db", "-f", r.write("behind.cfg", (
        "defaults\n mode http\n option forwardfor\n timeout connect 3s\n timeout client 10s\n timeout server 10s\n"
        f"listen l\n bind 127.0.0.1:{haproxy} accept-proxy\n server s 127.0.0.1:{server}\n")))
    r.run("nginx-behind", "nginx", "-e", f"{r.directory}/behind-error.log", "-c", r.write("behind.conf", (
        f"daemon off; pid {r.directory}/behind.pid;\nevents {{}}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{nginx} proxy_protocol; "
        'location / { return 200 "$proxy_protocol_addr"; } } }\n')))
    for version in ("v1", "v2"):
        for name, peer in (("haproxy", haproxy), ("nginx", nginx)):
            listens(peer)
            port = rig.free_port()
            # The probe sends a header too: a peer that insists on one would otherwise find it wrong.
            sailover(r, f"{name}-{version}", port, peer,
                     f"send_proxy: {version}, probe: {{ http: {{ path: / }}, interval: 200ms }}", "")
            listens(port)
            rig.eventually("the probe finds it well", 5, lambda: '"to":"up"' in r.log(f"{name}-{version}"))
            client, answer = ask(port)
            assert answer.endswith(b"\r\n\r\n" + CLIENT.encode()), (name, version, answer)
            print(f"interop: sailover -> {name}, {version}: the client is {client}")


def main():
    with rig.Rig() as r:
        before(r)
        behind(r)


if __name__ == "__main__":
    main()
