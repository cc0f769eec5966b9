//! Answers as they are passed on: by our version and our framing, early, or never whole; and what ends an exchange that stands still.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::http::{by_hand, pool, proxy, raw, read_request};
use crate::support::eventually;
use crate::support::proxy::Proxy;

/// A backend that says the same to each request, and then closes its connection or resets it.
fn says(answer: &'static str, resets: bool) -> SocketAddr {
    by_hand(move |mut stream| {
        if read_request(&mut stream).is_some() {
            stream.write_all(answer.as_bytes()).unwrap();
            if resets {
                // What is in its way is read first, or the client's kernel would throw it away.
                std::thread::park_timeout(Duration::from_millis(100));
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
    })
}

fn before(backend: SocketAddr, more: &str) -> Proxy {
    proxy(&pool("p", &[backend], &format!("probe: off, {more}")), "routes: [ { pool: p } ]", "")
}

fn ask(proxy: &Proxy) -> String {
    raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").to_ascii_lowercase()
}

#[test]
fn an_answer_has_our_version_and_says_nothing_of_the_backends_connection() {
    let old = before(says("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", false), "");
    let answer = ask(&old);
    assert!(answer.starts_with("http/1.1 200") && answer.ends_with("ok"), "{answer}");
    let empty = before(says("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", false), "");
    let answer = ask(&empty);
    assert!(answer.starts_with("http/1.1 204") && !answer.contains("content-length"), "{answer}");
    let hops = "HTTP/1.1 200 OK\r\nTE: x\r\nUpgrade: y\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok";
    let answer = ask(&before(says(hops, false), ""));
    assert!(answer.ends_with("ok"), "{answer}");
    assert!(!["\r\nte:", "\r\nupgrade:", "\r\nkeep-alive:"].iter().any(|name| answer.contains(name)), "{answer}");
}

#[test]
fn an_answer_of_another_coding_is_framed_anew_and_never_made_to_look_whole() {
    let whole = says("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nwhole", false);
    let answer = ask(&before(whole, ""));
    assert!(answer.contains("transfer-encoding: chunked") && answer.ends_with("5\r\nwhole\r\n0\r\n\r\n"), "{answer}");
    let cut = says("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhalf", true);
    let answer = ask(&before(cut, ""));
    assert!(answer.contains("transfer-encoding: chunked") && !answer.ends_with("0\r\n\r\n"), "{answer}");
    let twice =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    let answer = ask(&before(says(twice, false), ""));
    assert_eq!(answer.matches("transfer-encoding: chunked").count(), 1, "{answer}");
    let zipped = says("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nxx", false);
    assert!(ask(&before(zipped, "")).starts_with("http/1.1 502"));
}

#[test]
fn leave_to_send_a_body_costs_no_connection() {
    let backend = by_hand(|mut stream| {
        let mut head = Vec::new();
        let mut byte = [0; 1];
        while let Ok(1) = stream.read(&mut byte) {
            head.push(byte[0]);
            if head.ends_with(b"\r\n\r\n") {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
                stream.read_exact(&mut [0; 4]).unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
                head.clear();
            }
        }
    });
    let proxy = before(backend, "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    for _ in 0..2 {
        client.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").unwrap();
        let mut leave = [0; 25];
        client.read_exact(&mut leave).unwrap();
        assert_eq!(&leave, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"body").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok") {
            let mut byte = [0; 1];
            client.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        assert!(answer.starts_with("http/1.1 200") && !answer.contains("connection: close"), "{answer}");
    }
}

/// It takes no more of the body, and does not end its connection either.
#[test]
fn an_answer_that_comes_before_the_body_is_sent_comes_at_once() {
    let backend = by_hand(|mut stream| {
        socket2::SockRef::from(&stream).set_recv_buffer_size(4_096).unwrap();
        let _ = stream.read(&mut [0; 1_024]);
        std::thread::park_timeout(Duration::from_millis(500));
        stream.write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig").unwrap();
        std::thread::park_timeout(Duration::from_secs(60));
    });
    let proxy = before(backend, "timeouts: { request: 40s }");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    let mut sends = client.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let _ = sends.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 67108864\r\n\r\n");
        while sends.write_all(&[b'x'; 65_536]).is_ok() {}
    });
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    drop(client);
    drop(proxy);
    sending.join().unwrap();
}

/// A backend that takes a WebSocket and reads nothing of it; how many of its connections are open.
fn deaf() -> (SocketAddr, Arc<AtomicUsize>) {
    let open = Arc::new(AtomicUsize::new(0));
    let counts = open.clone();
    let address = by_hand(move |mut stream| {
        socket2::SockRef::from(&stream).set_recv_buffer_size(4_096).unwrap();
        if read_request(&mut stream).is_some() {
            counts.fetch_add(1, Relaxed);
            let leave = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
            stream.write_all(leave).unwrap();
            let gone = || sailover::sys::tcp_info(stream.as_fd()).unwrap().gone();
            eventually("its end", Duration::from_secs(50), || gone().then_some(()));
            counts.fetch_sub(1, Relaxed);
        }
    });
    (address, open)
}

/// Both bounds hold though the engine waits for the backend and for nothing else.
#[test]
fn a_stream_that_its_backend_does_not_read_ends_with_its_client_or_its_time() {
    let (address, open) = deaf();
    for leaves in [true, false] {
        let idle = if leaves { "1h" } else { "2s" };
        let proxy = before(address, &format!("timeouts: {{ idle: {idle} }}"));
        let mut client = TcpStream::connect(proxy.address(0)).unwrap();
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            .unwrap();
        client.read_exact(&mut [0; 12]).unwrap();
        client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        while client.write_all(&[b'x'; 65_536]).is_ok() {}
        assert_eq!(open.load(Relaxed), 1);
        if leaves {
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
        } else {
            std::mem::forget(client);
        }
        eventually("the backend's connection ends", Duration::from_secs(25), || {
            (open.load(Relaxed) == 0).then_some(())
        });
    }
}

/// It was told that the connection closes, and sends no body any more.
#[test]
fn who_sends_nothing_more_after_an_early_answer_is_not_waited_for() {
    let backend = by_hand(|mut stream| {
        let _ = stream.read(&mut [0; 4_096]);
        stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno").unwrap();
        let _ = stream.read(&mut [0; 4_096]);
    });
    let proxy = before(backend, "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n").unwrap();
    let begin = Instant::now();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn a_redirect_to_another_scheme_leaves_the_port_behind() {
    let routes = "routes: [ { path: /s, redirect: { scheme: https } }, { redirect: { path: /new } } ]";
    let proxy = proxy(&pool("p", &["127.0.0.1:1".parse().unwrap()], "probe: off"), routes, "");
    for (host, secure, same) in [
        ("a.example:8080", "https://a.example/s", "http://a.example:8080/new"),
        ("[::1]:8080", "https://[::1]/s", "http://[::1]:8080/new"),
        ("a.example", "https://a.example/s", "http://a.example/new"),
    ] {
        for (path, wanted) in [("/s", secure), ("/t", same)] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            let answer = raw(proxy.address(0), request.as_bytes());
            assert!(answer.to_ascii_lowercase().contains(&format!("location: {wanted}\r\n")), "{answer}");
        }
    }
}
